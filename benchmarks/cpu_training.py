"""Compare a whole training step on the CPU with nanoGPT's, at the same shape: with AdamW, and ours with Muon as well.

    git clone https://github.com/karpathy/nanoGPT
    python -m benchmarks.cpu_training nanoGPT [--rounds 7] [--threads 1] [--compiled]

Both run forward, backward, clipping to norm 1 and a step of AdamW on random tokens: nanoGPT with its ``model.py`` and
the step of its ``train.py``, Kindling with the functions that ``train.py`` calls. The line "kindling, Muon" is the step
of the recipes, whose blocks' matrices are Muon's. Products are in float32; where the CPU has instructions for bfloat16,
the lines with that name are the step with ``precision = "native"``, the default, and "nanoGPT, autocast" is nanoGPT
with the autocast that its ``train.py`` uses on a GPU only. ``--compiled`` adds nanoGPT under torch.compile. Tokens are
per CPU second of all threads together. Each candidate has its own process, which Kindling
configures as ``train.py`` does (``lm.model.device.keep_freed_memory``).

To hold a CPU with AVX-512 to AVX2, set ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2.
The heading names the instructions that PyTorch uses.

The rate of a step is its model's FLOPs (``Transformer.flops_per_token``) per CPU second, times the number of threads;
the machine's rate is the best of its matrix products with the same number of threads, by wall-clock time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from benchmarks.side_by_side import apart_in_turn
from lm.config.model_settings import ModelConfig
from lm.config.settings import Config
from lm.data.batch import Vocabulary, rows_of_windows
from lm.kernels.dispatch import multiplies_bfloat16
from lm.model.device import keep_freed_memory, machine_rate
from lm.model.transformer import Transformer
from lm.objectives.objective import open_objective
from lm.training.gradients import step_gradients
from lm.training.optimizer import Optimizer

# name: layers, heads, width, context, rows, steps per turn. The first is nanoGPT's for a CPU, the second that of its
# config/train_shakespeare_char.py with 16 rows.
SHAPES = {"0.8M": (4, 4, 128, 64, 12, 10), "10M": (6, 6, 384, 256, 16, 1)}
VOCABULARY = 65


def several(step: Callable[[], object], steps: int) -> Callable[[], object]:
    return lambda: [step() for _ in range(steps)]


def kindling_steps(name: str, threads: int, optimizer: str, precision: str) -> Callable[[], object]:
    """Run the steps of one turn."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    shape = SHAPES[name]
    layers, heads, width, context, rows, steps = shape
    config = Config().replace(
        num_layers=layers, num_heads=heads, hidden_size=width, vocab_size=VOCABULARY, context_length=context,
        batch_tokens=rows * context, objective="next_token", optimizer=optimizer, learning_rate=1e-3,
        precision=precision,
    )  # fmt: skip
    return several(kindling_step(config, torch.device("cpu")), steps)


def kindling_step(config: Config, device: torch.device) -> Callable[[], object]:
    """One training step with these settings on random tokens, compiled if they ask for it."""
    model = Transformer(config.model).initialize(0).to(device)
    if config.training.compile:
        model.compile_training()
    optimizer = Optimizer(model, config.optimizer)
    size, rows = config.model.vocab_size, config.data.batch_rows
    # No token is an end of text: each row is one document, as in nanoGPT.
    windows = np.random.default_rng(0).integers(1, size, (rows, config.data.context_length + 1))
    vocabulary = Vocabulary(size, end_of_text=0, mask=size - 1)
    objective = open_objective(config, vocabulary)
    batch = objective.prepare(rows_of_windows(windows, vocabulary))
    if device.type == "cuda":
        batch = batch.each(torch.Tensor.pin_memory)  # as in training

    def step() -> None:
        step_gradients(objective, model, batch, config, 0)
        optimizer.clip()
        optimizer.step(1.0)

    return step


def nanogpt_module(checkout: Path) -> ModuleType:
    """Import its ``model.py``."""
    specification = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def nanogpt_steps(
    checkout: Path, name: str, threads: int, *, compiled: bool = False, bfloat16: bool = False
) -> Callable[[], object]:
    """The steps of one turn of nanoGPT's ``train.py`` with its settings for a CPU, without dropout and biases.

    ``bfloat16``: with the autocast of its GPU runs, which ``train.py`` leaves out on a CPU.
    """
    torch.set_num_threads(threads)
    module = nanogpt_module(checkout)
    layers, heads, width, context, rows, steps = SHAPES[name]
    settings = module.GPTConfig(
        block_size=context, vocab_size=VOCABULARY, n_layer=layers, n_head=heads, n_embd=width, dropout=0.0, bias=False
    )
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(settings)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    forward = torch.compile(model) if compiled else model
    inputs, targets = torch.randint(0, VOCABULARY, (2, rows, context))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            _, loss = forward(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return several(step, steps)


def compare(name: str, nanogpt: Path, rounds: int, *, compiled: bool) -> None:
    """Print the lines of one shape."""
    layers, heads, width, context, rows, steps = SHAPES[name]
    threads = torch.get_num_threads()
    makers = {
        "nanoGPT": partial(nanogpt_steps, nanogpt, name, threads),
        "kindling": partial(kindling_steps, name, threads, "adamw", "float32"),
        "kindling, Muon": partial(kindling_steps, name, threads, "muon", "float32"),
    }
    if multiplies_bfloat16():
        makers["nanoGPT, autocast"] = partial(nanogpt_steps, nanogpt, name, threads, bfloat16=True)
        makers["kindling, bfloat16"] = partial(kindling_steps, name, threads, "adamw", "bfloat16")
        makers["kindling, Muon, bfloat16"] = partial(kindling_steps, name, threads, "muon", "bfloat16")
    if compiled:
        makers["nanoGPT, compiled"] = partial(nanogpt_steps, nanogpt, name, threads, compiled=True)
    machine = machine_rate(torch.device("cpu"))  # and again afterwards, since a busy machine may be slower
    timings = apart_in_turn(makers, rounds=rounds, warm_up=2)
    tokens = steps * rows * context
    machine = max(machine, machine_rate(torch.device("cpu")))
    print(
        f"{name}: {layers} layers x {width}, {rows} x {context} tokens, {threads} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}; the machine's products: {machine / 1e9:.0f} GFLOP/s"
    )
    model = Transformer(ModelConfig(layers, width, heads, vocab_size=VOCABULARY))
    nanogpt_flops = 6 * (12 * layers * width**2 + VOCABULARY * width) + 12 * layers * width * context
    for candidate, timing in timings.items():
        flops = model.flops_per_token(context) if candidate.startswith("kindling") else nanogpt_flops
        rate = tokens * flops * threads / timing.cpu
        print(
            f"  {candidate:24}  {tokens / timing.cpu:8,.0f} tokens/CPU s  {rate / 1e9:5.1f} GFLOP/s, "
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
    for one in SHAPES:
        if arguments.only in one:
            compare(one, arguments.nanogpt, arguments.rounds, compiled=arguments.compiled)
