"""Export a model that reads images as a ``PixtralVisionModel`` of ``transformers``, with an image processor.

The vision tower of Pixtral (Agrawal et al. 2024) computes what our linear stem and trunk compute. Its own image
processor keeps the aspect ratio of pictures, so the folder names CLIP's: shorter side to the size, middle cut out.
No class of ``transformers`` has a classifier on Pixtral: that of a fine-tuned model has a file of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import UserError
from data_prep.files import new_folder
from data_prep.shards.images import ImageFormat
from lm.config.model_settings import ModelConfig
from lm.data.patch_rows import layout_of
from lm.export.huggingface import write_card, write_json
from lm.export.model_card import NO_FACTS, CardFacts, model_card
from lm.export.task_model import TaskHead, label_config
from lm.model.image_transformer import ImageTransformer
from lm.runs.checkpoint import Checkpoint, save_tensors
from lm.runs.directory import Run

EPSILON = 1e-5  # of Pixtral's norms, which no setting changes
LARGEST_GRID = 64  # patches a side, or twice those of training: transformers 4 reads no larger images
TOLERANCE = 1e-4  # of hidden states, of the two models
# Pixtral's name of each part of a block.
PARTS = {
    "attention_norm": "attention_norm",
    "attention.query": "attention.q_proj",
    "attention.key": "attention.k_proj",
    "attention.value": "attention.v_proj",
    "attention.output": "attention.o_proj",
    "feed_forward_norm": "ffn_norm",
    "feed_forward.gate": "feed_forward.gate_proj",
    "feed_forward.up": "feed_forward.up_proj",
    "feed_forward.down": "feed_forward.down_proj",
}
UPRIGHT = "ImageOps.exif_transpose(Image.open(name))"
# transformers 4 takes no gray Pillow images.
GRAY = {"numpy": "import numpy as np\n", "picture": f'np.asarray({UPRIGHT}.convert("L"))[None]'}
COLOR = {"numpy": "", "picture": UPRIGHT}
CLASSIFIER = "classifier.safetensors"
IMPORTS = """\
<numpy>import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModel
"""
MORE_IMPORTS = """\
from safetensors.torch import load_file
from transformers.utils import cached_file
"""
FEATURES = """
where = <where>
processor = AutoImageProcessor.from_pretrained(where, backend="pil")
model = AutoModel.from_pretrained(where)
pictures = [<picture> for name in ["photo.jpg"]]
inputs = processor(pictures, return_tensors="pt")
with torch.no_grad():
    patches = model(**inputs).last_hidden_state[0]  # of all pictures, one after another
features = patches.unflatten(0, (len(pictures), -1)).mean(1)
"""
SHOW = """\
print(features.shape)
"""
CLASSIFY = f"""\
head = load_file(cached_file(where, "{CLASSIFIER}"))
for row in (features @ head["weight"].T + head["bias"]).softmax(1):
    print({{model.config.id2label[number]: float(probability) for number, probability in enumerate(row)}})
"""


def export_image_model(
    run: Run,
    out: Path,
    checkpoint: Checkpoint,
    facts: CardFacts = NO_FACTS,
    model: ImageTransformer | None = None,
    head: TaskHead | None = None,
) -> None:
    """Write the stem and trunk of a checkpoint to the folder ``out``, with float32 weights and an image processor.

    If ``transformers`` is installed, its hidden states are compared with ours before the folder is there.

    Args:
        model: of this checkpoint; None: load it.
        head: of a fine-tuned model; it is written next to the weights.

    Raises:
        UserError: Pixtral does not compute what the model does, its head has a hidden layer, or ``out`` is not empty.
    """
    if obstacles := pixtral_obstacles(run.config.model):
        raise UserError(
            f"{run.path} cannot be exported: no model class of transformers supports {'; nor '.join(obstacles)}"
        )
    if head and head.hidden:
        raise UserError(
            f"{run.path} cannot be exported: {CLASSIFIER} holds a head without a hidden layer (fine-tune with "
            "--head-hidden 0)"
        )
    form = run.image_format
    model = model or run.load_image_model(torch.device("cpu"), checkpoint)
    with new_folder(out) as folder:
        write_image_model(folder, run.config.model, model.state_dict(), form, head)
        checked = compare_with_transformers(folder, model)
        write_card(run, folder, _card(run, checkpoint, form, head, checked, facts))


def pixtral_obstacles(model: ModelConfig) -> list[str]:
    """What Pixtral's vision tower does not compute of a model that reads images, each with what would be exported."""
    found = []
    if model.stem != "linear":
        found.append(
            f"the stem {model.stem}: Pixtral has no convolutions before its patches (only linear can be exported)"
        )
    if model.norm_epsilon != EPSILON:
        found.append(f"norm_epsilon {model.norm_epsilon:g} (only {EPSILON:g} can be exported)")
    if model.activation != "swiglu":
        found.append(f"the activation {model.activation} (only swiglu can be exported)")
    if model.qk_norm:
        found.append("qk_norm in a model of images (only false can be exported)")
    if model.key_value_heads != model.num_heads:
        found.append(
            f"num_key_value_heads {model.key_value_heads} (only num_heads, {model.num_heads}, can be exported)"
        )
    if model.head_width * model.num_heads != model.hidden_size:
        found.append(f"head_size {model.head_width} (only hidden_size / num_heads can be exported)")
    return found


