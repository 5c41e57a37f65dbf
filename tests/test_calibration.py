"""The calibration study, on posteriors that are known to be right or wrong."""

import contextlib
import json
import math
import re
import signal

import numpy as np
import pandas as pd
import pytest
import torch

from sbi_jeffreys.metrics import Coverage
from tasks.methods import METHODS, Fit, Method
from tasks.run import simulate
from tasks.studies import calibration
from tasks.studies.calibration import Key, compare, errors_of, main, read_rows

TASK = "gaussian_linear"


class Posterior:
    """The posterior of `gaussian_linear`, its standard deviation multiplied."""

    def __init__(self, scale: float, error: Exception | None = None) -> None:
        self.scale = scale
        self.error = error

    def sample_batched(self, sample_shape, x, show_progress_bars=True):
        if self.error is not None:
            raise self.error
        noise = torch.randn(*sample_shape, *x.shape)
        return x / 2 + self.scale * math.sqrt(0.05) * noise


class Known(Method):
    """Known posteriors, which need no training; the trainings are counted."""

    def __init__(self, error: Exception | None = None, **posteriors) -> None:
        self.names = tuple(posteriors)
        self.posteriors = posteriors
        self.error = error
        self.problems = []

    def settings(self, name):
        return {"known": name}

    def check_train_arguments(self, train):
        pass

    def fit(self, problem):
        self.problems.append(problem)
        if self.error is not None:
            raise self.error
        return Fit(dict(self.posteriors), epochs=0, validation_loss=0.0)


@pytest.fixture
def known(monkeypatch):
    """Two methods: the right posterior, and one too narrow with one too wide."""
    methods = Known(right=Posterior(1)), Known(narrow=Posterior(0.6), wide=Posterior(2))
    for method in methods:
        for name in method.names:
            monkeypatch.setitem(METHODS, name, method)
    return methods


def study(folder, *more: str, methods="right narrow wide", seeds="1") -> int:
    arguments = ["--tasks", TASK, "--methods", *methods.split(), "--budget", "20"]
    arguments += ["--seeds", seeds, "--fresh", "150", "--num-samples", "50"]
    return main([*arguments, "--results", str(folder / "rows"), *more])


def test_one_training_for_all_posteriors_on_the_same_simulations(known, tmp_path):
    assert study(tmp_path) == 0
    right, others = known
    assert len(right.problems) == len(others.problems) == 1
    theta, x = simulate(TASK, 20, 1)
    for method in known:
        torch.testing.assert_close(method.problems[0].theta, theta)
        torch.testing.assert_close(method.problems[0].x, x)
    assert right.problems[0].seed == others.problems[0].seed
    rows = read_rows(tmp_path / "rows")
    assert list(rows) == [Key(TASK, n, 20, 1) for n in ("right", "narrow", "wide")]
    for row in rows.values():
        assert np.shape(row["ranks"]) == (150, 10)
        assert np.shape(row["distance_ranks"]) == (150,)
        assert row["settings"]["num_samples"] == 50 and row["status"] == "ok"


def test_fresh_simulations_are_fresh_and_depend_on_the_seed():
    first, second, again = (
        calibration.fresh_simulations(calibration.Unit(TASK, ("any",), 20, seed, 150))
        for seed in (1, 2, 1)
    )
    for old, new, same in zip(first, second, again, strict=True):
        assert not torch.isclose(old, new).any() and torch.equal(old, same)
    assert not torch.isin(first[0], simulate(TASK, 150, 1)[0]).any()


def test_same_command_makes_only_what_is_missing(known, tmp_path):
    study(tmp_path)
    files = sorted((tmp_path / "rows").rglob("*.json"))
    assert len(files) == 3
    before = {file: file.read_text() for file in files}
    (gone,) = (file for file in files if "wide" in str(file))
    gone.unlink()
    study(tmp_path)
    assert [len(method.problems) for method in known] == [1, 2]
    for file in files:
        if file != gone:
            assert file.read_text() == before[file]
    # The row that was made again has the same ranks.
    old, new = json.loads(before[gone]), json.loads(gone.read_text())
    assert old["ranks"] == new["ranks"]
    study(tmp_path, seeds="1-2")
    assert [len(method.problems) for method in known] == [2, 3]
    assert len(read_rows(tmp_path / "rows")) == 6


