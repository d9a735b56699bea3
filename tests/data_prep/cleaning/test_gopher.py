from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cleaning.gopher import quality_problem, repetition_problem
from data_prep.cleaning.ngrams import WordHashes

TOP = {2: 0.20, 3: 0.18, 4: 0.16}
REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

few_words = st.sampled_from(["of", "the", "cat", "sat", "a", "elephants", "x1", "!", "42"])
unlike_words = st.integers(0, 60).map(lambda number: f"w{number}" * (1 + number % 3))
separators = st.sampled_from([" ", " ", " ", "\n", "\n\n", "\n \n"])
texts = st.lists(st.tuples(st.one_of(few_words, unlike_words), separators), max_size=120).map(
    lambda pairs: "".join(word + separator for word, separator in pairs)
)
passages = st.tuples(texts, st.integers(0, 40), st.integers(0, 40)).map(
    lambda drawn: drawn[0] + " " + " ".join(drawn[0].split()[drawn[1] : drawn[1] + drawn[2]])
)


def naive_repetition_problem(text: str) -> str:
    """Table A1 again, with Counters and sets of positions instead of arrays; the name of what is exceeded."""
    for name, parts in (("lines", text.split("\n")), ("paragraphs", re.split(r"\n\s*\n", text))):
        units = [part.strip() for part in parts if part.strip()]
        repeats = [unit for place, unit in enumerate(units) if unit in units[:place]]
        if units and len(repeats) / len(units) > 0.30:
            return f"repeated {name}"
        if units and sum(len(unit) for unit in repeats) / sum(len(unit) for unit in units) > 0.20:
            return f"characters in repeated {name}"
    words = text.split()

    def share(starts: list[int], n: int) -> float:
        covered = {place for start in starts for place in range(start, start + n)}
        return sum(len(words[place]) for place in covered) / max(1, sum(len(word) for word in words))

    for n, most in TOP.items():
        runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        if runs:
            top, count = Counter(runs).most_common(1)[0]
            if count > 1 and share([i for i, run in enumerate(runs) if run == top], n) > most:
                return f"characters in the top {n}-gram"
    for n, most in REPEATED.items():
        runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        if share([i for i, run in enumerate(runs) if run in runs[:i]], n) > most:
            return f"characters in repeated {n}-grams"
    return ""


@given(st.one_of(texts, passages))
def test_repetition_agrees_with_a_naive_restatement(text: str) -> None:
    problem = repetition_problem(text, WordHashes())
    assert problem.rpartition(" > ")[0].rpartition(" ")[0] == naive_repetition_problem(text)


DISTINCT = [f"word{number:03}" for number in range(200)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("same\n" * 2 + "other\nlines\nthat stay\n", ""),  # 1 of 5 lines
        ("same\n" * 3 + "other\nlines\n", "repeated lines 0.40 > 0.3"),
        ("a long line that is here twice\n" * 2 + "b\nc\nd\n", "characters in repeated lines 0.48 > 0.2"),
        ("one\n\none\n \nsix\nten\ntwo\nnew\nold", "repeated paragraphs 0.33 > 0.3"),
        ("of the " * 20 + " ".join(DISTINCT[:20]), "characters in the top 2-gram 0.42 > 0.2"),
        ("seven77 eleven7 " * 10 + " ".join(DISTINCT[:65]), "characters in the top 2-gram 0.24 > 0.2"),
        (" ".join(DISTINCT[:100] + DISTINCT[50:70]), "characters in repeated 5-grams 0.17 > 0.15"),
        (" ".join(DISTINCT[:100] + DISTINCT[50:65]), "characters in repeated 7-grams 0.13 > 0.13"),
        (" ".join(DISTINCT[:100] + DISTINCT[50:60]), ""),
        ("", ""),
    ],
)
def test_repetition_is_told_with_its_figure(text: str, reason: str) -> None:
    assert repetition_problem(text, WordHashes()) == reason


def test_of_equally_frequent_runs_the_earlier_one_counts() -> None:
    between = [f"filler{number:02}" for number in range(25)]
    for number in range(20):  # so that the order of the hashes is now this, now that
        short, long = f"a{number} b{number}", f"extraordinary{number} extravagance{number}"
        for first, second, removed in ((short, long, False), (long, short, True)):
            words = [first, *between[:5], second, *between[5:10], first, *between[10:15], second, *between[15:]]
            problem = repetition_problem(" ".join(words), WordHashes())
            assert problem.startswith("characters in the top 2-gram") == removed


PROSE = "The keeper of the lighthouse went to sleep with the lamp and never woke that night"
GOOD = " ".join([PROSE] * 4)  # 64 words


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, ""),
        ("", "0 words < 50"),
        (" ".join([PROSE] * 3), "48 words < 50"),
        ("the of " * 50_001, "100002 words > 100000"),
        ("a be " * 60, "mean word length 1.50 < 3"),
        ("of the extraordinarily incomprehensible counterexamples " * 20, "mean word length 10.20 > 10"),
        (GOOD + " 1234" * 17, "alphabetic words 0.79 < 0.8"),
        (GOOD + " 1234" * 16, ""),
        ("lighthouse keeper " * 30, "0 different stop words < 2"),
        ("lighthouse keeper the " * 30, "1 different stop words < 2"),
        (GOOD + " #tag" * 8, "symbol ratio 0.11 > 0.1 (hash)"),
        (GOOD + " #tag" * 7, ""),
        (GOOD + " so... or…" * 5, "symbol ratio 0.14 > 0.1 (ellipsis)"),
        ("".join(f"- {PROSE}\n" for _ in range(10)), "bullet lines 1.00 > 0.9"),
        ("".join(f"  • {PROSE}\n\n" for _ in range(9)) + PROSE, ""),
        ("".join(f"{PROSE}…\n" for _ in range(4)) + f"{PROSE}\n" * 6, "lines ending in an ellipsis 0.40 > 0.3"),
        ("".join(f"{PROSE}...\n" for _ in range(3)) + f"{PROSE}\n" * 7, ""),
    ],
)
def test_each_quality_filter_removes_what_is_past_its_threshold_only(text: str, reason: str) -> None:
    assert quality_problem(text) == reason


@given(texts)
def test_quality_never_fails_on_any_text(text: str) -> None:
    assert isinstance(quality_problem(text), str)
