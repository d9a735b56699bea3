"""Train the same shape on the same tokens for the same CPU seconds, by Kindling and by models of transformers.

    python -m benchmarks.vs_peers DATA --peer llama --rate 0.003 --seed 0 --out results [--pairs BLIMP]
    python -m benchmarks.vs_peers --table results

DATA is a folder of shards. All have the layers, heads, widths, context and tokens a step of ``--recipe`` and one
thread; a step is timed first, and the number of steps, of which the schedules are functions, follows from
``--cpu-seconds``. A command trains one model and writes one JSON file.

- kindling: the recipe, with ``--objective`` if given.
- llama: ``LlamaForCausalLM`` as run_clm trains it: blocks of adjacent tokens, in another order each epoch, AdamW
  (0.9, 0.95), decay 0.1, linear fall after 5 % of warmup. ``--rate`` is its learning rate: try three.
- eurobert, modernbert: ``EuroBertForMaskedLM`` and ``ModernBertForMaskedLM`` on the same blocks as run_mlm trains them:
  30 % of the tokens are predicted, of which 80 % are masked and 10 % random.

Bits per byte are over the whole validation split: causal, and with one token in seven masked at a time. Llama's and
EuroBERT's weights become a run's and are evaluated as Kindling's are. ModernBERT is measured here, on windows in which
documents see each other, and has no pairs. Numbers are comparable within a column: the masked task sees both sides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.written_run import written_run
from lm.config.recipes import find_recipe, load_config
from lm.config.settings import Config
from lm.data.corpora import Corpora, open_corpora
from lm.evaluation.minimal_pairs import evaluate_model, read_pairs
from lm.evaluation.validation_loss import evaluate
from lm.export.huggingface import export_huggingface
from lm.export.stock_architectures import weight_names
from lm.inference.language_model import LanguageModel
from lm.model.transformer import Transformer
from lm.runs.directory import Run, open_run
from lm.training.pretraining import train
from lm.training.reporter import NullReporter

WARMUP, DECAY, BETAS, CLIP = 0.05, 0.1, (0.9, 0.95), 1.0
MASK_RATE, MASKED, RANDOM = 0.3, 0.8, 0.1  # of the tokens; of those that are predicted
UNTIMED, TIMED = 3, 8  # steps
PEERS = {"llama": "next_token", "eurobert": "masked_token", "modernbert": "masked_token"}


@dataclass(frozen=True)
class Result:
    """What one training run reached; ``bits_per_byte`` by readout, ``pairs`` the share of them by readout."""

    peer: str
    objective: str
    seed: int
    rate: float
    parameters: int
    steps: int
    tokens: int
    cpu_seconds: float
    bits_per_byte: dict[str, float]
    pairs: dict[str, float]
    versions: dict[str, str]


class Clock(NullReporter):
    """CPU seconds of this process at the end of each step, from ``begin`` on."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def begin(self, done: int, total: int) -> None:
        self.times = [time.process_time()]

    def step(self, step: int) -> None:
        self.times.append(time.process_time())


def steps_within(seconds: float, train_for: Callable[[int], Sequence[float]]) -> int:
    """How many steps take that long, by the median of a few; ``train_for`` returns the time after each step."""
    times = train_for(UNTIMED + TIMED)[-TIMED - 1 :]
    return max(1, round(seconds / statistics.median(np.diff(times))))


