"""A proxy that pools a network and surrogates of the likelihood, and its weights."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import QuadraticEnergy, grid, log_integral
from scipy import special
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal

from sbi_jeffreys import ConditionalEnergy, energy_nn
from sbi_jeffreys.base_measure import PriorMeasure, make_base_measure
from sbi_jeffreys.likelihood import SurrogateLikelihoods
from sbi_jeffreys.pooled_energy import MAX_WEIGHT, PooledEnergy, choose_weights

PRIOR = MultivariateNormal(torch.zeros(2), torch.eye(2))
NOISE = 0.8


def simulate(num):
    """Return parameters and outputs: two of them, and Gaussian noise."""
    theta = PRIOR.sample((num,))
    return theta, theta + NOISE * torch.randn(num, 2)


def log_likelihood(theta, x, noise=NOISE):
    return Normal(theta, noise).log_prob(x).sum(-1)


def validation(num=500, num_samples=100):
    """Return the exact log likelihood at simulations and samples, and the base."""
    theta, x = simulate(num)
    points = torch.cat((theta[None], PRIOR.sample((num_samples, num))))
    return log_likelihood(points, x), torch.zeros(1 + num_samples, num)


def objective(weights, factors, base):
    """Return what `choose_weights` minimises, as its documentation has it."""
    alone = np.eye(len(factors))[0]
    with np.errstate(invalid="ignore"):
        log_q = base.double().numpy() + np.tensordot(
            weights, factors.double().numpy(), axes=1
        )
    loss = special.logsumexp(log_q, axis=0) - log_q[0]
    return loss.sum() + 0.5 * np.square(weights - alone).sum()


def slope_and_curvature(weights, factors, base, index, step=1e-4):
    """Return the derivatives of the objective to one weight, by central differences."""
    move = step * np.eye(len(weights))[index]
    down, here, up = (
        objective(weights + k * move, factors, base) for k in (-1.0, 0.0, 1.0)
    )
    return (up - down) / (2 * step), (up - 2 * here + down) / step**2


def standard_error(weights, factors, base):
    """Return the standard error of one weight of a model that is right."""
    return slope_and_curvature(weights, factors, base, 0)[1] ** -0.5


def assert_optimal(weights, factors, base, tolerance=1e-3):
    """The weights are where the objective is lowest within the bounds."""
    values = weights.double().numpy()
    assert ((values >= 0) & (values <= MAX_WEIGHT)).all()
    for k, value in enumerate(values):
        slope, curvature = slope_and_curvature(values, factors, base, k)
        # How far away the lowest point along this weight is, downhill.
        distance = -slope / curvature
        if value <= 0:
            assert distance < tolerance, k
        elif value >= MAX_WEIGHT:
            assert distance > -tolerance, k
        else:
            assert abs(distance) < tolerance, k


def test_an_exact_factor_has_weight_one():
    """The posterior is the prior and all of the likelihood, not less or more."""
    log_l, base = validation()
    (weight,) = choose_weights(log_l[None], base).tolist()
    error = standard_error(np.ones(1), log_l[None], base)
    assert error < 0.1
    assert abs(weight - 1) < 3 * error


@pytest.mark.parametrize("spread", [1.0, 1.5])
def test_samples_count_by_their_importance_weights(spread):
    """Samples next to the posterior, as the flow's are, tell the same."""
    theta, x = simulate(500)
    proposal = Independent(
        Normal(x / (1 + NOISE**2), spread / (1 + NOISE**-2) ** 0.5), 1
    )
    points = torch.cat((theta[None], proposal.sample((100,))))
    factors = log_likelihood(points, x)[None]
    base = PRIOR.log_prob(points) - proposal.log_prob(points)
    (weight,) = choose_weights(factors, base).tolist()
    # Of samples that are the posterior's own all the information is in the base.
    error = standard_error(np.ones(1), factors, base)
    assert error < 0.1
    assert abs(weight - 1) < 3 * error
    (naive,) = choose_weights(factors, torch.zeros_like(base)).tolist()
    assert naive < 1 - 5 * error


@pytest.mark.parametrize("scale", [2.0, 0.8])
def test_a_factor_too_sharp_or_too_flat_is_scaled(scale):
    """Of a power of the likelihood the weight is its reciprocal."""
    log_l, base = validation()
    (weight,) = choose_weights(scale * log_l[None], base).tolist()
    error = standard_error(np.ones(1) / scale, scale * log_l[None], base)
    assert abs(weight - 1 / scale) < 3 * error


