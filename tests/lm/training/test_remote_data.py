"""A run whose shards are behind HTTP or S3 equals the run on local shards, bit for bit, also through outages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from data_prep.errors import StoreError, UserError
from data_prep.shards import block_cache, remote
from data_prep.shards.tokens import Dataset
from data_prep.sources import remote_files
from lm.config.recipes import load_config
from lm.config.settings import Config, DataConfig
from lm.data.corpora import open_corpora
from lm.evaluation.baselines import unigram_costs
from lm.runs.directory import Run, open_run
from lm.runs.run_data import located, open_data, openings_of
from lm.training.pretraining import train
from tests.conftest import Recorder
from tests.stores import Store, http_store, s3_store

DIFFER = {"tokens_per_second", "memory_bytes", "share_of_peak"}  # they describe the machine, not the run
CACHED = 6 * 512


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 512 bytes, of which the cache holds six and the memory two."""
    monkeypatch.setattr(remote, "BLOCK_BYTES", 512)
    monkeypatch.setattr(remote, "PART_BYTES", 4096)
    monkeypatch.setattr(remote, "HELD_BLOCKS", 2)
    monkeypatch.setattr(block_cache, "SETS", 2)
    usual = DataConfig.access.fget
    small = property(lambda self: remote.Access(self.data_cache, CACHED, self.data_retries, self.data_timeout))
    assert usual(DataConfig()) == remote.Access()
    monkeypatch.setattr(DataConfig, "access", small)


@pytest.fixture(params=["http", "s3"])
def store_of(request, tmp_path, monkeypatch) -> Callable:
    """(dataset) → a store that has a copy of it."""

    @contextmanager
    def made(dataset: Dataset):
        copy = shutil.copytree(dataset.directory, tmp_path / "served" / "data")
        with http_store(copy.parent) if request.param == "http" else s3_store(copy, monkeypatch) as store:
            yield store

    return made


@pytest.fixture
def web(dataset, tmp_path):
    shutil.copytree(dataset.directory, tmp_path / "served" / "data")
    with http_store(tmp_path / "served") as store:
        yield store


