"""Find images: in folders, .tar and .zip archives, .parquet files, Hugging Face datasets and scikit-learn's digits.

``list_images`` lists what the sources hold without reading any image, ``entries_of`` reads one listed item, and
``find_images`` does both. The class of an image is the first folder that not all images share; folders called train,
test and so on at the top are splits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath

from data_prep.errors import UserError
from data_prep.files import is_remote
from data_prep.sources.archives import ARCHIVES, list_archive, read_member
from data_prep.sources.decoding import MOST_BYTES, TOO_LARGE, UNREADABLE, BadImage, decode, decode_noting
from data_prep.sources.documents import one_line
from data_prep.sources.formats import some_names, summary_of
from data_prep.sources.image_records import (
    DIGITS,
    HUGGING_FACE,
    NUMBER_OF_DIGITS,
    digits,
    images_of_dataset,
    images_of_parquet,
    row_group_sizes,
)
from data_prep.sources.records import parse_hugging_face
from data_prep.sources.storage import (
    UnreadableError,
    broken_links,
    is_folder,
    is_glob,
    last_name,
    linked_folders,
    list_folder,
    list_glob,
    open_raw,
    read_errors,
    root_of_glob,
    size_of,
)

__all__ = ["BadImage", "ImageEntry", "decode", "decode_noting", "entries_of", "find_images", "list_images"]

# What names of images end in, in any case; Pillow reads them all.
ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".jp2", ".avif"),
)
PARQUET = ".parquet"
# Archives that are compressed as a whole, and what makes a .tar of them.
COMPRESSED = {".tar.gz": "gunzip", ".tgz": "gunzip", ".tar.bz2": "bunzip2", ".tar.xz": "unxz", ".tar.zst": "unzstd"}
COMPRESSED |= dict.fromkeys((".rar", ".7z"), "")
FILE, MEMBER = "file", "member"  # kinds of items; the others are PARQUET, HUGGING_FACE and DIGITS
TRAIN, VALIDATION, TEST = "train", "validation", "test"
# What folders of splits are called.
SPLIT_FOLDERS = {"train": TRAIN, "training": TRAIN, "test": TEST, "testing": TEST} | dict.fromkeys(
    ("val", "valid", "validation", "dev"), VALIDATION
)


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """One image.

    ``name`` is its path from the last folder of its source on, like ``photos/cat/1.jpg``, ``label`` its class or None.
    ``split`` is "train" or "validation" if a folder says so, or None; "test" occurs only where there is validation too.
    ``read`` returns the bytes of the file and raises ``BadImage`` if it cannot.
    """

    name: str
    label: str | None
    read: Callable[[], bytes]
    split: str | None = None


@dataclass(frozen=True, slots=True)
class ImageItem:
    """What is listed without being read: a file, a member of an archive, or rows of a table.

    ``kind`` says which. ``start`` and ``stop`` are bytes of an archive or row groups of a .parquet file; a ``stop`` of
    -1 means the end. ``size`` is in bytes and ``images`` a count, both 0 if unknown.
    """

    kind: str
    path: str
    name: str
    size: int
    label: str | None = None
    split: str | None = None
    start: int = 0
    stop: int = -1
    images: int = 1


@dataclass
class Listing:
    """What one source holds: ``unread`` are the names of files that are no images, ``notes`` sentences about it."""

    name: str
    split: str | None = field(default=None, kw_only=True)
    items: list[ImageItem] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_file(self) -> bool:
        """Whether the source is a single image file."""
        return [item.name for item in self.items] == [self.name] and self.items[0].kind == FILE


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold the images and their classes; "": find them."""

    image: str = ""
    label: str = ""


def find_images(sources: Sequence[str | Path], columns: Columns | None = None) -> Iterator[ImageEntry]:
    """Yield every image of the sources, in order.

    A source is a folder, a pattern, an image file, a .tar or .zip (or a folder in it, ``x.tar/train``), a .parquet
    file, ``hf:NAME[:SPLIT]`` or ``builtin:digits``. Raises ``UserError`` for a source that does not exist or has no
    images.
    """
    for listing in list_images([str(source) for source in sources]):
        for item in listing.items:
            yield from entries_of(item, columns or Columns())


def list_images(sources: Sequence[str]) -> list[Listing]:
    """List the sources by names and sizes only, each in the order of its paths. Raises ``UserError``."""
    if not sources:
        raise UserError("no source given: name a folder of images, a .tar or .zip, a .parquet file or builtin:digits")
    return [_list_source(source) for source in sources]


