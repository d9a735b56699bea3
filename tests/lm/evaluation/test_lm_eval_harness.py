"""Compared with the harness's own ``hf`` model of the exported run; skipped where the harness is not installed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")  # what its hf model imports

import lm_eval
from lm_eval.tasks import TaskManager

from data_prep.errors import UserError
from lm.cli.main import main
from lm.evaluation.lm_eval_harness import KindlingLM
from lm.export.huggingface import export_huggingface
from lm.inference.scoring import log_likelihoods
from tests.conftest import loaded

PAIRS = [
    ("The captain lost", " a silver key."),
    ("The captain lost ", "an owl"),
    ("", "Nobody sold the winter coat."),
    ("Every sparrow watched", " xq zzk"),
    ("My grandmother " * 9, " found seven apples"),
]


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "hf"
    export_huggingface(trained, out, trained.newest(), "next_token")
    return out


@pytest.fixture(scope="module")
def ours(trained):
    return KindlingLM(str(trained.path), device="cpu")


def peer(exported, **arguments):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(exported), device="cpu", batch_size=3, dtype="float32", **arguments)


def test_log_likelihoods_are_those_of_the_peer_with_the_exported_run(ours, exported):
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood", {}, pair, 0) for pair in PAIRS[:4]]
    wanted = peer(exported, add_bos_token=True).loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(requests(*PAIRS[:4]))
    for (nats, greedy), (their_nats, their_greedy) in zip(found, wanted, strict=True):
        assert nats == pytest.approx(their_nats, abs=2e-4)
        assert greedy == their_greedy


def test_rolling_log_likelihoods_are_those_of_the_peer(ours, exported):
    from lm_eval.api.instance import Instance

    texts = ["An owl.", "The old miller found a silver key. " * 12, "Nobody sold the winter coat again. " * 4]
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    wanted = peer(exported, add_bos_token=False).loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests(*((text,) for text in texts))) == pytest.approx(wanted, abs=2e-3)


def test_greedy_generation_is_that_of_the_peer(ours, exported):
    from lm_eval.api.instance import Instance

    settings = {"until": ["."], "max_gen_toks": 12, "do_sample": False}
    prompts = ["The captain", "Nobody", "A young fox watched"]
    asked = [Instance("generate_until", {}, (prompt, settings), 0) for prompt in prompts]
    wanted = peer(exported, add_bos_token=True).generate_until(asked, disable_tqdm=True)
    assert ours.generate_until(requests(*((prompt, settings) for prompt in prompts))) == wanted


def test_a_masked_readout_gives_pseudo_log_likelihoods(trained):
    masked = KindlingLM(str(trained.path), "masked_next_token", device="cpu")
    model, tokenizer = loaded(trained), trained.tokenizer
    first = len(tokenizer.encode("The captain lost"))
    tokens = tokenizer.encode("The captain lost a silver key.")
    wanted = log_likelihoods(model, [tokens], "masked_next_token", firsts=[first])[0]
    assert masked.loglikelihood(requests(PAIRS[0]))[0][0] == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(UserError, match="fills masks and cannot generate text"):
        masked.generate_until(requests(("The", {})))
    with pytest.raises(UserError, match="was trained for next_token and masked_next_token, not for masked_token"):
        KindlingLM(str(trained.path), "masked_token")


def test_a_context_that_is_too_long_loses_its_beginning(ours):
    nats, _ = ours.loglikelihood(requests(PAIRS[4]))[0]
    assert -100 < nats < 0
    assert ours.loglikelihood(requests(("", "")))[0] == (0.0, True)


@pytest.fixture
def tasks(tmp_path):
    """Task files of docs/harness, reading files of this test."""
    from pathlib import Path

    rows = {
        "pairs": [{"sentence_good": "The captain lost an owl.", "sentence_bad": "Captain the owl an lost."}] * 3,
        "questions": [{"text": "The captain lost", "choices": ["zq vvx", "a silver key."], "label": 1}] * 2,
        "sentiment": [{"text": "A small boat.", "label": 0}] * 2,
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for file in (Path(__file__).parents[3] / "docs" / "harness").glob("*.yaml"):
        text = file.read_text()
        for name in rows:
            text = text.replace(f"test: {name}.jsonl", f"test: {tmp_path / name}.jsonl")
        (tmp_path / file.name).write_text(text)
    return tmp_path


def test_our_task_files_score_alike_here_and_there(trained, exported, tasks, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "cache"))
    names = ["kindling_pairs", "kindling_choice", "kindling_sentiment"]
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    wanted = lm_eval.simple_evaluate(
        peer(exported, add_bos_token=True), tasks=names, task_manager=manager, log_samples=False, bootstrap_iters=0
    )
    arguments = ["harness", str(trained.path), "--tasks", ",".join(names), "--include-path", str(tasks), "--json"]
    told = CliRunner().invoke(main, [*arguments, "--device", "cpu"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout.splitlines()[-1])
    for name in names:
        assert found[name]["acc,none"] == wanted["results"][name]["acc,none"]
    assert found["kindling_choice"]["acc_norm,none"] == 1.0
    told = CliRunner().invoke(main, [*arguments[:2], "--tasks", "nonesuch", "--include-path", str(tasks)])
    assert (told.exit_code, 'has no task "nonesuch"' in told.stderr) == (2, True)
