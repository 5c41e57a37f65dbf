"""Expected coverage: closed forms of a scaled Gaussian posterior, and sbi's own."""

import logging
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LinearGaussianFlow, QuadraticEnergy, gaussian_proxy
from sbi.diagnostics import check_tarp, run_sbc, run_tarp
from sbi.inference import DirectPosterior
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from sbi.utils import BoxUniform
from scipy import integrate, stats
from torch import Tensor, nn
from torch.distributions import Exponential, MultivariateNormal, Normal

from sbi_jeffreys import JeffreysEstimator, RefinedPosterior
from sbi_jeffreys.metrics import Coverage, expected_coverage

N, L = 600, 200


class Gaussian:
    """Posterior of a standard normal prior and unit noise, its scale multiplied."""

    def __init__(self, scale: float = 1.0, shift: float = 0.0) -> None:
        self.scale = scale
        self.shift = shift

    def sample_batched(self, sample_shape, x, show_progress_bars=True):
        noise = torch.randn(*sample_shape, *x.shape, dtype=x.dtype)
        return x / 2 + self.shift + self.scale * math.sqrt(0.5) * noise


def simulate(num: int = N, dim: int = 2) -> tuple[Tensor, Tensor]:
    theta = torch.randn(num, dim)
    return theta, theta + torch.randn(num, dim)


def coverage_of(posterior, theta, x, **kwargs) -> Coverage:
    kwargs.setdefault("num_posterior_samples", L)
    return expected_coverage(posterior, theta, x, show_progress_bar=False, **kwargs)


def distribution_of_levels(u, scale):
    """Distribution function of the levels if the posterior's scale is multiplied."""
    return stats.norm.cdf(scale * stats.norm.ppf(u))


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_coverage_of_intervals_is_the_closed_form(scale):
    coverage = coverage_of(Gaussian(scale), *simulate())
    for mass in (0.0, 0.5, 0.9, 1.0):
        expected = 2 * stats.norm.cdf(scale * stats.norm.ppf((1 + mass) / 2)) - 1
        # Rounding a level to the nearest of L + 1 moves the ends of the interval.
        error = 3 * math.sqrt(expected * (1 - expected) / N) + 2 / L
        found = coverage.intervals(mass)
        np.testing.assert_allclose(found, expected, atol=error)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_sbc_error_is_the_closed_form(scale):
    coverage = coverage_of(Gaussian(scale), *simulate())
    u = np.linspace(0, 1, 1001)[1:-1]
    expected = np.abs(distribution_of_levels(u, scale) - u).max()
    # Largest of all errors of a distribution function, 99.9 % of the time.
    error = stats.kstwo.isf(0.001, N) + 1 / L
    np.testing.assert_allclose(coverage.sbc_error, expected, atol=float(error))
    area, _ = integrate.quad(lambda u: abs(distribution_of_levels(u, scale) - u), 0, 1)
    np.testing.assert_allclose(coverage.sbc_area, area, atol=float(error))
    if scale == 1:
        assert (coverage.sbc_p_value > 0.01).all() and coverage.tarp_p_value > 0.01
    else:
        assert (coverage.sbc_p_value < 1e-6).all() and coverage.tarp_p_value < 1e-6


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_area_and_balls_far_away_are_the_closed_form(scale):
    # Around a point far below, balls are half-lines, and TARP is SBC.
    theta, x = simulate(dim=1)
    coverage = coverage_of(
        Gaussian(scale),
        theta.double(),
        x.double(),
        references=torch.full((N, 1), -1e6),
    )
    torch.testing.assert_close(coverage.distance_ranks, coverage.ranks[:, 0])
    area, _ = integrate.quad(lambda u: distribution_of_levels(u, scale) - u, 0.5, 1)
    standard_error = coverage.atc_standard_error
    assert coverage.atc == pytest.approx(area, abs=3 * standard_error + 1 / L)
    if scale == 1:
        # min(1/2, U) of a uniform U has the variance 5/192.
        expected = math.sqrt(5 / 192 / N)
        assert standard_error == pytest.approx(expected, rel=0.1)
    for mass in (0.3, 0.8):
        expected = distribution_of_levels(mass, scale)
        error = 3 * math.sqrt(expected * (1 - expected) / N) + 2 / L
        assert coverage.balls(mass) == pytest.approx(expected, abs=error)


def test_level_of_a_ball_is_its_posterior_probability():
    theta, x = simulate(dim=1)
    center = 3 * torch.rand(N, 1) - 1.5
    coverage = coverage_of(Gaussian(1.5), theta, x, references=center)
    q = Normal(x / 2, 1.5 * math.sqrt(0.5))
    radius = (theta - center).abs()
    expected = (q.cdf(center + radius) - q.cdf(center - radius)).squeeze(1)
    found = (coverage.distance_ranks + 0.5) / (L + 1)
    standard_error = (expected * (1 - expected) / L).sqrt() + 0.5 / L
    # The largest of 600 normal errors.
    assert ((found - expected).abs() < 4.5 * standard_error).all()


