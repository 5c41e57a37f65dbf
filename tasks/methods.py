"""The methods that are compared: how each gets from simulations to posteriors.

A method is trained on simulations of a task and gives one or several posteriors, each
with a name of its own in the result table: the flow of `JeffreysNPE` and its refined
posterior come from one training. `METHODS` maps the name of every posterior to the
method that gives it. To add a method of sbi's interface, add a line to `_METHODS`;
to add another, write a subclass of `Method`.

All arguments that are not given here are sbi's defaults.
"""

import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from sbi.inference import FMPE, NLE, NPE, NPSE, NRE
from sbi.inference.posteriors.posterior_parameters import MCMCPosteriorParameters
from sbi.utils.sbiutils import seed_all_backends
from torch import Tensor

from sbi_jeffreys import JeffreysNPE, NoTracker, energy_nn
from tasks.errors import InputError
from tasks.task import Task


class Posterior(Protocol):
    """What the benchmark asks of a posterior; sbi's posteriors have it."""

    def sample(self, sample_shape: Any, x: Tensor, show_progress_bars: bool) -> Tensor:
        """Draw samples given the observation `x`."""
        ...


# Seconds after which sampling one posterior is given up. A flow whose mass lies outside
# the prior's support would be sampled by rejection for ever.
_SAMPLING_LIMIT = 1800.0


def draw(posterior: Any, num_samples: int, x: Tensor | None = None) -> Tensor:
    """Return samples of a posterior, quietly.

    Args:
        posterior: The posterior.
        num_samples: Number of samples.
        x: The observation, shape (1, dim_data); None for the posterior's default.

    Returns:
        Samples, shape (num_samples, dim_parameters).

    Raises:
        RuntimeError: If it takes more than half an hour and sbi's posterior can tell.
    """
    arguments: dict[str, Any] = {"show_progress_bars": False}
    if "max_sampling_time" in inspect.signature(posterior.sample).parameters:
        arguments["max_sampling_time"] = _SAMPLING_LIMIT
    return posterior.sample((num_samples,), x=x, **arguments)


@dataclass(frozen=True)
class Problem:
    r"""What a method is given.

    Args:
        task: The task, with its prior and simulator.
        theta: Parameters drawn from the prior, shape (budget, dim_parameters).
        x: Their simulations, shape (budget, dim_data).
        seed: Seed of the training. It is set right before the first call of `train`,
            so that trainers that split the data as sbi does split them alike.
        train: Arguments of the trainer's `train`.
        x_o: The observation, shape (1, dim_data), for methods that are trained for one
            observation; otherwise None.
    """

    task: Task
    theta: Tensor
    x: Tensor
    seed: int
    train: Mapping[str, Any] = field(default_factory=dict)
    x_o: Tensor | None = None


@dataclass(frozen=True)
class Fit:
    """What a training gives.

    Args:
        posteriors: The posteriors, or the error raised while building one, by name.
        epochs: Number of epochs, summed over the rounds.
        validation_loss: The best validation loss (of the last round), in the units of
            the method's own loss.
        share_of_simulations: The share of the problem's simulations that was used.
        simulation_seconds: Time of the simulations that the training made itself.
    """

    posteriors: dict[str, Posterior | Exception]
    epochs: int
    validation_loss: float
    share_of_simulations: float = 1.0
    simulation_seconds: float = 0.0


class Method(ABC):
    """A way from simulations to posteriors.

    Attributes:
        names: The names of the posteriors that one training gives.
        amortized: Whether one training serves every observation. If not, the method is
            trained for each observation, which it finds in `Problem.x_o`.
    """

    names: tuple[str, ...]
    amortized: bool = True

    @abstractmethod
    def settings(self, name: str) -> dict[str, Any]:
        """Return all that distinguishes the posterior `name`, fit for JSON.

        Rows are only taken for done by a sweep whose settings are the same.
        """

    @abstractmethod
    def fit(self, problem: Problem) -> Fit:
        """Train on the simulations of `problem`."""

    @abstractmethod
    def check_train_arguments(self, train: Mapping[str, Any]) -> None:
        """Raise an InputError if `train` has an argument that is not known."""


