from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from data_prep.errors import UserError
from data_prep.files import LOCK, only_writer_of, write_atomically
from data_prep.pipeline import build as pipeline
from data_prep.pipeline.splitting import hash_of
from data_prep.settings import BuildSettings, TokenizerSettings
from data_prep.shards.tokens import open_dataset
from data_prep.tokenizers.training import train_tokenizer
from tests.data_prep.pipeline.conftest import build, decoded, settings_for

Tree = Callable[[Path], dict[str, bytes]]


def test_every_document_is_there_once_in_order_and_on_its_side(undisturbed: Path, corpus: Path) -> None:
    train, validation = decoded(undisturbed, "train"), decoded(undisturbed, "validation")
    threshold = int(open_dataset(undisturbed).manifest["split_rule"]["threshold"], 16)
    assert all(hash_of(text.encode()) >= threshold for text in train)
    assert all(hash_of(text.encode()) < threshold for text in validation)
    texts: list[str] = []
    for path in sorted(corpus.glob("*.*")):
        if path.suffix == ".jsonl":
            texts += [json.loads(line)["text"] for line in path.read_text().splitlines()[:-1]]
        else:
            texts.append(path.read_text())
    whole = "".join(texts)
    remaining = [iter(train), iter(validation)]
    waiting = [next(documents, "") for documents in remaining]
    while whole:  # each next piece of the corpus begins one of the two streams
        side = 0 if waiting[0] and whole.startswith(waiting[0]) else 1
        assert waiting[side] and whole.startswith(waiting[side])
        whole = whole[len(waiting[side]) :]
        waiting[side] = next(remaining[side], "")
    assert waiting == ["", ""]


def test_the_manifest_counts_what_is_there(undisturbed: Path, corpus: Path) -> None:
    dataset = open_dataset(undisturbed)
    dataset.verify()
    for name in ("train", "validation"):
        split, texts = dataset.split(name), decoded(undisturbed, name)
        assert split.documents == len(texts)
        assert split.text_bytes == sum(len(text.encode()) for text in texts)
        assert split.words == sum(len(text.encode().split()) for text in texts)
        assert split.tokens == sum(map(len, dataset.tokenizer.encode_batch(texts))) + len(texts)
    names = [record.name for record in dataset.split("train").records]
    assert {"train-00000", "train-00000_01", "train-00001"} <= set(names)
    assert names == sorted(names)
    assert dataset.manifest["left_out"] == {"broken record": 1}
    size = sum(path.stat().st_size for path in corpus.iterdir())
    assert dataset.manifest["sources"] == [{"name": "corpus0", "weight": 1.0, "files": 14, "bytes": size}]


def test_nothing_tells_the_place_or_the_time(undisturbed: Path, corpus: Path) -> None:
    for content in ((undisturbed / name).read_bytes() for name in ("manifest.json", "tokenizer.json")):
        assert str(corpus.parent).encode() not in content
        assert str(undisturbed).encode() not in content
        assert time.strftime("%Y-%m").encode() not in content


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_byte(
    undisturbed: Path, corpus: Path, tmp_path: Path, tree: Tree, workers: int
) -> None:
    build(settings_for(corpus, tmp_path / "out", workers=workers))
    assert tree(tmp_path / "out") == tree(undisturbed)


@pytest.mark.usefixtures("ray")
def test_ray_changes_no_byte(undisturbed: Path, corpus: Path, tmp_path: Path, tree: Tree) -> None:
    build(settings_for(corpus, tmp_path / "out", engine="ray", workers=2))
    assert tree(tmp_path / "out") == tree(undisturbed)


def test_a_failed_new_build_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too large for this text"):
        build(settings_for(corpus, tmp_path / "a" / "b" / "out", vocab_size=60_000))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="too large for this text"):
        build(settings_for(corpus, tmp_path / "empty", vocab_size=60_000))
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_folder_with_other_things_is_not_touched(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r'is not empty \(it contains "thesis.txt"\)'):
        build(settings_for(corpus, tmp_path))
    with pytest.raises(UserError, match="is a file"):
        build(settings_for(corpus, tmp_path / "thesis.txt"))
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_two_builds_in_one_folder_are_refused(corpus: Path, tmp_path: Path) -> None:
    with only_writer_of(tmp_path / LOCK, "mine"), pytest.raises(UserError, match="another build is writing"):
        build(settings_for(corpus, tmp_path))
    for left in (LOCK, "build.json.tmp"):  # by a kill at the first write
        write_atomically(tmp_path / left, "")
    build(settings_for(corpus, tmp_path))


