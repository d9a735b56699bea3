"""Every setting of a run: defaults, recipe files, and the rules that check and choose them."""
