from __future__ import annotations

import pytest

from data_prep.errors import UserError
from lm.config.sweep_axes import Axis, describe, grid, parse_axes


def parsed(*texts: str, searching: bool = False) -> list[Axis]:
    return parse_axes(texts, {"steps": "--steps"}, searching=searching)


def test_values_have_the_type_of_their_setting():
    axes = parsed(
        "learning_rate=0.003, 1e-2", "num_layers=2,4", "qk_norm=true,false", "optimizer=muon,adamw",
        'data=data/a,["data/b@2","data/c"]', "init_from=../runs/a",
    )  # fmt: skip
    assert [axis.values for axis in axes] == [
        (0.003, 0.01), (2, 4), (True, False), ("muon", "adamw"), (["data/a"], ["data/b@2", "data/c"]), ("../runs/a",)
    ]  # fmt: skip
    assert [type(value) for axis in axes[:3] for value in axis.values] == [float, float, int, int, bool, bool]


def test_a_value_with_a_comma_stands_between_quotes():
    assert parsed('objective=hybrid,"hybrid:0.75,simclr:0.25",simclr')[0].values == (
        "hybrid", "hybrid:0.75,simclr:0.25", "simclr"
    )  # fmt: skip


def test_a_search_takes_ranges_and_lists():
    axes = parsed("learning_rate=1e-3..0.1:log", "num_layers=2..6", "weight_decay=0..1", "beta1=0.8", searching=True)
    assert axes == [
        Axis("learning_rate", (), 0.001, 0.1, log=True),
        Axis("num_layers", (), 2, 6),
        Axis("weight_decay", (), 0.0, 1.0),
        Axis("beta1", (0.8,)),
    ]
    assert [type(axis.low) for axis in axes[:3]] == [float, int, float]
    assert axes[1].ends == (2, 6)
    assert axes[3].ends == (0.8,)


def test_the_grid_has_every_combination_once():
    points = list(grid(parsed("learning_rate=0.1,0.2,0.3", "optimizer=muon,adamw")))
    assert len(points) == len({tuple(point.values()) for point in points}) == 6
    assert points[:2] == [{"learning_rate": 0.1, "optimizer": each} for each in ("muon", "adamw")]
    assert describe(points[0] | {"qk_norm": True, "data": ["a", "b"]}) == (
        "learning_rate 0.1, optimizer muon, qk_norm true, data a, b"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("learning_rate", '"learning_rate" names no values'),
        ("learning_rate=", '"learning_rate=" names no values'),
        ("lr=0.1", 'unknown setting "lr": did you mean "learning_rate"?'),
        ("task=none,classification", 'unknown setting "task"'),
        ("learning_rate=0.1,0.10", "--set learning_rate names 0.1 twice"),
        ("learning_rate=0.1,,0.2", "--set learning_rate: each value must be a number, not ''"),
        ("learning_rate=0.1..0.2", "--set learning_rate=0.1..0.2 is a range: add --trials N"),
        ("num_layers=2,2.5", "--set num_layers: each value must be an integer, not 2.5"),
        ("optimizer=muon,adam", "--set optimizer: each value must be one of muon, adamw, not 'adam'"),
        ("steps=10,20", "--steps fixes what --set steps varies"),
    ],
)
def test_a_mistake_is_one_sentence(text, problem):
    with pytest.raises(UserError) as error:
        parsed(text)
    assert str(error.value).startswith(problem)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("steps=9..3", "--steps fixes what --set steps varies"),
        ("num_layers=3..3", "--set num_layers=3..3 is no range"),
        ("weight_decay=0..1:log", "--set weight_decay=0..1:log: a range of factors (:log) starts above 0"),
        ("num_layers=1..x", "--set num_layers: each value must be an integer, not '1..x'"),
        ("optimizer=a..b", "--set optimizer: each value must be one of"),
    ],
)
def test_a_wrong_range_is_a_mistake(text, problem):
    with pytest.raises(UserError) as error:
        parsed(text, searching=True)
    assert str(error.value).startswith(problem)


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(UserError) as error:
        parsed("learning_rate=-1,x", "beta1=0.5", "beta1=0.6", "quux=1")
    assert str(error.value).splitlines() == [
        "--set learning_rate: each value must be at least 0, not -1.0",
        "--set learning_rate: each value must be a number, not 'x'",
        "--set beta1 is there twice: list all its values after one",
        'unknown setting "quux"',
    ]
    with pytest.raises(UserError, match="name a setting to vary and its values"):
        parsed()
