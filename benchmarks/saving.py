"""How long a checkpoint interrupts training: written in the foreground, and in the background.

python -m benchmarks.saving [RECIPE]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.cpu_cross_entropy import resident
from lm.config.recipes import find_recipe, load_config
from lm.model.transformer import Transformer
from lm.runs import checkpoint
from lm.runs.checkpoint import Retention
from lm.runs.checkpoint_writer import CheckpointWriter, snapshot
from lm.training.optimizer import Optimizer

ROUNDS = 15


def main(recipe: str) -> None:
    config = load_config(find_recipe(recipe), {"vocab_size": 8192})
    model = Transformer(config.model).initialize(0)
    optimizer = Optimizer(model, config.optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(1.0)
    weights, state = model.state_dict(), optimizer.state()
    size = sum(tensor.nbytes for part in (weights, state) for tensor in part.values())
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak memory to the current memory
    before = resident("VmRSS")
    pauses: dict[str, list[tuple[float, float]]] = {"in the foreground": [], "in the background": []}
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder, keep = Path(name), Retention(2)
        with CheckpointWriter(folder, keep, 0, lambda: None) as writer:
            for step in range(1, 2 * ROUNDS, 2):
                wall, cpu = time.perf_counter(), time.thread_time()
                checkpoint.save(folder, step, snapshot(weights), snapshot(state), {})
                checkpoint.tidy(folder, step, keep)
                pauses["in the foreground"].append((time.perf_counter() - wall, time.thread_time() - cpu))
                wall, cpu = time.perf_counter(), time.thread_time()
                writer.save(step + 1, weights, state, {}, scheduled=True, best_step=0)
                pauses["in the background"].append((time.perf_counter() - wall, time.thread_time() - cpu))
                writer.wait()
    print(model.describe())
    print(f"{size / 2**20:.0f} MiB of weights and optimizer state, {ROUNDS} times in turn, medians (and the range):")
    for name, measured in pauses.items():
        walls, cpus = ([1e3 * value for value in values] for values in zip(*measured, strict=True))
        print(
            f"  {name:24}{statistics.median(walls):7.0f} ms ({min(walls):.0f} to {max(walls):.0f}), "
            f"{statistics.median(cpus):.0f} ms of the training thread's CPU"
        )
    print(f"memory rose by {(resident('VmHWM') - before) / 2**20:.0f} MiB at most")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "small")
