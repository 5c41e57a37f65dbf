"""The refined posterior against Gaussians, whose products are known."""

import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from helpers import (
    DistributionFlow,
    LinearGaussianFlow,
    QuadraticEnergy,
    gaussian_proxy,
    gaussian_proxy_posterior,
    grid,
    log_integral,
)
from sbi.analysis import pairplot
from sbi.diagnostics import run_sbc
from sbi.inference import EnsemblePosterior
from sbi.inference.posteriors import DirectPosterior
from sbi.utils import BoxUniform
from torch import nn
from torch.distributions import MultivariateNormal

from sbi_jeffreys import JeffreysEstimator, RefinedPosterior, energy_nn
from sbi_jeffreys import posterior as posterior_module
from sbi_jeffreys.moves import metropolis_moves
from sbi_jeffreys.posterior import repeated_share, systematic_resampling
from sbi_jeffreys.refinement import sample_with_log_ratio

WIDE = MultivariateNormal(torch.zeros(2), 100 * torch.eye(2))
X = torch.tensor([[-1.0], [0.5], [2.0]])


def gaussian_estimator():
    """Return a Gaussian flow and a Gaussian proxy that differ by about a sigma."""
    flow = LinearGaussianFlow(
        torch.tensor([[1.0], [-0.5]]),
        torch.tensor([0.0, 0.3]),
        torch.tensor([[0.8, 0.0], [0.3, 0.7]]),
    )
    net = QuadraticEnergy(
        torch.tensor([[0.8], [-0.2]]),
        torch.tensor([0.3, 0.0]),
        torch.tensor([[1.5, 0.0], [-0.5, 1.2]]),
        shift=4.0,
    )
    return JeffreysEstimator(flow, gaussian_proxy(net))


def refined(estimator, x, exponent):
    """Return the exact refined posterior: a geometric mean of Gaussians."""
    p, net = estimator.flow, estimator.proxy.net
    precision_p = torch.linalg.inv(p.covariance())
    precision = (1 - exponent) * precision_p + exponent * net.precision()
    natural = (1 - exponent) * p.mean(x) @ precision_p
    natural = natural + exponent * net.mean(x) @ net.precision()
    mean = torch.linalg.solve(precision, natural.T).T
    return MultivariateNormal(mean.detach(), precision_matrix=precision.detach())


def assert_samples_of(samples, target, num_independent):
    """Compare mean and covariance with a Gaussian's, by their standard errors."""
    mean, covariance = target.mean, target.covariance_matrix
    variance = covariance.diagonal()
    assert (
        (samples.mean(0) - mean).abs() < 4.5 * (variance / num_independent).sqrt()
    ).all()
    # Var of an empirical covariance: (v_i v_j + c_ij^2) / n.
    error = ((variance.outer(variance) + covariance**2) / num_independent).sqrt()
    assert ((samples.T.cov() - covariance).abs() < 4.5 * error).all()


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_samples_of_a_product_of_gaussians(exponent):
    estimator = gaussian_estimator()
    posterior = RefinedPosterior(estimator, WIDE, exponent).set_default_x(X[:1])
    samples = posterior.sample((10_000,))
    assert samples.shape == (10_000, 2)
    ess = posterior.effective_sample_size(num_samples=40_000).item()
    assert_samples_of(samples, refined(estimator, X[0], exponent), min(1e4, ess))
    if exponent == 0.0:
        assert ess == pytest.approx(40_000)
    else:  # the flow alone would not have passed
        shift = (samples.mean(0) - estimator.flow.mean(X[0])).abs().max()
        assert shift > 0.05


@pytest.mark.parametrize("shape", [(), (7,), (3, 2)])
def test_shapes(shape):
    posterior = RefinedPosterior(gaussian_estimator(), WIDE, 1.0)
    assert posterior.sample(shape, x=X[0]).shape == (*shape, 2)
    assert posterior.sample(shape, x=X[:1]).shape == (*shape, 2)
    assert posterior.sample_batched(torch.Size(shape), X).shape == (*shape, 3, 2)


def test_observations_may_be_arrays():
    posterior = RefinedPosterior(gaussian_estimator(), WIDE, 1.0)
    for x in (X.numpy(), X.double(), X.double().numpy()):
        assert posterior.sample_batched((4,), x).shape == (4, 3, 2)
        assert posterior.sample((4,), x=x[:1]).dtype == torch.float32


