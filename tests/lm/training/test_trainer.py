from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from data_prep.errors import UserError
from data_prep.files import LOCK, only_writer_of
from lm.config.recipes import load_config
from lm.config.settings import all_settings
from lm.runs import checkpoint
from lm.training.pretraining import train
from lm.training.trainer import explain_out_of_memory
from tests.conftest import StopAt, terminate


def test_a_run_does_not_depend_on_its_micro_batches(small, quietly, tmp_path):
    lines = []
    for rows in (0, 2):
        run = quietly(small.replace(steps=8, log_every=1, micro_batch_rows=rows), tmp_path / str(rows))
        lines.append([line["loss"] for line in run.metrics() if "loss" in line])
    assert lines[0] == pytest.approx(lines[1], abs=1e-4)


def test_the_loss_falls(trained):
    losses = [line["loss"] for line in trained.metrics() if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    first, last = [line["validation"] for line in trained.metrics() if "validation" in line]
    for name in ("next_token", "masked_next_token"):
        assert last[name]["nats_per_token"] < first[name]["nats_per_token"]


def test_metrics_have_their_schema(trained):
    lines = list(trained.metrics())
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(10, 101, 10))
    for line in training:
        assert list(line) == [
            "step", "tokens", "epoch", "loss", "loss_next_token", "loss_masked_next_token", "gradient_norm",
            "learning_rate", "tokens_per_second", "share_of_peak", "memory_bytes",
        ]  # fmt: skip
        assert 0 < line["share_of_peak"] < 1.5
        assert line["memory_bytes"] > 1e8
        assert line["tokens"] == line["step"] * 256
        assert line["loss"] == pytest.approx((line["loss_next_token"] + line["loss_masked_next_token"]) / 2, rel=1e-5)
    validated = [line for line in lines if "validation" in line]
    assert [line["step"] for line in validated] == [50, 100]
    for line in validated:
        assert line["rows"]["taken"] == 8 < line["rows"]["of"]
        assert list(line["validation"]) == ["next_token", "masked_next_token"]
        for loss in line["validation"].values():
            assert list(loss) == ["nats_per_token", "bits_per_byte", "predicted"]


def test_the_run_directory_has_every_expected_file(trained, dataset, small):
    assert sorted(path.name for path in trained.path.iterdir()) == [
        "checkpoints", "config.toml", "metrics.jsonl", "tokenizer.json"
    ]  # fmt: skip
    assert load_config(trained.path / "config.toml") == trained.config
    assert trained.config == small.replace(
        steps=100, learning_rate=0.01, validate_every=50, checkpoint_every=50, vocab_size=400, micro_batch_rows=8
    )
    assert trained.tokenizer.sha256 == dataset.tokenizer.sha256
    state = trained.latest().state
    assert state["data_fingerprint"] == dataset.fingerprint


def test_more_steps_can_be_added_to_a_finished_run(small, quietly, recorder, tmp_path):
    quietly(small.replace(steps=4), tmp_path / "run")
    train(small.replace(steps=6, log_every=1, micro_batch_rows=2, prompts=("a",)), tmp_path / "run", recorder)
    assert recorder.began == (4, 6)
    assert [line["step"] for line in recorder.lines if "loss" in line] == [5, 6]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 0.5}, ["learning_rate 0.01 (now 0.5)", "add --resume to change it"]),
        ({"mask_rate": 0.4}, ["mask_rate 0.3 (now 0.4)", "own settings: ", "--resume --run"]),
        ({"hidden_size": 64}, ["hidden_size 32 (now 64)", "choose another --run"]),
        ({"seed": 9, "context_length": 16}, ["seed 0 (now 9)", "context_length 32 (now 16)", "choose another --run"]),
        ({"learning_rate": 0.5, "num_layers": 3}, ["learning_rate 0.01 (now 0.5)", "num_layers 2 (now 3)"]),
    ],
)
def test_a_run_does_not_resume_with_other_settings_unless_asked(small, quietly, tmp_path, changes, words):
    quietly(small.replace(steps=2), tmp_path / "run")
    before = (tmp_path / "run" / "config.toml").read_bytes()
    with pytest.raises(UserError) as refused:
        quietly(small.replace(steps=4, **changes), tmp_path / "run")
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert (tmp_path / "run" / "config.toml").read_bytes() == before
    if any(setting.on_resume == "never" for setting in all_settings() if setting.name in changes):
        assert "add --resume" not in str(refused.value)
        with pytest.raises(UserError, match="choose another --run"):
            quietly(small.replace(steps=4, **changes), tmp_path / "run", accept_changes=True)
    else:
        run = quietly(small.replace(steps=4, **changes), tmp_path / "run", accept_changes=True)
        assert run.latest().step == 4
        assert load_config(run.path / "config.toml") == small.replace(
            steps=4, vocab_size=400, micro_batch_rows=8, **changes
        )


def test_a_run_does_not_resume_with_other_data(small, quietly, text_folder, make_dataset, tmp_path):
    quietly(small.replace(steps=2), tmp_path / "run")
    other = make_dataset(text_folder, tmp_path / "other", vocab_size=400, validation_fraction=0.2)
    with pytest.raises(UserError, match=r"was trained on other data .*, and --init-from .*run to start it"):
        quietly(small.replace(steps=4, data=(str(other.directory),)), tmp_path / "run", accept_changes=True)


