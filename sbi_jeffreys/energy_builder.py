"""Builders of the proxy, as sbi has them of its networks."""

from numbers import Integral, Real
from typing import Callable, Literal, Optional, Protocol

import torch
from sbi.neural_nets.net_builders.classifier import build_z_scored_embedding_net
from sbi.utils.nn_utils import check_net_device, get_numel
from sbi.utils.user_input_checks import check_data_device
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F

from sbi_jeffreys.base_measure import make_base_measure
from sbi_jeffreys.coordinates import ResidualCoordinates
from sbi_jeffreys.energy import BoundedEnergyNet, ConditionalEnergy, EnergyNet
from sbi_jeffreys.features import Features, num_values
from sbi_jeffreys.likelihood import SurrogateLikelihoods, has_likelihood
from sbi_jeffreys.pooled_energy import PooledEnergy
from sbi_jeffreys.screening import informative_outputs

# An embedding network of more outputs is to make something of them. Their regression
# would take minutes, and their scores longer than the network.
MAX_REGRESSED_OUTPUTS = 1000

ZScore = Optional[Literal["independent", "structured", "none"]]


class EnergyBuilder(Protocol):
    """Builds the proxy from the first simulations, as `posterior_nn`'s builders do."""

    def __call__(
        self, theta: Tensor, x: Tensor, prior: Optional[Distribution]
    ) -> ConditionalEnergy:
        """Build the proxy.

        Args:
            theta: Parameters of the simulations, for shapes and z-scoring.
            x: Simulation outputs, likewise.
            prior: The prior, `None` if none was given.

        Returns:
            The proxy.
        """
        ...


def energy_nn(
    hidden_features: int = 64,
    num_blocks: int = 3,
    activation: Callable[[Tensor], Tensor] = F.silu,
    dropout: float = 0.1,
    z_score_x: ZScore = "independent",
    embedding_net: nn.Module = nn.Identity(),
    base_measure: Literal["prior", "lebesgue"] = "prior",
    likelihood: Literal["auto", "none"] = "auto",
) -> EnergyBuilder:
    r"""Return a function that builds the energy-based proxy of the posterior.

    It is to `JeffreysNPE(energy_estimator=...)` what `posterior_nn` is to
    `density_estimator=...`.

    Args:
        hidden_features: Number of hidden features.
        num_blocks: Number of residual blocks of two layers each.
        activation: Activation function. The flow learns from the slope of the energy:
            take a smooth one.
        dropout: Dropout probability in the residual blocks.
        z_score_x: Whether to z-score simulation outputs for the embedding network, as
            in `posterior_nn`: `"independent"` for every dimension alone,
            `"structured"` for all together, `"none"`. Without an embedding network
            the condition enters by its `Features`, of those outputs that say
            something, see `sbi_jeffreys.screening`.
        embedding_net: Embedding network for simulation outputs. Give the object that
            `posterior_nn` was given to share it with the flow, or one of its own. Up
            to a thousand outputs also enter by their regression, as without one.
        base_measure: Base measure $b(\theta)$. With `"prior"` the proxy has the
            prior's support and shape; `"lebesgue"` is the plain energy-based model.
        likelihood: Whether surrogates of the likelihood are factors of the proxy, see
            `sbi_jeffreys.pooled_energy`. With `"auto"` they are, where simulation
            outputs are vectors of 200 numbers or fewer and have no embedding network;
            with `"none"` the proxy is one energy network.

    Returns:
        Builder to be passed to `JeffreysNPE(energy_estimator=...)`.

    Raises:
        ValueError: If a size or the dropout is out of its range, or if `base_measure`,
            `likelihood` or a z-scoring option is unknown.
    """
    for name, value, least in (
        ("hidden_features", hidden_features, 1),
        ("num_blocks", num_blocks, 0),
    ):
        if not isinstance(value, Integral) or value < least:
            raise ValueError(
                f"{name} must be an integer of at least {least}, got {value!r}."
            )
    if not isinstance(dropout, Real) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout!r}.")
    embedding_net = check_net_device(
        embedding_net, "cpu", "The embedding net is moved to the CPU for building."
    )
    if z_score_x not in ("independent", "structured", "none", None):
        raise ValueError(
            "z_score_x must be 'independent', 'structured', 'none' or None, got "
            f"{z_score_x!r}."
        )
    if base_measure not in ("prior", "lebesgue"):
        raise ValueError(
            f"base_measure must be 'prior' or 'lebesgue', got {base_measure!r}."
        )
    if likelihood not in ("auto", "none"):
        raise ValueError(f"likelihood must be 'auto' or 'none', got {likelihood!r}.")

    def build_fn(
        theta: Tensor, x: Tensor, prior: Optional[Distribution]
    ) -> ConditionalEnergy:
        check_data_device(theta, x)
        is_embedded = not isinstance(embedding_net, nn.Identity)
        if is_embedded and x[0].numel() > MAX_REGRESSED_OUTPUTS:
            outputs = torch.empty(0, dtype=torch.long, device=x.device)
        else:
            outputs = informative_outputs(theta, x)
        features = Features(x, outputs)
        coordinates = ResidualCoordinates(theta, x, features, prior)
        if not is_embedded:
            embedding, x_numel = None, features.numel
        else:
            embedding = build_z_scored_embedding_net(x, z_score_x, embedding_net)
            x_numel = get_numel(x, embedding_net=embedding_net)
        # Without a condition the samples of all batches are behind one Z, which misses
        # no place for long; a bound only slows the network down.
        is_conditional = is_embedded or bool((num_values(x) > 1).any())
        net = (BoundedEnergyNet if is_conditional else EnergyNet)(
            coordinates,
            features,
            embedding,
            x_numel=x_numel,
            hidden_features=hidden_features,
            num_blocks=num_blocks,
            activation=activation,
            dropout=dropout,
        )
        base = make_base_measure(base_measure, prior, theta)
        shapes = theta[0].shape, x[0].shape
        used = x if outputs is None else x[:, outputs]
        if likelihood == "none" or embedding is not None or not has_likelihood(used):
            return ConditionalEnergy(net, base, *shapes)
        likelihoods = SurrogateLikelihoods(theta, x, coordinates, outputs)
        return PooledEnergy(net, likelihoods, base, *shapes)

    return build_fn
