"""``report.html``: curves, losses, samples, settings and environment of a run, in one file that needs no network."""

from __future__ import annotations

import io
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import torch

from data_prep.errors import UserError
from data_prep.files import write_atomically
from lm import __version__
from lm.checkpoint import Checkpoint
from lm.config import all_settings
from lm.generate import Sampling, continue_text, fill_masks
from lm.model import Transformer, describe
from lm.objectives import READOUTS
from lm.run_directory import Run, choose_device

SAMPLE = Sampling(temperature=0.7, top_p=0.95, max_new_tokens=100)


def write_report(
    run: Run,
    evaluation: dict[str, Any] | None,
    prompts: Sequence[str] = (),
    fills: Sequence[str] = (),
    checkpoint: Checkpoint | None = None,
) -> Path:
    """Write ``report.html`` into the run directory and return its path.

    ``prompts`` are continued and ``fills`` filled, as far as the run's objective has taught it; ``evaluation`` is what
    ``lm.evaluate.evaluate`` returned, or None; ``checkpoint`` is whose model writes them (None: the newest).
    """
    checkpoint = checkpoint or run.newest()
    model = run.load_model(choose_device("auto"), checkpoint)
    readouts = READOUTS[run.config.objective.objective]
    context = run.config.data.context_length
    continued = [
        (prompt, "".join(continue_text(model, run.tokenizer, prompt, SAMPLE, context)))
        for prompt in (prompts if "next_token" in readouts else ())
    ]
    filled = [_shown(model, run, text, readouts[-1]) for text in (fills if readouts[-1] != "next_token" else ())]
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("report.html")
    html = page.render(
        name=run.path.name,
        lead=f"{describe(model)}; trained with {run.config.objective.objective} "
        f"to step {checkpoint.step:,} of {run.config.training.steps:,}.",
        evaluation=_evaluation_rows(evaluation),
        curves=_curves(run),
        continued=continued,
        filled=filled,
        sampling=f"Continued at temperature {SAMPLE.temperature:g}, top-p {SAMPLE.top_p:g}, seed {SAMPLE.seed}; "
        "masks filled with the likeliest token, the surest first.",
        settings=_settings(run),
        environment=environment(model),
    )
    path = run.path / "report.html"
    write_atomically(path, html)
    return path


def environment(model: Transformer) -> dict[str, str]:
    """What the run was made with and on."""
    device = next(model.parameters()).device
    return {
        "Kindling": __version__,
        "Python": platform.python_version(),
        **{package: version(package) for package in ("torch", "tokenizers", "safetensors", "numpy")},
        "machine": platform.platform(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads",
    }


def _evaluation_rows(evaluation: dict[str, Any] | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    return {
        "rows": [
            {
                "name": name + (" (floor)" if is_floor else ""),
                "floor": is_floor,
                "nats": "" if loss["nats_per_token"] is None else f"{loss['nats_per_token']:.3f}",
                "bits": f"{loss['bits_per_byte']:.3f}",
            }
            for losses, is_floor in ((evaluation["validation"], False), (evaluation["floors"], True))
            for name, loss in losses.items()
        ],
        "protocol": evaluation["protocol"].capitalize(),
        "size": f"{evaluation['validation_tokens']:,} tokens, {evaluation['validation_bytes']:,} bytes",
        "step": evaluation["step"],
    }


def _shown(model: Transformer, run: Run, text: str, readout: str) -> dict[str, Any]:
    try:
        filled = fill_masks(model, run.tokenizer, text, readout, run.config.data.context_length)
    except UserError as problem:  # one text that cannot be filled is no reason to go without a report
        return {"pieces": [(f"{text} ({problem})", False)], "candidates": []}
    told = [[(token.strip(), f"{probability:.0%}") for token, probability in each] for each in filled.candidates]
    return {"pieces": filled.pieces, "candidates": told}


def _settings(run: Run) -> dict[str, list[dict[str, Any]]]:
    values = run.config.flat()
    sections: dict[str, list[dict[str, Any]]] = {}
    for setting in all_settings():
        row = {"name": setting.name, "value": values[setting.name], "help": setting.help}
        sections.setdefault(setting.section, []).append(row)
    return sections


def _curves(run: Run) -> list[str]:
    """The loss and the learning rate against the step, each as an SVG element."""
    lines = list(run.metrics())
    training = [line for line in lines if "loss" in line]
    if not training:
        return []
    losses = sorted({key for line in training for key in line if key.startswith("loss_")}) or ["loss"]
    curves = {key.removeprefix("loss_"): [(li["step"], li[key]) for li in training if key in li] for key in losses}
    validated = [line for line in lines if line.get("validation")]
    points = {
        f"{name}, validation": [
            (line["step"], line["validation"][name]["nats_per_token"])
            for line in validated
            if name in line["validation"]
        ]
        for name in sorted({name for line in validated for name in line["validation"]})
    }
    rates = {"learning rate": [(line["step"], line["learning_rate"]) for line in training]}
    speeds = {"tokens per second": [(line["step"], line["tokens_per_second"]) for line in training]}
    return [
        draw({"loss, nats per token": (curves, points)}, height=3.6),
        draw({"learning rate": (rates, {}), "tokens per second": (speeds, {})}, height=2.2),
    ]


Series = dict[str, list[tuple[float, float]]]


def draw(panels: dict[str, tuple[Series, Series]], height: float) -> str:
    """Panels side by side, each with lines and marked points over the step, as one SVG element."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    colours = ["#b3471d", "#2b5d8c", "#5a7d2a", "#7a4b8c"]
    style: dict[Any, Any] = {
        "svg.hashsalt": "kindling",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(9, height), layout="constrained")
        figure.patch.set_alpha(0)
        for axes, (title, (lines, points)) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            for colour, (label, series) in zip(colours, lines.items(), strict=False):
                axes.plot(*zip(*series, strict=True), color=colour, linewidth=1.2, label=label)
            for colour, (label, series) in zip(colours, points.items(), strict=False):
                axes.plot(
                    *zip(*series, strict=True), color=colour, marker="o", markersize=4, linestyle="--", label=label
                )
            axes.set(title=title, xlabel="step")
            axes.grid(color="#dfe3ea", linewidth=0.6)
            axes.patch.set_alpha(0)
            if len(lines) + len(points) > 1:
                axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)
