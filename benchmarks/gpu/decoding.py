"""Tokens per second of generation at the shape of GPT-2 small: the usual step, and a CUDA graph; and its products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.timing import milliseconds
from benchmarks.gpu.training import CONTEXT, HEADS, LAYERS, VOCABULARY, WIDTH
from lm.config.settings import Config
from lm.inference.compiled_decoding import compiled_decoder
from lm.inference.decoding import Step, decoder
from lm.inference.kv_cache import KVCache
from lm.inference.low_precision import LowPrecisionTransformer
from lm.inference.sampling import draw
from lm.kernels import few_rows_product
from lm.model.device import staged
from lm.model.transformer import Transformer

ROWS = (1, 64, 8)  # in order of value
GOALS = {1: 3_000, 64: 40_000}  # tokens per second, in bfloat16
PROMPT, STEPS = 256, 64


def new_model(device: torch.device, precision: str, shape: dict[str, Any] | None = None) -> Transformer:
    """A model at the shape of GPT-2 small, or another, with the weights that ``LanguageModel.writer`` would have."""
    usual = {"num_layers": LAYERS, "num_heads": HEADS, "hidden_size": WIDTH, "vocab_size": VOCABULARY}
    model = Transformer(Config().replace(**usual | (shape or {})).model).initialize(0).to(device).eval()
    return LowPrecisionTransformer(model) if precision == "bfloat16" else model


def speeds(device: torch.device, rounds: int = 3) -> Iterator[dict[str, object]]:
    """Tokens per second of each precision, number of rows and way, A B A B …, with a draw in every step."""
    for precision in ("bfloat16", "float32"):
        model = new_model(device, precision)
        for rows in ROWS:
            cache = KVCache.empty(model.config, rows, CONTEXT, model.head_weight)
            graph, note = compiled_decoder(model, cache)
            ways = {"usual": decoder(model, cache), "graph": graph}
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(rounds):
                for name, step in ways.items():
                    seconds[name].append(timed(step, cache))
            for name, times in seconds.items():
                speed = round(rows * STEPS / statistics.median(times))
                goal = GOALS.get(rows) if precision == "bfloat16" else None
                found = {"way": name, "rows": rows, "precision": precision, "tokens_per_second": speed, "goal": goal}
                yield found | ({"note": note} if name == "graph" else {})


@torch.inference_mode()
def timed(step: Step, cache: KVCache, steps: int = STEPS) -> float:
    """Seconds of so many steps of all rows of a cache, from ``PROMPT`` tokens on."""
    rows = len(cache.lengths)
    uniforms = torch.rand(steps, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cache.lengths[:] = [PROMPT] * rows
    tokens = step([0] * rows).argmax(-1).tolist()  # not timed: it may compile kernels
    started = time.perf_counter()
    for each in uniforms:
        logits = step(tokens)
        tokens = draw(logits, staged(each, logits.device).to(logits.device, non_blocking=True)).tolist()
    return time.perf_counter() - started


def plain_product(x: Tensor, weight: Tensor, norm: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    """``few_rows_product`` by PyTorch's operations, with cuBLAS's product in bfloat16."""
    factor = x if norm is None else F.rms_norm(x, norm.shape, norm, 1e-6).to(weight.dtype)
    out = F.linear(factor, weight)
    if activation == "swiglu":
        gate, up = out.chunk(2, dim=-1)
        out = F.silu(gate) * up
    return out if residual is None else residual.add_(out)


def products(device: torch.device) -> Iterator[dict[str, object]]:
    """Microseconds of each product of a step with what is around it, in bfloat16, weights not in the chip's cache."""
    inner = Config().replace(hidden_size=WIDTH).model.feed_forward_width
    kinds = {
        "queries, keys, values": (WIDTH, 3 * WIDTH, True, "", False),
        "output": (WIDTH, WIDTH, False, "", True),
        "gate and up": (WIDTH, 2 * inner, True, "swiglu", False),
        "down": (inner, WIDTH, False, "", True),
        "head": (WIDTH, VOCABULARY, True, "", False),
    }
    for name, (inputs, outputs, normed, activation, added) in kinds.items():
        for rows in sorted(ROWS):
            x = torch.randn(rows, inputs, device=device, dtype=torch.float32 if normed else torch.bfloat16)
            weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
            norm = torch.ones(inputs, device=device) if normed else None
            residual = torch.zeros(rows, outputs, device=device) if added else None
            ours = partial(few_rows_product, x, weight, norm=norm, epsilon=1e-6, activation=activation)
            calls = {
                "kindling": partial(ours, residual=residual),
                "pytorch": partial(plain_product, x, weight, norm, activation, residual),
            }
            times = {way: time and round(1000 * time, 2) for way, time in milliseconds(calls).items()}
            yield {"product": name, "rows": rows, "microseconds": times}
