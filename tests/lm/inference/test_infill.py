"""Writing in gaps: what the model reads, and that a model that has learned one thing writes it."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from data_prep.errors import UserError
from lm import api
from lm.cli.main import main
from lm.config.settings import Config
from lm.inference.infill import infill_prompt
from lm.inference.sampling import Sampling
from lm.training.reporter import NullReporter

LETTERS = "abcdefghijklmnopqrst"


@pytest.fixture(scope="module")
def run(make_dataset, tmp_path_factory):
    """Trained on one text, so that what is missing is known; the numbers at its end are what rearranging drops."""
    folder = tmp_path_factory.mktemp("infill")
    (folder / "text.txt").write_text("".join(f"{LETTERS}{n:03}\n" for n in range(400)), encoding="utf-8")
    dataset = make_dataset(
        folder / "text.txt", folder / "data", tokenizer_kind="characters", document_per="line", extra_tokens=("infill",)
    )
    config = Config().replace(
        data=(str(dataset.directory),), objective="fill_in_the_middle", infill_rate=1.0, packing="documents",
        num_layers=2, hidden_size=64, num_heads=2, context_length=32, batch_tokens=1024, steps=150, validate_every=50,
        learning_rate=0.01, muon_learning_rate=0.03, device="cpu", threads=1,
    )  # fmt: skip
    return api.train(config, run=folder / "run", reporter=NullReporter())


def sample(run, *arguments: object):
    return CliRunner().invoke(main, ["sample", str(run), "--device", "cpu", *map(str, arguments)])


def test_the_model_reads_what_it_was_trained_on(run):
    model = api.load(run)
    tokenizer = model.tokenizer
    prefix, suffix, middle = (tokenizer.special_tokens[f"<|fim_{name}|>"] for name in ("prefix", "suffix", "middle"))
    prompt = infill_prompt(tokenizer, model.config, "ab[GAP]d", Sampling())
    assert prompt.tokens == [0, prefix, *tokenizer.encode("ab"), suffix, *tokenizer.encode("d"), middle]
    assert (prompt.text, prompt.suffix) == ("ab", "d")


def test_it_writes_what_is_missing_and_stops(run):
    model = api.load(run)
    texts = ["abcdef[GAP]jklmnopqrst", "abcde[GAP]klmnopqrst"]
    assert model.infill(texts, temperature=0, max_new_tokens=12) == ["ghi", "fghij"]
    assert model.infill(texts[0], temperature=0) == "ghi"


def test_the_command_prints_the_whole_text_or_its_parts(run):
    asked = ("--infill", "abcdef[GAP]jklmnopqrst", "--temperature", 0)
    assert sample(run.path, *asked).stdout == f"{LETTERS}\n"
    line = json.loads(sample(run.path, *asked, "--json").stdout)
    assert line == {"prompt": "abcdef", "suffix": "jklmnopqrst", "continuation": "ghi", "finish_reason": "stop"}


def test_mistakes_are_told_in_a_sentence(run, trained):
    done = sample(run.path, "--infill", "no gap")
    assert done.exit_code == 2
    assert '"no gap" has no gaps: write [GAP] once, where text is missing' in done.stderr
    assert '"[GAP] [GAP]" has 2 gaps' in sample(run.path, "--infill", "[GAP] [GAP]").stderr
    assert "was trained with hybrid, not to fill gaps" in sample(trained.path, "--infill", "a[GAP]").stderr
    with pytest.raises(UserError, match="reads fewer than 32 at once"):
        api.load(run).infill(LETTERS + "[GAP]" + LETTERS)
