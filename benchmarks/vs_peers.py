"""Train the same shape on the same tokens for the same CPU seconds, by Kindling and by other systems.

    python -m benchmarks.vs_peers DATA --peer llama --out results [--pairs BLIMP]
    python -m benchmarks.vs_peers DATA --peer gpt-bert --checkout gpt-bert --out results
    python -m benchmarks.vs_peers DATA --peer nanochat --checkout nanochat --out results
    python -m benchmarks.vs_peers --table results

DATA is a folder of shards. All have the layers, heads, widths, context and tokens a step of ``--recipe``, the same
tokenizer and as many threads, and multiply bfloat16 where the CPU does. The number of steps, of which the schedules are
functions, follows from ``--cpu-seconds`` by the time of a few steps, or of the runs with other seeds if there are any.
A command tries the peer's learning rates with the first seed for ``--tune-seconds`` each, chooses by the mean bits per
byte of its readouts, and trains each seed. Each result is a JSON file, those of the rates in OUT/tuning; the same
command does what is missing. ``--quick`` shows that all of it runs.

- kindling: the recipe, with ``--objective`` if given.
- llama, eurobert, modernbert: classes of transformers as run_clm and run_mlm train them (benchmarks/peers/stock.py).
- gpt-bert, gpt-bert-mixed: its own code, with 15/16 and 1/2 of the rows masked (benchmarks/peers/gpt_bert.py).
- nanochat: its own code (benchmarks/peers/nanochat.py).

Kindling's evaluation measures all models: bits per byte of the whole validation split in windows of the context, with
documents apart, causal or with one token in seven masked at a time; minimal pairs with ties as one half and as right.
Compare numbers within a readout: the masked ones see both sides. With ``--tasks``, Kindling's fine-tuning teaches all
models the tasks of a file, by the same settings (benchmarks/peers/tasks.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers import gpt_bert, nanochat, stock
from benchmarks.peers.kindling import Kindling
from benchmarks.peers.peer import OtherPeer, Peer
from benchmarks.peers.reading import PeerModel
from benchmarks.peers.result import Asked, Result, done, of_other_seeds, table
from benchmarks.peers.tasks import task_scores
from data_prep.errors import UserError
from lm.config.recipes import find_recipe, load_config, read_toml
from lm.data.corpora import open_corpora
from lm.evaluation.minimal_pairs import Pairs, evaluate_pairs, read_pairs
from lm.inference.language_model import LanguageModel
from lm.inference.scoring import log_likelihoods
from lm.model.transformer import Transformer
from lm.training.validation import validate_readouts

PEERS: dict[str, type[Peer]] = {
    "kindling": Kindling,
    "llama": stock.Llama,
    "eurobert": stock.EuroBert,
    "modernbert": stock.ModernBert,
    "gpt-bert": gpt_bert.GptBert,
    "gpt-bert-mixed": gpt_bert.GptBertMixed,
    "nanochat": nanochat.Nanochat,
}
UNTIMED, TIMED = 3, 8  # steps
QUICK: dict[str, Any] = {
    "cpu_seconds": 3.0,
    "tune_seconds": 1.0,
    "seeds": 1,
    "most_pairs": 2,
    "validation_rows": 2,
    "shape": {"batch_tokens": 512},
}


def steps_within(
    seconds: float, train_for: Callable[[int], Sequence[float]], tokens_of_step: Callable[[int, int], int]
) -> int:
    """How many steps take that long, by the CPU seconds for each token of a few.

    ``train_for`` returns the time before the first step and after each; ``tokens_of_step`` as of ``Peer``.
    """
    steps, many = UNTIMED + TIMED, 1000
    times = train_for(steps)
    read = sum(tokens_of_step(step, steps) for step in range(UNTIMED, steps))
    per_step = sum(tokens_of_step(step, many) for step in range(many)) / many
    return max(1, round(seconds * read / (times[-1] - times[UNTIMED]) / per_step))


def shares(model: LanguageModel, paradigms: Sequence[Pairs]) -> dict[str, dict[str, float]]:
    """By readout: the mean over paradigms with ties as one half and as right, and the number of pairs."""
    found = {}
    for readout in model.readouts:
        scores = evaluate_pairs(paradigms, model.tokenizer, partial(log_likelihoods, model, readout=readout))
        every = scores.pop("all")
        ties = np.mean([each.ties / each.pairs for each in scores.values()])
        found[readout] = {"half": every.mean, "first": every.mean + float(ties) / 2, "pairs": every.pairs}
    return found


class Contest:
    """The runs of one peer; ``options`` are those of the command."""

    def __init__(self, options: argparse.Namespace) -> None:
        import transformers

        kind = PEERS[options.peer]
        given = {"data": [str(options.data)], "device": "cpu", "threads": options.threads, **options.shape}
        objective = options.objective or kind.objective
        config = load_config(find_recipe(options.recipe), given | ({"objective": objective} if objective else {}))
        corpora = open_corpora((str(options.data),))
        self.config = config.replace(vocab_size=corpora.processor.vocab_size)
        self.options, self.peer = options, kind(corpora, self.config, options.checkout)
        self.versions = {
            "torch": torch.__version__, "transformers": transformers.__version__,
            "instructions": torch.backends.cpu.get_cpu_capability(), **self.peer.versions,
        }  # fmt: skip
        self.pairs = {folder.name: read_pairs(folder) for folder in options.pairs}
        if most := options.most_pairs:
            self.pairs = {
                name: [replace(each, good=each.good[:most], bad=each.bad[:most]) for each in pairs]
                for name, pairs in self.pairs.items()
            }
        self.tasks = read_toml(options.tasks, "the tasks").get("tasks", {}) if options.tasks else {}
        torch.set_num_threads(options.threads)

    def run(self) -> list[Result]:
        """Do what is missing of all runs, and return their results."""
        options, rates = self.options, self.options.rates or self.peer.rates
        tuning = {}
        if len(rates) > 1:
            tuned = [self._result(rate, options.first_seed, options.tune_seconds, tuning={}) for rate in rates]
            tuning = {f"{result.asked.rate:g}": result.bits_per_byte for result in tuned}
        best = min(rates, key=lambda rate: np.mean([*tuning[f"{rate:g}"].values()])) if tuning else rates[0]
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        return [self._result(best, seed, options.cpu_seconds, tuning) for seed in seeds]

    def _result(self, rate: float, seed: int, seconds: float, tuning: dict[str, dict[str, float]]) -> Result:
        options, peer = self.options, self.peer
        of_rate = not tuning and len(options.rates or peer.rates) > 1
        folder = options.out / "tuning" if of_rate else options.out
        asked = Asked(
            options.peer, self.config.objective.objective, rate, seed, options.recipe, seconds, options.threads,
            peer.corpora.fingerprint, "bfloat16" if peer.bfloat16 else "float32", peer.settings,
        )  # fmt: skip
        measured = () if of_rate else (*self.pairs, *self.tasks)
        if found := done(folder, asked, measured):
            return found
        if paces := [each.steps / each.cpu_seconds for each in of_other_seeds(folder, asked)]:
            steps = max(1, round(seconds * statistics.mean(paces)))
        else:
            steps = steps_within(seconds, lambda steps: peer.train(rate, seed, steps)[1], peer.tokens_of_step)
        print(f"{asked.name}: {steps:,} steps in about {seconds:,.0f} CPU seconds", file=sys.stderr, flush=True)
        model, times = peer.train(rate, seed, steps)
        model.eval()
        readable = self._readable(model)
        bits = validate_readouts(readable, peer.corpora, self.config, rows=options.validation_rows, every_token=True)
        result = Result(
            asked, peer.parameters(model), steps, sum(peer.tokens_of_step(step, steps) for step in range(steps)),
            times[-1] - times[0], {name: loss["bits_per_byte"] for name, loss in bits.items()}, tuning=tuning,
            changes=list(peer.changes), versions=self.versions,
        )  # fmt: skip
        if not of_rate:
            tokenizer, config = peer.corpora.processor, self.config
            language_model = LanguageModel(readable, tokenizer, config)
            pairs = {name: shares(language_model, each) for name, each in self.pairs.items()}
            scores = task_scores(model, self._readable, tokenizer, config, options.tasks, seed) if options.tasks else {}
            result = replace(result, pairs=pairs, tasks=scores)
        result.save(folder)
        return result

    def _readable(self, model: Any) -> Transformer:
        """The peer's model for Kindling's evaluation."""
        if isinstance(self.peer, OtherPeer):
            return PeerModel(self.peer, model, self.config)
        assert isinstance(model, Transformer)
        return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--peer", choices=tuple(PEERS), default="kindling")
    parser.add_argument("--checkout", type=Path, help="the folder of the peer's code: gpt-bert, nanochat")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--objective", default="", help="kindling: another than the recipe's")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates to try; one: no trial")
    parser.add_argument("--cpu-seconds", type=float, default=1200)
    parser.add_argument("--tune-seconds", type=float, default=300, help="for each learning rate")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=Path, nargs="+", default=[], help="folders of minimal pairs, such as BLiMP's")
    parser.add_argument(
        "--tasks", type=Path, help="a file for `kindling tasks`: fine-tune each seed in full on its tasks"
    )
    parser.add_argument("--most-pairs", type=int, default=0, help="of each paradigm; 0: all")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--quick", action="store_true", help="seconds for everything: shows that it runs")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="print the results in a folder, and train nothing")
    parser.set_defaults(validation_rows=0, shape={})
    options = parser.parse_args()
    if options.table:
        print(table(options.table))
        return
    if options.data is None:
        parser.error("name a folder of shards, or --table FOLDER")
    if options.objective and options.peer != "kindling":
        parser.error(f"{options.peer} has its own objective: --objective is for kindling")
    if options.quick:
        vars(options).update(QUICK)
    try:
        for result in Contest(options).run():
            print(json.dumps(asdict(result)))
    except UserError as problem:
        sys.exit(str(problem))


if __name__ == "__main__":
    main()
