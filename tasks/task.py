"""What a benchmark task is."""

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from tasks import reference


class ReferencePosterior(Protocol):
    r"""The posterior $p(\theta \mid x)$ of one observation, as accurate as can be.

    The multivariate distributions of `torch.distributions` are of this form.
    """

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """Draw samples of shape `(*sample_shape, dim_parameters)`."""
        ...

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at `value`, shape (n, dim_parameters), as (n,)."""
        ...


class Task(ABC):
    r"""A simulator, its prior and ten observations with known posteriors.

    A task is a class that says what `prior`, `_simulate` and, where they are known,
    `_log_likelihood` and `_reference_posterior` are. Their arguments have been checked
    by the public methods of the same names.

    Attributes:
        name: Name of the task, as in `get_task(name)`.
        dim_parameters: Dimension of the parameters.
        dim_data: Dimension of the data.
        num_observations: Number of published observations.
        prior: Prior distribution over parameters, with `event_shape`
            (dim_parameters,).
        folder: Folder of the published files.
        observation_file: Name of the published files with the observations.
    """

    name: ClassVar[str]
    dim_parameters: ClassVar[int]
    dim_data: ClassVar[int]
    num_observations: ClassVar[int] = 10
    folder: ClassVar[str]
    observation_file: ClassVar[str] = "observation"

    prior: Distribution

    @property
    def labels(self) -> list[str]:
        """Names of the parameters, to be written at the axes of a plot."""
        return [rf"$\theta_{{{i}}}$" for i in range(1, self.dim_parameters + 1)]

    def simulator(self, theta: Tensor) -> Tensor:
        r"""Simulate $x \sim p(x \mid \theta)$ for a batch of parameters.

        The noise comes from torch's global generator, so `torch.manual_seed` makes the
        simulations repeatable.

        Args:
            theta: Parameters, shape (n, dim_parameters).

        Returns:
            Data of the type of `theta`, shape (n, dim_data).

        Raises:
            ValueError: If `theta` has another shape or is not finite.
        """
        theta = self._check(theta, "theta", self.dim_parameters)
        return self._simulate(theta.double()).to(theta.dtype)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        r"""Return $\log p(x \mid \theta)$.

        Args:
            theta: Parameters, shape (n, dim_parameters) or (1, dim_parameters).
            x: Data, shape (n, dim_data) or (1, dim_data). A single row goes with every
                row of the other.

        Returns:
            Log density, or log probability of discrete data, in double precision,
            shape (n,).

        Raises:
            ValueError: If a shape is not as said or a number is not finite.
            NotImplementedError: If the likelihood of the task is not known.
        """
        theta = self._check(theta, "theta", self.dim_parameters)
        x = self._check(x, "x", self.dim_data)
        if 1 not in (len(theta), len(x)) and len(theta) != len(x):
            raise ValueError(
                f"theta has {len(theta)} rows and x {len(x)}. Pass as many of both, or "
                "a single row of one."
            )
        return self._log_likelihood(theta.double(), x.double())

    def observation(self, n: int) -> Tensor:
        """Return the published observation `n` from 1 to 10, shape (1, dim_data)."""
        return self._published(n, f"{self.observation_file}.csv")

    def true_parameters(self, n: int) -> Tensor:
        """Return the parameters that observation `n` was simulated from.

        Shape (1, dim_parameters).
        """
        return self._published(n, "true_parameters.csv")

    def reference_posterior_samples(self, n: int) -> Tensor:
        """Return the published posterior samples for observation `n`.

        Shape (10_000, dim_parameters).
        """
        return self._published(n, "reference_posterior_samples.csv.bz2")

    def reference_posterior(self, x: Tensor) -> ReferencePosterior:
        r"""Return the posterior $p(\theta \mid x)$ for any data.

        Args:
            x: Data, shape (1, dim_data).

        Returns:
            A distribution over parameters with `sample` and `log_prob`.

        Raises:
            ValueError: If `x` has another shape, is not finite or is impossible.
            NotImplementedError: If the posterior of the task is only known for the
                published observations.
        """
        x = self._check(x, "x", self.dim_data)
        if len(x) != 1:
            raise ValueError(f"x is to be one row of data, but has {len(x)} rows.")
        return self._reference_posterior(x[0].double())

    @abstractmethod
    def _simulate(self, theta: Tensor) -> Tensor:
        """Return data of shape (n, dim_data) for `theta` in double precision."""

    def _log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError(f"The likelihood of {self.name} is not known.")

    def _reference_posterior(self, x: Tensor) -> ReferencePosterior:
        raise NotImplementedError(
            f"The posterior of {self.name} is known only for the published "
            "observations: see reference_posterior_samples(n)."
        )

    def _log_joint(self, theta: Tensor, x: Tensor) -> Tensor:
        r"""Return $\log p(\theta) + \log p(x \mid \theta)$ for x, shape (dim_data,)."""
        inside = self.prior.support.check(theta)  # type: ignore[union-attr]
        log_joint = torch.full((len(theta),), -torch.inf, dtype=theta.dtype)
        # Some distributions cannot take the log density of no parameters at all.
        if inside.any():
            theta = theta[inside]
            log_likelihood = self._log_likelihood(theta, x.unsqueeze(0))
            log_joint[inside] = self.prior.log_prob(theta) + log_likelihood
        return log_joint

    def _published(self, n: int, file: str) -> Tensor:
        if n not in range(1, self.num_observations + 1):
            raise ValueError(
                f"{self.name} has the observations 1 to {self.num_observations}, but "
                f"not {n!r}."
            )
        return reference.table(f"{self.folder}/files/num_observation_{int(n)}/{file}")

    def _check(self, value: Tensor, name: str, dim: int) -> Tensor:
        value = torch.as_tensor(value)
        if value.ndim != 2 or value.shape[1] != dim:
            raise ValueError(
                f"{name} of {self.name} is to have the shape (n, {dim}), but has "
                f"{tuple(value.shape)}."
            )
        if not torch.isfinite(value).all():
            bad = int((~torch.isfinite(value)).any(1).sum())
            raise ValueError(f"{bad} rows of {name} have entries that are not finite.")
        return value
