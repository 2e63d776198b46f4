"""How the site is built: `make docs`. Nothing here needs a network."""

import inspect
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import generate  # noqa: E402
from generate.docstrings import rendered  # noqa: E402

from shoestring import __version__  # noqa: E402

project = "Shoestring"
author = "Shoestring contributors"
copyright = "Shoestring contributors"
version = release = __version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
exclude_patterns = ["generate"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
default_role = "code"  # `name` in a docstring is code
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # what Lightning says of its hooks is in its own documents
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source", "Sources"]
suppress_warnings = ["myst.header"]  # a page of results may skip a level

smartquotes = False
html_theme = "furo"
html_title = f"Shoestring {release}"
html_show_sourcelink = False
html_copy_source = False


def _parameters(obj):
    try:
        return set(inspect.signature(obj).parameters)
    except (TypeError, ValueError):
        return set()


def _docstring(app, what, name, obj, options, lines):
    lines[:] = rendered(lines, _parameters(obj))


def setup(app):
    app.connect("builder-inited", lambda app: generate.write(HERE / "generated"))
    app.connect("autodoc-process-docstring", _docstring, priority=400)  # before napoleon's 500
    return {"parallel_read_safe": False}
