r"""The refined posterior's density: the flow, corrected by the proxy.

.. math:: r_\beta(\theta \mid x) = p(\theta \mid x) \,
    \left( \frac{b(\theta) \exp f(\theta, x)}{p(\theta \mid x)} \right)^\beta
    / Z_\beta(x), \qquad 0 \le \beta \le 1

is the geometric path from the flow ($\beta = 0$) to the proxy ($\beta = 1$). Two
models that err independently err less on the way between them, and a proxy that is no
better than the flow gets $\beta = 0$: the exponent is chosen on validation
simulations, so that refining is not a leap of faith.
"""

import math
from typing import Optional, Tuple

import torch
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from torch import Tensor
from torch.distributions import Distribution

from sbi_jeffreys.energy import ConditionalEnergy
from sbi_jeffreys.flow import rsample_and_log_prob
from sbi_jeffreys.partition import log_mixture

#: Exponents among which validation chooses.
EXPONENTS = torch.linspace(0.0, 1.0, 11)

# Conditions at which samples are drawn at once.
CHUNK = 100
# Parameters among which those of a simulation are told, in later rounds.
MAX_ATOMS = 50


def log_ratio(
    flow: ConditionalDensityEstimator,
    proxy: ConditionalEnergy,
    theta: Tensor,
    x: Tensor,
) -> Tensor:
    r"""Return $\log b(\theta) + f(\theta, x) - \log p(\theta \mid x)$.

    Args:
        flow: The flow $p$.
        proxy: The proxy.
        theta: Parameters of shape `(sample_dim, batch_dim, *input_shape)`.
        x: Conditions of shape `(batch_dim, *condition_shape)`.

    Returns:
        Log weights of shape `(sample_dim, batch_dim)`, $-\infty$ outside the support.
    """
    return proxy.log_unnormalized(theta, x) - flow.log_prob(theta, x)


@torch.no_grad()
def sample_with_log_ratio(
    flow: ConditionalDensityEstimator,
    proxy: ConditionalEnergy,
    num_samples: int,
    x: Tensor,
) -> Tuple[Tensor, Tensor]:
    """Return samples of the flow and their `log_ratio`, from one inversion.

    Args:
        flow: The flow.
        proxy: The proxy.
        num_samples: Number of samples for every condition.
        x: Conditions of shape `(batch_dim, *condition_shape)`.

    Returns:
        Samples of shape `(num_samples, batch_dim, *input_shape)` and log weights of
        shape `(num_samples, batch_dim)`.
    """
    theta, log_prob = rsample_and_log_prob(flow, num_samples, x)
    return theta, proxy.log_unnormalized(theta, x) - log_prob


@torch.no_grad()
def sample_with_log_weights(
    flow: ConditionalDensityEstimator,
    proxy: ConditionalEnergy,
    num_samples: int,
    x: Tensor,
    exponent: float,
) -> Tuple[Tensor, Tensor]:
    r"""Return samples of flow and prior, and what they weigh in $Z_\beta$.

    Samples of the flow alone would miss what it misses. The weights are those of
    `sbi_jeffreys.partition`, $\log (p^{1 - \beta} (b \exp f)^\beta) - \log m$.

    Args:
        flow: The flow.
        proxy: The proxy, whose base measure has the reference, as the prior.
        num_samples: Number of samples of either kind for every condition.
        x: Conditions of shape `(batch_dim, *condition_shape)`.
        exponent: The exponent $\beta$.

    Returns:
        Samples of shape `(2 * num_samples, batch_dim, *input_shape)` and log weights
        of shape `(2 * num_samples, batch_dim)`.
    """
    theta, log_p = rsample_and_log_prob(flow, num_samples, x)
    reference = proxy.base.sample(num_samples, len(x))
    theta = torch.cat((theta, reference))
    log_p = torch.cat((log_p, flow.log_prob(reference, x)))
    log_q = proxy.log_unnormalized(theta, x)
    log_r = log_refined(log_p, log_q, exponent)
    reference_log_prob = proxy.base.reference_log_prob(theta)
    log_m = log_mixture(log_p, reference_log_prob, num_samples, num_samples)
    return theta, log_r - log_m


