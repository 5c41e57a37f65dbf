"""The last stage: conditions that a surrogate makes up, and the proxy's samples."""

import math
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    LinearGaussianFlow,
    QuadraticEnergy,
    assert_equal,
    gaussian_proxy,
    gaussian_proxy_posterior,
    grid,
    identical,
    interrupt_before,
    make,
    outcome,
    simulate,
    train,
)
from sbi.utils import BoxUniform
from scipy import stats
from torch.distributions import MultivariateNormal

from sbi_jeffreys import (
    AdaptiveWeights,
    FixedWeights,
    JeffreysObjective,
    energy_nn,
    trainer,
)
from sbi_jeffreys.base_measure import make_base_measure
from sbi_jeffreys.coordinates import ResidualCoordinates
from sbi_jeffreys.energy import ConditionalEnergy
from sbi_jeffreys.features import Features
from sbi_jeffreys.likelihood import (
    IndependentLikelihood,
    SurrogateLikelihoods,
)
from sbi_jeffreys.objective import Divergences
from sbi_jeffreys.stages import Stage
from sbi_jeffreys.weights import ValidationDivergences

pytestmark = pytest.mark.filterwarnings(
    "ignore:Maximum number of epochs",
    "ignore:Training was interrupted",
    "ignore:When the inference object is pickled",
)

# ----------------------------------------------------------- inverse of normal scores


def skewed(num=2000):
    """Return outputs of several units, shapes and tails, and one that is discrete."""
    e = torch.randn(num, 4)
    columns = (e[:, 0], 3e3 + 20 * e[:, 1].exp(), e[:, 2] ** 3, 1e-5 * e[:, 3])
    return torch.stack((*columns, torch.arange(num) % 2), 1)


def test_values_have_the_normal_scores_that_they_were_asked_for():
    x = skewed()
    features = Features(x)
    x = x[:, :4]
    error = 1e-5 * (x.std(0) + x.mean(0).abs())
    y = features.normal_scores(torch.cat((x, x[:, :1]), 1))
    # Back and forth, from either side.
    assert ((features.from_normal_scores(y) - x).abs() < error).all()
    y = torch.linspace(-2.5, 2.5, 51).unsqueeze(1) + torch.tensor([0.0, 0.1, -0.1, 0.2])
    there = features.from_normal_scores(y)
    back = features.normal_scores(torch.cat((there, there[:, :1]), 1))
    torch.testing.assert_close(back, y, atol=2e-3, rtol=0)
    # As many simulations lie below as the normal distribution says.
    levels = torch.linspace(0.01, 0.99, 99)
    scores = torch.from_numpy(stats.norm.ppf(levels.double().numpy())).float()
    found = features.from_normal_scores(scores.unsqueeze(1).repeat(1, 4))
    below = (x < found.unsqueeze(1)).float().mean(1)
    error = (below - levels.unsqueeze(1)).abs()
    assert error.max() < 0.015  # between two knots there are up to three hundredths
    assert error.mean() < 0.002


def test_values_stay_within_the_range_of_the_simulations():
    x = skewed()
    features = Features(x)
    x = x[:, :4]
    error = 2e-6 * (x.std(0) + x.mean(0).abs())
    ends = torch.tensor([-torch.inf, -10.0, 10.0, torch.inf])
    found = features.from_normal_scores(ends.unsqueeze(1).repeat(1, 4))
    assert ((found[:2] - x.amin(0)).abs() < error).all()
    assert ((found[2:] - x.amax(0)).abs() < error).all()
    y = torch.linspace(-6, 6, 400).unsqueeze(1).repeat(1, 4)
    assert (features.from_normal_scores(y).diff(dim=0) >= 0).all()


def test_tied_values_have_the_inverse_of_all_their_ranks():
    # Half of them zero, the rest beyond.
    x = torch.cat((torch.zeros(500), 1 + torch.rand(500))).unsqueeze(1)
    features = Features(x)
    found = features.from_normal_scores(torch.tensor([[-9.0], [-3.0], [-0.68]]))
    assert (found == 0).all()
    assert features.from_normal_scores(torch.tensor([[0.1]])) > 1


