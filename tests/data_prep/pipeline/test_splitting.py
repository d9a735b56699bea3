from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.pipeline.splitting import HASH_RANGE, PartDigest, SplitRule, hash_of

hashes = st.lists(st.integers(0, HASH_RANGE - 1), min_size=2).filter(lambda found: len(set(found)) > 1)


def threshold_for(found: list[int], fraction: float, text_bytes: int = 10_000) -> int:
    rule = SplitRule(fraction)
    for document_hash in found:
        rule.add(document_hash)
    return rule.threshold(text_bytes)


@given(found=hashes, fraction=st.floats(1e-6, 0.999999))
def test_both_sides_get_a_document_whenever_two_differ(found: list[int], fraction: float) -> None:
    threshold = threshold_for(found, fraction)
    below = [h for h in found if h < threshold]
    assert 0 < len(below) < len(found)
    by_fraction = [h for h in found if h < int(fraction * HASH_RANGE)]
    if 0 < len(by_fraction) < len(found):
        assert below == by_fraction
    else:
        extreme = min(found) if not by_fraction else max(found)
        moved = [h for h in found if (h < threshold) != (h in by_fraction)]
        assert set(moved) == {extreme}


def test_without_a_fraction_all_is_training() -> None:
    assert threshold_for([0, 0], 0.0) == 0
    assert threshold_for([5], 0.0) == 0


@pytest.mark.parametrize(
    ("found", "text_bytes", "message"),
    [
        ([7], 20_000, "only one document, .* --max-document-bytes 1000, or .* --validation-fraction 0"),
        ([7], 100, "only one document, .* add text, or"),
        ([7, 7, 7], 100, "all documents are identical, too few"),
    ],
)
def test_too_little_to_split_is_refused(found: list[int], text_bytes: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        threshold_for(found, 0.05, text_bytes)


def test_the_share_of_validation_is_near_the_fraction() -> None:
    documents = [f"document {n}".encode() for n in range(4000)]
    threshold = threshold_for([hash_of(document) for document in documents], 0.1)
    share = sum(hash_of(document) < threshold for document in documents) / len(documents)
    assert 0.08 < share < 0.12  # four standard deviations


def test_hashes_and_digests_are_those_of_the_description() -> None:
    assert hash_of(b"abc") == int(hashlib.blake2b(b"abc", digest_size=8).hexdigest(), 16)
    digest = PartDigest()
    digest.update([b"ab"], [hash_of(b"ab")])
    digest.update([b"c"], [hash_of(b"c")])
    expected = b"\2\0\0\0\0\0\0\0" + hash_of(b"ab").to_bytes(8, "little")
    expected += b"\1\0\0\0\0\0\0\0" + hash_of(b"c").to_bytes(8, "little")
    assert digest.hexdigest() == hashlib.sha256(expected).hexdigest()


@given(found=hashes, fraction=st.floats(1e-6, 0.999999))
def test_once_settled_no_further_document_moves_the_border(found: list[int], fraction: float) -> None:
    rule = SplitRule(fraction)
    for number, document_hash in enumerate(found):
        rule.add(document_hash)
        if rule.settled:
            assert threshold_for(found[: number + 1], fraction) == threshold_for(found, fraction)
            return
