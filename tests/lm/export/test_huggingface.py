"""Exported models against the stock classes of transformers."""

from __future__ import annotations

import json
import os

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from data_prep.errors import UserError
from data_prep.settings import TokenizerSettings
from data_prep.tokenizers.special_tokens import SpecialTokens, with_record
from data_prep.tokenizers.tokenizer import Tokenizer
from data_prep.tokenizers.training import train_tokenizer
from lm.export.gguf import export_gguf
from lm.export.huggingface import choose_readout, template_with_start, tokenizer_with_start, tokenizer_without_start
from lm.inference.chat_template import CHAT_TEMPLATE, chat_format
from lm.inference.generator import stream
from lm.inference.sampling import Sampling
from lm.inference.scoring import log_likelihoods
from tests.conftest import loaded, sentences
from tests.lm.export.conftest import SHAPES, export, our_logits, run_of

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_causal_logits_are_those_of_the_stock_class(make_run, tmp_path, shape, qk_norm):
    run = make_run(objective="hybrid", qk_norm=qk_norm, **shape)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "out", "next_token"))
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    ids = torch.randint(0, run.config.model.vocab_size, (3, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = theirs(ids).logits
    assert logits.std() > 0.5
    torch.testing.assert_close(our_logits(run, ids, bidirectional=False), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("objective", ["masked_token", "hybrid_unshifted"])
def test_masked_logits_are_those_of_the_stock_class(make_run, tmp_path, shape, objective):
    run = make_run(objective=objective, **shape)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(export(run, tmp_path / "out", "masked_token"))
    assert type(theirs).__name__ == "EuroBertForMaskedLM"
    ids = torch.randint(0, run.config.model.vocab_size, (3, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = theirs(ids).logits
    torch.testing.assert_close(our_logits(run, ids, bidirectional=True), logits, rtol=1e-4, atol=1e-4)


def test_greedy_text_is_the_same_for_200_tokens(make_run, tmp_path):
    run = make_run(objective="next_token", **SHAPES[1])
    out = export(run, tmp_path / "out", "next_token")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    prompt = "The old miller found"
    events = stream(loaded(run), prompt, Sampling(temperature=0, max_new_tokens=200))
    ours = [event.token for event in events if event.token is not None]
    inputs = tokenizer(prompt, return_tensors="pt")
    made = theirs.generate(**inputs, max_new_tokens=200, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert len(ours) > 50
    assert made[: len(ours)] == ours


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shifted_masked_readout_is_found_one_position_before_the_mask(make_run, tmp_path, shape):
    run = make_run(objective="hybrid", **shape)
    out = export(run, tmp_path / "out", "masked_next_token")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = "The old miller found seven apples"
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    total = 0.0
    for place in range(1, len(ids)):
        hidden = ids.clone()
        hidden[place] = tokenizer.mask_token_id
        with torch.no_grad():
            logits = theirs(hidden[None]).logits[0]
        total += float(logits[place - 1].log_softmax(-1)[ids[place]])
    (ours,) = log_likelihoods(loaded(run), [run.tokenizer.encode(text)], "masked_next_token")
    assert total == pytest.approx(ours, abs=1e-5 * len(ids))


def test_a_batch_is_padded_on_the_left_and_written_as_single_texts_are(make_run, tmp_path):
    out = export(make_run(objective="next_token", **SHAPES[1]), tmp_path / "out", "next_token")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    texts = ["The", "The old miller found a silver key behind the barn", "", "Nobody carried"]

    def written(batch: list[str]) -> list[list[int]]:
        inputs = tokenizer(batch, return_tensors="pt", padding=True)
        made = theirs.generate(**inputs, max_new_tokens=12, do_sample=False)
        return made[:, inputs["input_ids"].shape[1] :].tolist()

    end = tokenizer.eos_token_id
    alone = [(written([text])[0] + [end] * 12)[:12] for text in texts]
    assert [(row + [end] * 12)[: row.index(end) if end in row else 12] for row in written(texts)] == [
        row[: row.index(end)] if end in row else row for row in alone
    ]


CONVERSATIONS = [
    [{"role": "user", "content": "Who found a silver key?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who  was it?"},
        {"role": "assistant", "content": "the old miller"},
        {"role": "user", "content": "And then —\n\nafter that?"},
    ],
]
TEMPLATES = [
    None,
    "  {% for m in messages %}\n <{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{%endif%}",
    "\n{%- for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor -%}",
    "{{ bos_token }}{% for m in messages %}{{ m.content }}/{% endfor %}",
    "<|endoftext|>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end_of_turn|>{% endfor %}<|assistant|>",
    "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}{{ bos_token }}<|user|>{{ messages }}",
    "{# no bos_token here #}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end_of_turn|>\n{% endfor %}",
]


@pytest.fixture(scope="module")
def chat_tokenizer():
    settings = TokenizerSettings(vocab_size=300, extra_tokens=("chat",))
    return train_tokenizer(iter([sentences(200, 1)]), settings)


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversation_has_the_ids_that_the_run_reads(small, chat_tokenizer, tmp_path, template, messages):
    run = run_of(small.replace(objective="next_token"), chat_tokenizer, tmp_path / "run")
    if template is not None:
        (run.path / CHAT_TEMPLATE).write_text(template)
    tokenizer = transformers.AutoTokenizer.from_pretrained(export(run, tmp_path / "out", "next_token"))
    chat = chat_format(run.path, run.tokenizer, run.config)
    if template and "raise_exception" in template:
        messages = [{"role": "system", "content": "Be kind."}, messages[-1]]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert theirs == [run.tokenizer.end_of_text_id, *chat.encode(messages)]


def test_a_run_that_read_its_template_as_characters_is_exported_with_a_warning(small, chat_tokenizer, tmp_path, capsys):
    config = small.replace(objective="next_token", task="instruction", weights="random", template_tokens="characters")
    run = run_of(config, chat_tokenizer, tmp_path / "run")
    for template, warned in (("{{ messages[0].content }}", False), ("<|user|>{{ messages[0].content }}", True)):
        (run.path / CHAT_TEMPLATE).write_text(template)
        template_with_start(run)
        assert ("as plain characters" in capsys.readouterr().err) == warned


def test_what_ends_a_turn_ends_the_text(small, chat_tokenizer, tmp_path):
    run = run_of(small.replace(objective="next_token"), chat_tokenizer, tmp_path / "run")
    end, turn_end = run.tokenizer.end_of_text_id, run.tokenizer.special_tokens["<|end_of_turn|>"]
    found = [json.loads((export(run, tmp_path / "a", "next_token") / "generation_config.json").read_text())]
    (run.path / CHAT_TEMPLATE).write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end_of_turn|>{% endfor %}"
    )
    found.append(json.loads((export(run, tmp_path / "b", "next_token") / "generation_config.json").read_text()))
    assert [each["eos_token_id"] for each in found] == [end, [end, turn_end]]
    gguf = pytest.importorskip("gguf")
    export_gguf(run, tmp_path / "b.gguf", run.newest(), "next_token")
    fields = gguf.GGUFReader(tmp_path / "b.gguf").fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == turn_end
    assert fields["tokenizer.ggml.eos_token_id"].contents() == end


HABITS = {  # of begin, bos, end_of_text, ends, padding, mask and unwritable, as names
    "llama": ("<|system|>", "<|system|>", "<|user|>", ["<|user|>", "<|assistant|>"], "<|user|>", None, []),
    "qwen": (None, None, "<|endoftext|>", ["<|endoftext|>", "<|end_of_turn|>"], "<|pad|>", None, ["<|pad|>"]),
    "begun by another": ("<|system|>", "<|pad|>", "<|user|>", ["<|user|>"], "<|user|>", None, []),
    "begun, without a bos": ("<|system|>", None, "<|user|>", ["<|user|>"], "<|user|>", None, []),
    "named but not added": (None, "<|system|>", "<|user|>", ["<|user|>"], "<|pad|>", "<|mask|>", ["<|mask|>"]),
}


@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("template", [None, "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_an_imported_tokenizer_leaves_with_its_own_habits(small, chat_tokenizer, tmp_path, habit, template):
    ids = chat_tokenizer.special_tokens
    begin, bos, end, ends, padding, mask, unwritable = HABITS[habit]
    special = SpecialTokens(
        ids.get(begin), ids.get(bos), ids[end], tuple(ids[each] for each in ends), ids[padding], ids.get(mask),
        tuple(ids[each] for each in unwritable),
    )  # fmt: skip
    description = with_record(chat_tokenizer.description, special, {i: name for name, i in ids.items()})
    own = Tokenizer.from_json(json.dumps(description))
    run = run_of(small.replace(objective="next_token"), own, tmp_path / "run")
    if template is not None:
        (run.path / CHAT_TEMPLATE).write_text(template)
    out = export(run, tmp_path / "out", "next_token")
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token, theirs.mask_token) == (bos, end, padding, mask)
    assert theirs("The barn")["input_ids"] == own.begun(own.encode("The barn"))
    chat = chat_format(run.path, own, run.config)
    given = theirs.apply_chat_template(CONVERSATIONS[0], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert given == own.begun(chat.encode(CONVERSATIONS[0]))
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == ([ids[each] for each in ends] if len(ends) > 1 else ids[end])
    assert generation.suppress_tokens == [ids[each] for each in unwritable]
    gguf = pytest.importorskip("gguf")
    export_gguf(run, tmp_path / "m.gguf", run.newest(), "next_token")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert fields["tokenizer.ggml.add_bos_token"] == (begin is not None)
    assert fields["tokenizer.ggml.eos_token_id"] == ids[end]
    assert fields.get("tokenizer.ggml.bos_token_id") == ids.get(begin or bos)
    assert fields.get("tokenizer.ggml.eot_token_id") == (ids[ends[1]] if len(ends) > 1 else None)


def test_the_generation_settings_of_an_imported_run_are_given_back(make_run, tmp_path):
    run = make_run(objective="next_token")
    saved = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": 399}
    (run.path / "generation_config.json").write_text(json.dumps(saved))
    theirs = transformers.GenerationConfig.from_pretrained(export(run, tmp_path / "out", "next_token"))
    assert (theirs.do_sample, theirs.temperature, theirs.top_p) == (True, 0.6, 0.95)
    assert theirs.eos_token_id == run.tokenizer.end_of_text_id  # what the run stops at


def test_a_masked_model_has_a_chat_template_only_if_the_run_has_one(make_run, tmp_path):
    run = make_run(objective="masked_token")
    assert not (export(run, tmp_path / "a", "masked_token") / CHAT_TEMPLATE).exists()
    (run.path / CHAT_TEMPLATE).write_text("{{ messages }}")
    assert (export(run, tmp_path / "b", "masked_token") / CHAT_TEMPLATE).read_text().endswith("{{ messages }}")


@pytest.mark.parametrize("text", ["", "a", "The café — naïve 12345 \n\n\tx", "<|endoftext|>", "日本語 🙂"])
def test_the_tokenizer_gives_the_same_ids_after_the_end_of_text_token(make_run, tmp_path, text):
    run = make_run(objective="next_token")
    theirs = transformers.AutoTokenizer.from_pretrained(export(run, tmp_path / "out", "next_token"))
    ours = run.tokenizer.encode(text)
    if "<|" not in text:  # there a text may spell a special token, here it may not
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours
        assert theirs(text)["input_ids"] == [run.tokenizer.end_of_text_id, *ours]
        assert theirs.decode(ours) == text
    assert theirs.mask_token_id == run.tokenizer.mask_id
    assert theirs.pad_token_id == run.tokenizer.padding_id
    assert theirs.eos_token_id == run.tokenizer.end_of_text_id


def test_nothing_in_the_folder_carries_code(make_run, tmp_path):
    out = export(make_run(objective="next_token"), tmp_path / "out", "next_token")
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "kindling.toml",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert "auto_map" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_can_be_read_by_whom_the_umask_says(make_run, tmp_path, umask):
    run = make_run(objective="next_token")
    before = os.umask(umask)
    try:
        out = export(run, tmp_path / "out", "next_token")
        export_gguf(run, out / "model.gguf", run.newest(), "next_token")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)
    assert {"model.safetensors", "model.gguf", "tokenizer.json"} <= modes.keys()


def test_the_card_has_losses_and_limits(trained, tmp_path):
    out = export(trained, tmp_path / "out", "next_token")
    card = (out / "README.md").read_text()
    for words in (
        "pipeline_tag: text-generation",
        "LlamaForCausalLM",
        "100 steps",
        "## Limits",
        "does not follow instructions",
    ):
        assert words in card, words


def test_the_readout_is_the_first_that_can_be_exported(make_run):
    run = make_run(objective="hybrid")
    assert choose_readout(run, None) == "next_token"
    with pytest.raises(UserError, match="was trained for next_token and masked_next_token, not for masked_token"):
        choose_readout(run, "masked_token")
    assert choose_readout(run, "masked_next_token") == "masked_next_token"


def test_the_shifted_readout_is_exported_only_by_name(make_run):
    run = make_run(objective="masked_next_token")
    with pytest.raises(UserError, match=r"from the position before it.* --readout masked_next_token"):
        choose_readout(run, None)


def test_a_folder_that_is_not_empty_is_not_overwritten(make_run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not an empty folder: choose another --out"):
        export(make_run(objective="next_token"), tmp_path / "out", "next_token")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    assert not (tmp_path / ".out.partial").exists()


def test_the_start_token_is_added_and_removed(dataset):
    there = tokenizer_with_start(dataset.tokenizer)
    assert there != dataset.tokenizer.description
    assert tokenizer_without_start(there) == dataset.tokenizer.description


def test_what_another_tokenizer_adds_is_replaced_by_the_end_of_text(dataset):
    """A downloaded tokenizer.json may add tokens of its own, which training leaves out."""
    backend = Backend.from_str(dataset.tokenizer.to_json())
    mask = dataset.tokenizer.mask_id
    backend.post_processor = processors.TemplateProcessing("<|mask|> $A", special_tokens=[("<|mask|>", mask)])
    tokenizer = Tokenizer(backend)
    exported = Backend.from_str(json.dumps(tokenizer_with_start(tokenizer)))
    assert exported.encode("sky").ids == tokenizer.begun(tokenizer.encode("sky"))
