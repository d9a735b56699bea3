from __future__ import annotations

import base64
import io
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image

from data_prep.shards.codebook import load_codebook
from lm.api import train
from lm.cli.main import main
from lm.data.images import denormalized, model_inputs
from lm.data.patch_rows import layout_of
from lm.data.training_data import training_rows
from lm.evaluation.image_features import evaluate_images, verdict
from lm.inference.attention_maps import attention_maps, overlaid
from lm.objectives.objective import open_objective
from lm.reports.image_report import principal_components, write_image_report
from lm.reports.page import picture
from lm.runs.directory import Run, open_run
from lm.runs.run_data import open_data
from lm.training.reporter import NullReporter
from tests.conftest import charts_drawn


@pytest.fixture(scope="module")
def runs(pictures, seeing, visual_tokens, tmp_path_factory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    config = seeing.replace(data=(str(pictures.directory),), visual_tokenizer=str(visual_tokens))
    return {
        name: train(config.replace(objective=name), run=folder / f"{name} <&> one", reporter=NullReporter())
        for name in ("simclr", "dino", "mae", "beit")
    }


@pytest.fixture(scope="module", params=["simclr", "mae", "beit"])
def run(request, runs) -> Run:
    return runs[request.param]


@pytest.fixture(scope="module")
def simclr(runs) -> Run:
    """For what is the same for all objectives."""
    return runs["simclr"]


@pytest.fixture(scope="module")
def html(run) -> str:
    with charts_drawn():
        return write_image_report(run, evaluate_images(run)).read_text(encoding="utf-8")


def images_of(html: str) -> dict[str, np.ndarray]:
    """The pictures of a page by their description."""
    found = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)"', html)
    return {alt: np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data, alt in found}


def test_training_writes_the_page(run):
    assert "Nearest neighbors" in (run.path / "report.html").read_text(encoding="utf-8")


def test_the_page_is_well_formed_needs_no_network_and_describes_each_picture(html, read_page, run):
    page = read_page(html)
    count = page.tags.count("img")
    assert count == len(re.findall(r'<img src="data:image/png;base64,[^"]+" alt="\w[^"]+" title="\w', html))
    assert count == (8 * 3 if run.config.objective.objective == "simclr" else 8 * 2 + 8 * 4) + 10 * 6 + 6 * 4
    assert run.path.name in page.words()


def test_curves_and_what_they_mean_are_there(html, run, read_page):
    words = read_page(html).words()
    validations = [line["validation"] for line in run.metrics() if "validation" in line]
    best = min((each[run.config.objective.objective] for each in validations), key=lambda each: each["loss"])
    for name in ("knn accuracy", "spread", "effective rank"):
        assert f"{name} {best[name.replace(' ', '_')]:.3f}" in words
    for title in ("loss", "k-NN accuracy, validation", "spread", "effective rank", "learning rate"):
        assert f">{title}</text>" in html
    assert ">images per second</text>" in html
    assert "to step 6 of 6" in words
    assert "1 after a collapse" in words
    assert "patch_size" in words
    assert "Pillow" in words
    if run.config.objective.objective == "simclr":  # -log of 1 in 2n - 1 views, for 12 and for 8 images
        assert f"{np.log(23):.2f}, and {np.log(15):.2f} in validation" in words
    elif run.config.objective.objective == "mae":
        assert "predicting 0 everywhere has 1" in words
    else:
        assert f"alike has {np.log(12):.2f}" in words
        assert ">code accuracy, validation</text>" in html


def test_the_sheet_has_the_very_views_of_training(html, run):
    config = run.config
    rows = training_rows(open_data(run), config).of_step(0)
    objective = open_objective(config, run.image_format)
    batch = objective.prepare(rows)
    views = denormalized(objective.views_of(batch), run.image_format).permute(0, 2, 3, 1) * 255
    found = images_of(html)
    for number in range(8):
        assert (found[f"training image {number + 1}"] == rows.images[number]).all()
        for view in range(objective.views):
            name = f"view {view + 1}" if objective.views > 1 else "view"
            expected = views[view * len(batch) + number].numpy()
            assert np.abs(found[f"{name} of image {number + 1}"] - expected).max() <= 0.51


def test_what_is_rebuilt_is_shown_where_patches_are_hidden(html, run, pictures, visual_tokens):
    found = images_of(html)
    if run.config.objective.objective == "simclr":
        assert "Hidden and rebuilt" not in html
        return
    split, rows = pictures.split("validation"), ["original", "visible", "rebuilt"]
    rows += ["its codes"] if run.config.objective.objective == "beit" else []
    chosen = np.arange(8) * split.count // 8
    for number, original in enumerate(split.read(chosen), 1):
        shown = {name: found[f"{name}, held-out image {number}"] for name in rows}
        assert (shown["original"] == original).all()
        tiles = {name: each.reshape(4, 4, 4, 4, 3).swapaxes(1, 2).reshape(16, -1) for name, each in shown.items()}
        hidden = np.abs(tiles["visible"].astype(int) - 128).max(1) <= 1
        assert hidden.sum() == 12
        if "its codes" not in rows:
            assert (tiles["rebuilt"][~hidden] == tiles["original"][~hidden]).all()
            assert (tiles["rebuilt"][hidden] != tiles["original"][hidden]).any()
            continue
        book = load_codebook(visual_tokens)
        codes, _ = book.encode(tiles["original"])
        assert (tiles["its codes"] == book.pixels.reshape(12, -1)[codes]).all()
        assert (tiles["rebuilt"][~hidden] == tiles["its codes"][~hidden]).all()
    assert ("without the model, held-out image 1" in found) == (run.config.objective.objective == "mae")


