"""What `JeffreysNPE.summary` and the tracker hold for every epoch beside sbi's own."""

from typing import Dict, Tuple

from sbi_jeffreys.stages import Stage

VALIDATION_METRICS = (
    "validation_forward_kl",
    "validation_reverse_kl",
    "validation_proxy_forward_kl",
    "validation_likelihood_loss",
    "log_partition",
    "effective_sample_size",
)
DUAL_METRICS = ("dual_forward_kl", "dual_reverse_kl", "dual_proxy_forward_kl")
TRAINING_METRICS = (
    "training_forward_kl",
    "training_reverse_kl",
    "training_proxy_forward_kl",
    "training_likelihood_loss",
)
EPOCH_METRICS = (
    *TRAINING_METRICS,
    *VALIDATION_METRICS,
    *DUAL_METRICS,
    "trust",
)
_MISSING: Dict[Stage, Tuple[str, ...]] = {
    Stage.FLOW: (*TRAINING_METRICS[1:], *VALIDATION_METRICS[1:]),
    Stage.LIKELIHOOD: (
        *TRAINING_METRICS[:3],
        *(name for name in VALIDATION_METRICS[1:] if "likelihood" not in name),
    ),
    Stage.PROXY: (
        "training_forward_kl",
        "training_likelihood_loss",
        "validation_likelihood_loss",
    ),
    Stage.DISTILLATION: (*TRAINING_METRICS[1:], "validation_likelihood_loss"),
}


def is_missing(name: str, stage: Stage) -> bool:
    """Return whether the epochs of a stage lack a metric, which is NaN there.

    They do for want of a model that learns.

    Args:
        name: One of `EPOCH_METRICS`.
        stage: The stage.
    """
    return name in _MISSING[stage]
