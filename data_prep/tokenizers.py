"""Train, load and use tokenizers. Each is a plain ``tokenizer.json`` that other programs read as well.

Every tokenizer trained here is lossless: ``decode(encode(text)) == text`` for any Unicode text. Ids 0, 1 and 2 are
the special tokens below; no text ever becomes one of them, not even a text that spells it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from data_prep.errors import UserError
from data_prep.files import write_atomically

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
MASK = "<|mask|>"
SPECIAL_TOKENS = (END_OF_TEXT, PADDING, MASK)
KINDS = ("bpe", "unigram", "bytes", "characters")

# How tokenizers from elsewhere spell the three; the first one present is taken.
END_OF_TEXT_SPELLINGS = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
PADDING_SPELLINGS = (PADDING, "[PAD]", "<pad>")
MASK_SPELLINGS = (MASK, "[MASK]", "<mask>")

# The visible characters that byte-level tokenizers write for the bytes 0 to 255.
BYTE_CHARACTERS = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + len(BYTE_CHARACTERS)

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _bytes_of_characters() -> dict[str, int]:
    """The byte behind each of ``BYTE_CHARACTERS``: printable Latin-1 is itself, the rest count up from U+0100."""
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in themselves]
    return {chr(byte): byte for byte in themselves} | {chr(256 + n): byte for n, byte in enumerate(moved)}


BYTE_OF_CHARACTER = _bytes_of_characters()


class Tokenizer:
    """Text to ids and back.

    Attributes:
        end_of_text_id, padding_id, mask_id: the three special tokens that training needs.
        vocab_size: the number of ids, that is the largest id plus one.
        kind: ``bpe``, ``unigram``, ``bytes`` or ``characters``; for loaded ones any other model's name in lower case.
    """

    def __init__(self, engine: Engine) -> None:
        # Text must not be able to spell a control token: "<|mask|>" in a document stays eight characters.
        engine.encode_special_tokens = True
        engine.no_truncation()
        engine.no_padding()
        self._engine = engine
        self.end_of_text_id = _find_or_add(engine, END_OF_TEXT_SPELLINGS)
        self.padding_id = _find_or_add(engine, PADDING_SPELLINGS)
        self.mask_id = _find_or_add(engine, MASK_SPELLINGS)
        self.vocab_size: int = max(engine.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read any ``tokenizer.json``. Special tokens that it lacks are added after its last id."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f'there is no tokenizer file "{path}"') from None
        except (UnicodeDecodeError, IsADirectoryError):
            raise UserError(f'"{path}" is not a tokenizer.json file') from None
        return cls.from_json(text, name=str(path))

    @classmethod
    def from_json(cls, text: str, *, name: str = "tokenizer.json") -> Tokenizer:
        """Make a tokenizer from the text of a ``tokenizer.json``; ``name`` is what an error message calls it."""
        try:
            engine = Engine.from_str(_with_short_scores(text))
        except Exception as error:  # the engine raises the base class for everything
            raise UserError(f'"{name}" is not a readable tokenizer.json: {error}') from None
        if engine.get_vocab_size() == 0:
            raise UserError(f'"{name}" is a tokenizer without any token')
        return cls(engine)

    def to_json(self) -> str:
        """The whole tokenizer as JSON text, the same for equal tokenizers."""
        return str(self._engine.to_str(pretty=True)) + "\n"

    def save(self, path: str | Path) -> None:
        """Write ``tokenizer.json``."""
        write_atomically(Path(path), self.to_json())

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of ``to_json()``, which is also that of the saved file."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    @cached_property
    def _description(self) -> dict[str, Any]:
        description: dict[str, Any] = json.loads(self.to_json())
        return description

    @cached_property
    def kind(self) -> str:
        model = self._description["model"]
        if model["type"] != "BPE" or model["merges"]:
            return str(model["type"]).lower()
        return "characters" if model["byte_fallback"] else "bytes"

    def encode(self, text: str) -> list[int]:
        """The ids of a text; no special token is added."""
        ids: list[int] = self._engine.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each text, on all cores unless ``TOKENIZERS_PARALLELISM`` is ``false``."""
        return [encoding.ids for encoding in self._engine.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, special tokens as their names, bytes that are no UTF-8 as U+FFFD."""
        return str(self._engine.decode([int(i) for i in ids], skip_special_tokens=False))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of some ids without the special tokens, exact even where a character is cut in two.

        Exact for byte-level and byte-fallback tokenizers, ours all are; others give the UTF-8 of their decoded text.
        """
        wanted = [int(i) for i in ids]
        if self._token_bytes is not None:
            return b"".join(self._token_bytes[i] for i in wanted)
        return str(self._engine.decode(wanted, skip_special_tokens=True)).encode("utf-8")

    def token_text(self, token_id: int) -> str:
        """One token in a form that can be read on one line: control characters and loose bytes are escaped."""
        if token_id in self._special_names:
            return self._special_names[token_id]
        text = self.decode_bytes([token_id]).decode("utf-8", "backslashreplace")
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)

    @cached_property
    def _special_names(self) -> dict[int, str]:
        return {i: token.content for i, token in self._engine.get_added_tokens_decoder().items() if token.special}

    @cached_property
    def _token_bytes(self) -> list[bytes] | None:
        """The bytes of every id, or None if this tokenizer's tokens have no bytes of their own."""
        kinds = _decoder_types(self._description["decoder"])
        added = {i: token.content for i, token in self._engine.get_added_tokens_decoder().items()}
        table = []
        for token_id in range(self.vocab_size):
            token = self._engine.id_to_token(token_id) or ""
            if token_id in self._special_names:
                table.append(b"")
            elif token_id in added:
                table.append(added[token_id].encode("utf-8"))
            elif kinds == {"ByteLevel"}:
                table.append(bytes(BYTE_OF_CHARACTER[character] for character in token))
            elif kinds == {"ByteFallback", "Fuse"}:
                byte = BYTE_TOKEN.fullmatch(token)
                table.append(bytes([int(byte[1], 16)]) if byte else token.encode("utf-8"))
            else:
                return None
        return table