def test_no_more_of_the_flow_is_sampled_than_its_weights_need(monkeypatch):
    drawn = []

    def count(flow, proxy, num_samples, x):
        drawn.append(num_samples)
        return sample_with_log_ratio(flow, proxy, num_samples, x)

    monkeypatch.setattr("sbi_jeffreys.posterior.sample_with_log_ratio", count)

    def num_drawn(exponent, num_samples, x=X[:1]):
        drawn.clear()
        posterior = RefinedPosterior(gaussian_estimator(), WIDE, exponent)
        posterior.sample_batched((num_samples,), x)
        return sum(drawn)

    # Equal weights: half of the four for each sample is more than enough.
    assert num_drawn(0.0, 1000) == 2000
    # A share of the weights is worth less than half.
    share = RefinedPosterior(gaussian_estimator(), WIDE, 1.0).effective_sample_size(X)
    assert (share < 5000).any()
    assert num_drawn(1.0, 4000, X) == 16_000
    # A few samples are drawn as some are.
    least = RefinedPosterior.min_num_samples
    assert num_drawn(0.0, 1) == num_drawn(0.0, 30) == num_drawn(0.0, least) == 200


def test_share_of_repeated_samples():
    log_weights = torch.tensor([[0.0, 0.0], [0.0, -torch.inf], [0.0, -torch.inf]])
    assert repeated_share(log_weights, 3).tolist() == pytest.approx([0, 2 / 3])
    assert repeated_share(log_weights, 6).tolist() == pytest.approx([0.5, 5 / 6])
    assert repeated_share(log_weights, 0).tolist() == [0, 0]
    assert repeated_share(torch.full((3, 1), -torch.inf), 2).tolist() == [1]
    # In the mean over its one random number, resampling repeats as many.
    torch.manual_seed(0)
    log_weights = 2 * torch.randn(500, 1)
    repeated = []
    for _ in range(200):
        chosen = systematic_resampling(log_weights, 200)
        repeated.append(1 - len(chosen.unique()) / 200)
    error = np.std(repeated) / 200**0.5
    share = repeated_share(log_weights, 200).item()
    assert 0.2 < share < 0.8
    assert np.mean(repeated) == pytest.approx(share, abs=4 * error)


def test_few_samples_have_as_many_of_the_flow_as_many_have(monkeypatch):
    drawn = []

    # One of ten samples of the flow counts.
    def tenth(flow, proxy, num, x):
        drawn.append(num)
        log_weights = torch.where(torch.arange(num) % 10 == 0, 0.0, -30.0)
        return torch.randn(num, len(x), 2), log_weights[:, None].expand(num, len(x))

    monkeypatch.setattr("sbi_jeffreys.posterior.sample_with_log_ratio", tenth)

    def num_drawn(num_samples, x=X[:1], **kwargs):
        drawn.clear()
        posterior = RefinedPosterior(gaussian_estimator(), WIDE, 1.0, **kwargs)
        posterior.sample_batched((num_samples,), x)
        return sum(drawn)

    assert num_drawn(1000) == 16_000  # of 8,000 eight hundred count
    assert num_drawn(8000) == 40_000
    assert num_drawn(8000, oversampling_factor=2) == 20_000
    assert num_drawn(30_000, oversampling_factor=2) == 60_000
    # Of many observations each has its share of what a call may draw.
    assert num_drawn(1000, X.repeat(2, 1)) == 4 * 1666
    assert num_drawn(1000, X.repeat(20, 1)) == 4000


def test_moves_are_as_many_as_repeated_samples_ask_for(monkeypatch):
    made = []

    def count(log_density, theta, num_moves, pool):
        made.append(num_moves)
        return metropolis_moves(log_density, theta, num_moves, pool)

    monkeypatch.setattr("sbi_jeffreys.posterior.metropolis_moves", count)
    estimator = gaussian_estimator()
    equal = RefinedPosterior(estimator, WIDE, 0.0)
    equal.sample((1000,), x=X[:1])
    assert made == []  # equal weights
    # Elsewhere flow and proxy disagree.
    uneven = RefinedPosterior(
        estimator, WIDE, 1.0, oversampling_factor=1, num_moves=100
    )
    log_weights = sample_with_log_ratio(
        estimator.flow, estimator.proxy, 200_000, X[2:]
    )[1]
    share = repeated_share(log_weights, 200_000).item()
    assert 0.1 < share < 0.8  # neither none of the moves nor all
    uneven.sample((10_000,), x=X[2:])
    assert made.pop() == pytest.approx(100 * share**0.5, abs=3)
    # None of a share that is small enough.
    uneven.max_repeated = 0.9
    uneven.sample((10_000,), x=X[2:])
    assert made == []


