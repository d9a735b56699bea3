"""Every setting: defaults, limits, recipes, and the rules that choose and check them."""

from lm.config.sampling import Sampling
from lm.config.setting import Setting
from lm.config.settings import OBJECTIVES, Config, all_settings

__all__ = ["OBJECTIVES", "Config", "Sampling", "Setting", "all_settings"]
