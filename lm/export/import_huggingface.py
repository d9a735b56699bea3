"""Import a checkpoint of ``transformers`` as a run directory, to sample, evaluate or fine-tune.

The source is a folder, or a name on the Hugging Face hub, with ``config.json``, safetensors and ``tokenizer.json``.
Nothing is unpickled, and no code of the folder runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_prep.errors import UserError
from data_prep.files import new_folder, read_json
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.recipes import load_config
from lm.config.settings import Config, ModelConfig
from lm.export.huggingface import OUR_CONFIG, tokenizer_without_start
from lm.export.stock_architectures import StockClass, model_config, weight_names
from lm.model.transformer import Transformer
from lm.runs import checkpoint
from lm.runs.directory import CHECKPOINTS, METRICS, plain_settings

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_FILES = ("*.safetensors", INDEX, "config.json", "tokenizer.json", OUR_CONFIG)


def import_checkpoint(source: str, out: Path) -> None:
    """Write a checkpoint of a Llama, Qwen3 or EuroBERT to the run directory ``out``.

    Raises:
        UserError: the checkpoint is missing, damaged or of an unsupported architecture, or ``out`` is not empty.
    """
    folder = _find(source)
    shape, stock = model_config(_json(folder / "config.json"))
    weights = _weights(folder, shape)
    description = json.dumps(tokenizer_without_start(_json(folder / "tokenizer.json")), ensure_ascii=False)
    tokenizer = Tokenizer.from_json(description, name=str(folder / "tokenizer.json"))
    if tokenizer.vocab_size > shape.vocab_size:
        weights = _grown(weights, tokenizer.vocab_size)
    vocab_size = max(shape.vocab_size, tokenizer.vocab_size)
    config = _settings(folder, Config().replace(**vars(shape) | {"vocab_size": vocab_size}), stock)
    with new_folder(out) as run:
        config.save(run / "config.toml")
        tokenizer.save(run / "tokenizer.json")
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


def _json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: it is not a JSON object")
    return content


def _weights(folder: Path, shape: ModelConfig) -> dict[str, Tensor]:
    """The weights as float32 tensors, by Kindling's names, after a check of their shapes."""
    files = {WEIGHTS}
    if (folder / INDEX).is_file():
        files = set(map(str, _json(folder / INDEX).get("weight_map", {}).values()))
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
        weights[ours] = tensor.float()
    return weights


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


def _settings(folder: Path, from_shape: Config, stock: StockClass) -> Config:
    """The settings of ``kindling.toml`` if the folder has it and it matches the weights, else of config.json."""
    if (folder / OUR_CONFIG).is_file():
        ours = load_config(folder / OUR_CONFIG)
        if _shapes(ours.model) == _shapes(from_shape.model):
            return ours
    context = int(_json(folder / "config.json").get("max_position_embeddings", 512))
    return from_shape.replace(context_length=context, batch_tokens=context, objective=stock.readout)
