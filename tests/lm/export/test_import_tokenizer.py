"""An imported checkpoint begins, continues and ends texts as transformers does with the same folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from data_prep.errors import UserError
from data_prep.tokenizers.load import load_tokenizer
from lm.config.sampling import Sampling, recommended
from lm.export.import_huggingface import import_checkpoint
from lm.export.import_tokenizer import chat_template
from lm.inference.batch_generation import Prompt, continuations
from lm.inference.generator import Generator
from lm.inference.language_model import LanguageModel
from lm.inference.scoring import log_likelihoods
from lm.runs.directory import open_run
from tests.lm.export.conftest import export

SPECIAL = ["<pad>", "<s>", "</s>", "<|turn|>", "<unk>"]
PAD, BEGIN, END, TURN = range(4)
PROMPTS = ["hello", " world 12", "aé", "a b  c", "zz"]


def byte_level() -> Backend:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, "he", "lo"])}
    backend = Backend(models.BPE(vocab, [("h", "e"), ("l", "o")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def metaspace() -> Backend:
    """As Llama 2's: a space before the text, and bytes for characters without a token."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁h", "he"]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocab = {token: i for i, token in enumerate(names)}
    backend = Backend(models.BPE(vocab, [("▁", "h"), ("h", "e")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def adding(backend: Backend, token: int) -> processors.PostProcessor:
    name = SPECIAL[token]
    return processors.TemplateProcessing(f"{name} $A", f"{name} $A {name} $B", [(name, token)])


# name: (tokenizer, post-processor, tokenizer_config.json, config.json, generation_config.json,
#        what begins a text, what ends it, what ends a document, padding)
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
AS_DICTS = {
    "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True},
    "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
    "pad_token": {"__type": "AddedToken", "content": "<pad>", "special": True},
}
IDS = {"bos_token_id": BEGIN, "eos_token_id": END}
HABITS = {
    "template": (byte_level, "template", NAMED, IDS, IDS, BEGIN, (END,), END, END),
    "template-after-byte-level": (byte_level, "sequence", NAMED, IDS, IDS, BEGIN, (END,), END, END),
    "add-bos-token": (byte_level, None, NAMED | {"add_bos_token": True}, IDS, IDS, BEGIN, (END,), END, END),
    "no-bos": (byte_level, None, {"bos_token": None, "eos_token": "</s>"}, IDS, IDS, None, (END,), END, END),
    "bos-not-added": (byte_level, "byte-level", NAMED | {"add_bos_token": False}, IDS, IDS, None, (END,), END, END),
    "several-ends": (
        byte_level, "template", NAMED | {"eos_token": "<|turn|>"}, IDS, {"eos_token_id": [END, TURN]},
        BEGIN, (END, TURN), TURN, TURN,
    ),
    "several-ends-in-config": (
        byte_level, "template", NAMED, {"bos_token_id": BEGIN, "eos_token_id": [TURN, END]}, None,
        BEGIN, (TURN, END), END, END,
    ),
    "end-of-generation-only": (
        byte_level, "template", NAMED, {"bos_token_id": None, "eos_token_id": None}, {"eos_token_id": TURN},
        BEGIN, (TURN,), TURN, TURN,
    ),
    "padding-is-the-end": (byte_level, "template", NAMED | {"pad_token": "</s>"}, IDS, IDS, BEGIN, (END,), END, END),
    "padding-of-its-own": (
        byte_level, "template", NAMED | {"pad_token": "<pad>"}, IDS | {"pad_token_id": PAD}, IDS,
        BEGIN, (END,), END, PAD,
    ),
    "dictionaries": (byte_level, "template", AS_DICTS, IDS, IDS, BEGIN, (END,), END, PAD),
    "metaspace": (metaspace, "template", NAMED | {"unk_token": "<unk>"}, IDS, IDS, BEGIN, (END,), END, END),
    "metaspace-no-bos": (metaspace, None, {"eos_token": "</s>"}, IDS, IDS, None, (END,), END, END),
}  # fmt: skip
ARCHITECTURES = ("Llama", "Mistral", "Qwen3")


def write_checkpoint(folder: Path, habit: str, architecture: str, **shape: object) -> Path:
    """A checkpoint with drawn weights, as transformers writes it, in which texts end after a few tokens."""
    transformers = pytest.importorskip("transformers")
    make, processor, settings, config, generation = HABITS[habit][:5]
    backend = make()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    parts = {
        "template": lambda: adding(backend, BEGIN),
        "sequence": lambda: processors.Sequence([processors.ByteLevel(trim_offsets=False), adding(backend, BEGIN)]),
        "byte-level": lambda: processors.ByteLevel(trim_offsets=False),
    }
    if processor is not None:
        backend.post_processor = parts[processor]()
    described = getattr(transformers, f"{architecture}Config")(
        vocab_size=backend.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}} | config | shape,
    )  # fmt: skip
    torch.manual_seed(sum(map(ord, habit + architecture)))
    model = getattr(transformers, f"{architecture}ForCausalLM")(described)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for end in (END, TURN):  # often enough the most likely token
            model.lm_head.weight[end] *= 3
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    backend.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


def imported(folder: Path, out: Path) -> LanguageModel:
    import_checkpoint(str(folder), out)
    run = open_run(out)
    return LanguageModel(run.load_model(torch.device("cpu")), run.tokenizer, run.config)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("habit", HABITS)
def test_a_checkpoint_writes_the_same_text_and_stops_where_transformers_stops(tmp_path, habit, architecture):
    transformers = pytest.importorskip("transformers")
    write_checkpoint(tmp_path / "theirs", habit, architecture)
    begin, ends, end_of_text, padding = HABITS[habit][5:]
    model = imported(tmp_path / "theirs", tmp_path / "run")
    tokenizer = model.tokenizer
    assert (tokenizer.begin_id, tokenizer.end_ids) == (begin, ends)
    assert (tokenizer.end_of_text_id, tokenizer.padding_id) == (end_of_text, padding)
    assert tokenizer.vocab_size == model.config.model.vocab_size  # nothing was added
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    ours = continuations(
        Generator(model), [Prompt(text, Sampling(temperature=0, max_new_tokens=24, logprobs=0)) for text in PROMPTS]
    )
    stopped = 0
    for text, found in zip(PROMPTS, ours, strict=True):
        ids = their_tokenizer(text).input_ids
        if habit == "add-bos-token":  # which transformers 5 ignores with a tokenizer.json, and 4 does not
            ids = [BEGIN, *ids]
        written = theirs.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0].tolist()[len(ids) :]
        ended = bool(written) and written[-1] in ends
        stopped += ended
        assert found.finish_reason == ("stop" if ended else "length")
        assert [event.token for event in found.events if event.token is not None] == written[: len(written) - ended]
        with torch.no_grad():
            logprobs = theirs(torch.tensor([ids + written])).logits[0].log_softmax(-1)
        for event, token, row in zip(found.events, written, logprobs[len(ids) - 1 :], strict=False):
            if event.token is not None:
                assert event.logprob == pytest.approx(float(row[token]), abs=2e-4)
    assert stopped, "no text ended: the test shows nothing"


