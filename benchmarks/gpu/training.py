"""A training step at the shape of GPT-2 small, in bfloat16, compared with nanoGPT's if there is a checkout of it."""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu_training import kindling_step, nanogpt_module
from lm.config.settings import Config
from lm.model.device import machine_rate
from lm.model.transformer import Transformer

LAYERS, HEADS, WIDTH, CONTEXT, VOCABULARY = 12, 12, 768, 1024, 50304
ROWS, AT_ONCE = 64, 32  # rows per step, and per micro-batch
STEPS = 3  # per turn


def kindling(
    device: torch.device, objective: str, optimizer: str, compiled: bool, residual: str = "float32"
) -> Callable[[], object]:
    config = Config().replace(
        num_layers=LAYERS, num_heads=HEADS, hidden_size=WIDTH, vocab_size=VOCABULARY, context_length=CONTEXT,
        batch_tokens=ROWS * CONTEXT, micro_batch_rows=AT_ONCE, objective=objective, optimizer=optimizer,
        compile=compiled, learning_rate=1e-5, muon_learning_rate=1e-5, residual_precision=residual,
    )  # fmt: skip
    return kindling_step(config, device)


def nanogpt_step(device: torch.device, checkout: Path, compiled: bool) -> Callable[[], object]:
    """A step of nanoGPT's ``train.py``, without dropout and biases."""
    module = nanogpt_module(checkout)
    settings = module.GPTConfig(
        n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, block_size=CONTEXT, vocab_size=VOCABULARY, bias=False, dropout=0.0
    )
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(settings).to(device)
        optimizer = model.configure_optimizers(0.1, 1e-5, (0.9, 0.95), "cuda")
    forward = torch.compile(model) if compiled else model
    tokens = torch.randint(1, VOCABULARY, (ROWS, CONTEXT + 1), device=device)

    def step() -> None:
        for part in tokens.split(AT_ONCE):
            with torch.autocast("cuda", torch.bfloat16):
                _, loss = forward(part[:, :-1].contiguous(), part[:, 1:].contiguous())
            (loss * len(part) / ROWS).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def speeds(device: torch.device, nanogpt: Path | None, rounds: int = 3) -> list[dict[str, Any]]:
    """Tokens per second, share of the card's matrix-product rate, and peak memory; medians of turns A B A B."""
    ways: dict[str, tuple[Callable[..., Callable[[], object]], tuple[Any, ...]]] = {
        "kindling": (kindling, (device, "next_token", "adamw", False)),
        "kindling, compiled": (kindling, (device, "next_token", "adamw", True)),
        "kindling, compiled, bfloat16 residual": (kindling, (device, "next_token", "adamw", True, "bfloat16")),
        "kindling, hybrid, muon": (kindling, (device, "hybrid", "muon", False)),
        "kindling, hybrid, muon, compiled": (kindling, (device, "hybrid", "muon", True)),
    }
    if nanogpt is not None:
        ways |= {"nanoGPT": (nanogpt_step, (device, nanogpt, False))}
        ways |= {"nanoGPT, compiled": (nanogpt_step, (device, nanogpt, True))}
    rate = machine_rate(device, "auto")
    flops = Transformer(
        Config().replace(num_layers=LAYERS, num_heads=HEADS, hidden_size=WIDTH, vocab_size=VOCABULARY).model
    ).flops_per_token(CONTEXT)
    steps, memory = {}, {}
    for name, (make, arguments) in ways.items():
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        try:
            steps[name] = make(*arguments)
            steps[name]()  # compiles
            steps[name]()
        except Exception as error:  # a failure must not hide the other results
            print(f"  {name}: {type(error).__name__} {str(error)[:300]}", flush=True)
            steps.pop(name, None)
            continue
        memory[name] = torch.cuda.max_memory_allocated() - before
        print(f"  {name}: ready in {time.perf_counter() - started:.1f} s", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(STEPS):
                step()
            torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - started) / STEPS)
    found = []
    for name, times in seconds.items():
        speed = ROWS * CONTEXT / statistics.median(times)
        found.append(
            {
                "way": name,
                "tokens_per_second": round(speed),
                "share_of_products": round(speed * flops / rate, 3),
                "peak_bytes": memory[name],
            }
        )
        print(f"  {found[-1]}", flush=True)
    return found
