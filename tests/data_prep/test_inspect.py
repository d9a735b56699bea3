from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from data_prep.inspect import SHOWN_TOKENS
from data_prep.shards import Dataset, open_dataset

Prep = Callable[..., Result]
DOCUMENTS = [f"document {n} " + "word " * n for n in range(60)]


@pytest.fixture
def dataset(prep: Prep, tmp_path: Path) -> Dataset:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    arguments = ["--out", tmp_path / "out", "--tokenizer-kind", "bytes", "--validation-fraction", "0.1"]
    assert prep("build", tmp_path / "a.jsonl", *arguments).exit_code == 0
    return open_dataset(tmp_path / "out")


def test_the_json_tells_totals_lengths_samples_and_common_tokens(prep: Prep, dataset: Dataset) -> None:
    found = json.loads(prep("inspect", dataset.directory, "--documents", 5, "--json").stdout)
    assert found["fingerprint"] == dataset.fingerprint
    for name, shown in found["splits"].items():
        split = dataset.split(name)
        assert (shown["documents"], shown["tokens"]) == (split.documents, split.tokens)
        lengths = sorted(split.document_lengths().tolist())
        assert (shown["tokens_per_document"]["0%"], shown["tokens_per_document"]["100%"]) == (lengths[0], lengths[-1])
        counts = Counter(split.read(0, split.tokens).tolist())
        top = shown["common_tokens"][0]
        assert counts[top["id"]] == max(counts.values())
        assert top["share"] == pytest.approx(counts[top["id"]] / split.tokens)
        assert len(shown["samples"]) == min(5, split.documents)
        for sample in shown["samples"]:
            whole = sample["begins"].removesuffix("<|endoftext|>")
            assert any(text.startswith(whole) for text in DOCUMENTS)
            assert sample["begins"].endswith("<|endoftext|>") == (sample["tokens"] <= SHOWN_TOKENS)


def test_the_text_marks_where_documents_begin_and_end(prep: Prep, dataset: Dataset) -> None:
    result = prep("inspect", dataset.directory, "--documents", 2)
    assert result.exit_code == 0
    for name in ("train", "validation"):
        assert result.stdout.count(f"--- {name} document ") == 2
    assert prep("inspect", dataset.directory, "--documents", 2).stdout == result.stdout
    assert prep("inspect", dataset.directory, "--documents", 2, "--seed", 1).stdout != result.stdout


def test_an_empty_split_and_no_documents_can_be_looked_at(prep: Prep, dataset: Dataset, tmp_path: Path) -> None:
    arguments = ["--tokenizer-kind", "bytes", "--validation-fraction", "0"]
    prep("build", tmp_path / "a.jsonl", "--out", tmp_path / "all", *arguments)
    assert "validation: 0 documents, 0 tokens in 0 files" in prep("inspect", tmp_path / "all").stdout
    assert "---" not in prep("inspect", dataset.directory, "--documents", 0).stdout
