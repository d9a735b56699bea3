"""The model card, ``README.md`` of an exported folder: what the model is, how to use it, its training and its limits.

The metadata at its head is what the Hugging Face hub reads (``huggingface_hub.ModelCardData``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from data_prep.errors import UserError
from lm import __version__
from lm.config.finetune_settings import HEAD_TASKS
from lm.config.settings import Config
from lm.export.stock_architectures import StockClass, auto_class
from lm.inference.chat_template import PLAIN_TURNS, read_template
from lm.runs.checkpoint import Checkpoint
from lm.runs.directory import Run, open_run, saved_evaluation
from lm.runs.metrics_log import metrics_at

LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code")
OUR_CONFIG = "kindling.toml"  # from which import_checkpoint restores all settings
HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
SHIFTED_NOTE = (
    "**The logits are shifted.** The logits at position i predict token i+1, as in a causal model, though the model "
    "reads in both directions: for a mask at position i, take the logits at i-1. The `mntp` backend of BabyLM's "
    "evaluation and LLM2Vec read them so. A fill-mask pipeline takes the logits at i, and its answers are wrong."
)
LOAD = """\
from transformers import <auto>, AutoTokenizer

where = <where>
tokenizer = AutoTokenizer.from_pretrained(where)
model = <auto>.from_pretrained(where)
"""
CONTINUE = """
prompt = <prompt>  # the beginning of a text; with an empty one the model begins a text itself
inputs = tokenizer(prompt, return_tensors="pt")
made = model.generate(**inputs, max_new_tokens=50, do_sample=True, top_p=0.9)
print(tokenizer.decode(made[0], skip_special_tokens=True))
"""
ANSWER = """
messages = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
made = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
FILL = """
text = <text>.replace("[MASK]", tokenizer.mask_token)
inputs = tokenizer(text, return_tensors="pt")
mask = int((inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0])
logits = model(**inputs).logits[0, <place>]
print([tokenizer.decode([token]) for token in logits.topk(5).indices])
"""


@dataclass(frozen=True)
class CardFacts:
    """What a card says that a run directory does not know; an empty value is left out.

    Attributes:
        license: an identifier of the hub, such as "mit" or "apache-2.0".
        languages: ISO 639 codes, such as "de".
        base_model: the name on the hub of the model that this one was made from.
        name: the name on the hub under which this model will be found.

    Raises:
        UserError: a value is not what the hub accepts.
    """

    license: str = ""
    languages: tuple[str, ...] = ()
    base_model: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        if self.license and not LICENSE.fullmatch(self.license):
            raise UserError(
                f'"{self.license}" is no license identifier of the Hugging Face hub, such as mit, apache-2.0 or '
                "cc-by-4.0 (in lower case)"
            )
        for language in self.languages:
            if not LANGUAGE.fullmatch(language):
                raise UserError(f'"{language}" is no language code, such as en, de or zh (ISO 639, in lower case)')
        if self.base_model and not HUB_NAME.fullmatch(self.base_model):
            raise UserError(f'"{self.base_model}" is no name of a model on the Hugging Face hub, such as USER/NAME')


NO_FACTS = CardFacts()


