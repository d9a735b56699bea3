"""Training, decoding, serving and preparing data while other programs want the cores, compared with two peers.

    git clone https://github.com/karpathy/nanoGPT
    python -m benchmarks.busy_cores nanoGPT TEXT_FOLDER [--rounds 5] [--only "train 0.8M"] [--instructions avx512 avx2]

Each kind of work runs on a quiet machine, next to one and two processes that compute without a pause, and in a control
group that may use half a core and one and a half (needs Linux and root; without them these rows are left out). Every
candidate has a process of its own and its default number of threads; they work in turn, A B A B, medians of the rounds.

- train: steps of AdamW on random tokens as in ``benchmarks.cpu_training``, and GPT-2 of transformers of the same shape;
- decode: texts one after another, each a prompt of 128 tokens and 256 more by greedy decoding, with the model of
  ``benchmarks.generate`` (nanoGPT: random weights of the same shape, and 64 more for one prompt, because it computes
  the whole text again for each token);
- serve: eight clients at the same time ask ``kindling serve`` for 64 tokens each, by HTTP; transformers, without a
  server, generates the same eight texts as one batch;
- prepare: ``kindling prep build`` of a text into shards as one command, and the same with ``datasets`` and a tokenizer
  of transformers in two processes.

"avx2" holds all libraries to AVX2 by their environment variables. The last columns are Kindling's tokens per second in
times those of each peer, and its tokens per CPU second as a share of the quiet figure.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import cpu_training, generate
from benchmarks.data_prep import adopt_orphans, changed_text, measured
from benchmarks.side_by_side import Timing, apart_in_turn
from lm.export.huggingface import export_huggingface
from lm.model.device import choose_device
from lm.runs.directory import open_run

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
TEXT_MEGABYTES = 8
# A few seconds of steady work: turns of cpu_training in one of these, and texts.
TURNS = {"0.8M": 10, "10M": 4}
TEXTS = 6
CLIENTS, ANSWER = 8, 64  # of serve: requests at the same time, and the tokens of each
PEER = """
import sys
import datasets, numpy, transformers
text, tokenizer, out = sys.argv[1:]
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=tokenizer)
if __name__ == "__main__":
    rows = datasets.load_dataset("json", data_files=text + "/*.jsonl", split="train", cache_dir=out + "/cache")
    rows = rows.map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns=["text"], num_proc=2)
    numpy.concatenate([numpy.array(ids, numpy.uint16) for ids in rows["input_ids"]]).tofile(out + "/train.bin")
"""


@dataclass(frozen=True)
class Condition:
    name: str
    busy: int = 0  # processes that compute without a pause
    cores: float = 0  # the quota of a control group; 0: none


CONDITIONS = (
    Condition("quiet"),
    Condition("one busy process", busy=1),
    Condition("two busy processes", busy=2),
    Condition("half a core", cores=0.5),
    Condition("one and a half cores", cores=1.5),
)
Maker = Callable[[], Callable[[], object]]


@contextlib.contextmanager
def in_condition(condition: Condition) -> Iterator[Path | None]:
    """Start the busy processes, or make a control group and yield it. Raises OSError where that cannot be done."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(condition.busy)]
    group = quota_group(condition.cores) if condition.cores else None
    try:
        yield group
    finally:
        for process in busy:
            process.kill()
            process.wait()
        if group:
            with contextlib.suppress(OSError):  # a process is still ending; the next condition sets another quota
                group.rmdir()


def quota_group(cores: float) -> Path:
    first = Path("/sys/fs/cgroup/cpu")
    group = (first if first.is_dir() else first.parent) / "kindling-benchmark"
    group.mkdir(exist_ok=True)
    quota, period = str(int(cores * 100_000)), "100000"
    if first.is_dir():
        (group / "cpu.cfs_period_us").write_text(period)
        (group / "cpu.cfs_quota_us").write_text(quota)
    else:
        (group / "cpu.max").write_text(f"{quota} {period}")
    return group


def enter(group: Path | None) -> None:
    if group:
        (group / "cgroup.procs").write_text(str(os.getpid()))


def inside(group: Path | None, make: Maker) -> Callable[[], object]:
    """Make a candidate in this process, inside a control group. Kindling's threads follow from it."""
    enter(group)
    return make()


def kindling_train(shape: str) -> Callable[[], object]:
    choose_device("cpu")
    steps = cpu_training.kindling_steps(shape, torch.get_num_threads(), "adamw", "native")
    return cpu_training.several(steps, TURNS[shape])


