from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest
from click.testing import CliRunner

from data_prep.errors import UserError
from lm.cli.main import main
from lm.evaluation.baselines import token_costs, unigram_likelihoods
from lm.evaluation.minimal_pairs import Pairs, evaluate_model, evaluate_pairs, read_pairs, scores
from tests.conftest import loaded
from tests.lm.inference.test_generator import restless_model


def write_blimp(folder, name, pairs, **fields):
    lines = [{"sentence_good": good, "sentence_bad": bad, "UID": name, **fields} for good, bad in pairs]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_blimp_files_are_read_with_their_paradigms(tmp_path):
    write_blimp(tmp_path, "island", [("Who ran?", "Ran who?"), ("a", "b")], linguistics_term="island_effects")
    write_blimp(tmp_path, "agreement", [("He runs.", "He run.")])
    (tmp_path / "README.md").write_text("not pairs")
    assert read_pairs(tmp_path) == [
        Pairs("agreement", "", ["He runs."], ["He run."]),
        Pairs("island", "island_effects", ["Who ran?", "a"], ["Ran who?", "b"]),
    ]


@pytest.mark.parametrize(("name", "between"), [("x.csv", ","), ("x.tsv", "\t")])
def test_any_file_with_two_columns_will_do(tmp_path, name, between):
    rows = [("yes", "no"), ("He runs.", "He run."), ('"a, b"', "c")]
    (tmp_path / name).write_text("\n".join(between.join(row) for row in rows) + "\n")
    assert read_pairs(tmp_path / name, ("yes", "no")) == [Pairs("x", "", ["He runs.", "a, b"], ["He run.", "c"])]


def test_zorros_files_have_a_sentence_per_line(tmp_path):
    (tmp_path / "agreement-in_question.txt").write_text("does he runs ?\ndoes he run ?\nare he here ?\nis he here ?\n")
    (tmp_path / "local.txt.gz").write_bytes(gzip.compress(b"a\nb\n"))
    zorro = [
        Pairs(
            "agreement-in_question", "agreement", ["does he run ?", "is he here ?"], ["does he runs ?", "are he here ?"]
        ),
        Pairs("local", "", ["b"], ["a"]),
    ]
    assert read_pairs(tmp_path) == zorro
    write_blimp(tmp_path, "island", [("Who ran?", "Ran who?")])
    assert [pairs.paradigm for pairs in read_pairs(tmp_path)] == ["island"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"sentence_good": "x"}\n', 'a.jsonl, line 1: "sentence_bad" is missing'),
        ("a.jsonl", '{"sentence_good": "x", "sentence_bad": "y"}\n\n{"sentence_good": 3}', "line 3: .sentence_good"),
        ("a.jsonl", '{"sentence_good": "x", "sentence_bad": "  "}', "contains no text"),
        ("a.jsonl", "[1]\n", "line 1: not a JSON object"),
        ("a.jsonl", "{", "a.jsonl, line 1: not JSON"),
        ("a.jsonl", "\n\n", "contains no pairs"),
        ("a.csv", "sentence_good\nx\n", 'line 2: "sentence_bad" is missing'),
        ("a.txt", "", "a.txt has 0 sentences: a .txt file of pairs has an even number"),
        ("a.txt", "he run .\nhe runs .\n\nthey runs .\n", "a.txt has 3 sentences"),
        ("a.md", "", "the file must end in one of"),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        read_pairs(tmp_path / name)


