"""docs/adding-an-objective.md, followed to the letter in a copy of the code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.pipeline.images import build_images
from tests.lm.conftest import draw_pictures

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "adding-an-objective.md").read_text(encoding="utf-8")


def python(folder: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The code with the page's files and its line added, and what Python has compiled of it."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("lm", "data_prep", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.pyc.*"))
    for name in ("train.py", "evaluate.py"):
        shutil.copy(ROOT / name, folder)
    files = dict(re.findall(r"`((?:lm|tests)/\S+\.py)`:\n```python\n(.*?)```", PAGE, flags=re.DOTALL))
    assert len(files) == 4
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    lines = re.findall(r"```python\n(    \"\w+\": \(.*?\),\n)```", PAGE)
    (images,) = re.findall(r"```python\n(IMAGE_OBJECTIVES = .*\n)```", PAGE)
    assert len(lines) == 2
    settings = folder / "lm" / "config" / "objective_settings.py"
    text = settings.read_text(encoding="utf-8")
    assert text.count("OBJECTIVES = {\n") == 1
    (before,) = [line for line in text.splitlines(keepends=True) if line.startswith("IMAGE_OBJECTIVES = ")]
    text = text.replace("OBJECTIVES = {\n", "OBJECTIVES = {\n" + "".join(lines))
    settings.write_text(text.replace(before, images), encoding="utf-8")
    return folder


def test_the_page_names_the_methods_of_the_face():
    source = (ROOT / "lm" / "objectives" / "objective.py").read_text(encoding="utf-8")
    face = source[source.index("class Objective(Protocol)") : source.index("class Comparing")]
    methods = set(re.findall(r"    def (\w+)\(", face))
    assert methods == set(
        re.findall(r"`(\w+)\(", "".join(line for line in PAGE.splitlines() if line.startswith("| `")))
    )


def test_the_tests_of_the_page_pass(copy):
    assert "2 passed" in python(
        copy, "-m", "pytest", "-p", "no:cacheprovider", "tests", "-c", "/dev/null", "--rootdir", "."
    )


def test_the_new_objective_trains_resumes_and_is_evaluated(copy, dataset):
    shape = ["--num-layers", "1", "--hidden-size", "16", "--num-heads", "2", "--context-length", "16"]
    train = [
        "train.py",
        "configs/tiny.toml",
        "--data",
        str(dataset.directory),
        "--run",
        "run",
        *shape,
        "--batch-tokens",
        "128",
    ]
    train += ["--objective", "word_dropout", "--threads", "1", "--validate-every", "4", "--log-every", "1"]
    python(copy, *train, "--steps", "4")
    assert "resuming at step 4" in python(copy, *train, "--steps", "8")
    lines = [json.loads(line) for line in (copy / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert [list(line["validation"]) for line in lines if "validation" in line] == [["next_token"]] * 2
    assert list(json.loads(python(copy, "evaluate.py", "run", "--json").splitlines()[-1])["validation"]) == [
        "next_token"
    ]


def test_the_new_objective_on_images_trains_resumes_is_evaluated_and_reported(copy):
    build_images([draw_pictures(copy / "pictures")], copy / "data", 16, workers=1)
    train = ["train.py", "configs/images-simclr.toml", "--data", "data", "--run", "turned", "--objective", "rotation"]
    train += ["--num-layers", "1", "--hidden-size", "16", "--num-heads", "2", "--batch-images", "16", "--threads", "1"]
    train += ["--validate-every", "2", "--log-every", "1"]
    python(copy, *train, "--steps", "2")
    assert "resuming at step 2" in python(copy, *train, "--steps", "4")
    lines = [json.loads(line) for line in (copy / "turned" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert all("knn_accuracy" in line["validation"]["rotation"] for line in lines if "validation" in line)
    (found,) = (line for line in python(copy, "evaluate.py", "turned", "--json").splitlines() if line.startswith("{"))
    assert set(json.loads(found)["features"]) == {"knn", "linear"}
    assert "Nearest neighbors" in (copy / "turned" / "report.html").read_text(encoding="utf-8")
