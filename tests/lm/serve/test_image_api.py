"""A served run that reads images: the same numbers as in the library, and clear refusals."""

from __future__ import annotations

import base64
import io
import random
import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import lm
from lm.cli.serve import image_service
from lm.inference.attention_maps import attention_maps
from lm.inference.image_embedding import image_vectors
from lm.serve.guard import AccessPolicy
from lm.serve.image_service import MOST_PIXELS, ImageService
from lm.serve.schema import Limits

LIMITS = Limits(body_bytes=1 << 18)
FEW = Limits(waiting=0)


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def file_of(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo() -> bytes:
    """A file of other shape and mode than what the model reads."""
    pixels = np.random.default_rng(0).integers(0, 256, (31, 47, 4), dtype=np.uint8)
    return file_of(Image.fromarray(pixels, "RGBA"))


@pytest.fixture(scope="module")
def model(seeing_run):
    return lm.load(seeing_run.path)


@pytest.fixture(scope="module")
def seen(seeing_run, model, serving_service):
    with serving_service(ImageService.open(seeing_run, model.saved, model, LIMITS)) as served:
        yield served


def test_the_feature_is_that_of_the_library(seen, model, photo, tmp_path):
    (tmp_path / "photo.png").write_bytes(photo)
    for options in ({}, {"layer": 1}, {"normalize": True}, {"layer": 0, "normalize": True}):
        found = seen.ask("/api/embed", {"image": in_base64(photo), **options}).json["vector"]
        (expected,) = model.embed([tmp_path / "photo.png"], **options)
        assert np.array_equal(np.array(found, dtype=np.float32), expected)


def test_pixels_and_attention_are_those_that_the_model_reads(seen, model, photo):
    answer = seen.ask("/api/image", {"image": in_base64(photo)}).json
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["pixels"]))))
    assert (pixels == model.form.pixels(Image.open(io.BytesIO(photo)))).all()
    assert np.array_equal(
        np.array(answer["attention"], dtype=np.float32), attention_maps(model.model, model.form, np.stack([pixels]))[0]
    )
    assert answer["prediction"] is None


def test_neighbors_are_the_nearest_training_images_with_class_and_cosine(seen, model, photo, pictures):
    answer = seen.ask("/api/image", {"image": in_base64(photo), "neighbors": 5}).json
    training = pictures.split("train")
    features = model.embed(training.read(np.arange(training.count)), normalize=True).astype(np.float64)
    (own,) = model.embed([Image.open(io.BytesIO(photo))], normalize=True)
    cosines = features @ own
    nearest = np.argsort(-cosines)[:5]
    assert [each["cosine"] for each in answer["neighbors"]] == pytest.approx(cosines[nearest], abs=1e-5)
    for number, each in zip(nearest, answer["neighbors"], strict=True):
        assert each["name"] == training.source_of(int(number))
        assert each["class"] == pictures.classes[training.labels[number]]
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(each["image"]))))
        assert (shown == training.read(np.array([number]))[0]).all()
    assert len(seen.ask("/api/image", {"image": in_base64(photo)}).json["neighbors"]) == 12
    assert seen.ask("/api/image", {"image": in_base64(photo), "neighbors": 0}).json["neighbors"] == []


def test_a_training_image_is_its_own_nearest_neighbor(seen, pictures):
    (pixels,) = pictures.split("train").read(np.array([7]))
    nearest = seen.ask("/api/image", {"image": in_base64(file_of(Image.fromarray(pixels)))}).json["neighbors"][0]
    assert nearest["name"] == pictures.split("train").source_of(7)
    assert nearest["cosine"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the image cannot be used: empty file"),
        (b"no picture at all", "the image cannot be used: not an image"),
        (file_of(Image.new("RGB", (40, 40)), "JPEG")[:300], "the image cannot be used: damaged or truncated"),
        (file_of(Image.new("L", (3, 9))), "the image cannot be used: a side below 4 pixels (3 x 9)"),
        (file_of(Image.new("1", (8001, 8000))), "the image cannot be used: more than 64 megapixels (8,001 x 8,000)"),
    ],
)
def test_a_bad_image_is_refused_with_the_reason(seen, data, words):
    for path in ("/api/embed", "/api/image"):
        answer = seen.ask(path, {"image": in_base64(data)})
        assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")
        assert answer.error["message"].startswith(words)
    assert MOST_PIXELS == 64_000_000


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/api/embed", {}, '"image" must be a string'),
        ("/api/image", {"image": 3}, '"image" must be a string, not 3'),
        ("/api/image", {"image": "äöü"}, '"image" must be the bytes of an image file in base64'),
        ("/api/image", {"image": "abc"}, '"image" must be the bytes of an image file in base64'),
        ("/api/image", {"image": "", "neighbors": 51}, '"neighbors" must be a whole number from 0 to 50'),
        ("/api/image", {"picture": ""}, '"picture" is unknown'),
        ("/api/embed", {"image": "", "layer": 9}, "no layer 9: the model has 0"),
        ("/api/embed", {"image": "", "layer": -2}, '"layer" must be a whole number'),
    ],
)
def test_invalid_requests_are_reported_in_one_sentence(seen, path, body, words):
    answer = seen.ask(path, body)
    assert answer.status == 400
    assert words in answer.error["message"]


