"""Instruction tuning: only responses are learned, and what comes out writes them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data_prep.errors import UserError
from lm.data.batch import IGNORED
from lm.data.examples import Example
from lm.finetuning.finetune import Finetuning, finetune, finetune_config
from lm.finetuning.instruction_task import pack_turns, turn_of
from lm.inference.chat_template import CHAT_TEMPLATE, PLAIN_TURNS, read_template, render
from lm.runs.base_weights import keep_base, starting_trunk
from lm.runs.directory import open_run
from lm.training.distributed import Ranks

CPU = torch.device("cpu")
COLORS = {"fox": "red", "owl": "grey", "boat": "white", "river": "blue"}


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> str:
    draw, path = random.Random(0), tmp_path_factory.mktemp("talk") / "talk.jsonl"
    things = [draw.choice(list(COLORS)) for _ in range(96)]
    rows = [{"prompt": f"The {thing}?", "response": COLORS[thing]} for thing in things]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(trained, conversations):
    def made(**changes):
        usual = {"task": "instruction", "train": conversations, "validation": conversations, "epochs": 8, "threads": 1}
        return finetune_config(trained, usual | {"batch_examples": 16, "learning_rate": 0.01, "dropout": 0.0} | changes)

    return made


def greedy(run, prompt: str, tokens: int = 6) -> str:
    """What the run answers, token by token, without any cache."""
    model, tokenizer = run.load_model(CPU), run.tokenizer
    text = render([{"role": "user", "content": prompt}], read_template(run.path))
    row = [tokenizer.end_of_text_id, *tokenizer.encode(text)]
    begun = len(row)
    for _ in range(tokens):
        positions = torch.arange(len(row), dtype=torch.int32)[None]
        hidden = model(torch.tensor([row]), positions, torch.zeros_like(positions), positions + 1)
        row.append(int(model.logits(hidden[0, -1]).argmax()))
        if row[-1] == tokenizer.end_of_text_id:
            break
    assert row[-1] == tokenizer.end_of_text_id  # it has learned to stop
    return tokenizer.decode(row[begun:-1])


def test_a_run_learns_to_answer_and_to_stop(config, recorder, tmp_path):
    done = finetune(config(), tmp_path / "run", recorder)
    assert done.scores["nats_per_token"] < 0.3
    assert (tmp_path / "run" / CHAT_TEMPLATE).read_text() == PLAIN_TURNS
    for thing, color in COLORS.items():
        assert greedy(open_run(done.path), f"The {thing}?").strip() == color


def test_an_adapted_run_is_read_as_a_plain_one(config, recorder, tmp_path):
    done = finetune(config(method="lora"), tmp_path / "run", recorder)
    losses = [line["loss"] for line in recorder.lines if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    task = Finetuning(done.config, done.path, Ranks()).task
    assert task.validate(done.load_model(CPU, done.checkpoint("best")))[1] == done.scores["nats_per_token"]


@torch.no_grad()
def test_the_loss_is_that_of_the_responses_alone(config, trained, tmp_path):
    task = Finetuning(config(micro_batch_tokens=60), tmp_path / "run", Ranks()).task
    model = trained.load_model(CPU)
    nats, count = 0.0, 0
    for turn in task.validation:
        row = torch.tensor([turn.row])
        positions = torch.arange(row.shape[1] - 1, dtype=torch.int32)[None]
        logits = model.logits(model(row[:, :-1], positions, torch.zeros_like(positions), positions + 1))[0]
        labels = torch.tensor(turn.labels[1:])
        nats += float(F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
        count += int((labels != IGNORED).sum())
    line, judged = task.validate(model)
    assert judged == pytest.approx(nats / count, rel=1e-5)
    assert line["validation"]["response"]["predicted"] == count


def test_micro_batches_give_the_gradient_of_the_whole_batch(config, trained, tmp_path):
    keep_base(trained.newest().path / "model.safetensors", tmp_path)
    found = []
    for most in (4096, 30):
        task = Finetuning(config(micro_batch_tokens=most), tmp_path / "run", Ranks()).task
        model = task.model(starting_trunk(task.config, tmp_path))
        losses, _ = task.gradients(model, task.batch(torch.arange(16).numpy()), 0)
        found.append((float(losses["response"]), [p.grad.clone() for p in model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_turn_keeps_its_response_and_the_end_of_a_long_prompt(trained):
    tokenizer, end = trained.tokenizer, trained.tokenizer.end_of_text_id
    short = turn_of(Example(("A fox?", "red"), None, ""), PLAIN_TURNS, tokenizer, 64)
    assert tokenizer.decode(short.row[1:-1]) == "User: A fox?\nAssistant: red"
    learned = [token for token in short.labels if token != IGNORED]
    assert tokenizer.decode(learned[:-1]) == " red"
    assert short.row[-len(learned) :] == learned
    assert (short.row[0], short.row[-1], short.cut) == (end, end, False)
    long = turn_of(Example(("A fox and an owl " * 9, "red"), None, ""), PLAIN_TURNS, tokenizer, 16)
    assert (len(long.row), long.cut, long.tokens) == (17, True, 16)
    assert tokenizer.decode(long.row[1:-1]).endswith("\nAssistant: red")
    only = turn_of(Example(("A fox?", "red " * 40), None, ""), PLAIN_TURNS, tokenizer, 8)
    assert (len(only.row), only.predicted, only.cut) == (9, 8, True)
    batch = pack_turns([short, long], 0.5, end, 64)
    assert float(batch.loss_weights.sum()) == 0.5 * (short.predicted + long.predicted)


def test_a_template_of_ones_own_is_used_and_kept(config, recorder, tmp_path):
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}"
    template = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    (tmp_path / "own.jinja").write_text(template)
    done = finetune(config(chat_template=str(tmp_path / "own.jinja"), epochs=1), tmp_path / "run", recorder)
    assert read_template(done.path) == template
    (tmp_path / "bad.jinja").write_text(
        "{% if add_generation_prompt %}x{% else %}y{% endif %}{{ messages[0].content }}"
    )
    with pytest.raises(
        UserError, match="line 1: the chat template formats the prompt differently when a response follows"
    ):
        finetune(config(chat_template=str(tmp_path / "bad.jinja")), tmp_path / "other", recorder)
    with pytest.raises(UserError, match=r"the chat template .*no\.jinja cannot be read"):
        finetune(config(chat_template=str(tmp_path / "no.jinja")), tmp_path / "other", recorder)


def test_a_run_that_cannot_write_is_refused(config, recorder, tmp_path):
    with pytest.raises(UserError, match="was trained with masked_token only: it generates no text"):
        finetune(config().replace(objective="masked_token"), tmp_path / "run", recorder)
    with pytest.raises(UserError, match="instruction tuning has none: choose full or lora"):
        config(method="probe")
    assert not Path(tmp_path / "run").exists()
