from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from data_prep.errors import UserError
from lm.cli.main import main
from lm.config.recipes import find_recipe, load_config
from lm.data.corpora import Corpora
from lm.model.device import machine_rate
from lm.model.transformer import Transformer
from lm.objectives.batches import TrainingBatches
from lm.training import plan, pretraining
from lm.training.memory_estimate import step_memory
from lm.training.plan import (
    MOST_EPOCHS,
    DryStep,
    choose_rows,
    dry_step,
    format_bytes,
    format_time,
    plan_run,
    settle_micro_batch,
)
from lm.training.pretraining import train

CPU = torch.device("cpu")
MEMORY = 10**11


@pytest.fixture
def known(small):
    """A run whose vocabulary is known."""
    return small.replace(vocab_size=400)


def metrics_of(path: Path) -> list[dict]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    measured = ("tokens_per_second", "share_of_peak", "memory_bytes")
    return [{name: value for name, value in line.items() if name not in measured} for line in lines]


def test_a_run_with_a_dry_step_is_the_same_bit_for_bit(small, quietly, tmp_path, monkeypatch):
    config = small.replace(steps=24, dropout=0.1, log_every=1, checkpoint_every=12, micro_batch_rows=4)
    measured = []
    real = plan.dry_step
    monkeypatch.setattr(plan, "dry_step", lambda *arguments: measured.append(1) or real(*arguments))
    with_it = quietly(config, tmp_path / "with")
    assert measured
    monkeypatch.setattr(pretraining, "FEWEST_STEPS", 1000)
    without = quietly(config, tmp_path / "without")
    assert len(measured) == 1
    assert metrics_of(with_it.path) == metrics_of(without.path)
    for part in ("model", "optimizer"):
        ours, theirs = (getattr(run.newest(), part)() for run in (with_it, without))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_dry_step_leaves_weights_and_gradients_as_they_are(dataset, known):
    model = Transformer(known.model).initialize(0)
    batches = TrainingBatches(Corpora([dataset]), known)
    objective, batch = batches.objective, batches.batch(0)
    found = dry_step(model, objective, known.replace(micro_batch_rows=4), batch, 100)
    assert found.rows == 4
    assert found.seconds > 0
    assert all(p.grad is None for p in model.parameters())
    again = Transformer(known.model).initialize(0)
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert dry_step(model, objective, known, batch, 3).rows == 3


