"""The manifest of a dataset: its contents, and what determined them. It contains no dates and no machine paths."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.files import write_atomically
from data_prep.settings import version_of
from data_prep.shards.tokens import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST,
    SPLITS,
    TOKENIZER_FILE,
    ShardRecord,
)
from data_prep.tokenizers.tokenizer import Tokenizer, token_dtype


def make_manifest(
    tokenizer: Tokenizer,
    shards: Mapping[str, Sequence[ShardRecord]],
    *,
    split_rule: dict[str, str],
    sources: list[dict[str, Any]],
    settings: dict[str, Any],
    left_out: dict[str, int],
    cleaning: dict[str, Any],
    corpus_sha256: str | None,
    encoders: dict[str, str],
) -> dict[str, Any]:
    """Return the manifest of ``shards``; ``docs/shard-format.md`` explains each entry."""
    return {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "tokenizer": {
            "file": TOKENIZER_FILE,
            "sha256": tokenizer.sha256,
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "end_of_text_id": tokenizer.end_of_text_id,
        },
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "split_rule": split_rule,
        "sources": sources,
        "settings": settings,
        "left_out": left_out,
        "cleaning": cleaning,
        "corpus_sha256": corpus_sha256,
        "splits": {split: split_totals(shards[split]) for split in SPLITS},
        "versions": {
            "kindling": version_of("kindling-lm") or "unknown",
            "tokenizers": version_of("tokenizers") or "unknown",
            "sentencepiece": version_of("sentencepiece") or "unknown",
            "python": platform.python_version(),
            "encoders": encoders,
        },
    }


def split_totals(records: Sequence[ShardRecord]) -> dict[str, Any]:
    """Return the manifest entry for a split: its totals, then its shards."""
    counted = ("tokens", "documents", "text_bytes", "words")
    totals: dict[str, Any] = {name: sum(getattr(record, name) for record in records) for name in counted}
    for name in ("lost_bytes", "unknown_tokens"):
        found = [getattr(record, name) for record in records]
        totals[name] = None if None in found else sum(found)
    return totals | {"shards": [asdict(record) for record in records]}


def save_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write ``manifest.json``, which makes ``directory`` a finished dataset."""
    write_atomically(directory / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
