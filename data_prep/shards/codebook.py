"""The codebook of a visual tokenizer: a patch of an image becomes the number of the code most like it.

It is ``codebook.npy`` in a dataset of visual tokens: uint8, shape ``(codes, size, size, channels)``, the pixels that
each code stands for. Everything here is in whole numbers, so the codes of an image are the same on every machine.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from data_prep.errors import UserError
from data_prep.errors.command_names import command
from data_prep.tokenizers.tokenizer import Tokenizer

CODEBOOK_FILE = "codebook.npy"
UNKNOWN = "<unknown>"
CENTER = 128  # subtracted from pixels: smaller numbers for the same distances
# Up to this many numbers in a patch, scores are multiples of 1/2 below 2^23, which float32 adds up exactly in any
# order; float64 does so for more.
EXACT_IN_FLOAT32 = 341


class Codebook:
    """The pixels that each code stands for: ``pixels`` is uint8, shape ``(codes, size, size, channels)``."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.codes, self.size, _, self.channels = pixels.shape
        kind = np.float32 if pixels[0].size <= EXACT_IN_FLOAT32 else np.float64
        self._centered = pixels.reshape(self.codes, -1).astype(kind) - CENTER
        self._half_squares = (self._centered**2).sum(1) / 2

    def encode(self, patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the code most like each patch, the first of equal ones, and the squared distance to it.

        Both are int64, shape ``(n,)``; patches are uint8, shape ``(n, size · size · channels)``.
        """
        centered = patches.astype(self._centered.dtype) - CENTER
        scores = centered @ self._centered.T - self._half_squares
        codes = scores.argmax(1)
        best = scores[np.arange(len(codes)), codes].astype(np.float64)
        return codes, ((centered.astype(np.float64) ** 2).sum(1) - 2 * best).astype(np.int64)

    def to_bytes(self) -> bytes:
        """Return the content of ``codebook.npy``."""
        buffer = io.BytesIO()
        np.save(buffer, self.pixels, allow_pickle=False)
        return buffer.getvalue()

    @property
    def sha256(self) -> str:
        """The SHA-256 of ``codebook.npy``."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        """Return a text tokenizer whose tokens are the codes, spelled ``<17>``; ids below ``codes`` are the codes."""
        names = {f"<{code}>": code for code in range(self.codes)} | {UNKNOWN: self.codes}
        backend = Backend(models.WordLevel(names, unk_token=UNKNOWN))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\d+>"), behavior="isolated")
        backend.decoder = decoders.Fuse()
        return Tokenizer(backend)


def patches_of(images: np.ndarray, size: int) -> np.ndarray:
    """Cut images ``(n, side, side, channels)`` into patches, row by row: ``(n · patches, size · size · channels)``."""
    n, side, _, channels = images.shape
    cut = images.reshape(n, side // size, size, side // size, size, channels)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(-1, size * size * channels)


def load_codebook(source: str | Path) -> Codebook:
    """Load a ``codebook.npy``, or that of a folder. Raises ``UserError`` if it is missing or damaged."""
    path = Path(source)
    path = path / CODEBOOK_FILE if path.is_dir() else path
    try:
        with path.open("rb") as file:
            pixels = np.lib.format.read_array(file, allow_pickle=False)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] != pixels.shape[2] or not pixels.size:
            raise ValueError
    except OSError:
        raise UserError(
            f'there is no visual tokenizer "{path}": make one with {command("prep visual-tokens")} YOUR_IMAGES '
            "--out FOLDER --patch-size SIZE"
        ) from None
    except ValueError:
        raise UserError(f'"{path}" is not a visual tokenizer, or damaged: build or copy it again') from None
    return Codebook(pixels)
