"""Look at a dataset as a model will see it."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_prep.shards import SPLITS, Dataset, Split

QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
COMMON_TOKENS = 20
SAMPLE_TOKENS = 1 << 24  # common tokens are counted in the first so many of a split
SHOWN_TOKENS = 200  # of one document


def inspect_dataset(dataset: Dataset, *, documents: int, seed: int) -> dict[str, Any]:
    """Totals, length quantiles, ``documents`` random documents and the most common tokens of each split."""
    return {
        "directory": str(dataset.directory),
        "tokenizer": dataset.manifest["tokenizer"],
        "fingerprint": dataset.fingerprint,
        "splits": {name: _inspect_split(dataset, dataset.split(name), documents, seed) for name in SPLITS},
    }


def _inspect_split(dataset: Dataset, split: Split, documents: int, seed: int) -> dict[str, Any]:
    totals: dict[str, Any] = {
        "documents": split.documents,
        "tokens": split.tokens,
        "text_bytes": split.text_bytes,
        "words": split.words,
        "shards": len(split.records),
    }
    if split.documents == 0:
        return totals
    lengths = split.document_lengths()
    quantiles = {f"{q:.0%}": int(value) for q, value in zip(QUANTILES, np.quantile(lengths, QUANTILES), strict=True)}
    return totals | {
        "tokens_per_document": quantiles,
        "samples": _samples(dataset, split, lengths, documents, seed),
        "common_tokens": _common_tokens(dataset, split),
    }


def _samples(dataset: Dataset, split: Split, lengths: np.ndarray, documents: int, seed: int) -> list[dict[str, Any]]:
    count = min(max(documents, 0), split.documents)
    chosen = np.sort(np.random.default_rng(seed).choice(split.documents, size=count, replace=False))
    ends = np.cumsum(lengths, dtype=np.int64)
    samples = []
    for document in chosen:
        start = int(ends[document] - lengths[document])
        tokens = split.read(start, start + min(int(lengths[document]), SHOWN_TOKENS))
        text = dataset.tokenizer.decode(tokens.tolist())
        samples.append({"document": int(document), "tokens": int(lengths[document]), "begins": text})
    return samples


def _common_tokens(dataset: Dataset, split: Split) -> list[dict[str, Any]]:
    sample = split.read(0, min(split.tokens, SAMPLE_TOKENS))
    counts = np.bincount(sample, minlength=dataset.vocab_size)
    top = np.argsort(-counts, kind="stable")[:COMMON_TOKENS]
    return [
        {"id": int(i), "token": dataset.tokenizer.token_text(int(i)), "share": float(counts[i] / len(sample))}
        for i in top
        if counts[i]
    ]


def render(found: dict[str, Any]) -> str:
    """The result of ``inspect_dataset`` for a person."""
    tokenizer = found["tokenizer"]
    lines = [f"{found['directory']}: {tokenizer['kind']} tokenizer of {tokenizer['vocab_size']:,} tokens"]
    for name, split in found["splits"].items():
        lines += [
            "",
            f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens in {split['shards']} files",
        ]
        if split["documents"] == 0:
            continue
        lines.append(f"  {split['text_bytes'] / split['tokens']:.2f} bytes of text per token, {split['words']:,} words")
        quantiles = "  ".join(f"{share}: {length:,}" for share, length in split["tokens_per_document"].items())
        lines.append(f"  tokens per document  {quantiles}")
        common = "  ".join(f'"{token["token"]}" {token["share"]:.1%}' for token in split["common_tokens"])
        lines.append(f"  most common tokens  {common}")
        for sample in split["samples"]:
            cut = " …" if sample["tokens"] > SHOWN_TOKENS else ""
            lines += ["", f"--- {name} document {sample['document']:,}, {sample['tokens']:,} tokens ---"]
            lines.append(sample["begins"] + cut)
    return "\n".join(lines)
