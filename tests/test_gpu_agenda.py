"""The agenda of ``benchmarks.gpu``, on parts that need no GPU: some succeed, fail, hang, or are resumed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.gpu import agenda, candidate_speeds, decoding, learning, sanitizer
from benchmarks.gpu.agenda import Part
from data_prep.errors import UserError
from lm.inference.decoding import decoder
from lm.inference.kv_cache import KVCache
from lm.kernels import few_rows_product
from tests.conftest import sentences

MACHINE = {"device": "a card", "triton": "3.6.0"}


def part(name: str, code: str, seconds: int = 60) -> Part:
    return Part(name, seconds, f"decides {name}", ("-c", code, "{out}"))


def writing(what: str, then: str = "") -> str:
    return f"import sys, pathlib, time\npathlib.Path(sys.argv[1]).write_text({what!r})\n{then}"


def statuses(out: Path) -> dict[str, str]:
    return {name: outcome["status"] for name, outcome in json.loads(out.read_text())["parts"].items()}


def test_a_part_that_fails_or_hangs_does_not_keep_the_next_from_running(tmp_path):
    children = tmp_path / "child"
    hang = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(children)!r}, 'w').write(str(child.pid))\n"
    )
    parts = [
        part("fails", "print('no kernel image'); raise SystemExit(3)"),
        part("hangs", writing('{"half": 1}', hang + "time.sleep(600)"), seconds=5),
        part("works", writing('{"tflops": 400}')),
    ]
    out = tmp_path / "out.json"
    found = agenda.run(parts, out, MACHINE, 600)
    assert json.loads(out.read_text()) == found
    assert found["machine"] == MACHINE
    fails, hangs, works = (found["parts"][name] for name in ("fails", "hangs", "works"))
    assert (fails["status"], fails["exit_status"], fails["result"]) == ("failed", 3, None)
    assert "no kernel image" in fails["output"]
    assert (hangs["status"], hangs["result"]) == ("timed out", {"half": 1})
    assert (works["status"], works["result"]) == ("done", {"tflops": 400})
    with pytest.raises(ProcessLookupError):  # its child is gone, too
        for _ in range(200):
            os.kill(int(children.read_text()), 0)
            if Path(f"/proc/{children.read_text()}/stat").read_text().split()[2] == "Z":
                raise ProcessLookupError
            time.sleep(0.05)


def test_the_same_command_resumes_and_tries_what_failed_last(tmp_path):
    ran = tmp_path / "ran"
    note = f"import sys; open({str(ran)!r}, 'a').write({{!r}}); sys.exit({{}})"
    first, second, third = (part(name, note.format(name, code)) for name, code in (("a", 0), ("b", 1), ("c", 0)))
    out = tmp_path / "out.json"
    agenda.run([first, second], out, MACHINE, 600)
    assert statuses(out) == {"a": "done", "b": "failed"}
    agenda.run([first, second, third], out, MACHINE, 600)
    assert ran.read_text() == "abcb"
    assert statuses(out) == {"a": "done", "b": "failed", "c": "done"}
    found = json.loads(out.read_text())
    assert agenda.summary([first, second, part("d", "")], found).splitlines() == [
        "done      a: decides a",
        "failed    b: decides b",
        "not run   d: decides d",
    ]


def test_results_are_written_after_each_part(tmp_path):
    out = tmp_path / "out.json"
    copy = f"import shutil; shutil.copy({str(out)!r}, {str(tmp_path / 'seen')!r})"
    agenda.run([part("first", writing("1")), part("second", copy)], out, MACHINE, 600)
    assert statuses(tmp_path / "seen") == {"first": "done"}


def test_nothing_starts_when_no_time_is_left(tmp_path):
    out = tmp_path / "out.json"
    assert agenda.run([part("a", "")], out, MACHINE, 1)["parts"] == {}
    assert not out.exists()


def test_results_of_two_machines_are_not_mixed(tmp_path):
    out = tmp_path / "out.json"
    agenda.run([part("a", "")], out, MACHINE, 600)
    with pytest.raises(UserError, match="another machine"):
        agenda.run([part("a", "")], out, MACHINE | {"triton": "3.7.1"}, 600)


def test_the_parts_have_different_names_and_fit_the_time_of_a_card():
    names = [part.name for part in agenda.PARTS]
    assert len(set(names)) == len(names)
    assert all(0 < part.seconds <= 600 for part in agenda.PARTS)


def test_a_candidate_is_right_if_its_errors_and_bits_are():
    exact = (torch.arange(4.0, dtype=torch.float64),)

    def calls(*added: float):
        """A function that adds the next number at each call."""
        numbers = iter(added)
        return lambda: ((exact[0] + next(numbers)).float(),)

    def right(*added: float) -> bool:
        return candidate_speeds.verdict(calls(*added), exact, [0.25])["right"]

    assert right(0.5, 0.5)
    assert not right(0.75, 0.75)
    assert not right(0.5, 0.25)  # other bits
    assert not right(math.nan, math.nan)

    def fail():
        raise RuntimeError("out of resource: shared memory\nmore")

    assert candidate_speeds.verdict(fail, exact, [0.25]) == {"right": False, "failed": "out of resource: shared memory"}


@torch.inference_mode()
def test_generation_is_timed_with_the_weights_of_a_gpu_and_its_products_are_compared_with_the_same_formula():
    shape = {"num_layers": 1, "num_heads": 2, "hidden_size": 16, "vocab_size": 50}
    model = decoding.new_model(torch.device("cpu"), "bfloat16", shape)
    cache = KVCache.empty(model.config, 2, decoding.PROMPT, model.head_weight)
    assert cache.stored.dtype == model.head_weight.dtype == torch.bfloat16
    assert decoding.timed(decoder(model, cache), cache, steps=3) > 0
    assert cache.lengths == [decoding.PROMPT + 4] * 2
    x, weight, norm = torch.randn(3, 16), torch.randn(8, 16).bfloat16(), torch.rand(16)
    for each, activation, residual in (
        (norm, "swiglu", None),
        (norm, "", None),
        (None, "", torch.randn(3, 8)),
    ):
        a = x if each is not None else x.bfloat16()
        plain = decoding.plain_product(a, weight, each, activation, None if residual is None else residual.clone())
        ours = few_rows_product(a, weight, norm=each, epsilon=1e-6, activation=activation, residual=residual)
        torch.testing.assert_close(plain.float(), ours.float(), rtol=0.05, atol=0.05)


def test_a_machine_without_the_sanitizer_skips_it_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitizer.main("memcheck", tmp_path / "out.json") == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found == {"skipped": "compute-sanitizer is not installed: it comes with the CUDA toolkit"}


@pytest.mark.parametrize("status", [0, 1])
def test_what_the_sanitizer_finds_fails_its_part(tmp_path, monkeypatch, status):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\nprintf "%s " "$@" > {tmp_path}/arguments\nexit {status}\n')
    tool.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitizer.main("racecheck", tmp_path / "out.json") == status
    assert json.loads((tmp_path / "out.json").read_text()) == {"check": "racecheck", "clean": not status}
    arguments = (tmp_path / "arguments").read_text()
    assert arguments.startswith(f"--tool racecheck --error-exitcode 1 {sys.executable} -m pytest")


def test_the_sanitizer_runs_tests_of_every_kernel_of_the_library():
    """Collected in the interpreter, by the same choice as on a GPU."""
    options = ["-m", "pytest", "--collect-only", "-q", "tests/triton", "-k", sanitizer.SMALL]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, *options], cwd=agenda.ROOT, env=environment, capture_output=True, text=True, check=True
    )
    files = {line.partition(":")[0] for line in done.stdout.splitlines()}
    kinds = ("attention", "cross_entropy", "rotary")
    assert {f"tests/triton/test_{kind}_triton.py" for kind in kinds} <= files


SMALL = ["--device", "cpu", "--num-layers", "1", "--hidden-size", "16", "--num-heads", "2"]


def test_runs_on_texts_and_images_are_trained_and_judged(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("\n\n".join(sentences(20, n) for n in range(40)), encoding="utf-8")
    (tmp_path / "pairs").mkdir()
    pair = {"sentence_good": "The cat sat.", "sentence_bad": "The cat sit."}
    (tmp_path / "pairs" / "verbs.jsonl").write_text(json.dumps(pair) + "\n", encoding="utf-8")
    draw = torch.Generator().manual_seed(0)
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for n in range(8):
            pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=draw)
            Image.fromarray(pixels.numpy()).save(tmp_path / "images" / name / f"{n}.png")
    given = ("--out", str(tmp_path / "out.json"), "--work", str(tmp_path / "work"), *SMALL)
    shape = ["--passes", "2", "--vocab-size", "400", "--batch-tokens", "512", "--context-length", "64"]
    learning.main(["text", str(tmp_path / "texts"), "--pairs", str(tmp_path / "pairs"), *shape, *given])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["result"]["step"] == found["steps"] > 2
    assert found["result"]["validation"].keys() == {"next_token", "masked_next_token"}
    assert "pairs" in found and found["speed"] > 0
    monkeypatch.setattr(learning, "TIMED_STEPS", 4)
    monkeypatch.setattr(learning, "speed", lambda run, measured=learning.speed: 6.0 if measured(run) > 0 else 0.0)
    of_images = ["images", str(tmp_path / "images"), "--method", "simclr", "--seconds", "8", *given]
    learning.main([*of_images, "--batch-images", "8", "--log-every", "1"])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["steps"] == found["result"]["step"] == 6
    assert found["result"]["features"].keys() == {"knn", "linear"}


def test_the_agenda_learns_from_what_it_is_given():
    texts, images = Path("novels"), Path("cifar10")
    assert agenda.learning_parts(None, None, None) == ()
    parts = agenda.learning_parts(texts, images, Path("blimp"))
    assert len({part.name for part in parts}) == 8
    assert all(("--pairs" in part.command) == ("text" in part.command) for part in parts)