def model_card(
    run: Run,
    checkpoint: Checkpoint,
    *,
    model: str,
    pipeline_tag: str,
    snippet: str,
    values: Mapping[str, str] = {},
    facts: CardFacts = NO_FACTS,
    library: str = "transformers",
    tags: Sequence[str] = (),
    notes: Sequence[str] = (),
    limits: Sequence[str] = (),
) -> str:
    """The text of a model card, with the training of this checkpoint and its losses if ``evaluate`` measured them.

    Args:
        model: what the model is, as the beginning of a sentence: "A LlamaForCausalLM".
        pipeline_tag, library, tags: metadata for the hub.
        snippet: Python code that loads and runs the model; <NAME> in it is replaced by ``values[NAME]``, and <where>
            by the folder or the name on the hub.
        notes: what one must know to use it, a paragraph each.
        limits: what it cannot do; empty: ``training_limits``.
    """
    from huggingface_hub import ModelCardData

    evaluation = saved_evaluation(run, checkpoint) or {}
    for name, value in {"where": json.dumps(facts.name or "."), **values}.items():
        snippet = snippet.replace(f"<{name}>", value)
    metadata = ModelCardData(
        license=facts.license or None,
        language=list(facts.languages) or None,
        base_model=facts.base_model or hub_base(run, checkpoint) or None,
        library_name=library,
        pipeline_tag=pipeline_tag,
        tags=["kindling", *tags],
    )
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    ).get_template("model_card.md")
    return template.render(
        metadata=metadata.to_yaml(),
        name=facts.name.rpartition("/")[2] or run.path.resolve().name,
        model=model,
        inputs=_inputs(run.config),
        config=run.config,
        snippet=snippet.strip("\n"),
        notes=notes,
        training=training_of(run, checkpoint),
        settings=OUR_CONFIG,
        losses={} if run.config.reads_images else evaluation.get("validation", {}),
        features=_features(evaluation),
        images=evaluation.get("images"),
        floors=evaluation.get("floors", {}),
        protocol=evaluation.get("protocol"),
        limits=limits or training_limits(run, checkpoint),
        version=__version__,
    )


def language_model_card(run: Run, checkpoint: Checkpoint, stock: StockClass, readout: str, facts: CardFacts) -> str:
    """The card of an exported language model, with a snippet that runs where the folder is."""
    tuned = finetuned_settings(run, checkpoint)
    template, imported = read_template(run.path), "imported_from" in checkpoint.state
    answers = readout == "next_token" and (tuned["task"] == "instruction" if tuned else imported and bool(template))
    report = run.config.report
    body = ANSWER if answers else CONTINUE if readout == "next_token" else FILL
    values = {
        "auto": auto_class(readout),
        "prompt": json.dumps(report.prompts[0] if report.prompts else "", ensure_ascii=False),
        "text": json.dumps(report.fills[0] if report.fills else "[MASK]", ensure_ascii=False),
        "place": "mask - 1" if readout == "masked_next_token" else "mask",
    }
    start = "The tokenizer adds the end-of-text token before each text, as in training: keep `add_special_tokens=True`."
    turns = "The chat template marks the turns with names only: stop generating at a new line that begins with `User:`."
    plain = readout == "next_token" and template in (None, PLAIN_TURNS)
    return model_card(
        run,
        checkpoint,
        model=f"A {stock.name}",
        pipeline_tag={"next_token": "text-generation", "masked_token": "fill-mask"}.get(readout, "feature-extraction"),
        tags=["mntp"] if readout == "masked_next_token" else [],
        snippet=LOAD + body,
        values=values if facts.name else values | {"where": '"."  # this folder'},
        facts=facts,
        notes=[
            *([] if run.tokenizer.is_imported else [start]),
            *([turns] if plain else []),
            *([SHIFTED_NOTE] if readout == "masked_next_token" else []),
        ],
    )


