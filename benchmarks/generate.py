"""Text generation on the CPU, compared with ``transformers`` and llama.cpp: same weights, float32, one process.

    python -m benchmarks.generate [--rounds 5] [--threads 2] [--rows 1 16] [--compiled]

A model with random weights (256 wide, 8 layers, 8 heads, vocabulary of 8,192) is exported to both formats. In turn,
each library reads prompts of 128 tokens and generates 256 more by greedy decoding; times include the prompts. Kindling
runs ``generator.Generator``, with --compiled also with compiled steps; ``transformers`` its ``generate`` with defaults;
llama.cpp (``pip install llama-cpp-python``, built on the machine; skipped if it is not installed) all rows in one
batch, with a float32 cache. All use ``--threads`` threads. Also printed: tokens per CPU second of all threads, the
share of tokens equal to Kindling's (after a first difference, from rounding, all differ), and the bytes of the weights
times steps per second, as a share of the rate of copying memory (bytes read and written).
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers

from benchmarks.side_by_side import in_turn
from benchmarks.written_run import written_run
from data_prep.settings import TokenizerSettings
from data_prep.sources.builtin_corpus import builtin_documents
from data_prep.tokenizers.training import train_tokenizer
from lm.config.settings import Config
from lm.export.gguf import export_gguf
from lm.export.huggingface import export_huggingface, unwritable_ids
from lm.inference.generator import Generator
from lm.inference.language_model import LanguageModel
from lm.inference.sampling import Sampling
from lm.model.transformer import Transformer
from lm.runs.directory import Run

PROMPT, WRITTEN = 128, 256
SHAPE = {"num_layers": 8, "hidden_size": 256, "num_heads": 8, "vocab_size": 8192, "context_length": 512}

Writer = Callable[[list[list[int]]], list[list[int]]]  # prompts, including their first token → generated tokens


def random_run(folder: Path) -> Run:
    """A run with random weights, far from their initialization, that never ends a text by itself."""
    texts = (text for _, text in builtin_documents())
    tokenizer = train_tokenizer(texts, TokenizerSettings(vocab_size=SHAPE["vocab_size"], train_bytes=3_000_000))
    config = Config().replace(objective="next_token", **SHAPE)
    model = Transformer(config.model).initialize(1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.05)
        model.embedding.weight[tokenizer.end_of_text_id] = 0.0  # its score, 0, is below that of the most likely token
    return written_run(folder, tokenizer, config, model.state_dict())


def ours(run: Run, rows: int, *, compiled: bool = False) -> Writer:
    model = LanguageModel(run.load_model(torch.device("cpu")), run.tokenizer, run.config)
    generator = Generator(model, max_rows=rows, compiled=compiled)
    if compiled:
        print(generator.compiling)
    greedy = Sampling(temperature=0, max_new_tokens=WRITTEN)

    def write(prompts: list[list[int]]) -> list[list[int]]:
        texts: dict[int, list[int]] = {generator.add(prompt[1:], greedy): [] for prompt in prompts}
        while generator.busy:
            for event in generator.step():
                assert event.token is not None
                texts[event.handle].append(event.token)
        return list(texts.values())

    return write


def of_transformers(folder: Path, tokens: int = WRITTEN) -> Writer:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def write(prompts: list[list[int]]) -> list[list[int]]:
        inputs = torch.tensor(prompts)
        with torch.inference_mode():
            made = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
            )
        return [[int(token) for token in row[PROMPT:]] for row in made]

    return write


def of_llama_cpp(path: Path, rows: int, threads: int, unwritable: list[int]) -> Writer:
    import llama_cpp

    llama_cpp.llama_backend_init()
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = rows * SHAPE["context_length"]
    settings.n_batch = settings.n_ubatch = max(512, rows * PROMPT)
    settings.n_seq_max = rows
    settings.n_threads = settings.n_threads_batch = threads
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)

    def read(tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """Read (token, position, row, is_last) each; return the most likely next token after each last one."""
        batch.n_tokens = len(tokens)
        last_indices = []
        for i, (token, position, row, last) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, row
            batch.logits[i] = last
            if last:
                last_indices.append(i)
        assert llama_cpp.llama_decode(context, batch) == 0
        chosen = []
        for i in last_indices:
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (SHAPE["vocab_size"],))
            logits[unwritable] = -np.inf
            chosen.append(int(logits.argmax()))
        return chosen

    def write(prompts: list[list[int]]) -> list[list[int]]:
        assert silent is not None  # llama.cpp calls it while it runs
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        inputs = [
            (token, position, row, position == PROMPT - 1)
            for row, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        texts: list[list[int]] = [[] for _ in prompts]
        for position in range(PROMPT, PROMPT + WRITTEN):
            chosen = read(inputs)
            for text, token in zip(texts, chosen, strict=True):
                text.append(token)
            inputs = [(token, position, row, True) for row, token in enumerate(chosen)]
        return texts

    return write


def copy_rate() -> float:
    """Bytes read and written per second when 256 MB are copied; the best of seven runs."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--compiled", action="store_true", help="also run Kindling with compiled steps")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        run = random_run(Path(name) / "run")
        export_huggingface(run, Path(name) / "hf", run.newest(), "next_token")
        export_gguf(run, Path(name) / "model.gguf", run.newest(), "next_token")
        unwritable = unwritable_ids(run.tokenizer, SHAPE["vocab_size"])
        for rows in arguments.rows:
            writers = {"kindling": ours(run, rows), "transformers": of_transformers(Path(name) / "hf")}
            if arguments.compiled:
                writers["compiled"] = ours(run, rows, compiled=True)
            if importlib.util.find_spec("llama_cpp") is not None:
                writers["llama.cpp"] = of_llama_cpp(Path(name) / "model.gguf", rows, arguments.threads, unwritable)
            first = run.tokenizer.end_of_text_id
            prompts = [[first, *draw.integers(10, SHAPE["vocab_size"], PROMPT - 1).tolist()] for _ in range(rows)]
            compare(writers, prompts, run, arguments.rounds)


def compare(writers: dict[str, Writer], prompts: list[list[int]], run: Run, rounds: int) -> None:
    made = {name: write(prompts) for name, write in writers.items()}
    calls = {name: (lambda write=write: write(prompts)) for name, write in writers.items()}
    timings = in_turn(calls, rounds=rounds, warm_up=0)
    weights = 4 * sum(p.numel() for p in run.load_model(torch.device("cpu")).parameters())
    rate = copy_rate()
    print(f"{len(prompts)} rows, {torch.get_num_threads()} threads; memory is copied at {rate / 1e9:.1f} GB/s")
    tokens = WRITTEN * len(prompts)
    for name, timing in timings.items():
        same = sum(a == b for x, y in zip(made[name], made["kindling"], strict=True) for a, b in zip(x, y, strict=True))
        print(
            f"  {name:12}  {tokens / timing.wall:7.0f} tokens/s  {tokens / timing.cpu:7.0f} per CPU second  "
            f"kindling is {timing.wall / timings['kindling'].wall:.2f} times as fast "
            f"({timing.cpu / timings['kindling'].cpu:.2f} by CPU seconds)  "
            f"weights at {weights * WRITTEN / timing.wall / rate:.0%} of the copy rate  "
            f"{same / tokens:.1%} of Kindling's tokens"
        )
    print(flush=True)


if __name__ == "__main__":
    main()
