"""``report.html`` of a run on images: what it learned from, what it makes of held-out images, curves, settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.errors import UserError
from data_prep.files import write_atomically
from data_prep.shards.images import ImageFormat
from lm.config.settings import Config
from lm.data.image_corpora import ImageCorpora
from lm.data.images import HeldOutImages, ImageValidation, TrainingImages, denormalized
from lm.data.training_data import validation_rows
from lm.evaluation.image_features import MAJORITY, NAMES, verdict
from lm.inference.attention_maps import attention_maps, overlaid
from lm.inference.embedding import Vectors
from lm.inference.image_embedding import image_vectors
from lm.model.device import choose_device
from lm.model.heads import PrototypeHead
from lm.model.image_transformer import ImageTransformer
from lm.objectives.beit import BEiT
from lm.objectives.image_views import ImageViews
from lm.objectives.images import ImageObjective
from lm.objectives.mae import MaskedAutoencoder
from lm.objectives.objective import open_objective, restore
from lm.objectives.simclr import SimCLR
from lm.reports.page import Panel, Scatter, chart, picture, render
from lm.reports.run_report import environment, events_of, lead, settings_of
from lm.runs.checkpoint import Checkpoint
from lm.runs.directory import Run
from lm.runs.metrics_log import best_validation, overfitting, rows_validated, series, summary
from lm.runs.run_data import open_data
from lm.training.plan import format_bytes

SHEET, REBUILT, ATTENDED, ASKED, NEAREST = 8, 8, 6, 10, 5  # images in each part of the page
PROTOTYPES = 6  # that are shown
AMONG, MAPPED, NAMED = 2000, 600, 12  # images that neighbors are sought in, images on the map, classes on it
PART = 256  # images that are read at a time

Shown = dict[str, str]  # a picture: its address, its description, and what is written below it


def write_image_report(run: Run, evaluation: dict[str, Any] | None, checkpoint: Checkpoint | None = None) -> Path:
    """Write ``report.html`` into the run directory and return its path.

    If the data is gone, or has no held-out images, the pictures that need them are left out.

    Args:
        evaluation: the content of ``evaluation.json``, or None.
        checkpoint: has the model to use; None: the newest.
    """
    checkpoint = checkpoint or run.newest()
    objective = open_objective(run.config, run.image_format)
    assert isinstance(objective, ImageObjective)
    model = run.load_image_model(choose_device("auto"), checkpoint, objective.new_model)
    restore(objective, model, checkpoint.objective())
    lines = list(run.metrics())
    corpora = _data_of(run)
    held_out = validation_rows(corpora, run.config) if corpora else None
    assert held_out is None or isinstance(held_out, ImageValidation)
    html = render(
        "image_report.html",
        name=run.path.name,
        lead=lead(run, checkpoint, model, lines),
        evaluation=_evaluated(evaluation) if evaluation else None,
        meaning=_meaning(run, lines),
        curves=_curves(lines),
        remarks=[sentence] if (sentence := overfitting(lines)) else [],
        summary=_summary(lines),
        events=events_of(lines),
        sheet=_sheet(objective, TrainingImages(corpora, run.config)) if corpora else None,
        rebuilt=_rebuilt(objective, model, held_out)
        if held_out and isinstance(objective, (MaskedAutoencoder, BEiT))
        else None,
        neighbors=_neighbors(model, run.image_format, held_out) if held_out else None,
        prototypes=_prototypes(model, run.image_format, held_out.train) if held_out else None,
        attention=_attention(model, run.image_format, held_out) if held_out else None,
        map=_map(model, run.image_format, held_out) if held_out else None,
        settings=settings_of(run),
        environment=environment(model, "Pillow"),
    )
    path = run.path / "report.html"
    write_atomically(path, html)
    return path


def _data_of(run: Run) -> ImageCorpora | None:
    """The images of the run; None if they are gone."""
    try:
        corpora = open_data(run)
    except UserError:
        return None
    return corpora if isinstance(corpora, ImageCorpora) else None


def _shown(pixels: NDArray[np.uint8], description: str, caption: str = "") -> Shown:
    return {"address": picture(pixels), "description": description, "caption": caption}


def _pictures(images: Tensor, description: str) -> list[Shown]:
    """Images (n, C, H, W) in [0, 1]."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [_shown(each, f"{description} {number}") for number, each in enumerate(pixels, 1)]