@pytest.mark.parametrize("habit", ["template", "no-bos"])
def test_scores_are_those_of_transformers(tmp_path, habit):
    """A text that nothing begins is scored after an end of text, and as a continuation, after its context alone."""
    transformers = pytest.importorskip("transformers")
    write_checkpoint(tmp_path / "theirs", habit, "Llama")
    model = imported(tmp_path / "theirs", tmp_path / "run")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    texts = [model.tokenizer.encode(text) for text in PROMPTS]
    for first in (0, 1):
        start = [BEGIN] if habit == "template" else [] if first else [END]
        wanted = []
        for text in texts:
            row = [*start, *text]
            with torch.no_grad():
                logprobs = theirs(torch.tensor([row])).logits[0].log_softmax(-1)
            wanted.append(sum(float(logprobs[len(start) + i - 1, text[i]]) for i in range(first, len(text))))
        found = log_likelihoods(model, texts, "next_token", firsts=[first] * len(texts))
        assert found == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("habit", HABITS)
def test_a_copy_of_the_tokenizer_and_an_export_keep_all_of_it(tmp_path, habit):
    write_checkpoint(tmp_path / "theirs", habit, "Llama")
    import_checkpoint(str(tmp_path / "theirs"), tmp_path / "run")
    run = open_run(tmp_path / "run")
    run.tokenizer.save(tmp_path / "copy.json")
    copy = load_tokenizer(tmp_path / "copy.json")
    assert (copy.special, copy.sha256) == (run.tokenizer.special, run.tokenizer.sha256)
    import_checkpoint(str(export(run, tmp_path / "out", "next_token")), tmp_path / "back")
    assert open_run(tmp_path / "back").tokenizer.special == run.tokenizer.special


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"

