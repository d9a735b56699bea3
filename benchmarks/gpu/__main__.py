"""Run everything and write one JSON: ``python -m benchmarks.gpu [--out FILE] [--quick]``."""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

import torch

from benchmarks.gpu import attention, head_and_rotary
from benchmarks.gpu.timing import environment

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="default: benchmarks/gpu/results/DEVICE-DATE.json")
    parser.add_argument("--quick", action="store_true", help="two lengths instead of six")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here; without one, see make kernels-aot and make test")
    device = torch.device("cuda")
    result: dict[str, object] = {"environment": environment(device), "date": datetime.date.today().isoformat()}
    print(result["environment"], flush=True)
    print("errors against float64", flush=True)
    errors = attention.worst_errors(device)
    result["attention_errors"] = errors
    for line in errors:
        worse = max(a / max(b, 1e-9) for a, b in zip(line["ours"], line["pytorch"], strict=True))
        verdict = "" if worse <= 2 and line["same_bits"] else "  <-- look at this"
        print(f"  {line['length']} {line['width']} {line['mask']} {line['inputs']}: {worse:.2f} x PyTorch's{verdict}")
    print("attention, TFLOP/s", flush=True)
    lengths = (1024, 4096) if options.quick else (512, 1024, 2048, 4096, 8192, 16384)
    result["attention"] = attention.speeds(device, (64, 128), lengths)
    print("linear cross-entropy", flush=True)
    result["linear_cross_entropy"] = head_and_rotary.heads_of_losses(device)
    print("QK-norm and rotary", flush=True)
    result["rotary"] = head_and_rotary.rotary_speeds(device)
    name = str(environment(device)["device"]).replace(" ", "-")
    out = options.out or RESULTS / f"{name}-{result['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
