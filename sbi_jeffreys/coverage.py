r"""Expected coverage: whether the uncertainty that a posterior states is the real one.

Over parameters $\theta_i$ from the prior and data $x_i$ simulated from them, two tests
of sbi's in one, on the same samples of the posterior: simulation-based calibration
(SBC [1]) of each parameter by itself and coverage of balls around random points
(TARP [2]) for all of them together.

[1] S. Talts et al., "Validating Bayesian Inference Algorithms with Simulation-Based
Calibration", arXiv:1804.06788.
[2] P. Lemos et al., "Sampling-Based Accuracy Testing of Posterior Estimators for
General Inference", ICML 2023, arXiv:2302.03026.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any, Optional

import torch
from sbi.diagnostics import run_sbc
from sbi.diagnostics.tarp import get_tarp_references
from sbi.inference import DirectPosterior
from sbi.utils import within_support
from sbi.utils.diagnostics_utils import get_posterior_samples_on_batch
from sbi.utils.metrics import l2
from scipy.stats import kstwo
from torch import Tensor
from tqdm.auto import tqdm

# Samples that are drawn in one go.
_BATCH = 20_000


@dataclass(frozen=True)
class Coverage:
    r"""What `expected_coverage` measured, over N simulations.

    The level of a parameter is the posterior's probability of what lies below it, from
    its rank r among L samples,

    $$u = \frac{r + 1/2}{L + 1}.$$

    If the posterior is the true one, levels are uniform on [0, 1]: those of each
    parameter, and those of the distances to random points.

    Args:
        ranks: For each simulation and parameter, the number of samples below the true
            parameter, as `sbi.diagnostics.run_sbc` returns it, shape (N, D).
        distance_ranks: For each simulation, the number of samples that are nearer to
            the reference point than the true parameters are, shape (N,).
        num_posterior_samples: Number of samples L for each simulation.
    """

    ranks: Tensor
    distance_ranks: Tensor
    num_posterior_samples: int

    @property
    def sbc_error(self) -> Tensor:
        r"""Largest error of the distribution of levels, for each parameter.

        $$\sup_u \left| \tfrac{1}{N} \#\{i : u_{ij} \le u\} - u \right|,$$

        the distance of Kolmogorov and Smirnov, shape (D,). That of the true posterior
        is $0.87 / \sqrt N$ in the mean, and not zero.
        """
        return _distance_from_uniform(self._levels(self.ranks))

    @property
    def sbc_p_value(self) -> Tensor:
        """Probability that the true posterior's `sbc_error` is as large, shape (D,)."""
        return _p_value(self.sbc_error, len(self.ranks))

    @property
    def sbc_area(self) -> Tensor:
        r"""Mean error of the distribution of levels, for each parameter, shape (D,).

        $$\int_0^1 \left| \tfrac{1}{N} \#\{i : u_{ij} \le u\} - u \right| du,$$

        the Wasserstein-1 distance of the levels from the uniform distribution. It has
        less noise than the largest error: that of the true posterior is
        $(0.31 \pm 0.14) / \sqrt N$.
        """
        return _area_from_uniform(self._levels(self.ranks))

    @property
    def tarp_error(self) -> float:
        r"""Largest distance $\sup_\alpha |\mathrm{ECP}(\alpha) - \alpha|$.

        The expected coverage probability $\mathrm{ECP}(\alpha)$ is that of `balls`.
        """
        return _distance_from_uniform(self._levels(self.distance_ranks)).item()

    @property
    def tarp_p_value(self) -> float:
        """Probability that the true posterior's `tarp_error` is as large."""
        return _p_value(torch.tensor(self.tarp_error), len(self.ranks)).item()

    @property
    def atc(self) -> float:
        r"""Area between expected coverage and diagonal above one half.

        $$\int_{1/2}^1 (\mathrm{ECP}(\alpha) - \alpha) \, d\alpha =
        \tfrac{1}{N} \sum_i \min(\tfrac{1}{2}, 1 - u_i) - \tfrac{3}{8}$$

        Positive if the posterior is too wide, at most 1/8; negative if it is too
        narrow or beside the point, at least -3/8. It is the area that
        `sbi.diagnostics.check_tarp` takes on a grid between the smallest and largest
        level that were seen.
        """
        return self._areas.mean().item()

    @property
    def atc_standard_error(self) -> float:
        """Standard error of `atc` over simulations; 0.16 / √N if calibrated."""
        return self._areas.std().item() / math.sqrt(len(self._areas))

    def intervals(self, mass: float) -> Tensor:
        r"""Return the share of parameters within the posterior's central intervals.

        Args:
            mass: Posterior probability of the interval, in [0, 1], such as 0.9.

        Returns:
            Share of the simulations for each parameter, shape (D,); `mass` if the
            posterior is calibrated.

        Raises:
            ValueError: If `mass` is not in [0, 1].
        """
        _check_mass(mass)
        inside = (2.0 * self._levels(self.ranks) - 1.0).abs() <= mass
        return inside.double().mean(0)

    def balls(self, mass: float) -> float:
        r"""Return the share of parameters within balls around the reference points.

        Args:
            mass: Posterior probability $\alpha$ of the balls, in [0, 1].

        Returns:
            Expected coverage probability $\mathrm{ECP}(\alpha)$; `mass` if the
            posterior is calibrated.

        Raises:
            ValueError: If `mass` is not in [0, 1].
        """
        _check_mass(mass)
        inside = self._levels(self.distance_ranks) <= mass
        return inside.double().mean().item()

    @property
    def _areas(self) -> Tensor:
        """What each simulation adds to the area."""
        return (1.0 - self._levels(self.distance_ranks)).clamp_max(0.5) - 0.375

    def _levels(self, ranks: Tensor) -> Tensor:
        return (ranks.double() + 0.5) / (self.num_posterior_samples + 1)


