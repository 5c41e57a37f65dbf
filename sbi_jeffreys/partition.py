r"""Partition function of the proxy by multiple importance sampling.

.. math:: Z(x) = \int b(\theta) \exp f(\theta, x) \, d\theta

Samples from the flow alone miss what the flow misses; samples from the prior alone
miss narrow posteriors. Drawn from both and weighted with the balance heuristic
[1], as if all came from their mixture

.. math:: m(\theta \mid x) = (K \, p(\theta \mid x) + M \, r(\theta)) / (K + M),

the weights $b \exp f / m$ are bounded wherever one of the two proposals covers the
proxy, from the first step of training.

[1] E. Veach and L. Guibas, "Optimally Combining Sampling Techniques for Monte Carlo
Rendering", SIGGRAPH 1995.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class LogPartition(NamedTuple):
    r"""Estimate of $\log Z(x)$ for a batch of conditions.

    Attributes:
        value: $\log \hat Z(x)$, of shape `(batch_dim,)`.
        effective_sample_size: $(\sum_i w_i)^2 / \sum_i w_i^2$ of the importance
            weights, between 1 and the number of samples, of shape `(batch_dim,)`.
        num_samples: Number of samples behind every estimate.
    """

    value: Tensor
    effective_sample_size: Tensor
    num_samples: int

    @property
    def standard_error(self) -> Tensor:
        r"""Standard error of $\log \hat Z$ by the delta method.

        .. math:: \sqrt{1 / \mathrm{ESS} - 1 / n}

        Meaningful while the effective sample size is above ten or so.
        """
        return (
            (1 / self.effective_sample_size - 1 / self.num_samples).clamp_min(0).sqrt()
        )

    @property
    def debiased(self) -> Tensor:
        r"""$\log \hat Z$ with its bias removed to first order.

        The logarithm of a mean is biased low by half its relative variance,
        $\tfrac12 (1 / \mathrm{ESS} - 1 / n)$.
        """
        return self.value + 0.5 * self.standard_error**2


def log_mixture(
    log_prob_flow: Tensor,
    log_prob_reference: Tensor,
    num_flow_samples: int,
    num_reference_samples: int,
) -> Tensor:
    r"""Return $\log m(\theta \mid x)$, the balance heuristic's mixture density.

    Args:
        log_prob_flow: $\log p(\theta \mid x)$ of any shape.
        log_prob_reference: $\log r(\theta)$ of the same shape.
        num_flow_samples: $K$, at least 0.
        num_reference_samples: $M$, at least 0; not both may be 0.

    Returns:
        Log density of the mixture, of the same shape.
    """
    total = num_flow_samples + num_reference_samples
    if num_reference_samples == 0:
        return log_prob_flow
    if num_flow_samples == 0:
        return log_prob_reference
    return torch.logaddexp(
        log_prob_flow + math.log(num_flow_samples / total),
        log_prob_reference + math.log(num_reference_samples / total),
    )


def from_log_weights(log_weights: Tensor) -> LogPartition:
    r"""Return the importance-sampling estimate of $\log Z(x)$.

    .. math:: \hat Z = \frac1n \sum_{i=1}^n w_i, \qquad
        w_i = \frac{b(\theta_i) \exp f(\theta_i, x)}{m(\theta_i \mid x)}

    Args:
        log_weights: $\log w_i$, of shape `(num_samples, batch_dim)`; $-\infty$ outside
            the support.

    Returns:
        The estimate with its effective sample size.
    """
    num_samples = len(log_weights)
    log_sum = torch.logsumexp(log_weights, 0)
    log_sum_squares = torch.logsumexp(2 * log_weights.detach(), 0)
    ess = (2 * log_sum.detach() - log_sum_squares).exp()
    # No sample in the support: nothing is known, and one sample is what that is worth.
    ess = torch.nan_to_num(ess, nan=1.0).clamp(1.0, float(num_samples))
    return LogPartition(log_sum - math.log(num_samples), ess, num_samples)
