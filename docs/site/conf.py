"""Sphinx's settings for the documentation site; build.py calls it."""

import lm

project = "Kindling"
version = release = lm.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
html_theme = "furo"
html_title = f"Kindling {version}"
html_copy_source = False
html_show_copyright = False
myst_heading_anchors = 4  # links to headings, as on GitHub
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
suppress_warnings = ["misc.highlighting_failure"]  # shell prompts and settings files are shown as plain text
