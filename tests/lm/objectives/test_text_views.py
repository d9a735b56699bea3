"""Views of texts: spans, their vectors, the losses, mixtures with language modeling, and runs that learn by them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from lm.config.recipes import pretraining_config
from lm.config.setting import shares_of
from lm.config.settings import Config
from lm.data.batch import Rows, Vocabulary, rows_of_windows
from lm.data.corpora import Corpora
from lm.data.packed_sequences import packed, pooled
from lm.data.text_views import draw_spans, pieces_of
from lm.model.transformer import Transformer
from lm.objectives.batches import TrainingBatches
from lm.objectives.contrastive import nt_xent
from lm.objectives.mixture import Mixture
from lm.objectives.objective import open_objective
from lm.training.gradients import step_gradients
from lm.training.pretraining import train
from tests.conftest import StopAt

END = 0
VOCABULARY = Vocabulary(50, END, 1, END)
METHODS = ("simclr", "moco", "byol", "dino")
MIXED = {"objective": "hybrid:0.75,moco:0.25", "queue_size": 24, "batch_tokens": 256}


def rows_of(tokens: list[list[int]]) -> Rows:
    targets = np.array(tokens)
    windows = np.concatenate([np.full((len(targets), 1), END), targets], axis=1)
    return rows_of_windows(windows, VOCABULARY)


def some_rows(rows: int, length: int, seed: int = 0, ends: float = 0.1) -> Rows:
    draw = np.random.default_rng(seed)
    targets = draw.integers(2, 50, (rows, length))
    targets[draw.random(targets.shape) < ends] = END
    return rows_of(targets.tolist())


@given(seed=st.integers(0, 99), length=st.integers(2, 12), ends=st.sampled_from([0.0, 0.1, 0.9]))
def test_pieces_are_documents_or_equal_parts_of_long_ones(seed, length, ends):
    rows = some_rows(3, 20, seed, ends)
    for row, pieces in zip(rows.targets.tolist(), pieces_of(rows, 40, length, END, seed), strict=True):
        documents = [[*map(ord, text)] for text in "".join(map(chr, row)).split(chr(END)) if text]
        expected = []
        for document in documents:
            count = math.ceil(len(document) / length)
            sizes = [len(document) // count + (n < len(document) % count) for n in range(count)]
            left = iter(document)
            expected += [[next(left) for _ in range(size)] for size in sizes]
        expected = expected or [[]]
        assert [piece.tolist() for piece in pieces] == [expected[n % len(expected)] for n in range(40)]


def test_of_many_pieces_some_are_drawn_by_the_number_of_the_row():
    rows = some_rows(4, 30, ends=0.3)
    everything = [{*map(bytes, row)} for row in pieces_of(rows, 30, 4, END, 1)]
    found = []
    for seed in (1, 2):
        pieces = pieces_of(rows, 3, 4, END, seed)
        assert all({*map(bytes, row)} <= whole for row, whole in zip(pieces, everything, strict=True))
        assert all(len({*map(bytes, row)}) > 1 for row in pieces)
        found.append([[piece.tolist() for piece in row] for row in pieces])
        alone = pieces_of(rows.chosen(np.array([2])), 3, 4, END, seed)
        assert [piece.tolist() for piece in alone[0]] == found[-1][2]
    assert found[0] != found[1]


def spans_as_lists(spans) -> list[list[list[list[int]]]]:
    """[row][view][piece] → tokens."""
    return [
        [[inputs[a : b + 1] for a, b in borders] for inputs, borders in zip(*each, strict=True)]
        for each in zip(spans.inputs.tolist(), spans.borders.tolist(), strict=True)
    ]


@given(seed=st.integers(0, 20), share=st.sampled_from([0.1, 0.5, 1.0]), deletion=st.sampled_from([0.0, 0.3]), both=...)
def test_a_view_is_a_span_of_its_piece_less_some_tokens(seed, share, deletion, both: bool):
    rows = some_rows(3, 24, seed)
    pieces = pieces_of(rows, 3, 8, END, seed)
    spans = draw_spans(
        pieces, 8, rows.numbers, seed, VOCABULARY, range(2), shares=(share, 1.0), deletion=deletion, bidirectional=both
    )
    for row, views in zip(pieces, spans_as_lists(spans), strict=True):
        for view in views:
            for piece, (begin, *span) in zip(row, view, strict=True):
                assert begin == END
                assert span or not len(piece)
                assert len(span) <= len(piece)
                left = iter(piece.tolist())
                assert all(token in left for token in span)  # in the same order
                if not deletion and len(piece):
                    assert len(span) >= max(1, round(share * len(piece)))
                    text = ",".join(map(str, piece.tolist()))
                    assert f",{','.join(map(str, span))}," in f",{text},"
    first, last = spans.borders.unbind(-1)
    for row, view in np.ndindex(spans.inputs.shape[:2]):
        for a, b in zip(first[row, view].tolist(), last[row, view].tolist(), strict=True):
            assert spans.lo[row, view, a : b + 1].tolist() == [a] * (b + 1 - a)
            assert spans.positions[row, view, a : b + 1].tolist() == list(range(b + 1 - a))
            seen = [b + 1] * (b + 1 - a) if both else list(range(a + 1, b + 2))
            assert spans.hi[row, view, a : b + 1].tolist() == seen


def test_views_depend_on_the_seed_and_the_number_of_their_row_alone():
    rows = some_rows(6, 24, ends=0.0)
    pieces = pieces_of(rows, 3, 8, END, 0)
    pieces[1] = [piece[:3] for piece in pieces[1]]  # shorter than those of other rows

    def drawn(some: list[int], seed: int = 1) -> list:
        return spans_as_lists(
            draw_spans(
                [pieces[n] for n in some],
                8,
                rows.numbers[some],
                seed,
                VOCABULARY,
                range(2),
                shares=(0.5, 1.0),
                deletion=0.2,
                bidirectional=True,
            )
        )

    whole = drawn([0, 1, 2, 3, 4, 5])
    assert drawn([4, 1]) == [whole[4], whole[1]]
    assert drawn([1]) == [whole[1]]
    assert drawn([0, 1, 2, 3, 4, 5], seed=2) != whole
    assert all(one != two for one, two in whole)  # views of a piece
    lengths = [len(span) - 1 for row, views in enumerate(whole) if row != 1 for view in views for span in view]
    assert 3 < np.mean(lengths) < 6.5  # 8 tokens, of which 75 % are in a span, and 80 % of these stay


def test_a_tokenizer_without_a_beginning_gives_views_without_one():
    rows = some_rows(2, 16, ends=0.0)
    spans = draw_spans(
        pieces_of(rows, 2, 8, END, 0),
        8,
        rows.numbers,
        0,
        replace(VOCABULARY, begin=None),
        range(1),
        bidirectional=False,
    )
    assert spans_as_lists(spans) == [[[row[:8], row[8:]]] for row in rows.targets.tolist()]


@pytest.fixture
def opened(dataset, small):
    """objective → (config, batches, a model in which every weight has a gradient)."""

    def make(objective: str, **changes):
        config = small.replace(
            vocab_size=400, objective=objective, view_tokens=10, projection_size=6, projection_hidden_size=12,
            prototypes=9, local_views=2, **changes,
        )  # fmt: skip
        batches = TrainingBatches(Corpora([dataset]), config)
        model = batches.objective.new_model().initialize(0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        batches.objective.begin(model)
        return config, batches, model

    return make


@pytest.mark.parametrize("reads", ["bidirectional", "causal"])
def test_a_piece_has_the_vector_that_embed_gives_it(opened, reads):
    """``lm.inference.embedding`` packs texts its own way."""
    objective = "simclr" if reads == "bidirectional" else "next_token:0.5,simclr:0.5"
    _, batches, model = opened(objective)
    views = getattr(batches.objective, "views", batches.objective)
    rows = batches.rows.of_step(0)
    spans = views._spans(rows, 0, range(1))
    ours = views.features_of(model, spans).flatten(0, 2)
    texts = [text for row in spans_as_lists(spans) for view in row for text in view]
    theirs = torch.empty_like(ours)
    for part in packed(texts, reads, batches.rows.inputs.end_of_text, 32, 4):
        found = pooled(model.read(part.batch), part, "mean" if reads == "bidirectional" else "last")
        theirs[torch.from_numpy(part.numbers)] = found
    assert len(texts) == 8 * 4
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_simclr_on_text_compares_the_two_views_of_each_piece_with_those_of_all_others(opened):
    config, batches, model = opened("simclr")
    batch = batches.batch(0)
    vectors = torch.zeros(2, 32, 6)
    for row, views in enumerate(spans_as_lists(batch.large)):
        for view, spans in enumerate(views):
            for piece, tokens in enumerate(spans):
                inputs, positions = torch.tensor([tokens]), torch.arange(len(tokens), dtype=torch.int32)[None]
                hidden = model(inputs, positions, torch.zeros_like(positions), torch.full_like(positions, len(tokens)))
                vectors[view, row * 4 + piece] = model.projector(hidden.mean(1))[0]
    expected = float(nt_xent(*vectors.detach(), config.objective.infonce_temperature))
    assert float(batches.objective.loss(model, batch)["simclr"].detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("objective", [*METHODS, "hybrid:0.75,dino:0.25", MIXED["objective"]])
def test_micro_batches_give_the_gradient_of_the_whole_step(opened, objective):
    config, batches, model = opened(objective, tie_embeddings=False)
    batch, found = batches.batch(1), []
    for rows in (0, 4, 2, 1):
        losses, shares = step_gradients(batches.objective, model, batch, config.replace(micro_batch_rows=rows), 1)
        found.append((losses, shares, {name: p.grad.clone() for name, p in model.named_parameters()}))
    assert max(float(each.abs().max()) for each in found[0][2].values()) > 0.001
    for losses, shares, gradients in found[1:]:
        assert shares == found[0][1]
        for name, loss in losses.items():
            torch.testing.assert_close(loss, found[0][0][name], rtol=1e-5, atol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][2][name], rtol=1e-4, atol=1e-5)


def test_a_mixture_is_the_mean_of_its_parts_by_their_shares(opened):
    config, batches, model = opened("hybrid:0.75,simclr:0.25", masked_fraction=0.5)
    mixture, rows = batches.objective, batches.rows.of_step(0)
    assert isinstance(mixture, Mixture)
    batch = mixture.prepare(rows)
    assert (len(batch.predicted), len(batch.compared)) == (6, 2)
    assert batch.parts == {"next_token": 3, "masked_next_token": 3, "simclr": 2}
    losses, shares = step_gradients(mixture, model, batch, config, 0)
    assert shares == {"next_token": 0.375, "masked_next_token": 0.375, "simclr": 0.25}
    alone = {name: open_objective(config.replace(objective=name), batches.rows.inputs) for name in ("hybrid", "simclr")}
    inside = spans_as_lists(batch.compared.large)
    of_compared = [n for n, views in enumerate(spans_as_lists(alone["simclr"].prepare(rows).large)) if views in inside]
    assert len(of_compared) == 2
    others = rows.chosen(np.setdiff1d(np.arange(8), of_compared))
    predicted = alone["hybrid"].prepare(replace(others, turns=np.arange(6)))
    compared = alone["simclr"].prepare(rows.chosen(np.array(of_compared)))
    expected = {name: 0.75 * loss for name, loss in alone["hybrid"].loss(model, predicted).items()}
    expected["simclr"] = 0.25 * alone["simclr"].loss(model, compared)["simclr"]
    assert losses.keys() == expected.keys()
    for name, loss in expected.items():
        assert float(losses[name]) == pytest.approx(float(loss), rel=1e-5)


def test_each_step_draws_other_rows_to_compare_and_every_row_has_a_part(opened):
    _, batches, _ = opened("hybrid:0.75,simclr:0.25")
    chosen = []
    for step in range(6):
        rows = batches.rows.of_step(step)
        batch = batches.objective.prepare(rows)
        masked = batch.predicted.parts["masked_next_token"]
        assert masked == 3
        predicted = {tuple(row) for row in batch.predicted.inputs[:3].tolist()}  # the causal ones, which hide nothing
        chosen.append([tuple(row) in predicted for row in rows.inputs.tolist()])
    assert len({tuple(each) for each in chosen}) > 3


def test_a_head_for_views_leaves_the_weights_of_a_new_language_model_as_they_were(opened):
    _, batches, _ = opened("hybrid:0.75,simclr:0.25")
    with_head = batches.objective.new_model().initialize(3).state_dict()
    for name, weight in Transformer(batches.objective.text.shape).initialize(3).state_dict().items():
        assert torch.equal(with_head[name], weight)
    assert float(with_head["projector.first.weight"].std()) == pytest.approx((3 * 32) ** -0.5, rel=0.2)


def state(run) -> dict[str, torch.Tensor]:
    newest = run.newest()
    return newest.model() | newest.optimizer() | {f"memory {k}": v for k, v in newest.objective().items()}


def test_a_stopped_run_ends_with_the_same_bits_teacher_and_queue_included(small, quietly, tmp_path):
    config = small.replace(
        **MIXED, view_tokens=16, projection_size=8, projection_hidden_size=16, steps=9, checkpoint_every=2, dropout=0.1
    )
    whole = state(quietly(config, tmp_path / "whole"))
    for stop in (3, 7):
        with pytest.raises(InterruptedError):
            train(config, tmp_path / "stopped", StopAt(stop))
    resumed = state(quietly(config, tmp_path / "stopped"))
    assert any(name.startswith("memory model.projector") for name in whole)
    assert "memory keys" in whole
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_views_teach_texts_to_be_found_again(small, quietly, tmp_path):
    config = small.replace(objective="simclr", view_tokens=16, steps=60, validate_every=30, learning_rate=0.01)
    run = quietly(config, tmp_path / "run")
    first, last = (line["validation"]["simclr"] for line in run.metrics() if "validation" in line)
    assert last["loss"] < first["loss"] < np.log(2 * 16 - 1)  # that of chance, for 8 rows of 2 pieces
    assert set(last) == {"loss", "pieces", "spread", "effective_rank"}
    assert last["pieces"] == 16


@pytest.mark.parametrize("objective", ["dino", "next_token:0.5,byol:0.5"])
def test_runs_are_validated_and_planned(small, quietly, tmp_path, objective):
    config = small.replace(objective=objective, view_tokens=16, prototypes=20, steps=4, validate_every=4)
    run = quietly(config, tmp_path / "run")
    (line,) = [line for line in run.metrics() if "validation" in line]
    groups = {"dino": ["dino"], "next_token:0.5,byol:0.5": ["next_token", "byol"]}[objective]
    assert list(line["validation"]) == groups
    assert line.get("comparable", True) == ("next_token" in groups)
    assert ("teacher_entropy" in line["validation"][groups[-1]]) == (objective == "dino")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"objective": "hybrid:0.7,simclr:0.25"}, "add up to 0.95 instead of 1"),
        ({"objective": "hybrid:0.5,simclr"}, "needs a share for simclr"),
        ({"objective": "hybrid:1.5,simclr:-0.5"}, "needs a share between 0 and 1 for hybrid, not 1.5"),
        ({"objective": "hybrid:0.5,hybrid:0.5"}, "names hybrid twice"),
        ({"objective": "hybrid:0.5,simklr:0.5"}, "'simklr': did you mean \"simclr\"?"),
        ({"objective": "hybrid:0.5,next_token:0.5"}, "hybrid and next_token both have rows of next_token; choose one"),
        ({"objective": "next_token:0.5,dino:0.25,simclr:0.25"}, "has at most one of simclr, moco, byol, dino"),
        ({"objective": "hybrid:0.9,simclr:0.1"}, "share of the 32 rows of a step, 28.8, is no whole number"),
        ({"objective": "mae"}, "objective mae learns from images"),
        ({"objective": "hybrid:0.5,dinov2:0.5"}, "objective dinov2 learns from images"),
        ({"objective": "simclr", "view_tokens": 300}, "view_tokens 300 is more than context_length 256"),
        ({"objective": "simclr", "span_share": 1.0, "token_deletion": 0.0}, "the views of a text would be equal"),
        ({"objective": "dino", "span_share": 0.3, "local_area": 0.4}, "local_area 0.4 is larger than span_share 0.3"),
    ],
)
def test_mistakes_are_told_in_a_sentence(changes, told):
    with pytest.raises(UserError) as error:
        pretraining_config("tiny", "somewhere_new", {"data": ("somewhere",), **changes})
    assert told in str(error.value)


def test_a_mixture_names_shares_that_add_up_to_one():
    assert [*map(str, shares_of("hybrid: 0.75, simclr: 0.25").values())] == ["3/4", "1/4"]
    assert shares_of("a:1/3,b:2/3").keys() == {"a", "b"}
    assert Config().replace(objective="hybrid:0.75,simclr:0.25").readouts == ("next_token", "masked_next_token")
    assert Config().replace(objective="simclr").readouts == ()


def test_the_rows_of_each_part_must_divide_among_ranks(opened):
    _, batches, _ = opened("hybrid:0.75,simclr:0.25")
    assert len(batches.batch(0, 1, 2)) == 4
    with pytest.raises(UserError, match="the batch's 6 rows of hybrid do not divide among 4 ranks"):
        batches.batch(0, 0, 4)
