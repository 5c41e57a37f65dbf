"""Gaussian linear: a conjugate pair in ten dimensions."""

import math

import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

from tasks.task import ReferencePosterior, Task

VARIANCE = 0.1


class GaussianLinear(Task):
    r"""The mean of a Gaussian under a Gaussian prior.

    .. math:: p(x \mid \theta) = N(x; \theta, 0.1 I), \quad p(\theta) = N(0, 0.1 I)

    in ten dimensions, 0.1 being the variance. The posterior is $N(x / 2, 0.05 I)$.

    Reference:
        Lueckmann et al. (2021), "Benchmarking Simulation-Based Inference".
    """

    name = "gaussian_linear"
    folder = "gaussian_linear"
    dim_parameters = 10
    dim_data = 10

    def __init__(self) -> None:
        dim = self.dim_parameters
        self.prior = MultivariateNormal(torch.zeros(dim), VARIANCE * torch.eye(dim))

    def _simulate(self, theta: Tensor) -> Tensor:
        return simulate(theta)

    def _log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        return log_likelihood(theta, x)

    def _reference_posterior(self, x: Tensor) -> ReferencePosterior:
        scale = math.sqrt(0.5 * VARIANCE)
        return Independent(Normal(0.5 * x.float(), scale), 1)


def simulate(theta: Tensor) -> Tensor:
    """Return parameters of shape (n, d) with Gaussian noise."""
    return theta + math.sqrt(VARIANCE) * torch.randn_like(theta)


def log_likelihood(theta: Tensor, x: Tensor) -> Tensor:
    """Return the log density of x of shape (n, d) given theta, as (n,)."""
    square = (x - theta).square().sum(1)
    constant = 0.5 * theta.shape[1] * math.log(2 * math.pi * VARIANCE)
    return -0.5 * square / VARIANCE - constant
