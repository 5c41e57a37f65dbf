r"""Weights of the three divergences: fixed, or dual variables of the resilient problem.

.. math:: \min_{\phi, \psi, u \ge 0} \sum_i h(u_i) \quad \text{subject to} \quad
    \mathrm{KL}(\pi \Vert p) \le u_1, \;
    \mathrm{KL}(p \Vert q) \le u_2, \;
    \mathrm{KL}(\pi \Vert q) \le u_3
"""

import math
from abc import ABC, abstractmethod
from copy import deepcopy
from typing import Any, Dict, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from sbi_jeffreys.relaxation import HuberRelaxation, Relaxation


class Weights(ABC):
    r"""Weights $\lambda$ of the three divergences, and how far the flow follows.

    $D_2 = \mathrm{KL}(p \Vert q)$ falls when the flow moves to the proxy and when the
    proxy moves to the flow. The proxy is asked to lower all of it, the flow the share
    `flow_share`: its gradient of $D_2$ is multiplied by that.

    Attributes:
        dual_variables: $\lambda$, of shape `(3,)`.
        trust: The probability that the proxy is nearer to the truth than the flow.
        forward_share: Share of $D_1$ that the flow is asked to lower while it learns
            from the proxy.
    """

    dual_variables: Tensor
    trust: float
    forward_share: float = 1.0

    @property
    @abstractmethod
    def flow_share(self) -> float:
        """Share of the reverse divergence that the flow is asked to lower."""

    @abstractmethod
    def update(self, validation: "ValidationDivergences") -> None:
        """Take one dual step, after an epoch.

        Args:
            validation: Divergences on simulations that neither model was fitted to.
        """

    @abstractmethod
    def measure_trust(self, validation: "ValidationDivergences") -> None:
        """Take the trust in a proxy that learnt while the flow stood still.

        Args:
            validation: Divergences on simulations that neither model was fitted to.
        """

    @abstractmethod
    def start_distillation(self, exponent: float) -> None:
        r"""Learn how far the proxy helps, before the flow learns from it.

        Args:
            exponent: $\beta$ of the refined posterior, chosen on validation
                simulations: how far from the flow to the proxy it pays to go.
        """

    @abstractmethod
    def start_round(self) -> None:
        """Forget what does not carry over to a new round of simulations."""

    def state_dict(self) -> Dict[str, Any]:
        """Return a copy of all attributes that are tensors, numbers or lists of them.

        A training is resumed with them. Extend it where other attributes change.
        """
        return deepcopy({k: v for k, v in vars(self).items() if _is_plain(v)})

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Take the attributes that `state_dict` returned."""
        vars(self).update(deepcopy(state_dict))


class ValidationDivergences:
    r"""The divergences on validation simulations.

    Args:
        forward_kl: $-\log p(\theta \mid x)$ of every simulation, `(num,)`.
        reverse_kl: Estimate of $\mathrm{KL}(p \Vert q)$ at every $x$, `(num,)`.
        proxy_forward_kl: $-\log q(\theta \mid x)$ of every simulation, `(num,)`.
    """

    def __init__(
        self, forward_kl: Tensor, reverse_kl: Tensor, proxy_forward_kl: Tensor
    ) -> None:
        self.forward_kl = forward_kl.mean().item()
        self.reverse_kl = reverse_kl.mean().item()
        self.proxy_forward_kl = proxy_forward_kl.mean().item()
        difference = forward_kl - proxy_forward_kl
        #: Validation advantage of the proxy, $D_1 - D_3$, in nats. The entropy that
        #: neither knows cancels.
        self.advantage = difference.mean().item()
        num = len(difference)
        #: Its standard error, from the paired differences.
        self.standard_error = (
            difference.std().item() / math.sqrt(num) if num > 1 else math.inf
        )


class FixedWeights(Weights):
    """The penalty form: weights that do not change, shared by both models.

    Args:
        weights: Weights of forward, reverse and proxy divergence, none negative.

    Raises:
        ValueError: If they are not three non-negative numbers.
    """

    def __init__(self, weights: Sequence[float] = (1.0, 1.0, 1.0)) -> None:
        self.dual_variables = torch.as_tensor(weights, dtype=torch.float32)
        if (
            self.dual_variables.shape != (3,)
            or not ((self.dual_variables >= 0) & self.dual_variables.isfinite()).all()
        ):
            raise ValueError(
                "weights must be three finite, non-negative numbers, for forward, "
                f"reverse and proxy divergence; got {weights!r}."
            )
        self.trust = math.nan

    @property
    def flow_share(self) -> float:
        return 1.0

    def start_distillation(self, exponent: float) -> None:
        pass

    def update(self, validation: ValidationDivergences) -> None:
        pass

    def measure_trust(self, validation: ValidationDivergences) -> None:
        pass

    def start_round(self) -> None:
        pass


class AdaptiveWeights(Weights):
    r"""Dual variables of the resilient problem, found by dual ascent.

    After every epoch, on validation simulations,

    .. math:: \lambda_i \leftarrow [\lambda_i + \eta (D_i - u_i)]_+, \qquad
        u_i = (h')^{-1}(\lambda_i)

    **Entropy.** $D_1$ and $D_3$ are known up to the entropy $H$ of the truth. Both
    models bound it from above, so the baseline is the lowest validation loss that
    either has reached so far. Its error is the divergence of the better model.
    Rescaling $\theta$ shifts losses and baseline alike and changes no dual variable.

    **Trust.** A proxy that is worse than the flow drags it away. The validation
    advantage of the proxy, $D_1 - D_3$, needs no entropy; with its standard error $s$

    .. math:: \tau = \Phi((D_1 - D_3) / s)

    is the probability that the proxy is nearer to the truth. A few validation
    simulations that the flow finds all but impossible may make a poor proxy look near;
    the exponent $\beta$ of the refined posterior, chosen on the same simulations, is
    not misled by them. Of the reverse divergence the flow is asked to lower the share
    $\beta \tau$, the proxy all: being held near the flow is what keeps it from
    overfitting. Where the proxy has surrogates of the likelihood, the flow is asked to
    lower $D_1$, to which it overfits, by the rest: $1 - \beta \tau$ as they were when
    it began to learn from the proxy.

    Args:
        relaxation: Cost $h$ of relaxing a constraint.
        dual_learning_rate: Step $\eta$ of the dual ascent, per epoch and nat.
        smoothing: Share of the past in the moving averages of divergences and trust,
            between 0 and 1.

    Raises:
        ValueError: If the step is not positive, or so large for the curvature of $h$
            that the ascent overshoots, or if the smoothing is not in [0, 1).
    """

    def __init__(
        self,
        relaxation: Optional[Relaxation] = None,
        dual_learning_rate: float = 0.05,
        smoothing: float = 0.8,
    ) -> None:
        if not dual_learning_rate > 0:
            raise ValueError(
                f"dual_learning_rate must be positive, got {dual_learning_rate}."
            )
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}.")
        self.h = HuberRelaxation() if relaxation is None else relaxation
        if dual_learning_rate > self.h.curvature:
            raise ValueError(
                f"A dual_learning_rate of {dual_learning_rate} overshoots for "
                f"alpha={self.h.curvature}: it must not exceed alpha. FixedWeights are "
                "the limit of a vanishing alpha."
            )
        self.dual_learning_rate = dual_learning_rate
        self.smoothing = smoothing
        self.dual_variables = torch.ones(3)
        #: Lowest validation loss of either model, the bound of the entropy.
        self.entropy_baseline = math.inf
        # The proxy earns trust: until the first validation it has none.
        self.trust = 0.0
        #: $\beta$ of the refined posterior when the flow begins to learn from it.
        self.exponent = 1.0
        self.forward_share = 1.0

    @property
    def flow_share(self) -> float:
        return self.exponent * self.trust

    def update(self, validation: ValidationDivergences) -> None:
        v = validation
        losses = [v.forward_kl, v.proxy_forward_kl]
        self.entropy_baseline = min([
            self.entropy_baseline,
            *filter(math.isfinite, losses),
        ])
        violations = torch.tensor([
            v.forward_kl - self.entropy_baseline,
            max(v.reverse_kl, 0.0),
            v.proxy_forward_kl - self.entropy_baseline,
        ])
        # An infinite loss says no more than a large one: the bound takes care.
        violations = torch.nan_to_num(violations, nan=0.0, posinf=1e6, neginf=0.0)
        step = violations - self.h.relaxation(self.dual_variables)
        self.dual_variables = (
            self.dual_variables + self.dual_learning_rate * step
        ).clamp(0.0, self.h.dual_bound)
        self.trust = self.smoothing * self.trust + (1 - self.smoothing) * _trust(v)

    def measure_trust(self, validation: ValidationDivergences) -> None:
        self.trust = _trust(validation)

    def start_distillation(self, exponent: float) -> None:
        self.exponent = exponent
        self.forward_share = 1.0 - self.flow_share

    def start_round(self) -> None:
        # Another round's simulations have another entropy; the duals carry over.
        self.entropy_baseline = math.inf


def _trust(validation: ValidationDivergences) -> float:
    """Return the probability that the proxy is nearer to the truth than the flow."""
    z = validation.advantage / max(validation.standard_error, 1e-12)
    return 0.5 * (1 + math.erf(z / math.sqrt(2))) if math.isfinite(z) else 0.0


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, [*value, *value.values()]))
    is_number = isinstance(value, np.generic)  # of settings by numpy
    return value is None or is_number or type(value) in (bool, int, float, str, Tensor)
