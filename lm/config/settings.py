"""Every setting of a run, in one place: its meaning, unit, default and limits.

Setting names are unique over all sections, so that the command line needs no prefixes. ``recipes`` reads recipe
files and command lines into these dataclasses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import tomli_w

from data_prep.files import write_atomically

# Tasks of fine-tuning: the first four have a head of their own (``lm.finetuning.heads``).
HEAD_TASKS = ("classification", "regression", "tokens", "choice")
TASKS = (*HEAD_TASKS, "instruction", "contrastive")
# Each objective, and the readouts that a model can be asked for after training with it.
READOUTS = {
    "next_token": ("next_token",),
    "masked_token": ("masked_token",),
    "masked_next_token": ("masked_next_token",),
    "hybrid": ("next_token", "masked_next_token"),
    "hybrid_unshifted": ("next_token", "masked_token"),
}


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field with its explanation and limits (both inclusive); the default's type is the setting's type."""
    return field(default=default, metadata={"help": help, "minimum": minimum, "maximum": maximum, "choices": choices})


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the transformer."""

    num_layers: int = setting(4, "transformer blocks", minimum=1)
    hidden_size: int = setting(192, "width of the residual stream", minimum=8)
    num_heads: int = setting(6, "query heads of each attention", minimum=1)
    num_key_value_heads: int = setting(0, "key and value heads (grouped-query attention); 0: num_heads", minimum=0)
    head_size: int = setting(0, "width of one head, even; 0: hidden_size / num_heads", minimum=0)
    feed_forward_size: int = setting(
        0, "inner width of the feed-forward; 0: 8/3 (swiglu) or 4 (relu2) x hidden_size", minimum=0
    )
    activation: str = setting("swiglu", "feed-forward activation", choices=("swiglu", "relu2"))
    qk_norm: bool = setting(False, "RMS-normalise each query and key head")
    tie_embeddings: bool = setting(True, "one matrix for the input embedding and the output head")
    logit_softcap: float = setting(0.0, "squash logits into (-c, c) by c*tanh(x/c); 0: off", minimum=0)
    dropout: float = setting(
        0.0, "share of activations dropped after the embedding, attention and feed-forward", minimum=0, maximum=0.9
    )
    rope_theta: float = setting(10_000.0, "base of the rotary position frequencies", minimum=1)
    norm_epsilon: float = setting(1e-6, "added to the mean square in RMSNorm", minimum=0)
    vocab_size: int = setting(0, "tokens in the vocabulary; 0: as many as the data's tokenizer has", minimum=0)

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_heads

    @property
    def head_width(self) -> int:
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def feed_forward_width(self) -> int:
        """As set, or the usual multiple of the width, rounded up to a multiple of 32."""
        multiple = {"swiglu": 8 / 3, "relu2": 4}[self.activation]
        return self.feed_forward_size or -(-int(multiple * self.hidden_size) // 32) * 32


@dataclass(frozen=True)
class DataConfig:
    """Which tokens, and how many at a time."""

    data: tuple[str, ...] = setting(
        (),
        "folders of token shards, made by: python -m data_prep build; FOLDER@WEIGHT gives several their shares of the "
        "rows (weight 1 if not said)",
    )
    packing: str = setting(
        "windows",
        "windows: rows are cut from the stream side by side; documents: whole documents are packed into rows, and only "
        "those longer than a row are cut",
        choices=("windows", "documents"),
    )
    context_length: int = setting(256, "tokens of one row", minimum=2)
    batch_tokens: int = setting(8192, "tokens of one optimizer step, a multiple of context_length", minimum=2)
    micro_batch_rows: int = setting(
        0, "rows of one forward pass; 0: chosen, as many as fit into memory (on a CPU up to 4,096 tokens)", minimum=0
    )
    verify_data: bool = setting(True, "compare all of the data with its checksums before the first step")

    @property
    def batch_rows(self) -> int:
        return self.batch_tokens // self.context_length


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the model learns to predict."""

    objective: str = setting("hybrid", "what is predicted", choices=tuple(READOUTS))
    masked_fraction: float = setting(
        0.5, "hybrid objectives: share of the rows that are masked and read both ways", minimum=0, maximum=1
    )
    mask_rate: float = setting(0.3, "share of a masked row's tokens to predict", minimum=0.01, maximum=1)
    mask_token_share: float = setting(0.8, "share of those that are replaced by the mask token", minimum=0, maximum=1)
    random_token_share: float = setting(
        0.1, "share of those that are replaced by a random token; the rest stays as it is", minimum=0, maximum=1
    )
    validation_mask_rate: float = setting(
        0.15, "share of tokens hidden at once when the masked readout is validated", minimum=0.01, maximum=1
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights move."""

    optimizer: str = setting(
        "muon",
        "muon: Muon for the matrices inside the blocks, AdamW for the rest; adamw: AdamW for all",
        choices=("muon", "adamw"),
    )
    learning_rate: float = setting(0.01, "peak learning rate of AdamW", minimum=0)
    muon_learning_rate: float = setting(0.02, "peak learning rate of Muon", minimum=0)
    weight_decay: float = setting(0.1, "decoupled decay of the matrices, per step and unit of learning rate", minimum=0)
    beta1: float = setting(0.9, "AdamW: decay of the mean of the gradient", minimum=0, maximum=0.9999)
    beta2: float = setting(0.95, "AdamW: decay of the mean of its square", minimum=0, maximum=0.99999)
    momentum: float = setting(0.95, "Muon: decay of the momentum", minimum=0, maximum=0.9999)
    gradient_clip: float = setting(1.0, "largest norm of the whole gradient; 0: off", minimum=0)
    spike_threshold: float = setting(
        8.0,
        "a step whose loss is this many standard deviations above the running mean is left out; 0: none is",
        minimum=0,
    )
    warmup_fraction: float = setting(
        0.02, "first share of the steps, over which the learning rate rises linearly", minimum=0, maximum=1
    )
    decay_fraction: float = setting(
        0.7, "last share of the steps, over which the learning rate falls linearly", minimum=0, maximum=1
    )
    final_learning_rate_fraction: float = setting(
        0.0, "learning rate at the end of the decay, as a share of the peak", minimum=0, maximum=1
    )


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how often, and on what."""

    steps: int = setting(1000, "optimizer steps of the whole run", minimum=1)
    init_from: str = setting("", "run whose newest weights are trained further, with other data say; empty: drawn ones")
    seed: int = setting(0, "of the weights, the order of the data, masking and dropout", minimum=0, maximum=2**63 - 1)
    log_every: int = setting(10, "steps between lines of metrics.jsonl", minimum=1)
    validate_every: int = setting(250, "steps between validations", minimum=1)
    validation_rows: int = setting(
        128, "rows of each validation, the same ones every time; 0: the whole split", minimum=0
    )
    checkpoint_every: int = setting(250, "steps between checkpoints", minimum=1)
    keep_checkpoints: int = setting(
        2, "newest checkpoints that are kept, beside that of the best validation", minimum=1
    )
    keep_every: int = setting(
        0, "steps between checkpoints that are kept for good, a multiple of checkpoint_every; 0: none are", minimum=0
    )
    device: str = setting(
        "auto", "where to compute; auto: a GPU if there is one", choices=("auto", "cpu", "cuda", "mps")
    )
    precision: str = setting(
        "auto",
        "of the matrix products; auto: bfloat16 on a GPU that has it, else float32",
        choices=("auto", "float32", "bfloat16"),
    )
    compile: bool = setting(
        False, "torch.compile the model, which takes half a minute: a GPU then trains a third faster, a CPU does not"
    )
    threads: int = setting(
        0, "CPU threads; 0: PyTorch's choice, or each of several processes its share of the cores", minimum=0
    )
    parallel: str = setting(
        "ddp",
        "several processes (torchrun): ddp: each holds the whole model; fsdp: each holds a slice of every weight, its "
        "gradient and its optimizer's state",
        choices=("ddp", "fsdp"),
    )
    trackers: tuple[str, ...] = setting(
        (), "where each line of metrics.jsonl goes too", choices=("tensorboard", "wandb", "trackio")
    )


@dataclass(frozen=True)
class ReportConfig:
    """What the report shows the model doing."""

    prompts: tuple[str, ...] = setting(
        (), 'texts to continue in report.html (a list in a recipe, --prompts \'["a", "b"]\' here)'
    )
    fills: tuple[str, ...] = setting((), "texts with [MASK] to fill in report.html")


@dataclass(frozen=True)
class FinetuneConfig:
    """A task that a pretrained run is fine-tuned on; a run without a task is pretraining, and has no such section."""

    task: str = setting("none", "what is learned; none: pretraining", choices=("none", *TASKS))
    base: str = setting("", "pretrained run whose newest weights, tokenizer and shape are taken")
    weights: str = setting(
        "pretrained", "weights to begin with; random: the same shape, untrained", choices=("pretrained", "random")
    )
    train: str = setting("", "examples to learn from: .jsonl, .csv, .tsv or .parquet, or hf:NAME[:SPLIT]")
    validation: str = setting("", "examples to choose the best step by; empty: none")
    text_column: str = setting("text", "column of the text")
    text_pair_column: str = setting(
        "auto", "column of the second text of a pair; auto: text_pair, if the file has it; empty: there is none"
    )
    label_column: str = setting("label", "column of the answer")
    choices_column: str = setting("choices", "choice: column with the list of choices, or several as in a,b,c")
    words_column: str = setting("words", "tokens: column of the words, a list or text with spaces")
    tags_column: str = setting("tags", "tokens: column of the words' labels")
    prompt_column: str = setting("prompt", "instruction: column of what the user says")
    response_column: str = setting("response", "instruction: column of what the model should say")
    chat_template: str = setting(
        "", "instruction: file with a Jinja template of conversations; empty: plain turns, User: and Assistant:"
    )
    reads: str = setting(
        "auto",
        "how texts are read; auto: bidirectionally if the base was trained to fill masks, else causally",
        choices=("auto", "bidirectional", "causal"),
    )
    pooling: str = setting(
        "auto",
        "what stands for a text: the mean of its tokens' hidden states, or the last one; auto: mean where texts are "
        "read bidirectionally, else last",
        choices=("auto", "mean", "last"),
    )
    long_texts: str = setting(
        "truncate",
        "texts longer than the context: truncate keeps the beginning, window averages windows side by side; pairs that "
        "are read together are always truncated, the longer text first",
        choices=("truncate", "window"),
    )
    pairs: str = setting(
        "apart",
        "of a classification or regression: apart: each text is read by itself, and the head sees both vectors, their "
        "difference and their product; together: a pair is one document, in which each text sees the other",
        choices=("apart", "together"),
    )
    method: str = setting(
        "full",
        "what learns: full: all weights; lora: low-rank additions to matrices; probe: the head alone",
        choices=("full", "lora", "probe"),
    )
    lora_rank: int = setting(8, "lora: rank of the additions", minimum=1)
    lora_alpha: float = setting(16.0, "lora: the additions are multiplied by this, divided by the rank", minimum=0)
    lora_matrices: tuple[str, ...] = setting(
        ("query", "key", "value", "output", "gate", "up", "down"),
        "lora: the matrices of each block that have additions",
        choices=("query", "key", "value", "output", "gate", "up", "down"),
    )
    epochs: float = setting(3.0, "passes over the training examples", minimum=0.01)
    batch_examples: int = setting(32, "examples of one optimizer step", minimum=1)
    micro_batch_tokens: int = setting(
        4096, "tokens of one forward pass, at most (or one example); without dropout the result is the same", minimum=1
    )
    validations_per_epoch: float = setting(1.0, "validations in one pass over the training examples", minimum=0.01)
    patience: int = setting(0, "validations in a row without a new best after which it ends; 0: never", minimum=0)
    judged_by: str = setting(
        "auto",
        "metric whose best validation is kept; auto: accuracy, spearman for a regression and contrastive, loss for "
        "instructions",
        choices=("auto", "loss", "accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman"),
    )
    layer_decay: float = setting(
        1.0, "learning rate of each block as a share of that of the block above it", minimum=0.1, maximum=1
    )
    class_weights: str = setting(
        "none", "weights of the classes in the loss; balanced: all classes count alike", choices=("none", "balanced")
    )
    temperature: float = setting(0.05, "contrastive: cosines are divided by this", minimum=0.001)
    label_smoothing: float = setting(0.0, "share of the answer that is spread over all classes", minimum=0, maximum=0.9)


@dataclass(frozen=True)
class Config:
    """A whole run. ``config.toml`` in a run directory is exactly this, as text."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)

    @property
    def readouts(self) -> tuple[str, ...]:
        """What the model can be asked for, by its objective: the causal readout, if there is one, comes first."""
        return READOUTS[self.objective.objective]

    @property
    def is_finetuning(self) -> bool:
        return self.finetune.task != "none"

    @property
    def has_task_head(self) -> bool:
        """Whether the model answers a task with a head of its own, and so writes no text."""
        return self.finetune.task in HEAD_TASKS

    def replace(self, **settings: Any) -> Config:
        """A copy with some settings changed, by their names: ``config.replace(steps=10, hidden_size=64)``."""
        owners = {s.name: s.section for s in all_settings()}
        sections = {owners[name] for name in settings}
        changed = {
            section: dataclasses.replace(
                getattr(self, section), **{name: value for name, value in settings.items() if owners[name] == section}
            )
            for section in sections
        }
        return dataclasses.replace(self, **changed)

    def flat(self) -> dict[str, Any]:
        """Every setting by its name."""
        return {s.name: getattr(getattr(self, s.section), s.name) for s in all_settings()}

    def to_toml(self) -> str:
        sections = dataclasses.asdict(self)
        if self.finetune == FinetuneConfig():
            del sections["finetune"]
        return tomli_w.dumps(sections, multiline_strings=False)

    def save(self, path: Path) -> None:
        write_atomically(path, self.to_toml())


@dataclass(frozen=True)
class Setting:
    """One setting as the command line and the recipe see it."""

    name: str
    section: str
    default: Any
    help: str
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The word for its type in help and messages."""
        return {bool: "true|false", int: "integer", float: "number", str: "text", tuple: "list of texts"}[
            type(self.default)
        ]

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")


def all_settings() -> Iterator[Setting]:
    """Every setting, section by section, in the order of the dataclasses."""
    for section in dataclasses.fields(Config):
        for f in dataclasses.fields(section.default_factory):  # type: ignore[arg-type]
            yield Setting(f.name, section.name, f.default, **f.metadata)


def pretraining_settings() -> list[Setting]:
    """The settings of a run that is no fine-tuning."""
    return [setting for setting in all_settings() if setting.section != "finetune"]


def corpus_of(text: str) -> tuple[str, Fraction]:
    """Path and weight of one entry of the setting ``data``: ``PATH`` (weight 1) or ``PATH@WEIGHT``."""
    path, at, weight = text.rpartition("@")
    try:
        return (path, Fraction(weight)) if at else (text, Fraction(1))
    except (ValueError, ZeroDivisionError):
        return text, Fraction(1)  # the "@" belongs to the path


def inconsistencies(config: Config) -> list[str]:
    """What cannot be true together, one sentence each."""
    model, data, optimizer = config.model, config.data, config.optimizer
    problems = []
    if not model.head_size and model.hidden_size % model.num_heads:
        problems.append(
            f"hidden_size {model.hidden_size} is not divisible by num_heads {model.num_heads}: "
            "change one of them, or set head_size"
        )
    elif model.head_width % 2:
        problems.append(
            f"a head is {model.head_width} wide, but rotary positions need an even width: change num_heads or head_size"
        )
    if model.num_heads % model.key_value_heads:
        problems.append(
            f"num_heads {model.num_heads} is not divisible by num_key_value_heads {model.num_key_value_heads}"
        )
    if data.batch_tokens % data.context_length:
        nearest = max(1, round(data.batch_tokens / data.context_length)) * data.context_length
        problems.append(
            f"batch_tokens {data.batch_tokens} is not a multiple of context_length {data.context_length}: "
            f"the nearest is {nearest}"
        )
    elif data.micro_batch_rows and data.batch_rows % data.micro_batch_rows:
        problems.append(f"micro_batch_rows {data.micro_batch_rows} does not divide the batch's {data.batch_rows} rows")
    if config.training.keep_every % config.training.checkpoint_every:
        problems.append(
            f"keep_every {config.training.keep_every} is not a multiple of checkpoint_every "
            f"{config.training.checkpoint_every}: no checkpoint is made at those steps"
        )
    problems += [f'data: the weight of "{text}" must be above 0' for text in data.data if corpus_of(text)[1] <= 0]
    problems += [
        f'fills: there is no [MASK] in "{text}": write it where a word is missing'
        for text in config.report.fills
        if "[MASK]" not in text
    ]
    if config.objective.mask_token_share + config.objective.random_token_share > 1:
        problems.append("mask_token_share and random_token_share add up to more than 1")
    if optimizer.warmup_fraction + optimizer.decay_fraction > 1:
        problems.append("warmup_fraction and decay_fraction add up to more than 1")
    return problems + _inconsistencies_of_task(config)


def _inconsistencies_of_task(config: Config) -> list[str]:
    task = config.finetune
    problems = []
    if task.task == "instruction" and task.method == "probe":
        problems.append("method probe trains a task's head, and instruction tuning has none: choose full or lora")
    if task.task == "instruction" and task.reads == "bidirectional":
        problems.append("instruction tuning teaches to write, so texts are read causally: leave reads out")
    if task.judged_by in ("pearson", "spearman") and task.task in ("classification", "tokens", "choice"):
        problems.append(f"judged_by {task.judged_by} is for a regression: choose accuracy, or loss")
    if task.task == "contrastive" and task.method == "probe":
        problems.append("method probe trains a task's head, and contrastive training has none: choose full or lora")
    if task.task == "contrastive" and task.judged_by not in ("auto", "pearson", "spearman"):
        problems.append(f"judged_by {task.judged_by} is not measured in contrastive training: choose auto, or pearson")
    if task.judged_by not in ("auto", "loss", "pearson", "spearman") and task.task == "regression":
        problems.append(f"judged_by {task.judged_by} is for classes, and a regression has none: choose auto, or loss")
    if task.judged_by not in ("auto", "loss") and task.task == "instruction":
        problems.append(f"judged_by {task.judged_by} is not measured of instructions: choose auto, or loss")
    if task.task not in ("none", "classification", "tokens"):
        problems += [
            f"{name} is for classes, and {task.task} has none: leave it out"
            for name, is_set in (
                ("label_smoothing", task.label_smoothing > 0),
                ("class_weights", task.class_weights != "none"),
            )
            if is_set
        ]
    if task.method == "lora" and not task.lora_matrices:
        problems.append("lora_matrices names none: name query, say, or choose method probe")
    return problems


def usual_reading(config: Config) -> str:
    """Both ways where the run has learnt to fill masks, else causally."""
    return "causal" if config.readouts == ("next_token",) else "bidirectional"


def usual_pooling(reads: str) -> str:
    """The last token, if only that one has seen the whole text; else the mean over all."""
    return "last" if reads == "causal" else "mean"
