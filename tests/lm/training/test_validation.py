from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from lm.data.rows import ValidationRows, vocabulary_of
from lm.objectives.text import validation_batch
from lm.training.validation import rows_of_validation, validate_readouts


@pytest.fixture(scope="module")
def model(random_run):
    return random_run.load_model(torch.device("cpu"))


def causal_loss_by_hand(model, dataset, context: int) -> tuple[float, int]:
    """Cross-entropy of the validation stream, one window and one document at a time, without any mask."""
    split = dataset.split("validation")
    stream = split.read(0, split.tokens).astype(np.int64)
    total, count = 0.0, 0
    for start in range(0, len(stream), context):
        window = np.concatenate([stream[start - 1 : start] if start else stream[-1:], stream[start : start + context]])
        starts = [0, *(np.flatnonzero(window[1:-1] == 0) + 1).tolist(), len(window) - 1]
        for begin, end in itertools.pairwise(starts):
            inputs, targets = torch.tensor(window[begin:end]), torch.tensor(window[begin + 1 : end + 1])
            length = len(inputs)
            lo, hi = torch.zeros(1, length), torch.arange(1, length + 1)[None]
            with torch.no_grad():
                hidden = model(inputs[None], torch.arange(length)[None], lo.int(), hi.int())
                logits = (hidden[0] @ model.embedding.weight.T).double()
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            count += length
    return total, count


def test_the_causal_loss_equals_a_sum_over_documents_read_one_by_one(model, dataset, random_run):
    total, count = causal_loss_by_hand(model, dataset, 32)
    split = dataset.split("validation")
    assert count == split.tokens
    loss = validate_readouts(model, dataset, random_run.config, rows=0, every_token=True)["next_token"]
    assert loss["predicted"] == count
    assert loss["nats_per_token"] == pytest.approx(total / count, rel=1e-5)
    assert loss["bits_per_byte"] == pytest.approx(total / math.log(2) / split.text_bytes, rel=1e-5)


def masked_loss_by_hand(model, dataset, config) -> tuple[float, int]:
    """Of every fold, the cross-entropy at each hidden token, found by comparing inputs with the stream."""
    split = dataset.split("validation")
    stream = split.read(0, split.tokens).astype(np.int64)
    rows = ValidationRows(split, 32)
    folds = round(1 / config.objective.validation_mask_rate)
    total, count = 0.0, 0
    for fold in range(folds):
        for number in range(rows.count):
            one = np.array([number])
            windows, real = rows.windows(one)
            batch = validation_batch(
                windows, real, one, "masked_next_token", vocabulary_of(dataset), fold=fold, folds=folds
            )
            original = torch.from_numpy(np.take(stream, np.arange(number * 32 - 1, number * 32 + 32), mode="wrap"))
            hidden_at = (batch.inputs[0] != original).nonzero()[:, 0]
            assert (batch.inputs[0, hidden_at] == 2).all()
            with torch.no_grad():
                hidden = model(batch.inputs, batch.positions, batch.lo, batch.hi)[0].double()
                logits = hidden[hidden_at - 1] @ model.embedding.weight.T.double()
            total += float(torch.nn.functional.cross_entropy(logits, original[hidden_at], reduction="sum"))
            count += len(hidden_at)
    return total, count


def test_the_masked_loss_predicts_every_word_once_over_its_folds(model, dataset, random_run):
    total, count = masked_loss_by_hand(model, dataset, random_run.config)
    split = dataset.split("validation")
    assert count == split.tokens - split.documents
    loss = validate_readouts(model, dataset, random_run.config, rows=0, every_token=True)["masked_next_token"]
    assert loss["predicted"] == count
    assert loss["nats_per_token"] == pytest.approx(total / count, rel=1e-5)
    assert loss["bits_per_byte"] == pytest.approx(total / math.log(2) / split.text_bytes, rel=1e-5)


def test_a_quick_validation_hides_a_share_of_the_tokens_and_is_the_same_each_time(model, dataset, random_run):
    first, again = (validate_readouts(model, dataset, random_run.config, rows=0) for _ in range(2))
    assert first == again
    split = dataset.split("validation")
    assert first["next_token"]["predicted"] == split.tokens
    share = first["masked_next_token"]["predicted"] / (split.tokens - split.documents)
    assert share == pytest.approx(1 / 7, abs=0.03)
    whole = validate_readouts(model, dataset, random_run.config, rows=0, every_token=True)
    assert first["masked_next_token"]["nats_per_token"] == pytest.approx(
        whole["masked_next_token"]["nats_per_token"], abs=0.5
    )


def test_the_micro_batch_does_not_change_the_loss(model, dataset, random_run):
    losses = [
        validate_readouts(model, dataset, random_run.config.replace(micro_batch_rows=rows), rows=9)
        for rows in (1, 4, 0)
    ]
    for name in ("next_token", "masked_next_token"):
        values = [loss[name]["nats_per_token"] for loss in losses]
        assert values == pytest.approx([values[0]] * 3, rel=1e-5)
        assert len({loss[name]["predicted"] for loss in losses}) == 1


def test_validation_ignores_dropout_and_leaves_the_model_training(dataset, small):
    from lm.model.transformer import Transformer

    config = small.replace(vocab_size=400, dropout=0.5)
    model = Transformer(config.model).initialize(0).train()
    losses = [validate_readouts(model, dataset, config, rows=4, every_token=True)["next_token"] for _ in range(2)]
    assert losses[0] == losses[1]
    assert model.training
    assert losses[0]["nats_per_token"] == pytest.approx(math.log(400), abs=0.1)


def test_the_readouts_are_those_of_the_objective(model, dataset, random_run):
    for objective, names in {
        "next_token": ["next_token"],
        "masked_token": ["masked_token"],
        "masked_next_token": ["masked_next_token"],
        "hybrid": ["next_token", "masked_next_token"],
        "hybrid_unshifted": ["next_token", "masked_token"],
    }.items():
        config = random_run.config.replace(objective=objective)
        assert list(validate_readouts(model, dataset, config, rows=2)) == names


def test_the_rows_of_a_validation_are_counted_with_all_there_are(dataset, random_run):
    rows = -(-dataset.split("validation").tokens // 32)
    assert rows_of_validation(dataset, random_run.config) == {"taken": 8, "of": rows}
    for asked in (0, rows, rows + 1):
        assert rows_of_validation(dataset, random_run.config.replace(validation_rows=asked)) == {
            "taken": rows,
            "of": rows,
        }


def test_without_validation_text_there_is_no_loss(model, random_run, text_folder, make_dataset, tmp_path):
    tokenizer = random_run.path / "tokenizer.json"
    bare = make_dataset(text_folder, tmp_path / "bare", tokenizer=tokenizer, validation_fraction=0.0)
    assert validate_readouts(model, bare, random_run.config) == {}
