r"""Two-dimensional densities that density estimators are shown on.

All but the pinwheel have a known density: Gaussians and the checkerboard in closed
form; circles by the modified Bessel function; points of a curve with Gaussian noise,

.. math:: \pi(\theta) = \int_0^1 N(\theta; c(u), \sigma^2 I) \, du,

by the midpoint rule with nodes nearer to each other than $\sigma$.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import i0e, logsumexp

from tasks.errors import InputError

Curve = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class PlanarDensity:
    """A density in two dimensions.

    Attributes:
        name: Its name.
        draw: Draws `n` samples of shape `(n, 2)` with a numpy generator.
        log_prob: Log density of points of shape `(n, 2)`, None if it is not known.
        extent: The square `[-extent, extent]` holds nearly all of it.
    """

    name: str
    draw: Callable[[int, np.random.Generator], np.ndarray]
    log_prob: Callable[[np.ndarray], np.ndarray] | None
    extent: float

    def sample(self, n: int, seed: int) -> np.ndarray:
        """Return samples of shape `(n, 2)`, the same for the same seed."""
        return self.draw(n, np.random.default_rng(seed))


def _mixture(
    name: str,
    means: np.ndarray,
    covariances: np.ndarray,
    extent: float,
) -> PlanarDensity:
    """Return a mixture of Gaussians with equal weights."""
    roots = np.linalg.cholesky(covariances)
    log_dets = np.log(np.diagonal(roots, axis1=1, axis2=2)).sum(1)

    def draw(n: int, rng: np.random.Generator) -> np.ndarray:
        component = rng.integers(len(means), size=n)
        noise = rng.standard_normal((n, 2, 1))
        return means[component] + (roots[component] @ noise)[..., 0]

    def log_prob(theta: np.ndarray) -> np.ndarray:
        white = np.linalg.solve(roots, (theta[:, None] - means)[..., None])[..., 0]
        logs = -0.5 * (white**2).sum(-1) - log_dets - math.log(2 * math.pi)
        return np.asarray(logsumexp(logs, axis=1)) - math.log(len(means))

    return PlanarDensity(name, draw, log_prob, extent)


def _gaussian_mixture() -> PlanarDensity:
    """Four Gaussians of different shapes, the set of the paper's first studies."""
    means = np.array([[-2.0, -2.0], [-2.0, 2.0], [2.0, -2.0], [2.0, 2.0]])
    angles, axes = (0.2, 1.0, 2.0, 2.8), np.diag([0.9, 0.3])
    turns = [
        np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
        for a in angles
    ]
    covariances = np.stack([turn @ axes**2 @ turn.T for turn in turns])
    return _mixture("gaussian_mixture", means, covariances, 5.0)


def _eight_gaussians() -> PlanarDensity:
    angles = np.arange(8) * math.pi / 4
    means = 3.0 * np.stack((np.cos(angles), np.sin(angles)), 1)
    return _mixture("eight_gaussians", means, np.tile(0.3**2 * np.eye(2), (8, 1, 1)), 4)


def _circles(
    name: str, radii: Sequence[float], noise: float, extent: float
) -> PlanarDensity:
    r"""Return circles of equal weight with Gaussian noise.

    .. math:: N * \text{circle}_R (r) = \frac{1}{2 \pi \sigma^2}
        \exp\left(-\frac{r^2 + R^2}{2 \sigma^2}\right) I_0(r R / \sigma^2)
    """
    circle = np.asarray(radii)

    def draw(n: int, rng: np.random.Generator) -> np.ndarray:
        radius = circle[rng.integers(len(circle), size=n)]
        angle = rng.uniform(0, 2 * math.pi, n)
        points = radius[:, None] * np.stack((np.cos(angle), np.sin(angle)), 1)
        return points + noise * rng.standard_normal((n, 2))

    def log_prob(theta: np.ndarray) -> np.ndarray:
        r = np.linalg.norm(theta, axis=1)[:, None]
        # i0e(z) = exp(-z) I_0(z), so that nothing overflows.
        logs = np.log(i0e(r * circle / noise**2)) - (r - circle) ** 2 / (2 * noise**2)
        log_constant = math.log(2 * math.pi * noise**2 * len(circle))
        return np.asarray(logsumexp(logs, axis=1)) - log_constant

    return PlanarDensity(name, draw, log_prob, extent)