def log_refined(log_p: Tensor, log_q: Tensor, exponent: float) -> Tensor:
    r"""Return $\log (p^{1 - \beta} (b \exp f)^\beta)$, $-\infty$ where a factor is 0.

    Args:
        log_p: $\log p(\theta \mid x)$ of the flow.
        log_q: $\log b(\theta) + f(\theta, x)$ of the proxy, of the same shape.
        exponent: The exponent $\beta$.
    """
    if exponent == 1:
        return log_q
    log_r = log_p + temper(log_q - log_p, exponent)
    # Where the flow has no density at all its ratio to the proxy is no number.
    return log_r.masked_fill(torch.isneginf(log_p), -torch.inf)


def temper(log_weights: Tensor, exponent: float) -> Tensor:
    r"""Return $\beta \log w$; with $\beta = 0$ zero, but $-\infty$ where $w = 0$."""
    # 0 * inf is NaN: samples outside the support stay excluded at every exponent.
    outside = torch.isneginf(log_weights)
    tempered = exponent * log_weights.masked_fill(outside, 0.0)
    return tempered.masked_fill(outside, -torch.inf)


@torch.no_grad()
def choose_exponent(
    flow: ConditionalDensityEstimator,
    proxy: ConditionalEnergy,
    theta: Tensor,
    x: Tensor,
    num_samples: int = 200,
    prior: Optional[Distribution] = None,
) -> float:
    r"""Return the exponent with the highest density of validation simulations.

    .. math:: \hat\beta = \arg\max_\beta \sum_j \left[ \beta \log w(\theta_j, x_j)
        - \log Z_\beta(x_j) \right]

    The partition functions come from samples of the flow. A weight that they miss
    would make the proxy look better than it is, so that the simulation itself counts
    as one more sample. Simulations whose parameters neither model knows, as those
    beyond the prior's support, say nothing of the exponent.

    Args:
        flow: The flow.
        proxy: The proxy.
        theta: Validation parameters of shape `(batch_dim, *input_shape)`.
        x: Validation simulations of shape `(batch_dim, *condition_shape)`.
        num_samples: Number of samples of the flow for every simulation.
        prior: Given when the parameters come from a proposal. Every simulation's
            parameters are then told from those of the others, as in
            `sbi_jeffreys.atomic`, which no proposal can bias.

    Returns:
        The exponent, one of `EXPONENTS`.
    """
    if prior is None:
        log_w = log_ratio(flow, proxy, theta.unsqueeze(0), x)
        log_w_samples = [
            sample_with_log_ratio(flow, proxy, num_samples, chunk)[1]
            for chunk in x.split(CHUNK)  # which bounds the memory
        ]
        candidates = torch.cat((log_w, torch.cat(log_w_samples, 1)))
        log_base = torch.zeros_like(candidates)
    else:
        atoms = as_atoms(theta)
        candidates = log_ratio(flow, proxy, atoms, x)
        log_prior = prior.log_prob(atoms.flatten(0, 1)).reshape(candidates.shape)
        log_base = flow.log_prob(atoms, x) - log_prior
    known = candidates[0].isfinite() & log_base[0].isfinite()
    candidates, log_base = candidates[:, known], log_base[:, known]
    scores = []
    for exponent in EXPONENTS.tolist():
        log_r = log_base + temper(candidates, exponent)
        scores.append((log_r[0] - torch.logsumexp(log_r, 0)).mean().item())
    best = max(range(len(scores)), key=lambda i: _finite(scores[i]))
    return EXPONENTS[best].item()


def as_atoms(theta: Tensor) -> Tensor:
    """Return the parameters of every simulation (first) among those of others.

    Args:
        theta: Parameters of shape `(batch_dim, *input_shape)`.

    Returns:
        Of shape `(num_atoms, batch_dim, *input_shape)`.
    """
    num_atoms = min(len(theta), MAX_ATOMS)
    return torch.stack([theta.roll(shift, 0) for shift in range(num_atoms)])


def _finite(score: float) -> float:
    return score if math.isfinite(score) else -math.inf
