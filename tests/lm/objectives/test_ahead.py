"""Several tokens ahead: the loss and its gradient against plain softmaxes in float64, and the weights over a run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lm.config.consistency import inconsistencies
from lm.config.settings import Config
from lm.data.batch import Vocabulary, rows_of_windows
from lm.model.transformer import Transformer
from lm.objectives.objective import open_objective
from lm.training.gradients import step_gradients
from lm.training.pretraining import train
from tests.conftest import StopAt

END, TOKENS, CONTEXT, ROWS = 0, 40, 12, 6


def settings(**changes) -> Config:
    shape = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "vocab_size": TOKENS, "context_length": CONTEXT}
    rest = {"batch_tokens": ROWS * CONTEXT, "objective": "next_token", "steps": 10, "predict_ahead": 3}
    return Config().replace(**shape | rest | changes)


def random_model(config: Config) -> Transformer:
    model = Transformer(config.model).initialize(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


def batch_of(config: Config, step: int = 0):
    windows = np.random.default_rng(step).integers(2, TOKENS, (ROWS, CONTEXT + 1))
    windows[::2, 5], windows[1, 11] = END, END
    vocabulary = Vocabulary(TOKENS, END, 1)
    rows = replace(rows_of_windows(windows, vocabulary), numbers=step * ROWS + np.arange(ROWS))
    rows.lengths[2] = 9
    objective = open_objective(config, vocabulary)
    return objective, objective.prepare(rows)


def plain_loss(model: Transformer, batch, weights: list[float]) -> torch.Tensor:
    """In float64, one position and one token at a time."""
    log_p = model.double().logits(model(batch.inputs, batch.positions, batch.lo, batch.hi)).double().log_softmax(-1)
    total = log_p.new_zeros(())
    for r in range(batch.parts["next_token"]):
        document = np.cumsum(batch.positions[r].numpy() == 0)
        for i in range(CONTEXT):
            for distance, weight in enumerate([1.0, *weights]):
                ahead = i + distance
                if ahead < CONTEXT and document[ahead] == document[i] and batch.targets[r, ahead] >= 0:
                    total = total - weight * float(batch.loss_weights[r, i]) * log_p[r, i, batch.targets[r, ahead]]
    return total


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradient_are_those_of_a_softmax_for_each_token(softcap, tied):
    config = settings(logit_softcap=softcap, tie_embeddings=tied)
    objective, batch = batch_of(config)
    assert batch.ahead == (0.5, 0.25)
    model = random_model(config)
    losses, _ = step_gradients(objective, model, batch, config, 0)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    reference = random_model(config)
    expected = plain_loss(reference, batch, [0.5, 0.25])
    assert float(losses["next_token"]) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(expected.detach()) > 1.3 * float(plain_loss(reference, batch, []).detach())
    expected.backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(found[name].double(), parameter.grad, rtol=1e-4, atol=1e-6)


def test_micro_batches_add_up_to_the_step():
    config = settings()
    objective, batch = batch_of(config)
    model, gradients = random_model(config), []
    for rows in (0, 1, 4):
        step_gradients(objective, model, batch, config.replace(micro_batch_rows=rows), 0)
        gradients.append(model.embedding.weight.grad.clone())
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)


def test_the_weights_fall_to_nothing_and_the_rest_of_the_run_is_as_without():
    config = settings(ahead_until=0.5)
    assert [len(batch_of(config, step)[1].ahead) for step in range(10)] == [2] * 5 + [0] * 5
    assert [batch_of(config, step)[1].ahead[0] for step in range(5)] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    model = random_model(config)
    found = []
    for each in (config, settings(predict_ahead=1)):
        objective, batch = batch_of(each, 5)
        found.append((step_gradients(objective, model, batch, each, 5), model.embedding.weight.grad.clone()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_only_causal_rows_predict_ahead_and_a_mixture_keeps_their_share():
    config = settings(objective="next_token:0.5,masked_next_token:0.5")
    objective, batch = batch_of(config)
    one = settings(objective="next_token:0.5,masked_next_token:0.5", predict_ahead=1)
    model = random_model(config)
    losses, _ = step_gradients(objective, model, batch, config, 0)
    plain, _ = step_gradients(*batch_of(one)[:1], model, batch_of(one)[1], one, 0)
    assert torch.equal(losses["masked_next_token"], plain["masked_next_token"])
    assert float(losses["next_token"]) == pytest.approx(float(plain_loss(model, batch, [0.5, 0.25]).detach()), rel=1e-5)


def test_a_stopped_run_ends_with_the_same_bits_and_the_same_weights_as_any_model(small, quietly, tmp_path):
    config = small.replace(objective="hybrid", predict_ahead=3, steps=8, checkpoint_every=2, micro_batch_rows=2)
    whole = quietly(config, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        train(config, tmp_path / "stopped", StopAt(3))
    again = quietly(config, tmp_path / "stopped")
    expected, found = (run.newest().model() for run in (whole, again))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert expected.keys() == Transformer(config.model).state_dict().keys()


def test_it_is_refused_where_no_row_is_causal():
    assert "predict_ahead is for next_token" in next(inconsistencies(settings(objective="masked_token")))
    assert not [*inconsistencies(settings(objective="hybrid"))]
