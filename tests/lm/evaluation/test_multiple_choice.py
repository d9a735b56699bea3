from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from data_prep.errors import UserError
from lm.cli.main import main
from lm.data.examples import Example
from lm.evaluation.multiple_choice import encode_answer, evaluate_choices, likelihoods, score
from lm.inference.scoring import log_likelihoods
from tests.conftest import loaded

QUESTIONS = [
    Example(("The captain lost", "a silver key.", "xqz jjw kkv."), 0, "f.jsonl, line 1"),
    Example(("Nobody sold", "vvq zzx", "an owl", "the winter coat again."), 2, "f.jsonl, line 2"),
]


@pytest.fixture(scope="module")
def model(trained):
    return loaded(trained)


@pytest.mark.parametrize("readout", ["next_token", "masked_next_token"])
def test_an_answer_is_scored_after_its_question_under_every_normalization(model, readout):
    tokenizer = model.tokenizer
    found, cut = likelihoods(model, QUESTIONS, readout)
    assert cut == 0
    for place, example in enumerate(QUESTIONS):
        scores = {name: of_examples[place] for name, of_examples in found.items()}
        question, *answers = example.texts
        for number, answer in enumerate(answers):
            whole, alone = tokenizer.encode(f"{question} {answer}"), tokenizer.encode(question)
            assert whole[: len(alone)] == alone
            given = log_likelihoods(model, [whole], readout, firsts=[len(alone)])[0]
            free = log_likelihoods(model, [whole[len(alone) :]], readout)[0]
            assert scores["sum"][number] == pytest.approx(given, abs=1e-4)
            assert scores["token"][number] == pytest.approx(given / (len(whole) - len(alone)), abs=1e-4)
            assert scores["byte"][number] == pytest.approx(given / len(answer), abs=1e-4)
            assert scores["unconditional"][number] == pytest.approx(given - free, abs=1e-4)


def test_a_question_that_is_too_long_loses_its_beginning(model):
    tokenizer = model.tokenizer
    encoded = encode_answer(tokenizer, "The captain lost " * 9, "an owl", 20)
    assert encoded.cut
    assert len(encoded.tokens) == 20
    assert tokenizer.decode(encoded.tokens).endswith("lost an owl")
    assert tokenizer.decode(encoded.tokens[encoded.first :]).strip() == "an owl"
    assert not encode_answer(tokenizer, "The captain lost ", "an owl", 31).cut
    long = Example(("q", "word " * 40, "x"), 0, "f.jsonl, line 7")
    with pytest.raises(UserError, match=r"f\.jsonl, line 7: the answer .* at most 31 can be read"):
        likelihoods(model, [long], "next_token")
    _, cut = likelihoods(model, [Example(("old owl " * 40, "x", "y"), 0, "f")], "next_token")
    assert cut == 2


def test_where_question_and_answer_grow_into_one_token_the_answer_has_it(dataset):
    tokenizer = dataset.tokenizer
    encoded = encode_answer(tokenizer, "The old mil", "ler", 31)
    assert encoded.tokens == tokenizer.encode("The old miller")
    assert tokenizer.decode(encoded.tokens[: encoded.first]) == "The old mil"[: len("The old")]


def test_equally_likely_answers_share_the_point():
    assert score(np.array([-1.0, -2.0]), 0) == 1.0
    assert score(np.array([-1.0, -2.0]), 1) == 0.0
    assert score(np.array([-1.0, -1.0 - 1e-7, -3.0]), 1) == 0.5
    assert score(np.array([-1.0, -1.0]), 0) == 0.5


def test_accuracy_is_the_share_of_points_next_to_chance(model):
    results, _ = evaluate_choices(model, QUESTIONS * 3)
    assert list(results) == ["next_token", "masked_next_token", "chance (floor)"]
    assert results["next_token"]["byte"].mean == 1.0
    assert results["chance (floor)"]["sum"].mean == pytest.approx((1 / 2 + 1 / 3) / 2)
    wrong = [Example(e.texts, (e.label + 1) % 2, e.place) for e in QUESTIONS]
    mixed, _ = evaluate_choices(model, [*QUESTIONS, *wrong] * 25)
    accuracy = mixed["next_token"]["byte"]
    assert accuracy.mean == 0.5
    assert accuracy.error == pytest.approx((0.25 / 100) ** 0.5, rel=0.1)


def test_the_command_prints_accuracies_of_a_file(random_run, tmp_path):
    path = tmp_path / "q.jsonl"
    rows = [{"q": e.texts[0], "choices": e.texts[1:], "label": e.label} for e in QUESTIONS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["evaluate", str(random_run.path), "--choices", str(path), "--text-column", "q"]
    told = CliRunner().invoke(main, arguments)
    assert told.exit_code == 0, told.output
    assert "unconditional" in told.stdout
    assert "chance (baseline)" in told.stdout
    assert "share of 2 questions whose right answer is the most likely" in told.stdout
    found = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert found["accuracy"]["next_token"]["byte"]["mean"] == 1.0
    assert found["questions"] == 2
