"""Files in .tar archives: where they are, and their bytes, read at random."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO

from data_prep.errors import UserError
from data_prep.sources.documents import one_line
from data_prep.sources.storage import UnreadableError, open_raw, read_errors

TAR = ".tar"


@dataclass
class Archive:
    """What an archive holds, without hidden files.

    ``members`` are the folders, the name, and the first and the end of the bytes of each file. ``links`` are the names
    of links. ``damage`` says why the rest cannot be listed, if so.
    """

    members: list[tuple[tuple[str, ...], str, int, int]] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    damage: str = ""

    def add(self, path: str, start: int, stop: int, *, link: bool) -> None:
        """Add a file or link."""
        parts = PurePosixPath(path).parts
        if not parts or any(part.startswith(".") for part in parts):
            return
        if link:
            self.links.append(path)
        else:
            self.members.append((parts[:-1], parts[-1], start, stop))


def list_archive(path: str) -> Archive:
    """List an archive, in its order. Raises ``UserError`` if it cannot be read, or is none."""
    found = Archive()
    try:
        with open_raw(path) as file, read_errors(path):
            _list_tar(file, found)
    except UnreadableError as error:
        raise UserError(f'"{one_line(path)}" {error}: make it readable') from None
    if found.damage and not found.members:
        raise UserError(f'"{one_line(path)}" is not a whole {TAR} ({found.damage}): get an intact copy')
    return found


def _list_tar(file: IO[bytes], found: Archive) -> None:
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined] # which would grow
                link = member.issym() or member.islnk()
                if link or member.isfile():
                    found.add(member.name, member.offset_data, member.offset_data + member.size, link=link)
    except (tarfile.TarError, EOFError) as error:
        found.damage = str(error)


def read_member(path: str, start: int, stop: int) -> bytes:
    """Return the bytes of a file that ``list_archive`` found there.

    Raises:
        UserError: the disk or network failed.
        UnreadableError: the archive cannot be opened.
    """
    with open_raw(path) as file, read_errors(path):
        file.seek(start)
        return file.read(stop - start)