def test_narrow_and_wide_are_worse_than_right(known, tmp_path, capsys):
    out = tmp_path / "report"
    more = ["--report", str(out), "--against", "right"]
    assert study(tmp_path, *more, seeds="1-2") == 0
    compared = pd.read_csv(out / "comparison.csv", keep_default_na=False)
    assert len(compared) == 4 and set(compared["verdict"]) == {"worse"}
    rows = pd.read_csv(out / "rows.csv").set_index("method")
    error = 3 * rows["atc_standard_error"]
    assert (rows["atc"].abs() < error)["right"].all()
    assert (rows["atc"] < -error)["narrow"].all()
    assert (rows["atc"] > error)["wide"].all()
    # 2 Phi(0.6 z) - 1 with z = 1.645; 150 simulations of ten parameters.
    assert rows.loc["narrow", "interval_90"].mean() == pytest.approx(0.676, abs=0.04)
    assert rows.loc["right", "interval_90"].mean() == pytest.approx(0.9, abs=0.03)
    text = (out / "report.md").read_text()
    assert f"## {TASK}, 20 simulations" in text and "## Failed" not in text
    (line,) = re.findall(r"^\| narrow \| 2/2 .*", text, re.MULTILINE)
    assert line.count("worse") == 2 and "| -0.0" in line
    (line,) = re.findall(r"^\| right \| 2/2 .*", text, re.MULTILINE)
    assert line.endswith("| – |")
    assert f"1 of 1: {TASK}" in text
    assert "6 rows, 0 of them failed" in capsys.readouterr().out
    # Against what is worse, the right one is better.
    study(tmp_path, "--report", str(out), "--against", "narrow", "wide")
    compared = pd.read_csv(out / "comparison.csv", keep_default_na=False)
    assert set(compared["verdict"]) == {"better"} and len(known[0].problems) == 2


def levels_as_coverage(levels: torch.Tensor) -> Coverage:
    ranks = (1001 * levels).long().clamp(0, 1000)
    return Coverage(ranks[:, :-1], ranks[:, -1], 1000)


def row_of(coverage: Coverage) -> dict:
    return {
        "status": "ok",
        "ranks": coverage.ranks.tolist(),
        "distance_ranks": coverage.distance_ranks.tolist(),
        "settings": {"num_samples": coverage.num_posterior_samples},
    }


def draw_pair() -> tuple[Coverage, Coverage]:
    """Return coverages of a narrow and of a less narrow posterior, which share much."""
    z = torch.randn(600, 4)
    normal = torch.distributions.Normal(0.0, 1.0)
    narrow = levels_as_coverage(normal.cdf(z / 0.5))
    z = 0.9 * z + math.sqrt(1 - 0.9**2) * torch.randn(600, 4)
    return narrow, levels_as_coverage(normal.cdf(z / 0.7))


def test_standard_error_of_a_difference_is_its_spread_over_repetitions():
    pairs = [draw_pair() for _ in range(300)]
    differences = {
        metric: np.array([
            errors_of(a)[metric] - errors_of(b)[metric] for a, b in pairs
        ])
        for metric in ("sbc", "atc")
    }
    rows = {}
    for seed in range(4):
        for name, coverage in zip(("narrow", "less"), pairs[seed], strict=True):
            rows[Key(TASK, name, 20, seed)] = row_of(coverage)
    compared = compare(rows, ["less"]).set_index("metric")
    for metric, values in differences.items():
        line = compared.loc[metric]
        # Of the mean over four seeds.
        assert line["standard_error"] == pytest.approx(values.std() / 2, rel=0.2)
        error = 4 * values.std() / 2
        assert line["difference"] == pytest.approx(values.mean(), abs=error)
        assert line["std_seeds"] == pytest.approx(values[:4].std(ddof=1), rel=1e-5)
        assert line["verdict"] == "worse" and line["seeds"] == 4


def test_equals_are_seldom_called_worse():
    # Levels independent of each other, so that nothing cancels.
    rows = {}
    for seed in range(40):
        for name in ("ours", "peer"):
            levels = levels_as_coverage(torch.rand(200, 3))
            rows[Key(TASK, name, seed, 0)] = row_of(levels)
    verdicts = compare(rows, ["peer"])["verdict"]
    # 80 comparisons, of which 2.3 % may be either; three times as many are rare.
    assert (verdicts == "worse").sum() <= 6 and (verdicts == "better").sum() <= 6