@pytest.mark.parametrize(
    ("scale", "sign"), [(1.0, 0), (0.5, -1), (2.0, 1)], ids=["right", "narrow", "wide"]
)
def test_area_tells_what_is_too_narrow_and_too_wide(scale, sign):
    # References in the box of the parameters, in three dimensions.
    coverage = coverage_of(Gaussian(scale), *simulate(dim=3))
    z = coverage.atc / coverage.atc_standard_error
    assert abs(z) < 3 if sign == 0 else sign * z > 5


def test_a_bias_is_found():
    coverage = coverage_of(Gaussian(shift=0.5), *simulate())
    assert (coverage.sbc_p_value < 1e-6).all() and coverage.tarp_p_value < 1e-3
    # Phi(z + 0.5 / 0.707) against Phi(z), largest in the middle.
    expected = 2 * stats.norm.cdf(0.25 * math.sqrt(2)) - 1
    error = 3 * 0.5 / math.sqrt(N) + 1 / L
    np.testing.assert_allclose(coverage.sbc_error, expected, atol=error)


def test_refined_posterior_of_a_flow_that_is_too_wide():
    theta, x = simulate()
    prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
    flow = LinearGaussianFlow(0.5 * torch.eye(2), torch.zeros(2), torch.eye(2))
    # The likelihood on the prior: the exact posterior.
    net = QuadraticEnergy(torch.eye(2), torch.zeros(2), torch.eye(2))
    estimator = JeffreysEstimator(flow, gaussian_proxy(net, prior))
    wide = coverage_of(DirectPosterior(estimator, prior), theta, x)
    right = coverage_of(RefinedPosterior(estimator, prior, exponent=1.0), theta, x)
    assert wide.atc > 5 * wide.atc_standard_error
    assert wide.sbc_p_value.max() < 1e-3
    assert abs(right.atc) < 3 * right.atc_standard_error
    assert right.sbc_p_value.min() > 0.01


def test_noise_of_a_calibrated_posterior_is_as_said():
    coverage = [coverage_of(Gaussian(), *simulate(100, 1)) for _ in range(100)]
    p_values = [each.sbc_p_value.item() for each in coverage]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    # The mean and the second moment, 7/60, of the area under a Brownian bridge.
    area = torch.cat([each.sbc_area for each in coverage]) * math.sqrt(100)
    mean, std = 0.3133, math.sqrt(7 / 60 - 0.3133**2)
    assert area.mean().item() == pytest.approx(mean, abs=3 * std / math.sqrt(100))
    assert area.std().item() == pytest.approx(std, rel=0.3)


def test_agrees_with_sbi():
    theta, x = simulate(dim=3)
    theta = theta * torch.tensor([1.0, 100.0, 0.01])

    class Scaled(Gaussian):
        def sample_batched(self, *args, **kwargs):
            samples = super().sample_batched(*args, **kwargs)
            return samples * torch.tensor([1.0, 100.0, 0.01])

    references = theta.mean(0) + theta.std(0) * torch.randn(N, 3)
    posterior: Any = Scaled(1.5)
    torch.manual_seed(1)
    ranks, _ = run_sbc(theta, x, posterior, L, show_progress_bar=False)
    torch.manual_seed(1)
    ecp, alpha = run_tarp(theta, x, posterior, references, L, show_progress_bar=False)
    torch.manual_seed(1)
    # 600 x 200 samples are drawn in several goes; sbi draws them in one.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sbi_jeffreys.coverage._BATCH", 10**9)
        coverage = coverage_of(posterior, theta, x, references=references)
    torch.testing.assert_close(coverage.ranks, ranks)
    # sbi's levels are k / L, so that those on an edge of its grid fall either way.
    found = torch.tensor([coverage.balls(a) for a in alpha.clamp(0, 1).tolist()])
    assert (found - ecp).abs().max() < 0.02
    atc, _ = check_tarp(ecp, alpha)
    assert coverage.atc == pytest.approx(atc, abs=0.005)
    for column, error, p_value in zip(
        ranks.T, coverage.sbc_error, coverage.sbc_p_value, strict=True
    ):
        test = stats.kstest((column + 0.5) / (L + 1), "uniform")
        assert error.item() == pytest.approx(test.statistic, abs=1e-6)
        assert p_value.item() == pytest.approx(test.pvalue, rel=1e-3)
    for column, area in zip(ranks.T, coverage.sbc_area, strict=True):
        uniform = (np.arange(100_000) + 0.5) / 100_000
        levels = (column.numpy() + 0.5) / (L + 1)
        expected = stats.wasserstein_distance(levels, uniform)
        assert area.item() == pytest.approx(expected, abs=1e-5)


