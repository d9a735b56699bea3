"""Every setting: recipes, defaults, limits and the rules that choose them."""

from lm.config.recipes import find_recipe, load_config, run_config
from lm.config.sampling import Sampling
from lm.config.settings import OBJECTIVES, Config, Setting, all_settings

__all__ = ["OBJECTIVES", "Config", "Sampling", "Setting", "all_settings", "find_recipe", "load_config", "run_config"]
