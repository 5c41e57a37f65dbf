"""What README and documentation tell a reader to type is tried.

Every block of Python is run as it stands, page by page, but for two numbers: trainings
have three epochs, and posteriors give a hundred samples where the page asks for ten
thousand. The names that a reader has from before are given: `prior`, `simulator`,
`theta`, `x`, `x_o` and a trained `inference`. The code of the tutorials is run by
`test_tutorials.py`.

Of commands, in blocks and in the text, a few of `python -m tasks` are run: `simulate`,
the `run` of tasks/README.md with fewer simulations and three epochs, and the `report`
of the committed rows. All others are parsed only: those of `python -m tasks` by their
own parser, of other programs the names of the options, of `make` the targets, of `pip`
the extras; and files of tasks/ and tests/ that they name are there.
"""

import configparser
import importlib
import re
import runpy
import shlex
import sys
from functools import wraps
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from fake_method import need_published_data
from sbi.inference import NPE
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
    *(ROOT / path / "README.md" for path in ("tasks", "tasks/reports", "tutorials")),
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


def mentioned_commands():
    """Return every command within the text of a page, with the page."""
    found = {}
    for page in [*PAGES, *OTHERS]:
        text = FENCE.sub("", text_of(page))
        for command in re.findall(r"`((?:python|make|pip|dask) [^`]+)`", text):
            found.setdefault(" ".join(command.split()), page)
    return found


def check_options(program, arguments, monkeypatch, capsys):
    """Raise unless a module or script has a help that names all of the options."""
    options = [word for word in arguments if word.startswith("--")]
    subcommand = [word for word in arguments[:1] if not word.startswith("-")]
    monkeypatch.setattr(sys, "argv", [program, *subcommand, "--help"])
    with pytest.raises(SystemExit) as end:
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__")
    assert not end.value.code
    usage = capsys.readouterr().out
    for option in options:
        assert option in usage, option


@pytest.mark.parametrize("command", {**commands(), **mentioned_commands()})
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
        # Text may name a command without its arguments, or with FILE.toml for one.
        placeholder = any(re.fullmatch(r"[A-Z]+(\.+\w*)?", word) for word in arguments)
        named_only = command not in commands() and len(arguments) < 2
        if module == "tasks" and not placeholder and not named_only:
            from tasks.__main__ import _parser

            _parser().parse_args(arguments)
        else:
            known = [word for word in arguments if word != "COMMAND"]
            check_options(module, known, monkeypatch, capsys)
    elif words[0] == "python" and words[1].endswith(".py"):
        check_options(words[1], words[2:], monkeypatch, capsys)
    elif words[0] == "dask":
        command_line = importlib.import_module(f"distributed.cli.dask_{words[1]}").main
        known = {option for given in command_line.params for option in given.opts}
        assert {word for word in words if word.startswith("--")} <= known
    else:
        pytest.fail(f"Nothing here checks the command {words[0]!r}.")


def arguments_of(start):
    """Return the arguments of the one command of the pages that starts so."""
    (command,) = (line for line in commands() if line.startswith(start))
    return shlex.split(command)[3:]


def test_simulations_are_written(tmp_path):
    out = tmp_path / "simulations.npz"
    arguments = ["simulate", "--task", "two_moons", "--budget", "50"]
    assert tasks_main([*arguments, "--out", str(out)]) == 0
    with np.load(out) as file:
        assert file["theta"].shape == file["x"].shape == (50, 2)


def with_three_epochs(train):
    """Return a method `train` with three epochs, and its signature."""

    @wraps(train)
    def short(self, *args, **kwargs):
        return train(self, *args, **{"max_num_epochs": 3, **kwargs})

    return short


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_run_of_the_page_makes_rows_and_their_report(tmp_path, monkeypatch):
    need_published_data()
    for trainer in (NPE, JeffreysNPE):
        monkeypatch.setattr(trainer, "train", with_three_epochs(trainer.train))
    folder = tmp_path / "results"
    # Of an option that is given twice the last counts.
    fewer = ["--budget", "60", "--observations", "1-2", "--num-samples", "100"]
    arguments = arguments_of("python -m tasks run")
    assert tasks_main([*arguments, *fewer, "--results", str(folder)]) == 0
    assert tasks_main(["report", str(folder)]) == 0
    rows = pd.read_csv(folder / "report/results.csv")
    assert set(rows["status"]) == {"ok"}
    assert sorted(rows["method"]) == ["jeffreys"] * 2 + ["npe_nsf"] * 2
    assert (rows["epochs"] <= 6).all() and rows["c2st"].between(0.3, 1).all()


@pytest.mark.slow
def test_the_report_of_the_committed_rows_is_the_committed_one(tmp_path):
    arguments = arguments_of("python -m tasks report tasks/reports")
    rows = ROOT / arguments[1]
    assert tasks_main(["report", str(rows), "--out", str(tmp_path)]) == 0
    for path in rows.parent.iterdir():
        if path.suffix in (".md", ".csv"):
            assert (tmp_path / path.name).read_text() == path.read_text(), path.name
        else:
            assert plt.imread(tmp_path / path.name).std() > 0.01  # not blank


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_links_to_files_lead_somewhere(page):
    text = FENCE.sub("", text_of(page))
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target