def ten_dimensional():
    """Return a posterior of N(0.4, 0.36 I) by a flow that says N(0, I), and itself."""
    flow = LinearGaussianFlow(torch.zeros(10, 1), torch.zeros(10), torch.eye(10))
    net = QuadraticEnergy(
        torch.zeros(10, 1), torch.full((10,), 0.4), torch.eye(10) / 0.6, shift=0.0
    )
    wide = MultivariateNormal(torch.zeros(10), 100 * torch.eye(10))
    posterior = RefinedPosterior(JeffreysEstimator(flow, gaussian_proxy(net)), wide, 1)
    return posterior, MultivariateNormal(torch.full((10,), 0.4), 0.36 * torch.eye(10))


@pytest.mark.parametrize(("num_samples", "num_calls"), [(1, 2000), (5, 400), (50, 40)])
def test_few_samples_at_many_observations_are_as_wide_as_many(num_samples, num_calls):
    posterior, target = ten_dimensional()
    torch.manual_seed(0)
    samples = posterior.sample_batched((num_samples,), torch.zeros(num_calls, 1))
    squares = (samples - target.mean).square().mean(-1) / 0.36
    # Samples of an observation have candidates in common: its mean counts as one.
    of_calls = squares.mean(0)
    error = of_calls.std().item() / num_calls**0.5
    # Moved by differences of themselves, five would be at 0.66.
    assert squares.mean().item() == pytest.approx(1, abs=4 * error)
    assert error < 0.02


def test_a_single_sample_is_as_good_as_many():
    posterior, target = ten_dimensional()
    torch.manual_seed(0)
    x = torch.zeros(1, 1)
    samples = torch.stack([posterior.sample((), x=x) for _ in range(150)])
    assert_samples_of(samples, target, 150)


def test_only_uneven_observations_move_and_a_batch_at_a_time(monkeypatch):
    asked, moved = [], []
    log_density = RefinedPosterior._log_density

    def record(self, theta, x):
        asked.append(theta.shape[:2].numel())
        return log_density(self, theta, x)

    def count(log_density, theta, num_moves, pool):
        moved.append(theta.shape[1])
        return metropolis_moves(log_density, theta, num_moves, pool)

    monkeypatch.setattr(RefinedPosterior, "_log_density", record)
    monkeypatch.setattr("sbi_jeffreys.posterior.metropolis_moves", count)
    posterior = RefinedPosterior(
        gaussian_estimator(), WIDE, 1.0, max_sampling_batch_size=500
    )
    # Flow and proxy agree at the second and the third.
    x = torch.tensor([[-1.5], [0.5], [1.0], [-2.0]])
    torch.manual_seed(0)
    samples = posterior.sample_batched((2000,), x)
    assert moved == [2]
    assert max(asked) <= 500 and sum(asked) >= 2 * 2000 * 2
    for index in range(4):
        target = refined(posterior.posterior_estimator, x[index], 1.0)
        # Of the last, the candidates are worth about so many.
        assert_samples_of(samples[:, index], target, 200)


@pytest.mark.filterwarnings("ignore:The importance weights have collapsed")
def test_a_prior_that_hardly_a_sample_of_the_flow_lies_in():
    estimator = gaussian_estimator()
    torch.manual_seed(0)
    flow = estimator.flow.sample(torch.Size((100_000,)), X[:1])[:, 0, 0]
    edge = flow.quantile(0.997).item()
    prior = BoxUniform(torch.tensor([edge, -50.0]), 50 * torch.ones(2))
    posterior = RefinedPosterior(estimator, prior, 0.0)
    # Among the first two hundred there is often none.
    for _ in range(20):
        assert (posterior.sample((3,), x=X[:1])[:, 0] >= edge).all()


