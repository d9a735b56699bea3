"""Several processes against one. Started as a program, this file is one rank of several: the first half of it."""

from __future__ import annotations

import atexit
import gc
import json
import os
import re
import socket
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from data_prep.errors import UserError
from data_prep.shards.images import open_images
from data_prep.shards.tokens import open_dataset
from lm.config.settings import Config
from lm.data.batch import Batch
from lm.data.corpora import Corpora
from lm.data.image_corpora import ImageCorpora, with_images
from lm.data.visual_codes import with_codes
from lm.model.transformer import Transformer
from lm.objectives.batches import TrainingBatches
from lm.objectives.objective import Objective
from lm.training.distributed import Ranks, joined
from lm.training.gradients import step_gradients
from lm.training.optimizer import Optimizer
from lm.training.pretraining import Pretraining
from lm.training.reporter import NullReporter
from lm.training.trainer import Trainer
from lm.training.validation import validate_readouts

ROOT = Path(__file__).parents[3]
STEPS = 4
# Nothing divides by 4: the slices of a weight differ in size and the last may be empty, and so may ranks' share of the
# matrices of a shape.
CONFIG = Config().replace(
    num_layers=3, hidden_size=24, num_heads=4, qk_norm=True, feed_forward_size=42, vocab_size=403, tie_embeddings=False,
    context_length=16, batch_tokens=16 * 32, masked_fraction=0.3, mask_rate=0.3, device="cpu", threads=1,
    validation_rows=11, gradient_clip=0.5, learning_rate=0.01,
)  # fmt: skip
OF_VIEWS = {
    "view_tokens": 8,
    "projection_size": 6,
    "projection_hidden_size": 10,
    "prototypes": 14,
    "steps": 8,
    "learning_rate": 0.001,
    "muon_learning_rate": 0.005,
}
MODELS = {
    "tied": {"tie_embeddings": True},
    "untied": {},
    "adamw": {"optimizer": "adamw", "objective": "masked_token:0.25,next_token:0.5,masked_next_token:0.25"},
    "normuon": {"muon_beta2": 0.9, "cautious_weight_decay": True, "embedding_weight_decay": 0.2},
    "views": {"objective": "dino", "local_views": 2, "teacher_momentum": 0.6, "gradient_clip": 0.05, **OF_VIEWS},
    "mixed": {"objective": "hybrid:0.75,moco:0.25", "queue_size": 40, "teacher_momentum": 0.6, **OF_VIEWS},
}
IMAGES = CONFIG.replace(
    num_layers=2, qk_norm=False, hidden_size=32, patch_size=4, batch_images=16, vocab_size=0, projection_size=6,
    projection_hidden_size=10, decoder_layers=1, decoder_size=32, gradient_clip=0.05,
    prototypes=14, queue_size=40, local_views=2, local_size=8, steps=8, teacher_momentum=0.6,
)  # fmt: skip
OBJECTIVES = ("simclr", "moco", "byol", "dino", "dinov2", "mae", "beit")
WORLDS = (2, 4)
# Four ranks are expensive: they compute only what smaller slices, or fewer matrices for each rank, could change.
OF_FOUR = {
    "ddp": ("untied", "normuon", "simclr", 1),
    "fsdp": ("untied", "normuon", "mixed", "simclr", "dinov2", "beit", 8, "given up"),
}
Found = tuple[dict[str, torch.Tensor], dict[str, Any]]


def done_by(world: int, parallel: str, *parts: Any) -> list[Any]:
    """Which of these models, objectives, numbers of micro-batches and failures are computed by so many ranks."""
    return [part for part in parts if world == 2 or part in OF_FOUR[parallel]]


