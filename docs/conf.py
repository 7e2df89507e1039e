"""Sphinx configuration: the pages of this directory and the reference from docstrings. Run ``make docs``."""

from importlib.metadata import version as installed
from pathlib import Path

project = "dybit"
author = "The dybit maintainers"
project_copyright = author
release = version = installed("dybit")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"dybit {release}"
html_show_sourcelink = False


def _list_guides(app, page, source):
    """Puts the pages that index.md does not name yet where it says ``GUIDES``."""
    if page == "index":
        named = source[0].split()
        pages = sorted(path.stem for path in Path(app.srcdir).glob("*.md"))
        source[0] = source[0].replace("GUIDES", "\n".join(name for name in pages if name not in (*named, "index")))


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", _list_guides)
