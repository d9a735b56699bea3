"""What a GPU must decide, in order of value: ``python -m benchmarks.gpu --agenda``.

A card may be at hand for half an hour only, and a kernel that has never run may hang. So each part is a process of its
own with its own time limit, and the results are written after each part, with the device and the versions. The same
command resumes: parts that are done are not run again, and those that failed come after those not tried yet.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
OUTPUT_KEPT = 4000  # characters of a part's output that are kept with its result
LEAST_SECONDS = 10  # a part is not started if fewer are left


@dataclass(frozen=True)
class Part:
    """One question to the card.

    ``command`` is run by this Python, in the root of the repository. Where it has ``{out}``, it gets the path of a file
    for its result as JSON, which may be written again and again while the part runs: what is there counts, even if the
    part is stopped. A part without ``{out}`` is judged by its exit status.
    """

    name: str
    seconds: int  # the time limit
    decides: str
    command: tuple[str, ...]


def of_benchmark(name: str, seconds: int, decides: str, *options: str) -> Part:
    """A part of ``python -m benchmarks.gpu``."""
    return Part(name, seconds, decides, ("-m", "benchmarks.gpu", "--only", name, "--out", "{out}", *options))


CANDIDATES = ("V1", "V2", "V3", "V4", "V5", "B1", "B2")


def of_candidate(what: str, seconds: int, decides: str, *names: str) -> Part:
    """A part for the candidates whose names begin so."""
    options = [word for name in names for word in ("--candidate", name)]
    command = ("-m", "benchmarks.gpu", "--only", f"candidate_{what}", "--out", "{out}", *options)
    return Part(f"{what} of {' '.join(names)}", seconds, decides, command)


# The order is the order of value: what is first is known even if the card is gone after five minutes.
PARTS: tuple[Part, ...] = (
    of_benchmark("errors", 120, "whether the library's attention is right on this card and gives the same bits twice"),
    *(of_candidate("errors", 60, f"whether {name} is right", name) for name in CANDIDATES),
    of_candidate("forward", 180, "which forward pass is the fastest, for long and for packed rows", *CANDIDATES[:4]),
    of_candidate("forward", 120, "whether a program that divides its own work is faster still", CANDIDATES[4]),
    of_candidate("backward", 180, "which backward pass is the fastest", *CANDIDATES[5:]),
    Part("triton tests", 300, "whether all kernels are right here", ("-m", "pytest", "-x", "tests/triton")),
    of_benchmark("attention", 300, "TFLOP/s of attention compared with cuDNN, flash and flex", "--quick"),
    of_benchmark("training", 300, "tokens/s of a step at the shape of GPT-2 small"),
    Part("gpu tests", 300, "whether the whole path works on this card", ("-m", "pytest", "tests/lm/test_gpu.py")),
    of_benchmark(
        "decoding", 300, "tokens/s of one text (goal 3,000) and of 64 (goal 40,000), with and without a graph"
    ),
    of_benchmark("decoding_products", 120, "whether the products of few rows are faster than PyTorch's"),
    of_benchmark("linear_cross_entropy", 120, "milliseconds and memory of the head and its loss"),
    of_benchmark("rotary", 60, "milliseconds of QK-norm and rotary positions"),
    *(
        Part(check, 300, f"whether kernels {finds}", ("-m", "benchmarks.gpu.sanitizer", check, "{out}"))
        for check, finds in (("memcheck", "use memory that is not theirs"), ("racecheck", "race for shared memory"))
    ),
)


def learning_parts(texts: Path | None, images: Path | None, pairs: Path | None) -> tuple[Part, ...]:
    """Training runs on a folder of texts, with minimal pairs or without, and on a folder of images; after all else."""
    parts = []
    command = ("-m", "benchmarks.gpu.learning")
    if texts:
        judged = ("--pairs", str(pairs.resolve())) if pairs else ()
        first, *others = (
            ("--batch-tokens", str(tokens), "--weight-decay", str(decay))
            for tokens, decay in ((16384, 0.1), (65536, 0.1), (16384, 0.3), (16384, 0.8), (16384, 1.6))
        )
        for options in (first, (*first, "--residual-precision", "bfloat16"), *others):
            words = (*command, "text", str(texts.resolve()), "--out", "{out}", *options, *judged)
            parts.append(
                Part(f"text {' '.join(options)}", 240, f"what ten passes with {' '.join(options)} give", words)
            )
    if images:
        for method in ("simclr", "dino"):
            decides = f"what {method} learns in four minutes, and images per second"
            words = (*command, "images", str(images.resolve()), "--out", "{out}", "--method", method)
            parts.append(Part(f"images {method}", 420, decides, words))
    return tuple(parts)


@dataclass(frozen=True)
class Outcome:
    """What became of a part: "done", "failed" (with its exit status) or "timed out"."""

    status: str
    seconds: float
    exit_status: int | None
    result: Any
    output: str


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a part with all its children, also one that hangs in a kernel."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_part(part: Part, seconds: float) -> Outcome:
    """Run one part for at most so many seconds."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder, "result.json"), Path(folder, "output")
        command = [sys.executable, *(word.replace("{out}", str(result)) for word in part.command)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
            try:
                exit_status: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                exit_status = None
            finally:
                stop(process)
        text = log.read_text(encoding="utf-8", errors="replace")[-OUTPUT_KEPT:]
        try:
            found = json.loads(result.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # it wrote none, or was stopped while it wrote
            found = None
    status = "timed out" if exit_status is None else "failed" if exit_status else "done"
    return Outcome(status, round(time.monotonic() - started, 1), exit_status, found, text)


def describe_machine() -> dict[str, Any]:
    """The card and the versions, asked in another process, so that this one holds no memory of the card."""
    code = (
        "import json, torch\nfrom benchmarks.gpu.timing import environment\n"
        "print(json.dumps(environment(torch.device('cuda'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the agenda needs a CUDA GPU: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def in_order(parts: Sequence[Part], outcomes: dict[str, Any]) -> list[Part]:
    """The parts to run: first those without an outcome, then those that failed or ran out of time."""
    todo = [part for part in parts if outcomes.get(part.name, {}).get("status") != "done"]
    return sorted(todo, key=lambda part: part.name in outcomes)


def run(parts: Sequence[Part], out: Path, machine: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Run the parts that are not done yet for at most ``seconds`` in all; the content of ``out``, which is written
    after each.

    Raises:
        UserError: the results in ``out`` are of another card or other versions.
    """
    found: dict[str, Any] = {"machine": machine, "parts": {}}
    if out.exists():
        found = json.loads(out.read_text(encoding="utf-8"))
        if found["machine"] != machine:
            raise UserError(f"{out} has the results of another machine: name another file with --out")
    end = time.monotonic() + seconds
    for part in in_order(parts, found["parts"]):
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            print(f"{part.name}: no time left", flush=True)
            continue
        print(f"{part.name}: {part.decides}", flush=True)
        outcome = run_part(part, min(part.seconds, left))
        found["parts"][part.name] = {"decides": part.decides, **vars(outcome)}
        write_atomically(out, (json.dumps(found, indent=1) + "\n").encode())
        print(f"{part.name}: {outcome.status} after {outcome.seconds} s", flush=True)
    return found


def summary(parts: Sequence[Part], found: dict[str, Any]) -> str:
    """A line for each part."""
    status = {name: outcome["status"] for name, outcome in found["parts"].items()}
    return "\n".join(f"{status.get(part.name, 'not run'):9} {part.name}: {part.decides}" for part in parts)
