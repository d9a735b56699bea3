"""Instruction tuning: only responses are learned, and what comes out writes them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from data_prep.errors import UserError
from lm.config.recipes import finetuning_config
from lm.data.batch import IGNORED
from lm.data.examples import Example
from lm.finetuning.finetune import Finetuning, finetune
from lm.finetuning.instruction_task import pack_turns, turn_of
from lm.inference.chat_template import CHAT_TEMPLATE, PLAIN_TURNS, ChatFormat, chat_format, read_template
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
        return finetuning_config(
            trained.path,
            trained.config,
            usual | {"batch_examples": 16, "learning_rate": 0.01, "dropout": 0.0} | changes,
        )

    return made


def greedy(run, prompt: str, tokens: int = 6) -> str:
    """What the run answers, token by token, without any cache."""
    model, tokenizer = run.load_model(CPU), run.tokenizer
    text = chat_format(run.path, tokenizer, run.config).render([{"role": "user", "content": prompt}]).text
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
        losses, _ = task.gradients(model, task.batch(torch.arange(16).numpy(), torch.zeros(16, dtype=int).numpy()), 0)
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


TALK = [
    ("system", "Be good."),
    ("user", "A fox?"),
    ("assistant", "red "),
    ("user", "An owl?"),
    ("assistant", "<|user|>"),
]
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end_of_turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|end_of_turn|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def chat_tokenizer(text_folder, make_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat_tokens") / "data"
    return make_dataset(text_folder, folder, vocab_size=400, extra_tokens=("chat",)).tokenizer


def talk_of(*turns, place: str = "") -> Example:
    return Example(tuple(text for _, text in turns), tuple(role for role, _ in turns), place)


def learned(turn, tokenizer) -> list[str]:
    """The texts that are learned, each as far as it goes."""
    parts = [[]]
    for label in turn.labels:
        parts += [[]] if label == IGNORED and parts[-1] else []
        parts[-1] += [] if label == IGNORED else [label]
    return [tokenizer.decode(part) for part in parts if part]


@pytest.mark.parametrize(
    ("template", "row", "answers"),
    [
        (
            CHATML,
            "<|system|>\nBe good.<|end_of_turn|>\n<|user|>\nA fox?<|end_of_turn|>\n<|assistant|>\nred <|end_of_turn|>\n"
            "<|user|>\nAn owl?<|end_of_turn|>\n<|assistant|>\n<|user|><|end_of_turn|>",
            ["red <|end_of_turn|>", "<|user|><|end_of_turn|>"],
        ),
        (
            MARKED,
            "<|system|>Be good.<|end_of_turn|><|user|>A fox?<|end_of_turn|><|assistant|>red <|end_of_turn|>"
            "<|user|>An owl?<|end_of_turn|><|assistant|><|user|><|end_of_turn|>",
            ["red <|end_of_turn|>", "<|user|><|end_of_turn|>"],
        ),
        (
            PLAIN_TURNS,
            "System: Be good.\nUser: A fox?\nAssistant: red \nUser: An owl?\nAssistant: <|user|><|endoftext|>",
            [" red <|endoftext|>", " <|user|><|endoftext|>"],
        ),
        (
            "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '') }}\n{% endfor %}",
            "Be good.\nA fox?\nred <|endoftext|>\nAn owl?\n<|user|><|endoftext|>",
            ["red <|endoftext|>", "<|user|><|endoftext|>"],
        ),
    ],
)
def test_all_of_the_assistants_turns_and_their_ends_are_learned(chat_tokenizer, template, row, answers):
    turn = turn_of(talk_of(*TALK, ("user", "Nobody answers.")), template, chat_tokenizer, 200)
    assert chat_tokenizer.decode(turn.row[1:]) == row
    assert learned(turn, chat_tokenizer) == answers
    assert turn.response_bytes == sum(len(re.sub(r"<.(end_of_turn|endoftext).>$", "", answer)) for answer in answers)
    # where the template ends no turn, the text could end, while the conversation continues
    other = [a != b for a, b in zip(turn.row, turn.labels, strict=True) if b != IGNORED]
    assert sum(other) == (template == PLAIN_TURNS)
    special = set(chat_tokenizer.special_tokens.values())  # all but the one that the user spelled
    assert sum(token in special for token in turn.row) == row.count("<|")


def test_the_marks_of_generation_are_those_of_transformers(chat_tokenizer):
    peer = PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(chat_tokenizer.to_json()))
    template = MARKED.replace("{% endgeneration %}", "<|end_of_turn|>{% endgeneration %}").replace(
        "{% endif %}<|end_of_turn|>", "<|end_of_turn|>{% endif %}"
    )
    turns = [("user", "The old fox?"), ("assistant", "it is red "), ("user", "And?"), ("assistant", "grey")]
    turn = turn_of(talk_of(*turns), template, chat_tokenizer, 200)
    theirs = peer.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns],
        chat_template=template,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    assert turn.row[1:] == theirs["input_ids"]
    assert [int(label != IGNORED) for label in turn.labels[1:]] == theirs["assistant_masks"]
    assert theirs["assistant_masks"].count(1) > 4


def test_training_reads_a_prompt_as_sampling_does(chat_tokenizer):
    for template in (CHATML, MARKED, PLAIN_TURNS):
        chat = ChatFormat(template, chat_tokenizer)
        turn = turn_of(talk_of(*TALK), template, chat_tokenizer, 200)
        for count in (2, 4):
            prompt = chat.encode([{"role": role, "content": text} for role, text in TALK[:count]])
            assert turn.row[1 : 1 + len(prompt)] == prompt
            assert turn.labels[1 + len(prompt)] == turn.row[1 + len(prompt)]  # the first token of the answer


def test_a_long_conversation_loses_its_beginning(chat_tokenizer):
    whole = turn_of(talk_of(*TALK), CHATML, chat_tokenizer, 200)
    for room in range(1, len(whole.row) + 2):
        turn = turn_of(talk_of(*TALK), CHATML, chat_tokenizer, room)
        assert turn.cut == (room < len(whole.row) - 1)
        assert len(turn.row) == 1 + min(room, len(whole.row) - 1)
        assert turn.predicted > 0
        answer = next(n for n in range(len(whole.row), 0, -1) if whole.labels[n - 1] == IGNORED)
        if room >= len(whole.row) - answer:
            assert turn.row[1:] == whole.row[-len(turn.row) + 1 :]
        else:
            assert turn.row[1:] == whole.row[answer : answer + room]


def test_a_template_that_writes_turns_otherwise_later_is_refused_unless_it_marks_them(chat_tokenizer):
    forgets = (
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}<|{{ m.role }}|>{{ m.content }}<|end_of_turn|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(UserError, match="line 3: the chat template formats the prompt differently when a response"):
        turn_of(talk_of(*TALK, place="line 3"), forgets, chat_tokenizer, 200)
    marks = forgets.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    turn = turn_of(talk_of(*TALK[3:]), marks, chat_tokenizer, 200)
    assert learned(turn, chat_tokenizer)[-1] == "<|user|><|end_of_turn|>"
    with pytest.raises(UserError, match="line 3: the chat template leaves out what the assistant says"):
        turn_of(talk_of(*TALK, place="line 3"), "{{ messages[0].content }}", chat_tokenizer, 200)
    with pytest.raises(UserError, match="line 3: the chat template fails: no system"):
        turn_of(talk_of(*TALK, place="line 3"), "{{ raise_exception('no system') }}", chat_tokenizer, 200)


def test_a_run_that_began_without_special_tokens_continues_without_them(config, recorder, tmp_path):
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    (tmp_path / "eos.jinja").write_text(template)
    asked = {"chat_template": str(tmp_path / "eos.jinja"), "epochs": 1}
    assert Finetuning(config(**asked), tmp_path / "new", Ranks()).config.finetune.template_tokens == "special"
    assert Finetuning(config(epochs=1), tmp_path / "new", Ranks()).config.finetune.template_tokens == "characters"
    old = finetune(config(**asked, template_tokens="characters"), tmp_path / "run", recorder)
    assert chat_format(old.path, old.tokenizer, old.config).render([{"role": "user", "content": "a"}]).text == "a"
    assert finetune(config(**asked), tmp_path / "run", recorder).config.finetune.template_tokens == "characters"
    with pytest.raises(UserError, match="template_tokens"):
        finetune(config(**asked, template_tokens="special"), tmp_path / "run", recorder)