# ------------------------------------------------------------------ samples of outputs


MIXING = torch.tensor([[1.0, 0.5], [0.0, 1.0], [-0.7, 0.4]])
# Correlated, so that the whitening is not diagonal.
NOISE = torch.tensor([[0.3, 0.0, 0.0], [0.2, 0.3, 0.0], [-0.1, 0.1, 0.4]])
POINTS = torch.tensor([[0.0, 0.0], [0.8, -0.6], [-1.0, 0.5]])


def linear(num=4000):
    """Return parameters and outputs that are linear in them, with Gaussian noise."""
    theta = torch.randn(num, 2)
    return theta, theta @ MIXING.T + torch.randn(num, 3) @ NOISE.T


def build(theta, x):
    coordinates = ResidualCoordinates(theta, x, Features(x))
    return SurrogateLikelihoods(theta, x, coordinates).eval()


def first(surrogates):
    member = surrogates.members[0]
    assert isinstance(member, IndependentLikelihood)
    return member


def test_untrained_it_samples_student_t_about_the_regression():
    theta, x = linear()
    surrogates = build(theta, x)
    for point in POINTS:
        samples = surrogates.sample(point.repeat(20_000, 1))
        assert samples.shape == (20_000, 3)
        # With 8 degrees of freedom the variance is 8 / 6 of the residuals'.
        covariance = 8 / 6 * NOISE @ NOISE.T
        std = covariance.diagonal().sqrt()
        errors = samples - MIXING @ point
        # Regression and distribution functions are those of 4000 simulations.
        assert (errors.mean(0).abs() < 0.12 * std).all()
        found = torch.cov(samples.T)
        scale = std[:, None] * std
        assert ((found - covariance).abs() < 0.12 * scale).all()
        assert (samples >= x.amin(0) - 1e-4).all()
        assert (samples <= x.amax(0) + 1e-4).all()
    # Tails are those of Student, and scores show them unbent: Kolmogorov's distance.
    theta, x = linear()
    x = x[:, :1]
    surrogates = build(theta, x)
    samples = surrogates.sample(torch.zeros(20_000, 2))
    y = Features(x).normal_scores(samples)[:, 0].double().numpy()
    all_y = Features(x).normal_scores(x)[:, 0]
    regressors = torch.cat((theta, Features(theta)(theta)), 1)
    design = torch.cat((regressors, torch.ones(len(x), 1)), 1).double().numpy()
    solution, *_ = np.linalg.lstsq(design, all_y.double().numpy(), rcond=None)
    scale = (all_y.double().numpy() - design @ solution).std()
    at_zero = torch.cat((torch.zeros(1, 2), Features(theta)(torch.zeros(1, 2))), 1)
    location = np.append(at_zero.double().numpy()[0], 1.0) @ solution
    exact = stats.t(8, location, scale)
    assert stats.kstest(y, exact.cdf).statistic < 0.02
    assert stats.kstest(y, stats.norm(location, exact.std()).cdf).statistic > 0.02


def test_samples_of_the_scores_have_the_density_of_the_surrogate():
    """Whatever the network says: moments of samples are those of its density."""
    theta, x = linear(500)
    surrogates = build(theta, x[:, :2])
    member = first(surrogates)
    with torch.no_grad():
        for parameter in member.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    points, cell = grid(-25, 25, 500, 2)
    points = points.float()
    none = torch.empty(len(points), 0, dtype=torch.long)
    means, integrals = [], []
    for z in POINTS:
        with torch.no_grad():
            log_density = member(z.expand(1, len(points), 2), points, none)[0]
            samples, categories = member.sample(z.expand(20_000, 2))
        assert categories.shape == (20_000, 0)
        weights = log_density.exp() * cell
        integrals.append(weights.sum().item())
        weights = weights / integrals[-1]

        def functions(y):
            # Bounded, and so indifferent to the tails.
            parts = [f(c * y / 2) for f in (torch.sin, torch.cos) for c in (1, 3)]
            parts.append((y[:, :1] * y[:, 1:] / 4).sin())
            return torch.cat(parts, 1)

        expected = (weights[:, None] * functions(points)).sum(0)
        found = functions(samples)
        error = found.std(0) / math.sqrt(len(found))
        assert ((found.mean(0) - expected).abs() < 4 * error + 2e-3).all()
        means.append(expected)
    assert (means[0] - means[1]).abs().max() > 0.1
    # Known up to a constant, and none of it beyond the grid.
    assert max(integrals) / min(integrals) == pytest.approx(1, abs=0.01)


