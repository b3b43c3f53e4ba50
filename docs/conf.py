"""The site: Sphinx reads the Markdown pages of this folder (MyST), Furo lays them out.

pip install -e ".[docs]" && sphinx-build -W --keep-going docs site
"""

from __future__ import annotations

import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

from mgfc import __version__

project = "mgfc"
author = "The mgfc developers"
copyright = author
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["__pycache__"]

myst_enable_extensions = ["attrs_block", "attrs_inline", "dollarmath"]
myst_heading_anchors = 3

default_role = "code"  # docstrings write `name` as Markdown does
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = "mgfc"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
html_use_index = False
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"
html_theme_options = {"top_of_page_buttons": []}
copybutton_exclude = ".linenos, .gp, .go"


def inline_math(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block_math(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def keep_together(app: Sphinx, page: str, lines: list[str]) -> None:
    """No line break within `41.17 ± 0.80` or `[+0.65, +1.72]`."""
    lines[0] = re.sub(r"(?<=\d) ± (?=\d)", "\u00a0±\u00a0", lines[0])
    lines[0] = re.sub(r"(\[[+-][\d.]+,) (?=[+-][\d.]+\])", "\\1\u00a0", lines[0])


def setup(app: Sphinx) -> None:
    """Equations become MathML as the pages are built, so that a page needs no script and no font for them."""
    app.connect("source-read", keep_together)
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))


html_math_renderer = "mathml"