def write_image_model(
    folder: Path, model: ModelConfig, state: Mapping[str, Tensor], form: ImageFormat, head: TaskHead | None = None
) -> None:
    """Write weights, ``config.json``, ``preprocessor_config.json`` and, with a ``head``, ``classifier.safetensors``.

    ``state`` is that of an ``ImageTransformer``.
    """
    save_tensors(pixtral_weights(model, state), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", pixtral_config(model) | (label_config(head) if head else {}))
    write_json(folder / "preprocessor_config.json", processor_config(form))
    if head:
        save_tensors({"weight": head.weight, "bias": head.bias}, folder / CLASSIFIER, metadata={"format": "pt"})


def pixtral_weights(model: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float32 weights of stem and trunk by Pixtral's names; ``state`` is that of an ``ImageTransformer``."""
    names = {"embedding.projection.weight": "patch_conv.weight", "embedding.norm.weight": "ln_pre.weight"}
    for layer in range(model.num_layers):
        for ours, theirs in PARTS.items():
            names[f"blocks.{layer}.{ours}.weight"] = f"transformer.layers.{layer}.{theirs}.weight"
    weights = {theirs: state[ours].detach().cpu().float().contiguous() for ours, theirs in names.items()}
    kernel = (model.hidden_size, model.image_channels, model.patch_size, model.patch_size)
    return weights | {"patch_conv.weight": weights["patch_conv.weight"].view(kernel)}


def pixtral_config(model: ModelConfig) -> dict[str, Any]:
    """The content of ``config.json``, for both transformers 4 and 5, which name the rotary base differently."""
    return {
        "architectures": ["PixtralVisionModel"],
        "model_type": "pixtral",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.feed_forward_width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_channels": model.image_channels,
        "image_size": max(2 * model.image_size, LARGEST_GRID * model.patch_size),  # the largest, not that of training
        "patch_size": model.patch_size,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "torch_dtype": "float32",
    }


def processor_config(form: ImageFormat) -> dict[str, Any]:
    """The content of ``preprocessor_config.json``, whose pixels are those of ``form``, normalized."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": form.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": form.size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": form.size, "width": form.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(form.mean),
        "image_std": list(form.std),
    }


def compare_with_transformers(folder: Path, model: ImageTransformer) -> str:
    """Compare the hidden states of an exported folder with those of ``model``, for squares and one other image.

    Returns:
        What was found, as a sentence; "" if ``transformers`` is not installed.

    Raises:
        UserError: they differ by more than ``TOLERANCE``, or that share of their root mean square above 1.
    """
    try:
        import transformers
    except ImportError:
        return ""
    from safetensors.torch import load_file

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    theirs = transformers.AutoModel.from_config(config).float().eval()
    theirs.load_state_dict(load_file(folder / "model.safetensors"))
    ours = copy.deepcopy(model).cpu().eval()
    shape, draw, worst = model.config, torch.Generator().manual_seed(0), 0.0
    side = shape.image_size // shape.patch_size
    for height, width in ((side, side), (side + 1, side + 1), (3, 3), (side, side + 2)):
        size = (1, shape.image_channels, height * shape.patch_size, width * shape.patch_size)
        image = torch.randn(size, generator=draw)
        with torch.no_grad():
            found = theirs(image).last_hidden_state
            expected = ours([image], layout_of([image], shape.patch_size))
        scale = max(1.0, float(expected.square().mean().sqrt()))
        worst = max(worst, float((found - expected).abs().max()) / scale)
    if not worst <= TOLERANCE:
        raise UserError(
            f"transformers {transformers.__version__} computes other hidden states than Kindling, by up to "
            f"{worst:.1g}: nothing was exported; try another version of transformers"
        )
    return (
        f"On export, the hidden states of transformers {transformers.__version__} were compared with Kindling's for "
        f"four image sizes: they differ by at most {worst:.1g}."
    )


def _card(
    run: Run, checkpoint: Checkpoint, form: ImageFormat, head: TaskHead | None, checked: str, facts: CardFacts
) -> str:
    patch_size = run.config.model.patch_size
    trained = (
        f"It was trained on images of {form.size} x {form.size} pixels. Other sides work if they are multiples of "
        f"{patch_size}, but it has not learned from them."
    )
    notes = [
        "The features of a picture are the mean over its patches, as in `kindling embed`.",
        f"The image processor scales the shorter side of a picture to {form.size} pixels, cuts out the middle and "
        "normalizes it by the mean and standard deviation of the training data. `exif_transpose` turns a photo "
        'upright first. `backend="pil"` (in transformers 4: `use_fast=False`) scales with Pillow, as in training, '
        "even if torchvision is installed.",
        *([checked] if checked else []),
    ]
    if head:
        notes[:1] = [
            "No class of transformers has a classifier on a PixtralVisionModel, so pipelines cannot load this one: "
            f"`{CLASSIFIER}` holds the matrix and the bias of its linear layer, to be applied as above."
        ]
        limits = ["It has learned to tell apart the classes of its training images, and knows no others."]
    else:
        limits = [
            f"The head of the objective `{run.config.objective.objective}` is left out. The model knows no classes: "
            "train a classifier, such as a linear one, on its features."
        ]
    return model_card(
        run,
        checkpoint,
        model="A PixtralVisionModel",
        pipeline_tag="image-feature-extraction",
        tags=["image-classification"] if head else [],
        snippet=IMPORTS + (MORE_IMPORTS if head else "") + FEATURES + (CLASSIFY if head else SHOW),
        values=GRAY if form.channels == 1 else COLOR,
        facts=facts,
        notes=notes,
        limits=[*limits, trained],
    )
