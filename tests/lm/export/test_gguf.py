"""GGUF files: read back with the gguf package, and, where llama-cpp-python is installed, run by llama.cpp."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from data_prep.errors import UserError
from data_prep.settings import TokenizerSettings
from data_prep.tokenizers.tokenizer import Tokenizer
from data_prep.tokenizers.training import train_tokenizer
from lm.export.gguf import OUTTYPES, export_gguf, pre_tokenizer_name, tensors
from lm.export.stock_architectures import STOCK_CLASSES
from lm.inference.chat_template import CHAT_TEMPLATE, PLAIN_TURNS
from lm.inference.generator import stream
from lm.inference.sampling import Sampling
from lm.kernels import masks
from lm.kernels.rotary import interleave_halves
from lm.model.transformer import rotary_table
from tests.conftest import loaded, sentences
from tests.lm.export.conftest import SHAPES

gguf = pytest.importorskip("gguf")


def exported(run, path, readout="next_token"):
    export_gguf(run, path, run.newest(), readout)
    return path


def test_interleaved_rows_rotated_as_neighbors_give_the_scores_of_halves(small):
    """Scores of queries and keys, computed with llama.cpp's pairs from reordered weights, are Kindling's."""
    config = small.replace(num_heads=3, head_size=8).model
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(24, 32, generator=draw) for _ in range(2))
    x = torch.randn(1, 5, 32, generator=draw)
    cos, sin = rotary_table(torch.arange(5)[None], 8, 10_000.0)

    def by_halves(weight):
        first, second = (x @ weight.T).view(1, 5, 3, 8).chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    def by_neighbors(weight):
        heads = (x @ interleave_halves(weight, config.head_width).T).view(1, 5, 3, 4, 2)
        even, odd = heads[..., 0], heads[..., 1]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)

    ours = torch.einsum("bqhd,bkhd->bhqk", by_halves(query), by_halves(key))
    theirs = torch.einsum("bqhd,bkhd->bhqk", by_neighbors(query), by_neighbors(key))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_file_holds_shape_tokenizer_and_every_weight(make_run, tmp_path, shape, qk_norm):
    run = make_run(objective="next_token", qk_norm=qk_norm, **shape)
    reader = gguf.GGUFReader(exported(run, tmp_path / "model.gguf"))
    kind = "qwen3" if qk_norm else "llama"
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == kind
    assert fields[f"{kind}.block_count"] == run.config.model.num_layers
    assert fields[f"{kind}.attention.head_count_kv"] == run.config.model.key_value_heads
    assert fields[f"{kind}.rope.freq_base"] == run.config.model.rope_theta
    assert fields["tokenizer.ggml.bos_token_id"] == run.tokenizer.end_of_text_id
    assert len(fields["tokenizer.ggml.tokens"]) == run.config.model.vocab_size
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    stock = next(stock for stock in STOCK_CLASSES if stock.model_type == kind)
    wanted = tensors(run.load_model(torch.device("cpu")), stock)
    assert stored.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert np.array_equal(stored[name], tensor.numpy()), name


def test_a_chat_template_comes_along_and_a_run_without_one_has_plain_turns(make_run, tmp_path):
    run = make_run(objective="next_token")
    read = gguf.GGUFReader(exported(run, tmp_path / "plain.gguf")).fields["tokenizer.chat_template"].contents()
    assert read.endswith(PLAIN_TURNS)
    (run.path / CHAT_TEMPLATE).write_text("{{ bos_token }}{{ messages[0].content }}…")
    read = gguf.GGUFReader(exported(run, tmp_path / "own.gguf")).fields["tokenizer.chat_template"].contents()
    assert read == "{{ bos_token }}{{ messages[0].content }}…"


def rounding_bound(weights: np.ndarray, outtype: str) -> np.ndarray:
    """How far a value may be from its weight: half a step of the type's grid, with float32's own rounding."""
    if outtype == "q8_0":  # 127 steps on each side of zero to a block's largest magnitude; its scale is a float16
        blocks = np.abs(weights).reshape(-1, 32).max(1, keepdims=True)
        return np.broadcast_to(blocks / 127 * (0.5 + 127 * 2.0**-11) + 1e-7, (len(blocks), 32)).reshape(weights.shape)
    mantissa = {"f32": 24, "f16": 11, "bf16": 8}[outtype]
    return np.abs(weights) * 2.0**-mantissa + (2.0**-25 if outtype == "f16" else 0)  # f16 below 2 ** -14: a fixed grid


@pytest.mark.parametrize("outtype", OUTTYPES)
def test_each_type_stores_matrices_within_its_rounding_and_vectors_exactly(make_run, tmp_path, outtype):
    run = make_run(objective="next_token", qk_norm=True, feed_forward_size=96, **SHAPES[0])
    export_gguf(run, tmp_path / "model.gguf", run.newest(), "next_token", outtype)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    named = {"f32": "ALL_F32"}.get(outtype, f"MOSTLY_{outtype.upper()}")
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[named]
    stock = next(stock for stock in STOCK_CLASSES if stock.model_type == "qwen3")
    wanted = tensors(run.load_model(torch.device("cpu")), stock)
    largest = 0.0
    for tensor in reader.tensors:
        weights = wanted.pop(tensor.name).numpy()
        assert tensor.tensor_type.name == (outtype.upper() if weights.ndim > 1 else "F32")
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        difference = np.abs(values.reshape(weights.shape) - weights)
        assert (difference <= (rounding_bound(weights, outtype) if weights.ndim > 1 else 0)).all(), tensor.name
        largest = max(largest, difference.max())
    assert not wanted
    assert (largest > 0) == (outtype != "f32")


def test_a_matrix_that_q8_0_cannot_divide_is_f16_and_named(make_run, tmp_path, capsys):
    run = make_run(objective="next_token", **SHAPES[1])  # 48 wide
    export_gguf(run, tmp_path / "model.gguf", run.newest(), "next_token", "q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert (types["blk.0.attn_q.weight"], types["blk.0.ffn_down.weight"]) == ("F16", "Q8_0")
    assert (
        "blk.0.attn_q.weight is written as f16: q8_0 needs rows of a multiple of 32, not 48" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "qwen35"),
        ({"word_split": "qwen35", "digits": "single"}, "qwen35"),
        ({"word_split": "gpt2"}, "gpt-2"),
        ({"word_split": "gpt2", "digits": "single"}, "starcoder"),
        ({"word_split": "llama3"}, "llama-bpe"),
        ({"word_split": "qwen2"}, "qwen2"),
        ({"word_split": "llama3", "digits": "single"}, "qwen2"),
    ],
)
def test_each_pre_tokenizer_has_its_name_in_llama_cpp(settings, name):
    tokenizer = train_tokenizer(iter([sentences(50, 0)]), TokenizerSettings(vocab_size=300, **settings))
    assert pre_tokenizer_name(tokenizer) == name


@pytest.mark.parametrize(("kind", "size"), [("bytes", 300), ("characters", 300), ("wordpiece", 600), ("unigram", 300)])
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(kind, size):
    tokenizer = train_tokenizer(iter([sentences(200, 0)]), TokenizerSettings(tokenizer_kind=kind, vocab_size=size))
    with pytest.raises(UserError, match=r"llama\.cpp has no equivalent of this tokenizer"):
        pre_tokenizer_name(tokenizer)


def test_a_tokenizer_whose_merges_spell_a_special_token_is_refused():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {entry: n for n, entry in enumerate(["<<>>", *letters, "<<", ">>"])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[("<", "<"), (">", ">"), ("<<", ">>")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert pre_tokenizer_name(Tokenizer(backend)) == "gpt-2"
    backend.add_special_tokens(["<<>>"])
    with pytest.raises(UserError, match=r"llama\.cpp has no equivalent of this tokenizer"):
        pre_tokenizer_name(Tokenizer(backend))


def test_existing_files_and_other_readouts_are_refused_and_nothing_is_left(make_run, tmp_path):
    run = make_run(objective="masked_token")
    with pytest.raises(UserError, match="from left to right"):
        exported(run, tmp_path / "model.gguf", "masked_token")
    (tmp_path / "there.gguf").write_text("precious")
    with pytest.raises(UserError, match="already exists"):
        exported(run, tmp_path / "there.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there.gguf"]


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_writes_the_same_greedy_tokens(make_run, tmp_path, shape, qk_norm):
    import llama_cpp

    run = make_run(objective="next_token", qk_norm=qk_norm, **shape)
    path = exported(run, tmp_path / "model.gguf")
    float32 = llama_cpp.GGML_TYPE_F32  # its cache of keys and values is float16 otherwise
    theirs = llama_cpp.Llama(
        str(path), n_ctx=256, n_threads=1, logits_all=True, verbose=False, type_k=float32, type_v=float32
    )
    text = "The old miller found 12345 owls — naïve, isn't it?\n\n  x"
    ids = theirs.tokenize(text.encode(), add_bos=True, special=False)
    assert ids == [run.tokenizer.end_of_text_id, *run.tokenizer.encode(text)]
    theirs.eval(ids)
    model = run.load_model(torch.device("cpu"))
    lo, hi = masks.causal(1, len(ids))
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([ids]), torch.arange(len(ids))[None], lo, hi))[0]
    np.testing.assert_allclose(np.array(theirs.scores)[: len(ids)], logits.numpy(), rtol=1e-3, atol=2e-3)
    events = stream(loaded(run), text, Sampling(temperature=0, max_new_tokens=50))
    wanted = [event.token for event in events if event.token is not None]
    made: list[int] = []
    for _ in wanted:
        last = np.array(theirs.scores[theirs.n_tokens - 1])
        last[[run.tokenizer.mask_id, run.tokenizer.padding_id]] = -np.inf  # as sample.py does
        made.append(int(last.argmax()))
        theirs.eval(made[-1:])
    assert len(made) > 10
    assert made == wanted
