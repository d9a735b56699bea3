"""The settings of a run as its reader sees them: only those that matter to it, with what a 0 stood for."""

from __future__ import annotations

from lm.config.objective_settings import OBJECTIVES, TEXT_VIEW_OBJECTIVES
from lm.config.setting import Setting, spelled
from lm.config.settings import Config, all_settings


def shown_settings(config: Config) -> dict[str, list[tuple[Setting, str]]]:
    """Each setting that matters to the run with its value as text, by section."""
    model = config.model
    derived = {
        "num_key_value_heads": model.key_value_heads,
        "head_size": model.head_width,
        "feed_forward_size": model.feed_forward_width,
    }
    values = config.flat()
    sections: dict[str, list[tuple[Setting, str]]] = {}
    for setting in all_settings():
        if _matters(setting, config):
            text = spelled(values[setting.name])
            if values[setting.name] == 0 and setting.name in derived:
                text += f" → {derived[setting.name]}"
            sections.setdefault(setting.section, []).append((setting, text))
    return sections


def _matters(setting: Setting, config: Config) -> bool:
    """Whether the run can depend on a setting.

    The help of one for some objectives, or for images or text alone, begins with these names: "mae: ", "images: ".
    """
    reads, objectives = "images" if config.reads_images else "text", set(config.objective.shares)
    names, colon, _ = setting.help.partition(": ")
    kinds = set(names.split(", ")) if colon else set()
    if kinds and kinds <= {*OBJECTIVES, "images", "text"} and not kinds & {reads, *objectives}:
        return False
    if setting.section == "views":
        return config.reads_images or ("text" in kinds and bool(objectives & set(TEXT_VIEW_OBJECTIVES)))
    return setting.section != "finetune" or config.is_finetuning


def shown_values(config: Config) -> dict[str, dict[str, str]]:
    """The texts of ``shown_settings`` by section and name, ready for JSON."""
    return {
        section: {setting.name: value for setting, value in settings}
        for section, settings in shown_settings(config).items()
    }
