"""Files in .tar and .zip archives: where they are, and their bytes, read at random."""

from __future__ import annotations

import stat
import struct
import tarfile
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO

from data_prep.errors import UserError
from data_prep.sources.decoding import DAMAGED, MOST_BYTES, TOO_LARGE, UNREADABLE, BadImage
from data_prep.sources.documents import one_line
from data_prep.sources.storage import UnreadableError, open_raw, read_errors

ARCHIVES = TAR, ZIP = (".tar", ".zip")
ZIP_HEADER = struct.Struct("<4s2xHH16xHH")  # of a file in a .zip: mark, flags, method, lengths of name and extra field
ZIP_MARK, ENCRYPTED, STORED, DEFLATED = b"PK\3\4", 1, 0, 8


@dataclass
class Archive:
    """What an archive holds, without hidden files.

    ``members`` are the folders, the name, and the start and stop of the bytes of each file; in a .zip a header, whose
    length is not counted, precedes them. ``links`` are the names of links. ``damage`` says why the rest cannot be
    listed, if so.
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
            if path.lower().endswith(ZIP):
                _list_zip(file, found)
            else:
                _list_tar(file, found)
    except UnreadableError as error:
        raise UserError(f'"{one_line(path)}" {error}: make it readable') from None
    if found.damage and not found.members:
        kind = PurePosixPath(path).suffix.lower()
        raise UserError(f'"{one_line(path)}" is not a whole {kind} ({found.damage}): get an intact copy')
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


def _list_zip(file: IO[bytes], found: Archive) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if not member.is_dir():
                    start, link = member.header_offset, stat.S_ISLNK(member.external_attr >> 16)
                    found.add(member.filename, start, start + member.compress_size, link=link)
    except zipfile.BadZipFile as error:
        found.damage = str(error)


def read_member(path: str, start: int, stop: int) -> bytes:
    """Return the bytes of a file that ``list_archive`` found there.

    Raises:
        BadImage: it is damaged, encrypted, or too large.
        UserError: the disk or network failed.
        UnreadableError: the archive cannot be opened.
    """
    header = b""
    with open_raw(path) as file, read_errors(path):
        file.seek(start)
        if path.lower().endswith(ZIP):
            header = file.read(ZIP_HEADER.size)
            if len(header) == ZIP_HEADER.size:
                *_, name_bytes, extra_bytes = ZIP_HEADER.unpack(header)
                file.seek(start + ZIP_HEADER.size + name_bytes + extra_bytes)
        data = file.read(stop - start)
    return _unzipped(header, data) if path.lower().endswith(ZIP) else data


def _unzipped(header: bytes, data: bytes) -> bytes:
    if not header.startswith(ZIP_MARK) or len(header) < ZIP_HEADER.size:
        raise BadImage(DAMAGED)
    _, flags, method, *_ = ZIP_HEADER.unpack(header)
    if flags & ENCRYPTED:
        raise BadImage(UNREADABLE, "encrypted")
    if method == STORED:
        return data
    if method != DEFLATED:
        raise BadImage(UNREADABLE, f"compressed by method {method} of .zip, not by deflate")
    try:
        found = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, MOST_BYTES + 1)
    except zlib.error as error:
        raise BadImage(DAMAGED, str(error)) from None
    if len(found) > MOST_BYTES:
        raise BadImage(TOO_LARGE, f"more than {MOST_BYTES / 1e6:,.0f} MB")
    return found
