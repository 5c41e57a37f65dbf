"""The path from the flow to the proxy, and how far along it validation says to go."""

import pytest
import torch
from helpers import LinearGaussianFlow, QuadraticEnergy, gaussian_proxy
from torch.distributions import MultivariateNormal

from sbi_jeffreys.refinement import (
    choose_exponent,
    log_ratio,
    log_refined,
    sample_with_log_ratio,
    temper,
)

PRIOR = MultivariateNormal(torch.zeros(2), torch.eye(2))
# x = theta + noise: the posterior is N(x / 2, 1 / 2).
WEIGHT, VARIANCE = 0.5, 0.5


def simulate(num, proposal=PRIOR):
    theta = proposal.sample((num,))
    return theta, theta + torch.randn(num, 2)


def flow(shift=0.0, scale=1.0, weight=WEIGHT):
    eye = torch.eye(2)
    return LinearGaussianFlow(
        weight * eye, torch.full((2,), shift), scale * VARIANCE**0.5 * eye
    )


def proxy(shift=0.0, scale=1.0, weight=WEIGHT):
    """Return the Gaussian of `flow`, as an energy on Lebesgue measure."""
    eye = torch.eye(2)
    return gaussian_proxy(
        QuadraticEnergy(
            weight * eye, torch.full((2,), shift), eye / (scale * VARIANCE**0.5), 5.0
        )
    )


@pytest.mark.parametrize(
    ("p", "q", "low", "high"),
    [
        (flow(shift=0.8), proxy(), 0.8, 1.0),  # the proxy is right
        (flow(), proxy(shift=0.8), 0.0, 0.2),  # the flow is right
        (flow(shift=0.5), proxy(shift=-0.5), 0.4, 0.6),  # the truth lies between
        (flow(shift=0.5), proxy(shift=-1.5), 0.1, 0.4),  # at a quarter
        (flow(), proxy(scale=0.2), 0.0, 0.2),  # a proxy that is too sure
        (flow(weight=0.1), proxy(weight=0.9), 0.4, 0.6),  # x is heeded too little
        (flow(weight=0.0), proxy(weight=2.0), 0.1, 0.4),  # or too much
    ],
)
@pytest.mark.parametrize("round_", ["first", "later"])
def test_validation_chooses_the_exponent(p, q, low, high, round_):
    torch.manual_seed(0)
    if round_ == "first":
        theta, x = simulate(1000)
        exponent = choose_exponent(p, q, theta, x)
    else:  # parameters from a proposal, of which nothing is known
        proposal = MultivariateNormal(torch.tensor([1.5, 0.5]), torch.eye(2))
        theta, x = simulate(1000, proposal)
        exponent = choose_exponent(p, q, theta, x, prior=PRIOR)
    assert low - 1e-6 <= exponent <= high + 1e-6


@pytest.mark.parametrize("round_", ["first", "later"])
def test_simulations_beyond_the_support_do_not_count(round_):
    p, q = flow(shift=0.8), proxy()
    theta, x = simulate(1000)
    log_unnormalized = q.log_unnormalized

    def cut_off(theta, x):
        log_q = log_unnormalized(theta, x)
        return log_q.masked_fill((theta > 50).any(-1), -torch.inf)

    q.log_unnormalized = cut_off
    theta[[3, 500]] = 100.0
    prior = None if round_ == "first" else PRIOR
    assert choose_exponent(p, q, theta, x, prior=prior) > 0.8 - 1e-6
    # Nothing is known of what none of them tells.
    theta[:] = 100.0
    assert choose_exponent(p, q, theta, x, prior=prior) == 0.0


def test_what_depends_on_x_alone_changes_nothing():
    class Shifted(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, theta, x):
            return self.net(theta, x) + 30 * x[:, 0]

    p, q = flow(shift=0.5), proxy(shift=-0.5)
    theta, x = simulate(500)
    q.net = Shifted(q.net)
    assert 0.4 - 1e-6 <= choose_exponent(p, q, theta, x) <= 0.6 + 1e-6


def test_equal_models_are_left_alone():
    theta, x = simulate(100)
    assert choose_exponent(flow(), proxy(), theta, x) == 0.0


def test_log_ratio_is_the_difference_of_the_models():
    p, q = flow(shift=0.3), proxy(scale=0.7)
    theta, x = torch.randn(6, 3, 2), torch.randn(3, 2)
    expected = q.net(theta, x) - p.distribution(x).log_prob(theta)
    torch.testing.assert_close(log_ratio(p, q, theta, x), expected)
    samples, log_w = sample_with_log_ratio(p, q, 50, x)
    assert samples.shape == (50, 3, 2)
    torch.testing.assert_close(log_w, log_ratio(p, q, samples, x))
    assert not log_w.requires_grad


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_temper(exponent):
    log_weights = torch.tensor([-3.0, 0.0, 700.0, -torch.inf])
    tempered = temper(log_weights, exponent)
    torch.testing.assert_close(tempered[:3], exponent * log_weights[:3])
    assert tempered[3] == -torch.inf  # also where 0 * inf would be NaN


@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.0])
def test_nothing_is_between_the_models_where_one_of_them_has_nothing(exponent):
    log_p = torch.tensor([-2.0, -torch.inf, -1e38, -torch.inf])
    log_q = torch.tensor([3.0, 1.0, -torch.inf, -torch.inf])
    found = log_refined(log_p, log_q, exponent).exp()
    p, q = log_p.exp(), log_q.exp()
    expected = p ** (1 - exponent) * q**exponent
    # Of the proxy alone what the flow says does not count, but not the other way.
    excluded = q == 0 if exponent < 1 else torch.zeros(4, dtype=torch.bool)
    torch.testing.assert_close(found, expected.masked_fill(excluded, 0.0))
