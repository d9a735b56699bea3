"""The whole path on a CUDA GPU: it trains, resumes, writes and answers as on a CPU. Without one, all are skipped."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lm.config.model_settings import ModelConfig
from lm.config.objective_settings import IMAGE_OBJECTIVES
from lm.config.settings import Config
from lm.config.view_settings import ViewsConfig
from lm.data.corpora import open_corpora
from lm.data.views import draw_views, make_views
from lm.evaluation.minimal_pairs import Pairs, evaluate_model
from lm.finetuning.finetune import finetune
from lm.finetuning.predict import open_predictor, predict, read_inputs
from lm.inference.compiled_decoding import compiled_decoder
from lm.inference.decoding import decoder
from lm.inference.embedding import Reading, all_vectors
from lm.inference.generator import Generator, stream
from lm.inference.kv_cache import KVCache, ReadingPrompt
from lm.inference.language_model import LanguageModel
from lm.inference.low_precision import LowPrecisionTransformer
from lm.inference.sampling import Sampling
from lm.kernels import linear_cross_entropy, masks
from lm.model.transformer import Transformer
from lm.runs import checkpoint
from lm.runs.directory import Run
from lm.training import pretraining, trainer
from lm.training.distributed import Ranks
from lm.training.optimizer import orthogonalize
from lm.training.pretraining import Pretraining, train
from lm.training.reporter import NullReporter
from lm.training.validation import validate_readouts
from tests.conftest import StopAt, loaded

GPU, CPU = torch.device("cuda"), torch.device("cpu")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


@pytest.fixture(scope="module")
def config(small: Config) -> Config:
    """Heads of 64, dropout and both objectives, in bfloat16 as a GPU has it unless told otherwise."""
    return small.replace(
        device="cuda",
        hidden_size=128,
        context_length=64,
        batch_tokens=2048,
        steps=60,
        dropout=0.1,
        learning_rate=0.005,
        optimizer="muon",
        validate_every=20,
        checkpoint_every=20,
    )


@pytest.fixture(scope="module")
def run(config: Config, quietly, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return quietly(config, tmp_path_factory.mktemp("gpu") / "run")


def last_validation(run: Run) -> dict[str, float]:
    line = [line for line in run.metrics() if "validation" in line][-1]
    return {name: result["nats_per_token"] for name, result in line["validation"].items()}


def model_with_noise(seed: int = 0, **changes) -> Transformer:
    shape = {"num_layers": 2, "hidden_size": 128, "num_heads": 2, "num_key_value_heads": 1, "vocab_size": 300}
    model = Transformer(ModelConfig(**shape | changes)).initialize(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def test_training_on_a_gpu_learns_what_training_on_a_cpu_learns(run, config, quietly, tmp_path):
    on_gpu, on_cpu = last_validation(run), last_validation(quietly(config.replace(device="cpu"), tmp_path / "cpu"))
    for name, loss in on_cpu.items():
        assert on_gpu[name] == pytest.approx(loss, rel=0.05)
    lines = [line for line in run.metrics() if "share_of_peak" in line]
    assert all(0 < line["share_of_peak"] < 1 and line["memory_bytes"] > 0 for line in lines)


@pytest.mark.parametrize("changes", [{}, {"precision": "float32"}, {"compile": True}])
def test_a_run_that_was_cut_off_ends_with_the_same_bits(changes, config, recorder, tmp_path):
    config = config.replace(steps=30, checkpoint_every=10, **changes)
    through = train(config, tmp_path / "through", recorder)
    for stop in (7, 23):
        with pytest.raises(InterruptedError):
            train(config, tmp_path / "run", StopAt(stop))
    resumed = train(config, tmp_path / "run", recorder)
    assert checkpoint.steps(through.path / "checkpoints") == checkpoint.steps(resumed.path / "checkpoints")
    for name, tensor in through.newest().model().items():
        assert torch.equal(tensor, resumed.newest().model()[name]), name


def test_a_checkpoint_has_the_same_loss_on_both_devices(run):
    config = run.config.replace(precision="float32")
    corpora = open_corpora(config.data.data)
    losses = [validate_readouts(run.load_model(device), corpora, config) for device in (CPU, GPU)]
    for name, result in losses[0].items():
        assert losses[1][name].nats_per_token == pytest.approx(result.nats_per_token, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_head_adds_the_gradient_of_its_weight_in_float32(dtype):
    """Several chunks: 20,000 tokens, of which 16,384 at most are taken at a time."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(20_000, 64, generator=draw).to(GPU, dtype).requires_grad_()
    weight = (torch.randn(3000, 64, generator=draw) / 8).to(GPU).requires_grad_()
    targets = torch.randint(0, 3000, (20_000,), generator=draw).to(GPU)
    loss = linear_cross_entropy(hidden, weight, targets)
    by_hidden, by_weight = torch.autograd.grad(loss, (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight.to(dtype))]
    truth = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum")
    truths = torch.autograd.grad(truth, exact)
    assert by_weight.dtype == torch.float32
    least = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]  # tf32 is on, if at all, by PyTorch
    for found, wanted in zip((by_hidden, by_weight), truths, strict=True):
        assert ((found.double() - wanted).norm() / wanted.norm()).item() < least
    assert loss.item() == pytest.approx(truth.item(), rel=1e-3)


