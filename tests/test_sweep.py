"""Sweeps: what is wanted, what is left, and that nothing is lost, whatever dies."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_method import FakeMethod, mean_distances, need_published_data

from tasks import TASKS, get_task
from tasks.__main__ import main
from tasks.errors import InputError
from tasks.methods import METHODS
from tasks.results import METRICS, Key, key_of, load, read_rows
from tasks.run import Chunk, chunks, simulate
from tasks.scale import WorkerDied, executor
from tasks.sweep import Sweep, parse_numbers, run_sweep

ROOT = Path(__file__).parent.parent
GRID = {
    "tasks": ("two_moons",),
    "methods": ("fake",),
    "budgets": (20,),
    "seeds": (1, 2, 3),
    "observations": (1, 2),
    "num_samples": 30,
}
_SWEEP_OF_FAKE = """
tasks = ["two_moons"]
methods = ["fake"]
budgets = [20]
seeds = [1]
observations = [1, 2]
num_samples = 30
metrics = ["c2st", "mmd", "log_prob_true_parameters"]
"""
FILE = """
tasks = ["two_moons"]
methods = ["npe_maf"]
budgets = [1000]
seeds = "1-5"
observations = [1, 2]
"""


@pytest.fixture
def fake(tmp_path, monkeypatch) -> FakeMethod:
    need_published_data()
    # The classifiers of C2ST are the same whatever keeps the books.
    monkeypatch.setattr("tasks.run.metrics.c2st_many", mean_distances)
    return add(monkeypatch, FakeMethod(tmp_path / "trainings"))


def add(monkeypatch, method: FakeMethod) -> FakeMethod:
    for name in method.names:
        monkeypatch.setitem(METHODS, name, method)
    return method


def make(results: Path, sweep: Sweep | None = None, **options):
    return run_sweep(sweep or Sweep(**GRID), results, progress=False, **options)


def files(results: Path) -> dict[Path, int]:
    """Return the inode of every row's file: a row written again has a new one."""
    return {path: path.stat().st_ino for path in results.glob("*/*/*.json")}


def test_sweep_file_is_read(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text(FILE + "num_samples = 50\n[train]\nmax_num_epochs = 3\n")
    assert Sweep.from_toml(path) == Sweep(
        tasks=("two_moons",),
        methods=("npe_maf",),
        budgets=(1000,),
        seeds=(1, 2, 3, 4, 5),
        observations=(1, 2),
        num_samples=50,
        train={"max_num_epochs": 3},
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[1000]", "1000", "budgets: expected a list.*got 1000"),
        ("[1000]", "[]", "budgets: expected a list, not empty"),
        ("[1000]", "[0]", "budgets: expected whole numbers of at least 1, got 0"),
        ("[1000]", "['1000']", "budgets: expected whole numbers.*'1000'"),
        ("[1000]", "[1000, 1000]", r"budgets: \[1000, 1000\] holds a value twice"),
        ('"1-5"', '"five"', "seeds: expected numbers such as.*'five'"),
        ('"1-5"', "[true]", "seeds: expected whole numbers"),
        ("[1, 2]", "[1, 11]", "observations: .*from 1 to 10, got 11"),
        ("[1, 2]", '"0-3"', "observations: .*from 1 to 10, got 0"),
        ('["two_moons"]', '["moons"]', "unknown task 'moons'. Known.*two_moons"),
        ('["two_moons"]', '"two_moons"', "tasks: expected a list"),
        ('["two_moons"]', "[1]", "tasks: expected names"),
        ('["npe_maf"]', '["maf"]', "unknown method 'maf'. Known.*npe_maf"),
        ("budgets", "budget", "unknown key budget. Known keys: .*budgets"),
        ("budgets = [1000]", "", "the key budgets is missing"),
        ("budgets = [1000]", "budgets = [1000", "not a TOML file.*line 5"),
        ("observations", "num_samples = 20000\nobservations", "num_samples: .*10000"),
        ("observations", "num_samples = 4\nobservations", "num_samples: .*from 5 to"),
        (
            "observations",
            "num_samples = 1\nmetrics = ['mmd']\nobservations",
            "num_samples: .*from 2 to 10000, got 1",
        ),
        ("observations", "train = 3\nobservations", "train: expected a table"),
        ("observations", "metrics = ['c3st']\nobservations", "unknown metric 'c3st'"),
        ("observations", "train.epochs = 3\nobservations", "epochs of NPE_C.train"),
        (
            '["npe_maf"]',
            '["jeffreys"]\ntrain.max_epochs = 3',
            "max_epochs of JeffreysNPE.train.*checkpoint, .*max_num_epochs",
        ),
        ("observations", "train.a = [2026-01-01]\nobservations", "train: .*date"),
    ],
)
def test_mistakes_in_a_sweep_file_are_named(old, new, message, tmp_path):
    path = tmp_path / "s.toml"
    assert old in FILE
    path.write_text(FILE.replace(old, new))
    with pytest.raises(InputError, match=f"(?s)s.toml.*{message}"):
        Sweep.from_toml(path)


