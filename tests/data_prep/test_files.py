from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from data_prep.files import atomic_file, sha256_of_file, write_atomically


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert [found.name for found in tmp_path.iterdir()] == ["a"]
    assert path.read_text() == "old"
    write_atomically(path, "néw")
    assert path.read_bytes() == "néw".encode()
    write_atomically(path, b"bytes")
    assert path.read_bytes() == b"bytes"


def test_the_checksum_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    assert sha256_of_file(tmp_path / "a") == hashlib.sha256(b"x" * 100_000).hexdigest()