def _with_short_scores(text: str) -> str:
    """The JSON text with a Unigram model's scores at nine decimals.

    The engine reads longer numbers with an error in the last bit, so the text would change with every save and load.
    """
    description = json.loads(text)
    if description["model"].get("type") != "Unigram":
        return text
    description["model"]["vocab"] = [[token, round(score, 9)] for token, score in description["model"]["vocab"]]
    return json.dumps(description, ensure_ascii=False)


def _decoder_types(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    return {part["type"] for part in decoder.get("decoders", [decoder])}


def _find_or_add(engine: Engine, spellings: Sequence[str]) -> int:
    """The id of the first spelling that the vocabulary has, marked as special; else the first is added at the end."""
    vocabulary = engine.get_vocab(with_added_tokens=True)
    name = next((spelling for spelling in spellings if spelling in vocabulary), spellings[0])
    engine.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    return int(engine.get_vocab(with_added_tokens=True)[name])


def train_tokenizer(texts: Iterator[str], kind: str, vocab_size: int) -> Tokenizer:
    """Train a tokenizer of one of ``KINDS`` on ``texts``; the same texts give the same tokenizer in every run.

    ``vocab_size`` counts the three special tokens and the 256 single bytes. It is met exactly for ``bpe`` and
    ``unigram``, is an upper bound for ``characters`` (the most frequent are kept) and means nothing for ``bytes``.
    """
    if kind not in KINDS:
        raise UserError(f'unknown tokenizer kind "{kind}": choose one of {", ".join(KINDS)}')
    if kind == "bytes":
        return _bytes_tokenizer()
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"--vocab-size {vocab_size} is too small: {len(BYTE_CHARACTERS)} bytes and {len(SPECIAL_TOKENS)} special "
            f"tokens need at least {SMALLEST_VOCABULARY}"
        )
    if kind == "characters":
        return _train_characters(texts, vocab_size)
    tokenizer = _train_bpe(texts, vocab_size) if kind == "bpe" else _train_unigram(texts, vocab_size)
    if tokenizer.vocab_size < vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size} is more than this text can give: it has {tokenizer.vocab_size:,} distinct "
            f"tokens; choose at most {tokenizer.vocab_size}, or add text"
        )
    return tokenizer