def test_discrete_outputs_have_the_probabilities_of_the_categories():
    theta = torch.randn(600, 2)
    x = torch.stack(
        [
            torch.tensor([-1.0, 2.5, 7.0])[torch.randint(0, 3, (600,))],
            torch.bernoulli(torch.full((600,), 0.5)),
        ],
        1,
    )
    surrogates = build(theta, x)
    # Untrained: every value that an output has is as probable, others impossible.
    for column, values in ((0, (-1.0, 2.5, 7.0)), (1, (0.0, 1.0))):
        samples = surrogates.sample(torch.zeros(9000, 2))[:, column]
        assert samples.unique().tolist() == list(values)
        for value in values:
            p = 1 / len(values)
            share = (samples == value).float().mean().item()
            assert share == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 9000))
    # They are what the logits say, at every parameter by itself.
    with torch.no_grad():
        for parameter in first(surrogates).parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        num, chances = 9000, []
        every = torch.cartesian_prod(torch.tensor([-1.0, 2.5, 7.0]), torch.arange(2.0))
        for point in POINTS:
            log_p = surrogates(point.expand(1, 6, 2), every, [0])[0, 0]
            samples = surrogates.sample(point.expand(num, 2))
            same = (samples[:, None] == every).all(-1).float().mean(0)
            p = log_p.exp()
            assert p.sum().item() == pytest.approx(1, abs=1e-5)
            assert ((same - p).abs() < 4 * (p * (1 - p) / num).sqrt()).all()
            chances.append(p)
    assert (chances[0] - chances[1]).abs().max() > 0.05


@pytest.mark.parametrize(("low", "step"), [(0.0, 1.0), (-40.0, 2.0), (3.0, 0.25)])
def test_counts_come_back_on_their_lattice(low, step):
    theta = torch.randn(2000, 2)
    x = low + step * torch.poisson(30 * (0.3 * theta[:, :1]).exp())
    surrogates = build(theta, x)
    points = POINTS.repeat_interleave(4000, 0)
    samples = surrogates.sample(points)
    steps = (samples - low) / step
    assert torch.equal(steps, steps.round())
    assert samples.min() >= x.min()
    assert samples.max() <= x.max()
    assert len(samples.unique()) > 30
    for point, found in zip(POINTS, steps.split(4000), strict=True):
        rate = 30 * math.exp(0.3 * point[0])
        assert found.mean().item() == pytest.approx(rate, abs=0.25 * math.sqrt(rate))
        # Student-t has 8 / 6 of the variance, and of skewed scores it is a guess.
        assert 0.8 < found.std().item() / math.sqrt(rate) < 1.6