class NetworkJeffreysNPE(JeffreysNPE):
    """`JeffreysNPE` whose proxy is one energy network, without likelihoods."""

    def __init__(self, prior: Any, **kwargs: Any):
        super().__init__(prior, energy_estimator=energy_nn(likelihood="none"), **kwargs)


class SingleRound(Method):
    """A trainer of sbi's interface, trained once on simulations from the prior.

    Args:
        trainer: The trainer's class, such as `sbi.inference.NPE`.
        posteriors: Arguments of `build_posterior` by name of the posterior.
        constructor: Arguments of the trainer's constructor besides the prior.
    """

    def __init__(
        self,
        trainer: type,
        posteriors: dict[str, dict[str, Any]],
        **constructor: Any,
    ):
        self.trainer = trainer
        self.posteriors = posteriors
        self.constructor = constructor
        self.names = tuple(posteriors)

    def settings(self, name: str) -> dict[str, Any]:
        """Return the trainer and the arguments that differ from its defaults."""
        return {
            "trainer": self.trainer.__name__,
            "constructor": self.constructor,
            "posterior": {
                key: value if isinstance(value, str | int | float) else repr(value)
                for key, value in self.posteriors[name].items()
            },
        }

    def check_train_arguments(self, train: Mapping[str, Any]) -> None:
        """Raise an InputError if `train` of the trainer does not take all of it."""
        known = _train_arguments(self.trainer)
        unknown = sorted(set(train) - set(known))
        if unknown:
            raise InputError(
                f"unknown argument {', '.join(unknown)} of {self.trainer.__name__}."
                f"train (method {', '.join(self.names)}). It takes: "
                f"{', '.join(known)}."
            )

    def fit(self, problem: Problem) -> Fit:
        """Train on all simulations and build each posterior."""
        trainer = self._trainer(problem)
        trainer.append_simulations(problem.theta, problem.x)
        seed_all_backends(problem.seed)
        trainer.train(**problem.train)
        return self._fit(trainer)

    def _trainer(self, problem: Problem) -> Any:
        """Return a new trainer that neither prints nor writes files."""
        return self.trainer(
            prior=problem.task.prior,
            tracker=NoTracker(),
            show_progress_bars=False,
            **self.constructor,
        )

    def _fit(self, trainer: Any) -> Fit:
        """Return the posteriors of a trained trainer."""
        posteriors: dict[str, Posterior | Exception] = {}
        for name, arguments in self.posteriors.items():
            # One posterior that cannot be built must not cost the others.
            try:
                posteriors[name] = trainer.build_posterior(**arguments)
            except Exception as error:
                posteriors[name] = error
        return Fit(
            posteriors=posteriors,
            epochs=sum(trainer.summary["epochs_trained"]),
            validation_loss=float(trainer.summary["best_validation_loss"][-1]),
        )


def _train_arguments(trainer: type) -> list[str]:
    """Return the names of the arguments of `train`.

    A `train` with `**kwargs` passes them on to that of its base class.
    """
    names: dict[str, None] = {}
    for base in trainer.__mro__:
        if "train" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["train"]).parameters.values())
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names.update({p.name: None for p in parameters[1:] if p.kind not in variable})
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return list(names)


