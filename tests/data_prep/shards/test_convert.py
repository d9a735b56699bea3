from __future__ import annotations

import csv
import gzip
import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cli.main import EXPORTED, IMPORTED
from data_prep.errors import UserError
from data_prep.shards import convert, layouts
from data_prep.shards.convert import export_dataset, import_dataset, text_size
from data_prep.shards.tokens import SPLITS, Dataset, ShardWriter, count_words, open_dataset
from data_prep.tokenizers.tokenizer import Tokenizer
from tests.data_prep.handmade import BYTES, finish_dataset

Prep = Callable[..., Result]
END = BYTES.end_of_text_id
TEXTS = {"train": ["ab", "c", "two words\nand été", ""], "validation": ["held out", "é"]}


def wide_tokenizer() -> Tokenizer:
    """A tokenizer of bytes with a vocabulary above 16 bits."""
    description = json.loads(BYTES.to_json())
    first = BYTES.vocab_size
    description["model"]["vocab"] |= {f"a{n}": n for n in range(first, 70_000)}
    return Tokenizer.from_json(json.dumps(description))


WIDE = wide_tokenizer()


def make_dataset(
    directory: Path, texts: dict[str, list[str]], *, tokenizer: Tokenizer = BYTES, shard_tokens: int = 2**26
) -> Dataset:
    directory.mkdir(parents=True)
    records = {}
    for split in SPLITS:
        with ShardWriter(directory, split, vocab_size=tokenizer.vocab_size, shard_tokens=shard_tokens) as writer:
            for text in texts[split]:
                tokens = np.array([*tokenizer.encode(text), tokenizer.end_of_text_id])
                writer.add(tokens, text_bytes=len(text.encode()), words=count_words(text.encode()))
        records[split] = writer.records
    finish_dataset(directory, tokenizer, records)
    return open_dataset(directory)


def documents_of(dataset: Dataset, split: str) -> list[list[int]]:
    part = dataset.split(split)
    ends = np.cumsum(part.document_lengths(), dtype=np.int64)
    return [part.read(int(start), int(end)).tolist() for start, end in zip([0, *ends], ends, strict=False)]


def totals(dataset: Dataset, split: str) -> tuple[int, int, int, int]:
    part = dataset.split(split)
    return part.tokens, part.documents, part.text_bytes, part.words


def ids(*texts: str) -> list[int]:
    return [token for text in texts for token in [*BYTES.encode(text), END]]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "data", TEXTS)


def u16(*tokens: int) -> bytes:
    return struct.pack(f"<{len(tokens)}H", *tokens)


# --- what is written, byte by byte ---


def test_nanogpt_gets_one_bare_file_of_16_bits_a_split_and_no_pickle(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", TEXTS, shard_tokens=8)
    assert len(data.split("train").records) > 1
    assert export_dataset(data, "nanogpt", tmp_path / "out") == ["train.bin", "val.bin"]
    assert (tmp_path / "out" / "train.bin").read_bytes() == u16(*ids(*TEXTS["train"]))
    assert (tmp_path / "out" / "val.bin").read_bytes() == u16(*ids(*TEXTS["validation"]))


def test_llmc_gets_a_header_of_1024_bytes_before_the_tokens(dataset: Dataset, tmp_path: Path) -> None:
    written = export_dataset(dataset, "llmc", tmp_path / "books")
    assert written == ["books_train_000001.bin", "books_val_000000.bin"]
    tokens = ids(*TEXTS["train"])
    header = struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253)
    assert (tmp_path / "books" / written[0]).read_bytes() == header + u16(*tokens)


