"""Attention: errors against float64, determinism, and TFLOP/s compared with PyTorch's on the same card."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.gpu.timing import milliseconds
from lm.kernels import attention, masks, reference

torch._functorch.config.donated_buffer = False  # flex's backward pass is called repeatedly on one graph
MASKS = ("causal", "full", "packed", "hybrid")
TOTAL_TOKENS = 16384  # rows × length, from 32 rows of 512 to one of 16,384, as in FlashAttention's figures
HIDDEN = 2048  # heads × head dimension, as there
MEAN_DOCUMENT = 512


def intervals(kind: str, rows: int, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """lo, hi and each token's document, (rows, length). Packed rows are causal; of hybrid rows half are."""
    starts = torch.zeros(rows, length, dtype=torch.bool)
    if kind == "packed":
        starts = torch.rand(rows, length, generator=torch.Generator().manual_seed(0)) < 1 / MEAN_DOCUMENT
    bidirectional = torch.full((rows,), kind == "full")
    if kind == "hybrid":
        bidirectional[rows // 2 :] = True
    lo, hi = masks.packed(starts, bidirectional)
    return lo.to(device), hi.to(device), starts.cumsum(1).to(device)


def inputs(rows: int, length: int, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    shape = (rows, length, heads, width)
    return [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]


def worst_errors(device: torch.device, lengths: tuple[int, ...] = (200, 1024)) -> list[dict[str, Any]]:
    """The largest errors of output and gradients against float64, Kindling's and PyTorch's, and whether bits repeat."""
    found = []
    for length in lengths:
        for width in (64, 128):
            for kind in MASKS:
                for fill in ("random", "ones"):
                    q, k, v = inputs(2, length, 2, width, torch.bfloat16, device)
                    if fill == "ones":
                        q, k, v = (torch.ones_like(x).requires_grad_() for x in (q, k, v))
                    lo, hi, _ = intervals(kind, 2, length, device)
                    direction = torch.randn_like(q)
                    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
                    truth, _ = reference.attention(exact[0], exact[1], exact[2], lo, hi)
                    truths = [truth, *torch.autograd.grad(truth, exact, direction.double())]
                    visible = masks.dense(lo, hi, length)[:, None]
                    pytorchs = F.scaled_dot_product_attention(*heads_first(q, k, v), attn_mask=visible).transpose(1, 2)
                    results = {}
                    for name, out in (("ours", attention(q, k, v, lo, hi)[0]), ("pytorch", pytorchs)):
                        got = [out, *torch.autograd.grad(out, (q, k, v), direction)]
                        results[name] = [(a.double() - b).abs().max().item() for a, b in zip(got, truths, strict=True)]
                    twice = [
                        [out, *torch.autograd.grad(out, (q, k, v), direction)]
                        for out in (attention(q, k, v, lo, hi)[0] for _ in range(2))
                    ]
                    same = all(torch.equal(a, b) for a, b in zip(*twice, strict=True))
                    found.append(
                        {"length": length, "width": width, "mask": kind, "inputs": fill, **results, "same_bits": same}
                    )
                    pairs = zip(results["ours"], results["pytorch"], strict=True)
                    worse = max(ours / max(theirs, 1e-9) for ours, theirs in pairs)
                    verdict = "" if worse <= 2 and same else "  <-- too large"
                    print(f"  {length} {width} {kind} {fill}: {worse:.2f}{verdict}", flush=True)
    return found


def heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def candidates(
    kind: str, q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, documents: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """Each implementation of this attention, as a function without arguments that returns (B, T, H, D)."""
    rows, length = lo.shape
    torch._dynamo.reset()  # compile each shape separately, as training with that shape would
    compiled_flex = torch.compile(flex_attention, dynamic=False)
    half = rows // 2 if kind == "hybrid" else rows if kind != "full" else 0

    def seen(b: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (documents[b, i] == documents[b, j]) & ((i >= j) | (b >= half))

    def by_sdpa(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            if kind == "hybrid":
                first = F.scaled_dot_product_attention(*heads_first(q[:half], k[:half], v[:half]), is_causal=True)
                second = F.scaled_dot_product_attention(*heads_first(q[half:], k[half:], v[half:]))
                return torch.cat((first, second)).transpose(1, 2)
            if kind == "packed":
                mask = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
                return F.scaled_dot_product_attention(*heads_first(q, k, v), attn_mask=mask).transpose(1, 2)
            return F.scaled_dot_product_attention(*heads_first(q, k, v), is_causal=kind == "causal").transpose(1, 2)

    ways: dict[str, Callable[[], Tensor]] = {"kindling": lambda: attention(q, k, v, lo, hi)[0]}
    if kind in ("packed", "hybrid"):  # PyTorch has faster ones for the others
        block_mask = create_block_mask(seen, rows, None, length, length, device=str(q.device))
        ways["flex"] = lambda: compiled_flex(*heads_first(q, k, v), block_mask=block_mask).transpose(1, 2)
    if kind == "packed":  # the only one of these that takes a mask
        return ways | {"sdpa efficient, dense mask": partial(by_sdpa, SDPBackend.EFFICIENT_ATTENTION)}
    return ways | {
        "sdpa flash": partial(by_sdpa, SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": partial(by_sdpa, SDPBackend.CUDNN_ATTENTION),
    }


def setting(width: int, length: int, kind: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """The arguments of ``candidates``, with the same total of tokens and heads × width for every case."""
    rows = max(TOTAL_TOKENS // length, 2 if kind == "hybrid" else 1)
    return kind, *inputs(rows, length, HIDDEN // width, width, dtype, device), *intervals(kind, rows, length, device)


def compile_ahead(case: tuple[int, int, str]) -> None:
    """Call each compiled function once, so that a later process finds it in the caches on disk."""
    ways = candidates(*setting(*case, torch.bfloat16, torch.device("cuda")))
    for name in {"kindling", "flex"} & ways.keys():
        ways[name]().sum().backward()


def speeds(
    device: torch.device, widths: tuple[int, ...], lengths: tuple[int, ...], dtype: torch.dtype = torch.bfloat16
) -> list[dict[str, Any]]:
    """TFLOP/s over visible pairs: 4 (forward) and 10 (backward) × pairs × heads × width operations."""
    cases = [(width, length, kind) for width in widths for length in lengths for kind in MASKS]
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 1) - 2), get_context("spawn")) as pool:
        list(pool.map(compile_ahead, cases))
    found = []
    for width, length, kind in cases:
        kind, q, k, v, lo, hi, documents = setting(width, length, kind, dtype, device)
        rows, heads = q.shape[0], q.shape[2]
        flops = 4 * float((hi - lo).sum()) * heads * width
        ways = candidates(kind, q, k, v, lo, hi, documents)
        line: dict[str, Any] = {"width": width, "length": length, "rows": rows, "heads": heads, "mask": kind}
        with torch.no_grad():
            forward = milliseconds(ways)
        direction = torch.randn_like(q)
        backwards = {}
        for name, way in ways.items():
            if forward[name] is not None:
                grad = partial(torch.autograd.grad, way(), (q, k, v), direction, retain_graph=True)
                backwards[name] = grad
        backward = milliseconds(backwards)
        line["forward_tflops"] = {n: t and round(flops / t / 1e9, 1) for n, t in forward.items()}
        line["backward_tflops"] = {n: t and round(2.5 * flops / t / 1e9, 1) for n, t in backward.items()}
        found.append(line)
        print(f"  {line}", flush=True)
    return found
