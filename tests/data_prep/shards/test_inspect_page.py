from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from data_prep.settings import TokenizerSettings
from data_prep.tokenizers.training import train_tokenizer

Prep = Callable[..., Result]


class Reader(HTMLParser):
    """Collects what a browser would make of a page: tags, their attributes, and the shown text of each token."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tokens: list[tuple[int, str]] = []
        self._token: int | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        values = dict(attrs)
        self._token = int(values["title"] or "") if re.fullmatch(r"s\d|end", values.get("class") or "") else None
        if self._token is not None:
            self.tokens.append((self._token, ""))

    def handle_endtag(self, tag: str) -> None:
        self._token = None

    def handle_data(self, data: str) -> None:
        if self._token is not None:
            self.tokens[-1] = (self._token, self.tokens[-1][1] + data)


def page_of(
    prep: Prep, tmp_path: Path, texts: list[str], *arguments: object, out: str = "out"
) -> tuple[Reader, str, dict[str, Any]]:
    """A page of a dataset of ``texts``: what a browser reads, the HTML, and the JSON that it shows."""
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    settings = ["--tokenizer-kind", "bytes", *arguments]
    assert prep("build", tmp_path / "a.jsonl", "--out", tmp_path / out, *settings).exit_code == 0
    result = prep("inspect", tmp_path / out, "--page", tmp_path / "page.html", "--json")
    assert result.exit_code == 0, result.stderr
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(html)
    return reader, html, json.loads(result.stdout)


def test_evil_text_is_shown_as_text(prep: Prep, tmp_path: Path) -> None:
    description = json.loads(train_tokenizer(iter([]), TokenizerSettings("bytes")).to_json())
    evil = "<img src=x onerror=alert(1)>"  # a token of its own, so that no tag of the page's comes between its letters
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    description["added_tokens"].append({"id": 259, "content": evil} | flags)
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    arguments = ["--tokenizer", tmp_path / "tokenizer.json", "--validation-fraction", "0"]
    reader, _, _ = page_of(prep, tmp_path, ["</script>" + evil + ' & "too" <!-- bold\n' + evil], *arguments)
    assert (259, evil) in reader.tokens
    assert not {"script", "img"} & set(reader.tags)
    assert not [name for name, _ in reader.attributes if name.startswith("on")]


def test_evil_names_of_folders_are_shown_as_text(prep: Prep, tmp_path: Path) -> None:
    reader, html, _ = page_of(
        prep, tmp_path, ["text"], "--validation-fraction", "0", out="<img src=x onerror=alert(1)>"
    )
    assert "img" not in reader.tags
    assert "&lt;img src=x" in html


@pytest.mark.parametrize("fraction", ["0", "0.3"])
def test_every_token_of_the_samples_is_a_span_with_its_id(prep: Prep, tmp_path: Path, fraction: str) -> None:
    texts = [f"document {n}\n" + "word " * n for n in range(20)]
    reader, _, found = page_of(prep, tmp_path, texts, "--validation-fraction", fraction)
    expected = [
        pair
        for split in found["splits"].values()
        for part in [*split.get("samples", []), *split.get("window", [])]
        for pair in zip(part["ids"], part["token_texts"], strict=True)
    ]
    assert reader.tokens == expected


def test_the_page_asks_nothing_of_a_network_and_is_the_same_again(prep: Prep, tmp_path: Path) -> None:
    reader, html, _ = page_of(prep, tmp_path, ["one", "two", "three"])
    assert not {"src", "href", "srcset"} & {name for name, _ in reader.attributes}
    assert "url(" not in html and "@import" not in html and "http" not in html
    prep("inspect", tmp_path / "out", "--page", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == html


def test_a_long_text_is_folded_and_loses_no_token(prep: Prep, tmp_path: Path) -> None:
    reader, html, found = page_of(prep, tmp_path, ["a" * 250, "b" * 100], "--validation-fraction", "0")
    assert html.count("<details>") == html.count("100 more tokens</summary>") == 1
    shown = [token for sample in found["splits"]["train"]["samples"] for token in sample["ids"]]
    assert [token for token, _ in reader.tokens][: len(shown)] == shown


def test_the_chart_has_its_numbers_as_text_and_says_what_it_shows(prep: Prep, tmp_path: Path) -> None:
    reader, html, _ = page_of(prep, tmp_path, ["a" * 120 + "bc"], "--validation-fraction", "0")
    (label,) = (value for name, value in reader.attributes if name == "aria-label")
    assert label.startswith("Token count by rank, with logarithmic axes: the most common token occurs 120 times")
    for mark in ("100", "10", "1"):
        assert re.search(rf'<span class="count" style="top: [\d.]+%">{mark}</span>', html)


def test_bytes_that_are_no_text_are_explained_where_they_are_shown(prep: Prep, tmp_path: Path) -> None:
    explained = "digits stand for one byte"
    assert explained in page_of(prep, tmp_path, ["ä"], "--validation-fraction", "0")[1]
    words = ["--tokenizer-kind", "characters", "--validation-fraction", "0"]
    assert explained not in page_of(prep, tmp_path, ["ä"], *words, out="other")[1]
