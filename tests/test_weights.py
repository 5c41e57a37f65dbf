"""Weights of the three divergences: fixed, and dual variables on given divergences."""

import math

import pytest
import torch
from torch.distributions import Normal

from sbi_jeffreys import (
    AdaptiveWeights,
    FixedWeights,
    HuberRelaxation,
    QuadraticRelaxation,
)
from sbi_jeffreys.weights import ValidationDivergences


def divergences(forward, reverse, proxy_forward, num=100, spread=0.0):
    """Return validation divergences with these means, exactly."""
    noise = torch.randn(num, dtype=torch.double)
    noise = spread * (noise - noise.mean())
    return ValidationDivergences(
        forward + noise,
        torch.full((num,), float(reverse), dtype=torch.double),
        torch.full((num,), float(proxy_forward), dtype=torch.double),
    )


def feed(weights, values, epochs):
    for _ in range(epochs):
        weights.update(divergences(*values))
    return weights.dual_variables.tolist()


@pytest.mark.parametrize(
    ("h", "alpha", "price"),
    [
        (QuadraticRelaxation(), 1.0, 1.0),
        (QuadraticRelaxation(alpha=0.5, price=2.0), 0.5, 2.0),
        (QuadraticRelaxation(alpha=0.05, price=1.0), 0.05, 1.0),
        (HuberRelaxation(alpha=2.0, price=0.5, delta=5.0), 2.0, 0.5),
    ],
)
def test_duals_settle_at_price_plus_alpha_divergence(h, alpha, price):
    weights = AdaptiveWeights(h, dual_learning_rate=0.05)
    # The better model's loss, 1.5, is the baseline of the entropy.
    duals = feed(weights, (1.5, 0.7, 2.3), epochs=2000)
    assert duals[1] == pytest.approx(price + alpha * 0.7, rel=1e-3)
    assert duals[2] == pytest.approx(price + alpha * 0.8, rel=1e-3)
    # At no excess over the baseline any weight up to the price is optimal.
    assert duals[0] <= max(price, 1.0) + 1e-6


def test_baseline_is_the_lowest_loss_of_either_model_so_far():
    weights = AdaptiveWeights(QuadraticRelaxation(alpha=1.0, price=0.0))
    feed(weights, (3.0, 0.0, 1.0), epochs=1)
    # The best was 1.0: both now exceed it.
    duals = feed(weights, (3.0, 0.0, 2.0), epochs=2000)
    assert duals[0] == pytest.approx(2.0, rel=1e-3)
    assert duals[2] == pytest.approx(1.0, rel=1e-3)


def test_a_new_round_has_another_entropy():
    weights = AdaptiveWeights(QuadraticRelaxation(alpha=1.0, price=0.0))
    feed(weights, (-20.0, 0.0, -20.0), epochs=5)
    weights.start_round()
    duals = feed(weights, (3.0, 0.5, 2.0), epochs=2000)
    assert duals == pytest.approx([1.0, 0.5, 0.0], abs=1e-3)


@pytest.mark.parametrize("constant", [1000.0, -1000.0, 2 * math.log(1000)])
def test_units_of_theta_change_nothing(constant):
    # Rescaling theta adds a constant to every log density: to D1 and D3.
    torch.manual_seed(0)
    epochs = [
        (3 * math.exp(-i / 10) + 0.1 * torch.randn(1).item(), 1 / (1 + i), 2 - i / 50)
        for i in range(60)
    ]
    weights, rescaled = AdaptiveWeights(), AdaptiveWeights()
    for forward, reverse, proxy_forward in epochs:
        noise = 0.3 * torch.randn(100, dtype=torch.double)
        for w, shift in ((weights, 0.0), (rescaled, constant)):
            w.update(
                ValidationDivergences(
                    forward + shift + noise,
                    torch.full((100,), reverse),
                    torch.full((100,), proxy_forward + shift, dtype=torch.double),
                )
            )
        torch.testing.assert_close(
            rescaled.dual_variables, weights.dual_variables, rtol=1e-5, atol=1e-5
        )
        assert rescaled.trust == pytest.approx(weights.trust, abs=1e-9)
    assert weights.dual_variables.std() > 0.01  # something did happen