def _curves(
    name: str,
    curves: Sequence[Curve],
    noise: float,
    extent: float,
    num_nodes: int = 600,
) -> PlanarDensity:
    """Return points at uniform `u` of curves of equal weight, with Gaussian noise."""
    nodes = (np.arange(num_nodes) + 0.5) / num_nodes
    centers = np.concatenate([curve(nodes) for curve in curves])

    def draw(n: int, rng: np.random.Generator) -> np.ndarray:
        u = rng.uniform(size=n)
        which = rng.integers(len(curves), size=n)
        every = np.stack([curve(u) for curve in curves])
        return every[which, np.arange(n)] + noise * rng.standard_normal((n, 2))

    def log_prob(theta: np.ndarray) -> np.ndarray:
        parts = []
        for part in np.array_split(theta, max(1, len(theta) // 500)):
            squares = ((part[:, None] - centers) ** 2).sum(-1)
            parts.append(logsumexp(-squares / (2 * noise**2), axis=1))
        constant = math.log(2 * math.pi * noise**2 * len(centers))
        return np.concatenate(parts) - constant

    return PlanarDensity(name, draw, log_prob, extent)


def _two_moons() -> PlanarDensity:
    def upper(u: np.ndarray) -> np.ndarray:
        angle = math.pi * u
        return 2 * np.stack((np.cos(angle) - 0.5, np.sin(angle) - 0.25), 1)

    def lower(u: np.ndarray) -> np.ndarray:
        return -upper(u)

    return _curves("two_moons", (upper, lower), 0.2, 4.0)


def _swiss_roll() -> PlanarDensity:
    def roll(u: np.ndarray) -> np.ndarray:
        t = 1.5 * math.pi * (1 + 2 * u)
        return (t * np.stack((np.cos(t), np.sin(t)))).T / 4

    return _curves("swiss_roll", (roll,), 0.2, 4.5)


def _spirals() -> PlanarDensity:
    def arm(u: np.ndarray) -> np.ndarray:
        t = 3 * math.pi * np.sqrt(u)
        return (t * np.stack((-np.cos(t), np.sin(t)))).T / 3

    def other(u: np.ndarray) -> np.ndarray:
        return -arm(u)

    return _curves("spirals", (arm, other), 0.15, 4.0)


def _checkerboard() -> PlanarDensity:
    """Uniform on every other of sixteen squares of side 2."""

    def draw(n: int, rng: np.random.Generator) -> np.ndarray:
        column = rng.integers(4, size=n)
        row = 2 * rng.integers(2, size=n) + column % 2
        corner = 2.0 * np.stack((column, row), 1) - 4
        return corner + rng.uniform(0, 2, (n, 2))

    def log_prob(theta: np.ndarray) -> np.ndarray:
        square = np.floor((theta + 4) / 2).astype(int)
        inside = ((square >= 0) & (square < 4)).all(1) & (square.sum(1) % 2 == 0)
        return np.where(inside, -math.log(32.0), -np.inf)

    return PlanarDensity("checkerboard", draw, log_prob, 4.5)


def _pinwheel() -> PlanarDensity:
    """Five bent arms; of no known density, since the bending is not one to one."""

    def draw(n: int, rng: np.random.Generator) -> np.ndarray:
        arm = rng.integers(5, size=n)
        points = rng.standard_normal((n, 2)) * [0.3, 0.1] + [1.0, 0.0]
        angle = 2 * math.pi * arm / 5 + 0.25 * np.exp(points[:, 0])
        cos, sin = np.cos(angle), np.sin(angle)
        x, y = points.T
        return 2 * np.stack((cos * x + sin * y, -sin * x + cos * y), 1)

    return PlanarDensity("pinwheel", draw, None, 4.0)


SETS = {
    density.name: density
    for density in (
        _gaussian_mixture(),
        _eight_gaussians(),
        _two_moons(),
        _circles("circles", (1.2, 2.8), 0.15, 4.0),
        _circles("rings", (0.8, 1.6, 2.4, 3.2), 0.12, 4.0),
        _pinwheel(),
        _checkerboard(),
        _swiss_roll(),
        _spirals(),
    )
}


def planar_density(name: str) -> PlanarDensity:
    """Return the density called `name`.

    Raises:
        InputError: If there is none of that name.
    """
    if name not in SETS:
        raise InputError(f"there is no 2-D density {name!r}; known: {', '.join(SETS)}.")
    return SETS[name]
