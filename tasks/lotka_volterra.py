"""Lotka-Volterra: predators and their prey."""

import math

import torch
from torch import Tensor
from torch.distributions import Independent, LogNormal

from tasks.importance import ImportancePosterior
from tasks.ode import integrate
from tasks.task import ReferencePosterior, Task

START = (30.0, 1.0)
TIMES = tuple(2.1 * k for k in range(10))
NOISE = 0.1
LOW, HIGH = 1e-10, 1e4


class LotkaVolterra(Task):
    r"""Sizes of two populations, predators and their prey.

    .. math::
        \dot u = \alpha u - \beta u v, \quad \dot v = -\gamma v + \delta u v

    with $u(0) = 30$ and $v(0) = 1$. The data are both sizes at the ten times $t_k = 0,
    2.1, \dots, 18.9$, first the prey's, $x_k \sim \mathrm{LogNormal}(\log u(t_k),
    0.1^2)$, then the predators'. The sizes are kept within $[10^{-10}, 10^4]$, as in
    the published task. The prior is log-normal: $\log \alpha, \log \gamma \sim
    N(-0.125, 0.5^2)$, $\log \beta, \log \delta \sim N(-3, 0.5^2)$.

    The equations are integrated for $\log u$ and $\log v$ with a relative error of 1e-7
    a step, so no size becomes negative.

    Reference:
        Lueckmann et al. (2021), "Benchmarking Simulation-Based Inference".
    """

    name = "lotka_volterra"
    folder = "lotka_volterra"
    dim_parameters = 4
    dim_data = 2 * len(TIMES)

    def __init__(self) -> None:
        self.loc = torch.tensor([-0.125, -3.0, -0.125, -3.0])
        self.scale = torch.full((4,), 0.5)
        self.prior = Independent(LogNormal(self.loc, self.scale), 1)

    @property
    def labels(self) -> list[str]:
        """Names of the parameters, in the order of the equations."""
        return [r"$\alpha$", r"$\beta$", r"$\gamma$", r"$\delta$"]

    def _simulate(self, theta: Tensor) -> Tensor:
        loc = log_sizes(theta)
        return (loc + NOISE * torch.randn_like(loc)).exp()

    def _log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        log_x = x.clamp_min(torch.finfo(x.dtype).tiny).log()
        log_likelihood = (
            -0.5 * ((log_x - log_sizes(theta)) / NOISE).square()
            - math.log(NOISE * math.sqrt(2 * math.pi))
            - log_x
        ).sum(1)
        return torch.where((x > 0).all(1), log_likelihood, -torch.inf)

    def _reference_posterior(self, x: Tensor) -> ReferencePosterior:
        def transform(u: Tensor) -> Tensor:
            return (self.loc + self.scale * u).exp()

        return ImportancePosterior(
            lambda u: self._log_likelihood(transform(u), x.unsqueeze(0)),
            transform,
            lambda theta: self._log_joint(theta, x),
            dim=self.dim_parameters,
            # Fewer than otherwise, as each costs an integration.
            num_samples=5_000,
        )


def log_sizes(theta: Tensor) -> Tensor:
    r"""Return the logarithms of $u$ at the ten times, then those of $v$, (n, 20)."""
    state = torch.tensor(START, dtype=torch.float64).log().expand(len(theta), 2)
    solution = integrate(_field, state, theta, TIMES)
    low, high = torch.tensor([LOW, HIGH]).log().tolist()
    return solution.clamp(low, high).transpose(1, 2).flatten(1)


def _field(state: Tensor, theta: Tensor) -> Tensor:
    prey, predators = state.exp()
    alpha, beta, gamma, delta = theta
    return torch.stack((alpha - beta * predators, delta * prey - gamma))
