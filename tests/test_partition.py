"""Importance-sampled partition functions against quadrature and closed forms."""

import pytest
import torch
from helpers import (
    DistributionFlow,
    LinearGaussianFlow,
    QuadraticEnergy,
    flat_gradient,
    gaussian_proxy,
    gaussian_proxy_posterior,
    grid,
    log_integral,
    mean_and_standard_error,
)
from sbi.utils import BoxUniform
from torch.distributions import MultivariateNormal

from sbi_jeffreys import energy_nn
from sbi_jeffreys.partition import (
    from_log_weights,
    log_mixture,
)


def random_proxy(prior, dim, base="prior"):
    """Return a proxy with a random network, which differs from flat by some nats."""
    theta = prior.sample((300,))
    x = theta[:, :1] + torch.randn(300, 1)
    proxy = energy_nn(hidden_features=20, num_blocks=1, base_measure=base)(
        theta, x, prior
    )
    torch.nn.init.normal_(proxy.net.final_layer.weight, std=1.5)
    return proxy.eval()


def quadrature(proxy, x, dim, low, high, num):
    points, cell = grid(low, high, num, dim)
    theta = points.to(torch.float32).unsqueeze(1).expand(-1, len(x), -1)
    return log_integral(proxy.log_unnormalized(theta, x), cell)


def flow(dim, mean, scale):
    return LinearGaussianFlow(
        torch.zeros(dim, 1), torch.full((dim,), mean), scale * torch.eye(dim)
    )


PRIORS = {
    "box": lambda dim: BoxUniform(-2 * torch.ones(dim), 2 * torch.ones(dim)),
    "normal": lambda dim: MultivariateNormal(torch.zeros(dim), torch.eye(dim)),
}


@pytest.mark.parametrize("proposal", ["good", "poor", "leaking", None])
@pytest.mark.parametrize(
    # Of a random energy on unbounded Lebesgue measure there is no Z.
    ("name", "base"),
    [("box", "prior"), ("box", "lebesgue"), ("normal", "prior")],
)
@pytest.mark.parametrize("dim", [1, 2])
def test_log_partition_against_quadrature(dim, name, base, proposal):
    prior = PRIORS[name](dim)
    proxy = random_proxy(prior, dim, base)
    x = torch.tensor([[-4.0], [0.0], [4.0]])
    flows = {
        "good": flow(dim, 0.0, 1.0),
        "poor": flow(dim, 1.5, 0.1),
        "leaking": flow(dim, 2.5, 1.0),
        None: None,
    }
    limit = 2 if name == "box" else 7
    with torch.no_grad():
        exact = quadrature(proxy, x, dim, -limit, limit, 2000 if dim == 1 else 250)
        estimate = proxy.log_partition(x, flows[proposal], num_samples=4000)
    assert estimate.value.shape == estimate.effective_sample_size.shape == (3,)
    assert estimate.num_samples == 4000
    error = (estimate.debiased - exact).abs()
    # A millinat is the quadrature's share.
    assert (error < 4 * estimate.standard_error + 1e-3).all()
    assert (estimate.standard_error < 0.1).all()
    assert exact.std() > 0.1  # the conditions differ


@pytest.mark.parametrize("with_prior", [True, False])
def test_log_partition_of_gaussians(with_prior):
    prior = MultivariateNormal(
        torch.tensor([1.0, -1.0]), torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    )
    net = QuadraticEnergy(
        torch.tensor([[1.0], [0.5]]),
        torch.tensor([0.2, 0.0]),
        torch.tensor([[1.5, 0.0], [-0.4, 0.8]]),
        shift=2.0,
    )
    x = torch.tensor([[-1.0], [0.5], [2.0]])
    proxy = gaussian_proxy(net, prior if with_prior else None)
    q, log_z = gaussian_proxy_posterior(net, x, prior if with_prior else None)
    for proposal in (flow(2, 0.0, 1.0), flow(2, -3.0, 0.3), None):
        estimate = proxy.log_partition(x, proposal, num_samples=20_000)
        error = (estimate.debiased - log_z).abs()
        assert (error < 4 * estimate.standard_error).all()
    # log_prob is normalised by the same estimate.
    theta = q.sample((5,))
    log_prob = proxy.log_prob(theta, x, flow(2, 0.0, 1.0), num_samples=20_000)
    torch.testing.assert_close(log_prob, q.log_prob(theta), atol=0.1, rtol=0)


def test_the_proxy_itself_as_proposal_leaves_no_error():
    distribution = MultivariateNormal(torch.zeros(2), torch.eye(2))
    theta = distribution.sample((50, 3))
    log_q = distribution.log_prob(theta)
    estimate = from_log_weights(log_q + 3.0 - log_q)
    torch.testing.assert_close(estimate.value, torch.full((3,), 3.0))
    torch.testing.assert_close(estimate.effective_sample_size, torch.full((3,), 50.0))
    torch.testing.assert_close(
        estimate.standard_error, torch.zeros(3), atol=1e-3, rtol=0
    )


def test_log_mixture_is_the_density_of_what_is_drawn():
    p, r = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(3.0, 2.0)
    points, cell = grid(-30, 30, 6000, 1)
    theta = points.squeeze(-1)
    log_m = log_mixture(p.log_prob(theta), r.log_prob(theta), 30, 10)
    expected = 0.75 * p.log_prob(theta).exp() + 0.25 * r.log_prob(theta).exp()
    torch.testing.assert_close(log_m.exp(), expected)
    assert log_integral(log_m, cell).abs() < 1e-6
    for counts, only in (((5, 0), p), ((0, 5), r)):
        log_m = log_mixture(p.log_prob(theta), r.log_prob(theta), *counts)
        torch.testing.assert_close(log_m, only.log_prob(theta))
    outside = torch.tensor([-torch.inf])
    torch.testing.assert_close(
        log_mixture(torch.zeros(1), outside, 1, 1), torch.tensor([0.5]).log()
    )


