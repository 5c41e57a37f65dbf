"""The benchmark of simulation times the simulations that a run makes."""

import sys

import torch

from tasks import TASKS
from tasks.benchmarks import simulation


def test_every_task_is_simulated_and_timed(monkeypatch, capsys):
    now = 0.0
    threads = []

    def simulate(name, num_simulations, seed):
        nonlocal now
        threads.append(torch.get_num_threads())
        now += num_simulations / 8 + TASKS.index(name)

    monkeypatch.setattr("time.process_time", lambda: now)
    monkeypatch.setattr(simulation, "simulate", simulate)
    monkeypatch.setattr(sys, "argv", ["simulation", "--budget", "6"])
    torch.set_num_threads(2)
    simulation.main()
    header, rule, *rows = capsys.readouterr().out.splitlines()
    assert (header, rule) == ("| task | seconds |", "|---|---|")
    assert rows == [f"| {name} | {i + 0.75:.2f} |" for i, name in enumerate(TASKS)]
    assert threads == [1] * len(TASKS)


def test_simulations_are_real_by_default(monkeypatch, capsys):
    made = []
    simulate = simulation.simulate

    def recording(name, num_simulations, seed):
        made.append((name, num_simulations))
        return simulate(name, 10, seed)

    monkeypatch.setattr(simulation, "simulate", recording)
    monkeypatch.setattr(sys, "argv", ["simulation"])
    simulation.main()
    assert made == [(name, 100_000) for name in TASKS]
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(TASKS)
