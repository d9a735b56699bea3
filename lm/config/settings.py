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

from data_prep.errors.wording import counted
from data_prep.files import write_atomically
from lm.config.finetune_settings import HEAD_TASKS, IMAGE_METHODS, METHODS, FinetuneConfig
from lm.config.setting import Setting, setting, shares_of
from lm.config.view_settings import ViewsConfig

if TYPE_CHECKING:
    from fractions import Fraction

# Each objective: the file of lm/objectives that makes it, and the readouts that a model can be asked for afterwards.
OBJECTIVES = {
    "next_token": ("text", ("next_token",)),
    "masked_token": ("text", ("masked_token",)),
    "masked_next_token": ("text", ("masked_next_token",)),
    "hybrid": ("text", ("next_token", "masked_next_token")),
    "hybrid_unshifted": ("text", ("next_token", "masked_token")),
    "simclr": ("simclr", ()),
    "moco": ("moco", ()),
    "byol": ("byol", ()),
    "dino": ("dino", ()),
    "dinov2": ("dinov2", ()),
    "mae": ("mae", ()),
    "beit": ("beit", ()),
}
# The objectives that learn from images, and those of them that learn from views, which text has too.
IMAGE_OBJECTIVES = ("simclr", "moco", "byol", "dino", "dinov2", "mae", "beit")
TEXT_VIEW_OBJECTIVES = ("simclr", "moco", "byol", "dino")
# The kinds of files that ``kindling predict`` and ``kindling embed`` write.
ANSWER_FILES, VECTOR_FILES = (".jsonl", ".csv", ".tsv"), (".jsonl", ".npy")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the transformer."""

    num_layers: int = setting(4, "number of transformer blocks", minimum=1, on_resume="never")
    hidden_size: int = setting(192, "width of the residual stream", minimum=8, on_resume="never")
    num_heads: int = setting(6, "number of query heads", minimum=1, on_resume="never")
    num_key_value_heads: int = setting(
        0, "number of key and value heads (grouped-query attention); 0: num_heads", minimum=0, on_resume="never"
    )
    head_size: int = setting(0, "width of one head, even; 0: hidden_size / num_heads", minimum=0, on_resume="never")
    feed_forward_size: int = setting(
        0, "width inside the feed-forward; 0: 8/3 (swiglu) or 4 (relu2) x hidden_size", minimum=0, on_resume="never"
    )
    activation: str = setting("swiglu", "feed-forward activation", choices=("swiglu", "relu2"), on_resume="never")
    qk_norm: bool = setting(False, "RMS-normalize queries and keys, per head", on_resume="never")
    tie_embeddings: bool = setting(True, "one matrix for the input embedding and the output head", on_resume="never")
    logit_softcap: float = setting(0.0, "limit logits to (-c, c) by c*tanh(x/c); 0: off", minimum=0, on_resume="never")
    dropout: float = setting(
        0.0, "dropout in embedding, attention, feed-forward", minimum=0, maximum=0.9, on_resume="never", finetuning=0.1
    )
    rope_theta: float = setting(10_000.0, "base of the rotary position frequencies", minimum=1, on_resume="never")
    norm_epsilon: float = setting(1e-6, "added to the mean square in RMSNorm", minimum=0, on_resume="never")
    vocab_size: int = setting(0, "vocabulary size; 0: that of the data's tokenizer", minimum=0, on_resume="never")
    patch_size: int = setting(
        0, "images: side of a patch in pixels, a divisor of the image size; 0: text", minimum=0, on_resume="never"
    )
    stem: str = setting(
        "linear",
        "images: what turns a patch into a vector: a linear map, which other libraries can load, or convolutions over "
        "the whole image",
        choices=("linear", "convolutional"),
        on_resume="never",
    )
    image_size: int = setting(0, "images: side in pixels; 0: that of the data", minimum=0, on_resume="never")
    image_channels: int = setting(
        0, "images: color channels, 1 or 3; 0: those of the data", minimum=0, maximum=3, on_resume="never"
    )

    @property
    def shape(self) -> str:
        """The blocks in words: "4 layers x 128 wide, 4 heads of 32, swiglu 352"."""
        layers = f"{counted(self.num_layers, 'layer')} x {self.hidden_size} wide"
        return f"{layers}, {self.num_heads} heads of {self.head_width}, {self.activation} {self.feed_forward_width}"

    @property
    def patches(self) -> int:
        """Patches of an image of ``image_size``."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_heads

    @property
    def head_width(self) -> int:
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def feed_forward_width(self) -> int:
        """``feed_forward_size``, or the usual multiple of ``hidden_size``, rounded up to a multiple of 32."""
        multiple = {"swiglu": 8 / 3, "relu2": 4}[self.activation]
        return self.feed_forward_size or -(-int(multiple * self.hidden_size) // 32) * 32


@dataclass(frozen=True)
class DataConfig:
    """Which tokens, and how many at a time."""

    data: tuple[str, ...] = setting(
        (),
        "folders of token shards, made by kindling prep build; with several, FOLDER@WEIGHT sets a folder's "
        "share of the rows (weight 1 if omitted)",
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

    @property
    def batch_rows(self) -> int:
        """Rows, or images, of a step."""
        return self.batch_images or self.batch_tokens // self.context_length


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the model learns to predict."""

    objective: str = setting(
        "hybrid",
        "what the model learns; on text also one that predicts tokens and one that compares views, each with its share "
        "of the rows: hybrid:0.75,simclr:0.25",
        choices=tuple(OBJECTIVES),
        mixture=True,
    )
    masked_fraction: float = setting(
        0.5, "hybrid objectives: share of the rows that are masked and read bidirectionally", minimum=0, maximum=1
    )
    mask_rate: float = setting(0.3, "share of a masked row's tokens to predict", minimum=0.01, maximum=1)
    mask_token_share: float = setting(0.8, "share of predicted tokens that become the mask token", minimum=0, maximum=1)
    random_token_share: float = setting(
        0.1, "share of predicted tokens that become a random token; the rest is unchanged", minimum=0, maximum=1
    )
    validation_mask_rate: float = setting(
        0.15, "share of the tokens hidden at once when validating the masked readout", minimum=0.01, maximum=1
    )

    infonce_temperature: float = setting(
        0.2, "simclr, moco: cosine similarities are divided by this", minimum=0.001, maximum=100
    )
    projection_size: int = setting(
        128, "simclr, moco, byol, dino, dinov2: width of the vectors that are compared", minimum=2, on_resume="never"
    )
    projection_hidden_size: int = setting(
        512, "simclr, moco, byol, dino, dinov2: width inside the projection head", minimum=2, on_resume="never"
    )
    queue_size: int = setting(
        0,
        "moco: the teacher's vectors of earlier steps that are compared too; 0: none (MoCo v3)",
        minimum=0,
        on_resume="never",
    )
    teacher_momentum: float = setting(
        0.99,
        "moco, byol, dino, dinov2: share of the teacher's weights that a step keeps; it rises to 1 along a cosine",
        minimum=0,
        maximum=1,
    )
    prototypes: int = setting(1024, "dino, dinov2: number of prototypes", minimum=2, on_resume="never")
    student_temperature: float = setting(0.1, "dino, dinov2: the student's scores are divided by this", minimum=0.001)
    teacher_temperature: float = setting(0.04, "dino, dinov2: the teacher's scores are divided by this", minimum=0.001)
    first_teacher_temperature: float = setting(
        0.04, "dino, dinov2: teacher_temperature at the start, from where it rises linearly", minimum=0.001
    )
    teacher_warmup: float = setting(
        0.1, "dino, dinov2: share of the steps after which teacher_temperature is reached", minimum=0, maximum=1
    )
    center_momentum: float = setting(
        0.9, "dino, dinov2: share of the center of the teacher's scores that a step keeps", minimum=0, maximum=1
    )
    prototypes_frozen: float = setting(
        0.01, "dino, dinov2: share of the steps, at the start, in which prototypes do not change", minimum=0, maximum=1
    )
    centering: str = setting(
        "auto",
        "dino, dinov2: what keeps the teacher from one prototype for all: mean subtracts a moving average, sinkhorn "
        "balances each batch; auto: mean for dino, sinkhorn for dinov2",
        choices=("auto", "mean", "sinkhorn"),
    )
    ibot_weight: float = setting(
        1.0, "dinov2: weight of the loss of patches (patch_mask_rate) that are hidden from the student", minimum=0
    )
    koleo_weight: float = setting(0.1, "dinov2: weight of the loss that spreads features out", minimum=0)
    local_views: int = setting(
        4, "dino, dinov2: smaller views of each image that only the student sees", minimum=0, maximum=64
    )
    local_size: int = setting(
        0, "dino, dinov2: side of the smaller views in pixels, a multiple of patch_size; 0: half the image's", minimum=0
    )
    local_area: float = setting(
        0.05,
        "dino, dinov2: smallest share of the image's area in a smaller view; the largest is crop_area",
        minimum=0.01,
        maximum=1,
    )
    patch_mask_rate: float = setting(
        0.75, "mae, beit: share of an image's patches that are hidden and predicted", minimum=0.01, maximum=0.99
    )
    visual_tokenizer: str = setting("", "beit: folder of visual tokens whose codes are predicted", on_resume="never")
    visual_codes: int = setting(
        0, "beit: number of codes; 0: those of visual_tokenizer", minimum=0, maximum=2**15, on_resume="never"
    )
    normalize_patches: bool = setting(
        True, "mae: predict the pixels of a patch after normalizing them by their own mean and variance"
    )
    decoder_layers: int = setting(2, "mae: blocks of the decoder", minimum=1, on_resume="never")
    decoder_size: int = setting(96, "mae: width of the decoder, in heads of 32", minimum=32, on_resume="never")

    @property
    def shares(self) -> dict[str, Fraction]:
        """The objectives that ``objective`` names, with their shares of the rows."""
        return shares_of(self.objective)

    @property
    def validation_folds(self) -> int:
        """The number of passes in which a masked readout hides every token once."""
        return round(1 / self.validation_mask_rate)


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are updated."""

    optimizer: str = setting(
        "muon",
        "muon: Muon for the matrices inside the blocks and AdamW for the rest; adamw: AdamW for everything",
        choices=("muon", "adamw"),
        on_resume="never",
        finetuning="adamw",
    )
    learning_rate: float = setting(0.01, "peak learning rate of AdamW", minimum=0, finetuning=METHODS["full"])
    muon_learning_rate: float = setting(0.02, "peak learning rate of Muon", minimum=0, finetuning=0.002)
    weight_decay: float = setting(
        0.1, "decoupled weight decay of the matrices, multiplied by the learning rate", minimum=0, finetuning=0.01
    )
    beta1: float = setting(0.9, "AdamW: decay of the mean gradient", minimum=0, maximum=0.9999)
    beta2: float = setting(
        0.95, "AdamW: decay of the mean squared gradient", minimum=0, maximum=0.99999, finetuning=0.98
    )
    final_weight_decay: float = setting(
        1.0,
        "weight decay at the end, as a multiple of weight_decay, reached along a cosine (DINO: 10)",
        minimum=0,
        finetuning=1.0,
    )
    stem_learning_rate: float = setting(
        1.0, "learning rate of the embedding, or of the patch embedding, as a multiple of the others'", minimum=0
    )
    head_learning_rate: float = setting(
        1.0,
        "learning rate of the head of an objective on images or views, or of a task, as a multiple of the others'",
        minimum=0,
    )
    layer_decay: float = setting(
        1.0,
        "learning rate of each block as a share of that of the block above it",
        minimum=0.1,
        maximum=1,
        once_in="finetune",
    )
    momentum: float = setting(0.95, "Muon: decay of the momentum", minimum=0, maximum=0.9999)
    gradient_clip: float = setting(1.0, "largest norm of the whole gradient; 0: off", minimum=0)
    spike_threshold: float = setting(
        8.0, "skip a step whose loss is this many standard deviations above the running mean; 0: off", minimum=0
    )
    warmup_fraction: float = setting(
        0.02, "linear warmup, as a share of the steps", minimum=0, maximum=1, finetuning=0.1
    )
    decay_fraction: float = setting(
        0.7, "linear decay at the end, as a share of the steps", minimum=0, maximum=1, finetuning=0.9
    )
    final_learning_rate_fraction: float = setting(
        0.0, "learning rate at the end of the decay, as a share of the peak", minimum=0, maximum=1
    )


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
        "auto",
        "precision of matrix products; auto: bfloat16 on a GPU that supports it, else float32",
        choices=("auto", "float32", "bfloat16"),
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
        return tuple(readout for name in self.objective.shares for readout in OBJECTIVES[name][1])

    def predicting(self) -> Config:
        """These settings, with nothing but the objective that predicts tokens."""
        return self.replace(objective=next(name for name in self.objective.shares if OBJECTIVES[name][1]))

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
