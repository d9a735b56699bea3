"""What a training run of a peer reached, as JSON, and the table of many."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data_prep.files import write_atomically


@dataclass(frozen=True)
class Asked:
    """What a result depends on.

    ``data`` is the fingerprint of the shards, ``products`` the dtype of training steps, and ``settings`` are those of
    the recipe. Results of earlier versions name neither of the last two; their products are in float32.
    """

    peer: str
    objective: str
    rate: float
    seed: int
    recipe: str
    cpu_seconds: float
    threads: int
    data: str
    products: str = "float32"
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its file, without the suffix."""
        objective = self.objective.replace(":", "_").replace(",", "+")
        return f"{self.peer}-{objective}-{self.rate:g}-{self.seed}"


@dataclass(frozen=True)
class Result:
    """What one run reached.

    Attributes:
        bits_per_byte: of the whole validation split, by readout.
        pairs: by folder of pairs and readout: the mean over paradigms with equal scores as one half (``half``) and as
            right (``first``), and the number of pairs.
        tasks: metrics on the test examples, by task and name.
        tuning: bits per byte of the rates that were tried, by rate and readout.
    """

    asked: Asked
    parameters: int
    steps: int
    tokens: int
    cpu_seconds: float
    bits_per_byte: dict[str, float]
    pairs: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    tuning: dict[str, dict[str, float]] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{self.asked.name}.json", json.dumps(asdict(self), indent=1) + "\n")


def read(file: Path) -> Result:
    found = json.loads(file.read_text(encoding="utf-8"))
    return Result(**found | {"asked": Asked(**found["asked"])})


def done(folder: Path, asked: Asked, measured: Iterable[str] = ()) -> Result | None:
    """The result of exactly this run, if it is there with these pairs and tasks; other files are written over."""
    file = folder / f"{asked.name}.json"
    found = read(file) if file.is_file() else None
    return found if found and found.asked == asked and {*measured} <= found.pairs.keys() | found.tasks.keys() else None


def of_other_seeds(folder: Path, asked: Asked) -> list[Result]:
    """The results that differ from ``asked`` in the seed alone."""
    found = map(read, sorted(folder.glob("*.json")))
    others = (result for result in found if result.asked.seed != asked.seed)
    return [result for result in others if replace(result.asked, seed=asked.seed) == asked]


def table(folder: Path) -> str:
    """Markdown: a row for each readout of the runs that differ in the seed alone, their mean and standard deviation."""
    groups: dict[str, list[Result]] = {}
    for result in map(read, sorted(folder.glob("*.json"))):
        groups.setdefault(repr(replace(result.asked, seed=0)), []).append(result)
    rows = []
    for readout in dict.fromkeys(readout for own in groups.values() for readout in own[0].bits_per_byte):
        measured = [own for own in groups.values() if readout in own[0].bits_per_byte]
        rows += [_row(own, readout) for own in sorted(measured, key=lambda own: _bits(own, readout))]
    columns = dict.fromkeys(column for row in rows for column in row)
    lines = ([row.get(column, "") for column in columns] for row in rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in ([*columns], ["---"] * len(columns), *lines))


def _row(own: list[Result], readout: str) -> dict[str, str]:
    """The cells of results that differ in the seed alone; metrics of tasks are in the row of the first readout."""
    asked, first = own[0].asked, own[0]
    row = {
        "readout": readout,
        "system": f"{asked.peer} `{asked.objective}`",
        "rate": f"{asked.rate:g}",
        "products": asked.products,
        "seeds": f"{len(own)}",
        "parameters": f"{first.parameters / 1e6:.2f}M",
        "CPU seconds": f"{statistics.mean(result.cpu_seconds for result in own):,.0f}",
        "tokens": f"{statistics.mean(result.tokens for result in own) / 1e6:.2f}M",
        "bits per byte": _spread([result.bits_per_byte[readout] for result in own], 3, len(own)),
    }
    for folder in dict.fromkeys(folder for result in own for folder in result.pairs):
        scores = [result.pairs[folder][readout] for result in own if folder in result.pairs]
        for ties, meaning in (("half", "one half"), ("first", "right")):
            row[f"{folder}, ties {meaning}"] = _spread([100 * each[ties] for each in scores], 1, len(own))
    if readout == next(iter(first.bits_per_byte)):
        for task in dict.fromkeys(task for result in own for task in result.tasks):
            metrics = [result.tasks[task] for result in own if task in result.tasks]
            row |= {f"{task}, {name}": _spread([each[name] for each in metrics], 3, len(own)) for name in metrics[0]}
    return row


def _bits(own: list[Result], readout: str) -> float:
    return statistics.mean(result.bits_per_byte[readout] for result in own)


def _spread(values: list[float], digits: int, seeds: int) -> str:
    """The mean and the sample standard deviation, and how many of the ``seeds`` there are if not all."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    some = f" ({len(values)} of {seeds} seeds)" if len(values) < seeds else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}{some}"
