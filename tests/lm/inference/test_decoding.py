from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lm.inference import decoding
from lm.inference.decoding import PackedDecoder, PackedMatrix, decoder, least_rows_with_equal_bits
from lm.inference.kv_cache import KVCache, ReadingPrompt
from tests.lm.inference.test_kv_cache import read_anew
from tests.lm.model.test_transformer import BASE, VARIANTS, model_of

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


def drawn_texts(lengths: list[int], steps: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, BASE["vocab_size"], (length + steps,), generator=draw) for length in lengths]


@torch.inference_mode()
def decoded(model, texts: list[torch.Tensor], lengths: list[int], window: int, rows: int) -> list[torch.Tensor]:
    """Logits after each token of each text from ``lengths`` on, the texts side by side in a cache of ``rows``."""
    cache = KVCache.empty(model.config, rows, window, model.embedding.weight)
    for row, length in enumerate(lengths):
        if length:
            reading = ReadingPrompt(cache, row, length)
            model(texts[row][None, :length], reading.positions, reading.lo, reading.hi, reading)
            reading.done()
    step = decoder(model, cache)
    made = []
    for n in range(len(texts[0]) - lengths[0]):
        made.append(step([int(text[length + n]) for text, length in zip(texts, lengths, strict=True)]).clone())
    assert cache.lengths[: len(texts)] == [len(text) for text in texts]
    return list(torch.stack(made, dim=1))


@needs_onednn
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    steps=st.integers(1, 6),
    window=st.sampled_from([1, 3, 8, 100]),
    changes=st.sampled_from(list(VARIANTS.values())),
)
@hypothesis_settings(max_examples=40)
def test_logits_with_a_cache_are_those_without(lengths, steps, window, changes):
    """Every shape of model, texts of different lengths side by side, inside and beyond the window."""
    model = model_of(dtype=torch.float32, **changes)
    texts = drawn_texts(lengths, steps)
    for text, length, got in zip(texts, lengths, decoded(model, texts, lengths, window, len(texts)), strict=True):
        with torch.no_grad():
            whole = model.logits(read_anew(model, text, window))[length:]
        torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4)


@needs_onednn
@pytest.mark.parametrize(
    ("changes", "threads"),
    [
        ({}, 1),
        ({"hidden_size": 24, "num_heads": 3, "feed_forward_size": 20, "logit_softcap": 3.0}, 1),
        ({"qk_norm": True, "num_key_value_heads": 2, "num_layers": 1}, 2),
        ({"num_layers": 1, "feed_forward_size": 3000}, 1),  # oneDNN has another kernel for one row of so many inputs
    ],
)
def test_a_row_has_the_same_bits_alone_and_beside_any_others(changes, threads):
    model = model_of(dtype=torch.float32, **changes)
    lengths = [0, 7, 7, 20, 3, 70, 2, 7]
    texts = drawn_texts(lengths, 2)
    torch.set_num_threads(threads)
    try:
        together = decoded(model, texts, lengths, 64, 16)
        for row in range(len(texts)):
            alone = decoded(model, texts[row : row + 1], lengths[row : row + 1], 64, 1)
            assert torch.equal(alone[0], together[row]), row
    finally:
        torch.set_num_threads(1)


@needs_onednn
def test_rows_are_added_until_the_bits_of_a_product_do_not_depend_on_them():
    class Stub(PackedMatrix):
        def __init__(self) -> None:
            self.inputs = 4

        def times(self, x):
            return x if len(x) > 2 else x * 2

    assert least_rows_with_equal_bits([Stub()], 8) == 3
    assert least_rows_with_equal_bits([], 8) == 1
    long = PackedMatrix(torch.randn(64, 4096))  # where oneDNN may take another kernel for one row
    least = least_rows_with_equal_bits([long], 16)
    x = torch.randn(16, 4096)
    for rows in range(least, 17):
        assert torch.equal(long.times(x[:rows]), long.times(x)[:rows])


def test_the_reference_is_taken_where_it_is_asked_for(monkeypatch):
    model = model_of(dtype=torch.float32)
    texts = drawn_texts([2, 5], 3)
    usual = decoded(model, texts, [2, 5], 8, 2)
    monkeypatch.setenv("KINDLING_KERNELS", "reference")
    monkeypatch.setattr(PackedDecoder, "step", None)
    for a, b in zip(usual, decoded(model, texts, [2, 5], 8, 2), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@needs_onednn
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_decoding_on_one_thread_while_the_machine_is_busy_gives_the_same_bits(changes, monkeypatch):
    model, texts = model_of(dtype=torch.float32, **changes), drawn_texts([9, 30], 5)
    used = []
    step_of_packed = PackedDecoder.step
    monkeypatch.setattr(
        PackedDecoder, "step", lambda *both: used.append(torch.get_num_threads()) or step_of_packed(*both)
    )
    before = torch.get_num_threads()
    made = {}
    try:
        torch.set_num_threads(2)
        for busy in (False, True):
            monkeypatch.setattr(decoding, "others_want_cores", lambda busy=busy: busy)
            made[busy] = decoded(model, texts, [9, 30], 100, 2)
    finally:
        torch.set_num_threads(before)
    assert used == [2] * 5 + [1] * 5
    assert all(torch.equal(a, b) for a, b in zip(made[False], made[True], strict=True))