def test_prototypes_are_shown_with_the_images_nearest_to_them(runs, pictures, read_page):
    run = runs["dino"]
    html = write_image_report(run, None).read_text(encoding="utf-8")
    objective = open_objective(run.config, run.image_format)
    model, split = run.load_image_model(torch.device("cpu"), None, objective.new_model), pictures.split("train")
    images = [model_inputs(torch.from_numpy(split.read(np.arange(split.count))), run.image_format)]
    with torch.no_grad():
        states = model(images, layout_of(images, 4)).mean(1)
        hidden = F.gelu(
            F.linear(F.gelu(F.linear(model.head.norm(states), model.head.first.weight)), model.head.second.weight)
        )
        found = F.normalize(F.linear(hidden, model.head.third.weight), dim=1)
        cosines = (found @ F.normalize(model.head.prototypes, dim=1).T).numpy()
    of = cosines.argmax(1)
    most = int(np.bincount(of, minlength=24).argmax())
    best = int(cosines[:, most].argmax())
    words, shown = read_page(html).words(), images_of(html)
    assert (
        f"Of 24 prototypes, {len(set(of.tolist()))} are the nearest one of some of {split.count} training images"
        in words
    )
    assert f"{most}, of {(of == most).sum()}" in words
    name = f"prototype {most}: cosine {cosines[best, most]:.3f}, {split.source_of(best)}"
    assert (shown[name] == split.read(np.array([best]))[0]).all()
    assert sum(each.startswith("prototype ") for each in shown) == 6 * 5
    assert ">small view 2</th>" in html
    assert "Prototypes" not in (runs["simclr"].path / "report.html").read_text(encoding="utf-8")


def test_neighbors_are_the_nearest_training_images_with_their_classes(html, run, pictures, read_page):
    """Computed once more by hand, one image at a time."""
    model, form = run.load_image_model(torch.device("cpu")), run.image_format

    def feature(pixels: np.ndarray) -> np.ndarray:
        images = [model_inputs(torch.from_numpy(pixels[None]), form)]
        with torch.no_grad():
            return model(images, layout_of(images, 4)).mean(1)[0].double().numpy()

    held_out, training = pictures.split("validation"), pictures.split("train")
    features = np.stack([feature(each) for each in training.read(np.arange(training.count))])
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    right = 0
    for number in np.arange(10) * held_out.count // 10:
        own = feature(held_out.read(np.array([number]))[0])
        cosines = features @ own / np.linalg.norm(own)
        nearest = np.argsort(-cosines)[:5]
        for neighbor in nearest:
            assert f"neighbor: cosine {cosines[neighbor]:.3f}, {training.source_of(int(neighbor))}" in html
        right += int((training.labels[nearest] == held_out.labels[number]).sum())
    words = read_page(html).words()
    assert f"✓ {right} of 50 neighbors have the class" in words
    assert words.count("✓") - 1 == right  # so that it can be seen without colors
    assert words.count("✗") - 1 == 50 - right


def test_attention_is_shown_over_held_out_images_for_all_heads_and_each(html, run, pictures, read_page):
    split, model = pictures.split("validation"), run.load_image_model(torch.device("cpu"))
    images = split.read(np.arange(6) * split.count // 6)
    maps, found, words = attention_maps(model, run.image_format, images), images_of(html), read_page(html).words()
    for number, (image, of_heads) in enumerate(zip(images, maps, strict=True), 1):
        for name, shares in {"all heads": of_heads.mean(0), "head 1": of_heads[0], "head 2": of_heads[1]}.items():
            shown = f"attention of {name} on held-out image {number}, at most {shares.max():.1%} on a patch"
            assert (found[shown] == overlaid(image, shares)).all()
            assert f"{shares.max() * 16:.1f} x" in words
    assert "an even share, 1/16" in words


def test_names_of_classes_break_at_underscores_and_ten_letters_fit(pictures, simclr, tmp_path):
    folder = shutil.copytree(pictures.directory, tmp_path / "named")
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest.replace('"left"', '"left_<b>half"'))
    named = replace(simclr, config=simclr.config.replace(data=(str(folder),)))
    html = write_image_report(named, None).read_text()
    assert "left_<wbr>&lt;b&gt;half</b></figcaption>" in html
    (columns,) = re.findall(r"\.asked { display: grid; grid-template-columns: ([^;]+);", html)
    (letters,) = re.findall(r"\.asked figcaption { font-size: ([.\d]+)rem", html)
    assert min(float(width) for width in re.findall(r"([.\d]+)rem", columns)) > 10 * 0.59 * float(
        letters
    )  # of a wide font


