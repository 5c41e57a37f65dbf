"""A grid of tasks, methods, budgets, seeds and observations, and its execution."""

import itertools
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tasks import TASKS, get_task
from tasks.errors import InputError
from tasks.methods import Method, get_method
from tasks.results import (
    METRICS,
    Key,
    Row,
    check_writable,
    key_of,
    read_rows,
    settings_text,
    write_row,
)
from tasks.run import COMMIT, Unit, failed_rows, run_unit
from tasks.scale import WorkerDied, executor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

NUM_OBSERVATIONS = 10
NUM_REFERENCE_SAMPLES = 10_000
# Numbers of samples that metrics need: the five folds of C2ST have two each, at least.
_LEAST_SAMPLES = {
    **dict.fromkeys(("c2st", "marginal_c2st_mean", "marginal_c2st_max"), 5),
    **dict.fromkeys(("mmd", "sliced_wasserstein"), 2),
}
_MAX_NUMBERS = 100_000


@dataclass(frozen=True)
class Sweep:
    """Which rows of the result table are wanted.

    Args:
        tasks: Names of tasks.
        methods: Names of methods (of their posteriors).
        budgets: Numbers of simulations.
        seeds: Seeds; each has its own simulations and training.
        observations: Numbers of observations, from 1 to 10.
        num_samples: Number of samples of each posterior, at most 10,000, and at
            least 5 if a C2ST is scored.
        train: Arguments of `train` of every method.
        metrics: Names of the metrics to score.

    Raises:
        InputError: If a value is not what is expected, with its name.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    budgets: tuple[int, ...]
    seeds: tuple[int, ...]
    observations: tuple[int, ...]
    num_samples: int = NUM_REFERENCE_SAMPLES
    train: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = METRICS

    def __post_init__(self) -> None:
        for name in ("tasks", "methods", "budgets", "seeds", "observations"):
            _check_list(name, getattr(self, name))
        for name in ("tasks", "methods"):
            if not all(isinstance(value, str) for value in getattr(self, name)):
                raise InputError(f"{name}: expected names, got {getattr(self, name)}.")
        for task in self.tasks:
            if task not in TASKS:
                raise InputError(
                    f"unknown task {task!r}. Known tasks: {', '.join(TASKS)}."
                )
        _check_numbers("budgets", self.budgets, 1)
        _check_numbers("seeds", self.seeds, 0)
        _check_numbers("observations", self.observations, 1, NUM_OBSERVATIONS)
        _check_list("metrics", self.metrics)
        for metric in self.metrics:
            if metric not in METRICS:
                raise InputError(
                    f"unknown metric {metric!r}. Known metrics: {', '.join(METRICS)}."
                )
        least = max(_LEAST_SAMPLES.get(metric, 1) for metric in self.metrics)
        _check_numbers("num_samples", (self.num_samples,), least, NUM_REFERENCE_SAMPLES)
        if not isinstance(self.train, Mapping):
            raise InputError(f"train: expected a table, got {self.train!r}.")
        try:
            settings_text({**self.train})
        except TypeError as error:  # a date of TOML
            raise InputError(f"train: cannot be noted in the rows: {error}.") from error
        for method in self.methods:
            get_method(method).check_train_arguments(self.train)

    @classmethod
    def from_toml(cls, path: Path) -> "Sweep":
        """Read a sweep from a TOML file.

        The file has one key for each argument of `Sweep`. Seeds and observations may
        be a list of numbers or a text such as "1-5" or "1-3,7".

        Raises:
            FileNotFoundError: If there is no such file.
            InputError: If it is not TOML, or a key is missing, unknown or has a value
                that is not what is expected; with the file and the key.
        """
        try:
            with open(path, "rb") as file:
                content = tomllib.load(file)
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no sweep file {path}.") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not a TOML file: {error}.") from error

        known = [f.name for f in fields(cls)]
        optional = ["num_samples", "train", "metrics"]
        unknown = [key for key in content if key not in known]
        missing = [key for key in known if key not in (*content, *optional)]
        try:
            if unknown:
                raise InputError(
                    f"unknown key {', '.join(unknown)}. Known keys: {', '.join(known)}."
                )
            if missing:
                raise InputError(f"the key {', '.join(missing)} is missing.")
            for key in ("seeds", "observations"):
                if isinstance(content[key], str):
                    content[key] = parse_numbers(key, content[key])
            arguments: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in content.items()
            }
            return cls(**arguments)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def units(
        self,
        done: Iterable[Key] = (),
        threads: int = 1,
        scoring_device: str = "cpu",
    ) -> list[Unit]:
        """Return the work that is left.

        Rows that one training can give are in one unit. The cheapest budgets and the
        first seeds come first, so that a comparison of all methods is there early.

        Args:
            done: Keys of the rows that are there already.
            threads: Number of threads of torch in a unit.
            scoring_device: Where the classifiers of C2ST are trained.
        """
        done = set(done)
        methods: dict[int, tuple[Method, list[str]]] = {}
        for name in self.methods:
            method = get_method(name)
            methods.setdefault(id(method), (method, []))[1].append(name)

        units = []
        for budget, seed, task, (method, names) in itertools.product(
            sorted(self.budgets), self.seeds, self.tasks, methods.values()
        ):
            rows = [
                (name, observation)
                for observation in self.observations
                for name in names
                if Key(task, name, budget, seed, observation) not in done
            ]
            together = (
                [rows]
                if method.amortized
                else [[row for row in rows if row[1] == o] for o in self.observations]
            )
            units += [
                Unit(
                    task=task,
                    method=method,
                    budget=budget,
                    seed=seed,
                    rows=tuple(group),
                    num_samples=self.num_samples,
                    train=self.train,
                    metrics=self.metrics,
                    threads=threads,
                    scoring_device=scoring_device,
                )
                for group in together
                if group
            ]
        return units


@dataclass
class Summary:
    """What a sweep did.

    Args:
        found: Number of its rows that were there already.
        finished: Number of rows added.
        failed: Of all its rows, the number that record an error.
        other_commits: Of those found, the number that another commit made.
        unscored: Of those found that record no error, the number that lacks each
            metric that is asked for.
    """

    found: int = 0
    finished: int = 0
    failed: int = 0
    other_commits: int = 0
    unscored: dict[str, int] = field(default_factory=dict)


def run_sweep(
    sweep: Sweep,
    results: Path,
    jobs: int = 1,
    dask: str | None = None,
    retry_failed: bool = False,
    threads: int = 1,
    scoring_device: str = "cpu",
    progress: bool = True,
) -> Summary:
    """Make the rows of a sweep that are not there yet.

    Every row is written by this process as soon as its unit is finished; stop the
    sweep at any moment and call it again to go on.

    Args:
        sweep: Which rows are wanted.
        results: The results folder.
        jobs: Number of processes on this machine.
        dask: Address of a Dask scheduler whose workers are used instead.
        retry_failed: Whether to make rows that record an error again.
        threads: Number of threads of torch in each process.
        scoring_device: Where the classifiers of C2ST are trained. They are most of
            the work in ten dimensions.
        progress: Whether to show a progress bar.

    Returns:
        How many rows were found, finished and failed.

    Raises:
        InputError: If the folder holds rows of this sweep made with other settings,
            or there is no such device.
        OSError: If the folder cannot be written into.
    """
    check_threads(threads)
    if dask is None:  # whose workers may have devices that this machine has not
        _check_device(scoring_device)
    # Before a training is lost to it.
    check_writable(results)
    with executor(jobs, dask) as calls:
        there = {key_of(row): row for row in read_rows(results)}
        wanted = sweep.units(threads=threads)
        if retry_failed:
            # As if they were not there, whatever they were made with.
            there = {k: row for k, row in there.items() if row["status"] != "failed"}
        _check_settings(wanted, there, results)
        found = [key for unit in wanted for key in unit.keys if key in there]
        units = sweep.units(found, threads, scoring_device)
        # Fetch the reference data once, not in every worker at once, and stop here if
        # they cannot be had.
        for task in dict.fromkeys(unit.task for unit in units):
            get_task(task).reference_posterior_samples(sweep.observations[0])

        summary = Summary(
            found=len(found),
            failed=sum(there[key]["status"] == "failed" for key in found),
            other_commits=sum(there[key]["commit"] != COMMIT for key in found),
            unscored=_count_unscored([there[key] for key in found], sweep.metrics),
        )
        with tqdm(
            total=sum(len(unit.rows) for unit in units),
            unit="row",
            disable=not progress,
            dynamic_ncols=True,
            smoothing=0,
        ) as bar:
            for index, result in calls.stream(run_unit, units):
                unit = units[index]
                rows = (
                    failed_rows(unit, result)
                    if isinstance(result, WorkerDied)
                    else result
                )
                for row in rows:
                    write_row(results, row)
                    summary.finished += 1
                    summary.failed += row["status"] == "failed"
                bar.set_postfix_str(f"{summary.failed} failed", refresh=False)
                bar.update(len(rows))
    return summary


def parse_numbers(name: str, text: str) -> tuple[int, ...]:
    """Return the numbers of a text such as "1-5" or "1-3,7".

    Args:
        name: What the numbers are, for the error message.
        text: The text.

    Raises:
        InputError: If it is not of that form.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not (first.isdecimal() and (last.isdecimal() if dash else not last)):
            raise InputError(
                f"{name}: expected numbers such as 4, 1-10 or 1-3,7, got {text!r}."
            )
        span = range(int(first), int(last or first) + 1)
        if not span:
            raise InputError(
                f"{name}: {part.strip()!r} is an empty range; expected its smaller "
                f"number first, such as {last}-{first}."
            )
        if len(span) > _MAX_NUMBERS:
            raise InputError(f"{name}: {text!r} is more than {_MAX_NUMBERS} numbers.")
        numbers += span
    return tuple(dict.fromkeys(numbers))


