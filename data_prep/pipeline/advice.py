"""What a build notes about its text beyond counts: settings that did not have the effect they are for."""

from __future__ import annotations

from collections.abc import Iterator

from data_prep.cleaning.cleaner import CleaningReport
from data_prep.settings import DOCUMENT_PER, ReadSettings
from data_prep.sources.documents import MOST_COUNTED, ReadReport

MANY_MORE = 10  # times as many documents as there are


def advice(settings: ReadSettings, reading: ReadReport, cleaning: CleaningReport, scale: float = 1.0) -> Iterator[str]:
    """Yield one sentence for each thing that the user should know before training.

    ``scale`` multiplies all counts, for reports about a sample.
    """
    yield from _separators(settings, reading, scale)
    yield from removals(reading, cleaning, scale)


def removals(reading: ReadReport, cleaning: CleaningReport, scale: float = 1.0) -> Iterator[str]:
    """Yield one sentence per cleaning step that removed more than half of the documents, or of their bytes."""
    for name, step in cleaning.steps.items():
        if 2 * step.removed_documents > reading.documents or 2 * step.removed_bytes > reading.text_bytes:
            why = f" ({step.examples[0]['reason']}, for example)" if step.examples else ""
            meant_for = ", which is meant for English prose," if name == "quality" else ""
            removed, there = _count(step.removed_documents, scale), _count(reading.documents, scale)
            share = "" if not reading.text_bytes else f", {step.removed_bytes / reading.text_bytes:.0%} of the text"
            yield f'the step "{name}"{meant_for} removed {removed} of {there} documents{share}{why}'


def why_empty(reading: ReadReport, cleaning: CleaningReport) -> str:
    """Return why no document was kept, for a message."""
    return "; ".join(removals(reading, cleaning)) or "every document is empty, only whitespace, or was skipped"


def _separators(settings: ReadSettings, reading: ReadReport, scale: float) -> Iterator[str]:
    documents, per = reading.text_documents, settings.document_per
    if per not in DOCUMENT_PER:
        if documents and not reading.separators:
            yield f'--document-per "{per}" never occurs in the text files, so they were split by size'
        return
    if per != "size" or not 0 < documents < MOST_COUNTED:
        return
    most = settings.max_document_bytes
    few_and_long = reading.text_document_bytes > documents * most / 2
    ways = (("paragraph", reading.paragraphs), ("line", reading.lines))
    better = next(
        (f"--document-per {way} would give {_count(n, scale)}" for way, n in ways if n > MANY_MORE * documents), ""
    )
    if few_and_long and better:
        average = reading.text_document_bytes / documents / 1000
        yield f"text files gave {_count(documents, scale)} documents of {average:,.0f} KB on average; {better}"


def _count(number: int, scale: float) -> str:
    return f"{number:,}" if scale == 1 else f"about {round(number * scale):,}"
