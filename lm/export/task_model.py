"""Export a model that was fine-tuned on a task, for ``transformers``' classes of sequence and token classification.

A causal trunk becomes ``LlamaFor…`` or ``Qwen3For…``, whose sequence head is a matrix times the last hidden state. One
that reads in both directions becomes ``EuroBertFor…``, whose sequence head is a dense layer, GELU and a classifier on
the mean of the hidden states; a linear head has such a form, too (``head_weights``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import UserError
from data_prep.files import new_folder
from lm.export.huggingface import write_card
from lm.export.model_card import NO_FACTS, CardFacts, model_card
from lm.export.stock_architectures import StockClass, reading_class
from lm.export.stock_trunk import refuse_other_tokens, trunk_config, trunk_weights, write_trunk
from lm.runs.checkpoint import Checkpoint
from lm.runs.directory import Run

GELU_IS_IDENTITY = 6.0  # from here on, GELU(x) and x are the same float32

CLASSIFY = """\
from transformers import pipeline

classify = pipeline("text-classification", <where>, top_k=None)
print(classify(<input>, truncation=True))
"""
TAG = """\
from transformers import pipeline

tag = pipeline("token-classification", <where>, aggregation_strategy="first", ignore_labels=[])
print(tag("Words with spaces between them"))
"""
CHOOSE = """\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

