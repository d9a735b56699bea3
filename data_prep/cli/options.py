"""The options of ``build``, in three groups that correspond to the settings of reading, cleaning and the tokenizer.

An option's name is that of the field it sets. Imports nothing heavy: --help is quick.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _all(*options: Decorator) -> Decorator:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


reading_options = _all(
    click.option(
        "--text-field", default="text", show_default=True, help="Column with the text, where there are columns."
    ),
    click.option(
        "--document-per",
        default="size",
        show_default=True,
        help='What a document of a text file is: "size" cuts at blank lines, "file", "line", or any text between two.',
    ),
    click.option(
        "--max-document-bytes",
        type=int,
        default=65536,
        show_default=True,
        help="Longer texts are cut into documents of at most this many bytes, at blank lines where there are any.",
    ),
    click.option(
        "--errors",
        type=click.Choice(["skip", "replace", "stop"]),
        default="skip",
        show_default=True,
        help="Bytes that are no UTF-8: leave the document out, put U+FFFD, or stop.",
    ),
    click.option(
        "--part-bytes", type=int, default=64 * 2**20, show_default=True, help="Most text that is worked on in one go."
    ),
)

cleaning_options = _all(
    click.option(
        "--unicode-form",
        type=click.Choice(["", "NFC", "NFKC", "NFD", "NFKD"]),
        default="",
        metavar="[NFC|NFKC|NFD|NFKD]",
        help="Bring text into this form.",
    ),
    click.option("--control-characters", is_flag=True, help="Remove control characters, save newlines and tabs."),
    click.option("--min-characters", type=int, default=0, help="Leave out shorter documents."),
    click.option("--max-characters", type=int, default=0, help="Leave out longer documents."),
    click.option("--repetition", is_flag=True, help="Leave out repetitive documents (Gopher's rules)."),
    click.option("--quality", is_flag=True, help="Leave out what does not read like prose (Gopher's rules)."),
    click.option("--language", multiple=True, help="Keep documents in this language, such as en; may be repeated."),
    click.option(
        "--duplicates",
        type=click.Choice(["keep", "exact", "near"]),
        default="keep",
        show_default=True,
        help="Leave out documents that were there before, exactly or nearly.",
    ),
    click.option(
        "--near-threshold", type=float, default=0.8, show_default=True, help="Similarity from which two are near."
    ),
    click.option(
        "--decontaminate", multiple=True, help="Leave out documents that share text with this file; may be repeated."
    ),
    click.option(
        "--decontaminate-ngram", type=int, default=13, show_default=True, help="Words in a row that count as shared."
    ),
)

tokenizer_options = _all(
    click.option("--vocab-size", type=int, default=8192, show_default=True, help="Tokens in the vocabulary."),
    click.option(
        "--tokenizer-kind",
        "kind",
        type=click.Choice(["bpe", "wordpiece", "unigram", "bytes", "characters"]),
        default="bpe",
        show_default=True,
        help="Kind of tokenizer to train.",
    ),
    click.option(
        "--tokenizer",
        help="A tokenizer to use instead of training one: tokenizer.json, sentencepiece .model, a folder, a hub name.",
    ),
    click.option(
        "--train-bytes",
        type=int,
        default=100_000_000,
        show_default=True,
        help="Bytes of training text, from the start, that the tokenizer is trained on.",
    ),
    click.option(
        "--word-split",
        "split",
        type=click.Choice(["gpt2", "llama3", "qwen2"]),
        default="gpt2",
        show_default=True,
        help="How bpe cuts text into words.",
    ),
    click.option(
        "--digits",
        type=click.Choice(["together", "single"]),
        default="together",
        show_default=True,
        help="single: each digit a token.",
    ),
    click.option(
        "--extra-token",
        "extra_tokens",
        multiple=True,
        help="A further special token <|name|>, or chat or infill for theirs; may be repeated.",
    ),
    click.option(
        "--encoder",
        default="auto",
        show_default=True,
        help="The program that encodes; the fastest that is installed and proves exact, unless said.",
    ),
)
