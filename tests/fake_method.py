"""Methods to test what runs methods: one costs nothing, one waits to be killed."""

import os
import signal
import time
import uuid
from pathlib import Path

import pytest
import torch

from tasks.methods import Fit, Method, Problem
from tasks.reference import ReferenceDataError, wheel


class FakeMethod(Method):
    """Takes the prior for the posterior and notes every training in a folder.

    Args:
        log: Folder with one file for each training that was started; its name begins
            with the number of the process.
        names: Names of the posteriors.
        seconds: How long a training takes.
        train_error: Error that training raises.
        sample_error: Error that sampling raises at one observation.
        bad_x: Data of that observation.
        kill_if: Training kills its own process while this file is there.
    """

    def __init__(
        self,
        log: Path,
        names: tuple[str, ...] = ("fake",),
        seconds: float = 0.0,
        train_error: Exception | None = None,
        sample_error: Exception | None = None,
        bad_x: torch.Tensor | None = None,
        kill_if: Path | None = None,
    ):
        self.log = log
        self.names = names
        self.seconds = seconds
        self.train_error = train_error
        self.sample_error = sample_error
        self.bad_x = bad_x
        self.kill_if = kill_if
        log.mkdir(parents=True, exist_ok=True)

    def settings(self, name: str) -> dict:
        return {"fake": name}

    def check_train_arguments(self, train) -> None:
        pass

    def fit(self, problem: Problem) -> Fit:
        (self.log / f"{os.getpid()}_{uuid.uuid4().hex}").write_text(
            repr(problem.theta.double().sum().item())
        )
        time.sleep(self.seconds)
        if self.kill_if is not None and self.kill_if.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if self.train_error is not None:
            raise self.train_error
        posterior = FakePosterior(problem.task.prior, self.sample_error, self.bad_x)
        return Fit(dict.fromkeys(self.names, posterior), epochs=3, validation_loss=0.5)

    def trainings(self) -> int:
        """Return the number of trainings so far, in all processes."""
        return len(list(self.log.iterdir()))


class HeldMethod(Method):
    """A method that, of more than 50 simulations, makes no posterior but waits.

    Args:
        method: What it is otherwise.
        log: Folder with one file for each process that waits, named by its number.
    """

    def __init__(self, method: Method, log: Path):
        self.method = method
        self.names = method.names
        self.log = log

    def settings(self, name: str) -> dict:
        return self.method.settings(name)

    def check_train_arguments(self, train) -> None:
        self.method.check_train_arguments(train)

    def fit(self, problem: Problem) -> Fit:
        if len(problem.theta) <= 50:
            return self.method.fit(problem)
        (self.log / str(os.getpid())).touch()
        time.sleep(600)
        raise TimeoutError("nobody has ended this process in ten minutes.")


class FakePosterior:
    """The prior, as a posterior of sbi's interface."""

    def __init__(self, prior, error, bad_x):
        self.prior = prior
        self.error = error
        self.bad_x = bad_x

    def sample(self, sample_shape, x, show_progress_bars=True):
        if self.error is not None and torch.equal(x, self.bad_x):
            raise self.error
        return self.prior.sample(sample_shape)

    def log_prob(self, theta, x):
        return self.prior.log_prob(theta)


def need_published_data() -> None:
    """Skip the test if the published data are not at hand and cannot be fetched."""
    try:
        wheel()
    except ReferenceDataError as error:
        pytest.skip(f"needs the published data, which need a network once: {error}")


def mean_distances(pairs, device="cpu"):
    """Stand in for `metrics.c2st_many` where any number will do: trains nothing."""
    return torch.stack([(x - y).abs().mean() for x, y in pairs])
