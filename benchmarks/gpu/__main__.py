"""Run all parts, or some, and write the results to a JSON file.

python -m benchmarks.gpu [--out FILE] [--quick] [--only PART] [--nanogpt CHECKOUT]
python -m benchmarks.gpu --agenda [--out FILE] [--only PART] [--minutes N] [--texts FOLDER] [--images FOLDER]
"""

from __future__ import annotations

import argparse
import datetime
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.gpu import agenda, attention, candidate_speeds, decoding, head_and_rotary, training
from benchmarks.gpu.timing import environment
from data_prep.errors import UserError

PARTS = {
    "errors": "attention's largest errors against float64, as multiples of PyTorch's in bfloat16",
    "attention": "TFLOP/s forward and backward",
    "linear_cross_entropy": "milliseconds and peak bytes of the head and its loss",
    "rotary": "milliseconds of QK-norm and rotary positions",
    "training": "a step at the shape of GPT-2 small",
    "candidate_errors": "whether the candidate attention kernels are right, and give the same bits twice",
    "candidate_forward": "TFLOP/s of the candidates next to the library's and PyTorch's, forward",
    "candidate_backward": "the same, backward",
    "decoding": "tokens per second of generation at that shape, with and without a CUDA graph",
    "decoding_products": "microseconds of the products of a step of few rows, next to PyTorch's",
}
RESULTS = Path(__file__).parent / "results"


def follow_agenda(parts: Sequence[agenda.Part], out: Path | None, minutes: float) -> None:
    """Run parts of the agenda, and print what became of each; exit status 1 if one is not done."""
    machine = agenda.describe_machine()
    name = "-".join(["agenda", str(machine["device"]).replace(" ", "-"), f"triton-{machine['triton']}"])
    out = out or RESULTS / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the part that runs, too
    found = agenda.run(parts, out, machine, 60 * minutes)
    print(agenda.summary(parts, found), out, sep="\n")
    sys.exit(any(found["parts"].get(part.name, {}).get("status") != "done" for part in parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agenda", action="store_true", help="what a card must decide, each part in its own process")
    parser.add_argument("--minutes", type=float, default=28.0, help="the time for the agenda (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/gpu/results/DEVICE-DATE.json")
    parser.add_argument("--quick", action="store_true", help="two lengths instead of six")
    parser.add_argument("--only", action="append", metavar="PART", help="run only this part; may be repeated")
    parser.add_argument("--candidate", action="append", default=[], help="only candidates named so, V1 to V5, B1, B2")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT to compare with")
    parser.add_argument("--texts", type=Path, help="for the agenda: .txt files to train on")
    parser.add_argument("--pairs", type=Path, help="for the agenda: minimal pairs to judge these runs by")
    parser.add_argument("--images", type=Path, help="for the agenda: train/ and test/, with a folder for each class")
    options = parser.parse_args()
    of_agenda = (*agenda.PARTS, *agenda.learning_parts(options.texts, options.images, options.pairs))
    known = [part.name for part in of_agenda] if options.agenda else list(PARTS)
    for name in options.only or ():
        if name not in known:
            parser.error(f'there is no part "{name}": choose from {", ".join(known)}')
    if options.agenda:
        try:
            chosen = [part for part in of_agenda if not options.only or part.name in options.only]
            follow_agenda(chosen, options.out, options.minutes)
        except UserError as error:
            parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("no CUDA device was found; without one, use make kernels-aot and make test")
    device = torch.device("cuda")
    candidates = tuple(options.candidate)
    lengths = (1024, 4096) if options.quick else (512, 1024, 2048, 4096, 8192, 16384)
    measure: dict[str, Callable[[], object]] = {
        "errors": lambda: attention.worst_errors(device),
        "attention": lambda: attention.speeds(device, (64, 128), lengths),
        "linear_cross_entropy": lambda: head_and_rotary.heads_of_losses(device),
        "rotary": lambda: head_and_rotary.rotary_speeds(device),
        "training": lambda: training.speeds(device, options.nanogpt),
        "candidate_errors": lambda: candidate_speeds.verdicts(device, candidates),
        "candidate_forward": lambda: candidate_speeds.forward_speeds(device, candidates),
        "candidate_backward": lambda: candidate_speeds.backward_speeds(device, candidates),
        "decoding": lambda: decoding.speeds(device),
        "decoding_products": lambda: decoding.products(device),
    }
    result: dict[str, object] = {"environment": environment(device), "date": datetime.date.today().isoformat()}
    print(result["environment"], flush=True)
    name = str(environment(device)["device"]).replace(" ", "-")
    out = options.out or RESULTS / f"{name}-{result['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for part in options.only or PARTS:
        print(f"{part}: {PARTS[part]}", flush=True)
        found = measure[part]()
        if isinstance(found, Iterator):  # it gives line after line: each is kept, even if a later one hangs
            lines: list[object] = []
            for line in found:
                print(f"  {line}", flush=True)
                result[part] = lines = [*lines, line]
                out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        else:
            result[part] = found
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
