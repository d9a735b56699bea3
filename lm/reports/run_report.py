"""``report.html`` of a run: curves, losses, samples, settings and environment, in one file that needs no network."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import UserError
from data_prep.errors.wording import counted
from data_prep.files import write_atomically
from lm import __version__
from lm.config.objective_settings import TEXT_VIEW_OBJECTIVES
from lm.config.settings import Config
from lm.config.shown import shown_settings
from lm.evaluation.validation_loss import verdict
from lm.inference.fill_mask import fill_masks
from lm.inference.generator import stream
from lm.inference.language_model import LanguageModel
from lm.inference.sampling import Sampling
from lm.model.device import choose_device
from lm.model.image_transformer import Model
from lm.reports.page import Panel, Series, chart, render
from lm.runs.checkpoint import STATE, Checkpoint
from lm.runs.directory import Run
from lm.runs.metrics_log import best_validation, of_tokens, overfitting, rows_validated, series, summary
from lm.runs.run_data import openings_of
from lm.training.plan import format_bytes, format_time

SAMPLE = Sampling(temperature=0.7, top_p=0.95, max_new_tokens=100)


def write_report(
    run: Run,
    evaluation: dict[str, Any] | None,
    prompts: Sequence[str] = (),
    fills: Sequence[str] = (),
    checkpoint: Checkpoint | None = None,
) -> Path:
    """Write ``report.html`` into the run directory and return its path.

    ``prompts`` are continued and ``fills`` filled, if the run's objective allows; without any, openings of validation
    documents are taken, if the data is there. ``evaluation`` is the result of ``validation_loss.evaluate``, or None;
    ``checkpoint`` has the model to use (None: the newest).
    """
    checkpoint = checkpoint or run.newest()
    trunk = run.load_model(choose_device("auto"), checkpoint)
    model = LanguageModel(trunk, run.tokenizer, run.config)
    found = [] if prompts or fills else openings_of(run)
    prompts = (prompts or [each.prompt for each in found]) if "next_token" in model.readouts else ()
    fills = (fills or [each.fill for each in found]) if model.masked_readout else ()
    lines = list(run.metrics())
    html = render(
        "report.html",
        name=run.path.name,
        lead=lead(run, checkpoint, trunk, lines),
        evaluation=_evaluation_rows(evaluation) if evaluation else None,
        meaning=_meaning(evaluation or best_validation(lines) or {}),
        curves=_curves(lines, run.config),
        remarks=[sentence] if (sentence := overfitting(lines)) else [],
        summary=_summary(lines),
        events=events_of(lines),
        continued=[(prompt, "".join(event.text for event in stream(model, prompt, SAMPLE))) for prompt in prompts],
        filled=[_shown(model, text) for text in fills],
        openings=bool(found),
        sampling=f"Continued at temperature {SAMPLE.temperature:g}, top-p {SAMPLE.top_p:g}, seed {SAMPLE.seed}; "
        "each mask filled with its most likely token, the most confident first.",
        settings=settings_of(run),
        environment=environment(trunk),
    )
    path = run.path / "report.html"
    write_atomically(path, html)
    return path


def lead(run: Run, checkpoint: Checkpoint, model: Model, lines: Sequence[dict[str, Any]]) -> str:
    """What the run is, when it was trained, and how long."""
    saved = datetime.fromtimestamp((checkpoint.path / STATE).stat().st_mtime).astimezone()
    steps = f"to step {checkpoint.step:,} of {run.config.training.steps:,}"
    seconds, seen = 0.0, 0
    for line in lines:
        if "loss" in line:
            seconds += (line["tokens"] - seen) / line["tokens_per_second"]
            seen = line["tokens"]
    took = f", which took {format_time(seconds)}" if seconds else ""
    task = run.config.finetune
    how = f"trained with {run.config.objective.objective}"
    if run.config.is_finetuning:
        start = Path(task.base).name if task.weights == "pretrained" else "random weights"
        how = f"fine-tuned from {start} for {task.task.replace('_', ' ')} ({task.method})"
    what = f"{model.describe()}; {how} {steps}{took}."
    return f"{what} The checkpoint was saved on {saved:%Y-%m-%d at %H:%M}."


def environment(model: Model, reader: str = "tokenizers") -> dict[str, str]:
    """The versions and the machine that the report was made with; ``reader`` is the package that reads its inputs."""
    device = next(model.parameters()).device
    threads = f"{device.type}, {counted(torch.get_num_threads(), 'thread')}"
    return {
        "Kindling": __version__,
        "Python": platform.python_version(),
        **{package: version(package) for package in ("torch", reader, "safetensors", "numpy")},
        "machine": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else threads,
    }


def _meaning(measured: dict[str, Any]) -> str:
    """What the first loss of an evaluation or a validation means; "" if it has none."""
    for name, loss in of_tokens(measured.get("validation", {})).items():
        nats = loss["nats_per_token"]
        return (
            "The loss is the mean negative logarithm of the right token's probability, in nats: lower is better. "
            f"{name} {nats:.3f} is as if the model gave each token {math.exp(-nats):.2%}, or chose among "
            f"{math.exp(nats):,.0f} equally likely tokens (its perplexity). Bits per byte compare models with "
            "different tokenizers, and with baselines that know only token frequencies (unigram), or compress (bz2)."
        )
    return ""


def _evaluation_rows(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {
        "verdict": verdict(evaluation),
        "rows": [
            {
                "name": name + (" (baseline)" if is_baseline else ""),
                "is_baseline": is_baseline,
                "nats": "" if loss["nats_per_token"] is None else f"{loss['nats_per_token']:.3f}",
                "bits": f"{loss['bits_per_byte']:.3f}",
            }
            for losses, is_baseline in ((evaluation["validation"], False), (evaluation["floors"], True))
            for name, loss in losses.items()
        ],
        "protocol": evaluation["protocol"].capitalize(),
        "size": f"{evaluation['validation_tokens']:,} tokens, {format_bytes(evaluation['validation_bytes'])}",
        "step": evaluation["step"],
    }


def _shown(model: LanguageModel, text: str) -> dict[str, Any]:
    try:
        filled = fill_masks(model, text)
    except UserError as problem:  # one text that cannot be filled must not prevent the report
        return {"pieces": [(f"{text} ({problem})", False)], "candidates": []}
    candidates = [[(repr(token), _percent(probability)) for token, probability in each] for each in filled.candidates]
    return {"pieces": filled.pieces, "candidates": candidates}


def _percent(probability: float) -> str:
    """A probability with two digits: ``34%``, ``0.12%``."""
    return f"{probability:.0%}" if probability >= 0.1 else f"{100 * probability:.2g}%"


def settings_of(run: Run) -> dict[str, list[dict[str, str]]]:
    return {
        section: [{"name": setting.name, "value": value, "help": setting.help} for setting, value in settings]
        for section, settings in shown_settings(run.config).items()
    }


def _is_of_views(name: str, config: Config) -> bool:
    """Whether a curve is that of an objective that compares views; a run with one objective has only "loss"."""
    name = name.removesuffix(", validation")
    return name in TEXT_VIEW_OBJECTIVES or (name == "loss" and not config.predicts_tokens)


def _curves(lines: list[dict[str, Any]], config: Config) -> list[str]:
    """Losses, learning rate, gradient norm and speed by step, as SVG elements."""
    training = [line for line in lines if "loss" in line]
    if not training:
        return []
    losses = sorted({key for line in training for key in line if key.startswith("loss_")}) or ["loss"]
    curves = {key.removeprefix("loss_"): series(training, key) for key in losses}
    validated = [line for line in lines if line.get("validation")]
    points: Series = {
        f"{name}, validation": [] for name in sorted({n for line in validated for n in line["validation"]})
    }
    for line in validated:
        for name, loss in line["validation"].items():
            points[f"{name}, validation"].append((line["step"], next(iter(loss.values()))))
    best = best_validation(lines)
    marks = {f"best validation, step {best['step']:,}": best["step"]} if best and best is not validated[-1] else {}
    rates = [Panel(key.replace("_", " "), {"": series(training, key)}) for key in ("learning_rate", "gradient_norm")]
    speed = [Panel("tokens per second", {"": series(training, "tokens_per_second")})]
    if peak := series(training, "share_of_peak"):
        speed.append(Panel("fraction of peak", {"": peak}))
    panels = []
    for title, of_views in (("loss, nats per token", False), ("loss of views", True)):
        part, of_part = (
            {name: found for name, found in each.items() if _is_of_views(name, config) == of_views}
            for each in (curves, points)
        )
        if part or of_part:
            panels.append(Panel(title, part, of_part, marks))
    return [
        chart(panels, height=3.6),
        chart(rates, height=2.2),
        chart(speed, height=2.2),
    ]


def _summary(lines: list[dict[str, Any]]) -> dict[str, str]:
    """The state of the run, in words."""
    words = {
        "tokens": ("tokens seen", "{:,}"),
        "epoch": ("epochs seen", "{:.2f}"),
        "tokens_per_second": ("tokens per second, median", "{:,.0f}"),
        "share_of_peak": ("fraction of the machine's peak, median", "{:.1%}"),
    }
    found = summary(lines)
    state = {label: form.format(found[name]) for name, (label, form) in words.items() if name in found}
    if "memory_bytes" in found:
        state["peak memory"] = format_bytes(found["memory_bytes"])
    if best := best_validation(lines):
        tokens = of_tokens(best["validation"])
        losses = ", ".join(
            f"{name} {next(iter(loss.values())):.3f}" for name, loss in (tokens or best["validation"]).items()
        )
        state["best validation"] = f"step {best['step']:,}: {losses}{' nats per token' if tokens else ''}"
        if part := rows_validated(best):
            state["validated on"] = part
    if skipped := sum(line["event"] in ("skip", "lower") for line in lines if "event" in line):
        state["skipped steps"] = f"{skipped:,}"
    return state


def events_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    done = {
        "skip": "skipped",
        "lower": "skipped, learning rate lowered to {rate:g} of the schedule",
        "roll_back": "rolled back to this step, with {rate:g} of the scheduled learning rate",
    }
    return [
        {"step": f"{line['step']:,}", "what": done.get(event, event).format(rate=line["rate"]), "why": line["reason"]}
        for line in lines
        if (event := line.get("event"))
    ]
