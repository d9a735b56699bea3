"""The vectors of a task's examples by a frozen model, for the rows of a table that train no weight of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lm.data.examples import Example
from lm.data.image_files import LabeledImages
from lm.evaluation.image_probes import Reader, all_vectors, feature_reader, pixel_reader, random_trunk
from lm.evaluation.task_table import WITHOUT_MODEL, Examples, Frozen
from lm.finetuning.heads import pair_features
from lm.inference import embedding
from lm.inference.embedding import Reading, Vectors
from lm.inference.language_model import LanguageModel
from lm.model.image_transformer import ImageTransformer
from lm.model.transformer import Transformer
from lm.runs.directory import Run


@dataclass
class TextFeatures:
    """Vectors of texts (``task_table.Features``); those of one task at a time are kept."""

    run: Run
    model: Transformer
    reading: Reading
    _known: dict[tuple[str, int | None, int], Frozen] = field(default_factory=dict, init=False)

    def key(self, row: str) -> Any:
        return asdict(self.reading)

    def of(self, examples: Examples, row: str, seed: int) -> Frozen:
        """By the run's model, or by an untrained one that is drawn from the seed."""
        untrained = seed if row == "probe_untrained" else None
        key = (examples.task.name, untrained, seed if examples.task.labels < 1 else 0)
        if key not in self._known:
            start, mine = time.perf_counter(), examples.of_seed(seed)
            trunk = self.model
            if untrained is not None:
                device = next(self.model.parameters()).device
                trunk = Transformer(self.run.config.model).initialize(untrained).to(device).eval()
            model = LanguageModel(trunk, self.run.tokenizer, self.run.config)
            train, test = (self._vectors_of(model, part) for part in (mine.train, mine.test))
            seconds = time.perf_counter() - start
            self._known = {key: value for key, value in self._known.items() if key[0] == examples.task.name}
            self._known[key] = Frozen(train[0], test[0], seconds, train[1] + test[1])
        return self._known[key]

    def _vectors_of(self, model: LanguageModel, examples: Sequence[Example]) -> tuple[Vectors, int]:
        """A vector per example (those of a pair are combined), and how many texts were truncated."""
        columns = zip(*(example.texts for example in examples), strict=True)
        found = [embedding.all_vectors(model, [(text,) for text in column], self.reading) for column in columns]
        first, *others = (vectors for vectors, _ in found)
        vectors = np.concatenate(pair_features(first, others[0]), axis=1) if others else first
        return vectors, sum(cut for _, cut in found)


@dataclass
class ImageFeatures:
    """Vectors of images (``task_table.Features``): features, those of random weights, and raw pixels.

    All are kept, so tasks that differ in their share of the labels read the images once.
    """

    run: Run
    model: ImageTransformer
    layer: int = -1
    _known: dict[tuple[str, str, int], tuple[Vectors, float]] = field(default_factory=dict, init=False)

    def key(self, row: str) -> Any:
        return self.run.image_format.sha256 if row in WITHOUT_MODEL else self.layer

    def of(self, examples: Examples, row: str, seed: int) -> Frozen:
        """By the run's model, by random weights that are drawn from the seed, or the pixels themselves."""
        kind = row.rpartition("_")[2] if "_" in row else "trained"
        numbers = examples.numbers(seed)
        train, of_train = self._vectors(examples.train, kind, seed)
        test, of_test = self._vectors(examples.test, kind, seed)
        return Frozen(train[numbers], test, of_train * len(numbers) / len(train) + of_test)

    def _vectors(self, images: Sequence[Example], kind: str, seed: int) -> tuple[Vectors, float]:
        """The vectors of all images, and the seconds that they took."""
        assert isinstance(images, LabeledImages)
        key = (images.digest, kind, seed if kind == "untrained" else 0)
        if key not in self._known:
            start = time.perf_counter()
            self._known[key] = all_vectors(images, {kind: self._reader(kind, seed)})[kind], time.perf_counter() - start
        return self._known[key]

    def _reader(self, kind: str, seed: int) -> Reader:
        form = self.run.image_format
        if kind == "pixels":
            return pixel_reader(form)
        model = self.model
        if kind == "untrained":
            model = random_trunk(self.run.config.model, seed, next(self.model.parameters()).device)
        return feature_reader(model, form, self.layer)
