"""Compare runs: their different settings, their losses, and their curves in one chart.

Only files that training and evaluation write are read, so unfinished runs can be compared too, and imported ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.errors.command_names import command
from data_prep.files import read_json, write_atomically
from lm.reports.page import Panel, Series, chart, render
from lm.runs.checkpoint import STATE, Checkpoint
from lm.runs.directory import METRICS, Run, open_run, saved_evaluation
from lm.runs.metrics_log import overfitting, rows_validated, summary
from lm.training.plan import format_bytes

# The last is that of images, and of views of texts.
UNITS = {"nats_per_token": "nats/token", "bits_per_byte": "bits/byte", "loss": "loss"}


@dataclass(frozen=True)
class Entry:
    """One of the runs to compare, with the lines of its metrics."""

    name: str
    run: Run
    lines: list[dict[str, Any]]

    @cached_property
    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose state can be read, unverified; None if there is none."""
        for state in sorted(self.run.path.glob(f"checkpoints/step_*/{STATE}"), reverse=True):
            try:
                content = read_json(state)
                return Checkpoint(state.parent, content["step"], content)
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return None

    @property
    def origin(self) -> str:
        """Where a run comes from that has not been trained here; "" for others."""
        state = self.newest.state if self.newest and not summary(self.lines) else {}
        keys = {"imported_from": "imported", "merged_from": "merged"}
        return next((f"{done} from {state[key]}" for key, done in keys.items() if key in state), "")

    def evaluation(self) -> dict[str, Any]:
        """The last evaluation of the newest checkpoint, of a run on text; {} without one."""
        known = saved_evaluation(self.run, self.newest) if self.newest and not self.run.config.reads_images else None
        return known or {}

    @property
    def objective(self) -> str:
        """Its objective, or the task of a fine-tuning."""
        config = self.run.config
        return config.finetune.task if config.is_finetuning else config.objective.objective

    def training_losses(self) -> Series:
        """(tokens seen, loss) by objective, in nats per token."""
        found: Series = {}
        for line in self.lines:
            if "loss" in line:
                losses = {key.removeprefix("loss_"): line[key] for key in line if key.startswith("loss_")}
                for objective, loss in (losses or {self.objective: line["loss"]}).items():
                    found.setdefault(objective, []).append((line["tokens"], loss))
        return found

    def validations(self, unit: str) -> dict[str, list[dict[str, Any]]]:
        """The validation losses in this unit by readout, with the step and the tokens seen."""
        found: dict[str, list[dict[str, Any]]] = {}
        for line in self.lines:
            seen = {"step": line["step"], "tokens": line["step"] * self.run.config.data.batch_tokens}
            for readout, loss in line.get("validation", {}).items():
                if unit in loss:
                    found.setdefault(readout, []).append(seen | loss)
        return found

    def data_fingerprint(self) -> str | None:
        """The hash of the data's content, from the newest checkpoint."""
        return self.newest.state.get("data_fingerprint") if self.newest else None


def open_entries(paths: Sequence[str | Path]) -> list[Entry]:
    """Open the runs to compare, named by their directories, or by their paths if names repeat.

    Raise UserError if one is not a run, or is to be trained here and has logged nothing yet, or if some read text and
    others images.
    """
    names = [Path(path).resolve().name for path in paths]
    names = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    runs = [open_run(path) for path in paths]
    if len({run.config.reads_images for run in runs}) > 1:
        text, images = (next(run.path for run in runs if run.config.reads_images == which) for which in (False, True))
        raise UserError(f"{images} reads images, and {text} reads text: compare runs of one kind")
    entries = [Entry(name, run, list(run.metrics())) for name, run in zip(names, runs, strict=True)]
    for entry in entries:
        if not summary(entry.lines) and not entry.origin:
            raise UserError(f"{entry.run.path} has no metrics in {METRICS} yet: train it first")
    return entries