def check_threads(threads: int) -> None:
    """Raise an InputError unless torch can compute with so many threads."""
    if threads < 1:
        raise InputError(f"--threads must be at least 1, got {threads}.")


def _count_unscored(rows: list[Row], metrics: Iterable[str]) -> dict[str, int]:
    """Return of how many rows that record no error each metric was left out."""
    good = [row for row in rows if row["status"] == "ok"]
    counts = {
        name: sum(math.isnan(row[name]) for row in good)
        for name in metrics
        # Which is NaN, too, of posteriors that have no normalised density.
        if name != "log_prob_true_parameters"
    }
    return {name: count for name, count in counts.items() if count}


def _check_settings(units: list[Unit], there: dict[Key, Row], results: Path) -> None:
    """Raise an InputError if rows of the units were made with other settings."""
    for unit in units:
        for key in unit.keys:
            if key not in there:
                continue
            old, new = there[key]["settings"], unit.settings(key.method)
            if settings_text(old) == settings_text(new):
                continue
            changed = {
                name: (old.get(name), new.get(name))
                for name in sorted({*old, *new})
                if old.get(name) != new.get(name)
            }
            raise InputError(
                f"{results} already holds the row of {key} with other settings "
                f"(there, wanted): {changed}. Give another folder with --results, or "
                "remove those rows; --retry-failed makes failed ones again."
            )


def _check_device(device: str) -> None:
    """Raise an InputError unless torch can put a tensor on `device`."""
    try:
        torch.zeros(1, device=device)
    # A torch without CUDA asserts that it has it.
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--scoring-device {device}: torch has no such device here ({error})."
        ) from error


def _check_list(name: str, values: Any) -> None:
    """Raise an InputError unless `values` is a list of distinct values."""
    if not isinstance(values, tuple) or not values:
        raise InputError(f"{name}: expected a list, not empty, got {values!r}.")
    if len({repr(value) for value in values}) != len(values):
        raise InputError(f"{name}: {list(values)} holds a value twice.")


def _check_numbers(
    name: str, values: Iterable[Any], least: int, most: int | None = None
) -> None:
    """Raise an InputError unless all values are whole numbers in the range."""
    for value in values:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < least or (most is not None and value > most):
            wanted = f"from {least} to {most}" if most else f"of at least {least}"
            raise InputError(f"{name}: expected whole numbers {wanted}, got {value!r}.")
