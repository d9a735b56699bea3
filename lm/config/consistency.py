"""Which settings contradict each other."""

from __future__ import annotations

from collections.abc import Iterator

from lm.config.corpus_entry import problem_of_entry
from lm.config.finetune_settings import IMAGE_TASKS, TASKS, FinetuneConfig
from lm.config.model_settings import ModelConfig
from lm.config.objective_settings import IMAGE_OBJECTIVES, OBJECTIVES, TEXT_VIEW_OBJECTIVES
from lm.config.sampling import problem_of_fill
from lm.config.settings import Config

LARGEST_HEAD = 256  # of the attention kernels
MOST_PARAMETERS = 10**13
IMAGE_ONLY = set(IMAGE_OBJECTIVES) - set(TEXT_VIEW_OBJECTIVES)
TEXT_TASKS = [name for name in TASKS if name not in IMAGE_TASKS]


def inconsistencies(config: Config) -> Iterator[str]:
    """Yield one sentence per contradiction between settings."""
    model, data, optimizer = config.model, config.data, config.optimizer
    if not model.head_size and model.hidden_size % model.num_heads:
        yield (
            f"hidden_size {model.hidden_size} is not divisible by num_heads {model.num_heads}: "
            "change one of them, or set head_size"
        )
    elif model.head_width % 2:
        yield (
            f"the head size is {model.head_width}, but rotary positions need an even one: change num_heads or head_size"
        )
    elif model.head_width > LARGEST_HEAD:
        yield f"the head size is {model.head_width}, but at most {LARGEST_HEAD}: change num_heads or head_size"
    if model.num_heads % model.key_value_heads:
        yield f"num_heads {model.num_heads} is not divisible by num_key_value_heads {model.num_key_value_heads}"
    if (parameters := _matrix_parameters(model)) > MOST_PARAMETERS:
        yield (
            f"this model would have {parameters:.3g} parameters: choose a smaller num_layers, hidden_size, num_heads, "
            "feed_forward_size or vocab_size"
        )
    if config.reads_images:
        yield from _inconsistencies_of_images(config)
    elif data.batch_images:
        yield "batch_images is for images: set patch_size, or leave batch_images out"
    elif only := [name for name in config.objective.shares if name in IMAGE_ONLY]:
        yield (
            f"objective {only[0]} learns from images: set patch_size and batch_images, or start from the recipe "
            f"images-{only[0]}"
        )
    elif data.batch_tokens % data.context_length:
        nearest = max(1, round(data.batch_tokens / data.context_length)) * data.context_length
        yield (
            f"batch_tokens {data.batch_tokens} is not a multiple of context_length {data.context_length}: "
            f"the nearest is {nearest}"
        )
    elif data.micro_batch_rows and data.batch_rows % data.micro_batch_rows:
        yield f"micro_batch_rows {data.micro_batch_rows} does not divide the batch's {data.batch_rows} rows"
    if not config.reads_images and not config.is_finetuning:
        yield from _inconsistencies_of_views(config)
    if config.training.keep_every % config.training.checkpoint_every:
        yield (
            f"keep_every {config.training.keep_every} is not a multiple of checkpoint_every "
            f"{config.training.checkpoint_every}: there are no checkpoints at those steps"
        )
    for text in data.data:
        if problem := problem_of_entry(text):
            yield f"data: {problem}"
    for text in config.report.fills:
        if problem := problem_of_fill(text):
            yield f"fills: {problem}"
    if config.objective.mask_token_share + config.objective.random_token_share > 1:
        yield "mask_token_share and random_token_share add up to more than 1"
    kinds = [OBJECTIVES[name] for name in config.objective.shares]
    if config.objective.predict_ahead > 1 and not any(file == "text" and "next_token" in own for file, own in kinds):
        yield f"predict_ahead is for next_token and hybrid objectives, not {config.objective.objective}: leave it out"
    for name, lowest in (("final_masked_fraction", 0), ("final_mask_rate", 0.01)):
        if (value := getattr(config.objective, name)) != -1 and value < lowest:
            yield f"{name} {value:g} is neither -1 nor at least {lowest}"
    if optimizer.warmup_fraction + optimizer.decay_fraction > 1:
        yield "warmup_fraction and decay_fraction add up to more than 1"
    if config.is_finetuning and config.reads_images != (config.finetune.task in IMAGE_TASKS):
        reads, fitting = ("images", IMAGE_TASKS) if config.reads_images else ("text", TEXT_TASKS)
        yield (
            f"task {config.finetune.task} does not fit {config.finetune.base}, which reads {reads}: "
            f"choose {' or '.join(fitting)}"
        )
    yield from _inconsistencies_of_task(config.finetune)