def test_no_factor_is_sharpened_for_ever():
    """Half a log likelihood would have to be doubled, which the bound forbids."""
    log_l, base = validation()
    weights = choose_weights(torch.stack((log_l / 2, torch.zeros_like(log_l))), base)
    assert weights.tolist() == [MAX_WEIGHT, 0.0]
    # Two halves may be.
    weights = choose_weights(torch.stack((log_l / 2, log_l / 2)), base)
    assert_optimal(weights, torch.stack((log_l / 2, log_l / 2)), base)
    error = standard_error(np.ones(2), torch.stack((log_l / 2, log_l / 2)), base)
    assert abs(weights.sum().item() - 2) < 3 * error


@pytest.mark.parametrize("num_copies", [2, 4])
def test_copies_share_their_weight(num_copies):
    """What is told twice is heeded once, by what the prior says of them."""
    log_l, base = validation()
    log_l = 0.7 * log_l
    weights = choose_weights(log_l.expand(num_copies, -1, -1), base)
    alone = choose_weights(log_l[None], base).item()
    # But for the penalty, which is of the size of one simulation.
    assert weights.sum().item() == pytest.approx(alone, abs=0.01)
    expected = torch.full((num_copies,), (alone - 1) / num_copies)
    expected[0] += 1
    assert expected.min() > 0.05
    torch.testing.assert_close(weights, expected, atol=0.01, rtol=0)


def test_parts_of_a_likelihood_have_weight_one_each():
    """Factors that each know one output are multiplied, not averaged."""
    theta, x = simulate(500)
    points = torch.cat((theta[None], PRIOR.sample((100, 500))))
    factors = Normal(points, NOISE).log_prob(x).movedim(-1, 0)
    base = torch.zeros(101, 500)
    weights = choose_weights(factors, base)
    for k in (0, 1):
        error = slope_and_curvature(np.ones(2), factors, base, k)[1] ** -0.5
        assert error < 0.1
        assert abs(weights[k].item() - 1) < 3.5 * error


@pytest.mark.parametrize("noise_first", [False, True])
def test_noise_has_no_weight(noise_first):
    """What only errs is left out, be it the network itself."""
    log_l, base = validation()
    noise = torch.randn(log_l.shape)
    order = (noise, log_l) if noise_first else (log_l, noise)
    weights = choose_weights(torch.stack(order), base).tolist()
    of_noise, of_truth = weights if noise_first else weights[::-1]
    # About its expectation, zero, the information in it is its variance.
    error = len(log_l[0]) ** -0.5
    assert 0 <= of_noise < 4 * error
    error = standard_error(np.ones(1), log_l[None], base)
    assert abs(of_truth - 1) < 4 * error


def test_weights_are_not_negative():
    """Even where a factor would have to be taken off another one."""
    theta, x = simulate(500)
    points = torch.cat((theta[None], PRIOR.sample((100, 500))))
    misled = points[..., 0]
    factors = torch.stack((log_likelihood(points, x) + 0.5 * misled, misled))
    base = torch.zeros(101, 500)
    weights = choose_weights(factors, base)
    assert_optimal(weights, factors, base)
    slope, _ = slope_and_curvature(weights.double().numpy(), factors, base, 1)
    assert weights[1] == 0 and slope > 1
    # The first factor is what it would be by itself.
    torch.testing.assert_close(
        weights[:1], choose_weights(factors[:1], base), atol=1e-3, rtol=0
    )


def problem(seed, num_factors=3, num=60, num_samples=40, scale=1.0):
    """Return factors that err and are alike, and a base with a bounded support."""
    torch.manual_seed(seed)
    theta, x = simulate(num)
    points = torch.cat((theta[None], PRIOR.sample((num_samples, num))))
    exact = log_likelihood(points, x)
    factors = torch.stack([
        scale
        * (
            torch.rand(()) * 2 * exact
            + torch.rand(()) * torch.randn_like(exact)
            + torch.randn(()) * points[..., 0]
        )
        for _ in range(num_factors)
    ])
    base = 0.5 * torch.randn(exact.shape)
    outside = torch.rand(exact.shape) < 0.3
    outside[0] = False
    return factors, base.masked_fill(outside, -torch.inf)