TOOL = {"name": "tool", "template": "x"}


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, None),
        ({"tokenizer_config.json": {"chat_template": TEMPLATE}}, TEMPLATE),
        ({"tokenizer_config.json": {"chat_template": [TOOL]}}, None),
        ({"tokenizer_config.json": {"chat_template": [TOOL, {"name": "default", "template": TEMPLATE}]}}, TEMPLATE),
        ({"chat_template.json": {"chat_template": TEMPLATE}, "tokenizer_config.json": TOOL}, TEMPLATE),
        ({"chat_template.jinja": TEMPLATE, "tokenizer_config.json": {"chat_template": "x"}}, TEMPLATE),
    ],
)  # fmt: skip
def test_the_chat_template_is_found_where_transformers_writes_it(tmp_path, files, wanted):
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert chat_template(tmp_path) == wanted


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9, "do_sample": True}, {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"repetition_penalty": 1.05, "top_k": 9, "min_p": None}, {"repetition_penalty": 1.05, "top_k": 9}),
        ({"eos_token_id": [1, 2], "num_beams": 4, "seed": 3}, {}),
    ],
)  # fmt: skip
def test_generation_settings_become_the_defaults_of_sampling(tmp_path, content, wanted):
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert recommended(tmp_path) == wanted


@pytest.mark.parametrize("content", ['{"temperature": -1}', '{"top_p": "much"}', "[]", "{"])
def test_damaged_generation_settings_are_refused(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config\.json"):
        recommended(tmp_path)


def test_a_checkpoint_without_a_mask_gets_one_only_on_request(tmp_path):
    write_checkpoint(tmp_path / "theirs", "template", "Llama")
    with pytest.raises(UserError, match="--add-mask"):
        _ = imported(tmp_path / "theirs", tmp_path / "run").tokenizer.mask_id
    import_checkpoint(str(tmp_path / "theirs"), tmp_path / "masked", add_mask=True)
    run = open_run(tmp_path / "masked")
    assert run.config.model.vocab_size == run.tokenizer.vocab_size == run.tokenizer.mask_id + 1
    assert run.tokenizer.begin_id == BEGIN


def test_an_empty_prompt_that_nothing_begins_follows_an_end_of_text(tmp_path):
    write_checkpoint(tmp_path / "theirs", "no-bos", "Llama")
    tokenizer = imported(tmp_path / "theirs", tmp_path / "run").tokenizer
    assert tokenizer.begun([]) == [END]
    assert tokenizer.begun([7]) == [7]


def test_a_beginning_that_a_template_wrote_is_not_added_twice(tmp_path):
    write_checkpoint(tmp_path / "theirs", "template", "Llama")
    tokenizer = imported(tmp_path / "theirs", tmp_path / "run").tokenizer
    assert tokenizer.begun([BEGIN, 7]) == tokenizer.begun([7]) == [BEGIN, 7]


@pytest.mark.parametrize(
    ("tied", "name", "shape", "words"),
    [
        (
            False,
            "model.layers.0.self_attn.q_proj.bias",
            (32,),
            "weights that Kindling's model lacks: model.layers.0.self",
        ),
        (True, "lm_head.weight", None, "lm_head.weight of its own"),
    ],
)
def test_weights_that_would_change_the_model_are_not_passed_over(tmp_path, tied, name, shape, words):
    write_checkpoint(tmp_path / "theirs", "template", "Llama", tie_word_embeddings=tied)
    path = tmp_path / "theirs" / "model.safetensors"
    weights = load_file(path)
    weights[name] = torch.ones(shape or weights["model.embed_tokens.weight"].shape)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=words):
        import_checkpoint(str(tmp_path / "theirs"), tmp_path / "run")


def test_weights_of_no_use_are_named_and_left_out(tmp_path):
    write_checkpoint(tmp_path / "theirs", "template", "Llama")
    path = tmp_path / "theirs" / "model.safetensors"
    useless = {"v_head.weight": torch.ones(3), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(path) | useless, path, metadata={"format": "pt"})
    notes: list[str] = []
    import_checkpoint(str(tmp_path / "theirs"), tmp_path / "run", note=notes.append)
    assert notes == ["its weights v_head.weight are left out"]
