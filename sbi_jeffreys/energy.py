r"""The proxy: a conditional energy-based model of the posterior.

.. math:: q_\psi(\theta \mid x) = b(\theta) \exp f_\psi(\theta, x) / Z_\psi(x),
    \qquad E = -f

"""

import math
from typing import Callable, Optional

import torch
from nflows.nn.nets.resnet import ResidualBlock
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from torch import Tensor, nn
from torch.nn import functional as F

from sbi_jeffreys.base_measure import BaseMeasure
from sbi_jeffreys.coordinates import ResidualCoordinates
from sbi_jeffreys.features import MAX_SCORE, Features
from sbi_jeffreys.flow import rsample_and_log_prob
from sbi_jeffreys.partition import (
    LogPartition,
    from_log_weights,
    log_mixture,
)

LOG_TWO = math.log(2)
# Parameters that are drawn, or taken without gradients, at once, if they are at several
# conditions: beyond the cache they take nearly twice as long.
MAX_AT_ONCE = 16_384


class EnergyNet(nn.Module):
    r"""Residual network for $f_\psi(\theta, x)$.

    Its inputs are the standardised parameters $z$, their residual coordinates
    $u(\theta, x)$ and the condition. With $u$ a network of $x$ and $\theta$ need not
    find from few simulations where the posterior is, only what its shape is.
    The condition enters the first layer and is embedded once for all parameters that
    it is paired with. The last layer starts at zero, so that the proxy starts as its
    base measure.

    Args:
        coordinates: Residual coordinates of the parameters.
        features: Features of the condition.
        embedding_net: Embedding network of the condition, `None` for its features.
        x_numel: Number of features of the embedded condition.
        hidden_features: Width.
        num_blocks: Number of residual blocks of two layers each.
        activation: Activation function; smooth, since the flow learns from its slope.
        dropout: Dropout probability within the blocks.
    """

    def __init__(
        self,
        coordinates: ResidualCoordinates,
        features: Features,
        embedding_net: Optional[nn.Module],
        x_numel: int,
        hidden_features: int,
        num_blocks: int,
        activation: Callable[[Tensor], Tensor],
        dropout: float,
    ) -> None:
        super().__init__()
        self.coordinates = coordinates
        self.features = features
        self.embedding_net = embedding_net
        self.theta_layer = nn.Linear(2 * coordinates.numel, hidden_features)
        self.x_layer = nn.Linear(x_numel, hidden_features, bias=False)
        self.blocks = nn.ModuleList([
            ResidualBlock(
                hidden_features,
                context_features=None,
                activation=activation,
                zero_initialization=False,
            )
            for _ in range(num_blocks)
        ])
        for block in self.blocks:
            block.dropout = ConditionDropout(dropout)
        self.activation = activation
        self.final_layer = nn.Linear(hidden_features, 1, bias=False)
        nn.init.zeros_(self.final_layer.weight)

    def forward(self, theta: Tensor, x: Tensor) -> Tensor:
        r"""Return $f_\psi(\theta, x)$ of shape `(sample_dim, batch_dim)`.

        Args:
            theta: Parameters of shape `(sample_dim, batch_dim, theta_numel)`. In
                training, the first are those of the simulations with these outputs.
            x: Conditions of shape `(batch_dim, *condition_shape)`.
        """
        features = self.features(x)
        embedded = (
            features if self.embedding_net is None else self.embedding_net(x).flatten(1)
        )
        z = self.coordinates.standardize(theta)
        u = self.coordinates.residual(z, features, first_is_own=self.training)
        inputs = _saturate(torch.cat((z, u), -1))
        hidden = self.theta_layer(inputs) + self.x_layer(embedded)
        for block in self.blocks:
            hidden = block(hidden)
        return self.final_layer(self.activation(hidden)).squeeze(-1)


class BoundedEnergyNet(EnergyNet):
    r"""The same for $f_\psi(\theta, x) = \log (2 \sigma(h))$ of what it returns, $h$.

    The logistic function $\sigma$ bounds the proxy, $q < 2 b / Z$. Without a bound, a
    network that overfits has energies of minus hundreds at places that none of the few
    samples behind $Z(x)$ has found, and there nearly all of its mass.
    """

    def forward(self, theta: Tensor, x: Tensor) -> Tensor:
        r"""Return $f_\psi(\theta, x) < \log 2$ of shape `(sample_dim, batch_dim)`.

        Args:
            theta: Parameters of shape `(sample_dim, batch_dim, theta_numel)`.
            x: Conditions of shape `(batch_dim, *condition_shape)`.
        """
        return F.logsigmoid(super().forward(theta, x)) + LOG_TWO


