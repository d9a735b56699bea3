"""Inspect a dataset as a model sees it: statistics, documents, and windows that cross the end of a document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from data_prep.shards.counts import token_counts
from data_prep.shards.tokens import SPLITS, Dataset, Split

QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
COMMON_TOKENS = 20
UNUSED_SHOWN = 20
SHOWN_TOKENS = 200  # of one document or window
CURVE_POINTS = 60
BAR_WIDTH = 40


def inspect_dataset(dataset: Dataset, *, documents: int, seed: int) -> dict[str, Any]:
    """Describe each split, ready for JSON: totals, document lengths, ``documents`` random documents and one window,
    token counts over the whole split, and bytes per token by source.
    """
    return {
        "directory": dataset.location,
        "tokenizer": dataset.manifest["tokenizer"],
        "fingerprint": dataset.fingerprint,
        "splits": {name: _inspect_split(dataset, dataset.split(name), documents, seed) for name in SPLITS},
    }


def _inspect_split(dataset: Dataset, split: Split, documents: int, seed: int) -> dict[str, Any]:
    totals: dict[str, Any] = {
        "documents": split.documents,
        "tokens": split.tokens,
        "text_bytes": split.text_bytes,
        "lost_bytes": split.lost_bytes,
        "words": split.words,
        "shards": len(split.records),
    }
    if split.documents == 0:
        return totals
    lengths = split.document_lengths()
    ends = np.cumsum(lengths, dtype=np.int64)
    counts = token_counts(split, dataset.vocab_size)
    rng = np.random.default_rng(seed)
    quantiles = {f"{q:.0%}": int(value) for q, value in zip(QUANTILES, np.quantile(lengths, QUANTILES), strict=True)}
    return totals | {
        "tokens_per_document": quantiles,
        "length_histogram": _length_histogram(lengths),
        "samples": _samples(dataset, split, ends, documents, rng),
        "window": _window(dataset, split, ends, rng) if documents > 0 else [],
        "common_tokens": _common_tokens(dataset, counts),
        "unused_tokens": _unused_tokens(dataset, counts),
        "rank_frequency": _rank_frequency(counts),
        "sources": _by_source(dataset, split),
    }


def _length_histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Count documents by length, in bins between powers of two, without empty bins at either end."""
    exponents = np.frexp(lengths)[1] - 1  # exact, unlike a logarithm
    bins = np.bincount(exponents)
    return [
        {"from": 2**exponent, "below": 2 ** (exponent + 1), "documents": int(bins[exponent])}
        for exponent in range(int(exponents.min()), len(bins))
    ]