def expected_coverage(
    posterior: Any,
    theta: Tensor,
    x: Tensor,
    references: Optional[Tensor] = None,
    num_posterior_samples: int = 1000,
    show_progress_bar: bool = True,
    max_sampling_time: Optional[float] = None,
) -> Coverage:
    r"""Return how often true parameters lie where a posterior says, over simulations.

    $$\theta_i, x_i \sim p(\theta) \, p(x \mid \theta), \quad
    \theta_i^{(1)}, \dots, \theta_i^{(L)} \sim q(\theta \mid x_i), \quad
    r_{ij} = \#\{l : \theta_{ij}^{(l)} < \theta_{ij}\}$$

    The ranks $r_{ij}$ of each parameter are those of `sbi.diagnostics.run_sbc`. TARP is
    the same for the distances to reference points, $\|\theta_i^{(l)} - t_i\|$ and
    $\|\theta_i - t_i\|$, with every parameter scaled to its range as in
    `sbi.diagnostics.run_tarp`. That function returns a histogram of these ranks alone,
    which tells neither a standard error nor the difference of two posteriors on the
    same simulations. The posterior is sampled once for both.

    Calibration is not accuracy: the prior is calibrated, too. The simulations must be
    fresh, not those that the posterior was trained on.

    Example:
    --------

    ::

        coverage = expected_coverage(posterior, theta_test, x_test)
        coverage.sbc_error         # of each parameter, with coverage.sbc_p_value
        coverage.atc               # > 0 too wide, < 0 too narrow
        coverage.intervals(0.9)    # share of each parameter in its 90 % interval

    Args:
        posterior: A posterior of sbi's interface. It is sampled for many observations
            at once (`sample_batched`) where it can.
        theta: Parameters from the prior, shape (N, D). Hundreds of them: the standard
            error of a coverage is at most $1 / 2\sqrt{N}$.
        x: Data simulated from each, shape (N, *data shape).
        references: Reference points, shape (N, D). By default uniform in the box that
            holds `theta`. To compare posteriors, give all of them the same.
        num_posterior_samples: Number of samples L for each simulation. Ranks of a
            calibrated posterior are uniform whatever their number, but levels then lie
            on a grid of L + 1 points: with fewer samples than a tenth of the
            simulations its steps are seen, and p-values are too small.
        show_progress_bar: Whether to show a progress bar.
        max_sampling_time: Seconds after which a flow that leaks out of the prior's
            support is given up, for each observation; no limit by default.

    Returns:
        Ranks, with the errors, their p-values and the coverages as properties. Draws
        are from torch's global generator.

    Raises:
        TypeError: If `theta`, `x` or `references` is not a tensor, or `theta` not one
            of floating-point numbers.
        ValueError: If shapes disagree, numbers are not finite, a parameter has the same
            value in all simulations, or the posterior's samples are not finite.
        RuntimeError: If `max_sampling_time` is over.
    """
    _check_input(theta, x, references, num_posterior_samples)
    parts = x.split(max(1, _BATCH // num_posterior_samples))
    samples = torch.cat(
        [
            _draw(posterior, num_posterior_samples, part, max_sampling_time)
            for part in tqdm(parts, "Sampling", disable=not show_progress_bar)
        ],
        dim=1,
    ).to(theta)
    if samples.shape[1:] != theta.shape:
        raise ValueError(
            f"The posterior's samples have {samples.shape[2]} parameters, but theta "
            f"has {theta.shape[1]}. Pass the parameters that it was trained on."
        )
    if not samples.isfinite().all():
        bad = int((~samples.isfinite().all(-1)).sum())
        raise ValueError(
            f"{bad} of {samples.shape[0] * samples.shape[1]} samples of the posterior "
            "are not finite, and have no rank. Find out why the sampler gave them."
        )
    if references is None:
        references = get_tarp_references(theta)
    center, width = references.to(theta), theta.amax(0) - theta.amin(0)

    def with_distance(points: Tensor) -> Tensor:
        distance = l2(points / width, center / width)
        return torch.cat((points, distance.unsqueeze(-1)), -1)

    ranks, _ = run_sbc(
        with_distance(theta),
        x,
        _Drawn(with_distance(samples)),  # type: ignore[arg-type]
        num_posterior_samples,
        show_progress_bar=False,
    )
    return Coverage(ranks[:, :-1], ranks[:, -1], num_posterior_samples)


class _Drawn:
    """Samples that are there already, for sbi's diagnostics, which draw their own."""

    def __init__(self, samples: Tensor) -> None:
        self.samples = samples

    def sample_batched(self, sample_shape: Any, x: Tensor, **_: Any) -> Tensor:
        return self.samples


@torch.no_grad()
def _draw(
    posterior: Any, num_samples: int, x: Tensor, max_sampling_time: Optional[float]
) -> Tensor:
    """Return samples given every observation, shape (num_samples, len(x), D).

    sbi's `sample_batched` of a flow draws for all observations until each has enough
    samples within the prior's support, and counts for a batch what the worst has in it.
    Where a flow leaks at a few of hundreds of observations, that takes very long, or
    for ever. Here those that lack samples are sampled one by one.
    """
    if not isinstance(posterior, DirectPosterior):
        return get_posterior_samples_on_batch(x, posterior, (num_samples,))
    with warnings.catch_warnings():
        # About what is mended below, and a size that is not used here.
        warnings.filterwarnings("ignore", ".*outside the prior support")
        warnings.filterwarnings("ignore", "Capping max_sampling_batch_size")
        samples = posterior.sample_batched(
            torch.Size((num_samples,)),
            x,
            show_progress_bars=False,
            reject_outside_prior=False,
        )
    inside = within_support(posterior.prior, samples.flatten(0, 1))
    outside = ~inside.reshape(samples.shape[:2])
    for i in outside.any(0).nonzero().flatten().tolist():
        num = torch.Size((int(outside[:, i].sum()),))
        samples[outside[:, i], i] = posterior.sample(
            num,
            x[i : i + 1],
            show_progress_bars=False,
            max_sampling_time=max_sampling_time,
        )
    return samples


def _distance_from_uniform(levels: Tensor) -> Tensor:
    """Return the largest error of the distribution function, over dimension 0."""
    steps = torch.arange(len(levels) + 1, dtype=levels.dtype) / len(levels)
    steps = steps.reshape(-1, *[1] * (levels.ndim - 1))
    levels = levels.sort(dim=0).values
    return torch.maximum(steps[1:] - levels, levels - steps[:-1]).amax(0)


def _area_from_uniform(levels: Tensor) -> Tensor:
    """Return the area between distribution function and diagonal, over dimension 0."""
    steps = torch.arange(len(levels) + 1, dtype=levels.dtype) / len(levels)
    steps = steps.reshape(-1, *[1] * (levels.ndim - 1))
    ends = torch.zeros_like(levels[:1])
    levels = torch.cat((ends, levels.sort(dim=0).values, ends + 1))
    # The antiderivative of |u - c| is (u - c) |u - c| / 2.
    low, high = levels[:-1] - steps, levels[1:] - steps
    return 0.5 * (high * high.abs() - low * low.abs()).sum(0)


def _p_value(distance: Tensor, num_simulations: int) -> Tensor:
    return torch.as_tensor(kstwo.sf(distance.numpy(), num_simulations))


def _check_mass(mass: float) -> None:
    if not 0 <= mass <= 1:
        raise ValueError(f"mass must be a probability in [0, 1], got {mass}.")


def _check_input(
    theta: Tensor, x: Tensor, references: Optional[Tensor], num_posterior_samples: int
) -> None:
    given = {"theta": theta, "x": x}
    if references is not None:
        given["references"] = references
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a torch.Tensor, got {type(value).__name__}."
            )
    if not theta.is_floating_point():
        # The posterior's samples are brought to its type, and would be cut.
        raise TypeError(
            f"theta must hold floating-point numbers, got {theta.dtype}. Pass "
            "theta.float()."
        )
    if theta.ndim != 2 or len(theta) < 2:
        raise ValueError(
            "theta must have shape (simulations, parameters), with at least two "
            f"simulations, got {tuple(theta.shape)}."
        )
    if len(x) != len(theta):
        raise ValueError(
            f"theta and x must have one row for each simulation, got {len(theta)} and "
            f"{len(x)} rows."
        )
    if references is not None and references.shape != theta.shape:
        raise ValueError(
            "references must be one point for each simulation, shape "
            f"{tuple(theta.shape)} as theta, got {tuple(references.shape)}."
        )
    if num_posterior_samples < 1:
        raise ValueError(
            f"num_posterior_samples must be positive, got {num_posterior_samples}."
        )
    for name, value in given.items():
        bad = int((~value.isfinite().flatten(1).all(1)).sum())
        if bad:
            raise ValueError(
                f"{name} has NaN or infinity in {bad} of {len(value)} rows. Leave "
                "those simulations out of theta and x."
            )
    constant = (theta == theta[0]).all(0)
    if constant.any():
        columns = ", ".join(map(str, constant.nonzero().flatten().tolist()))
        raise ValueError(
            f"theta is constant in column {columns}: its parameters are to be drawn "
            "from the prior."
        )
