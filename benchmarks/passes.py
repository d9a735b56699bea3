"""Masked diffusion compared with next-token prediction as passes over a small text grow (Prabhudesai et al. 2025).

    python -m benchmarks.passes BOOK --out FOLDER [--passes 1,4,16,64] [--seeds 1] [--set hidden_size=128 ...]

BOOK is a text file, whose paragraphs are made into documents, a tenth of them for validation; or a folder of shards.
For each number of passes a run of its own learns each objective, with the same model, the same tokens and a whole
schedule: equal compute at each number of passes. FOLDER gets results.json, passes.png and passes.svg, with the bits per
byte of the whole validation split: of next_token the likelihood, of diffusion its bound. "Best" is the lowest of the
validations during the run, as of a run that is stopped in time. The command resumes where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import data_prep
from data_prep.files import write_atomically
from lm.config.recipes import load_config
from lm.config.settings import Config
from lm.data.corpora import open_corpora
from lm.model.device import choose_device
from lm.runs.directory import open_run
from lm.training.pretraining import train
from lm.training.reporter import NullReporter
from lm.training.validation import validate_readouts

# Each objective, and what its run is judged by.
MEASURES = {"next_token": "next_token", "diffusion": "diffusion_bound"}
SHAPE = {"num_layers": 4, "hidden_size": 128, "num_heads": 4, "context_length": 128, "batch_tokens": 2048}
VALIDATIONS = 8  # in a run
DOCUMENT = 4_000  # characters


def prepared(book: Path, folder: Path, vocab_size: int) -> Path:
    """The folder of shards of a text file, built in ``folder`` unless it is there; or ``book``, if it is a folder."""
    if book.is_dir():
        return book
    if not (folder / "data").is_dir():
        documents = [""]
        for paragraph in book.read_text(encoding="utf-8").split("\n\n"):
            if len(documents[-1]) > DOCUMENT:
                documents.append("")
            documents[-1] += paragraph + "\n\n"
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
        write_atomically(folder / "book.jsonl", "".join(lines))
        data_prep.build(
            [str(folder / "book.jsonl")], out=folder / "data", vocab_size=vocab_size, validation_fraction=0.1
        )
    return folder / "data"


def config_of(objective: str, passes: int, seed: int, data: Path, changes: dict[str, str]) -> Config:
    """The settings of one run, as many steps as are ``passes`` over the training text."""
    fixed = {"objective": objective, "seed": seed, "data": (str(data),), "validation_rows": 0}
    config = load_config(None, SHAPE | changes | fixed)
    corpora = open_corpora((str(data),))
    tokens = sum(text.stop - text.start for text in corpora.training_texts())
    steps = max(1, round(passes * tokens / config.data.batch_tokens))
    every = max(1, steps // VALIDATIONS)
    return config.replace(steps=steps, validate_every=every, checkpoint_every=max(every, 50))


def measured(config: Config, folder: Path) -> dict[str, Any]:
    """Train one run, or the rest of it, and measure its last weights on the whole validation split."""
    train(config, folder, NullReporter())
    run, name = open_run(folder), MEASURES[config.objective.objective]
    corpora = open_corpora(config.data.data)
    model = run.load_model(choose_device(config.training.device))
    last = validate_readouts(model, corpora, run.config, rows=0, every_token=True)[name]
    during = [line["validation"][name]["bits_per_byte"] for line in run.metrics() if line.get("validation")]
    last_bits = last["bits_per_byte"]
    return {"steps": config.training.steps, "last": last_bits, "best": min([*during, last_bits])}


def table(results: dict[str, dict[str, Any]], which: str) -> dict[str, dict[int, list[float]]]:
    """Of each objective the bits per byte of all seeds, by passes."""
    found: dict[str, dict[int, list[float]]] = {name: {} for name in MEASURES}
    for each in results.values():
        found[each["objective"]].setdefault(each["passes"], []).append(each[which])
    return {name: dict(sorted(by_passes.items())) for name, by_passes in found.items()}


def crossing(results: dict[str, dict[str, Any]], which: str) -> str:
    """From how many passes on diffusion is at or below next_token, in words."""
    means = {
        name: {passes: statistics.mean(values) for passes, values in by_passes.items()}
        for name, by_passes in table(results, which).items()
    }
    shared = sorted(means["next_token"].keys() & means["diffusion"].keys(), reverse=True)
    below = []
    for passes in shared:
        if means["diffusion"][passes] > means["next_token"][passes]:
            break
        below.append(passes)
    if not below:
        return f"{which}: diffusion is above next_token at {shared[0] if shared else 'no'} passes"
    return f"{which}: diffusion is at or below next_token from {below[-1]} passes on"


def draw(results: dict[str, dict[str, Any]], folder: Path) -> None:
    """passes.png and passes.svg: bits per byte by passes, a line for the last weights and one for the best."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for which, style in (("last", "-"), ("best", ":")):
        for color, (name, by_passes) in zip(("#b3471d", "#2b5d8c"), table(results, which).items(), strict=True):
            means = [statistics.mean(values) for values in by_passes.values()]
            errors = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in by_passes.values()]
            label = f"{name}{', a bound' if name == 'diffusion' else ''}, {which}"
            axes.errorbar([*by_passes], means, errors, color=color, linestyle=style, marker="o", capsize=3, label=label)
    axes.set_xscale("log", base=2)
    ticks = sorted({each["passes"] for each in results.values()})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlabel="passes over the text", ylabel="bits per byte, whole validation split")
    axes.legend()
    for kind in ("png", "svg"):
        figure.savefig(folder / f"passes.{kind}", dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("book", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--passes", default="1,4,16,64")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--vocab-size", type=int, default=2048, help="of the tokenizer of a text file")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting of all runs")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    data, kept = prepared(given.book, given.out, given.vocab_size), given.out / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    changes = dict(each.split("=", 1) for each in given.set)
    for passes in map(int, given.passes.split(",")):
        for seed in range(given.seeds):
            for objective in MEASURES:
                name = f"{objective}-{passes}-{seed}"
                config = config_of(objective, passes, seed, data, changes)
                if results.get(name, {}).get("settings") != changes:
                    found = measured(config, given.out / "runs" / name)
                    about = {"objective": objective, "passes": passes, "seed": seed, "settings": changes}
                    results[name] = about | found
                    write_atomically(kept, json.dumps(results, indent=1) + "\n")
                    draw(results, given.out)
                print(name, results[name], flush=True)
    for which in ("last", "best"):
        print(crossing(results, which))


if __name__ == "__main__":
    main()
