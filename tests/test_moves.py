"""Metropolis moves of repeated samples."""

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from sbi_jeffreys.moves import metropolis_moves


def test_repeated_samples_spread_and_keep_their_distribution():
    torch.manual_seed(0)
    covariance = torch.tensor([[1.0, 0.9], [0.9, 2.0]])
    targets = [
        MultivariateNormal(torch.zeros(2), covariance),
        MultivariateNormal(torch.tensor([5.0, -3.0]), 0.01 * covariance),
    ]

    def log_density(theta):
        return torch.stack([t.log_prob(theta[:, i]) for i, t in enumerate(targets)], 1)

    # Five hundred samples, each ten times.
    samples = torch.stack([target.sample((500,)) for target in targets], 1)
    pool = torch.stack([target.sample((2000,)) for target in targets], 1)
    moved = metropolis_moves(log_density, samples.repeat(10, 1, 1), 20, pool)
    for index, target in enumerate(targets):
        points = moved[:, index]
        assert len(points.unique(dim=0)) > 0.95 * len(points)
        # At least as many independent samples as there were: 500.
        error = 4 / 500**0.5 * target.variance.sqrt()
        assert ((points.mean(0) - target.mean).abs() < error).all()
        relative = torch.cov(points.T) / target.covariance_matrix - 1
        assert relative.abs().max() < 4 * (2 / 500) ** 0.5


def test_samples_of_a_wrong_distribution_come_nearer_to_the_target():
    torch.manual_seed(0)
    target = Normal(0.0, 1.0)
    wide = 3 * torch.randn(4000, 1, 1)
    pool = 3 * torch.randn(4000, 1, 1)
    moved = metropolis_moves(lambda t: target.log_prob(t).squeeze(-1), wide, 60, pool)
    assert moved.std().item() == pytest.approx(1, abs=0.05)


def test_modes_keep_their_weights():
    torch.manual_seed(0)
    left, right = Normal(-5.0, 0.1), Normal(5.0, 0.1)

    def log_density(theta):
        return torch.logaddexp(
            left.log_prob(theta), right.log_prob(theta) + torch.log(torch.tensor(3.0))
        ).squeeze(-1)

    # Equal weights at first, three to one in the target: steps of one lead across.
    start = torch.cat((left.sample((3000, 1, 1)), right.sample((3000, 1, 1))))
    moved = metropolis_moves(log_density, start, 200, start.flip(0))
    assert (moved > 0).float().mean().item() == pytest.approx(0.75, abs=0.03)


def test_points_without_density_are_never_reached():
    torch.manual_seed(0)
    samples = torch.rand(2000, 1, 2)

    def log_density(theta):
        inside = ((theta >= 0) & (theta <= 1)).all(-1)
        return torch.where(inside, 0.0, -torch.inf)

    moved = metropolis_moves(log_density, samples, 20, torch.rand(2000, 1, 2))
    assert (moved >= 0).all() and (moved <= 1).all()
    assert moved.mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("num_samples", [1, 3, 10])
def test_few_samples_stay_as_wide_as_they_are(num_samples):
    torch.manual_seed(0)
    num_conditions, dim = 12_000 // num_samples, 2
    samples = torch.randn(num_samples, num_conditions, dim)
    moved = metropolis_moves(
        lambda theta: -theta.square().sum(-1) / 2,
        samples,
        20,
        pool=torch.randn(200, num_conditions, dim),
    )
    # Differences of the samples themselves would leave 0.85 of three, 0.95 of ten.
    error = (2 / (num_samples * num_conditions * dim)) ** 0.5
    assert moved.square().mean().item() == pytest.approx(1, abs=4 * error)
    assert (moved != samples).all(-1).float().mean() > 0.95
