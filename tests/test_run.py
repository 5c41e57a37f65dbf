"""One unit of work: seeds, figures, failures, and what is written."""

import contextlib
import json
import resource
import signal
import subprocess
import time
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from fake_method import FakeMethod, mean_distances, need_published_data
from sbi.inference import NPE
from sbi.utils.sbiutils import seed_all_backends

from sbi_jeffreys import NoTracker, metrics
from tasks import get_task
from tasks.errors import InputError
from tasks.methods import METHODS, Fit, Sequential
from tasks.results import COLUMNS, METRICS, Key, key_of, load, read_rows, write_row
from tasks.run import CHUNK, COMMIT, Unit, chunks, run_unit, seed_of, simulate
from tasks.two_moons import TwoMoons


def unit(method, *rows, **arguments) -> Unit:
    arguments = {"budget": 50, "seed": 1, "num_samples": 40, **arguments}
    return Unit(task="two_moons", method=method, rows=rows, **arguments)


@pytest.fixture
def quick_scores(monkeypatch) -> None:
    need_published_data()
    monkeypatch.setattr("tasks.run.metrics.c2st_many", mean_distances)


@pytest.fixture
def fake(tmp_path, quick_scores) -> FakeMethod:
    return FakeMethod(tmp_path / "trainings")


def test_simulations_depend_on_task_budget_and_seed_alone():
    theta, x = simulate("two_moons", 50, 3)
    torch.rand(7)
    again = simulate("two_moons", 50, 3)
    assert torch.equal(theta, again[0]) and torch.equal(x, again[1])
    assert theta.shape == x.shape == (50, 2)
    others = [("two_moons", 50, 4), ("two_moons", 51, 3), ("gaussian_mixture", 50, 3)]
    for other in others:
        assert not torch.equal(theta[:50], simulate(*other)[0][:50])


def test_large_simulations_are_chunks_with_seeds_of_their_own():
    budget = 2 * CHUNK + 5
    theta, x = simulate("two_moons", budget, 1)
    assert theta.shape == (budget, 2)
    assert len(theta.unique(dim=0)) == budget
    parts = chunks("two_moons", budget, 1)
    # In any order, in any process.
    last, first = parts[2].simulate(), parts[0].simulate()
    assert torch.equal(theta[:CHUNK], first[0]) and torch.equal(x[:CHUNK], first[1])
    assert torch.equal(theta[2 * CHUNK :], last[0])


def test_seeds_are_distinct_and_stable():
    seeds = {
        seed_of("simulations", "two_moons", b, s) for b in range(50) for s in range(50)
    }
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**31 for seed in seeds)
    # Rows made by one version are gone on with by the next.
    assert seed_of("simulations", "two_moons", 1000, 1, 0) == 1029400045