def entries_of(item: ImageItem, columns: Columns) -> Iterator[ImageEntry]:
    """Yield the images of a listed item."""
    if item.kind == PARQUET:
        rows = images_of_parquet(item.path, columns.image, columns.label, item.start, item.stop)
    elif item.kind == HUGGING_FACE:
        rows = images_of_dataset(item.path, columns.image, columns.label)
    elif item.kind == DIGITS:
        rows = digits()
    else:
        yield ImageEntry(item.name, item.label, partial(_read, item), item.split)
        return
    for row in rows:
        yield ImageEntry(f"{item.name}:{row.number}", row.label, row.read, item.split)


def _read(item: ImageItem) -> bytes:
    if item.size > MOST_BYTES:
        raise BadImage(TOO_LARGE, f"{item.size / 1e6:,.0f} MB")
    try:
        if item.kind == MEMBER:
            return read_member(item.path, item.start, item.stop)
        with open_raw(item.path) as file, read_errors(item.path):
            return file.read()
    except UnreadableError as error:
        raise BadImage(UNREADABLE, str(error)) from None


def _list_source(text: str) -> Listing:
    if text == DIGITS:
        return Listing(DIGITS, [ImageItem(DIGITS, DIGITS, "digits", 0, images=NUMBER_OF_DIGITS)])
    if text == "builtin":
        raise UserError(f'"builtin" is text: the built-in images are {DIGITS}')
    if text == "-":
        raise UserError("images cannot come from standard input (-): name a folder or a .tar")
    if text.startswith(HUGGING_FACE):
        name, split = parse_hugging_face(text)
        shown = f"{last_name(name) if Path(name).exists() else name}:{split}"
        return Listing(f"{HUGGING_FACE}{shown}", [ImageItem(HUGGING_FACE, text, shown, 0, images=0)])
    archive, inside = _split_at_archive(text)
    if archive:
        listing = _list_archive(archive, inside)
    elif is_glob(text):
        listing = _list_files(list_glob(text), root_of_glob(text))
    elif is_folder(text):
        listing = _list_files(list_folder(text), text)
        listing.notes += _links_in(text, listing.name)
    else:
        listing = _list_file(text)
    if not listing.items:
        others = [f"there is only {summary_of(listing.unread)}"] if listing.unread else []
        looked_for = f"looked for {', '.join((*ENDINGS, *ARCHIVES))} and {PARQUET} in it and its subfolders"
        raise UserError(f'no image in "{one_line(text)}": {"; ".join([looked_for, *others, *listing.notes])}')
    return listing


def _links_in(folder: str, name: str) -> Iterator[str]:
    """Yield a sentence for each kind of link in a folder that is not read."""
    yield from _not_followed(linked_folders(folder), "linked folder", name)
    yield from _not_followed(broken_links(folder), "broken link", name)


def _not_followed(links: Sequence[str], what: str, name: str) -> Iterator[str]:
    if links:
        several = f"1 {what} is" if len(links) == 1 else f"{len(links):,} {what}s are"
        yield f'{several} not followed in "{name}": {some_names(links)}'


def _list_file(path: str) -> Listing:
    if not is_remote(path) and not Path(path).is_file():
        is_there = Path(path).exists()
        raise UserError(
            f'"{one_line(path)}" is neither a file nor a folder'
            if is_there
            else f'there is no file or folder "{one_line(path)}"'
        )
    for ending, program in COMPRESSED.items():
        if path.lower().endswith(ending):
            how = f"; {program} makes a .tar of it, which can be read" if program else ""
            raise UserError(
                f'"{one_line(path)}" is compressed, so its images cannot be read at random: unpack it first{how}'
            )
    name, size = one_line(last_name(path)), size_of(path) or 0
    if path.lower().endswith(PARQUET):
        return Listing(name, list(_of_parquet(path, name)))
    return Listing(name, [ImageItem(FILE, path, name, size)])


def _of_parquet(path: str, name: str) -> Iterator[ImageItem]:
    for number, (rows, group) in enumerate(row_group_sizes(path)):
        yield ImageItem(PARQUET, path, name, group, start=number, stop=number + 1, images=rows)


