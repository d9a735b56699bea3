"""Train tokenizers: byte-level BPE, WordPiece, Unigram, single bytes, characters.

Every tokenizer trained here is lossless: ``decode(encode(text)) == text`` for any Unicode text. Ids 0, 1 and 2 are the
special tokens that training needs, those asked for beyond them follow. The same texts give the same ``tokenizer.json``
in every run and for every number of threads. What is held in memory are the distinct words, never the text.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from data_prep.errors import UserError
from data_prep.tokenizers.fast_bpe import SMALLEST_TEXT_BYTES, fast_merges, is_installed
from data_prep.tokenizers.text_spool import TextSpool
from data_prep.tokenizers.tokenizer import BYTE_CHARACTERS, SPECIAL_TOKENS, Tokenizer

KINDS = ("bpe", "wordpiece", "unigram", "bytes", "characters")
DIGITS = ("together", "single")

TOKEN_SETS = {
    "chat": ("<|system|>", "<|user|>", "<|assistant|>", "<|end_of_turn|>"),
    "infill": ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
}
# A name of this form is several words to every tokenizer here, so no text's word can be looked up as one.
SPECIAL_FORM = re.compile(r"<\|[A-Za-z0-9_]+\|>")

# How llama.cpp's "llama-bpe" cuts a text; its "qwen2" differs in the digits alone.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS = ("gpt2", "llama3", "qwen2")

MIN_PAIR_COUNT = 2  # a pair seen once is no pattern

# Not in the byte alphabet, so no word of a text starts with it: "##" of a text stays two characters.
INSIDE_WORD = "\u2040"
LONGEST_PIECED_WORD = 64  # in bytes; looking for pieces takes the square of a word's length

LARGEST_TRAIN_BYTES = 2**31 - 1  # the trainer of tokenizers counts pairs with 32 bits


@dataclass(frozen=True)
class TokenizerSettings:
    """What to train.

    Attributes:
        kind: one of ``KINDS``.
        vocab_size: tokens in the vocabulary, the special tokens and the single bytes included. Met exactly by ``bpe``,
            ``wordpiece`` and ``unigram``, an upper bound for ``characters`` (the most frequent are kept), meaningless
            for ``bytes``.
        train_bytes: bytes of UTF-8 to train on; reading stops after the text that reaches them.
        split: how byte-level BPE cuts a text into words, by the names that llama.cpp knows it under: ``gpt2``,
            ``llama3`` or ``qwen2``.
        digits: ``together`` leaves digits to the split (gpt2: a whole number, llama3: up to three, qwen2: each alone),
            ``single`` makes each a token of its own (with gpt2 that is llama.cpp's ``smollm``, with llama3 ``qwen2``).
        extra_tokens: further special tokens, each ``<|like_this|>``, or a name of ``TOKEN_SETS`` for those in it.
    """

    kind: str = "bpe"
    vocab_size: int = 8192
    train_bytes: int = 100_000_000
    split: str = "gpt2"
    digits: str = "together"
    extra_tokens: tuple[str, ...] = ()

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """All special tokens in the order of their ids, sets of tokens spelled out."""
        spelled = [token for name in self.extra_tokens for token in TOKEN_SETS.get(name, (name,))]
        return (*SPECIAL_TOKENS, *spelled)

    @property
    def smallest_vocabulary(self) -> int:
        """The special tokens and the bytes; WordPiece has each byte twice, at the start of a word and inside."""
        return len(self.special_tokens) + len(BYTE_CHARACTERS) * (2 if self.kind == "wordpiece" else 1)

    def check(self) -> Iterator[str]:
        """One sentence for each thing that is wrong."""
        if self.kind not in KINDS:
            yield f'unknown tokenizer kind "{self.kind}": choose one of {", ".join(KINDS)}'
        elif self.kind != "bytes" and self.vocab_size < self.smallest_vocabulary:
            twice = " (each at the start of a word and inside)" if self.kind == "wordpiece" else ""
            yield (
                f"--vocab-size {self.vocab_size} is too small: {len(BYTE_CHARACTERS)} bytes{twice} and "
                f"{len(self.special_tokens)} special tokens need at least {self.smallest_vocabulary}"
            )
        if not 1 <= self.train_bytes <= LARGEST_TRAIN_BYTES:
            yield f"--train-bytes {self.train_bytes} must be from 1 to {LARGEST_TRAIN_BYTES:,}"
        if self.split not in SPLITS:
            yield f'unknown split "{self.split}": choose one of {", ".join(SPLITS)}'
        if self.digits not in DIGITS:
            yield f'unknown value "{self.digits}" for digits: choose one of {", ".join(DIGITS)}'
        if self.kind != "bpe" and (self.split, self.digits) != ("gpt2", "together"):
            yield f'a split or single digits can be chosen for the kind "bpe" only, and this is "{self.kind}"'
        yield from self._wrong_tokens()

    def _wrong_tokens(self) -> Iterator[str]:
        for token in self.special_tokens:
            if not SPECIAL_FORM.fullmatch(token):
                name = re.sub(r"\W+", "_", token).strip("_") or "name"
                yield (
                    f'"{token}" cannot be a special token: write it as <|{name}|>, or name one of the sets '
                    f"{', '.join(TOKEN_SETS)}"
                )
        for token, count in Counter(self.special_tokens).items():
            if count > 1:
                yield f'the special token "{token}" is there {count} times: name each once'

    def identity(self) -> dict[str, Any]:
        """What decides the tokenizer beside the texts, ready for JSON; sets of tokens are spelled out."""
        extra_tokens = list(self.special_tokens[len(SPECIAL_TOKENS) :])
        if self.kind == "bytes":
            return {"tokenizer_kind": self.kind, "extra_tokens": extra_tokens}
        return {
            "tokenizer_kind": self.kind,
            "vocab_size": self.vocab_size,
            "train_bytes": self.train_bytes,
            "word_split": self.split,
            "digits": self.digits,
            "extra_tokens": extra_tokens,
        }


def train_tokenizer(texts: Iterator[str], settings: TokenizerSettings) -> Tokenizer:
    """Train a tokenizer on the first ``train_bytes`` of ``texts``.

    Raises ``UserError`` if the settings are wrong, or the texts cannot fill the vocabulary.
    """
    problems = list(settings.check())
    if problems:
        raise UserError("\n".join(problems))
    texts = _first_bytes(texts, settings.train_bytes)
    trained = _TRAINERS[settings.kind](texts, settings)
    if settings.kind not in ("bytes", "characters") and trained.vocab_size < settings.vocab_size:
        raise UserError(
            f"--vocab-size {settings.vocab_size} is more than this text can give: it has {trained.vocab_size:,} "
            f"distinct tokens; choose at most {trained.vocab_size}, or add text"
        )
    return trained


def _first_bytes(texts: Iterator[str], limit: int) -> Iterator[str]:
    left = limit
    for text in texts:
        yield text
        left -= len(text.encode("utf-8"))
        if left <= 0:
            return


def _finished(engine: Engine, special_tokens: Iterable[str]) -> Tokenizer:
    engine.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    return Tokenizer(engine)


def _numbered(tokens: Iterable[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def _byte_level_words() -> pre_tokenizers.PreTokenizer:
    """GPT-2's words (Radford et al. 2019), their bytes written as visible characters."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _bytes_tokenizer(texts: Iterator[str], settings: TokenizerSettings) -> Tokenizer:
    """One token a byte: the ids are the number of special tokens plus the rank of the byte's visible character."""
    vocabulary = _numbered([*settings.special_tokens, *BYTE_CHARACTERS])
    engine = Engine(models.BPE(vocab=vocabulary, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    return _finished(engine, settings.special_tokens)


def _train_characters(texts: Iterator[str], settings: TokenizerSettings) -> Tokenizer:
    """One token a character; characters outside the vocabulary become the bytes of their UTF-8."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    by_frequency = sorted(counts, key=lambda character: (-counts[character], character))
    kept = sorted(by_frequency[: settings.vocab_size - settings.smallest_vocabulary])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = _numbered([*settings.special_tokens, *byte_tokens, *kept])
    engine = Engine(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    engine.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _finished(engine, settings.special_tokens)


def _train_bpe(texts: Iterator[str], settings: TokenizerSettings) -> Tokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016).

    For GPT-2's words and more than a little text a faster library makes the same merges if it is installed; see
    ``fast_bpe`` for what is checked. It reads the texts from a temporary file.
    """
    if (settings.split, settings.digits) != ("gpt2", "together") or not is_installed():
        return _train_bpe_with_tokenizers(texts, settings)
    head = list(_first_bytes(texts, SMALLEST_TEXT_BYTES))
    following = list(islice(texts, 1))
    if not following:
        return _train_bpe_with_tokenizers(iter(head), settings)
    with TextSpool(chain(head, following, texts)) as spool:
        merges = fast_merges(spool, settings.vocab_size - len(settings.special_tokens), MIN_PAIR_COUNT)
        if merges is None:
            return _train_bpe_with_tokenizers(spool.texts(), settings)
    # Different pairs can make the same token, which then has the number of the first.
    tokens = dict.fromkeys([*settings.special_tokens, *BYTE_CHARACTERS, *(a + b for a, b in merges)])
    engine = Engine(models.BPE(vocab=_numbered(tokens), merges=merges))
    engine.pre_tokenizer = _byte_level_words()
    engine.decoder = decoders.ByteLevel()
    return _finished(engine, settings.special_tokens)


def _train_bpe_with_tokenizers(texts: Iterator[str], settings: TokenizerSettings) -> Tokenizer:
    engine = Engine(models.BPE())
    engine.pre_tokenizer = _words_of(settings)
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        min_frequency=MIN_PAIR_COUNT,
        special_tokens=list(settings.special_tokens),
        initial_alphabet=list(BYTE_CHARACTERS),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    engine.decoder = decoders.ByteLevel()
    return _finished(engine, settings.special_tokens)


def _words_of(settings: TokenizerSettings) -> pre_tokenizers.PreTokenizer:
    single = settings.digits == "single"
    if settings.split == "gpt2":
        words = _byte_level_words()
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]) if single else words
    pattern = QWEN2_WORDS if single or settings.split == "qwen2" else LLAMA3_WORDS
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _train_wordpiece(texts: Iterator[str], settings: TokenizerSettings) -> Tokenizer:
    """WordPiece (Schuster and Nakajima 2012, as in BERT) over byte-level words: longest piece first, nothing unknown.

    The vocabulary is learned like BERT's in ``tokenizers``: pairs are merged, with tokens inside a word marked. There
    the marked alphabet is numbered in the order of a hash table, which decides ties; here it is numbered beforehand.
    """
    engine = Engine(models.BPE(continuing_subword_prefix=INSIDE_WORD))
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [_byte_level_words(), pre_tokenizers.Split(Regex(f".{{1,{LONGEST_PIECED_WORD}}}"), behavior="isolated")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        min_frequency=MIN_PAIR_COUNT,
        special_tokens=[*settings.special_tokens, *(INSIDE_WORD + character for character in BYTE_CHARACTERS)],
        initial_alphabet=list(BYTE_CHARACTERS),
        continuing_subword_prefix=INSIDE_WORD,
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    # Readers of the format want the name of an unknown token, though every byte is in the vocabulary.
    model = models.WordPiece(
        engine.get_vocab(), unk_token=SPECIAL_TOKENS[1], max_input_chars_per_word=LONGEST_PIECED_WORD
    )
    model.continuing_subword_prefix = INSIDE_WORD
    pieces = Engine(model)
    pieces.pre_tokenizer = engine.pre_tokenizer
    pieces.decoder = decoders.Sequence([decoders.Replace(INSIDE_WORD, ""), decoders.ByteLevel()])
    return _finished(pieces, settings.special_tokens)


def _train_unigram(texts: Iterator[str], settings: TokenizerSettings) -> Tokenizer:
    """Unigram language model (Kudo 2018) over byte-level words.

    The vocabulary comes from sentencepiece, whose trainer gives the same result in every run; the trainer of
    ``tokenizers`` does not. Bytes that the text lacks get a score below all others, so nothing is unknown.
    """
    words = _count_words(texts)
    seen = {character for word in words for character in word}
    unseen = [character for character in BYTE_CHARACTERS if character not in seen]
    size = settings.vocab_size - len(settings.special_tokens) - len(unseen)
    pieces = _sentencepiece_pieces(words, size) if words else []
    lowest = min((score for _, score in pieces), default=0.0) - 1.0
    # The special tokens' scores are never used: their names span several words, and only words are looked up.
    specials = [(token, lowest) for token in settings.special_tokens]
    engine = Engine(models.Unigram([*specials, *pieces, *((character, lowest) for character in unseen)]))
    engine.pre_tokenizer = _byte_level_words()
    engine.decoder = decoders.ByteLevel()
    return Tokenizer.from_json(_finished(engine, settings.special_tokens).to_json())


def _count_words(texts: Iterator[str], longest: int = 256) -> Counter[str]:
    """Count the byte-level words of GPT-2's pattern; words above ``longest`` characters are counted in parts.

    Python's fast pattern first finds runs that the byte-level pattern never crosses, so only distinct runs pay for it.
    """
    runs: Counter[str] = Counter()
    for text in texts:
        runs.update(re.findall(r" ?\S+|\s+(?!\S)|\s+", text))
    byte_level = _byte_level_words()
    words: Counter[str] = Counter()
    for run, count in runs.items():
        for word, _ in byte_level.pre_tokenize_str(run):
            for start in range(0, len(word), longest):
                words[word[start : start + longest]] += count
    return words


def _sentencepiece_pieces(words: Counter[str], size: int) -> list[tuple[str, float]]:
    """At most ``size`` pieces with their log-probabilities, best first."""
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


_TRAINERS = {
    "bpe": _train_bpe,
    "wordpiece": _train_wordpiece,
    "unigram": _train_unigram,
    "bytes": _bytes_tokenizer,
    "characters": _train_characters,
}