def _sheet(objective: ImageObjective, training: TrainingImages) -> dict[str, list[Shown]]:
    """The first images of step 1, and the views of them that the model was trained on."""
    rows = training.of_step(0)
    batch = objective.prepare(rows).rows(0, SHEET)
    views = denormalized(objective.views_of(batch), objective.form).chunk(objective.views)
    originals = [_shown(each, f"training image {number}") for number, each in enumerate(rows.images[:SHEET], 1)]
    several = objective.views > 1
    named = {f"view {number}" if several else "view": view for number, view in enumerate(views, 1)}
    if isinstance(objective, ImageViews) and (local := objective.method.local_views):
        smaller = denormalized(objective.local_views_of(batch), objective.form).chunk(local)
        named |= {f"small view {number}": view for number, view in enumerate(smaller, 1)}
    return {"original": originals} | {name: _pictures(view, f"{name} of image") for name, view in named.items()}


@torch.no_grad()
def _rebuilt(objective: MaskedAutoencoder | BEiT, model: ImageTransformer, held_out: ImageValidation) -> dict[str, Any]:
    """Held-out images, what the model sees of them, and what it makes of that."""
    numbers = held_out.held_out.choose(REBUILT)
    batch = objective.whole(held_out.held_out.read(numbers), numbers).to(next(model.parameters()).device)
    made = objective.pictures(model, batch)
    has_codes = isinstance(objective, BEiT)
    scaled = objective.config.objective.normalize_patches and not has_codes
    names = {"original": "original"} | ({"codes": "its codes"} if has_codes else {})
    names |= {"visible": "visible", "rebuilt": "rebuilt"} | ({"flat": "without the model"} if scaled else {})
    rows = {name: _pictures(made[key], f"{name}, held-out image") for key, name in names.items()}
    share = objective.hidden / objective.config.model.patches
    return {"rows": rows, "share": f"{share:.0%}", "scaled": scaled, "has_codes": has_codes}


def _features(model: ImageTransformer, form: ImageFormat, split: HeldOutImages, numbers: NDArray[np.int64]) -> Vectors:
    """Features of these images, scaled to length 1."""
    parts = (split.read(numbers[first : first + PART]) for first in range(0, len(numbers), PART))
    return image_vectors(model, form, parts, normalize=True)


def _neighbors(model: ImageTransformer, form: ImageFormat, held_out: ImageValidation) -> dict[str, Any]:
    """Held-out images, each with the training images whose features have the largest cosine with its own."""
    asked, among = held_out.held_out.choose(ASKED), held_out.train.choose(AMONG)
    cosines = _features(model, form, held_out.held_out, asked) @ _features(model, form, held_out.train, among).T
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :NEAREST]
    rows, right, known = [], 0, 0
    for place, number in enumerate(asked.tolist()):
        own_class = _class(held_out.held_out, number)
        found = []
        for neighbor, cosine in zip(among[nearest[place]].tolist(), cosines[place, nearest[place]], strict=True):
            name = _class(held_out.train, neighbor)
            same = own_class == name if own_class and name else None
            right, known = right + bool(same), known + (same is not None)
            source = f"cosine {cosine:.3f}, {held_out.train.source_of(neighbor)}"
            found.append(
                _shown(held_out.train.read(np.array([neighbor]))[0], f"neighbor: {source}", name) | {"same": same}
            )
        pixels, source = held_out.held_out.read(np.array([number]))[0], held_out.held_out.source_of(number)
        rows.append({"asked": _shown(pixels, f"held-out image: {source}", own_class), "found": found})
    return {"rows": rows, "among": len(among), "of": held_out.train.count, "right": right, "known": known}


@torch.no_grad()
def _prototypes(model: ImageTransformer, form: ImageFormat, train: HeldOutImages) -> dict[str, Any] | None:
    """The prototypes that most training images are nearest to, with the nearest images; None without prototypes."""
    if not isinstance(model.head, PrototypeHead):
        return None
    numbers = train.choose(AMONG)
    parts = (train.read(numbers[first : first + PART]) for first in range(0, len(numbers), PART))
    features = torch.from_numpy(image_vectors(model, form, parts)).to(next(model.parameters()).device)
    cosines = model.head(features).cpu().numpy()
    counts = np.bincount(cosines.argmax(1), minlength=cosines.shape[1])
    rows = {}
    for prototype in np.argsort(-counts, kind="stable")[:PROTOTYPES].tolist():
        places = np.argsort(-cosines[:, prototype], kind="stable")[:NEAREST]
        shown = []
        for number, cosine in zip(numbers[places].tolist(), cosines[places, prototype], strict=True):
            description = f"prototype {prototype}: cosine {cosine:.3f}, {train.source_of(number)}"
            shown.append(_shown(train.read(np.array([number]))[0], description, _class(train, number)))
        rows[f"{prototype}, of {counts[prototype]:,}"] = shown
    return {"rows": rows, "used": int((counts > 0).sum()), "of": len(counts), "images": len(numbers)}