class Sequential(SingleRound):
    """A trainer of sbi's interface, trained in rounds for one observation.

    The budget is divided evenly over the rounds. The first round takes the first of
    the simulations that all methods share; each later one simulates parameters drawn
    from the posterior of the round before.

    Args:
        trainer: The trainer's class, such as `sbi.inference.NPE`.
        posteriors: Arguments of `build_posterior` by name of the posterior. The last is
            that from which the next round's parameters are drawn.
        rounds: Number of rounds.
        constructor: Arguments of the trainer's constructor besides the prior.
    """

    amortized = False

    def __init__(
        self,
        trainer: type,
        posteriors: dict[str, dict[str, Any]],
        rounds: int = 10,
        **constructor: Any,
    ):
        super().__init__(trainer, posteriors, **constructor)
        self.rounds = rounds

    def settings(self, name: str) -> dict[str, Any]:
        """Return those of the trainer, the rounds, and the posterior they draw from."""
        return {
            **super().settings(name),
            "rounds": self.rounds,
            "proposal": self._proposal,
        }

    @property
    def _proposal(self) -> str:
        """Return the name of the posterior from which the next round is drawn."""
        return self.names[-1]

    def fit(self, problem: Problem) -> Fit:
        """Train in rounds, each on all simulations so far."""
        if problem.x_o is None:
            raise InputError(
                f"{', '.join(self.names)} is trained for one observation; none given."
            )
        budget = len(problem.theta)
        if budget < self.rounds:
            raise InputError(
                f"{budget} simulations cannot be divided over {self.rounds} rounds."
            )
        # The remainder goes to the first rounds.
        sizes = [
            budget // self.rounds + (r < budget % self.rounds)
            for r in range(self.rounds)
        ]

        trainer = self._trainer(problem)
        seed_all_backends(problem.seed)
        posterior = None
        simulation_seconds = 0.0
        for round_, size in enumerate(sizes):
            if posterior is None:
                theta, x = problem.theta[:size], problem.x[:size]
            else:
                theta = draw(posterior, size)
                start = time.perf_counter()
                x = problem.task.simulator(theta)
                simulation_seconds += time.perf_counter() - start
            if "proposal" in inspect.signature(trainer.append_simulations).parameters:
                trainer.append_simulations(theta, x, proposal=posterior)
            else:
                trainer.append_simulations(theta, x, from_round=round_)
            trainer.train(**problem.train)
            if round_ < self.rounds - 1:
                arguments = self.posteriors[self._proposal]
                posterior = trainer.build_posterior(**arguments)
                posterior.set_default_x(problem.x_o)
        return replace(
            self._fit(trainer),
            share_of_simulations=sizes[0] / budget,
            simulation_seconds=simulation_seconds,
        )


# sbi's vectorised slice sampler with sbi's defaults (200 warm-up steps, no thinning,
# chains started by resampling from the prior), but for 100 chains instead of 20: the
# chains share out the modes of a posterior at their start and seldom change over, so
# that 20 would give the weight of one of two equal modes a standard deviation of 0.11.
_MCMC = {"posterior_parameters": MCMCPosteriorParameters(num_chains=100)}

_METHODS: tuple[Method, ...] = (
    SingleRound(
        JeffreysNPE,
        {"jeffreys": {}, "jeffreys_refined": {"sample_with": "refined"}},
    ),
    SingleRound(
        JeffreysNPE,
        {"jeffreys_fixed": {}},
        weights="fixed",
    ),
    SingleRound(
        JeffreysNPE,
        {"jeffreys_fast": {}, "jeffreys_fast_refined": {"sample_with": "refined"}},
        preset="fast",
    ),
    SingleRound(
        NetworkJeffreysNPE,
        {
            "jeffreys_network": {},
            "jeffreys_network_refined": {"sample_with": "refined"},
        },
    ),
    SingleRound(NPE, {"npe_nsf": {}}, density_estimator="nsf"),
    SingleRound(NPE, {"npe_maf": {}}, density_estimator="maf"),
    SingleRound(NPE, {"npe_mdn": {}}, density_estimator="mdn"),
    SingleRound(NPE, {"npe_zuko_nsf": {}}, density_estimator="zuko_nsf"),
    SingleRound(FMPE, {"fmpe": {}}),
    SingleRound(NPSE, {"npse": {}}),
    SingleRound(NLE, {"nle": _MCMC}),
    SingleRound(NRE, {"nre": _MCMC}),
    Sequential(
        JeffreysNPE, {"sjeffreys": {}, "sjeffreys_refined": {"sample_with": "refined"}}
    ),
    Sequential(NPE, {"snpe": {}}),
    Sequential(NLE, {"snle": _MCMC}),
    Sequential(NRE, {"snre": _MCMC}),
)

METHODS: dict[str, Method] = {
    name: method for method in _METHODS for name in method.names
}


def get_method(name: str) -> Method:
    """Return the method that gives the posterior `name`.

    Raises:
        InputError: If there is none, with the names there are.
    """
    if name not in METHODS:
        raise InputError(
            f"unknown method {name!r}. Known methods: {', '.join(METHODS)}."
        )
    return METHODS[name]
