"""What a run needs, estimated before it starts: will it fit, and how long will it take.

    settings -> memory by part (memory_estimate) -> rows of a micro-batch -> a measured dry step -> seconds to the end

``train.py … --plan`` prints the plan and writes nothing; a run prints a short form before it starts. The dry step uses
weights that are initialized again afterwards, so that it does not change the result of the run.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_prep.errors import UserError
from data_prep.errors.wording import counted
from lm import kernels
from lm.config.scaling import rule_for
from lm.config.settings import Config
from lm.data import keyed_random
from lm.data.batch import Rows, Vocabulary, rows_of_windows
from lm.data.corpora import Corpora
from lm.data.datasets import open_training_data, settled
from lm.data.image_corpora import ImageCorpora, sized
from lm.data.images import ImageRows, TrainingImages
from lm.data.rows import TrainingRows
from lm.data.visual_codes import with_codes
from lm.model.device import (
    available_memory,
    choose_device,
    is_out_of_memory,
    keep_freed_memory,
    machine_rate,
    peak_memory,
    resident_memory,
    synchronize,
    uses_bfloat16,
)
from lm.model.image_transformer import Model
from lm.objectives.batches import TrainingBatches
from lm.objectives.objective import Objective, open_objective
from lm.training.gradients import step_gradients
from lm.training.memory_estimate import StepMemory, step_memory
from lm.training.optimizer import Optimizer

# Share of the available memory that a chosen micro-batch may take.
USABLE_SHARE = 0.8
# On a CPU more tokens per micro-batch take more memory without being faster (docs/lab-notes.md).
CPU_MICRO_BATCH_TOKENS = 4096
# A dry step that would take longer than the first of these uses fewer rows; a quick one is repeated for the second,
# since it takes several steps to reach a steady speed.
DRY_SECONDS, ENOUGH_SECONDS, MOST_PASSES = 5.0, 2.0, 12
# From this many passes over the same text, further ones teach ever less (Muennighoff et al. 2023, "Scaling
# Data-Constrained Language Models": a repeated token's worth has fallen to 1/e after 15 repetitions); a plan that takes
# longer than this names a shorter run.
MOST_EPOCHS, LONG_SECONDS = 16, 3600
# Shorter runs start without a dry step.
FEWEST_STEPS = 20


@dataclass(frozen=True)
class DryStep:
    """A measurement: rows of the micro-batch, seconds of a whole optimizer step, and peak memory in bytes."""

    rows: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run needs, and what the machine has, in bytes, seconds, and floating-point operations (per second).

    ``process_bytes`` is the memory of the process in addition to that of a step; ``epochs`` is None without data.
    """

    config: Config
    device: torch.device
    model: str
    parameters: int
    flops_per_token: float
    memory: StepMemory
    process_bytes: int
    available_bytes: int
    machine_rate: float
    data: str
    epochs: float | None
    dry_step: DryStep | None = None

    @property
    def rows(self) -> int:
        """Rows of a micro-batch."""
        return self.config.data.micro_batch_rows or self.config.data.batch_rows

    @property
    def tokens(self) -> int:
        return self.config.training.steps * self.config.data.batch_tokens

    @property
    def peak_bytes(self) -> int:
        """The expected peak memory, which is measured if the dry step had a whole micro-batch."""
        counted = self.process_bytes + self.memory.total
        if self.dry_step is None:
            return counted
        return self.dry_step.peak_bytes if self.dry_step.rows == self.rows else max(counted, self.dry_step.peak_bytes)

    @property
    def tokens_per_second(self) -> float | None:
        return self.config.data.batch_tokens / self.dry_step.seconds if self.dry_step else None

    @property
    def images_per_second(self) -> float | None:
        return self.config.data.batch_images / self.dry_step.seconds if self.dry_step else None

    @property
    def share_of_peak(self) -> float | None:
        speed = self.tokens_per_second
        return speed * self.flops_per_token / self.machine_rate if speed else None

    @property
    def seconds(self) -> float | None:
        """The time of all steps, without validation and saving."""
        return self.config.training.steps * self.dry_step.seconds if self.dry_step else None

    @property
    def obstacle(self) -> str:
        """Why the run does not fit, and what would fit; empty if it does."""
        return _obstacle(self.config, self.device, self.available_bytes)

    @property
    def notes(self) -> list[str]:
        """What a user may want to change: many passes over the same text, or a long time."""
        steps, notes = self.config.training.steps, []
        if self.epochs and round(self.epochs) > MOST_EPOCHS and not self.config.reads_images:  # whose views differ
            enough = max(1, int(steps * MOST_EPOCHS / self.epochs))
            notes.append(
                f"{self.epochs:.0f} epochs: after about {MOST_EPOCHS}, more passes over the same text teach little, "
                f"and the model may overfit; --steps {enough} makes {MOST_EPOCHS}; more text goes further"
            )
        if self.seconds and self.seconds > LONG_SECONDS:
            enough = max(1, int(steps * LONG_SECONDS / self.seconds))
            notes.append(
                f"for a first look, --steps {enough} takes about {format_time(LONG_SECONDS)}; a smaller recipe or a "
                "shorter context_length is faster"
            )
        return notes

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON; values that were not measured are None."""
        return {
            "parameters": self.parameters,
            "flops_per_token": self.flops_per_token,
            "steps": self.config.training.steps,
            "tokens": self.tokens,
            "epochs": self.epochs,
            "device": str(self.device),
            "machine_flops_per_second": self.machine_rate,
            "batch_rows": self.config.data.batch_rows,
            "micro_batch_rows": self.rows,
            "memory_bytes": {
                **dataclasses.asdict(self.memory),
                "process": self.process_bytes,
                "peak": self.peak_bytes,
                "available": self.available_bytes,
            },
            "obstacle": self.obstacle,
            "notes": self.notes,
            "tokens_per_second": self.tokens_per_second,
            **({"images_per_second": self.images_per_second} if self.config.reads_images else {}),
            "share_of_peak": self.share_of_peak,
            "seconds": self.seconds,
        }

    def table(self) -> list[tuple[str, str]]:
        """Name and value of each line that ``--plan`` prints."""
        data = self.config.data
        processor = f"{self.device.type.upper()}, {counted(torch.get_num_threads(), 'thread')}"
        if self.device.type == "cuda":
            processor = torch.cuda.get_device_name(self.device)
        dtype = "bfloat16" if uses_bfloat16(self.device, self.config.training.precision) else "float32"
        products = f"peak: {self.machine_rate / 1e9:,.0f} GFLOP/s in matrix products of {dtype}"
        rows = [
            ("model", self.model),
            ("objective", f"{self.config.objective.description} on {self.data}"),
            *self._amounts(),
            ("device", f"{processor} ({products}); {kernels.describe(self.device)}"),
            ("micro-batch", f"{self.rows} of the batch's {data.batch_rows} rows"),
            *((name, format_bytes(size)) for name, size in self._parts().items()),
            ("peak memory", f"{format_bytes(self.peak_bytes)} of {format_bytes(self.available_bytes)} available"),
        ]
        if self.obstacle:
            rows.append(("does not fit", self.obstacle))
        if self.dry_step:
            measured = "" if self.dry_step.rows == self.rows else f", measured with {self.dry_step.rows} rows"
            rows += [
                ("speed", f"{self._speed()}, {self.share_of_peak:.0%} of peak{measured}"),
                ("time", f"{format_time(self.seconds or 0)} for all steps, without validation and saving"),
            ]
        return rows + [("note", note) for note in self.notes]

    def _amounts(self) -> list[tuple[str, str]]:
        """How much the run reads, and what that takes."""
        passes = "" if self.epochs is None else f", {self.epochs:.2f} epochs"
        data, steps, total = self.config.data, self.config.training.steps, format_flops(self.flops)
        if self.config.reads_images:
            images = steps * data.batch_images
            per_image = self.flops_per_token * data.context_length
            return [
                ("images", f"{steps:,} steps x {data.batch_images:,} images = {images:,} images{passes}"),
                ("FLOPs per image", f"{per_image / 1e6:.1f}M, {total} in total"),
            ]
        return [
            ("tokens", f"{steps:,} steps x {data.batch_tokens:,} tokens = {format_tokens(self.tokens)}{passes}"),
            ("scaling rule", rule_for(self.config, self.epochs).describe(self.config)),
            ("FLOPs per token", f"{self.flops_per_token / 1e6:.1f}M, {total} in total"),
        ]

    def _speed(self) -> str:
        if self.config.reads_images:
            return f"{self.images_per_second:,.0f} images/s"
        return f"{self.tokens_per_second:,.0f} tokens/s"

    def introduction(self, processes: str = "") -> list[str]:
        """What to print before the first step, one sentence each; ``processes`` as of ``Ranks.describe``."""
        table = dict(self.table())
        parts = ", ".join(f"{name} {table[name]}" for name in self._parts())
        lines = [
            self.model,
            f"{table['objective']}: {self._amounts()[0][1]}, {format_flops(self.flops)}",
            f"on {processes}{table['device']}",
            f"{table['micro-batch']} per micro-batch: about {format_bytes(self.peak_bytes)} of memory ({parts}); "
            f"{format_bytes(self.available_bytes)} available",
        ]
        if self.dry_step:
            lines.append(f"about {table['speed']}: {table['time']}")
        return lines + [f"note: {note}" for note in self.notes]

    @property
    def flops(self) -> float:
        """Floating-point operations of the whole run."""
        return self.tokens * self.flops_per_token

    def _parts(self) -> dict[str, int]:
        on_cpu = {"process": max(0, self.peak_bytes - self.memory.total)} if self.device.type == "cpu" else {}
        parts = {name: size for name, size in dataclasses.asdict(self.memory).items() if size or name != "average"}
        return parts | on_cpu


def process_memory(memory: StepMemory, device: torch.device, resident: int) -> int:
    """Bytes a process needs in addition to ``memory`` at a step's peak; it has ``resident`` bytes without a model."""
    # On a CPU: the pages of PyTorch's code and its libraries that the first step touches, and the fragmentation of the
    # heap as a share of the activations (docs/lab-notes.md).
    return resident + 40_000_000 + int(0.25 * memory.activations) if device.type == "cpu" else 0


