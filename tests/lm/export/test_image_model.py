"""Exported models of images against transformers, and its image processor against the pixels of a build."""

from __future__ import annotations

import ast
import io
import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from data_prep.errors import UserError
from data_prep.shards.images import ImageFormat
from lm import api
from lm.cli.main import main
from lm.config.settings import Config
from lm.data.patch_rows import layout_of
from lm.export import image_model
from lm.export.image_model import compare_with_transformers, export_image_model, pixtral_obstacles
from lm.export.import_huggingface import import_checkpoint
from lm.export.model_card import NO_FACTS, CardFacts
from lm.export.task_model import TaskHead
from lm.inference.attention_maps import attention_maps
from lm.model.image_transformer import ImageTransformer
from lm.runs import checkpoint
from lm.runs.checkpoint_writer import snapshot
from lm.runs.directory import open_run, plain_settings
from tests.lm.export.conftest import disturbed
from tests.lm.export.test_model_card import run_snippet

transformers = pytest.importorskip("transformers")

SHAPES = [
    {"patch_size": 4},
    {"num_layers": 3, "hidden_size": 48, "num_heads": 3, "patch_size": 2, "rope_theta": 100.0},
    {"patch_size": 8, "image_channels": 1, "feed_forward_size": 40},
]
RED_GREEN_BLUE = ImageFormat(16, 3, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
GRAY = ImageFormat(16, 1, (0.3,), (0.31,))
LAID_OVER_WHITE = pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 ignores transparency")


@pytest.fixture
def make_run(tmp_path):
    """A run directory of a model of images with random weights, far from their initialization."""

    def make(**changes):
        shape = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "norm_epsilon": 1e-5, "image_channels": 3}
        shape |= {"patch_size": 4, "image_size": 16, "objective": "simclr", "batch_images": 8} | changes
        config = Config().replace(data=("photos",), **shape)
        form = RED_GREEN_BLUE if config.model.image_channels == 3 else GRAY
        (tmp_path / "run").mkdir()
        config.save(tmp_path / "run" / "config.toml")
        form.save(tmp_path / "run" / form.file_name)
        model = disturbed(ImageTransformer(config.model).initialize(1, identity=False))
        state = {"processor_sha256": form.sha256, "config": plain_settings(config)}
        checkpoint.save(tmp_path / "run" / "checkpoints", 7, snapshot(model.state_dict()), {}, state)
        return open_run(tmp_path / "run")

    return make


def exported(run, out, facts=NO_FACTS, head=None):
    export_image_model(run, out, run.newest(), facts, head=head)
    return out


def our_states(run, images):
    with torch.no_grad():
        return run.load_image_model(torch.device("cpu"))([images], layout_of([images], run.config.model.patch_size))


