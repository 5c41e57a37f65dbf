"""Configuration of Sphinx, with the theme and the extensions of sbi's documentation.

`reports` is a link to the folder of the repository, and `tutorials` is copied from it
when the site is built, since links between notebooks are not followed through a link:
notebooks are shown with the outputs they were committed with. Tables of measurements
are made from the committed rows by `tables.py`.
"""

import logging
import re
import shutil
import sys
from pathlib import Path

from sbi_jeffreys import __version__

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "docs"))
from tables import substitutions  # noqa: E402

shutil.copytree(
    REPOSITORY / "tutorials",
    REPOSITORY / "docs/tutorials",
    ignore=lambda folder, names: [n for n in names if not n.endswith(".ipynb")],
    dirs_exist_ok=True,
)

project = "sbi-jeffreys"
author = "The sbi-jeffreys developers"
copyright = f"2026, {author}"
release = version = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "myst_nb",
]
source_suffix = {
    ".rst": "restructuredtext",
    ".md": "myst-nb",
    ".ipynb": "myst-nb",
}
exclude_patterns = [
    "build",
    "jupyter_execute",
    "**/.ipynb_checkpoints",
    "tutorials/*.md",
    "tutorials/*.py",
    "reports/README.md",
]

# Single backquotes in docstrings name objects, as in sbi's.
default_role = "py:obj"
# Arguments of JeffreysNPE are those of `__init__`, as sbi's.
autoclass_content = "both"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
add_module_names = False
napoleon_use_rtype = False
nb_execution_mode = "off"
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath", "substitution"]
myst_heading_anchors = 3

html_theme = "sphinx_book_theme"
html_title = "sbi-jeffreys"
html_theme_options = {
    "use_download_button": False,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
}


# What the pages say of measurements is taken from the committed rows.
myst_substitutions = substitutions()


def _prepare_docstring(app, what, name, obj, options, lines):
    """Rewrite sbi's style of docstrings into what Sphinx reads.

    Formulas between dollars become roles and directives, which must happen before the
    text is parsed: subscripts look like links. The underline that sbi has below
    `Example:` goes, since napoleon reads one style of sections in a docstring.
    """
    text = "\n".join(lines)
    text = re.sub(r"^(\s*Example:)\n\s*-{3,}$", r"\1", text, flags=re.MULTILINE)

    def display(match: re.Match[str]) -> str:
        formula = " ".join(match[2].split())
        return f"{match[1]}.. math:: {formula}\n"

    text = re.sub(
        r"^([ \t]*)\$\$(.+?)\$\$", display, text, flags=re.MULTILINE | re.DOTALL
    )
    text = re.sub(
        r"\$([^$]+)\$", lambda match: f":math:`{' '.join(match[1].split())}`", text
    )
    # The star of an unpacked shape opens no emphasis.
    text = re.sub(r", \*(?=\w+ )", r", \\*", text)
    lines[:] = text.split("\n")


def _skip(app, what, name, obj, skip, options):
    """Leave out what scikit-learn adds to every estimator by itself."""
    return True if re.fullmatch(r"set_\w+_request", name) else None


def setup(app):
    # An empty folder of notebooks is no fault. The warning has no type to suppress.
    logging.getLogger("sphinx.sphinx.directives.other").addFilter(
        lambda record: "glob pattern" not in str(record.msg)
    )
    # Before napoleon, whose priority is 500.
    app.connect("autodoc-process-docstring", _prepare_docstring, priority=400)
    app.connect("autodoc-skip-member", _skip)
