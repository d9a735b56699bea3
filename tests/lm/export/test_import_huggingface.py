"""Checkpoints of transformers, and Kindling's own exports, as run directories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_prep.errors import UserError
from lm.export.huggingface import public_settings
from lm.export.import_huggingface import import_checkpoint
from lm.runs.directory import open_run
from tests.lm.export.conftest import SHAPES, export, our_logits


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize(("objective", "readout"), [("hybrid", "next_token"), ("masked_token", "masked_token")])
def test_an_export_is_imported_unchanged(make_run, tmp_path, changes, objective, readout):
    run = make_run(objective=objective, **changes)
    import_checkpoint(str(export(run, tmp_path / "out", readout)), tmp_path / "back")
    back = open_run(tmp_path / "back")
    assert back.config == public_settings(run.config)
    assert back.config.data.data == (Path(run.config.data.data[0]).name,)  # the absolute path stays here
    assert back.tokenizer.sha256 == run.tokenizer.sha256
    weights = back.newest().model()
    assert weights.keys() == run.newest().model().keys()
    for name, tensor in run.newest().model().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_stock_checkpoint_is_imported_with_its_logits(dataset, tmp_path, qk_norm):
    """Saved by transformers, in several files, without Kindling's settings."""
    transformers = pytest.importorskip("transformers")
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
        torch.testing.assert_close(our_logits(run, ids, bidirectional=False), theirs(ids).logits, rtol=1e-4, atol=1e-4)


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
        (
            spoil_json(model_type="gpt2"),
            "model_type 'gpt2' cannot be imported: .*; only llama, mistral, qwen3 and eurobert are supported",
        ),
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
def test_what_cannot_be_imported_is_reported_in_one_sentence_and_leaves_nothing(make_run, tmp_path, spoil, words):
    out = export(make_run(objective="next_token"), tmp_path / "out", "next_token")
    spoil(out)
    with pytest.raises(UserError, match=words):
        import_checkpoint(str(out), tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert not (tmp_path / "back.tmp").exists()


def test_an_unknown_name_is_reported(tmp_path):
    for name in ("no/such-model", "not a name!"):
        with pytest.raises(UserError, match="there is no folder"):
            import_checkpoint(name, tmp_path / "back")
