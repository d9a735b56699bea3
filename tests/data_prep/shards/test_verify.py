"""A dataset that is not what was built: ``verify`` finds every flipped bit, training altered sizes and headers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.shards.tokens import IDX_HEADER, SPLITS, ShardWriter, open_dataset
from lm.config.settings import Config
from tests.data_prep.handmade import BYTES, finish_dataset

Prep = Callable[..., Result]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of several shards in both splits."""
    directory = tmp_path_factory.mktemp("verify") / "data"
    directory.mkdir()
    rng = np.random.default_rng(0)
    records = {}
    for split in SPLITS:
        with ShardWriter(directory, split, vocab_size=BYTES.vocab_size, shard_tokens=400) as writer:
            for length in rng.integers(1, 60, size=30):
                ids = BYTES.encode("".join(rng.choice(list("abc "), size=length)))
                writer.add(np.array([*ids, BYTES.end_of_text_id]), text_bytes=len(ids), words=1)
        records[split] = writer.records
    finish_dataset(directory, BYTES, records)
    return directory


def shard_files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".idx"))


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_one_flipped_bit_anywhere_is_found_and_its_file_named(whole: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(shard_files(whole)))
    path = whole / name
    bit = data.draw(st.integers(0, 8 * path.stat().st_size - 1))
    flip(path, bit)
    try:
        with pytest.raises(UserError) as told:
            open_dataset(whole).verify()
        assert f'"{path}"' in str(told.value)
    finally:
        flip(path, bit)
    open_dataset(whole).verify()


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_the_command_names_the_file_and_its_status_says_so(
    prep: Prep, whole: Path, tmp_path: Path, suffix: str
) -> None:
    directory = Path(shutil.copytree(whole, tmp_path / "data"))
    path = directory / f"validation-00000_01{suffix}"
    flip(path, 8 * path.stat().st_size - 1)
    result = prep("verify", directory)
    assert result.exit_code == 2
    assert str(path) in result.stderr and "Traceback" not in result.stderr


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def alter_header(path: Path) -> None:
    flip(path, 8 * (IDX_HEADER.size - 1))


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        (harm, f"{split}-00000_01{suffix}")
        for harm in (cut, lengthen, Path.unlink)
        for split in SPLITS
        for suffix in (".bin", ".idx")
    ]
    + [(alter_header, "train-00000_01.idx"), (cut, "tokenizer.json"), (Path.unlink, "tokenizer.json")],
)
def test_training_refuses_an_altered_file_before_it_makes_a_run(
    whole: Path,
    tmp_path: Path,
    small: Config,
    quietly: Callable[..., object],
    harm: Callable[[Path], None],
    name: str,
) -> None:
    directory = Path(shutil.copytree(whole, tmp_path / "data"))
    harm(directory / name)
    with pytest.raises(UserError) as told:
        quietly(small.replace(data=(str(directory),)), tmp_path / "run")
    assert f'"{directory / name}"' in str(told.value)
    assert not (tmp_path / "run").exists()