def test_llmc_gets_32_bits_and_the_other_magic_for_a_large_vocabulary(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", TEXTS, tokenizer=WIDE)
    export_dataset(data, "llmc", tmp_path / "books")
    tokens = data.split("train").read(0, data.split("train").tokens)
    expected = struct.pack("<256i", 20240801, 7, len(tokens), *[0] * 253) + tokens.astype("<u4").tobytes()
    assert (tmp_path / "books" / "books_train_000001.bin").read_bytes() == expected


def test_no_file_of_llmc_reaches_the_size_its_reader_cannot_seek(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "LLMC_LARGEST_FILE", 1024 + 2 * 10 + 1)
    names = [name for name in export_dataset(dataset, "llmc", tmp_path / "out") if "_train_" in name]
    found: list[int] = []
    for number, name in enumerate(names, 1):
        assert name == f"out_train_{number:06d}.bin"
        header = np.fromfile(tmp_path / "out" / name, dtype="<i4", count=256)
        tokens = np.fromfile(tmp_path / "out" / name, dtype="<u2", offset=1024)
        assert tokens.size == header[2] <= 10
        found += tokens.tolist()
    assert found == ids(*TEXTS["train"])


def test_datatrove_gets_ends_in_tokens_as_64_bits_and_a_text_of_three_lines(dataset: Dataset, tmp_path: Path) -> None:
    export_dataset(dataset, "datatrove", tmp_path / "out")
    folder = tmp_path / "out" / "train"
    assert sorted(path.name for path in folder.iterdir()) == [
        "train-00000.ds",
        "train-00000.ds.index",
        "train-00000.ds.metadata",
    ]
    lengths = [len(text.encode()) + 1 for text in TEXTS["train"]]
    ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]
    assert (folder / "train-00000.ds").read_bytes() == u16(*ids(*TEXTS["train"]))
    assert (folder / "train-00000.ds.index").read_bytes() == struct.pack(f"<{len(ends)}Q", *ends)
    lines = (folder / "train-00000.ds.metadata").read_text().split("\n")
    assert lines[:2] == ["tokenizer.json|2", str(sum(lengths))] and len(lines) == 3


def test_olmo_gets_bare_tokens_and_rows_of_start_end_id_source_place(dataset: Dataset, tmp_path: Path) -> None:
    export_dataset(dataset, "olmo", tmp_path / "out")
    folder = tmp_path / "out" / "train"
    assert (folder / "part-0-00000.npy").read_bytes() == u16(*ids(*TEXTS["train"]))
    with gzip.open(folder / "part-0-00000.csv.gz", "rt", newline="") as file:
        rows = list(csv.reader(file))
    at = 0
    for number, (row, text) in enumerate(zip(rows, TEXTS["train"], strict=True)):
        end = at + len(text.encode()) + 1
        assert row == [str(at), str(end), f"train-00000-{number}", "train-00000", str(number)]
        at = end


