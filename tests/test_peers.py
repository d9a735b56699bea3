"""benchmarks.vs_peers, with small stand-ins for the code of other systems."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import vs_nanogpt, vs_peers
from benchmarks.peers import stock
from benchmarks.peers.gpt_bert import GptBert
from benchmarks.peers.kindling import Kindling
from benchmarks.peers.nanochat import Nanochat, momentum, rate_factor
from benchmarks.peers.reading import PeerModel
from benchmarks.peers.result import Asked, Result, done, of_other_seeds, read, table
from benchmarks.peers.tasks import task_scores
from benchmarks.written_run import written_run
from data_prep.errors import UserError
from lm.config.settings import Config
from lm.data.corpora import Corpora, open_corpora
from lm.evaluation.validation_loss import evaluate
from lm.export.stock_architectures import weight_names
from lm.kernels import dispatch
from lm.training.pretraining import Pretraining
from lm.training.validation import validate_readouts
from tests.conftest import sentences

SHAPE = {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "context_length": 32, "batch_tokens": 128}
# What the benchmark uses of GPT-BERT's files: a bag of words for a model, and plain gradient descent.
GPT_BERT = {
    "model_extra": """
import torch
from torch import nn
from torch.nn.functional import cross_entropy

class Bert(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.classifier = nn.Module()
        self.classifier.nonlinearity = nn.Linear(config.hidden_size, config.vocab_size)

    def get_contextualized(self, tokens, unseen):
        seen = (~unseen).float()
        mean = seen / seen.sum(-1, keepdim=True).clamp(min=1)
        return (mean @ self.words(tokens.t())).transpose(0, 1)

    def forward(self, tokens, unseen, targets, num_masked, ratio):
        assert tokens.shape == targets.shape == unseen.shape[1::-1] and 0 < num_masked < tokens.shape[1]
        scores = self.classifier.nonlinearity(self.get_contextualized(tokens, unseen))
        costs = [cross_entropy(s.flatten(0, 1), t.flatten()) for s, t in
                 ((scores[:, :num_masked], targets[:, :num_masked]), (scores[:, num_masked:], targets[:, num_masked:]))]
        return ratio * costs[0] + (1 - ratio) * costs[1], *costs, 0, 0, 0, scores.mean(), 0
""",
    "lamb": """
import torch

def Lamb(groups, lr, betas, eps):
    return torch.optim.AdamW(groups, lr, betas, eps)
""",
    "utils": """
import torch

def cosine_schedule_with_warmup_cooldown(optimizer, warmup, cooldown, steps, least):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
""",
    "dataset": """
import torch

class CausalDataset:
    def __init__(self, file, tokenizer, args, seq_length, rank, world_size):
        self.begin, self.length = tokenizer.token_to_id("<s>"), seq_length
        self.text = torch.cat(torch.load(file))

    def __len__(self):
        return len(self.text) // self.length

    def set_global_step(self, step):
        pass

    def __getitem__(self, number):
        own = self.text[number * self.length:][:self.length]
        inputs = torch.cat([torch.tensor([self.begin]), own[:-1]])
        return inputs, own, torch.ones(self.length, self.length).triu(1).bool(), torch.zeros([])

class MaskedDataset(CausalDataset):
    pass
""",
}
# The same of nanochat's.
NANOCHAT = {
    "__init__": "",
    "gpt": """
from types import SimpleNamespace
import torch
from torch import nn

def GPTConfig(**settings):
    return SimpleNamespace(**settings)

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def init_weights(self):
        nn.init.normal_(self.words.weight)
        nn.init.zeros_(self.lm_head.weight)

    def num_scaling_params(self):
        return {"transformer_matrices": 1, "lm_head": self.lm_head.weight.numel()}

    def setup_optimizer(self, embedding_lr, unembedding_lr, matrix_lr, scalar_lr, weight_decay=0.0):
        group = {"params": list(self.parameters()), "kind": "muon", "initial_lr": embedding_lr}
        return torch.optim.AdamW([group], lr=embedding_lr)

    def forward(self, tokens, targets=None):
        scores = 15 * torch.tanh(self.lm_head(self.words(tokens)) / 15)
        if targets is None:
            return scores
        return nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())
