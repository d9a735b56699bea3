"""The page needs no network, runs only its own files, and inserts foreign content only as text."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from lm.serve.app import PAGE

FILES = sorted(PAGE.iterdir())
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
HTML = (PAGE / "index.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attributes}))


ELEMENTS = Elements(HTML).found
IDS = {attributes["id"] for _, attributes in ELEMENTS if "id" in attributes}


def test_the_page_is_served_with_all_its_files(served):
    answer = served.ask("/")
    assert (answer.status, answer.body.decode()) == (200, HTML)
    assert answer.headers["content-type"].startswith("text/html")
    kinds = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}
    for path in FILES:
        answer = served.ask(f"/static/{path.name}")
        assert (answer.status, answer.body) == (200, path.read_bytes())
        assert answer.headers["content-type"].startswith(kinds[path.suffix])


def test_every_referenced_file_exists_and_no_other():
    referred = [value for _, each in ELEMENTS for name, value in each.items() if name in ("src", "href")]
    for path in SCRIPTS:
        referred += [f"static/{name}" for name in re.findall(r'from "\./([\w.]+)"', path.read_text(encoding="utf-8"))]
    assert {name.removeprefix("static/") for name in referred} | {"index.html"} == {path.name for path in FILES}


def test_nothing_that_the_policy_forbids_is_inline():
    for tag, attributes in ELEMENTS:
        assert tag != "style"
        assert tag != "script" or "src" in attributes
        assert not any(name == "style" or name.startswith("on") for name in attributes)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_refers_to_another_server(path):
    text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert len(text.splitlines()) <= 500


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_foreign_content_is_inserted_as_text(path):
    text = path.read_text(encoding="utf-8")
    for method in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "srcdoc"):
        assert method not in text
    assert not re.search(r'setAttribute\(\s*"(on|style|src|href)', text)


def test_every_id_in_scripts_and_labels_is_on_the_page():
    for path in SCRIPTS:
        named = re.findall(r'(?:\$|say)\("([\w-]+)"', path.read_text(encoding="utf-8"))
        assert set(named) <= IDS, path.name
    for _, attributes in ELEMENTS:
        for name in ("for", "aria-controls", "aria-labelledby"):
            assert name not in attributes or attributes[name] in IDS


def test_every_field_has_a_label():
    labeled = {attributes["for"] for tag, attributes in ELEMENTS if tag == "label" and "for" in attributes}
    within = set(re.findall(r'<label>[^<]*(?:<output[^>]*></output>)?\s*<input[^>]* id="(\w+)"', HTML))
    fields = {attributes["id"] for tag, attributes in ELEMENTS if tag in ("input", "textarea")}
    assert fields == labeled | within
