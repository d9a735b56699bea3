from __future__ import annotations

from dataclasses import replace

import pytest

from lm.serve.schema import ApiError

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
