"""The documentation site has every page, every command and every link, before Sphinx reads it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from lm.cli.main import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site() -> ModuleType:
    """docs/site/build.py, which is no package."""
    spec = importlib.util.spec_from_file_location("site_build", ROOT / "docs" / "site" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def source(site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "source"
    site.write_sources(folder)
    return folder


def test_every_page_is_in_the_table_of_contents_once(site, source):
    contents = (source / "README.md").read_text(encoding="utf-8").splitlines()
    for page in site.pages():
        assert contents.count(str(page.with_suffix(""))) == (page.name != "README.md"), page
        assert (source / page).is_file()


def test_every_command_has_a_page_with_all_its_options(source):
    index = (source / "docs" / "commands" / "index.md").read_text(encoding="utf-8")
    for name in [*main.commands, "prep build"]:
        if name != "prep":
            page = f"{name.replace(' ', '-')}.md"
            assert f"[kindling {name}]({page})" in index
            assert f"Usage: kindling {name} " in (source / "docs" / "commands" / page).read_text(encoding="utf-8")
    assert "--muon-learning-rate" in (source / "docs" / "commands" / "train.md").read_text(encoding="utf-8")


def test_what_a_page_links_to_is_there(site, source):
    for page in site.pages():
        for link in site.LINK.findall((source / page).read_text(encoding="utf-8")):
            if "://" not in link and "{" not in link:
                assert (source / page.parent / link).exists(), f"{page} links to {link}"


def test_every_name_of_the_api_page_exists(site):
    import data_prep
    import lm
    from lm import api

    known = {"lm": lm, "data_prep": data_prep, "lm.api": api}
    for _, names in site.API.values():
        for name in names:
            module, _, attribute = name.rpartition(".")
            assert getattr(known[module], attribute).__doc__, name


def test_sphinx_builds_the_site_without_a_warning(site, tmp_path):
    pytest.importorskip("furo")
    pytest.importorskip("myst_parser")
    assert site.build(tmp_path / "site") == 0
    assert (tmp_path / "site" / "html" / "index.html").is_file()
