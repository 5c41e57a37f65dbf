"""SIR: the course of an epidemic."""

import math

import torch
from torch import Tensor
from torch.distributions import Independent, LogNormal

from tasks.importance import ImportancePosterior
from tasks.ode import integrate
from tasks.task import ReferencePosterior, Task

POPULATION = 1_000_000.0
NUM_TESTED = 1000
TIMES = tuple(17.0 * k for k in range(10))


class SIR(Task):
    r"""Numbers of infected people in samples of a population.

    .. math::
        \dot S = -\beta S I / N, \quad \dot I = \beta S I / N - \gamma I

    with $N = 10^6$, $I(0) = 1$ and $S(0) = N - 1$, in days. The data are the numbers of
    infected people among 1,000 who are tested, $x_k \sim \mathrm{Binomial}(1000,
    I(t_k) / N)$, at the ten times $t_k = 0, 17, \dots, 153$ days. The prior is
    log-normal: $\log \beta \sim N(\log 0.4, 0.5^2)$, $\log \gamma \sim N(\log 0.125,
    0.2^2)$, per day.

    The equations are integrated for $\log S$ and $\log I$ with a relative error of 1e-7
    a step. In these coordinates no parameters of the prior are stiff and nothing
    becomes negative.

    Reference:
        Lueckmann et al. (2021), "Benchmarking Simulation-Based Inference".
    """

    name = "sir"
    folder = "sir"
    dim_parameters = 2
    dim_data = len(TIMES)

    def __init__(self) -> None:
        self.loc = torch.tensor([math.log(0.4), math.log(0.125)])
        self.scale = torch.tensor([0.5, 0.2])
        self.prior = Independent(LogNormal(self.loc, self.scale), 1)

    @property
    def labels(self) -> list[str]:
        """Names of the parameters: contact rate and recovery rate."""
        return [r"$\beta$", r"$\gamma$"]

    def _simulate(self, theta: Tensor) -> Tensor:
        probs = log_infected_fraction(theta).exp()
        counts = torch.binomial(torch.full_like(probs, NUM_TESTED), probs.nan_to_num())
        return torch.where(probs.isnan(), torch.nan, counts)

    def _log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        log_p = log_infected_fraction(theta)
        log_binomial = (
            math.lgamma(NUM_TESTED + 1)
            - torch.lgamma(x + 1)
            - torch.lgamma(NUM_TESTED - x + 1)
        )
        log_not_infected = torch.special.xlog1py(NUM_TESTED - x, -log_p.exp())
        log_likelihood = (log_binomial + x * log_p + log_not_infected).sum(1)
        possible = ((x >= 0) & (x <= NUM_TESTED) & (x == x.round())).all(1)
        return torch.where(possible, log_likelihood, -torch.inf)

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


def log_infected_fraction(theta: Tensor) -> Tensor:
    r"""Return $\log (I / N)$ at the ten times, shape (n, 10)."""
    start = torch.tensor([POPULATION - 1, 1.0], dtype=torch.float64) / POPULATION
    state = start.log().expand(len(theta), 2)
    # Rounding may leave a fraction just above one.
    return integrate(_field, state, theta, TIMES)[:, :, 1].clamp_max(0.0)


def _field(state: Tensor, theta: Tensor) -> Tensor:
    susceptible, infected = state.exp()
    beta, gamma = theta
    return torch.stack((-beta * infected, beta * susceptible - gamma))
