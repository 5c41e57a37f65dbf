r"""A proxy that pools an energy network and surrogates of the likelihood.

.. math:: q(\theta \mid x) = b(\theta) \, e^{w_0 f_\psi(\theta, x)}
    \textstyle\prod_k \ell_k(x \mid \theta)^{w_k} / Z_w(x), \qquad w \ge 0

Each factor is fitted by itself, the network to the posterior and the surrogates to the
likelihood, and the weights are chosen on validation simulations, as those with the
lowest forward divergence $D_3$. In them it is convex. Models that err independently
err less when they are pooled in the logarithm [1], and one that only errs has no
weight.

[1] C. Genest and J. Zidek, "Combining Probability Distributions: A Critique and an
Annotated Bibliography", Statistical Science 1986.
"""

from typing import Tuple

import numpy as np
import torch
from scipy.optimize import Bounds, minimize
from torch import Tensor, nn

from sbi_jeffreys.base_measure import BaseMeasure
from sbi_jeffreys.energy import ConditionalEnergy
from sbi_jeffreys.likelihood import SurrogateLikelihoods

# A factor that is too flat may be sharpened, but not for ever.
MAX_WEIGHT = 1.5
# Prior precision of the weights about those of the network alone, in simulations: of
# very few validation simulations nothing is learnt.
PRIOR_SIMULATIONS = 1.0


class PooledEnergy(ConditionalEnergy):
    r"""Energy-based model with the negative energy $w_0 f + \sum_k w_k \log \ell_k$.

    Args:
        net: Network with `net(theta, x)` of shape `(sample_dim, batch_dim)`.
        likelihoods: Surrogates of the likelihood.
        base: Base measure $b$.
        input_shape: Event shape of the parameters.
        condition_shape: Event shape of the conditions.
    """

    weights: Tensor

    def __init__(
        self,
        net: nn.Module,
        likelihoods: SurrogateLikelihoods,
        base: BaseMeasure,
        input_shape: torch.Size,
        condition_shape: torch.Size,
    ) -> None:
        super().__init__(net, base, input_shape, condition_shape)
        self.likelihoods = likelihoods
        self.register_buffer("weights", torch.zeros(1 + len(likelihoods)))
        self.reset_weights()

    def reset_weights(self) -> None:
        """Let the proxy be its network alone."""
        self.weights.zero_()
        self.weights[0] = 1.0

    def _negative_energy(self, theta: Tensor, x: Tensor) -> Tensor:
        of_net, *of_likelihoods = self.weights.tolist()
        f = theta.new_zeros(theta.shape[:2])
        if of_net > 0:
            f = of_net * self.net(theta, x)
        used = [k for k, weight in enumerate(of_likelihoods) if weight > 0]
        if used:
            log_likelihoods = self.likelihoods(theta, x, used)
            weights = self.weights[1:][used]
            f = f + (weights[:, None, None] * log_likelihoods).sum(0)
        return f

    def log_factors(self, theta: Tensor, x: Tensor) -> Tensor:
        r"""Return $f$ and all $\log \ell_k$, `(num_factors, sample_dim, batch_dim)`.

        Args:
            theta: Parameters of shape `(sample_dim, batch_dim, *input_shape)`.
            x: Conditions of shape `(batch_dim, *condition_shape)`.
        """
        f = self.net(theta, x).unsqueeze(0)
        return torch.cat((f, self.likelihoods(theta, x)))


def choose_weights(log_factors: Tensor, log_base: Tensor) -> Tensor:
    r"""Return the weights with the highest density of validation simulations.

    .. math:: \hat w = \arg\min_{w \ge 0} \sum_j \Big[ \log \sum_i
        e^{\log b_{ij} + \sum_k w_k g_{kij}} - \sum_k w_k g_{k0j} \Big]
        + \tfrac12 \|w - (1, 0, \dots)\|^2

    Args:
        log_factors: $g$ at the parameters of every simulation (first) and at samples,
            `(num_factors, 1 + num_samples, batch_dim)`.
        log_base: Logarithm of what the factors multiply, with the samples' importance
            weights, `(1 + num_samples, batch_dim)`; $-\infty$ outside the support.

    Returns:
        Of shape `(num_factors,)`.
    """
    factors, base = log_factors.double(), log_base.double()
    # Neither inside nor outside the support: outside.
    base = torch.where(base.isnan(), -torch.inf, base)
    # Simulations at which no sample lies in the support tell nothing.
    known = base[1:].isfinite().any(0) & base[0].isfinite()
    factors, base = factors[:, :, known].cpu(), base[:, known].cpu()
    # Of a factor that is not a number anywhere, nothing can be made.
    usable = factors.isfinite().flatten(1).all(1)
    factors = torch.where(usable[:, None, None], factors, 0.0)
    alone = torch.zeros(len(factors), dtype=torch.double)
    alone[0] = 1.0

    def loss_and_gradient(values: np.ndarray) -> Tuple[float, np.ndarray]:
        weights = torch.from_numpy(values).requires_grad_()
        with torch.enable_grad():
            log_q = base + torch.einsum("k,kij->ij", weights, factors)
            loss = (torch.logsumexp(log_q, 0) - log_q[0]).sum()
            loss = loss + 0.5 * PRIOR_SIMULATIONS * (weights - alone).square().sum()
            (gradient,) = torch.autograd.grad(loss, weights)
        return loss.item(), gradient.numpy()

    result = minimize(
        loss_and_gradient,
        alone.numpy(),
        method="L-BFGS-B",
        jac=True,
        bounds=Bounds(0.0, MAX_WEIGHT),
    )
    return (torch.from_numpy(result.x) * usable).to(log_factors)