@pytest.mark.parametrize("seed", range(4))
def test_weights_are_the_best_of_a_grid(seed):
    """By brute force there are no better ones."""
    factors, base = problem(seed, num_factors=2, num=30, num_samples=20)
    weights = choose_weights(factors, base)
    axis = np.linspace(0, MAX_WEIGHT, 31)
    losses = [objective(np.array([a, b]), factors, base) for a in axis for b in axis]
    assert objective(weights.double().numpy(), factors, base) <= min(losses) + 1e-6
    assert_optimal(weights, factors, base)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("seed", range(3))
def test_weights_meet_the_conditions_of_an_optimum(seed, scale):
    """The slope is zero between the bounds and points outwards at them."""
    factors, base = problem(10 + seed, scale=scale)
    weights = choose_weights(factors, base)
    if scale <= 1:
        assert_optimal(weights, factors, base)
        return
    # Where factors are ever so large the optimum is sharp; what is told is the loss.
    values = weights.double().numpy()
    assert ((values >= 0) & (values <= MAX_WEIGHT)).all()
    here = objective(values, factors, base)
    for k in range(3):
        for move in (0.5, 0.9, 1.1, 2.0):
            other = values.copy()
            other[k] = min(move * other[k], MAX_WEIGHT)
            assert here <= objective(other, factors, base) + 1e-3


def test_bounded_log_likelihoods_do_not_stop_the_search():
    """A few guesses at the bound of the log likelihood are ordinary numbers."""
    factors, base = problem(3)
    factors[1, 1:][torch.rand(factors[1, 1:].shape) < 0.05] = -1e4
    weights = choose_weights(factors, base)
    here = objective(weights.double().numpy(), factors, base)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        other = rng.uniform(0, MAX_WEIGHT, 3) * (rng.random(3) < 0.8)
        assert here <= objective(other, factors, base) + 1e-4


