"""Compare attention on the CPU, forward and backward: planned pieces and PyTorch's attention with a dense mask.

    python -m benchmarks.cpu_attention [--rounds 15]

"dense mask" is ``scaled_dot_product_attention`` with a boolean mask (rows, 1, T, T) that is made outside the timing.
"fastest call" is the same function with the cheapest arguments possible: no mask, the causal flag, or else the dense
mask. "pieces" finds its plan in the cache, as all layers of a model but the first do; "plan" is the cost of the first.

Pieces are many short parallel regions. If other programs use the same cores, OpenMP's threads spin while they wait for
one that is not running, and pieces can take five times as long; ``OMP_WAIT_POLICY=passive`` in the environment avoids
that.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.side_by_side import in_turn, table
from lm.kernels import attention_torch, masks

# name: rows, tokens, heads, key heads, width, mean document length (0: whole rows), how many rows are bidirectional
CASES = {
    "documents of 128, causal": (8, 512, 8, 8, 32, 128, 0),
    "documents of 128, half of the rows both ways": (8, 512, 8, 8, 32, 128, 4),
    "documents of 128, causal, 2 key heads": (8, 512, 8, 2, 32, 128, 0),
    "whole rows, half of them both ways": (8, 512, 8, 8, 32, 0, 4),
    "whole rows, causal": (8, 512, 8, 8, 32, 0, 0),
    "whole rows, both ways": (8, 512, 8, 8, 32, 0, 8),
    "whole long rows, causal": (4, 1024, 8, 8, 64, 0, 0),
    "documents of 1000, causal, T = 128": (32, 128, 4, 4, 32, 1000, 0),
    "documents of 1000, half both ways, T = 128": (32, 128, 4, 4, 32, 1000, 16),
    "documents of 1000, causal, T = 256": (16, 256, 4, 4, 32, 1000, 0),
    "documents of 1000, half both ways, T = 256": (16, 256, 6, 6, 32, 1000, 8),
    "whole rows, causal, T = 128": (32, 128, 4, 4, 32, 0, 0),
    "whole rows, causal, T = 256": (16, 256, 6, 6, 32, 0, 0),
}


class Pieces(torch.autograd.Function):
    """The two functions of ``attention_torch`` under autograd, as a model calls them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        out, lse = attention_torch.forward(q, k, v, lo, hi, q.shape[-1] ** -0.5, 0.0)
        ctx.save_for_backward(q, k, v, out, lse, lo, hi)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, lo, hi = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        return (*attention_torch.backward(grad_outputs[0], q, k, v, out, lse, lo, hi, scale, 0.0), None, None)


def compare(name: str, rounds: int) -> None:
    """Print the table of one case."""
    rows, tokens, heads, key_heads, width, mean_length, both = CASES[name]
    torch.manual_seed(0)
    q, k, v = (torch.randn(rows, tokens, count, width, requires_grad=True) for count in (heads, key_heads, key_heads))
    grad_out = torch.randn(rows, tokens, heads, width)
    starts = torch.rand(rows, tokens) < (1 / mean_length if mean_length else 0)
    lo, hi = masks.packed(starts, torch.arange(rows) < both)
    visible = masks.dense(lo, hi, tokens)[:, None]
    whole = not mean_length and both in (0, rows)

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (q, k, v), grad_out)

    def builtin(mask: Tensor | None, is_causal: bool) -> Callable[[], object]:
        def call() -> object:
            queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(
                queries, keys, values, mask, is_causal=is_causal, enable_gqa=heads != key_heads
            )
            return gradients(out.transpose(1, 2))

        return call

    candidates = {"dense mask": builtin(visible, False), "pieces": lambda: gradients(Pieces.apply(q, k, v, lo, hi))}
    if whole:
        candidates["fastest call"] = builtin(None, both == 0)
    title = f"{name}: {rows} x {tokens}, {heads} heads of {width}"
    print(table(title, in_turn(candidates, rounds=rounds), "dense mask"))
    made = []
    for _ in range(rounds):
        attention_torch.make_plan.cache_clear()
        begin = time.perf_counter()
        plan = attention_torch.plan_for(q, k, lo, hi)
        made.append(time.perf_counter() - begin)
    pairs = sum(len(p.rows) * (p.queries[1] - p.queries[0]) * (p.keys[1] - p.keys[0]) for p in plan.pieces)
    print(
        f"  plan {statistics.median(made) * 1e3:.2f} ms: {len(plan.pieces)} calls, "
        f"{pairs / (rows * tokens**2):.2f} of all pairs, {visible.float().mean():.2f} visible\n",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    for case in CASES:
        if arguments.only in case:
            compare(case, arguments.rounds)