def test_a_vocabulary_above_16_bits_is_not_for_nanogpt(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", TEXTS, tokenizer=WIDE)
    with pytest.raises(UserError, match=r"16-bit.*70,00\d tokens"):
        export_dataset(data, "nanogpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nanogpt_is_told_of_a_vocabulary_above_its_default(tmp_path: Path) -> None:
    description = json.loads(BYTES.to_json())
    description["model"]["vocab"] |= {f"a{n}": n for n in range(BYTES.vocab_size, 60_000)}
    tokenizer = Tokenizer.from_json(json.dumps(description))
    data = make_dataset(tmp_path / "data", TEXTS, tokenizer=tokenizer)
    assert "meta.pkl" in export_dataset(data, "nanogpt", tmp_path / "out")
    assert pickle.loads((tmp_path / "out" / "meta.pkl").read_bytes()) == {"vocab_size": tokenizer.vocab_size}


@pytest.mark.parametrize("layout", ["nanogpt", "datatrove", "olmo"])
def test_tokens_are_linked_unless_a_copy_is_asked_for(dataset: Dataset, tmp_path: Path, layout: str) -> None:
    original = (dataset.directory / "train-00000.bin").stat()
    for copy in (False, True):
        out = tmp_path / f"out-{copy}"
        export_dataset(dataset, layout, out, copy=copy)
        inodes = {path.stat().st_ino for path in out.rglob("*")}
        assert (original.st_ino in inodes) == (not copy)


def test_tokens_are_copied_where_the_disk_has_no_links(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(18, os.strerror(18))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    export_dataset(dataset, "olmo", tmp_path / "out")
    content = (tmp_path / "out" / "train" / "part-0-00000.npy").read_bytes()
    assert content == (dataset.directory / "train-00000.bin").read_bytes()


def test_the_same_dataset_gives_the_same_bytes(dataset: Dataset, tmp_path: Path) -> None:
    for layout in EXPORTED:
        contents = []
        for number in (1, 2):
            out = tmp_path / str(number) / layout
            export_dataset(dataset, layout, out)
            contents.append({path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()})
        assert contents[0] == contents[1]


# --- and back ---

few_texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=5)


@given(train=few_texts.filter(bool), validation=few_texts, shard_tokens=st.integers(1, 40))
@settings(max_examples=8, deadline=None)
@pytest.mark.parametrize("layout", IMPORTED)
def test_there_and_back_gives_the_same_tokens_documents_and_counts(
    tmp_path_factory: pytest.TempPathFactory,
    layout: str,
    train: list[str],
    validation: list[str],
    shard_tokens: int,
) -> None:
    place = tmp_path_factory.mktemp("there")
    texts = {"train": train, "validation": validation}
    check_round_trip(place, layout, texts, BYTES, shard_tokens)
    shutil.rmtree(place)


@pytest.mark.parametrize("layout", [layout for layout in IMPORTED if layout != "nanogpt"])
def test_32_bits_come_there_and_back(tmp_path: Path, layout: str) -> None:
    check_round_trip(tmp_path, layout, TEXTS, WIDE, shard_tokens=8)


def check_round_trip(
    place: Path, layout: str, texts: dict[str, list[str]], tokenizer: Tokenizer, shard_tokens: int
) -> None:
    data = make_dataset(place / "data", texts, tokenizer=tokenizer, shard_tokens=shard_tokens)
    there = data.directory
    if layout != "megatron":  # whose files a dataset's own are
        there = place / layout
        export_dataset(data, layout, there)
    import_dataset([there], layout, tokenizer, place / "back", shard_tokens=shard_tokens)
    back = open_dataset(place / "back")
    back.verify()
    for split in SPLITS:
        assert documents_of(back, split) == documents_of(data, split)
        assert totals(back, split) == totals(data, split)
        hashes = [record.bin_sha256 for record in back.split(split).records]
        assert hashes == [record.bin_sha256 for record in data.split(split).records]


# --- files of others, written from the formats' definitions ---


def bring(tmp_path: Path, layout: str, *sources: Path, tokenizer: Tokenizer = BYTES) -> Dataset:
    import_dataset(list(sources), layout, tokenizer, tmp_path / "back")
    data = open_dataset(tmp_path / "back")
    data.verify()
    return data


def test_a_last_document_without_an_end_gets_one_and_it_is_counted(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(u16(*ids("ab"), *BYTES.encode("cd")))
    data = bring(tmp_path, "nanogpt", tmp_path / "train.bin")
    assert documents_of(data, "train") == [ids("ab"), ids("cd")]
    assert data.manifest["left_out"] == {"empty_documents": 0, "ends_added": 1, "ends_moved": 0}


def test_a_document_may_begin_in_one_file_and_end_in_the_next(tmp_path: Path) -> None:
    tokens = ids("first", "second over the border", "third")
    for number, part in ((1, tokens[:10]), (2, tokens[10:])):
        header = struct.pack("<256i", 20240520, 1, len(part), *[0] * 253)
        (tmp_path / f"x_train_{number:06d}.bin").write_bytes(header + u16(*part))
    data = bring(tmp_path, "llmc", tmp_path / "x_train_000001.bin", tmp_path / "x_train_000002.bin")
    assert documents_of(data, "train") == [ids("first"), ids("second over the border"), ids("third")]
    assert sum(data.manifest["left_out"].values()) == 0


def test_documents_that_begin_with_the_end_of_text_token_as_llmc_writes_them_keep_their_borders(tmp_path: Path) -> None:
    tokens = [END, *BYTES.encode("ab"), END, *BYTES.encode("cd")]
    header = struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253)
    (tmp_path / "x_train_000001.bin").write_bytes(header + u16(*tokens))
    data = bring(tmp_path, "llmc", tmp_path / "x_train_000001.bin")
    assert data.manifest["left_out"] == {"empty_documents": 0, "ends_added": 0, "ends_moved": 1}
    assert documents_of(data, "train") == [ids("ab"), ids("cd")]


def test_borders_that_the_index_tells_need_no_end_of_text_token(tmp_path: Path) -> None:
    tokens = [*BYTES.encode("ab"), *BYTES.encode("cde"), *ids("f")]
    (tmp_path / "a.ds").write_bytes(u16(*tokens))
    (tmp_path / "a.ds.index").write_bytes(struct.pack("<4Q", 2, 2, 5, 7))
    data = bring(tmp_path, "datatrove", tmp_path / "a.ds")
    assert documents_of(data, "train") == [ids("ab"), ids("cde"), ids("f")]
    assert data.manifest["left_out"] == {"empty_documents": 1, "ends_added": 2, "ends_moved": 0}
    assert totals(data, "train") == (9, 3, 6, 3)


def test_ends_inside_documents_of_an_index_are_kept_and_counted(tmp_path: Path) -> None:
    tokens = [*ids("ab", "cd"), *ids("e")]
    (tmp_path / "a.ds").write_bytes(u16(*tokens))
    (tmp_path / "a.ds.index").write_bytes(struct.pack("<2Q", 6, 8))
    data = bring(tmp_path, "datatrove", tmp_path / "a.ds")
    assert documents_of(data, "train") == [[*ids("ab"), *ids("cd")], ids("e")]
    assert data.manifest["settings"]["ends_inside_documents"] == 1


@pytest.mark.parametrize(("code", "name"), [(8, "<u2"), (4, "<i4"), (5, "<i8"), (3, "<i2")])
def test_documents_of_several_sequences_in_any_type_of_megatron(tmp_path: Path, code: int, name: str) -> None:
    sequences = [ids("ab")[:2], ids("cd"), ids("e")]  # the first two are one document
    lengths = [len(sequence) for sequence in sequences]
    width = np.dtype(name).itemsize
    (tmp_path / "x.bin").write_bytes(np.concatenate(sequences).astype(name).tobytes())
    (tmp_path / "x.idx").write_bytes(
        struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, 3, 3)
        + struct.pack("<3i", *lengths)
        + struct.pack("<3q", 0, width * lengths[0], width * (lengths[0] + lengths[1]))
        + struct.pack("<3q", 0, 2, 3)
    )
    data = bring(tmp_path, "megatron", tmp_path / "x.bin")
    assert documents_of(data, "train") == [sequences[0] + sequences[1], sequences[2]]


@pytest.mark.parametrize("suffix", [".csv.gz", None])
def test_32_bits_of_olmo_are_known_by_the_rows_or_the_vocabulary(tmp_path: Path, suffix: str | None) -> None:
    tokens = [WIDE.vocab_size - 1, WIDE.end_of_text_id, 7, WIDE.end_of_text_id]
    (tmp_path / "part-0-00000.npy").write_bytes(struct.pack("<4I", *tokens))
    if suffix:
        with gzip.open(tmp_path / "part-0-00000.csv.gz", "wt") as file:
            file.write("0,2,a,b,1\n2,4,c,d,2\n")
    data = bring(tmp_path, "olmo", tmp_path, tokenizer=WIDE)
    assert documents_of(data, "train") == [tokens[:2], tokens[2:]]


def test_megatrons_own_reader_reads_a_dataset_and_we_read_what_its_own_writer_writes(tmp_path: Path) -> None:
    module = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    data = make_dataset(tmp_path / "data", TEXTS)
    theirs = module.IndexedDataset(str(tmp_path / "data" / "train-00000"), mmap=True)
    assert [theirs[n].tolist() for n in range(len(theirs))] == documents_of(data, "train")
    assert theirs.document_indices.tolist() == list(range(len(TEXTS["train"]) + 1))

    builder = module.IndexedDatasetBuilder(str(tmp_path / "own.bin"), dtype=np.uint16)
    for text in TEXTS["train"]:
        builder.add_document(torch.tensor(ids(text)), [len(ids(text))])
    builder.finalize(str(tmp_path / "own.idx"))
    back = bring(tmp_path, "megatron", tmp_path / "own.bin")
    assert documents_of(back, "train") == documents_of(data, "train")
    assert (tmp_path / "own.idx").read_bytes() == (tmp_path / "data" / "train-00000.idx").read_bytes()


@pytest.mark.parametrize("block", [1, 4, 7])
def test_borders_and_wrong_ids_are_found_in_every_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(layouts, "BLOCK_TOKENS", block)
    texts = ["ab", "", "a longer one", "c"]
    (tmp_path / "train.bin").write_bytes(u16(*ids(*texts)))
    assert documents_of(bring(tmp_path, "nanogpt", tmp_path / "train.bin"), "train") == [ids(text) for text in texts]
    (tmp_path / "wrong.bin").write_bytes(u16(*ids(*texts), 999, END))
    with pytest.raises(UserError, match=rf"token {len(ids(*texts))} of .* is 999"):
        import_dataset([tmp_path / "wrong.bin"], "nanogpt", BYTES, tmp_path / "none")


def test_text_is_measured_across_pieces_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "  été and\u2003words, \n two "
    tokens = np.array(ids(text))
    for piece in range(1, 12):
        monkeypatch.setattr(convert, "PIECE_TOKENS", piece)
        assert text_size(BYTES, tokens) == (len(text.encode()), count_words(text.encode()))


# --- what is refused ---


GOOD = u16(*ids("ab", "cd"))
HEADER = struct.pack("<256i", 20240520, 1, 6, *[0] * 253)
INDEX = struct.pack("<9sQBQQ2i2q3q", b"MMIDIDX\0\0", 1, 8, 2, 3, 3, 3, 0, 6, 0, 1, 2)
#: What is wrong: the layout, the files (the first is converted), and what the sentence says.
DAMAGE: dict[str, tuple[str, dict[str, bytes], str]] = {
    "odd": ("nanogpt", {"x.bin": GOOD + b"x"}, "not a multiple of 2"),
    "llmc as nanogpt": ("nanogpt", {"x.bin": HEADER + GOOD}, "--from llmc"),
    "short": ("llmc", {"x.bin": HEADER + GOOD[:-2]}, "6 tokens"),
    "no header": ("llmc", {"x.bin": GOOD}, "shorter than the header"),
    "magic": ("llmc", {"x.bin": b"\1" + HEADER[1:] + GOOD}, "magic"),
    "version": ("llmc", {"x.bin": HEADER[:4] + b"\7" + HEADER[5:] + GOOD}, "magic number and version"),
    "index": ("datatrove", {"x.ds": GOOD, "x.ds.index": struct.pack("<2Q", 3, 7)}, "7 tokens"),
    "half index": ("datatrove", {"x.ds": GOOD, "x.ds.index": bytes(9)}, "not a multiple of 8"),
    "back": ("datatrove", {"x.ds": GOOD, "x.ds.index": struct.pack("<2Q", 7, 6)}, "decreasing positions"),
    "metadata": ("datatrove", {"x.ds": GOOD, "x.ds.metadata": b"gpt2\n6\n6"}, "2 or 4 .bytes per token"),
    "numpy": ("olmo", {"x.npy": b"\x93NUMPY\1\0" + GOOD}, "NumPy header"),
    "gzip": ("olmo", {"x.npy": GOOD, "x.csv.gz": gzip.compress(b"0,6,a,b,c\n" * 99)[:-9]}, "damaged"),
    "rows": ("olmo", {"x.npy": GOOD, "x.csv.gz": gzip.compress(b"zero,6\n")}, "start,end"),
    "gap": ("olmo", {"x.npy": GOOD, "x.csv.gz": gzip.compress(b"0,2,a,b,1\n3,6,a,b,2\n")}, "gap"),
    "no idx": ("megatron", {"x.bin": GOOD}, "x.idx"),
    "not idx": ("megatron", {"x.bin": GOOD, "x.idx": b"?" + INDEX[1:]}, "magic"),
    "short idx": ("megatron", {"x.bin": GOOD, "x.idx": INDEX[:-1]}, "its header"),
    "floats": ("megatron", {"x.bin": GOOD, "x.idx": INDEX[:17] + b"\7" + INDEX[18:]}, "type 7"),
    "pointers": ("megatron", {"x.bin": GOOD, "x.idx": INDEX[:42] + b"\2" + INDEX[43:]}, "adjacent documents"),
    "short bin": ("megatron", {"x.bin": GOOD[:-2], "x.idx": INDEX}, "6 tokens"),
    "ids": ("nanogpt", {"x.bin": GOOD + u16(BYTES.vocab_size)}, f"token 6 .*is {BYTES.vocab_size}"),
    "nothing": ("nanogpt", {"x.bin": b""}, "no tokens to train on"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_has_its_sentence_and_nothing_is_left_behind(prep: Prep, tmp_path: Path, damage: str) -> None:
    layout, files, sentence = DAMAGE[damage]
    (tmp_path / "files").mkdir()
    for name, content in files.items():
        (tmp_path / "files" / name).write_bytes(content)
    BYTES.save(tmp_path / "tokenizer.json")
    arguments = ["--from", layout, "--tokenizer", tmp_path / "tokenizer.json", "--out", tmp_path / "back"]
    result = prep("convert", tmp_path / "files" / next(iter(files)), *arguments)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert re.search(sentence, result.stderr)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["files", "tokenizer.json"]


def test_a_full_disk_leaves_nothing_behind(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, os.strerror(28))

    before = set(tmp_path.iterdir())
    monkeypatch.setattr(convert, "save_manifest", full)
    with pytest.raises(OSError, match="No space left"):
        import_dataset([dataset.directory], "megatron", BYTES, tmp_path / "back")
    monkeypatch.setattr(layouts, "olmo_index", full)
    with pytest.raises(OSError, match="No space left"):
        export_dataset(dataset, "olmo", tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


def test_a_folder_in_use_is_refused_and_what_a_killed_conversion_left_is_not(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes").touch()
    (tmp_path / "file").touch()
    for taken in ("used", "file"):
        with pytest.raises(UserError, match="not an empty folder"):
            export_dataset(dataset, "olmo", tmp_path / taken)
    (tmp_path / "empty").mkdir()
    (tmp_path / ".empty.partial" / "train").mkdir(parents=True)
    (tmp_path / ".empty.partial" / "train" / "old.npy").touch()
    written = export_dataset(dataset, "olmo", tmp_path / "empty")
    assert "train/old.npy" not in written and len(written) == 4


def test_the_command_converts_there_and_back(prep: Prep, dataset: Dataset, tmp_path: Path) -> None:
    result = prep("convert", dataset.directory, "--to", "datatrove", "--out", tmp_path / "there", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["files"][0] == "train/train-00000.ds"
    back = ["--from", "datatrove", "--tokenizer", dataset.directory / "tokenizer.json", "--out", tmp_path / "back"]
    result = prep("convert", tmp_path / "there", *back)
    assert result.exit_code == 0, result.stderr
    assert documents_of(open_dataset(tmp_path / "back"), "validation") == documents_of(dataset, "validation")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "either --to"),
        (["--to", "olmo", "--from", "olmo"], "either --to"),
        (["--from", "olmo"], "needs the --tokenizer"),
        (["--to", "olmo", "second"], "one dataset"),
    ],
)
def test_the_command_says_what_it_needs(
    prep: Prep, dataset: Dataset, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    result = prep("convert", dataset.directory, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2 and sentence in result.stderr