def test_samples_in_several_goes_belong_to_their_observations(monkeypatch):
    monkeypatch.setattr("sbi_jeffreys.coverage._BATCH", 7 * L)
    # Posteriors that are almost points, each far from the next.
    x = torch.arange(100.0).unsqueeze(1)
    posterior = Gaussian(0.01)
    coverage = coverage_of(posterior, posterior.sample_batched((1,), x)[0], x)
    assert coverage.sbc_p_value.item() > 0.01


class LeakyFlow(ConditionalDensityEstimator):
    """Exponential of the rate x, of which a prior on [0, 1] keeps a part."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1), torch.Size([1]), torch.Size([1]))
        self.num_drawn = 0

    def sample(self, sample_shape, condition, **_):
        self.num_drawn += torch.Size(sample_shape).numel() * len(condition)
        return Exponential(condition).sample(torch.Size(sample_shape))

    def log_prob(self, input, condition, **_):
        return Exponential(condition).log_prob(input).sum(-1)

    def loss(self, input, condition, **_):
        return -self.log_prob(input.unsqueeze(0), condition)[0]


def test_a_flow_that_leaks_is_that_within_the_support(caplog):
    # Exact posteriors of a prior on [0, 1], one in a thousand samples being inside
    # at ten of the observations.
    x = torch.full((400, 1), 1.0)
    x[:10] = 0.001
    u = torch.rand(400, 1)
    theta = -torch.log1p(-u * (1 - torch.exp(-x))) / x
    flow = LeakyFlow()
    posterior = DirectPosterior(flow, BoxUniform(torch.zeros(1), torch.ones(1)))
    with warnings.catch_warnings(), caplog.at_level(logging.CRITICAL):
        warnings.simplefilter("error")
        coverage = coverage_of(posterior, theta, x, num_posterior_samples=100)
    assert coverage.sbc_p_value.item() > 0.01
    levels = (coverage.ranks + 0.5) / 101
    # A level has the standard deviation (u (1 - u) / 100)^(1/2), at most 0.05.
    assert (levels - u).abs().max() < 0.2
    # 400 x 100, half as many again for those outside, and 10 x 100 x 1000.
    assert flow.num_drawn < 3e6


def test_sampling_that_leads_nowhere_is_given_up():
    posterior = DirectPosterior(LeakyFlow(), BoxUniform(torch.zeros(1), torch.ones(1)))
    theta, x = torch.rand(100, 1), torch.full((100, 1), 1e-9)
    with pytest.raises(RuntimeError, match="max_sampling_time"):
        coverage_of(posterior, theta, x, max_sampling_time=0.1)


THETA, X = torch.zeros(100, 2), torch.zeros(100, 3)
NAN = X.clone()
NAN[7] = math.nan


@pytest.mark.parametrize(
    ("theta", "x", "kwargs", "message"),
    [
        (THETA[:, 0], X, {}, r"shape \(simulations, parameters\).*got \(100,\)"),
        (THETA[:1], X[:1], {}, r"at least two simulations, got \(1, 2\)"),
        (THETA, X[:99], {}, "got 100 and 99 rows"),
        (THETA, NAN, {}, "x has NaN or infinity in 1 of 100 rows"),
        (NAN, X, {}, "theta has NaN or infinity in 1 of 100 rows"),
        (THETA, X, {}, "theta is constant in column 0, 1"),
        (THETA, X, {"references": THETA[0]}, r"got \(2,\)"),
        (THETA, X, {"references": NAN[:, :2]}, "references has NaN"),
        (THETA, X, {"num_posterior_samples": 0}, "must be positive, got 0"),
    ],
)
def test_wrong_input(theta, x, kwargs, message):
    with pytest.raises(ValueError, match=message):
        coverage_of(Gaussian(), theta, x, **kwargs)


def test_wrong_types_and_samples_and_masses():
    with pytest.raises(TypeError, match="theta must be a torch.Tensor, got list"):
        coverage_of(Gaussian(), [[0.0]], X)
    theta, x = simulate()
    with pytest.raises(TypeError, match="references must be .* got ndarray"):
        coverage_of(Gaussian(), theta, x, references=theta.numpy())
    with pytest.raises(TypeError, match=r"theta must hold floating.* theta.float\(\)"):
        coverage_of(Gaussian(), theta.long(), x, references=theta)
    with pytest.raises(ValueError, match="samples have 2 parameters, but theta has 1"):
        coverage_of(Gaussian(), theta[:, :1], x)
    with pytest.raises(ValueError, match="of 120000 samples .* not finite"):
        coverage_of(Gaussian(math.nan), theta, x)
    coverage = coverage_of(Gaussian(), theta, x)
    for region in (coverage.intervals, coverage.balls):
        with pytest.raises(ValueError, match="got 90"):
            region(90)
