from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from data_prep.shards.manifest import make_manifest, save_manifest
from data_prep.shards.tokens import ShardWriter
from tests.data_prep.handmade import BYTES


def test_the_manifest_sums_its_shards_and_describes_the_tokenizer(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train", vocab_size=BYTES.vocab_size, shard_tokens=4) as writer:
        for size in (1, 3, 2):
            writer.add(np.array([70] * size + [BYTES.end_of_text_id]), text_bytes=size, words=1, origin=f"a:{size}")
    settings = {"seed": "é"}
    manifest = make_manifest(
        BYTES,
        {"train": writer.records, "validation": []},
        split_rule={"validation_if": "never"},
        sources=[{"name": "a", "weight": 1.0}],
        settings=settings,
        left_out={"empty document": 2},
        cleaning={},
        corpus_sha256=None,
        encoders={"tokenizers 1.0": "exact"},
    )
    train = manifest["splits"]["train"]
    assert (train["tokens"], train["documents"], train["text_bytes"], train["words"]) == (9, 3, 6, 3)
    assert [(shard["tokens"], shard["first"], shard["last"]) for shard in train["shards"]] == [
        (2, "a:1", "a:1"),
        (4, "a:3", "a:3"),
        (3, "a:2", "a:2"),
    ]
    counted = ("tokens", "documents", "text_bytes", "words", "lost_bytes", "unknown_tokens")
    assert manifest["splits"]["validation"] == dict.fromkeys(counted, 0) | {"shards": []}
    assert (manifest["format"], manifest["dtype"]) == ("kindling-shards", "uint16")
    assert manifest["tokenizer"]["sha256"] == BYTES.sha256
    assert manifest["versions"]["encoders"] == {"tokenizers 1.0": "exact"}
    save_manifest(tmp_path, manifest)
    written = (tmp_path / "manifest.json").read_text(encoding="utf-8")
    assert written.endswith("}\n") and "é" in written
    assert json.loads(written) == manifest