@pytest.mark.parametrize("shape", [(3, 128, 384), (2, 384, 128), (1, 768, 2048)])
def test_muon_brings_all_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(GPU)
    values = torch.linalg.svdvals(orthogonalize(matrices).double())
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.3


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_compiled_model_has_the_loss_and_gradients_of_a_plain_one(qk_norm):
    model = model_with_noise(qk_norm=qk_norm).to(GPU)
    inputs = torch.randint(0, 300, (4, 200), generator=torch.Generator().manual_seed(0)).to(GPU)
    lo, hi = (x.to(GPU) for x in masks.packed(torch.rand(4, 200) < 0.02, torch.tensor([False, False, True, True])))
    positions, ones = torch.arange(200, device=GPU) - lo, torch.ones(4, 200, device=GPU)

    def loss():
        return model.loss(model(inputs, positions, lo, hi), inputs.roll(-1, 1), ones)

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True)):
        value = call()
        results.append([value, *torch.autograd.grad(value, list(model.parameters()))])
    for plain, compiled in zip(*results, strict=True):
        assert ((plain - compiled).norm() / plain.norm()).item() < 2e-3


@torch.inference_mode()
def test_logits_with_a_cache_are_those_without():
    model = model_with_noise().to(GPU)
    tokens = torch.randint(0, 300, (1, 90), generator=torch.Generator().manual_seed(0)).to(GPU)
    lo, hi = masks.causal(1, 90, device=GPU)
    whole = model.logits(model(tokens, torch.arange(90, device=GPU)[None], lo, hi))[0]
    cache = KVCache.empty(model.config, 1, 90, model.embedding.weight)
    reading = ReadingPrompt(cache, 0, 40)
    model(tokens[:, :40], reading.positions, reading.lo, reading.hi, reading)
    reading.done()
    step = decoder(model, cache)
    for position in range(40, 90):
        logits = step([int(tokens[0, position])])[0]
        torch.testing.assert_close(logits, whole[position].cpu(), rtol=1e-3, atol=1e-3)


def in_precision(run: Run, device: torch.device, precision: str) -> LanguageModel:
    return LanguageModel(run.load_model(device), run.tokenizer, run.config.replace(precision=precision))


def test_a_gpu_writes_the_likeliest_text_that_a_cpu_writes(run):
    sampling, models = Sampling(temperature=0, max_new_tokens=40), [in_precision(run, d, "float32") for d in (CPU, GPU)]
    texts = ["".join(event.text for event in stream(model, "The old miller", sampling)) for model in models]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("method", ["full", "lora", "probe"])
def test_fine_tuning_learns_and_answers_alike_on_both_devices(method, task_settings, recorder, tmp_path):
    done = finetune(task_settings("classification", method=method, device="cuda"), tmp_path / "run", recorder)
    assert done.scores["accuracy"] > {"full": 0.9, "lora": 0.8, "probe": 0.5}[method]
    told = []
    for device in (CPU, GPU):
        predictor = open_predictor(done.path, device)
        told.append(
            [answer for answer, _ in predict(predictor, read_inputs(predictor, done.config.finetune.validation))]
        )
    assert [a["label"] for a in told[0]] == [a["label"] for a in told[1]]


def test_pairs_and_vectors_are_those_of_a_cpu(run):
    good = ["The captain lost seven apples.", "Nobody carried an owl.", "Every sparrow wanted a small boat."]
    bad = ["Captain the apples seven lost.", "Carried nobody owl an.", "Sparrow every boat a small wanted."]
    pairs = [Pairs("order", "", good, bad)]
    found = [evaluate_model(loaded(run, device), pairs) for device in (CPU, GPU)]
    for name, result in found[0].items():
        assert found[1][name]["all"].mean == result["all"].mean
    reading = Reading("bidirectional", "mean")
    both = [all_vectors(loaded(run, device), [(t,) for t in good], reading)[0] for device in (CPU, GPU)]
    assert abs(both[0] - both[1]).max() < 1e-3


