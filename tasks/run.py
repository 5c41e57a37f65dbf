"""One unit of work: simulate, train once, sample each observation, score.

Everything random is seeded from what it belongs to: the simulations by (task, budget,
seed) alone, so that every method is given the same ones; the training likewise, so
that trainers that split the data as sbi does train and validate on the same
simulations; the samples and the scores by (task, budget, seed, observation), so that
they do not depend on which other rows a unit has. But for C2ST, in its last digits: the
classifiers of several rows are trained as one, whose rounding errors depend on how many
they are, and grow along a training.
"""

import contextlib
import hashlib
import io
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import joblib
import sbi
import torch
from sbi.utils.sbiutils import seed_all_backends
from torch import Tensor
from tqdm import tqdm

import sbi_jeffreys
from sbi_jeffreys import metrics
from tasks import get_task
from tasks.methods import Fit, Method, Posterior, Problem, draw
from tasks.results import COLUMNS, ERRORS, METRICS, Key, Row
from tasks.task import Task

# Simulations are made in chunks of this many, each with a seed of its own, so that
# they do not depend on how many processes share the work.
CHUNK = 10_000

# Random states, the number of threads and the standard output belong to the process.
_ONE_AT_A_TIME = threading.Lock()

# Bars are drawn by this process alone. tqdm's own lock would be a semaphore, which a
# worker that is killed leaves behind with a warning.
tqdm.set_lock(threading.RLock())

_MAX_WARNINGS = 10