def test_every_observation_has_its_own_samples():
    estimator = gaussian_estimator()
    posterior = RefinedPosterior(estimator, WIDE, 1.0)
    # Several batches of proposals, which must not mix the observations.
    posterior.max_sampling_batch_size = 5000
    samples = posterior.sample_batched((10_000,), X)
    ess = posterior.effective_sample_size(X, num_samples=40_000)
    assert ess.shape == (3,)
    for i, x in enumerate(X):
        assert_samples_of(
            samples[:, i], refined(estimator, x, 1.0), min(1e4, ess[i].item())
        )


@pytest.mark.parametrize("exponent", [0.0, 0.4, 1.0])
def test_log_prob_of_a_product_of_gaussians(exponent):
    estimator = gaussian_estimator()
    posterior = RefinedPosterior(estimator, WIDE, exponent)
    target = refined(estimator, X[1], exponent)
    theta = target.sample((20,))
    log_prob = posterior.log_prob(theta, x=X[1:2], num_samples=50_000)
    assert not log_prob.requires_grad
    error = (1 / posterior.effective_sample_size(X[1:2], 50_000)).sqrt().item()
    difference = log_prob - target.log_prob(theta)
    torch.testing.assert_close(
        difference, torch.zeros(20), atol=4 * error + 1e-4, rtol=0
    )
    # The error is one of the constant.
    assert difference.std() < 1e-4
    potential = posterior.log_prob(theta, x=X[1:2], norm_posterior=False)
    torch.testing.assert_close(posterior.potential(theta, x=X[1:2]), potential)
    assert (potential - log_prob).std() < 1e-4


@pytest.mark.parametrize("exponent", [0.0, 0.4, 1.0])
def test_log_prob_of_several_observations(exponent):
    estimator = gaussian_estimator()
    posterior = RefinedPosterior(estimator, WIDE, exponent)
    theta = torch.randn(5, len(X), 2)
    log_prob = posterior.log_prob_batched(theta, X, num_samples=50_000)
    raw = posterior.log_prob_batched(theta, X, norm_posterior=False)
    assert log_prob.shape == raw.shape == (5, len(X))
    assert not log_prob.requires_grad
    errors = posterior.effective_sample_size(X, 50_000).rsqrt()
    for i, x in enumerate(X):
        expected = refined(estimator, x, exponent).log_prob(theta[:, i])
        assert (log_prob[:, i] - expected).abs().max() < 4 * errors[i] + 1e-4
        one = posterior.log_prob(theta[:, i], x=x[None], norm_posterior=False)
        torch.testing.assert_close(raw[:, i], one)
    # Shapes are those of sbi's posterior.
    direct = DirectPosterior(estimator, WIDE)
    for given in (theta, theta[0]):
        options = {"norm_posterior": False, "track_gradients": True}
        ours = posterior.log_prob_batched(given, X, **options)
        theirs = direct.log_prob_batched(given, X, **options)
        assert ours.shape == theirs.shape
        assert ours.requires_grad == theirs.requires_grad
        if exponent == 0:
            torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="each of 3 observations.* got them for 2"):
        posterior.log_prob_batched(theta[:, :2], X)
    bounded = RefinedPosterior(estimator, BoxUniform(-torch.ones(2), torch.ones(2)))
    beyond = bounded.log_prob_batched(torch.full((3, 2), 1.5), X)
    assert torch.isneginf(beyond).all()


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("dim", [1, 2])
def test_density_integrates_to_one_on_the_prior(dim, exponent):
    prior = BoxUniform(-torch.ones(dim), torch.ones(dim))
    theta = prior.sample((200,))
    # With noise: without it the energy has a step that the grid does not resolve.
    proxy = energy_nn(20, 1)(theta, theta[:, :1] + 0.2 * torch.randn(200, 1), prior)
    nn.init.normal_(proxy.net.final_layer.weight)
    # The flow leaks a good part beyond the prior.
    flow = LinearGaussianFlow(
        torch.ones(dim, 1), torch.full((dim,), 0.3), 0.6 * torch.eye(dim)
    )
    posterior = RefinedPosterior(JeffreysEstimator(flow, proxy), prior, exponent)
    posterior.set_default_x(torch.tensor([[0.4]]))
    points, cell = grid(-1, 1, 2000 if dim == 1 else 100, dim)
    log_prob = posterior.log_prob(points.float(), num_samples=50_000)
    assert torch.isfinite(log_prob).all()
    ess = posterior.effective_sample_size(num_samples=50_000).item()
    # What leaks counts against it.
    assert ess < 0.95 * 50_000
    assert abs(log_integral(log_prob, cell)) < 4 / ess**0.5 + 1e-3
    outside = torch.full((2, dim), 1.5)
    outside[1, 0] = -3.0
    assert posterior.log_prob(outside).tolist() == [-torch.inf, -torch.inf]
    assert posterior.log_prob(outside[:1]).tolist() == [-torch.inf]
    samples = posterior.sample((2000,))
    assert (samples.abs() <= 1).all()


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (4.0, 0.3)])
def test_density_is_normalised_where_the_flow_has_no_samples(mean, scale):
    flow = LinearGaussianFlow(torch.zeros(1, 1), torch.zeros(1), torch.eye(1))
    net = QuadraticEnergy(
        torch.zeros(1, 1), torch.tensor([mean]), torch.eye(1) / scale, shift=2.0
    )
    prior = MultivariateNormal(torch.zeros(1), 9 * torch.eye(1))
    estimator = JeffreysEstimator(flow, gaussian_proxy(net, prior))
    posterior = RefinedPosterior(estimator, prior, 1.0)
    target, _ = gaussian_proxy_posterior(net, torch.zeros(1, 1), prior)
    theta = target.sample((5,))[:, 0]
    torch.manual_seed(0)
    # Of ten thousand samples of the flow less than two lie there.
    torch.testing.assert_close(
        posterior.log_prob(theta, x=torch.zeros(1, 1)),
        target.log_prob(theta),
        atol=0.15,
        rtol=0,
    )


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_a_prior_narrower_than_the_proxy(exponent):
    # As after training without a prior, with one given to build_posterior.
    prior = BoxUniform(-torch.ones(2), torch.ones(2))
    posterior = RefinedPosterior(gaussian_estimator(), prior, exponent)
    posterior.set_default_x(X[:1])
    points, cell = grid(-1, 1, 100, 2)
    log_prob = posterior.log_prob(points.float(), num_samples=50_000)
    ess = posterior.effective_sample_size(num_samples=50_000).item()
    assert abs(log_integral(log_prob, cell)) < 4 / ess**0.5 + 1e-3
    assert torch.isneginf(posterior.log_prob(torch.tensor([[1.1, 0.0]]))).all()
    assert (posterior.sample((1000,)).abs() <= 1).all()


