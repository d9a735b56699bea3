"""The commands as a person calls them, and what happens when they are killed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers

from data_prep.settings import TokenizerSettings
from data_prep.shards.tokens import open_dataset
from data_prep.tokenizers.training import train_tokenizer

Prep = Callable[..., Result]
Tree = Callable[[Path], dict[str, bytes]]
SMALL = ("--vocab-size", "300", "--max-document-bytes", "2000", "--workers", "1")


@pytest.fixture(scope="session")
def novel(make_text: Callable[[int, int], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    path.write_text(make_text(1, 80), encoding="utf-8")
    return path


def test_help_names_every_command_and_every_option_with_its_default(prep: Prep) -> None:
    assert all(command in prep("--help").stdout for command in ("build", "convert", "inspect", "tokenizer", "verify"))
    shown = " ".join(prep("build", "--help-all").stdout.split())
    for default in ("8192", "bpe", "0.05", "65536", "text", "100000000", "67108864", "skip"):
        assert f"[default: {default}]" in shown
    assert "[required]" in shown
    assert "Worker processes; 0: one per available core. [default: 0]" in shown


def test_help_does_not_wait_for_heavy_imports() -> None:
    program = (
        "import sys, data_prep.cli.main; print(sorted({'numpy', 'tokenizers', 'rich', 'torch'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


def test_a_build_tells_what_it_made_and_what_to_do_next(prep: Prep, novel: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = prep("build", novel, "--out", out, *SMALL)
    assert result.exit_code == 0, result.stderr
    split = open_dataset(out).split("train")
    assert f"{split.tokens:,}" in result.stdout
    assert "vocabulary: 300 tokens (bpe)" in result.stdout
    assert f"next: kindling train tiny --data {out} --run runs/out" in result.stdout
    again = prep("build", novel, "--out", out, *SMALL)
    assert again.exit_code == 0
    assert "already built" in again.stderr


def test_a_build_says_what_its_tokenizer_loses(prep: Prep, tmp_path: Path) -> None:
    backend = Backend.from_str(train_tokenizer(iter([]), TokenizerSettings("bytes")).to_json())
    backend.normalizer = normalizers.Lowercase()
    backend.save(str(tmp_path / "lower.json"))
    (tmp_path / "a.txt").write_text("The Old Miller.\n" * 10, encoding="utf-8")
    given = ("--tokenizer", tmp_path / "lower.json", "--validation-fraction", "0")
    result = prep("build", tmp_path / "a.txt", "--out", tmp_path / "out", *given)
    assert "lost: the tokenizer loses 18.75% of the train text, 30 bytes; bits per byte do not count" in result.stdout
    assert "lost bytes: 30" in prep("tokenizer", tmp_path / "lower.json", tmp_path / "a.txt").stdout
    assert "30 bytes of text are lost" in prep("inspect", tmp_path / "out").stdout
    again = prep("build", tmp_path / "a.txt", "--out", tmp_path / "json", "--json", *given)
    assert json.loads(again.stdout)["splits"]["train"]["lost_bytes"] == 30
    lossless = prep("build", tmp_path / "a.txt", "--out", tmp_path / "b", "--tokenizer-kind", "bytes", *given[2:])
    assert "lose" not in lossless.stdout


def test_json_is_all_that_is_on_stdout(prep: Prep, novel: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = prep("build", novel, "--out", out, "--json", "--validation-fraction", "0", *SMALL)
    summary = json.loads(result.stdout)
    split = open_dataset(out).split("train")
    assert summary["splits"]["train"]["tokens"] == split.tokens
    assert summary["splits"]["train"]["bytes_per_token"] == split.text_bytes / split.tokens
    assert summary["splits"]["validation"]["bytes_per_token"] is None


def test_what_is_left_out_is_told_and_changes_the_exit_status(prep: Prep, novel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_bytes(novel.read_bytes())
    (folder / "b.jsonl").write_text('{"text": "good"}\n{"text": ')
    result = prep("build", folder, "--out", tmp_path / "out", "--validation-fraction", "0", *SMALL)
    assert result.exit_code == 3
    assert "left out: broken record 1\n" in result.stdout
    assert 'left out: "texts/b.jsonl", byte 17: not JSON' in result.stderr
    assert "–" in result.stdout


def test_a_dry_run_writes_nothing(prep: Prep, novel: Path, tmp_path: Path) -> None:
    result = prep("build", novel, "--out", tmp_path / "out", "--dry-run", *SMALL)
    assert result.exit_code == 0, result.stderr
    assert "nothing was written" in result.stdout
    assert list(tmp_path.iterdir()) == []
    found = json.loads(prep("build", novel, "--out", tmp_path / "out", "--dry-run", "--json", *SMALL).stdout)
    assert found["text_bytes"] == pytest.approx(novel.stat().st_size, rel=0.1)


def test_text_can_be_piped_in(prep: Prep, novel: Path, tmp_path: Path, tree: Tree) -> None:
    result = prep("build", "-", "--out", tmp_path / "out", *SMALL, stdin=novel.read_bytes())
    assert result.exit_code == 0, result.stderr
    assert not any("stdin" in name for name in tree(tmp_path / "out"))
    prep("build", novel, "--out", tmp_path / "same", *SMALL)
    piped, named = open_dataset(tmp_path / "out").manifest, open_dataset(tmp_path / "same").manifest
    for name, split in piped["splits"].items():
        for one, other in zip(split["shards"], named["splits"][name]["shards"], strict=True):
            assert one["bin_sha256"] == other["bin_sha256"]
    bad = prep("build", "-", "--out", tmp_path / "bad", *SMALL, stdin=b"\xff")
    assert (bad.exit_code, (tmp_path / "bad").exists()) == (2, False)


def test_a_tokenizer_can_be_judged_by_any_text(prep: Prep, novel: Path, tmp_path: Path) -> None:
    prep("build", novel, "--out", tmp_path / "out", *SMALL)
    result = prep("tokenizer", tmp_path / "out", novel, "--most-bytes", 1)
    assert result.exit_code == 0, result.stderr
    assert "bytes per token: " in result.stdout
    found = json.loads(prep("tokenizer", tmp_path / "out", novel, "--json").stdout)
    split = open_dataset(tmp_path / "out").split("train")
    assert found["bytes_per_token"] == pytest.approx(split.text_bytes / (split.tokens - split.documents), rel=0.05)
    assert "cannot be used here" in prep("tokenizer", tmp_path / "out", "-").stderr


MISTAKES = {
    "no source": (["--out", "OUT"], "missing argument 'SOURCE...'"),
    "no out": (["TEXT"], "missing option '--out'"),
    "misspelt option": (["TEXT", "--ot", "OUT"], "--out"),
    "unknown kind": (["TEXT", "--out", "OUT", "--tokenizer-kind", "words"], "'words' is not one of"),
    "missing file": (["nothing.txt", "--out", "OUT"], 'there is no file or folder "nothing.txt"'),
    "binary file": ([sys.executable, "--out", "OUT"], "looks like a program (ELF)"),
    "too few documents": (["TEXT", "--out", "OUT"], "--max-document-bytes"),
    "large vocabulary": (["TEXT", "--out", "OUT", "--max-document-bytes", "999"], "--vocab-size 8192 is too large for"),
    "small vocabulary": (["TEXT", "--out", "OUT", "--max-document-bytes", "999", "--vocab-size", "9"], "at least 259"),
    "no such tokenizer": (["TEXT", "--out", "OUT", "--tokenizer", "no.json"], "there is no tokenizer file"),
    "text as a tokenizer": (["TEXT", "--out", "OUT", "--tokenizer", "TEXT"], "is not a readable tokenizer.json"),
    "impossible fraction": (["TEXT", "--out", "OUT", "--validation-fraction", "1"], "below 1"),
    "number above 64 bits": (["TEXT", "--out", "OUT", "--vocab-size", "9" * 20], r"must be below 2^63"),
    "number above the largest vocabulary": (
        ["TEXT", "--out", "OUT", "--vocab-size", "9" * 10],
        "must be at most 16,777,216",
    ),
    "number above 32 bits": (["TEXT", "--out", "OUT", "--train-bytes", "9" * 11], "must be from 1 to 2,147,483,647"),
    "number above all": (
        ["TEXT", "--out", "OUT", "--near-threshold", "1e999"],
        "must be above 0 and at most 1, not inf",
    ),
    "no whole number": (["TEXT", "--out", "OUT", "--part-bytes", "1e99"], "'1e99' is not a valid integer"),
    "word as a separator": (
        ["TEXT", "--out", "OUT", "--document-per", "paragraphs"],
        "choose size, file, paragraph, line",
    ),
    "out is stdout": (["TEXT", "--out", "-"], "--out names a folder"),
    "out is a file": (["TEXT", "--out", "TEXT"], "is a file"),
    "out under a file": (["TEXT", "--out", "TEXT/out"], "not a directory"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_gets_a_sentence_and_leaves_nothing(
    prep: Prep, novel: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"TEXT": str(novel), "TEXT/out": str(novel / "out"), "OUT": str(tmp_path / "out")}
    result = prep("build", *(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == (1 if message == "not a directory" else 2)
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_is_no_dataset_gets_a_sentence(prep: Prep, tmp_path: Path, command: str) -> None:
    result = prep(command, tmp_path)
    assert result.exit_code == 2
    assert "is not a Kindling dataset" in result.stderr


def test_verify_says_that_all_is_well_or_names_the_file(prep: Prep, novel: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prep("build", novel, "--out", out, *SMALL)
    result = prep("verify", out)
    assert (result.exit_code, "is intact" in result.stdout) == (0, True)
    assert json.loads(prep("verify", out, "--json").stdout)["whole"] is True
    content = bytearray((out / "train-00000.bin").read_bytes())
    content[100] ^= 4
    (out / "train-00000.bin").write_bytes(content)
    result = prep("verify", out)
    assert result.exit_code == 2
    assert 'train-00000.bin" is damaged' in result.stderr


def prep_command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "data_prep", *(str(argument) for argument in arguments)]


def test_an_unwritable_place_gets_a_sentence(novel: Path) -> None:
    result = subprocess.run(prep_command("build", novel, "--out", "/proc/out"), capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith('error: "/proc/out":')
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def slow_build(
    make_text: Callable[[int, int], str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[object], dict[str, bytes]]:
    """Arguments of a build with dozens of shards, and the bytes it gives when nobody disturbs it."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "texts").mkdir()
    for n in range(6):
        (folder / "texts" / f"{n}.txt").write_text(make_text(n, 1000), encoding="utf-8")
    arguments: list[object] = ["build", folder / "texts", "--vocab-size", 500, "--shard-tokens", 12_000]
    arguments += ["--max-document-bytes", 4000, "--part-bytes", 120_000]
    subprocess.run(prep_command(*arguments, "--out", folder / "out", "--workers", 1), check=True, capture_output=True)
    content = {path.name: path.read_bytes() for path in sorted((folder / "out").iterdir())}
    assert len(content) > 30
    return arguments, content


