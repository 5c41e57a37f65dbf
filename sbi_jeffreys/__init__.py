"""Neural posterior estimation with the adaptive constrained Jeffreys objective.

``JeffreysNPE`` takes the place of ``sbi.inference.NPE``; the other names are its
parts.
"""

from sbi_jeffreys.energy import ConditionalEnergy, energy_nn
from sbi_jeffreys.estimator import JeffreysEstimator
from sbi_jeffreys.objective import JeffreysObjective
from sbi_jeffreys.posterior import RefinedPosterior
from sbi_jeffreys.relaxation import HuberRelaxation, QuadraticRelaxation
from sbi_jeffreys.tracking import NoTracker
from sbi_jeffreys.trainer import JeffreysNPE
from sbi_jeffreys.version import __version__
from sbi_jeffreys.weights import AdaptiveWeights, FixedWeights

__all__ = [
    "AdaptiveWeights",
    "ConditionalEnergy",
    "FixedWeights",
    "HuberRelaxation",
    "JeffreysEstimator",
    "JeffreysNPE",
    "JeffreysObjective",
    "NoTracker",
    "QuadraticRelaxation",
    "RefinedPosterior",
    "energy_nn",
    "__version__",
]
