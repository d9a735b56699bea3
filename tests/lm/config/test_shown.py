from __future__ import annotations

from dataclasses import replace

from lm.config.finetune_settings import FinetuneConfig
from lm.config.settings import Config, all_settings
from lm.config.shown import shown_settings, shown_values

TEXT, IMAGES = Config(), Config().replace(patch_size=4, image_size=16, image_channels=3, objective="mae")


def test_what_zero_stood_for_is_shown_next_to_it():
    config = TEXT.replace(hidden_size=64, num_heads=2, num_key_value_heads=1)
    model = shown_values(config)["model"]
    assert model["feed_forward_size"] == f"0 → {config.model.feed_forward_width}"
    assert model["head_size"] == "0 → 32"
    assert model["num_key_value_heads"] == "1"
    assert model["dropout"] == "0"


def test_values_are_spelled_as_in_recipes():
    values = shown_values(TEXT.replace(data=("a", "b@2"), learning_rate=2e-5, compile=True))
    assert (values["data"]["data"], values["optimizer"]["learning_rate"]) == ("a, b@2", "2e-05")
    assert (values["training"]["compile"], values["training"]["init_from"]) == ("true", "")


def test_settings_of_other_objectives_and_of_images_are_left_out():
    text, images = shown_values(TEXT), shown_values(IMAGES)
    assert list(text["objective"])[:3] == ["objective", "masked_fraction", "final_masked_fraction"]
    assert not {"views", "finetune"} & set(text)
    assert not {"patch_size", "stem"} & set(text["model"])
    assert not {"decoder_size", "projection_size", "prototypes"} & set(text["objective"])
    assert {"patch_size", "stem"} <= set(images["model"])
    assert {"decoder_size", "patch_mask_rate"} <= set(images["objective"])
    assert not {"projection_size", "prototypes"} & set(images["objective"])
    assert "views" in images


def test_of_the_settings_of_views_text_has_its_own():
    views = shown_values(TEXT.replace(objective="hybrid:0.75,simclr:0.25"))
    assert set(views["views"]) == {"view_tokens", "span_share", "token_deletion"}
    assert {"masked_fraction", "projection_size"} <= set(views["objective"])
    assert "decoder_size" not in views["objective"]
    assert {"crop_area", "flip"} <= set(shown_values(IMAGES)["views"])
    assert "view_tokens" not in shown_values(IMAGES)["views"]


def test_each_setting_is_shown_by_some_run():
    tuned = replace(IMAGES, finetune=FinetuneConfig(task="image_classification"))
    runs = [
        TEXT,
        TEXT.replace(objective="moco"),
        *(TEXT.replace(objective=name) for name in ("prefix_lm", "fill_in_the_middle", "span_corruption", "diffusion")),
        tuned,
        *(IMAGES.replace(objective=name) for name in ("simclr", "moco", "byol", "dino", "dinov2", "beit")),
    ]
    shown = {setting.name for run in runs for settings in shown_settings(run).values() for setting, _ in settings}
    assert shown == {setting.name for setting in all_settings()}