@pytest.mark.parametrize("spike", [1e3, 1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_spikes_leave_the_duals_bounded(spike, where):
    h = HuberRelaxation(alpha=0.5, price=1.0, delta=2.0)
    weights = AdaptiveWeights(h)
    calm = [1.5, 0.3, 1.2]
    spiked = list(calm)
    spiked[where] = spike
    for epoch in range(200):
        weights.update(divergences(*(spiked if epoch % 20 == 10 else calm)))
        assert torch.isfinite(weights.dual_variables).all()
        assert (weights.dual_variables >= 0).all()
        assert (weights.dual_variables <= h.dual_bound + 1e-6).all()
        assert 0 <= weights.trust <= 1


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_losses_that_are_never_finite_leave_the_duals_finite(value):
    weights = AdaptiveWeights()
    feed(weights, (value, value, value), epochs=50)
    assert torch.isfinite(weights.dual_variables).all()
    # And they recover.
    duals = feed(weights, (2.0, 0.5, 1.5), epochs=3000)
    assert duals[1] == pytest.approx(weights.h.price + 0.5 * weights.h.alpha, rel=1e-3)


def test_default_relaxation_is_bounded():
    # Quadratic costs let one spike of validation run away with the training.
    assert math.isfinite(AdaptiveWeights().h.dual_bound)


@pytest.mark.parametrize("advantage", [-0.3, -0.05, 0.0, 0.1, 0.4])
def test_trust_is_the_probability_that_the_proxy_is_better(advantage):
    weights = AdaptiveWeights(smoothing=0.0)
    difference = torch.randn(200, dtype=torch.double)
    difference = difference - difference.mean() + advantage
    proxy_forward = torch.randn(200, dtype=torch.double)
    weights.update(
        ValidationDivergences(
            proxy_forward + difference, torch.zeros(200), proxy_forward
        )
    )
    z = advantage / (difference.std().item() / math.sqrt(200))
    expected = Normal(0.0, 1.0).cdf(torch.tensor(z)).item()
    assert weights.trust == pytest.approx(expected, abs=1e-5)
    assert weights.flow_share == pytest.approx(expected, abs=1e-5)


def test_trust_is_earned_and_smoothed():
    weights = AdaptiveWeights(smoothing=0.9)
    assert weights.trust == 0
    better = divergences(5.0, 0.0, 1.0, spread=0.1)  # the proxy, surely
    history = []
    for _ in range(5):
        weights.update(better)
        history.append(weights.trust)
    expected = [1 - 0.9**k for k in range(1, 6)]
    assert history == pytest.approx(expected, abs=1e-6)


def test_trust_in_a_proxy_that_learns_alone_is_taken_as_it_is():
    weights = AdaptiveWeights(smoothing=0.9)
    for advantage in (0.02, -0.01, 0.05):
        validation = divergences(1.0 + advantage, 0.5, 1.0, spread=0.3)
        weights.measure_trust(validation)
        z = torch.tensor(validation.advantage / validation.standard_error)
        expected = Normal(0.0, 1.0).cdf(z).item()
        assert 0.01 < expected < 0.99
        # Of this proxy alone: no average with those before it.
        assert weights.trust == pytest.approx(expected, abs=1e-5)
    # The dual variables, and their baseline, belong to the flow's stage.
    assert weights.dual_variables.tolist() == [1.0, 1.0, 1.0]
    assert weights.entropy_baseline == math.inf
    # From there the averages go on.
    before = weights.trust
    weights.update(divergences(5.0, 0.0, 1.0, spread=0.1))
    assert weights.trust == pytest.approx(0.9 * before + 0.1, abs=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_proxy_that_is_no_number_is_not_trusted(value):
    weights = AdaptiveWeights()
    weights.measure_trust(divergences(5.0, 0.0, 1.0, spread=0.1))
    assert weights.trust == pytest.approx(1.0)
    weights.measure_trust(divergences(1.0, 0.0, value))
    assert weights.trust == 0.0


def test_validation_divergences_compare_in_pairs():
    # Simulations differ by ten nats, the models by 0.1 on every one of them.
    hard = 10 * torch.randn(500, dtype=torch.double)
    noise = 0.2 * torch.randn(500, dtype=torch.double)
    v = ValidationDivergences(hard + 0.1 + noise, torch.ones(500), hard)
    assert v.advantage == pytest.approx(0.1 + noise.mean().item(), abs=1e-6)
    assert v.standard_error == pytest.approx(noise.std().item() / 500**0.5, rel=1e-6)
    assert v.reverse_kl == 1


def test_one_validation_simulation_says_nothing():
    weights = AdaptiveWeights(smoothing=0.0)
    weights.update(ValidationDivergences(torch.ones(1), torch.ones(1), torch.zeros(1)))
    assert weights.trust <= 0.5
    assert torch.isfinite(weights.dual_variables).all()


def test_the_flow_follows_as_far_as_it_pays():
    weights = AdaptiveWeights()
    weights.measure_trust(divergences(1.02, 0.5, 1.0, spread=0.3))
    trust = weights.trust
    assert 0.01 < trust < 0.99
    for exponent in (0.3, 0.0, 1.0):
        weights.start_distillation(exponent)
        assert weights.trust == trust
        assert weights.flow_share == pytest.approx(exponent * trust, abs=1e-9)
    weights.start_distillation(0.3)
    other = AdaptiveWeights()
    other.load_state_dict(weights.state_dict())
    assert other.flow_share == weights.flow_share
    # Of the penalty form the flow follows all the way.
    fixed = FixedWeights()
    fixed.start_distillation(0.3)
    assert fixed.flow_share == 1.0


def test_fixed_weights_are_fixed():
    weights = FixedWeights((1.0, 0.5, 2.0))
    duals = feed(weights, (100.0, 50.0, math.nan), epochs=10)
    assert duals == [1.0, 0.5, 2.0]
    weights.measure_trust(divergences(100.0, 50.0, 1.0))
    assert weights.dual_variables.tolist() == duals
    assert math.isnan(weights.trust)
    assert weights.flow_share == 1.0
    assert FixedWeights().dual_variables.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaptiveWeights(dual_learning_rate=0.0), "must be positive, got 0.0"),
        (
            lambda: AdaptiveWeights(dual_learning_rate=math.nan),
            "dual_learning_rate must be positive, got nan",
        ),
        (
            lambda: AdaptiveWeights(QuadraticRelaxation(alpha=0.02)),
            "dual_learning_rate of 0.05 overshoots for alpha=0.02",
        ),
        (lambda: AdaptiveWeights(smoothing=1.0), r"must be in \[0, 1\), got 1.0"),
        (lambda: AdaptiveWeights(smoothing=-0.1), r"must be in \[0, 1\), got -0.1"),
        (lambda: FixedWeights((1.0, 1.0)), "three .*non-negative numbers"),
        (lambda: FixedWeights((1.0, -1.0, 1.0)), "three .*non-negative numbers"),
        (lambda: FixedWeights((1.0, math.nan, 1.0)), "three .*non-negative numbers"),
        (lambda: FixedWeights((1.0, math.inf, 1.0)), "three .*non-negative numbers"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
