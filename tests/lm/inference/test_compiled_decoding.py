from __future__ import annotations

import pytest
import torch
import torch._dynamo
import torch._inductor.cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from lm.inference import compiled_decoding
from lm.inference.compiled_decoding import CompiledDecoder, compiled_decoder
from lm.inference.generator import Generator
from lm.inference.kv_cache import KVCache
from lm.inference.sampling import Sampling
from lm.model.transformer import Transformer
from tests.lm.inference.test_decoding import drawn_texts
from tests.lm.inference.test_generator import restless_model
from tests.lm.inference.test_kv_cache import read_anew
from tests.lm.model.test_transformer import model_of


def has_compiler() -> bool:
    try:
        torch._inductor.cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": True, "num_key_value_heads": 2, "tie_embeddings": False},
        {"num_key_value_heads": 1, "head_size": 10, "activation": "relu2", "logit_softcap": 3.0},
    ],
)
@torch.inference_mode()
def test_compiled_steps_are_compiled_once_and_give_the_logits_of_the_model_alone_and_among_others(changes):
    """From the first token to beyond the window, texts of different lengths side by side."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = model_of(dtype=torch.float32, **changes)
    window, texts = 8, drawn_texts([12, 9, 10], 0)

    def written(rows: list[int], cache: KVCache, decoder: CompiledDecoder) -> dict[int, list[torch.Tensor]]:
        cache.lengths[:] = [0] * len(cache.lengths)
        made: dict[int, list[torch.Tensor]] = {row: [] for row in rows}
        for place in range(min(len(texts[row]) for row in rows)):
            for row, logits in zip(rows, decoder.step([int(texts[row][place]) for row in rows]), strict=True):
                made[row].append(logits)
        return made

    cache = KVCache.empty(model.config, 3, window, model.embedding.weight)
    decoder = CompiledDecoder(model, cache)
    together = written([2, 0, 1], cache, decoder)
    for row, text in enumerate(texts):
        alone = written([row], cache, decoder)[row]
        torch.testing.assert_close(
            torch.stack(alone), model.logits(read_anew(model, text, window)), rtol=1e-4, atol=1e-4
        )
        assert torch.equal(torch.stack(alone[:9]), torch.stack(together[row]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@needs_compiler
def test_the_same_seed_writes_the_same_text_alone_and_among_others(dataset):
    torch._dynamo.reset()
    model = restless_model(dataset.tokenizer, 12)
    requests = [("The old miller", Sampling(seed=n, temperature=1.3, max_new_tokens=10 + n)) for n in range(3)]

    def written(generator: Generator) -> list[str]:
        handles = [generator.add(*request) for request in requests]
        texts = dict.fromkeys(handles, "")
        while generator.busy:
            for event in generator.step():
                texts[event.handle] += event.text
        return list(texts.values())

    alone, together = (Generator(model, max_rows=rows, compiled=True) for rows in (1, 3))
    assert alone.compiling.startswith("compiled the step in ")
    assert written(alone) == written(together)


@torch.inference_mode()
def test_an_error_of_any_kind_while_compiling_leaves_the_usual_step(monkeypatch):
    class OutOfResourcesError(Exception):
        """Triton's, too, is no RuntimeError."""

    def fail(model: Transformer, cache: KVCache) -> CompiledDecoder:
        raise OutOfResourcesError("shared memory")

    monkeypatch.setattr(compiled_decoding, "CompiledDecoder", fail)
    model = model_of(dtype=torch.float32, num_layers=1)
    cache = KVCache.empty(model.config, 1, 8, model.embedding.weight)
    step, note = compiled_decoder(model, cache)
    assert note.startswith("the step could not be compiled and runs uncompiled: shared memory")
    torch.testing.assert_close(step([3]), model.logits(read_anew(model, torch.tensor([3]), 8)))


@torch.inference_mode()
def test_without_a_compiler_the_steps_run_uncompiled(monkeypatch):
    def no_compiler() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(torch._inductor.cpp_builder, "get_cpp_compiler", no_compiler)
    torch._dynamo.reset()
    model = model_of(dtype=torch.float32, num_layers=1)
    cache = KVCache.empty(model.config, 1, 8, model.embedding.weight)
    step, note = compiled_decoder(model, cache)
    assert note.startswith("the step could not be compiled and runs uncompiled: ")
    torch.testing.assert_close(step([3]), model.logits(read_anew(model, torch.tensor([3]), 8)))


def test_in_float64_nothing_is_compiled():
    model = model_of(num_layers=1)
    cache = KVCache.empty(model.config, 1, 8, model.embedding.weight)
    assert "only a GPU, or float32 on a CPU" in compiled_decoder(model, cache)[1]