def test_columns_of_all_kinds_come_back_in_order():
    theta, x = linear(2000)
    coin = torch.bernoulli((theta[:, 1:]).sigmoid())
    values = torch.tensor([-1.0, 2.5, 7.0])[torch.randint(0, 3, (2000, 1))]
    counts = torch.poisson(100 * (0.2 * theta[:, :1]).exp())
    x = torch.cat(
        (coin, x[:, :1], torch.full((2000, 1), 3.25), counts, values, 50 + x[:, 1:2]), 1
    )
    surrogates = build(theta, x)
    samples = surrogates.sample(theta)
    assert samples.shape == x.shape
    assert samples.isfinite().all()
    assert (samples >= x.amin(0) - 1e-4).all()
    assert (samples <= x.amax(0) + 1e-4).all()
    assert set(samples[:, 0].tolist()) == {0.0, 1.0}
    assert (samples[:, 2] == 3.25).all()
    assert torch.equal(samples[:, 3], samples[:, 3].round())
    assert set(samples[:, 4].tolist()) == {-1.0, 2.5, 7.0}
    # Every continuous column goes with what its own depends on, and with no other's.
    for column, mean, std in (
        (1, theta @ MIXING[0], 0.3),
        (3, 100 * (0.2 * theta[:, 0]).exp(), 10.0),
        (5, 50 + theta @ MIXING[1], 0.36),
    ):
        error = samples[:, column] - mean
        assert error.abs().median() < 1.2 * std
        assert error.std() < 1.5 * std
        assert error.mean().abs() < 0.2 * std
    # The same numbers are drawn at the same parameters, in whatever batch.
    torch.manual_seed(3)
    again = surrogates.sample(theta)
    torch.manual_seed(3)
    assert torch.equal(again, surrogates.sample(theta))
    assert not torch.equal(again, samples)


@pytest.mark.parametrize("kind", ["continuous", "discrete", "missing"])
def test_outputs_of_one_kind_are_finite_and_within_their_range(kind):
    theta, x = linear(500)
    if kind == "discrete":
        x = x.sign()
    if kind == "missing":
        x[::3, 0] = torch.nan
        x[1::3, 1] = torch.inf
        x[:, 2] = -torch.inf
    known = x.nan_to_num(nan=torch.nan, posinf=torch.nan, neginf=torch.nan)
    known[:, known.isnan().all(0)] = 0.0  # of what is never seen, a constant
    surrogates = build(theta, x)
    # Parameters far beyond all simulations, too.
    far = torch.tensor([[1e6, -1e6], [-1e3, 1e3], [9.0, 9.0]])
    samples = surrogates.sample(torch.cat((theta, far)))
    assert samples.shape == (503, 3)
    assert samples.isfinite().all()
    low, high = known.nan_to_num(nan=torch.inf), known.nan_to_num(nan=-torch.inf)
    assert (samples >= low.amin(0) - 1e-4).all()
    assert (samples <= high.amax(0) + 1e-4).all()


# ---------------------------------------------------------------- samples of the proxy


def narrow_net():
    """A correlated Gaussian, narrow beside all proposals."""
    covariance = torch.tensor([[0.09, 0.08], [0.08, 0.16]])
    root = torch.linalg.cholesky(torch.linalg.inv(covariance))
    return QuadraticEnergy(torch.zeros(2, 1), torch.tensor([1.0, -0.5]), root, 0.7)


def share_of_unique(theta):
    """Return the share of different samples, at the average condition."""
    counts = [len(theta[:, i].unique(dim=0)) for i in range(50)]
    return sum(counts) / (50 * len(theta))


@pytest.mark.parametrize("with_prior", [False, True])
def test_moved_samples_are_those_of_the_proxy(with_prior):
    """Where few proposals hit, plain resampling repeats them, and is off."""
    prior = MultivariateNormal(torch.zeros(2), torch.eye(2)) if with_prior else None
    net = narrow_net()
    proxy, x = gaussian_proxy(net, prior), torch.zeros(2000, 1)
    with torch.no_grad():
        q, exact_log_z = gaussian_proxy_posterior(net, x[:1], prior)
    flow = LinearGaussianFlow(torch.zeros(2, 1), torch.zeros(2), torch.eye(2))
    sampler = JeffreysObjective(64, 64)

    def draw(num_moves):
        torch.manual_seed(0)
        proposals = sampler.propose(flow, proxy, x)
        samples = sampler.sample_proxy(proxy, x, proposals, 64, num_moves)
        whitened = torch.linalg.solve_triangular(
            q.scale_tril[0], (samples.theta - q.mean[0]).unsqueeze(-1), upper=False
        ).squeeze(-1)
        # Of two functions each, mean over the samples of a condition: of these the
        # conditions are independent.
        products = whitened[..., [0, 1, 0]] * whitened[..., [0, 1, 1]]
        means = torch.cat((whitened, products), -1).mean(0)
        return samples, means.mean(0), means.std(0) / math.sqrt(len(x))

    expected = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0])
    plain, plain_moments, _ = draw(0)
    assert share_of_unique(plain.theta) < 0.4
    assert (plain_moments - expected)[2:4].max() > 0.02
    samples, moments, error = draw(10)
    assert samples.theta.shape == (64, 2000, 2)
    assert share_of_unique(samples.theta) > 0.9
    assert ((moments - expected).abs() < 4 * error + 0.01).all()
    assert error.max() < 0.02
    # Samples come with their own density, up to the estimate of log Z.
    with torch.no_grad():
        log_q = q.log_prob(samples.theta) + exact_log_z
    total = samples.log_prob + samples.log_partition
    torch.testing.assert_close(total, log_q.expand_as(total), atol=1e-3, rtol=1e-4)
    log_z = samples.log_partition
    assert (log_z.mean() - exact_log_z).abs() < 4 * log_z.std() / math.sqrt(2000) + 0.05
    assert not samples.theta.requires_grad and not samples.log_prob.requires_grad


