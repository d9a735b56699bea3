"""Token files of other programs against bytes written by hand; ``test_convert`` has the round trips."""

from __future__ import annotations

import gzip
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.shards import layouts
from data_prep.shards.layouts import TokenFile, check_ids, documents_of, read_token_file

TOKENS = np.array([5, 6, 0, 7, 0], "<u2")


def test_bare_tokens_have_no_lengths_and_an_empty_file_no_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(TOKENS.tobytes())
    (tmp_path / "b.bin").touch()
    file = read_token_file(tmp_path / "a.bin", "nanogpt", 300)
    assert file.tokens.tolist() == [5, 6, 0, 7, 0] and file.lengths is None
    assert read_token_file(tmp_path / "b.bin", "nanogpt", 300).tokens.shape == (0,)


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
def test_the_header_of_llmc_tells_the_type(tmp_path: Path, magic: int, version: int, dtype: str) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(TOKENS)
    assert layouts.llmc_header(len(TOKENS), np.dtype(dtype)) == header.tobytes()
    (tmp_path / "a.bin").write_bytes(header.tobytes() + TOKENS.astype(dtype).tobytes())
    file = read_token_file(tmp_path / "a.bin", "llmc", 300)
    assert (file.dtype, file.tokens.tolist()) == (np.dtype(dtype), TOKENS.tolist())


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, "<u2"), (70_000, "<u4")])
def test_without_an_index_the_vocabulary_decides_the_width(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    (tmp_path / "a.ds").write_bytes(TOKENS.astype(dtype).tobytes())
    assert read_token_file(tmp_path / "a.ds", "datatrove", vocab_size).tokens.tolist() == TOKENS.tolist()


def test_indexes_give_lengths(tmp_path: Path) -> None:
    lengths = np.array([3, 2])
    assert layouts.datatrove_index(lengths) == struct.pack("<2Q", 3, 5)
    (tmp_path / "a.ds").write_bytes(TOKENS.tobytes())
    (tmp_path / "a.ds.index").write_bytes(layouts.datatrove_index(lengths))
    (tmp_path / "a.ds.metadata").write_text(layouts.datatrove_metadata("tokenizer.json", 5, TOKENS.dtype))
    assert read_token_file(tmp_path / "a.ds", "datatrove", 70_000).lengths.tolist() == [3, 2]  # type: ignore[union-attr]
    rows = layouts.olmo_index(lengths, "a", 7)
    assert gzip.decompress(rows) == b"0,3,a-7,a,7\n3,5,a-8,a,8\n"
    assert rows == layouts.olmo_index(lengths, "a", 7)
    (tmp_path / "b.npy").write_bytes(TOKENS.tobytes())
    (tmp_path / "b.csv.gz").write_bytes(rows)
    assert read_token_file(tmp_path / "b.npy", "olmo", 70_000).lengths.tolist() == [3, 2]  # type: ignore[union-attr]


def test_nanogpt_s_pickle_holds_the_vocabulary() -> None:
    assert pickle.loads(layouts.nanogpt_meta(60_000)) == {"vocab_size": 60_000}


def test_a_token_outside_the_vocabulary_is_named_with_its_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "BLOCK_TOKENS", 2)
    (tmp_path / "a.bin").write_bytes(TOKENS.tobytes())
    file = TokenFile(tmp_path / "a.bin", TOKENS.dtype)
    check_ids(file, 8)
    with pytest.raises(UserError, match=re.escape(f'token 3 of "{file.path}" is 7, but the tokenizer has 7 tokens')):
        check_ids(file, 7)


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=4))
def test_documents_without_an_index_end_with_the_token_across_files(files: list[list[int]]) -> None:
    class Loose(TokenFile):
        tokens = np.empty(0)  # type: ignore[assignment]

    loose = []
    for ids in files:
        file = Loose(Path("a.bin"), np.dtype("<u2"))
        object.__setattr__(file, "tokens", np.array(ids, "<u2"))
        loose.append(file)
    joined = [token for ids in files for token in ids]
    expected: list[list[int]] = [[]]
    for token in joined:
        expected[-1].append(token)
        if token == 0:
            expected.append([])
    assert [document.tolist() for document in documents_of(loose, 0)] == [ids for ids in expected if ids]
