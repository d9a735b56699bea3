"""Every setting of a build, in one place: its meaning, default and limits. The command line follows from it."""

from __future__ import annotations

import difflib
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import sha256_of_file

SMALLEST_MAX_DOCUMENT_BYTES = 16  # room for any character, and a line or two
LARGEST_TRAIN_BYTES = 2**31 - 1  # the trainer of tokenizers counts pairs with 32 bits
LARGEST_VOCABULARY = 2**24
LARGEST_SHARD_TOKENS = 2**28  # keeps every offset that other readers hold in 32 bits in range
DEFAULT_SHARD_TOKENS = 2**26
READING_RULES = 2  # the newest
SMALLEST_IMAGE, LARGEST_IMAGE = 4, 2048  # pixels a side
DOCUMENT_PER = ("size", "file", "paragraph", "line")

UNICODE_FORMS = ("NFC", "NFKC", "NFD", "NFKD")
KEEP, EXACT, NEAR = "keep", "exact", "near"  # what to do with duplicates
INSTALL = 'pip install "kindling-lm[cleaning]"'
NO_RAY = '--engine ray needs the package "ray": pip install "kindling-lm[ray]"'

KINDS = ("bpe", "wordpiece", "unigram", "bytes", "characters")
WORD_SPLITS = ("gpt2", "llama3", "qwen2", "qwen35")
SPECIAL_TOKENS = END_OF_TEXT, PADDING, MASK = "<|endoftext|>", "<|pad|>", "<|mask|>"
TOKEN_SETS = {
    "chat": ("<|system|>", "<|user|>", "<|assistant|>", "<|end_of_turn|>"),
    "infill": ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
}
# Every tokenizer trained here splits a name of this form into several words, so no word of a text equals one.
SPECIAL_FORM = re.compile(r"<\|[A-Za-z0-9_]+\|>")

TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "True or False", tuple: "a list of texts"}


def available_cores() -> int:
    """Return how many cores this process may use; a container can allow fewer than the machine has.

    Part of a core counts as a whole one.
    """
    cores: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group, generation in control_groups("cpu"):
        try:
            if generation == 2:
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota, period = ((group / f"cpu.cfs_{part}_us").read_text().strip() for part in ("quota", "period"))
        except (OSError, ValueError):
            continue  # the root has no limit, and a container may hide the groups above its own
        if quota not in ("max", "-1"):
            cores = min(cores, int(quota) / int(period))
    return max(1, math.ceil(cores))