def test_missing_sweep_file_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no sweep file .*x.toml"):
        Sweep.from_toml(tmp_path / "x.toml")


def test_numbers_are_parsed():
    assert parse_numbers("seeds", "4") == (4,)
    assert parse_numbers("seeds", "1-3, 7,2") == (1, 2, 3, 7)
    for bad in ("", "1-", "-3", "3-1", "1,3-2", "1--2", "a", "1.5", "1-999999999"):
        with pytest.raises(InputError, match="seeds"):
            parse_numbers("seeds", bad)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("against_npe_1000", 6 * 4 * 3 * 10),
        ("against_npe_1000_10d", 4 * 4 * 3 * 10),
        ("against_npe_10000", 10 * 4 * 10),
        ("sequential_1000", 2 * 3 * 3),
        ("sequential_10000", 2 * 3 * 3),
        ("fast_1000", 10 * 2 * 3 * 10),
        ("network_1000", 6 * 2 * 3 * 10),
        ("network_1000_10d", 4 * 2 * 3 * 10),
        ("single_round_1000", 10 * 11 * 3 * 10),
        ("single_round_10000", 6 * 7 * 10),
    ],
)
def test_sweeps_of_the_repository(name, rows):
    sweep = Sweep.from_toml(ROOT / "tasks" / "sweeps" / f"{name}.toml")
    units = sweep.units()
    keys = [key for unit in units for key in unit.keys]
    assert len(keys) == len(set(keys)) == rows
    if name == "single_round_1000":
        assert set(sweep.tasks) == set(TASKS)
        options = {name for name in METHODS if re.search("network|fast", name)}
        assert set(sweep.methods) | options == {
            name for name, method in METHODS.items() if method.amortized
        }


def test_units_share_trainings_and_leave_out_what_is_done():
    sweep = Sweep(
        ("two_moons",),
        ("jeffreys", "npe_nsf", "jeffreys_refined", "snpe"),
        (2000, 1000),
        (1,),
        (1, 2),
    )
    done = [
        Key("two_moons", "npe_nsf", 1000, 1, 1),
        Key("two_moons", "npe_nsf", 1000, 1, 2),
        Key("two_moons", "jeffreys", 1000, 1, 2),
    ]
    units = [u for u in sweep.units(done) if u.budget == 1000]
    assert [unit.rows for unit in units] == [
        (("jeffreys", 1), ("jeffreys_refined", 1), ("jeffreys_refined", 2)),
        (("snpe", 1),),
        (("snpe", 2),),
    ]
    assert [unit.budget for unit in sweep.units()] == [1000] * 4 + [2000] * 4


def test_same_command_makes_only_what_is_missing(fake, tmp_path):
    results = tmp_path / "results"
    summary = make(results)
    assert (summary.found, summary.finished, summary.failed) == (0, 6, 0)
    assert fake.trainings() == 3
    first, table = files(results), load(results)

    assert make(results).finished == 0
    assert fake.trainings() == 3 and files(results) == first

    # One row lost: one training, one row, the same figures.
    lost = Key("two_moons", "fake", 20, 2, 1).path(results)
    lost.unlink()
    summary = make(results)
    assert (summary.found, summary.finished) == (5, 1)
    assert fake.trainings() == 4
    second = files(results)
    assert {path for path in first if first[path] != second[path]} <= {lost}
    metrics = ["c2st", "mmd", "sliced_wasserstein"]
    assert load(results)[metrics].equals(table[metrics])

    # A larger grid: only what it adds.
    make(results, Sweep(**{**GRID, "seeds": (1, 2, 3, 4)}))
    assert fake.trainings() == 5 and len(load(results)) == 8


def test_methods_of_one_sweep_have_the_same_simulations(fake, tmp_path, monkeypatch):
    one = add(monkeypatch, FakeMethod(tmp_path / "one", names=("one",)))
    two = add(monkeypatch, FakeMethod(tmp_path / "two", names=("two",)))
    make(tmp_path / "results", Sweep(**{**GRID, "methods": ("one", "two")}))
    sums = [
        sorted(path.read_text() for path in method.log.iterdir())
        for method in (one, two)
    ]
    assert sums[0] == sums[1] and len(set(sums[0])) == 3


