"""Posteriors sampled by adaptive importance sampling."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


class ImportancePosterior:
    r"""Posterior for a likelihood that can be computed, under a Gaussian prior.

    Parameters are written as $\theta = g(u)$ with $u \sim N(0, I)$ a priori, so the
    posterior of $u$ is proportional to $N(u; 0, I) \, p(x \mid u)$. It is approached
    from the prior along powers $p(x \mid u)^\tau$ of the likelihood, with $\tau$
    growing to one: in each round samples of a proposal are weighted, and the next
    proposal is fitted to them. The posterior is then sampled from the last proposal by
    rejection: its samples are independent, and none comes twice. The weights are
    bounded by their largest in the last round; the few beyond are cut to it.

    Args:
        log_likelihood: Maps $u$, shape (n, dim), to $\log p(x \mid u)$, shape (n,).
        transform: Maps $u$, shape (n, dim), to $\theta$, shape (n, dim_parameters).
        log_joint: Maps $\theta$, shape (n, dim_parameters), to
            $\log p(\theta) + \log p(x \mid \theta)$, shape (n,).
        dim: Dimension of $u$.
        num_samples: Number of samples in a round.

    Attributes:
        efficiency: Effective sample size of the last proposal, as a fraction.
        log_evidence: Estimate of $\log p(x)$, with the standard error
            `((1 / efficiency - 1) / num_samples) ** 0.5`.

    Raises:
        ValueError: If no parameters are found that can give the data.
        RuntimeError: If no good proposal is found.

    Reference:
        Cappé, Douc, Guillin, Marin and Robert (2008), "Adaptive importance sampling in
        general mixture classes".
    """

    def __init__(
        self,
        log_likelihood: Callable[[Tensor], Tensor],
        transform: Callable[[Tensor], Tensor],
        log_joint: Callable[[Tensor], Tensor],
        dim: int,
        num_samples: int = 20_000,
    ) -> None:
        self._log_likelihood = log_likelihood
        self._transform = transform
        self._log_joint = log_joint

        self._proposal = _Proposal(torch.zeros(dim), torch.eye(dim), prior_share=1.0)
        self.efficiency = 0.0
        for _ in range(100):
            u, log_ratio, log_l = self._propose(num_samples)
            if log_l.max() == -torch.inf:
                raise ValueError("No parameters were found that can give these data.")
            tau, log_w = _temper(log_ratio, log_l)
            if tau == 1.0:
                # Go on fitting for as long as that gains anything.
                before, self.efficiency = self.efficiency, _efficiency(log_w)
                if self.efficiency < 1.05 * before:
                    break
            self._proposal = _fit(u, log_w)
        else:
            raise RuntimeError(
                "The posterior could not be approached by importance sampling: the "
                "proposal is still poor after 100 rounds. Try more samples in a round."
            )
        self.log_evidence = float(log_w.logsumexp(0)) - math.log(num_samples)
        self._log_bound = float(log_w.max())

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """Draw samples of shape `(*sample_shape, dim_parameters)`."""
        shape = torch.Size(sample_shape)
        rate = math.exp(self.log_evidence - self._log_bound)
        accepted = [self._proposal.sample(0)]
        missing = shape.numel()
        while missing > 0:
            num_samples = min(int(1.1 * missing / rate) + 10, 100_000)
            u, log_ratio, log_l = self._propose(num_samples)
            log_rate = log_ratio + log_l - self._log_bound
            accept = torch.rand_like(log_rate).log() < log_rate
            accepted.append(u[accept][:missing])
            missing -= len(accepted[-1])
        theta = self._transform(torch.cat(accepted))
        return theta.float().unflatten(0, shape) if shape else theta[0].float()

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of parameters of shape (n, dim_parameters)."""
        return self._log_joint(value.double()) - self.log_evidence

    def _propose(self, num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return samples u with log N(u; 0, I) / q(u) and log p(x | u)."""
        u = self._proposal.sample(num_samples)
        log_l = self._log_likelihood(u)
        # The likelihood is not a number where the simulator fails.
        log_l = torch.where(log_l.isnan(), -torch.inf, log_l)
        return u, _log_standard_normal(u) - self._proposal.log_prob(u), log_l


class _Proposal:
    r"""A mixture of a Student t distribution and the prior $N(0, I)$.

    The heavy tails, and the prior far out, keep the weights bounded.
    """

    degrees_of_freedom = 4.0

    def __init__(self, loc: Tensor, scale_tril: Tensor, prior_share: float) -> None:
        self.loc = loc.double()
        self.scale_tril = scale_tril.double()
        self.prior_share = prior_share

    def sample(self, n: int) -> Tensor:
        nu = self.degrees_of_freedom
        noise = torch.randn(n, len(self.loc), dtype=torch.float64)
        # A chi-square variable with four degrees of freedom, from two uniform ones.
        chi2 = -2 * torch.rand(2, n, 1, dtype=torch.float64).log().sum(0)
        student = self.loc + (nu / chi2).sqrt() * noise @ self.scale_tril.T
        return torch.where(torch.rand(n, 1) < self.prior_share, noise, student)

    def log_prob(self, u: Tensor) -> Tensor:
        nu, dim = self.degrees_of_freedom, len(self.loc)
        scaled = torch.linalg.solve_triangular(
            self.scale_tril, (u - self.loc).T, upper=False
        )
        log_student = (
            math.lgamma(0.5 * (nu + dim))
            - math.lgamma(0.5 * nu)
            - 0.5 * dim * math.log(nu * math.pi)
            - self.scale_tril.diagonal().log().sum()
            - 0.5 * (nu + dim) * torch.log1p(scaled.square().sum(0) / nu)
        )
        shares = torch.tensor([1 - self.prior_share, self.prior_share]).double().log()
        return torch.logaddexp(
            shares[0] + log_student, shares[1] + _log_standard_normal(u)
        )


def _fit(u: Tensor, log_w: Tensor) -> _Proposal:
    """Return the proposal with the mean and covariance of weighted samples."""
    w = log_w.softmax(0).unsqueeze(1)
    loc = (w * u).sum(0)
    covariance = (u - loc).T @ (w * (u - loc))
    return _Proposal(loc, torch.linalg.cholesky(covariance), prior_share=0.1)


def _temper(log_ratio: Tensor, log_l: Tensor) -> tuple[float, Tensor]:
    """Return the power of the likelihood to go to, and the log weights with it.

    The power is the largest up to one that leaves a tenth of the samples effective.
    """

    def log_w(tau: float) -> Tensor:
        # What is impossible stays impossible, also with the power zero.
        return torch.where(log_l > -torch.inf, log_ratio + tau * log_l, -torch.inf)

    low, high = 0.0, 1.0
    if _efficiency(log_w(1.0)) >= 0.1:
        return 1.0, log_w(1.0)
    for _ in range(40):
        middle = 0.5 * (low + high)
        if _efficiency(log_w(middle)) >= 0.1:
            low = middle
        else:
            high = middle
    return low, log_w(low)


def _efficiency(log_w: Tensor) -> float:
    """Return the effective sample size as a fraction of the number of samples."""
    log_size = 2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)
    return math.exp(log_size) / len(log_w)


def _log_standard_normal(u: Tensor) -> Tensor:
    return -0.5 * (u.square().sum(1) + u.shape[1] * math.log(2 * math.pi))
