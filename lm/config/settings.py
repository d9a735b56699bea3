"""Every setting of a run, in one place: its meaning, unit, default, limits, and whether a resumed run may change it.

Setting names are unique across sections, so the command line needs no prefixes. ``recipes`` reads recipe files and
command lines into these dataclasses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.files import write_atomically
from lm.config.finetune_settings import HEAD_TASKS, IMAGE_METHODS, METHODS, FinetuneConfig
from lm.config.model_settings import ModelConfig
from lm.config.objective_settings import IMAGE_OBJECTIVES, OBJECTIVES, ObjectiveConfig
from lm.config.optimizer_settings import OptimizerConfig
from lm.config.setting import Setting, setting
from lm.config.view_settings import ViewsConfig

if TYPE_CHECKING:
    from data_prep.shards.remote import Access

# The kinds of files that ``kindling predict`` and ``kindling embed`` write.
ANSWER_FILES, VECTOR_FILES = (".jsonl", ".csv", ".tsv"), (".jsonl", ".npy")


@dataclass(frozen=True)
class DataConfig:
    """Which tokens, and how many at a time."""

    data: tuple[str, ...] = setting(
        (),
        "folders of shards made by kindling prep build, or URLs; a URL begins with s3:// or https://; with several, "
        "FOLDER@WEIGHT sets a folder's share of the rows (weight 1 if omitted)",
        on_resume="free",
    )
    packing: str = setting(
        "windows",
        "windows: cut rows from the token stream one after another; documents: pack whole documents into rows and cut "
        "only those longer than a row",
        choices=("windows", "documents"),
        on_resume="never",
    )
    context_length: int = setting(256, "tokens per row", minimum=2, maximum=2**30, on_resume="never")
    batch_tokens: int = setting(
        8192, "tokens per step, a multiple of context_length", minimum=2, maximum=2**30, on_resume="never"
    )
    batch_images: int = setting(
        0,
        "images per step; context_length and batch_tokens follow from it, a patch being a token (0: text)",
        minimum=0,
        maximum=2**20,
        on_resume="never",
    )
    micro_batch_rows: int = setting(
        0,
        "rows per forward pass; 0: as many as fit into memory (CPU: at most 4,096 tokens)",
        minimum=0,
        on_resume="free",
    )
    verify_data: bool = setting(True, "check all data against its checksums before the first step", on_resume="free")
    data_cache: str = setting(
        "",
        "folder that keeps blocks of data read from URLs; runs and processes may share it; empty: kindling/data in the "
        "user's folder for caches",
        on_resume="free",
    )
    data_cache_gb: float = setting(
        10.0, "size in GB (10^9 bytes) up to which that folder grows", minimum=0.02, maximum=10**6, on_resume="free"
    )
    data_timeout: float = setting(
        60.0, "seconds after which a request for data at a URL has failed", minimum=1, maximum=3600, on_resume="free"
    )
    data_retries: int = setting(
        10,
        "attempts after such a failure, 1, 2, 4, ... and at most 60 seconds apart, before the run ends",
        minimum=0,
        maximum=10**6,
        on_resume="free",
    )

    @property
    def access(self) -> Access:
        """How data at URLs is read."""
        from data_prep.shards.remote import Access  # here, because --help should be quick

        return Access(self.data_cache, round(self.data_cache_gb * 10**9), self.data_retries, self.data_timeout)

    @property
    def batch_rows(self) -> int:
        """Rows, or images, of a step."""
        return self.batch_images or self.batch_tokens // self.context_length


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how often, and on which device."""

    steps: int = setting(
        1000, "optimizer steps of the whole run", minimum=1, maximum=10**12, on_resume="free", pretraining_only=True
    )
    init_from: str = setting(
        "",
        "run whose newest weights to start from; for example to continue with other data; empty: random weights",
        on_resume="never",
        pretraining_only=True,
    )
    seed: int = setting(
        0, "random seed; for weights, data order, masking and dropout", minimum=0, maximum=2**63 - 1, on_resume="never"
    )
    output_init: float = setting(
        0.0,
        "initial standard deviation of the matrices that end the halves of a block (attention output, feed-forward "
        "down), as a multiple of 1 / sqrt(hidden_size); 0: zero, so that each block starts as the identity",
        minimum=0,
        maximum=100,
        on_resume="never",
        pretraining_only=True,
    )
    average_last: float = setting(
        0.0,
        "keep the mean of the weights over this share of the steps, the last ones, for --checkpoint average; 0: off",
        minimum=0,
        maximum=1,
    )
    log_every: int = setting(10, "steps between lines of metrics.jsonl", minimum=1, on_resume="free")
    validate_every: int = setting(250, "steps between validations", minimum=1, on_resume="free", pretraining_only=True)
    validation_rows: int = setting(
        128, "rows per validation, always the same ones; 0: all", minimum=0, on_resume="free", pretraining_only=True
    )
    checkpoint_every: int = setting(250, "steps between checkpoints", minimum=1, on_resume="free", finetuning=200)
    keep_checkpoints: int = setting(
        2, "number of newest checkpoints to keep, in addition to the best", minimum=1, on_resume="free", finetuning=1
    )
    keep_every: int = setting(
        0, "steps between permanent checkpoints, a multiple of checkpoint_every; 0: none", minimum=0, on_resume="free"
    )
    device: str = setting(
        "auto", "device; auto: a GPU if there is one", choices=("auto", "cpu", "cuda", "mps"), on_resume="free"
    )
    precision: str = setting(
        "native",
        "precision of matrix products; native: bfloat16 on a GPU that supports it, and in the steps of a CPU that does "
        "(AVX512-BF16), else float32; auto: as native on a GPU, float32 on a CPU",
        choices=("native", "auto", "float32", "bfloat16"),
        on_resume="free",
    )
    compile: bool = setting(
        False,
        "torch.compile the model, which takes half a minute; a GPU then trains a third faster, a CPU does not",
        on_resume="free",
        pretraining_only=True,
    )
    threads: int = setting(
        0,
        "CPU threads; 0: PyTorch's default, or an equal share of the cores per process",
        minimum=0,
        maximum=4096,
        on_resume="free",
    )
    parallel: str = setting(
        "ddp",
        "with several processes (torchrun), ddp: each holds the whole model; fsdp: each holds a slice of every weight, "
        "its gradient and its optimizer state",
        choices=("ddp", "fsdp"),
        on_resume="free",
        pretraining_only=True,
    )
    fsdp_reshard: str = setting(
        "auto",
        "with fsdp, free gathered weights after each pass of a block (pass), or after each optimizer step (step): that "
        "exchanges less and takes 8 bytes per parameter more; auto: step if these are at most a fifth of the memory",
        choices=("auto", "pass", "step"),
        on_resume="free",
        pretraining_only=True,
    )
    sharded_checkpoints: str = setting(
        "auto",
        "with fsdp, each process writes its own slices of a checkpoint; auto: if the first one has too little memory "
        "to put it together",
        choices=("auto", "always", "never"),
        on_resume="free",
        pretraining_only=True,
    )
    trackers: tuple[str, ...] = setting(
        (), "send each line of metrics.jsonl here too", choices=("tensorboard", "wandb", "trackio"), on_resume="free"
    )


