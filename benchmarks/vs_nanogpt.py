"""Compare the recipe char-tiny with nanoGPT, on characters and at the shape of nanoGPT's CPU example.

    git clone https://github.com/karpathy/nanoGPT
    python -m benchmarks.vs_nanogpt nanoGPT input.txt [--seeds 3] [--steps 2000] [--reach-steps 250] [--tuned 3e-3]

Both have 4 layers, 4 heads, width 128, context 64, batches of 12 rows, no dropout and the same number of steps, on the
same characters: the first nine tenths of the text for training, the rest for validation. For each seed, in turn:

- kindling: ``lm.training.pretraining.train`` with the unchanged recipe.
- kindling, short: the same with ``--reach-steps`` steps, for the CPU seconds to the loss ``--reach``.
- nanoGPT: its ``model.py``, with the loop and the schedule of its ``train.py`` reimplemented here, and the settings
  that its readme recommends for a CPU. (``train.py`` itself cannot report the loss on a whole split.) ``--tuned`` sets
  another peak learning rate.

Losses are over the whole validation split, in consecutive windows, in nats per character; Kindling's includes the end
of the text. CPU seconds are those of all threads for batches, steps and logging, without validation and start-up.
nanoGPT's vocabulary is the 65 characters of the text; Kindling's has 259 more.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

import data_prep
from data_prep.shards.convert import import_dataset
from data_prep.shards.tokens import open_dataset
from lm.config.recipes import find_recipe, load_config
from lm.training.pretraining import train

CONTEXT, ROWS = 64, 12
# nanoGPT's config/train_shakespeare_char.py, with the changes that its readme recommends for a CPU.
PEAK_RATE, LEAST_RATE, WARMUP, WEIGHT_DECAY, BETAS, CLIP = 1e-3, 1e-4, 100, 0.1, (0.9, 0.99), 1.0
SHAPE = {"block_size": CONTEXT, "n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.0, "bias": False}


@dataclass(frozen=True)
class Point:
    """The cost and the loss of a run after ``step`` steps."""

    step: int
    cpu_seconds: float
    loss: float


@dataclass(frozen=True)
class Curve:
    name: str
    seed: int
    points: list[Point]

    def seconds_to(self, loss: float) -> float:
        """CPU seconds until the first validation at or below ``loss``; infinite if there is none."""
        return next((point.cpu_seconds for point in self.points if point.loss <= loss), math.inf)


class Stopwatch:
    """CPU seconds of all threads of this process while it runs."""

    def __init__(self) -> None:
        self.seconds, self._since = 0.0, 0.0

    def go(self) -> None:
        self._since = time.process_time()

    def stop(self) -> None:
        self.seconds += time.process_time() - self._since


def split_text(text: str) -> tuple[str, str]:
    """The first nine tenths of the characters, and the rest."""
    border = int(0.9 * len(text))
    return text[:border], text[border:]


@torch.no_grad()
def whole_split_loss(logits_of: Callable[[Tensor], Tensor], tokens: NDArray[np.int64], context: int) -> float:
    """Mean loss, in nats, of ``tokens`` in consecutive windows of ``context``; the last token precedes the first.

    ``logits_of`` maps inputs (rows, T) to scores (rows, T, vocabulary).
    """
    inputs = torch.from_numpy(np.roll(tokens, 1))
    targets = torch.from_numpy(tokens)
    whole = len(tokens) // context * context
    parts = [*zip(inputs[:whole].view(-1, context).split(64), targets[:whole].view(-1, context).split(64), strict=True)]
    if whole < len(tokens):
        parts.append((inputs[None, whole:], targets[None, whole:]))
    costs = [F.cross_entropy(logits_of(x).flatten(0, 1), y.flatten(), reduction="sum") for x, y in parts]
    return sum(map(float, costs)) / len(tokens)


def nanogpt_rate(step: int, steps: int, peak: float) -> float:
    """The learning rate of ``step``: linear warmup over ``WARMUP`` steps, then cosine decay to ``LEAST_RATE``."""
    if step < WARMUP:
        return peak * (step + 1) / (WARMUP + 1)
    share = (step - WARMUP) / max(1, steps - WARMUP)
    return LEAST_RATE + 0.5 * (1 + math.cos(math.pi * share)) * (peak - LEAST_RATE)


def load_nanogpt(checkout: Path) -> ModuleType:
    """Import ``model.py`` of a checkout."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_nanogpt(
    model_py: ModuleType, text: tuple[str, str], seed: int, *, steps: int, every: int, peak: float
) -> list[Point]:
    """Train nanoGPT, with regular validations."""
    number_of = {character: i for i, character in enumerate(sorted(set(text[0] + text[1])))}
    training, validation = (np.array([number_of[c] for c in part], dtype=np.uint16) for part in text)
    torch.manual_seed(1337 + seed)
    model = model_py.GPT(model_py.GPTConfig(vocab_size=len(number_of), **SHAPE))
    optimizer = model.configure_optimizers(WEIGHT_DECAY, peak, BETAS, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.bin"
        training.tofile(path)

        def batch() -> tuple[Tensor, Tensor]:
            data = np.memmap(path, dtype=np.uint16, mode="r")
            starts = torch.randint(len(data) - CONTEXT, (ROWS,)).tolist()
            windows = torch.stack([torch.from_numpy(data[s : s + CONTEXT + 1].astype(np.int64)) for s in starts])
            return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

        points, watch = [], Stopwatch()
        watch.go()
        inputs, targets = batch()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = nanogpt_rate(step, steps, peak)
            _, loss = model(inputs, targets)
            inputs, targets = batch()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            if (step + 1) % every == 0 or step + 1 == steps:
                watch.stop()
                model.eval()  # it returns all logits only if it receives targets
                found = whole_split_loss(lambda x: model(x, x)[0], validation.astype(np.int64), CONTEXT)
                model.train()
                points.append(Point(step + 1, watch.seconds, found))
                watch.go()
    return points


def make_dataset(text: tuple[str, str], folder: Path) -> Path:
    """Write shards of both parts, each as one document, with the characters of the first part as tokens."""
    source = folder / "train.txt"
    source.write_text(text[0], encoding="utf-8", newline="")
    data_prep.build([source], folder / "characters", tokenizer_kind="characters", validation_fraction=0.0)
    tokenizer = open_dataset(folder / "characters").tokenizer
    (folder / "tokens").mkdir()
    for name, part in zip(("train", "val"), text, strict=True):
        np.array(tokenizer.encode(part), dtype=np.uint16).tofile(folder / "tokens" / f"{name}.bin")
    import_dataset([folder / "tokens"], "nanogpt", tokenizer, folder / "data")
    return folder / "data"


class Clock:
    """A reporter that runs a stopwatch between steps, and stops it during validation and saving."""

    def __init__(self, characters: int) -> None:
        self.characters, self.watch, self.points, self._running = characters, Stopwatch(), list[Point](), False

    def note(self, text: str) -> None:
        pass

    def begin(self, done: int, total: int) -> None:
        self.step(done)

    def step(self, step: int) -> None:
        if not self._running:
            self.watch.go()
            self._running = True

    def metrics(self, line: dict[str, Any]) -> None:
        if "validation" not in line:
            self.watch.stop()
            self._running = False
            return
        readout = line["validation"]["next_token"]
        loss = readout["nats_per_token"] * readout["predicted"] / self.characters
        self.points.append(Point(line["step"], self.watch.seconds, loss))

    def end(self) -> None:
        pass


def train_kindling(data: Path, characters: int, run: Path, seed: int, **settings: Any) -> list[Point]:
    """Train the recipe with some settings changed; ``characters`` is the length of the validation text."""
    every = min(settings.pop("every"), settings["steps"])
    asked = {
        "data": [str(data)],
        "device": "cpu",
        "seed": seed,
        "validation_rows": 0,
        "log_every": every,
        "validate_every": every,
        "checkpoint_every": settings["steps"],
        **settings,
    }
    config, clock = load_config(find_recipe("char-tiny"), asked), Clock(characters)
    assert (config.data.context_length, config.data.batch_rows) == (CONTEXT, ROWS)
    train(config, run, clock)
    return clock.points


def summary(curves: list[Curve], reach: float) -> str:
    """One line per candidate: its final loss, per seed and on average, and CPU seconds in total and to ``reach``."""
    names = list(dict.fromkeys(curve.name for curve in curves))
    lines = [f"{'':24}  loss at the end: mean, each     CPU s  CPU s to {reach:g}: each"]
    for name in names:
        own = [curve for curve in curves if curve.name == name]
        losses, seconds = [c.points[-1].loss for c in own], [c.points[-1].cpu_seconds for c in own]
        reached = ", ".join(f"{curve.seconds_to(reach):.1f}" for curve in own)
        each = ", ".join(f"{loss:.3f}" for loss in losses)
        lines.append(f"{name:24}  {statistics.mean(losses):.3f}  ({each})  {statistics.mean(seconds):6.1f}  {reached}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("text", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--reach-steps", type=int, default=250)
    parser.add_argument("--reach", type=float, default=1.898, help="a validation loss")
    parser.add_argument("--every", type=int, default=250, help="steps between validations")
    parser.add_argument("--tuned", type=float, help="also nanoGPT with this peak learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for all curves, rewritten after each run")
    arguments = parser.parse_args()
    text = split_text(arguments.text.read_text(encoding="utf-8"))
    model_py, every = load_nanogpt(arguments.nanogpt), arguments.every
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_dataset(text, folder)

        def peer(seed: int, peak: float) -> list[Point]:
            return train_nanogpt(model_py, text, seed, steps=arguments.steps, every=every, peak=peak)

        def ours(seed: int, steps: int) -> list[Point]:
            run, threads = folder / f"run-{seed}-{steps}", arguments.threads
            return train_kindling(data, len(text[1]), run, seed, steps=steps, every=every, threads=threads)

        candidates: dict[str, Callable[[int], list[Point]]] = {
            "kindling": lambda seed: ours(seed, arguments.steps),
            f"kindling, {arguments.reach_steps} steps": lambda seed: ours(seed, arguments.reach_steps),
            "nanoGPT": lambda seed: peer(seed, PEAK_RATE),
        }
        if arguments.tuned:
            candidates[f"nanoGPT, rate {arguments.tuned:g}"] = lambda seed: peer(seed, arguments.tuned)
        curves = []
        for seed in range(arguments.seeds):
            for candidate, run in candidates.items():
                curves.append(Curve(candidate, seed, run(seed)))
                points = ", ".join(f"{p.step}: {p.loss:.3f} ({p.cpu_seconds:.1f} s)" for p in curves[-1].points)
                print(f"{candidate}, seed {seed}: {points}", file=sys.stderr, flush=True)
                if arguments.json:
                    arguments.json.write_text(json.dumps([asdict(curve) for curve in curves], indent=1))
    print(summary(curves, arguments.reach))


if __name__ == "__main__":
    main()
