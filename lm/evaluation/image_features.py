"""What the features of an image run are worth: k-NN and linear probe of its frozen features, next to baselines.

All are fitted on the same training images and tested on the same others, by one protocol, after training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.files import write_atomically
from lm.config.recipes import require_image_model, require_no_task_head
from lm.data.datasets import open_training_data
from lm.data.examples import Example, Labels
from lm.data.image_corpora import ImageCorpora
from lm.data.image_files import TRAIN, VALIDATION, LabeledImages, has_validation, read_labeled, require_format
from lm.data.images import HeldOutImages
from lm.data.labels import class_name
from lm.evaluation.baselines import Progress
from lm.evaluation.bootstrap import Accuracy
from lm.evaluation.image_probes import (
    PIXELS_A_SIDE,
    PROBES,
    all_vectors,
    feature_reader,
    pixel_reader,
    random_trunk,
)
from lm.evaluation.probes import Target, majority
from lm.finetuning.metrics import require_libraries
from lm.inference.embedding import require_layer
from lm.model.device import choose_device
from lm.objectives.images import feature_health
from lm.objectives.objective import open_objective, restore
from lm.runs.checkpoint import Checkpoint
from lm.runs.directory import RESULT, Run, saved_evaluation
from lm.runs.run_data import open_data
from lm.training.validation import validate_readouts

MOST_TRAIN, MOST_TEST = 50_000, 10_000  # images that are judged on, spread evenly over those that are there
SEED = 0  # of the random weights, and of the fifth of the training images on which hyperparameters are chosen
FEATURES, RAW_PIXELS, RANDOM_WEIGHTS, MAJORITY = "features", "raw_pixels", "random_weights", "majority"
NAMES = {RAW_PIXELS: "raw pixels", RANDOM_WEIGHTS: "random weights", "knn": "k-NN", "linear": "linear probe"}
MISJUDGED = ("mae",)  # objectives whose features k-NN misjudges (He et al. 2022)


@dataclass(frozen=True)
class Judged:
    """The images to judge on: probes learn from ``train`` and are tested on ``test``.

    ``values`` and ``truth`` are their classes, int64 (images,), from 0 up to ``classes``.
    """

    train: LabeledImages
    test: LabeledImages
    values: NDArray[np.int64]
    truth: NDArray[np.int64]
    classes: int
    described: str

    @property
    def target(self) -> Target:
        return Target(self.values, self.classes, "accuracy")


def evaluate_images(
    run: Run,
    *,
    data: str = "",
    train: str = "",
    test: str = "",
    layer: int = -1,
    checkpoint: Checkpoint | None = None,
    device: str = "auto",
    progress: Progress = lambda text: None,
) -> dict[str, Any]:
    """Judge the frozen features of a checkpoint (None: the newest) on labeled images.

    Args:
        data: a dataset, of whose train split probes learn to be tested on its validation split; "": that of the run.
        train: a folder with a folder for each class, or a dataset, to learn from instead.
        test: one to test on instead.
        layer: as of ``image_vectors``.
        device: "auto", "cpu", "cuda" or "mps".
        progress: called with a line before each part.

    Returns:
        ``features``, and each of ``baselines`` but ``majority``, have the accuracies of ``knn`` and ``linear`` with
        their standard ``error``; those of a baseline also the ``difference`` of the features from it, with its
        ``difference_error``. Without labels both are empty, and ``no_accuracy`` says why. ``spread`` and
        ``effective_rank`` (``feature_health``) are of the test images. ``validation`` is what the objective measures
        on the validation split, as while it trains; it is empty if both ``train`` and ``test`` are given. The result on
        the run's own data is saved in ``evaluation.json`` and read from there the next time.

    Raises:
        UserError: the data is missing or does not fit, or images that were named have no classes.
    """
    require_image_model(run.path, run.config)
    require_no_task_head(run.path, run.config)
    require_layer(run.config.model, layer)
    corpora = None if train and test else _corpora(run, data)
    saved, plain = checkpoint or run.newest(), not (train or test) and layer == -1
    known = saved_evaluation(run, saved) if plain else None
    if known and corpora and known["data_fingerprint"] == corpora.fingerprint:
        return known
    judged, no_accuracy = None, ""
    try:
        judged = _judged(run, corpora, train, test)
        require_libraries()
    except _NoClassesError as reason:
        no_accuracy = str(reason)
    where = choose_device(device)
    if corpora:
        progress(f"{run.config.objective.objective}: loss on the validation split")
    result: dict[str, Any] = {
        "step": saved.step,
        "checkpoint": saved.weights_sha256,
        "objective": run.config.objective.objective,
        "data": corpora.name if corpora else "",
        "data_fingerprint": corpora.fingerprint if corpora else "",
        "validation": _validation(run, saved, corpora, where) if corpora else {},
    }
    result |= _of_features(run, saved, corpora, judged, layer, where, progress)
    result |= {"no_accuracy": no_accuracy} if no_accuracy else {}
    if plain and not data:
        write_atomically(run.path / RESULT, json.dumps(result, indent=1) + "\n")
    return result


class _NoClassesError(UserError):
    """Why there is no accuracy on the data of a run, which is no mistake."""


def _corpora(run: Run, data: str) -> ImageCorpora:
    corpora = open_training_data((data,), run.config.data.access) if data else open_data(run)
    if not isinstance(corpora, ImageCorpora):
        raise UserError(f"{corpora.name} holds text, and {run.path} reads images")
    for dataset in corpora.datasets:
        require_format(dataset, run.image_format)
    if not HeldOutImages(corpora, VALIDATION).count:
        raise UserError(
            f"{corpora.name} has no validation images: build it with --validation-fraction above 0, or name images to "
            "judge on with --train and --test"
        )
    return corpora


def _judged(run: Run, corpora: ImageCorpora | None, train: str, test: str) -> Judged:
    """The images to judge on. Raises ``_NoClassesError`` if those of the run's own data cannot be, else UserError."""
    sets, described = [], []
    for split, named, most in ((TRAIN, train, MOST_TRAIN), (VALIDATION, test, MOST_TEST)):
        if named:
            images = read_labeled(named, run.image_format, split if has_validation(named) else "")
        else:
            assert corpora is not None
            images = _labeled(corpora, split)
        there = len(images)
        if there > most:
            images = images.chosen(np.arange(most, dtype=np.int64) * there // most)
        sets.append(images)
        what = named or f"{corpora.name if corpora else ''}, {split} split"
        described.append(f"{len(images):,}{f' of {there:,}' if there > most else ''} images ({what})")
    try:
        labels = Labels.of(sets[0])
        values, truth = (np.array([labels.indices(each)[0] for each in images], dtype=np.int64) for images in sets)
    except UserError as reason:
        raise (UserError if train or test else _NoClassesError)(str(reason)) from None
    return Judged(
        sets[0], sets[1], values, truth, len(labels.names), f"fitted on {described[0]}, tested on {described[1]}"
    )


def _labeled(corpora: ImageCorpora, split: str) -> LabeledImages:
    """The images with a class of a split of the run's data."""
    images = HeldOutImages(corpora, split)
    numbers = np.flatnonzero(images.labels >= 0)
    if not len(numbers):
        raise _NoClassesError(
            f"the images of {corpora.name}, {split} split, have no classes: judge the features on labeled ones with "
            "--train FOLDER --test FOLDER"
        )
    place = f"{corpora.name}, {split} split"
    names = [class_name("label", name) for name in images.classes]
    examples = [Example((), names[label], place) for label in images.labels[numbers].tolist()]
    return LabeledImages(examples, lambda some: images.read(numbers[some]), f"{corpora.fingerprint} {split}", [])


def _validation(run: Run, saved: Checkpoint, corpora: ImageCorpora, device: torch.device) -> dict[str, Any]:
    """What the objective measures on the validation split, as while it trains."""
    objective = open_objective(run.config, run.image_format)
    run.refuse_another(saved)
    with torch.device("meta"):
        model = objective.new_model()
    model.load_state_dict(saved.model(), assign=True)
    model.to(device)
    restore(objective, model, saved.objective())
    return validate_readouts(model, corpora, run.config, objective=objective)


def _of_features(
    run: Run,
    saved: Checkpoint,
    corpora: ImageCorpora | None,
    judged: Judged | None,
    layer: int,
    device: torch.device,
    progress: Progress,
) -> dict[str, Any]:
    """The accuracies of the features and of the baselines; without classes only how spread out the features are."""
    form = run.image_format
    readers = {FEATURES: feature_reader(run.load_image_model(device, saved), form, layer)}
    if judged is None:
        assert corpora is not None
        held_out = HeldOutImages(corpora, VALIDATION)
        chosen = held_out.choose(MOST_TEST)
        unlabeled = LabeledImages(
            [Example((), None, "")] * len(chosen), lambda some: held_out.read(chosen[some]), "", []
        )
        progress(f"features of {len(chosen):,} images")
        return {"features": {}, "baselines": {}, **feature_health(all_vectors(unlabeled, readers)[FEATURES])}
    readers[RAW_PIXELS] = pixel_reader(form)
    readers[RANDOM_WEIGHTS] = feature_reader(random_trunk(run.config.model, SEED, device), form, layer)
    progress(f"features of {len(judged.train):,} training images and {len(judged.test):,} test images")
    train, test = (all_vectors(images, readers) for images in (judged.train, judged.test))
    scores: dict[str, dict[str, NDArray[np.float64]]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in readers:
        scores[name], found[name] = {}, {}
        for probe, fit in PROBES.items():
            progress(f"{NAMES[probe]} of {NAMES.get(name, 'features')}")
            predicted = fit(train[name], judged.target, test[name], SEED)
            right = (predicted.outputs.argmax(1) == judged.truth).astype(np.float64)
            accuracy = Accuracy.of(right)
            scores[name][probe] = right
            found[name][probe] = {"accuracy": accuracy.mean, "error": accuracy.error, "chosen": predicted.chosen}
            if name != FEATURES:
                difference = Accuracy.of(scores[FEATURES][probe] - right)  # paired: of the same images
                found[name][probe] |= {"difference": difference.mean, "difference_error": difference.error}
    usual = majority(judged.target, len(judged.test)).outputs.argmax(1) == judged.truth
    of_majority = Accuracy.of(usual.astype(np.float64))
    return {
        "features": found.pop(FEATURES),
        "baselines": {**found, MAJORITY: {"accuracy": of_majority.mean, "error": of_majority.error}},
        **feature_health(test[FEATURES]),
        "images": {"train": len(judged.train), "test": len(judged.test)},
        "classes": judged.classes,
        "notes": [*judged.train.notes, *judged.test.notes],
        "protocol": protocol(run, judged, layer),
    }


def protocol(run: Run, judged: Judged, layer: int) -> str:
    """How the features were judged, in words."""
    model, size = run.config.model, min(PIXELS_A_SIDE, run.image_format.size)
    block = layer if layer >= 0 else model.num_layers
    averaged = f", averaged to {size} x {size}" if size < run.image_format.size else ""
    return "; ".join(
        [
            f"frozen features: the mean over an image's patches after block {block} of {model.num_layers}",
            judged.described,
            "k-NN by cosine and logistic regression on standardized vectors, with k and C chosen on a fifth of the "
            "training images",
            f"raw pixels: normalized{averaged}",
            f"random weights: the same shape, seed {SEED}, every matrix drawn, as before the first step the blocks "
            "do nothing",
            "± standard error (bootstrap over test images)",
        ]
    )


def verdict(result: dict[str, Any]) -> str:
    """Whether the features beat the baselines, in plain sentences; a difference counts above two standard errors."""
    if not result["features"]:
        return f"No accuracy: {result['no_accuracy']}."
    sentences = []
    for probe in PROBES:
        beaten: dict[str, list[str]] = {}
        for name in (RAW_PIXELS, RANDOM_WEIGHTS):
            of = result["baselines"][name][probe]
            difference, margin = of["difference"], 2 * of["difference_error"]
            clear = (
                "beat" if difference > margin else "are worse than" if -difference > margin else "do not clearly beat"
            )
            beaten.setdefault(clear, []).append(f"{NAMES[name]} ({100 * difference:+.1f} points)")
        compared = "; they ".join(f"{clear} {' and '.join(names)}" for clear, names in beaten.items())
        sentences.append(f"By {NAMES[probe]} the features {compared}.")
    if result["objective"] in MISJUDGED:
        sentences.append(
            f"k-NN misjudges features of {result['objective']}: go by the linear probe, and by fine-tuning."
        )
    return " ".join(sentences)