def test_the_same_data_may_be_in_another_folder(small, dataset, quietly, tmp_path):
    quietly(small.replace(steps=2), tmp_path / "run")
    moved = shutil.copytree(dataset.directory, tmp_path / "moved")
    run = quietly(small.replace(steps=3, data=(str(moved),)), tmp_path / "run")
    assert run.latest().step == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": ()}, "no data: name a folder"),
        ({"data": ("nowhere",)}, 'there is no folder "nowhere"'),
        ({"vocab_size": 300}, "vocab_size 300 is smaller than the tokenizer of .* which has 400"),
        ({"context_length": 10**6, "batch_tokens": 10**6}, "context_length 1000000 is longer"),
    ],
)
def test_a_run_that_cannot_start_leaves_nothing_behind(small, quietly, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        quietly(small.replace(**changes), tmp_path / "runs" / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_does_not_become_a_run(small, quietly, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty and is not a run directory"):
        quietly(small, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_when_every_checkpoint_is_damaged_no_new_run_is_started(small, quietly, tmp_path):
    run = quietly(small.replace(steps=2), tmp_path / "run")
    (run.path / "checkpoints" / "step_00000002" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        quietly(small.replace(steps=4), tmp_path / "run")


def test_a_loss_that_is_no_longer_finite_ends_the_run_and_is_not_saved(small, recorder, tmp_path):
    config = small.replace(learning_rate=1e30, muon_learning_rate=1e30, log_every=1, checkpoint_every=1)
    with pytest.raises(
        UserError,
        match=r"is not finite, or far too high, at step \d+, .* start another run with a lower learning_rate",
    ):
        train(config, tmp_path / "run", recorder)
    saved = list((tmp_path / "run").glob("checkpoints/*"))
    assert saved
    for path in saved:
        assert all(torch.isfinite(tensor).all() for tensor in checkpoint.read(path).model().values())


def test_a_run_in_a_thread_trains_without_handling_signals(small, quietly, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(quietly, small.replace(steps=2), tmp_path / "run").result()
    assert run.latest().step == 2


def test_two_processes_do_not_train_one_run(small, quietly, tmp_path):
    quietly(small.replace(steps=2), tmp_path / "run")
    with (
        only_writer_of(tmp_path / "run" / LOCK, "mine"),
        pytest.raises(UserError, match=r"another process is training .*run: wait for it"),
    ):
        quietly(small.replace(steps=4), tmp_path / "run")
    assert quietly(small.replace(steps=4), tmp_path / "run").latest().step == 4


def test_a_failed_allocation_is_explained_in_one_sentence_and_other_failures_pass_through():
    with pytest.raises(UserError, match="set micro_batch_rows lower"), explain_out_of_memory():
        torch.empty(2**60)
    with pytest.raises(UserError, match="not enough memory"), explain_out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="size of tensor"), explain_out_of_memory():
        torch.empty(2) + torch.empty(3)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "num_key_value_heads": 1},
        {"tie_embeddings": False, "activation": "relu2", "logit_softcap": 10.0},
        {"objective": "masked_token", "qk_norm": True},
        {"precision": "bfloat16", "objective": "masked_next_token"},
        {"precision": "bfloat16", "residual_precision": "bfloat16"},
        {"vocab_size": 512, "objective": "next_token"},
    ],
)
def test_every_kind_of_model_learns(small, quietly, tmp_path, changes):
    run = quietly(small.replace(steps=25, learning_rate=0.01, log_every=5, **changes), tmp_path / "run")
    losses = [line["loss"] for line in run.metrics() if "loss" in line]
    assert losses[-1] < losses[0] - 0.4
    model = run.load_model(torch.device("cpu"))
    assert run.newest().step == 25
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_terminal_is_restored_when_a_run_fails(small, recorder, tmp_path):
    with pytest.raises(UserError):
        train(small.replace(learning_rate=1e30, muon_learning_rate=1e30), tmp_path / "run", recorder)
    assert recorder.ended == 1


@pytest.mark.parametrize(("first", "then"), [("adamw", "muon"), ("muon", "adamw")])
def test_the_optimizer_of_a_run_cannot_be_changed(small, quietly, tmp_path, first, then):
    """Not even with --resume: the checkpoints hold the state of the first one."""
    quietly(small.replace(optimizer=first, steps=2), tmp_path / "run")
    with pytest.raises(UserError, match=rf"optimizer '?{first}'? \(now '?{then}'?\).*choose another --run"):
        quietly(small.replace(optimizer=then, steps=4), tmp_path / "run", accept_changes=True)
    run = quietly(small.replace(optimizer=first, steps=4), tmp_path / "run")
    assert (run.latest().step, run.config.optimizer.optimizer) == (4, first)


def test_a_signal_after_the_save_of_a_step_stops_only_after_another_save(small, tmp_path):
    reporter = StopAt(3, terminate)
    with pytest.raises(SystemExit):
        train(small, tmp_path / "run", reporter)
    saved = checkpoint.latest(tmp_path / "run" / "checkpoints", pytest.fail)
    assert saved is not None
    assert f"stopped at step {saved.step}, which is saved" in reporter.notes[-1]


@pytest.mark.parametrize("left", [LOCK, "tokenizer.json", "tokenizer.json.tmp", "config.toml.tmp"])
def test_a_run_killed_while_its_directory_is_created_starts_over(small, quietly, dataset, tmp_path, left):
    (tmp_path / "run").mkdir()
    dataset.tokenizer.save(tmp_path / "run" / left)
    assert quietly(small.replace(steps=1), tmp_path / "run").latest().step == 1


def test_a_run_that_is_being_trained_keeps_its_config(small, quietly, tmp_path):
    quietly(small.replace(steps=2), tmp_path / "run")
    before = (tmp_path / "run" / "config.toml").read_bytes()
    with only_writer_of(tmp_path / "run" / LOCK, "mine"), pytest.raises(UserError):
        quietly(small.replace(steps=4), tmp_path / "run")
    assert (tmp_path / "run" / "config.toml").read_bytes() == before
