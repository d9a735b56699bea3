from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from data_prep.shards import counts as counting
from data_prep.shards.counts import token_counts
from data_prep.shards.inspect import SHOWN_TOKENS, UNUSED_SHOWN
from data_prep.shards.tokens import Dataset, open_dataset

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


def test_the_histogram_counts_each_document_in_its_power_of_two(prep: Prep, dataset: Dataset) -> None:
    found = json.loads(prep("inspect", dataset.directory, "--json").stdout)
    for name, shown in found["splits"].items():
        lengths = dataset.split(name).document_lengths().tolist()
        expected = Counter(length.bit_length() - 1 for length in lengths)
        rows = shown["length_histogram"]
        assert [row["from"] for row in rows] == [2**n for n in range(min(expected), max(expected) + 1)]
        for row in rows:
            assert row["documents"] == expected[row["from"].bit_length() - 1]
            assert row["below"] == 2 * row["from"]


@pytest.mark.parametrize("block", [1, 7, 1 << 22])
def test_tokens_are_counted_over_the_whole_split_whatever_the_block(
    dataset: Dataset, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "COUNTED_TOKENS", block)
    split = dataset.split("validation")
    counts = token_counts(split, dataset.vocab_size)
    expected = Counter(split.read(0, split.tokens).tolist())
    assert {token: int(counts[token]) for token in np.flatnonzero(counts)} == expected


def test_never_used_tokens_and_the_curve_agree_with_a_count(prep: Prep, dataset: Dataset) -> None:
    found = json.loads(prep("inspect", dataset.directory, "--json").stdout)
    for name, shown in found["splits"].items():
        split = dataset.split(name)
        counts = Counter(split.read(0, split.tokens).tolist())
        unused = [token for token in range(dataset.vocab_size) if token not in counts]
        assert shown["unused_tokens"]["count"] == len(unused)
        assert [token["id"] for token in shown["unused_tokens"]["first"]] == unused[:UNUSED_SHOWN]
        descending = sorted(counts.values(), reverse=True)
        curve = shown["rank_frequency"]
        assert (curve[0][0], curve[-1][0]) == (1, len(descending))
        assert all(count == descending[rank - 1] for rank, count in curve)


def test_the_window_is_the_stream_around_a_documents_end(prep: Prep, dataset: Dataset) -> None:
    split = dataset.split("train")
    stream, lengths = split.read(0, split.tokens).tolist(), split.document_lengths().tolist()
    for seed in range(5):
        found = json.loads(prep("inspect", dataset.directory, "--seed", seed, "--json").stdout)
        window = found["splits"]["train"]["window"]
        assert len(window) > 1
        joined = [token for part in window for token in part["ids"]]
        assert len(joined) <= SHOWN_TOKENS
        assert any(stream[at : at + len(joined)] == joined for at in range(len(stream)))
        for part, after in pairwise(window):
            assert part["text"].endswith("<|endoftext|>") and part["ids"].count(dataset.tokenizer.end_of_text_id) == 1
            assert after["document"] == part["document"] + 1
        for part in window[1:-1]:
            assert len(part["ids"]) == lengths[part["document"]]


def test_a_window_that_begins_where_a_document_does_has_no_empty_part(prep: Prep, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"document{n:02}"[-9:]}) for n in range(60)))
    arguments = ["--tokenizer-kind", "bytes", "--validation-fraction", "0"]
    prep("build", tmp_path / "a.jsonl", "--out", tmp_path / "even", *arguments)
    for seed in range(3):
        found = json.loads(prep("inspect", tmp_path / "even", "--seed", seed, "--json").stdout)
        assert {len(part["ids"]) for part in found["splits"]["train"]["window"]} == {10}


def test_ids_show_every_token_apart(prep: Prep, dataset: Dataset) -> None:
    text = prep("inspect", dataset.directory, "--documents", 1, "--ids").stdout
    sample = json.loads(prep("inspect", dataset.directory, "--documents", 1, "--json").stdout)["splits"]["train"]
    (shown,) = sample["samples"]
    assert " ".join(f"{i}·{dataset.tokenizer.token_text(i)}" for i in shown["ids"]) in text


def test_bytes_per_token_are_told_by_source(prep: Prep, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc " * 500)
    (tmp_path / "b.txt").write_text("été " * 300)
    sources = [f"books={tmp_path / 'a.txt'}", f"web={tmp_path / 'b.txt'}"]
    arguments = ["--out", tmp_path / "out", "--tokenizer-kind", "bytes", "--validation-fraction", "0"]
    assert prep("build", *sources, *arguments).exit_code == 0
    rows = json.loads(prep("inspect", tmp_path / "out", "--json").stdout)["splits"]["train"]["sources"]
    assert [(row["name"], row["text_bytes"]) for row in rows] == [("books", 2000), ("web", 1800)]


def test_bytes_per_token_of_all_sources_are_the_splits(prep: Prep, dataset: Dataset) -> None:
    for shown in json.loads(prep("inspect", dataset.directory, "--json").stdout)["splits"].values():
        (row,) = shown["sources"]
        assert (row["tokens"], row["documents"]) == (shown["tokens"], shown["documents"])
        assert row["bytes_per_token"] == pytest.approx(shown["text_bytes"] / shown["tokens"])