def compare(entries: Sequence[Entry]) -> dict[str, Any]:
    """Compare the runs; the result is ready for JSON.

    ``unit`` is the unit in which losses are comparable, "loss" for images and views; ``remarks`` are caveats about the
    numbers; ``runs`` has the state of each run and, per readout, its ``final`` and its ``best`` validation and its
    ``evaluation``; a run that was not trained here has an ``origin`` instead of steps; ``settings`` has the values of
    the settings that differ, in the order of the runs.
    """
    flat = [entry.run.config.flat() for entry in entries]
    same_inputs = _alike(entry.run.processor.sha256 for entry in entries)
    unit = "nats_per_token" if same_inputs else "bits_per_byte"
    if not any(entry.run.config.predicts_tokens for entry in entries):
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
            for readout, losses in entry.validations(unit).items()
        },
        "evaluation": entry.evaluation().get("validation", {}),
    } | ({"origin": entry.origin} if entry.origin else {})


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
    trained = [entry for entry in entries if not entry.origin]
    fingerprints = [entry.data_fingerprint() for entry in trained]
    if not _alike([entry.run.config.data.data for entry in trained] if None in fingerprints else fingerprints):
        remarks.append("The data differ, so the losses may be on different texts.")
    parts = [[rows_validated(line) for line in entry.lines if line.get("validation")][-1:] for entry in trained]
    if not _alike(parts):
        named = [f"{e.name} {''.join(part) or 'unknown'}" for e, part in zip(trained, parts, strict=True)]
        remarks.append(f"The validations use different parts of the split: {', '.join(named)}.")
    evaluated = [entry.evaluation() for entry in entries if entry.evaluation()]
    if not _alike(known["data_fingerprint"] for known in evaluated):
        remarks.append(f"The evaluations are of different texts: {', '.join(known['data'] for known in evaluated)}.")
    remarks += [_not_trained(entry) for entry in entries if entry.origin]
    return remarks + [f"{entry.name}: {sentence}" for entry in entries if (sentence := overfitting(entry.lines))]


def _not_trained(entry: Entry) -> str:
    """That a run has not been trained here, and what would measure it."""
    run = entry.run
    sentence = f"{entry.name} was {entry.origin} and has not been trained here, so it has no curves"
    if entry.evaluation() or run.config.has_task_head:
        return f"{sentence}."
    data = "" if run.config.reads_images else " --data FOLDER"
    return f"{sentence}: {command('evaluate')} {run.path}{data} measures it."


def _alike(values: Iterable[Any]) -> bool:
    values = list(values)
    return all(value == values[0] for value in values)


def rows(comparison: dict[str, Any]) -> list[list[str]]:
    """The numbers as a table of texts: a header with the names of the runs, then a row per quantity.

    A cell is "" if a run does not have the quantity.
    """
    runs, unit = comparison["runs"], comparison["unit"]
    table = [
        ["losses" if unit == "loss" else f"losses in {UNITS[unit]}", *(run["name"] for run in runs)],
        ["steps", *(run.get("origin") or f"{run['step']:,} of {run['steps']:,}" for run in runs)],
    ]
    known = {
        "tokens": ("tokens seen", "{:,}".format),
        "epoch": ("epochs seen", "{:.2f}".format),
        "tokens_per_second": ("tokens/s, median", "{:,.0f}".format),
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
    for readout in _names(runs, "evaluation"):
        found = [run["evaluation"].get(readout) for run in runs]
        table.append(
            [f"evaluation, {readout}", *(f"{loss[unit]:.4f}" if loss and unit in loss else "" for loss in found)]
        )
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
    losses = {entry.name: entry.validations(unit) for entry in entries}
    for readout in _names(runs, "validation"):
        points = {
            name: [(loss["tokens"], loss[unit]) for loss in found.get(readout, [])] for name, found in losses.items()
        }
        validation.append(Panel(f"validation, {readout}, {UNITS[unit]}", {}, points, horizontal="tokens seen"))
    return [chart(panels, height=3.2) for panels in (training, validation) if panels]


def _names(runs: Sequence[dict[str, Any]], key: str) -> list[str]:
    """The objectives or readouts that occur in any of the runs, in order."""
    return list(dict.fromkeys(name for run in runs for name in run[key]))