@dataclass(frozen=True)
class ReportConfig:
    """Samples to show in the report."""

    prompts: tuple[str, ...] = setting(
        (), 'texts to continue in report.html (a list in a recipe, --prompts \'["a", "b"]\' here)', on_resume="free"
    )
    fills: tuple[str, ...] = setting((), "texts with [MASK] to fill in report.html", on_resume="free")


@dataclass(frozen=True)
class Config:
    """All settings of a run. ``config.toml`` in a run directory is exactly this, as text."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)

    @property
    def readouts(self) -> tuple[str, ...]:
        """The readouts of a model with this objective, the causal one first."""
        found = dict.fromkeys(readout for name in self.objective.shares for readout in OBJECTIVES[name][1])
        return tuple(sorted(found, key=lambda readout: readout != "next_token"))

    def predicting(self) -> Config:
        """These settings, with nothing but the objectives that predict tokens."""
        shares = {name: share for name, share in self.objective.shares.items() if OBJECTIVES[name][1]}
        whole = sum(shares.values())
        mixed = ",".join(f"{name}:{share / whole}" for name, share in shares.items())
        return self.replace(objective=mixed if len(shares) > 1 else next(iter(shares)))

    @property
    def predicts_tokens(self) -> bool:
        """Whether an objective predicts tokens, instead of comparing views or reading images."""
        return not set(self.objective.shares) <= set(IMAGE_OBJECTIVES)

    @property
    def writes_by_unmasking(self) -> bool:
        """Whether the model continues a text by filling masks in rounds, having no other readout to do so."""
        return "diffusion" in self.objective.shares and "next_token" not in self.readouts

    @property
    def reads_images(self) -> bool:
        """Whether the model reads images instead of text."""
        return self.model.patch_size > 0

    @property
    def is_finetuning(self) -> bool:
        return self.finetune.task != "none"

    @property
    def has_task_head(self) -> bool:
        """Whether the model has a task's head instead of a language model's, and so generates no text."""
        return self.finetune.task in HEAD_TASKS

    def replace(self, **settings: Any) -> Config:
        """Return a copy with some settings changed by name: ``config.replace(steps=10, hidden_size=64)``."""
        owners = {s.name: s.section for s in all_settings()}
        changed: dict[str, dict[str, Any]] = {}
        for name, value in settings.items():
            changed.setdefault(owners[name], {})[name] = value
        return dataclasses.replace(
            self,
            **{section: dataclasses.replace(getattr(self, section), **values) for section, values in changed.items()},
        )

    def flat(self) -> dict[str, Any]:
        """The value of every setting, by name."""
        return {s.name: getattr(getattr(self, s.section), s.name) for s in all_settings()}

    def to_toml(self) -> str:
        import tomli_w

        sections = dataclasses.asdict(self)
        for section in ("views", "finetune"):
            if getattr(self, section) == getattr(Config(), section):
                del sections[section]
        return tomli_w.dumps(sections, multiline_strings=False)

    def save(self, path: Path) -> None:
        write_atomically(path, self.to_toml())


def all_settings() -> Iterator[Setting]:
    """Every setting, section by section, in the order of the dataclasses."""
    for section in dataclasses.fields(Config):
        for f in dataclasses.fields(section.default_factory):  # type: ignore[arg-type]
            yield Setting(f.name, section.name, f.default, **f.metadata)


def pretraining_settings() -> list[Setting]:
    """The settings of pretraining."""
    return [setting for setting in all_settings() if setting.section != "finetune"]


def finetuning_settings() -> list[Setting]:
    """The settings of fine-tuning with its own defaults, those of the task first; all others come from the base run."""
    sections = ("finetune", "optimizer", "training", "views")
    own = [s for s in all_settings() if s.section in sections or s.name == "dropout"]
    own = [s for s in own if s.name != "base" and not s.pretraining_only]
    by_method = f"; the default by method: {', '.join(f'{name} {rate:g}' for name, rate in METHODS.items())}"
    by_method += f" (full on images: {IMAGE_METHODS['full']:g})"
    return [
        dataclasses.replace(
            s,
            default=s.default if s.finetuning is None else s.finetuning,
            help=s.help + {"learning_rate": by_method, "dropout": "; for images the default is 0"}.get(s.name, ""),
        )
        for s in sorted(own, key=lambda s: s.section != "finetune")
    ]


def finetuning_defaults(*, images: bool = False) -> dict[str, Any]:
    """The defaults that differ in fine-tuning, by name; ``learning_rate`` is that of the method "full".

    Views are for ``images`` only, which vary enough without dropout.
    """
    different = {s.name: s.finetuning for s in all_settings() if s.finetuning is not None}
    if images:
        return different | {"dropout": 0.0}
    return {s.name: different[s.name] for s in all_settings() if s.name in different and s.section != "views"}


def usual_reading(config: Config) -> str:
    """The attention for reading texts: "bidirectional" if the run was trained to fill masks, else "causal"."""
    return "causal" if config.readouts == ("next_token",) else "bidirectional"


def usual_pooling(reads: str) -> str:
    """The pooling for this attention: "last" if only the last token has seen the whole text, else "mean"."""
    return "last" if reads == "causal" else "mean"