def _inconsistencies_of_views(config: Config) -> Iterator[str]:
    """Those of a mixture's shares of the rows, and of an objective that compares views of texts."""
    shares, views, rows = config.objective.shares, config.views, config.data.batch_rows
    compared = [name for name in shares if name in TEXT_VIEW_OBJECTIVES]
    if len(compared) > 1:
        yield f"objective {config.objective.objective}: a mixture has at most one of {', '.join(TEXT_VIEW_OBJECTIVES)}"
        return
    plain = [name for name in shares if OBJECTIVES[name][0] == "text"]
    for readout in dict.fromkeys(readout for name in plain for readout in OBJECTIVES[name][1]):
        if len(both := [name for name in plain if readout in OBJECTIVES[name][1]]) > 1:
            yield (
                f"objective {config.objective.objective}: {' and '.join(both)} both have rows of {readout}; choose one "
                "of them, and set the shares accordingly"
            )
            return
    for name, share in shares.items():
        if (share * rows).denominator > 1:
            yield (
                f"objective: {name}'s share of the {rows} rows of a step, {float(share * rows):g}, is no whole number: "
                "change the shares, or batch_tokens"
            )
            return
    if not compared:
        return
    if views.view_tokens > config.data.context_length:
        yield f"view_tokens {views.view_tokens} is more than context_length {config.data.context_length}"
    if views.span_share == 1 and not views.token_deletion and not config.model.dropout:
        yield "the views of a text would be equal: set span_share below 1, token_deletion or dropout above 0"
    if "dino" in shares and config.objective.local_views and config.objective.local_area > views.span_share:
        yield f"local_area {config.objective.local_area} is larger than span_share {views.span_share}"


def _inconsistencies_of_images(config: Config) -> Iterator[str]:
    model, data, objective = config.model, config.data, config.objective.objective
    if objective not in IMAGE_OBJECTIVES and not config.is_finetuning:
        yield f"patch_size is for images, and {objective} learns from text: choose {' or '.join(IMAGE_OBJECTIVES)}"
    if not data.batch_images:
        yield "batch_images is 0: set how many images a step has"
    elif data.micro_batch_rows and data.batch_images % data.micro_batch_rows:
        yield f"micro_batch_rows {data.micro_batch_rows} does not divide the batch's {data.batch_images} images"
    if model.image_size % model.patch_size:
        yield f"patch_size {model.patch_size} does not divide the images' {model.image_size} pixels"
    if model.head_width % 4 and model.head_width % 2 == 0:
        yield (
            f"the head size is {model.head_width}, but the two axes of an image need a multiple of 4: change num_heads "
            "or head_size"
        )
    if model.stem == "convolutional":
        if objective in ("mae", "beit"):
            yield f"stem convolutional shows each patch its neighbors, which {objective} hides: choose linear"
        if model.patch_size & (model.patch_size - 1) or model.patch_size < 4:
            yield f"stem convolutional needs a patch_size of 4, 8 or 16, not {model.patch_size}"
    if config.objective.local_size % model.patch_size:
        yield f"local_size {config.objective.local_size} is not a multiple of patch_size {model.patch_size}"
    if config.views.crop_area > config.views.largest_crop:
        yield f"crop_area {config.views.crop_area} is larger than largest_crop {config.views.largest_crop}"
    if objective == "dino" and config.objective.local_views and config.objective.local_area > config.views.crop_area:
        yield f"local_area {config.objective.local_area} is larger than crop_area {config.views.crop_area}"
    if config.objective.decoder_size % 32:
        yield f"decoder_size {config.objective.decoder_size} is not a multiple of 32, the width of its heads"


def _matrix_parameters(model: ModelConfig) -> int:
    """The weights in the matrices of a model, up to its vocabulary head."""
    attention = 2 * (model.num_heads + model.key_value_heads) * model.head_width
    feed_forward = (3 if model.activation == "swiglu" else 2) * model.feed_forward_width
    return model.hidden_size * (model.num_layers * (attention + feed_forward) + model.vocab_size)


def _inconsistencies_of_task(task: FinetuneConfig) -> Iterator[str]:
    headless = {"instruction": "instruction tuning", "contrastive": "contrastive training"}.get(task.task)
    if headless and task.method == "probe":
        yield f"method probe trains a task's head, and {headless} has none: choose full or lora"
    if headless and task.head_hidden:
        yield f"head_hidden is for a task's head, and {headless} has none: leave it out"
    if task.method == "lora" and task.lora_rate == "scaled" and not task.lora_alpha:
        yield "lora_rate scaled divides by lora_alpha, which is 0: choose another, or lora_rate fixed"
    if task.task == "instruction" and task.reads == "bidirectional":
        yield "instruction tuning trains generation, which needs causal attention: leave reads out"
    if task.judged_by in ("pearson", "spearman") and task.task in (
        "classification",
        "tokens",
        "choice",
        "image_classification",
    ):
        yield f"judged_by {task.judged_by} is for regression: choose accuracy or loss"
    if task.task == "contrastive" and task.judged_by not in ("auto", "pearson", "spearman"):
        yield f"judged_by {task.judged_by} is not available in contrastive training: choose auto or pearson"
    if task.judged_by not in ("auto", "loss", "pearson", "spearman") and task.task == "regression":
        yield f"judged_by {task.judged_by} is for classes, and regression has none: choose auto or loss"
    if task.judged_by not in ("auto", "loss") and task.task == "instruction":
        yield f"judged_by {task.judged_by} is not available in instruction tuning: choose auto or loss"
    if task.task in ("regression", "choice", "instruction", "contrastive"):
        for name in ("label_smoothing", "class_weights"):
            if getattr(task, name) not in (0, "none"):
                yield f"{name} is for classes, and {task.task} has none: leave it out"
    if task.task in IMAGE_TASKS and (task.reads == "causal" or task.pooling == "last"):
        yield "reads and pooling are for texts: an image's vector is always the mean over its patches"
    if task.method == "lora" and not task.lora_matrices:
        yield "lora_matrices is empty: name a matrix, for example query, or choose method probe"
