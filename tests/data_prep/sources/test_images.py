from __future__ import annotations

import io
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile

from data_prep.errors import UserError
from data_prep.sources import archives
from data_prep.sources import images as module
from data_prep.sources.images import BadImage, ImageEntry, decode, find_images, list_images
from tests.data_prep.handmade_images import encoded, picture, write_tar, write_tree, write_zip

DATA = {seed: encoded(picture(seed), "PNG") for seed in range(9)}
CLASSES = {"cat/1.png": DATA[0], "cat/in/2.png": DATA[1], "dog/1.png": DATA[2]}


def found(*sources: object) -> list[tuple[str, str | None, str | None]]:
    return [(each.name, each.label, each.split) for each in find_images([str(source) for source in sources])]


def names(entries: list[ImageEntry]) -> list[str]:
    return [each.name for each in entries]


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "photos", {"b.PNG": DATA[0], "a.jpeg": DATA[1], ".hidden.png": DATA[2]})
    assert found(folder) == [("photos/a.jpeg", None, None), ("photos/b.PNG", None, None)]
    assert [each.read() for each in find_images([folder])] == [DATA[1], DATA[0]]


def test_the_first_folder_is_the_class(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "pets", CLASSES | {"loose.png": DATA[3]})
    assert found(folder) == [
        ("pets/cat/1.png", "cat", None),
        ("pets/cat/in/2.png", "cat", None),
        ("pets/dog/1.png", "dog", None),
        ("pets/loose.png", None, None),
    ]


def test_folders_that_all_images_share_are_no_classes(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "pets", {f"data/v1/{name}": data for name, data in CLASSES.items()})
    assert [label for _, label, _ in found(folder)] == ["cat", "cat", "dog"]
    assert [label for _, label, _ in found(folder / "data" / "v1" / "cat")] == [None, "in"]
    only = write_tree(tmp_path / "only", {"x/y/1.png": DATA[0], "x/y/2.png": DATA[1]})
    assert [label for _, label, _ in found(only)] == [None, None]


@pytest.mark.parametrize("kind", [".tar", ".zip", ".ZIP"])
def test_an_archive_reads_like_the_folder_in_it(kind: str, tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "pets", CLASSES)
    write = write_tar if kind == ".tar" else write_zip
    archive = write(tmp_path / f"pets{kind}", {f"pets/{name}": data for name, data in CLASSES.items()})
    assert found(archive) == found(folder)
    assert [each.read() for each in find_images([archive])] == [each.read() for each in find_images([folder])]
    assert found(archive / "cat") == [("pets/cat/1.png", None, None), ("pets/cat/in/2.png", "in", None)]
    assert found(archive / "pets" / "dog") == [("pets/dog/1.png", None, None)]
    with pytest.raises(UserError, match=r'has no folder "cow" with images: its folders are cat, dog'):
        found(archive / "cow")


def test_a_folder_may_be_called_like_an_archive(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "pets.tar", CLASSES)
    assert [label for _, label, _ in found(folder)] == ["cat", "cat", "dog"]
    assert len(found(folder / "cat")) == 2


def test_folders_of_splits_are_no_classes(tmp_path: Path) -> None:
    tree = {
        "train/cat/1.png": DATA[0],
        "train/dog/2.png": DATA[1],
        "Test/cat/3.png": DATA[2],
        "Test/dog/4.png": DATA[3],
    }
    expected = [
        ("x/Test/cat/3.png", "cat", "validation"),
        ("x/Test/dog/4.png", "dog", "validation"),
        ("x/train/cat/1.png", "cat", "train"),
        ("x/train/dog/2.png", "dog", "train"),
    ]
    assert found(write_tree(tmp_path / "x", tree)) == expected
    assert found(write_tar(tmp_path / "x.tar", tree)) == expected
    assert found(write_tree(tmp_path / "v", {"train/1.png": DATA[0], "val/2.png": DATA[1]})) == [
        ("v/train/1.png", None, "train"),
        ("v/val/2.png", None, "validation"),
    ]
    three = {"train/1.png": DATA[0], "dev/2.png": DATA[1], "testing/3.png": DATA[2]}
    assert [split for *_, split in found(write_tree(tmp_path / "t", three))] == ["validation", "test", "train"]
    nested = {"train/cat/images/1.png": DATA[0], "train/dog/images/2.png": DATA[1], "val/images/3.png": DATA[2]}
    assert [label for _, label, _ in found(write_tree(tmp_path / "n", nested))] == ["cat", "dog", None]


def test_a_class_may_be_called_test(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "x", {"test/1.png": DATA[0], "exam/2.png": DATA[1]})
    assert [(label, split) for _, label, split in found(folder)] == [("exam", None), ("test", None)]
    untrained = write_tree(tmp_path / "y", {"test/1.png": DATA[0], "val/2.png": DATA[1]})
    assert [(label, split) for _, label, split in found(untrained)] == [("test", None), ("val", None)]


