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

# The benchmarks make their pages beside their figures. Sphinx reads pages of this directory only.
results = Path(__file__).parent / "results"
results.mkdir(exist_ok=True)
pages = {page.name: page.read_text() for page in Path(__file__).parent.parent.glob("benchmarks/results/*.md")}
names = "\n".join(sorted(name.removesuffix(".md") for name in pages))
pages["index.md"] = (
    f"# Measurements\n\n`make bench` makes these pages.\n\n```{{toctree}}\n:maxdepth: 1\n\n{names}\n```\n"
)
for name, text in pages.items():
    copy = results / name
    if not copy.exists() or copy.read_text() != text:
        copy.write_text(text)
