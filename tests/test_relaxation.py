"""Costs of relaxing a constraint, and the relaxation that a dual variable buys."""

import pytest
import torch

from sbi_jeffreys import HuberRelaxation, QuadraticRelaxation

COSTS = [
    QuadraticRelaxation(),
    QuadraticRelaxation(alpha=0.3, price=0.0),
    QuadraticRelaxation(alpha=4.0, price=2.5),
    HuberRelaxation(),
    HuberRelaxation(alpha=0.5, price=0.2, delta=3.0),
    HuberRelaxation(alpha=2.0, price=0.0, delta=0.5),
]


@pytest.mark.parametrize("h", COSTS)
def test_relaxation_is_the_minimiser(h):
    u = torch.linspace(0, 30, 300_001, dtype=torch.double)
    highest = min(h.dual_bound, 8.0)
    for dual in torch.linspace(0, 0.999 * highest, 13, dtype=torch.double):
        best = u[(h.cost(u) - dual * u).argmin()]
        torch.testing.assert_close(h.relaxation(dual), best, rtol=0, atol=2e-4)


@pytest.mark.parametrize("h", COSTS)
def test_cost_is_convex_increasing_and_zero_at_zero(h):
    u = torch.linspace(0, 10, 1001, dtype=torch.double)
    cost = h.cost(u)
    assert cost[0] == 0
    assert (cost.diff() >= 0).all()
    assert (cost.diff().diff() >= -1e-12).all()


def test_slope_of_huber_ends_at_its_bound():
    h = HuberRelaxation(alpha=0.5, price=0.2, delta=3.0)
    assert h.dual_bound == pytest.approx(0.2 + 0.5 * 3.0)
    u = torch.tensor([3.0, 30.0, 300.0], dtype=torch.double, requires_grad=True)
    (slope,) = torch.autograd.grad(h.cost(u).sum(), u)
    torch.testing.assert_close(slope, torch.full_like(u, h.dual_bound))
    near = torch.tensor([3.0 - 1e-9, 3.0 + 1e-9], dtype=torch.double)
    assert h.cost(near).diff().abs() < 1e-8  # continuous where it turns linear


def test_quadratic_is_unbounded():
    assert QuadraticRelaxation().dual_bound == float("inf")


@pytest.mark.parametrize("h", COSTS)
def test_relaxation_works_element_by_element(h):
    duals = torch.tensor([0.0, 0.1, 0.7])
    together = h.relaxation(duals)
    assert together.shape == (3,)
    assert together.tolist() == [h.relaxation(dual).item() for dual in duals]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuadraticRelaxation(alpha=0.0), "alpha must be positive, got 0.0"),
        (lambda: QuadraticRelaxation(alpha=-1), "alpha must be positive, got -1"),
        (lambda: QuadraticRelaxation(alpha=float("nan")), "alpha must be positive"),
        (lambda: QuadraticRelaxation(price=-1), "price must not be negative, got -1"),
        (lambda: HuberRelaxation(delta=0), "delta must be positive, got 0"),
        (lambda: HuberRelaxation(price=-0.5), "price must not be negative, got -0.5"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