def finetuned_settings(run: Run, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The settings, by name, of the fine-tuning that made a checkpoint, even if it was merged; None if none did."""
    merged: dict[str, Any] | None = checkpoint.state.get("merged_config")
    return merged or (run.config.flat() if run.config.is_finetuning else None)


def training_of(run: Run, checkpoint: Checkpoint) -> list[str]:
    """What training made a checkpoint, in sentences. They name no path of this machine."""
    state, config, tuned = checkpoint.state, run.config, finetuned_settings(run, checkpoint)
    if tuned:
        method = {"full": "all weights", "lora": f"LoRA of rank {tuned['lora_rank']}", "probe": "only the head"}
        base = f"the run {Path(tuned['base']).name}" if tuned["weights"] == "pretrained" else "random weights"
        sentences = [
            f"Fine-tuned for the task {tuned['task']} from {base} (pretrained with the objective "
            f"`{tuned['objective']}`; {method[tuned['method']]} trained), on {Path(tuned['train']).name}: "
            f"{checkpoint.step:,} steps of {tuned['batch_examples']} examples, {tuned['optimizer']}, "
            f"seed {tuned['seed']}{'' if config.reads_images else f'; texts are read {_reading(tuned)}'}."
        ]
        sentences += _averaging(checkpoint)
        if measured := _validation(run, checkpoint):
            sentences.append(f"Validation at this step: {measured}.")
        return sentences
    if "merged_from" in state:
        return [f"Merged from the fine-tuned run {Path(state['merged_from']).name} at its step {checkpoint.step:,}."]
    if "imported_from" in state:
        return [f"Imported from {_public_name(state)}; Kindling has not trained it further."]
    start = f"from the weights of the run {Path(config.training.init_from).name}" if config.training.init_from else ""
    tokens, images = config.data.batch_tokens, config.data.batch_images
    size = f"{tokens:,} tokens ({checkpoint.step * tokens / 1e6:.1f}M tokens in total)"
    if config.reads_images:
        size = f"{images:,} images ({checkpoint.step * images:,} images in total)"
    data = ", ".join(Path(name).name for name in config.data.data)
    return [
        f"Pretrained {start + ' ' if start else ''}with the objective `{config.objective.objective}`: "
        f"{checkpoint.step:,} steps of {size}, {config.optimizer.optimizer}, seed {config.training.seed}.",
        *_averaging(checkpoint),
        f"Data: {data or 'not recorded'}.",
    ]


def _averaging(checkpoint: Checkpoint) -> list[str]:
    """That the weights are a mean, if they are."""
    if not checkpoint.is_average:
        return []
    steps = checkpoint.state["training"]["averaged"]
    return [f"Its weights are the mean of those after each of the last {steps:,} steps."]


def training_limits(run: Run, checkpoint: Checkpoint) -> list[str]:
    """What a language model cannot do because of its training."""
    tuned = finetuned_settings(run, checkpoint)
    if tuned and tuned["task"] == "instruction":
        return ["It has learned to answer from the examples above, and answers like them, right or wrong."]
    if tuned:
        dropped = ", and the task's head was dropped" if tuned["task"] in HEAD_TASKS else ""
        return [
            f"Its weights were changed for the task {tuned['task']}, which reads texts {_reading(tuned)}{dropped}: "
            "as a language model it may be worse than the model it was made from."
        ]
    if "merged_from" in checkpoint.state:
        return ["Its weights were changed for a task: it may be worse as a language model than what it was made from."]
    if "imported_from" in checkpoint.state:
        return [f"Its abilities and limits are those of {_public_name(checkpoint.state)}."]
    return ["A base model: it continues or fills text like its training data, and does not follow instructions."]


def hub_base(run: Run, checkpoint: Checkpoint) -> str:
    """The name on the hub of the model that a checkpoint was made from, directly or over other runs here, or ""."""
    seen = set()
    while run.path.resolve() not in seen:
        seen.add(run.path.resolve())
        if "imported_from" in checkpoint.state:
            return str(checkpoint.state.get("hub_name", ""))
        tuned = finetuned_settings(run, checkpoint)
        base = tuned["base"] if tuned else run.config.training.init_from
        if not base:
            break
        try:
            run = open_run(base)
            checkpoint = run.newest()
        except UserError:  # it was moved or deleted
            break
    return ""


def _features(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The accuracies of ``evaluate`` by what they are of, if it judged a model of images with labels."""
    if not evaluation.get("features"):
        return {}
    baselines = {name: evaluation["baselines"][name] for name in ("raw_pixels", "random_weights")}
    named = {f"{name.replace('_', ' ')} (baseline)": each for name, each in baselines.items()}
    return {"this model": evaluation["features"], **named}


def _inputs(config: Config) -> str:
    """What a model reads, after "with 2 heads and …"."""
    if config.reads_images:
        return f"patches of {config.model.patch_size} x {config.model.patch_size} pixels"
    return f"a vocabulary of {config.model.vocab_size:,}"


def _reading(tuned: dict[str, Any]) -> str:
    return {"causal": "from left to right", "bidirectional": "in both directions"}.get(tuned["reads"], "as set")


def _public_name(state: dict[str, Any]) -> str:
    return str(state.get("hub_name") or Path(state["imported_from"]).name)


def _validation(run: Run, checkpoint: Checkpoint) -> str:
    """The measures of a fine-tuning's validation at a checkpoint's step: "accuracy 0.8500, loss 0.5287"."""
    found = metrics_at(run.metrics(), checkpoint.step, averaged=checkpoint.is_average)
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.items() if type(value) is float)
