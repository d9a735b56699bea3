"""The effect of each setting of a subword recipe: change one at a time and keep everything else.

    python -m benchmarks.recipe_study DATA --out FOLDER [--only PREFIX] [--threads 1]

DATA is a folder of shards; the runs with repeated text need a second one, ``--little``, a small part of the same text.
Finished runs are kept in FOLDER and not repeated. Losses are over the whole split, in nats per token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from lm.config.settings import Config
from lm.data.corpora import open_corpora
from lm.runs.directory import open_run
from lm.training.optimizer import Optimizer
from lm.training.pretraining import train
from lm.training.reporter import NullReporter
from lm.training.validation import validate_readouts

BASE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_heads": 4,
    "context_length": 128,
    "batch_tokens": 2048,
    "objective": "hybrid",
    "steps": 300,
}
WIDTHS = {64: 2, 128: 4, 256: 8}  # the number of heads of size 32
AVERAGES = (0.9, 0.97, 0.99)


def experiments() -> dict[str, dict[str, Any]]:
    """The settings that each run changes, by the run's name."""
    runs: dict[str, dict[str, Any]] = {f"base seed {seed}": {"seed": seed} for seed in range(3)}
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        for rate in (0.1, 0.2, 0.3, 0.4) if 0 < share < 1 else (0.2, 0.4):
            runs[f"masked_fraction {share}, mask_rate {rate}"] = {"masked_fraction": share, "mask_rate": rate}
    # The masked readout learns to use both sides only after some time, so its value shows in longer runs.
    for share, rate in (
        (0.5, 0.2),
        (0.5, 0.4),
        (0.5, 0.3),
        (0.25, 0.4),
        (0.25, 0.2),
        (0.0, 0.2),
        (0.75, 0.4),
        (1.0, 0.4),
    ):
        runs[f"four times as long, masked_fraction {share}, mask_rate {rate}"] = {
            "masked_fraction": share,
            "mask_rate": rate,
            "steps": 4 * BASE["steps"],
        }
    runs["every hidden token is [MASK]"] = {"mask_token_share": 1.0, "random_token_share": 0.0}
    for width, heads in WIDTHS.items():
        shape = {"hidden_size": width, "num_heads": heads}
        for rate in (0.01, 0.02, 0.04):
            runs[f"width {width}, muon {rate}"] = {**shape, "muon_learning_rate": rate}
        for rate in (0.005, 0.01, 0.02):
            runs[f"width {width}, adamw {rate}"] = {**shape, "learning_rate": rate}
    for tokens in (1024, 4096, 8192):
        steps = BASE["steps"] * BASE["batch_tokens"] // tokens
        for scale in (0.5, 1.0, 2.0):
            runs[f"batch {tokens}, both rates x {scale}"] = {
                "batch_tokens": tokens,
                "steps": steps,
                "learning_rate": 0.01 * scale,
                "muon_learning_rate": 0.02 * scale,
            }
    for share in (0.3, 1.0):
        runs[f"decay_fraction {share}"] = {"decay_fraction": share, "warmup_fraction": min(0.02, 1 - share)}
    for decay in (0.0, 0.3):
        runs[f"weight_decay {decay}"] = {"weight_decay": decay}
    for momentum in (0.85, 0.9):
        runs[f"momentum {momentum}"] = {"momentum": momentum}
    runs["qk_norm"] = {"qk_norm": True}
    for dropout in (0.0, 0.1, 0.2):
        for decay in (0.1, 0.5):
            runs[f"repeated, dropout {dropout}, decay {decay}"] = {"dropout": dropout, "weight_decay": decay}
    for dropout in (0.0, 0.1, 0.2):
        runs[f"repeated, four times as long, dropout {dropout}"] = {"dropout": dropout, "steps": 4 * BASE["steps"]}
    runs["averaged, decaying rate"] = {}
    runs["averaged, level rate"] = {"decay_fraction": 0.0}
    return runs


@contextmanager
def averaging(decays: tuple[float, ...]) -> Iterator[dict[float, dict[str, Tensor]]]:
    """Collect exponential moving averages of the weights that are trained inside the context."""
    kept: dict[float, dict[str, Tensor]] = {}
    step = Optimizer.step

    @torch.no_grad()
    def observed(self: Optimizer, factor: float, decay: float = 1.0) -> None:
        step(self, factor, decay)
        for decay in decays:
            average = kept.setdefault(decay, {name: p.detach().clone() for name, p in self.parameters.items()})
            for name, parameter in self.parameters.items():
                average[name].lerp_(parameter.detach(), 1 - decay)

    with patch.object(Optimizer, "step", observed):
        yield kept


def losses(model: torch.nn.Module, data: Path, config: Config) -> dict[str, float]:
    corpora = open_corpora((str(data),))
    found = validate_readouts(model, corpora, config, rows=0)
    return {readout: loss["nats_per_token"] for readout, loss in found.items()}


def measure(name: str, settings: dict[str, Any], data: Path, folder: Path, threads: int) -> dict[str, Any]:
    """Train one run and measure it."""
    config = Config().replace(
        **settings, data=(str(data),), threads=threads, validate_every=10**6, checkpoint_every=10**6
    )
    path = folder / "".join(c if c.isalnum() or c in ".-" else "_" for c in name)
    start = time.process_time()
    with averaging(AVERAGES if name.startswith("averaged") else ()) as averages:
        train(config, path, NullReporter())
    seconds = time.process_time() - start
    run = open_run(path)
    model = run.load_model(torch.device("cpu"))
    result: dict[str, Any] = {"cpu_seconds": seconds, "losses": losses(model, data, config)}
    for decay, weights in averages.items():
        model.load_state_dict(weights)
        result[f"averaged {decay}"] = losses(model, data, config)
    last = [line for line in run.metrics() if "validation" in line][-1]
    return {**result, "epochs": last.get("epoch")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--little", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--only", action="append", default=[], help="only runs whose name starts with this; may be repeated"
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = arguments.out / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    chosen = {
        n: {**BASE, **c} for n, c in experiments().items() if not arguments.only or n.startswith(tuple(arguments.only))
    }
    for name, settings in chosen.items():
        special = name.startswith(("repeated", "averaged"))
        data = arguments.little if name.startswith("repeated") else arguments.data
        if name in results or data is None:
            continue
        found = {**Config().replace(**settings).flat(), "data": str(data)}
        same = [r for r in results.values() if r["settings"] == found and not special]
        results[name] = same[0] if same else measure(name, settings, data, arguments.out, arguments.threads)
        results[name]["settings"] = found
        kept.write_text(json.dumps(results, indent=1))
        print(name, {key: value for key, value in results[name].items() if key != "settings"}, flush=True)
    seeds = [results[f"base seed {seed}"]["losses"] for seed in range(3) if f"base seed {seed}" in results]
    if len(seeds) > 1:
        spread = {readout: statistics.stdev(found[readout] for found in seeds) for readout in seeds[0]}
        print("standard deviation over the seeds of the base:", spread)


if __name__ == "__main__":
    main()
