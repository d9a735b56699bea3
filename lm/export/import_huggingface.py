"""Import a checkpoint of ``transformers`` as a run directory, to sample, evaluate or fine-tune.

The source is a folder, or a name on the Hugging Face hub, with ``config.json``, safetensors and ``tokenizer.json``.
Nothing is unpickled, and no code of the folder runs.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_prep.errors import UserError
from data_prep.files import new_folder
from lm.config.finetune_settings import FinetuneConfig
from lm.config.model_settings import ModelConfig
from lm.config.recipes import load_config
from lm.config.settings import Config
from lm.export.checkpoint_config import read_config, with_defaults
from lm.export.import_tokenizer import chat_template, import_tokenizer, read_object
from lm.export.model_card import OUR_CONFIG
from lm.export.stock_architectures import weight_names
from lm.model.transformer import Transformer
from lm.runs import checkpoint
from lm.runs.companions import CHAT_TEMPLATE, GENERATION, TOKENIZER_CONFIG
from lm.runs.directory import CHECKPOINTS, METRICS, plain_settings

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_FILES = ("*.safetensors", "*.json", "tokenizer.model", CHAT_TEMPLATE, OUR_CONFIG)


def import_checkpoint(
    source: str, out: Path, *, add_mask: bool = False, note: Callable[[str], None] = lambda text: None
) -> None:
    """Write a checkpoint of a Llama, Mistral, Qwen3 or EuroBERT to the run directory ``out``.

    Args:
        add_mask: give a model that predicts the next token a mask token, for training with a masked objective.
        note: called with what is not as the files of the checkpoint say.

    Raises:
        UserError: the checkpoint is missing, damaged or of an unsupported architecture, or ``out`` is not empty.
    """
    folder = _find(source)
    content = with_defaults(read_object(folder / "config.json"))
    shape, context_length, stock = read_config(content)
    weights = _weights(folder, shape, note)
    masked = add_mask or stock.readout != "next_token"
    tokenizer = import_tokenizer(folder, content, masked=masked, note=note)
    template = chat_template(folder)
    if tokenizer.vocab_size > shape.vocab_size:
        weights = _grown(weights, tokenizer.vocab_size)
    vocab_size = max(shape.vocab_size, tokenizer.vocab_size)
    described = Config().replace(
        **vars(shape) | {"vocab_size": vocab_size, "context_length": context_length, "batch_tokens": context_length},
        objective=stock.readout,
    )
    config = _own_settings(folder, described) or described
    with new_folder(out) as run:
        config.save(run / "config.toml")
        tokenizer.save(run / "tokenizer.json")
        for name in (GENERATION, TOKENIZER_CONFIG) if tokenizer.is_imported else ():
            if (folder / name).is_file():
                shutil.copyfile(folder / name, run / name)
        if template is not None:
            (run / CHAT_TEMPLATE).write_text(template, encoding="utf-8", newline="\n")
        (run / METRICS).touch()
        state = {
            "imported_from": source,
            "hub_name": "" if Path(source).is_dir() else source,
            "data_fingerprint": "",
            "tokenizer_sha256": tokenizer.sha256,
            "config": plain_settings(config),
        }
        checkpoint.save(run / CHECKPOINTS, 0, weights, {}, state)


def _find(source: str) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{source} is a file: name the folder that contains config.json and {WEIGHTS}")
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(HUB_FILES)))
    except errors.HFValidationError:
        raise UserError(f"there is no folder {source}, and it is not a valid name on the Hugging Face hub") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError):
        problem = "no model of that name could be downloaded from the Hugging Face hub"
        raise UserError(f"there is no folder {source}, and {problem}") from None


def _weights(folder: Path, shape: ModelConfig, note: Callable[[str], None]) -> dict[str, Tensor]:
    """The weights as float32 tensors, by Kindling's names, after a check of their shapes."""
    files = {WEIGHTS}
    if (folder / INDEX).is_file():
        files = set(map(str, read_object(folder / INDEX).get("weight_map", {}).values()))
    found: dict[str, Tensor] = {}
    for name in sorted(files):
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder} has no file {name}: only safetensors are read, nothing is unpickled")
        try:
            found |= load_file(folder / name)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{folder / name} is damaged: {error}") from None
    mismatch = f"{folder} does not match its config.json"
    if shape.num_layers > len(found):  # before creating as many layers as a damaged number says
        raise UserError(f"{mismatch}: model.layers.{len(found)}.input_layernorm is missing")
    names, weights = weight_names(shape), {}
    for ours, size in _shapes(shape).items():
        tensor = found.get(names[ours])
        if tensor is None or tensor.shape != size:
            problem = "is missing" if tensor is None else f"has the shape {tuple(tensor.shape)}, not {tuple(size)}"
            raise UserError(f"{mismatch}: {names[ours]} {problem}")
        if not tensor.is_floating_point():
            raise UserError(f"{names[ours]} of {folder} has the type {tensor.dtype}: quantized weights are not read")
        weights[ours] = tensor.float()
    _refuse_others(folder, found, set(names.values()), note)
    return weights


def _refuse_others(folder: Path, found: dict[str, Tensor], known: set[str], note: Callable[[str], None]) -> None:
    """Say what the weights hold besides the model's. UserError if that would change what the model computes."""
    others = sorted(name for name in found.keys() - known if not name.endswith("rotary_emb.inv_freq"))
    head = found.get("lm_head.weight")
    if "lm_head.weight" in others and head is not None:  # although config.json says that it is the embeddings
        if not torch.equal(head, found["model.embed_tokens.weight"]):
            raise UserError(f"{folder} has an lm_head.weight of its own, but its config.json has tie_word_embeddings")
        others.remove("lm_head.weight")
    if within := [name for name in others if name.startswith("model.")]:
        raise UserError(f"{folder} has weights that Kindling's model lacks: {', '.join(within[:5])}")
    if others:
        note(f"its weights {', '.join(others[:5])} are left out")


def _shapes(model: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Transformer(model).state_dict().items()}


def _grown(weights: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Add rows to the embeddings, each their mean, for the special tokens that the tokenizer lacked."""
    grown = {}
    for name in weights.keys() & {"embedding.weight", "head.weight"}:
        old = weights[name]
        grown[name] = torch.cat([old, old.mean(0, keepdim=True).expand(rows - len(old), -1)]).contiguous()
    return weights | grown


def _own_settings(folder: Path, described: Config) -> Config | None:
    """The settings of ``kindling.toml``, if the folder has it and it matches the weights."""
    if not (folder / OUR_CONFIG).is_file():
        return None
    ours = load_config(folder / OUR_CONFIG)
    if _shapes(ours.model) != _shapes(described.model):
        return None
    return dataclasses.replace(ours, finetune=FinetuneConfig())  # the weights are plain, even if it was fine-tuned