def test_views_of_images_are_those_of_a_cpu():
    images = torch.randint(0, 256, (16, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    settings = ViewsConfig(solarize=0.3)
    draws = draw_views(0, np.arange(16), 1, settings)[:, 0]
    views = [make_views(images.to(device), draws, 64, settings).cpu() for device in (CPU, GPU)]
    assert torch.allclose(views[0], views[1], rtol=0, atol=2e-5)
    again = make_views(images.to(GPU), draws, 64, settings).cpu()
    assert torch.equal(again, views[1])


@pytest.fixture(scope="module")
def images(pictures, seeing, visual_tokens) -> Config:
    """Settings of a model of images with heads that the kernels take, in float32."""
    data = {"data": (str(pictures.directory),), "visual_tokenizer": str(visual_tokens)}
    return seeing.replace(hidden_size=64, num_heads=2, device="cuda", precision="float32", **data)


@pytest.mark.parametrize("objective", IMAGE_OBJECTIVES)
def test_images_are_learned_as_on_a_cpu_and_a_run_that_was_cut_off_ends_with_the_same_bits(
    objective, images, tmp_path, quietly
):
    config = images.replace(objective=objective)
    on_gpu, on_cpu = (quietly(each, tmp_path / each.training.device) for each in (config, config.replace(device="cpu")))
    losses = [[line["loss"] for line in run.metrics() if "loss" in line] for run in (on_gpu, on_cpu)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    with pytest.raises(InterruptedError):
        train(config, tmp_path / "cut off", StopAt(3))
    again = quietly(config, tmp_path / "cut off").newest()
    for mine, whole in ((again.model(), on_gpu.newest().model()), (again.objective(), on_gpu.newest().objective())):
        assert mine.keys() == whole.keys()
        assert all(torch.equal(mine[name], whole[name]) for name in mine)


def test_batches_are_pinned_when_they_are_prepared_and_their_micro_batches_too(config, tmp_path):
    module = Pretraining.open(config, tmp_path, Ranks(GPU))
    batch = module.batch(0)
    micro_batch = batch.rows(1, 3)
    assert batch.inputs.is_pinned()
    assert micro_batch.inputs.is_pinned()
    assert torch.equal(micro_batch.to(GPU).inputs.cpu(), module.batches.batch(0).inputs[1:3])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=0.7, top_p=0.9, seed=1)])
def test_steps_replayed_by_a_graph_write_the_same_text_alone_and_in_a_batch(sampling, precision, run):
    """In float32 it is the text of the usual step, too; in bfloat16 that one rounds at other places."""
    model, texts = in_precision(run, GPU, precision), {}
    for rows, compiled in ((1, False), (1, True), (4, True)):
        generator = Generator(model, max_rows=rows, compiled=compiled)
        assert generator.compiling.startswith("compiled") == compiled, generator.compiling
        handles = [generator.add(prompt, sampling) for prompt in ("Once", "The old man", "A", "He")[: max(rows, 3)]]
        found = dict.fromkeys(handles, "")
        while generator.busy:
            for event in generator.step():
                found[event.handle] += event.text
        texts[rows, compiled] = list(found.values())[:3]
    assert texts[1, True] == texts[4, True]
    if precision == "float32":
        assert texts[1, False] == texts[1, True]


@torch.inference_mode()
def test_a_step_of_a_graph_in_bfloat16_has_the_logits_of_float32_but_for_rounding():
    model = model_with_noise(qk_norm=True).to(GPU)
    logits = []
    for each in (model, LowPrecisionTransformer(model)):
        cache = KVCache.empty(each.config, 3, 300, each.head_weight)
        step, note = compiled_decoder(each, cache)
        assert note.startswith("compiled"), note
        logits.append(torch.stack([step([n, n + 1, n + 2]).clone() for n in range(280)]))
    assert logits[1].dtype == torch.float32
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert error < 0.02


def a_run_with_bad_steps(config: Config, path: Path, recorder, monkeypatch) -> Run:
    honest = pretraining.step_gradients

    def spoiled(objective, model, batch, config, step, ranks):
        losses, shares = honest(objective, model, batch, config, step, ranks)
        return {name: loss * (math.nan if step in (3, 8, 12) else 1.0) for name, loss in losses.items()}, shares

    with monkeypatch.context() as patched:
        patched.setattr(pretraining, "step_gradients", spoiled)
        return train(config, path, recorder)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_steps_that_the_gpu_skips_are_those_that_the_cpu_would_skip(optimizer, config, recorder, monkeypatch, tmp_path):
    config = config.replace(steps=20, checkpoint_every=10, optimizer=optimizer)
    late = a_run_with_bad_steps(config, tmp_path / "late", recorder, monkeypatch)
    monkeypatch.setattr(trainer, "decides_on_device", lambda ranks, objective: False)
    at_once = a_run_with_bad_steps(config, tmp_path / "at once", recorder, monkeypatch)
    events = [[(line["step"], line["event"]) for line in run.metrics() if "event" in line] for run in (late, at_once)]
    assert events == [[(4, "skip"), (9, "skip"), (13, "skip")]] * 2
    for name, tensor in at_once.newest().model().items():
        assert torch.equal(tensor, late.newest().model()[name]), name


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_cpu_does_not_wait_between_a_batch_and_the_update(optimizer, config, tmp_path):
    module = Pretraining.open(config.replace(optimizer=optimizer), tmp_path, Ranks(GPU))
    training = trainer.Trainer(module, tmp_path, module.ranks, NullReporter())
    training._restore(None)
    for step in range(3):  # the first ones compile the kernels
        batch = module.batch(step)
        training.unread = None
        torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
        try:
            assert training._step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
