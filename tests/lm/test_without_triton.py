"""A machine without a GPU needs no Triton, which takes more room than the rest of Kindling."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Stands for "pip uninstall triton": import fails, and find_spec finds nothing.
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import importlib, pkgutil, lm
for module in pkgutil.walk_packages(lm.__path__, "lm."):
    if not module.name.endswith("_triton") and module.name != "lm.evaluation.lm_eval_harness":
        importlib.import_module(module.name)
from lm.cli.main import main
main(sys.argv[1:])
"""


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TRITON, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_everything_is_imported_and_a_model_trained_without_triton(small, tmp_path):
    small.replace(steps=4).save(tmp_path / "recipe.toml")
    done = call("train", tmp_path / "recipe.toml", "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "kernels: PyTorch" in done.stderr
    assert (tmp_path / "run" / "checkpoints" / "step_00000004").exists()