def _list_files(files: Sequence[tuple[str, int]], root: str) -> Listing:
    """List the images of a folder or pattern or, if there are none, what its archives and tables hold."""
    listing = Listing(one_line(last_name(root or ".")))
    images, packed = [], []
    for path, size in files:
        relative = path.removeprefix(root).lstrip("/") if is_remote(path) else Path(path).relative_to(root).as_posix()
        name = f"{listing.name}/{one_line(relative)}"
        if path.lower().endswith(ENDINGS):
            images.append((PurePosixPath(relative).parts[:-1], ImageItem(FILE, path, name, size)))
        elif path.lower().endswith((PARQUET, *ARCHIVES)):
            packed.append((path, name))
        else:
            listing.unread.append(name)
    listing.items = _with_folders(images, listing)
    if images:
        listing.unread += [name for _, name in packed]
        return listing
    for path, name in packed:
        if path.lower().endswith(PARQUET):
            listing.items += _of_parquet(path, name)
        else:
            inner = _list_archive(path, "")
            listing.items += inner.items
            listing.unread += inner.unread
            listing.notes += inner.notes
    return listing


def _split_at_archive(text: str) -> tuple[str, str]:
    """Return the archive that a path names or leads into, and the folder in it; "", "" if there is none."""
    for path in (Path(text), *Path(text).parents):
        if path.suffix.lower() in ARCHIVES and path.is_file():
            return str(path), "/".join(Path(text).relative_to(path).parts)
    return (text, "") if is_remote(text) and text.lower().endswith(ARCHIVES) else ("", "")


def _list_archive(path: str, inside: str) -> Listing:
    listing = Listing(one_line("/".join(filter(None, (PurePosixPath(last_name(path)).stem, inside)))))
    archive = list_archive(path)
    members = sorted(member for member in archive.members if member[1].lower().endswith(ENDINGS))
    others = (member for member in archive.members if not member[1].lower().endswith(ENDINGS))
    listing.unread = [f"{listing.name}/{one_line('/'.join((*folders, name)))}" for folders, name, *_ in others]
    if archive.damage:
        listing.notes.append(
            f'"{one_line(last_name(path))}" is damaged ({archive.damage}): {len(members):,} images precede it'
        )
    listing.notes += _not_followed(archive.links, "link", listing.name)
    shared = _shared([folders for folders, *_ in members])
    wanted = tuple(PurePosixPath(inside).parts) if inside else ()
    if wanted and not any(folders[: len(wanted)] == wanted for folders, *_ in members):
        wanted = (*members[0][0][:shared], *wanted) if members else wanted
    if not members:
        return listing
    chosen = [each for each in members if each[0][: len(wanted)] == wanted]
    if not chosen:
        folders = sorted({"/".join(each[0][shared : shared + 1]) for each in members} - {""})
        raise UserError(
            f'"{one_line(path)}" has no folder "{one_line(inside)}" with images'
            + (f": its folders are {', '.join(folders[:20])}" if folders else "")
        )
    items = []
    for above, name, start, stop in chosen:
        shown = "/".join((PurePosixPath(last_name(path)).stem, *above[shared:], name))
        item = ImageItem(MEMBER, path, one_line(shown), stop - start, start=start, stop=stop)
        items.append((above[len(wanted) :], item))
    listing.items = _with_folders(items, listing)
    return listing


def _shared(folders: Sequence[tuple[str, ...]]) -> int:
    """Return how many leading folders all images share."""
    if not folders:
        return 0
    first, last = min(folders), max(folders)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def _with_folders(images: Sequence[tuple[tuple[str, ...], ImageItem]], listing: Listing) -> list[ImageItem]:
    """Give images the class and split that their folders name, and note what the splits are used for."""
    shared = _shared([folders for folders, _ in images])
    tops = {folders[shared] if len(folders) > shared else "" for folders, _ in images}
    splits = {top: SPLIT_FOLDERS.get(top.lower()) for top in tops}
    if len(tops) < 2 or None in splits.values() or TRAIN not in splits.values():
        return [replace(item, label=_class_of(folders, shared)) for folders, item in images]
    if VALIDATION not in splits.values():
        splits = {top: VALIDATION if split == TEST else split for top, split in splits.items()}
        listing.notes.append(f'"{listing.name}" has folders for training and test: the test images are for validation')
    by_top = defaultdict(list)
    for folders, item in images:
        by_top[folders[shared]].append((folders[shared + 1 :], item))
    found = []
    for top, inner in sorted(by_top.items()):
        deeper = _shared([folders for folders, _ in inner])
        found += [replace(item, label=_class_of(folders, deeper), split=splits[top]) for folders, item in inner]
    return found


def _class_of(folders: tuple[str, ...], shared: int) -> str | None:
    return one_line(folders[shared]) if len(folders) > shared else None
