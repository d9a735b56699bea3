from __future__ import annotations

import math

import pytest

from lm.inference.fill_mask import fill_masks
from lm.inference.sampling import Sampling
from lm.inference.scoring import log_likelihoods

TEXT = "The old miller found a café."


def test_filling_is_the_same_as_in_the_library(served):
    service, text = served.service, "the [MASK] miller found a [MASK]."
    answer = served.ask("/api/fill", {"text": text, "top": 3}).json
    expected = fill_masks(service.model, text, top=3)
    assert answer["text"] == expected.text == "".join(piece["text"] for piece in answer["pieces"])
    assert [piece["filled"] for piece in answer["pieces"]] == [False, True, False, True, False]
    assert [[one["token"] for one in mask] for mask in answer["candidates"]] == [
        [token for token, _ in mask] for mask in expected.candidates
    ]
    assert all(len(mask) == 3 and 0 < mask[-1]["probability"] <= 1 for mask in answer["candidates"])


def test_many_masks_are_filled_in_few_rounds_by_temperature_and_seed(served):
    service, text = served.service, "the captain [MASK:20]"
    settings = {"rounds": 3, "temperature": 1.5, "seed": 4}
    answer = served.ask("/api/fill", {"text": text, **settings}).json
    sampling = Sampling(temperature=1.5, seed=4)
    expected = fill_masks(service.model, text, rounds=3, sampling=sampling)
    assert answer["text"] == expected.text
    assert answer["text"] != served.ask("/api/fill", {"text": text, **settings, "seed": 5}).json["text"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"text": "[MASK]", "temperature": -1}, '"temperature" must be a number from 0 to 100'),
        ({"text": "[MASK]", "rounds": 33}, "from 1 to 32"),
        ({"text": "no masks"}, "nothing to fill"),
        ({"text": "[MASK]" * 40}, "reads at most 32"),
        ({}, '"text" must be a string'),
        ({"text": "[MASK]", "top": 0}, '"top" must be a whole number'),
        ({"txt": "[MASK]"}, 'did you mean "text"'),
    ],
)
def test_invalid_requests_to_fill_are_reported(served, body, words):
    answer = served.ask("/api/fill", body)
    assert answer.status == 400
    assert words in answer.error["message"]


def test_probabilities_by_each_readout_add_up_to_the_score(served):
    service = served.service
    answer = served.ask("/api/probabilities", {"text": TEXT, "top": 4}).json
    ids = service.model.tokenizer.encode(TEXT)
    assert [token["id"] for token in answer["tokens"]] == ids
    assert "".join(token["text"] for token in answer["tokens"]) == TEXT
    assert list(answer["readouts"]) == ["next_token", "masked_next_token"]
    for readout, each in answer["readouts"].items():
        (score,) = log_likelihoods(service.model, [ids], readout)
        assert sum(math.log(one["probability"]) for one in each) == pytest.approx(score, abs=1e-3)
        assert all(len(one["alternatives"]) == 4 and one["rank"] >= 1 for one in each)


def test_one_readout_can_be_requested_and_an_empty_text_has_no_tokens(served):
    answer = served.ask("/api/probabilities", {"text": "", "readout": "next_token"}).json
    assert answer == {"tokens": [], "readouts": {"next_token": []}}
    answer = served.ask("/api/probabilities", {"text": "a", "readout": "masked_token"})
    assert "must be one of next_token, masked_next_token" in answer.error["message"]


def test_metrics_are_those_of_the_file(served, trained):
    answer = served.ask("/api/metrics").json
    assert answer["lines"] == list(trained.metrics())
    again = served.ask(f"/api/metrics?from={answer['next']}&file={answer['file']}").json
    assert (again["lines"], again["whole"]) == ([], False)
    for start in ("-1", "x", "1.5", "9" * 30):
        assert served.ask(f"/api/metrics?from={start}").status == 400
