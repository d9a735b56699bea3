from __future__ import annotations

import dataclasses

import pytest

from lm.config.finetune_settings import METHODS
from lm.config.model_settings import ModelConfig
from lm.config.recipes import load_config
from lm.config.settings import Config, all_settings, finetuning_defaults, finetuning_settings


def test_setting_names_are_unique_over_all_sections():
    names = [setting.name for setting in all_settings()]
    assert len(names) == len(set(names)) == sum(len(dataclasses.asdict(getattr(Config(), s))) for s in vars(Config()))


@pytest.mark.parametrize("setting", list(all_settings()), ids=lambda setting: setting.name)
def test_every_setting_is_explained_and_its_default_is_within_its_limits(setting):
    assert len(setting.help) > 8
    assert setting.kind in ("true|false", "integer", "number", "text", "list of texts")
    assert setting.option == "--" + setting.name.replace("_", "-")
    if setting.choices:
        defaults = setting.default if isinstance(setting.default, tuple) else (setting.default,)
        assert set(defaults) <= set(setting.choices)
    if setting.minimum is not None:
        assert setting.default >= setting.minimum
    if setting.maximum is not None:
        assert setting.default <= setting.maximum


def test_replace_finds_each_setting_in_its_section_and_leaves_the_original():
    config = Config()
    changed = config.replace(steps=10, hidden_size=64, prompts=("a",))
    assert (changed.training.steps, changed.model.hidden_size, changed.report.prompts) == (10, 64, ("a",))
    assert config == Config()
    assert changed.replace(steps=1000, hidden_size=192, prompts=()) == config
    with pytest.raises(KeyError):
        config.replace(no_such_setting=1)


def test_flat_has_every_setting_by_name():
    flat = Config().replace(mask_rate=0.3).flat()
    assert flat["mask_rate"] == 0.3
    assert list(flat) == [setting.name for setting in all_settings()]


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({"hidden_size": 192}, 512),
        ({"hidden_size": 48, "activation": "relu2"}, 192),
        ({"hidden_size": 100, "num_heads": 1}, 288),  # 266.7, up to a multiple of 32
        ({"feed_forward_size": 7}, 7),
    ],
)
def test_the_feed_forward_is_the_usual_multiple_unless_set(changes, width):
    assert ModelConfig(**changes).feed_forward_width == width


def test_head_sizes_and_counts_have_their_usual_values_unless_set():
    assert ModelConfig(hidden_size=48, num_heads=4).head_width == 12
    assert ModelConfig(head_size=10).head_width == 10
    assert ModelConfig(num_heads=6).key_value_heads == 6
    assert ModelConfig(num_heads=6, num_key_value_heads=2).key_value_heads == 2
    assert Config().replace(batch_tokens=1024, context_length=128).data.batch_rows == 8


# What a run of version 0.1 could be resumed with.
FREE = """steps log_every validate_every validation_rows checkpoint_every keep_checkpoints keep_every device precision
    compile threads parallel micro_batch_rows prompts fills data verify_data data_cache
    data_cache_gb data_timeout data_retries trackers train validation epochs
    fsdp_reshard sharded_checkpoints validations_per_epoch patience micro_batch_tokens
    diffusion_passes residual_precision"""
NEVER = """num_layers hidden_size num_heads num_key_value_heads head_size feed_forward_size activation qk_norm
    tie_embeddings logit_softcap dropout rope_theta norm_epsilon vocab_size context_length batch_tokens packing seed
    optimizer init_from task base weights method lora_rank lora_alpha lora_matrices batch_examples pairs
    template_tokens head_bias patch_size stem image_size image_channels batch_images projection_size
    projection_hidden_size decoder_layers decoder_size queue_size prototypes
    visual_tokenizer visual_codes view_tokens muon_beta2 output_init checkpoint head_hidden lora_rate"""
ASK = """objective masked_fraction final_masked_fraction mask_rate final_mask_rate
    mask_token_share random_token_share validation_mask_rate learning_rate
    muon_learning_rate weight_decay beta1 beta2 momentum gradient_clip spike_threshold warmup_fraction decay_fraction
    final_learning_rate_fraction text_column text_pair_column label_column choices_column words_column tags_column
    prompt_column response_column chat_template reads pooling long_texts judged_by layer_decay class_weights temperature
    label_smoothing infonce_temperature patch_mask_rate normalize_patches crop_area crop_ratio flip color_jitter
    color_jitter_rate grayscale blur solarize largest_crop teacher_momentum student_temperature teacher_temperature
    first_teacher_temperature teacher_warmup center_momentum prototypes_frozen centering ibot_weight koleo_weight
    local_views local_size local_area
    final_weight_decay stem_learning_rate span_share token_deletion first_blur
    second_solarize head_learning_rate embedding_weight_decay cautious_weight_decay first_momentum momentum_warmup
    mask_whole_words longest_prefix infill_rate suffix_first_rate span_corruption_rate mean_span_length span_attention
    predict_ahead ahead_weight ahead_until lowest_diffusion_rate average_last"""


@pytest.mark.parametrize(("answer", "names"), [("free", FREE), ("never", NEVER), ("ask", ASK)])
def test_what_may_change_on_resume(answer, names):
    assert sorted(s.name for s in all_settings() if s.on_resume == answer) == sorted(names.split())


def test_the_defaults_of_finetuning():
    assert finetuning_defaults() == {
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "muon_learning_rate": 0.002,
        "weight_decay": 0.01,
        "final_weight_decay": 1.0,
        "beta2": 0.98,
        "warmup_fraction": 0.1,
        "decay_fraction": 0.9,
        "dropout": 0.1,
        "checkpoint_every": 200,
        "keep_checkpoints": 1,
        "template_tokens": "auto",
        "epochs": 0.0,
        "head_bias": "auto",
    }
    assert METHODS == {"full": 1e-3, "lora": 5e-3, "probe": 1e-2}
    shown = {s.name: s.default for s in finetuning_settings()}
    assert shown.items() >= finetuning_defaults().items()
    left_out = {
        "steps", "validate_every", "validation_rows", "parallel", "fsdp_reshard", "sharded_checkpoints", "init_from",
        "compile", "base", "embedding_weight_decay", "output_init",
    }  # fmt: skip
    assert not shown.keys() & left_out
    assert {s.name for s in all_settings() if s.section in ("training", "finetune")} <= shown.keys() | left_out


def test_what_a_task_is():
    assert [s.name for s in all_settings() if s.of_task] == (
        ["task", "train", "validation", "text_column", "text_pair_column", "label_column", "judged_by"]
    )


def test_a_setting_is_also_read_where_earlier_versions_had_it(tmp_path):
    for section in ("finetune", "optimizer"):
        (tmp_path / "config.toml").write_text(f"[{section}]\nlayer_decay = 0.7\n", encoding="utf-8")
        assert load_config(tmp_path / "config.toml").optimizer.layer_decay == 0.7


def test_the_blocks_are_described_in_words():
    assert ModelConfig(4, 128, 4).shape == "4 layers x 128 wide, 4 heads of 32, swiglu 352"
    assert ModelConfig(1, 32, 2).shape.startswith("1 layer x 32 wide")
