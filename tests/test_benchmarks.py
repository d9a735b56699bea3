"""What the benchmarks compute, on texts and steps few enough for a test."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import passes, vs_nanogpt
from benchmarks.vs_nanogpt import Curve, Point
from tests.conftest import sentences

# What the benchmark uses of nanoGPT's model.py.
PEER = """
import torch
from torch import nn

def GPTConfig(**settings):
    return settings

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.scores = nn.Embedding(config["vocab_size"], config["vocab_size"])

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def forward(self, x, y):
        scores = self.scores(x)
        return scores, nn.functional.cross_entropy(scores.flatten(0, 1), y.flatten())
"""


def test_the_loss_of_a_split_counts_every_token_once_after_the_one_before_it():
    torch.manual_seed(0)
    scores = torch.randn(5, 5)
    tokens = np.random.default_rng(0).integers(0, 5, 64 * 70 + 11)
    expected = -scores.log_softmax(1).numpy()[np.roll(tokens, 1), tokens].mean()
    assert vs_nanogpt.whole_split_loss(lambda x: scores[x], tokens, 64) == pytest.approx(expected, rel=1e-5)


def test_nanogpts_schedule_rises_to_its_peak_and_falls_along_a_cosine():
    rates = [vs_nanogpt.nanogpt_rate(step, 2000, 1e-3) for step in (0, 99, 100, 1050, 2000)]
    assert rates == pytest.approx([1e-3 / 101, 1e-3 * 100 / 101, 1e-3, 5.5e-4, 1e-4])


def test_seconds_to_a_loss_are_those_of_the_first_validation_at_or_below_it():
    curve = Curve("a", 0, [Point(1, 2.0, 3.0), Point(2, 4.0, 1.5), Point(3, 6.0, 1.0)])
    assert [curve.seconds_to(loss) for loss in (3.0, 2.0, 1.0, 0.5)] == [2.0, 4.0, 6.0, math.inf]


def test_both_sides_learn_the_same_text_and_their_clocks_run_from_step_to_step(tmp_path: Path):
    text = vs_nanogpt.split_text("the cat sat on the mat, and the dog sat on the cat.\n" * 60)
    (tmp_path / "model.py").write_text(PEER)
    peer = vs_nanogpt.train_nanogpt(vs_nanogpt.load_nanogpt(tmp_path), text, 0, steps=6, every=4, peak=1.0)
    data = vs_nanogpt.make_dataset(text, tmp_path)
    ours = vs_nanogpt.train_kindling(data, len(text[1]), tmp_path / "run", 0, steps=6, every=4, num_layers=1)
    for points in (peer, ours):
        assert [point.step for point in points] == [4, 6]
        assert 0 < points[0].cpu_seconds < points[1].cpu_seconds
        assert points[1].loss < points[0].loss < 6
    assert "kindling" in vs_nanogpt.summary([Curve("nanoGPT", 0, peer), Curve("kindling", 0, ours)], 1.9)


def test_passes_are_measured_once_drawn_and_resumed(tmp_path, capsys, monkeypatch):
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(sentences(8, number) for number in range(90)), encoding="utf-8")
    monkeypatch.setattr(passes, "DOCUMENT", 1000)
    shape = ["num_layers=1", "hidden_size=16", "num_heads=1", "context_length=32", "batch_tokens=1024"]
    options = [str(book), "--out", str(tmp_path / "out"), "--passes", "1,2", "--vocab-size", "300"]
    options += [part for each in shape for part in ("--set", each)]
    passes.main(options)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results) == {f"{name}-{n}-0" for name in ("next_token", "diffusion") for n in (1, 2)}
    steps = {(each["passes"], each["steps"]) for each in results.values()}
    assert len(steps) == 2  # equal compute at each number of passes
    assert abs(dict(steps)[2] - 2 * dict(steps)[1]) <= 1
    assert all(0 < each["best"] <= each["last"] < 9 for each in results.values())
    assert all((tmp_path / "out" / f"passes.{kind}").stat().st_size > 1000 for kind in ("png", "svg"))
    monkeypatch.setattr(passes, "measured", lambda *_: pytest.fail("measured again"))
    passes.main(options)
    assert "next_token" in capsys.readouterr().out


def test_the_crossing_is_where_diffusion_stays_below():
    def results(causal: list[float], diffusion: list[float]):
        both = {"next_token": causal, "diffusion": diffusion}
        return {
            f"{name}{n}": {"objective": name, "passes": 4**n, "last": value}
            for name, values in both.items()
            for n, value in enumerate(values)
        }

    assert passes.crossing(results([3, 2, 2, 4], [2, 3, 2, 2]), "last").endswith("from 16 passes on")
    assert "above next_token at 64 passes" in passes.crossing(results([3, 2, 2, 1], [2, 3, 2, 2]), "last")
