"""The pages as a site: `sphinx-build -W docs docs/_build` (requirements-docs.txt), warnings as errors."""

import ast
import inspect
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

project = "dreamprm_jax"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = project
suppress_warnings = ["ref.python"]  # two rooms may have a type of one name

myst_heading_anchors = 3  # as GitHub has them, so that links serve both
default_role = "literal"  # `name` in docstrings is code, as in Markdown
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_ivar = True


def _is_field(value: object) -> bool:
    return type(value).__name__ == "_tuplegetter"


def leave_out(app, what, name, value, skip, options) -> bool | None:
    """What is imported from elsewhere, and the fields of a NamedTuple: "Alias for field number 0", see `add_fields`."""
    is_imported = inspect.isroutine(value) and not (value.__module__ or "").startswith("dreamprm_jax")
    return True if _is_field(value) or is_imported else None


def add_fields(app, what, name, value, options, lines) -> None:
    """The fields of a NamedTuple as the source has them, with types, defaults and the comments beside them."""
    if what != "class" or not hasattr(value, "_fields"):
        return
    source = inspect.getsource(value)
    places = [node.lineno for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    fields = source.splitlines()[places[0] - 1 : places[-1]]
    lines += ["", ".. code-block:: python", "", *(f" {line.strip()}" for line in fields), ""]


def keep_layout(app, what, name, value, options, lines) -> None:
    """What a module's docstring indents is laid out by hand: formulas, tables, an example of a row."""
    if what != "module":
        return
    for number, line in reversed(list(enumerate(lines))):
        before = lines[number - 1] if number else ""
        if line.startswith(" ") and not before.strip():
            lines[number:number] = ["::", ""]


def link_to_index(app, name, source) -> None:
    """README is the site's first page."""
    source[0] = source[0].replace("](../README.md", "](index.md")


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("source-read", link_to_index)
    app.connect("autodoc-skip-member", leave_out)
    app.connect("autodoc-process-docstring", add_fields)
    app.connect("autodoc-process-docstring", keep_layout)
