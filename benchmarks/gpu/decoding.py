"""Tokens per second of generation at the shape of GPT-2 small: the usual step, and a CUDA graph."""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.gpu.training import CONTEXT, HEADS, LAYERS, VOCABULARY, WIDTH
from lm.config.settings import Config
from lm.inference.compiled_decoding import compiled_decoder
from lm.inference.decoding import Step, decoder
from lm.inference.kv_cache import KVCache
from lm.inference.sampling import draw
from lm.model.transformer import Transformer

ROWS = (1, 8, 64)
PROMPT, STEPS = 256, 64


def speeds(device: torch.device, rounds: int = 3) -> list[dict[str, object]]:
    """Tokens per second of each number of rows, weights type and way, A B A B …, with a draw in every step."""
    shape = {"num_layers": LAYERS, "num_heads": HEADS, "hidden_size": WIDTH, "vocab_size": VOCABULARY}
    found: list[dict[str, object]] = []
    for dtype in (torch.float32, torch.bfloat16):
        model = Transformer(Config().replace(**shape).model).initialize(0).to(device, dtype).eval()
        for rows in ROWS:
            ways, cache = {}, KVCache.empty(model.config, rows, CONTEXT, model.embedding.weight)
            ways["usual"] = decoder(model, cache)
            ways["graph"], note = compiled_decoder(model, cache)
            print(f"  {rows} rows, {dtype}: {note}", flush=True)
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(rounds):
                for name, step in ways.items():
                    seconds[name].append(timed(step, cache))
            for name, times in seconds.items():
                speed = round(rows * STEPS / statistics.median(times))
                found.append({"way": name, "rows": rows, "dtype": str(dtype), "tokens_per_second": speed})
                print(f"  {found[-1]}", flush=True)
    return found


@torch.inference_mode()
def timed(step: Step, cache: KVCache) -> float:
    """Seconds of ``STEPS`` steps of all rows of a cache, from ``PROMPT`` tokens on."""
    rows = len(cache.lengths)
    uniforms = torch.rand(STEPS, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cache.lengths[:] = [PROMPT] * rows
    tokens = step([0] * rows).argmax(-1).tolist()  # not timed: it may compile kernels
    started = time.perf_counter()
    for each in uniforms:
        logits = step(tokens)
        tokens = draw(logits, each.to(logits.device)).tolist()
    return time.perf_counter() - started