def relative(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of all tensors together, as a share of the norm of ``expected``."""
    squares = [
        ((found[name].double() - tensor.double()).square().sum(), tensor.double().square().sum())
        for name, tensor in expected.items()
    ]
    different, whole = (float(sum(column)) for column in zip(*squares, strict=True))
    return (different / whole) ** 0.5


def perturbed(objective: Objective) -> nn.Module:
    """A model whose every matrix has a gradient (some begin as zeros)."""
    model = objective.new_model().initialize(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def gradients(config: Config, corpora: Corpora | ImageCorpora, ranks: Ranks) -> Found:
    """Gradient, losses and shares of the second step."""
    batches = TrainingBatches(corpora, config)
    model = perturbed(batches.objective)
    batches.objective.begin(model)
    ranks.spread(model, batches.objective)
    batch = batches.batch(1, ranks.rank, ranks.world)
    losses, shares = step_gradients(batches.objective, model, batch, config, 1, ranks)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return ranks.gathered(found), {"losses": {n: float(loss) for n, loss in losses.items()}, "shares": shares}


def trained(config: Config, corpora: Corpora | ImageCorpora, ranks: Ranks) -> Found:
    """Weights and optimizer after some steps, the optimizer saved and loaded half way; norms, losses, validation."""
    batches = TrainingBatches(corpora, config)
    model = perturbed(batches.objective)
    batches.objective.begin(model)
    ranks.spread(model, batches.objective)
    optimizer = Optimizer(model, config.optimizer, ranks)
    told: dict[str, Any] = {"norms": [], "losses": []}
    for step in range(STEPS):
        if step == STEPS // 2:
            state = ranks.gathered(optimizer.state())
            optimizer = Optimizer(model, config.optimizer, ranks)
            optimizer.load_state(ranks.on_main(lambda state=state: state))  # as all would read it from a checkpoint
        batch = batches.batch(step, ranks.rank, ranks.world)
        losses, _ = step_gradients(batches.objective, model, batch, config, step, ranks)
        told["losses"].append(sum(map(float, losses.values())))
        told["norms"].append(float(optimizer.clip()))
        optimizer.step(1.0)
        batches.objective.after_step(model, step)
    for rows in (2, 0):
        told[f"validation by {rows}"] = validate_readouts(
            model, corpora, config.replace(micro_batch_rows=rows), objective=batches.objective, ranks=ranks
        )
    ranks.reshard()
    memory = batches.objective.memory or nn.Module()
    held = {**model.state_dict(), **optimizer.state(), **dict(memory.named_parameters(prefix="memory"))}
    whole = [name for name in held if not held[name].ndim or name.endswith(".row_moment")]
    told["numbers held"] = sum(ranks.local(held[name]).numel() for name in held.keys() - whole)
    return ranks.gathered(held | dict(memory.named_buffers(prefix="memory"))), told


class Exchanges(TorchDispatchMode):
    """Counts the collective operations of FSDP."""

    def __init__(self) -> None:
        super().__init__()
        self.gathers = self.reductions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.gathers += name.startswith("c10d._allgather_base_")
        self.reductions += name.startswith("c10d._reduce_scatter_base_")
        return func(*args, **(kwargs or {}))


def resharded(corpora: Corpora, ranks: Ranks, how: str) -> Found:
    """Gradient of a step in four micro-batches with ``fsdp_reshard`` ``how``, and what was exchanged for it."""
    ranks.parallel, ranks.fsdp_reshard = "fsdp", how
    config = CONFIG.replace(micro_batch_rows=CONFIG.data.batch_rows // ranks.world // 4)
    batches = TrainingBatches(corpora, config)
    model = perturbed(batches.objective)
    ranks.spread(model, batches.objective)
    with Exchanges() as exchanges:
        step_gradients(batches.objective, model, batches.batch(1, ranks.rank, ranks.world), config, 1, ranks)
    found = ranks.gathered({name: parameter.grad for name, parameter in model.named_parameters()})
    validate_readouts(model, corpora, config, objective=batches.objective, ranks=ranks)
    ranks.reshard()
    held = sum(ranks.local(parameter).numel() for parameter in model.parameters())
    ranks.fsdp_reshard = "auto"
    return found, {"gathers": exchanges.gathers, "reductions": exchanges.reductions, "held": held}


def given_up(config: Config, corpora: Corpora, ranks: Ranks, path: Path) -> dict[str, Any]:
    """What a run says that learns so fast that it is taken back again and again, and how often it was."""
    config = config.replace(
        learning_rate=1e30,
        muon_learning_rate=1e30,
        checkpoint_every=1,
        steps=40,
        decay_fraction=0.0,
        warmup_fraction=0.1,
    )
    path.mkdir(exist_ok=True)
    training = Trainer(Pretraining(config, path, corpora, ranks), path, ranks, NullReporter())
    with pytest.raises(UserError) as error:
        training.run(None)
    return {"error": str(error.value), "went back": training.state.ladder.roll_backs}


def of_images(corpora: ImageCorpora, tokens: Path, objective: str) -> Config:
    config = IMAGES.replace(objective=objective, visual_tokenizer=str(tokens))
    return with_codes(with_images(config, corpora))


def rank_of_several(data: Path, images: Path, tokens: Path, out: Path) -> None:
    """What one rank computes; rank 0 writes tensors to ``out``, each rank what else it found to ``out``.RANK."""
    corpora, pictures = Corpora([open_dataset(data)]), ImageCorpora([open_images(images)])
    tensors: dict[str, torch.Tensor] = {}
    told: dict[str, Any] = {}

    def refused() -> None:
        raise UserError("rank 0 does not like it")

    with joined(CONFIG.training) as ranks:
        for parallel in ("ddp", "fsdp"):
            ranks.parallel = parallel
            for micro_batches in done_by(ranks.world, parallel, 1, 2, 4, 8):
                rows = CONFIG.data.batch_rows // ranks.world // micro_batches
                found, told[f"{parallel} {micro_batches}"] = gradients(
                    CONFIG.replace(micro_batch_rows=rows), corpora, ranks
                )
                tensors |= {f"{parallel} {micro_batches} {name}": tensor for name, tensor in found.items()}
            for name in done_by(ranks.world, parallel, *MODELS):
                config = CONFIG.replace(micro_batch_rows=4, **MODELS[name])
                found, told[f"{parallel} {name}"] = trained(config, corpora, ranks)
                tensors |= {f"{parallel} {name} {key}": tensor for key, tensor in found.items()}
            for name in done_by(ranks.world, parallel, *OBJECTIVES):
                config = of_images(pictures, tokens, name)
                rows = config.data.batch_rows // ranks.world
                for micro_batches in (1, 2):
                    changed = config.replace(micro_batch_rows=rows // micro_batches)
                    found, told[f"{parallel} {name} {micro_batches}"] = gradients(changed, pictures, ranks)
                    tensors |= {f"{parallel} {name} {micro_batches} {key}": tensor for key, tensor in found.items()}
                found, told[f"{parallel} {name}"] = trained(config.replace(micro_batch_rows=2), pictures, ranks)
                tensors |= {f"{parallel} {name} {key}": tensor for key, tensor in found.items()}
            if parallel == "fsdp":
                for how in ("pass", "step"):
                    found, told[f"reshard {how}"] = resharded(corpora, ranks, how)
                    tensors |= {f"reshard {how} {key}": tensor for key, tensor in found.items()}
            for name in done_by(ranks.world, parallel, "given up"):
                told[f"{parallel} {name}"] = given_up(CONFIG, corpora, ranks, out.with_name(parallel))
        told["highest"] = ranks.highest(ranks.rank * 10)
        told["from main"] = ranks.on_main(lambda: ranks.rank + 5)
        with suppress(UserError):
            ranks.on_main(refused)
            told["refused"] = False
        if tensors:
            save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, out)
        out.with_name(f"{out.name}.{ranks.rank}").write_text(json.dumps(told), encoding="utf-8")
        if ranks.rank == ranks.world - 1:
            raise UserError("only the last rank knows")
        ranks.highest(0)  # the others wait for it, in vain


if __name__ == "__main__":
    atexit.register(gc.freeze)  # as in commands
    try:
        rank_of_several(*map(Path, sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module", params=WORLDS)
def several(request, dataset, pictures, visual_tokens, tmp_path_factory):
    """(world, tensors, what each rank found, (exit status, stderr) of each rank) of this file run as ranks."""
    world, out = request.param, tmp_path_factory.mktemp("ranks") / "out"
    command = [sys.executable, __file__, str(dataset.directory), str(pictures.directory), str(visual_tokens), str(out)]
    # Bound but not listening: no other process is given this port, and rank 0 can listen on it.
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(held.getsockname()[1]), "WORLD_SIZE": str(world)}
        processes = [
            subprocess.Popen(command, env=environment(RANK=str(rank), **meeting), stderr=subprocess.PIPE, text=True)
            for rank in range(world)
        ]
        ends = [(process.communicate(timeout=580)[1], process.returncode) for process in processes]
    assert out.exists(), ends
    return world, load_file(out), [json.loads(Path(f"{out}.{r}").read_text()) for r in range(world)], ends


@pytest.fixture(scope="module")
def alone(dataset, pictures, visual_tokens) -> Found:
    """The same by one process, all rows of a batch at once."""
    corpora, tensors, told = Corpora([dataset]), {}, {}
    found, told["gradient"] = gradients(CONFIG, corpora, Ranks())
    tensors |= {f"gradient {name}": tensor.clone() for name, tensor in found.items()}
    for name, changes in MODELS.items():
        found, told[name] = trained(CONFIG.replace(**changes), corpora, Ranks())
        tensors |= {f"{name} {key}": tensor for key, tensor in found.items()}
    images = ImageCorpora([pictures])
    for name in OBJECTIVES:
        config = of_images(images, visual_tokens, name)
        found, told[f"{name} gradient"] = gradients(config, images, Ranks())
        tensors |= {f"gradient of {name} {key}": tensor.clone() for key, tensor in found.items()}
        found, told[name] = trained(config, images, Ranks())
        tensors |= {f"{name} {key}": tensor for key, tensor in found.items()}
    return tensors, told


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_and_micro_batches_give_the_gradient_of_the_whole_batch(several, alone, parallel):
    """Although each part has another number of hidden tokens."""
    world, tensors, told, _ = several
    expected = {name: tensor for name, tensor in alone[0].items() if re.match("gradient (?!of )", name)}
    assert max(float(tensor.abs().max()) for tensor in expected.values()) > 0.01
    for micro_batches in done_by(world, parallel, 1, 2, 4, 8):
        for name, tensor in expected.items():
            ours = tensors[name.replace("gradient", f"{parallel} {micro_batches}")]
            torch.testing.assert_close(ours, tensor, rtol=1e-5, atol=1e-6)
        for of_rank in told:
            found = of_rank[f"{parallel} {micro_batches}"]
            assert found["losses"] == pytest.approx(alone[1]["gradient"]["losses"], abs=1e-5)
            assert found["shares"] == alone[1]["gradient"]["shares"]


def test_fsdp_gathers_and_reduces_once_a_step_where_whole_weights_may_be_held(several, alone):
    """Three blocks and the rest of the model are four groups of weights; a step has four micro-batches."""
    _, tensors, told, _ = several
    expected = {name: tensor for name, tensor in alone[0].items() if re.match("gradient (?!of )", name)}
    for how in ("pass", "step"):
        ours = {name: tensors[name.replace("gradient", f"reshard {how}")] for name in expected}
        assert relative(ours, expected) < 2e-6
    for of_rank in told:
        by_pass, by_step = (of_rank[f"reshard {how}"] for how in ("pass", "step"))
        assert (by_pass["gathers"], by_pass["reductions"]) == (4 * (2 * 3 + 1), 4 * 4)
        assert (by_step["gathers"], by_step["reductions"]) == (4, 4)
        assert by_step["held"] == by_pass["held"]
    numbers = sum(tensor.numel() for tensor in expected.values())
    assert sum(of_rank["reshard step"]["held"] for of_rank in told) == numbers


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_give_the_gradient_of_all_images(several, alone, parallel):
    """In SimCLR an image's negatives are the other images of the whole step, on all ranks."""
    world, tensors, told, _ = several
    for objective in done_by(world, parallel, *OBJECTIVES):
        expected = {name: tensor for name, tensor in alone[0].items() if name.startswith(f"gradient of {objective} ")}
        losses = alone[1][f"{objective} gradient"]["losses"]
        for micro_batches in (1, 2):
            prefix = f"{parallel} {objective} {micro_batches} "
            ours = {name: tensors[name.replace(f"gradient of {objective} ", prefix)] for name in expected}
            assert relative(ours, expected) < 2e-6, prefix
            for of_rank in told:
                found = of_rank[f"{parallel} {objective} {micro_batches}"]["losses"]
                assert found == pytest.approx(losses, abs=1e-5), prefix


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_take_the_steps_of_one_process(several, alone, parallel):
    """Clipped, with an optimizer that was saved and loaded between."""
    world, tensors, told, _ = several
    state = (".momentum", ".exp_avg", ".exp_avg_sq", ".step")
    for model in done_by(world, parallel, *MODELS, *OBJECTIVES):
        found = {name: tensor for name, tensor in alone[0].items() if name.startswith(f"{model} ")}
        for name, tensor in found.items():
            named = partial("{}: {}".format, name)
            torch.testing.assert_close(tensors[f"{parallel} {name}"], tensor, rtol=1e-4, atol=5e-5, msg=named)
        weights = {name: tensor for name, tensor in found.items() if not name.endswith(state)}
        assert relative({name: tensors[f"{parallel} {name}"] for name in weights}, weights) < 1e-5, model
        for part in ("norms", "losses"):
            expected = pytest.approx(alone[1][model][part], rel=1e-4, abs=1e-5)
            assert told[0][f"{parallel} {model}"][part] == expected, model
        config = IMAGES if model in OBJECTIVES else CONFIG.replace(**MODELS[model])
        assert min(alone[1][model]["norms"]) > config.optimizer.gradient_clip, model


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_validation_is_that_of_one_process(several, alone, parallel):
    """11 rows, which divide among no number of ranks here."""
    for rows in ("validation by 2", "validation by 0"):
        for model in done_by(several[0], parallel, "untied", "mixed"):
            for readout, loss in alone[1][model][rows].items():
                close = 2e-6 if "nats_per_token" in loss and model == "untied" else 1e-3
                assert several[2][0][f"{parallel} {model}"][rows][readout] == pytest.approx(loss, abs=close)
        for objective in done_by(several[0], parallel, *OBJECTIVES):
            expected, found = (
                told[rows][objective] for told in (alone[1][objective], several[2][0][f"{parallel} {objective}"])
            )
            assert found == pytest.approx(expected, abs=1e-3)


def test_all_ranks_find_the_same_to_the_last_bit(several):
    world, _, told, _ = several
    for of_rank in told:
        for name, found in of_rank.items():
            mine, first = (dict(f) if isinstance(f, dict) else {"": f} for f in (found, told[0][name]))
            for own in ("numbers held", "held"):
                mine.pop(own, None), first.pop(own, None)
            assert mine == first
    for parallel in ("ddp", "fsdp"):
        for name in done_by(world, parallel, "given up"):
            assert told[0][f"{parallel} {name}"]["error"].startswith("the loss is not finite")
            assert told[0][f"{parallel} {name}"]["went back"] == 4
    assert (told[0]["highest"], told[0]["from main"]) == (10 * (world - 1), 5)
    assert "refused" not in told[0]


def test_sharded_ranks_hold_each_number_once_and_replicas_hold_all(several, alone):
    world, _, told, _ = several
    for parallel in ("ddp", "fsdp"):
        for model in done_by(world, parallel, *MODELS, *OBJECTIVES):
            numbers = alone[1][model]["numbers held"]
            held = [of_rank[f"{parallel} {model}"]["numbers held"] for of_rank in told]
            if parallel == "ddp":
                assert held == [numbers] * world
            else:
                assert sum(held) == numbers and max(held) < 1.2 * numbers / world


def test_an_error_of_one_rank_ends_all_and_is_reported_once(several):
    *_, ends = several
    assert ends[-1] == ("error: only the last rank knows\n", 1)
    for told, status in ends[:-1]:
        assert status == 2
        assert "error" not in told
        assert "Traceback" not in told


class Part(Ranks):
    """A rank that never hears of the others."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.rank, self.world = rank, world


def test_every_row_has_its_own_dropout_on_whatever_rank(dataset, small, monkeypatch):
    config = small.replace(vocab_size=400, dropout=0.3, micro_batch_rows=1)
    model, batches = Transformer(config.model), TrainingBatches(Corpora([dataset]), config)
    seeds: list[int] = []
    monkeypatch.setattr("lm.training.gradients._seed_dropout", lambda model, seed: seeds.append(seed))

    def drawn(ranks: Ranks) -> list[int]:
        seeds.clear()
        batch: Batch = batches.batch(3, ranks.rank, ranks.world)
        step_gradients(batches.objective, model, batch, config, 3, ranks)
        return seeds.copy()

    rows = drawn(Ranks())
    assert len(set(rows)) == 8
    for world in (2, 4):
        assert [drawn(Part(rank, world)) for rank in range(world)] == [rows[rank::world] for rank in range(world)]
