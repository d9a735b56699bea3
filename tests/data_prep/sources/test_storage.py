from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.sources import storage
from data_prep.sources.storage import Stream, UnreadableError, list_folder, list_glob, open_stream, root_of_glob


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


NAMES = ("b.txt", "a/z.md", "a/b/c.txt", ".hidden.txt", ".git/x.txt", "picture.png", "B.txt")


def test_folders_are_listed_by_name_without_hidden_files_and_linked_folders(tmp_path: Path) -> None:
    make(tmp_path, *NAMES)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "linked.txt").symlink_to(tmp_path / "b.txt")
    found = [(Path(path).relative_to(tmp_path).as_posix(), size) for path, size in list_folder(str(tmp_path))]
    names = ["B.txt", "a/b/c.txt", "a/z.md", "b.txt", "linked.txt", "picture.png"]
    assert found == [(name, 5 if name == "linked.txt" else len(name)) for name in names]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.txt", ["B.txt", "b.txt"]),
        ("**/*.txt", ["B.txt", "a/b/c.txt", "b.txt"]),
        ("**", ["B.txt", "a/b/c.txt", "a/z.md", "b.txt", "picture.png"]),
        ("a/**/c.txt", ["a/b/c.txt"]),
        ("*/*", ["a/z.md"]),
        ("[a-b].txt", ["b.txt"]),
        ("?/?/c.*", ["a/b/c.txt"]),
        ("x*", []),
    ],
)
def test_globs_match_as_in_a_shell_and_links_to_folders_end_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, names: list[str]
) -> None:
    make(tmp_path, *NAMES)
    (tmp_path / "loop").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert [path for path, _ in list_glob(pattern)] == names
    assert [path for path, _ in list_glob(f"{tmp_path}/{pattern}")] == [f"{tmp_path}/{name}" for name in names]


def test_the_root_of_a_glob_is_the_folder_above_its_first_pattern() -> None:
    patterns = ["data/wiki/*.txt", "data/a*/b/*", "*.txt", "/*", "s3://bucket/x/*.gz", "memory://*.txt"]
    assert [root_of_glob(pattern) for pattern in patterns] == [
        "data/wiki",
        "data",
        "",
        "/",
        "s3://bucket/x",
        "memory://",
    ]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    make(tmp_path, "file")
    with pytest.raises(UserError, match=f'cannot list the folder "{tmp_path / "file"}": Not a directory'):
        list_folder(str(tmp_path / "file"))


@given(frames=st.lists(st.binary(max_size=2000), min_size=1, max_size=4), cut=st.integers(0, 100_000))
def test_zstandard_frames_join_and_the_last_is_never_silently_cut_off(
    tmp_path_factory: pytest.TempPathFactory, frames: list[bytes], cut: int
) -> None:
    packed = [zstandard.ZstdCompressor().compress(frame) for frame in frames]
    path = tmp_path_factory.mktemp("zst") / "x.zst"
    whole = b"".join(packed)
    path.write_bytes(whole)
    with open_stream(str(path)) as stream:
        assert b"".join(stream.blocks()) == b"".join(frames)
        assert not stream.damage
    cut %= len(whole)
    path.write_bytes(whole[:cut])
    borders = [sum(map(len, packed[:number])) for number in range(len(packed))]
    with open_stream(str(path)) as stream:
        assert b"".join(frames).startswith(b"".join(stream.blocks()))
        assert bool(stream.damage) is (cut not in borders)


def test_peeking_reads_nothing_away(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(range(256)) * 1000)
    with open_stream(str(path)) as stream:
        assert stream.peek() == path.read_bytes()[: 1 << 16]
        assert b"".join(stream.blocks()) == path.read_bytes()
        stream.seek(255_990)
        assert b"".join(stream.blocks()) == path.read_bytes()[-10:]


def test_a_failing_disk_ends_the_reading_with_the_file_s_name() -> None:
    class Failing(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(UserError, match=r'cannot read all of "x\.txt": Input/output error'):
        list(Stream(Failing(), "x.txt").blocks())


def test_a_file_that_cannot_be_opened_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match="cannot be opened"), open_stream(str(tmp_path / "none")):
        pass


def test_the_folder_above_a_pattern_is_found_in_paths_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert root_of_glob(r"data\texts\*.txt") == ""
    monkeypatch.setattr(storage, "os", SimpleNamespace(**vars(os) | {"sep": "\\"}))
    patterns = [r"data\texts\*.txt", r"C:\texts\*\a.txt", r"C:\*.txt", "data/*.txt", "*.txt"]
    assert [root_of_glob(pattern) for pattern in patterns] == ["data/texts", "C:/texts", "C:/", "data", ""]