def test_the_least_number_of_samples_can_be_scored(tmp_path, monkeypatch):
    need_published_data()
    add(monkeypatch, FakeMethod(tmp_path / "trainings"))
    grid = {**GRID, "seeds": (1,), "observations": (1,)}
    few = {5: METRICS, 2: ("mmd", "sliced_wasserstein"), 1: METRICS[-1:]}
    for num_samples, metrics in few.items():
        sweep = Sweep(**{**grid, "num_samples": num_samples, "metrics": metrics})
        assert make(tmp_path / f"{num_samples}", sweep).failed == 0
        with pytest.raises(InputError, match="num_samples: expected whole numbers"):
            replace(sweep, num_samples=num_samples - 1)


def test_rows_of_other_settings_are_not_taken_for_done(fake, tmp_path):
    make(tmp_path / "results")
    with pytest.raises(InputError, match=r"(?s)num_samples.*\(30, 31\).*--results"):
        make(tmp_path / "results", Sweep(**{**GRID, "num_samples": 31}))
    assert fake.trainings() == 3


def test_failures_are_recorded_and_retried_on_request(fake, tmp_path, monkeypatch):
    results = tmp_path / "results"
    task = get_task("two_moons")
    bad = add(
        monkeypatch,
        FakeMethod(
            tmp_path / "bad",
            names=("bad",),
            sample_error=RuntimeError("stuck"),
            bad_x=task.observation(2),
        ),
    )
    sweep = Sweep(**{**GRID, "methods": ("bad", "fake")})
    summary = make(results, sweep)
    assert (summary.finished, summary.failed) == (12, 3)
    table = load(results)
    failed = table[table["status"] == "failed"]
    assert set(failed["observation"]) == {2} and set(failed["method"]) == {"bad"}
    assert failed["c2st"].isna().all()
    assert (failed["error_message"] == "stuck").all()

    assert make(results, sweep).failed == 3
    assert bad.trainings() == 3

    bad.sample_error = None
    summary = make(results, sweep, retry_failed=True)
    assert (summary.found, summary.finished, summary.failed) == (9, 3, 0)
    assert bad.trainings() == 6 and fake.trainings() == 3
    assert (load(results)["status"] == "ok").all()


def test_rows_that_are_retried_may_have_had_other_settings(fake, tmp_path):
    results = tmp_path / "results"
    fake.train_error = TypeError("no argument max_epochs")
    make(results, Sweep(**{**GRID, "train": {"max_epochs": 3}}))
    fake.train_error = None
    with pytest.raises(InputError, match="other settings.*--retry-failed"):
        make(results)
    assert make(results, retry_failed=True).finished == 6
    assert (load(results)["status"] == "ok").all()


def test_rows_found_are_told_where_they_are_not_what_is_asked_for(
    fake, tmp_path, monkeypatch, capsys
):
    results = tmp_path / "results"
    make(results, Sweep(**{**GRID, "seeds": (1,), "metrics": ("mmd",)}))
    (tmp_path / "s.toml").write_text(_SWEEP_OF_FAKE)
    monkeypatch.setattr("tasks.sweep.COMMIT", "0123456789ab")
    command = ["sweep", str(tmp_path / "s.toml"), "--results", str(results)]
    assert main(command) == 0
    told = capsys.readouterr().out.splitlines()[1:]
    assert told == [
        "2 rows lack c2st; remove them to have them made with it.",
        "2 of the rows that were there are of other commits.",
    ]