where = <where>
tokenizer = AutoTokenizer.from_pretrained(where)
model = AutoModelForSequenceClassification.from_pretrained(where)
question, choices = "Which one?", ["this one", "that one"]
inputs = tokenizer([question] * len(choices), choices, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    print(model(**inputs).logits[:, 0].softmax(0))
"""


@dataclass(frozen=True)
class TaskHead:
    """A linear head: ``weight`` (outputs, hidden) times a text's, word's or image's vector, plus ``bias`` (outputs,).

    Both are float32. ``labels`` are the names of the outputs; ``texts`` is how many texts are read together, 1 or 2;
    ``apart``: the texts of a pair are read separately. ``hidden`` are weight (width, hidden) and bias (width,) of a
    layer before it, whose GELU takes the place of the vector; None: there is none.
    """

    weight: Tensor
    bias: Tensor
    labels: tuple[str, ...]
    texts: int
    apart: bool
    hidden: tuple[Tensor, Tensor] | None = None


def export_task_model(
    run: Run,
    out: Path,
    checkpoint: Checkpoint,
    trunk: Mapping[str, Tensor],
    head: TaskHead,
    facts: CardFacts = NO_FACTS,
) -> None:
    """Write a fine-tuned model to the folder ``out``, with float32 weights and the labels in its config.

    Args:
        trunk: the state of the run's ``Transformer``, with LoRA merged.

    Raises:
        UserError: no stock class computes what the model does, or ``out`` is not empty.
    """
    content, found = stock_task_model(run, head, trunk["norm.weight"])
    with new_folder(out) as folder:
        write_trunk(run, folder, content, trunk_weights(run.config, trunk) | found)
        write_card(run, folder, _card(run, checkpoint, content, head, facts))


def pipeline_of(task: str) -> str:
    """The pipeline of transformers for a task with a head."""
    return "token-classification" if task == "tokens" else "text-classification"


def stock_task_model(run: Run, head: TaskHead, norm: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of ``config.json``, and the head's weights by the stock class's names.

    ``norm`` (hidden,) is the weight of the trunk's last norm.

    Raises:
        UserError: no stock class computes what the model does; the message names the setting that helps.
    """
    task = run.config.finetune
    try:
        stock = reading_class(run.config.model, task.reads)
    except UserError as problem:
        hint = "; fine-tune with --reads causal" if run.config.model.qk_norm and task.reads == "bidirectional" else ""
        raise UserError(f"{run.path} cannot be exported: {problem}{hint}") from None
    if obstacles := _obstacles(run, head, stock):
        raise UserError(f"{run.path} cannot be exported: no model class of transformers {'; nor '.join(obstacles)}")
    refuse_other_tokens(run, head.texts)
    tags = task.task == "tokens"
    architecture = "ForTokenClassification" if tags else "ForSequenceClassification"
    content = trunk_config(run, stock, stock.sibling(architecture)) | label_config(head)
    if tags:
        content |= {"classifier_dropout": 0.0}
    elif task.task == "classification":
        content |= {"problem_type": "single_label_classification"}
    else:
        content |= {"problem_type": "regression"}
    if stock.model_type == "eurobert" and not tags:
        content |= {"classifier_pooling": "mean"}
    return content, head_weights(head, norm, stock, tags=tags)


def label_config(head: TaskHead) -> dict[str, Any]:
    """The entries of ``config.json`` with the names of the outputs."""
    return {
        "id2label": {str(number): label for number, label in enumerate(head.labels)},
        "label2id": {label: number for number, label in enumerate(head.labels)},
    }


def _obstacles(run: Run, head: TaskHead, stock: StockClass) -> list[str]:
    """What no stock class does, each with the setting that helps."""
    task = run.config.finetune
    if task.task == "tokens":
        return ["has a hidden layer in a head for words (fine-tune with --head-hidden 0)"] if head.hidden else []
    found = []
    if head.hidden and stock.readout == "next_token":
        found.append("has a hidden layer in a head on the last hidden state (fine-tune with --head-hidden 0)")
    elif head.hidden and len(head.hidden[1]) > (widest := run.config.model.hidden_size):
        found.append(f"has a hidden layer wider than the model (fine-tune with --head-hidden {widest}, or less)")
    if head.apart:
        found.append("reads the two texts of a pair apart (fine-tune with --pairs together)")
    causal = stock.readout == "next_token"
    if causal and task.pooling == "mean":
        found.append("classifies the mean of causal hidden states (fine-tune with --pooling last)")
    if not causal and task.pooling == "last":
        found.append("classifies the last hidden state of bidirectional attention (fine-tune with --pooling mean)")
    if causal and task.task != "choice" and head.bias.any():  # the softmax over choices cancels a bias
        found.append("has a head with a bias on the last hidden state (fine-tune with --head-bias false)")
    return found


def head_weights(head: TaskHead, norm: Tensor, stock: StockClass, *, tags: bool) -> dict[str, Tensor]:
    """The weights of a stock class's head that computes what ``head`` does.

    EuroBERT's sequence head is ``classifier(GELU(dense(v)))``. With z = W v, ``dense`` gives z and -z, and GELU(z) -
    GELU(-z) = z. If it has no room for both, it gives v + c with c so large that GELU is the identity there: after
    RMSNorm, |v| is at most the root of its size times the norm's weight ``norm`` (hidden,). A hidden layer of ours is
    ``dense``, with zeros where it is narrower.
    """
    weight, bias = head.weight.float(), head.bias.float()
    if stock.readout == "next_token":
        return {"score.weight": weight} | ({"score.bias": bias} if tags else {})
    if tags:
        return {"classifier.weight": weight, "classifier.bias": bias}
    outputs, hidden_size = len(weight), len(norm)
    dense, classifier = torch.zeros(hidden_size, hidden_size), torch.zeros(outputs, hidden_size)
    shift = torch.zeros(hidden_size)
    if head.hidden:
        width = len(head.hidden[1])
        dense[:width], shift[:width] = head.hidden
        classifier[:, :width] = weight
    elif 2 * outputs <= hidden_size:
        dense[:outputs], dense[outputs : 2 * outputs] = weight, -weight
        classifier[:, :outputs], classifier[:, outputs : 2 * outputs] = torch.eye(outputs), -torch.eye(outputs)
    else:
        dense, classifier = torch.eye(hidden_size), weight
        shift = norm.float().abs() * math.sqrt(hidden_size) + GELU_IS_IDENTITY
        bias = (bias.double() - weight.double() @ shift.double()).float()
    return {
        "dense.weight": dense,
        "dense.bias": shift,
        "classifier.weight": classifier.contiguous(),
        "classifier.bias": bias,
    }


def _card(run: Run, checkpoint: Checkpoint, content: dict[str, Any], head: TaskHead, facts: CardFacts) -> str:
    task, context = run.config.finetune, run.config.data.context_length
    cut = f"`truncation=True` cuts a longer text to {context:,} tokens"
    if task.task == "tokens":
        cut = f"Words after the first {context:,} tokens get no label"
    windows = task.task == "tokens" or (task.long_texts == "window" and head.texts == 1)
    notes = {
        "tokens": "The label of a word is that of its first token. Put a space between words, also where the training "
        "examples have punctuation as a word.",
        "choice": "Each choice is read after the question and gets a score; their softmax is the probability.",
        "regression": "The score is the value itself.",
    }
    return model_card(
        run,
        checkpoint,
        model=f"{'An' if content['architectures'][0][0] in 'AEIOU' else 'A'} {content['architectures'][0]}",
        pipeline_tag=pipeline_of(task.task),
        snippet={"tokens": TAG, "choice": CHOOSE}.get(task.task, CLASSIFY),
        values={"input": json.dumps({"text": "A text", "text_pair": "another"} if head.texts == 2 else "A text")},
        facts=facts,
        notes=[
            *([notes[task.task]] if task.task in notes else []),
            f"{cut}{', where Kindling reads it in windows' if windows else ', as in training'}.",
        ],
        limits=[f"It has learned the task {task.task} from the examples above, and knows no label but theirs."],
    )