def test_effective_sample_size_is_the_formula():
    weights = torch.rand(40, 7, dtype=torch.double) ** 4
    estimate = from_log_weights(weights.log() + 500)  # no overflow
    expected = weights.sum(0) ** 2 / (weights**2).sum(0)
    torch.testing.assert_close(estimate.effective_sample_size, expected)
    torch.testing.assert_close(estimate.value, weights.mean(0).log() + 500)
    torch.testing.assert_close(
        estimate.standard_error, (1 / expected - 1 / 40).sqrt(), atol=1e-6, rtol=1e-6
    )
    alone = torch.full((40, 1), -torch.inf)
    alone[3] = 0.0
    torch.testing.assert_close(
        from_log_weights(alone).effective_sample_size, torch.ones(1)
    )


def test_standard_error_is_the_spread_of_the_estimates():
    # Log-normal weights of mean one: log Z = 0.
    sigma, num = 0.5, 200
    log_weights = -0.5 * sigma**2 + sigma * torch.randn(num, 5000, dtype=torch.double)
    estimate = from_log_weights(log_weights)
    spread = estimate.value.std()
    assert estimate.standard_error.mean() == pytest.approx(spread.item(), rel=0.05)


def test_debiased_is_less_biased():
    sigma, num, repeats = 0.7, 16, 40_000
    log_weights = -0.5 * sigma**2 + sigma * torch.randn(
        num, repeats, dtype=torch.double
    )
    estimate = from_log_weights(log_weights)
    bias = estimate.value.mean().item()
    error = estimate.value.std().item() / repeats**0.5
    # Minus half the relative variance, to first order.
    assert bias == pytest.approx(-(2.718281828 ** (sigma**2) - 1) / (2 * num), rel=0.15)
    assert bias < -10 * error
    assert abs(estimate.debiased.mean().item()) < 0.25 * abs(bias)


@pytest.mark.parametrize("dim", [1, 2])
def test_gradient_of_log_partition_against_quadrature(dim):
    prior = PRIORS["box"](dim)
    proxy = random_proxy(prior, dim)
    x = torch.tensor([[-1.0], [1.0]])
    exact = flat_gradient(
        quadrature(proxy, x, dim, -2, 2, 1000 if dim == 1 else 100).sum(), proxy
    )
    proposal = flow(dim, 0.5, 0.8)
    mean, error = mean_and_standard_error(
        lambda: flat_gradient(
            proxy.log_partition(x, proposal, num_samples=2000).value.sum(), proxy
        ),
        repeats=30,
    )
    assert exact.norm() > 0.1
    # Of some hundred parameters none may be off by five standard errors.
    z = (mean - exact).abs() / (error + 1e-4)
    assert z.max() < 5
    assert (mean - exact).norm() < 0.05 * exact.norm()


def test_gradient_does_not_reach_the_proposal():
    proxy = random_proxy(PRIORS["box"](2), 2)
    proposal = flow(2, 0.0, 1.0)
    proxy.log_partition(torch.zeros(1, 1), proposal, 100).value.sum().backward()
    assert all(parameter.grad is None for parameter in proposal.parameters())
    assert any(parameter.grad is not None for parameter in proxy.parameters())


def test_samples_outside_the_support_weigh_nothing():
    log_unnormalized = torch.randn(10, 2)
    log_unnormalized[:4] = -torch.inf
    log_unnormalized.requires_grad_()
    log_proposal = torch.randn(10, 2)
    estimate = from_log_weights(log_unnormalized - log_proposal)
    inside = (log_unnormalized - log_proposal)[4:]
    expected = torch.logsumexp(inside, 0) - torch.tensor(10.0).log()
    torch.testing.assert_close(estimate.value, expected)
    (gradient,) = torch.autograd.grad(estimate.value.sum(), log_unnormalized)
    torch.testing.assert_close(gradient[4:], torch.softmax(inside, 0))
    assert (gradient[:4] == 0).all()


def test_no_sample_in_the_support():
    log_unnormalized = torch.full((10, 1), -torch.inf)
    estimate = from_log_weights(log_unnormalized)
    assert estimate.value.item() == -torch.inf
    assert estimate.effective_sample_size.item() == 1.0
    assert not estimate.debiased.isnan().any()


def test_samples_of_the_prior_save_a_flow_that_misses():
    # A flow that sits on one of two modes: alone, it never finds the other.
    prior = BoxUniform(-5 * torch.ones(1), 5 * torch.ones(1))
    proxy = random_proxy(prior, 1)

    class TwoModes(torch.nn.Module):
        def forward(self, theta, x):
            modes = torch.stack([-50 * (theta - m) ** 2 for m in (-3.0, 3.0)])
            return torch.logsumexp(modes, 0).squeeze(-1)

    proxy.net = TwoModes()
    proxy.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    x = torch.zeros(1, 1)
    exact = quadrature(proxy, x, 1, -5, 5, 5000)
    one_mode = DistributionFlow(
        MultivariateNormal(torch.tensor([-3.0]), 0.01 * torch.eye(1))
    )
    estimate = proxy.log_partition(x, one_mode, num_samples=20_000)
    assert abs(estimate.value - exact) < 4 * estimate.standard_error
    assert estimate.standard_error < 0.05
    theta = one_mode.sample(torch.Size((20_000,)), x)
    blind = from_log_weights(
        proxy.log_unnormalized(theta, x) - one_mode.log_prob(theta, x)
    )
    assert blind.value - exact < -0.5  # half the mass missed, a nat of 0.69
