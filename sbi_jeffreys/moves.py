r"""Metropolis moves that spread resampled samples.

Resampling by importance weights repeats samples where the weights are uneven. A few
steps of a Markov chain with the target as its stationary distribution move the repeats
apart and leave the distribution as it is [1]. The steps are differences of two samples
of a pool [2], as of the proposal, and so have its scale, correlations and modes. The
pool does not follow the samples: differences of few samples to each other, as in [2],
whose pool is renewed, draw them together.

[1] W. Gilks and C. Berzuini, "Following a moving target: Monte Carlo inference for
dynamic Bayesian models", JRSS B 2001.
[2] C. ter Braak, "A Markov Chain Monte Carlo version of the genetic algorithm
Differential Evolution", Statistics and Computing 2006.
"""

import math
from typing import Callable

import torch
from torch import Tensor


def metropolis_moves(
    log_density: Callable[[Tensor], Tensor],
    theta: Tensor,
    num_moves: int,
    pool: Tensor,
) -> Tensor:
    r"""Return samples after a number of Metropolis steps.

    .. math:: \theta' = \theta + \gamma \, (\theta_a - \theta_b)

    with $a$ and $b$ drawn from the pool, which does not change, so that a step and its
    reverse are equally probable. The scale $\gamma$ is $2.38 / \sqrt{2 d}$ in turn
    with a quarter of it, and one, which leads from mode to mode, in every fifth step.

    Args:
        log_density: Returns the log density, up to a constant, of parameters of the
            shape of `theta`, as `(num_samples, batch_dim)`.
        theta: Samples of shape `(num_samples, batch_dim, num_parameters)`.
        num_moves: Number of steps of every sample.
        pool: Samples whose differences are the steps, of shape
            `(num_pool, batch_dim, num_parameters)`: many more, and different, than
            would notice whether one of them is where a sample began.

    Returns:
        Samples of the shape of `theta`.
    """
    num_samples, batch_dim, dim = theta.shape
    scale = 2.38 / math.sqrt(2 * dim)
    current = log_density(theta)
    for move in range(num_moves):
        gamma = 1.0 if move % 5 == 4 else scale * (1.0, 0.25)[move % 2]
        first, second = (_draw(pool, num_samples) for _ in range(2))
        proposed = theta + gamma * (first - second)
        proposed_log_density = log_density(proposed)
        uniform = torch.rand(num_samples, batch_dim).to(current)
        accepted = uniform.log() < proposed_log_density - current
        theta = torch.where(accepted.unsqueeze(-1), proposed, theta)
        current = torch.where(accepted, proposed_log_density, current)
    return theta


def _draw(pool: Tensor, num_samples: int) -> Tensor:
    """Return so many samples, drawn with replacement at every condition."""
    index = torch.randint(len(pool), (num_samples, pool.shape[1])).to(pool.device)
    return pool.gather(0, index.unsqueeze(-1).expand(*index.shape, pool.shape[-1]))
