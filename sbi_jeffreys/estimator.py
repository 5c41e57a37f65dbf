"""What `JeffreysNPE.train` returns: the flow and its proxy as one estimator."""

from functools import cached_property
from typing import Optional, Tuple

import torch
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from torch import Tensor, nn

from sbi_jeffreys.energy import ConditionalEnergy
from sbi_jeffreys.flow import sample_and_log_prob
from sbi_jeffreys.likelihood import SurrogateLikelihoods
from sbi_jeffreys.pooled_energy import PooledEnergy


class JeffreysEstimator(ConditionalDensityEstimator):
    r"""A conditional flow $p(\theta \mid x)$ and its energy-based proxy.

    Everything that sbi asks of a density estimator is answered by the flow; the proxy
    is kept beside it for the refined posterior and for diagnostics.

    Args:
        flow: The flow, the main model.
        proxy: The energy-based proxy.
    """

    _exponent: Tensor

    def __init__(
        self, flow: ConditionalDensityEstimator, proxy: ConditionalEnergy
    ) -> None:
        super().__init__(flow.net, flow.input_shape, flow.condition_shape)
        self.flow = flow
        self.proxy = proxy
        self.register_buffer("_exponent", torch.zeros(()))

    def train(self, mode: bool = True) -> "JeffreysEstimator":
        """Set the mode of flow and proxy, of each module once.

        sbi's estimators hold the network of the flow as `net`, too.

        Args:
            mode: Whether to train, else to evaluate.
        """
        self.training = mode
        self.flow.train(mode)
        self.proxy.train(mode)
        return self

    @cached_property
    def shares_parameters(self) -> bool:
        """Whether flow and proxy have parameters in common: an embedding net."""
        of_flow = {id(parameter) for parameter in self.flow.parameters()}
        return any(id(parameter) in of_flow for parameter in self.proxy.parameters())

    @property
    def models(self) -> Tuple[ConditionalDensityEstimator, ConditionalEnergy]:
        """The flow and the proxy."""
        return self.flow, self.proxy

    @property
    def likelihoods(self) -> Optional[SurrogateLikelihoods]:
        """The surrogates of the likelihood, `None` where the proxy has none."""
        return self.proxy.likelihoods if isinstance(self.proxy, PooledEnergy) else None

    @property
    def exponent(self) -> float:
        r"""Exponent $\beta$ of the refined posterior, see `sbi_jeffreys.refinement`."""
        return self._exponent.item()

    @exponent.setter
    def exponent(self, value: float) -> None:
        self._exponent.fill_(value)

    @property
    def embedding_net(self) -> Optional[nn.Module]:
        """Return the embedding network of the flow."""
        return self.flow.embedding_net

    def log_prob(self, input: Tensor, condition: Tensor, **kwargs) -> Tensor:
        r"""Return $\log p(\theta \mid x)$ of the flow, `(sample_dim, batch_dim)`.

        Args:
            input: Parameters of shape `(sample_dim, batch_dim, *input_shape)`.
            condition: Conditions of shape `(batch_dim, *condition_shape)`.
        """
        return self.flow.log_prob(input, condition, **kwargs)

    def loss(self, input: Tensor, condition: Tensor, **kwargs) -> Tensor:
        r"""Return the forward KL of the flow up to the entropy, `(batch_dim,)`.

        Args:
            input: Parameters of shape `(batch_dim, *input_shape)`.
            condition: Conditions of shape `(batch_dim, *condition_shape)`.
        """
        return self.flow.loss(input, condition, **kwargs)

    def sample(self, sample_shape: torch.Size, condition: Tensor, **kwargs) -> Tensor:
        """Return samples of the flow, `(*sample_shape, batch_dim, *input_shape)`.

        Args:
            sample_shape: Shape of the samples.
            condition: Conditions of shape `(batch_dim, *condition_shape)`.
        """
        return self.flow.sample(sample_shape, condition, **kwargs)

    def sample_and_log_prob(
        self, sample_shape: torch.Size, condition: Tensor, **kwargs
    ) -> Tuple[Tensor, Tensor]:
        """Return samples of the flow and their log densities, from one inversion.

        Args:
            sample_shape: Shape of the samples.
            condition: Conditions of shape `(batch_dim, *condition_shape)`.

        Returns:
            Samples of shape `(*sample_shape, batch_dim, *input_shape)` and their log
            densities of shape `(*sample_shape, batch_dim)`.
        """
        return sample_and_log_prob(self.flow, sample_shape, condition)
