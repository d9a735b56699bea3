"""MB of text per CPU-second for each cleaning step: python -m benchmarks.cleaning [FILE…]

Uses documents of 4,096 characters from the files, or from the built-in corpus. The steps take turns, so that a busy
machine slows all of them equally; the result is the median of the rounds. All steps run in one worker process.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.side_by_side import in_turn
from data_prep.cleaning.cleaner import Cleaner
from data_prep.cleaning.duplicates import signatures
from data_prep.settings import CleaningSettings
from data_prep.sources.builtin_corpus import builtin_documents

DOCUMENT_CHARACTERS = 4096
DOCUMENTS = 300
EVALUATION_TEXTS = 20_000


def main() -> None:
    whole = "\n".join(Path(name).read_text("utf-8") for name in sys.argv[1:]) or _builtin_text()
    stride = max(DOCUMENT_CHARACTERS, len(whole) // DOCUMENTS)
    texts = [whole[start : start + DOCUMENT_CHARACTERS] for start in range(0, len(whole), stride)]
    megabytes = sum(len(text.encode("utf-8")) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        evaluation = Path(folder) / "evaluation.txt"
        evaluation.write_text(_evaluation_text(whole), "utf-8")
        timings = in_turn(_candidates(texts, str(evaluation)), rounds=7, warm_up=1)
    print(f"{len(texts)} documents, {megabytes:.1f} MB")
    for name, timing in timings.items():
        print(f"  {name:18}  {megabytes / timing.cpu:8.1f} MB per CPU-second")


def _builtin_text() -> str:
    return "\n".join(text for _, text in builtin_documents())


def _evaluation_text(text: str) -> str:
    """Return lines of 15 words of the text, in reverse order so that none matches."""
    words = text.split()[: 15 * EVALUATION_TEXTS][::-1]
    return "\n".join(" ".join(words[start : start + 15]) for start in range(0, len(words), 15))


def _candidates(texts: list[str], evaluation: str) -> dict[str, Callable[[], object]]:
    steps = {
        "control characters": CleaningSettings(control_characters=True),
        "NFC": CleaningSettings(unicode_form="NFC"),
        "NFKC": CleaningSettings(unicode_form="NFKC"),
        "length": CleaningSettings(min_characters=1),
        "quality": CleaningSettings(quality=True),
        "repetition": CleaningSettings(repetition=True),
        "evaluation texts": CleaningSettings(decontaminate=(evaluation,)),
        "language": CleaningSettings(language=("en",)),
    }
    candidates: dict[str, Callable[[], object]] = {
        name: partial(_clean_all, Cleaner(settings), texts) for name, settings in steps.items()
    }
    for how in ("exact", "near"):
        candidates[f"{how} signatures"] = partial(signatures, texts, how)
    return candidates


def _clean_all(cleaner: Cleaner, texts: list[str]) -> None:
    for text in texts:
        cleaner.clean(text)


if __name__ == "__main__":
    main()
