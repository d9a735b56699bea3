"""Text that remembers, through everything a template does with it, which of its characters a message brought.

A special token in a rendered conversation counts only if the template wrote all of it. So each character of a message
that occurs in a special token is replaced by a stand-in: an unpaired surrogate, which no text contains. A string of
this kind acts as the plain text would (``strip``, ``split``, ``in``, …), while the stand-ins pass into the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, SupportsIndex

STAND_INS = range(0xD800, 0xE000)


class MarkedText(str):
    """A string whose value may hold stand-ins; ``marked_kind`` makes the subclass for an alphabet.

    Methods that compare see the plain text. Those that cut keep the stand-ins of what is left. Those that make other
    characters, such as ``upper``, mark all of them.
    """

    __slots__ = ()
    _to: dict[int, int]
    _back: dict[int, int]

    @classmethod
    def marked(cls, text: str) -> MarkedText:
        """Mark every character of a text."""
        return cls(text.translate(cls._to))

    @classmethod
    def plain(cls, value: Any) -> Any:
        """Return a value with plain text for each string in it; lists, tuples and dictionaries are copied."""
        if isinstance(value, str):
            return str.translate(value, cls._back)
        if isinstance(value, dict):
            return {cls.plain(key): cls.plain(each) for key, each in value.items()}
        return type(value)(map(cls.plain, value)) if type(value) in (list, tuple) else value

    @classmethod
    def shielded(cls, text: str) -> str:
        """Return a text of the same length in which U+FFFF takes the place of every stand-in."""
        return str.translate(text, dict.fromkeys(cls._back, "\uffff"))

    def __str__(self) -> str:
        return self

    def __repr__(self) -> str:
        return self.marked(repr(self.plain(self)))

    __hash__: Callable[[], int]

    def __getitem__(self, index: SupportsIndex | slice) -> MarkedText:
        return type(self)(str.__getitem__(self, index))

    def __iter__(self) -> Iterator[MarkedText]:
        return map(type(self), str.__iter__(self))

    def __radd__(self, other: Any) -> Any:
        return type(self)(str.__add__(other, self)) if isinstance(other, str) else NotImplemented

    def _pieces(self, pieces: list[str], gap: int) -> list[MarkedText]:
        """Return the parts of this text that spell these pieces, with at least ``gap`` characters between them."""
        found, text, start = [], self.plain(self), 0
        for piece in pieces:
            start = text.index(piece, start)
            found.append(self[start : start + len(piece)])
            start += len(piece) + gap
        return found

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[MarkedText]:  # type: ignore[override]
        sep = self.plain(sep)
        return self._pieces(self.plain(self).split(sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[MarkedText]:  # type: ignore[override]
        sep = self.plain(sep)
        return self._pieces(self.plain(self).rsplit(sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[MarkedText]:  # type: ignore[override]
        return self._pieces(self.plain(self).splitlines(keepends), 0)

    def partition(self, sep: str) -> tuple[MarkedText, MarkedText, MarkedText]:
        first, middle, _ = map(len, self.plain(self).partition(self.plain(sep)))
        return self[:first], self[first : first + middle], self[first + middle :]

    def rpartition(self, sep: str) -> tuple[MarkedText, MarkedText, MarkedText]:
        first, middle, _ = map(len, self.plain(self).rpartition(self.plain(sep)))
        return self[:first], self[first : first + middle], self[first + middle :]

    def lstrip(self, chars: str | None = None) -> MarkedText:
        return self[len(self) - len(self.plain(self).lstrip(self.plain(chars))) :]

    def rstrip(self, chars: str | None = None) -> MarkedText:
        return self[: len(self.plain(self).rstrip(self.plain(chars)))]

    def strip(self, chars: str | None = None) -> MarkedText:
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str) -> MarkedText:
        return self[len(prefix) if self.plain(self).startswith(self.plain(prefix)) else 0 :]

    def removesuffix(self, suffix: str) -> MarkedText:
        return self[: len(self.plain(self).removesuffix(self.plain(suffix)))]

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> MarkedText:
        if not old:
            return type(self)(str.replace(self, old, new, count))
        return type(self)(str.join(new, self.split(old, count)))


def _compares(name: str) -> Callable[..., Any]:
    def method(self: MarkedText, *args: Any) -> Any:
        return getattr(str, name)(self.plain(self), *map(self.plain, args))

    return method


def _keeps(name: str) -> Callable[..., Any]:
    def method(self: MarkedText, *args: Any) -> Any:
        made = getattr(str, name)(self, *args)
        return type(self)(made) if isinstance(made, str) else made

    return method


def _marks(name: str) -> Callable[..., Any]:
    def method(self: MarkedText, *args: Any) -> Any:
        return self.marked(getattr(str, name)(self.plain(self), *map(self.plain, args)))

    return method


def _converts(kind: type) -> Callable[[MarkedText], Any]:
    return lambda self: kind(self.plain(self))


_TESTS = (
    "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __hash__ __contains__ startswith endswith find rfind index rindex count "
    "isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper"
)
_CHANGES = "upper lower capitalize title swapcase casefold center ljust rjust zfill expandtabs translate"
for _makes, _names in (
    (_compares, _TESTS),
    (_keeps, "__add__ __mul__ __rmul__ __mod__ __format__ join"),
    (_marks, _CHANGES),
):
    for _name in _names.split():
        setattr(MarkedText, _name, _makes(_name))
for _kind in (int, float):
    setattr(MarkedText, f"__{_kind.__name__}__", _converts(_kind))


@lru_cache(maxsize=64)
def marked_kind(alphabet: str) -> type[MarkedText]:
    """Return the kind of text that marks these characters, at most ``len(STAND_INS)``."""
    pairs = dict(zip(map(ord, alphabet), STAND_INS, strict=False))
    back = {stand_in: character for character, stand_in in pairs.items()}
    return type("MarkedText", (MarkedText,), {"__slots__": (), "_to": pairs, "_back": back})