def test_moves_respect_every_condition_and_the_support():
    """A Gaussian cut off by the box, elsewhere at every condition: scipy's."""
    box = BoxUniform(-2 * torch.ones(1), 2 * torch.ones(1))
    net = QuadraticEnergy(
        torch.ones(1, 1), torch.zeros(1), torch.tensor([[2.0]]), shift=-3.0
    )
    base = make_base_measure("prior", box, box.sample((500,)))
    proxy = ConditionalEnergy(net, base, torch.Size([1]), torch.Size([1]))
    centers = torch.tensor([[-1.9], [0.3], [2.5]])
    x = centers.repeat(400, 1)
    # A flow that leaks, and is elsewhere.
    flow = LinearGaussianFlow(-torch.ones(1, 1), torch.ones(1), 0.8 * torch.eye(1))
    sampler = JeffreysObjective(50, 50)
    proposals = sampler.propose(flow, proxy, x)
    samples = sampler.sample_proxy(proxy, x, proposals, 50, 8)
    assert (samples.theta.abs() <= 2).all()
    assert samples.log_prob.isfinite().all()
    for index, center in enumerate(centers[:, 0].tolist()):
        theta = samples.theta[:, index::3, 0]
        exact: Any = stats.truncnorm(2 * (-2 - center), 2 * (2 - center), center, 0.5)
        for k in (1, 2, 3):
            means = (theta - exact.mean()).pow(k).mean(0)
            moment = exact.expect(lambda t, k=k, m=exact.mean(): (t - m) ** k)
            error = means.std().item() / math.sqrt(400)
            assert means.mean().item() == pytest.approx(moment, abs=4 * error + 4e-3)
        log_q = torch.from_numpy(exact.logpdf(theta.double().numpy()))
        # log Z of the box's uniform density.
        log_z = samples.log_partition[index::3]
        inside: Any = stats.norm(center, 0.5)
        exact_log_z = (
            math.log(inside.cdf(2) - inside.cdf(-2))
            - math.log(4)
            - 3
            - inside.logpdf(center)
        )
        total = samples.log_prob[:, index::3].double() + log_z
        torch.testing.assert_close(total, log_q + exact_log_z, atol=1e-3, rtol=1e-4)
        assert log_z.mean().item() == pytest.approx(exact_log_z, abs=0.05)


# ------------------------------------------------------------ weights of the last stage


def divergences(advantage):
    """Return divergences that give a proxy this advantage with standard error one."""
    around = torch.tensor([-1.0, 1.0]) * math.sqrt(0.5) * math.sqrt(2)
    loss = torch.zeros(2)
    return ValidationDivergences(loss + advantage + around, torch.ones(2), loss)


