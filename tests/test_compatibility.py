"""This version reads what version 0.1 wrote: the files in tests/fixtures/v0.1 still give the results they gave then.

Computed numbers may differ by 1e-4, because CPUs round differently. With KINDLING_EXACT=1 in the environment, every bit
must match, which holds on a machine like the one that wrote the files. The tests use only commands and files, so they
do not depend on how the code behind them is organized.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from lm.cli.main import main

FIXTURE = Path(__file__).parent / "fixtures" / "v0.1"
TOLERANCE = 0.0 if os.environ.get("KINDLING_EXACT") == "1" else 1e-4
SHORTER = ("--steps", 64, "--log-every", 4, "--checkpoint-every", 64, "--validate-every", 64)
FINETUNING = (
    *("--method", "lora", "--lora-rank", 2, "--epochs", 8, "--batch-examples", 8, "--learning-rate", 0.02),
    *("--micro-batch-tokens", 256, "--keep-checkpoints", 1, "--seed", 3, "--device", "cpu", "--threads", 1),
)
LABELS = ("--train", "tasks/train.jsonl", "--validation", "tasks/validation.jsonl")
ANSWERS = (
    *("--train", "tasks/talk.jsonl", "--validation", "tasks/held_out.jsonl"),
    *("--chat-template", "tasks/template.jinja"),
)
PROMPTS = ("--prompt", "The baker found", "--prompt", "A gray cat")
GREEDY = ("--temperature", 0, "--max-new-tokens", 16)


@pytest.fixture(autouse=True)
def in_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a copy of the files, and on the CPU even if there is a GPU."""
    shutil.copytree(FIXTURE, tmp_path / "v0.1")
    monkeypatch.chdir(tmp_path / "v0.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def kindling(*arguments: object, stdin: str | None = None) -> str:
    """Run ``kindling …``, which must succeed, and return what it prints on stdout."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done.stdout


def expected(name: str) -> Any:
    return json.loads(Path("expected", name).read_text(encoding="utf-8"))


def json_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def assert_holds(found: Any, recorded: Any, place: str = "") -> None:
    """Everything that was recorded must still be there; a later version may add more."""
    if isinstance(recorded, dict):
        assert recorded.keys() <= found.keys(), place
        for name in recorded:
            assert_holds(found[name], recorded[name], f"{place}/{name}")
    elif isinstance(recorded, list):
        assert len(found) == len(recorded), place
        for number, part in enumerate(recorded):
            assert_holds(found[number], part, f"{place}/{number}")
    elif isinstance(recorded, float):
        assert found == pytest.approx(recorded, rel=0, abs=TOLERANCE), place
    else:
        assert found == recorded, place


def assert_same_tensors(found: Path, recorded: Path, tolerance: float) -> None:
    ours, theirs = load_file(found), load_file(recorded)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        if tolerance:
            assert (ours[name] - tensor).abs().max() <= tolerance, name
        else:
            assert ours[name].numpy().tobytes() == tensor.numpy().tobytes(), name


def assert_same_export(found: Path, recorded: Path, tolerance: float) -> None:
    assert_same_tensors(found / "model.safetensors", recorded / "model.safetensors", tolerance)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert json.loads((found / name).read_bytes()) == json.loads((recorded / name).read_bytes()), name
    assert_holds(*(json.loads((folder / "tokenizer_config.json").read_bytes()) for folder in (found, recorded)))
    assert_holds(*(tomllib.loads((folder / "kindling.toml").read_text()) for folder in (found, recorded)))


def weights_of(run: str, step: int) -> Path:
    return Path(run, "checkpoints", f"step_{step:08}", "model.safetensors")


def checkpoints_of(run: str) -> set[int]:
    return {int(path.name.removeprefix("step_")) for path in Path(run, "checkpoints").iterdir()}


def test_the_dataset_verifies():
    assert "error" not in kindling("prep", "verify", "data", "--json")


def test_a_stopped_run_resumes_to_the_weights_of_an_uninterrupted_run():
    kindling("train", "recipe.toml", *SHORTER, "--run", "runs/stopped")
    assert_same_tensors(weights_of("runs/stopped", 64), Path("expected/resumed.safetensors"), TOLERANCE)
    assert checkpoints_of("runs/stopped") == {64}


def test_a_stopped_run_resumes_to_the_log_of_an_uninterrupted_run():
    kindling("train", "recipe.toml", *SHORTER, "--run", "runs/stopped")
    found, recorded = (
        json_lines(Path(path).read_text(encoding="utf-8"))
        for path in ("runs/stopped/metrics.jsonl", "expected/resumed_metrics.jsonl")
    )
    for line in recorded:  # speed and memory depend on the machine
        for name in ("tokens_per_second", "share_of_peak", "memory_bytes"):
            line.pop(name, None)
    assert_holds(found, recorded)


def test_a_finished_run_trains_further_and_keeps_its_checkpoint():
    more = ("--steps", 410, "--checkpoint-every", 10, "--validate-every", 410, "--keep-checkpoints", 2)
    kindling("train", "recipe.toml", *more, "--run", "runs/finished")
    assert checkpoints_of("runs/finished") == {400, 410}


def test_a_run_evaluates_to_the_same_losses():
    recorded = expected("evaluation.json")
    del recorded["protocol"]  # an explanation, which may be reworded
    assert_holds(json.loads(kindling("evaluate", "runs/finished", "--json")), recorded)


def test_a_run_writes_the_same_greedy_text():
    assert kindling("sample", "runs/finished", *PROMPTS, *GREEDY) == expected("continuation.json")


def test_a_run_gives_tokens_the_same_log_probabilities():
    told = kindling("sample", "runs/finished", *PROMPTS, *GREEDY, "--json", "--logprobs", 2)
    assert_holds(json_lines(told), expected("log_probabilities.json"))


def test_a_run_fills_masks_with_the_same_tokens():
    (recorded,) = expected("fill.json")
    told = kindling("sample", "runs/finished", "--fill", recorded["fill"], "--json")
    assert_holds(json_lines(told), [recorded])


def test_a_run_embeds_texts_to_the_same_vectors():
    texts = "".join(json.dumps({"text": text}) + "\n" for text in ("The owl saw a red hat.", "Nobody came."))
    told = kindling("embed", "runs/finished", "--input", "-", "--output", "-", stdin=texts)
    assert_holds(json_lines(told), expected("embeddings.json"))


def test_a_run_exports_the_same_transformers_files():
    kindling("export", "runs/finished", "--to", "hf", "--readout", "next_token", "--out", "again")
    assert_same_export(Path("again"), Path("exported/finished"), tolerance=0)


def test_a_run_exports_the_same_gguf_content():
    gguf = pytest.importorskip("gguf")
    kindling("export", "runs/finished", "--to", "gguf", "--out", "finished.gguf")
    reader, recorded = gguf.GGUFReader("finished.gguf"), expected("gguf.json")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert_holds(fields, recorded["fields"])
    assert {tensor.name for tensor in reader.tensors} == recorded["tensors"].keys()
    for tensor in reader.tensors:
        content = hashlib.sha256(np.ascontiguousarray(tensor.data).tobytes()).hexdigest()
        shape = [int(size) for size in tensor.shape]
        assert {"shape": shape, "sha256": content} == recorded["tensors"][tensor.name], tensor.name


def test_an_export_imports_with_the_weights_of_its_run():
    kindling("import", "exported/finished", "--run", "imported")
    (weights,) = Path("imported").glob("checkpoints/*/model.safetensors")
    assert_same_tensors(weights, weights_of("runs/finished", 400), tolerance=0)


def test_a_classifier_predicts_the_same_labels_and_probabilities():
    assert_holds(
        json_lines(kindling("predict", "runs/labels", "--input", "tasks/new.jsonl")), expected("predictions.json")
    )


def test_a_lora_run_merges_to_the_same_weights():
    kindling("merge", "runs/labels", "--out", "merged")
    assert_same_tensors(weights_of("merged", 30), Path("expected/merged_labels.safetensors"), TOLERANCE)


def test_a_lora_run_resumes_to_the_same_weights():
    shutil.rmtree("runs/labels/checkpoints/step_00000048")  # as if it had been killed after step 30
    kindling("finetune", "runs/finished", "--task", "classification", "--run", "runs/labels", *FINETUNING, *LABELS)
    recorded = FIXTURE / weights_of("runs/labels", 48)
    assert_same_tensors(weights_of("runs/labels", 48), recorded, TOLERANCE)
    assert checkpoints_of("runs/labels") == {30, 48}


def test_an_instruction_run_gives_the_same_answers():
    talk = "Who found the key?\nWho lost a boat?\n"
    assert kindling("sample", "runs/answers", "--chat", *GREEDY, stdin=talk) == expected("talk.json")


def test_an_instruction_run_merges_and_exports_the_same_files():
    kindling("merge", "runs/answers", "--out", "merged/answers")
    kindling("export", "merged/answers", "--to", "hf", "--out", "again")
    assert_same_export(Path("again"), Path("exported/answers"), TOLERANCE)


@pytest.mark.parametrize(
    ("run", "task", "files"), [("runs/labels", "classification", LABELS), ("runs/answers", "instruction", ANSWERS)]
)
def test_repeating_the_command_of_a_finished_fine_tuning_changes_nothing(run: str, task: str, files: tuple[str, ...]):
    before = {path: path.stat().st_mtime_ns for path in Path(run, "checkpoints").rglob("*")}
    kindling("finetune", "runs/finished", "--task", task, "--run", run, *FINETUNING, *files)
    assert {path: path.stat().st_mtime_ns for path in Path(run, "checkpoints").rglob("*")} == before