def stop_when(path: Path, number: signal.Signals, command: list[str], delay: float = 0.0) -> tuple[int, str]:
    """Send a signal to a build, ``delay`` seconds after ``path`` exists; its status and what it said.

    On a busy machine the build may be complete before the signal reaches it; then it is tried again from nothing.
    """
    for _ in range(10):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        while not path.exists() and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(delay)
        if process.poll() is None:
            if number == signal.SIGKILL:
                process.kill()  # the workers must notice by themselves
            else:
                os.killpg(process.pid, number)  # what a terminal does
        _, said = process.communicate(timeout=120)
        wait_for_the_end_of_group(process.pid)
        if not (path.parent / "manifest.json").exists():
            return process.returncode, said
        shutil.rmtree(path.parent)
    raise AssertionError("it was always complete before it could be stopped")


def wait_for_the_end_of_group(group: int) -> None:
    for _ in range(10_000):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise AssertionError("worker processes outlive the command")


@pytest.mark.parametrize(
    ("moment", "workers"),
    [("build.json", 1), ("tokenizer.json", 2), ("train-00000.idx", 1), ("train-00003.bin", 2)],
)
def test_killed_outright_it_goes_on_to_the_same_bytes(
    slow_build: tuple[list[object], dict[str, bytes]], prep: Prep, tmp_path: Path, tree: Tree, moment: str, workers: int
) -> None:
    arguments, expected = slow_build
    out = tmp_path / "out"
    command = [*arguments, "--out", out, "--workers", workers]
    status, _ = stop_when(out / moment, signal.SIGKILL, prep_command(*command))
    assert status == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    assert "is not finished" in prep("verify", out).stderr
    result = prep(*arguments, "--out", out, "--workers", 1)
    assert result.exit_code == 0, result.stderr
    assert "resuming the build" in result.stderr
    assert tree(out) == expected


