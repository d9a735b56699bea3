"""Builds that were interrupted, are finished, or were begun by an earlier version."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from data_prep.errors import UserError
from data_prep.pipeline import build as pipeline
from data_prep.pipeline import parts, workers
from data_prep.settings import BuildSettings
from data_prep.shards.manifest import split_totals
from data_prep.shards.tokens import open_dataset
from data_prep.tokenizers.training import train_tokenizer
from tests.data_prep.pipeline.conftest import build, ends_before_file, settings_for

Tree = Callable[[Path], dict[str, bytes]]


def build_until(settings: BuildSettings, count: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    return ends_before_file(count, lambda: build(settings), monkeypatch)


def test_stopped_before_any_file_it_resumes_to_the_same_bytes(
    undisturbed: Path, corpus: Path, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # many small builds; their safety is tested with kills
    expected = tree(undisturbed)
    for count in range(1000):
        settings = settings_for(corpus, tmp_path / str(count))
        if build_until(settings, count, monkeypatch):
            break
        build(settings)
        assert tree(settings.out) == expected, f"stopped before file {count}"
    shards = (len(expected) - 2) // 2
    parts = 1 + int(open_dataset(undisturbed).split("train").records[-1].name.split("-")[1][:5])
    # A shard is two files; a part's last two shards, one of each split, are written down with its summary.
    assert count == 3 * shards - parts + 5, "every file of a shard and each state of a journal was a point to stop at"


def test_stopped_again_and_again_it_still_ends(
    undisturbed: Path, corpus: Path, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(corpus, tmp_path / "out")
    for _ in range(100):
        if build_until(settings, 6, monkeypatch):
            break
    assert tree(settings.out) == tree(undisturbed)


def test_finished_work_is_not_done_again(
    undisturbed: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(corpus, tmp_path / "out")
    assert not build_until(settings, 12, monkeypatch)
    before = {path.name: path.stat().st_mtime_ns for path in settings.out.glob("*.*")}
    shards = json.loads((settings.out / "work/part-00000.json").read_text())["shards"]
    done = shards["train"] + shards["validation"]
    assert done
    monkeypatch.setattr(pipeline, "train_tokenizer", None)
    monkeypatch.setattr(pipeline, "choose_encoder", None)
    words_counted: list[bytes] = []
    monkeypatch.setattr(parts, "count_words", lambda content: words_counted.append(content) or 0)
    build(settings)
    for name in ["tokenizer.json", *(f"{record['name']}.bin" for record in done)]:
        assert (settings.out / name).stat().st_mtime_ns == before[name], f"{name} was written again"
    total = sum(open_dataset(settings.out).split(split).documents for split in ("train", "validation"))
    assert len(words_counted) == total - sum(record["documents"] for record in done)


def test_a_finished_build_is_left_as_it_is(undisturbed: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(pipeline, "run_calls", None)  # nothing is read again
    (undisturbed / "build.json").write_text("{}")  # as if killed just before the last step
    (undisturbed / "work").mkdir()
    manifest = build(settings_for(corpus, undisturbed), notes)
    assert manifest == json.loads((undisturbed / "manifest.json").read_text())
    assert "already built" in notes[0]
    assert not (undisturbed / "build.json").exists()
    assert not (undisturbed / "work").exists()


def test_other_settings_or_sources_are_refused_by_name(undisturbed: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocab size was 400, now 500.*choose another --out"):
        build(settings_for(corpus, undisturbed, vocab_size=500))
    with pytest.raises(UserError, match=r"text field was .*; validation fraction was 0\.2, now 0\.3"):
        build(settings_for(corpus, undisturbed, validation_fraction=0.3, text_field="body"))
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(UserError, match=r"sources was .*corpus.*, now .*other\.txt"):
        build(settings_for(tmp_path / "other.txt", undisturbed))
    open_dataset(undisturbed).verify()


def test_an_interrupted_build_refuses_other_settings_and_stays(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tree: Tree, undisturbed: Path
) -> None:
    settings = settings_for(corpus, tmp_path / "out")
    build_until(settings, 6, monkeypatch)
    before = tree(settings.out)
    with pytest.raises(UserError, match="max document bytes was 3000, now 2000"):
        build(settings_for(corpus, settings.out, max_document_bytes=2000))
    assert tree(settings.out) == before
    build(settings)
    assert tree(settings.out) == tree(undisturbed)


def test_a_damaged_journal_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "build.json").write_text('{"identity": {}}')
    with pytest.raises(UserError, match=r'build\.json" is damaged: remove'):
        build(settings_for(corpus, tmp_path))


def test_sources_that_change_meanwhile_are_noticed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"one two {n}\n\n" for n in range(100)))

    def train_and_change(*arguments: Any) -> Any:
        tokenizer = train_tokenizer(*arguments)
        path.write_text("".join(f"one TWO {n}\n\n" for n in range(100)))
        os.utime(path, ns=(1, 1))
        return tokenizer

    settings = settings_for(path, tmp_path / "new" / "out", vocab_size=259, max_document_bytes=70)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "train_tokenizer", train_and_change)
        with pytest.raises(UserError, match="the sources changed since the build in"):
            build(settings)
    os.utime(path, ns=(2, 2))
    with pytest.raises(UserError, match="the sources changed since the build in"):
        build(settings)


def test_an_earlier_build_keeps_its_word_split(
    corpus: Path, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default was once gpt2: what was begun with it resumes with it, and what is finished stays finished."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    build(settings_for(corpus, whole, word_split="gpt2"))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "choose_encoder", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(settings_for(corpus, stopped, word_split="gpt2"))
    for out in (stopped, whole):
        assert build(settings_for(corpus, out))["settings"]["word_split"] == "gpt2"
    assert tree(stopped) == tree(whole)
    for named in ("qwen35", "llama3"):
        with pytest.raises(UserError, match=f'word split was "gpt2", now "{named}"'):
            build(settings_for(corpus, whole, word_split=named))
    assert build(settings_for(corpus, tmp_path / "new"))["settings"]["word_split"] == "qwen35"


def test_shards_of_an_earlier_version_leave_the_loss_unknown(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    path = out / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    assert {split["lost_bytes"] for split in manifest["splits"].values()} == {0}
    for split in manifest["splits"].values():
        for record in (split, *split["shards"]):
            del record["lost_bytes"], record["unknown_tokens"]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    train = open_dataset(out).split("train")
    assert (train.lost_bytes, train.counted_bytes) == (0, train.text_bytes)
    assert split_totals(train.records)["lost_bytes"] is None


def test_a_build_from_before_resumes_by_its_own_rules(
    make_text: Callable[[int, int], str], tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    records = "".join(json.dumps({"text": f"a\0{make_text(n, 1)}"}) + "\n" for n in range(20))
    for name, content in {
        "a.txt": make_text(1, 30).replace(" a", " paragraph"),
        "b.TXT": make_text(2, 30),
        "c.json": records,
        "d.txt": records,
        "e.jsonl": records,
    }.items():
        (texts / name).write_text(content, encoding="utf-8")

    def settings(out: str, rules: int) -> BuildSettings:
        made = settings_for(texts, tmp_path / out, document_per="paragraph")
        return replace(made, reading=replace(made.reading, reading_rules=rules))

    notes: list[str] = []
    manifest = build(settings("old", 1), notes)
    assert "left out: 2 files whose names end in nothing that is read: 1 .json (c.json), 1 .txt (b.TXT)" in notes
    assert "reading_rules" not in manifest["settings"]
    assert (manifest["sources"][0]["files"], manifest["left_out"]) == (3, {"empty document": 1})
    expected = tree(tmp_path / "old")
    for count in range(2, 12, 3):
        assert not build_until(settings(str(count), 1), count, monkeypatch)
        build(settings(str(count), 2))
        assert tree(tmp_path / str(count)) == expected
    assert build(settings("old", 2)) == manifest
    assert tree(tmp_path / "old") == expected
    new = build(settings("new", 2))
    assert (new["settings"]["reading_rules"], new["sources"][0]["files"]) == (2, 5)
    assert new["left_out"] == {"NUL bytes": 40, "file of another kind than its name says": 1}


def test_spawned_workers_change_no_byte(
    undisturbed: Path, corpus: Path, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "START_METHOD", "spawn")
    build(settings_for(corpus, tmp_path / "out", workers=2))
    assert tree(tmp_path / "out") == tree(undisturbed)


def test_a_finished_dataset_in_a_folder_that_cannot_be_written_is_left_as_it_is(
    undisturbed: Path, corpus: Path, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    notes: list[str] = []
    build(settings_for(corpus, out), notes)
    assert "is already built with these settings" in notes[-1]
    assert tree(out) == tree(undisturbed)