def test_the_evaluation_is_shown_next_to_its_baselines(html, run, read_page):
    words, found = read_page(html).words(), evaluate_images(run)
    assert "accuracy k-NN linear probe this run" in words
    rows = {
        "this run": found["features"],
        **{
            f"{name} (baseline)": found["baselines"][name.replace(" ", "_")]
            for name in ("raw pixels", "random weights")
        },
    }
    for name, probes in rows.items():
        cells = " ".join(f"{probe['accuracy']:.1%} ± {probe['error']:.1%}" for probe in probes.values())
        assert f"{name} {cells}" in words
    majority = found["baselines"]["majority"]
    usual = f"{majority['accuracy']:.1%} ± {majority['error']:.1%}"
    assert f"most frequent class (baseline) {usual} {usual}" in words
    assert verdict(found) in words
    assert found["protocol"][1:] in words


def test_pictures_without_labels_have_no_marks(pictures, simclr, tmp_path, read_page):
    """As of a flat folder."""
    folder = shutil.copytree(pictures.directory, tmp_path / "flat")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["classes"] = []
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            index = np.fromfile(folder / f"{shard['name']}.idx", "<i8").reshape(-1, 4)
            index[:, 0] = -1
            index.tofile(folder / f"{shard['name']}.idx")
            shard["classes"] = []
    (folder / "manifest.json").write_text(json.dumps(manifest))
    flat = replace(simclr, config=simclr.config.replace(data=(str(folder),)))
    words = read_page(write_image_report(flat, evaluate_images(flat)).read_text()).words()
    assert "No accuracy: the images of" in words
    assert "Nearest neighbors" in words
    assert "✓" not in words
    assert "Training did not see the classes" not in words
    assert "this run" not in words


def test_without_the_data_only_the_pictures_are_missing(simclr, tmp_path, read_page):
    words = read_page(
        write_image_report(
            replace(simclr, config=simclr.config.replace(data=(str(tmp_path / "gone"),))), None
        ).read_text()
    ).words()
    assert "The pictures are missing because the run's data is not there" in words
    assert "Nearest neighbors" not in words
    assert "Attention" not in words
    assert "effective rank" in words


@pytest.mark.usefixtures("charts")
def test_the_same_run_gives_the_same_page(simclr):
    assert write_image_report(simclr, None).read_bytes() == write_image_report(simclr, None).read_bytes()


def test_the_command_writes_the_page_of_a_checkpoint_and_refuses_text(simclr):
    result = CliRunner().invoke(main, ["report", str(simclr.path), "--checkpoint", "4"])
    assert result.exit_code == 0, result.output
    assert "to step 4 of 6" in (simclr.path / "report.html").read_text()
    refused = CliRunner().invoke(main, ["report", str(simclr.path), "--prompt", "The"])
    assert refused.exit_code == 2
    assert "reads images: leave out --prompt and --fill" in refused.output


def test_a_classifier_has_a_page_of_its_own(image_classifier, tmp_path):
    path = shutil.copytree(image_classifier.path, tmp_path / "run")
    made = CliRunner().invoke(main, ["report", str(path)])
    assert made.exit_code == 0, made.stderr
    assert "Example by example" in (path / "report.html").read_text(encoding="utf-8")
    refused = CliRunner().invoke(main, ["report", str(path), "--prompt", "text"])
    assert refused.exit_code == 2
    assert "reads images: leave out --prompt and --fill" in refused.stderr


def test_a_run_without_any_logged_step_says_so(simclr, tmp_path):
    bare = open_run(shutil.copytree(simclr.path, tmp_path / "bare"))
    (bare.path / "metrics.jsonl").unlink()
    assert "No steps have been logged yet" in write_image_report(bare, None).read_text()


def test_principal_components_are_those_of_the_covariance():
    vectors = np.random.default_rng(0).normal(size=(40, 5)) * [3, 2, 1, 0.5, 0.1]
    places, shares = principal_components(vectors)
    values, axes = np.linalg.eigh(np.cov(vectors.T))
    expected = (vectors - vectors.mean(0)) @ axes[:, [-1, -2]]
    assert np.abs(np.abs(places) - np.abs(expected)).max() < 1e-10
    assert shares == pytest.approx(values[[-1, -2]] / values.sum())
    assert (places[np.abs(places).argmax(0), [0, 1]] > 0).all()
    assert np.isfinite(principal_components(np.ones((4, 3)))[1]).all()


def test_a_large_picture_is_made_small_and_a_gray_one_stays_gray():
    def shown(pixels: np.ndarray) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(picture(pixels).partition(",")[2])))

    assert shown(np.zeros((224, 224, 3), dtype=np.uint8)).size == (96, 96)
    gray = shown(np.arange(64, dtype=np.uint8).reshape(8, 8, 1))
    assert (gray.mode, gray.size) == ("L", (8, 8))
    assert (np.asarray(gray).ravel() == np.arange(64)).all()