def test_one_simulation_says_little():
    """The prior about the network alone counts as much as one simulation."""
    base = torch.randn(50, 1)
    factors = 0.02 * torch.randn(3, 50, 1)
    # Let the last two be wanted.
    factors[1:, 0] = 0.03
    weights = choose_weights(factors, base)
    # To first order in the factors, what the simulation has more of than samples.
    mean = (factors * base.softmax(0)).sum(1)
    expected = torch.eye(3)[0] + (factors[:, 0] - mean)[:, 0]
    assert (expected - torch.eye(3)[0]).abs().min() > 0.01
    torch.testing.assert_close(weights, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("size", [30.0, 3e4])
def test_what_depends_on_x_alone_changes_nothing(size):
    """Neither in a factor nor in the base; the evidence of x is not compared."""
    factors, base = problem(5)
    of_x = size * torch.randn(3, 1, factors.shape[2]).double()
    shifted = choose_weights(factors.double() + of_x, base.double() + of_x[0])
    expected = choose_weights(factors.double(), base.double())
    torch.testing.assert_close(shifted, expected, atol=2e-3, rtol=0)


def test_a_factor_that_is_not_a_number_has_no_weight():
    """The others are weighed as if it were not there."""
    factors, base = problem(7)
    expected = choose_weights(factors, base)
    assert expected[0] > 0
    for index in (1, 3):
        for bad in (torch.nan, torch.inf, -torch.inf):
            broken = factors[:1].clone()
            broken[0, 4, 9] = bad
            more = torch.cat((factors[:index], broken, factors[index:]))
            weights = choose_weights(more, base)
            assert weights[index] == 0
            others = torch.cat((weights[:index], weights[index + 1 :]))
            torch.testing.assert_close(others, expected, atol=1e-5, rtol=0)


def test_a_network_that_is_not_a_number_has_no_weight():
    """The surrogates are weighed without it."""
    log_l, base = validation()
    factors = torch.stack((torch.full_like(log_l, torch.nan), log_l))
    weights = choose_weights(factors, base)
    assert weights[0] == 0
    error = standard_error(np.ones(1), log_l[None], base)
    assert abs(weights[1].item() - 1) < 4 * error
    assert (choose_weights(factors[[0, 0]], base) == 0).all()


def test_simulations_that_tell_nothing_are_left_out():
    """Those outside the support, or without a sample in it, change no weight."""
    factors, base = problem(8)
    extra, extra_base = problem(9)
    extra_base = extra_base.clone()
    extra_base[0, ::2] = -torch.inf
    extra_base[1:, 1::2] = -torch.inf
    # Whatever the factors are there.
    extra[:, :, ::3] = torch.nan
    weights = choose_weights(
        torch.cat((extra, factors), 2), torch.cat((extra_base, base), 1)
    )
    torch.testing.assert_close(
        weights, choose_weights(factors, base), atol=1e-5, rtol=0
    )
    assert choose_weights(extra, extra_base).tolist() == [1.0, 0.0, 0.0]
    empty = choose_weights(factors[:, :, :0], base[:, :0])
    assert empty.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_a_tensor_like_the_factors(dtype):
    """They are chosen while no gradients are recorded, and have none."""
    factors, base = problem(1)
    factors, base = factors.to(dtype), base.to(dtype)
    before = factors.clone(), base.clone()
    with torch.no_grad():
        weights = choose_weights(factors, base)
    assert weights.dtype == dtype and weights.shape == (3,)
    assert not weights.requires_grad
    assert (weights - torch.tensor([1.0, 0.0, 0.0])).abs().max() > 0.05
    assert torch.equal(factors, before[0]) and torch.equal(base, before[1])
    torch.testing.assert_close(choose_weights(factors.requires_grad_(), base), weights)


def build(seed=0, **kwargs):
    torch.manual_seed(seed)
    theta, x = simulate(300)
    kwargs.setdefault("likelihood", "auto")
    return energy_nn(8, 1, **kwargs)(theta, x, PRIOR)


def randomized(seed=0):
    """Return a pooled proxy of which no factor is where it starts."""
    proxy = build(seed=seed)
    assert isinstance(proxy, PooledEnergy)
    with torch.no_grad():
        for parameter in proxy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return proxy.eval()


def test_it_starts_as_its_network_alone():
    """Until the factors are weighed the likelihoods are neither used nor needed."""
    proxy = randomized()
    assert proxy.weights.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    theta, x = PRIOR.sample((5, 7)), torch.randn(7, 2)
    expected = proxy.net(theta, x)
    assert expected.std() > 1e-2
    assert torch.equal(proxy(theta, x), expected)
    proxy.weights.copy_(torch.tensor([0.3, 0.0, 0.7, 0.9, 1.2]))
    assert not torch.allclose(proxy(theta, x), expected)
    proxy.reset_weights()
    assert proxy.weights.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert torch.equal(proxy(theta, x), expected)


@pytest.mark.parametrize(
    "weights",
    [
        [0.3, 0.0, 0.7, 0.9, 1.2],
        [0.0, 0.5, 0.0, 0.0, 0.0],
        [1.0, 0.2, 0.4, 0.3, 0.6],
        [0.0, 0.0, 0.0, 0.0, 0.0],
        [0.5, 0.0, 0.0, 0.0, 1.5],
    ],
)
def test_energy_is_the_weighted_sum_of_the_factors(weights):
    """Every factor counts by its own weight, those without one not at all."""
    proxy = randomized()
    theta, x = PRIOR.sample((5, 7)), torch.randn(7, 2)
    z = 10 * torch.tanh(proxy.likelihoods.coordinates.standardize(theta) / 10)
    y, categories = proxy.likelihoods.outputs(x)
    parts = [proxy.net(theta, x)]
    first, *others = (m(z, y, categories) for m in proxy.likelihoods.members)
    parts += [first, *(torch.log(0.99 * o.exp() + 0.01 * first.exp()) for o in others)]
    # The flow's is a density of the scores, and the first one of their whitening.
    broad = first + proxy.likelihoods.members[0].coordinates.log_abs_det(y)
    parts[-1] = torch.log(0.99 * others[-1].exp() + 0.01 * broad.exp())
    expected = sum(w * part for w, part in zip(weights, parts, strict=True))
    proxy.weights.copy_(torch.tensor(weights))
    f = proxy(theta, x)
    assert f.shape == (5, 7)
    torch.testing.assert_close(f, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        proxy.log_unnormalized(theta, x),
        PRIOR.log_prob(theta) + expected,
        atol=1e-4,
        rtol=1e-4,
    )
    # What is weighed are the factors, whatever the weights are now.
    factors = proxy.log_factors(theta, x)
    assert factors.shape == (5, 5, 7)
    torch.testing.assert_close(factors, torch.stack(parts), atol=1e-4, rtol=1e-4)


class Nonsense(nn.Module):
    """A factor that is not a number."""

    def forward(self, *args):
        return torch.full((5, 7), torch.nan)


def test_a_likelihood_without_weight_is_not_evaluated():
    """It may be nonsense, and costs nothing."""
    proxy = randomized()
    theta, x = PRIOR.sample((5, 7)), torch.randn(7, 2)
    proxy.weights.copy_(torch.tensor([1.0, 0.5, 0.0, 0.0, 0.0]))
    expected = proxy(theta, x)
    proxy.likelihoods.members[1] = nn.Linear(1, 1)  # cannot be called
    assert torch.equal(proxy(theta, x), expected)


def test_a_network_without_weight_may_be_nonsense():
    """`choose_weights` leaves out what is not a number, and so does the proxy."""
    proxy = randomized()
    theta, x = PRIOR.sample((5, 7)), torch.randn(7, 2)
    proxy.weights.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0]))
    expected = proxy(theta, x)
    assert expected.isfinite().all()
    proxy.net = Nonsense()
    torch.testing.assert_close(proxy(theta, x), expected)


