r"""The scale of a flow's base distribution, fitted to validation simulations.

A flow that has learnt from few simulations is sure of more than it knows: the noise
$z = T^{-1}(\theta; x)$ of parameters that it was not trained with spreads wider than
the standard normal distribution that it should have, and its regions are too narrow.
One number mends most of that. With the base distribution $\mathcal{N}(0, s^2 I)$ the
density of $N$ validation simulations in $d$ dimensions is highest at

.. math:: s^2 = \frac{1}{N d} \sum_j |z_j|^2 ,

which is 1 for a flow that knows what it does not know.
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
# Standard deviations in every dimension beyond which noise is that of an outlier. It
# still counts, but one of them among a hundred does not make all posteriors wide.
MAX_NOISE = 5.0


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

    Args:
        flow: The flow, in evaluation mode. One without a scale is left as it is.
        theta: Parameters of validation simulations, `(batch_dim, *input_shape)`.
        x: Their outputs, of shape `(batch_dim, *condition_shape)`.
        kernel: Weights of the simulations, `(batch_dim,)`.

    Returns:
        The scale $s$. It stays what it is if a density is not finite.
    """
    bases = _bases(flow)
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
    squares = squares.clamp(0, num_parameters * MAX_NOISE**2)
    num_values = num_parameters * kernel.sum() + NUM_PRIOR_VALUES
    scale = (((kernel * squares).sum() + NUM_PRIOR_VALUES) / num_values).sqrt().item()
    if math.isfinite(scale):
        _set(bases, scale)
    return bases[0].scale.item()


def _bases(flow: ConditionalDensityEstimator) -> List[ScaledNormal]:
    """Return the base distribution of the flow that is active, if it has a scale."""
    if isinstance(flow, FlowCandidates):
        flow = flow.flow
    return [module for module in flow.modules() if isinstance(module, ScaledNormal)]


def _set(bases: List[ScaledNormal], scale: float) -> None:
    for base in bases:
        base.scale.fill_(scale)