def test_files_and_patterns_and_several_sources(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "pets", CLASSES)
    assert found(folder / "cat" / "1.png") == [("1.png", None, None)]
    assert found(tmp_path / "pets" / "*" / "1.png") == [
        ("pets/cat/1.png", "cat", None),
        ("pets/dog/1.png", "dog", None),
    ]
    assert len(found(folder, folder)) == 6, "equal names do not matter"


def test_archives_in_a_folder_are_read_if_it_has_no_images(tmp_path: Path) -> None:
    folder = tmp_path / "all"
    folder.mkdir()
    write_zip(folder / "pets.zip", CLASSES)
    write_tar(folder / "more.tar", {"1.png": DATA[4]})
    assert [(name, label) for name, label, _ in found(folder)] == [
        ("more/1.png", None),
        ("pets/cat/1.png", "cat"),
        ("pets/cat/in/2.png", "cat"),
        ("pets/dog/1.png", "dog"),
    ]
    write_tree(folder, {"loose.png": DATA[5]})
    (listing,) = list_images([str(folder)])
    assert [item.name for item in listing.items] == ["all/loose.png"]
    assert listing.unread == ["all/more.tar", "all/pets.zip"]


def test_the_digits_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    digits = sklearn.load_digits()
    entries = list(find_images(["builtin:digits"]))
    assert names(entries[:2]) == ["digits:1", "digits:2"]
    assert [each.label for each in entries] == [str(target) for target in digits.target]
    assert len(entries) == module.NUMBER_OF_DIGITS
    image = decode(entries[100].read())
    assert image.mode == "L"
    assert [round(value * 16 / 255) for value in image.tobytes()] == digits.images[100].astype(int).ravel().tolist()


def test_other_files_and_links_are_listed(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "x", {"1.png": DATA[0], "notes.txt": b"x", "in/2.png": DATA[1]})
    (folder / "linked").symlink_to(folder)
    (folder / "circle.png").symlink_to(folder / "circle.png")
    (folder / "gone.png").symlink_to(folder / "nothing.png")
    (folder / "alias.png").symlink_to(folder / "1.png")
    (listing,) = list_images([str(folder)])
    assert [item.name for item in listing.items] == ["x/1.png", "x/alias.png", "x/in/2.png"]
    assert listing.unread == ["x/notes.txt"]
    assert listing.notes == [
        '1 linked folder is not followed in "x": linked',
        '2 broken links are not followed in "x": circle.png, gone.png',
    ]


