"""Every block of Python and every command in README and documentation is run.

The code of the tutorials is run by `test_tutorials.py`; here are their commands.

Python runs as it stands, page by page, but for two numbers: trainings have three
epochs, and posteriors give a hundred samples where the page asks for ten thousand. The
names that a reader has from before are given: `prior`, `simulator`, `theta`, `x`,
`x_o` and a trained `inference`. Commands are read by their own parsers, with the files
that they name; what is cheap is run.
"""

import configparser
import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from sbi.utils import BoxUniform

from sbi_jeffreys import JeffreysNPE, NoTracker
from tasks.__main__ import main as tasks_main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(
        path
        for path in (ROOT / "docs").rglob("*.md")
        if not {"build", "tutorials", "reports"} & set(path.relative_to(ROOT).parts)
    ),
]
# Pages of which no Python is run here.
OTHERS = [
    *(ROOT / folder / "README.md" for folder in ("tasks", "tutorials")),
    *sorted((ROOT / "tutorials").glob("*.ipynb")),
]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def simulator(theta):
    return theta + theta.square() / 4 + 0.3 * torch.randn_like(theta)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def text_of(page):
    """Return the text of a page, of a notebook that between its code."""
    if page.suffix != ".ipynb":
        return page.read_text()
    cells = nbformat.read(page, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def blocks(path, language):
    """Return the line of every block of a language in a page, and its text."""
    text = text_of(path)
    return [
        (text[: match.start(2)].count("\n"), match[2])
        for match in FENCE.finditer(text)
        if match[1] == language
    ]


def shortened(code):
    """Return the code with three epochs for every training and few samples."""
    for call in (r".train(", "JeffreysDensityEstimator("):
        pattern = re.escape(call) + "(?!.*max_num_epochs)"
        code = re.sub(pattern, call + "max_num_epochs=3, ", code)
    return code.replace("(10_000,)", "(100,)")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained inference, saved, with all that a reader has at that point."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    prior = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
    theta = prior.sample((200,))
    x = simulator(theta)
    inference = JeffreysNPE(prior, tracker=NoTracker(), show_progress_bars=False)
    inference.append_simulations(theta, x)
    with pytest.warns(UserWarning, match="Maximum number of epochs"):
        inference.train(max_num_epochs=3)
    path = tmp_path_factory.mktemp("trained") / "inference.pt"
    inference.save(path)
    torch.set_num_threads(num_threads)
    x_o = simulator(torch.tensor([[0.5, -1.0]]))
    return path, {"prior": prior, "theta": theta, "x": x, "x_o": x_o}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=name_of
)
def test_python_of_a_page_runs(page, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # logs and files that the page writes
    path, given = trained
    inference = JeffreysNPE(
        given["prior"], tracker=NoTracker(), show_progress_bars=False
    )
    namespace = {
        **given,
        "torch": torch,
        "simulator": simulator,
        "inference": inference.load(path),
    }
    for line, code in blocks(page, "python"):
        # As many empty lines as stand before it: errors name the line of the page.
        exec(compile("\n" * line + shortened(code), str(page), "exec"), namespace)
    plt.close("all")


def commands():
    """Return every command in blocks of bash, or indented, with its page."""
    found = {}
    for page in [*PAGES, *OTHERS]:
        texts = [text.replace("\\\n", " ") for _, text in blocks(page, "bash")]
        lines = [line for text in texts for line in text.splitlines()]
        indented = r"^    ((?:[A-Z]+=\S+ )?(?:python|make|pip|dask) .*)$"
        lines += re.findall(indented, text_of(page), re.M)
        for line in filter(None, (line.split("#")[0].strip() for line in lines)):
            found.setdefault(line, page)
    return found


@pytest.mark.parametrize("command", commands())
def test_command_is_one(command, monkeypatch, capsys):
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        for target in words[1:]:
            assert re.search(rf"^{re.escape(target)}:", makefile, re.M), target
    elif words[:2] == ["pip", "install"]:
        options = configparser.ConfigParser()
        options.read(ROOT / "setup.cfg")
        extras = re.findall(r"\[(.*)\]", command)
        for extra in (name for names in extras for name in names.split(",")):
            assert extra in options["options.extras_require"], extra
    elif words[:3] == ["python", "-m", "pytest"]:
        pytest.Config.fromdictargs({}, words[3:])  # raises at unknown options
    elif words[:2] == ["python", "-m"]:
        module, arguments = words[2], words[3:]
        for word in arguments:
            if word.startswith(("tasks/", "tests/")):
                assert (ROOT / word).exists(), word
        if module == "tasks":
            from tasks.__main__ import _parser

            _parser().parse_args(arguments)
            return
        monkeypatch.setattr(sys, "argv", [module, "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__")
        assert not end.value.code
        usage = capsys.readouterr().out
        for option in (word for word in arguments if word.startswith("--")):
            assert option in usage, option
    elif words[0] == "dask":
        command_line = importlib.import_module(f"distributed.cli.dask_{words[1]}").main
        known = {option for given in command_line.params for option in given.opts}
        assert {word for word in words if word.startswith("--")} <= known
    else:
        pytest.fail(f"Nothing here checks the command {words[0]!r}.")


def test_cheap_commands_run(tmp_path):
    out = tmp_path / "simulations.npz"
    arguments = ["simulate", "--task", "two_moons", "--budget", "50"]
    assert tasks_main([*arguments, "--out", str(out)]) == 0
    assert out.exists()


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_links_to_files_lead_somewhere(page):
    text = FENCE.sub("", text_of(page))
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target