def _byte_level(engine: Engine, *, split_words: bool = True) -> Tokenizer:
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    engine.decoder = decoders.ByteLevel()
    return Tokenizer(engine)


def _numbered(tokens: Iterable[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def _bytes_tokenizer() -> Tokenizer:
    """One token a byte: the ids are 3 plus the rank of the byte's visible character."""
    vocabulary = _numbered([*SPECIAL_TOKENS, *BYTE_CHARACTERS])
    return _byte_level(Engine(models.BPE(vocab=vocabulary, merges=[])), split_words=False)


def _train_characters(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """One token a character; characters outside the vocabulary become the bytes of their UTF-8."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    by_frequency = sorted(counts, key=lambda character: (-counts[character], character))
    kept = sorted(by_frequency[: vocab_size - SMALLEST_VOCABULARY])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = _numbered([*SPECIAL_TOKENS, *byte_tokens, *kept])
    engine = Engine(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    engine.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(engine)


def _train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016; bytes and word pattern of GPT-2, Radford et al. 2019)."""
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once is no pattern
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=list(BYTE_CHARACTERS),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    return _byte_level(engine)


def _train_unigram(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Unigram language model (Kudo 2018) over byte-level words.

    The vocabulary comes from sentencepiece, whose trainer gives the same result in every run; the trainer of
    ``tokenizers`` does not. Bytes that the text lacks get a score below all others, so nothing is unknown.
    """
    words = _count_words(texts)
    seen = {character for word in words for character in word}
    unseen = [character for character in BYTE_CHARACTERS if character not in seen]
    pieces = _sentencepiece_pieces(words, vocab_size - len(SPECIAL_TOKENS) - len(unseen)) if words else []
    lowest = min((score for _, score in pieces), default=0.0) - 1.0
    # The special tokens' scores are never used: their names span several words, and only words are looked up.
    specials = [(token, lowest) for token in SPECIAL_TOKENS]
    scored = [*specials, *pieces, *((character, lowest) for character in unseen)]
    return Tokenizer.from_json(_byte_level(Engine(models.Unigram(scored))).to_json())


def _count_words(texts: Iterator[str], longest: int = 256) -> Counter[str]:
    """Count the byte-level words of GPT-2's pattern; words above ``longest`` characters are counted in parts.

    Python's fast pattern first finds runs that the byte-level pattern never crosses, so only distinct runs pay for it.
    """
    runs: Counter[str] = Counter()
    for text in texts:
        runs.update(re.findall(r" ?\S+|\s+(?!\S)|\s+", text))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words: Counter[str] = Counter()
    for run, count in runs.items():
        for word, _ in byte_level.pre_tokenize_str(run):
            for start in range(0, len(word), longest):
                words[word[start : start + longest]] += count
    return words


def _sentencepiece_pieces(words: Counter[str], size: int) -> list[tuple[str, float]]:
    """At most ``size`` pieces with their log-probabilities, best first."""
    import io
    import tempfile

    import sentencepiece

    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".tsv") as table:
        table.writelines(f"{word}\t{count}\n" for word, count in sorted(words.items()))
        table.flush()
        sentencepiece.SentencePieceTrainer.train(
            input=table.name,
            input_format="tsv",
            model_writer=model,
            model_type="unigram",
            vocab_size=size + 1,  # one more for <unk>, which is dropped below
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_by_unicode_script=False,
            split_by_number=False,
            split_by_whitespace=False,
            bos_id=-1,
            eos_id=-1,
            num_threads=4,  # fixed, not the machine's: the order of its floating-point sums depends on it
            minloglevel=2,
        )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = [i for i in range(processor.get_piece_size()) if not processor.is_unknown(i)]
    return [(processor.id_to_piece(i), processor.get_score(i)) for i in ids]
