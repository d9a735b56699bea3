from __future__ import annotations

import random
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cleaning import duplicates
from data_prep.cleaning.duplicates import band_rows, find_duplicates, signatures
from data_prep.errors import UserError
from data_prep.settings import CleaningSettings

EXACT = CleaningSettings(duplicates="exact")
NEAR = CleaningSettings(duplicates="near")


def found_in(folder: Path, parts: list[list[str]], chosen: CleaningSettings) -> list[list[bool]]:
    files = []
    for number, texts in enumerate(parts):
        files.append(folder / f"part{number}")
        files[-1].write_bytes(signatures(texts, chosen.duplicates))
    return [flags.tolist() for flags in find_duplicates(files, chosen.duplicates, chosen)]


def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def jaccard(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    """The similarity of two sets by brute force."""
    return len(one & other) / len(one | other)


def families(seed: int, number: int, members: int) -> list[str]:
    """Groups of texts of 30 to 300 words; the members of a group differ in up to an eighth of their words."""
    rng = random.Random(seed)
    texts = []
    for _ in range(number):
        words = [f"w{rng.randrange(3000)}" for _ in range(rng.randrange(30, 300))]
        for _ in range(members):
            changes = rng.randrange(0, max(1, len(words) // 8))
            changed = list(words)
            for place in rng.sample(range(len(words)), changes):
                changed[place] = f"new{rng.randrange(10**6)}"
            texts.append(" ".join(changed))
    rng.shuffle(texts)
    return texts


drawn_parts = st.lists(st.lists(st.sampled_from(["a", "A", "b", "", "a ", "ä", "a\u0308"]), max_size=8), max_size=5)


@given(parts=drawn_parts, pass_bytes=st.sampled_from([64, 200, 1 << 20]))
def test_exact_duplicates_are_the_texts_that_came_before(tmp_path_factory, parts, pass_bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "PASS_BYTES", pass_bytes)
        patch.setattr(duplicates, "_BLOCK_RECORDS", 3)
        found = found_in(tmp_path_factory.mktemp("parts"), parts, EXACT)
    seen: set[str] = set()
    expected: list[list[bool]] = []
    for texts in parts:
        expected.append([])
        for text in texts:
            expected[-1].append(text in seen)
            seen.add(text)
    assert found == expected


@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_no_two_texts_that_are_kept_are_much_more_alike_than_the_threshold(tmp_path: Path, threshold: float) -> None:
    texts = families(seed=3, number=25, members=8)
    chosen = CleaningSettings(duplicates="near", near_threshold=threshold)
    (flags,) = found_in(tmp_path, [texts], chosen)
    kept = [shingles(text) for text, duplicate in zip(texts, flags, strict=True) if not duplicate]
    assert 25 <= len(kept) < len(texts)
    assert max(jaccard(a, b) for i, a in enumerate(kept) for b in kept[:i]) <= threshold + 0.1


def test_what_is_removed_is_like_a_text_of_its_group(tmp_path: Path) -> None:
    texts = families(seed=4, number=25, members=8)
    (flags,) = found_in(tmp_path, [texts], NEAR)
    sets = [shingles(text) for text in texts]
    for place in np.flatnonzero(flags):
        assert max(jaccard(sets[place], other) for i, other in enumerate(sets) if i != place) >= 0.8 - 0.15


def test_the_estimate_is_near_the_similarity_by_brute_force(tmp_path: Path) -> None:
    texts = families(seed=5, number=40, members=5)
    values = np.frombuffer(signatures(texts, "near"), duplicates.NEAR_RECORD)["minhash"]
    pairs = [(a, b) for a in range(len(texts)) for b in range(a)]
    sets = [shingles(text) for text in texts]
    exact = np.array([jaccard(sets[a], sets[b]) for a, b in pairs])
    estimated = np.array([(values[a] == values[b]).mean() for a, b in pairs])
    alike = exact > 0.3
    deviation = np.sqrt(exact * (1 - exact) / duplicates.MINHASH_VALUES)
    assert alike.sum() > 50
    assert np.abs(estimated - exact)[alike].max() < 5 * deviation.max()
    assert abs((estimated - exact)[alike].mean()) < 0.02
    assert estimated[exact == 0].max() < 0.06


def test_parts_and_blocks_and_bands_do_not_change_what_is_found(tmp_path: Path, monkeypatch) -> None:
    texts = families(seed=6, number=12, members=6)
    (whole,) = found_in(tmp_path, [texts], NEAR)
    assert 0 < sum(whole) < len(texts)
    monkeypatch.setattr(duplicates, "_BLOCK_RECORDS", 5)
    monkeypatch.setattr(duplicates, "_PAIRS_AT_ONCE", 3)
    in_parts = found_in(tmp_path, [texts[:7], [], texts[7:40], texts[40:]], NEAR)
    assert [len(part) for part in in_parts] == [7, 0, 33, 32]
    assert [flag for part in in_parts for flag in part] == whole
    assert found_in(tmp_path, [[text] for text in texts], NEAR) == [[flag] for flag in whole]


def test_unlike_texts_of_one_bucket_are_each_compared_with_those_of_their_kind(tmp_path: Path, monkeypatch) -> None:
    texts = families(seed=8, number=10, members=6)
    monkeypatch.setattr(duplicates, "_mixed", lambda band: np.zeros(len(band), np.uint64))
    (flags,) = found_in(tmp_path, [texts], NEAR)
    values = np.frombuffer(signatures(texts, "near"), duplicates.NEAR_RECORD)["minhash"]
    leaders: list[int] = []
    for place in range(len(texts)):
        if not any((values[leader] == values[place]).mean() >= 0.8 for leader in leaders):
            leaders.append(place)
    assert 10 <= len(leaders) < len(texts)
    assert [place for place, flag in enumerate(flags) if not flag] == leaders


@settings(max_examples=30)
@given(st.lists(st.sampled_from(["", "!", "?!", "one", "One!", "one two", "a b c d e f", "a, B c d e f"]), max_size=9))
def test_texts_of_equal_words_are_near_duplicates_and_so_are_equal_texts(tmp_path_factory, texts) -> None:
    (flags,) = found_in(tmp_path_factory.mktemp("parts"), [texts], NEAR)
    keys = [tuple(re.findall(r"\w+", text.lower())) or text for text in texts]
    assert flags == [key in keys[:place] for place, key in enumerate(keys)]


def test_a_chain_of_likenesses_is_one_group_and_its_first_text_stays(tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(230)]
    chain = [" ".join(words[start : start + 200]) for start in range(0, 31, 5)]  # neighbours share 0.95, the ends 0.73
    first, second, last = (shingles(chain[place]) for place in (0, 1, -1))
    assert jaccard(first, last) < 0.8 < jaccard(first, second)
    (flags,) = found_in(tmp_path, [[*chain, "quite another text of more than five words", *reversed(chain)]], NEAR)
    assert flags == [False] + [True] * 6 + [False] + [True] * 7


def test_a_pair_at_the_threshold_is_mostly_a_candidate_and_one_a_tenth_above_always() -> None:
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9):
        rows = band_rows(threshold)
        bands = duplicates.MINHASH_VALUES // rows
        assert rows * bands == duplicates.MINHASH_VALUES
        assert 1 - (1 - threshold**rows) ** bands >= 0.94
        assert 1 - (1 - min(1, threshold + 0.1) ** rows) ** bands > 0.997
    assert band_rows(0.8) == 8


def test_records_have_a_fixed_size_and_do_not_depend_on_company_or_process() -> None:
    texts = families(seed=7, number=3, members=2)
    for chosen, size in ((EXACT, 16), (NEAR, 528)):
        how = chosen.duplicates
        together = signatures(texts, how)
        assert len(together) == size * len(texts)
        assert together == b"".join(signatures([text], how) for text in texts)
        assert signatures([], how) == b""
    program = (
        "import sys; from data_prep.cleaning.duplicates import signatures;"
        "sys.stdout.buffer.write(signatures(sys.argv[1:], 'near'))"
    )
    command = [sys.executable, "-c", program, *texts]
    assert subprocess.run(command, check=True, capture_output=True).stdout == signatures(texts, "near")


def test_both_ways_to_hash_a_set_give_the_same_values(monkeypatch) -> None:
    texts = ["", "one", *families(seed=9, number=10, members=1), " ".join(f"w{number}" for number in range(20_000))]
    as_arrays = signatures(texts, "near")
    monkeypatch.setattr(duplicates, "_MOST_SHINGLES_OF_AN_ARRAY", 0)
    assert signatures(texts, "near") == as_arrays


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux shows them")
def test_no_threads_are_started_that_a_forked_worker_would_wait_for() -> None:
    texts = [" ".join(f"w{number * place % 997}" for place in range(100)) for number in range(500)]
    texts.append(" ".join(f"w{number}" for number in range(100_000)))
    program = """
import os, sys
from data_prep.cleaning.duplicates import signatures
texts = sys.stdin.read().split(chr(10))
signatures(texts[:1], "near")
threads = len(os.listdir("/proc/self/task"))
signatures(texts, "near")
print(len(os.listdir("/proc/self/task")) - threads)
"""
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, check=True, capture_output=True, text=True, input="\n".join(texts)).stdout == "0\n"


def test_memory_for_exact_duplicates_is_bounded_by_more_passes(tmp_path: Path, monkeypatch) -> None:
    documents = 100_000
    hashes = np.random.default_rng(0).integers(0, 2**63, (documents, 2), dtype=np.uint64)
    hashes[-1] = hashes[0]
    (tmp_path / "part").write_bytes(hashes.tobytes())
    monkeypatch.setattr(duplicates, "PASS_BYTES", 1 << 20)
    monkeypatch.setattr(duplicates, "_BLOCK_RECORDS", 1 << 10)
    tracemalloc.start()
    (flags,) = find_duplicates([tmp_path / "part"], "exact", EXACT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.flatnonzero(flags).tolist() == [documents - 1]
    assert peak < (1 << 20) + documents + (1 << 19)


def test_a_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    (tmp_path / "part7").write_bytes(signatures(["a", "b"], "exact")[:-1])
    with pytest.raises(UserError, match=r"part7\" is truncated"):
        find_duplicates([tmp_path / "part7"], "exact", EXACT)


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(UserError, match=r'need the package rensa: pip install "kindling-lm\[cleaning\]"'):
        signatures(["a"], "near")
