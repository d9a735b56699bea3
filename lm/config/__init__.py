"""Every setting: recipes, defaults and the rules that choose them."""
