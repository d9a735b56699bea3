"""A run with random weights, small tasks, and a run fine-tuned on one of them; no test changes them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.pipeline.images import build_images
from data_prep.pipeline.visual_tokens import build_visual_tokens
from data_prep.shards.images import ImageDataset, open_images
from data_prep.shards.tokens import Dataset
from lm.config.recipes import finetuning_config
from lm.config.settings import Config
from lm.finetuning.finetune import Finetuned, finetune
from lm.model.transformer import Transformer
from lm.runs import checkpoint
from lm.runs.directory import CHECKPOINTS, Run, plain_settings
from lm.training.pretraining import train
from lm.training.reporter import NullReporter

ANIMALS, PLACES = ("fox", "owl", "sparrow", "horse"), ("barn", "market", "river", "sky")


def draw_pictures(folder: Path, count: int = 20, size: int = 16) -> Path:
    """PNG pictures of three classes in a folder each: noise over a bright half, at the top, on the left or nowhere."""
    draw = np.random.default_rng(0)
    for name in ("left", "none", "top"):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            picture = draw.integers(0, 120, (size, size, 3))
            picture[: size // 2 if name == "top" else 0] += 100
            picture[:, : size // 2 if name == "left" else 0] += 100
            Image.fromarray(picture.astype(np.uint8)).save(folder / name / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> ImageDataset:
    """A dataset of 60 pictures of 16 x 16 pixels, in three classes; a fifth is for validation."""
    folder = tmp_path_factory.mktemp("pictures")
    out = folder / "dataset"
    build_images([draw_pictures(folder / "files")], out, 16, validation_fraction=0.2, workers=1)
    return open_images(out)


@pytest.fixture(scope="session")
def visual_tokens(pictures, tmp_path_factory) -> Path:
    """``pictures`` as a dataset of visual tokens: 12 codes for patches of 4 x 4 pixels."""
    out = tmp_path_factory.mktemp("visual") / "tokens"
    return build_visual_tokens(pictures.directory, out, 4, codes=12, workers=1).directory


@pytest.fixture(scope="session")
def seeing() -> Config:
    """Settings of a tiny model on ``pictures``, without its data."""
    return Config().replace(
        num_layers=2, hidden_size=32, num_heads=2, patch_size=4, norm_epsilon=1e-5, batch_images=12, objective="simclr",
        projection_size=8, projection_hidden_size=16, decoder_layers=1, decoder_size=32, steps=6, device="cpu",
        checkpoint_every=2, validate_every=3, log_every=2, threads=1, validation_rows=8, prototypes=24, queue_size=30,
        local_views=2,
    )  # fmt: skip


@pytest.fixture(scope="session")
def seeing_run(pictures, seeing, tmp_path_factory) -> Run:
    """A run that has learned from ``pictures`` for a few steps."""
    config = seeing.replace(data=(str(pictures.directory),))
    return train(config, tmp_path_factory.mktemp("seeing") / "run", NullReporter())


@pytest.fixture(scope="session")
def image_settings(pictures, seeing_run) -> Callable[..., Config]:
    """The settings of a fine-tuning of ``seeing_run`` on the classes of ``pictures``, with changes."""

    def made(**changes) -> Config:
        task = {"task": "image_classification", "train": str(pictures.directory)}
        usual = {"epochs": 8, "batch_examples": 12, "learning_rate": 0.01, "threads": 1, "device": "cpu"}
        return finetuning_config(seeing_run.path, seeing_run.config, task | usual | changes)

    return made


@pytest.fixture(scope="session")
def image_classifier(image_settings, tmp_path_factory) -> Finetuned:
    return finetune(image_settings(), tmp_path_factory.mktemp("classified") / "run", NullReporter())


def write_rows_to(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sentence(draw: random.Random, word: str) -> str:
    before = " ".join(
        draw.choice(("the", "old", "young", "captain", "found", "carried")) for _ in range(draw.randint(0, 6))
    )
    after = " ".join(draw.choice(("again", "in", "morning", "boat", "lost")) for _ in range(draw.randint(0, 6)))
    return f"{before} {word} {after}".strip()


def rows_of(kind: str, count: int, seed: int) -> list[dict]:
    """Examples whose label depends on one word: an animal or a place."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        is_place = draw.random() < 0.5
        word = draw.choice(PLACES if is_place else ANIMALS)
        text = sentence(draw, word)
        if kind == "classification":
            rows.append({"text": text, "label": "place" if is_place else "animal"})
        elif kind == "pair":
            other = draw.choice(PLACES + ANIMALS)
            rows.append({"text": word, "text_pair": other, "label": int((word in PLACES) == (other in PLACES))})
        elif kind == "regression":
            rows.append({"text": text, "label": 3.5 if is_place else 1.25})
        elif kind == "tokens":
            words = text.split()
            rows.append({"words": words, "tags": ["P" if w in PLACES else "A" if w in ANIMALS else "O" for w in words]})
        else:
            answers = [draw.choice(ANIMALS), draw.choice(PLACES)]
            rows.append({"text": "which one is a place?", "choices": answers if draw.random() < 0.5 else answers[::-1]})
            rows[-1]["label"] = int(rows[-1]["choices"][1] in PLACES)
    return rows


@pytest.fixture(scope="session")
def random_run(small: Config, dataset: Dataset, tmp_path_factory) -> Run:
    """A run of the hybrid objective with random weights: its outputs depend on all it reads, without training."""
    path = tmp_path_factory.mktemp("runs") / "random"
    path.mkdir()
    config = small.replace(vocab_size=dataset.tokenizer.vocab_size)
    generator = torch.Generator().manual_seed(0)
    model = Transformer(config.model)
    weights = {
        name: (torch.randn(tensor.shape, generator=generator) * 0.3 if tensor.ndim > 1 else tensor.detach())
        for name, tensor in model.named_parameters()
    }
    config.save(path / "config.toml")
    dataset.tokenizer.save(path / "tokenizer.json")
    state = {"tokenizer_sha256": dataset.tokenizer.sha256, "config": plain_settings(config)}
    checkpoint.save(path / CHECKPOINTS, 1, weights, {}, state)
    return Run(path, config)


@pytest.fixture(scope="session")
def task_files(tmp_path_factory) -> dict[str, tuple[str, str]]:
    """A training and a validation file for each kind of task."""
    folder = tmp_path_factory.mktemp("tasks")
    kinds = ("classification", "pair", "regression", "tokens", "choice")
    return {
        kind: tuple(
            write_rows_to(folder / f"{kind}-{part}.jsonl", rows_of(kind, n, n)) for part, n in (("t", 192), ("v", 64))
        )
        for kind in kinds
    }


@pytest.fixture(scope="session")
def task_settings(trained, task_files) -> Callable[..., Config]:
    """The settings of a fine-tuning of the trained run: (kind, **changes)."""

    def made(kind: str, **changes):
        train, validation = task_files[kind]
        task = {"task": "classification" if kind == "pair" else kind, "train": train, "validation": validation}
        usual = {"epochs": 4, "batch_examples": 16, "learning_rate": 0.01, "dropout": 0.0, "threads": 1}
        return finetuning_config(trained.path, trained.config, task | usual | changes)

    return made


@pytest.fixture(scope="session")
def classifier(task_settings, tmp_path_factory) -> Finetuned:
    return finetune(task_settings("classification"), tmp_path_factory.mktemp("finetuned") / "run", NullReporter())


@pytest.fixture(scope="session")
def write_rows() -> Callable[[Path, list[dict]], str]:
    """Write a .jsonl file: (path, rows) -> its name."""
    return write_rows_to
