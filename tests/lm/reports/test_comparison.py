from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import UserError
from lm.config.recipes import load_config
from lm.evaluation.validation_loss import evaluate
from lm.reports.comparison import compare, differences, open_entries, rows, write_comparison
from lm.runs import checkpoint
from lm.runs.directory import CHECKPOINTS, open_run


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the trained run: (name, lines of its metrics or None for its own, **settings that it says it had)."""

    def make(name: str, lines: list[dict[str, Any]] | None = None, **settings: Any) -> Path:
        path = shutil.copytree(trained.path, tmp_path / name)
        if lines is not None:
            (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if settings:
            load_config(path / "config.toml").replace(**settings).save(path / "config.toml")
        return path

    return make


def interval(step: int, loss: float, speed: float = 100.0, **more: Any) -> dict[str, Any]:
    return {"step": step, "tokens": 256 * step, "epoch": step / 50, "loss": loss, "tokens_per_second": speed, **more}


def validation(step: int, nats: float, readout: str = "next_token", taken: int = 8) -> dict[str, Any]:
    loss = {"nats_per_token": nats, "bits_per_byte": nats / 2, "predicted": 9}
    return {"step": step, "validation": {readout: loss}, "rows": {"taken": taken, "of": 1024}}


def told(*paths: Path) -> dict[str, Any]:
    return compare(open_entries(paths))


def table(comparison: dict[str, Any]) -> dict[str, list[str]]:
    return {name: cells for name, *cells in rows(comparison)}


def test_final_and_best_losses_come_with_their_step_and_tokens(copy):
    a = copy("a", [interval(10, 4.0, 50.0), interval(20, 3.0, 70.0), validation(10, 2.5), validation(20, 2.75)])
    b = copy("b", [interval(10, 5.0, 10.0), validation(10, 2.0)])
    comparison = told(a, b)
    assert comparison["unit"] == "nats_per_token"
    first, second = comparison["runs"]
    loss = {"predicted": 9}
    assert first["validation"] == {
        "next_token": {
            "final": {"step": 20, "tokens": 5120, "nats_per_token": 2.75, "bits_per_byte": 1.375} | loss,
            "best": {"step": 10, "tokens": 2560, "nats_per_token": 2.5, "bits_per_byte": 1.25} | loss,
        }
    }
    assert (first["step"], first["steps"], first["tokens"], first["tokens_per_second"]) == (20, 100, 5120, 60.0)
    assert second["training_loss"] == {"hybrid": 5.0}
    cells = table(comparison)
    assert cells["losses in nats/token"] == ["a", "b"]
    assert cells["steps"] == ["20 of 100", "10 of 100"]
    assert cells["tokens/s, median"] == ["60", "10"]
    assert cells["validation, next_token, final"][0] == "2.7500 at step 20, 0.01M tokens"
    assert cells["validation, next_token, best"][0] == "2.5000 at step 10, 0.00M tokens"
    assert "fraction of peak, median" not in cells
    assert json.loads(json.dumps(comparison)).keys() == {"unit", "remarks", "runs", "settings"}


def test_what_only_one_run_has_leaves_the_others_cell_empty(copy):
    parts = {"loss_next_token": 3.0, "loss_masked_next_token": 5.0, "share_of_peak": 0.5, "memory_bytes": 2000}
    a = copy("a", [interval(10, 4.0, **parts), validation(10, 3.0, "masked_next_token")])
    b = copy("b", [interval(10, 3.5), validation(10, 2.0)], objective="next_token")
    cells = table(told(a, b))
    assert cells["training, next_token"] == ["3.0000", "3.5000"]
    assert cells["training, masked_next_token"] == ["5.0000", ""]
    assert cells["fraction of peak, median"] == ["50.0%", ""]
    assert cells["peak memory"] == ["2 kB", ""]
    assert [bool(cell) for cell in cells["validation, masked_next_token, best"]] == [True, False]
    assert [bool(cell) for cell in cells["validation, next_token, best"]] == [False, True]


def test_exactly_the_settings_that_differ_are_listed(copy):
    paths = [copy("a"), copy("b", learning_rate=0.5), copy("c", learning_rate=0.5, trackers=("wandb", "trackio"))]
    comparison = told(*paths)
    assert comparison["settings"] == {"learning_rate": [0.01, 0.5, 0.5], "trackers": [(), (), ("wandb", "trackio")]}
    assert differences(comparison) == [
        ["learning_rate", "0.01", "0.5", "0.5"],
        ["trackers", "", "", "wandb trackio"],
    ]
    assert comparison["remarks"] == []


def test_runs_of_different_tokenizers_are_compared_in_bits_per_byte(copy, small, byte_dataset, quietly, tmp_path):
    of_bytes = quietly(small.replace(data=(str(byte_dataset.directory),), steps=2), tmp_path / "bytes").path
    comparison = told(copy("a"), of_bytes)
    assert comparison["unit"] == "bits_per_byte"
    assert (
        "The tokenizers differ (vocabularies of 400, 259 tokens), so losses are compared in bits per byte"
        in (comparison["remarks"][0])
    )
    cells = table(comparison)
    assert not any(name.startswith("training") for name in cells)
    for run, cell in zip(comparison["runs"], cells["validation, next_token, final"], strict=True):
        assert cell.startswith(f"{run['validation']['next_token']['final']['bits_per_byte']:.4f} at step")


def test_other_data_vocabularies_and_parts_of_the_split_are_told(copy):
    a = copy("a", [interval(10, 4.0), validation(10, 2.0)])
    b = copy("b", [interval(10, 4.0), validation(10, 2.0, taken=1024)], vocab_size=512)
    for state in b.glob("checkpoints/*/state.json"):
        state.write_text(json.dumps(json.loads(state.read_text()) | {"data_fingerprint": "another"}))
    assert told(a, b)["remarks"] == [
        "The vocabularies differ in size: 400, 512 tokens.",
        "The data differ, so the losses may be on different texts.",
        "The validations use different parts of the split: a 8 of 1,024 rows, b whole split.",
    ]


def test_without_checkpoints_the_data_are_told_apart_by_their_names(copy):
    a, b = copy("a"), copy("b", data=("elsewhere",))
    assert told(a, b)["remarks"] == []  # the checkpoints say that the content is the same
    for path in (a, b):
        shutil.rmtree(path / "checkpoints")
    assert told(a, b)["remarks"] == ["The data differ, so the losses may be on different texts."]
    assert told(a, a)["remarks"] == []


def test_overfitting_is_told_with_the_name_of_the_run(copy):
    rising = [validation(step, loss) for step, loss in ((10, 2.0), (20, 2.1), (30, 2.2), (40, 2.3))]
    (remark,) = told(copy("a", [interval(40, 1.0), *rising]), copy("b", [interval(40, 1.0), *rising[:3]]))["remarks"]
    assert remark.startswith("a: The validation loss was lowest at step 10")


@pytest.mark.usefixtures("charts")
def test_the_page_holds_numbers_curves_and_settings_and_needs_no_network(copy, tmp_path, read_page):
    paths = [copy("a"), copy("<i>b $x$ --></i>", learning_rate=0.5)]
    entries = open_entries(paths)
    comparison = compare(entries)
    write_comparison(entries, comparison, tmp_path / "compare.html")
    html = (tmp_path / "compare.html").read_text(encoding="utf-8")
    page = read_page(html)
    assert page.tags.count("svg") == 4
    assert "i" not in page.tags
    words = page.words()
    for row in [*rows(comparison), *differences(comparison)]:
        assert all(" ".join(cell.split()) in words for cell in row)
    for title in ("training, next_token", "training, masked_next_token", "validation, next_token"):
        assert f">{title}, nats/token</text>" in html
    write_comparison(entries, comparison, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == html


def test_runs_without_validation_or_differences_have_a_page_too(copy, tmp_path, read_page):
    entries = open_entries(
        [copy("a", [interval(1, 4.0)]), copy("b", [interval(1, 4.0), {"step": 1, "validation": {}}])]
    )
    write_comparison(entries, compare(entries), tmp_path / "compare.html")
    assert "None: all settings are the same." in read_page((tmp_path / "compare.html").read_text()).words()


def test_a_run_that_is_training_can_be_compared(copy):
    """Its last line may be cut off, and it may have no checkpoint yet."""
    a, b = copy("a", [interval(10, 4.0), interval(20, 3.0)]), copy("b")
    shutil.rmtree(a / "checkpoints")
    with (a / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    assert told(a, b)["runs"][0]["step"] == 20


def test_runs_of_one_name_are_told_apart_by_their_paths(copy, tmp_path):
    (tmp_path / "x").mkdir()
    shutil.copytree(copy("run"), tmp_path / "x" / "run")
    assert [entry.name for entry in open_entries([tmp_path / "run", tmp_path / "x" / "run"])] == [
        str(tmp_path / "run"),
        str(tmp_path / "x" / "run"),
    ]


def test_what_cannot_be_compared_is_said_in_a_sentence(copy, tmp_path):
    a, bare = copy("a"), copy("bare", [validation(10, 1.0)])
    with pytest.raises(UserError, match="bare has no metrics in metrics"):
        open_entries([a, bare])
    with pytest.raises(UserError, match="there is no run directory"):
        open_entries([a, tmp_path / "none"])


def test_a_fine_tuning_is_called_by_its_task(classifier, trained):
    found = compare(open_entries([trained.path, classifier.path]))
    assert [run["objective"] for run in found["runs"]] == ["hybrid", "classification"]
    assert list(found["runs"][1]["training_loss"]) == ["classification"]


@pytest.mark.usefixtures("charts")
def test_runs_on_images_are_compared_by_their_losses(seeing_run, image_classifier, trained, tmp_path):
    entries = open_entries([seeing_run.path, image_classifier.path])
    comparison = compare(entries)
    assert comparison["unit"] == "loss"
    assert not any("vocabular" in remark for remark in comparison["remarks"])
    simclr = comparison["runs"][0]["validation"]["simclr"]
    lines = [line["validation"]["simclr"]["loss"] for line in seeing_run.metrics() if "validation" in line]
    assert (simclr["final"]["loss"], simclr["best"]["loss"]) == (lines[-1], min(lines))
    table = {row[0]: row[1:] for row in rows(comparison)}
    assert table["training, image_classification"][0] == ""
    assert table["validation, simclr, best"][0].startswith(f"{min(lines):.4f} at step ")
    write_comparison(entries, comparison, tmp_path / "page.html")
    assert "validation, simclr, loss" in (tmp_path / "page.html").read_text()
    with pytest.raises(UserError, match=r"reads images, and .* reads text: compare runs of one kind"):
        open_entries([trained.path, seeing_run.path])


def imported(path: Path) -> Path:
    """The run as an import leaves it: without a log, and without data of its own."""
    (path / "metrics.jsonl").write_text("")
    newest = open_run(path).newest()
    kept = {name: newest.state[name] for name in ("tokenizer_sha256", "config")}
    weights = newest.model()
    shutil.rmtree(path / CHECKPOINTS)
    checkpoint.save(path / CHECKPOINTS, 0, weights, {}, kept | {"imported_from": "a/model", "data_fingerprint": ""})
    return path


def test_a_run_that_was_imported_is_compared_by_its_settings_and_evaluation(copy, dataset, tmp_path, read_page):
    a, b = copy("a"), imported(copy("b", learning_rate=0.5))
    comparison = told(a, b)
    assert table(comparison)["steps"] == ["100 of 100", "imported from a/model"]
    assert table(comparison)["tokens seen"] == ["25,600", ""]
    assert comparison["settings"] == {"learning_rate": [0.01, 0.5]}
    (remark,) = comparison["remarks"]
    assert remark.startswith("b was imported from a/model and has not been trained here, so it has no curves: ")
    assert remark.endswith(f"evaluate {b} --data FOLDER measures it.")

    results = [evaluate(open_run(a)), evaluate(open_run(b), str(dataset.directory))]
    entries = open_entries([a, b])
    comparison = compare(entries)
    assert comparison["remarks"] == ["b was imported from a/model and has not been trained here, so it has no curves."]
    losses = [f"{result['validation']['next_token']['nats_per_token']:.4f}" for result in results]
    assert table(comparison)["evaluation, next_token"] == losses
    write_comparison(entries, comparison, tmp_path / "compare.html")
    page = read_page((tmp_path / "compare.html").read_text())
    assert " ".join(losses) in page.words()
    assert "Curves" in page.words()

    only = open_entries([b, b])
    write_comparison(only, compare(only), tmp_path / "only.html")
    assert "Curves" not in read_page((tmp_path / "only.html").read_text()).words()


def test_evaluations_of_different_texts_are_told(copy, dataset, other_dataset):
    a, b = imported(copy("a")), imported(copy("b"))
    evaluate(open_run(a), str(dataset.directory))
    evaluate(open_run(b), str(other_dataset.directory))
    remark = f"The evaluations are of different texts: {dataset.directory}, {other_dataset.directory}."
    assert remark in told(a, b)["remarks"]
