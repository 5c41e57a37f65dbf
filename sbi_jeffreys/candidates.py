"""A flow that is one of several candidates, the best on validation simulations."""

from functools import partial
from typing import Any, Callable, Optional, Sequence, Tuple, cast

import torch
from sbi.neural_nets import posterior_nn
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from torch import Tensor, nn
from torch.distributions import Distribution

from sbi_jeffreys.flow import sample_and_log_prob
from sbi_jeffreys.residual_flow import ResidualFlow, build_residual_flow
from sbi_jeffreys.screening import SelectOutputs, informative_outputs


class FlowCandidates(ConditionalDensityEstimator):
    """Several flows, of which one is active and stands for all.

    Which flow is best depends on the posterior: autoregressive affine flows follow
    location and scale in many dimensions, splines have shapes that those have not, and
    a regression that explains little only adds noise. `JeffreysNPE` trains them one
    after the other and keeps the one with the lowest validation loss.

    Args:
        candidates: The flows, of the same input and condition shape.
    """

    _active: Tensor

    def __init__(self, candidates: Sequence[ConditionalDensityEstimator]) -> None:
        first = candidates[0]
        super().__init__(
            nn.ModuleList(candidates), first.input_shape, first.condition_shape
        )
        self.register_buffer("_active", torch.zeros((), dtype=torch.long))

    def __len__(self) -> int:
        return len(cast(nn.ModuleList, self.net))

    @property
    def active(self) -> int:
        """Index of the active candidate."""
        return int(self._active)

    @active.setter
    def active(self, index: int) -> None:
        self._active.fill_(index)

    @property
    def flow(self) -> ConditionalDensityEstimator:
        """The active candidate."""
        candidate = cast(nn.ModuleList, self.net)[self.active]
        return cast(ConditionalDensityEstimator, candidate)

    @property
    def last(self) -> ConditionalDensityEstimator:
        """The last candidate."""
        return cast(ConditionalDensityEstimator, cast(nn.ModuleList, self.net)[-1])

    @property
    def embedding_net(self) -> Optional[nn.Module]:
        """Return the embedding network of the active candidate."""
        return self.flow.embedding_net

    def log_prob(self, input: Tensor, condition: Tensor, **kwargs: Any) -> Tensor:
        r"""Return $\log p(\theta \mid x)$ of shape `(sample_dim, batch_dim)`.

        Args:
            input: Parameters of shape `(sample_dim, batch_dim, *input_shape)`.
            condition: Conditions of shape `(batch_dim, *condition_shape)`.
        """
        return self.flow.log_prob(input, condition, **kwargs)

    def loss(self, input: Tensor, condition: Tensor, **kwargs: Any) -> Tensor:
        r"""Return $-\log p(\theta \mid x)$ of shape `(batch_dim,)`.

        Args:
            input: Parameters of shape `(batch_dim, *input_shape)`.
            condition: Conditions of shape `(batch_dim, *condition_shape)`.
        """
        return self.flow.loss(input, condition, **kwargs)

    def sample(
        self, sample_shape: torch.Size, condition: Tensor, **kwargs: Any
    ) -> Tensor:
        """Return samples of shape `(*sample_shape, batch_dim, *input_shape)`.

        Args:
            sample_shape: Shape of the samples.
            condition: Conditions of shape `(batch_dim, *condition_shape)`.
        """
        return self.flow.sample(sample_shape, condition, **kwargs)

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
        return sample_and_log_prob(self.flow, sample_shape, condition)


def build_candidates(
    theta: Tensor, x: Tensor, prior: Optional[Distribution]
) -> ConditionalDensityEstimator:
    """Build the flows among which `density_estimator="auto"` chooses.

    They are sbi's `"maf"` and `"nsf"` on residual coordinates, and sbi's `"nsf"` as it
    is, which the residuals of a poor regression would only blur. Outputs of more than
    one dimension have no flow of sbi's without an embedding network.

    Args:
        theta: Parameters of shape `(num_simulations, num_parameters)`.
        x: Simulation outputs of shape `(num_simulations, *condition_shape)`.
        prior: The prior, for the bounds of its support.

    Returns:
        The candidates.
    """
    builders: list[Callable[[Tensor, Tensor], ConditionalDensityEstimator]] = [
        partial(build_residual_flow, model, prior=prior) for model in ("maf", "nsf")
    ]
    if x.ndim == 2:
        outputs = informative_outputs(theta, x)
        embedding = nn.Identity() if outputs is None else SelectOutputs(outputs)
        builders.append(posterior_nn("nsf", embedding_net=embedding))
    return FlowCandidates([builder(theta, x) for builder in builders])


def log_prob_of_simulations(
    flow: ConditionalDensityEstimator, theta: Tensor, x: Tensor
) -> Tensor:
    r"""Return $\log p(\theta \mid x)$ where the first parameters are the simulations'.

    In training a flow of residuals takes them as its loss does.

    Args:
        flow: Any flow.
        theta: Parameters of shape `(sample_dim, batch_dim, *input_shape)`.
        x: Simulation outputs of shape `(batch_dim, *condition_shape)`.

    Returns:
        Of shape `(sample_dim, batch_dim)`.
    """
    if isinstance(flow, FlowCandidates):
        flow = flow.flow
    if isinstance(flow, ResidualFlow):
        return flow.log_prob(theta, x, first_is_own=True)
    return flow.log_prob(theta, x)
