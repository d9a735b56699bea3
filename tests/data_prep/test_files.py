from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock, _unix

from data_prep import files
from data_prep.errors import UserError
from data_prep.files import LOCK, atomic_file, names_in, new_folder, only_writer_of, sha256_of_file, write_atomically

LOCKING = """
import sys
from pathlib import Path
from data_prep.errors import UserError
from data_prep.files import only_writer_of
try:
    with only_writer_of(Path(sys.argv[1]), "busy"):
        print("held", flush=True)
        sys.stdin.read()
except UserError as error:
    print(error)
"""


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


@contextmanager
def processes_locking(lock: Path, number: int = 1) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that want a lock; who gets it holds it until its input ends."""
    command = [sys.executable, "-c", LOCKING, str(lock)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(number)
    ]
    yield processes
    for process in processes:
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_a_lock_is_held_by_one_process_until_it_ends_or_is_killed(tmp_path: Path) -> None:
    lock = tmp_path / LOCK
    with processes_locking(lock) as (process,):
        assert said(process) == "held\n"
        with pytest.raises(UserError, match="another writes"), only_writer_of(lock, "another writes"):
            pass
        process.kill()
    assert lock.exists()  # and does not matter
    with only_writer_of(lock, "another writes"):
        assert lock.exists()
    assert not lock.exists()
    with processes_locking(lock) as (process,):
        assert said(process) == "held\n"
    assert list(tmp_path.iterdir()) == []


def test_of_several_processes_one_gets_the_lock(tmp_path: Path) -> None:
    with processes_locking(tmp_path / LOCK, 3) as processes:
        assert sorted(map(said, processes)) == ["busy\n", "busy\n", "held\n"]


def failing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "acquire", fail)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(_unix, "fcntl", SimpleNamespace(**vars(fcntl) | {"flock": flock}))
    wanted = pytest.raises(UserError, match=r"the file system of .* has no locks: choose a folder on a local disk")
    with wanted, only_writer_of(tmp_path / LOCK, "another writes"):
        pass


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_needs_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    failing(monkeypatch, number)
    with only_writer_of(tmp_path / LOCK, "another writes"):
        assert names_in(tmp_path) == set()
    (tmp_path / LOCK).touch()  # of another user, in a folder that several write
    with pytest.raises(OSError, match=os.strerror(number)), only_writer_of(tmp_path / LOCK, "another writes"):
        pass
    monkeypatch.setattr(files, "os", SimpleNamespace(**vars(os) | {"access": lambda path, mode: False}))
    with only_writer_of(tmp_path / LOCK, "another writes"):
        pass
    assert (tmp_path / LOCK).exists()


def test_another_error_of_a_lock_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, errno.ENOSPC)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)), only_writer_of(tmp_path / LOCK, "another writes"):
        pass


def test_a_new_folder_is_written_by_one_process_and_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / LOCK).touch()  # left by a training that was killed at once
    with new_folder(out) as folder:
        (folder / "a").write_text("a")
        assert names_in(out) == set()
        with pytest.raises(UserError, match="another process is writing to"), new_folder(out):
            pass
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/a"]
    with pytest.raises(UserError, match="is not an empty folder"), new_folder(out):
        pass


def test_on_windows_no_directory_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_like_windows(path: Any, *rest: Any, **more: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return os.open(path, *rest, **more)

    monkeypatch.setattr(files, "os", SimpleNamespace(**vars(os) | {"open": open_like_windows}))
    with pytest.raises(PermissionError):
        write_atomically(tmp_path / "a", "a")
    monkeypatch.setattr(files, "WINDOWS", True)
    write_atomically(tmp_path / "a", "a")
    with new_folder(tmp_path / "out") as folder:
        write_atomically(folder / "b", "b")
    assert sorted(names_in(tmp_path)) == ["a", "out"]


def test_on_windows_a_rename_waits_for_a_program_that_has_the_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(path: Path, target: Path) -> Path:
        refusals.append(target)
        if len(refusals) < 4:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return replaced(path, target)

    refusals: list[Path] = []
    replaced = Path.replace
    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(PermissionError):
        write_atomically(tmp_path / "a", "a")
    monkeypatch.setattr(files, "WINDOWS", True)
    write_atomically(tmp_path / "a", "a")
    assert len(refusals) == 4
    monkeypatch.setattr(files, "SHARING_SECONDS", 0.0)
    refusals.clear()
    with pytest.raises(PermissionError):
        write_atomically(tmp_path / "a", "b")
    assert (tmp_path / "a").read_text() == "a"
