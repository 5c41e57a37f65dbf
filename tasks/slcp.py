"""SLCP: simple likelihood, complex posterior."""

import math

import torch
from sbi.utils import BoxUniform
from torch import Tensor
from torch.special import ndtr

from tasks.importance import ImportancePosterior
from tasks.task import ReferencePosterior, Task
from tasks.truncated_normal import TruncatedNormal

BOUND = 3.0
NUM_POINTS = 4
# Keeps the covariance positive definite where a scale is zero.
JITTER = 1e-6


class SLCP(Task):
    r"""Four points of a Gaussian in the plane, whose scales hide their signs.

    .. math::
        x_i \sim N\left( \begin{pmatrix} \theta_1 \\ \theta_2 \end{pmatrix},
        \begin{pmatrix} s_1^2 & \rho s_1 s_2 \\ \rho s_1 s_2 & s_2^2 \end{pmatrix}
        + 10^{-6} I \right), \quad
        s_1 = \theta_3^2, \; s_2 = \theta_4^2, \; \rho = \tanh \theta_5

    for $i = 1, \dots, 4$. The prior is uniform on $[-3, 3]^5$. The data are the points
    one after the other, the posterior has four symmetric modes.

    Reference:
        Papamakarios, Sterratt and Murray (2019), "Sequential Neural Likelihood".
    """

    name = "slcp"
    folder = "slcp"
    dim_parameters = 5
    dim_data = 2 * NUM_POINTS

    def __init__(self) -> None:
        bound = BOUND * torch.ones(self.dim_parameters)
        self.prior = BoxUniform(-bound, bound)

    def _simulate(self, theta: Tensor) -> Tensor:
        l11, l21, l22 = cholesky(theta[:, 2:])
        noise = torch.randn(len(theta), NUM_POINTS, 2, dtype=theta.dtype)
        e1, e2 = noise.unbind(-1)
        x1 = theta[:, 0:1] + l11 * e1
        x2 = theta[:, 1:2] + l21 * e1 + l22 * e2
        return torch.stack((x1, x2), dim=-1).flatten(1)

    def _log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        l11, l21, l22 = cholesky(theta[:, 2:])
        x1, x2 = x.unflatten(1, (NUM_POINTS, 2)).unbind(-1)
        e1 = (x1 - theta[:, 0:1]) / l11
        e2 = (x2 - theta[:, 1:2] - l21 * e1) / l22
        square = (e1.square() + e2.square()).sum(1)
        log_det = (l11.log() + l22.log()).squeeze(1)
        return -0.5 * square - NUM_POINTS * (log_det + math.log(2 * math.pi))

    def _reference_posterior(self, x: Tensor) -> ReferencePosterior:
        latent = _Latent(x)
        return ImportancePosterior(
            latent.log_likelihood,
            latent.transform,
            lambda theta: self._log_joint(theta, x),
            dim=self.dim_parameters,
        )


def cholesky(shape: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the entries 11, 21 and 22 of the covariance's Cholesky factor.

    Args:
        shape: The last three parameters, $\theta_3$ to $\theta_5$, shape (n, 3).

    Returns:
        Tensors of shape (n, 1).
    """
    s1, s2 = shape[:, 0:1].square(), shape[:, 1:2].square()
    rho = shape[:, 2:3].tanh()
    l11 = (s1.square() + JITTER).sqrt()
    l21 = rho * s1 * s2 / l11
    # s2^2 - l21^2, written without the difference of two nearly equal numbers.
    rest = s2.square() * (s1.square() * (1 - rho.square()) + JITTER) / l11.square()
    return l11, l21, (rest + JITTER).sqrt()


class _Latent:
    r"""Coordinates $u \sim N(0, I)$ a priori in which the posterior is nearly Gaussian.

    Three coordinates, made uniform, are $|\theta_3|$, $|\theta_4|$ and $\theta_5$ on
    their intervals. The signs are left to chance, as the posterior does not depend on
    them. Given these, and so the covariance $\Sigma$, the posterior of the mean is
    $N(\bar x, \Sigma / 4)$ restricted to the prior's box. The other two coordinates,
    made uniform, are mapped to $\theta_1$ by the quantiles of its normal distribution
    restricted to $[-3, 3]$, and to $\theta_2$ by those of its distribution given
    $\theta_1$. What this leaves of the likelihood is

    .. math::
        \frac{1}{6^2} \int \prod_{i=1}^4 N(x_i; m, \Sigma) \, dm
        \cdot P(|\theta_1| \le 3) \cdot P(|\theta_2| \le 3 \mid \theta_1)

    with the integral over the plane and the probabilities without the restriction (the
    method of Geweke, Hajivassiliou and Keane).

    Args:
        x: Data, shape (8,).
    """

    def __init__(self, x: Tensor) -> None:
        points = x.reshape(NUM_POINTS, 2)
        self.mean = points.mean(0)
        self.deviations = points - self.mean

    def log_likelihood(self, u: Tensor) -> Tensor:
        """Return the log likelihood of coordinates of shape (n, 5), as (n,)."""
        shape, first, second = self._conditionals(u)
        l11, l21, l22 = cholesky(shape)
        e1 = self.deviations[:, 0] / l11
        e2 = (self.deviations[:, 1] - l21 * e1) / l22
        log_integral = (
            -0.5 * (e1.square() + e2.square()).sum(1)
            - (NUM_POINTS - 1) * (math.log(2 * math.pi) + (l11 * l22).log().squeeze(1))
            - math.log(NUM_POINTS)
        )
        log_box = (first.log_mass + second.log_mass).squeeze(1)
        return log_integral + log_box - 2 * math.log(2 * BOUND)

    def transform(self, u: Tensor) -> Tensor:
        """Return parameters for coordinates of shape (n, 5)."""
        shape, first, second = self._conditionals(u)
        signs = torch.ones_like(shape)
        signs[:, :2] = 2.0 * torch.randint(2, (len(u), 2)) - 1
        theta1 = first.quantile(ndtr(u[:, 3:4]))
        theta2 = second.quantile(ndtr(u[:, 4:5]))
        return torch.cat((theta1, theta2, signs * shape), dim=1)

    def _conditionals(
        self, u: Tensor
    ) -> tuple[Tensor, TruncatedNormal, TruncatedNormal]:
        """Return the last three parameters and the distributions of the first two."""
        shape = BOUND * ndtr(u[:, :3])
        shape[:, 2] = 2 * shape[:, 2] - BOUND
        l11, l21, l22 = cholesky(shape)
        first = TruncatedNormal(
            self.mean[0].expand_as(l11), l11 / math.sqrt(NUM_POINTS), -BOUND, BOUND
        )
        theta1 = first.quantile(ndtr(u[:, 3:4]))
        second = TruncatedNormal(
            self.mean[1] + l21 / l11 * (theta1 - self.mean[0]),
            l22 / math.sqrt(NUM_POINTS),
            -BOUND,
            BOUND,
        )
        return shape, first, second
