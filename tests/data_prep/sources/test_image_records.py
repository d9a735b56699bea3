from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.errors import UserError
from data_prep.sources.images import BadImage, Columns, ImageEntry, find_images, list_images
from tests.data_prep.handmade_images import encoded, picture, write_tree

DATA = [encoded(picture(seed), "PNG") for seed in range(6)]


def write(path: Path, columns: dict[str, Any], *, rows: int = 2, features: dict[str, Any] | None = None) -> Path:
    """Write a .parquet file of so many rows a row group; ``features`` as the library datasets writes them."""
    table = pyarrow.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)
    return path


def structs(data: list[bytes | None]) -> Any:
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    return pyarrow.array([None if each is None else {"bytes": each, "path": "a.png"} for each in data], kind)


def found(path: Path, **columns: str) -> list[tuple[str, str | None, bytes]]:
    return [(each.name, each.label, each.read()) for each in find_images([path], Columns(**columns))]


def test_a_table_as_datasets_writes_it(tmp_path: Path) -> None:
    names = ["cat", "dog"]
    features = {
        "image": {"_type": "Image"},
        "label": {"names": names, "_type": "ClassLabel"},
        "id": {"dtype": "int64", "_type": "Value"},
    }
    labels = [0, 1, 1, None, -1]
    path = write(
        tmp_path / "x.parquet", {"id": range(5), "image": structs(DATA[:5]), "label": labels}, features=features
    )
    expected = ["cat", "dog", "dog", None, None]
    assert found(path) == [(f"x.parquet:{n + 1}", expected[n], DATA[n]) for n in range(5)]
    (listing,) = list_images([str(path)])
    assert [item.images for item in listing.items] == [2, 2, 1]


def test_plain_columns_of_bytes_and_names(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"picture": DATA[:3], "category": ["a", "b", ""], "other": [1, 2, 3]})
    assert [(label, data) for _, label, data in found(path)] == list(zip(["a", "b", None], DATA, strict=False))
    numbers = write(tmp_path / "y.parquet", {"picture": DATA[:3], "label": [7, 3, -1]})
    assert [label for _, label, _ in found(numbers)] == ["7", "3", None]
    without = write(tmp_path / "z.parquet", {"picture": DATA[:2], "size": [7, 3]})
    assert [label for _, label, _ in found(without)] == [None, None]
    assert [label for _, label, _ in found(without, label="size")] == ["7", "3"]


def test_numbers_with_gaps_are_classes_though_pandas_makes_them_floats(tmp_path: Path) -> None:
    values = [7.0, float("nan"), 3.0, None, -1.0, 0.5]
    table = write(tmp_path / "x.parquet", {"picture": DATA, "label": values})
    assert [label for _, label, _ in found(table)] == ["7", None, "3", None, None, "0.5"]
    blank = write(tmp_path / "y.parquet", {"picture": DATA[:2], "label": [" ", "a"]})
    assert [label for _, label, _ in found(blank)] == [None, "a"]


def test_columns_of_lists_or_images_hold_no_class(tmp_path: Path) -> None:
    columns = {"picture": DATA[:2], "labels": [["a", "b"], ["a"]], "mask": DATA[2:4], "age": [1, 2]}
    path = write(tmp_path / "x.parquet", columns)
    assert [label for _, label, _ in found(path, image="picture")] == [None, None]
    for label in ("labels", "mask"):
        message = f'has images or lists in "{label}", not a class in each row: choose --label-column from "age"$'
        with pytest.raises(UserError, match=message):
            found(path, image="picture", label=label)


@pytest.mark.parametrize("metadata", ["not JSON", "[]", "{}", '{"info": null}', '{"info": {"features": {"a": 3}}}'])
def test_notes_of_the_library_datasets_that_make_no_sense_are_ignored(tmp_path: Path, metadata: str) -> None:
    table = pyarrow.table({"image": DATA[:2], "label": [0, 1]}).replace_schema_metadata({"huggingface": metadata})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert [label for _, label, _ in found(tmp_path / "x.parquet")] == ["0", "1"]


def test_an_empty_cell_is_a_bad_image(tmp_path: Path) -> None:
    first, second = find_images([write(tmp_path / "x.parquet", {"image": structs([None, DATA[0]])})])
    with pytest.raises(BadImage, match="empty file"):
        first.read()
    assert second.read() == DATA[0]


def test_columns_that_are_missing_or_ambiguous_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"left": DATA[:2], "right": DATA[2:4], "text": ["a", "b"]})
    with pytest.raises(UserError, match=r'several columns with images.* choose --image-column from "left", "right"'):
        found(path)
    assert [data for *_, data in found(path, image="right")] == DATA[2:4]
    with pytest.raises(UserError, match='no column "middle": choose --image-column from "left", "right", "text"'):
        found(path, image="middle")
    with pytest.raises(UserError, match='no column "kind": choose --label-column'):
        found(path, image="left", label="kind")
    with pytest.raises(UserError, match='no column with images: choose --image-column from "a", "b"'):
        found(write(tmp_path / "y.parquet", {"a": ["x"], "b": [1]}))


def test_a_column_that_holds_no_images_gives_bad_images(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"text": ["a", "b"]})
    entries = list(find_images([path], Columns(image="text")))
    with pytest.raises(BadImage):
        entries[0].read()


def test_a_folder_of_tables_is_read_by_name(tmp_path: Path) -> None:
    for name, rows in (("b", DATA[2:4]), ("a", DATA[:2])):
        write(tmp_path / f"{name}.parquet", {"image": structs(rows)})
    assert [data for *_, data in found(tmp_path)] == DATA[:4]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))


def entries_of(source: str) -> list[ImageEntry]:
    return list(find_images([source]))


def test_a_local_dataset_of_tables(tmp_path: Path, offline: None) -> None:
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    folder = tmp_path / "pets"
    (folder / "data").mkdir(parents=True)
    for split, rows in (("train", slice(0, 3)), ("test", slice(3, 5))):
        columns = {"image": structs(DATA[rows]), "label": [0, 1, 1, 0, 1][rows]}
        write(folder / "data" / f"{split}-00000-of-00001.parquet", columns, features=features)
    entries = entries_of(f"hf:{folder}")
    assert [(each.name, each.label, each.read()) for each in entries] == [
        ("pets:train:1", "cat", DATA[0]),
        ("pets:train:2", "dog", DATA[1]),
        ("pets:train:3", "dog", DATA[2]),
    ]
    assert [each.read() for each in entries_of(f"hf:{folder}:test")] == DATA[3:5]
    with pytest.raises(UserError, match=r'cannot read the dataset ".*pets", split "other"'):
        entries_of(f"hf:{folder}:other")


def test_a_local_dataset_of_folders(tmp_path: Path, offline: None) -> None:
    folder = write_tree(tmp_path / "pets", {"train/cat/1.png": DATA[0], "train/dog/2.png": DATA[1]})
    assert [(each.label, each.read()) for each in entries_of(f"hf:{folder}")] == [("cat", DATA[0]), ("dog", DATA[1])]