def test_gradients_reach_all_that_is_weighed():
    """The flow learns from the slope of all factors, by their weights."""
    proxy = randomized()
    theta, x = PRIOR.sample((5, 7)).requires_grad_(), torch.randn(7, 2)
    slopes = [
        torch.autograd.grad(part.sum(), theta, retain_graph=True)[0]
        for part in proxy.log_factors(theta, x)
    ]
    weights = torch.tensor([0.3, 0.4, 0.0, 0.8, 1.2])
    proxy.weights.copy_(weights)
    (slope,) = torch.autograd.grad(proxy(theta, x).sum(), theta)
    expected = torch.einsum("k,kijl->ijl", weights, torch.stack(slopes))
    torch.testing.assert_close(slope, expected, atol=1e-3, rtol=1e-3)
    assert all(s.abs().mean() > 1e-2 for s in slopes)


class ExactLikelihoods(nn.Module):
    """Powers of the likelihood of a linear Gaussian task, in place of surrogates."""

    def __init__(self, powers):
        super().__init__()
        self.powers = torch.tensor(powers, dtype=torch.double)

    def __len__(self):
        return len(self.powers)

    def forward(self, theta, x, which=None):
        powers = self.powers if which is None else self.powers[which]
        return powers[:, None, None] * log_likelihood(theta, x)


@pytest.mark.parametrize(
    ("weights", "power"),
    [
        ([1.0, 0.0, 0.0], 0.5),  # half of it is the network's
        ([0.0, 1.0, 0.0], 1.0),  # the exact posterior
        ([1.0, 0.2, 0.4], 1.5),  # 0.5 + 0.2 + 0.4 * 2
        ([0.0, 0.0, 0.0], 0.0),  # the prior
    ],
)
def test_posterior_of_exact_factors_is_the_closed_form(weights, power):
    """Its normalised density is that of the prior and a power of the likelihood."""
    prior = MultivariateNormal(
        torch.zeros(1, dtype=torch.double), torch.eye(1, dtype=torch.double)
    )
    one = torch.eye(1, dtype=torch.double)
    net = QuadraticEnergy(one, torch.zeros(1).double(), one * 0.5**0.5 / NOISE, 3.0)
    likelihoods: Any = ExactLikelihoods([1.0, 2.0])
    base = make_base_measure("prior", prior, prior.sample((100,)))
    shape = torch.Size([1])
    proxy = PooledEnergy(net, likelihoods, base, shape, shape)
    proxy.weights.copy_(torch.tensor(weights))
    x = torch.tensor([[0.7], [-1.5]], dtype=torch.double)
    points, cell = grid(-5, 5, 4000, 1)
    with torch.no_grad():
        log_q = proxy.log_unnormalized(points[:, None].expand(-1, 2, -1), x)
    log_q = log_q - log_integral(log_q, cell)
    precision = 1 + power / NOISE**2
    exact = Normal(power * x[:, 0] / NOISE**2 / precision, precision**-0.5)
    torch.testing.assert_close(log_q, exact.log_prob(points), atol=1e-5, rtol=1e-5)
    # And that which is normalised by sampling.
    torch.manual_seed(0)
    log_z = proxy.log_partition(x, num_samples=20_000)
    estimate = proxy.log_unnormalized(x[None], x)[0] - log_z.value
    error = 4 * log_z.standard_error + 1e-5
    assert ((estimate - exact.log_prob(x[:, 0])).abs() < error).all()