def nanogpt_train(checkout: Path, shape: str) -> Callable[[], object]:
    steps = cpu_training.nanogpt_steps(checkout, shape, torch.get_num_threads())
    return cpu_training.several(steps, TURNS[shape])


def transformers_train(shape: str) -> Callable[[], object]:
    import transformers

    layers, heads, width, context, rows, steps = cpu_training.SHAPES[shape]
    settings = transformers.GPT2Config(
        vocab_size=cpu_training.VOCABULARY, n_positions=context, n_embd=width, n_layer=layers, n_head=heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(settings)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    tokens = torch.randint(0, cpu_training.VOCABULARY, (rows, context))

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return cpu_training.several(step, steps * TURNS[shape])


def prompt() -> list[int]:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(10, generate.SHAPE["vocab_size"], (generate.PROMPT,), generator=draw).tolist()


def kindling_decode(work: Path) -> Callable[[], object]:
    choose_device("cpu")
    write = generate.ours(open_run(work / "run"), 1)
    return cpu_training.several(lambda: write([prompt()]), TEXTS)


def transformers_decode(work: Path) -> Callable[[], object]:
    write = generate.of_transformers(work / "hf")
    return cpu_training.several(lambda: write([prompt()]), TEXTS)


def kindling_serve(work: Path) -> Callable[[], object]:
    from lm.cli.serve import text_service
    from lm.serve.app import make_app
    from lm.serve.guard import AccessPolicy
    from lm.serve.schema import Limits
    from lm.serve.server import listen, make_server

    run, listening = open_run(work / "run"), listen("127.0.0.1", 0)
    app = make_app(text_service(run, "newest", "cpu", Limits(concurrent=CLIENTS), False), AccessPolicy())
    threading.Thread(target=make_server(app).run, args=([listening],), daemon=True).start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/completions"
    body = {"prompt": "the cat sat on the mat " * 16, "max_tokens": ANSWER, "temperature": 0}

    def ask(_: int) -> None:
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == ANSWER

    clients = ThreadPoolExecutor(CLIENTS)
    return lambda: list(clients.map(ask, range(CLIENTS)))


def transformers_serve(work: Path) -> Callable[[], object]:
    write = generate.of_transformers(work / "hf", ANSWER)
    return lambda: write([prompt()] * CLIENTS)


def nanogpt_decode(checkout: Path) -> Callable[[], object]:
    module, shape = cpu_training.nanogpt_module(checkout), generate.SHAPE
    settings = module.GPTConfig(
        block_size=shape["context_length"], vocab_size=shape["vocab_size"], n_layer=shape["num_layers"],
        n_head=shape["num_heads"], n_embd=shape["hidden_size"], dropout=0.0, bias=False,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(settings).eval()
    return lambda: model.generate(torch.tensor([prompt()]), generate.WRITTEN // 4, top_k=1)


def prepare_data(work: Path, folder: Path) -> None:
    """Write the text, and train the tokenizer that both candidates use."""
    (work / "text").mkdir()
    with (work / "text" / "a.jsonl").open("w") as records:
        for piece in changed_text(folder, TEXT_MEGABYTES * 10**6):
            records.write(json.dumps({"text": piece}, ensure_ascii=False) + "\n")
    (work / "peer.py").write_text(PEER)
    command = [sys.executable, "-m", "data_prep", "build", str(work / "text"), "--out", str(work / "trained")]
    subprocess.run([*command, "--vocab-size", "8192"], check=True, capture_output=True)


def commands(work: Path) -> dict[str, list[str]]:
    text, tokenizer, out = (str(work / name) for name in ("text", "trained/tokenizer.json", "out"))
    build = [sys.executable, "-m", "data_prep", "build", text, "--out", out, "--tokenizer", tokenizer]
    return {"kindling": build, "transformers": [sys.executable, str(work / "peer.py"), text, tokenizer, out]}


def timed_commands(work: Path, group: Path | None, rounds: int) -> dict[str, Timing]:
    costs: dict[str, list[Timing]] = {name: [] for name in commands(work)}
    for _ in range(rounds):
        for name, command in commands(work).items():
            shutil.rmtree(work / "out", ignore_errors=True)
            if name != "kindling":
                (work / "out").mkdir()
            join = [f'echo $$ > "{group}/cgroup.procs"; exec "$@"'] if group else ['exec "$@"']
            cost = measured(["bash", "-c", *join, "bash", *command])
            costs[name].append(Timing(cost.seconds, cost.cpu_seconds))
    return {
        name: Timing(statistics.median(t.wall for t in found), statistics.median(t.cpu for t in found))
        for name, found in costs.items()
    }


def works(checkout: Path, work: Path) -> dict[str, tuple[dict[str, Maker], dict[str, int]]]:
    """Every kind of work in one process: the makers of its candidates, and the tokens of one call of each."""
    found: dict[str, tuple[dict[str, Maker], dict[str, int]]] = {}
    for shape, (_, _, _, context, rows, steps) in cpu_training.SHAPES.items():
        makers: dict[str, Maker] = {
            "kindling": partial(kindling_train, shape),
            "nanoGPT": partial(nanogpt_train, checkout, shape),
            "transformers": partial(transformers_train, shape),
        }
        found[f"train {shape}"] = makers, dict.fromkeys(makers, TURNS[shape] * steps * rows * context)
    makers = {
        "kindling": partial(kindling_decode, work),
        "nanoGPT": partial(nanogpt_decode, checkout),
        "transformers": partial(transformers_decode, work),
    }
    tokens = TEXTS * generate.WRITTEN
    found["decode"] = makers, {"kindling": tokens, "nanoGPT": tokens // TEXTS // 4, "transformers": tokens}
    makers = {"kindling": partial(kindling_serve, work), "transformers": partial(transformers_serve, work)}
    found["serve"] = makers, dict.fromkeys(makers, CLIENTS * ANSWER)
    return found


def show(name: str, rates: Mapping[str, tuple[float, float]], quiet: float) -> None:
    """One line: (tokens per second, per CPU second) of each candidate."""
    cells = [f"{candidate} {wall:9,.0f} {cpu:9,.0f}" for candidate, (wall, cpu) in rates.items()]
    ours, per_cpu = rates["kindling"]
    times = [f"{ours / wall:.2f} x {peer}" for peer, (wall, _) in rates.items() if peer != "kindling"]
    print(f"  {name:20}  {'  '.join(cells)}   {', '.join(times)}, {per_cpu / quiet:.2f} of quiet", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("folder", type=Path, help="a folder of .txt files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="work whose name contains this")
    names = [condition.name for condition in CONDITIONS]
    parser.add_argument("--conditions", nargs="+", choices=names, default=names)
    parser.add_argument("--instructions", nargs="+", choices=("avx512", "avx2"), default=["avx512", "avx2"])
    arguments = parser.parse_args()
    adopt_orphans()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        run = generate.random_run(work / "run")
        export_huggingface(run, work / "hf", run.newest(), "next_token")
        prepare_data(work, arguments.folder)
        if arguments.only in "prepare":
            size = dict.fromkeys(commands(work), TEXT_MEGABYTES * 10**6)
            print("prepare: bytes per second, per CPU second")
            compare(lambda group: timed_commands(work, group, arguments.rounds), size, arguments.conditions)
        for instructions in arguments.instructions:
            os.environ.update(AVX2 if instructions == "avx2" else {})
            for title, (makers, tokens) in works(arguments.nanogpt, work).items():
                if arguments.only in title:
                    print(f"{title}, {instructions}: tokens per second, per CPU second")
                    compare(partial(timed_makers, makers, arguments.rounds), tokens, arguments.conditions)


def timed_makers(makers: dict[str, Maker], rounds: int, group: Path | None) -> dict[str, Timing]:
    candidates = {name: partial(inside, group, make) for name, make in makers.items()}
    return apart_in_turn(candidates, rounds=rounds, warm_up=1)


def compare(
    measure: Callable[[Path | None], dict[str, Timing]], tokens: Mapping[str, int], conditions: Sequence[str]
) -> None:
    quiet = 0.0
    for condition in (each for each in CONDITIONS if each.name in conditions):
        try:
            with in_condition(condition) as group:
                timings = measure(group)
        except OSError as error:
            print(f"  {condition.name:20}  left out: {error.strerror} ({error.filename})")
            continue
        rates = {name: (tokens[name] / timing.wall, tokens[name] / timing.cpu) for name, timing in timings.items()}
        quiet = quiet or rates["kindling"][1]
        show(condition.name, rates, quiet)


if __name__ == "__main__":
    main()
