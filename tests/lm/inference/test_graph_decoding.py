from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from lm.inference import compiled_decoding
from lm.inference.decoding import Step, decoder
from lm.inference.generator import Generator
from lm.inference.graph_decoding import GraphDecoder
from lm.inference.kv_cache import KVCache, ReadingPrompt
from lm.inference.sampling import Sampling
from lm.model.transformer import Transformer
from tests.lm.inference.test_decoding import drawn_texts
from tests.lm.inference.test_generator import restless_model
from tests.lm.inference.test_kv_cache import read_anew
from tests.lm.model.test_transformer import VARIANTS, model_of


def capture_on_a_cpu(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """As a CUDA graph: the operations of one run, repeated with the shapes and the numbers of Python that it had."""
    run()
    graph = make_fx(run)()
    output = graph().clone()

    def replay() -> Tensor:
        return output.copy_(graph())

    return replay


@pytest.fixture(autouse=True)
def whole_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU attention looks at the intervals and computes what they need; the reference does not, as a GPU's."""
    monkeypatch.setenv("KINDLING_KERNELS", "reference")


@pytest.mark.parametrize(("variant", "window"), [("grouped", 5), ("qk_norm", 1), ("softcap", 100)])
@torch.inference_mode()
def test_replayed_steps_give_the_logits_of_one_pass_over_the_text(variant, window):
    """Texts of different lengths side by side, the first empty, inside and beyond the window, three rows as four."""
    model, lengths, steps = model_of(num_layers=1, **VARIANTS[variant]), [0, 7, 3], 4
    texts = drawn_texts(lengths, steps)
    cache = KVCache.empty(model.config, 4, window, model.embedding.weight)
    for row, length in enumerate(lengths[1:], 1):
        reading = ReadingPrompt(cache, row, length)
        model(texts[row][None, :length], reading.positions, reading.lo, reading.hi, reading)
        reading.done()
    graphs = GraphDecoder(model, cache, capture_on_a_cpu)
    assert graphs.sizes == [1, 2, 4]
    made = []
    for n in range(steps):
        made.append(graphs.step([int(text[length + n]) for text, length in zip(texts, lengths, strict=True)]).clone())
    assert cache.lengths == [4, 11, 7, 0]
    for text, length, got in zip(texts, lengths, torch.stack(made, dim=1), strict=True):
        whole = model.logits(read_anew(model, text, window))[length:]
        torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_unused_rows_and_the_recording_change_nothing_in_the_cache():
    model = model_of(num_layers=1)
    cache = KVCache.empty(model.config, 4, 8, model.embedding.weight)
    cache.stored.normal_()
    before = cache.stored.clone()
    graphs = GraphDecoder(model, cache, capture_on_a_cpu)
    assert torch.equal(cache.stored, before)
    cache.lengths = [5, 2, 8, 3]
    graphs.step([1, 2, 3])
    changed = (cache.stored != before).any(0).any(0).any(1).any(-1)  # (rows, capacity)
    assert changed.nonzero().tolist() == [[0, 5], [1, 2], [2, 0]]
    assert graphs._inputs[4].tolist() == [[1, 2, 3, 0], [5, 2, 8, 0], [6, 3, 8, 0]]


@given(rows=st.integers(1, 70))
@hypothesis_settings(max_examples=15)
def test_every_number_of_rows_has_a_graph_of_less_than_twice_its_rows(rows):
    model = model_of(num_layers=1)
    cache = KVCache.empty(model.config, rows, 2, model.embedding.weight)
    sizes = GraphDecoder(model, cache, lambda run: run).sizes
    assert sizes[-1] == rows
    for each in range(1, rows + 1):
        assert each <= min(size for size in sizes if size >= each) < 2 * each


def texts_of(model, prompts: dict[str, Sampling], max_rows: int, arrivals: Sequence[int] = ()) -> dict[str, str]:
    """The text of each prompt; ``arrivals`` are the steps before which the prompts come, at first by default."""
    generator = Generator(model, max_rows=max_rows, compiled=True)
    coming = sorted(zip(arrivals or [0] * len(prompts), prompts, strict=True))
    texts, handles = dict.fromkeys(prompts, ""), {}
    for step in count():
        for _, prompt in (each for each in coming if each[0] == step):
            handles[generator.add(prompt, prompts[prompt])] = prompt
        for event in generator.step():
            texts[handles[event.handle]] += event.text
        if not generator.busy and len(handles) == len(prompts):
            return texts
    raise AssertionError


def test_a_generator_with_graphs_writes_what_the_usual_step_writes_alone_and_in_a_batch(dataset, monkeypatch):
    """Requests with all kinds of settings join and leave, also beyond the context."""
    model = restless_model(dataset.tokenizer, 12, num_layers=1)
    prompts = {
        "The old miller": Sampling(temperature=0, max_new_tokens=9),
        "Once": Sampling(temperature=0.8, top_p=0.9, max_new_tokens=20, seed=1),
        "A dog": Sampling(top_k=20, repetition_penalty=1.2, max_new_tokens=5, seed=2),
        "In the morning": Sampling(min_p=0.05, max_new_tokens=14, seed=3),
    }
    monkeypatch.setattr(compiled_decoding, "compiled_decoder", lambda *arguments: (decoder(*arguments), ""))
    usual = texts_of(model, prompts, 3)

    monkeypatch.setattr(compiled_decoding, "compiled_decoder", with_graphs)
    with torch.inference_mode():
        assert texts_of(model, prompts, 3) == texts_of(model, prompts, 1) == usual


def with_graphs(model: Transformer, cache: KVCache) -> tuple[Step, str]:
    """In the place of ``compiled_decoder``, as on a GPU."""
    return GraphDecoder(model, cache, capture_on_a_cpu).step, ""


@given(data=st.data(), max_rows=st.integers(2, 5))
@hypothesis_settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_text_does_not_depend_on_those_that_are_written_with_it(dataset, monkeypatch, data, max_rows):
    """Whichever come before or join later, and however long each is: rows are freed, and graphs of all sizes used."""
    model = restless_model(dataset.tokenizer, 6, num_layers=1)
    model.model.double()
    prompts = {
        prompt: Sampling(seed=seed, temperature=1.5, max_new_tokens=data.draw(st.integers(1, 9)))
        for seed, prompt in enumerate(["The old miller", "Once", "A dog", "In the morning", "She", "It was a"])
    }
    arrivals = [data.draw(st.integers(0, 6)) for _ in prompts]
    monkeypatch.setattr(compiled_decoding, "compiled_decoder", with_graphs)
    together = texts_of(model, prompts, max_rows, arrivals)
    assert texts_of(model, prompts, 1) == together


@torch.inference_mode()
def test_matrices_that_share_their_input_are_joined_without_a_copy_and_the_model_stays_as_it_is():
    model = model_of(num_layers=1, num_key_value_heads=2)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    graphs = GraphDecoder(model, KVCache.empty(model.config, 1, 4, model.embedding.weight), lambda run: run)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])
    attention = model.blocks[0].attention
    parts = [attention.query.weight, attention.key.weight, attention.value.weight]
    assert torch.equal(graphs._layers[0].heads, torch.cat(parts))
    assert {part.untyped_storage().data_ptr() for part in parts} == {
        graphs._layers[0].heads.untyped_storage().data_ptr()
    }