def _samples(
    dataset: Dataset, split: Split, ends: np.ndarray, documents: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    count = min(max(documents, 0), split.documents)
    samples = []
    for document in np.sort(rng.choice(split.documents, size=count, replace=False)):
        start = int(ends[document - 1]) if document else 0
        tokens = int(ends[document]) - start
        shown = split.read(start, start + min(tokens, SHOWN_TOKENS))
        samples.append(
            {"document": int(document), "tokens": tokens, "begins": dataset.tokenizer.decode(shown.tolist())}
            | _as_tokens(dataset, shown)
        )
    return samples


def _window(dataset: Dataset, split: Split, ends: np.ndarray, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return tokens around the end of a random document, as a model trained on windows sees them, by document."""
    middle = int(ends[rng.integers(max(split.documents - 1, 1))])  # nothing follows the last document
    start, stop = max(middle - SHOWN_TOKENS // 2, 0), min(middle + SHOWN_TOKENS // 2, split.tokens)
    parts = []
    document = int(np.searchsorted(ends, start, side="right"))
    while start < stop:
        end = min(int(ends[document]), stop)
        tokens = split.read(start, end)
        parts.append(
            {"document": document, "text": dataset.tokenizer.decode(tokens.tolist())} | _as_tokens(dataset, tokens)
        )
        start, document = end, document + 1
    return parts


def _as_tokens(dataset: Dataset, tokens: np.ndarray) -> dict[str, list[Any]]:
    ids = tokens.tolist()
    return {"ids": ids, "token_texts": [dataset.tokenizer.token_text(token) for token in ids]}


def _common_tokens(dataset: Dataset, counts: np.ndarray) -> list[dict[str, Any]]:
    top = np.argsort(-counts, kind="stable")[:COMMON_TOKENS]
    return [
        {"id": int(i), "token": dataset.tokenizer.token_text(int(i)), "share": float(counts[i] / counts.sum())}
        for i in top
        if counts[i]
    ]


def _unused_tokens(dataset: Dataset, counts: np.ndarray) -> dict[str, Any]:
    unused = np.flatnonzero(counts == 0)
    first = [{"id": int(i), "token": dataset.tokenizer.token_text(int(i))} for i in unused[:UNUSED_SHOWN]]
    return {"count": int(unused.size), "first": first}


def _rank_frequency(counts: np.ndarray) -> list[list[int]]:
    """Return ``[rank, count]`` of the used tokens (rank 1 is the most common), at logarithmically spaced ranks."""
    descending = np.sort(counts[counts > 0])[::-1]
    ranks = np.unique(np.geomspace(1, descending.size, CURVE_POINTS).round().astype(int))
    return [[int(rank), int(descending[rank - 1])] for rank in ranks]


def _by_source(dataset: Dataset, split: Split) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for record in split.records:
        name = dataset.manifest["sources"][record.source]["name"]
        row = found.setdefault(name, {"name": name, "documents": 0, "tokens": 0, "text_bytes": 0})
        for key in ("documents", "tokens", "text_bytes"):
            row[key] += getattr(record, key)
    return [row | {"bytes_per_token": row["text_bytes"] / row["tokens"]} for row in found.values()]


def render(found: dict[str, Any], *, ids: bool = False) -> str:
    """Format the result of ``inspect_dataset`` as text; with ``ids``, sampled text as single tokens with their ids."""
    tokenizer = found["tokenizer"]
    lines = [f"{found['directory']}: {tokenizer['kind']} tokenizer of {tokenizer['vocab_size']:,} tokens"]
    for name, split in found["splits"].items():
        heading = f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens in {split['shards']} files"
        lines += ["", heading]
        if split["documents"]:
            lines += [*_numbers(split), *_texts(name, split, ids)]
    return "\n".join(lines)


def _numbers(split: dict[str, Any]) -> Iterator[str]:
    lost = f", {split['lost_bytes']:,} bytes of text are lost" if split["lost_bytes"] else ""
    yield f"  {split['text_bytes'] / split['tokens']:.2f} bytes of text per token, {split['words']:,} words{lost}"
    if len(split["sources"]) > 1:
        for source in split["sources"]:
            yield f"    {source['name']}: {source['bytes_per_token']:.2f}, {source['tokens']:,} tokens"
    quantiles = "  ".join(f"{share}: {length:,}" for share, length in split["tokens_per_document"].items())
    yield f"  tokens per document  {quantiles}"
    most = max(row["documents"] for row in split["length_histogram"])
    for row in split["length_histogram"]:
        bar = "█" * -(-row["documents"] * BAR_WIDTH // most)
        yield f"    {row['from']:>10,} to {row['below'] - 1:<10,} {bar:{BAR_WIDTH}} {row['documents']:,}"
    common = "  ".join(f'"{token["token"]}" {token["share"]:.1%}' for token in split["common_tokens"])
    yield f"  most common tokens  {common}"
    unused = split["unused_tokens"]
    if unused["count"]:
        shown = "  ".join(f'"{token["token"]}"' for token in unused["first"])
        more = " …" if unused["count"] > len(unused["first"]) else ""
        yield f"  never used: {unused['count']:,} tokens  {shown}{more}"


def _texts(name: str, split: dict[str, Any], ids: bool) -> Iterator[str]:
    for sample in split["samples"]:
        cut = " …" if sample["tokens"] > SHOWN_TOKENS else ""
        yield ""
        yield f"--- {name} document {sample['document']:,}, {sample['tokens']:,} tokens ---"
        yield (_with_ids(sample) if ids else sample["begins"]) + cut
    for number, part in enumerate(split["window"]):
        if number == 0:
            yield ""
            yield f"=== {name} window, from within document {part['document']:,} ==="
        else:
            yield f"··· document {part['document']:,} begins ···"
        yield _with_ids(part) if ids else part["text"]


def _with_ids(shown: dict[str, Any]) -> str:
    return " ".join(f"{token}·{text}" for token, text in zip(shown["ids"], shown["token_texts"], strict=True))
