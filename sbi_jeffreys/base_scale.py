r"""The scale of a flow's base distribution, fitted to validation simulations.

A flow that has learnt from few simulations is sure of more than it knows: the noise
$z = T^{-1}(\theta; x)$ of parameters that it was not trained with spreads wider than
the standard normal distribution that it should have, and its regions are too narrow.
One number mends most of that: the scale $s$ of the base distribution
$\mathcal{N}(0, s^2 I)$. Huber's [1] is the $\hat s$ with

.. math:: \frac1N \sum_{j=1}^N \min(|z_j|^2 / \hat s^2, c) =
    \mathbb{E}_{\chi^2_d}[\min(\cdot, c)], \qquad c = d + 2 \sqrt{2 d}

over $N$ validation simulations in $d$ dimensions. Regions of usual size then hold what
they should. Maximum likelihood, $\hat s^2 = \sum_j |z_j|^2 / (N d)$, would make all
posteriors wide for the sake of a few simulations. Of few simulations little is known,
and a flow is never narrower than with the standard normal distribution:

.. math:: s^2 = \max\left(1, \frac{N d \, \hat s^2 + 20}{N d + 20}\right)

[1] P. Huber, "Robust Estimation of a Location Parameter", Annals of Mathematical
Statistics 35, 1964 (Proposal 2).
"""

import math
from typing import List, Optional, cast

import torch
from nflows.distributions import StandardNormal
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from torch import Tensor, nn

from sbi_jeffreys.candidates import FlowCandidates

# Noise of variance 1 that counts beside that of the simulations: with ten of them in
# one dimension their mean square is right within 45 % only.
NUM_PRIOR_VALUES = 20
# Of the fixed point, far more than it needs.
NUM_ITERATIONS = 50


class ScaledNormal(StandardNormal):
    r"""Normal distribution $\mathcal{N}(0, s^2 I)$, for the base of an nflows flow."""

    #: The scale $s$, a number.
    scale: Tensor

    def _log_prob(self, inputs: Tensor, context: Optional[Tensor]) -> Tensor:
        log_scale = self._shape.numel() * self.scale.log()
        return super()._log_prob(inputs / self.scale, context) - log_scale

    def _sample(self, num_samples: int, context: Optional[Tensor]) -> Tensor:
        return self.scale * super()._sample(num_samples, context)


def give_scale(flow: nn.Module) -> None:
    """Give the base distributions of nflows' flows a scale, 1 as yet.

    Flows of other libraries are left as they are.

    Args:
        flow: Any module, changed in place.
    """
    for module in flow.modules():
        if type(module) is StandardNormal:
            log_z = cast(Tensor, module._log_z)
            module.register_buffer("scale", torch.ones((), device=log_z.device))
            module.__class__ = ScaledNormal


@torch.no_grad()
def fit_scale(
    flow: ConditionalDensityEstimator, theta: Tensor, x: Tensor, kernel: Tensor
) -> float:
    r"""Set the scale of the flow's base distribution, and return it.

    Below one it is not: the epoch that is kept is the one whose validation loss was
    lowest, by chance too; and a narrower flow that loses less mass beyond a prior's
    bounds is not for that nearer to the posterior within.

    Args:
        flow: The flow, in evaluation mode. One without a scale is left as it is.
        theta: Parameters of validation simulations, `(batch_dim, *input_shape)`.
        x: Their outputs, of shape `(batch_dim, *condition_shape)`.
        kernel: Weights of the simulations, `(batch_dim,)`, in any unit.

    Returns:
        The scale $s$. It stays what it is if a density is not finite.
    """
    bases = scaled_bases(flow)
    if not bases:
        return 1.0
    before = bases[0].scale.item()
    num_parameters = theta[0].numel()
    # The density at two scales tells how far out the noise is, whatever is around the
    # nflows flow: log p(s) = const - |z|^2 / (2 s^2) - d log s.
    log_probs = []
    try:
        for scale in (1.0, math.sqrt(2)):
            _set(bases, scale)
            log_probs.append(flow.log_prob(theta.unsqueeze(0), x)[0].double())
    finally:
        _set(bases, before)
    squares = 4 * (log_probs[1] - log_probs[0]) + 2 * num_parameters * math.log(2)
    variance = _robust_variance(squares.clamp_min(0), kernel.double(), num_parameters)
    # So many simulations of equal weight tell as much.
    num_simulations = kernel.sum().square() / kernel.square().sum()
    num_values = num_parameters * num_simulations.item()
    variance = (num_values * variance + NUM_PRIOR_VALUES) / (
        num_values + NUM_PRIOR_VALUES
    )
    if math.isfinite(variance):
        _set(bases, math.sqrt(max(1.0, variance)))
    return bases[0].scale.item()


def _robust_variance(squares: Tensor, kernel: Tensor, num_parameters: int) -> float:
    """Return Huber's estimate of the variance in each dimension.

    Args:
        squares: Squared distances from the mean, `(batch_dim,)`.
        kernel: Weights, `(batch_dim,)`.
        num_parameters: Number of dimensions.
    """
    cut = num_parameters + math.sqrt(8 * num_parameters)
    half = torch.tensor([num_parameters / 2, num_parameters / 2 + 1]).double()
    below = torch.special.gammainc(half, torch.full_like(half, cut / 2))
    expected = (num_parameters * below[1] + cut * (1 - below[0])).item()
    kernel = kernel / kernel.sum()
    variance = (kernel * squares).sum() / num_parameters
    for _ in range(NUM_ITERATIONS):
        share = (kernel * (squares / variance).clamp_max(cut)).sum() / expected
        variance = variance * share
    return variance.item()


def scaled_bases(flow: ConditionalDensityEstimator) -> List[ScaledNormal]:
    """Return the base distributions with a scale of the flow that is active."""
    if isinstance(flow, FlowCandidates):
        flow = flow.flow
    return [module for module in flow.modules() if isinstance(module, ScaledNormal)]


def _set(bases: List[ScaledNormal], scale: float) -> None:
    for base in bases:
        base.scale.fill_(scale)
