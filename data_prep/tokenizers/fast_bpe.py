"""Byte-pair merges from gigatoken, an optional library: the same as from ``tokenizers``, in a fraction of the time.

The result is used only after two checks: on the first texts, both trainers must agree merge by merge, and the last
merge must occur often enough in the text, because gigatoken has no minimum count. It runs in a separate process, so its
output, crashes and memory do not affect this one.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from data_prep.files import read_json
from data_prep.tokenizers.text_spool import SEPARATOR, TextSpool, first_bytes
from data_prep.tokenizers.tokenizer import BYTE_CHARACTERS, BYTE_OF_CHARACTER

CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}

SMALLEST_TEXT_BYTES = 1 << 22  # below this, the checks cost more than they save
SAMPLE_BYTES = 1 << 19
SAMPLE_VOCABULARY = 1024

Merge = tuple[str, str]

# Run as a program: trains on the first file and writes the merges as pairs of hexadecimal bytes to the last.
PROGRAM = """
import json, sys
import gigatoken
source, size, separator, result = sys.argv[1:]
texts = gigatoken.TextFileSource([source], separator=bytes.fromhex(separator))
_, merges = gigatoken.train_bpe(texts, int(size), [])
with open(result, "w") as file:
    json.dump([[left.hex(), right.hex()] for left, right in merges], file)
"""


def is_installed() -> bool:
    """Return whether the library is installed."""
    return importlib.util.find_spec("gigatoken") is not None


def fast_merges(spool: TextSpool, vocab_size: int, min_pair_count: int) -> list[Merge] | None:
    """Return the merges, in byte characters, for a vocabulary of the 256 bytes and ``vocab_size - 256`` more tokens.

    Returns None if a check fails; then ``tokenizers`` must train instead.
    """
    if not _agree_on_a_sample(spool):
        return None
    merges = _train(spool.path, vocab_size)
    if merges is None or len({left + right for left, right in merges}) != vocab_size - len(BYTE_CHARACTERS):
        return None
    return merges if not merges or _last_occurs(merges, spool, min_pair_count) else None


def _agree_on_a_sample(spool: TextSpool) -> bool:
    with TextSpool(first_bytes(spool.texts(), SAMPLE_BYTES)) as sample:
        return _train(sample.path, SAMPLE_VOCABULARY) == _train_with_tokenizers(sample.texts(), SAMPLE_VOCABULARY)


def _train(path: Path, vocab_size: int) -> list[Merge] | None:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "merges.json")
        command = [sys.executable, "-c", PROGRAM, str(path), str(vocab_size), SEPARATOR.hex(), str(result)]
        if subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode != 0:
            return None
        return [(_characters(left), _characters(right)) for left, right in read_json(result)]


def _characters(content: str) -> str:
    return "".join(CHARACTER_OF_BYTE[byte] for byte in bytes.fromhex(content))


def _train_with_tokenizers(texts: Iterator[str], vocab_size: int) -> list[Merge]:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=list(BYTE_CHARACTERS), show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]


def _last_occurs(merges: list[Merge], spool: TextSpool, times: int) -> bool:
    """Return whether the last merge is applied at least ``times`` times; as counts decrease, so are all others."""
    token = "".join(merges[-1])
    vocabulary = dict.fromkeys([*BYTE_CHARACTERS, *(left + right for left, right in merges)])
    backend = Backend(models.BPE(vocab={name: number for number, name in enumerate(vocabulary)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    content = bytes(BYTE_OF_CHARACTER[character] for character in token)
    holding = (text for text in spool.texts() if content in text.encode("utf-8"))
    found = (name for text in holding for name in backend.encode(text).tokens if name == token)
    return len(list(islice(found, times))) == times