def test_the_flow_is_asked_for_the_rest_of_its_divergence():
    weights = AdaptiveWeights()
    before = weights.state_dict()
    weights.measure_trust(divergences(1.0))
    assert weights.trust == pytest.approx(stats.norm.cdf(1.0), abs=1e-6)
    assert weights.forward_share == 1.0
    weights.start_distillation(0.7)
    share = 1 - 0.7 * stats.norm.cdf(1.0)
    assert weights.forward_share == pytest.approx(share, abs=1e-6)
    # It stays, though trust moves on.
    for _ in range(5):
        weights.update(divergences(-3.0))
    assert weights.flow_share < 0.5 * 0.7 * stats.norm.cdf(1.0)
    assert weights.forward_share == pytest.approx(share, abs=1e-6)
    other = AdaptiveWeights()
    other.load_state_dict(weights.state_dict())
    assert other.forward_share == weights.forward_share
    assert AdaptiveWeights().forward_share == 1.0
    fresh = AdaptiveWeights()
    fresh.load_state_dict(before)
    assert fresh.forward_share == 1.0
    # Another distillation, of a later round, has another.
    weights.start_round()
    weights.measure_trust(divergences(0.0))
    weights.start_distillation(1.0)
    assert weights.forward_share == pytest.approx(0.5)


def test_fixed_weights_ask_for_all_of_it():
    weights = FixedWeights((1.0, 2.0, 3.0))
    assert weights.forward_share == 1.0
    weights.measure_trust(divergences(1.0))
    weights.start_distillation(0.3)
    assert weights.forward_share == 1.0


def test_the_share_counts_in_the_last_stage_only():
    inference = make()
    train(inference, 2, simulate())
    weights = inference._weights
    weights.forward_share = 0.25
    weights.dual_variables = torch.tensor([2.0, 3.0, 5.0])
    loss = torch.tensor([1.0, -4.0])
    for stage, expected in ((Stage.FLOW, 2 * loss), (Stage.DISTILLATION, loss / 2)):
        inference._stage = stage
        assert torch.equal(inference._lagrangian(Divergences(loss)), expected)
    assert weights.dual_variables.tolist() == [2.0, 3.0, 5.0]


# ------------------------------------------------------------------------- in training


def small(**kwargs) -> Any:
    """Return an inference object whose flow follows the proxy from the start."""
    kwargs = {"weights": "fixed", "objective": JeffreysObjective(4, 4), **kwargs}
    return make(**kwargs)


@pytest.fixture
def drawn(monkeypatch):
    """The parameters that outputs are drawn at, in turn, with these outputs."""
    calls = []
    sample = SurrogateLikelihoods.sample

    def recording(self, theta):
        x = sample(self, theta)
        calls.append(SimpleNamespace(theta=theta, x=x))
        return x

    monkeypatch.setattr(SurrogateLikelihoods, "sample", recording)
    return calls


def test_synthetic_conditions_of_a_training(drawn):
    theta, x = simulate(1000)
    inference = small()
    train(inference, 4, (theta, x), training_batch_size=500)
    assert inference.summary["stage"] == [stage.value for stage in Stage]
    assert len(inference.train_indices) == 900
    (call,) = drawn
    # At every training simulation's parameters as often.
    rows, counts = call.theta.unique(dim=0, return_counts=True)
    assert torch.equal(rows, theta[inference.train_indices].unique(dim=0))
    assert (counts == 4).all()
    # The simulations differ from each other, and come in another order.
    x = inference._synthetic_x
    assert x is not None
    assert len(x.unique(dim=0)) == 4 * 900
    assert torch.equal(x.unique(dim=0), call.x.unique(dim=0))
    assert not torch.equal(x, call.x)
    samples = inference._proxy_samples["synthetic"].theta
    assert samples.shape == (8, 4 * 900, 2)


