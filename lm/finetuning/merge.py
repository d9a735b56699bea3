"""Turn a fine-tuned run into one with plain weights, merging LoRA into the matrices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from data_prep.errors import UserError
from data_prep.files import new_folder
from lm.config.finetune_settings import FinetuneConfig
from lm.finetuning.predict import load_task_model
from lm.runs import checkpoint
from lm.runs.base_weights import BASE
from lm.runs.checkpoint import Checkpoint
from lm.runs.checkpoint_writer import snapshot, trained_tensors
from lm.runs.companions import copy_companions
from lm.runs.directory import CHECKPOINTS, METRICS, Run, plain_settings, sha256_key


def merge(run: Run, out: Path, saved: Checkpoint, *, trunk_only: bool = False) -> None:
    """Write the run directory ``out`` from a checkpoint of a fine-tuned run; its outputs are the same bit for bit.

    A run with a task head keeps it, unless ``trunk_only``; without a head the result is like a pretrained run, to be
    sampled from, exported or fine-tuned. Raise UserError if the run is not fine-tuned, or ``out`` is not empty.
    """
    if not run.config.is_finetuning:
        raise UserError(f"{run.path} is not fine-tuned: its weights are plain already")
    keeps_head = run.config.has_task_head and not trunk_only
    if run.config.has_task_head:
        whole, answers = load_task_model(run, saved)
        trunk, model = whole.trunk, whole if keeps_head else whole.trunk
    else:
        trunk = model = run.load_model(torch.device("cpu"), saved)
    for name, parameter in model.named_parameters():  # all are saved as trained, but not a vocabulary head without use
        parameter.requires_grad_(name != "trunk.head.weight")
    config = run.config.replace(method="full", weights="pretrained", base=str(run.path))
    if not keeps_head:
        config = replace(run.config, finetune=FinetuneConfig())
    with new_folder(out) as folder:
        config.save(folder / "config.toml")
        processor = run.image_format if run.config.reads_images else run.tokenizer
        processor.save(folder / processor.file_name)
        (folder / METRICS).touch()
        if keeps_head:
            checkpoint.save_tensors(snapshot(trunk.state_dict()), folder / BASE)
            answers.save(folder)
        copy_companions(run.path, folder)
        state = {
            "merged_from": str(run.path),
            "merged_config": plain_settings(run.config),
            "data_fingerprint": "",
            sha256_key(processor.file_name): processor.sha256,
            "config": plain_settings(config),
        }
        weights = snapshot(trained_tensors(model))
        checkpoint.save(folder / CHECKPOINTS, saved.step, weights, {}, state, best_step=saved.step)