def test_members_that_are_no_files_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        kinds = {"a": tarfile.REGTYPE, "b": tarfile.SYMTYPE, "c": tarfile.DIRTYPE, "d": tarfile.LNKTYPE}
        for name, kind in ((f"{name}.png", kind) for name, kind in kinds.items()):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.png"
            member.size = len(DATA[0]) if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(DATA[0]))
        hidden = tarfile.TarInfo("__MACOSX/._a.png")
        archive.addfile(hidden)
        readme = tarfile.TarInfo("README.md")
        archive.addfile(readme)
    (listing,) = list_images([str(path)])
    assert [item.name for item in listing.items] == ["x/a.png"]
    assert listing.unread == ["x/README.md"]
    assert listing.notes == ['2 links are not followed in "x": b.png, d.png']


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_after_other_bytes_and_with_comments_is_read(method: int, tmp_path: Path) -> None:
    """As programs that unpack themselves are, and with fields of any length before the data."""
    path = tmp_path / "x.zip"
    path.write_bytes(b"#!/bin/sh\n" * 9)
    with zipfile.ZipFile(path, "a", method) as archive:
        for name, extra in (("a/1.png", b""), ("b/2.png", b"\xfe\xca\x03\x00abc"), ("b/notes.txt", b"")):
            member = zipfile.ZipInfo(name)
            member.extra, member.compress_type, member.comment = extra, method, b"PK"
            archive.writestr(member, DATA[1 + len(extra)])
        archive.comment = b"PK\3\4"
        archive.mkdir("c.png")
        link = zipfile.ZipInfo("link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "a/1.png")
        archive.writestr("__MACOSX/a/._1.png", b"x")
    assert [(each.name, each.label, each.read()) for each in find_images([path])] == [
        ("x/a/1.png", "a", DATA[1]),
        ("x/b/2.png", "b", DATA[8]),
    ]
    (listing,) = list_images([str(path)])
    assert listing.unread == ["x/b/notes.txt"]
    assert listing.notes == ['1 link is not followed in "x": link.png']


def test_what_cannot_be_read_in_a_zip_has_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_zip(tmp_path / "x.zip", {"1.png": DATA[0]})
    content = bytearray(whole.read_bytes())
    for first, mend, reason in (
        (0, b"xx", "damaged"),
        (6, b"\1", "encrypted"),
        (8, b"\x0c", "compressed by method 12 of .zip, not by deflate"),
        (35, b"\xff" * 20, r"damaged or truncated \(Error -3"),
    ):
        (tmp_path / "y.zip").write_bytes(content[:first] + mend + content[first + len(mend) :])
        (entry,) = find_images([tmp_path / "y.zip"])
        with pytest.raises(BadImage, match=reason):
            entry.read()
    (tmp_path / "cut.zip").write_bytes(content[:-30])
    with pytest.raises(UserError, match=r"is not a whole .zip \(File is not a zip file\): get an intact copy"):
        found(tmp_path / "cut.zip")
    (bomb,) = find_images([write_zip(tmp_path / "bomb.zip", {"1.png": bytes(10**6)})])
    monkeypatch.setattr(archives, "MOST_BYTES", 10**5)
    with pytest.raises(BadImage, match="more than"):
        bomb.read()


def test_a_cut_archive_gives_what_is_whole(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", {f"{n}.png": DATA[n] for n in range(5)})
    cut = tmp_path / "cut.tar"
    with tarfile.open(whole) as archive:
        third = archive.getmember("2.png").offset_data
    cut.write_bytes(whole.read_bytes()[: third + 100])
    (listing,) = list_images([str(cut)])
    assert [item.name for item in listing.items] in (["cut/0.png", "cut/1.png"], [f"cut/{n}.png" for n in range(3)])
    if len(listing.items) == 3:
        with pytest.raises(BadImage):
            decode(list(find_images([cut]))[2].read())
    else:
        assert "damaged" in listing.notes[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", 'there is no file or folder "nothing"'),
        ("/dev/null", '"/dev/null" is neither a file nor a folder'),
        ("empty", 'no image in "empty": looked for .jpg'),
        ("texts", r"there is only 1 \.txt \(a\.txt\)"),
        ("linked", r"1 linked folder is not followed in \"linked\": pets"),
        ("x.tar", "is not a whole .tar"),
        ("x.parquet", "is not a whole .parquet file"),
        ("x.zip", "is not a whole .zip"),
        ("x.tar.gz", "cannot be read at random: unpack it first; gunzip makes a .tar of it, which can be read$"),
        ("x.7z", "is compressed, so its images cannot be read at random: unpack it first$"),
        ("builtin", "the built-in images are builtin:digits"),
        ("-", "images cannot come from standard input"),
        ("*.png", r'no image in "\*\.png"'),
    ],
)
def test_a_source_without_images_is_refused(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path, {"texts/a.txt": b"x", "pets/a.png": DATA[0]})
    for folder in ("empty", "linked"):
        (tmp_path / folder).mkdir()
    (tmp_path / "linked" / "pets").symlink_to(tmp_path / "pets")
    for file in ("x.tar", "x.parquet", "x.zip", "x.tar.gz", "x.7z"):
        (tmp_path / file).write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match=message) as error:
        found(name)
    assert "\n" not in str(error.value)


def test_without_a_source_there_is_nothing_to_find() -> None:
    with pytest.raises(UserError, match="no source given"):
        found()


def test_a_file_that_vanishes_or_is_huge_is_a_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tree(tmp_path / "x", {"1.png": DATA[0], "2.png": DATA[1]})
    first, second = find_images([folder])
    (folder / "1.png").unlink()
    with pytest.raises(BadImage, match="unreadable file"):
        first.read()
    monkeypatch.setattr(module, "MOST_BYTES", 10)
    with pytest.raises(BadImage, match="more than"):
        second.read()


@pytest.mark.parametrize("archive", [True, False])
def test_a_network_that_fails_ends_the_reading(archive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    tar = write_tar(tmp_path / "x.tar", {"1.png": DATA[0]})
    memory.pipe({"/pets/1.png": DATA[0], "/x.tar": tar.read_bytes()})

    def fail(*_: object) -> bytes:
        raise RuntimeError("connection lost")

    (entry,) = find_images(["memory://x.tar" if archive else "memory://pets/1.png"])
    assert entry.read() == DATA[0]
    monkeypatch.setattr(MemoryFile, "read", fail)
    with pytest.raises(UserError, match=r'cannot read "memory://.*": connection lost'):
        entry.read()
    if archive:
        with pytest.raises(UserError, match=r'cannot read "memory://x.tar": connection lost'):
            list_images(["memory://x.tar"])


def test_names_are_one_printable_line(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    write_tree(folder, {"a\nb/1.png": DATA[0], "c/2.png": DATA[1]})
    Path(os.fsdecode(os.fsencode(folder) + b"/c/\xff.png")).write_bytes(DATA[2])
    assert found(folder) == [
        ("x/a\\nb/1.png", "a\\nb", None),
        ("x/c/2.png", "c", None),
        ("x/c/\\udcff.png", "c", None),
    ]
