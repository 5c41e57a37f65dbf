"""Gaussian mixture: one mean, two widths."""

import math

import torch
from sbi.utils import BoxUniform
from torch import Tensor

from tasks.task import ReferencePosterior, Task
from tasks.truncated_normal import TruncatedNormal

BOUND = 10.0
SCALES = (1.0, 0.1)


class GaussianMixture(Task):
    r"""The common mean of two Gaussians, a wide and a narrow one.

    .. math::
        p(x \mid \theta) = \tfrac12 N(x; \theta, I) + \tfrac12 N(x; \theta, 0.1^2 I)

    The prior is uniform on $[-10, 10]^2$.

    The published package holds two versions of this simulator. They differ in form
    only: both draw a component for each row of a batch, and the published observations
    and reference samples agree with this mixture.

    Reference:
        Sisson, Fan and Tanaka (2007), "Sequential Monte Carlo without likelihoods".
    """

    name = "gaussian_mixture"
    folder = "gaussian_mixture"
    dim_parameters = 2
    dim_data = 2

    def __init__(self) -> None:
        self.prior = BoxUniform(-BOUND * torch.ones(2), BOUND * torch.ones(2))

    def _simulate(self, theta: Tensor) -> Tensor:
        scale = torch.tensor(SCALES, dtype=theta.dtype)
        component = torch.randint(len(SCALES), (len(theta), 1))
        return theta + scale[component] * torch.randn_like(theta)

    def _log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        square = (x - theta).square().sum(1)
        return torch.stack([
            -0.5 * square / scale**2 - math.log(4 * math.pi * scale**2)
            for scale in SCALES
        ]).logsumexp(0)

    def _reference_posterior(self, x: Tensor) -> ReferencePosterior:
        return GaussianMixturePosterior(x)


class GaussianMixturePosterior:
    """Posterior of `GaussianMixture`, in closed form.

    The two Gaussians around `x`, restricted to the prior's box and weighted with their
    mass inside it.

    Args:
        x: Data, shape (2,).
    """

    def __init__(self, x: Tensor) -> None:
        self.components = [
            TruncatedNormal(x, torch.full_like(x, scale), -BOUND, BOUND)
            for scale in SCALES
        ]
        log_mass = torch.stack([c.log_mass.sum() for c in self.components])
        self.log_weights = log_mass.log_softmax(0)

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """Draw samples of shape `(*sample_shape, 2)`."""
        shape = torch.Size(sample_shape)
        narrow = torch.rand(*shape, 1, dtype=torch.float64) < self.log_weights[1].exp()
        wide, narrow_ = (c.sample(shape) for c in self.components)
        return torch.where(narrow, narrow_, wide)

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Return the log density of parameters of shape (n, 2), $-\infty$ outside."""
        log_probs = torch.stack([c.log_prob(value) for c in self.components])
        return (log_probs + self.log_weights.unsqueeze(1)).logsumexp(0)
