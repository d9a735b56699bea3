from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cleaning.decontamination import EvaluationTexts, evaluation_texts
from data_prep.cleaning.ngrams import WordHashes
from data_prep.errors import UserError

LONG = "Many years later as he faced the firing squad the colonel remembered that distant afternoon when ice was new"
SHORT = "Who should Derek hug today?"
RECORDS = "".join(json.dumps({"a": f"é {n**5}"}, ensure_ascii=False) + "\n" for n in range(999))


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def texts_of(path: Path, ngram: int = 13) -> EvaluationTexts:
    return EvaluationTexts([path], ngram, WordHashes())


drawn_texts = st.lists(st.sampled_from(["a", "b", "c", "A!", "(b"]), min_size=5, max_size=14).map(" ".join)


@given(evaluation=st.lists(drawn_texts, min_size=1, max_size=4), text=drawn_texts, ngram=st.integers(2, 9))
def test_a_match_is_a_shared_run_as_a_naive_search_finds_it(tmp_path_factory, evaluation, text, ngram) -> None:
    path = tmp_path_factory.mktemp("evaluation") / "drawn.jsonl"
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in evaluation))

    def runs(of: str, length: int) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", of.lower())
        return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}

    lengths = [min(ngram, len(one.split())) for one in evaluation]
    expected = any(runs(one, length) & runs(text, length) for one, length in zip(evaluation, lengths, strict=True))
    assert bool(texts_of(path, ngram).match(text)) == expected


def test_thirteen_shared_words_are_a_match_and_twelve_are_none(tmp_path: Path) -> None:
    found = texts_of(written(tmp_path, "novel.txt", LONG))
    words = LONG.upper().split()
    shared = "Said he -- " + ", ".join(words[3:16]) + "!"
    assert found.match(shared) == '"Many years later as he faced the firing squad the" of novel.txt'
    assert found.match("Then " + " ".join(words[3:15]) + " then " + " ".join(words[16:])) == ""


def test_a_short_text_is_found_as_a_whole_from_five_words_on(tmp_path: Path) -> None:
    found = texts_of(written(tmp_path, "questions.txt", f"{SHORT}\nHello my good friend\n"))
    assert found.match(f'"{SHORT.lower()}" he asked. Hello, my good friend!') == f'"{SHORT}" of questions.txt'
    assert found.match("Hello my good friend. Who should Derek hug tomorrow") == ""
    assert found.match("") == ""


def test_each_of_many_texts_is_found_and_named(tmp_path: Path) -> None:
    lines = [f"question {number} of {number * 7} has {number} answers" for number in range(3000)]
    found = texts_of(written(tmp_path, "many.txt", "\n".join(lines)))
    assert [found.match(f"He said: {line}.") for line in lines] == [f'"{line}" of many.txt' for line in lines]
    assert not any(found.match(f"question {number} of {number * 7 + 1} has {number} answers") for number in range(3000))


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.jsonl", '{"a": "x", "b": [{"c": "y"}, 3, null]}\n\n"z"\n', ["x", "y", "z"]),
        ("a.csv", 'text,label\n"one, two\nthree",1\n', ["text", "label", "one, two\nthree", "1"]),
        ("a.tsv", "one, two\t1\r\n", ["one, two", "1"]),
        ("a.NDJSON", '{"a": "x"}\n', ["x"]),
        ("a.json", '[{"a": "x", "b": {"c": "y"}}, "z"]', ["x", "y", "z"]),
        ("b.json", '{"a": "x"}\n{"a": "y"}\n', ["x", "y"]),
        ("b.tsv", 'a\tb\n"A b" c\t1\n', ["a", "b", '"A b" c', "1"]),
        ("A.TXT", "\none\ntwo\n", ["", "one", "two", ""]),
        ("a.txt", "\none\ntwo\n", ["", "one", "two", ""]),
        ("a.md", "one\ntwo\n \nthree\n", ["one\ntwo", "three\n"]),
    ],
)
def test_every_kind_of_file_gives_its_texts_packed_or_not(tmp_path: Path, name: str, content: str, texts: list) -> None:
    assert list(evaluation_texts(written(tmp_path, name, "\ufeff" + content))) == texts
    for suffix, pack in (("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)):
        packed = tmp_path / f"{name}.{suffix}"
        packed.write_bytes(pack(content.encode()))
        assert list(evaluation_texts(packed)) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"abc\xff", r"bad\.txt\" is not UTF-8 text \(invalid start byte\)"),
        ("bad.jsonl", b'{"a": "x"}\n{broken\n', r"bad\.jsonl\", line 2 is not JSON"),
        ("bad.csv", b'a,b\nx,"y"z\n', r"bad\.csv\", line 2 cannot be read \('?,'? expected"),
        ("data.txt", b'{"a": "x"}\n{"a": "y"}\n', r'data\.txt" looks like JSON lines: give it a name that ends in'),
        ("bad.parquet", b"PAR1 no", r'bad\.parquet" is not a complete parquet file'),
        ("few.txt", b"one two three four\n", r"few\.txt\" has no text of 5 words or more"),
        ("cut.txt.gz", gzip.compress(b"one two three four five" * 99, mtime=0)[:-9], r"cut\.txt\.gz\" is damaged"),
        ("no.txt.gz", b"plain", r"no\.txt\.gz\" is damaged"),
        ("cut.jsonl.gz", gzip.compress(RECORDS.encode())[:-999], r"cut\.jsonl\.gz\" is damaged"),
        ("cut.csv.gz", gzip.compress(('"' + RECORDS.replace('"', "")).encode())[:-999], r"cut\.csv\.gz\" is damaged"),
    ],
)
def test_a_file_that_is_no_use_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts_of(tmp_path / name)


def test_every_string_of_a_parquet_file_counts(tmp_path: Path) -> None:
    rows = [{"a": "x", "b": {"c": ["y"]}, "d": 1}, {"a": None, "b": {"c": ["z", "w"]}, "d": 2}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(evaluation_texts(tmp_path / "a.parquet")) == ["x", "y", "z", "w"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'the evaluation file ".*gone\.txt" cannot be opened \(No such file'):
        texts_of(tmp_path / "gone.txt")
