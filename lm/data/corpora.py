"""The corpora of a run: one dataset, or several with weights, that share a tokenizer and are validated as one.

A run names them as ``PATH`` or ``PATH@WEIGHT``. Weights are shares of the training rows, independent of the sizes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from data_prep.errors import UserError
from data_prep.errors.command_names import command
from data_prep.files import is_remote
from data_prep.shards.images import ImageDataset
from data_prep.shards.tokens import Dataset, Split, open_dataset
from data_prep.tokenizers.loss import counted_bytes
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.corpus_entry import corpus_of, is_folder
from lm.config.settings import Config

if TYPE_CHECKING:
    from data_prep.shards.remote import Access

Kind = TypeVar("Kind", Dataset, ImageDataset)


@dataclass(frozen=True)
class Text:
    """The documents of ``split`` from token ``start`` to ``stop``, and their weight among the texts of a run."""

    name: str
    weight: Fraction
    split: Split
    start: int
    stop: int


class JoinedSplit:
    """Splits of several datasets read as one stream, with the counts and reading methods of a ``Split``."""

    def __init__(self, parts: Sequence[Split]) -> None:
        self._parts = parts
        self._ends = list(accumulate(part.tokens for part in parts))
        self.tokens = self._ends[-1]
        self.documents = sum(part.documents for part in parts)
        self.text_bytes = sum(part.text_bytes for part in parts)
        self.lost_bytes = sum(part.lost_bytes for part in parts)
        self.counted_bytes = counted_bytes(self.text_bytes, self.lost_bytes)
        self.is_remote = any(part.is_remote for part in parts)

    def announce(self, start: int, stop: int) -> None:
        """As of a ``Split``."""
        for part, first, last in self._pieces(start, stop):
            part.announce(first, last)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` (exclusive) of the stream, shape ``(stop - start,)``."""
        pieces = [part.read(first, last) for part, first, last in self._pieces(start, stop)]
        return np.concatenate(pieces) if pieces else self._parts[0].read(0, 0)

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fill ``out``, one-dimensional and of any integer type, with the tokens from ``start`` on."""
        filled = 0
        for part, first, last in self._pieces(start, start + len(out)):
            part.read_into(first, out[filled : filled + last - first])
            filled += last - first

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[Split, int, int]]:
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.tokens}")
        for part, end in zip(self._parts, self._ends, strict=True):
            first, last = (min(max(token - end + part.tokens, 0), part.tokens) for token in (start, stop))
            if first < last:
                yield part, first, last


class Datasets(Generic[Kind]):
    """The datasets of a run, each with a weight."""

    def __init__(self, datasets: Sequence[Kind], weights: Sequence[Fraction] = (Fraction(1),)) -> None:
        self.datasets: Sequence[Kind] = datasets
        self.weights = weights

    @property
    def name(self) -> str:
        return " + ".join(dataset.location for dataset in self.datasets)

    @property
    def fingerprint(self) -> str:
        """SHA-256 that names the whole content and the weights; with one dataset it is the dataset's own."""
        if len(self.datasets) == 1:
            return self.datasets[0].fingerprint
        total = sum(self.weights)
        named = [[each.fingerprint, str(w / total)] for each, w in zip(self.datasets, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()

    def verify(self) -> None:
        """Read everything; raise a UserError at the first file that has changed since the build.

        Blocks of data at a URL are checked whenever they are read, so that one time is enough.
        """
        for dataset in self.datasets:
            if not dataset.is_verified:
                dataset.verify()


class Corpora(Datasets[Dataset]):
    """Datasets, each with a weight, that were made with one tokenizer; raises UserError if their tokenizers differ."""

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[Fraction] = (Fraction(1),)) -> None:
        super().__init__(datasets, weights)
        first = datasets[0]
        for other in datasets[1:]:
            if other.manifest["tokenizer"]["sha256"] != first.manifest["tokenizer"]["sha256"]:
                raise UserError(
                    f"{other.location} was made with another tokenizer than {first.location}: "
                    f"prepare it with --tokenizer {first.location}/tokenizer.json"
                )
        self.tokenizer: Tokenizer = first.tokenizer
        self.vocab_size = first.vocab_size

    @property
    def processor(self) -> Tokenizer:
        """What makes model inputs of text."""
        return self.tokenizer

    def split(self, name: str) -> Split | JoinedSplit:
        """The split ``train`` or ``validation``, the datasets one after another."""
        parts = [dataset.split(name) for dataset in self.datasets]
        return parts[0] if len(parts) == 1 else JoinedSplit(parts)

    def training_texts(self) -> list[Text]:
        """The corpora that share the training rows: the datasets, or the sources if their weights differ."""
        texts = []
        for dataset, weight in zip(self.datasets, self.weights, strict=True):
            split, spans = dataset.split("train"), dataset.split("train").source_spans
            if len({span.weight for span in spans}) <= 1:
                texts.append(Text(dataset.location, weight, split, 0, split.tokens))
                continue
            shares = [Fraction(str(span.weight)) for span in spans]
            for span, share in zip(spans, shares, strict=True):
                name = f"{span.name} in {dataset.location}"
                texts.append(Text(name, weight * share / sum(shares), split, span.start, span.stop))
        return texts


def open_corpora(data: Sequence[str], access: Access | None = None) -> Corpora:
    """Open the datasets of the setting ``data``, reading sizes and headers only.

    ``access`` says how data at URLs is read (None: with the defaults). Raise UserError if no dataset is named, or one
    is missing, incomplete or made with another tokenizer.
    """
    if not any(data):
        raise UserError(f"no data: name a folder of token shards with --data ({command('prep build')} makes one)")
    paths, weights = check_entries(data)
    return Corpora([open_dataset(path, access) for path in paths], weights)


def check_entries(data: Sequence[str]) -> tuple[list[str], list[Fraction]]:
    """The folders and the weights of ``PATH`` or ``PATH@WEIGHT``. UserError if an entry can be read in two ways."""
    paths, weights = zip(*(corpus_of(text) for text in data), strict=True)
    for path, text in zip(paths, data, strict=True):
        if path != text and not is_remote(path) and not is_folder(path):
            weight = text.removeprefix(path)
            raise UserError(f'there is no folder "{text}", nor "{path}", with {weight} taken as its weight')
    return list(paths), list(weights)


def with_vocabulary(config: Config, corpora: Corpora) -> Config:
    """Set the vocabulary size, if it is not set, to the tokenizer's. UserError if the setting is below that."""
    asked = config.model.vocab_size
    if asked and asked < corpora.vocab_size:
        raise UserError(
            f"vocab_size {asked} is smaller than the tokenizer of {corpora.name}, which has {corpora.vocab_size}"
        )
    return config.replace(vocab_size=asked or corpora.vocab_size)
