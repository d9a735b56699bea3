"""Train tokenizers: byte-level BPE, WordPiece, Unigram, single bytes, characters.

Every tokenizer trained here is lossless: ``decode(encode(text)) == text`` for any Unicode text. Ids 0, 1 and 2 are the
special tokens that training needs; additional ones follow. The same texts produce the same ``tokenizer.json`` in every
run and for any number of threads. Distinct words are held in memory, but never the whole text.
"""

from __future__ import annotations

import io
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from data_prep.errors import UserError
from data_prep.settings import SPECIAL_TOKENS, TokenizerSettings
from data_prep.tokenizers.fast_bpe import SMALLEST_TEXT_BYTES, fast_merges, is_installed
from data_prep.tokenizers.text_spool import TextSpool, first_bytes
from data_prep.tokenizers.tokenizer import BYTE_CHARACTERS, Tokenizer

# How llama.cpp's "llama-bpe" splits a text into words; its "qwen2" differs only in digits.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
# Its "qwen35" also keeps combining marks with their letters, which many scripts of Asia need to write a vowel.
QWEN35_WORDS = QWEN2_WORDS.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
PATTERNS = {"llama3": LLAMA3_WORDS, "qwen2": QWEN2_WORDS, "qwen35": QWEN35_WORDS}

SAMPLE_CHARACTERS = 100_000
LARGE_SHARE_OF_MARKS = 0.01  # of letters; 0.3 to 0.6 in Hindi or Thai

MIN_PAIR_COUNT = 2  # a pair seen once is not a pattern

# Not in the byte alphabet, so no word starts with it: "##" in a text remains two characters.
INSIDE_WORD = "\u2040"
LONGEST_PIECED_WORD = 64  # in bytes; the search for pieces is quadratic in the length of a word


def train_tokenizer(texts: Iterator[str], settings: TokenizerSettings) -> Tokenizer:
    """Train a tokenizer on the first ``train_bytes`` of ``texts``.

    Raises ``UserError`` if the settings are invalid or the texts are too few for the vocabulary.
    """
    problems = list(settings.check())
    if problems:
        raise UserError("\n".join(problems))
    beginning: list[str] = []
    read = _keep_beginning(first_bytes(texts, settings.train_bytes), beginning)
    trained = _TRAINERS[settings.tokenizer_kind](read, settings)
    if settings.tokenizer_kind not in ("bytes", "characters") and trained.vocab_size < settings.vocab_size:
        raise UserError(
            f"--vocab-size {settings.vocab_size} is too large for this text: it yields only {trained.vocab_size:,} "
            f"distinct tokens; choose at most {trained.vocab_size}, or add text{_advice(settings, ''.join(beginning))}"
        )
    return trained


def _keep_beginning(texts: Iterator[str], kept: list[str]) -> Iterator[str]:
    """Yield the texts, and keep the first ones."""
    size = 0
    for text in texts:
        if size < SAMPLE_CHARACTERS:
            kept.append(text[: SAMPLE_CHARACTERS - size])
            size += len(kept[-1])
        yield text


def _advice(settings: TokenizerSettings, text: str) -> str:
    """Return what to do if words are short because they are cut at combining marks, else ""."""
    categories = Counter(unicodedata.category(character)[0] for character in text)
    if settings.words == "qwen35" or categories["M"] < LARGE_SHARE_OF_MARKS * categories["L"]:
        return ""
    other = "--word-split qwen35" if settings.tokenizer_kind == "bpe" else "--tokenizer-kind bpe --word-split qwen35"
    return f"; its words are short because they are cut at combining marks, which {other} does not do"


def _finished(
    model: models.Model,
    settings: TokenizerSettings,
    decoder: decoders.Decoder,
    words: pre_tokenizers.PreTokenizer | None = None,
) -> Tokenizer:
    backend = Backend(model)
    backend.decoder = decoder
    if words is not None:
        backend.pre_tokenizer = words
    tokens = [AddedToken(token, special=True, normalized=False) for token in settings.special_tokens]
    backend.add_special_tokens(tokens)
    return Tokenizer(backend)


