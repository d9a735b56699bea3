"""One small text, one dataset and one trained model that many tests read and none changes."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

# One thread for each process, in these and in the programs that tests start: several processes test at once.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_VNNI"  # products in float32 on every CPU, unless a test asks for others

import pytest
import torch
from hypothesis import settings

import data_prep
from data_prep.progress import SilentReporter
from data_prep.settings import available_cores
from data_prep.shards.tokens import Dataset
from lm.config.settings import Config
from lm.data.batch import Batch
from lm.inference.language_model import LanguageModel
from lm.kernels import dispatch
from lm.model.device import available_memory
from lm.reports import page
from lm.runs.directory import Run
from lm.training.pretraining import train

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what it puts in the background without it
os.environ["TOKENIZERS_PARALLELISM"] = "false"
settings.register_profile("kindling", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("kindling")
gc.disable()  # collecting garbage among all that importing and collecting tests creates takes half of their time


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


SUBJECTS = "the old miller|a young fox|my grandmother|the captain|every sparrow|nobody|the clever weaver|a tired horse"
VERBS = "found|carried|watched|remembered|painted|lost|sold|followed|wanted|forgot"
OBJECTS = "a silver key|the long river|seven apples|the winter coat|a small boat|her brother's letter|the café|an owl"
PLACES = "behind the barn|in the morning|before the rain came|at the market|under a wide sky|without a word|again"


def sentences(count: int, seed: int) -> str:
    """English-like text, the same for the same seed."""
    draw = random.Random(seed)
    parts = [list.split("|") for list in (SUBJECTS, VERBS, OBJECTS, PLACES)]
    made = (" ".join(draw.choice(part) for part in parts) for _ in range(count))
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in made)


def masked_rows_of(batch: Batch) -> torch.Tensor:
    """Which rows of a batch are read in both directions, bool (rows,)."""
    return torch.tensor([name != "next_token" for name, rows in batch.parts.items() for _ in range(rows)])


@pytest.fixture
def bfloat16_products(monkeypatch) -> None:
    """``precision = "native"`` means bfloat16, which oneDNN emulates on a CPU without instructions for it."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no products of bfloat16 here")
    monkeypatch.setattr(dispatch, "multiplies_bfloat16", lambda: True)


class Recorder:
    """A reporter, of a run or of a build, that keeps everything it receives."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.lines: list[dict[str, Any]] = []
        self.began: tuple[int, int] | None = None
        self.ended = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, done: int, total: int) -> None:
        self.began = (done, total)

    def step(self, step: int) -> None:
        self.last_step = step

    def metrics(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def end(self) -> None:
        self.ended += 1

    @contextmanager
    def stage(self, name: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
        yield lambda size: None


def raise_interrupted() -> None:
    raise InterruptedError


def terminate() -> None:
    """Send this process the signal of a polite ``kill``."""
    os.kill(os.getpid(), signal.SIGTERM)


class StopAt(Recorder):
    """A recorder that calls ``stop`` after a step."""

    def __init__(self, step: int, stop: Callable[[], None] = raise_interrupted) -> None:
        super().__init__()
        self.at, self.stop = step, stop

    def step(self, step: int) -> None:
        if step == self.at:
            self.stop()


def pytest_xdist_auto_num_workers() -> int:
    """Number of processes of ``pytest -n auto``: one for each core, as far as there are 2 GB of memory for each."""
    return max(1, min(available_cores(), available_memory(torch.device("cpu")) // 2_000_000_000))


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Keep bytes out of the names of tests: what gzip packs holds the second, and all workers must find the same."""
    return argname if isinstance(val, bytes) else None


def process_state() -> dict[str, Any]:
    """What all tests of one process share."""
    return {
        "folder": Path.cwd(),
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
    }


@pytest.fixture(autouse=True)
def leaves_the_process_as_it_was() -> Iterator[None]:
    """Every test undoes what it changes in the process, so that none depends on those before it.

    Only what a library adds to the environment when it is first imported stays.
    """
    before, environment = process_state(), dict(os.environ)
    yield
    assert process_state() == before
    changed = {name for name, value in environment.items() if os.environ.get(name) != value}
    assert changed <= {"PYTEST_CURRENT_TEST"}