class ConditionDropout(nn.Module):
    r"""Dropout with one mask for all parameters at a condition.

    Parameters at one $x$ are compared with each other, in $f$ and in $Z$ alike. With
    the same units left out they are compared by one energy, whose $Z$ is its own; and
    the masks are as many as conditions, not as samples.

    Args:
        probability: Probability that a unit is left out.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, hidden: Tensor) -> Tensor:
        """Return hidden units of shape `(sample_dim, batch_dim, hidden_features)`.

        Args:
            hidden: Hidden units of that shape.
        """
        mask = F.dropout(torch.ones_like(hidden[0]), self.probability, self.training)
        return hidden * mask if self.training else hidden


def _saturate(scores: Tensor) -> Tensor:
    """Return scores bounded at ten standard deviations.

    Beyond the simulations a network goes on linearly. The energy must not outgrow the
    tails of the base measure, or the proxy could not be normalised.
    """
    return MAX_SCORE * torch.tanh(scores / MAX_SCORE)


class ConditionalEnergy(nn.Module):
    r"""Energy-based model $q(\theta \mid x) = b(\theta) \exp f(\theta, x) / Z(x)$.

    Args:
        net: Network with `net(theta, x)` of shape `(sample_dim, batch_dim)`.
        base: Base measure $b$.
        input_shape: Event shape of the parameters.
        condition_shape: Event shape of the conditions.
    """

    def __init__(
        self,
        net: nn.Module,
        base: BaseMeasure,
        input_shape: torch.Size,
        condition_shape: torch.Size,
    ) -> None:
        super().__init__()
        self.net = net
        self.base = base
        self.input_shape = input_shape
        self.condition_shape = condition_shape

    def forward(self, theta: Tensor, x: Tensor) -> Tensor:
        r"""Return the negative energy $f(\theta, x)$.

        Args:
            theta: Parameters of shape `(sample_dim, batch_dim, *input_shape)`.
            x: Conditions of shape `(batch_dim, *condition_shape)`.

        Returns:
            Of shape `(sample_dim, batch_dim)`.
        """
        num_conditions = max(1, MAX_AT_ONCE // len(theta))
        if self.training or torch.is_grad_enabled() or num_conditions >= len(x):
            return self._negative_energy(theta, x)
        parts = zip(
            theta.split(num_conditions, 1), x.split(num_conditions), strict=True
        )
        return torch.cat([self._negative_energy(*part) for part in parts], 1)

    def _negative_energy(self, theta: Tensor, x: Tensor) -> Tensor:
        return self.net(theta, x)

    def log_unnormalized(self, theta: Tensor, x: Tensor) -> Tensor:
        r"""Return $\log b(\theta) + f(\theta, x)$, $-\infty$ outside the support.

        Args:
            theta: Parameters of shape `(sample_dim, batch_dim, *input_shape)`.
            x: Conditions of shape `(batch_dim, *condition_shape)`.

        Returns:
            Of shape `(sample_dim, batch_dim)`.
        """
        return self.base.log_prob(theta) + self(theta, x)

    def log_partition(
        self,
        x: Tensor,
        proposal: Optional[ConditionalDensityEstimator] = None,
        num_samples: int = 1000,
    ) -> LogPartition:
        r"""Return an estimate of $\log Z(x)$ and its effective sample size.

        Half the samples come from the proposal and half from the reference
        distribution of the base measure (the prior), see `sbi_jeffreys.partition`.

        Args:
            x: Conditions of shape `(batch_dim, *condition_shape)`.
            proposal: Flow to draw from; without it all samples are the reference's.
            num_samples: Number of samples for every condition.

        Returns:
            The estimate; its `value` and `effective_sample_size` have shape
            `(batch_dim,)`.
        """
        num_flow = num_samples // 2 if proposal is not None else 0
        num_reference = num_samples - num_flow
        batch_dim = len(x)
        with torch.no_grad():
            theta = self.base.sample(num_reference, batch_dim)
            log_flow = torch.full(theta.shape[:2], -torch.inf).to(x)
            if proposal is not None:
                log_flow = proposal.log_prob(theta, x)
                theta_flow, log_prob = rsample_and_log_prob(proposal, num_flow, x)
                theta = torch.cat((theta_flow, theta))
                log_flow = torch.cat((log_prob, log_flow))
            log_proposal = log_mixture(
                log_flow, self.base.reference_log_prob(theta), num_flow, num_reference
            )
        return from_log_weights(self.log_unnormalized(theta, x) - log_proposal)

    def log_prob(
        self,
        theta: Tensor,
        x: Tensor,
        proposal: Optional[ConditionalDensityEstimator] = None,
        num_samples: int = 1000,
    ) -> Tensor:
        r"""Return $\log q(\theta \mid x)$ with an estimated partition function.

        Args:
            theta: Parameters of shape `(sample_dim, batch_dim, *input_shape)`.
            x: Conditions of shape `(batch_dim, *condition_shape)`.
            proposal: See `log_partition`.
            num_samples: See `log_partition`.

        Returns:
            Of shape `(sample_dim, batch_dim)`.
        """
        log_partition = self.log_partition(x, proposal, num_samples).debiased
        return self.log_unnormalized(theta, x) - log_partition

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        super()._apply(fn, recurse)
        self.base.to(next(self.parameters()).device)
        return self
