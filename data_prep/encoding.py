"""Text to token arrays, fast: every distinct word is encoded once, and worker processes share the texts.

The tokenizers that we train, and others with GPT-2's word pattern, never look across the border of a word. So a text's
tokens are its words' tokens one after the other, and a dictionary finds most of them several times faster than the
engine makes them. For all other tokenizers the engine does the work; the tokens are the same either way.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import Any

import numpy as np

from data_prep.shards import token_dtype
from data_prep.tokenizers import Tokenizer

# Unicode's White_Space, which the engine's pattern means by \s. Python's own \s has four characters more.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

# GPT-2's pattern with all kinds of words taken as one: no match of the full pattern reaches over a match of this one.
RUNS = re.compile(rf" ?[^{SPACE}]+|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+")

LARGEST_CACHE_CHARACTERS = 1 << 23  # about 100 MB with the dictionary around them


def splits_at_words(tokenizer: Tokenizer) -> bool:
    """Whether the tokens of a text are the tokens of its ``RUNS`` one after the other."""
    description = json.loads(tokenizer.to_json())
    if description["normalizer"] is not None or not all(token["special"] for token in description["added_tokens"]):
        return False
    pre_tokenizer = description["pre_tokenizer"]
    if pre_tokenizer is None:
        return tokenizer.kind == "characters"
    if pre_tokenizer["type"] != "ByteLevel" or pre_tokenizer["add_prefix_space"]:
        return False
    return pre_tokenizer["use_regex"] or tokenizer.kind == "bytes"


@dataclass(frozen=True)
class EncodedTexts:
    """Several texts: all their tokens in one array, each with its end-of-text token, and counts for each text."""

    tokens: np.ndarray
    lengths: np.ndarray
    words: list[int]


class FastEncoder:
    """Encodes texts into arrays of the shards' dtype."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._end_of_text = np.array([tokenizer.end_of_text_id], self._dtype).tobytes()
        self._by_words = splits_at_words(tokenizer)
        self._known: dict[str, bytes] = {}
        self._known_characters = 0

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """The tokens of each text, with the end-of-text token after each."""
        encoded = [self._encode_words(text) for text in texts] if self._by_words else self._encode_whole(texts)
        tokens = np.frombuffer(b"".join(content + self._end_of_text for content in encoded), self._dtype)
        lengths = np.array([len(content) // self._dtype.itemsize + 1 for content in encoded], dtype=np.int64)
        return EncodedTexts(tokens, lengths, [len(text.split()) for text in texts])

    def _encode_whole(self, texts: Sequence[str]) -> list[bytes]:
        return [np.array(ids, self._dtype).tobytes() for ids in self._tokenizer.encode_batch(texts)]

    def _encode_words(self, text: str) -> bytes:
        words = RUNS.findall(text)
        new = list(set(words).difference(self._known))
        self._known.update(zip(new, self._encode_whole(new), strict=True))
        content = b"".join([self._known[word] for word in words])
        self._known_characters += sum(map(len, new))
        if self._known_characters > LARGEST_CACHE_CHARACTERS:
            self._known.clear()
            self._known_characters = 0
        return content


def encode_in_order(
    batches: Iterable[tuple[Any, Sequence[str]]], tokenizer: Tokenizer, workers: int
) -> Generator[tuple[Any, EncodedTexts], None, None]:
    """Encode batches of texts; each result comes with its batch's label, in the order of the batches.

    With more than one worker, processes do the work while a bounded number of batches waits; the results are the same.
    Raises ``ChildProcessError`` if a worker is killed.
    """
    if workers == 1:
        encoder = FastEncoder(tokenizer)
        for label, texts in batches:
            yield label, encoder.encode(texts)
        return
    with _worker_pool(tokenizer, workers) as submit:
        waiting: deque[tuple[Any, Future[EncodedTexts]]] = deque()
        for label, texts in batches:
            waiting.append((label, submit(texts)))
            if len(waiting) >= 2 * workers:
                label, future = waiting.popleft()
                yield label, future.result()
        for label, future in waiting:
            yield label, future.result()


@contextmanager
def _worker_pool(tokenizer: Tokenizer, workers: int) -> Iterator[Callable[[Sequence[str]], Future[EncodedTexts]]]:
    # spawn, not fork: the engine may have threads in this process, and a fork would copy their locks
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (tokenizer.to_json(),))

    def submit(texts: Sequence[str]) -> Future[EncodedTexts]:
        with _interrupts_held():  # submitting starts processes
            return pool.submit(_encode_in_worker, texts)

    try:
        yield submit
    except BrokenProcessPool:
        raise ChildProcessError(
            "a worker process was killed, perhaps for want of memory: try fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back for a moment. Processes started meanwhile never see it: only the parent decides to stop.

    They inherit the mask. For this process a mask is not enough, since any of its threads may receive the signal.
    """
    if threading.current_thread() is not threading.main_thread():  # Ctrl-C never interrupts another thread
        yield
        return
    held: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if held and callable(handler):
        handler(signal.SIGINT, None)


# The one piece of state in a worker process, set when it starts.
_worker_encoder: FastEncoder


def _start_worker(tokenizer_json: str) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _worker_encoder = FastEncoder(Tokenizer.from_json(tokenizer_json))


def _leave_with_parent() -> None:
    """End this worker when its parent is gone; a parent killed outright cannot tell it to."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(texts: Sequence[str]) -> EncodedTexts:
    return _worker_encoder.encode(texts)