draw_chart = page.draw


@pytest.fixture(scope="session", autouse=True)
def without_charts() -> Iterator[None]:
    """Charts are empty, for those of a report take a second to draw; ``charts`` draws them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(page, "draw", lambda panels, height, *, stacked=False: "<svg></svg>")
        yield


@contextmanager
def charts_drawn() -> Iterator[None]:
    """Draw the charts of what is written here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(page, "draw", draw_chart)
        yield


@pytest.fixture
def charts() -> Iterator[None]:
    """Draw the charts of what a test writes."""
    with charts_drawn():
        yield


VOID = {"meta", "br", "img", "hr", "input", "link"}


class Page(HTMLParser):
    """Checks that tags are balanced and that nothing is fetched or executed; keeps tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        self.needs_no_network(html)

    def needs_no_network(self, html: str) -> None:
        assert not {"script", "link", "iframe", "object", "embed", "base"} & set(self.tags)
        for _, name, value in self.attributes:
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                assert re.match(r"#|data:image/png;base64,|[\w-]+/report\.html$", value), value
            if name == "style":
                assert "url(" not in value.replace("url(#", "")
        assert "@import" not in html
        assert "url(http" not in html

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="session")
def read_page() -> type[Page]:
    """Read a page of HTML: html → ``Page``."""
    return Page


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="session")
def quietly() -> Callable[..., Run]:
    """``train`` with its reports kept to itself: (config, path) → the run."""
    return lambda config, path, **arguments: train(config, path, Recorder(), **arguments)


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., Dataset]:
    """Build a dataset: (source, folder, **settings of the build) → the dataset."""
    return build_dataset


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hundred short documents."""
    folder = tmp_path_factory.mktemp("text")
    with (folder / "stories.jsonl").open("w", encoding="utf-8") as file:
        for number in range(300):
            file.write(json.dumps({"text": sentences(3 + number % 5, number)}) + "\n")
    return folder


def build_dataset(source: Path, out: Path, **changes: Any) -> Dataset:
    options = {"validation_fraction": 0.1, "workers": 1} | changes
    return data_prep.build([source], out, progress=SilentReporter(), **options)


def loaded(run: Run, device: str = "cpu") -> LanguageModel:
    """The model of a run's newest checkpoint."""
    return LanguageModel(run.load_model(torch.device(device)), run.tokenizer, run.config)


@pytest.fixture(scope="session")
def dataset(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The documents as tokens of a byte-level BPE, in several shards."""
    return build_dataset(text_folder, tmp_path_factory.mktemp("data") / "bpe", vocab_size=400, shard_tokens=5000)


@pytest.fixture(scope="session")
def other_dataset(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Fewer and different documents, as tokens of the same tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    lines = (json.dumps({"text": sentences(2 + number % 4, 1000 + number)}) + "\n" for number in range(80))
    (folder / "other.jsonl").write_text("".join(lines), encoding="utf-8")
    return build_dataset(folder, folder / "out", tokenizer=str(dataset.directory / "tokenizer.json"))


@pytest.fixture(scope="session")
def byte_dataset(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The same documents, one token a byte."""
    return build_dataset(text_folder, tmp_path_factory.mktemp("data") / "bytes", tokenizer_kind="bytes")


@pytest.fixture(scope="session")
def small(dataset: Dataset) -> Config:
    """The settings of a run that takes one second."""
    return Config().replace(
        num_layers=2,
        hidden_size=32,
        num_heads=2,
        context_length=32,
        batch_tokens=256,
        data=(str(dataset.directory),),
        steps=20,
        validation_rows=8,
        device="cpu",
        threads=1,
    )


@pytest.fixture(scope="session")
def trained(small: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of the hybrid objective that has learned a little."""
    config = small.replace(steps=100, learning_rate=0.01, validate_every=50, checkpoint_every=50)
    return train(config, tmp_path_factory.mktemp("runs") / "trained", Recorder())
