"""Gaussian linear uniform: a Gaussian mean under a uniform prior."""

import math

import torch
from sbi.utils import BoxUniform
from torch import Tensor

from tasks.gaussian_linear import VARIANCE, log_likelihood, simulate
from tasks.task import ReferencePosterior, Task
from tasks.truncated_normal import TruncatedNormal


class GaussianLinearUniform(Task):
    r"""The mean of a Gaussian under a uniform prior.

    .. math:: p(x \mid \theta) = N(x; \theta, 0.1 I), \quad p(\theta) = U([-1, 1]^{10})

    The simulator is that of `GaussianLinear`. The posterior is a Gaussian around `x`,
    cut off at the prior's box.

    Reference:
        Lueckmann et al. (2021), "Benchmarking Simulation-Based Inference".
    """

    name = "gaussian_linear_uniform"
    folder = "gaussian_linear_uniform"
    dim_parameters = 10
    dim_data = 10

    def __init__(self) -> None:
        bound = torch.ones(self.dim_parameters)
        self.prior = BoxUniform(-bound, bound)

    def _simulate(self, theta: Tensor) -> Tensor:
        return simulate(theta)

    def _log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        return log_likelihood(theta, x)

    def _reference_posterior(self, x: Tensor) -> ReferencePosterior:
        return TruncatedNormal(x, torch.full_like(x, math.sqrt(VARIANCE)), -1.0, 1.0)