def test_effective_sample_size_in_closed_form():
    # Weights of N(m, 1) over N(0, 1): E[w] = 1, E[w^2] = exp(m^2).
    flow = LinearGaussianFlow(torch.zeros(1, 1), torch.zeros(1), torch.eye(1))
    net = QuadraticEnergy(torch.zeros(1, 1), torch.tensor([0.5]), torch.eye(1))
    prior = MultivariateNormal(torch.zeros(1), 100 * torch.eye(1))
    posterior = RefinedPosterior(
        JeffreysEstimator(flow, gaussian_proxy(net)), prior, 1.0
    )
    ess = posterior.effective_sample_size(torch.zeros(1, 1), num_samples=100_000)
    assert ess.item() / 100_000 == pytest.approx(math.exp(-0.25), rel=0.02)
    # Half the exponent halves the shift in log w: E[w] = exp(-m^2/8), ...
    posterior = RefinedPosterior(
        JeffreysEstimator(flow, gaussian_proxy(net)), prior, 0.5
    )
    ess = posterior.effective_sample_size(torch.zeros(1, 1), num_samples=100_000)
    assert ess.item() / 100_000 == pytest.approx(math.exp(-0.0625), rel=0.02)


def test_exponent_of_the_estimator_is_the_default():
    estimator = gaussian_estimator()
    estimator.exponent = 0.7
    assert RefinedPosterior(estimator, WIDE).exponent == pytest.approx(0.7)
    assert RefinedPosterior(estimator, WIDE, 0.0).exponent == 0.0


