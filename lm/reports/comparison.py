"""Compare runs: their different settings, their losses, and their curves in one chart.

Only files that are written during training are read, so unfinished runs can be compared too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.errors.command_names import command
from data_prep.files import read_json, write_atomically
from lm.config.settings import OBJECTIVES
from lm.reports.page import Panel, Series, chart, render
from lm.runs.checkpoint import STATE
from lm.runs.directory import METRICS, Run, open_run
from lm.runs.metrics_log import overfitting, rows_validated, summary
from lm.training.plan import format_bytes

UNITS = {"nats_per_token": "nats/token", "bits_per_byte": "bits/byte", "loss": "loss"}  # the last is that of images


@dataclass(frozen=True)
class Entry:
    """One of the runs to compare, with the lines of its metrics."""

    name: str
    run: Run
    lines: list[dict[str, Any]]

    @property
    def objective(self) -> str:
        """Its objective, or the task of a fine-tuning."""
        config = self.run.config
        return config.finetune.task if config.is_finetuning else config.objective.objective

    def training_losses(self) -> Series:
        """(tokens seen, loss) by objective, in nats per token."""
        readouts = OBJECTIVES.get(self.objective, ("", (self.objective,)))[1]
        alone = readouts[0] if len(readouts) == 1 else self.objective
        found: Series = {}
        for line in self.lines:
            if "loss" in line:
                losses = {key.removeprefix("loss_"): line[key] for key in line if key.startswith("loss_")}
                for objective, loss in (losses or {alone: line["loss"]}).items():
                    found.setdefault(objective, []).append((line["tokens"], loss))
        return found

    def validations(self) -> dict[str, list[dict[str, Any]]]:
        """The validation losses by readout, with the step and the tokens seen."""
        found: dict[str, list[dict[str, Any]]] = {}
        for line in self.lines:
            seen = {"step": line["step"], "tokens": line["step"] * self.run.config.data.batch_tokens}
            for readout, loss in line.get("validation", {}).items():
                found.setdefault(readout, []).append(seen | loss)
        return found

    def data_fingerprint(self) -> str | None:
        """The hash of the data's content, from the newest checkpoint that has it."""
        for state in sorted(self.run.path.glob(f"checkpoints/step_*/{STATE}"), reverse=True):
            try:
                return str(read_json(state)["data_fingerprint"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return None


def open_entries(paths: Sequence[str | Path]) -> list[Entry]:
    """Open the runs to compare, named by their directories, or by their paths if names repeat.

    Raise UserError if one is not a run, or has logged nothing yet, or if some read text and others images.
    """
    names = [Path(path).resolve().name for path in paths]
    names = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    runs = [open_run(path) for path in paths]
    if len({run.config.reads_images for run in runs}) > 1:
        text, images = (next(run.path for run in runs if run.config.reads_images == which) for which in (False, True))
        raise UserError(f"{images} reads images, and {text} reads text: compare runs of one kind")
    entries = [Entry(name, run, list(run.metrics())) for name, run in zip(names, runs, strict=True)]
    for entry in entries:
        if not summary(entry.lines):
            raise UserError(_why_no_metrics(entry.run))
    return entries


def _why_no_metrics(run: Run) -> str:
    """Why a run has no line of training, and what to do instead."""
    newest = run.latest(lambda _: None)
    for key, done in (("imported_from", "imported"), ("merged_from", "merged")):
        if newest and key in newest.state:
            how = f"was {done} from {newest.state[key]} and has not been trained here, so it has no curves to compare"
            options = "" if run.config.reads_images else " --text FILE"
            measure = "" if run.config.has_task_head else f": {command('evaluate')} {run.path}{options} measures it"
            return f"{run.path} {how}{measure}"
    return f"{run.path} has no metrics in {METRICS} yet: train it first"


def compare(entries: Sequence[Entry]) -> dict[str, Any]:
    """Compare the runs; the result is ready for JSON.

    ``unit`` is the unit in which losses are comparable, "loss" for images, and ``remarks`` are caveats about the
    numbers; ``runs`` has the state of each run and, per readout, its ``final`` and its ``best`` validation;
    ``settings`` has the values of the settings that differ, in the order of the runs.
    """
    flat = [entry.run.config.flat() for entry in entries]
    same_inputs = _alike(entry.run.processor.sha256 for entry in entries)
    unit = "nats_per_token" if same_inputs else "bits_per_byte"
    if entries[0].run.config.reads_images:
        unit = "loss"
    return {
        "unit": unit,
        "remarks": _remarks(entries, same_inputs=same_inputs),
        "runs": [_state_of(entry, unit) for entry in entries],
        "settings": {name: [values[name] for values in flat] for name in flat[0] if not _alike(v[name] for v in flat)},
    }


def _state_of(entry: Entry, unit: str) -> dict[str, Any]:
    return {
        "run": str(entry.run.path),
        "name": entry.name,
        "objective": entry.objective,
        **summary(entry.lines),
        "steps": entry.run.config.training.steps,
        "training_loss": {objective: points[-1][1] for objective, points in entry.training_losses().items()},
        "validation": {
            readout: {"final": losses[-1], "best": min(losses, key=lambda loss: loss[unit])}
            for readout, losses in entry.validations().items()
        },
    }


def _remarks(entries: Sequence[Entry], *, same_inputs: bool) -> list[str]:
    remarks = []
    sizes = ", ".join(f"{entry.run.config.model.vocab_size:,}" for entry in entries)
    if entries[0].run.config.reads_images:
        if not same_inputs:
            remarks.append("The images differ in size, channels or normalization, so losses are not comparable.")
    elif not same_inputs:
        remarks.append(
            f"The tokenizers differ (vocabularies of {sizes} tokens), so losses are compared in bits per byte; "
            "training losses are per token and are left out."
        )
    elif not _alike(entry.run.config.model.vocab_size for entry in entries):
        remarks.append(f"The vocabularies differ in size: {sizes} tokens.")
    fingerprints = [entry.data_fingerprint() for entry in entries]
    if not _alike([entry.run.config.data.data for entry in entries] if None in fingerprints else fingerprints):
        remarks.append("The data differ, so the losses may be on different texts.")
    parts = [[rows_validated(line) for line in entry.lines if line.get("validation")][-1:] for entry in entries]
    if not _alike(parts):
        named = [f"{e.name} {''.join(part) or 'unknown'}" for e, part in zip(entries, parts, strict=True)]
        remarks.append(f"The validations use different parts of the split: {', '.join(named)}.")
    return remarks + [f"{entry.name}: {sentence}" for entry in entries if (sentence := overfitting(entry.lines))]


def _alike(values: Any) -> bool:
    first, *others = values
    return all(other == first for other in others)


def rows(comparison: dict[str, Any]) -> list[list[str]]:
    """The numbers as a table of texts: a header with the names of the runs, then a row per quantity.

    A cell is "" if a run does not have the quantity.
    """
    runs, unit = comparison["runs"], comparison["unit"]
    table = [
        ["losses" if unit == "loss" else f"losses in {UNITS[unit]}", *(run["name"] for run in runs)],
        ["steps", *(f"{run['step']:,} of {run['steps']:,}" for run in runs)],
        ["tokens seen", *(f"{run['tokens']:,}" for run in runs)],
        ["epochs seen", *(f"{run['epoch']:.2f}" for run in runs)],
        ["tokens/s, median", *(f"{run['tokens_per_second']:,.0f}" for run in runs)],
    ]
    known = {
        "share_of_peak": ("fraction of peak, median", "{:.1%}".format),
        "memory_bytes": ("peak memory", format_bytes),
    }
    for key, (name, form) in known.items():
        if any(key in run for run in runs):
            table.append([name, *_cells(runs, key, form)])
    if unit != "bits_per_byte":
        losses = [run["training_loss"] for run in runs]
        table += [
            [f"training, {name}", *_cells(losses, name, "{:.4f}".format)] for name in _names(runs, "training_loss")
        ]
    for readout in _names(runs, "validation"):
        for which in ("final", "best"):
            found = [run["validation"].get(readout, {}).get(which) for run in runs]
            cells = (
                f"{loss[unit]:.4f} at step {loss['step']:,}, {loss['tokens'] / 1e6:.2f}M tokens" if loss else ""
                for loss in found
            )
            table.append([f"validation, {readout}, {which}", *cells])
    return table


def differences(comparison: dict[str, Any]) -> list[list[str]]:
    """The settings that differ as a table of texts: the name of the setting, then a cell per run."""
    return [
        [name, *(" ".join(value) if isinstance(value, tuple) else str(value) for value in values)]
        for name, values in comparison["settings"].items()
    ]


def _cells(values: Sequence[Mapping[str, float]], key: str, form: Callable[[float], str]) -> list[str]:
    return [form(each[key]) if each.get(key) is not None else "" for each in values]


def write_comparison(entries: Sequence[Entry], comparison: dict[str, Any], out: Path) -> None:
    """Write the page ``out``: the table, the curves of all runs in common charts, and the settings that differ."""
    page = render(
        "compare.html",
        names=[entry.name for entry in entries],
        remarks=comparison["remarks"],
        rows=rows(comparison),
        curves=_curves(entries, comparison),
        differences=differences(comparison),
    )
    write_atomically(out, page)


def _curves(entries: Sequence[Entry], comparison: dict[str, Any]) -> list[str]:
    """Training and validation losses by tokens seen, with a panel per objective and readout."""
    unit, runs = comparison["unit"], comparison["runs"]
    training, validation = [], []
    if unit != "bits_per_byte":
        curves = {entry.name: entry.training_losses() for entry in entries}
        for objective in _names(runs, "training_loss"):
            lines = {name: losses.get(objective, []) for name, losses in curves.items()}
            training.append(Panel(f"training, {objective}, {UNITS[unit]}", lines, horizontal="tokens seen"))
    losses = {entry.name: entry.validations() for entry in entries}
    for readout in _names(runs, "validation"):
        points = {
            name: [(loss["tokens"], loss[unit]) for loss in found.get(readout, [])] for name, found in losses.items()
        }
        validation.append(Panel(f"validation, {readout}, {UNITS[unit]}", {}, points, horizontal="tokens seen"))
    return [chart(panels, height=3.2) for panels in (training, validation) if panels]


def _names(runs: Sequence[dict[str, Any]], key: str) -> list[str]:
    """The objectives or readouts that occur in any of the runs, in order."""
    return list(dict.fromkeys(name for run in runs for name in run[key]))