""",
    "dataloader": """
import torch

def _document_batches(split, resumed, at_once):
    raise AssertionError("parquet files are not read")

def tokenizing_distributed_data_loader_bos_bestfit(tokenizer, B, T, split, tokenizer_batch_size, device):
    batches, row = _document_batches(split, None, tokenizer_batch_size), []
    while True:
        while len(row) < B * (T + 1):
            documents = tokenizer.encode(next(batches)[0], prepend=tokenizer.get_bos_token_id(), num_threads=1)
            row += [token for document in documents for token in document]
        rows, row = torch.tensor(row[:B * (T + 1)]).view(B, T + 1), row[B * (T + 1):]
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
""",
}


@pytest.fixture
def corpora(make_dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpora:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    documents = [{"text": sentences(30, number)} for number in range(12)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
    make_dataset(tmp_path / "text.jsonl", tmp_path / "data", vocab_size=400)
    return open_corpora((str(tmp_path / "data"),))


def checkout(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)


@pytest.fixture(autouse=True)
def forgets_nanochat(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test has a checkout of its own, and the dtype that it computes in."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "nanochat"]:
        del sys.modules[name]


def bits_of(peer: Any, model: Any, config: Config, corpora: Corpora) -> dict[str, float]:
    model.eval()
    found = validate_readouts(PeerModel(peer, model, config), corpora, config, rows=0, every_token=True)
    return {name: loss["bits_per_byte"] for name, loss in found.items()}


@pytest.mark.parametrize("kind", [stock.Llama, stock.EuroBert])
def test_a_peers_own_class_and_its_weights_in_a_run_have_the_same_loss(kind, corpora, tmp_path):
    config = Config().replace(**SHAPE, objective=kind.objective, vocab_size=corpora.processor.vocab_size)
    peer = kind(corpora, config)
    model, times = peer.train(0.01, 0, 3)
    assert times == sorted(times) and len(times) == 4
    weights = model.state_dict()
    own = {ours: weights[theirs].contiguous() for ours, theirs in weight_names(config.model).items()}
    run = written_run(tmp_path / "run", corpora.processor, config, own)
    expected = {name: x["bits_per_byte"] for name, x in evaluate(run, str(tmp_path / "data"))["validation"].items()}
    assert bits_of(peer, model, config, corpora) == pytest.approx(expected, rel=1e-5)


def test_modernbert_trains_and_is_read(corpora):
    config = Config().replace(**SHAPE, objective="masked_token", vocab_size=corpora.processor.vocab_size)
    peer = stock.ModernBert(corpora, config)
    model, _ = peer.train(0.01, 0, 2)
    tokens = torch.randint(3, 400, (2, 9))
    states = peer.states(model.eval(), tokens, torch.tensor([9, 9]), False)
    assert torch.allclose(peer.logits(model, states), model(input_ids=tokens).logits, atol=1e-5)


def test_gpt_berts_code_trains_and_both_of_its_readouts_are_measured(corpora, tmp_path):
    checkout(tmp_path / "gpt-bert" / "pretraining", GPT_BERT)
    config = Config().replace(**SHAPE, objective="hybrid", vocab_size=corpora.processor.vocab_size)
    peer = GptBert(corpora, config, tmp_path / "gpt-bert")
    shapes = [peer.rows_of_step(step, 10) for step in (0, 5, 6, 8, 9)]
    assert shapes == [(4, 8), (10, 8), (6, 16), (3, 32), (4, 32)]  # 1/4 + 3/4 step/steps of 16, 8 and 4 rows
    first, last = (bits_of(peer, peer.train(0.05, 0, steps)[0], config, corpora) for steps in (1, 30))
    assert list(last) == ["next_token", "masked_next_token"] and last["next_token"] < first["next_token"]


def test_nanochats_code_trains_on_documents_of_the_shards(corpora, tmp_path, monkeypatch):
    checkout(tmp_path / "nanochat" / "nanochat", NANOCHAT)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    config = Config().replace(**SHAPE, objective="next_token", vocab_size=corpora.processor.vocab_size)
    peer = Nanochat(corpora, config, tmp_path / "nanochat")
    model, _ = peer.train(100.0, 0, 60)
    split = corpora.split("validation")
    nats = vs_nanogpt.whole_split_loss(model, split.read(0, split.tokens).astype(np.int64), 32) * split.tokens
    found = bits_of(peer, model, config, corpora)["next_token"]
    assert found == pytest.approx(nats / math.log(2) / split.counted_bytes, rel=1e-4)
    uniform = split.tokens * math.log2(400) / split.counted_bytes
    assert found < 0.95 * uniform


@pytest.mark.parametrize("kind", ["llama", "modernbert", "gpt-bert", "nanochat", "kindling"])
def test_every_peer_learns_a_task_and_stays_as_it_is(kind, corpora, tmp_path, monkeypatch):
    checkout(tmp_path / "gpt-bert" / "pretraining", GPT_BERT)
    checkout(tmp_path / "nanochat" / "nanochat", NANOCHAT)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    chosen = vs_peers.PEERS[kind]
    objective = chosen.objective or "next_token"
    config = Config().replace(**SHAPE, objective=objective, vocab_size=400, device="cpu", data=[str(tmp_path / "data")])
    peer = chosen(corpora, config, tmp_path / kind)
    model, _ = peer.train(0.01, 0, 2)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, count in (("train", 60), ("test", 30)):
        rows = [{"text": f"{'silver river' if n % 2 else 'winter coat'} {n}", "label": n % 2} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = '[settings]\nepochs = 8\nlearning_rate = 0.01\n[tasks.river]\ntask = "classification"\n'
    (tmp_path / "tasks.toml").write_text(f'{tasks}train = "train.jsonl"\ntest = "test.jsonl"\n')
    readable = (lambda model: model) if kind == "kindling" else lambda model: PeerModel(peer, model, config)
    found = task_scores(model, readable, corpora.processor, config, tmp_path / "tasks.toml", seed=0)
    assert found["river"]["accuracy"] > 0.9
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "modernbert", "gpt-bert", "nanochat"])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_steps_multiply_bfloat16_where_kindlings_do_and_the_model_is_measured_in_float32(
    kind, bfloat16, corpora, tmp_path, monkeypatch
):
    checkout(tmp_path / "gpt-bert" / "pretraining", GPT_BERT)
    checkout(tmp_path / "nanochat" / "nanochat", NANOCHAT)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(dispatch, "multiplies_bfloat16", lambda: bfloat16)
    chosen = vs_peers.PEERS[kind]
    config = Config().replace(**SHAPE, objective=chosen.objective, vocab_size=400)
    peer, seen = chosen(corpora, config, tmp_path / kind), set[bool]()

    def look(module: torch.nn.Module, inputs: Any) -> None:
        own = module.forward.__globals__.get("COMPUTE_DTYPE")  # of nanochat, which does not use autocast
        seen.add(torch.is_autocast_enabled("cpu") or own == torch.bfloat16)

    with torch.nn.modules.module.register_module_forward_pre_hook(look):
        model, _ = peer.train(0.01, 0, 2)
        assert seen >= {bfloat16} and peer.bfloat16 == bfloat16
        seen.clear()
        bits_of(peer, model, config, corpora)
    assert seen == {False}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_nanochats_schedules_are_those_of_its_script():
    rates = [rate_factor(step, 1000) for step in (0, 39, 40, 350, 675, 1000)]
    assert rates == pytest.approx([1 / 40, 1.0, 1.0, 1.0, 0.525, 0.05])
    assert [momentum(step, 1000) for step in (0, 200, 400, 1000)] == pytest.approx([0.85, 0.91, 0.97 - 0.07 / 13, 0.9])


@pytest.mark.parametrize("kind", [GptBert, Nanochat])
def test_a_missing_checkout_is_one_sentence(kind, corpora, tmp_path):
    config = Config().replace(**SHAPE, vocab_size=corpora.processor.vocab_size)
    for folder, problem in ((None, "no --checkout was given"), (tmp_path / "none", "does not exist")):
        with pytest.raises(UserError, match=problem) as found:
            kind(corpora, config, folder).train(0.1, 0, 1)
        assert "git clone https://github.com/" in str(found.value) and "\n" not in str(found.value)


def test_a_command_does_what_is_missing_and_the_table_has_its_results(corpora, tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.toml").write_text("")
    pairs = [{"sentence_good": sentences(1, n), "sentence_bad": sentences(1, n + 9)} for n in range(3)]
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "one.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    shape = Config().replace(**SHAPE, objective="next_token")
    monkeypatch.setattr(vs_peers, "load_config", lambda file, given: shape)
    monkeypatch.setattr(vs_peers, "steps_within", lambda *arguments: 2)
    words = ["vs_peers", str(tmp_path / "data"), "--peer", "llama", "--rates", "0.01", "0.1", "--seeds", "2"]
    words += ["--cpu-seconds", "0.05"]
    words += ["--pairs", str(tmp_path / "pairs"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    vs_peers.main()
    files = sorted((tmp_path / "out").rglob("*.json"))
    assert [file.parent.name for file in files] == ["out", "out", "tuning", "tuning"]
    result = read(files[0])
    assert set(result.tuning) == {"0.01", "0.1"} and result.tokens == 256
    best = min(result.tuning, key=lambda rate: result.tuning[rate]["next_token"])
    assert result.asked.rate == float(best)
    # A result of other products or another recipe is another; those of earlier versions name neither.
    assert done(files[0].parent, replace(result.asked, products="bfloat16")) is None
    assert done(files[0].parent, replace(result.asked, settings={"hidden_size": 64})) is None
    assert result.asked.settings == {**SHAPE, "vocab_size": corpora.processor.vocab_size}
    written = json.loads(files[0].read_text())
    assert written["asked"].pop("products") == "float32"
    files[0].write_text(json.dumps(written))
    assert done(files[0].parent, result.asked) == result
    scores = result.pairs["pairs"]["next_token"]
    assert scores["pairs"] == 3 and scores["half"] <= scores["first"]
    files[0].unlink()
    times = [file.stat().st_mtime_ns for file in files[1:]]
    vs_peers.main()
    assert files[0].is_file() and times == [file.stat().st_mtime_ns for file in files[1:]]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["vs_peers", "--table", str(tmp_path / "out")])
    vs_peers.main()
    columns, _, row = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    cells = dict(zip(columns, row, strict=True))
    assert cells["system"] == "llama `next_token`" and float(cells["rate"]) == float(best) and cells["seeds"] == "2"
    half, right = (float(cells[f"pairs, ties {ties}"].split(" ±")[0]) for ties in ("one half", "right"))
    assert 0 <= half <= right <= 100


def test_the_table_compares_means_within_a_readout(tmp_path):
    def save(peer: str, seed: int, bits: dict[str, float], **measured: Any) -> None:
        asked = Asked(peer, "hybrid", 1.0, seed, "tiny", 1200.0, 1, "data", "bfloat16")
        Result(asked, 3_300_000, 10, 2_000_000, 1200.0 + seed, bits, **measured).save(tmp_path)

    grammar = {"blimp": {"next_token": {"half": 0.5, "first": 0.6, "pairs": 9}}}
    save("other", 0, {"next_token": 2.0}, pairs=grammar)
    save("own", 0, {"next_token": 1.0, "masked_token": 3.0}, tasks={"trec": {"accuracy": 0.8}})
    save(
        "own", 1, {"next_token": 1.5, "masked_token": 3.0}, tasks={"trec": {"accuracy": 0.9}, "rte": {"accuracy": 0.5}}
    )
    own = read(tmp_path / "own-hybrid-1-0.json").asked
    assert [other.asked.seed for other in of_other_seeds(tmp_path, own)] == [1]
    assert of_other_seeds(tmp_path, replace(own, cpu_seconds=600.0)) == []
    columns, _, *rows = (line[2:-2].split(" | ") for line in table(tmp_path).splitlines())
    cells = [dict(zip(columns, map(str.strip, row), strict=True)) for row in rows]
    assert [(row["readout"], row["system"], row["bits per byte"]) for row in cells] == [
        ("next_token", "own `hybrid`", "1.250 ± 0.354"),
        ("next_token", "other `hybrid`", "2.000"),
        ("masked_token", "own `hybrid`", "3.000 ± 0.000"),
    ]
    assert [row["trec, accuracy"] for row in cells] == ["0.850 ± 0.071", "", ""]
    assert [row["rte, accuracy"] for row in cells] == ["0.500 (1 of 2 seeds)", "", ""]
    assert [row["blimp, ties right"] for row in cells] == ["", "60.0", ""]


def test_the_documentation_has_the_table_of_the_measured_results():
    root = Path(vs_peers.__file__).parents[1]
    page = (root / "docs/performance.md").read_text(encoding="utf-8")
    assert table(root / "benchmarks/peers/results") in page


def test_the_steps_follow_from_the_time_of_a_token():
    times = [0.0, 9.0, 18.0, 27.0, *(27.0 + 2.0 * i for i in range(1, 9))]
    assert vs_peers.steps_within(100.0, lambda steps: times, lambda step, steps: 64) == 50
    assert vs_peers.steps_within(100.0, lambda steps: times, lambda step, steps: 128 if steps == 1000 else 64) == 25


def test_kindlings_time_ends_before_its_validation(corpora, dataset, small, monkeypatch):
    seconds = [0.0]

    def validate(self: Pretraining, model: torch.nn.Module) -> tuple[dict[str, Any], float]:
        seconds[0] += 100
        return {"validation": {}}, 0.0

    monkeypatch.setattr("benchmarks.peers.kindling.process_time", lambda: seconds[0])
    monkeypatch.setattr(Pretraining, "validate", validate)
    _, times = Kindling(corpora, small.replace(data=[str(dataset.directory)])).train(1.0, 0, 3)
    assert times == [0.0] * 4
    assert seconds == [100.0]


def test_the_commit_of_a_checkout_is_recorded(corpora, tmp_path):
    root = Path(__file__).resolve().parents[1]
    found = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert GptBert(corpora, Config(), root).versions == {"commit": found or "unknown"}


def test_masked_inputs_are_those_of_the_usual_collator():
    tokens, draw = torch.randint(10, 1000, (200, 100)), torch.Generator().manual_seed(0)
    inputs, labels = stock.masked(tokens, 5, 1000, draw)
    predicted = labels != -100
    assert torch.equal(labels[predicted], tokens[predicted]) and torch.equal(inputs[~predicted], tokens[~predicted])
    hidden, same = inputs[predicted] == 5, inputs[predicted] == tokens[predicted]
    shares = [float(each.float().mean()) for each in (predicted, hidden, same)]
    assert shares == pytest.approx([0.3, 0.8, 0.1], abs=0.02)


def test_the_peers_rate_rises_and_falls_in_straight_lines():
    rates = [stock.learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])
    assert np.diff(rates[5:]) == pytest.approx([-1 / 95] * 94)


def test_blocks_are_all_seen_once_in_each_epoch():
    config = Config().replace(context_length=8, batch_tokens=24)
    batches = stock.blocks(np.arange(8 * 9 + 5), config, seed=0)
    first, second = (torch.cat([next(batches) for _ in range(3)])[:, 0] for _ in range(2))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(0, 72, 8))
    assert first.tolist() != second.tolist()
