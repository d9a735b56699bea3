"""A fine-tuned run as one with plain weights: what LoRA has added becomes part of the matrices."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from data_prep.errors import UserError
from data_prep.files import new_folder
from lm.config.settings import FinetuneConfig
from lm.finetuning.answers import Answers
from lm.finetuning.predict import load_task_model
from lm.inference.chat_template import CHAT_TEMPLATE
from lm.runs import checkpoint
from lm.runs.base_weights import BASE
from lm.runs.checkpoint import Checkpoint
from lm.runs.checkpoint_writer import snapshot, trained_tensors
from lm.runs.directory import CHECKPOINTS, METRICS, Run, plain_settings


def merge(run: Run, out: Path, saved: Checkpoint, *, trunk_only: bool = False) -> None:
    """Write the run directory ``out`` from a checkpoint of a fine-tuned run; it says what that says, to the last bit.

    A run with a task's head keeps it, unless ``trunk_only``; without one the result is a run as pretraining makes it,
    to sample, to export, to fine-tune again.

    Raises:
        UserError: the run is not fine-tuned, or ``out`` holds something.
    """
    if not run.config.is_finetuning:
        raise UserError(f"{run.path} is not fine-tuned: its weights are plain as they are")
    keeps_head = run.config.has_task_head and not trunk_only
    if run.config.has_task_head:
        whole = load_task_model(run, saved)
        trunk, model = whole.trunk, whole if keeps_head else whole.trunk
    else:
        trunk = model = run.load_model(torch.device("cpu"), saved)
    _all_learn(model)
    config = run.config.replace(method="full", weights="pretrained", base=str(run.path))
    if not keeps_head:
        config = dataclasses.replace(run.config, finetune=FinetuneConfig())
    with new_folder(out) as folder:
        config.save(folder / "config.toml")
        run.tokenizer.save(folder / "tokenizer.json")
        (folder / METRICS).touch()
        if keeps_head:
            save_file(snapshot(trunk.state_dict()), folder / BASE)
            Answers.load(run.path).save(folder)
        if (run.path / CHAT_TEMPLATE).is_file():
            shutil.copyfile(run.path / CHAT_TEMPLATE, folder / CHAT_TEMPLATE)
        state = {
            "merged_from": str(run.path),
            "data_fingerprint": "",
            "tokenizer_sha256": run.tokenizer.sha256,
            "config": plain_settings(config),
        }
        weights = snapshot(trained_tensors(model))
        checkpoint.save(folder / CHECKPOINTS, saved.step, weights, {}, state, best_step=saved.step)


def _all_learn(model: nn.Module) -> None:
    """Have every weight count as one that full fine-tuning moves; the vocabulary's head of a task model is none."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name != "trunk.head.weight")
