"""The networks that every method of a study shares."""

from dataclasses import dataclass

from sbi.neural_nets import posterior_nn
from torch import Tensor

from sbi_jeffreys import energy_nn
from sbi_jeffreys.coordinates import ResidualCoordinates
from sbi_jeffreys.energy_builder import EnergyBuilder
from sbi_jeffreys.features import Features
from sbi_jeffreys.residual_flow import ResidualFlow


@dataclass(frozen=True)
class Networks:
    """Sizes of flow and energy.

    Attributes:
        flow: Name of the flow, as in sbi's `posterior_nn`.
        num_transforms: Its number of transforms.
        flow_features: Its number of hidden features.
        energy_features: Hidden features of energy and critic.
        energy_blocks: Their number of residual blocks of two layers each.
        dropout: Dropout in the energy. A critic has none, which its gradient penalty
            would not bear.
    """

    flow: str = "zuko_nsf"
    num_transforms: int = 3
    flow_features: int = 32
    energy_features: int = 32
    energy_blocks: int = 2
    dropout: float = 0.1

    def build_flow(self, theta: Tensor, x: Tensor) -> ResidualFlow:
        """Build the flow, on whitened coordinates as `JeffreysNPE`'s are."""
        features = Features(x)
        coordinates = ResidualCoordinates(theta, x, features)
        inputs = features(x)
        build = posterior_nn(
            self.flow,  # type: ignore[arg-type]
            z_score_x="none",
            hidden_features=self.flow_features,
            num_transforms=self.num_transforms,
        )
        flow = build(coordinates(theta, inputs), inputs)
        return ResidualFlow(flow, coordinates, features, theta[0].shape, x[0].shape)

    def energy(self, dropout: float | None = None) -> EnergyBuilder:
        """Return the builder of the energy."""
        return energy_nn(
            self.energy_features,
            self.energy_blocks,
            dropout=self.dropout if dropout is None else dropout,
        )