def test_many_simulations_have_fewer_or_no_synthetic_conditions(monkeypatch, drawn):
    """Five thousand conditions in all, or less than twice as many as there are."""
    theta, x = simulate(2600)
    inference = small()
    train(inference, 4, (theta[:60], x[:60]))
    monkeypatch.setattr(inference, "_draw_proxy_samples", lambda x, *args: x)
    loader: Any = SimpleNamespace(dataset=SimpleNamespace(tensors=(theta, x)))
    for num, multiple in (
        (1, 4),
        (900, 4),
        (1000, 4),
        (1001, 3),
        (1250, 3),
        (1251, 2),
        (2500, 1),
        (2501, 0),
    ):
        drawn.clear()
        inference._proxy_samples = {}
        inference.train_indices = torch.arange(num)
        inference._draw_synthetic(loader)
        if not multiple:
            assert drawn == []
            assert inference._synthetic_x is None
            assert "synthetic" not in inference._proxy_samples
            continue
        (call,) = drawn
        assert torch.equal(call.theta, theta[:num].repeat(multiple, 1))
        synthetic = inference._synthetic_x
        assert synthetic is not None
        assert len(synthetic) == multiple * num <= 5000
        assert inference._proxy_samples["synthetic"] is synthetic


class Distrustful(FixedWeights):
    """The flow does not follow."""

    @property
    def flow_share(self):
        return 0.0


@pytest.mark.parametrize(
    ("kwargs", "num_stages"),
    [
        ({"energy_estimator": energy_nn(8, 1, likelihood="none")}, 3),
        ({"weights": FixedWeights((1, 0, 0))}, 1),
        ({"weights": FixedWeights((1, 0, 1))}, 4),
        ({"weights": Distrustful()}, 4),
    ],
)
def test_without_likelihoods_or_a_proxy_to_follow_there_are_none(
    monkeypatch, drawn, kwargs, num_stages
):
    monkeypatch.setattr(trainer, "MAX_SYNTHETIC_EPOCHS", 1)
    inference = small(**kwargs)
    train(inference, 8, simulate())
    assert drawn == []
    assert inference._synthetic_x is None
    assert "synthetic" not in inference._proxy_samples
    # And no stage ends before its time.
    stages = inference.summary["stage"]
    assert len(stages) == 8
    assert len(set(stages)) == num_stages


def rows_of(tensor):
    return sorted(map(tuple, tensor.tolist()))


def test_every_epoch_follows_at_every_synthetic_condition_once(monkeypatch, drawn):
    monkeypatch.setattr(trainer, "POOLED_DISTILLATION_EPOCHS", 2)
    inference = small()
    epochs, calls = [], []
    forward_kl_to_proxy = inference.objective.forward_kl_to_proxy
    train_epoch = inference._train_epoch

    def recording_objective(flow, x, samples):
        assert flow is inference._neural_net.flow
        if torch.is_grad_enabled():  # in validation they are others
            calls.append((x, samples))
        return forward_kl_to_proxy(flow, x, samples)

    def recording_train(*args):
        calls.clear()
        loss = train_epoch(*args)
        state = inference._synthetic_x, inference._proxy_samples.get("synthetic")
        epochs.append((inference._stage, [*calls], state))
        return loss

    monkeypatch.setattr(inference.objective, "forward_kl_to_proxy", recording_objective)
    inference._train_epoch = recording_train
    theta, x = simulate()
    train(inference, 13, (theta, x))
    proxy = inference._neural_net.proxy
    for stage, followed, (synthetic, samples) in epochs:
        if stage is not Stage.DISTILLATION:
            assert synthetic is None and samples is None and not followed
            continue
        # Beside the simulations of the batches, two of 40; in batches of their size.
        assert len(inference.train_indices) == 108
        simulated = {tuple(row) for row in x.tolist()}
        batches = [at for at, _ in followed if tuple(at[0].tolist()) not in simulated]
        assert len(followed) - len(batches) == 2
        assert all(len(at) <= 54 for at in batches)
        assert rows_of(torch.cat(batches)) == rows_of(synthetic)
        assert len(synthetic) == 4 * 108
        # With samples of the proxy at these, two of them in a step.
        for at, each in followed:
            assert each.theta.shape == (2, len(at), 2)
            with torch.no_grad():
                log_q = proxy.log_unnormalized(each.theta, at) - each.log_partition
            torch.testing.assert_close(each.log_prob, log_q, atol=1e-3, rtol=1e-4)
    # As the flow moves on, conditions and samples are drawn again.
    kept = [state for stage, _, state in epochs if stage is Stage.DISTILLATION]
    assert len(kept) == 4 and len(drawn) == 2
    assert [kept[i][0] is kept[i + 1][0] for i in range(3)] == [True, False, True]
    assert [kept[i][1] is kept[i + 1][1] for i in range(3)] == [True, False, True]


