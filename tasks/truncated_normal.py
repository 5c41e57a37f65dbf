"""Independent normal distributions, restricted to an interval."""

import math

import torch
from scipy.special import ndtri_exp
from torch import Tensor
from torch.special import log_ndtr


class TruncatedNormal:
    r"""Product of normal distributions, each restricted to the interval [low, high].

    Everything is computed from log probabilities, so an interval far out in a tail is
    sampled as accurately as the centre.

    Args:
        loc: Means before truncation, shape (d,).
        scale: Standard deviations before truncation, shape (d,).
        low: Lower end of the interval.
        high: Upper end of the interval.

    Attributes:
        log_mass: Log probability of each interval before truncation, shape (d,).
    """

    def __init__(self, loc: Tensor, scale: Tensor, low: float, high: float) -> None:
        self.loc, self.scale = loc.double(), scale.double()
        self.low, self.high = low, high
        lower = (low - self.loc) / self.scale
        upper = (high - self.loc) / self.scale
        # The upper tail is mirrored: log_ndtr has no accuracy left near probability 1.
        self.sign = torch.where(lower + upper > 0, -1.0, 1.0).to(self.loc)
        ends = torch.stack((lower, upper)) * self.sign
        self.log_cdf_low = log_ndtr(ends.amin(0))
        self.log_cdf_high = log_ndtr(ends.amax(0))
        self.log_mass = _log_sub_exp(self.log_cdf_high, self.log_cdf_low)

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """Draw samples of shape `(*sample_shape, d)`."""
        shape = torch.Size(sample_shape) + self.loc.shape
        return self.quantile(torch.rand(shape, dtype=torch.float64)).float()

    def quantile(self, probability: Tensor) -> Tensor:
        """Return the quantiles of the probabilities, both of shape (..., d)."""
        p = torch.where(self.sign < 0, 1 - probability, probability)
        log_cdf = torch.logaddexp(self.log_cdf_low, p.log() + self.log_mass)
        z = self.sign * torch.from_numpy(ndtri_exp(log_cdf.numpy()))
        return (self.loc + self.scale * z).clamp(self.low, self.high)

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Return the log density at `value`, shape (n, d), $-\infty$ outside."""
        value = value.double()
        log_prob = (
            -0.5 * ((value - self.loc) / self.scale).square()
            - self.scale.log()
            - 0.5 * math.log(2 * math.pi)
            - self.log_mass
        ).sum(-1)
        inside = ((value >= self.low) & (value <= self.high)).all(-1)
        return torch.where(inside, log_prob, -torch.inf)


def _log_sub_exp(a: Tensor, b: Tensor) -> Tensor:
    """Return log(exp(a) - exp(b)) for a > b."""
    return a + torch.log(-torch.expm1(b - a))