def test_folder_that_cannot_be_written_is_said_before_a_training(
    fake, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    arguments = ["--task=two_moons", "--method=fake", "--budget=20", "--num-samples=30"]
    for name in ("file", "file/results"):
        assert main(["run", *arguments, "--results", str(tmp_path / name)]) == 2
        assert "error: " in capsys.readouterr().err
    assert fake.trainings() == 0
    (tmp_path / "results").mkdir(mode=0o500)
    if not os.access(tmp_path / "results", os.W_OK):  # root may write everywhere
        with pytest.raises(PermissionError):
            make(tmp_path / "results")
        assert fake.trainings() == 0


def test_command_line_says_what_is_wrong(fake, tmp_path, capsys):
    results = ["--results", str(tmp_path)]
    run = ["run", "--budget", "20", "--num-samples", "30", *results]
    for arguments, message in [
        (["--task", "moons", "--method", "fake"], "unknown task 'moons'"),
        (["--task", "two_moons", "--method", "fak"], "unknown method 'fak'"),
        (
            ["--task", "two_moons", "--method", "fake", "--observations", "9-11"],
            "observations: expected whole numbers from 1 to 10, got 11",
        ),
        (["--task", "two_moons", "--method", "fake", "--jobs", "0"], "--jobs"),
        (["--task", "two_moons", "--method", "fake", "--threads", "0"], "--threads"),
        (
            ["--task=two_moons", "--method=fake", "--jobs=2", "--dask=tcp://x:1"],
            "exclude each other",
        ),
        (
            ["--task=two_moons", "--method=fake", "--scoring-device=cuda:99"],
            "--scoring-device cuda:99: torch has no such device here",
        ),
    ]:
        assert main([*run, *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error
    assert fake.trainings() == 0
    arguments = ["--task", "two_moons", "--method", "fake", "--observations", "1"]
    assert main([*run, *arguments]) == 0
    assert "1 rows added" in capsys.readouterr().out
    assert main(["sweep", str(tmp_path / "no.toml")]) == 2
    assert "no sweep file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"), [([], "cpu"), (["--scoring-device", "cpu:0"], "cpu:0")]
)
def test_classifiers_are_trained_where_asked(
    arguments, expected, fake, tmp_path, monkeypatch
):
    seen = []

    def classify(pairs, device):
        seen.append(device)
        return torch.full((len(pairs),), 0.5)

    monkeypatch.setattr("sbi_jeffreys.metrics.c2st_many", classify)
    run = ["run", "--task=two_moons", "--method=fake", "--budget=20"]
    run += ["--num-samples=30", f"--results={tmp_path}", "--observations=1"]
    assert main([*run, *arguments]) == 0
    # All pairs, then all parameters.
    assert seen == [expected, expected]


def test_dask_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with (
        pytest.raises(InputError, match="pip install dask distributed"),
        executor(dask="tcp://127.0.0.1:1"),
    ):
        pass


def test_dask_scheduler_that_does_not_answer_is_said(monkeypatch):
    monkeypatch.setattr("tasks.scale._CONNECT_SECONDS", 1)
    with (
        pytest.raises(ConnectionError, match="no Dask scheduler answers.*127.0.0.1:1"),
        executor(dask="tcp://127.0.0.1:1"),
    ):
        pass


@pytest.mark.slow
def test_call_that_kills_its_worker_costs_only_itself(tmp_path):
    def square(number: int) -> int:
        (tmp_path / f"{number}").touch()
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return number**2

    with executor(jobs=2) as calls:
        results = dict(calls.stream(square, [1, 2, 3, 4, 5, 6]))
    assert isinstance(results.pop(2), WorkerDied)
    assert results == {0: 1, 1: 4, 3: 16, 4: 25, 5: 36}


def test_dead_worker_is_a_failed_row(fake, tmp_path, monkeypatch):
    class Calls:
        def stream(self, function, items):
            yield 1, function(items[1])
            yield 0, WorkerDied("killed")
            yield 2, function(items[2])

    monkeypatch.setattr("tasks.sweep.executor", lambda *a: nullcontext(Calls()))
    summary = make(tmp_path / "results")
    assert (summary.finished, summary.failed) == (6, 2)
    table = load(tmp_path / "results")
    failed = table[table["status"] == "failed"]
    assert failed["seed"].tolist() == [1, 1]
    assert set(failed["error_type"]) == {"WorkerDied"}
    assert failed["error_message"].str.contains("want of memory").all()


@pytest.mark.slow
def test_simulations_do_not_depend_on_the_number_of_processes():
    with executor(jobs=2) as calls:
        parts = dict(calls.stream(Chunk.simulate, chunks("two_moons", 25_000, 1)))
    theta, x = simulate("two_moons", 25_000, 1)
    assert torch.equal(theta, torch.cat([parts[i][0] for i in range(3)]))
    assert torch.equal(x, torch.cat([parts[i][1] for i in range(3)]))


# A sweep in a process of its own: four short trainings of a real method, and after them
# eight that do not end, so that it is under way whenever this process has its turn.
_SWEEP = """
tasks = ["two_moons"]
methods = ["npe_mdn"]
budgets = [50, 60, 70]
seeds = "1-4"
observations = [1]
num_samples = 20
[train]
max_num_epochs = 2
"""
_HELD_COMMAND_LINE = """
import runpy, sys
from pathlib import Path

sys.path.append("tests")
from fake_method import HeldMethod
from tasks.methods import METHODS

METHODS["npe_mdn"] = HeldMethod(METHODS["npe_mdn"], Path(sys.argv.pop(1)))
runpy.run_module("tasks", run_name="__main__", alter_sys=True)
"""


@contextmanager
def started(
    tmp_path: Path, *options: str, num_rows: int, num_waiting: int = 0
) -> Iterator[tuple[subprocess.Popen, Path]]:
    """Start the sweep; give it with its results when it has so many rows.

    Args:
        tmp_path: Folder of its files.
        options: Further options of the command line.
        num_rows: Number of rows to wait for.
        num_waiting: Number of its processes that must be in a training without end.
    """
    need_published_data()
    (tmp_path / "s.toml").write_text(_SWEEP)
    results, waiting = tmp_path / "results", tmp_path / "waiting"
    waiting.mkdir()
    command = [sys.executable, "-c", _HELD_COMMAND_LINE, str(waiting)]
    sweep = ["sweep", str(tmp_path / "s.toml"), "--results", str(results)]
    with subprocess.Popen(
        [*command, *sweep, *options],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            deadline = time.monotonic() + 300
            while (
                len(files(results)) < num_rows or len(os.listdir(waiting)) < num_waiting
            ):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline, "no rows within five minutes"
                time.sleep(0.01)
            yield process, results
        finally:
            # It would never end by itself.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_killed_sweep_leaves_whole_rows_and_goes_on(tmp_path):
    with started(tmp_path, num_rows=2) as (process, results):
        process.kill()
        process.communicate()
    before = files(results)
    assert 2 <= len(before) <= 4
    assert len(load(results)) == len(before)

    summary = make(results, Sweep.from_toml(tmp_path / "s.toml"))
    assert (summary.found, summary.finished) == (len(before), 12 - len(before))
    after = files(results)
    assert len(after) == 12 and before.items() <= after.items()
    assert (load(results)["status"] == "ok").all()


@pytest.mark.slow
def test_interrupt_keeps_the_finished_rows(tmp_path):
    # While both workers train, and more trainings wait than loky's queue holds.
    together = started(tmp_path, "--jobs", "2", num_rows=4, num_waiting=2)
    with together as (process, results):
        # As Ctrl-C does: to the whole group, the workers included.
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted; the finished rows are in" in error
    assert "Traceback" not in error
    rows = {key_of(row): row for row in read_rows(results)}
    assert {(key.budget, key.seed) for key in rows} == {(50, s) for s in range(1, 5)}
    assert all(row["status"] == "ok" for row in rows.values())

    # A row made in a worker is the row that is made here.
    key = min(rows)
    key.path(results).unlink()
    sweep = replace(
        Sweep.from_toml(tmp_path / "s.toml"), budgets=(50,), seeds=(key.seed,)
    )
    assert make(results, sweep).finished == 1
    again = {key_of(row): row for row in read_rows(results)}[key]
    names = ["c2st", "mmd", "validation_loss"]
    assert [again[name] for name in names] == [rows[key][name] for name in names]


@pytest.mark.slow
def test_dask_worker_killed_in_a_sweep_costs_no_row(tmp_path, monkeypatch):
    dask = pytest.importorskip("dask")
    distributed = pytest.importorskip("distributed")
    need_published_data()
    fake = add(monkeypatch, FakeMethod(tmp_path / "trainings", seconds=0.5))
    sweep = Sweep(**{**GRID, "seeds": tuple(range(1, 11)), "observations": (1,)})
    # How many deaths Dask forgives a call.
    forgive = dask.config.set({"distributed.scheduler.allowed-failures": 1})
    with (
        forgive,
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address=None,
            silence_logs=50,
        ) as cluster,
    ):
        killed = []

        def kill_the_first_at_work():
            while not (started := list(fake.log.iterdir())):
                time.sleep(0.02)
            killed.append(int(started[0].name.split("_")[0]))
            os.kill(killed[0], signal.SIGKILL)

        killer = threading.Thread(target=kill_the_first_at_work)
        killer.start()
        summary = make(tmp_path / "results", sweep, dask=cluster.scheduler_address)
        killer.join()

        def die(number: int) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        with executor(dask=cluster.scheduler_address) as calls:
            ((_, result),) = calls.stream(die, [1])
    assert isinstance(result, WorkerDied)
    assert killed[0] != os.getpid()
    assert (summary.finished, summary.failed) == (10, 0)
    table = load(tmp_path / "results")
    assert table["seed"].tolist() == list(range(1, 11))
    # Ten, and the one that died on the way.
    assert fake.trainings() == 11


def test_dask_workers_with_threads_are_refused(monkeypatch):
    class Client:
        def __init__(self, *arguments, **options):
            pass

        def nthreads(self):
            return {"tcp://127.0.0.1:1234": 4}

        def close(self):
            pass

    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(distributed, "Client", Client)
    with (
        pytest.raises(ConnectionError, match="--nthreads 1"),
        executor(dask="tcp://127.0.0.1:8786"),
    ):
        pass
