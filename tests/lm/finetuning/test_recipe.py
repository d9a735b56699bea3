"""What the recipe of fine-tuning chooses: epochs, LoRA's rate, a hidden layer, and how pairs are read."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from data_prep.errors import UserError
from lm.cli.main import main
from lm.config.recipes import finetuning_config, load_config
from lm.config.settings import Config
from lm.evaluation import tuned_rows
from lm.evaluation.task_table import Examples
from lm.evaluation.tuned_rows import Tuner, learning_seconds
from lm.finetuning.finetune import Finetuning, finetune, settle_steps
from lm.finetuning.heads import TaskModel
from lm.finetuning.predict import open_predictor
from lm.model.transformer import Transformer
from lm.runs.directory import open_run
from lm.training.distributed import Ranks
from lm.training.learning_rates import lr_multipliers
from tests.conftest import StopAt
from tests.lm.finetuning.test_finetune import assert_same_run

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("task", "examples", "given", "epochs"),
    [
        ("classification", 9_999, {}, 10), ("classification", 10_000, {}, 3), ("tokens", 50, {}, 10),
        ("regression", 5_000, {}, 10), ("instruction", 50, {}, 3), ("contrastive", 50, {}, 3),
        ("classification", 50, {"epochs": 3}, 3), ("classification", 50, {"epochs": 0.5}, 0.5),
    ],
)  # fmt: skip
def test_fewer_examples_are_read_more_often_unless_the_user_says_otherwise(trained, task, examples, given, epochs):
    config = finetuning_config(trained.path, trained.config, {"task": task, "train": "x.jsonl"} | given)
    settled = settle_steps(config, examples)
    assert settled.finetune.epochs == epochs
    assert settled.training.steps == -(-epochs * examples // 32)


def test_images_keep_their_three_passes(image_settings):
    config = image_settings().replace(epochs=0.0)
    assert settle_steps(config, 50).finetune.epochs == 3


def test_what_earlier_versions_wrote_still_means_three_passes(task_settings, recorder, tmp_path, monkeypatch):
    (tmp_path / "old.toml").write_text('[finetune]\ntask = "classification"\n')
    assert load_config(tmp_path / "old.toml").finetune.epochs == 3
    finetune(task_settings("classification", epochs=1), tmp_path / "run", recorder)
    again = Finetuning(task_settings("classification", epochs=0), tmp_path / "run", Ranks())
    assert (again.config.finetune.epochs, again.config.training.steps) == (1, 12)
    asked: list[Config] = []

    def stop(config, *_):
        asked.append(config)
        raise InterruptedError

    monkeypatch.setattr(tuned_rows, "finetune", stop)
    settings = task_settings("classification")
    task = SimpleNamespace(kind="classification", judged_by="accuracy")
    examples = Examples(task, [], [], [SimpleNamespace(texts=("a",), label="b")], None)
    for given in ({}, {"epochs": 0}):
        with pytest.raises(InterruptedError):
            Tuner(open_run(settings.finetune.base), CPU)("full", examples, 0, given, tmp_path / "row")
    assert [config.finetune.epochs for config in asked] == [3, 0]
    shown = CliRunner().invoke(main, ["tasks", "--help-all"]).output
    assert "[default: 3.0]" in " ".join(shown.split())


@pytest.mark.parametrize(("hidden", "rank", "alpha"), [(192, 8, 16.0), (256, 4, 4.0), (512, 64, 16.0)])
def test_the_scaled_rate_moves_outputs_like_full_fine_tuning(trained, hidden, rank, alpha):
    """A step of Adam has about the size of its rate; its signs are drawn here."""
    base = trained.config.replace(hidden_size=hidden)
    given = {"task": "classification", "method": "lora", "lora_rank": rank, "lora_alpha": alpha, "lora_rate": "scaled"}
    rate = finetuning_config(trained.path, base, given).optimizer.learning_rate
    draw = np.random.default_rng(0)
    x, a = draw.standard_normal((500, hidden)), draw.standard_normal((hidden, rank)) * hidden**-0.5
    full = 0.001 * x @ draw.choice([-1.0, 1.0], (hidden, 300))
    low = rate * alpha / rank * (x @ a) @ draw.choice([-1.0, 1.0], (rank, 300))
    assert low.std() == pytest.approx(full.std(), rel=0.1)
    assert finetuning_config(trained.path, base, given | {"learning_rate": 0.5}).optimizer.learning_rate == 0.5
    assert finetuning_config(trained.path, base, given | {"lora_rate": "fixed"}).optimizer.learning_rate == 0.005
    with pytest.raises(UserError, match="lora_rate scaled divides by lora_alpha"):
        finetuning_config(trained.path, base, given | {"lora_alpha": 0})


@torch.no_grad()
def test_a_hidden_layer_is_a_product_gelu_and_a_product(small, monkeypatch):
    trunk = Transformer(small.replace(vocab_size=50).model).initialize(0)
    plain, model = (TaskModel(trunk, 3, 0.0, pairs=True, hidden=hidden) for hidden in (0, 7))
    for each in (plain, model):
        each.initialize_head(5)
    assert {name for name, _ in plain.named_parameters() if "trunk" not in name} == {"head.weight", "head.bias"}
    vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(TaskModel, "vectors", lambda self, batch: batch)
    u, v = vectors[0::2].double(), vectors[1::2].double()
    x = torch.cat([u, v, (u - v).abs(), u * v], 1)
    z = x @ model.hidden.weight.T.double() + model.hidden.bias
    inner = z * 0.5 * (1 + torch.erf(z / 2**0.5))
    expected = inner @ model.head.weight.T.double() + model.head.bias
    torch.testing.assert_close(model(vectors).double(), expected, rtol=1e-5, atol=1e-6)
    assert float(z.std()) == pytest.approx(float(x.square().mean() ** 0.5), rel=0.6)
    linear = x @ plain.head.weight.T.double()
    torch.testing.assert_close(plain(vectors).double(), linear, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["full", "lora", "probe"])
def test_a_hidden_layer_is_learned_and_a_run_with_one_resumes(method, task_settings, recorder, tmp_path):
    config = task_settings("classification", method=method, head_hidden=16, dropout=0.2, checkpoint_every=5, epochs=3)
    done = finetune(config, tmp_path / "through", recorder)
    assert done.newest().model()["hidden.weight"].shape == (16, 32)
    with pytest.raises(InterruptedError):
        finetune(config, tmp_path / "run", StopAt(17))
    finetune(config, tmp_path / "run", recorder)
    assert_same_run(tmp_path / "run", tmp_path / "through")
    assert done.scores["accuracy"] > {"full": 0.9, "lora": 0.6, "probe": 0.0}[method]
    names = ["hidden.weight", "hidden.bias", "head.weight", "trunk.norm.weight"]
    assert lr_multipliers(config.replace(head_learning_rate=3.0), names) == dict.fromkeys(names[:3], 3.0)


def test_a_hidden_layer_needs_a_head(trained):
    with pytest.raises(UserError, match="head_hidden is for a task's head, and contrastive training has none"):
        finetuning_config(trained.path, trained.config, {"task": "contrastive", "train": "x", "head_hidden": 8})


@pytest.fixture(scope="module")
def both_ways(task_settings, tmp_path_factory):
    """The two ways to read pairs, each as a run of its own: (folder, runs)."""
    from lm.training.reporter import NullReporter

    folder = tmp_path_factory.mktemp("ways")
    return {
        way: finetune(task_settings("pair", pairs=way, epochs=3), folder / way, NullReporter())
        for way in ("apart", "together")
    }


def test_pairs_are_read_the_way_that_validates_better(both_ways, task_settings, recorder, tmp_path):
    config = task_settings("pair", pairs="auto", epochs=3)
    done = finetune(config, tmp_path / "run", recorder)
    scores = {way: run.scores["accuracy"] for way, run in both_ways.items()}
    better = max(scores, key=lambda way: scores[way])
    other = "apart" if better == "together" else "together"
    assert scores[better] > scores[other]
    assert done.config.finetune.pairs == better
    assert done.scores == both_ways[better].scores
    assert_same_run(done.path, both_ways[better].path)
    assert_same_run(done.path / f"pairs_{other}", both_ways[other].path)
    assert not (done.path / f"pairs_{better}").exists()
    assert f"{scores['apart']:.4f} if they are read apart" in " ".join(recorder.notes)
    assert open_predictor(done.path, CPU).model.pairs == (better == "apart")
    assert learning_seconds(done) > learning_seconds(open_run(done.path / f"pairs_{other}"))
    again = finetune(config, tmp_path / "run", recorder)
    assert "is trained" in recorder.notes[-1]
    assert again.scores == done.scores


def test_a_choice_that_was_cut_off_anywhere_ends_as_if_undisturbed(both_ways, task_settings, tmp_path, recorder):
    config, run = task_settings("pair", pairs="auto", epochs=3, checkpoint_every=10), tmp_path / "run"
    for _ in range(2):  # in the first way, and in the second
        with pytest.raises(InterruptedError):
            finetune(config, run, StopAt(25))
        (run / "pairs_apart" / ".lock").unlink(missing_ok=True)
    finetune(config, run, recorder)
    for name, tensor in both_ways[open_run(run).config.finetune.pairs].checkpoint("best").model().items():
        assert torch.equal(open_run(run).checkpoint("best").model()[name], tensor), name


def test_without_pairs_there_is_nothing_to_choose_and_without_validation_nothing_to_choose_by(
    task_settings, recorder, tmp_path
):
    single = finetune(task_settings("classification", pairs="auto", epochs=0.2), tmp_path / "single", recorder)
    assert single.config.finetune.pairs == "apart"
    assert not list(single.path.glob("pairs_*"))
    with pytest.raises(UserError, match="pairs auto chooses by validation: add --validation FILE"):
        finetune(task_settings("pair", pairs="auto", validation=""), tmp_path / "pair", recorder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and is not a run directory"):
        finetune(task_settings("pair", pairs="auto"), tmp_path / "full", recorder)