def _need(config: Config, rows: int, device: torch.device) -> int:
    memory = step_memory(config, rows, device)
    return memory.total + process_memory(memory, device, 0)


def _divisors(number: int) -> list[int]:
    """From the largest down."""
    return [n for n in range(number, 0, -1) if number % n == 0]


def choose_rows(config: Config, device: torch.device, available: int) -> int | None:
    """The rows of a micro-batch: the largest divisor of the batch's rows that fits into 80 % of ``available`` bytes.

    On a CPU at most 4,096 tokens, since more are not faster. None: not even one row fits.
    """
    most = max(1, CPU_MICRO_BATCH_TOKENS // config.data.context_length) if device.type == "cpu" else None
    if open_objective(config).compares:  # several micro-batches take a second pass
        most = None
    for rows in _divisors(config.data.batch_rows):
        if (most is None or rows <= most) and _need(config, rows, device) <= USABLE_SHARE * available:
            return rows
    return None


def settle_micro_batch(config: Config, device: torch.device, before: Config | None = None) -> Config:
    """``config`` with micro-batch rows: as set, else as in the run so far (``before``), else chosen.

    UserError if not even one row fits.
    """
    if config.data.micro_batch_rows:
        return config
    if before is not None and before.data.micro_batch_rows in _divisors(config.data.batch_rows):
        return config.replace(micro_batch_rows=before.data.micro_batch_rows)
    available = available_memory(device)
    config = config.replace(micro_batch_rows=choose_rows(config, device, available) or 1)
    if obstacle := _obstacle(config, device, available):
        raise UserError(obstacle)
    return config


def _obstacle(config: Config, device: torch.device, available: int) -> str:
    rows = config.data.micro_batch_rows or config.data.batch_rows
    if (need := _need(config, rows, device)) <= available:
        return ""
    shortage = f"micro_batch_rows {rows} needs about {format_bytes(need)}, but {format_bytes(available)} is available"
    if fitting := choose_rows(config, device, available):
        return f"{shortage}: micro_batch_rows {fitting} would fit, with the same result"
    for layers in range(config.model.num_layers - 1, 0, -1):
        if _need(config.replace(num_layers=layers), 1, device) <= USABLE_SHARE * available:
            fits = f"num_layers {layers} would fit with micro_batch_rows 1"
            return f"{shortage}: {fits}; or choose a shorter context_length"
    return f"{shortage}: choose a smaller hidden_size or a shorter context_length"


def dry_step(model: Model, objective: Objective, config: Config, batch: Any, affordable_rows: int) -> DryStep:
    """Repeat a training step several times and measure the later ones; the weights do not change.

    The weights should be those of a new run: PyTorch's own initialization spreads the logits so far that their
    exponentials are denormal numbers, with which a CPU takes several times as long. If a whole micro-batch would take
    too long, only ``affordable_rows`` of its rows are used and the time is scaled.
    """
    device = next(model.parameters()).device
    count = len(batch)
    rows = max(1, min(config.data.micro_batch_rows or count, count, affordable_rows))
    part = batch.every(0, count // rows).rows(0, rows)
    config = config.replace(micro_batch_rows=rows)
    optimizer = Optimizer(model, config.optimizer)
    times: list[tuple[float, float]] = []
    while len(times) < MOST_PASSES:
        start = time.perf_counter()
        step_gradients(objective, model, part, config, 0)
        synchronize(device)
        between = time.perf_counter()
        optimizer.clip()
        optimizer.step(0.0)
        synchronize(device)
        times.append((between - start, time.perf_counter() - between))
        spent = np.sum(times)
        if spent > DRY_SECONDS or (spent > ENOUGH_SECONDS and len(times) >= 4):
            break
    model.zero_grad()
    # The first ones warm up; they count only if there are no others.
    passes, update = np.median(times[min(len(times) - 1, max(1, len(times) // 3)) :], axis=0)
    return DryStep(rows, float(passes * count / rows + update), peak_memory(device))


def make_plan(
    config: Config,
    model: Model,
    objective: Objective,
    batch: Any,
    device: torch.device,
    *,
    data: str,
    epochs: float | None,
    measure: bool,
    may_shrink: bool,
) -> Plan:
    """The plan of a run whose micro-batch is settled; ``measure``: include a dry step, if the run fits.

    ``model`` is on ``device``, or on the meta device if there is no dry step. ``may_shrink``: if the dry step runs out
    of memory, plan with a smaller micro-batch, which is then in the plan's config.
    """
    rows, rate = config.data.micro_batch_rows or config.data.batch_rows, machine_rate(device, config.training.precision)
    flops = objective.flops_per_token(model, config.data.context_length)
    memory = step_memory(config, rows, device)
    held = 0 if next(model.parameters()).is_meta else memory.weights
    plan = Plan(
        config,
        device,
        model.describe(),
        model.parameter_counts()["total"],
        flops,
        memory,
        process_memory(memory, device, max(0, resident_memory() - held)),
        available_memory(device) + held,
        rate,
        data,
        epochs,
    )
    if not measure or plan.obstacle:
        return plan
    affordable = int(DRY_SECONDS * rate / 2 / (flops * config.data.context_length))
    try:
        return dataclasses.replace(plan, dry_step=dry_step(model, objective, config, batch, affordable))
    except (MemoryError, RuntimeError) as error:
        smaller = [n for n in _divisors(config.data.batch_rows) if n < rows]
        if not (may_shrink and smaller and is_out_of_memory(error)):
            raise
    model.zero_grad()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    fewer = config.replace(micro_batch_rows=smaller[0])
    return make_plan(fewer, model, objective, batch, device, data=data, epochs=epochs, measure=measure, may_shrink=True)


def plan_run(config: Config, before: Config | None = None) -> Plan:
    """The plan of ``config``, or of resuming a run with the settings ``before``; nothing is written.

    Without data the vocabulary is ``vocab_size`` (UserError if it is 0), and the batch is random.
    """
    device = choose_device(config.training.device)
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    if device.type == "cpu":
        keep_freed_memory()  # as the run will
    if not config.data.data:
        config, rows = _random_rows(config)
        objective = open_objective(config)
        batch = objective.prepare(rows)
        data, epochs = "unspecified data", None
    else:
        corpora = open_training_data(config.data.data, config.data.access)
        config = settled(config, corpora)
        batches = TrainingBatches(corpora, config)
        objective, batch = batches.objective, batches.batch(0)
        data, epochs = describe_data(corpora, batches.rows), batches.rows.epochs(config.training.steps)
    may_shrink = not config.data.micro_batch_rows
    try:
        config = settle_micro_batch(config, device, before)
    except UserError:
        config = config.replace(micro_batch_rows=1)  # so that the plan has everything else
    fits = not _obstacle(config, device, available_memory(device))
    with torch.device("cpu" if fits else "meta"):
        model = objective.new_model()
    if fits:
        model.initialize(config.training.seed, output_init=config.training.output_init).to(device)
        objective.begin(model)
    return make_plan(
        config, model, objective, batch, device, data=data, epochs=epochs, measure=fits, may_shrink=may_shrink
    )


def _random_rows(config: Config) -> tuple[Config, Rows | ImageRows]:
    """Rows of a step without data, and the settings with what data would decide. UserError if a size is missing."""
    numbers = np.arange(config.data.batch_rows, dtype=np.int64)
    if config.reads_images:
        if not (size := config.model.image_size):
            raise UserError("a plan needs --data, or --image-size instead of it")
        channels = config.model.image_channels or 3
        config = sized(config, size, channels)
        if not config.objective.visual_codes:
            config = with_codes(config)
        drawn = keyed_random.uniform(0, numbers, size * size * channels) * 256
        return config, ImageRows(drawn.astype(np.uint8).reshape(-1, size, size, channels), numbers)
    if not config.model.vocab_size:
        raise UserError("a plan needs --data, or --vocab-size instead of it")
    vocabulary = Vocabulary(config.model.vocab_size, 0, 1)
    drawn = keyed_random.uniform(0, numbers, config.data.context_length + 1) * (vocabulary.size - 2)
    return config, rows_of_windows(drawn.astype(np.int64) + 2, vocabulary)


def describe_data(corpora: Corpora | ImageCorpora, rows: TrainingRows | TrainingImages) -> str:
    return f"{rows.describe()} of {corpora.name}"


def format_bytes(size: float) -> str:
    for limit, unit, name in ((1e6, 1e3, "kB"), (1e9, 1e6, "MB")):
        if size < limit:
            return f"{size / unit:.0f} {name}"
    return f"{size / 1e9:.1f} GB"


def format_flops(count: float) -> str:
    for limit, unit, name in ((1e12, 1e9, "GFLOP"), (1e15, 1e12, "TFLOP")):
        if count < limit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1e15:,.1f} PFLOP"


def format_tokens(count: int) -> str:
    return f"{count / 1e6:.1f}M tokens" if count >= 1e6 else f"{count:,} tokens"


def format_time(seconds: float) -> str:
    """``43 s``, ``12 min``, ``3.5 h`` or ``2.1 days``."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