def test_the_flow_learns_from_synthetic_conditions_alone():
    """Without the simulations' own steps, it comes nearer to the proxy by these."""
    inference = small()
    train(inference, 4, simulate())
    flow, proxy = inference._neural_net.flow, inference._neural_net.proxy
    x, samples = inference._synthetic_x, inference._proxy_samples["synthetic"]
    assert x is not None

    def distance():
        with torch.no_grad():
            kl = inference.objective.forward_kl_to_proxy(flow, x, samples)
        return kl.mean().item()

    before, states = distance(), [p.clone() for p in proxy.parameters()]
    loader = [None] * 2
    for step in range(20):
        inference._follow_at_synthetic_x(loader, step, inference._validation[1], 5.0)  # type: ignore[arg-type]
    assert distance() < before - 0.05
    for old, new in zip(states, proxy.parameters(), strict=True):
        assert torch.equal(old, new)


def test_synthetic_conditions_end_the_stage(monkeypatch):
    limit = 2
    monkeypatch.setattr(trainer, "MAX_SYNTHETIC_EPOCHS", limit)
    inference = small()
    train(inference, 16, simulate(), stop_after_epochs=100)
    stages = list(inference.summary["stage"])
    expected = [stage.value for stage in Stage for _ in range(4)]
    assert stages == expected[: 12 + limit]
    # A training after that has the same stages, not ended by conditions of before.
    inference.append_simulations(*simulate(60, seed=5))
    train(inference, 16, stop_after_epochs=100, force_first_round_loss=True)
    assert inference.summary["stage"][12 + limit :] == stages
    assert inference._synthetic_x is not None
    assert len(inference._synthetic_x) == 4 * 162


def test_resumed_within_the_stage_as_uninterrupted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # unpickled trainers log where they are
    # They are drawn in epoch 9, anew in 11, and end the stage after that.
    monkeypatch.setattr(trainer, "POOLED_DISTILLATION_EPOCHS", 2)
    monkeypatch.setattr(trainer, "MAX_SYNTHETIC_EPOCHS", 3)
    data, whole, part = simulate(90), small(), small()
    train(whole, 13, data)
    assert len(whole.summary["stage"]) == 12
    assert whole._synthetic_x is not None
    interrupt_before(part, 10)
    train(part, 13, data)
    before = part._synthetic_x
    assert before is not None
    part.save("training.pt")
    unpickled = pickle.loads(pickle.dumps(part))
    unpickled._show_progress_bars = False
    interrupt_before(part, 11)
    train(part, 13, resume_training=True)
    ways = ((small().load("training.pt"), 10), (unpickled, 10), (part, 11))
    for resumed, epoch in ways:
        assert len(resumed.summary["stage"]) == epoch
        torch.manual_seed(77)  # what another process would have done
        np.random.seed(77)
        restored = recorded(resumed)
        train(resumed, 13, resume_training=True, seed=8)
        assert len(restored) == 12 - epoch
        assert identical(restored[0], before)
        assert not torch.equal(before, whole._synthetic_x)
        assert_equal(outcome(resumed), outcome(whole))
        assert_equal(resumed._synthetic_x, whole._synthetic_x)
        for name in ("synthetic", "validation"):
            own, other = (vars(each._proxy_samples[name]) for each in (resumed, whole))
            assert_equal(own, other)


def recorded(inference):
    """Return a list that will hold the conditions that every epoch began with."""
    restored = []
    train_epoch = inference._train_epoch

    def recording(*args):
        restored.append(inference._synthetic_x)
        return train_epoch(*args)

    inference._train_epoch = recording
    return restored