def test_the_tokenizer_learns_from_training_documents_only(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def watched(texts: Any, *rest: Any) -> Any:
        return train_tokenizer((seen.append(text) or text for text in texts), *rest)

    monkeypatch.setattr(pipeline, "train_tokenizer", watched)
    build(settings_for(corpus, tmp_path / "out"))
    assert seen == decoded(tmp_path / "out", "train")
    seen.clear()
    build(settings_for(corpus, tmp_path / "less", train_bytes=10_000))
    assert 10_000 <= sum(len(text.encode()) for text in seen) < 13_000


def test_a_given_tokenizer_is_taken(corpus: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(iter(["a b c"]), TokenizerSettings("characters", 300))
    tokenizer.save(tmp_path / "given.json")
    settings = settings_for(corpus, tmp_path / "out", tokenizer=str(tmp_path / "given.json"))
    manifest = build(settings)
    assert manifest["tokenizer"]["sha256"] == tokenizer.sha256 == open_dataset(tmp_path / "out").tokenizer.sha256
    assert manifest["settings"]["tokenizer_sha256"] == tokenizer.sha256
    with pytest.raises(UserError, match="tokenizer sha256 was"):
        build(settings_for(corpus, tmp_path / "out"))


def test_bytes_need_no_vocabulary_size(corpus: Path, tmp_path: Path) -> None:
    manifest = build(settings_for(corpus, tmp_path / "out", tokenizer_kind="bytes", vocab_size=0))
    splits = manifest["splits"].values()
    assert all(split["tokens"] == split["text_bytes"] + split["documents"] for split in splits)
    assert "vocab_size" not in manifest["settings"]


def test_equal_documents_fall_on_the_same_side_and_an_odd_one_is_split_off(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ["same"] * 20 + ["other"]))
    settings = settings_for(tmp_path / "a.jsonl", tmp_path / "out", tokenizer_kind="bytes", validation_fraction=1e-9)
    build(settings)
    assert {frozenset(decoded(tmp_path / "out", split)) for split in ("train", "validation")} == {
        frozenset({"same"}),
        frozenset({"other"}),
    }


def test_a_document_above_the_shard_size_gets_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ["ab", "x" * 50, "cd"]))
    settings = settings_for(
        tmp_path / "a.jsonl", tmp_path / "out", tokenizer_kind="bytes", shard_tokens=10, validation_fraction=0.0
    )
    assert [shard["tokens"] for shard in build(settings)["splits"]["train"]["shards"]] == [3, 51, 3]
    assert open_dataset(tmp_path / "out").split("validation").tokens == 0


