"""Codebooks: the nearest code against float64, and the text tokenizer that stands for one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.shards.codebook import CODEBOOK_FILE, Codebook, load_codebook, patches_of
from data_prep.tokenizers.load import load_tokenizer


@pytest.mark.parametrize(("size", "channels"), [(1, 1), (2, 3), (4, 3), (16, 3)])
def test_a_patch_gets_the_nearest_code(size: int, channels: int) -> None:
    rng = np.random.default_rng(size)
    book = Codebook(rng.integers(0, 256, (30, size, size, channels), dtype=np.uint8))
    patches = rng.integers(0, 256, (200, size * size * channels), dtype=np.uint8)
    codes, distances = book.encode(patches)
    expected = ((patches[:, None].astype(np.float64) - book.pixels.reshape(30, -1)[None]) ** 2).sum(2)
    assert np.array_equal(codes, expected.argmin(1)), "the first of equally near ones"
    assert np.array_equal(distances, expected.min(1)), "exactly"


@pytest.mark.parametrize("size", [4, 10, 16])
def test_the_farthest_pixels_are_compared_exactly(size: int) -> None:
    rng = np.random.default_rng(0)
    book = Codebook(rng.integers(254, 256, (200, size, size, 3), dtype=np.uint8))
    patches = rng.integers(0, 2, (50, size * size * 3), dtype=np.uint8)
    codes, distances = book.encode(patches)
    expected = ((patches[:, None].astype(np.int64) - book.pixels.reshape(200, -1).astype(np.int64)) ** 2).sum(2)
    assert np.array_equal(codes, expected.argmin(1))
    assert np.array_equal(distances, expected.min(1))


def test_patches_are_cut_row_by_row() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)
    patches = patches_of(images, 2)
    assert patches.shape == (18, 12)
    assert np.array_equal(patches[9 + 5], images[1, 2:4, 4:6].ravel())


def test_a_codebook_is_read_back_from_its_file_or_folder(tmp_path: Path) -> None:
    book = Codebook(np.random.default_rng(0).integers(0, 256, (5, 2, 2, 3), dtype=np.uint8))
    (tmp_path / CODEBOOK_FILE).write_bytes(book.to_bytes())
    for place in (tmp_path, tmp_path / CODEBOOK_FILE):
        found = load_codebook(place)
        assert np.array_equal(found.pixels, book.pixels)
        assert found.sha256 == book.sha256
    assert (book.codes, book.size, book.channels) == (5, 2, 3)


def test_a_missing_or_damaged_codebook_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'no visual tokenizer ".*codebook\.npy": make one with .*visual-tokens'):
        load_codebook(tmp_path)
    path = tmp_path / CODEBOOK_FILE
    np.save(path, np.zeros((4, 2, 3, 1), np.uint8))
    for content in (b"", b"x" * 200, path.read_bytes(), path.read_bytes()[:-3]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is not a visual tokenizer, or damaged"):
            load_codebook(path)


def test_the_ids_of_its_text_tokenizer_are_the_codes(tmp_path: Path) -> None:
    tokenizer = Codebook(np.zeros((12, 1, 1, 1), np.uint8)).tokenizer()
    assert tokenizer.encode("<0><11><3>") == [0, 11, 3]
    assert tokenizer.decode([0, 11, 3]) == "<0><11><3>"
    specials = {tokenizer.unknown_id, tokenizer.end_of_text_id, tokenizer.padding_id, tokenizer.mask_id}
    assert specials == {12, 13, 14, 15}
    assert tokenizer.vocab_size == 16
    for text in ("some words", "<|mask|>", "<12>", "<|endoftext|>"):
        assert set(tokenizer.encode(text)) == {tokenizer.unknown_id}
    tokenizer.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path).sha256 == tokenizer.sha256
