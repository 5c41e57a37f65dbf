"""Configuration of Sphinx, with the theme and the extensions of sbi's documentation.

`reports` is a link to the folder of the repository, and `tutorials` is copied from it
when the site is built, since links between notebooks are not followed through a link:
notebooks are shown with the outputs they were committed with, and the figures of the
benchmark are those of the committed report.
"""

import csv
import logging
import math
import re
import shutil
from collections import defaultdict
from pathlib import Path

from sbi_jeffreys import __version__

REPOSITORY = Path(__file__).resolve().parents[1]
REPORT = REPOSITORY / "tasks/reports/against_npe_1000"
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


def _read(name: str) -> list[dict[str, str]]:
    with open(REPORT / name, newline="") as file:
        return list(csv.DictReader(file))


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _c2st() -> str:
    """Return C2ST of every task and method, the best in bold."""
    rows = [row for row in _read("c2st.csv") if row["source"] == "measured"]
    methods = sorted({row["method"] for row in rows})
    cells = {(row["task"], row["method"]): float(row["mean"]) for row in rows}
    tasks = sorted({task for task, _ in cells})
    lines = []
    for task in tasks:
        values = [cells.get((task, method), math.nan) for method in methods]
        best = min(filter(math.isfinite, values))
        lines.append([
            f"`{task}`",
            *(f"**{v:.3f}**" if v == best else f"{v:.3f}" for v in values),
        ])
    means = [
        sum(cells.get((task, method), math.nan) for task in tasks) / len(tasks)
        for method in methods
    ]
    lines.append(["mean", *(f"{mean:.3f}" for mean in means)])
    return _table(["task", *(f"`{method}`" for method in methods)], lines)


def _losses() -> str:
    """Return where NPE was better than the flow or than the refined posterior."""
    c2st = {
        (row["task"], row["method"]): float(row["mean"])
        for row in _read("c2st.csv")
        if row["source"] == "measured" and row["mean"]
    }
    ours = ("jeffreys", "jeffreys_refined")
    rows = [
        [f"`{task}`", f"`{us}`", f"`{peer}`", f"{value:.3f}", f"{theirs:.3f}"]
        + [f"{value - theirs:+.3f}"]
        for us in ours
        for (task, peer), theirs in sorted(c2st.items())
        if peer.startswith("npe") and (value := c2st[task, us]) > theirs
    ]
    rows.sort(key=lambda row: -float(row[-1]))
    return _table(["task", "ours", "peer", "C2ST ours", "C2ST peer", "loss"], rows)


def _seconds() -> str:
    """Return the geometric mean over tasks of the ratio of training times."""
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in _read("results.csv"):
        if row["training_seconds"]:
            seconds[row["task"], row["method"]].append(float(row["training_seconds"]))
    means = {key: sum(values) / len(values) for key, values in seconds.items()}
    texts = []
    for peer in ("npe_maf", "npe_nsf"):
        logs = [
            math.log(means[task, "jeffreys"] / value)
            for (task, method), value in means.items()
            if method == peer and (task, "jeffreys") in means
        ]
        texts.append(f"{math.exp(sum(logs) / len(logs)):.1f} times as long as `{peer}`")
    return " and ".join(texts)


def _seeds() -> str:
    seeds = sorted({int(row["seed"]) for row in _read("results.csv")})
    plural = "seeds" if len(seeds) > 1 else "seed"
    return f"{len(seeds)} {plural} ({', '.join(map(str, seeds))})"


# What the pages say of the benchmark is taken from the committed report.
myst_substitutions = {
    "c2st_table": _c2st(),
    "loss_table": _losses(),
    "training_ratio": _seconds(),
    "seeds": _seeds(),
}


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
