"""What a training run of a peer reached, as JSON, and the table of many."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_prep.files import write_atomically


@dataclass(frozen=True)
class Asked:
    """What a result depends on; ``data`` is the fingerprint of the shards, ``products`` the dtype of training steps."""

    peer: str
    objective: str
    rate: float
    seed: int
    recipe: str
    cpu_seconds: float
    threads: int
    data: str
    products: str = "float32"  # of results from before it was recorded

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


def table(folder: Path) -> str:
    """A line for each peer, objective, rate and dtype: the mean and the sample standard deviation of the seeds."""
    groups: dict[tuple[str, str, float, str], list[Result]] = {}
    for result in map(read, sorted(folder.glob("*.json"))):
        asked = result.asked
        groups.setdefault((asked.peer, asked.objective, asked.rate, asked.products), []).append(result)
    lines = []
    for (peer, objective, rate, products), own in groups.items():
        spent, tokens = (statistics.mean(getattr(r, name) for r in own) for name in ("cpu_seconds", "tokens"))
        cells = [f"{peer} {objective} {rate:g} {products}", f"{len(own)} seeds", f"{own[0].parameters / 1e6:.2f}M"]
        cells += [f"{spent:,.0f} CPU s", f"{tokens / spent:,.0f} tokens/CPU s"]
        cells += [f"{name} {_spread(values)}" for name, values in _columns(own).items()]
        lines.append(", ".join(cells))
    return "\n".join(lines)


def _columns(results: Iterable[Result]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for result in results:
        for readout, bits in result.bits_per_byte.items():
            found.setdefault(f"{readout} bits per byte", []).append(bits)
        for folder, readouts in result.pairs.items():
            for readout, scores in readouts.items():
                for ties in ("half", "first"):
                    found.setdefault(f"{folder} {readout} ties {ties}", []).append(scores[ties])
        for task, metrics in result.tasks.items():
            for name, value in metrics.items():
                found.setdefault(f"{task} {name}", []).append(value)
    return found


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")