def _attention(model: ImageTransformer, form: ImageFormat, held_out: ImageValidation) -> dict[str, Any]:
    """Held-out images, and over each how much attention its patches receive: of all heads, then of each."""
    images = held_out.held_out.read(held_out.held_out.choose(ATTENDED))
    of_heads = attention_maps(model, form, images)
    patches = of_heads[0, 0].size
    maps = {"all heads": of_heads.mean(1)}
    maps |= {f"head {number}": of_heads[:, number - 1] for number in range(1, of_heads.shape[1] + 1)}
    rows = {"original": [_shown(each, f"held-out image {number}") for number, each in enumerate(images, 1)]}
    for name, shares in maps.items():
        rows[name] = [
            _shown(
                overlaid(image, share),
                f"attention of {name} on held-out image {number}, at most {share.max():.1%} on a patch",
                f"{share.max() * patches:.1f} x",
            )
            for number, (image, share) in enumerate(zip(images, shares, strict=True), 1)
        ]
    return {"rows": rows, "patches": patches}


def _class(split: HeldOutImages, number: int) -> str:
    """The name of an image's class; "" if unknown."""
    label = int(split.labels[number])
    return split.classes[label] if label >= 0 else ""


def _map(model: ImageTransformer, form: ImageFormat, held_out: ImageValidation) -> dict[str, Any] | None:
    """The features of held-out images in the plane in which they differ most; None for fewer than three images."""
    split = held_out.held_out
    numbers = split.choose(MAPPED)
    if len(numbers) < 3:
        return None
    vectors = _features(model, form, split, numbers).astype(np.float64)
    places, shares = principal_components(vectors)
    labels = split.labels[numbers]
    counts = np.bincount(labels[labels >= 0], minlength=len(split.classes))
    shown = sorted(np.argsort(-counts, kind="stable")[:NAMED].tolist())
    points = {"": places[~np.isin(labels, shown)].tolist()}
    points |= {split.classes[label]: places[labels == label].tolist() for label in shown if counts[label]}
    axes = [f"component {number}: {share:.0%} of the variance" for number, share in enumerate(shares, 1)]
    scatter = Scatter("", {name: [(x, y) for x, y in each] for name, each in points.items()}, *axes)
    return {
        "chart": chart([scatter], height=5),
        "images": len(numbers),
        "share": f"{shares.sum():.0%}",
        "others": int(max(0, (counts > 0).sum() - NAMED)),
        "classes": bool(counts.any()),
    }


