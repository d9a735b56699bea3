"""The Python face: two names, loaded when they are used."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import data_prep
from data_prep.errors import UserError
from data_prep.progress import SilentReporter


def test_a_build_opens_what_the_command_line_makes(
    prep: Callable[..., object],
    make_text: Callable[[int, int], str],
    tree: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    (tmp_path / "a.txt").write_text(make_text(1, 40))
    options = {"vocab_size": 300, "max_document_bytes": 500, "extra_tokens": ["chat"], "workers": 1}
    quiet = SilentReporter()
    dataset = data_prep.build([tmp_path / "a.txt"], tmp_path / "out", progress=quiet, **options)
    assert (dataset.vocab_size, dataset.directory) == (300, tmp_path / "out")
    arguments = ["--vocab-size", 300, "--max-document-bytes", 500, "--extra-token", "chat", "--workers", 1]
    prep("build", tmp_path / "a.txt", "--out", tmp_path / "same", *arguments)
    assert tree(tmp_path / "same") == tree(tmp_path / "out")
    again = data_prep.build(str(tmp_path / "a.txt"), str(tmp_path / "out"), progress=quiet, **options)
    assert again.fingerprint == dataset.fingerprint == data_prep.open_dataset(tmp_path / "out").fingerprint


def test_a_build_reports_to_the_console_unless_told_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("one\n\n" * 40)
    options = {"tokenizer_kind": "bytes", "validation_fraction": 0.0, "workers": 1}
    data_prep.build([tmp_path / "a.txt"], tmp_path / "loud", **options)
    assert "encoding: 0.0 MB" in capsys.readouterr().err
    data_prep.build([tmp_path / "a.txt"], tmp_path / "quiet", progress=SilentReporter(), **options)
    assert capsys.readouterr() == ("", "")


def test_unknown_and_wrong_settings_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean vocab_size"):
        data_prep.build(["builtin"], tmp_path / "out", vocabsize=300)
    with pytest.raises(UserError, match="--vocab-size 3 is too small"):
        data_prep.build(["builtin"], tmp_path / "out", vocab_size=3)
    assert list(tmp_path.iterdir()) == []


def test_importing_the_package_loads_nothing_heavy_and_other_names_are_no_attributes() -> None:
    program = (
        "import sys, data_prep, data_prep.errors, data_prep.settings, data_prep.cli.main\n"
        "print(sorted({'numpy', 'tokenizers', 'rich', 'torch'} & sys.modules.keys()), hasattr(data_prep, 'sources'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\n"
    with pytest.raises(AttributeError, match="no attribute 'bild'"):
        data_prep.bild  # noqa: B018


@pytest.mark.parametrize("room", ["sources", "cleaning", "tokenizers", "shards", "pipeline"])
def test_each_room_has_a_face_of_three_to_ten_names(room: str) -> None:
    program = (
        f"import data_prep.{room} as room; print(sorted(room.__all__), all(hasattr(room, n) for n in room.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names, complete = done.stdout.rsplit(" ", 1)
    assert complete == "True\n"
    assert 3 <= len(names.split(",")) <= 10
