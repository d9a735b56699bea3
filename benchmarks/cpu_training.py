"""A whole training step on the CPU beside nanoGPT's, at the same shape and with AdamW.

    git clone https://github.com/karpathy/nanoGPT
    python -m benchmarks.cpu_training nanoGPT [--rounds 7] [--threads 1] [--compiled]

Both take random tokens through forward, backward, clipping to norm 1 and a step of AdamW: nanoGPT by its ``model.py``
and what its ``train.py`` does in a step, Kindling by the functions that ``train.py`` calls. ``--compiled`` adds nanoGPT
under torch.compile, with the seconds that took. Tokens are per CPU second of all threads together.

The rate of a step is its model's FLOPs (as ``Transformer.flops_per_token`` counts them) over its CPU seconds, times the
threads; the machine's is the best that its matrix products reach with as many threads, by the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.side_by_side import in_turn
from lm.config import Config
from lm.gradients import step_gradients
from lm.machine import machine_rate
from lm.model import Transformer
from lm.objectives import Vocabulary, make_batch, rows_of_windows
from lm.optim import Optimizer

# name: layers, heads, width, context, rows, steps in a turn. The first is nanoGPT's for a CPU, the second that of its
# config/train_shakespeare_char.py with 16 rows.
SHAPES = {"0.8M": (4, 4, 128, 64, 12, 10), "10M": (6, 6, 384, 256, 16, 1)}
VOCABULARY = 65


def kindling_step(shape: tuple[int, ...]) -> tuple[Callable[[], object], Transformer]:
    """One step, and the model that it trains."""
    layers, heads, width, context, rows, _ = shape
    config = Config().replace(
        num_layers=layers, num_heads=heads, hidden_size=width, vocab_size=VOCABULARY, context_length=context,
        batch_tokens=rows * context, objective="next_token", optimizer="adamw", learning_rate=1e-3, precision="float32",
    )  # fmt: skip
    model = Transformer(config.model).initialise(0)
    optimizer = Optimizer(model, config.optimizer)
    # No token is an end of text: each row is one document, as in nanoGPT.
    windows = np.random.default_rng(0).integers(1, VOCABULARY, (rows, context + 1))
    vocabulary = Vocabulary(VOCABULARY, end_of_text=0, mask=VOCABULARY - 1)
    numbers = np.arange(rows)
    batch = make_batch(rows_of_windows(windows, vocabulary), numbers, numbers, config.objective, vocabulary, 0)

    def step() -> None:
        step_gradients(model, batch, config, 0)
        optimizer.clip()
        optimizer.step(1.0)

    return step, model


def nanogpt_step(module: Any, shape: tuple[int, ...], *, compiled: bool) -> Callable[[], object]:
    """One step of nanoGPT's ``train.py``, without dropout and biases, as it is set for a CPU."""
    layers, heads, width, context, rows, _ = shape
    settings = module.GPTConfig(
        block_size=context, vocab_size=VOCABULARY, n_layer=layers, n_head=heads, n_embd=width, dropout=0.0, bias=False
    )
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(settings)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    forward = torch.compile(model) if compiled else model
    inputs, targets = torch.randint(0, VOCABULARY, (2, rows, context))

    def step() -> None:
        _, loss = forward(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def compare(name: str, module: Any, rounds: int, *, compiled: bool) -> None:
    """Print the lines of one shape."""
    shape = SHAPES[name]
    layers, _, width, context, rows, steps = shape
    ours, model = kindling_step(shape)
    candidates = {"nanoGPT": nanogpt_step(module, shape, compiled=False), "kindling": ours}
    if compiled:
        candidates["nanoGPT, compiled"] = nanogpt_step(module, shape, compiled=True)
        began = time.perf_counter()
        candidates["nanoGPT, compiled"]()
        print(f"  compiling nanoGPT took {time.perf_counter() - began:.0f} s")

    def several(step: Callable[[], object]) -> Callable[[], object]:
        return lambda: [step() for _ in range(steps)]

    machine = machine_rate(torch.device("cpu"))  # and again afterwards: a busy machine may hide what it can do
    timings = in_turn({name: several(step) for name, step in candidates.items()}, rounds=rounds, warm_up=1)
    tokens, threads = steps * rows * context, torch.get_num_threads()
    machine = max(machine, machine_rate(torch.device("cpu")))
    print(
        f"{name}: {layers} layers x {width}, {rows} x {context} tokens, {threads} threads; "
        f"the machine's products: {machine / 1e9:.0f} GFLOP/s"
    )
    nanogpt_flops = 6 * (12 * layers * width**2 + VOCABULARY * width) + 12 * layers * width * context
    for candidate, timing in timings.items():
        flops = model.flops_per_token(context) if candidate == "kindling" else nanogpt_flops
        rate = tokens * flops * threads / timing.cpu
        print(
            f"  {candidate:17}  {tokens / timing.cpu:8,.0f} tokens/CPU s  {rate / 1e9:5.1f} GFLOP/s, "
            f"{rate / machine:.2f} of the machine's  "
            f"{timings['nanoGPT'].cpu / timing.cpu:.2f} times nanoGPT",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compiled", action="store_true", help="nanoGPT under torch.compile as well")
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    specification = importlib.util.spec_from_file_location("nanogpt_model", arguments.nanogpt / "model.py")
    assert specification is not None and specification.loader is not None
    nanogpt = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(nanogpt)
    for one in SHAPES:
        if arguments.only in one:
            compare(one, nanogpt, arguments.rounds, compiled=arguments.compiled)
