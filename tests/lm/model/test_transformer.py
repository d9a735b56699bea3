from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from lm.config.model_settings import ModelConfig
from lm.kernels import dispatch, masks, rotary
from lm.model.transformer import Block, Transformer, rotary_table

BASE = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 23}
VARIANTS = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "one key head": {"num_key_value_heads": 1},
    "untied": {"tie_embeddings": False},
    "qk_norm": {"qk_norm": True},
    "relu2": {"activation": "relu2", "feed_forward_size": 24},
    "softcap": {"logit_softcap": 3.0},
    "wide heads": {"head_size": 10, "rope_theta": 500.0},
}


def model_of(seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> Transformer:
    """A model in evaluation mode with all parameters drawn at random, so that no part of it is idle."""
    model = Transformer(ModelConfig(**(BASE | changes))).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 0.3 * noise)
    return model


def packed_inputs(rows: int, length: int, seed: int = 0, ends: float = 0.2):
    """Random tokens, cut into documents; the first half of the rows is causal, the others are read both ways."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randint(1, BASE["vocab_size"], (rows, length), generator=draw)
    inputs[torch.rand(rows, length, generator=draw) < ends] = 0
    lo, hi = masks.packed(inputs == 0, torch.arange(rows) >= rows / 2)
    return inputs, torch.arange(length) - lo, lo, hi


def plain_forward(model: Transformer, inputs, positions, lo, hi) -> np.ndarray:
    """The transformer from its equations: numpy, float64, one row, one head and one query at a time."""
    w = {name: tensor.detach().double().numpy() for name, tensor in model.named_parameters()}
    c = model.config
    d, group = c.head_width, c.num_heads // c.key_value_heads

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_epsilon) * weight

    def turned(x, place):  # rotary positions as multiplication by e^(i·place·theta^(-2k/d))
        z = (x[: d // 2] + 1j * x[d // 2 :]) * np.exp(1j * place * c.rope_theta ** (-2 * np.arange(d // 2) / d))
        return np.concatenate([z.real, z.imag])

    rows = []
    for row in range(len(inputs)):
        x = w["embedding.weight"][inputs[row]]
        places, length = positions[row].tolist(), inputs.shape[1]
        for layer in range(c.num_layers):
            part = {n.split(".", 2)[2]: t for n, t in w.items() if n.startswith(f"blocks.{layer}.")}
            y = norm(x, part["attention_norm.weight"])
            heads = np.zeros((length, c.num_heads * d))
            for h in range(c.num_heads):
                q = y @ part["attention.query.weight"][h * d : (h + 1) * d].T
                shared = slice(h // group * d, (h // group + 1) * d)
                k, v = y @ part["attention.key.weight"][shared].T, y @ part["attention.value.weight"][shared].T
                if c.qk_norm:
                    q = norm(q, part["attention.query_norm.weight"])
                    k = norm(k, part["attention.key_norm.weight"])
                q = np.stack([turned(vector, place) for vector, place in zip(q, places, strict=True)])
                k = np.stack([turned(vector, place) for vector, place in zip(k, places, strict=True)])
                for i in range(length):
                    seen = slice(int(lo[row, i]), int(hi[row, i]))
                    scores = np.exp(k[seen] @ q[i] / math.sqrt(d))
                    heads[i, h * d : (h + 1) * d] = scores / scores.sum() @ v[seen]
            x = x + heads @ part["attention.output.weight"].T
            y = norm(x, part["feed_forward_norm.weight"])
            up = y @ part["feed_forward.up.weight"].T
            if c.activation == "swiglu":
                gate = y @ part["feed_forward.gate.weight"].T
                inner = gate / (1 + np.exp(-gate)) * up
            else:
                inner = np.maximum(up, 0) ** 2
            x = x + inner @ part["feed_forward.down.weight"].T
        rows.append(norm(x, w["norm.weight"]))
    return np.stack(rows)


def plain_loss(model: Transformer, hidden: np.ndarray, targets, weights) -> float:
    head = dict(model.named_parameters())["embedding.weight" if model.head is None else "head.weight"]
    logits = hidden @ head.detach().double().numpy().T
    if cap := model.config.logit_softcap:
        logits = cap * np.tanh(logits / cap)
    losses = (
        np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets.clamp(min=0).numpy()[..., None], -1)[..., 0]
    )
    return float((losses * weights.numpy() * (targets.numpy() >= 0)).sum())


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_hidden_states_and_loss_equal_a_plain_implementation(changes):
    model = model_of(**changes)
    inputs, positions, lo, hi = packed_inputs(4, 9)
    hidden = model(inputs, positions, lo, hi)
    expected = plain_forward(model, inputs, positions, lo, hi)
    np.testing.assert_allclose(hidden.detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    targets = torch.randint(-5, BASE["vocab_size"], inputs.shape)
    weights = torch.rand(inputs.shape)
    loss = model.loss(hidden, targets, weights).item()
    assert loss == pytest.approx(plain_loss(model, expected, targets, weights), rel=1e-5)
    logits = model.logits(hidden)
    assert logits.shape == (*inputs.shape, BASE["vocab_size"])
    if changes.get("logit_softcap"):
        assert logits.abs().max() < 3


def test_grouped_query_attention_is_attention_with_its_key_heads_repeated():
    grouped = model_of(num_key_value_heads=2)
    full = model_of()
    state = dict(grouped.state_dict())
    for name in state:
        if name.endswith(("attention.key.weight", "attention.value.weight")):
            state[name] = state[name].view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(state)
    batch = packed_inputs(2, 8)
    torch.testing.assert_close(grouped(*batch), full(*batch))


def test_only_an_untied_head_has_weights_of_its_own():
    tied, untied = model_of(), model_of(tie_embeddings=False)
    assert tied.head_weight is tied.embedding.weight
    assert untied.head_weight is untied.head.weight
    assert len(list(untied.parameters())) == len(list(tied.parameters())) + 1


def test_blocks_start_as_the_identity():
    model = Transformer(ModelConfig(**BASE)).initialize(3)
    inputs, positions, lo, hi = packed_inputs(2, 8)
    expected = torch.nn.functional.rms_norm(model.embedding(inputs), (32,), eps=1e-6)
    torch.testing.assert_close(model(inputs, positions, lo, hi), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_the_first_loss_is_that_of_knowing_nothing(tied):
    vocabulary = 500
    model = Transformer(ModelConfig(**(BASE | {"vocab_size": vocabulary, "tie_embeddings": tied}))).initialize(0)
    inputs = torch.randint(0, vocabulary, (8, 32))
    hidden = model(inputs, torch.arange(32).expand(8, 32), *masks.causal(8, 32))
    targets = torch.randint(0, vocabulary, (8, 32))
    loss = float(model.loss(hidden, targets, torch.full((8, 32), 1 / 256)).detach())
    assert loss == pytest.approx(math.log(vocabulary), abs=0.1)


def test_initial_weights_depend_on_the_seed_alone():
    first, again, other = (Transformer(ModelConfig(**BASE)).initialize(seed) for seed in (5, 5, 6))
    torch.manual_seed(99)  # the global stream has no say
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        if name.endswith((".output.weight", ".down.weight")) or a.ndim == 1:
            assert a.unique().tolist() == [1.0 if a.ndim == 1 else 0.0]
        else:
            assert not torch.equal(a, c)
            wanted = 0.02 if name == "embedding.weight" else (3 * a.shape[1]) ** -0.5
            assert float(a.detach().std()) == pytest.approx(wanted, rel=0.15)


@pytest.mark.parametrize("size", [32, 128])
def test_the_ends_of_a_block_may_start_above_zero(size):
    shape = ModelConfig(**(BASE | {"hidden_size": size}))
    model, off = Transformer(shape).initialize(5, output_init=0.5), Transformer(shape).initialize(5, output_init=0.0)
    for name, weight in model.named_parameters():
        if name.endswith((".output.weight", ".down.weight")):
            assert float(weight.detach().std()) == pytest.approx(0.5 * size**-0.5, rel=0.1)
    usual = Transformer(shape).initialize(5).named_parameters()
    for (name, same), weight in zip(usual, off.parameters(), strict=True):
        assert torch.equal(same, weight), name


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_parameter_counts_add_up(changes):
    model = Transformer(ModelConfig(**(BASE | changes)))
    counts = model.parameter_counts()
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert counts["blocks"] == sum(parameter.numel() for parameter in model.blocks.parameters())
    assert counts["embedding"] == 23 * 32 * (1 if model.config.tie_embeddings else 2)
    assert counts["total"] == counts["blocks"] + counts["embedding"] + 32
    assert f"{counts['total'] / 1e6:.2f}M parameters" in model.describe()


@pytest.mark.parametrize("of", [masks.causal, masks.bidirectional])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_flops_are_those_that_pytorch_counts_in_the_plain_formulas(monkeypatch, changes, of):
    monkeypatch.setenv(dispatch.SETTING, "reference")
    model = model_of(**changes)
    inputs = torch.randint(0, BASE["vocab_size"], (3, 11))
    with FlopCounterMode(display=False) as counter:
        hidden = model(inputs, torch.arange(11).expand(3, 11), *of(3, 11))
        model.loss(hidden, inputs, torch.ones(3, 11)).backward()
    assert counter.get_total_flops() == 33 * model.flops_per_token(11)


@pytest.mark.parametrize("both_ways", [False, True])
def test_a_document_is_not_touched_by_the_others_in_its_row(both_ways):
    model = model_of()
    inputs = torch.tensor([[0, 4, 5, 6, 0, 7, 8, 9, 0, 3, 2]])
    lo, hi = masks.packed(inputs == 0, torch.tensor([both_ways]))
    positions = torch.arange(11) - lo
    before = model(inputs, positions, lo, hi)
    changed = inputs.clone()
    changed[0, [1, 2, 9]] = 11
    after = model(changed, positions, lo, hi)
    assert torch.equal(before[:, 4:8], after[:, 4:8])
    assert not torch.equal(before[:, 1:4], after[:, 1:4])
    alone = model(inputs[:, 4:8], torch.arange(4)[None], *(masks.bidirectional if both_ways else masks.causal)(1, 4))
    torch.testing.assert_close(before[:, 4:8], alone)


def hidden_and_gradients(model: Transformer) -> list[torch.Tensor]:
    inputs, positions, lo, hi = packed_inputs(4, 24)
    hidden = model(inputs, positions, lo, hi)
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    return [hidden, *torch.autograd.grad(hidden, list(model.parameters()), direction)]


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}], ids=["plain", "grouped"])
def test_blocks_of_two_operations_have_the_bits_of_separate_ones(monkeypatch, changes):
    model = model_of(dtype=torch.float32, **changes)
    calls = []
    in_two_operations = Block.in_two_operations
    monkeypatch.setattr(Block, "in_two_operations", lambda *given: (calls.append(0), in_two_operations(*given))[1])
    together = hidden_and_gradients(model)
    assert len(calls) == 2
    monkeypatch.setattr(Block, "is_plain", False)
    assert all(map(torch.equal, together, hidden_and_gradients(model)))
    assert len(calls) == 2


@pytest.mark.parametrize("changes", [{"qk_norm": True}, {"activation": "relu2"}, {"dropout": 0.5}], ids=str)
def test_blocks_are_computed_in_parts_where_two_operations_would_not_do(monkeypatch, changes):
    monkeypatch.setattr(Block, "in_two_operations", None)
    hidden_and_gradients(model_of(dtype=torch.float32, **changes).train())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_residual_stream_is_in_its_own_precision_under_autocast(training, precision):
    model = model_of(dtype=torch.float32, residual_precision=precision).train(training)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, given, out: seen.extend([given[0].dtype, out.dtype]))
    model(*packed_inputs(2, 8))
    assert set(seen) == {torch.float32}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        model(*packed_inputs(2, 8))
    rounded = training and precision == "bfloat16"
    assert set(seen) == {torch.bfloat16 if rounded else torch.float32}


def test_a_residual_stream_in_bfloat16_gives_nearly_the_same_gradient():
    inputs, *rest = packed_inputs(4, 64)
    targets, ones, gradients = inputs.roll(-1, 1), torch.ones(inputs.shape), []
    for precision in ("float32", "bfloat16"):
        model = model_of(dtype=torch.float32, residual_precision=precision).train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(model(inputs, *rest), targets, ones)
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        assert all(part.dtype == torch.float32 for part in gradient)
        gradients.append(torch.cat([part.flatten() for part in gradient]))
    precise, rounded = gradients
    assert 0 < (precise - rounded).norm() < 0.05 * precise.norm()


def test_dropout_acts_in_training_only():
    model = model_of(dropout=0.5)
    batch = packed_inputs(2, 8)
    assert torch.equal(model(*batch), model(*batch))
    torch.testing.assert_close(model(*batch), model_of()(*batch))
    model.train()
    torch.manual_seed(0)
    first = model(*batch)
    assert not torch.equal(first, model(*batch))
    torch.manual_seed(0)
    assert torch.equal(first, model(*batch))


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(-500, 500))
def test_rotated_heads_meet_at_their_distance_alone(a, b, shift):
    shift = max(shift, -a, -b)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(first, second):
        tables = [rotary_table(torch.tensor([[place]]), 16, 10_000.0) for place in (first, second)]
        return float((rotary(q, *tables[0]) * rotary(k, *tables[1])).sum())

    assert score(a, b) == pytest.approx(score(a + shift, b + shift), abs=1e-4)
    at = rotary_table(torch.tensor([[a]]), 16, 10_000.0)
    assert float(rotary(q, *at).norm()) == pytest.approx(float(q.norm()), rel=1e-6)


def test_position_zero_is_not_turned():
    x = torch.randn(1, 1, 2, 8)
    assert torch.equal(rotary(x, *rotary_table(torch.zeros(1, 1, dtype=torch.long), 8, 10_000.0)), x)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "logit_softcap": 2.0, "num_key_value_heads": 1}])
def test_the_gradient_of_the_whole_loss_passes_gradcheck(changes):
    small = {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "vocab_size": 5, "feed_forward_size": 6}
    model = model_of(**(small | changes))
    inputs = torch.tensor([[0, 1, 2, 0, 3], [0, 4, 4, 1, 2]])
    lo, hi = masks.packed(inputs == 0, torch.tensor([False, True]))
    targets = torch.tensor([[1, 2, -100, 3, 0], [-100, 4, 1, -100, 2]])
    weights = torch.rand(2, 5, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]

    def loss(*parameters):
        def run(inputs):
            return torch.func.functional_call(
                _WithLoss(model), {f"model.{n}": p for n, p in zip(names, parameters, strict=True)}, (inputs,)
            )

        return run((inputs, torch.arange(5) - lo, lo, hi, targets, weights))

    assert torch.autograd.gradcheck(loss, tuple(p.detach().requires_grad_() for p in model.parameters()), atol=1e-4)


class _WithLoss(torch.nn.Module):
    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch):
        inputs, positions, lo, hi, targets, weights = batch
        return self.model.loss(self.model(inputs, positions, lo, hi), targets, weights)