def blocks(tokens: NDArray[np.int64], config: Config, seed: int) -> Iterator[Tensor]:
    """Batches (rows, context) of adjacent blocks, shuffled in each epoch; the incomplete last block is left out."""
    context, rows = config.data.context_length, config.data.batch_rows
    whole = torch.from_numpy(tokens[: len(tokens) // context * context]).view(-1, context)
    draw, waiting = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    while True:
        while len(waiting) < rows:
            waiting = torch.cat([waiting, torch.randperm(len(whole), generator=draw)])
        yield whole[waiting[:rows]]
        waiting = waiting[rows:]


def masked(tokens: Tensor, mask: int, vocabulary: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and labels (-100: not predicted), as transformers' collator for masked language modeling makes them."""
    chosen = torch.rand(tokens.shape, generator=draw) < MASK_RATE
    fate = torch.rand(tokens.shape, generator=draw)
    inputs = torch.where(chosen & (fate < MASKED), mask, tokens)
    drawn = torch.randint(vocabulary, tokens.shape, generator=draw)
    inputs = torch.where(chosen & (fate >= MASKED) & (fate < MASKED + RANDOM), drawn, inputs)
    return inputs, torch.where(chosen, tokens, -100)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The rate of ``step``, from 0: linear warmup, linear fall to 0."""
    warmup = round(WARMUP * steps)
    return peak * ((step + 1) / (warmup + 1) if step < warmup else (steps - step) / (steps - warmup))


def shaped(peer: str, corpora: Corpora, config: Config) -> Config:
    """The settings of the peer's run: its objective and its vocabulary."""
    return config.replace(objective=PEERS[peer], vocab_size=corpora.processor.vocab_size)


def with_weights(folder: Path, peer: str, corpora: Corpora, config: Config, weights: Mapping[str, Tensor]) -> Run:
    """A run with the weights of a stock class in its shape."""
    config = shaped(peer, corpora, config)
    own = {ours: weights[theirs].contiguous() for ours, theirs in weight_names(config.model).items()}
    return written_run(folder, corpora.processor, config, own)


def template(peer: str, corpora: Corpora, config: Config, folder: Path) -> Any:
    """The peer's model with random weights, in the shape of ``config``."""
    import transformers

    config = shaped(peer, corpora, config)
    weights = Transformer(config.model).initialize(0).state_dict()
    run = written_run(folder / "random", corpora.processor, config, weights)
    if peer == "modernbert":
        shape = config.model
        none: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
        settings = transformers.ModernBertConfig(
            vocab_size=run.config.model.vocab_size, hidden_size=shape.hidden_size,
            intermediate_size=shape.feed_forward_width, num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads, max_position_embeddings=config.data.context_length, pad_token_id=0,
            **none,
        )  # fmt: skip
        return transformers.ModernBertForMaskedLM(settings)
    export_huggingface(run, folder / "peer", run.newest(), PEERS[peer])
    kind = transformers.AutoModelForCausalLM if peer == "llama" else transformers.AutoModelForMaskedLM
    return kind.from_config(transformers.AutoConfig.from_pretrained(folder / "peer"))


def train_peer(model: Any, peer: str, corpora: Corpora, config: Config, rate: float, seed: int, steps: int) -> Clock:
    """Train in place; the clock has the time after each step."""
    stream, tokenizer = corpora.split("train"), corpora.processor
    batches = blocks(stream.read(0, stream.tokens).astype(np.int64), config, seed)
    draw, clock = torch.Generator().manual_seed(seed), Clock()
    optimizer = torch.optim.AdamW(model.parameters(), rate, BETAS, weight_decay=DECAY, fused=True)
    model.train()
    clock.begin(0, steps)
    for step in range(steps):
        inputs = labels = next(batches)
        if PEERS[peer] == "masked_token":
            assert tokenizer.mask_id is not None
            inputs, labels = masked(inputs, tokenizer.mask_id, tokenizer.vocab_size, draw)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, rate)
        model(input_ids=inputs, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.step(step + 1)
    return clock


@torch.no_grad()
def masked_bits(model: Any, corpora: Corpora, config: Config) -> float:
    """Bits per byte of the whole validation split, one token in seven hidden at a time until each has been."""
    split, mask = corpora.split("validation"), corpora.processor.mask_id
    tokens = torch.from_numpy(split.read(0, split.tokens).astype(np.int64))
    folds, context, nats = config.objective.validation_folds, config.data.context_length, 0.0
    model.eval()
    for window in tokens.split(context):
        hidden = (torch.arange(len(window)) % folds) == torch.arange(folds)[:, None]
        logits = model(input_ids=torch.where(hidden, mask, window)).logits
        nats += float(F.cross_entropy(logits[hidden].double(), window.expand(folds, -1)[hidden], reduction="sum"))
    return nats / np.log(2) / split.counted_bytes


def measured(run: Run, pairs: Path | None, data: str) -> tuple[dict[str, float], dict[str, float]]:
    """Bits per byte and the share of pairs, by readout."""
    bits = {name: loss["bits_per_byte"] for name, loss in evaluate(run, data)["validation"].items()}
    if pairs is None:
        return bits, {}
    model = LanguageModel(run.load_model(torch.device("cpu")), run.tokenizer, run.config)
    found = evaluate_model(model, read_pairs(pairs))
    return bits, {name: found[name]["all"].mean for name in bits}


def compete(arguments: argparse.Namespace, folder: Path) -> Result:
    import transformers

    peer, seed, given = arguments.peer, arguments.seed, {"data": [str(arguments.data)], "device": "cpu"}
    given |= {"objective": arguments.objective} if arguments.objective else {}
    config = load_config(find_recipe(arguments.recipe), given | {"seed": seed, "threads": 1})
    corpora = open_corpora((str(arguments.data),))
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    pairs: dict[str, float] = {}
    if peer == "kindling":

        def train_for(steps: int, path: Path = folder / "timed") -> Clock:
            clock, rare = Clock(), {"validate_every": steps, "checkpoint_every": steps, "log_every": 1}
            train(config.replace(steps=steps, **rare), path, clock)
            return clock

        steps = steps_within(arguments.cpu_seconds, lambda steps: train_for(steps).times)
        times = train_for(steps, folder / "run").times
        run = open_run(folder / "run")
        parameters = sum(p.numel() for p in run.load_model(torch.device("cpu")).parameters())
        bits, pairs = measured(run, arguments.pairs, "")
    else:
        model = template(peer, corpora, config, folder)
        begin = {name: weight.clone() for name, weight in model.state_dict().items()}
        learn = partial(train_peer, model, peer, corpora, config, arguments.rate, seed)
        steps = steps_within(arguments.cpu_seconds, lambda steps: learn(steps).times)
        model.load_state_dict(begin)
        times = learn(steps).times
        parameters = sum(p.numel() for p in model.parameters())
        if peer == "modernbert":
            bits = {"masked_token": masked_bits(model, corpora, config)}
        else:
            run = with_weights(folder / "run", peer, corpora, config, model.state_dict())
            bits, pairs = measured(run, arguments.pairs, str(arguments.data))
    return Result(
        peer,
        config.objective.objective if peer == "kindling" else PEERS[peer],
        seed,
        0.0 if peer == "kindling" else arguments.rate,
        parameters,
        steps,
        steps * config.data.batch_tokens,
        times[-1] - times[0],
        bits,
        pairs,
        {"torch": torch.__version__, "transformers": transformers.__version__},
    )


def table(folder: Path) -> str:
    """A line for each peer, objective and rate: the mean and the sample standard deviation of the seeds."""
    results = [Result(**json.loads(file.read_text(encoding="utf-8"))) for file in sorted(folder.glob("*.json"))]
    groups: dict[tuple[str, str, float], list[Result]] = {}
    for result in results:
        groups.setdefault((result.peer, result.objective, result.rate), []).append(result)
    lines = []
    for (peer, objective, rate), own in groups.items():
        spent = statistics.mean(result.cpu_seconds for result in own)
        tokens = statistics.mean(result.tokens for result in own)
        cells = [f"{peer} {objective}" + (f" {rate:g}" if rate else ""), f"{len(own)} seeds", f"{spent:,.0f} CPU s"]
        cells.append(f"{tokens / spent:,.0f} tokens/CPU s")
        for title, of in (("bits per byte", "bits_per_byte"), ("pairs", "pairs")):
            for readout in getattr(own[0], of):
                values = [getattr(result, of)[readout] for result in own]
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{readout} {title} {statistics.mean(values):.3f}{spread}")
        lines.append(", ".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--peer", choices=("kindling", *PEERS), default="kindling")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--objective", default="", help="kindling: another than the recipe's")
    parser.add_argument("--rate", type=float, default=0.003, help="the others' learning rate")
    parser.add_argument("--cpu-seconds", type=float, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=Path, help="minimal pairs, such as BLiMP's folder")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="print the results in a folder, and train nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.table))
        return
    if arguments.data is None:
        parser.error("name a folder of shards, or --table FOLDER")
    with tempfile.TemporaryDirectory() as name:
        result = compete(arguments, Path(name))
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = "-".join([result.peer, result.objective.replace(":", "_"), f"{result.rate:g}", str(result.seed)])
    (arguments.out / f"{name}.json").write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
