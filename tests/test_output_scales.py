"""The scale of outputs: where noise is additive, where it multiplies."""

import numpy as np
import pytest
import torch
from scipy import stats

from sbi_jeffreys.features import Features
from sbi_jeffreys.output_scales import (
    MEAN_LOG_SQUARE,
    MIN_SIMULATIONS,
    _scores,
    _surface,
    prefers_normal_scores,
)


def parameters(num):
    return 3**0.5 * (2 * torch.rand(num, 3) - 1)


def additive(z):
    """Uniform means, far from Gaussian, with little noise."""
    return z[:, :1] + 0.3 * torch.randn(len(z), 1)


def heteroscedastic(z):
    """Heavy tails, which the parameters know of."""
    return z[:, :1] + z[:, 1:2].exp() * torch.randn(len(z), 1)


def multiplicative(z):
    return (2 * z[:, :1] + 0.3 * torch.randn(len(z), 1)).exp()


@pytest.mark.parametrize("num", [300, 2000])
@pytest.mark.parametrize("seed", range(3))
def test_additive_noise_stays_and_factors_are_logarithms(num, seed):
    torch.manual_seed(seed)
    z = parameters(num)
    columns = (additive(z), heteroscedastic(z), multiplicative(z), additive(z))
    prefers = prefers_normal_scores(z, torch.cat(columns, 1))
    assert prefers.tolist() == [False, False, True, False]


@pytest.mark.parametrize("scale", [1e-30, 1e8])
def test_units_do_not_matter(scale):
    z = parameters(400)
    x = torch.cat((additive(z), multiplicative(z)), 1)
    prefers = prefers_normal_scores(z, scale * x + scale)
    assert prefers.tolist() == [False, True]


def test_missing_outputs_are_not_judged():
    """They neither decide nor make anything else missing."""
    z = parameters(600)
    x = torch.cat((additive(z), multiplicative(z), multiplicative(z)), 1)
    x[::3, 0] = torch.nan
    x[1::3, 1] = torch.inf
    x[:, 2] = torch.nan
    assert prefers_normal_scores(z, x).tolist() == [False, True, False]


@pytest.mark.parametrize(("outlier", "expected"), [(20.0, False), (1e6, True)])
def test_an_outlier_is_no_evidence_but_may_hide_all_others(outlier, expected):
    """Where it is far out, the standard scores of all others are one number."""
    z = parameters(400)
    x = additive(z)
    x[7] = outlier
    assert prefers_normal_scores(z, x).tolist() == [expected]


@pytest.mark.parametrize("values", [[0.0], [1.0, 1.0, 1.0, 2.0]])
def test_outputs_that_hardly_vary(values):
    """Of what recurs without end there is no slope, and no decision."""
    x = torch.tensor(values).repeat(200)[:200, None]
    assert not prefers_normal_scores(parameters(200), x).any()


def test_few_simulations_tell_nothing():
    z = parameters(MIN_SIMULATIONS)
    x = multiplicative(z)
    assert prefers_normal_scores(z, x).all()
    assert not prefers_normal_scores(z[1:], x[1:]).any()
    assert prefers_normal_scores(z, x[:, :0]).shape == (0,)


def test_scores_are_those_of_the_networks_and_slopes_their_derivatives():
    x = multiplicative(parameters(500)).double().numpy()[:, 0]
    fitted = np.arange(500) < 250
    features = Features(torch.from_numpy(x[fitted, None]))
    # Within the table, not at its knots.
    at = np.exp(np.linspace(-3, 3, 101)) + 1e-4
    values = np.concatenate((x[fitted], at))
    scores, log_slopes = _scores(values, np.arange(len(values)) < 250)
    scores, log_slopes = scores[250:], log_slopes[250:]
    at = torch.from_numpy(at[:, None])
    expected = torch.cat((features.standard_scores(at), features.normal_scores(at)), 1)
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    step = 1e-6
    both = []
    for sign in (-1, 1):
        moved = np.concatenate((x[fitted], at[:, 0].numpy() + sign * step))
        both.append(_scores(moved, np.arange(len(moved)) < 250)[0][250:])
    slopes = (both[1] - both[0]) / (2 * step)
    np.testing.assert_allclose(np.exp(log_slopes), slopes, rtol=1e-3)


def test_there_is_no_slope_beyond_the_table():
    values = np.array([0.0, 1.0, 2.0, 3.0, -1.0, 1.5, 4.0])
    log_slopes = _scores(values, np.arange(7) < 4)[1]
    assert np.isneginf(log_slopes[[4, 6], 1]).all()
    assert np.isfinite(log_slopes[5, 1]) and np.isfinite(log_slopes[:, 0]).all()


def test_errors_of_a_surface_are_those_of_one_without_the_simulation():
    terms, y = np.random.default_rng(0).normal(size=(2, 30, 2))
    surface, squares = _surface(terms, y)
    for j in (0, 17):
        others = np.arange(30) != j
        center = terms[others].mean(0)
        centered = terms[others] - center
        for k, penalty in enumerate(surface.alpha_):
            gram = centered.T @ centered + penalty * np.eye(2)
            weight = np.linalg.solve(gram, centered.T @ y[others, k])
            prediction = y[others, k].mean() + (terms[j] - center) @ weight
            expected = (y[j, k] - prediction) ** 2
            assert squares[j, k] == pytest.approx(expected, rel=0.02)


def test_mean_logarithm_of_squares_is_that_of_student_t():
    expected = stats.t(8).expect(lambda t: np.log(t**2), lb=0) * 2
    assert pytest.approx(expected, abs=1e-6) == MEAN_LOG_SQUARE