def _commit() -> str:
    """Return the commit of the clone that this file is in; empty if it is in none.

    It ends in "-dirty" where files differ from the commit.
    """
    # Of no tag: the commit's own name, in clones with and without tags alike.
    command = ["git", "describe", "--always", "--exclude=*", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except OSError:  # no git
        return ""
    return result.stdout.strip()


# Of the code that this process has loaded, whatever becomes of the clone meanwhile.
COMMIT = _commit()


@dataclass(frozen=True)
class Unit:
    """The rows of the result table that come from one training.

    Args:
        task: Name of the task.
        method: The method.
        budget: Number of simulations.
        seed: Seed of the simulations, the training and the samples.
        rows: Names of posteriors of the method, each with a number of an observation.
        num_samples: Number of samples of each posterior, at most as many as there are
            reference samples (10,000).
        train: Arguments of the trainer's `train`.
        metrics: Which metrics to score; those left out are missing in the rows.
        threads: Number of threads of torch.
        scoring_device: Where the classifiers of C2ST are trained.
    """

    task: str
    method: Method
    budget: int
    seed: int
    rows: tuple[tuple[str, int], ...]
    num_samples: int = 10_000
    train: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = METRICS
    threads: int = 1
    scoring_device: str = "cpu"

    @property
    def keys(self) -> list[Key]:
        """Return the keys of the rows."""
        return [
            Key(self.task, name, self.budget, self.seed, observation)
            for name, observation in self.rows
        ]

    def settings(self, name: str) -> dict[str, Any]:
        """Return all settings behind the rows of the posterior `name`."""
        return {
            **self.method.settings(name),
            "train": dict(self.train),
            "num_samples": self.num_samples,
        }


def seed_of(*parts: str | int) -> int:
    """Return a seed that depends on all parts and on nothing else.

    Args:
        parts: What the seed is for, such as ("simulations", "two_moons", 1000, 1).

    Returns:
        A number in [0, 2³¹).
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@dataclass(frozen=True)
class Chunk:
    """A part of the simulations of (task, budget, seed)."""

    task: str
    budget: int
    seed: int
    index: int

    def simulate(self) -> tuple[Tensor, Tensor]:
        """Return parameters from the prior and their simulations."""
        task = get_task(self.task)
        size = min(CHUNK, self.budget - self.index * CHUNK)
        seed_all_backends(
            seed_of("simulations", self.task, self.budget, self.seed, self.index)
        )
        theta = task.prior.sample((size,))
        return theta, task.simulator(theta)


def chunks(task: str, budget: int, seed: int) -> list[Chunk]:
    """Return the chunks that make up the simulations of (task, budget, seed)."""
    return [Chunk(task, budget, seed, i) for i in range(-(-budget // CHUNK))]


def simulate(task: str, budget: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the simulations that every method is given.

    Args:
        task: Name of the task.
        budget: Number of simulations.
        seed: Seed.

    Returns:
        Parameters, shape (budget, dim_parameters), and data, shape (budget, dim_data).
    """
    theta, x = zip(
        *(chunk.simulate() for chunk in chunks(task, budget, seed)), strict=True
    )
    return torch.cat(theta), torch.cat(x)


def run_unit(unit: Unit) -> list[Row]:
    """Return the rows of a unit, whatever goes wrong.

    An error in the training makes all rows failed rows, one in sampling or scoring an
    observation only its own. Failed rows carry the error and no metrics.
    """
    with _ONE_AT_A_TIME, _quiet() as messages, _threads(unit.threads):
        run = _Run(unit)
        # What runs in parallel is the sweep; no method or metric forks below it.
        with joblib.parallel_config(backend="sequential"):
            rows = run.rows()
        for row in rows:
            row["warnings"] = messages()
        return rows


@dataclass(frozen=True)
class _Samples:
    """Samples of a posterior and of the reference, and the seconds of sampling."""

    key: Key
    samples: Tensor
    reference: Tensor
    seconds: float


@dataclass(frozen=True)
class _Accuracies:
    """C2ST, joint and of each parameter, and the seconds it took."""

    joint: float
    marginal: Tensor
    seconds: float


class _Run:
    """The state of one call of `run_unit`: what is measured as it goes."""

    def __init__(self, unit: Unit):
        self.unit = unit
        self.measured: dict[str, Any] = {"threads": unit.threads}

    def rows(self) -> list[Row]:
        unit = self.unit
        with _PeakMemory() as memory:
            try:
                task = get_task(unit.task)
                fit = self._train(task)
            except Exception as error:
                return [self._failed(key, error) for key in unit.keys]

            done: list[Row] = []
            samples: list[_Samples] = []
            for key in unit.keys:
                try:
                    samples.append(self._sample(task, fit, key))
                except Exception as error:
                    done.append(self._failed(key, error))
        # Scoring has the memory of the metrics, not of the method.
        self.measured["peak_memory_mb"] = memory.peak_mb

        try:
            accuracies = self._classify(task, samples)
        except Exception as error:
            return done + [self._failed(drawn.key, error) for drawn in samples]
        for drawn, accuracy in zip(samples, accuracies, strict=True):
            try:
                done.append(self._score(task, fit, drawn, accuracy))
            except Exception as error:
                done.append(self._failed(drawn.key, error))
        return done

    def _train(self, task: Task) -> Fit:
        """Simulate and train."""
        unit = self.unit
        start = time.perf_counter()
        theta, x = simulate(unit.task, unit.budget, unit.seed)
        simulation_seconds = time.perf_counter() - start

        x_o = None
        if not unit.method.amortized:
            (observation,) = {observation for _, observation in unit.rows}
            x_o = task.observation(observation)
        start = time.perf_counter()
        problem = Problem(
            task=task,
            theta=theta,
            x=x,
            seed=seed_of("training", unit.task, unit.budget, unit.seed),
            train=unit.train,
            x_o=x_o,
        )
        with ctrl_c_ends():
            fit = unit.method.fit(problem)
        seconds = time.perf_counter() - start
        self.measured["training_seconds"] = seconds - fit.simulation_seconds
        # Of what was made for all methods alike, rounds take the first part alone.
        self.measured["simulation_seconds"] = (
            fit.share_of_simulations * simulation_seconds + fit.simulation_seconds
        )
        self.measured["epochs"] = fit.epochs
        self.measured["validation_loss"] = fit.validation_loss
        return fit

    def _sample(self, task: Task, fit: Fit, key: Key) -> _Samples:
        """Return checked samples of one posterior given one observation."""
        posterior = _posterior(fit, key.method)
        num = self.unit.num_samples
        seed_all_backends(
            seed_of("samples", key.task, key.budget, key.seed, key.observation)
        )
        x_o = task.observation(key.observation)  # read from a file, the first time
        start = time.perf_counter()
        samples = draw(posterior, num, x_o).detach()
        seconds = time.perf_counter() - start
        if samples.shape != (num, task.dim_parameters):
            raise ValueError(
                f"asked for {num} samples of {task.dim_parameters} parameters, the "
                f"posterior gave the shape {tuple(samples.shape)}."
            )
        not_finite = int((~samples.isfinite().all(dim=1)).sum())
        if not_finite:
            raise ValueError(f"{not_finite} of {num} samples are not finite.")
        reference = task.reference_posterior_samples(key.observation)
        return _Samples(key, samples, reference[:num], seconds)

    def _classify(self, task: Task, samples: Sequence[_Samples]) -> list[_Accuracies]:
        """Return C2ST, joint and of each parameter, of all samples, as far as wanted.

        The classifiers of all of them are trained together, which is much faster.
        """
        if not samples:
            return []
        start = time.perf_counter()
        wanted = set(self.unit.metrics)
        device = self.unit.scoring_device
        joint = torch.full((len(samples),), torch.nan)
        if "c2st" in wanted:
            pairs = [(s.reference, s.samples) for s in samples]
            joint = metrics.c2st_many(pairs, device=device)
        marginal = torch.full((len(samples), task.dim_parameters), torch.nan)
        if wanted & {"marginal_c2st_mean", "marginal_c2st_max"}:
            columns = [
                (s.reference[:, [i]], s.samples[:, [i]])
                for s in samples
                for i in range(task.dim_parameters)
            ]
            accuracies = metrics.c2st_many(columns, device=device)
            marginal = accuracies.reshape(marginal.shape)
        seconds = (time.perf_counter() - start) / len(samples)
        return [
            _Accuracies(float(accuracy), of_parameters, seconds)
            for accuracy, of_parameters in zip(joint, marginal, strict=True)
        ]

    def _score(
        self, task: Task, fit: Fit, samples: _Samples, accuracies: _Accuracies
    ) -> Row:
        """Return the finished row of one posterior given one observation."""
        key = samples.key
        pair = samples.reference, samples.samples
        # Densities within the prior's support are normalised with random samples.
        seed_all_backends(
            seed_of("scores", key.task, key.budget, key.seed, key.observation)
        )
        start = time.perf_counter()
        scores: dict[str, Callable[[], float]] = {
            "c2st": lambda: accuracies.joint,
            "mmd": lambda: metrics.mmd(*pair),
            "sliced_wasserstein": lambda: metrics.sliced_wasserstein(*pair),
            "marginal_c2st_mean": lambda: float(accuracies.marginal.mean()),
            "marginal_c2st_max": lambda: float(accuracies.marginal.max()),
            "log_prob_true_parameters": lambda: metrics.log_prob_true_parameters(
                _posterior(fit, key.method),
                task.true_parameters(key.observation),
                task.observation(key.observation),
            ),
        }
        values = {name: scores[name]() for name in self.unit.metrics}
        seconds = time.perf_counter() - start + accuracies.seconds
        return self._row(
            key,
            status="ok",
            sampling_seconds=samples.seconds,
            scoring_seconds=seconds,
            **values,
        )

    def _failed(self, key: Key, error: Exception) -> Row:
        """Return the row that records an error."""
        return self._row(key, **_error_columns(error))

    def _row(self, key: Key, **columns: Any) -> Row:
        return _row(self.unit, key, **{**self.measured, **columns})


def failed_rows(unit: Unit, error: Exception) -> list[Row]:
    """Return the rows of a unit that could not even record its own error."""
    return [_row(unit, key, **_error_columns(error)) for key in unit.keys]


def _posterior(fit: Fit, name: str) -> Posterior:
    """Return a posterior of a training, or raise the error that building it raised."""
    posterior = fit.posteriors[name]
    if isinstance(posterior, Exception):
        raise posterior
    return posterior


def _row(unit: Unit, key: Key, **columns: Any) -> Row:
    """Return a whole row; what is not given is NaN, or empty for texts."""
    row: Row = dict.fromkeys(COLUMNS, float("nan"))
    row.update(
        key._asdict(),
        version_sbi_jeffreys=sbi_jeffreys.__version__,
        version_sbi=sbi.__version__,
        version_torch=torch.__version__,
        commit=COMMIT,
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        settings=unit.settings(key.method),
        warnings=[],
        **dict.fromkeys(ERRORS, ""),
    )
    row.update(columns)
    return row


def _error_columns(error: Exception) -> dict[str, str]:
    """Return the columns of a failed row."""
    return {
        "status": "failed",
        "error_type": type(error).__name__,
        "error_message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }


@contextlib.contextmanager
def _quiet() -> Iterator[Callable[[], list[str]]]:
    """Print nothing; give a function that returns the distinct warnings so far."""
    with (
        warnings.catch_warnings(record=True) as caught,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        # Each warning once for each place: some are given in every epoch.
        warnings.simplefilter("default")

        def messages() -> list[str]:
            distinct = dict.fromkeys(
                f"{warning.category.__name__}: {warning.message}" for warning in caught
            )
            return list(distinct)[:_MAX_WARNINGS]

        yield messages


@contextlib.contextmanager
def ctrl_c_ends() -> Iterator[None]:
    """Raise a KeyboardInterrupt at the end of the block if one was swallowed in it.

    `JeffreysNPE` takes Ctrl-C for the wish to end its training; here that would pass a
    training cut short for a whole one.
    """
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread is interrupted.
        yield
        return
    interrupted = False

    def note(number: int, frame: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        # In the place of an error, too: of a training cut short it says nothing.
        if interrupted:
            raise KeyboardInterrupt


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Let torch use a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _PeakMemory:
    """The largest resident memory of the process since it was entered.

    Linux can be asked to forget the peak so far; elsewhere the peak is that of the
    whole life of the process.
    """

    peak_mb: float = float("nan")

    def __enter__(self) -> "_PeakMemory":
        # "5" resets the peak (see proc(5), /proc/pid/clear_refs).
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            status = Path("/proc/self/status").read_text()
            (line,) = [row for row in status.splitlines() if row.startswith("VmHWM")]
            self.peak_mb = int(line.split()[1]) / 1024
        except (OSError, ValueError):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            # Bytes on macOS, kibibytes elsewhere.
            self.peak_mb = peak / (1024**2 if sys.platform == "darwin" else 1024)