def test_map_is_the_mode():
    estimator = gaussian_estimator()
    posterior = RefinedPosterior(estimator, WIDE, 0.5).set_default_x(X[2:])
    mode = posterior.map(num_init_samples=50, num_to_optimize=5, num_iter=300)
    assert mode.shape == (1, 2)
    torch.testing.assert_close(
        mode[0], refined(estimator, X[2], 0.5).mean, atol=0.02, rtol=0
    )
    assert torch.equal(posterior.map(), mode)  # kept until x changes


def test_collapsed_weights_are_reported():
    estimator = gaussian_estimator()
    with torch.no_grad():
        estimator.proxy.net.center += 6.0
    posterior = RefinedPosterior(estimator, WIDE, 1.0)
    with pytest.warns(UserWarning, match="importance weights have collapsed") as caught:
        posterior.sample((500,), x=X[:1])
    message = str(caught[0].message)
    assert "sample_with='direct'" in message  # what to do
    assert caught[0].filename == __file__  # said of the user's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RefinedPosterior(gaussian_estimator(), WIDE, 1.0).sample((500,), x=X[:1])


def test_a_flow_beyond_the_prior_is_an_error():
    prior = BoxUniform(-torch.ones(2), torch.ones(2))
    estimator = gaussian_estimator()
    with torch.no_grad():
        estimator.flow.bias += 100.0
    posterior = RefinedPosterior(estimator, prior, 1.0)
    with pytest.raises(RuntimeError, match="outside the prior's support"):
        posterior.sample((10,), x=X[:1])
    with pytest.raises(RuntimeError, match="outside the prior's support"):
        posterior.sample_batched((10,), X)
    # One bad observation among many can be found.
    far = torch.zeros(5, *X.shape[1:])
    far[3] = 1e3
    posterior = RefinedPosterior(gaussian_estimator(), prior, 0.0)
    with pytest.raises(RuntimeError, match=r"at 1 of 5 observations \(number 3\)"):
        posterior.sample_batched((10,), far)


def test_the_exponent_is_that_of_samples_and_densities():
    posterior = RefinedPosterior(gaussian_estimator(), WIDE, 0.3)
    assert posterior.exponent == posterior.potential_fn.exponent == 0.3
    with pytest.raises(AttributeError):
        posterior.exponent = 0.5


def test_samples_in_batches_as_sbi_calls_them(monkeypatch):
    posterior = RefinedPosterior(gaussian_estimator(), WIDE, 1.0)
    sizes = []
    draw = posterior_module.sample_with_log_ratio

    def noted(flow, proxy, num_samples, x):
        sizes.append(num_samples * len(x))
        return draw(flow, proxy, num_samples, x)

    monkeypatch.setattr(posterior_module, "sample_with_log_ratio", noted)
    ensemble = EnsemblePosterior([posterior, posterior])
    for call in (
        lambda **given: posterior.sample((1000,), x=X[:1], **given),
        lambda **given: posterior.sample_batched((1000,), X, **given),
        lambda **given: ensemble.sample((1000,), x=X[:1], **given),
    ):
        sizes.clear()
        assert call().shape[0] == 1000 and max(sizes) > 300
        sizes.clear()
        assert call(max_sampling_batch_size=300).shape[0] == 1000
        assert max(sizes) <= 300 and sum(sizes) >= 2000


@pytest.mark.parametrize("factor", [1.5, 0.5, -2])
def test_candidates_are_a_whole_multiple_of_the_samples(factor):
    with pytest.raises(ValueError, match=f"whole number of at least 1, got {factor}"):
        RefinedPosterior(gaussian_estimator(), WIDE, oversampling_factor=factor)


def test_sbi_takes_it_for_a_posterior():
    estimator = gaussian_estimator()
    posterior = RefinedPosterior(estimator, WIDE, 1.0).set_default_x(X[:1])
    copy = pickle.loads(pickle.dumps(posterior))
    torch.manual_seed(1)
    samples = posterior.sample((100,))
    torch.manual_seed(1)
    assert torch.equal(copy.sample((100,)), samples)
    assert "RefinedPosterior" in str(posterior)

    # Calibration: parameters of the posterior's own have uniform ranks.
    x = X.repeat(40, 1)
    theta = posterior.sample_batched((1,), x)[0]
    ranks, _ = run_sbc(
        theta, x, posterior, num_posterior_samples=50, show_progress_bar=False
    )
    assert ranks.shape == (120, 2)
    uniform_error = 50 / math.sqrt(12 * 120)
    assert ((ranks.double().mean(0) - 25).abs() < 4 * uniform_error).all()

    ensemble = EnsemblePosterior([posterior, copy]).set_default_x(X[:1])
    assert ensemble.sample((20,)).shape == (20, 2)
    assert torch.isfinite(ensemble.log_prob(samples[:5])).all()

    figure, _ = pairplot(samples)
    figure.clear()


