from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lm.inference import compiled_decoding
from lm.inference.decoding import Step
from lm.inference.graph_decoding import GraphDecoder
from lm.inference.kv_cache import KVCache
from lm.inference.sampling import Sampling
from lm.model.transformer import Transformer
from lm.serve.engine import Engine, TextRequest
from lm.serve.schema import ApiError, Limits
from lm.serve.service import Service
from tests.lm.inference.test_graph_decoding import capture_on_a_cpu

HELLO = [{"role": "user", "content": "the old miller"}]


def test_requests_for_another_model_or_too_many_texts_are_refused(served):
    service = served.service
    service.check(None)
    service.check("trained", service.places)
    with pytest.raises(ApiError, match='no model "gpt"') as caught:
        service.check("gpt")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    with pytest.raises(ApiError, match=f"asks for {service.places + 1} texts") as caught:
        service.check(None, service.places + 1)
    assert caught.value.status == 400


def test_a_run_that_cannot_continue_text_says_so(small, quietly, tmp_path, serving):
    run = quietly(small.replace(objective="masked_token", steps=2), tmp_path / "masks")
    with serving(run) as served:
        for path, body in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": HELLO})):
            answer = served.ask(f"/v1/{path}", body)
            assert answer.status == 400
            assert answer.error["code"] == "unsupported_readout"
            assert "can fill masks" in answer.error["message"]
        assert served.ask("/api/fill", {"text": "a [MASK]"}).status == 200


def test_a_run_that_cannot_fill_masks_says_so(small, quietly, tmp_path, serving):
    run = quietly(small.replace(objective="next_token", steps=2), tmp_path / "writer")
    with serving(run) as served:
        answer = served.ask("/api/fill", {"text": "a [MASK]"})
        assert (answer.status, answer.error["code"]) == (400, "unsupported_readout")
        assert list(served.ask("/api/probabilities", {"text": "a"}).json["readouts"]) == ["next_token"]
        assert served.ask("/api/run").json["readouts"] == ["next_token"]


def test_the_run_is_described(served, trained):
    about = served.ask("/api/run").json
    assert (about["name"], about["step"], about["context_length"]) == ("trained", 100, 32)
    assert about["parameters"]["total"] == sum(p.numel() for p in served.service.model.model.parameters())
    assert about["readouts"] == ["next_token", "masked_next_token"]
    assert about["settings"]["hidden_size"] == 32


def test_the_page_begins_with_texts_of_the_run_if_its_data_is_there(served, trained, dataset, tmp_path, serving):
    found = served.ask("/api/run").json["openings"]
    split = dataset.split("validation")
    held_out = dataset.tokenizer.decode(split.read(0, split.tokens).tolist())
    assert 1 <= len(found) <= 3
    for opening in found:
        assert opening["prompt"] in opening["text"] in held_out
        before, after = opening["fill"].split("[MASK]")
        assert opening["text"].startswith(before)
        assert opening["text"].endswith(after)
        assert served.ask("/api/fill", {"text": opening["fill"]}).status == 200
    gone = replace(trained, config=trained.config.replace(data=(str(tmp_path / "gone"),)))
    with serving(gone) as other:
        assert other.ask("/api/run").json["openings"] == []


def test_a_compiled_service_writes_many_texts_at_once_as_each_alone(trained, monkeypatch):
    """Replayed steps, with a trace in the place of a CUDA graph: texts wait, join and end at different times."""
    monkeypatch.setenv("KINDLING_KERNELS", "reference")
    rows: list[int] = []

    def with_graphs(model: Transformer, cache: KVCache) -> tuple[Step, str]:
        graphs = GraphDecoder(model, cache, capture_on_a_cpu)

        def step(tokens: list[int]) -> Tensor:
            rows.append(len(tokens))
            return graphs.step(tokens)

        return step, "recorded"

    monkeypatch.setattr(compiled_decoding, "compiled_decoder", with_graphs)
    checkpoint = trained.newest()
    model = trained.load_model(torch.device("cpu"), checkpoint).double()
    service = Service.open(trained, checkpoint, model, Limits(concurrent=3), compiled=True)
    requests = [
        TextRequest(service.model.tokenizer.encode("the captain"), Sampling(seed=n, max_new_tokens=4 + 3 * n))
        for n in range(6)
    ]

    async def written(engine: Engine, requests: list[TextRequest]) -> list[str]:
        texts = [""] * len(requests)
        async with engine.write(requests) as events:
            async for index, event in events:
                texts[index] += event.text
        return texts

    async def body() -> None:
        engine = Engine(service.make_writer, service.places)
        engine.start()
        try:
            alone = [text for each in requests for text in await written(engine, [each])]
            assert set(rows) == {1}
            together = await asyncio.gather(written(engine, requests[:4]), written(engine, requests[4:]))
            assert [text for texts in together for text in texts] == alone
            assert set(rows) == {1, 2, 3}
        finally:
            await engine.close()

    asyncio.run(body())
