"""Neural posterior estimation with the adaptive constrained Jeffreys objective.

``JeffreysNPE`` takes the place of ``sbi.inference.NPE``; the other names are its
parts.
"""

from sbi_jeffreys.density import JeffreysDensityEstimator
from sbi_jeffreys.diagnostics import (
    FitCheck,
    ModelComparison,
    check_fit,
    compare_models,
)
from sbi_jeffreys.energy import ConditionalEnergy
from sbi_jeffreys.energy_builder import energy_nn
from sbi_jeffreys.estimator import JeffreysEstimator
from sbi_jeffreys.objective import JeffreysObjective
from sbi_jeffreys.posterior import (
    RefinedPosterior,
    RefinedPotential,
    proxy_based_potential,
)
from sbi_jeffreys.relaxation import HuberRelaxation, QuadraticRelaxation
from sbi_jeffreys.tracking import NoTracker
from sbi_jeffreys.trainer import JeffreysNPE
from sbi_jeffreys.version import __version__
from sbi_jeffreys.weights import AdaptiveWeights, FixedWeights

__all__ = [
    "AdaptiveWeights",
    "ConditionalEnergy",
    "FitCheck",
    "FixedWeights",
    "HuberRelaxation",
    "JeffreysDensityEstimator",
    "JeffreysEstimator",
    "JeffreysNPE",
    "JeffreysObjective",
    "ModelComparison",
    "NoTracker",
    "QuadraticRelaxation",
    "RefinedPosterior",
    "RefinedPotential",
    "check_fit",
    "compare_models",
    "energy_nn",
    "proxy_based_potential",
    "__version__",
]