def test_it_moves():
    posterior = RefinedPosterior(gaussian_estimator(), WIDE, 1.0).set_default_x(X[:1])
    posterior.to("cpu")
    assert posterior.sample((3,)).shape == (3, 2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: RefinedPosterior(gaussian_estimator().flow, WIDE),
            TypeError,
            "got LinearGaussianFlow",
        ),
        (
            lambda: RefinedPosterior(gaussian_estimator(), WIDE, 1.2),
            ValueError,
            "exponent must be between 0 and 1, got 1.2",
        ),
        (
            lambda: RefinedPosterior(gaussian_estimator(), WIDE, oversampling_factor=0),
            ValueError,
            "oversampling_factor must be a whole number of at least 1, got 0",
        ),
        (
            lambda: RefinedPosterior(gaussian_estimator(), WIDE, 1.0).sample((3,), x=X),
            ValueError,
            "One observation is expected, got 3.*sample_batched",
        ),
        (
            lambda: RefinedPosterior(gaussian_estimator(), WIDE, 1.0).sample((3,)),
            ValueError,
            "set_default_x",
        ),
        (
            lambda: RefinedPosterior(gaussian_estimator(), WIDE, 1.0).sample(
                (3,), x=torch.zeros(1, 4)
            ),
            RuntimeError,
            r"Expected trailing dimensions \(1,\), but got \(4,\)",
        ),
        (
            lambda: RefinedPosterior(gaussian_estimator(), WIDE, 1.0).log_prob(
                torch.zeros(2, 3), x=X[:1]
            ),
            (ValueError, AssertionError, RuntimeError),
            "3",
        ),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


class TestSystematicResampling:
    weights = torch.tensor([[0.1, 0.0, 0.45, 0.05, 0.4], [1.0, 1.0, 1.0, 0.0, 0.0]]).T

    def counts(self, num_samples):
        index = systematic_resampling(self.weights.log(), num_samples)
        assert index.shape == (num_samples, 2)
        return torch.stack([torch.bincount(column, minlength=5) for column in index.T])

    def test_counts_are_unbiased_and_nearly_exact(self):
        shares = (self.weights / self.weights.sum(0)).T.double()
        total = torch.zeros(2, 5)
        for _ in range(2000):
            counts = self.counts(7)
            assert (counts >= (7 * shares - 1e-6).floor()).all()
            assert (counts <= (7 * shares + 1e-6).ceil()).all()
            total += counts
        # Each count is one of two neighbours: a variance of a quarter at most.
        error = 0.5 / 2000**0.5
        torch.testing.assert_close(
            total.double() / 2000, 7 * shares, atol=4 * error, rtol=0
        )

    def test_order_is_random(self):
        index = systematic_resampling(torch.zeros(1000, 1), 1000).squeeze(1)
        assert not torch.equal(index, torch.arange(1000))
        assert torch.equal(index.sort().values, torch.arange(1000))
        correlation = torch.corrcoef(torch.stack((index, torch.arange(1000))).double())
        assert abs(correlation[0, 1]) < 4 / 1000**0.5

    def test_one_weight_takes_all(self):
        log_weights = torch.full((6, 1), -torch.inf)
        log_weights[4] = -1000.0
        assert (systematic_resampling(log_weights, 9) == 4).all()


def test_a_flow_without_parameters_of_its_own():
    # What sbi asks of an estimator is enough: no attribute of nflows or zuko.
    flow = DistributionFlow(MultivariateNormal(torch.zeros(2), torch.eye(2)))
    net = QuadraticEnergy(torch.zeros(2, 1), torch.zeros(2), torch.eye(2))
    posterior = RefinedPosterior(
        JeffreysEstimator(flow, gaussian_proxy(net)), WIDE, 1.0
    )
    assert posterior.sample((5,), x=X[:1]).shape == (5, 2)
    assert posterior.effective_sample_size(X[:1], 100).item() == pytest.approx(100)
