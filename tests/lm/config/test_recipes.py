from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from lm.config import recipes
from lm.config.recipes import find_recipe, load_config
from lm.config.settings import Config, all_settings

CONFIGS = Path(__file__).parents[3] / "configs"
SETTINGS = {setting.name: setting for setting in all_settings()}


@pytest.fixture
def recipe(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "my.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def problems_of(*arguments, **keywords) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(*arguments, **keywords)
    return str(caught.value).split("\n")


def values_of(setting):
    """Values that a setting may have."""
    if setting.choices:
        one = st.sampled_from(setting.choices)
        return st.lists(one, max_size=3).map(tuple) if setting.kind == "list of texts" else one
    if setting.kind == "true|false":
        return st.booleans()
    if setting.kind == "integer":
        return st.integers(int(setting.minimum), int(setting.maximum or 10**6))
    if setting.kind == "number":
        return st.floats(setting.minimum, setting.maximum or 1e9)
    text = st.text(st.characters(codec="utf-8"), max_size=12)
    return text if setting.kind == "text" else st.lists(text, max_size=3).map(tuple)


CHANGES = st.sets(st.sampled_from(sorted(SETTINGS)), max_size=8).flatmap(
    lambda names: st.fixed_dictionaries({name: values_of(SETTINGS[name]) for name in sorted(names)})
)


def consistent(changes) -> Config | None:
    try:
        return load_config(None, changes)
    except UserError:
        return None


@given(CHANGES)
def test_a_config_written_as_toml_is_read_back_the_same(tmp_path_factory, changes):
    config = consistent(changes)
    if config is not None:
        path = tmp_path_factory.mktemp("toml") / "config.toml"
        config.save(path)
        assert load_config(path) == config


def as_typed(value) -> str:
    """A value as a person types it after an option."""
    return json.dumps(list(value)) if isinstance(value, tuple) else str(value)


@given(CHANGES)
def test_the_command_line_and_a_recipe_are_two_spellings_of_the_same(changes):
    changes = {n: v for n, v in changes.items() if not isinstance(v, tuple) or all(t.isascii() for t in v)}
    config = consistent(changes)
    if config is not None:
        assert load_config(None, {name: as_typed(value) for name, value in changes.items()}) == config
        assert config.flat() == Config().flat() | changes


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_every_recipe_that_comes_with_kindling_is_without_problems(path):
    load_config(path)
    assert find_recipe(path.stem) == path


def test_a_file_is_found_by_its_path_and_a_recipe_by_its_name(recipe):
    path = recipe("")
    assert find_recipe(str(path)) == path
    assert find_recipe("tiny").name == "tiny.toml"


def test_a_recipe_is_found_where_pip_put_it_for_one_user_or_on_debian(tmp_path, monkeypatch):
    for name in ("user", "local"):
        (tmp_path / name / "share" / "kindling" / "configs").mkdir(parents=True)
        (tmp_path / name / "share" / "kindling" / "configs" / f"of-{name}.toml").touch()
    monkeypatch.setattr(recipes, "site", SimpleNamespace(getuserbase=lambda: str(tmp_path / "user")))
    monkeypatch.setattr(recipes, "sysconfig", SimpleNamespace(get_path=lambda name: str(tmp_path / "local")))
    assert find_recipe("of-user").parents[3] == tmp_path / "user"
    assert find_recipe("of-local").parents[3] == tmp_path / "local"


def test_an_unknown_recipe_is_answered_with_the_nearest_or_with_all():
    with pytest.raises(UserError, match=r'no recipe "tinny".*did you mean "tiny"'):
        find_recipe("tinny")
    with pytest.raises(UserError, match=r"available recipes: .*tiny"):
        find_recipe("configs/quuux.toml")


def test_overrides_win_over_the_recipe_and_the_recipe_over_the_base(recipe):
    base = Config().replace(steps=1, seed=2, hidden_size=48)
    config = load_config(recipe("[training]\nsteps = 10\nseed = 20"), {"seed": "200"}, base=base)
    assert (config.training.steps, config.training.seed, config.model.hidden_size) == (10, 200, 48)


def test_nothing_given_is_the_defaults(recipe):
    assert load_config() == load_config(recipe("")) == Config()


def test_every_problem_is_told_at_once(recipe):
    path = recipe(
        "steps = 5\n[model]\nhidden_sise = 64\nnum_heads = 5\n"
        "[optimizer]\nlearning_rate = 'fast'\nsteps = 3\n[modle]\nx = 1"
    )
    told = problems_of(path, {"dropout": "2"}, unknown_options=("--setps",))
    wanted = [
        ('"steps" outside a section', "under [training]"),
        ('unknown setting "hidden_sise"', 'did you mean "hidden_size"?'),
        ("learning_rate", "must be a number, not 'fast'"),
        ('"steps"', "belongs under [training], not [optimizer]"),
        ('unknown section "[modle]"', 'did you mean "model"?'),
        ("--dropout must be at most 0.9, not 2.0",),
        ("unknown option --setps", 'did you mean "--steps"?'),
        ("hidden_size 192 is not divisible by num_heads 5",),
    ]
    assert len(told) == len(wanted)
    for words in wanted:
        assert any(all(word in line for word in words) for line in told), words
    assert all(str(path) in line for line in told[:5])


@pytest.mark.parametrize(
    "text", ["[model\n", "a = = 1", b"\xff\xfe[model]", "[model]\nhidden_size = 1\nhidden_size = 2"]
)
def test_a_recipe_that_is_no_toml_is_named(recipe, text):
    path = recipe(text)
    (told,) = problems_of(path)
    assert told.startswith(f"cannot read the recipe {path}: ")


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    assert "nowhere.toml" in problems_of(tmp_path / "nowhere.toml")[0]


def test_a_setting_of_no_section_without_a_near_name_is_just_unknown(recipe):
    (told,) = problems_of(recipe("[model]\nzzzzqq = 1"))
    assert told.startswith('unknown setting "zzzzqq" in ')
    assert "did you mean" not in told
    (told,) = problems_of(recipe("zzzzqq = 1"))
    assert 'setting "zzzzqq" outside a section' in told


@pytest.mark.parametrize(
    ("name", "value", "result"),
    [
        ("steps", "1000", 1000),
        ("steps", "1e3", 1000),
        ("steps", "1_000", 1000),
        ("steps", 7.0, 7),
        ("learning_rate", "3e-4", 3e-4),
        ("learning_rate", "1", 1.0),
        ("learning_rate", 1, 1.0),
        ("qk_norm", "true", True),
        ("qk_norm", "False", False),
        ("data", "some/folder", ("some/folder",)),
        ("data", "12", ("12",)),
        ("prompts", '["a", "b"]', ("a", "b")),
        ("prompts", "Once upon a time", ("Once upon a time",)),
        ("prompts", ["a"], ("a",)),
        ("fills", "The [MASK] sat.", ("The [MASK] sat.",)),
        ("objective", "masked_token", "masked_token"),
    ],
)
def test_values_are_read_in_the_type_of_their_setting(name, value, result):
    got = load_config(None, {name: value}).flat()[name]
    assert got == result
    assert type(got) is type(result)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("steps", "many", "must be an integer, not 'many'"),
        ("steps", "1.5", "must be an integer, not 1.5"),
        ("steps", "1e400", "must be an integer"),
        ("steps", "1-2", "must be an integer, not '1-2'"),
        ("steps", True, "must be an integer, not True"),
        ("steps", "0", "must be at least 1, not 0"),
        ("seed", "-1", "must be at least 0, not -1"),
        ("learning_rate", "1e400", "must be finite"),
        ("learning_rate", float("nan"), "must be at least 0, not nan"),
        ("learning_rate", "nan", "must be a number, not 'nan'"),
        ("dropout", "0.95", "must be at most 0.9, not 0.95"),
        ("qk_norm", "yes", "must be true|false, not 'yes'"),
        ("qk_norm", 1, "must be true|false, not 1"),
        ("data", 3, "must be a list of texts, not 3"),
        ("prompts", [1], "must be a list of texts"),
        ("objective", "hybird", "diffusion, simclr, moco, byol, dino, dinov2, mae, beit, not 'hybird'"),
        ("objective", "hybird", 'did you mean "hybrid"?'),
        ("trackers", ["wandb", "tensorbord"], "must be one of tensorboard, wandb, trackio, not 'tensorbord': did you"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_or_beyond_its_limits_is_told(name, value, words):
    (told,) = problems_of(None, {name: value})
    assert told.startswith(SETTINGS[name].option)
    assert words in told


def test_a_wrong_value_in_a_recipe_is_told_with_the_file(recipe):
    path = recipe("[training]\nsteps = 0")
    assert problems_of(path) == [f"steps in {path} must be at least 1, not 0"]


def test_sections_of_the_file_are_the_fields_of_the_config():
    """Only a run that is fine-tuned has the section of that, and only one with views of its own that of views."""
    assert "[finetune]" not in Config().to_toml()
    assert "[views]" not in Config().to_toml()
    text = Config().replace(task="regression", flip=0.0).to_toml()
    for field in dataclasses.fields(Config):
        assert f"[{field.name}]" in text


@pytest.mark.parametrize(("text", "wanted"), [("2024", ("2024",)), ("true", ("true",)), ('"a"', ("a",))])
def test_a_single_text_is_a_list_of_one_whatever_it_looks_like(text, wanted):
    assert load_config(None, {"prompts": text}).report.prompts == wanted


NUMBERS = [setting for setting in all_settings() if type(setting.default) in (int, float)]


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda setting: setting.name)
def test_a_number_that_nothing_can_hold_is_refused(setting, recipe):
    huge = ["1e30", "9" * 25, "9" * 5000] if isinstance(setting.default, int) else ["1e400", "9" * 400]
    for value in huge:
        (line,) = [line for line in problems_of(overrides={setting.name: value}) if line.startswith(setting.option)]
        assert "must be" in line
    for value in ["9" * 25] if isinstance(setting.default, int) else ["inf", "-inf", "nan", "1e400"]:
        told = problems_of(recipe(f"[{setting.section}]\n{setting.name} = {value}\n"))
        assert any(line.startswith(f"{setting.name} in ") and "must be" in line for line in told), (value, told)


def test_a_recipe_may_begin_with_a_byte_order_mark_and_must_be_utf8(tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes(b"\xef\xbb\xbf[training]\nsteps = 7\n")
    assert load_config(path).training.steps == 7
    path.write_bytes(b'[report]\nprompts = ["caf\xe9"]\n')
    with pytest.raises(UserError, match=r"r\.toml: it is not UTF-8 \(byte 0xe9 at offset 24\)"):
        load_config(path)
    path.write_bytes(b'[report]\nprompts = ["\\ud83d"]\n')
    with pytest.raises(UserError, match=r"cannot read the recipe .*r\.toml"):
        load_config(path)


def test_a_head_that_attention_cannot_read_is_refused():
    assert problems_of(overrides={"hidden_size": 1024, "num_heads": 2}) == [
        "the head size is 512, but at most 256: change num_heads or head_size"
    ]


def test_an_endless_number_is_told(tmp_path):
    for text in ("[optimizer]\nlearning_rate = 1" + "0" * 400, "[training]\nsteps = 1" + "0" * 5000):
        (tmp_path / "r.toml").write_text(text)
        with pytest.raises(UserError):
            load_config(tmp_path / "r.toml")


def test_folders_of_data_are_kept_as_other_systems_write_them(recipe, monkeypatch):
    there = r"data\mine@2"
    assert load_config(None, {"data": there}).data.data == (there,)
    monkeypatch.setattr(recipes, "os", SimpleNamespace(**vars(os) | {"sep": "\\"}))
    assert load_config(None, {"data": there}).data.data == ("data/mine@2",)
    path = recipe(f"[data]\ndata = ['{there}']\n")
    assert load_config(path).data.data == ("data/mine@2",)