def picture(width, height, mode="RGB", seed=0):
    """Smooth colors with noise on them, so that the filter of a resize shows."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (5, 7, 4), dtype=np.uint8), "RGBA")
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = np.clip(smooth + draw.integers(-40, 41, smooth.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(noisy, "RGBA").convert(mode)


def normalized(form, image):
    pixels = form.pixels(image).astype(np.float64) / 255
    return ((pixels - form.mean) / form.std).transpose(2, 0, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_hidden_states_are_those_of_pixtral_for_squares_and_others(make_run, tmp_path, shape):
    run = make_run(**shape)
    theirs = transformers.AutoModel.from_pretrained(exported(run, tmp_path / "out"))
    assert type(theirs).__name__ == "PixtralVisionModel"
    draw = torch.Generator().manual_seed(3)
    for height, width in ((16, 16), (8, 8), (32, 32), (16, 40), (24, 8)):
        images = torch.randn(3, run.config.model.image_channels, height, width, generator=draw)
        with torch.no_grad():
            states = theirs(images).last_hidden_state
        assert states.std() > 0.5
        torch.testing.assert_close(our_states(run, images).flatten(0, 1), states[0], rtol=0, atol=1e-4)


def test_attention_maps_are_those_of_transformers(make_run, tmp_path):
    run = make_run(num_layers=3, hidden_size=48, num_heads=3)
    where = exported(run, tmp_path / "out")
    theirs = transformers.AutoModel.from_pretrained(where, attn_implementation="eager")
    pixels = np.stack([RED_GREEN_BLUE.pixels(picture(16, 16, seed=seed)) for seed in range(3)])
    found = attention_maps(run.load_image_model(torch.device("cpu")), RED_GREEN_BLUE, pixels)
    for image, maps in zip(pixels, found, strict=True):
        inputs = torch.from_numpy(normalized(RED_GREEN_BLUE, Image.fromarray(image))).float()[None]
        with torch.no_grad():
            (attention,) = theirs(inputs, output_attentions=True).attentions[-1]
        assert attention.std() > 0.01
        np.testing.assert_allclose(maps, attention.mean(1).unflatten(1, (4, 4)).numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (40, 40), (61, 40), (40, 61), (200, 33), (7, 9), (17, 16)])
def test_the_image_processor_gives_the_pixels_of_a_build(make_run, tmp_path, size):
    out = exported(make_run(), tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(out, backend="pil")
    given = picture(*size)
    found = processor(given, return_tensors="np").pixel_values
    np.testing.assert_allclose(found[0], normalized(RED_GREEN_BLUE, given), rtol=0, atol=1e-5)


def palette(**options):
    """A picture of 64 colors, as Pillow opens it from a PNG."""
    file = io.BytesIO()
    picture(61, 40).quantize(64).save(file, "PNG", **options)
    return Image.open(file)


@pytest.mark.parametrize(
    "given",
    [
        picture(61, 40, "L"),
        pytest.param(picture(61, 40, "RGBA"), marks=LAID_OVER_WHITE),
        picture(61, 40, "CMYK"),
        palette(),
        pytest.param(palette(transparency=5), marks=LAID_OVER_WHITE),
    ],
    ids=["gray", "RGBA", "CMYK", "palette", "transparent palette"],
)
def test_pictures_of_other_modes_become_the_same_pixels(make_run, tmp_path, given):
    processor = transformers.AutoImageProcessor.from_pretrained(exported(make_run(), tmp_path / "out"), backend="pil")
    found = processor(given, return_tensors="np").pixel_values
    np.testing.assert_allclose(found[0], normalized(RED_GREEN_BLUE, given), rtol=0, atol=1e-5)


def test_gray_pictures_have_one_channel(make_run, tmp_path):
    out = exported(make_run(image_channels=1), tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(out, backend="pil")
    given = picture(61, 40, "L")
    found = processor(np.asarray(given)[None], return_tensors="np").pixel_values
    assert found.shape == (1, 1, 16, 16)
    np.testing.assert_allclose(found[0], normalized(GRAY, given), rtol=0, atol=1e-5)


def test_the_classifier_of_a_fine_tuned_model_is_applied_by_the_snippet(make_run, tmp_path, monkeypatch):
    run, draw = make_run(), torch.Generator().manual_seed(5)
    head = TaskHead(torch.randn(3, 32, generator=draw), torch.randn(3, generator=draw), ("a cat", "dog", "é"), 1, False)
    out = exported(run, tmp_path / "out", head=head)
    given = picture(61, 40)
    given.save(out / "photo.jpg")
    printed = ast.literal_eval(run_snippet((out / "README.md").read_text(), out, monkeypatch))
    pixels = torch.from_numpy(normalized(RED_GREEN_BLUE, Image.open(out / "photo.jpg")))[None].float()
    scores = our_states(run, pixels).mean(1) @ head.weight.T + head.bias
    expected = dict(zip(head.labels, scores.softmax(1)[0].tolist(), strict=True))
    assert printed == pytest.approx(expected, abs=1e-5)
    assert max(expected.values()) < 0.95


def test_a_fine_tuned_run_answers_as_predict(image_classifier, tmp_path, monkeypatch):
    out, photo = tmp_path / "out", tmp_path / "out" / "photo.jpg"
    result = CliRunner().invoke(main, ["export", str(image_classifier.path), "--to", "hf", "--out", str(out)])
    assert result.exit_code == 0, result.output
    picture(30, 20).save(photo)
    printed = ast.literal_eval(run_snippet((out / "README.md").read_text(), out, monkeypatch))
    (expected,) = api.load(image_classifier.path).predict([str(photo)])
    assert printed == pytest.approx(expected["probabilities"], abs=1e-5)
    assert max(printed, key=printed.get) == expected["label"]
    card = (out / "README.md").read_text()
    assert "Fine-tuned for the task image_classification from the run" in card
    assert "texts are read" not in card


def test_the_card_of_a_classifier_says_that_no_class_has_it(make_run, tmp_path):
    head = TaskHead(torch.zeros(2, 32), torch.zeros(2), ("cat", "dog"), 1, False)
    out = exported(make_run(), tmp_path / "out", head=head)
    card = (out / "README.md").read_text()
    assert "No class of transformers has a classifier on a PixtralVisionModel" in card
    assert "knows no others" in card
    assert "left out" not in card
    assert ModelCard(card).data.tags == ["kindling", "image-classification"]
    with pytest.raises(ValueError, match="PixtralVisionConfig"):
        transformers.AutoModelForImageClassification.from_pretrained(out)
    assert transformers.AutoConfig.from_pretrained(out).label2id == {"cat": 0, "dog": 1}


@pytest.mark.parametrize("channels", [1, 3])
def test_the_snippet_of_the_card_runs_in_the_folder(make_run, tmp_path, monkeypatch, channels):
    out = exported(make_run(image_channels=channels), tmp_path / "out")
    picture(61, 40).save(out / "photo.jpg")
    printed = run_snippet((out / "README.md").read_text(), out, monkeypatch)
    assert printed.strip() == "torch.Size([1, 32])"


def test_the_card_says_how_the_model_was_trained_and_what_it_lacks(make_run, tmp_path):
    run = make_run(objective="mae")
    card = (exported(run, tmp_path / "out", CardFacts(license="mit", name="me/mine")) / "README.md").read_text()
    data = ModelCard(card).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "image-feature-extraction")
    assert "PixtralVisionModel with 2 layers of width 32, 2 heads and patches of 4 x 4 pixels" in card
    assert "Pretrained with the objective `mae`: 7 steps of 8 images (56 images in total)" in card
    assert "Data: photos." in card
    assert "The head of the objective `mae` is left out" in card
    assert "mean over its patches" in card
    assert f"hidden states of transformers {transformers.__version__} were compared" in card
    assert "token" not in card
    assert "vocabulary" not in card


def test_the_card_has_the_accuracies_that_evaluate_measured(make_run, tmp_path):
    run = make_run()

    def accuracies(knn, linear):
        return {"knn": {"accuracy": knn}, "linear": {"accuracy": linear}}

    evaluation = {
        "checkpoint": run.newest().state["sha256"]["model.safetensors"],
        "validation": {"simclr": {"loss": 1.0}},
        "features": accuracies(0.4321, 0.5),
        "baselines": {
            "raw_pixels": accuracies(0.25, 0.3),
            "random_weights": accuracies(0.2, 0.35),
            "majority": {"accuracy": 0.1},
        },
        "images": {"train": 1048, "test": 55},
        "protocol": "in /home/me",
    }
    (run.path / "evaluation.json").write_text(json.dumps(evaluation))
    card = (exported(run, tmp_path / "out") / "README.md").read_text()
    assert "fitted on 1,048 training images and tested on 55" in card
    assert (
        "| this model | 43.2 | 50.0 |\n| raw pixels (baseline) | 25.0 | 30.0 |\n| random weights (baseline) | 20.0"
        in card
    )
    assert "/home/me" not in card


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stem": "convolutional"}, "the stem convolutional: Pixtral has no convolutions"),
        ({"norm_epsilon": 1e-6}, r"norm_epsilon 1e-06 \(only 1e-05"),
        ({"activation": "relu2"}, "the activation relu2"),
        ({"qk_norm": True}, "qk_norm"),
        ({"num_heads": 4, "num_key_value_heads": 2}, r"num_key_value_heads 2 \(only num_heads, 4"),
        ({"head_size": 20}, "head_size 20"),
        ({"qk_norm": True, "activation": "relu2"}, "relu2 .*; nor qk_norm"),
    ],
)
def test_what_pixtral_does_not_compute_is_refused_with_its_reason(make_run, tmp_path, changes, words):
    run = make_run(**changes)
    with pytest.raises(UserError, match=f"no model class of transformers supports .*{words}"):
        exported(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_pixtral_computes_has_no_obstacles():
    shape = Config().replace(patch_size=4, image_channels=3, norm_epsilon=1e-5, num_key_value_heads=6, head_size=32)
    assert pixtral_obstacles(shape.model) == []


def test_hidden_states_that_differ_end_the_export(make_run, tmp_path, monkeypatch):
    run = make_run()
    other = image_model.pixtral_config(run.config.model) | {"rope_theta": 1e4 + 900}
    other["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4 + 900}
    monkeypatch.setattr(image_model, "pixtral_config", lambda model: other)
    with pytest.raises(
        UserError, match=r"computes other hidden states than Kindling, by up to .*: nothing was exported"
    ):
        exported(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_single_changed_weight_is_found(make_run, tmp_path):
    run = make_run()
    out = exported(run, tmp_path / "out")
    weights = load_file(out / "model.safetensors")
    weights["transformer.layers.1.ffn_norm.weight"][3] += 0.01
    save_file(weights, out / "model.safetensors")
    with pytest.raises(UserError, match="other hidden states"):
        compare_with_transformers(out, run.load_image_model(torch.device("cpu")))


def test_the_command_writes_a_folder_and_says_how_to_load_it(make_run, tmp_path):
    run = make_run()
    result = CliRunner().invoke(main, ["export", str(run.path), "--to", "hf", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert f'transformers.AutoModel.from_pretrained("{tmp_path / "out"}")' in result.stderr
    assert "left out: checkpoints (all but the weights of step 7)" in result.stderr
    assert "processor.json" not in result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors", "config.json", "preprocessor_config.json", "kindling.toml", "README.md"
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "pixtral"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "gguf"], "--to gguf is for models that read text, and .* reads images: use --to hf"),
        (["--to", "sentence-transformers"], "--to sentence-transformers is for models that read text"),
        (["--to", "peft"], "--to peft is for models that read text"),
        (["--to", "hf", "--readout", "masked_token"], "--readout is for language models"),
    ],
)
def test_formats_of_text_are_refused(make_run, tmp_path, options, words):
    arguments = ["export", str(make_run().path), "--out", str(tmp_path / "out"), *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert re.search(words, result.stderr)


def test_an_exported_folder_is_not_imported_as_text(make_run, tmp_path):
    out = exported(make_run(), tmp_path / "out")
    with pytest.raises(UserError, match="model_type 'pixtral' cannot be imported: it reads images"):
        import_checkpoint(str(out), tmp_path / "back")
