"""Training runs whose outcome a GPU gives within minutes, as parts of the agenda.

python -m benchmarks.gpu.learning text FOLDER --out FILE [--batch-tokens N] [--weight-decay D] [--pairs FOLDER]
python -m benchmarks.gpu.learning images FOLDER --out FILE [--method dino] [--seconds N]

text: a number of passes over the .txt files of FOLDER with the recipe 30m. images: FOLDER/train and FOLDER/test have a
folder for each class; the method trains for so many seconds on a trunk about as expensive as a ResNet-18 on images of
32 pixels (0.56 billion multiplications an image; 12 blocks of 256 on 64 patches have 0.6). Datasets and runs are kept
in --work, so a part that was stopped resumes. Further options are those of train.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from data_prep.shards.tokens import open_dataset
from lm.runs.directory import open_run

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "runs" / "gpu-agenda"
TRUNK = ("--num-layers", "12", "--hidden-size", "256", "--num-heads", "8", "--patch-size", "4")
TIMED_STEPS = 60  # the second half of which tells how many images there are in a second


def program(*words: object) -> str:
    """Run a command of the repository; its standard output. Ends this process with its status if that is not 0."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def evaluated(run: Path, *options: object) -> dict[str, Any]:
    """What ``evaluate.py`` finds, and how fast the run was."""
    found = json.loads(program("evaluate.py", run, "--json", *options))
    return {"result": found, "speed": speed(run)}


def speed(run: Path) -> float:
    """The median tokens, or images, per second in the second half of the log."""
    lines = [line for line in open_run(run).metrics() if "loss" in line]
    unit = "images_per_second" if "images_per_second" in lines[0] else "tokens_per_second"
    return statistics.median(line[unit] for line in lines[len(lines) // 2 :])


def text(options: argparse.Namespace, settings: list[str]) -> dict[str, Any]:
    """Bits per byte, and minimal pairs if asked, after some passes over a text."""
    data = options.work / "text"
    cut = ("--max-document-bytes", 4096, "--validation-fraction", 0.02)  # books become parts, some of them held out
    build = ("-m", "data_prep", "build", options.folder, "--out", data, "--vocab-size", options.vocab_size)
    program(*build, *cut)  # a finished dataset is left as it is
    steps = round(options.passes * open_dataset(data).split("train").tokens / options.batch_tokens)
    run = options.work / "-".join(
        ["text", str(options.batch_tokens), str(options.weight_decay), *(word.lstrip("-") for word in settings)]
    )
    given = ("--batch-tokens", options.batch_tokens, "--weight-decay", options.weight_decay, "--steps", steps)
    program("train.py", "configs/30m.toml", "--data", data, "--run", run, *given, *settings)
    found = {"steps": steps, **evaluated(run)}
    return found | ({"pairs": evaluated(run, "--pairs", options.pairs)["result"]} if options.pairs else {})


def images(options: argparse.Namespace, settings: list[str]) -> dict[str, Any]:
    """k-NN and linear probe after some seconds of training; first a short run says how many steps these are."""
    data, folder = options.work / "images", options.folder
    program("-m", "data_prep", "images", folder / "train", "--validation", folder / "test", "--out", data, "--size", 32)
    recipe = f"configs/images-{options.method}.toml"

    def train(name: str, steps: int) -> Path:
        run = options.work / f"images-{options.method}-{name}"
        given = ("--steps", steps, "--log-every", 10, *TRUNK, *settings)
        program("train.py", recipe, "--data", data, "--run", run, *given)
        return run

    first = train("first", TIMED_STEPS)
    steps = max(1, round(options.seconds * speed(first) / open_run(first).config.data.batch_images))
    return {"steps": steps, **evaluated(train(f"{options.seconds}-seconds", steps))}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("text", "images"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--passes", type=float, default=10)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--pairs", type=Path, help="a folder of minimal pairs")
    parser.add_argument("--method", default="dino")
    parser.add_argument("--seconds", type=int, default=240)
    options, settings = parser.parse_known_args(words)
    options.work.mkdir(parents=True, exist_ok=True)
    found = text(options, settings) if options.what == "text" else images(options, settings)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
