"""Products of bfloat16 on a CPU: where ``precision`` wants them, and what a run with them learns."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from lm.kernels import dispatch
from lm.model import device
from lm.model.device import autocast, machine_rate, uses_bfloat16
from lm.runs.directory import Run
from lm.training.pretraining import train

CPU = torch.device("cpu")


def validations(run: Run) -> list[float]:
    lines = [line["validation"] for line in run.metrics() if "validation" in line]
    return [loss["nats_per_token"] for losses in lines for loss in losses.values()]


@pytest.mark.parametrize(
    ("precision", "able", "expected"),
    [
        ("native", True, torch.bfloat16), ("native", False, torch.float32), ("auto", True, torch.float32),
        ("float32", True, torch.float32), ("bfloat16", False, torch.bfloat16),
    ],
)  # fmt: skip
def test_products_are_in_bfloat16_where_the_setting_and_the_cpu_want_it(monkeypatch, precision, able, expected):
    monkeypatch.setattr(dispatch, "multiplies_bfloat16", lambda: able)
    a = torch.randn(4, 4)
    with autocast(CPU, precision, training=True):
        assert (a @ a).dtype == expected
    with autocast(CPU, precision, training=False):
        assert (a @ a).dtype == (torch.float32 if precision == "native" else expected)
    assert uses_bfloat16(CPU, precision) == (expected == torch.bfloat16)


@pytest.mark.parametrize(("precision", "dtype"), [("native", torch.bfloat16), ("float32", torch.float32)])
def test_the_rate_of_a_machine_is_that_of_the_products_of_a_run(bfloat16_products, monkeypatch, precision, dtype):
    seen = set()
    monkeypatch.setattr(device, "matmul", lambda a, b: seen.update((a.dtype, b.dtype)))
    device._measured_rate.cache_clear()
    machine_rate(CPU, precision)
    device._measured_rate.cache_clear()
    assert seen == {dtype}


def test_a_run_in_bfloat16_learns_what_one_in_float32_does(bfloat16_products, small, tmp_path, recorder):
    config = small.replace(steps=60, learning_rate=0.01, validate_every=30)
    precise, rounded = (
        validations(train(config.replace(precision=precision), tmp_path / precision, recorder))
        for precision in ("float32", "native")
    )
    assert precise != rounded
    assert rounded == pytest.approx(precise, rel=0.01)
    assert rounded[-1] < 0.9 * rounded[0]


def test_a_run_in_bfloat16_that_was_stopped_ends_with_the_same_bits(bfloat16_products, small, tmp_path, recorder):
    config, path = small.replace(steps=8, checkpoint_every=4, keep_checkpoints=2), tmp_path / "run"
    whole = train(config, path, recorder).newest()
    assert whole.state["place"]["products"] == "bfloat16"
    expected = whole.model()
    shutil.rmtree(whole.path)
    stopped = train(config, path, recorder)
    assert "resuming at step 4" in recorder.notes
    found = stopped.newest().model()
    assert stopped.newest().step == 8
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_of_an_earlier_version_reports_that_its_products_change(bfloat16_products, trained, tmp_path, recorder):
    path = shutil.copytree(trained.path, tmp_path / "run")
    state = path / "checkpoints" / "step_00000100" / "state.json"
    kept = json.loads(state.read_text())
    del kept["place"]["products"]
    state.write_text(json.dumps(kept))
    train(trained.config.replace(steps=101), path, recorder)
    assert any("with products 'float32' (now 'bfloat16')" in note for note in recorder.notes)
