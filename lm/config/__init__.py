"""Every setting: defaults, limits, recipes, and the rules that choose and check them."""

from lm.config.objective_settings import OBJECTIVES
from lm.config.sampling import Sampling
from lm.config.setting import Setting
from lm.config.settings import Config, all_settings

__all__ = ["OBJECTIVES", "Config", "Sampling", "Setting", "all_settings"]