def principal_components(vectors: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Vectors (n, width) in the plane of their largest variance, (n, 2), and the share of the variance of each axis.

    Each axis points to where the vector farthest from the mean along it is, so that the plane is unique.
    """
    left, values, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    places = left[:, :2] * values[:2]
    places = places * np.sign(places[np.abs(places).argmax(0), [0, 1]])
    return places, values[:2] ** 2 / max(float((values**2).sum()), 1e-300)


def _evaluated(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The content of ``evaluation.json`` (``lm.evaluation.image_features``), as a table and sentences."""
    features, baselines = evaluation["features"], dict(evaluation["baselines"])
    rows = [("this run", features)] if features else []
    usual = baselines.pop(MAJORITY, None)
    rows += [(f"{NAMES[name]} (baseline)", found) for name, found in baselines.items()]
    if usual:
        rows.append(("most frequent class (baseline)", dict.fromkeys(features, usual)))
    return {
        "columns": [NAMES[probe] for probe in features],
        "rows": [{"name": name, "cells": [_percent(found[probe]) for probe in features]} for name, found in rows],
        "verdict": verdict(evaluation),
        "protocol": evaluation.get("protocol", ""),
        "step": evaluation["step"],
    }


def _percent(accuracy: dict[str, float]) -> str:
    return f"{accuracy['accuracy']:.1%}" + (f" ± {accuracy['error']:.1%}" if "error" in accuracy else "")


def _validations(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The numbers of each validation, with its step."""
    return [
        {"step": line["step"], **next(iter(line["validation"].values()))} for line in lines if line.get("validation")
    ]


def _meaning(run: Run, lines: Sequence[dict[str, Any]]) -> list[str]:
    """What the curves show, one sentence or two for each."""
    validated, objective = _validations(lines), run.config.objective
    found = []
    if objective.objective == SimCLR.name:
        batch = run.config.data.batch_images
        at_chance = f"{math.log(2 * batch - 1):.2f}"
        if validated:
            at_chance += f", and {math.log(2 * validated[-1]['images'] - 1):.2f} in validation"
        found.append(
            f"The loss is the cross-entropy of finding a view's partner among the views of {batch:,} images: a model "
            f"that guesses has {at_chance}. The curves compare different numbers of images, so their heights differ."
        )
    found += _of_teacher(run.config)
    if objective.objective == MaskedAutoencoder.name:
        scaled = ", each patch scaled to mean 0 and variance 1: predicting 0 everywhere has 1"
        found.append(
            "The loss is the mean squared error of the hidden patches' pixels"
            f"{scaled if objective.normalize_patches else ''}. Training sees crops, validation whole images."
        )
    if objective.objective == BEiT.name:
        found.append(
            "The loss is the cross-entropy of the hidden patches' codes: a model that finds all of them alike has "
            f"{math.log(objective.visual_codes):.2f}. Code accuracy is the share of hidden patches whose code the "
            "model finds most likely; a code that looks nearly the same counts as wrong. Training sees crops, "
            "validation whole images."
        )
    if validated:
        found.append(
            "Spread is the mean standard deviation of the features after scaling each to length 1, 1 if they point "
            "everywhere, 0 if all images have the same features: a collapse. Effective rank says in how many "
            f"directions they differ, of {run.config.model.hidden_size}; it is near 1 after a collapse."
        )
    if any("knn_accuracy" in line for line in validated):
        found.append(
            "k-NN accuracy is the share of held-out images whose class most of their nearest training images have, by "
            "features alone; training does not see the classes."
            + (
                " It says little about MAE: a linear probe does."
                if objective.objective == MaskedAutoencoder.name
                else ""
            )
        )
    return found


def _of_teacher(config: Config) -> list[str]:
    """What the loss of an objective with a teacher is, whose height says little as the teacher moves."""
    settings, name = config.objective, config.objective.objective
    if name == "moco":
        keys = config.data.batch_images + settings.queue_size
        return [
            "The loss is the cross-entropy of finding the teacher's vector of the other view among those of "
            f"{keys:,} views: a model that guesses has {math.log(keys):.2f}."
        ]
    if name == "byol":
        return [
            "The loss is the squared distance between the prediction and the teacher's vector of the other view, "
            "both of length 1: 0 if they are equal, 2 if they have nothing in common. It can rise while the features "
            "get better, as the teacher's vectors spread out."
        ]
    if name == "dino":
        return [
            "The loss is the cross-entropy of the student's and the teacher's distributions over prototypes, "
            f"{math.log(settings.prototypes):.2f} if both find all {settings.prototypes:,} alike. The teacher's "
            "entropy starts near that and falls; if it stays there, or goes to 0, the model has collapsed."
        ]
    return []


def _curves(lines: list[dict[str, Any]]) -> list[str]:
    """Losses, what the features are like, learning rate, gradient norm and speed by step, as SVG elements."""
    training = [line for line in lines if "loss" in line]
    if not training:
        return []
    validated = _validations(lines)
    best = best_validation(lines)
    marks = (
        {f"best validation, step {best['step']:,}": best["step"]}
        if best and validated[-1]["step"] != best["step"]
        else {}
    )
    losses = Panel("loss", {"training": series(training, "loss")}, {"validation": series(validated, "loss")}, marks)
    watched = [
        key
        for key in ("knn_accuracy", "code_accuracy", "spread", "effective_rank", "teacher_entropy")
        if series(validated, key)
    ]
    titles = {"knn_accuracy": "k-NN accuracy, validation", "code_accuracy": "code accuracy, validation"}
    health = [Panel(titles.get(key, key.replace("_", " ")), {}, {"": series(validated, key)}) for key in watched]
    rates = [
        Panel(key.replace("_", " "), {"": series(training, key)})
        for key in ("learning_rate", "gradient_norm", "images_per_second")
    ]
    return [chart([losses], height=3.6), *([chart(health, height=2.2)] if health else []), chart(rates, height=2.2)]


def _summary(lines: list[dict[str, Any]]) -> dict[str, str]:
    """The state of the run, in words."""
    found, validated, best = summary(lines), _validations(lines), best_validation(lines)
    state = {}
    if found:
        speeds = [line["images_per_second"] for line in lines if line.get("images_per_second")]
        state["epochs seen"] = f"{found['epoch']:.2f}"
        if speeds:
            state["images per second, median"] = f"{np.median(speeds):,.0f}"
        if "share_of_peak" in found:
            state["fraction of the machine's peak, median"] = f"{found['share_of_peak']:.1%}"
    if "memory_bytes" in found:
        state["peak memory"] = format_bytes(found["memory_bytes"])
    if best:
        values = next(line for line in validated if line["step"] == best["step"])
        words = [
            f"{key.replace('_', ' ')} {value:.3f}" for key, value in values.items() if key not in ("step", "images")
        ]
        state["best validation"] = f"step {best['step']:,}: {', '.join(words)}"
        if part := rows_validated(best):
            state["validated on"] = part.replace("rows", "images")
    return state
