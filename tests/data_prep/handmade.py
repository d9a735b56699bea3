"""Datasets made by hand, without the pipeline."""

from __future__ import annotations

from pathlib import Path

from data_prep.settings import TokenizerSettings
from data_prep.shards.manifest import make_manifest, save_manifest
from data_prep.shards.tokens import ShardRecord
from data_prep.tokenizers.tokenizer import Tokenizer
from data_prep.tokenizers.training import train_tokenizer

BYTES = train_tokenizer(iter([]), TokenizerSettings("bytes"))


def finish_dataset(directory: Path, tokenizer: Tokenizer, records: dict[str, list[ShardRecord]]) -> None:
    """Make finished shards a dataset."""
    tokenizer.save(directory / "tokenizer.json")
    manifest = make_manifest(
        tokenizer,
        records,
        split_rule={},
        sources=[{"name": "texts", "weight": 1.0}],
        settings={},
        left_out={},
        cleaning={},
        corpus_sha256=None,
        encoders={},
    )
    save_manifest(directory, manifest)
