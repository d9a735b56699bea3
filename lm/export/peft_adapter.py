"""Export a LoRA fine-tuning as an adapter for PEFT, with the base model that it belongs to."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from data_prep.errors import UserError
from data_prep.files import new_folder
from lm.config.finetune_settings import HEAD_TASKS
from lm.export.huggingface import write_card, write_json, write_language_model
from lm.export.model_card import NO_FACTS, CardFacts, model_card
from lm.export.stock_architectures import PARTS, reading_class, stock_class, stock_config, stock_weights, weight_names
from lm.export.stock_trunk import refuse_other_tokens, trunk_config, trunk_weights, write_trunk
from lm.export.task_model import TaskHead, stock_task_model
from lm.runs.base_weights import starting_trunk
from lm.runs.checkpoint import Checkpoint, save_tensors
from lm.runs.directory import Run

LOW_RANK = re.compile(r"(?:trunk\.)?(blocks\.\d+)\.(\w+\.\w+)\.parametrizations\.weight\.0\.([ab])")
BASE = "base"  # the folder of the base model, in the exported one
# PEFT's task types, each with the class of transformers that the base is loaded with, and the hub's name of the task.
TASK_TYPES = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
}
SNIPPET = """\
from peft import PeftModel
from transformers import <auto>, AutoTokenizer

base = <base>
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(<auto>.from_pretrained(base), <where>)
"""


def export_adapter(
    run: Run, out: Path, checkpoint: Checkpoint, head: TaskHead | None = None, facts: CardFacts = NO_FACTS
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` to the folder ``out``, and to ``base`` in it the
    base model as transformers loads it.

    Args:
        head: of a run that was fine-tuned on a task with one; it becomes part of the adapter.
        facts: for the card; ``base_model`` is also the name under which PEFT looks for the base.

    Raises:
        UserError: the run has no LoRA, no stock class computes what its model does, or ``out`` is not empty.
    """
    config, task = run.config, run.config.finetune
    if not config.is_finetuning or task.method != "lora":
        raise UserError(f"{run.path} has no LoRA adapter: fine-tune with --method lora, or export with --to hf")
    run.refuse_another(checkpoint)
    start = starting_trunk(config.replace(method="full"), run.path)
    base = trunk_weights(config, start.state_dict())
    trained: dict[str, Tensor] = {}
    if head is not None:
        content, trained = stock_task_model(run, head, start.norm.weight)
        kind = "TOKEN_CLS" if task.task == "tokens" else "SEQ_CLS"
    elif task.task == "instruction":
        content, kind = stock_config(config, run.tokenizer, stock_class(config.model, "next_token")), "CAUSAL_LM"
        base = stock_weights(config.model, start.state_dict())
    else:
        refuse_other_tokens(run, 1)
        stock = reading_class(config.model, task.reads)
        content, kind = trunk_config(run, stock, stock.sibling("Model")), "FEATURE_EXTRACTION"
    matrices = _matrices(run, checkpoint.model(), prefix="" if kind == "FEATURE_EXTRACTION" else "model.")
    with new_folder(out) as folder:
        (folder / BASE).mkdir()
        if kind == "CAUSAL_LM":
            write_language_model(run, folder / BASE, content, base, generates=True)
        else:
            write_trunk(run, folder / BASE, content, base)
        tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in {**matrices, **trained}.items()}
        save_tensors(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        settings = {
            "peft_type": "LORA",
            "task_type": kind,
            "base_model_name_or_path": facts.base_model
            or (BASE if facts.name else str(out / BASE)),  # no local path in an upload
            "r": task.lora_rank,
            "lora_alpha": task.lora_alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "modules_to_save": sorted({name.rpartition(".")[0] for name in trained}) or None,
            **_ranks(matrices, task.lora_rank),
        }
        write_json(folder / "adapter_config.json", settings)
        write_card(run, folder, _card(run, checkpoint, kind, facts))


def _matrices(run: Run, saved: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The low-rank matrices of a checkpoint by PEFT's names, of modules whose names begin with ``prefix``."""
    names = weight_names(run.config.model)
    found = {}
    for name, tensor in saved.items():
        if match := LOW_RANK.fullmatch(name):
            block, part, side = match.groups()
            module = names[f"{block}.{part}.weight"].removeprefix("model.").removesuffix(".weight")
            found[f"{prefix}{module}.lora_{side.upper()}.weight"] = tensor.float()
    return found


def _ranks(matrices: dict[str, Tensor], usual: int) -> dict[str, Any]:
    """The adapted modules, and the rank of those in which it is smaller than the usual one (``add_lora``)."""
    ranks = {name.split(".")[-3]: len(tensor) for name, tensor in matrices.items() if name.endswith("lora_A.weight")}
    order = [theirs.split(".")[1] for theirs, _ in PARTS.values() if "." in theirs]
    return {
        "target_modules": sorted(ranks, key=order.index),
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != usual},
        "alpha_pattern": {},
    }


def _card(run: Run, checkpoint: Checkpoint, kind: str, facts: CardFacts) -> str:
    auto, tag = TASK_TYPES[kind]
    own = f"{facts.name}/{BASE}" if facts.name else BASE
    learned = run.config.finetune.task
    return model_card(
        run,
        checkpoint,
        model="A LoRA adapter for a model",
        pipeline_tag=tag,
        library="peft",
        tags=["lora"],
        snippet=SNIPPET,
        values={"auto": auto, "base": json.dumps(facts.base_model or own)},
        facts=facts,
        limits=[f"It has learned the task {learned} from the examples above."] if learned in HEAD_TASKS else [],
    )