def _numbered(tokens: Iterable[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def _byte_level_words() -> pre_tokenizers.PreTokenizer:
    """Split into GPT-2's words (Radford et al. 2019), with bytes written as visible characters."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _bytes_tokenizer(texts: Iterator[str], settings: TokenizerSettings) -> Tokenizer:
    """One token per byte; its id is the number of special tokens plus the rank of the byte's visible character."""
    model = models.BPE(vocab=_numbered([*settings.special_tokens, *BYTE_CHARACTERS]), merges=[])
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _finished(model, settings, decoders.ByteLevel(), words)


def _train_characters(texts: Iterator[str], settings: TokenizerSettings) -> Tokenizer:
    """One token per character; characters outside the vocabulary become their UTF-8 bytes."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    by_frequency = sorted(counts, key=lambda character: (-counts[character], character))
    kept = sorted(by_frequency[: settings.vocab_size - settings.smallest_vocabulary])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = _numbered([*settings.special_tokens, *byte_tokens, *kept])
    model = models.BPE(vocab=vocabulary, merges=[], byte_fallback=True)
    return _finished(model, settings, decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]))


def _train_bpe(texts: Iterator[str], settings: TokenizerSettings) -> Tokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016).

    For GPT-2's words and larger texts, a faster library produces the same merges if it is installed; ``fast_bpe`` lists
    what is checked. It reads the texts from a temporary file.
    """
    if (settings.words, settings.digits) != ("gpt2", "together") or not is_installed():
        return _train_bpe_with_tokenizers(texts, settings)
    head = list(first_bytes(texts, SMALLEST_TEXT_BYTES))
    following = list(islice(texts, 1))
    if not following:
        return _train_bpe_with_tokenizers(iter(head), settings)
    with TextSpool(chain(head, following, texts)) as spool:
        merges = fast_merges(spool, settings.vocab_size - len(settings.special_tokens), MIN_PAIR_COUNT)
        if merges is None:
            return _train_bpe_with_tokenizers(spool.texts(), settings)
    # Different pairs can form the same token, which keeps the id of the first.
    tokens = dict.fromkeys([*settings.special_tokens, *BYTE_CHARACTERS, *(a + b for a, b in merges)])
    model = models.BPE(vocab=_numbered(tokens), merges=merges)
    return _finished(model, settings, decoders.ByteLevel(), _byte_level_words())


def _train_bpe_with_tokenizers(texts: Iterator[str], settings: TokenizerSettings) -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = _words_of(settings)
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        min_frequency=MIN_PAIR_COUNT,
        special_tokens=list(settings.special_tokens),
        initial_alphabet=list(BYTE_CHARACTERS),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _finished(backend.model, settings, decoders.ByteLevel(), backend.pre_tokenizer)


def _words_of(settings: TokenizerSettings) -> pre_tokenizers.PreTokenizer:
    single = settings.digits == "single"
    if settings.words == "gpt2":
        words = _byte_level_words()
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]) if single else words
    pattern = PATTERNS["qwen2" if single and settings.words == "llama3" else settings.words]
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _train_wordpiece(texts: Iterator[str], settings: TokenizerSettings) -> Tokenizer:
    """WordPiece (Schuster and Nakajima 2012, as in BERT) over byte-level words: longest piece first, nothing unknown.

    The vocabulary is learned as for BERT in ``tokenizers``: pairs are merged, and word-internal tokens are marked.
    There, the marked alphabet is numbered in hash-table order, which breaks ties at random; here it is numbered in
    advance.
    """
    backend = Backend(models.BPE(continuing_subword_prefix=INSIDE_WORD))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
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
    backend.train_from_iterator(texts, trainer)
    # Readers of the format expect an unknown token, although every byte is in the vocabulary.
    model = models.WordPiece(
        backend.get_vocab(), unk_token=SPECIAL_TOKENS[1], max_input_chars_per_word=LONGEST_PIECED_WORD
    )
    model.continuing_subword_prefix = INSIDE_WORD
    decoder = decoders.Sequence([decoders.Replace(INSIDE_WORD, ""), decoders.ByteLevel()])
    return _finished(model, settings, decoder, backend.pre_tokenizer)


def _train_unigram(texts: Iterator[str], settings: TokenizerSettings) -> Tokenizer:
    """Unigram language model (Kudo 2018) over byte-level words.

    The vocabulary comes from sentencepiece, whose trainer is deterministic; the one in ``tokenizers`` is not. Bytes
    that do not occur in the text get a score below all others, so nothing is unknown.
    """
    words = _count_words(texts)
    seen = {character for word in words for character in word}
    unseen = [character for character in BYTE_CHARACTERS if character not in seen]
    size = settings.vocab_size - len(settings.special_tokens) - len(unseen)
    pieces = _sentencepiece_pieces(words, size) if words else []
    lowest = min((score for _, score in pieces), default=0.0) - 1.0
    # The scores of special tokens are never used: their names span several words, and only words are looked up.
    specials = [(token, lowest) for token in settings.special_tokens]
    model = models.Unigram([*specials, *pieces, *((character, lowest) for character in unseen)])
    return Tokenizer.from_json(_finished(model, settings, decoders.ByteLevel(), _byte_level_words()).to_json())


def _count_words(texts: Iterator[str], longest: int = 256) -> Counter[str]:
    """Count the byte-level words of GPT-2's pattern; words above ``longest`` characters are counted in pieces.

    A fast Python pattern first finds runs that the byte-level pattern never crosses, so only distinct runs are split.
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
    """Return at most ``size`` pieces with their log-probabilities, best first."""
    import sentencepiece

    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "words.tsv")
        with table.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{word}\t{count}\n" for word, count in sorted(words.items()))
        sentencepiece.SentencePieceTrainer.train(
            input=str(table),
            input_format="tsv",
            model_writer=model,
            model_type="unigram",
            vocab_size=size + 1,  # plus one for <unk>, which is dropped below
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
            num_threads=4,  # fixed: the order of floating-point sums depends on it
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
