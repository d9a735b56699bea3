from __future__ import annotations

import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

from data_prep.sources import builtin_corpus
from data_prep.sources.builtin_corpus import _prose_of_file, builtin_documents, is_prose

PROSE = "This sentence is long enough to count as prose, since it has more than eighty characters in it."


@pytest.fixture
def one_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of our own in place of the machine's."""
    monkeypatch.setattr(builtin_corpus, "PACKAGES", ("mine", "missing"))
    monkeypatch.setattr(builtin_corpus, "_package_folder", lambda name: tmp_path if name == "mine" else None)
    builtin_documents.cache_clear()
    yield tmp_path
    builtin_documents.cache_clear()


def write(path: Path, source: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source), encoding="utf-8")


def test_each_file_gives_its_strings_by_path_and_repeats_are_dropped(one_package: Path) -> None:
    write(one_package / "b.py", f'"""{PROSE} One."""\n\ndef f():\n    """{PROSE} Two.\n\n      Indented.\n    """\n')
    write(one_package / "a" / "z.py", f"'''{PROSE} Two.\n\n  Indented.\n'''\nx = r'''{PROSE} Three.'''\n")
    write(one_package / "tests" / "t.py", f'"""{PROSE} Four."""')
    write(one_package / "short.py", '"""Too short."""')
    assert builtin_documents() == (
        ("mine/a/z.py", f"{PROSE} Two.\n\nIndented.\n\n{PROSE} Three."),
        ("mine/b.py", f"{PROSE} One."),
    )


def test_quotes_inside_comments_and_strings_do_not_open_a_string(tmp_path: Path) -> None:
    source = f'''
    # a comment with """ in it
    a = 'a string with """ in it'
    b = "another \\" with \\'\\'\\' in it"
    c = f"""{{a}} {PROSE} formatted"""
    d = b"""{PROSE} bytes"""
    e = """{PROSE} with a "quoted" word and an escaped \\""" inside."""
    '''
    write(tmp_path / "a.py", source)
    assert list(_prose_of_file("mine/a.py", tmp_path / "a.py")) == [
        f'{PROSE} with a "quoted" word and an escaped \\""" inside.'
    ]


def test_files_that_cannot_be_read_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes(b'"""\xe9 ' + PROSE.encode() + b'"""')
    assert list(_prose_of_file("latin.py", tmp_path / "latin.py")) == []
    assert list(_prose_of_file("gone.py", tmp_path / "gone.py")) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PROSE, True),
        (PROSE[:80], False),
        ("x" * 200, False),
        (PROSE + " 0x1f, 0x2f, 0x3f, 0x4f;" * 5, False),
        ("\n".join(["for all of these words do the thing;", "while more words remain {", "stop here }"] * 5), False),
    ],
)
def test_prose_is_told_from_tables_and_code(text: str, expected: bool) -> None:
    assert is_prose(text) is expected


def test_the_language_reference_of_this_python_is_found() -> None:
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    topics = list(_prose_of_file("python/pydoc_data/topics.py", path))
    assert sum(map(len, topics)) > 300_000
    assert any("assert_stmt" in topic or "assert" in topic for topic in topics)


def test_nothing_is_imported_and_the_corpus_is_large() -> None:
    program = (
        "import sys\n"
        "from data_prep.sources import builtin_corpus\n"
        "builtin_corpus.PACKAGES = ('python', 'networkx', 'numpy')\n"
        "documents = builtin_corpus.builtin_documents()\n"
        "assert not {'torch', 'networkx', 'numpy'} & sys.modules.keys()\n"
        "print(sum(len(text) for _, text in documents), len({name for name, _ in documents}) == len(documents))\n"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    characters, distinct_names = output.split()
    assert int(characters) > 4_000_000
    assert distinct_names == "True"
