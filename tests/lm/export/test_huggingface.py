"""Exported models against the stock classes of transformers."""

from __future__ import annotations

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from data_prep.errors import UserError
from lm.export.huggingface import choose_readout, export_huggingface, tokenizer_with_start, tokenizer_without_start
from lm.export.import_huggingface import import_checkpoint
from lm.export.stock_architectures import STOCK_CLASSES, model_config, stock_class, stock_config, weight_names
from lm.inference.generator import stream
from lm.inference.sampling import Sampling
from lm.kernels import masks
from lm.model.transformer import Transformer
from lm.runs import checkpoint
from lm.runs.checkpoint_writer import snapshot
from lm.runs.directory import Run, open_run, plain_settings

transformers = pytest.importorskip("transformers")

SHAPES = [
    {"num_layers": 1, "hidden_size": 32, "num_heads": 2},
    {"num_layers": 3, "hidden_size": 48, "num_heads": 6, "num_key_value_heads": 2, "tie_embeddings": False},
    {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_key_value_heads": 1, "rope_theta": 50_000.0},
]


def run_of(config, tokenizer, path) -> Run:
    """A run directory with weights far from their start, untrained."""
    config = config.replace(vocab_size=tokenizer.vocab_size, context_length=256, batch_tokens=256)
    model = Transformer(config.model).initialise(1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    path.mkdir()
    tokenizer.save(path / "tokenizer.json")
    config.save(path / "config.toml")
    state = {"tokenizer_sha256": tokenizer.sha256, "config": plain_settings(config)}
    checkpoint.save(path / "checkpoints", 7, snapshot(model.state_dict()), {}, state)
    return open_run(path)


@pytest.fixture
def make_run(small, dataset, tmp_path):
    return lambda **changes: run_of(small.replace(**changes), dataset.tokenizer, tmp_path / "run")


def exported(run: Run, out, readout: str):
    export_huggingface(run, out, run.newest(), readout)
    return out


def our_logits(run: Run, ids: torch.Tensor, *, both_ways: bool) -> torch.Tensor:
    model = run.load_model(torch.device("cpu"))
    rows, length = ids.shape
    lo, hi = masks.bidirectional(rows, length) if both_ways else masks.causal(rows, length)
    positions = torch.arange(length).expand(rows, -1)
    with torch.no_grad():
        return model.logits(model(ids, positions, lo, hi))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_causal_logits_are_those_of_the_stock_class(make_run, tmp_path, shape, qk_norm):
    run = make_run(objective="hybrid", qk_norm=qk_norm, **shape)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported(run, tmp_path / "out", "next_token"))
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    ids = torch.randint(0, run.config.model.vocab_size, (3, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = theirs(ids).logits
    assert logits.std() > 0.5
    torch.testing.assert_close(our_logits(run, ids, both_ways=False), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("objective", ["masked_token", "hybrid_unshifted"])
def test_masked_logits_are_those_of_the_stock_class(make_run, tmp_path, shape, objective):
    run = make_run(objective=objective, **shape)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(exported(run, tmp_path / "out", "masked_token"))
    assert type(theirs).__name__ == "EuroBertForMaskedLM"
    ids = torch.randint(0, run.config.model.vocab_size, (3, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = theirs(ids).logits
    torch.testing.assert_close(our_logits(run, ids, both_ways=True), logits, rtol=1e-4, atol=1e-4)


def test_greedy_text_is_the_same_for_200_tokens(make_run, tmp_path):
    run = make_run(objective="next_token", **SHAPES[1])
    out = exported(run, tmp_path / "out", "next_token")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    prompt = "The old miller found"
    model, greedy = run.load_model(torch.device("cpu")), Sampling(temperature=0, max_new_tokens=200)
    events = stream(model, run.tokenizer, prompt, greedy, 256)
    ours = [event.token for event in events if event.token is not None]
    inputs = tokenizer(prompt, return_tensors="pt")
    made = theirs.generate(**inputs, max_new_tokens=200, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert len(ours) > 50
    assert made[: len(ours)] == ours


@pytest.mark.parametrize("text", ["", "a", "The café — naïve 12345 \n\n\tx", "<|endoftext|>", "日本語 🙂"])
def test_the_tokenizer_gives_the_same_ids_after_the_end_of_text_token(make_run, tmp_path, text):
    run = make_run(objective="next_token")
    theirs = transformers.AutoTokenizer.from_pretrained(exported(run, tmp_path / "out", "next_token"))
    ours = run.tokenizer.encode(text)
    if "<|" not in text:  # there a text may spell a special token, here it may not
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours
        assert theirs(text)["input_ids"] == [run.tokenizer.end_of_text_id, *ours]
        assert theirs.decode(ours) == text
    assert theirs.mask_token_id == run.tokenizer.mask_id
    assert theirs.pad_token_id == run.tokenizer.padding_id
    assert theirs.eos_token_id == run.tokenizer.end_of_text_id


def test_nothing_in_the_folder_carries_code(make_run, tmp_path):
    out = exported(make_run(objective="next_token"), tmp_path / "out", "next_token")
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "kindling.toml", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert "auto_map" not in json.loads((out / "config.json").read_text())


def test_the_card_has_losses_and_limits(trained, tmp_path):
    out = exported(trained, tmp_path / "out", "next_token")
    card = (out / "README.md").read_text()
    for words in ("pipeline_tag: text-generation", "LlamaForCausalLM", "100 steps", "## Limits", "no instructions"):
        assert words in card, words


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize(("objective", "readout"), [("hybrid", "next_token"), ("masked_token", "masked_token")])
def test_what_was_exported_and_imported_is_what_it_was(make_run, tmp_path, changes, objective, readout):
    run = make_run(objective=objective, **changes)
    import_checkpoint(str(exported(run, tmp_path / "out", readout)), tmp_path / "back")
    back = open_run(tmp_path / "back")
    assert back.config == run.config
    assert back.tokenizer.sha256 == run.tokenizer.sha256
    weights = back.newest().model()
    assert weights.keys() == run.newest().model().keys()
    for name, tensor in run.newest().model().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_stock_checkpoint_is_imported_with_its_logits(dataset, tmp_path, qk_norm):
    """Made by transformers, in several files, without anything of ours beside it."""
    kind = "Qwen3" if qk_norm else "Llama"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=dataset.tokenizer.vocab_size, hidden_size=48, intermediate_size=100, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128, rope_theta=30_000.0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    theirs.save_pretrained(tmp_path / "stock", max_shard_size="40KB")
    dataset.tokenizer.save(tmp_path / "stock" / "tokenizer.json")
    assert len(list((tmp_path / "stock").glob("*.safetensors"))) > 1
    import_checkpoint(str(tmp_path / "stock"), tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert (run.config.model.rope_theta, run.config.data.context_length) == (30_000.0, 128)
    ids = torch.randint(0, 400, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(our_logits(run, ids, both_ways=False), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_every_weight_has_a_name_and_none_has_two(small):
    for changes in ({}, {"qk_norm": True, "tie_embeddings": False}):
        model = Transformer(small.replace(vocab_size=300, **changes).model)
        names = weight_names(model.config)
        assert names.keys() == model.state_dict().keys()
        assert len(set(names.values())) == len(names)


def test_a_config_is_read_back_as_the_shape_it_was_made_from(small, dataset):
    for stock in STOCK_CLASSES:
        config = small.replace(vocab_size=400, qk_norm=stock.qk_norm, head_size=20, rope_theta=123.0)
        shape, found = model_config(stock_config(config, dataset.tokenizer, stock))
        assert found is stock
        assert (shape.head_size, shape.rope_theta, shape.qk_norm) == (20, 123.0, stock.qk_norm)
        assert shape.feed_forward_size == config.model.feed_forward_width


@pytest.mark.parametrize(
    ("changes", "readout", "words"),
    [
        ({"activation": "relu2"}, "next_token", "the activation relu2"),
        ({"logit_softcap": 15.0}, "next_token", "logit_softcap 15"),
        ({"qk_norm": True}, "masked_token", "qk_norm in a masked model"),
        ({}, "masked_next_token", "at the place before it"),
        ({"activation": "relu2", "logit_softcap": 5.0}, "next_token", "relu2 .*; nor logit_softcap 5"),
    ],
)
def test_what_no_stock_class_has_is_refused_with_its_reason(small, changes, readout, words):
    with pytest.raises(UserError, match=words):
        stock_class(small.replace(**changes).model, readout)


def test_the_readout_is_the_first_that_can_be_exported(make_run):
    run = make_run(objective="hybrid")
    assert choose_readout(run, None) == "next_token"
    with pytest.raises(UserError, match="was trained for next_token and masked_next_token, not for masked_token"):
        choose_readout(run, "masked_token")
    with pytest.raises(UserError, match="hybrid_unshifted can be exported"):
        choose_readout(run, "masked_next_token")


def test_a_folder_with_something_in_it_is_not_written_over(make_run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not an empty folder: choose another --out"):
        exported(make_run(objective="next_token"), tmp_path / "out", "next_token")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    assert not (tmp_path / ".out.partial").exists()


def test_the_start_token_comes_and_goes(dataset):
    there = tokenizer_with_start(dataset.tokenizer)
    assert there != dataset.tokenizer.description
    assert tokenizer_without_start(there) == dataset.tokenizer.description


def spoil_json(**changes):
    def spoil(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def huge_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def overlapping(folder):
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_json(model_type="gpt2"), "model_type 'gpt2' cannot be imported: only llama, qwen3, eurobert"),
        (spoil_json(attention_bias=True), "it has attention_bias True"),
        (spoil_json(hidden_act="gelu"), "hidden_act 'gelu'"),
        (spoil_json(rope_parameters={"rope_type": "yarn"}), "scaled rotary positions"),
        (spoil_json(num_hidden_layers=9), r"model.layers.\d.* is missing"),
        (spoil_json(hidden_size=64, head_dim=16), "has the shape"),
        (spoil_json(num_hidden_layers=9_000_000), "model.layers.20.input_layernorm is missing"),
        (spoil_json(num_hidden_layers=10**12), "is damaged: a size of 1000000000000"),
        (spoil_json(num_attention_heads=0), "is damaged: a size of 0"),
        (spoil_json(hidden_size="wide"), "is damaged: invalid literal"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json: it is nested too deeply"),
        (
            lambda folder: (folder / "tokenizer.json").write_text("[" * 100_000),
            "tokenizer.json: it is nested too deeply",
        ),
        (lambda folder: (folder / "config.json").write_text("[1, 2"), "cannot read .*config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "nothing is unpickled"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"PK\3\4pickle"), "is damaged"),
        (huge_header, "is damaged"),
        (overlapping, "is damaged"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"model": 1}'), "is not a readable tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot read .*tokenizer.json"),
    ],
)
def test_what_cannot_be_imported_is_told_in_one_sentence_and_leaves_nothing(make_run, tmp_path, spoil, words):
    out = exported(make_run(objective="next_token"), tmp_path / "out", "next_token")
    spoil(out)
    with pytest.raises(UserError, match=words):
        import_checkpoint(str(out), tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert not (tmp_path / ".back.partial").exists()


def test_a_name_that_is_nowhere_is_told(tmp_path):
    for name in ("no/such-model", "not a name!"):
        with pytest.raises(UserError, match="there is no folder"):
            import_checkpoint(name, tmp_path / "back")