def test_errors_are_recorded_and_the_study_goes_on(monkeypatch, tmp_path, capsys):
    no_training = Known(ValueError("no | convergence"), lost=Posterior(1))
    half = Known(good=Posterior(1), bad=Posterior(1, RuntimeError("no sample")))
    unbuilt = Known(unbuilt=TypeError("cannot be built"))
    for method in (no_training, half, unbuilt):
        for name in method.names:
            monkeypatch.setitem(METHODS, name, method)
    names, out = "lost good bad unbuilt", tmp_path / "report"
    more = ["--report", str(out), "--against", "good"]
    assert study(tmp_path, *more, methods=names) == 1
    rows = {k.method: row for k, row in read_rows(tmp_path / "rows").items()}
    assert {name: row["error"] for name, row in rows.items()} == {
        "lost": "ValueError: no | convergence",
        "good": "",
        "bad": "RuntimeError: no sample",
        "unbuilt": "TypeError: cannot be built",
    }
    assert "in fit" in rows["lost"]["traceback"]
    text = (out / "report.md").read_text()
    assert r"| ValueError: no \| convergence |" in text and "| bad | 0/1 | –" in text
    # Failed rows are left alone, and counted, unless asked for.
    capsys.readouterr()
    assert study(tmp_path, methods=names) == 1 and len(half.problems) == 1
    out = capsys.readouterr().out
    assert "0 rows added, 4 were there, 3 of them failed." in out
    assert "`--retry-failed` runs failed rows again." in out
    assert study(tmp_path, methods="good") == 0
    no_training.error = None
    assert study(tmp_path, "--retry-failed", methods=names) == 1
    assert read_rows(tmp_path / "rows")[Key(TASK, "lost", 20, 1)]["status"] == "ok"
    assert [len(m.problems) for m in (no_training, half, unbuilt)] == [2, 2, 2]


def test_rows_that_are_retried_may_have_had_other_settings(monkeypatch, tmp_path):
    method = Known(ValueError("no"), one=Posterior(1), two=Posterior(1))
    for name in method.names:
        monkeypatch.setitem(METHODS, name, method)
    assert study(tmp_path, "--fresh", "100", methods="one") == 1
    method.error = None
    assert study(tmp_path, methods="one two") == 2
    assert study(tmp_path, "--retry-failed", methods="one two") == 0
    rows = read_rows(tmp_path / "rows").values()
    assert [row["status"] for row in rows] == ["ok", "ok"]
    # Those that have not failed may not.
    assert study(tmp_path, "--retry-failed", "--fresh", "100", methods="one") == 2


def test_all_failed_makes_a_report_nevertheless(monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "lost", Known(ValueError("no"), lost=Posterior(1)))
    assert study(tmp_path, "--report", str(tmp_path), methods="lost") == 1
    assert "| lost | 0/1 |" in (tmp_path / "report.md").read_text()


def test_ctrl_c_leaves_whole_rows(known, tmp_path, capsys, monkeypatch):
    class Stubborn(Known):
        """As `JeffreysNPE`, which ends its training with the best network so far."""

        def fit(self, problem):
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            return super().fit(problem)

    monkeypatch.setitem(METHODS, "stubborn", Stubborn(stubborn=Posterior(1)))
    assert study(tmp_path, methods="right stubborn wide") == 130
    assert list(read_rows(tmp_path / "rows")) == [Key(TASK, "right", 20, 1)]
    assert "goes on from here" in capsys.readouterr().err
    assert not [p for p in tmp_path.rglob(".*") if p.is_file()]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fresh", "200"], "'num_fresh': 150.*Name another folder"),
        (["--num-samples", "60"], "other settings"),
        (["--fresh", "1"], "--fresh must be at least 2, got 1"),
        (["--budget", "0"], "--budget must be at least 1, got 0"),
        (["--tasks", "no_task"], "unknown task 'no_task'. Known: two_moons"),
        (["--methods", "no_method"], "unknown method 'no_method'"),
        (["--methods", "snpe"], "snpe is trained for one observation"),
        (["--seeds", "x"], "seeds: expected numbers"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--tasks", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["--against", "right", "--report", "/dev/null/x"], "ot a directory"),
    ],
)
def test_wrong_input(known, tmp_path, capsys, more, message):
    study(tmp_path)
    capsys.readouterr()
    assert study(tmp_path, *more) == 2
    assert re.search(message, capsys.readouterr().err)
    assert [len(method.problems) for method in known] == [1, 1]


def test_report_of_nothing_and_of_files_that_are_not_rows(known, tmp_path, capsys):
    report = ["--report", str(tmp_path / "report")]
    nothing = ["--tasks", "--results", str(tmp_path / "rows"), *report]
    assert main(nothing) == 2
    assert "holds no rows" in capsys.readouterr().err
    study(tmp_path)
    (file,) = (tmp_path / "rows").glob("*/wide/*")
    text = file.read_text()
    for wrong in (text[:-10], text.replace('"seed": 1', '"seed": 2'), "[]"):
        file.write_text(wrong)
        assert main(nothing) == 2
        assert str(file) in capsys.readouterr().err
    file.write_text(text)
    assert main(nothing) == 0 and (tmp_path / "report" / "report.md").exists()


def test_methods_on_different_simulations_are_not_compared():
    rows = {
        Key(TASK, name, 20, 1): row_of(levels_as_coverage(torch.rand(num, 3)))
        for name, num in (("ours", 100), ("peer", 120))
    }
    with pytest.raises(ValueError, match="of 100 and 120 fresh simulations"):
        compare(rows, ["peer"])
