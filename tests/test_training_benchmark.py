"""The benchmark of training: what its stopwatch counts, and that its commands run."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from sbi_jeffreys import objective
from sbi_jeffreys.energy import ConditionalEnergy
from sbi_jeffreys.residual_flow import ResidualFlow
from sbi_jeffreys.stages import Stage
from tasks.benchmarks import training
from tasks.benchmarks.training import EPOCHS, PARTS, Stopwatch, main

pytestmark = pytest.mark.filterwarnings("ignore:Maximum number of epochs")

BUDGET = 60


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command at a tiny size, and return the rows of its table."""
    monkeypatch.setattr(training, "EPOCHS", {BUDGET: 8})
    monkeypatch.setattr(training, "REPETITIONS", {BUDGET: 1, 1_000: 1})
    monkeypatch.setattr(training, "NUM_SAMPLES", 20)

    def run(*arguments: str) -> list[dict[str, str]]:
        monkeypatch.setattr(sys, "argv", ["training", *arguments])
        main()
        header, rule, *rows = (
            [cell.strip() for cell in line.strip().strip("|").split("|")]
            for line in capsys.readouterr().out.splitlines()
        )
        assert rule == ["---"] * len(header)
        return [dict(zip(header, row, strict=True)) for row in rows]

    return run


def test_stopwatch_counts_what_is_nested_once(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.process_time", lambda: now)

    def work(seconds, then=None):
        nonlocal now
        now += seconds
        if then is not None:
            then()
            now += seconds

    def fail():
        work(64)
        raise StopIteration

    watch = Stopwatch()
    inner = watch.timed(lambda: work(4), "inner", "without")
    outer = watch.timed(lambda: work(16, inner), "outer")
    work(1)
    outer()
    with torch.no_grad():
        inner()
    with pytest.raises(StopIteration):
        watch.timed(fail, "failing")()
    work(2)
    watch.lap("first")
    inner()
    watch.lap("second")
    parts = {"rest": 3, "outer": 32, "inner": 4, "without": 4, "failing": 64}
    assert watch.laps == [("first", parts), ("second", {"rest": 0, "inner": 4})]


def test_profile_says_what_each_stage_does(run):
    before = objective.rsample_and_log_prob, ResidualFlow.log_prob
    before += ConditionalEnergy.forward, torch.Tensor.backward
    rows = run("profile", "--tasks", "two_moons", "--budgets", f"{BUDGET}")
    after = objective.rsample_and_log_prob, ResidualFlow.log_prob
    after += ConditionalEnergy.forward, torch.Tensor.backward
    assert after == before

    assert [row["stage"] for row in rows] == [stage.value for stage in Stage]
    shares = {
        row["stage"]: {part: float(row[name]) for part, name in PARTS.items()}
        for row in rows
    }
    for stage, share in shares.items():
        # Each is rounded.
        assert sum(share.values()) == pytest.approx(100, abs=0.05 * len(PARTS))
        for part in ("densities", "backward", "step"):
            assert share[part] > 0, (stage, part)
    assert shares["likelihood"]["likelihoods"] > shares["flow"]["likelihoods"] == 0
    for stage in ("flow", "likelihood"):
        for part in ("inversion", "proxy", "judged"):
            assert shares[stage][part] == 0, (stage, part)
    for part in ("inversion", "proxy", "judged"):
        assert shares["proxy"][part] > 0, part
    # So short a training may leave a proxy that the flow does not follow.
    for part in ("inversion", "judged"):
        assert shares["distillation"][part] > 0, part


def test_epochs(run):
    (row,) = run("epochs", "--tasks", "two_moons", "--budgets", f"{BUDGET}")
    assert (row.pop("task"), row.pop("simulations")) == ("two_moons", f"{BUDGET}")
    assert len(row) == 8
    assert all(float(value) > 0 for value in row.values())


@pytest.mark.slow
def test_converged(run, monkeypatch):
    train = training.NPE.train
    now = 0.0

    def short(self, *args, **kwargs):
        nonlocal now
        now += 8.0 if type(self) is training.NPE else 100.0
        return train(self, *args, **{**kwargs, "max_num_epochs": 9})

    monkeypatch.setattr(training.NPE, "train", short)
    monkeypatch.setattr("time.perf_counter", lambda: now)
    (row,) = run("converged", "--tasks", "two_moons", "--budgets", f"{BUDGET}")
    assert list(row.values()) == (
        ["two_moons", f"{BUDGET}", "8", "10", "100", "10", "100", "10"]
        + ["12.50", "12.50"]
    )


@pytest.mark.slow
def test_sampling(run, monkeypatch):
    trainer = training.trainer
    monkeypatch.setattr(
        training, "trainer", lambda kind, task, _, **own: trainer(kind, task, 60, **own)
    )
    (row,) = run("sampling", "--tasks", "two_moons")
    assert row.pop("task") == "two_moons"
    assert len(row) == 3
    assert all(float(value) > 0 for value in row.values())


def test_flows(run):
    rows = run("flows")
    assert [(row.pop("flow"), row.pop("dimensions")) for row in rows] == [
        (flow, dim) for flow in ("maf", "nsf") for dim in ("2", "5", "10")
    ]
    assert all(float(value) > 0 for row in rows for value in row.values())
    assert all(len(row) == 3 for row in rows)


def test_memory_is_the_ratio_of_two_peaks(run, monkeypatch):
    peaks = {"NPE": "100.0 400.0\n", "JeffreysNPE": "150.0 500.0\n"}

    def run_process(command, **kwargs):
        _, _, module, measurement, kind, *rest = command
        assert (module, measurement) == ("tasks.benchmarks.training", "peak")
        assert rest == ["two_moons", "--flow", "maf"]
        return SimpleNamespace(stdout="a warning\n" + peaks[kind])

    monkeypatch.setattr(subprocess, "run", run_process)
    (row,) = run("memory", "--tasks", "two_moons")
    assert list(row.values()) == ["two_moons", "400", "1.25", "300", "350"]


@pytest.mark.slow
def test_peak(monkeypatch, capsys):
    trainer = training.trainer
    monkeypatch.setattr(
        training, "trainer", lambda kind, task, _, **own: trainer(kind, task, 60, **own)
    )
    monkeypatch.setattr(sys, "argv", ["training", "peak", "JeffreysNPE", "two_moons"])
    main()
    before, after = map(float, capsys.readouterr().out.split())
    assert 50 < before <= after


def test_epochs_are_enough_for_every_stage():
    """The first epoch is not timed, and stages share what there are."""
    for num_epochs in EPOCHS.values():
        assert num_epochs >= 2 * len(Stage)
