"""Files below a URL, read in parts and patiently: a store that fails, stalls or sends other bytes is asked again.

A request has a time limit. After a failure come ``retries`` more attempts, at growing distances of at most
``LONGEST_WAIT`` seconds. The first failure and the first answer after it are logged as warnings, which Python prints.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from threading import Lock
from typing import Any

from data_prep.errors import StoreError, UserError
from data_prep.errors.wording import counted
from data_prep.files import problem_of_url
from data_prep.sources.storage import filesystem_of

LONGEST_WAIT = 60.0
# Bytes that are wrong again and again have changed in the store; a cache or a proxy on the way may be wrong once.
RETRIES_OF_OTHER_BYTES = 3
INSTALL = 'pip install "kindling-lm[remote]"'
REFUSALS = (401, 403, 407)  # HTTP's statuses
BEYOND_THE_END = 416
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")  # of botocore

LOG = logging.getLogger(__name__)


class OtherBytesError(Exception):
    """An answer that is not what was asked for; the message says why."""


class RemoteFiles:
    """The files of one folder at ``url``. Reading is thread-safe.

    Raises:
        UserError: the URL holds credentials, or no installed package can read it.
    """

    def __init__(self, url: str, *, retries: int, timeout_seconds: float) -> None:
        if problem := problem_of_url(url):
            raise UserError(problem)
        self.url = url.rstrip("/")
        self._retries, self._timeout = retries, timeout_seconds
        self._lock, self._fails = Lock(), False
        self._filesystem: Any
        try:
            self._filesystem, self._folder = filesystem_of(self.url)
        except ImportError as error:
            raise UserError(f'"{self.url}" needs a package that is not installed: {INSTALL} ({error})') from None
        except ValueError as error:
            raise UserError(f'"{self.url}" cannot be read: {error}') from None

    def read(
        self,
        name: str,
        start: int | None = None,
        stop: int | None = None,
        *,
        check: Callable[[bytes], str] = lambda content: "",
    ) -> bytes:
        """Return the bytes of a file from ``start`` to ``stop`` (exclusive); without them, all.

        ``check`` says what is wrong with an answer, "" if nothing is.

        Raises:
            FileNotFoundError: the store says that there is no such file.
            StoreError: it refuses access, or no attempt brought the right bytes.
        """
        file, attempt = f"{self.url}/{name}", 0
        while True:
            try:
                content = self._fetch(f"{self._folder.rstrip('/')}/{name}", start, stop)
                if problem := check(content):
                    raise OtherBytesError(problem)
                self._answers()
                return content
            except FileNotFoundError:
                raise
            except Exception as error:  # every remote system has its own errors
                reason = self._reason(error)
                if _is_refusal(error):
                    raise StoreError(f'access to "{file}" was refused ({reason}): check the credentials') from error
                wrong = isinstance(error, OtherBytesError)
                allowed = min(self._retries, RETRIES_OF_OTHER_BYTES) if wrong else self._retries
                if attempt >= allowed:
                    then = "" if wrong else "; the same command continues when the store is back"
                    tried = counted(attempt + 1, "attempt")
                    raise StoreError(f'cannot read "{file}": {reason} ({tried}){then}') from error
                self._report(f'cannot read "{file}": {reason}; trying again')
            time.sleep(min(2.0**attempt, LONGEST_WAIT))
            attempt += 1

    def _fetch(self, path: str, start: int | None, stop: int | None) -> bytes:
        store = self._filesystem
        try:
            if not store.async_impl:
                return bytes(store.cat_file(path, start=start, end=stop))
            from fsspec.asyn import sync  # rarely needed

            return bytes(sync(store.loop, store._cat_file, path, start=start, end=stop, timeout=self._timeout))
        except Exception as error:
            if start is not None and (_status(error) == BEYOND_THE_END or "InvalidRange" in repr(error.__cause__)):
                return b""
            raise

    def _reason(self, error: Exception) -> str:
        if isinstance(error, TimeoutError) and not str(error).strip():
            return f"no answer within {self._timeout:g} seconds"
        return (str(error).strip() or type(error).__name__).splitlines()[0]

    def _report(self, sentence: str) -> None:
        """Log the first failure; the threads that fail after it say nothing new."""
        with self._lock:
            first, self._fails = not self._fails, True
        if first:
            LOG.warning("%s", sentence)

    def _answers(self) -> None:
        if self._fails:
            with self._lock:
                before, self._fails = self._fails, False
            if before:
                LOG.warning("%s answers again", self.url)


def _status(error: Exception) -> int:
    return getattr(error, "status", None) or 0


def _is_refusal(error: Exception) -> bool:
    named = any(each.__name__ in NO_CREDENTIALS for each in type(error).__mro__)
    return isinstance(error, PermissionError) or named or _status(error) in REFUSALS
