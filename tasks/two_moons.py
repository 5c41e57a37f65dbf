"""Two moons: a posterior of two crescents."""

import math

import torch
from sbi.utils import BoxUniform
from torch import Tensor

from tasks.task import ReferencePosterior, Task

OFFSET, RADIUS, WIDTH = 0.25, 0.1, 0.01


class TwoMoons(Task):
    r"""A crescent, shifted by the parameters in a way that hides a sign.

    .. math::
        x = p + \left( -\frac{|\theta_1 + \theta_2|}{\sqrt 2},
            \frac{\theta_2 - \theta_1}{\sqrt 2} \right), \quad
        p = \left( r \cos a + 0.25, r \sin a \right)

    with $a \sim U(-\pi/2, \pi/2)$ and $r \sim N(0.1, 0.01^2)$. The prior is uniform on
    $[-1, 1]^2$.

    Reference:
        Greenberg, Nonnenmacher and Macke (2019), "Automatic Posterior Transformation
        for Likelihood-Free Inference".
    """

    name = "two_moons"
    folder = "two_moons"
    dim_parameters = 2
    dim_data = 2

    def __init__(self) -> None:
        self.prior = BoxUniform(-torch.ones(2), torch.ones(2))

    def _simulate(self, theta: Tensor) -> Tensor:
        return _sample_crescent(len(theta)) - _shift(theta)

    def _log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        return _log_prob_crescent(x + _shift(theta))

    def _reference_posterior(self, x: Tensor) -> ReferencePosterior:
        return TwoMoonsPosterior(x)


class TwoMoonsPosterior:
    r"""Posterior of `TwoMoons`, in closed form.

    In the coordinates $z = \left( (\theta_1 + \theta_2) / \sqrt 2,
    (\theta_2 - \theta_1) / \sqrt 2 \right)$ the simulator reads
    $x = p + (-|z_1|, z_2)$, so that a point $p$ of the crescent has the two preimages
    $z = (\pm (p_1 - x_1), x_2 - p_2)$ where $p_1 \ge x_1$, and none elsewhere. The map
    is an isometry for each sign: the posterior is the density of the crescent at $p$,
    divided evenly among the signs. The prior's box is $|z_1| + |z_2| \le \sqrt 2$,
    which treats the signs alike; what lies outside is rejected.

    Args:
        x: Data, shape (2,).

    Raises:
        ValueError: If hardly any parameters inside the prior's box can give `x`.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.mass = _mass_inside(x)
        if self.mass < 1e-6:
            raise ValueError(
                f"two_moons cannot give x = {x.tolist()} for parameters in [-1, 1]^2."
            )

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """Draw samples of shape `(*sample_shape, 2)`."""
        shape = torch.Size(sample_shape)
        accepted = torch.empty(0, 2, dtype=torch.float64)
        while len(accepted) < shape.numel():
            missing = shape.numel() - len(accepted)
            # Memory stays bounded where hardly anything is accepted.
            p = _sample_crescent(min(int(1.1 * missing / self.mass) + 10, 1_000_000))
            z = torch.stack((p[:, 0] - self.x[0], self.x[1] - p[:, 1]), dim=1)
            accepted = torch.cat((accepted, z[_inside(z)]))
        z1, z2 = accepted[: shape.numel()].unbind(1)
        z1 = torch.where(torch.rand_like(z1) < 0.5, z1, -z1)
        theta = torch.stack((z1 - z2, z1 + z2), dim=1) / math.sqrt(2)
        return theta.float().reshape(*shape, 2)

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Return the log density of parameters of shape (n, 2), $-\infty$ outside."""
        theta = value.double()
        log_prob = _log_prob_crescent(self.x + _shift(theta))
        log_prob = log_prob - math.log(2 * self.mass)
        return torch.where((theta.abs() <= 1).all(1), log_prob, -torch.inf)


def _shift(theta: Tensor) -> Tensor:
    """Return $p - x$."""
    theta1, theta2 = theta.unbind(1)
    shift = torch.stack(((theta1 + theta2).abs(), theta1 - theta2), dim=1)
    return shift / math.sqrt(2)


def _sample_crescent(n: int) -> Tensor:
    a = math.pi * (torch.rand(n, dtype=torch.float64) - 0.5)
    r = RADIUS + WIDTH * torch.randn(n, dtype=torch.float64)
    return torch.stack((r * a.cos() + OFFSET, r * a.sin()), dim=1)


def _log_prob_crescent(p: Tensor) -> Tensor:
    u, v = p[:, 0] - OFFSET, p[:, 1]
    r = torch.hypot(u, v)
    # The last term is the area of a ring: points at a radius r are spread over pi r.
    log_prob = (
        -0.5 * ((r - RADIUS) / WIDTH) ** 2
        - math.log(math.sqrt(2 * math.pi) * WIDTH)
        - torch.log(math.pi * r)
    )
    return torch.where(u >= 0, log_prob, -torch.inf)


def _inside(z: Tensor) -> Tensor:
    """Return whether z has a preimage (its first entry is an absolute value) inside."""
    return (z[:, 0] >= 0) & (z[:, 0] + z[:, 1].abs() <= math.sqrt(2))


def _mass_inside(x: Tensor, num_angles: int = 20_000) -> float:
    r"""Return the probability that a point of the crescent has preimages in the box.

    At each angle $a$ the conditions on $r$ are linear, $c r \le k$: the probability is
    that of an interval under a Gaussian. It is averaged over angles by the midpoint
    rule.
    """
    a = math.pi * ((torch.arange(num_angles, dtype=torch.float64) + 0.5) / num_angles)
    a = a - math.pi / 2
    cos, sin = a.cos(), a.sin()
    room = math.sqrt(2) + x[0] - OFFSET
    slopes = torch.stack((-cos, cos - sin, cos + sin))
    limits = torch.stack((OFFSET - x[0], room - x[1], room + x[1])).unsqueeze(1)
    bounds = limits / slopes
    upper = torch.where(slopes > 0, bounds, torch.inf).amin(0)
    lower = torch.where(slopes < 0, bounds, -torch.inf).amax(0)
    cdf = torch.special.ndtr((torch.stack((lower, upper)) - RADIUS) / WIDTH)
    return float((cdf[1] - cdf[0]).clamp_min(0).mean())
