"""Images in the rows of .parquet files and Hugging Face datasets, and scikit-learn's digits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from data_prep.errors import UserError
from data_prep.sources.decoding import EMPTY, UNREADABLE, BadImage
from data_prep.sources.documents import one_line
from data_prep.sources.records import (
    HUGGING_FACE,
    PARQUET_BUFFER_BYTES,
    first_line,
    known_fields,
    parse_hugging_face,
    row_groups,
)
from data_prep.sources.storage import UnreadableError, open_raw

DIGITS = "builtin:digits"
NUMBER_OF_DIGITS = 1797
LABEL_NAMES = ("label", "labels", "class", "category", "fine_label")
NO_CLASS = ("Image", "list", "List", "LargeList", "Sequence", "dict")  # kinds of columns that hold no class
BATCH_ROWS = 16

__all__ = [
    "DIGITS",
    "HUGGING_FACE",
    "NUMBER_OF_DIGITS",
    "digits",
    "images_of_dataset",
    "images_of_parquet",
    "row_group_sizes",
]


@dataclass(frozen=True, slots=True)
class ImageRow:
    """The image of one row, counted from 1; ``read`` returns its bytes or raises ``BadImage``."""

    number: int
    label: str | None
    read: Callable[[], bytes]


def row_group_sizes(path: str) -> list[tuple[int, int]]:
    """Return rows and compressed bytes of each row group of a .parquet file. Raises ``UserError`` if it is not one."""
    try:
        with open_raw(path) as file:
            groups = row_groups(file)
    except UnreadableError as error:
        raise UserError(f'"{one_line(path)}" {error}: make it readable') from None
    if not groups:
        raise UserError(f'"{one_line(path)}" is not a whole .parquet file, or has no rows: get an intact copy')
    return groups


def images_of_parquet(path: str, image: str, label: str, start: int, stop: int) -> Iterator[ImageRow]:
    """Yield the images in row groups ``[start, stop)`` of a .parquet file; "" for a column means: find it."""
    import pyarrow
    import pyarrow.parquet

    try:
        with open_raw(path) as file:
            parquet = pyarrow.parquet.ParquetFile(file, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False)
            schema = parquet.schema_arrow
            features = _features_of((schema.metadata or {}).get(b"huggingface", b""))
            kinds = {name: _kind_of_arrow(schema.field(name).type) for name in schema.names}
            kinds |= {name: each["_type"] for name, each in features.items() if name in kinds}
            image, label = _columns(f'"{one_line(path)}"', kinds, image, label)
            names = features.get(label, {}).get("names")
            row = sum(parquet.metadata.row_group(group).num_rows for group in range(start))
            columns = [image, label] if label else [image]
            for batch in parquet.iter_batches(BATCH_ROWS, row_groups=list(range(start, stop)), columns=columns):
                for values in batch.to_pylist():
                    row += 1
                    yield ImageRow(row, _label(values.get(label), names), partial(_bytes_of, values[image]))
    except (pyarrow.ArrowException, OSError, UnreadableError) as error:
        raise UserError(f'cannot read all of "{one_line(path)}": {first_line(error)}') from None


def images_of_dataset(location: str, image: str, label: str) -> Iterator[ImageRow]:
    """Yield the images of ``hf:NAME[:SPLIT]``, streamed; "" for a column means: find it. Raises ``UserError``."""
    import datasets  # takes seconds to import

    name, split = parse_hugging_face(location)
    try:
        rows = datasets.load_dataset(name, split=split, streaming=True)
        features = rows.features or next(iter(rows)) or {}
        kinds = {column: type(feature).__name__ for column, feature in features.items()}
        image, label = _columns(f'the dataset "{name}"', kinds, image, label)
        if kinds[image] == "Image":
            rows = rows.cast_column(image, datasets.Image(decode=False))
        names = getattr(features.get(label), "names", None)
        for number, values in enumerate(rows, start=1):
            yield ImageRow(number, _label(values.get(label), names), partial(_bytes_of, values[image]))
    except UserError:
        raise
    except Exception as error:  # the library raises anything from ValueError to errors of its network client
        raise UserError(f'cannot read the dataset "{name}", split "{split}": {first_line(error)}') from error


def _features_of(metadata: bytes) -> dict[str, dict[str, Any]]:
    """Return the columns of images and of classes that the library datasets has noted in a file; {} if it has not."""
    try:
        features = json.loads(metadata)["info"]["features"].items()
        return {name: each for name, each in features if each["_type"] in ("Image", "ClassLabel")}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _kind_of_arrow(kind: Any) -> str:
    from pyarrow import types

    binary = types.is_binary(kind) or types.is_large_binary(kind)
    struct = types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    return "Image" if binary or struct else "list" if types.is_nested(kind) else "other"


def _columns(where: str, kinds: dict[str, str], image: str, label: str) -> tuple[str, str]:
    """Return the names of the columns with images and with classes, "" if there are no classes."""
    for wanted, option in ((image, "--image-column"), (label, "--label-column")):
        if wanted and wanted not in kinds:
            raise UserError(f'{where} has no column "{wanted}": choose {option} from {known_fields(kinds)}')
    images = [image] if image else [name for name, kind in kinds.items() if kind == "Image"]
    if len(images) != 1:
        several = f"several columns with images, {known_fields(images)}" if images else "no column with images"
        raise UserError(f"{where} has {several}: choose --image-column from {known_fields(images or kinds)}")
    classes = [name for name, kind in kinds.items() if kind not in NO_CLASS]
    if label and label not in classes:
        others = f": choose --label-column from {known_fields(classes)}" if classes else ""
        raise UserError(f'{where} has images or lists in "{label}", not a class in each row{others}')
    labels = [name for name in classes if kinds[name] == "ClassLabel"]
    named = [name for name in LABEL_NAMES if name in classes]
    return images[0], label or (labels[0] if len(labels) == 1 else (named or [""])[0])


def _label(value: Any, names: list[str] | None) -> str | None:
    if isinstance(value, float) and value.is_integer():  # pandas makes whole numbers so if one is missing
        value = int(value)
    if value is None or value != value or value == -1 or not str(value).strip():
        return None
    if names and isinstance(value, int):
        return one_line(names[value]) if 0 <= value < len(names) else None
    return one_line(str(value))


def _bytes_of(value: Any) -> bytes:
    """Return the bytes of an image column's value: bytes, or a struct of bytes and a path."""
    path = None
    if isinstance(value, dict):
        value, path = value.get("bytes"), value.get("path")
    if isinstance(value, bytes):
        return value
    if path is None:
        raise BadImage(EMPTY)
    try:
        with open_raw(path) as file:
            return file.read()
    except (UnreadableError, UserError) as error:
        raise BadImage(UNREADABLE, str(error)) from None


def digits() -> Iterator[ImageRow]:
    """Yield scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, gray from 0 to 16, as PGM files."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(f'{DIGITS} needs the package scikit-learn: pip install "kindling-lm[tasks]"') from None
    found = load_digits()
    for number, (image, label) in enumerate(zip(found.images, found.target, strict=True), start=1):
        levels = (image * 255 / 16).round().astype("u1")
        yield ImageRow(number, str(label), partial(bytes, b"P5 8 8 255\n" + levels.tobytes()))
