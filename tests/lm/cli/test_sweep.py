from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lm import api
from lm.cli.main import main
from lm.config import sweep_plan
from lm.runs.directory import open_run


@pytest.fixture
def sweep(small, tmp_path):
    """``kindling sweep`` of a small recipe, into the folder ``sweep``: (*arguments) → its result."""
    small.replace(steps=4, validate_every=2).save(tmp_path / "small.toml")

    def call(*arguments: object) -> Result:
        command = ["sweep", tmp_path / "small.toml", "--out", tmp_path / "sweep", *arguments]
        return CliRunner().invoke(main, list(map(str, command)))

    return call


def test_a_sweep_trains_prints_its_table_and_writes_its_page(sweep, tmp_path):
    arguments = ("--set", "learning_rate=0.001,0.03", "--set", "optimizer=adamw", "--beta1", 0.8)
    done = sweep(*arguments)
    assert done.exit_code == 0, done.output
    header, first, second, best = done.stdout.splitlines()[:4]
    assert header.split() == ["point", "learning_rate", "optimizer", "bits", "per", "byte"]
    assert first.split()[:3] == ["002", "0.03", "adamw"]
    assert second.split()[:3] == ["001", "0.001", "adamw"]
    assert best.startswith("Best: point 002 with learning_rate 0.03, optimizer adamw: bits per byte")
    assert f"point 2 of 2: learning_rate 0.03, optimizer adamw, in {tmp_path / 'sweep' / '002'}" in done.stderr
    assert done.stderr.endswith(f"{tmp_path / 'sweep' / 'sweep.html'}\n")
    run = open_run(tmp_path / "sweep" / "002")
    assert (run.config.optimizer.learning_rate, run.config.optimizer.beta1) == (0.03, 0.8)
    assert (run.path / "report.html").is_file()
    again = sweep(*arguments, "--json")
    assert "point" not in again.stderr
    assert json.loads(again.stdout) == json.loads((tmp_path / "sweep" / "table.json").read_text())
    last = [line["validation"] for line in run.metrics() if "validation" in line][-1]
    mean = sum(group["bits_per_byte"] for group in last.values()) / 2
    assert json.loads(again.stdout)["points"][0]["value"] == mean


def test_a_search_takes_the_points_that_optuna_suggests(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "_write_report", lambda run: None)  # a second for each run
    pytest.importorskip("optuna", reason="the extra sweep is not installed")
    done = sweep("--set", "learning_rate=0.001..0.1:log", "--trials", 2, "--steps", 2, "--json")
    assert done.exit_code == 0, done.output
    rates = [point["settings"]["learning_rate"] for point in json.loads(done.stdout)["points"]]
    assert sorted(rates) == sorted(
        open_run(tmp_path / "sweep" / each).config.optimizer.learning_rate for each in ("001", "002")
    )
    assert len(set(rates)) == 2


@pytest.mark.parametrize(
    ("arguments", "sentences"),
    [
        ([], ["name a setting to vary and its values, for example --set learning_rate=0.003,0.01"]),
        (["--set", "lr=1", "--set", "beta1=2"], ['did you mean "learning_rate"?', "--set beta1: each value must be"]),
        (["--set", "beta1=0.1,0.2", "--beta1", 0.3], ["--beta1 fixes what --set beta1 varies: leave one of them out"]),
        (["--set", "seed=1,2", "--seeds", "0,1"], ["--seeds fixes what --set seed varies: leave one of them out"]),
        (["--set", "beta1=0.1", "--seed", 1, "--seeds", "0,1"], ["leave out --seed"]),
        (["--set", "beta1=0.1", "--seeds", "x"], ["--seeds x must be different whole numbers"]),
        (["--set", "beta1=0.1..0.2", "--trials", 0], ["--trials must be at least 1, not 0"]),
        (["--set", "hidden_size=32,33"], ["hidden_size 33 is not divisible by num_heads 2", "(at hidden_size 33)"]),
        (["--set", "data=nowhere,elsewhere", "--lr", 1], ['unknown option --lr: did you mean "--learning-rate"?']),
    ],
)
def test_a_mistake_is_reported_before_anything_is_written(sweep, tmp_path, arguments, sentences):
    done = sweep(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert all(sentence in done.stderr for sentence in sentences), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_without_any_point_that_finished_fails(sweep, tmp_path):
    done = sweep("--set", "learning_rate=1e30", "--optimizer", "adamw", "--json")
    assert done.exit_code == 2
    assert "its training has diverged" in json.loads(done.stdout)["points"][0]["note"]
    assert done.stderr.endswith("error: no point has finished: the table says why\n")
    assert (tmp_path / "sweep" / "sweep.html").is_file()


def test_without_optuna_a_search_says_what_to_install(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_plan, "find_spec", lambda name: None)
    done = sweep("--set", "beta1=0.1..0.2", "--trials", 2)
    assert done.stderr == 'error: --trials needs the package "optuna": pip install "kindling-lm[sweep]"\n'
    assert not (tmp_path / "sweep").exists()


def test_a_mistake_in_the_settings_of_a_point_loads_no_torch(sweep, tmp_path):
    code = "import sys; from lm.cli.main import main; main(sys.argv[1:], standalone_mode=False)"
    arguments = ["sweep", tmp_path / "small.toml", "--set", "hidden_size=33,35"]
    program = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr.count("is not divisible by num_heads 2") == 2


def test_a_sweep_is_refused_where_it_cannot_be(sweep, tmp_path, monkeypatch):
    (tmp_path / "sweep").touch()
    assert f"{tmp_path / 'sweep'} is a file: choose another --out" in sweep("--set", "beta1=0.1").stderr
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "a sweep trains in one process: start it without torchrun" in sweep("--set", "beta1=0.1").stderr


def test_the_usual_folder_has_the_name_of_the_recipe(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "_write_report", lambda run: None)
    small.replace(steps=1).save(Path("little.toml"))
    assert CliRunner().invoke(main, ["sweep", "little.toml", "--set", "beta1=0.9"]).exit_code == 0
    assert (tmp_path / "sweeps" / "little" / "001" / "config.toml").is_file()
