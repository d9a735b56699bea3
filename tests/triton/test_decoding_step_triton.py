from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm.inference.graph_decoding import GraphDecoder
from lm.inference.kv_cache import KVCache
from lm.inference.low_precision import LowPrecisionTransformer
from lm.kernels import decoding_triton, dispatch, few_rows_product, reference, rotate_and_store
from tests.lm.model.test_transformer import VARIANTS, model_of

INTERPRETED = dispatch.interpreted()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
EXACT = torch.float64 if INTERPRETED else torch.float32
EACH = settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


@EACH
@given(
    rows=st.integers(1, 35),
    inputs=st.sampled_from([8, 32, 40, 96]),
    outputs=st.integers(1, 70),
    activation=st.sampled_from(["", "relu2", "swiglu"]),
    normed=st.booleans(),
    added=st.booleans(),
    dtype=st.sampled_from([EXACT, torch.float32]),
)
def test_products_equal_the_reference(rows, inputs, outputs, activation, normed, added, dtype):
    torch.manual_seed(rows)
    x, norm, residual = drawn(rows, inputs), drawn(inputs), drawn(rows, outputs)
    weight = drawn(2 * outputs if activation == "swiglu" else outputs, inputs) / inputs**0.5
    exactly = reference.few_rows_product(
        x, weight, norm if normed else None, 1e-3, activation, residual.clone() if added else None, torch.float64
    )
    x, weight, norm, residual = (each.to(dtype) for each in (x, weight, norm, residual))
    got = few_rows_product(
        x,
        weight,
        norm=norm if normed else None,
        epsilon=1e-3,
        activation=activation,
        residual=residual if added else None,
    )
    assert got.dtype == dtype
    assert got is residual or not added
    torch.testing.assert_close(got.double(), exactly, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["", "swiglu"])
def test_in_bfloat16_only_the_factors_and_the_result_are_rounded(activation):
    """A norm's weight is multiplied in before rounding, its factor of the row after the sum, all in float32."""
    x, norm = drawn(5, 96, dtype=torch.float32), drawn(96, dtype=torch.float32)
    weight = (drawn(64, 96) / 10).to(torch.bfloat16)
    got = few_rows_product(x, weight, norm=norm, epsilon=1e-6, activation=activation, dtype=torch.float32)
    factor = (x * norm).bfloat16().double()
    exactly = factor @ weight.double().T / (x.double().square().mean(1, keepdim=True) + 1e-6).sqrt()
    if activation:
        exactly = torch.nn.functional.silu(exactly[:, :32]) * exactly[:, 32:]
    torch.testing.assert_close(got.double(), exactly, rtol=1e-5, atol=1e-5)
    low = few_rows_product(x, weight, norm=norm, epsilon=1e-6, activation=activation)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, got.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_a_row_do_not_depend_on_the_others(dtype):
    x, norm, weight = drawn(70, 96, dtype=torch.float32), drawn(96, dtype=torch.float32), drawn(80, 96, dtype=dtype)
    whole = few_rows_product(x, weight, norm=norm, epsilon=1e-6, activation="swiglu")
    for rows in (1, 2, 3, 16, 17, 64):
        assert torch.equal(
            few_rows_product(x[:rows], weight, norm=norm, epsilon=1e-6, activation="swiglu"), whole[:rows]
        )


def inputs_of_a_step(rows, heads, kv_heads, width, capacity, dtype):
    qkv = drawn(rows, heads + 2 * kv_heads, width, dtype=dtype)
    cache = drawn(2, rows + 1, kv_heads, capacity, width, dtype=dtype)
    positions = torch.randint(0, 3 * capacity, (rows,), dtype=torch.int32).to(DEVICE)
    hi = (positions + 1).clamp(max=capacity)
    hi[torch.rand(rows).to(DEVICE) < 0.3] = 0
    angles = torch.randn(rows, 1, width // 2).to(DEVICE)
    return qkv, angles.cos(), angles.sin(), positions, hi, cache


@EACH
@given(
    rows=st.integers(1, 5),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (9, 9)]),
    width=st.sampled_from([2, 16, 20]),
    capacity=st.sampled_from([1, 7]),
    dtype=st.sampled_from([EXACT, torch.float32, torch.bfloat16]),
)
def test_heads_are_rotated_and_stored_as_by_the_plain_path_bit_for_bit(rows, heads, width, capacity, dtype):
    """In bfloat16 too, because both round once; in the cache nothing else changes."""
    torch.manual_seed(rows)
    arguments = inputs_of_a_step(rows, *heads, width, capacity, dtype)
    ours, theirs = arguments[-1].clone(), arguments[-1].clone()
    q = rotate_and_store(*arguments[:-1], ours)
    expected = reference.rotate_and_store(*arguments[:-1], theirs, None, 0.0)
    if INTERPRETED:
        assert torch.equal(q, expected)
        assert torch.equal(ours, theirs)
    else:  # a GPU fuses products and sums
        torch.testing.assert_close(q, expected)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [EXACT, torch.float32, torch.bfloat16])
def test_heads_are_normalized_first_with_qk_norm(dtype):
    arguments = inputs_of_a_step(6, 4, 2, 16, 5, dtype)
    norms = drawn(16, dtype=torch.float32), drawn(16, dtype=torch.float32)
    ours, exact = arguments[-1].clone(), arguments[-1].double()
    q = rotate_and_store(*arguments[:-1], ours, norms, 1e-3)
    wide = (arguments[0].double(), *arguments[1:-1])
    expected = reference.rotate_and_store(*wide, exact, tuple(norm.double() for norm in norms), 1e-3)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(q.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("variant", ["plain", "qk_norm", "softcap"])
@torch.inference_mode()
def test_a_row_of_a_step_has_the_same_bits_in_every_batch(monkeypatch, variant, low):
    """Texts of different lengths, with a window that is filled and with more keys than one part of decoding has."""
    monkeypatch.setattr(decoding_triton, "KEYS_PER_PART", 32)
    model = model_of(dtype=torch.float32, num_layers=1, **VARIANTS[variant]).to(DEVICE)
    model = LowPrecisionTransformer(model) if low else model
    lengths, window = [50, 3, 0, 36, 44], 40

    def logits_of(rows: list[int]) -> torch.Tensor:
        """After two tokens of each row."""
        torch.manual_seed(0)
        whole = KVCache.empty(model.config, 5, window, model.head_weight)
        whole.stored.normal_()
        cache = KVCache(whole.stored[:, :, rows].contiguous(), [lengths[row] for row in rows])
        step = GraphDecoder(model, cache, lambda run: run).step
        return torch.stack([step([n + row for row in rows]).clone() for n in range(2)], dim=1)

    together = logits_of([0, 1, 2, 3, 4])
    assert together.isfinite().all()
    for rows in ([0], [2], [4, 1, 3]):
        assert torch.equal(logits_of(rows), together[rows])