def test_where_nothing_is_there_are_no_pairs(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.jsonl"):
        with pytest.raises(UserError, match="there are no pairs at"):
            read_pairs(path)


def test_a_tie_is_half_right_or_goes_to_the_first_as_asked():
    good, bad = np.array([-1.0, -2.0, -3.0]), np.array([-2.0, -2.0, -1.0])
    assert scores(good, bad, "half").tolist() == [1.0, 0.5, 0.0]
    assert scores(good, bad, "first").tolist() == [1.0, 1.0, 0.0]


def test_the_mean_over_paradigms_does_not_weigh_them_by_size(dataset):
    tokenizer = dataset.tokenizer
    paradigms = [Pairs("easy", "", ["a"] * 30, ["bbb"] * 30), Pairs("hard", "", ["bbb"] * 10, ["a"] * 10)]
    found = evaluate_pairs(paradigms, tokenizer, lambda texts: np.array([-float(len(text)) for text in texts]))
    assert (found["easy"].mean, found["hard"].mean, found["all"].mean) == (1.0, 0.0, 0.5)
    assert (found["all"].pairs, found["all"].error, found["all"].ties) == (40, 0.0, 0)


def test_the_bootstrap_error_is_that_of_a_proportion(dataset):
    draw = np.random.default_rng(0)
    values = iter([draw.random(400), draw.random(400)])

    def likelihoods(texts):
        better = next(values)
        return np.concatenate([better[:200] + 0.2, better[200:]])

    pairs = [Pairs(name, "", ["a"] * 200, ["b"] * 200) for name in ("one", "two")]
    found = evaluate_pairs(pairs, dataset.tokenizer, likelihoods)
    for name in ("one", "two"):
        share = found[name].mean
        assert found[name].error == pytest.approx(math.sqrt(share * (1 - share) / 200), rel=0.15)
    assert found["all"].error == pytest.approx(math.hypot(found["one"].error, found["two"].error) / 2, rel=0.15)


def test_the_unigram_baseline_prefers_common_words_and_short_sentences():
    found = unigram_likelihoods(token_costs(np.array([99, 9, 0])), [[0], [1], [2], [0, 0]])
    np.testing.assert_allclose(found, np.log([100 / 111, 10 / 111, 1 / 111, (100 / 111) ** 2]))


def test_sentences_of_the_same_tokens_are_a_tie_for_every_readout_and_the_baseline(trained):
    """For the baseline, also those that differ only in order: its sums may differ in the last bit."""
    model = loaded(trained)
    same = ["the old miller found a silver key"] * 9
    found = evaluate_model(model, [Pairs("same", "", same, same[::-1])])
    assert list(found) == ["next_token", "masked_next_token", "unigram (floor)"]
    for result in found.values():
        assert (result["same"].mean, result["same"].ties) == (0.5, 9)
    shuffled = evaluate_model(model, [Pairs("order", "", [" a b c"], [" c a b"])])
    assert shuffled["unigram (floor)"]["order"].ties == 1
    assert shuffled["next_token"]["order"].ties == 0


def test_a_trained_model_prefers_sentences_like_its_text(trained):
    model = loaded(trained)
    good = ["The captain lost seven apples.", "Nobody carried an owl.", "Every sparrow wanted a small boat."]
    bad = ["Captain the apples seven lost.", "Carried nobody owl an.", "Sparrow every boat a small wanted."]
    found = evaluate_model(model, [Pairs("order", "", good, bad)])
    assert found["next_token"]["all"].mean == 1.0


def test_without_the_data_there_is_no_baseline_and_a_note_says_so(dataset, tmp_path):
    model = restless_model(dataset.tokenizer, data=(str(tmp_path / "gone"),))
    notes: list[str] = []
    found = evaluate_model(model, [Pairs("a", "", ["a"], ["b"])], progress=notes.append)
    assert list(found) == ["next_token", "masked_next_token"]
    assert any("no unigram baseline" in text for text in notes)


def test_the_table_in_a_file_cuts_no_name_off(trained, tmp_path):
    names = [f"coordinate_structure_constraint_complex_left_branch_{number}_of_a_very_long_name" for number in range(2)]
    for name in names:
        write_blimp(tmp_path, name, [("Nobody carried an owl.", "Nobody an owl carried.")])
    result = CliRunner().invoke(main, ["evaluate", str(trained.path), "--pairs", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert all(name in result.stdout for name in names)
    assert "unigram (baseline)" in result.stdout
    assert "unigram (floor)" not in result.stdout
