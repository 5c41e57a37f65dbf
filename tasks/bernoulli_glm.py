"""Bernoulli GLM: the filter of a neuron, from the statistics of its spikes."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.nn.functional import softplus

from tasks.importance import ImportancePosterior
from tasks.task import ReferencePosterior, Task

DURATION = 100


class BernoulliGLM(Task):
    r"""Sufficient statistics of a logistic regression on a stimulus.

    In each of 100 time bins a neuron spikes or does not,
    $y_t \sim \mathrm{Bernoulli}(\sigma(v_t^\top \theta))$, where $v_t$ holds a one and
    the stimulus of the last nine bins, fixed white noise. $\theta_1$ is the offset, the
    other parameters are a filter. The data are the sufficient statistics
    $\sum_t y_t v_t$: the number of spikes, and the sums of the stimuli before them.

    The prior is Gaussian with precision 0.5 for the offset and $F^\top F$ for the
    filter, which favours small second differences: $F = D^2 + \mathrm{diag}(\sqrt{0/9},
    \dots, \sqrt{8/9})$ with $D$ the matrix of first differences.

    The log likelihood is that of the spikes. That of the statistics is larger by the
    logarithm of the number of spike trains that share them, which does not depend on
    parameters.

    Reference:
        Goncalves et al. (2020), "Training deep neural density estimators to identify
        mechanistic models of neural dynamics".
    """

    name = "bernoulli_glm"
    folder = "bernoulli_glm"
    dim_parameters = 10
    dim_data = 10

    def __init__(self) -> None:
        m = self.dim_parameters - 1
        difference = torch.eye(m) - torch.diag(torch.ones(m - 1), -1)
        f = difference @ difference + torch.diag(torch.arange(m) / m).sqrt()
        precision = torch.zeros(m + 1, m + 1)
        precision[0, 0] = 0.5
        precision[1:, 1:] = f.T @ f
        # The whitened parameters u have the prior N(0, I): theta = root u.
        self.root = torch.linalg.cholesky(precision.double().inverse())
        self.prior = MultivariateNormal(torch.zeros(m + 1), precision_matrix=precision)

    def _simulate(self, theta: Tensor) -> Tensor:
        return simulate_spikes(theta) @ design_matrix()

    def _log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        return (theta * x).sum(1) - softplus(theta @ design_matrix().T).sum(1)

    def _reference_posterior(self, x: Tensor) -> ReferencePosterior:
        return ImportancePosterior(
            lambda u: self._log_likelihood(u @ self.root.T, x.unsqueeze(0)),
            lambda u: u @ self.root.T,
            lambda theta: self._log_joint(theta, x),
            dim=self.dim_parameters,
        )


def simulate_spikes(theta: Tensor) -> Tensor:
    """Return spikes, zero or one, of shape (n, 100) for `theta` of shape (n, 10)."""
    return torch.bernoulli(torch.sigmoid(theta @ design_matrix().T))


@lru_cache(maxsize=1)
def design_matrix() -> Tensor:
    """Return the design matrix, shape (100, 10).

    The stimulus is that of the published task: the first numbers of numpy's legacy
    generator, whose stream is frozen, with the seed 42, in single precision.
    """
    stimulus = np.random.RandomState(42).normal(size=DURATION).astype(np.float32)
    lags = BernoulliGLM.dim_parameters - 1
    design = torch.zeros(DURATION, lags + 1, dtype=torch.float64)
    design[:, 0] = 1
    for lag in range(lags):
        design[lag:, 1 + lag] = torch.from_numpy(stimulus[: DURATION - lag])
    return design