def test_weighed_surrogates_of_a_linear_task_are_near_the_posterior():
    """Untrained, they know the likelihood that the network knows nothing of."""
    theta, x = simulate(1000)
    proxy = energy_nn(8, 1, likelihood="auto")(theta, x, PRIOR).eval()
    assert isinstance(proxy, PooledEnergy)
    theta, x = simulate(300)
    posterior = Independent(
        Normal(x / (1 + NOISE**2), (1 / (1 + NOISE**-2)) ** 0.5), 1
    ).log_prob(theta)

    def excess():
        torch.manual_seed(1)
        with torch.no_grad():
            log_q = proxy.log_prob(theta[None], x, num_samples=200)[0]
        return (posterior - log_q).mean().item()

    before = excess()
    # The network is the prior, which leaves out what the outputs tell.
    assert before == pytest.approx(math.log(1 + NOISE**-2), rel=0.25)
    at, outputs = simulate(300)
    points = torch.cat((at[None], PRIOR.sample((100, 300))))
    with torch.no_grad():
        factors = proxy.log_factors(points, outputs)
    weights = choose_weights(factors, torch.zeros(factors.shape[1:]))
    assert weights[0].item() == pytest.approx(1.0, abs=1e-3)  # it is zero everywhere
    # All of the same regression; the maf knows nothing yet.
    assert 0.75 < weights[1:4].sum() < 1.25
    assert_optimal(weights, factors, torch.zeros(factors.shape[1:]), 5e-3)
    proxy.weights.copy_(weights)
    assert abs(excess()) < 0.05


def test_weights_survive_the_state_dict_and_a_copy():
    """All factors and their weights are in the state."""
    proxy, other = randomized(), randomized(seed=1)
    proxy.weights.copy_(torch.tensor([0.3, 0.1, 0.7, 0.9, 1.2]))
    theta, x = PRIOR.sample((5, 7)), torch.randn(7, 2)
    expected = proxy(theta, x)
    assert not torch.allclose(other(theta, x), expected)
    twin = copy.deepcopy(proxy)
    other.load_state_dict(proxy.state_dict())
    proxy.reset_weights()
    for restored in (other, twin):
        assert torch.equal(restored.weights, torch.tensor([0.3, 0.1, 0.7, 0.9, 1.2]))
        assert torch.equal(restored(theta, x), expected)
        # No optimiser may learn them.
        assert "weights" in dict(restored.named_buffers())


def test_builder_pools_where_there_is_a_likelihood():
    """By default vectors of numbers have surrogates of their likelihood."""
    options: Any = ({}, {"likelihood": "auto"}, {"embedding_net": nn.Identity()})
    for kwargs in options:
        proxy = build(**kwargs)
        assert type(proxy) is PooledEnergy
        assert type(proxy.likelihoods) is SurrogateLikelihoods
        assert type(proxy.base) is PriorMeasure
        assert proxy.input_shape == proxy.condition_shape == (2,)
        # They have the parameters in the same units as the network.
        assert proxy.likelihoods.coordinates is proxy.net.coordinates
        assert len(proxy.weights) == 1 + len(proxy.likelihoods) == 5


def test_builder_does_not_pool_where_there_is_none():
    """Without a likelihood the proxy is a network, of the same kind as in a pool."""
    proxy = build(likelihood="none")
    assert type(proxy) is ConditionalEnergy
    pooled = build()
    names = {name for name in pooled.state_dict() if name.startswith("net.")}
    assert set(proxy.state_dict()) == names
    assert type(build(embedding_net=nn.Linear(2, 3))) is ConditionalEnergy
    theta = PRIOR.sample((100,))
    for shape in ((201,), (4, 4), (1, 8, 8)):
        proxy = energy_nn(8, 1, likelihood="auto")(
            theta, torch.randn(100, *shape), PRIOR
        )
        assert type(proxy) is ConditionalEnergy
        assert proxy.condition_shape == shape
    proxy = energy_nn(8, 1, likelihood="auto")(theta, torch.randn(100, 1), PRIOR)
    assert type(proxy) is PooledEnergy and len(proxy.weights) == 3


@pytest.mark.parametrize("likelihood", ["always", "", None, True])
def test_unknown_options_are_errors(likelihood):
    """The message says what there is."""
    with pytest.raises(ValueError, match="likelihood must be 'auto' or 'none', got"):
        energy_nn(likelihood=likelihood)
