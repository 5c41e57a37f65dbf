"""A conditional flow of the parameters' residual coordinates."""

from typing import Any, Optional, Tuple, cast

import torch
from sbi.neural_nets import posterior_nn
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from torch import Tensor, nn
from torch.distributions import Distribution

from sbi_jeffreys.coordinates import ResidualCoordinates
from sbi_jeffreys.features import MAX_SIMULATIONS, Features
from sbi_jeffreys.flow import sample_and_log_prob
from sbi_jeffreys.screening import informative_outputs


class ResidualFlow(ConditionalDensityEstimator):
    r"""Density $p(\theta \mid x) = p_u(u(\theta, x) \mid \varphi(x)) \,
    |\partial u / \partial \theta|$ by a flow $p_u$.

    Args:
        flow: Conditional flow of the residual coordinates given the features.
        coordinates: The residual coordinates.
        features: The features.
        input_shape: Event shape of the parameters.
        condition_shape: Event shape of the simulation outputs.
    """

    def __init__(
        self,
        flow: ConditionalDensityEstimator,
        coordinates: ResidualCoordinates,
        features: Features,
        input_shape: torch.Size,
        condition_shape: torch.Size,
    ) -> None:
        super().__init__(flow, input_shape, condition_shape)
        self.coordinates = coordinates
        self.features = features

    @property
    def flow(self) -> ConditionalDensityEstimator:
        """The flow of the residual coordinates."""
        # Registered once, as sbi's `net`.
        return cast(ConditionalDensityEstimator, self.net)

    @property
    def embedding_net(self) -> Optional[nn.Module]:
        """Return the features, which stand where an embedding network would."""
        return self.features

    def log_prob(
        self,
        input: Tensor,
        condition: Tensor,
        first_is_own: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        r"""Return $\log p(\theta \mid x)$ of shape `(sample_dim, batch_dim)`.

        Args:
            input: Parameters of shape `(sample_dim, batch_dim, *input_shape)`.
            condition: Conditions of shape `(batch_dim, *condition_shape)`.
            first_is_own: Whether the first parameters are those of the simulations
                that have these outputs, see `ResidualCoordinates.residual`.
        """
        features = self.features(condition)
        u = self.coordinates(input, features, first_is_own)
        log_prob = self.flow.log_prob(u, features)
        return log_prob + self.coordinates.log_abs_det(input)

    def loss(self, input: Tensor, condition: Tensor, **kwargs: Any) -> Tensor:
        r"""Return $-\log p(\theta \mid x)$ of shape `(batch_dim,)`.

        In training that of simulations, see `ResidualCoordinates.residual`.

        Args:
            input: Parameters of shape `(batch_dim, *input_shape)`.
            condition: Conditions of shape `(batch_dim, *condition_shape)`.
        """
        return -self.log_prob(input.unsqueeze(0), condition, first_is_own=True)[0]

    def sample(
        self, sample_shape: torch.Size, condition: Tensor, **kwargs: Any
    ) -> Tensor:
        """Return samples of shape `(*sample_shape, batch_dim, *input_shape)`.

        Args:
            sample_shape: Shape of the samples.
            condition: Conditions of shape `(batch_dim, *condition_shape)`.
        """
        features = self.features(condition)
        u = self.flow.sample(torch.Size(sample_shape), features, **kwargs)
        return self.coordinates.inverse(u, features)

    def sample_and_log_prob(
        self, sample_shape: torch.Size, condition: Tensor, **kwargs: Any
    ) -> Tuple[Tensor, Tensor]:
        """Return samples and their log densities, with gradients to the flow.

        Args:
            sample_shape: Shape of the samples.
            condition: Conditions of shape `(batch_dim, *condition_shape)`.

        Returns:
            Samples of shape `(*sample_shape, batch_dim, *input_shape)` and their log
            densities of shape `(*sample_shape, batch_dim)`.
        """
        features = self.features(condition)
        u, log_prob = sample_and_log_prob(self.flow, sample_shape, features)
        theta = self.coordinates.inverse(u, features)
        return theta, log_prob + self.coordinates.log_abs_det(theta)


def build_residual_flow(
    model: str, theta: Tensor, x: Tensor, prior: Optional[Distribution]
) -> ResidualFlow:
    """Build a flow of sbi's on residual coordinates.

    Of many outputs it takes those that say something, see `sbi_jeffreys.screening`.

    Args:
        model: Name of the flow, as in `posterior_nn`.
        theta: Parameters of shape `(num_simulations, num_parameters)`.
        x: Simulation outputs of shape `(num_simulations, num_outputs)`.
        prior: The prior, for the bounds of its support.

    Returns:
        The flow.
    """
    features = Features(x, informative_outputs(theta, x))
    coordinates = ResidualCoordinates(theta, x, features, prior)
    # Of more simulations the flow's builder takes nothing but memory.
    inputs = features(x[:MAX_SIMULATIONS])
    residuals = coordinates(theta[:MAX_SIMULATIONS], inputs)
    # Features and residuals are standard already; a second z-score of the data would
    # blow up features that hardly vary.
    flow = posterior_nn(model, z_score_x="none")(residuals, inputs)
    return ResidualFlow(flow, coordinates, features, theta[0].shape, x[0].shape)
