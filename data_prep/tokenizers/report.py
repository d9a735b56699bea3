"""Report how a tokenizer handles a text: compression, coverage, examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from data_prep.sources.text_files import decode
from data_prep.tokenizers.loss import loss_of
from data_prep.tokenizers.tokenizer import Tokenizer


def tokenizer_report(tokenizer: Tokenizer, texts: Iterable[str], *, longest: int = 10) -> dict[str, Any]:
    """Report how a tokenizer handles some texts, which are read once.

    Returns ``texts``, ``text_bytes``, ``words`` (split at whitespace), ``tokens``, ``bytes_per_token`` and
    ``tokens_per_word`` (None without tokens or words), ``unused_tokens`` (non-special ids that never occurred) and
    their share ``unused_share``, ``longest_tokens`` (used tokens with the most bytes), ``fallback_bytes`` (bytes in
    tokens that split a character) with ``fallback_share`` of the text, ``unknown_tokens``, ``lost_bytes``
    (text that decoding does not restore) with ``lost_share``, and ``special_tokens`` with their ids.
    """
    counts: Counter[int] = Counter()
    read = text_bytes = words = lost_bytes = 0
    for text in texts:
        ids = tokenizer.encode(text)
        counts.update(ids)
        lost_bytes += loss_of(tokenizer, text, ids).lost_bytes
        read += 1
        text_bytes += len(text.encode("utf-8"))
        words += len(text.split())
    tokens = counts.total()
    special = tokenizer.special_tokens
    ordinary = tokenizer.vocab_size - len(special)
    unused = ordinary - len(counts.keys() - special.values())
    content = {token: tokenizer.decode_bytes([token]) for token in counts}
    parts = [token for token in counts if decode(content[token], "skip")[0] is None]  # of a character
    fallback_bytes = sum(counts[token] * len(content[token]) for token in parts)
    by_length = sorted(counts, key=lambda token: (-len(content[token]), token))
    return {
        "texts": read,
        "text_bytes": text_bytes,
        "words": words,
        "tokens": tokens,
        "bytes_per_token": text_bytes / tokens if tokens else None,
        "tokens_per_word": tokens / words if words else None,
        "unused_tokens": unused,
        "unused_share": unused / ordinary if ordinary else 0.0,
        "longest_tokens": [tokenizer.token_text(token) for token in by_length[:longest]],
        "fallback_bytes": fallback_bytes,
        "fallback_share": fallback_bytes / text_bytes if text_bytes else 0.0,
        "unknown_tokens": counts[tokenizer.unknown_id] if tokenizer.unknown_id is not None else 0,
        "lost_bytes": lost_bytes,
        "lost_share": lost_bytes / text_bytes if text_bytes else 0.0,
        "special_tokens": special,
    }