def test_all_wrong_settings_are_told_at_once(tmp_path: Path) -> None:
    settings = BuildSettings.from_options(
        (), tmp_path / "out", tokenizer_kind="words", validation_fraction=1.0, max_document_bytes=3, shard_tokens=0,
        workers=-1, errors="ignore", unicode_form="NFX", engine="spark",
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        build(settings)
    assert len(str(caught.value).splitlines()) == 8
    with pytest.raises(UserError, match="only once"):
        build(BuildSettings(("-", "-"), tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_the_checksum_of_the_corpus_is_that_of_its_documents(corpus: Path, tmp_path: Path) -> None:
    manifest = build(settings_for(corpus, tmp_path / "out", validation_fraction=0.0, part_bytes=1 << 20))
    part = hashlib.sha256()
    for text in decoded(tmp_path / "out", "train"):
        part.update(len(text.encode()).to_bytes(8, "little") + hash_of(text.encode()).to_bytes(8, "little"))
    assert manifest["corpus_sha256"] == hashlib.sha256(part.hexdigest().encode()).hexdigest()


def test_duplicates_are_left_out_wherever_they_are(corpus: Path, tmp_path: Path) -> None:
    manifest = build(settings_for(corpus, tmp_path / "out", duplicates="exact", part_bytes=20_000, document_per="file"))
    build(settings_for(corpus, tmp_path / "all", part_bytes=20_000, document_per="file"))
    kept, there = (
        [*decoded(out, "train"), *decoded(out, "validation")] for out in (tmp_path / "out", tmp_path / "all")
    )
    assert len(kept) == len(set(kept)) < len(there)
    assert set(kept) == set(there)
    assert manifest["cleaning"]["exact duplicates"]["removed_documents"] == len(there) - len(kept)


def test_cleaning_is_done_before_anything_else(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(["cafe\u0301 au lait"] * 50 + ["x"]))
    settings = settings_for(
        tmp_path / "a.txt", tmp_path / "out", tokenizer_kind="characters", document_per="\n\n", unicode_form="NFC",
        min_characters=5, validation_fraction=0.0,
    )  # fmt: skip
    manifest = build(settings)
    assert set(decoded(tmp_path / "out", "train")) == {"caf\u00e9 au lait"}
    assert "\u0301" not in (tmp_path / "out/tokenizer.json").read_text()
    assert manifest["splits"]["train"]["documents"] == 50
    assert manifest["cleaning"]


def test_sources_have_their_names_weights_and_shards(make_text: Callable[[int, int], str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(make_text(ord(name), 40))
    sources = (f"first={tmp_path / 'a.txt'}@2", str(tmp_path / "b.txt"))
    build(BuildSettings.from_options(sources, tmp_path / "out", tokenizer_kind="bytes", max_document_bytes=500))
    dataset = open_dataset(tmp_path / "out")
    assert [(source["name"], source["weight"]) for source in dataset.manifest["sources"]] == [
        ("first", 2),
        ("b.txt", 1),
    ]
    split = dataset.split("train")
    assert [record.source for record in split.records] == [0, 1]
    assert [span.weight for span in split.source_spans] == [2, 1]
    assert [span.name for span in split.source_spans] == ["first", "b.txt"]
    assert split.source_spans[0].stop == split.source_spans[1].start == split.records[0].tokens
    assert split.source_spans[1].stop == split.tokens
    assert split.records[0].first.startswith("a.txt:")


def unigram_file(path: Path) -> Path:
    """A tokenizer like T5's: its model knows </s> and <pad> as pieces, lacks most characters, and joins spaces."""
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((letter, -5.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"),
    ]
    backend = Backend(models.Unigram(pieces, unk_id=2))
    backend.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens([AddedToken(name, special=True) for name, _ in pieces[:3]])
    backend.save(str(path))
    return path


@pytest.mark.parametrize("workers", [1, 2])
def test_a_text_that_spells_the_end_of_a_text_does_not_end(tmp_path: Path, workers: int) -> None:
    (tmp_path / "texts").mkdir()
    for n in range(4):
        (tmp_path / "texts" / f"{n}.txt").write_text(f"say </s> and <pad></s>{'x' * n} to the miller", encoding="utf-8")
    tokenizer = str(unigram_file(tmp_path / "given.json"))
    settings = settings_for(tmp_path / "texts", tmp_path / "out", tokenizer=tokenizer, workers=workers, part_bytes=50)
    manifest = build(settings)
    assert manifest["settings"]["cuts_names"] is True
    dataset = open_dataset(tmp_path / "out")
    dataset.verify()
    train = dataset.split("train")
    tokens = train.read(0, train.tokens).tolist()
    assert tokens.count(dataset.tokenizer.end_of_text_id) == train.documents == 3
    assert dataset.tokenizer.padding_id not in tokens
    # A build that an earlier version began has no such setting, and other tokens.
    path = tmp_path / "out" / "manifest.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"cuts_names": true', '"names": true'), encoding="utf-8")
    with pytest.raises(UserError, match="cuts names was null, now true"):
        build(settings)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_the_tokenizer_loses_is_counted(tmp_path: Path, workers: int) -> None:
    (tmp_path / "texts").mkdir()
    for n in range(4):
        (tmp_path / "texts" / f"{n}.txt").write_text(f"the old miller 日{'本' * n} sold\n\nHens.", encoding="utf-8")
    settings = settings_for(
        tmp_path / "texts",
        tmp_path / "out",
        tokenizer=str(unigram_file(tmp_path / "given.json")),
        workers=workers,
        part_bytes=50,
        validation_fraction=0,
    )
    train = build(settings)["splits"]["train"]
    # Each file: the Chinese characters, two line breaks that become a space, the H and the period.
    lost = sum(3 * (1 + n) + 2 + 2 for n in range(4))
    assert train["lost_bytes"] == lost == sum(shard["lost_bytes"] for shard in train["shards"])
    assert train["unknown_tokens"] == 4 * 3
    split = open_dataset(tmp_path / "out").split("train")
    assert (split.lost_bytes, split.counted_bytes) == (lost, split.text_bytes - lost)
