from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from data_prep.errors import UserError
from lm.cli.main import main
from lm.config.recipes import finetuning_config
from lm.data.examples import Example
from lm.data.keyed_random import Stream, key
from lm.data.packed_sequences import packed, pooled
from lm.finetuning.contrastive_task import similarity
from lm.finetuning.finetune import Finetuning, finetune
from lm.inference.embedding import Reading, all_vectors, reading_of
from lm.objectives.contrastive import info_nce
from lm.runs.directory import Run
from lm.training.distributed import Ranks
from lm.training.reporter import NullReporter
from tests.conftest import loaded

SENTENCES = [
    f"{who} {did} {what}."
    for who in ("The old miller", "A young fox", "My grandmother", "The captain")
    for did in ("found", "painted", "lost")
    for what in ("a silver key", "the long river")
]


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config_of(trained: Run, tmp_path):
    """Settings of a contrastive training of the sentences, with some changed."""

    def config_of(**changes):
        train = write(tmp_path / "train.jsonl", [{"text": sentence} for sentence in SENTENCES])
        settings = {"task": "contrastive", "train": train, "batch_examples": 8, "dropout": 0.2, "device": "cpu"}
        return finetuning_config(trained.path, trained.config, settings | changes)

    return config_of


@pytest.fixture
def pairs(tmp_path):
    """Pairs that are the more alike the more of their three parts they share."""
    rows = []
    for one in SENTENCES[:12]:
        for other in SENTENCES[6:]:
            shared = sum(a == b for a, b in zip(one.split(), other.split(), strict=False))
            rows.append({"text": one, "text_pair": other, "label": shared})
    return write(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def task_of(config_of, tmp_path):
    """The task of these settings."""
    return lambda **changes: Finetuning(config_of(**changes), tmp_path / "run", Ranks()).task


def test_the_loss_is_its_formula():
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 5, 7, generator=draw, dtype=torch.float64)
    total = 0.0
    for i in range(5):
        shares = [float(torch.exp(torch.cosine_similarity(first[i], second[j], dim=0) / 0.05)) for j in range(5)]
        total -= np.log(shares[i] / sum(shares)) / 5
    assert float(info_nce(first, second, 0.05)) == pytest.approx(total)
    assert float(info_nce(first, first * 3, 0.001)) < 1e-6


@pytest.mark.parametrize("tokens", [64, 100_000])
def test_the_gradient_in_parts_is_that_of_the_whole_batch(trained, task_of, tokens):
    task = task_of(micro_batch_tokens=tokens)
    batch = task.batch(np.arange(8), np.zeros(8, int))
    assert (len(batch) > 2) == (tokens == 64)
    model = trained.load_model(torch.device("cpu"))
    model.blocks[0].dropout.p = 0.2
    model.blocks.config = dataclasses.replace(model.config, dropout=0.2)
    model.train()
    found, _ = task.gradients(model, batch, 3)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    views = torch.zeros(2, 8, 32)
    for number, (view, part) in enumerate(batch):
        torch.manual_seed(key(0, Stream.FINETUNING_DROPOUT, 3, number) >> 1)
        at = (torch.tensor(view), torch.from_numpy(part.numbers))
        views = views.index_put(at, task._vectors(model, (view, part)))
    loss = info_nce(views[0], views[1], 0.05)
    loss.backward()
    assert float(found["contrastive"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert (views[0] - views[1]).abs().max() > 0.01  # the dropout differs
    assert len(gradients) > 10
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, rtol=1e-4, atol=1e-6)


def test_the_views_of_a_pair_are_its_two_texts(trained, task_of, tmp_path):
    rows = [{"text": one, "text_pair": other} for one, other in zip(SENTENCES, SENTENCES[::-1], strict=True)]
    task = task_of(train=write(tmp_path / "two.jsonl", rows), dropout=0.0)
    assert task.pairs
    views = dict(task.batch(np.array([2, 5]), np.zeros(2, int)))
    for view, texts in enumerate((SENTENCES, SENTENCES[::-1])):
        row = views[view].batch.inputs[0].tolist()
        at = int(views[view].first[list(views[view].numbers).index(1)])
        wanted = trained.tokenizer.encode(texts[5])
        assert row[at + 1 : at + 1 + len(wanted)] == wanted


def test_similarity_is_the_correlation_of_cosines(trained):
    model = loaded(trained)
    examples = [Example((SENTENCES[0], SENTENCES[n]), float(-n), "f") for n in (0, 1, 5, 9, 20)]
    reading = Reading("bidirectional", "mean")
    vectors, _ = all_vectors(model, [(s,) for s in SENTENCES], reading)
    cosines = [
        float(torch.cosine_similarity(torch.tensor(vectors[0]), torch.tensor(vectors[n]), dim=0))
        for n in (0, 1, 5, 9, 20)
    ]
    found = similarity(model, examples, reading)
    assert found["pearson"] == pytest.approx(np.corrcoef(cosines, [0, -1, -5, -9, -20])[0, 1], abs=1e-5)


def test_training_tells_sentences_apart_and_makes_a_run_that_embeds(trained, config_of, pairs, tmp_path):
    before = CliRunner().invoke(main, ["evaluate", str(trained.path), "--similarity", pairs, "--json"])
    assert before.exit_code == 0, before.output
    config = config_of(epochs=20, validation=pairs, learning_rate=0.002)
    done = finetune(config, tmp_path / "out", NullReporter())
    after = CliRunner().invoke(
        main, ["evaluate", str(done.path), "--similarity", pairs, "--checkpoint", "best", "--json"]
    )
    assert after.exit_code == 0, after.output
    found, first = json.loads(after.stdout), json.loads(before.stdout)
    assert found["spearman"] == pytest.approx(done.scores["spearman"], abs=1e-6)
    losses = [line["loss"] for line in done.metrics() if "loss" in line]
    assert losses[-1] < losses[0]
    assert reading_of(done.config) == Reading("bidirectional", "mean")
    assert found["pairs"] == first["pairs"] == 216


def test_what_cannot_be_trained_or_judged_is_refused(task_of, config_of, tmp_path):
    for changes, words in (
        ({"dropout": 0.0}, "two views of a text differ by dropout, but dropout is 0"),
        ({"validation": write(tmp_path / "v.jsonl", [{"text": "a", "label": 1}])}, "line 1: there is only one text"),
    ):
        with pytest.raises(UserError, match=words):
            task_of(**changes)
    for changes, words in (
        ({"method": "probe"}, "contrastive training has none"),
        ({"judged_by": "accuracy"}, "judged_by accuracy is not available in contrastive training"),
    ):
        with pytest.raises(UserError, match=words):
            config_of(**changes)


def test_vectors_of_a_part_are_pooled_hidden_states(trained, task_of):
    task = task_of(dropout=0.1)
    model = trained.load_model(torch.device("cpu"))
    (part,) = packed(
        [each.sequences[0] for each in task.train[:3]], "bidirectional", trained.tokenizer.end_of_text_id, 32, 9
    )
    with torch.no_grad():
        hidden = model(part.batch.inputs, part.batch.positions, part.batch.lo, part.batch.hi)
        torch.testing.assert_close(task._vectors(model, (0, part)), pooled(hidden, part, "mean"))