class Outages(Recorder):
    """Shuts the gate after two of the steps, each time until an attempt waits for the second time."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch, states: tuple[str, ...]) -> None:
        super().__init__()
        self.store, self.states = store, dict(zip((3, 9), states, strict=True))
        self.waited_while: set[str] = set()
        monkeypatch.setattr(remote_files, "time", SimpleNamespace(sleep=self.wait))

    def step(self, step: int) -> None:
        if step in self.states:
            self.store.gate.set(self.states[step])

    def wait(self, seconds: float) -> None:
        self.waited_while.add(self.store.gate.state)
        if seconds > 1:
            self.store.gate.set("open")


def lines_of(run: Run) -> list[dict]:
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in DIFFER} for line in lines]


def weights_of(run: Run) -> bytes:
    newest = run.newest()
    return b"".join((newest.path / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors"))


def assert_equal(one: Run, other: Run) -> None:
    assert lines_of(one) == lines_of(other)
    assert one.newest().step == other.newest().step
    assert weights_of(one) == weights_of(other)


@pytest.fixture(scope="module")
def settings(small) -> Config:
    return small.replace(steps=16, log_every=1, validate_every=8, checkpoint_every=8, context_length=64)


@pytest.fixture(scope="module", params=["windows", "documents"])
def local(request, settings, quietly, tmp_path_factory) -> Run:
    return quietly(settings.replace(packing=request.param), tmp_path_factory.mktemp("local") / request.param)


def test_a_run_through_two_outages_equals_the_local_run(store_of, local, dataset, tmp_path, monkeypatch, caplog):
    states = ("refusing", "stalling")
    with store_of(dataset) as store:
        cache = tmp_path / "cache"
        config = local.config.replace(data=(store.url,), data_cache=str(cache), data_timeout=2.0, data_retries=20)
        outages = Outages(store, monkeypatch, states)
        run = train(config, tmp_path / "run", outages)
        assert set(states) <= outages.waited_while
        reported = [record.getMessage() for record in caplog.records if record.name == remote_files.__name__]
        failed, back = reported[::2], reported[1::2]  # each outage once or, as threads notice it, twice
        assert all(line.startswith(f'cannot read "{store.url}/') for line in failed)
        assert back == [f"{store.url} answers again"] * len(failed)
        assert len(failed) >= 2
        assert_equal(run, local)
        assert run.config.data.data == (store.url,)
        size = sum(path.stat().st_size for path in (cache / "blocks").rglob("*") if path.is_file())
        train_bytes = 2 * dataset.split("train").tokens
        assert 0 < size <= CACHED < train_bytes / 4
        assert open_data(open_run(run.path)).fingerprint == dataset.fingerprint


def test_a_run_resumes_from_its_url_and_mixes_local_and_remote_data(
    web, settings, other_dataset, quietly, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(other_dataset.directory, "other")
    mixed = settings.replace(data_cache=str(tmp_path / "cache"))
    here = tuple(f"{web.url if each is None else each}@2" for each in ("other", None))
    expected = quietly(mixed.replace(data=(f"{tmp_path}/other@2", f"{tmp_path}/served/data@2")), tmp_path / "expected")
    quietly(mixed.replace(data=here, steps=8, final_learning_rate_fraction=0.0), tmp_path / "short")
    run = quietly(mixed.replace(data=here), tmp_path / "run")
    assert_equal(run, expected)
    resumed = quietly(mixed.replace(data=here, steps=20), tmp_path / "run")
    assert resumed.newest().step == 20
    assert load_config(tmp_path / "run" / "config.toml").data.data == here
    assert located(open_run("run")).config.data.data == here
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the local one is found from where the run was trained
    assert located(open_run("../run")).config.data.data == (f"{tmp_path}/other@2", here[1])


def test_changed_bytes_are_noticed_before_they_are_trained_on(web, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_files, "time", SimpleNamespace(sleep=lambda seconds: None))

    class Change(Recorder):
        def step(self, step: int) -> None:
            if step == 3:
                for path in (tmp_path / "served" / "data").glob("train-*.bin"):
                    content = bytearray(path.read_bytes())
                    content[::512] = bytes(byte ^ 1 for byte in content[::512])
                    path.write_bytes(content)

    config = settings.replace(data=(web.url,), data_cache=str(tmp_path / "cache"))
    reporter = Change()
    with pytest.raises(StoreError, match=r"its bytes have changed since it was verified \(4 attempts\)"):
        train(config, tmp_path / "run", reporter)
    assert len(reporter.lines) < 16


def test_a_store_that_is_away_is_not_taken_for_data_that_is_gone(web, settings, quietly, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_files, "time", SimpleNamespace(sleep=lambda seconds: None))
    config = settings.replace(data=(web.url,), data_cache=str(tmp_path / "cache"), steps=1, data_retries=1)
    run = quietly(config, tmp_path / "run")
    web.gate.set("refusing")
    away = r'cannot read ".*/data/manifest\.json": .* \(2 attempts\); the same command continues when the store is back'
    for use in (open_data, openings_of, lambda run: unigram_costs(run.config, print)):
        with pytest.raises(StoreError, match=away):
            use(run)
    with pytest.raises(StoreError, match=away):
        quietly(config.replace(steps=2), tmp_path / "run")


def test_credentials_in_a_url_are_refused_before_anything_is_written(tmp_path):
    from click.testing import CliRunner

    from lm.cli.main import main

    command = ["train", "tiny", "--data", "s3://key:secret@bucket/data", "--run", str(tmp_path / "run")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert 'data: "s3://…@bucket" has a user name or password in it' in result.stderr
    assert "secret" not in result.output
    assert not (tmp_path / "run").exists()


def test_images_at_a_url_are_refused_in_one_sentence(pictures, tmp_path):
    shutil.copytree(pictures.directory, tmp_path / "served" / "data")
    with http_store(tmp_path / "served") as store, pytest.raises(UserError, match="which are read from this machine"):
        open_corpora([store.url], remote.Access(str(tmp_path / "cache")))
