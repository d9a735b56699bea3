from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lm.inference.kv_cache import KVCache, ReadingPrompt, WritingTokens
from lm.kernels import masks
from tests.lm.model.test_transformer import BASE, model_of

EACH = hypothesis_settings(max_examples=20)


def read_anew(model, tokens: torch.Tensor, window: int) -> torch.Tensor:
    """Hidden states (T, hidden) of one text, all of it in one pass without a cache."""
    positions = torch.arange(len(tokens))[None]
    return model(tokens[None], positions, *masks.sliding_window(*masks.causal(1, len(tokens)), window))[0]


@given(
    texts=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3),
    steps=st.integers(0, 9),
    window=st.sampled_from([1, 2, 5, 100]),
    key_heads=st.sampled_from([4, 2]),
)
@EACH
@torch.no_grad()
def test_what_is_read_in_pieces_and_token_by_token_is_what_one_pass_reads(texts, steps, window, key_heads):
    """Texts of different lengths, each in pieces of its own, then all together a token at a time, past the window."""
    model = model_of(num_key_value_heads=key_heads)
    lengths = [sum(pieces) for pieces in texts]
    draw = torch.Generator().manual_seed(sum(lengths))
    tokens = [torch.randint(0, BASE["vocab_size"], (length + steps,), generator=draw) for length in lengths]
    cache = KVCache.empty(model.config, len(texts) + 1, window, model.embedding.weight)
    got: list[list[torch.Tensor]] = [[] for _ in texts]
    for row, pieces in enumerate(texts):
        for count in pieces:
            reading, start = ReadingPrompt(cache, row, count), cache.lengths[row]
            inputs = tokens[row][None, start : start + count]
            got[row] += model(inputs, reading.positions, reading.lo, reading.hi, reading)[0]
            reading.done()
    for _ in range(steps):
        writing = WritingTokens(cache, len(texts))
        inputs = torch.stack([each[n : n + 1] for each, n in zip(tokens, cache.lengths, strict=False)])
        hidden = model(inputs, writing.positions, writing.lo, writing.hi, writing)
        writing.done()
        for row, each in enumerate(hidden):
            got[row] += each
    for row, each in enumerate(tokens):
        torch.testing.assert_close(torch.stack(got[row]), read_anew(model, each, window), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [3, 8, 11])
@torch.no_grad()
def test_a_row_that_moved_goes_on_as_it_would_have(length):
    model = model_of()
    tokens = torch.randint(0, BASE["vocab_size"], (1, length))
    cache = KVCache.empty(model.config, 3, 8, model.embedding.weight)
    for row in (0, 2):
        reading = ReadingPrompt(cache, row, length)
        model(tokens if row else tokens.flip(1), reading.positions, reading.lo, reading.hi, reading)
        reading.done()
    cache.move(2, 0)
    cache.stored[:, :, 2] = 100.0
    writing = WritingTokens(cache, 1)
    hidden = model(torch.tensor([[5]]), writing.positions, writing.lo, writing.hi, writing)[0, 0]
    whole = read_anew(model, torch.tensor([*tokens[0], 5]), 8)
    torch.testing.assert_close(hidden, whole[-1], rtol=1e-9, atol=1e-9)


def test_a_cache_of_any_dtype_begins_with_zeros():
    config = model_of().config
    for dtype in (torch.float32, torch.bfloat16):
        cache = KVCache.empty(config, 2, 16, torch.empty(0, dtype=dtype))
        assert cache.stored.dtype == dtype
        assert not cache.stored.any()