def control_groups(
    controller: str, membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> Iterator[tuple[Path, int]]:
    """Yield the control groups (Linux) that may limit "cpu" or "memory" of this process, and their version, 1 or 2."""
    lines = membership.read_text().splitlines() if membership.is_file() else []
    for hierarchy, controllers, path in (line.split(":", 2) for line in lines):
        if hierarchy == "0":
            root, generation = mount, 2
        elif controller in controllers.split(","):
            root, generation = mount / controller, 1
        else:
            continue
        inside = root / path.strip("/")
        for group in (inside, *inside.parents):
            if group.is_relative_to(root):
                yield group, generation


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field with its help text and limits (both inclusive); the default's type is the setting's type."""
    return field(default=default, metadata={"help": help, "minimum": minimum, "maximum": maximum, "choices": choices})


def settings_of(kind: Any) -> list[Field[Any]]:
    """Return the fields of a settings dataclass, or of an instance, that ``setting`` made."""
    return [each for each in fields(kind) if "help" in each.metadata]


def option_of(each: Field[Any]) -> str:
    """Return a setting's name on the command line. An option that may be repeated is in the singular."""
    name = each.name.removesuffix("s") if isinstance(each.default, tuple) else each.name
    return f"--{name.replace('_', '-')}"


def problems(settings: Any) -> Iterator[str]:
    """Yield one sentence per setting that is outside its limits or not among its choices."""
    for each in settings_of(settings):
        value, option = getattr(settings, each.name), option_of(each)
        least, most, choices = (each.metadata[name] for name in ("minimum", "maximum", "choices"))
        if choices and value not in choices:
            yield f'unknown {option} "{value}": choose one of {", ".join(filter(None, choices))}'
        elif least is not None and most is not None and not least <= value <= most:
            yield f"{option} {value} must be from {least:,} to {most:,}"
        elif least is not None and not least <= value:
            yield f"{option} {value} must be at least {least:,}"
        elif most is not None and not value <= most:
            yield f"{option} {value} must be at most {most:,}"


def _is_a_word(separator: str) -> bool:
    return separator.isalpha() and separator in (separator.lower(), separator.capitalize())


@dataclass(frozen=True)
class ReadSettings:
    """How files become documents. Every setting affects the result."""

    max_document_bytes: int = setting(
        65536,
        "Most bytes of a document. Longer texts are split, at blank lines where possible.",
        minimum=SMALLEST_MAX_DOCUMENT_BYTES,
        maximum=2**31 - 1,
    )
    document_per: str = setting(
        "size",
        "What is one document in a text file: size, file, paragraph, line, or the text between documents. "
        '"size" splits long files at blank lines, "file" takes each file, "paragraph" each paragraph (between blank '
        'lines), "line" each line; any other text, in which \\n is a newline and \\t a tab, separates documents and is '
        "dropped. Documents above --max-document-bytes are always split.",
    )
    text_field: str = setting("text", "Column that holds the text, for sources with columns.")
    errors: str = setting(
        "skip",
        "Documents that are not valid UTF-8: skip them, replace the invalid bytes with U+FFFD, or stop.",
        choices=("skip", "replace", "stop"),
    )
    part_bytes: int = setting(64 * 2**20, "Approximate bytes of input that one worker processes at a time.", minimum=1)
    # The version of the rules in docs/data.md; a build resumes by those it began with. By version 1, every file
    # was text but .jsonl, .csv and .parquet, and --document-per had no "paragraph".
    reading_rules: int = READING_RULES

    def check(self) -> Iterator[str]:
        """Yield one sentence per invalid setting."""
        yield from problems(self)
        if not self.document_per:
            yield f"--document-per is empty: choose {', '.join(DOCUMENT_PER)}, or the text between two documents"
        elif self.reading_rules > 1 and self.document_per not in DOCUMENT_PER and _is_a_word(self.document_per):
            yield (
                f'--document-per "{self.document_per}" would cut wherever these letters occur: choose '
                f"{', '.join(DOCUMENT_PER)}, or \\n{self.document_per}\\n for a line with this word"
            )
        elif "\0" in self.document_per or "\r" in self.document_per:
            yield "--document-per cannot contain NUL or carriage return: write newlines as \\n, which matches all kinds"
        if not self.text_field:
            yield "--text-field is empty: name the column that holds the text"


@dataclass(frozen=True)
class CleaningSettings:
    """How to clean. Every step is off by default."""

    unicode_form: str = setting("", "Normalize text to this Unicode form.", choices=("", *UNICODE_FORMS))
    control_characters: bool = setting(False, "Remove control characters except newlines and tabs.")
    min_characters: int = setting(0, "Drop documents shorter than this.", minimum=0)
    max_characters: int = setting(0, "Drop documents longer than this; 0: no limit.", minimum=0)
    repetition: bool = setting(False, "Drop repetitive documents (Gopher's rules).")
    quality: bool = setting(False, "Drop documents that do not read like English prose (Gopher's rules).")
    language: tuple[str, ...] = setting((), "Keep only this language, such as en; may be repeated.")
    duplicates: str = setting(
        KEEP, "Drop documents that repeat an earlier one exactly or nearly.", choices=(KEEP, EXACT, NEAR)
    )
    near_threshold: float = setting(0.8, "Similarity at which two documents count as near duplicates.")
    decontaminate: tuple[str, ...] = setting(
        (), "Drop documents that share a run of words with this file of evaluation texts; may be repeated."
    )
    decontaminate_ngram: int = setting(13, "Length of such a run, in words.", minimum=1)

    def check(self) -> Iterator[str]:
        """Yield one sentence per invalid setting, with the way to fix it."""
        yield from problems(self)
        if 0 < self.max_characters < self.min_characters:
            yield f"no text has {self.min_characters} characters or more and {self.max_characters} or fewer: change one"
        if not 0 < self.near_threshold <= 1:
            yield f"--near-threshold must be above 0 and at most 1, not {self.near_threshold:g}"
        for name in self.decontaminate:
            if not Path(name).is_file():
                yield f'there is no evaluation file "{name}"'
        if self.duplicates == NEAR and not version_of("rensa"):
            yield f"near duplicates need the package rensa: {INSTALL}"
        if self.language and not version_of("py3langid"):
            yield f"the language filter needs the package py3langid: {INSTALL}"
        elif self.language:
            known = load_language_identifier().labels
            for language in self.language:
                if language not in known:
                    yield f'unknown language "{language}": choose one of {", ".join(sorted(known))}'

    def identity(self) -> dict[str, Any]:
        """Return what determines the result, ready for JSON: settings, files by name and SHA-256, library versions.

        Raises ``UserError`` if an evaluation file does not exist.
        """
        found: dict[str, Any] = asdict(self)
        found["language"] = sorted(self.language)
        found["decontaminate"] = [{"name": Path(name).name, "sha256": _sha256(name)} for name in self.decontaminate]
        found["versions"] = {
            name: value
            for name, used, value in (
                ("unicode", bool(self.unicode_form), unicodedata.unidata_version),
                ("py3langid", bool(self.language), version_of("py3langid")),
                ("rensa", self.duplicates == NEAR, version_of("rensa")),
            )
            if used
        }
        return found


def version_of(package: str) -> str:
    """Return the version of an installed package, or ""."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _sha256(name: str) -> str:
    try:
        return sha256_of_file(Path(name))
    except FileNotFoundError:
        raise UserError(f'there is no evaluation file "{name}"') from None


@cache
def load_language_identifier() -> Any:
    """Load py3langid's model, which takes half a second; cached per process and inherited by forked workers."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # an extra

    return LanguageIdentifier.from_model_file(MODEL_FILE)


@dataclass(frozen=True)
class TokenizerSettings:
    """Which tokenizer to train.

    The vocabulary size includes special tokens and single bytes. ``bpe``, ``wordpiece`` and ``unigram`` reach it
    exactly, ``characters`` keeps at most that many (the most frequent), ``bytes`` ignores it. ``word_split`` uses
    llama.cpp's names; "auto" is "qwen35" for ``bpe``, while the others split as "gpt2" does. With ``digits="single"``
    the split ``gpt2`` becomes llama.cpp's ``smollm``, and ``llama3`` its ``qwen2``.
    """

    tokenizer_kind: str = setting("bpe", "Kind of tokenizer to train.", choices=KINDS)
    vocab_size: int = setting(8192, "Tokens in the vocabulary.", maximum=LARGEST_VOCABULARY)
    train_bytes: int = setting(
        100_000_000,
        "Bytes of training text, from the beginning, to train the tokenizer on.",
        minimum=1,
        maximum=LARGEST_TRAIN_BYTES,
    )
    word_split: str = setting(
        "auto",
        "How bpe splits text into words; auto: qwen35, or what an earlier build in --out began with.",
        choices=("auto", *WORD_SPLITS),
    )
    digits: str = setting(
        "together", "single: make each digit a token; together: follow the word split.", choices=("together", "single")
    )
    extra_tokens: tuple[str, ...] = setting(
        (), "Additional special token <|name|>, or chat or infill for a predefined set; may be repeated."
    )

    @property
    def words(self) -> str:
        """One of ``WORD_SPLITS``: how this kind of tokenizer splits text into words."""
        if self.word_split != "auto":
            return self.word_split
        return "qwen35" if self.tokenizer_kind == "bpe" else "gpt2"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """All special tokens in the order of their ids, with predefined sets expanded."""
        expanded = [token for name in self.extra_tokens for token in TOKEN_SETS.get(name, (name,))]
        return (*SPECIAL_TOKENS, *expanded)

    @property
    def smallest_vocabulary(self) -> int:
        """The special tokens plus the 256 bytes. WordPiece has each byte twice: word-initial and word-internal."""
        return len(self.special_tokens) + 256 * (2 if self.tokenizer_kind == "wordpiece" else 1)

    def check(self) -> Iterator[str]:
        """Yield one sentence per invalid setting."""
        yield from problems(self)
        sized = self.tokenizer_kind in KINDS and self.tokenizer_kind != "bytes"
        if sized and self.vocab_size < self.smallest_vocabulary:
            twice = " (each word-initial and word-internal)" if self.tokenizer_kind == "wordpiece" else ""
            yield (
                f"--vocab-size {self.vocab_size} is too small: 256 bytes{twice} and {len(self.special_tokens)} "
                f"special tokens need at least {self.smallest_vocabulary}"
            )
        if self.tokenizer_kind != "bpe" and (self.words, self.digits) != ("gpt2", "together"):
            yield f'--word-split and --digits apply only to --tokenizer-kind bpe, not to "{self.tokenizer_kind}"'
        for token, count in Counter(self.special_tokens).items():
            if not SPECIAL_FORM.fullmatch(token):
                name = re.sub(r"\W+", "_", token).strip("_") or "name"
                sets = ", ".join(TOKEN_SETS)
                yield f'"{token}" cannot be a special token: write it as <|{name}|>, or name one of the sets {sets}'
            if count > 1:
                yield f'the special token "{token}" is listed {count} times: list each one once'

    def identity(self) -> dict[str, Any]:
        """Return what determines the tokenizer, apart from the texts, ready for JSON; token sets are expanded."""
        extra_tokens = list(self.special_tokens[len(SPECIAL_TOKENS) :])
        if self.tokenizer_kind == "bytes":
            return {"tokenizer_kind": self.tokenizer_kind, "extra_tokens": extra_tokens}
        return asdict(self) | {"word_split": self.words, "extra_tokens": extra_tokens}


@dataclass(frozen=True)
class BuildSettings:
    """How to write the dataset, and all other settings of a build.

    ``workers``, ``engine`` and ``encoder`` do not affect the result.
    """

    sources: tuple[str, ...]
    out: Path
    reading: ReadSettings = field(default_factory=ReadSettings)
    cleaning: CleaningSettings = field(default_factory=CleaningSettings)
    training: TokenizerSettings = field(default_factory=TokenizerSettings)
    tokenizer: str | None = setting(
        None,
        "Existing tokenizer, instead of training one. It is a tokenizer.json, a sentencepiece .model, a folder "
        "with either, or a name on the Hugging Face Hub.",
    )
    validation_fraction: float = setting(0.05, "Fraction of documents held out for validation, from 0 to below 1.")
    shard_tokens: int = setting(
        DEFAULT_SHARD_TOKENS, "Maximum tokens per shard file.", minimum=1, maximum=LARGEST_SHARD_TOKENS
    )
    workers: int = setting(0, "Worker processes; 0: one per available core.", minimum=0)
    engine: str = setting(
        "local",
        "Where workers run: on this machine, or on the Ray cluster at RAY_ADDRESS.",
        choices=("local", "ray"),
    )
    encoder: str = setting("auto", "Library that encodes; auto: the fastest one installed that proves exact.")

    @classmethod
    def from_options(cls, sources: Sequence[str | Path], out: str | Path, **options: Any) -> BuildSettings:
        """Make settings from options, each named after a field here or in one of the three groups.

        Raises ``UserError`` for an unknown option or a value of the wrong type.
        """
        groups = {"reading": ReadSettings, "cleaning": CleaningSettings, "training": TokenizerSettings}
        known = {each.name: each.default for kind in (*groups.values(), cls) for each in settings_of(kind)}
        options = {name: _as_given(name, value, known) for name, value in options.items()}
        made = {
            group: kind(**{each.name: options.pop(each.name) for each in settings_of(kind) if each.name in options})
            for group, kind in groups.items()
        }
        named = [sources] if isinstance(sources, (str, Path)) else sources
        return cls(tuple(map(str, named)), Path(out), **made, **options)

    def check(self) -> None:
        """Raise ``UserError`` with one line per invalid setting."""
        found = [*self.reading.check(), *self.cleaning.check(), *problems(self)]
        others = [language for language in self.cleaning.language if language != "en"]
        if self.cleaning.quality and others and self.reading.reading_rules > 1:
            found.append(
                f"--quality keeps only English prose (it counts English words), but --language is {', '.join(others)}: "
                "leave one of them out"
            )
        if self.tokenizer is None:
            found += self.training.check()
        if self.engine == "ray" and not version_of("ray"):
            found.append(NO_RAY)
        if not 0 <= self.validation_fraction < 1:
            found.append(f"--validation-fraction {self.validation_fraction} must be at least 0 and below 1")
        if found:
            raise UserError("\n".join(found))


@dataclass(frozen=True)
class VisualTokenSettings:
    """All settings of a build of visual tokens. ``workers`` does not affect the result."""

    images: str
    out: Path
    patch_size: int  # pixels a side
    codes: int = setting(512, "Number of codes, each standing for patches that look alike.", minimum=2, maximum=2**15)
    seed: int = setting(0, "Random seed of the patches that the codes are learned from.", minimum=0)
    shard_tokens: int = setting(
        DEFAULT_SHARD_TOKENS, "Maximum tokens per shard file.", minimum=1, maximum=LARGEST_SHARD_TOKENS
    )
    workers: int = setting(0, "Worker processes; 0: one per available core.", minimum=0)

    @classmethod
    def from_options(cls, images: str | Path, out: str | Path, patch_size: int, **options: Any) -> VisualTokenSettings:
        """Make settings from options, each named after a field here; errors as of ``ImageSettings``."""
        known = {each.name: each.default for each in settings_of(cls)} | {"patch_size": 0}
        given = {name: _as_given(name, value, known) for name, value in (options | {"patch_size": patch_size}).items()}
        return cls(str(images), Path(out), **given)

    def check(self) -> None:
        """Raise ``UserError`` with one line per invalid setting."""
        found = list(problems(self))
        if self.patch_size < 1:
            found.append(f"--patch-size {self.patch_size} must be at least 1 pixel")
        if found:
            raise UserError("\n".join(found))


def _as_given(name: str, value: Any, known: dict[str, Any]) -> Any:
    if name not in known:
        similar = difflib.get_close_matches(name, known, 1)
        raise UserError(
            f'there is no setting "{name}": '
            + (f"did you mean {similar[0]}?" if similar else f"choose from {', '.join(known)}")
        )
    kind = type(known[name])
    if kind is tuple:
        several = value if isinstance(value, (list, tuple)) else [value]
        if all(isinstance(each, (str, Path)) for each in several):
            return tuple(map(str, several))
    elif known[name] is None or isinstance(value, (int, float) if kind is float else kind):
        return value
    raise UserError(f"{name} must be {TYPE_NAMES[kind]}, not {value!r}")


@dataclass(frozen=True)
class ImageSettings:
    """How to read and store images, and all other settings of their build. ``workers`` does not affect the result."""

    sources: tuple[str, ...]
    out: Path
    size: int  # pixels a side
    channels: int = setting(0, "Channels to store: 3 (color) or 1 (gray); 0: 1 if all images are gray, else 3.")
    validation: tuple[str, ...] = setting(
        (), "Source of the validation images; then all others are for training. May be repeated."
    )
    validation_fraction: float = setting(0.05, "Fraction of images held out for validation, from 0 to below 1.")
    image_column: str = setting("", "Column that holds the images, for sources with columns; default: the only one.")
    label_column: str = setting(
        "", "Column that holds the classes, for sources with columns; default: one called label, if there is one."
    )
    shard_bytes: int = setting(2**28, "Maximum bytes per shard file.", minimum=1, maximum=2**40)
    workers: int = setting(0, "Worker processes; 0: one per available core.", minimum=0)

    @classmethod
    def from_options(cls, sources: Sequence[str | Path], out: str | Path, size: int, **options: Any) -> ImageSettings:
        """Make settings from options, each named after a field here.

        Raises ``UserError`` for an unknown option or a value of the wrong type.
        """
        known = {each.name: each.default for each in settings_of(cls)} | {"size": 0}
        given = {name: _as_given(name, value, known) for name, value in (options | {"size": size}).items()}
        named = [sources] if isinstance(sources, (str, Path)) else sources
        return cls(tuple(map(str, named)), Path(out), **given)

    def check(self) -> None:
        """Raise ``UserError`` with one line per invalid setting."""
        found = list(problems(self))
        if not SMALLEST_IMAGE <= self.size <= LARGEST_IMAGE:
            found.append(f"--size {self.size} must be from {SMALLEST_IMAGE} to {LARGEST_IMAGE:,} pixels")
        if self.channels not in (0, 1, 3):
            found.append(f"--channels {self.channels} must be 3 (color), 1 (gray), or 0 to choose by the images")
        if not 0 <= self.validation_fraction < 1:
            found.append(f"--validation-fraction {self.validation_fraction} must be at least 0 and below 1")
        if found:
            raise UserError("\n".join(found))
