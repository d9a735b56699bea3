"""Compare Muon's arithmetic on the CPU: orthogonalize the matrices of some layers by one inverse and by products.

    python -m benchmarks.cpu_muon [--rounds 9] [--threads 1]

Both use the same stacks, one for each matrix shape of a layer: four square matrices, and three of a SwiGLU
feed-forward. Below the times are the resulting singular values of random square matrices.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.side_by_side import in_turn, table
from lm.config.model_settings import ModelConfig
from lm.training import optimizer

CASES = ((128, 4), (256, 2), (384, 2), (768, 1))  # width, layers


def stacks_of(width: int, layers: int) -> list[Tensor]:
    """Wide matrices of norm 1, of attention and of the feed-forward."""
    inner = ModelConfig(hidden_size=width, num_heads=1).feed_forward_width
    stacks = [torch.randn(4 * layers, width, width), torch.randn(3 * layers, width, inner)]
    return [stack / stack.norm(dim=(1, 2), keepdim=True) for stack in stacks]


def every(function: Callable[[Tensor], Tensor], stacks: list[Tensor]) -> Callable[[], object]:
    return lambda: [function(stack) for stack in stacks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ways = {"five rounds of products": optimizer._by_products, "one inverse": optimizer._by_inverse}
    for width, layers in CASES:
        torch.manual_seed(0)
        stacks = stacks_of(width, layers)
        timings = in_turn({name: every(way, stacks) for name, way in ways.items()}, rounds=arguments.rounds)
        print(table(f"width {width}, {layers} layers", timings, "five rounds of products"))
        for name, way in ways.items():
            marks = torch.quantile(torch.linalg.svdvals(way(stacks[0][:4])), torch.tensor([0.05, 0.5, 0.95]))
            print(f"  {name}: singular values {', '.join(f'{mark:.2f}' for mark in marks)} (5 %, half, 95 %)")
        print(flush=True)


if __name__ == "__main__":
    main()
