"""Which settings contradict each other."""

from __future__ import annotations

from lm.config.settings import Config, corpus_of


def inconsistencies(config: Config) -> list[str]:
    """Return one sentence per contradiction between settings."""
    model, data, optimizer = config.model, config.data, config.optimizer
    problems = []
    if not model.head_size and model.hidden_size % model.num_heads:
        problems.append(
            f"hidden_size {model.hidden_size} is not divisible by num_heads {model.num_heads}: "
            "change one of them, or set head_size"
        )
    elif model.head_width % 2:
        problems.append(
            f"the head size is {model.head_width}, but rotary positions need an even one: change num_heads or head_size"
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
            f"{config.training.checkpoint_every}: there are no checkpoints at those steps"
        )
    problems += [f'data: the weight of "{text}" must be above 0' for text in data.data if corpus_of(text)[1] <= 0]
    problems += [
        f'fills: there is no [MASK] in "{text}": write [MASK] where a word is missing'
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
    headless = {"instruction": "instruction tuning", "contrastive": "contrastive training"}.get(task.task)
    if headless and task.method == "probe":
        problems.append(f"method probe trains a task's head, and {headless} has none: choose full or lora")
    if task.task == "instruction" and task.reads == "bidirectional":
        problems.append("instruction tuning trains generation, which needs causal attention: leave reads out")
    if task.judged_by in ("pearson", "spearman") and task.task in ("classification", "tokens", "choice"):
        problems.append(f"judged_by {task.judged_by} is for regression: choose accuracy or loss")
    if task.task == "contrastive" and task.judged_by not in ("auto", "pearson", "spearman"):
        problems.append(f"judged_by {task.judged_by} is not available in contrastive training: choose auto or pearson")
    if task.judged_by not in ("auto", "loss", "pearson", "spearman") and task.task == "regression":
        problems.append(f"judged_by {task.judged_by} is for classes, and regression has none: choose auto or loss")
    if task.judged_by not in ("auto", "loss") and task.task == "instruction":
        problems.append(f"judged_by {task.judged_by} is not available in instruction tuning: choose auto or loss")
    if task.task in ("regression", "choice", "instruction", "contrastive"):
        given = {"label_smoothing": task.label_smoothing > 0, "class_weights": task.class_weights != "none"}
        problems += [f"{n} is for classes, and {task.task} has none: leave it out" for n in given if given[n]]
    if task.method == "lora" and not task.lora_matrices:
        problems.append("lora_matrices is empty: name a matrix, for example query, or choose method probe")
    return problems