def test_row_has_the_figures_that_plain_sbi_gives():
    need_published_data()
    train = {"max_num_epochs": 3}
    (row,) = run_unit(
        unit(
            METHODS["npe_maf"], ("npe_maf", 4), budget=100, num_samples=100, train=train
        )
    )
    assert row["status"] == "ok", row["traceback"]

    task = get_task("two_moons")
    seed_all_backends(seed_of("simulations", "two_moons", 100, 1, 0))
    theta = task.prior.sample((100,))
    x = task.simulator(theta)
    trainer = NPE(task.prior, "maf", tracker=NoTracker(), show_progress_bars=False)
    trainer.append_simulations(theta, x)
    seed_all_backends(seed_of("training", "two_moons", 100, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(max_num_epochs=3)
    posterior = trainer.build_posterior()
    seed_all_backends(seed_of("samples", "two_moons", 100, 1, 4))
    samples = posterior.sample(
        (100,), x=task.observation(4), show_progress_bars=False
    ).detach()

    reference = task.reference_posterior_samples(4)[:100]
    assert row["c2st"] == pytest.approx(metrics.c2st(reference, samples))
    assert row["mmd"] == pytest.approx(metrics.mmd(reference, samples))
    assert row["sliced_wasserstein"] == pytest.approx(
        metrics.sliced_wasserstein(reference, samples)
    )
    marginal = [metrics.c2st(reference[:, [i]], samples[:, [i]]) for i in range(2)]
    assert row["marginal_c2st_mean"] == pytest.approx(sum(marginal) / 2)
    assert row["marginal_c2st_max"] == pytest.approx(max(marginal))
    # sbi estimates the mass within the prior's support by sampling.
    seed_all_backends(seed_of("scores", "two_moons", 100, 1, 4))
    log_prob = posterior.log_prob(task.true_parameters(4), x=task.observation(4))
    assert row["log_prob_true_parameters"] == pytest.approx(log_prob.item())
    assert row["epochs"] == 4
    assert row["validation_loss"] == trainer.summary["best_validation_loss"][-1]
    assert any("max_num_epochs=3" in message for message in row["warnings"])
    assert row["settings"] == {
        "trainer": "NPE_C",
        "constructor": {"density_estimator": "maf"},
        "posterior": {},
        "train": train,
        "num_samples": 100,
    }
    for cost in ("simulation", "training", "sampling", "scoring"):
        assert row[f"{cost}_seconds"] > 0


def test_rows_say_which_commit_made_them(fake):
    root = Path(__file__).parents[1]
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    head = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if head.returncode:
        pytest.skip("this copy of the repository is no clone")
    (row,) = run_unit(unit(fake, ("fake", 1)))
    assert row["commit"].removesuffix("-dirty") == head.stdout.strip()


def test_the_commit_is_that_of_the_code_that_runs(fake, monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("read too late")

    monkeypatch.setattr(subprocess, "run", refuse)
    (row,) = run_unit(unit(fake, ("fake", 1)))
    assert row["commit"] == COMMIT


def test_posteriors_of_one_training_share_it(fake, tmp_path, capsys):
    both = FakeMethod(tmp_path / "both", names=("flow", "refined"))
    rows = run_unit(unit(both, ("flow", 1), ("refined", 1), ("flow", 2)))
    assert both.trainings() == 1
    assert [(r["method"], r["observation"]) for r in rows] == [
        ("flow", 1),
        ("refined", 1),
        ("flow", 2),
    ]
    assert len({row["training_seconds"] for row in rows}) == 1
    assert all(set(row) == set(COLUMNS) and row["status"] == "ok" for row in rows)
    # The prior of two_moons is uniform on [-1, 1]².
    assert rows[0]["log_prob_true_parameters"] == pytest.approx(-1.386, abs=1e-3)
    assert capsys.readouterr().out == ""


def test_only_the_wanted_metrics_are_scored(fake, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("not wanted")

    wanted = ("mmd", "log_prob_true_parameters")
    for name in ("c2st_many", "sliced_wasserstein"):
        monkeypatch.setattr(f"tasks.run.metrics.{name}", refuse)
    (row,) = run_unit(unit(fake, ("fake", 1), metrics=wanted))
    assert row["status"] == "ok", row["traceback"]
    assert {name for name in METRICS if not pd.isna(row[name])} == set(wanted)


def test_training_error_is_in_every_row(tmp_path):
    method = FakeMethod(tmp_path / "log", train_error=ArithmeticError("no luck"))
    rows = run_unit(unit(method, ("fake", 1), ("fake", 2)))
    assert len(rows) == 2
    for row in rows:
        assert row["status"] == "failed"
        assert row["error_type"] == "ArithmeticError"
        assert row["error_message"] == "no luck"
        assert "fake_method.py" in row["traceback"]
        assert all(pd.isna(row[metric]) for metric in METRICS)


@pytest.mark.usefixtures("quick_scores")
def test_simulations_of_rounds_are_no_training(tmp_path, monkeypatch):
    simulate, took = TwoMoons.simulator, []

    def slow(task, theta):
        start = time.perf_counter()
        time.sleep(0.2)
        x = simulate(task, theta)
        took.append(time.perf_counter() - start)
        return x

    monkeypatch.setattr(TwoMoons, "simulator", slow)
    method = Sequential(NPE, {"s": {}}, rounds=4, density_estimator="mdn")
    few = {"max_num_epochs": 1}
    start = time.perf_counter()
    (row,) = run_unit(unit(method, ("s", 1), budget=100, train=few))
    whole = time.perf_counter() - start
    assert row["status"] == "ok", row["traceback"]
    # A quarter of the call that made all, and three of the training's own.
    first, *later = took
    expected = first / 4 + sum(later)
    assert len(later) == 3
    assert row["simulation_seconds"] == pytest.approx(expected, abs=0.04)
    spent = sum(row[f"{part}_seconds"] for part in ("training", "sampling"))
    assert 0 < spent < whole - sum(took)


@pytest.mark.usefixtures("quick_scores")
def test_reading_the_observation_is_no_sampling(fake, monkeypatch):
    read = TwoMoons.observation

    def slow(task, number):
        time.sleep(0.3)
        return read(task, number)

    monkeypatch.setattr(TwoMoons, "observation", slow)
    (row,) = run_unit(unit(fake, ("fake", 1)))
    assert row["sampling_seconds"] < 0.3


@pytest.mark.usefixtures("quick_scores")
def test_sampling_error_costs_only_its_observation(tmp_path):
    task = get_task("two_moons")
    method = FakeMethod(
        tmp_path / "log",
        sample_error=RuntimeError("stuck"),
        bad_x=task.observation(2),
    )
    rows = {
        r["observation"]: r
        for r in run_unit(unit(method, *[("fake", o) for o in (1, 2, 3)]))
    }
    assert {o: row["status"] for o, row in rows.items()} == {
        1: "ok",
        2: "failed",
        3: "ok",
    }
    assert rows[2]["error_message"] == "stuck"
    assert rows[2]["training_seconds"] > 0


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.full((40, 2), float("nan")), "40 of 40 samples are not finite"),
        (torch.zeros(39, 2), r"gave the shape \(39, 2\)"),
    ],
)
def test_bad_samples_are_a_failure_not_a_figure(samples, message, fake, monkeypatch):
    monkeypatch.setattr("tasks.run.draw", lambda posterior, num, x: samples)
    (row,) = run_unit(unit(fake, ("fake", 1)))
    assert row["status"] == "failed"
    assert pd.Series([row["error_message"]]).str.contains(message).all()


@pytest.mark.usefixtures("quick_scores")
def test_scores_do_not_depend_on_the_other_rows_of_a_unit(tmp_path, monkeypatch):
    # As sbi's, and ours, of a flow that leaks out of the prior's support.
    def log_prob(self, theta, x):
        return self.prior.log_prob(theta) + torch.rand(len(theta))

    monkeypatch.setattr("fake_method.FakePosterior.log_prob", log_prob)
    method = FakeMethod(tmp_path / "log")
    _, second = run_unit(unit(method, ("fake", 1), ("fake", 2)))
    (alone,) = run_unit(unit(method, ("fake", 2)))
    for metric in METRICS:
        assert second[metric] == alone[metric], metric


@pytest.mark.usefixtures("quick_scores")
def test_posterior_that_was_not_built_fails_alone(tmp_path, monkeypatch):
    both = FakeMethod(tmp_path / "both", names=("good", "bad"))
    fit = both.fit

    def half(problem):
        whole = fit(problem)
        posteriors = {**whole.posteriors, "bad": ValueError("cannot be built")}
        return Fit(posteriors, whole.epochs, whole.validation_loss)

    monkeypatch.setattr(both, "fit", half)
    good, bad = run_unit(unit(both, ("good", 1), ("bad", 1)))[::-1]
    assert good["status"] == "ok"
    assert (bad["status"], bad["error_message"]) == ("failed", "cannot be built")


@pytest.mark.usefixtures("quick_scores")
@pytest.mark.parametrize("error", [None, ValueError("cut short")])
def test_ctrl_c_ends_a_training_that_would_go_on(error, tmp_path):
    class Stubborn(FakeMethod):
        """As `JeffreysNPE`, which ends its training with the best network so far."""

        def fit(self, problem):
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            return super().fit(problem)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_unit(unit(Stubborn(tmp_path / "log", train_error=error), ("fake", 1)))
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("quick_scores")
def test_threads_are_set_and_given_back(tmp_path):
    before = torch.get_num_threads()
    seen = []

    class Spy(FakeMethod):
        def fit(self, problem):
            seen.append(torch.get_num_threads())
            return super().fit(problem)

    (row,) = run_unit(unit(Spy(tmp_path / "log"), ("fake", 1), threads=before + 1))
    assert seen == [before + 1] and torch.get_num_threads() == before
    assert row["threads"] == before + 1


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a peak"
)
def test_peak_memory_is_that_of_the_unit(fake, tmp_path):
    resident = []

    class Hungry(FakeMethod):
        def fit(self, problem):
            held = torch.zeros(300 * 2**20 // 4).add_(1)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(pages * resource.getpagesize() / 2**20)
            del held
            return super().fit(problem)

    (hungry,) = run_unit(unit(Hungry(tmp_path / "log"), ("fake", 1)))
    (after,) = run_unit(unit(fake, ("fake", 1)))
    # In this order, since what other tests left may be freed meanwhile.
    assert hungry["peak_memory_mb"] >= resident[0] - 1
    assert after["peak_memory_mb"] < resident[0] - 200


def test_result_table_keeps_rows_as_they_are(fake, tmp_path):
    rows = run_unit(unit(fake, ("fake", 1), ("fake", 2)))
    rows[1]["log_prob_true_parameters"] = float("-inf")
    folder = tmp_path / "results"
    for row in rows:
        write_row(folder, row)
    write_row(folder, rows[0])
    back = {key_of(row): row for row in read_rows(folder)}
    assert len(back) == 2
    for row in rows:
        pd.testing.assert_series_equal(pd.Series(back[key_of(row)]), pd.Series(row))

    table = load(folder)
    assert list(table.columns) == list(COLUMNS)
    assert table["observation"].tolist() == [1, 2]
    assert table["log_prob_true_parameters"].tolist()[1] == float("-inf")
    assert json.loads(table["settings"][0])["num_samples"] == 40
    csv = tmp_path / "rows.csv"
    table.to_csv(csv, index=False)
    pd.testing.assert_frame_equal(load(csv), table)
    with pytest.raises(InputError, match="2 rows are in more than one"):
        load(folder, csv)


def test_only_whole_rows_are_read(fake, tmp_path):
    (row,) = run_unit(unit(fake, ("fake", 1)))
    path = write_row(tmp_path / "results", row)
    # What a kill in the middle of a write leaves behind.
    (path.parent / ".unfinished-0123").write_text('{"task": "two_mo')
    assert len(load(tmp_path / "results")) == 1

    path.write_text("{")
    with pytest.raises(InputError, match=f"{path} is not a row"):
        load(tmp_path / "results")
    path.write_text(json.dumps(key_of(row)._asdict()))
    with pytest.raises(InputError, match=f"{path} is not a row.*it has no status, "):
        load(tmp_path / "results")
    path.write_text(json.dumps({k: v for k, v in row.items() if k != "commit"}))
    assert load(tmp_path / "results")["commit"].tolist() == [""]
    path.write_text(json.dumps({**row, "seed": 2}))
    with pytest.raises(InputError, match=f"{path} .*seed=2.* does not belong there"):
        load(tmp_path / "results")
    path.write_text("[1]")
    with pytest.raises(InputError, match=f"{path} is not a row"):
        load(tmp_path / "results")
    # Whole JSON, but what is read later would be another row, or none.
    for name, value in (
        ("budget", 50.0),
        ("seed", "1"),
        ("observation", "1"),
        ("observation", 1.0),
        ("observation", True),
        ("task", 3),
        ("c2st", "abc"),
        ("epochs", None),
        ("settings", None),
        ("settings", {}),
        ("settings", {"num_samples": "40"}),
        ("warnings", "text"),
        ("warnings", [1]),
    ):
        path.write_text(json.dumps({**row, name: value}))
        for read in (load, lambda folder: list(read_rows(folder))):
            with pytest.raises(InputError, match=f"{path} is not a row"):
                read(tmp_path / "results")


def test_failed_write_leaves_the_old_row(fake, tmp_path, monkeypatch):
    (row,) = run_unit(unit(fake, ("fake", 1)))
    path = write_row(tmp_path, row)
    old = path.read_text()

    def full(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_row(tmp_path, {**row, "c2st": 0.9})
    assert path.read_text() == old
    assert list(path.parent.iterdir()) == [path]


def test_missing_results_are_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no results"):
        load(tmp_path)
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="not a result table"):
        load(tmp_path / "x.csv")


def test_row_must_be_complete(fake, tmp_path):
    (row,) = run_unit(unit(fake, ("fake", 1)))
    assert key_of(row) == Key("two_moons", "fake", 50, 1, 1)
    del row["c2st"]
    with pytest.raises(InputError, match="c2st"):
        write_row(tmp_path, row)