def test_a_body_that_is_too_large_is_refused(seen):
    answer = seen.ask("/api/image", {"image": "A" * LIMITS.body_bytes})
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")


def test_requests_for_text_are_refused_in_a_sentence_and_those_for_images_by_a_run_on_text(seen, served, photo):
    for path in ("/v1/completions", "/v1/chat/completions", "/api/fill", "/api/probabilities"):
        answer = seen.ask(path, {"prompt": "a"})
        assert (answer.status, answer.error["code"]) == (400, "unsupported_input")
        assert answer.error["message"] == "run reads images, not text: use /api/embed or /api/image"
    for path in ("/api/embed", "/api/image"):
        answer = served.ask(path, {"image": in_base64(photo)})
        assert (answer.status, answer.error["code"]) == (400, "unsupported_input")
        assert answer.error["message"] == "trained reads text, not images"


def test_only_admitted_clients_may_ask(seen, seeing_run, model, photo, serving_service):
    body = {"image": in_base64(photo)}
    assert seen.ask("/api/image", body, {"Host": "evil.example"}).error["code"] == "unknown_host"
    assert seen.ask("/api/image", body, {"Origin": "https://evil.example"}).error["code"] == "foreign_origin"
    service = ImageService(seeing_run, model.saved, model, LIMITS)
    with serving_service(service, AccessPolicy(key="sesame")) as kept:
        assert kept.ask("/api/embed", body).status == kept.ask("/api/run").status == 401
        assert kept.ask("/api/embed", body, {"Authorization": "Bearer sesame"}).status == 200


def test_noise_is_answered_with_4xx_and_the_server_lives(seen, photo):
    draw = random.Random(0)
    for _ in range(30):
        data = bytearray(photo)
        for _ in range(draw.randrange(1, 20)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        answer = seen.ask("/api/image", {"image": in_base64(bytes(data[: draw.randrange(len(data))]))})
        assert answer.status in (200, 400), answer
    assert seen.ask("/health").json["requests"] == 0


def test_the_run_is_described_and_its_metrics_are_served(seen, seeing_run, pictures):
    about = seen.ask("/api/run").json
    assert (about["name"], about["reads"], about["step"]) == ("run", "images", 6)
    assert (about["objective"], about["task"], about["image_size"]) == ("simclr", None, 16)
    count = pictures.split("train").count
    assert about["neighbors"]["images"] == count
    assert about["neighbors"]["note"].startswith(f"Neighbors are sought among all {count} training images, whose ")
    assert {each["class"] for each in about["samples"]} <= {"left", "none", "top"}
    assert len(about["samples"]) == 6
    assert seen.ask("/api/metrics").json["lines"] == list(seeing_run.metrics())
    assert [each["id"] for each in seen.ask("/v1/models").json["data"]] == ["run"]


def test_without_the_data_there_are_no_neighbors_and_the_rest_works(
    seeing_run, model, photo, tmp_path, serving_service
):
    gone = replace(seeing_run, config=seeing_run.config.replace(data=(str(tmp_path / "gone"),)))
    with serving_service(ImageService.open(gone, model.saved, model, LIMITS)) as served:
        about = served.ask("/api/run").json
        assert about["neighbors"]["images"] == 0
        note = about["neighbors"]["note"]
        assert note.startswith("There are no neighbors, because the training images cannot be read: the data of ")
        assert note.endswith("which is not there.")
        assert about["samples"] == []
        answer = served.ask("/api/image", {"image": in_base64(photo)}).json
        assert answer["neighbors"] == []
        assert len(answer["attention"]) == 2


def test_more_requests_than_places_are_refused(seeing_run, model, photo, serving_service):
    entered, leave, answers = threading.Event(), threading.Event(), []

    def classify(_):
        entered.set()
        assert leave.wait(120)
        return {"label": "left"}

    body, service = {"image": in_base64(photo)}, ImageService(seeing_run, model.saved, model, FEW, classify)
    with serving_service(service) as served:
        asking = threading.Thread(target=lambda: answers.append(served.ask("/api/image", body)))
        asking.start()
        assert entered.wait(120)
        refused = served.ask("/api/embed", body)
        assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
        leave.set()
        asking.join(120)
    assert answers[0].json["prediction"] == {"label": "left"}


def test_a_fine_tuned_run_predicts_and_finds_neighbors_among_its_examples(
    image_classifier, photo, tmp_path, serving_service, pictures
):
    """As ``kindling serve`` opens it."""
    predictor, form = lm.load(image_classifier.path), pictures.format
    service = image_service(predictor.run, "best", "cpu", LIMITS)
    with serving_service(service) as served:
        answer = served.ask("/api/image", {"image": in_base64(photo)}).json
        (tmp_path / "photo.png").write_bytes(photo)
        assert answer["prediction"] == predictor.predict([tmp_path / "photo.png"])[0]
        found = np.array(served.ask("/api/embed", {"image": in_base64(photo)}).json["vector"], dtype=np.float32)
        pixels = np.stack([form.pixels(Image.open(tmp_path / "photo.png"))])
        assert np.array_equal(found, image_vectors(predictor.model.trunk, form, [pixels])[0])
        about = served.ask("/api/run").json
        assert about["task"] == "image_classification"
        assert about["step"] == predictor.saved.step
        assert about["neighbors"]["images"] == pictures.split("train").count