def test_the_time_of_part_of_a_batch_is_scaled_to_all_of_it(dataset, known, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(plan, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    batches = TrainingBatches(Corpora([dataset]), known)
    objective, batch = batches.objective, batches.batch(0)
    # Each pass over 2 of the 8 rows takes one second of this clock, and each update one.
    assert dry_step(Transformer(known.model), objective, known, batch, 2).seconds == 4 * 1 + 1


def test_the_largest_micro_batch_that_fits_is_chosen(known, monkeypatch):
    known = known.replace(batch_tokens=32 * 6)
    for rows in (6, 3, 2, 1):
        memory = step_memory(known, rows, CPU)
        need = memory.total + plan.process_memory(memory, CPU, 0)
        assert choose_rows(known, CPU, int(need / 0.8) + 2) == rows
    assert choose_rows(known, CPU, int(need / 0.8) - 2) is None
    monkeypatch.setattr(plan, "available_memory", lambda device: need)
    assert settle_micro_batch(known, CPU).data.micro_batch_rows == 1  # with little to spare
    monkeypatch.setattr(plan, "available_memory", lambda device: need - 1)
    with pytest.raises(UserError, match="micro_batch_rows 1 needs about"):
        settle_micro_batch(known, CPU)


def test_a_cpu_takes_no_more_tokens_at_a_time_than_make_it_faster(known):
    assert choose_rows(known.replace(batch_tokens=32 * 1000), CPU, MEMORY) == 125
    assert choose_rows(known.replace(context_length=8192, batch_tokens=8192 * 4), CPU, MEMORY) == 1


def test_what_was_asked_for_wins_then_what_the_run_was_begun_with(known, monkeypatch):
    monkeypatch.setattr(plan, "available_memory", lambda device: MEMORY)
    assert settle_micro_batch(known.replace(micro_batch_rows=2), CPU).data.micro_batch_rows == 2
    begun = known.replace(micro_batch_rows=4)
    assert settle_micro_batch(known, CPU, begun).data.micro_batch_rows == 4
    assert settle_micro_batch(known.replace(batch_tokens=32 * 6), CPU, begun).data.micro_batch_rows == 6
    assert settle_micro_batch(known, CPU).data.micro_batch_rows == 8


def test_the_choice_is_kept_when_a_run_goes_on(small, quietly, tmp_path, monkeypatch):
    assert quietly(small.replace(steps=1), tmp_path / "run").config.data.micro_batch_rows == 8
    assert load_config(tmp_path / "run" / "config.toml").data.micro_batch_rows == 8
    monkeypatch.setattr(plan, "CPU_MICRO_BATCH_TOKENS", 64)
    assert quietly(small.replace(steps=2), tmp_path / "run").config.data.micro_batch_rows == 8
    assert quietly(small.replace(steps=2), tmp_path / "new").config.data.micro_batch_rows == 2


def test_a_model_that_does_not_fit_is_refused_with_what_would(known, small, quietly, tmp_path, monkeypatch):
    known = known.replace(num_layers=6, hidden_size=512, num_heads=8)
    three, six = (step_memory(known.replace(num_layers=n), 1, CPU) for n in (3, 6))
    room = (three.total + plan.process_memory(three, CPU, 0)) / 0.8
    monkeypatch.setattr(plan, "available_memory", lambda device: int(room) + 2)
    assert six.total > room
    with pytest.raises(UserError, match=r"micro_batch_rows 1 needs about \d+ MB, .*: num_layers 3 would fit"):
        quietly(known.replace(micro_batch_rows=0), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    assert quietly(small.replace(steps=1), tmp_path / "run").newest().step == 1


def test_a_micro_batch_that_was_asked_for_is_tried_and_the_doubt_told(small, recorder, tmp_path, monkeypatch):
    small = small.replace(steps=1, context_length=256, batch_tokens=256 * 8)
    one = step_memory(small.replace(vocab_size=400), 1, CPU)
    room = int((one.total + plan.process_memory(one, CPU, 0)) / 0.8) + 2
    # What the model itself holds is counted as available once it is there.
    monkeypatch.setattr(plan, "available_memory", lambda device: room - one.weights)
    run = train(small.replace(micro_batch_rows=8), tmp_path / "run", recorder)
    assert run.config.data.micro_batch_rows == 8
    (told,) = [note for note in recorder.notes if "this may not fit" in note]
    assert "micro_batch_rows 1 would fit, with the same result" in told


def test_memory_that_runs_out_in_the_dry_step_makes_the_micro_batch_smaller(small, recorder, tmp_path, monkeypatch):
    def scarce(model, objective, config, batch, affordable_rows):
        if config.data.micro_batch_rows > 2:
            raise torch.OutOfMemoryError("out of memory")
        return DryStep(config.data.micro_batch_rows, 1.0, 10**9)

    monkeypatch.setattr(plan, "dry_step", scarce)
    run = train(small, tmp_path / "run", recorder)
    assert "memory ran out with 8 rows at a time" in recorder.notes
    assert run.config.data.micro_batch_rows == load_config(run.path / "config.toml").data.micro_batch_rows == 2
    assert run.newest().step == 20
    with pytest.raises(UserError, match="not enough memory for this model and batch"):
        train(small.replace(micro_batch_rows=4), tmp_path / "asked", recorder)


def test_a_run_tells_its_plan_and_its_lines_their_share_of_the_machine(small, recorder, tmp_path):
    run = train(small.replace(log_every=5), tmp_path / "run", recorder)
    notes = "\n".join(recorder.notes)
    for words in (
        "8 of the batch's 8 rows per micro-batch",
        "weights 158 kB",
        "tokens/s",
        "of peak",
        "GFLOP/s in matrix",
    ):
        assert words in notes, notes
    flops = Transformer(run.config.model).flops_per_token(32)
    for line in (line for line in run.metrics() if "loss" in line):
        assert line["share_of_peak"] == pytest.approx(flops * line["tokens_per_second"] / machine_rate(CPU), rel=0.05)
        assert line["memory_bytes"] > 10**8


def test_a_short_run_has_no_dry_step(small, recorder, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "dry_step", lambda *_: pytest.fail("measured"))
    train(small.replace(steps=19), tmp_path / "run", recorder)
    assert not any("tokens/s" in note for note in recorder.notes)


def test_a_plan_agrees_with_itself(known):
    made = plan_run(known)
    told = made.as_dict()
    assert told["parameters"] == sum(p.numel() for p in Transformer(known.model).parameters())
    assert told["tokens"] == 20 * 256
    assert told["seconds"] == pytest.approx(told["tokens"] / told["tokens_per_second"])
    rate = told["flops_per_token"] * told["tokens_per_second"]
    assert told["share_of_peak"] == pytest.approx(rate / told["machine_flops_per_second"])
    memory = told["memory_bytes"]
    assert memory["peak"] >= memory["weights"] + memory["gradients"] + memory["optimizer"] + memory["activations"]
    assert told["obstacle"] == ""


def kindling(*arguments: object):
    return CliRunner().invoke(main, ["train", *map(str, arguments)])


def test_plan_prints_and_writes_nothing(dataset, tmp_path):
    shape = ("--num-layers", 1, "--hidden-size", 32, "--num-heads", 2, "--context-length", 32, "--batch-tokens", 128)
    command = ["tiny", "--data", dataset.directory, "--run", tmp_path / "run", "--device", "cpu", *shape, "--plan"]
    result = kindling(*command)
    assert result.exit_code == 0, result.output
    for name in ("model", "FLOPs per token", "weights", "gradients", "optimizer", "activations", "speed", "time"):
        assert any(line.startswith(name) for line in result.stdout.splitlines()), name
    assert list(tmp_path.iterdir()) == []
    told = json.loads(kindling(*command, "--json").stdout)
    assert told["micro_batch_rows"] == 4
    assert list(tmp_path.iterdir()) == []


def test_a_plan_without_data_needs_the_vocabulary():
    result = kindling("char-tiny", "--plan", "--device", "cpu", "--threads", 1)
    assert result.exit_code == 2
    assert "a plan needs --data, or --vocab-size instead of it" in result.stderr
    told = json.loads(kindling("char-tiny", "--plan", "--vocab-size", 65, "--device", "cpu", "--json").stdout)
    assert told["epochs"] is None
    assert told["tokens_per_second"] > 0


def test_a_preset_that_does_not_fit_says_what_would(monkeypatch):
    monkeypatch.setattr(plan, "available_memory", lambda device: 12 * 10**9)
    config = load_config(find_recipe("350m"), {"vocab_size": 32768, "device": "cpu", "micro_batch_rows": 64})
    made = plan_run(config)
    assert made.dry_step is None
    assert "micro_batch_rows 64 needs about" in made.obstacle
    assert "micro_batch_rows 2 would fit" in made.obstacle
    assert ("does not fit", made.obstacle) in made.table()


def test_sizes_and_times_are_told_in_their_units():
    assert [format_bytes(size) for size in (1.4e6, 0.99e9, 1.25e9)] == ["1 MB", "990 MB", "1.2 GB"]
    assert [format_time(s) for s in (3.4, 700, 9000, 400_000)] == ["3 s", "12 min", "2.5 h", "4.6 days"]


def test_a_plan_warns_of_many_passes_and_long_times_and_names_fewer_steps(small):
    once = plan_run(small.replace(steps=1))
    assert once.notes == []
    most = int(MOST_EPOCHS / once.epochs)
    assert plan_run(small.replace(steps=most)).notes == []
    many = plan_run(small.replace(steps=10 * most))
    (note,) = many.notes
    assert f"--steps {int(10 * most * MOST_EPOCHS / many.epochs)} " in note
    assert many.as_dict()["notes"] == [note]
    assert ("note", note) in many.table()
    slow = replace(many, dry_step=DryStep(8, 3600.0, 1))
    assert "--steps 1 takes about 60 min" in slow.notes[1]


def test_the_plan_says_which_shares_of_the_rows_are_masked_where_that_moves():
    objective = ("--objective", "hybrid", "--masked-fraction", 0.25, "--final-masked-fraction")
    for last, expected in ((0.75, "hybrid (25% to 75% of the rows masked) on"), (-1, "hybrid on"), (0.25, "hybrid on")):
        result = kindling("char-tiny", "--plan", "--vocab-size", 65, "--device", "cpu", *objective, last)
        assert f"objective        {expected}" in result.stdout, result.output
    result = kindling("tiny", "--plan", "--vocab-size", 65, "--device", "cpu", "--objective", "next_token")
    assert "objective        next_token on" in result.stdout, result.output