# The delays meet the worker processes while they start.
@pytest.mark.parametrize(
    ("moment", "workers", "delay"),
    [("build.json", 1, 0), ("tokenizer.json", 2, 0.02), ("tokenizer.json", 2, 0.08), ("train-00001.idx", 2, 0)],
)
def test_ctrl_c_is_one_line_and_keeps_what_is_finished(
    slow_build: tuple[list[object], dict[str, bytes]],
    prep: Prep,
    tmp_path: Path,
    tree: Tree,
    moment: str,
    workers: int,
    delay: float,
) -> None:
    arguments, expected = slow_build
    out = tmp_path / "out"
    command = prep_command(*arguments, "--out", out, "--workers", workers)
    status, said = stop_when(out / moment, signal.SIGINT, command, delay)
    assert status == 130
    assert said.splitlines()[-1] == "stopped; run the same command again to resume"
    assert "Traceback" not in said
    assert not list(out.glob("*.tmp"))
    assert prep(*arguments, "--out", out, "--workers", 1).exit_code == 0
    assert tree(out) == expected


def test_a_full_disk_is_one_line_and_keeps_what_is_finished(
    slow_build: tuple[list[object], dict[str, bytes]], prep: Prep, tmp_path: Path, tree: Tree
) -> None:
    arguments, expected = slow_build
    out = tmp_path / "out"
    limit = len(expected["tokenizer.json"]) + 100  # the shards are larger
    result = subprocess.run(
        prep_command(*arguments, "--out", out, "--workers", 1),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "error: file too large"
    assert "Traceback" not in result.stderr
    assert (out / "tokenizer.json").exists()
    assert prep(*arguments, "--out", out, "--workers", 1).exit_code == 0
    assert tree(out) == expected


COMMANDS = {
    "build": ("build", "TEXT", "--out", "NEW"),
    "dry run": ("build", "TEXT", "--out", "NEW", "--dry-run"),
    "inspect": ("inspect", "DATA"),
    "inspect page": ("inspect", "DATA", "--page", "-"),
    "tokenizer": ("tokenizer", "DATA", "TEXT"),
    "verify": ("verify", "DATA"),
    "convert": ("convert", "DATA", "--to", "nanogpt", "--out", "NEW"),
    "help": ("build", "--help"),
}


@pytest.fixture(scope="module")
def built(novel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "out"
    subprocess.run(prep_command("build", novel, "--out", out, *SMALL), check=True, capture_output=True)
    return out


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_reader_that_goes_away_is_no_error(
    built: Path, novel: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    places = {"TEXT": novel, "DATA": built, "NEW": tmp_path / "new"}
    arguments = [places.get(argument, argument) for argument in command]
    more = SMALL if command[0] == "build" and "--help" not in command else ()
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        result = subprocess.run(prep_command(*arguments, *more), stdout=closed, stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in result.stderr and "BrokenPipe" not in result.stderr
    assert "error" not in result.stderr
    assert result.returncode == 1  # as of other programs


def test_a_page_can_go_to_standard_output(prep: Prep, built: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    result = prep("inspect", built, "--page", "-")
    assert result.exit_code == 0 and result.stdout.startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_text_is_not_proposed_as_the_place_of_its_dataset(
    prep: Prep, novel: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, arguments in (
        ("my texts", "'my texts' --out 'data/my texts'"),
        ("data/mine", "data/mine --out data/mine-tokens"),
    ):
        Path(name).mkdir(parents=True)
        (Path(name) / "a.txt").write_text("text")
        assert prep("verify", name).stderr.endswith(f"make one with: kindling prep build {arguments}\n")
    Path("empty").mkdir()
    assert prep("verify", "empty").stderr.endswith("build YOUR_TEXT --out empty\n")


def test_what_a_folder_has_besides_text_is_told_in_one_line(prep: Prep, novel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.TXT").write_bytes(novel.read_bytes())
    for name in ("b.png", "c.png", "notes"):
        (folder / name).write_text("x")
    told = (
        "left out: 3 files whose names end in nothing that is read: 2 .png (b.png, c.png), 1 without an ending (notes)"
    )
    dry = prep("build", folder, "--out", tmp_path / "out", "--dry-run", *SMALL)
    assert told in dry.stdout.splitlines() and "1 file, 0.0 MB, in 1 part" in dry.stdout
    result = prep("build", folder, "--out", tmp_path / "out", *SMALL)
    assert (result.exit_code, result.stderr.splitlines().count(told)) == (0, 1)
    (encoder,) = [line for line in result.stderr.splitlines() if line.startswith("encoder: ")]
    name = encoder.removeprefix("encoder: ").partition(", exact")[0]
    assert encoder.count(name) == 1


def test_records_on_standard_input_are_not_taken_for_prose(prep: Prep, tmp_path: Path) -> None:
    result = prep("build", "-", "--out", tmp_path / "out", *SMALL, stdin='{"text": "a"}\n{"text": "b"}\n')
    assert result.exit_code == 2
    advice = 'save it in a file with a name that ends in ".jsonl"'
    assert result.stderr == f"error: standard input looks like JSON lines: {advice}\n"
