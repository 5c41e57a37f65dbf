r"""The paper's algorithm as published: both models learn at once, without stages.

With $K$ samples of the flow and as many of the base measure behind $\log Z$, every step
lowers

.. math:: \lambda_1 \, \mathbb{E}_\pi[-\log p] + \lambda_2 \, \mathrm{KL}(p \Vert q)
    + \lambda_3 \, \mathbb{E}_\pi[-\log q]

over flow and energy together; the whole second term acts on both. The weights are fixed
(the penalty form) or dual variables. `JeffreysDensityEstimator` trains the models one
after the other instead.

O. Ben-Dov and L. F. O. Chamon, "Adaptive Symmetrization of the KL Divergence",
arXiv:2511.11159.
"""

import torch
from torch import Tensor

from sbi_jeffreys import AdaptiveWeights, FixedWeights
from sbi_jeffreys.density import gaussian_of
from sbi_jeffreys.flow import rsample_and_log_prob, score
from sbi_jeffreys.partition import from_log_weights, log_mixture
from sbi_jeffreys.weights import ValidationDivergences
from tasks.density.baselines import NormalizingFlow, Training
from tasks.density.networks import Networks

# Samples of flow and of base measure behind log Z, each, for every sample of the batch.
NUM_SAMPLES = 4


class JointJeffreys(NormalizingFlow):
    """Flow and energy, trained together from the first step.

    Args:
        networks: Sizes of the networks.
        training: How to train.
        weights: Fixed weights, None for dual variables.
    """

    def __init__(
        self,
        networks: Networks,
        training: Training,
        weights: tuple[float, float, float] | None = None,
    ) -> None:
        super().__init__(networks, training)
        self.weights = AdaptiveWeights() if weights is None else FixedWeights(weights)

    def build(self, theta: Tensor, x: Tensor) -> None:
        super().build(theta, x)
        self.energy = self.networks.energy()(theta, x, gaussian_of(theta))
        parameters = [*self.flow.parameters(), *self.energy.parameters()]
        self.optimizer = torch.optim.Adam(parameters, self.training.learning_rate)

    def train(self, mode: bool) -> None:
        super().train(mode)
        self.energy.train(mode)

    def end_epoch(self) -> None:
        """Take a dual step, on validation samples."""
        forward, reverse, proxy_forward = self.divergences(self.validation)
        self.weights.update(
            ValidationDivergences(forward, reverse.expand(len(forward)), proxy_forward)
        )

    def step(self, theta: Tensor) -> None:
        forward, reverse, proxy_forward = self.divergences(theta)
        terms = torch.stack((forward.mean(), reverse, proxy_forward.mean()))
        self._descend(self.optimizer, (self.weights.dual_variables * terms).sum())

    def divergences(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return D1 at every sample, D2, and D3 at every sample, with gradients.

        The gradient of D2 to the flow is the path gradient, see
        `JeffreysObjective.reverse_kl_of_flow`.

        Args:
            theta: Samples of shape `(num, dim)`.
        """
        x, base = self.condition, self.energy.base
        num = NUM_SAMPLES * len(theta)
        drawn, log_p = rsample_and_log_prob(self.flow, num, x)
        points = torch.cat((drawn.detach(), base.sample(num, 1)))
        with torch.no_grad():
            log_flow = torch.cat((log_p, self.flow.log_prob(points[num:], x)))
            log_reference = base.reference_log_prob(points)
            log_m = log_mixture(log_flow, log_reference, num, num)
            log_b = base.log_prob(points)
        f = self.energy(torch.cat((theta.unsqueeze(1), points)), x)[:, 0]
        f_data, f_points = f[: len(theta)], f[len(theta) :]
        log_weights = f_points + (log_b - log_m)[:, 0]
        log_z = from_log_weights(log_weights.unsqueeze(1)).value[0]
        log_ratio = (log_p.detach() - log_b[:num])[:, 0]
        reverse = (log_ratio - f_points[:num]).mean() + log_z
        if torch.is_grad_enabled() and self.weights.dual_variables[1] > 0:
            # One sample of the flow for every one of the data leads the flow.
            few = drawn[: len(theta)]
            at = few.detach().requires_grad_()
            log_q = base.extended_log_prob(at) + self.energy(at, x)
            (slope,) = torch.autograd.grad(log_q.sum(), at)
            path = score(self.flow, at, x) - slope
            # Zero in value: it only carries the gradient.
            reverse = reverse + (path * (few - at.detach())).sum(-1).mean()
        proxy_forward = log_z - base.log_prob(theta) - f_data
        return -self.log_prob(theta), reverse, proxy_forward

    def log_partition(self) -> float:
        """Return log Z."""
        partition = self.energy.log_partition(self.condition, self.flow, 5_000)
        return partition.value.item()

    def energy_log_prob(self, theta: Tensor) -> Tensor:
        """Return log densities of the energy-based model, of shape `(num,)`."""
        log_q = self.energy.log_prob(
            theta.unsqueeze(1), self.condition, self.flow, 10_000
        )
        return log_q[:, 0]
