"""Atomic loss of the proxy for simulations from a proposal."""

import pytest
import torch
from helpers import QuadraticEnergy, gaussian_proxy
from torch.distributions import MultivariateNormal

from sbi_jeffreys.atomic import atomic_proxy_loss

PRIOR = MultivariateNormal(torch.zeros(2), 4 * torch.eye(2))


@pytest.fixture
def net():
    return QuadraticEnergy(
        torch.tensor([[1.0], [-0.5]]), torch.zeros(2), torch.eye(2), shift=3.0
    )


@pytest.mark.parametrize("base", ["prior", "lebesgue"])
def test_all_atoms_are_a_softmax_over_the_batch(net, base):
    proxy = gaussian_proxy(net, PRIOR if base == "prior" else None)
    theta, x = torch.randn(8, 2), torch.randn(8, 1)
    loss = atomic_proxy_loss(proxy, PRIOR, theta, x, num_atoms=8)
    # r = q / p0 of every pair, whatever the base measure.
    log_q = net(theta.unsqueeze(1), x)  # (parameters, conditions)
    if base == "prior":
        log_q = log_q + PRIOR.log_prob(theta).unsqueeze(1)
    log_r = log_q - PRIOR.log_prob(theta).unsqueeze(1)
    expected = -torch.log_softmax(log_r, 0).diagonal()
    torch.testing.assert_close(loss, expected)


def test_partition_function_cancels(net):
    proxy = gaussian_proxy(net, PRIOR)
    theta, x = torch.randn(30, 2), torch.randn(30, 1)
    torch.manual_seed(1)
    loss = atomic_proxy_loss(proxy, PRIOR, theta, x, num_atoms=5)
    with torch.no_grad():
        net.shift += 100.0
    torch.manual_seed(1)
    shifted = atomic_proxy_loss(proxy, PRIOR, theta, x, num_atoms=5)
    torch.testing.assert_close(shifted, loss, rtol=1e-4, atol=1e-4)


def test_the_right_parameter_is_never_its_own_contrast(net):
    # With two atoms, the loss of every pair is that of one other of the batch.
    proxy = gaussian_proxy(net, PRIOR)
    theta, x = 3 * torch.randn(6, 2), torch.randn(6, 1)
    log_r = net(theta.unsqueeze(1), x)
    possible = torch.nn.functional.softplus(log_r - log_r.diagonal())
    for _ in range(20):
        loss = atomic_proxy_loss(proxy, PRIOR, theta, x, num_atoms=2)
        nearest = (possible - loss).abs()
        nearest.fill_diagonal_(torch.inf)
        assert nearest.min(0).values.max() < 1e-4


def test_the_true_posterior_is_the_minimum_under_any_proposal(net):
    # x = theta_1 - theta_2 / 2 + noise: exp f is this likelihood up to scale.
    class Likelihood(QuadraticEnergy):
        def forward(self, theta, x):
            mean = theta @ torch.tensor([1.0, -0.5])
            return -0.5 * self.root[0, 0] * (x.squeeze(-1) - mean) ** 2

    net = Likelihood(torch.zeros(2, 1), torch.zeros(2), torch.eye(2))
    proxy = gaussian_proxy(net, PRIOR)
    proposal = MultivariateNormal(torch.tensor([2.0, 0.0]), 0.5 * torch.eye(2))
    theta = proposal.sample((4000,))
    x = (theta @ torch.tensor([1.0, -0.5]) + torch.randn(4000)).unsqueeze(1)
    losses = []
    for precision in (0.5, 0.8, 1.0, 1.25, 2.0):
        with torch.no_grad():
            net.root[0, 0] = precision
        torch.manual_seed(0)
        losses.append(
            torch.cat([
                atomic_proxy_loss(proxy, PRIOR, *batch, num_atoms=20)
                for batch in zip(theta.split(200), x.split(200), strict=True)
            ]).mean()
        )
    assert min(losses) in losses[1:4]
    assert losses[2] < min(losses[0], losses[4]) - 0.01


def test_a_single_simulation_has_no_contrast(net):
    with pytest.raises(ValueError, match="needs two or more"):
        atomic_proxy_loss(
            gaussian_proxy(net, PRIOR), PRIOR, torch.zeros(1, 2), torch.zeros(1, 1), 10
        )


def test_more_atoms_than_simulations(net):
    proxy = gaussian_proxy(net, PRIOR)
    theta, x = torch.randn(4, 2), torch.randn(4, 1)
    loss = atomic_proxy_loss(proxy, PRIOR, theta, x, num_atoms=100)
    expected = atomic_proxy_loss(proxy, PRIOR, theta, x, num_atoms=4)
    torch.testing.assert_close(loss, expected)
