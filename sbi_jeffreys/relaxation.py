r"""Costs $h(u)$ of relaxing the constraints of the resilient problem.

In resilient constrained learning [1] a constraint $D_i \le u_i$ may be relaxed at the
cost $h(u)$. Of $h$ the algorithm needs its derivative's inverse: the relaxation that a
dual variable $\lambda = h'(u)$ pays for.

[1] I. Hounie, A. Ribeiro, L. F. O. Chamon, "Resilient Constrained Learning", NeurIPS
2023.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Relaxation(ABC):
    r"""A convex cost $h(u)$, the same for every constraint."""

    @abstractmethod
    def cost(self, relaxation: Tensor) -> Tensor:
        r"""Return $h(u)$ of every $u \ge 0$."""

    @abstractmethod
    def relaxation(self, dual_variables: Tensor) -> Tensor:
        r"""Return $\arg\min_{u \ge 0} h(u) - \lambda u$ of every $\lambda$."""

    @property
    def curvature(self) -> float:
        r"""The second derivative of $h$ where it is strictly convex."""
        return float("inf")

    @property
    def dual_bound(self) -> float:
        r"""The largest slope of $h$, which bounds the dual variables."""
        return float("inf")


class QuadraticRelaxation(Relaxation):
    r"""Quadratic cost $h(u) = c u + \tfrac12 \alpha u^2$.

    The dual variables settle at $\lambda = c + \alpha D$: the price $c$ of the first
    nat, and more the further a divergence is from being met. With $\alpha \to 0$ all
    weights are $c$.

    Args:
        alpha: Curvature $\alpha > 0$, per nat.
        price: Price $c \ge 0$.

    Raises:
        ValueError: If `alpha` is not positive or `price` is negative.
    """

    def __init__(self, alpha: float = 1.0, price: float = 1.0) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha must be positive, got {alpha}.")
        if not price >= 0:
            raise ValueError(f"price must not be negative, got {price}.")
        self.alpha = alpha
        self.price = price

    def cost(self, relaxation: Tensor) -> Tensor:
        return self.price * relaxation + 0.5 * self.alpha * relaxation**2

    @property
    def curvature(self) -> float:
        return self.alpha

    def relaxation(self, dual_variables: Tensor) -> Tensor:
        return ((dual_variables - self.price) / self.alpha).clamp_min(0)


class HuberRelaxation(QuadraticRelaxation):
    r"""Huber's cost: quadratic up to $u = \delta$, linear beyond.

    .. math:: h(u) = c u + \begin{cases} \tfrac12 \alpha u^2 & u \le \delta \\
        \alpha \delta (u - \tfrac12 \delta) & u > \delta \end{cases}

    It is Lipschitz, so that no divergence, however large, drives its dual variable
    beyond $c + \alpha \delta$.

    Args:
        alpha: Curvature $\alpha > 0$, per nat.
        price: Price $c \ge 0$.
        delta: Relaxation $\delta > 0$ where the cost becomes linear, in nats.

    Raises:
        ValueError: If `alpha` or `delta` is not positive or `price` is negative.
    """

    def __init__(
        self, alpha: float = 1.0, price: float = 1.0, delta: float = 2.0
    ) -> None:
        super().__init__(alpha, price)
        if not delta > 0:
            raise ValueError(f"delta must be positive, got {delta}.")
        self.delta = delta

    def cost(self, relaxation: Tensor) -> Tensor:
        linear = self.alpha * self.delta * (relaxation - 0.5 * self.delta)
        quadratic = 0.5 * self.alpha * relaxation**2
        return self.price * relaxation + torch.where(
            relaxation <= self.delta, quadratic, linear
        )

    @property
    def dual_bound(self) -> float:
        return self.price + self.alpha * self.delta
