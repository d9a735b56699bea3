from __future__ import annotations

import pytest
import torch

from lm.inference.decoding import decoder
from lm.inference.generator import Generator
from lm.inference.kv_cache import KVCache
from lm.inference.language_model import LanguageModel
from lm.inference.low_precision import LowPrecisionTransformer
from lm.inference.sampling import Sampling
from lm.kernels import masks
from tests.lm.inference.test_generator import restless_model
from tests.lm.model.test_transformer import VARIANTS, model_of


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_weights_cast_once_give_the_hidden_states_of_autocast_bit_for_bit_and_unrounded_logits(variant):
    model = model_of(dtype=torch.float32, **VARIANTS[variant])
    low, tokens = LowPrecisionTransformer(model), torch.arange(20)[None]
    positions, bounds = tokens, masks.causal(1, 20)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(tokens, positions, *bounds)
        rounded = model.logits(expected[0])
    hidden = low(tokens, positions, *bounds)
    assert hidden.dtype == torch.float32
    assert torch.equal(hidden, expected)
    logits = low.logits(hidden[0])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, rounded, rtol=2**-7, atol=2**-7)
    assert not torch.equal(logits, logits.bfloat16().float())


def test_norms_and_embedding_are_the_models_own_in_float32_and_each_matrix_takes_half_as_much_more():
    model = model_of(dtype=torch.float32, qk_norm=True)
    low, own = LowPrecisionTransformer(model), dict(model.named_parameters())
    for name, parameter in low.named_parameters():
        if parameter.ndim == 1 or name == "embedding.weight":
            assert parameter.data_ptr() == own[name].data_ptr()
            assert parameter.dtype == torch.float32
        else:
            assert parameter.dtype == torch.bfloat16
    assert torch.equal(low.head_weight, model.head_weight.bfloat16())
    assert all(parameter.dtype == torch.float32 for parameter in own.values())


def test_on_a_cpu_the_model_itself_writes_whatever_precision_it_was_trained_with(dataset):
    model = restless_model(dataset.tokenizer, precision="bfloat16")
    assert model.writer is model.model
    assert Generator(model)._cache.stored.dtype == torch.float32


def test_a_generator_reads_and_writes_with_the_weights_of_low_precision(dataset, monkeypatch):
    """As on a GPU: prompts and steps in bfloat16, and the texts those of steps by hand."""
    model = restless_model(dataset.tokenizer, 12, num_layers=1)
    low = LowPrecisionTransformer(model.model)
    monkeypatch.setattr(LanguageModel, "writer", low)
    generator = Generator(model, max_rows=1)
    assert generator._cache.stored.dtype == torch.bfloat16
    generator.add("The old miller", Sampling(temperature=0, max_new_tokens=9))
    written = [event.token for _ in range(9) for event in generator.step()]
    cache = KVCache.empty(low.config, 1, 12, low.head_weight)
    step = decoder(low, cache)
    with torch.inference_mode():
        tokens = model.tokenizer.begun(model.tokenizer.encode("The old miller"))
        for token in tokens[:-1]:
            step([token])
        for token in written:
            logits = step([tokens[-1]])[0]
            logits[list(model.tokenizer.unwritable_ids)] = float("-inf")
            best, chosen = logits.max(), logits[token]
            assert best - chosen < 0.05  # a prompt read at once rounds differently
            tokens.append(token)
