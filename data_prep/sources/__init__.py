"""Sources: what users name, read as documents."""

from data_prep.sources.documents import CorpusPart, Document, ReadReport, Source
from data_prep.sources.listing import parse_sources, parts_of
from data_prep.sources.reading import read_part

__all__ = ["CorpusPart", "Document", "ReadReport", "Source", "parse_sources", "parts_of", "read_part"]
