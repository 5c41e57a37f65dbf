r"""Atomic loss of the proxy, for simulations from a proposal.

From the second round on, parameters come from a proposal instead of the prior, and
the likelihood of the simulations belongs to the proposal's posterior. Among the
parameters of a batch, the one that made $x$ is told from the others by [1]

.. math:: -\log \frac{r(\theta, x)}{\sum_{a} r(\theta_a, x)}, \qquad
    r(\theta, x) = q(\theta \mid x) / p_0(\theta)

in which the proposal cancels, and so does the proxy's partition function: no
importance sampling is needed.

[1] D. Greenberg, M. Nonnenmacher, J. Macke, "Automatic Posterior Transformation for
Likelihood-Free Inference", ICML 2019.
"""

from typing import Callable, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from sbi_jeffreys.energy import ConditionalEnergy


class AtomicLosses(NamedTuple):
    """The losses of both models where parameters come from a proposal.

    Attributes:
        of_flow: sbi's, of parameters, outputs and whether parameters are of the prior.
        of_proxy: `atomic_proxy_loss`, of parameters and outputs.
    """

    of_flow: Callable[[Tensor, Tensor, Tensor], Tensor]
    of_proxy: Callable[[Tensor, Tensor], Tensor]


def check_batch(theta: Tensor) -> None:
    """Raise if a batch has no two simulations to tell apart.

    Args:
        theta: Parameters of shape `(batch_dim, *input_shape)`.

    Raises:
        ValueError: If the batch holds a single simulation.
    """
    if len(theta) < 2:
        raise ValueError(
            "The atomic loss tells simulations of a batch from each other and needs "
            "two or more; got a batch of 1. Change training_batch_size, or "
            "validation_fraction where there is one simulation for validation."
        )


def atomic_proxy_loss(
    proxy: ConditionalEnergy,
    prior: Distribution,
    theta: Tensor,
    x: Tensor,
    num_atoms: int,
) -> Tensor:
    r"""Return the atomic loss of the proxy for every simulation.

    Args:
        proxy: The proxy.
        prior: The prior $p_0$.
        theta: Parameters of shape `(batch_dim, *input_shape)`.
        x: Simulation outputs of shape `(batch_dim, *condition_shape)`.
        num_atoms: Number of atoms, the right one included; at most `batch_dim`.

    Returns:
        Of shape `(batch_dim,)`.

    Raises:
        ValueError: If the batch holds a single simulation.
    """
    check_batch(theta)
    batch_dim = len(theta)
    num_atoms = max(2, min(num_atoms, batch_dim))
    others = (1 - torch.eye(batch_dim, device=theta.device)) / (batch_dim - 1)
    choices = torch.multinomial(others, num_atoms - 1, replacement=False)
    atoms = torch.cat((theta[None], theta[choices.T]))
    log_prior = prior.log_prob(atoms.flatten(0, 1)).reshape(atoms.shape[:2])
    log_r = proxy.log_unnormalized(atoms, x) - log_prior
    return torch.logsumexp(log_r, 0) - log_r[0]
