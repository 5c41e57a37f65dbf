"""The study of `check_fit`'s alarms: its observations, and its shares."""

import re

import pandas as pd
import pytest
import torch

from sbi_jeffreys import JeffreysNPE
from tasks.studies import alarms
from tasks.studies.rows import run_trainings


def test_observations_are_what_they_are_called():
    torch.manual_seed(0)
    scale = torch.tensor([0.1, 1.0, 50.0])
    x, fresh = (scale * torch.randn(num, 3) for num in (4_000, 3_000))
    of = alarms.observations(x, fresh)
    assert torch.equal(of["good"], fresh)
    torch.testing.assert_close(
        (of["far"] - fresh) / scale, torch.full((3_000, 3), 10.0), rtol=0.05, atol=0
    )
    # Independent noise doubles the variance; five standard errors of it are 0.26.
    ratio = of["noisy"].var(0) / fresh.var(0)
    torch.testing.assert_close(ratio, torch.full((3,), 2.0), rtol=0, atol=0.26)


def test_shares_are_means_over_the_seeds():
    share = {("a", 1): 0.0, ("a", 2): 0.1, ("b", 1): 0.05, ("b", 2): 0.25}
    rows = pd.DataFrame([
        {
            "task": task,
            "budget": 1000,
            "seed": seed,
            "kind": kind,
            "objected": 1.0 if kind == "far" else value,
            "novelty": 0.5 if kind == "far" else 0.0,
            "disagreement": value,
            "calibration": 0.0,
            "coverage_90": 0.85 if task == "a" else None,
        }
        for (task, seed), value in share.items()
        for kind in ("good", "far")
    ])
    text = alarms.report(rows)
    cells = [
        [c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()
    ]
    assert ["task", "good", "far", "90 % regions hold"] in cells
    assert ["a", "5.0%", "100.0%", "85.0%"] in cells
    assert ["**mean**", "10.0%", "100.0%", "–"] in cells
    assert "4 trainings with 2 seed(s)" in text and "good ones is 25%" in text
    assert ["far", "50.0%", "10.0%", "0.0%"] in cells


def test_without_rows_there_is_no_report(tmp_path, monkeypatch, capsys):
    command = ["alarms", "--out", str(tmp_path / "rows.csv"), "--report"]
    monkeypatch.setattr("sys.argv", command)
    assert run_trainings("Alarms.", (31,), alarms.run, alarms.report) == 2
    assert "rows.csv has no rows; run it without --report" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--report", "--tasks=slcp"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'tasks = ["slcp"]\nbudgets = [100]\n', "it has no column '(budget|task)'"),
        (b"a = 1\nb = 2\nc = [1, 2]\n", "Error tokenizing data"),
        (b"", "No columns"),
        (b"\x89PNG\xff", "'utf-8' codec can't decode"),
    ],
)
def test_a_file_that_is_no_table_of_alarms_is_said(
    content, message, option, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "small.toml"
    path.write_bytes(content)
    monkeypatch.setattr("sys.argv", ["alarms", "--out", str(path), option])
    assert run_trainings("Alarms.", (31,), alarms.run, alarms.report) == 2
    error = capsys.readouterr().err
    assert re.match(f"error: .*small.toml is no table of this study: {message}", error)
    assert error.count("\n") == 1 and path.read_bytes() == content


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_far_observations_of_a_task_are_objected_to(monkeypatch):
    train = JeffreysNPE.train
    monkeypatch.setattr(
        JeffreysNPE, "train", lambda self: train(self, max_num_epochs=8)
    )
    monkeypatch.setattr(alarms, "NUM_OBSERVATIONS", 20)
    monkeypatch.setattr(alarms, "NUM_FRESH", 50)
    rows = pd.DataFrame(alarms.run("gaussian_linear", 200, 1)).set_index("kind")
    assert list(rows.index) == ["good", "noisy", "far"]
    assert rows["objected"]["far"] == 1.0
    assert rows["novelty"]["far"] == 1.0
    assert rows["novelty"]["good"] < 0.2
    assert 0 < rows["coverage_90"]["good"] <= 1
