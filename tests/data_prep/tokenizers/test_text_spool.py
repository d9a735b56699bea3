from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.tokenizers import text_spool
from data_prep.tokenizers.text_spool import TextSpool


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]))), chunk=st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_texts_come_back_as_they_were(texts: list[str], chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch, TextSpool(iter(texts)) as spool:
        patch.setattr(text_spool, "CHUNK_BYTES", chunk)
        assert list(spool.texts()) == texts == list(spool.texts())
        assert spool.path.stat().st_size == sum(len(text.encode()) + 1 for text in texts)


def test_the_file_is_gone_afterwards_also_when_the_texts_fail() -> None:
    with TextSpool(["a"]) as spool:
        assert spool.path.exists()
    assert not spool.path.exists()

    def failing() -> object:
        yield "a"
        raise OSError("unreadable")

    with pytest.raises(OSError, match="unreadable"):
        TextSpool(failing())
