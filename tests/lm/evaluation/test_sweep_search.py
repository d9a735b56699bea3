from __future__ import annotations

import pytest

from lm.config.sweep_axes import Axis
from lm.evaluation.sweep_search import suggest

AXES = [
    Axis("learning_rate", (), 0.001, 0.1, log=True),
    Axis("num_layers", (), 2, 6),
    Axis("data", (["a"], ["b", "c"])),
]


def searched(trials: int, sampler: str = "tpe", seed: int = 0, axes=AXES, higher: bool = False) -> list[dict]:
    """The points of a search in which a learning rate of 0.02 is best, and the second data fails."""
    tried: list = []
    for _ in range(trials):
        point = suggest(axes, tried, seed, sampler, higher_is_better=higher)
        if point is None:
            break
        distance = (point.get("learning_rate", 0.02) - 0.02) ** 2
        fails = point.get("data") == ["b", "c"] and point["learning_rate"] > 0.05
        tried.append((point, None if fails else -distance if higher else distance))
    return [point for point, _ in tried]


class TestSearch:
    @pytest.fixture(autouse=True)
    def optuna(self):
        pytest.importorskip("optuna", reason="the extra sweep is not installed")

    @pytest.mark.parametrize("sampler", ["tpe", "random"])
    def test_points_are_in_their_ranges_new_and_the_same_for_the_same_seed(self, sampler):
        points = searched(14, sampler)
        assert points == searched(14, sampler)
        assert points[0] != searched(1, sampler, seed=1)[0]
        assert all(point not in points[:number] for number, point in enumerate(points))
        for point in points:
            assert 0.001 <= point["learning_rate"] <= 0.1
            assert point["learning_rate"] == float(f"{point['learning_rate']:.5g}")
            assert type(point["num_layers"]) is int
            assert 2 <= point["num_layers"] <= 6
            assert point["data"] in (["a"], ["b", "c"])
        assert len({point["num_layers"] for point in points}) > 1

    @pytest.mark.parametrize("higher", [False, True])
    def test_tpe_learns_from_the_points_before(self, higher):
        """After its random start it draws close to the best value more often; ``higher`` turns the sign."""

        def close(sampler: str) -> int:
            rates = [
                point["learning_rate"]
                for seed in (0, 1)
                for point in searched(30, sampler, seed, AXES[:1], higher=higher)[10:]
            ]
            return sum(0.01 < rate < 0.03 for rate in rates)

        assert close("tpe") > 2 * close("random")

    def test_the_points_before_decide_what_follows_not_when_they_were_made(self):
        points = searched(13)
        tried = [(point, (point["learning_rate"] - 0.02) ** 2) for point in points[:12]]
        assert suggest(AXES, tried, 0, "tpe", higher_is_better=False) == suggest(
            AXES, tried, 0, "tpe", higher_is_better=False
        )
        other = [(point, -value) for point, value in tried]
        assert suggest(AXES, other, 0, "tpe", higher_is_better=False) != suggest(
            AXES, tried, 0, "tpe", higher_is_better=False
        )

    def test_a_search_among_few_values_tries_each_once_and_ends(self):
        points = searched(9, axes=[Axis("optimizer", ("muon", "adamw")), Axis("num_layers", (), 2, 3)])
        assert len(points) == 4
