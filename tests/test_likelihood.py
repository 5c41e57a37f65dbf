"""Surrogates of the likelihood: what outputs they see, and the densities they are."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import grid, log_integral
from scipy import stats
from sklearn.linear_model import Ridge, RidgeCV
from torch import nn
from torch.distributions import MultivariateNormal, Normal

from sbi_jeffreys.coordinates import PENALTIES, ResidualCoordinates, hold_out
from sbi_jeffreys.features import MIN_DISTINCT, Features
from sbi_jeffreys.likelihood import (
    MAX_CORRELATED,
    MAX_LOG_LIKELIHOOD,
    CorrelatedLikelihood,
    FlowLikelihood,
    IndependentLikelihood,
    Outputs,
    SurrogateLikelihoods,
    has_likelihood,
)

PRIOR = MultivariateNormal(torch.zeros(2), torch.eye(2))
MIXING = torch.tensor([[1.0, 0.5], [0.0, 1.0], [-0.7, 0.4]])
# Correlated, so that the whitening is not diagonal.
NOISE = torch.tensor([[0.3, 0.0, 0.0], [0.2, 0.3, 0.0], [-0.1, 0.1, 0.4]])


def simulations(num=1000):
    """Return parameters and outputs that are linear in them, with Gaussian noise."""
    theta = PRIOR.sample((num,))
    return theta, theta @ MIXING.T + torch.randn(num, 3) @ NOISE.T


def mixed(num=1000):
    """Return parameters and outputs: a coin, two numbers, one of three, and counts."""
    theta, x = simulations(num)
    counts = torch.poisson(100 * (0.2 * theta[:, :1]).exp())
    coin = (torch.rand(num, 1) < theta[:, 1:].sigmoid()).float()
    values = torch.tensor([-1.0, 2.5, 7.0])[torch.randint(0, 3, (num, 1))]
    return theta, torch.cat((coin, x[:, :2], values, counts), 1)


def build(theta, x, **kwargs):
    coordinates = ResidualCoordinates(theta, x, Features(x), PRIOR)
    return SurrogateLikelihoods(theta, x, coordinates, **kwargs)


def independent(surrogates, index=0):
    """Return a surrogate with independent outputs, which have coordinates."""
    member = surrogates.members[index]
    assert isinstance(member, IndependentLikelihood)
    assert member.coordinates is not None
    return member, member.coordinates


def randomize(module, std=0.3):
    """Move all parameters, of which some start at zero, and stop the dropout."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return module.eval()


def ridge(inputs, targets, penalties):
    """Return the ridge regression with the least leave-one-out error per target."""
    center = inputs.mean(0)
    centered = inputs - center
    best = [(math.inf, np.empty(0), 0.0)] * targets.shape[1]
    for penalty in penalties:
        inverse = np.linalg.inv(
            centered.T @ centered + penalty * np.eye(inputs.shape[1])
        )
        leverage = ((centered @ inverse) * centered).sum(1) + 1 / len(inputs)
        for k, target in enumerate(targets.T):
            weight = inverse @ centered.T @ (target - target.mean())
            residual = target - target.mean() - centered @ weight
            error = np.square(residual / (1 - leverage)).mean()
            if error < best[k][0]:
                best[k] = error, weight, target.mean() - center @ weight
    return np.stack([b[1] for b in best]), np.array([b[2] for b in best])


def test_it_starts_as_student_t_about_the_ridge_regression():
    """Regression, whitening and density are those of numpy and scipy."""
    theta, _ = simulations()
    # Much noise and few outliers: parameters are saturated, which makes no odds here.
    x = theta @ MIXING.T + 5 * torch.randn(len(theta), 3) @ NOISE.T
    surrogates = build(theta, x).eval()
    at, outputs = 0.7 * PRIOR.sample((4, 6)), x[:6]
    with torch.no_grad():
        log_l = surrogates(at, outputs, [0])[0].numpy()

    mean, std = theta.mean(0), theta.std(0)
    of_theta = Features((theta - mean) / std)
    phi = of_theta((theta - mean) / std).double().numpy()
    y = ((x - x.mean(0)) / x.std(0)).double().numpy()
    y_mean, y_std = y.mean(0), y.std(0, ddof=1)
    weight, bias = ridge(phi, (y - y_mean) / y_std, np.logspace(-2, 5, 22))
    residual = (y - y_mean) / y_std - phi @ weight.T - bias
    covariance = np.cov(residual.T)
    assert abs(np.corrcoef(residual.T)[0, 1]) > 0.4  # the whitening is put to use
    whitening = np.linalg.inv(np.linalg.cholesky(covariance))
    expected = np.empty((4, 6))
    for s, b in np.ndindex(4, 6):
        z = (at[s, b] - mean) / std
        location = weight @ of_theta(z[None])[0].double().numpy() + bias
        u = whitening @ ((y[b] - y_mean) / y_std - location)
        expected[s, b] = stats.t.logpdf(u, 8).sum()
    assert expected.std(0).mean() > 0.3 and expected.std(1).mean() > 0.3
    np.testing.assert_allclose(log_l, expected, atol=0.05)


def test_in_training_a_simulation_is_judged_by_a_regression_without_it():
    theta, x = simulations(60)
    surrogates = build(theta, x)
    member, coordinates = independent(surrogates)
    hold_out(surrogates, True)
    with torch.no_grad():
        loss = surrogates.losses(theta, x, [0])[0]
        surrogates.eval()
        in_sample = surrogates.losses(theta, x, [0])[0]
        y, _ = surrogates.outputs(x)
        z = surrogates.coordinates.standardize(theta)
        phi = member.features(10 * torch.tanh(z / 10))
    y = coordinates.standardize(y).double().numpy()
    phi, whitening = phi.double().numpy(), coordinates.whitening.double().numpy()
    penalties = RidgeCV(alphas=PENALTIES * 60 / 1000, alpha_per_target=True)
    penalties = penalties.fit(phi, y).alpha_
    for j in (0, 31, 59):
        others = np.arange(60) != j
        location = [
            Ridge(penalty).fit(phi[others], y[others, k]).predict(phi[j : j + 1]).item()
            for k, penalty in enumerate(penalties)
        ]
        expected = -stats.t.logpdf(whitening @ (y[j] - location), 8).sum()
        assert loss[j].item() == pytest.approx(expected, abs=2e-3)
    # Without it, it is farther away.
    assert loss.mean() > in_sample.mean() + 0.1


def test_location_scale_and_tails_are_those_of_scipy():
    """What the network says enters the Student-t density where it belongs."""
    theta, x = simulations(300)
    member, coordinates = independent(build(theta, x[:, :1]).eval())
    none = torch.empty(300, 0, dtype=torch.long)
    # Where a density of known location is largest tells the regression's location.
    axis = torch.linspace(-3, 3, 6001).unsqueeze(1)
    at = theta[:1].expand(1, 6001, -1)
    with torch.no_grad():
        before = member(at, axis, none)[0]
        # The intercept, which is next to nothing of standardised parameters.
        coordinates.bias.add_(0.4)
        moved = member(at, axis, none)[0]
        coordinates.bias.sub_(0.4)
        member.location_and_scale.bias.copy_(torch.tensor([0.7, -1.2]))
        member.tails.fill_(1.5)
        after = member(at, axis, none)[0]
    (unit,) = coordinates.scale
    (whitening,) = coordinates.whitening.flatten()
    shift = (axis[moved.argmax()] - axis[before.argmax()]).item()
    assert shift == pytest.approx(0.4 * unit.item(), abs=3e-3)
    center = axis[before.argmax()] + 0.7 * unit / whitening
    u = (axis - center)[:, 0] / unit * whitening
    expected = stats.t.logpdf(
        u.numpy(),
        2 + math.log1p(math.exp(1.5)),
        scale=math.exp(6 * math.tanh(-1.2 / 6)),
    )
    np.testing.assert_allclose(after.numpy(), expected, atol=0.02)


@pytest.mark.parametrize("extreme", [-1e6, 1e6])
def test_scales_and_tails_are_bounded(extreme):
    """Whatever the network says, the log likelihood and its gradient are finite."""
    theta, x = simulations(300)
    member, _ = independent(build(theta, x))
    nn.init.constant_(member.location_and_scale.bias[3:], extreme)
    nn.init.constant_(member.tails, extreme)
    y = Features(x).normal_scores(x)
    log_l = member(theta[None], y, torch.empty(300, 0, dtype=torch.long))
    assert log_l.isfinite().all()
    (gradient,) = torch.autograd.grad(log_l.sum(), member.location_and_scale.weight)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("num_scores", [1, 2])
def test_density_of_independent_scores_integrates_to_one(num_scores):
    """Of the scores it is a density, up to the Jacobian of their whitening."""
    theta, x = simulations()
    x = x[:, :num_scores]
    member, coordinates = independent(randomize(build(theta, x), 0.1))
    # Of heavy tails a grid sees little: the light ones are as good for a constant.
    nn.init.constant_(member.tails, 20.0)
    points, cell = grid(-8, 8, 40_000 if num_scores == 1 else 400, num_scores)
    scores = points.float()
    categories = torch.empty(len(scores), 0, dtype=torch.long)
    jacobian = torch.linalg.slogdet(coordinates.whitening)[1]
    jacobian = jacobian - coordinates.scale.log().sum()
    log_integrals = []
    for parameters in torch.tensor([[0.0, 0.0], [1.0, -1.0], [-2.0, 0.5]]):
        with torch.no_grad():
            at = parameters.expand(1, len(scores), -1)
            log_l = member(at, scores, categories)[0].double()
        log_integrals.append(log_integral(log_l, cell) + jacobian)
    assert torch.stack(log_integrals).abs().max() < 2e-3


@pytest.mark.parametrize("at", [[0.0, 0.0], [1.0, -1.0], [-2.0, 0.5]])
def test_density_of_correlated_scores_is_autoregressive(at):
    """It is the product of Student's t, each about a regression on those before it."""
    theta, x = simulations()
    surrogates = randomize(build(theta, x), 0.1)
    member = surrogates.members[2]
    assert isinstance(member, CorrelatedLikelihood)
    coordinates = member.coordinates
    assert coordinates is not None
    z, categories = torch.tensor(at)[None], torch.empty(50, 0, dtype=torch.long)
    y, _ = surrogates.outputs(x[:50])
    with torch.no_grad():
        actual = member(z.expand(1, 50, -1), y, categories)[0]
        hidden = member.hidden(member.features(z))
        location, log_scale = member.location_and_scale(hidden)[0].chunk(2)
        location = (
            location
            + coordinates.whitening @ coordinates.weight @ (member.features(z)[0])
        )
        u = (y - coordinates.mean) / coordinates.scale - coordinates.bias
        residual = u @ coordinates.whitening.T - location
        b21, b31, b32 = member.coefficients(hidden)[0]
        shift = torch.stack(
            (
                torch.zeros(50),
                b21 * residual[:, 0],
                b31 * residual[:, 0] + b32 * residual[:, 1],
            ),
            1,
        )
        degrees_of_freedom = 2 + torch.nn.functional.softplus(member.tails)
        scale = (6 * torch.tanh(log_scale / 6)).exp()
    assert shift.std(0)[1:].min() > 0.01  # the coefficients matter
    expected = stats.t.logpdf(residual - shift, degrees_of_freedom, scale=scale)
    np.testing.assert_allclose(actual, expected.sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_correlated_scores_turn_with_the_parameters():
    """Gaussian noise whose correlation is a function of the parameters is learnt."""
    prior = MultivariateNormal(torch.zeros(1), torch.eye(1))

    def noise(theta):
        correlation = 0.95 * torch.tanh(2 * theta[..., 0])
        one = torch.ones_like(correlation)
        rows = torch.stack((one, correlation), -1), torch.stack((correlation, one), -1)
        return MultivariateNormal(torch.zeros(2), torch.stack(rows, -2))

    theta = prior.sample((3000,))
    x = noise(theta).sample()
    coordinates = ResidualCoordinates(theta, x, Features(x), prior)
    surrogates = SurrogateLikelihoods(theta, x, coordinates)
    at = prior.sample((1000,))
    outputs = noise(at).sample()
    pair = torch.stack((at, -at))
    exact = noise(pair).log_prob(outputs)
    optimizer = torch.optim.Adam(surrogates.parameters(), 1e-2)
    for _ in range(8):
        surrogates.train()
        for batch in torch.randperm(len(theta)).split(200):
            losses = surrogates.losses(theta[batch], x[batch], [0, 2])
            optimizer.zero_grad()
            losses.sum(0).mean().backward()
            optimizer.step()
    with torch.no_grad():
        log_l = surrogates.eval()(pair, outputs, [0, 2])
    difference = log_l[:, 0] - log_l[:, 1]
    error = (difference - exact[0] + exact[1]).abs().median(1).values
    # Independent ones know nothing of the sign of the parameter.
    assert error[1] < 0.3 * error[0]


def test_density_of_the_flow_integrates_to_one():
    """The maf is a density of the scores themselves."""
    theta, x = simulations()
    y = Features(x[:, :2]).normal_scores(x[:, :2])
    member = randomize(FlowLikelihood(theta, y), 0.02)
    # Untrained it is broad.
    points, cell = grid(-120, 120, 200, 2)
    with torch.no_grad():
        at = torch.tensor([[[0.5, -0.5]]]).expand(1, len(points), -1)
        log_l = member(at, points.float(), torch.empty(0))[0].double()
    assert log_l.max() - log_l[0] > 10  # the grid goes far enough
    assert log_integral(log_l, cell).abs() < 0.01


def test_flow_is_sbis_at_every_pair():
    """The maf's log likelihoods are sbi's log densities of single pairs."""
    theta, x = simulations()
    y = Features(x).normal_scores(x)
    member = randomize(FlowLikelihood(theta, y), 0.2)
    at = PRIOR.sample((3, 4))
    with torch.no_grad():
        log_l = member(at, y[:4], torch.empty(4, 0))
        expected = [
            [member.flow.log_prob(y[None, [b]], at[s, [b]]).item() for b in range(4)]
            for s in range(3)
        ]
    expected = torch.tensor(expected)
    assert expected.std(0).min() > 0.1 and expected.std(1).min() > 0.1
    torch.testing.assert_close(log_l, expected, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------- outputs that are drawn


@pytest.mark.parametrize("index", [0, 2, 3])
def test_scores_are_drawn_from_the_density(index):
    """Expectations of bounded functions are those of quadrature."""
    theta, x = simulations()
    surrogates = randomize(build(theta, x[:, :2]), 0.1)
    member = surrogates.members[index]
    at = torch.tensor([[0.7, -0.4]])
    with torch.no_grad():
        y, categories = member.sample(at.expand(40_000, -1))  # type: ignore[operator]
    assert categories.shape == (40_000, 0)
    width = 5 * y.std(0).max().item() + y.abs().mean(0).max().item()
    points, _ = grid(-width, width, 500, 2)
    with torch.no_grad():
        log_l = torch.cat(
            [
                member(
                    at.expand(1, len(part), -1), part.float(), categories[: len(part)]
                )
                for part in points.split(50_000)
            ],
            1,
        )
    weights = torch.softmax(log_l[0].double(), 0)
    unit = y.std(0)

    def functions(scores):
        u = torch.tanh(scores / unit)
        return torch.stack((u[:, 0], u[:, 1], u[:, 0] ** 2, u[:, 0] * u[:, 1]), 1)

    expected = weights @ functions(points)
    drawn = functions(y).double()
    error = drawn.std(0) / math.sqrt(len(drawn))
    assert ((drawn.mean(0) - expected).abs() < 4 * error + 1e-3).all()


def test_categories_are_drawn_with_their_probabilities():
    theta, x = mixed()
    surrogates = randomize(build(theta, x))
    member, _ = independent(surrogates)
    at = torch.tensor([[0.7, -0.4]])
    with torch.no_grad():
        _, categories = member.sample(at.expand(20_000, -1))
        features = member.features(at)
        hidden = member.hidden(features)
        probabilities = member._categorical(features, hidden).probs[0]
    for j in range(categories.shape[1]):
        shares = torch.bincount(categories[:, j], minlength=probabilities.shape[1])
        shares = shares / 20_000
        error = (probabilities[j] * (1 - probabilities[j]) / 20_000).sqrt()
        assert ((shares - probabilities[j]).abs() <= 4 * error + 1e-6).all()


def test_outputs_come_back_from_their_scores():
    """Up to the ends of the tables; lattices are hit, and what is missing stays."""
    theta, x = mixed()
    outputs = Outputs(x, theta).eval()
    inside = ((x > x.quantile(0.01, 0)) & (x < x.quantile(0.99, 0))) | (
        outputs.spacing == 0
    )
    y, categories = outputs(x)
    back = outputs.inverse(torch.zeros_like(x), y, categories)
    known = inside.all(1)
    assert known.float().mean() > 0.9
    torch.testing.assert_close(back[known], x[known], atol=1e-3, rtol=1e-4)
    assert torch.equal(back[known][:, [0, 3, 4]], x[known][:, [0, 3, 4]])
    missing = x.clone()
    missing[::2, 1], missing[1::2, 3] = torch.nan, torch.inf
    back = outputs.inverse(missing, y, categories)
    assert torch.equal(back.isfinite(), missing.isfinite())
    # A maf has no categories: they are left as they are.
    none = torch.empty(len(x), 0, dtype=torch.long)
    assert torch.equal(outputs.inverse(x, y - 1, none)[:, [0, 3]], x[:, [0, 3]])


def test_outputs_are_drawn_about_those_of_the_parameters():
    """Trained on nothing, they are already near the simulator's where it is linear."""
    theta, x = simulations(2000)
    noise = torch.randn(len(theta), 1)
    surrogates = build(theta, torch.cat((x, noise), 1), used=torch.tensor([0, 2]))
    surrogates.eval()
    outputs = torch.cat((x, noise), 1)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0])
    drawn = surrogates.sample(theta, outputs, weights)
    # Those that they are no surrogates for stay.
    assert torch.equal(drawn[:, [1, 3]], outputs[:, [1, 3]])
    own = drawn[:, [0, 2]]
    assert not (own == x[:, [0, 2]]).any()
    residual = own - (theta @ MIXING.T)[:, [0, 2]]
    expected = (NOISE @ NOISE.T)[[0, 2]][:, [0, 2]]
    covariance = torch.cov(residual.T)
    scale = expected.diagonal().sqrt()
    scale = scale[:, None] * scale
    # Student's t of eight degrees of freedom has a third more variance.
    ratio = covariance / scale
    assert ((ratio - 8 / 6 * expected / scale).abs() < 0.25).all()


def few_values(num=400):
    """Return parameters and outputs that have two and three values."""
    theta, x = mixed(num)
    return theta, x[:, [0, 3]]


def test_probabilities_of_all_values_sum_to_one():
    """Values of a simulator's discrete outputs have all probability there is."""
    theta, x = few_values()
    member = build(theta, x).members[0]
    at = PRIOR.sample((20, 1))
    y = torch.empty(6, 0)
    pairs = torch.tensor(list(itertools.product(range(2), range(3))))
    before = member(at.expand(-1, 6, -1), y, pairs)
    # It starts as logistic regressions.
    assert isinstance(member, IndependentLikelihood)
    logits = member.logistic(member.features(at[:, 0])).unflatten(-1, (2, 3))
    coin, value = logits[:, 0, :2].log_softmax(-1), logits[:, 1].log_softmax(-1)
    expected = coin[:, pairs[:, 0]] + value[:, pairs[:, 1]]
    assert expected.exp().std(0).min() > 0.01
    torch.testing.assert_close(before, expected)
    randomize(member)
    probabilities = member(at.expand(-1, 6, -1), y, pairs).exp()
    assert probabilities.std(0).min() > 0.01  # they depend on the parameters
    torch.testing.assert_close(probabilities.sum(1), torch.ones(20))
    # The coin has two sides, also where another output has three values.
    assert member(at[:1], y[:1], torch.tensor([[2, 0]])).exp() == 0


def test_missing_categories_are_summed_over():
    """What is missing contributes nothing: it has been integrated out."""
    theta, x = few_values()
    surrogates = randomize(build(theta, x))
    at = PRIOR.sample((10, 1))
    coin = torch.tensor([[0.0], [1.0]])
    for hole in (torch.nan, torch.inf, -torch.inf):
        seen = torch.cat((coin, torch.full((2, 1), hole)), 1)
        log_l = surrogates(at.expand(-1, 2, -1), seen)
        for side in (0, 1):
            every = torch.tensor([[side, value] for value in (-1.0, 2.5, 7.0)])
            expected = surrogates(at.expand(-1, 3, -1), every).logsumexp(2)
            torch.testing.assert_close(log_l[:, :, side], expected)
    nothing = torch.full((1, 2), torch.nan)
    assert surrogates(at, nothing).abs().max() < 1e-6


@pytest.mark.parametrize("value", [3.0, torch.nan, torch.inf])
def test_outputs_that_say_nothing_have_likelihood_one(value):
    """A constant output, or one that is always missing, is no evidence."""
    theta, x = simulations(300)
    idle = torch.full((300, 1), value)
    alone = randomize(build(theta, idle))
    assert len(alone) == 2
    at = PRIOR.sample((5, 300))
    for seen in (idle, torch.randn(300, 1)):
        assert alone(at, seen).abs().max() < 1e-6
    # Nor do others heed it.
    both = build(theta, torch.cat((x[:, :2], idle), 1)).eval()
    expected = build(theta, x[:, :2]).eval()
    torch.testing.assert_close(
        both(at, torch.cat((x[:, :2], idle), 1), [0]),
        expected(at, x[:, :2], [0]),
        atol=1e-4,
        rtol=1e-4,
    )


def test_likelihood_of_mixed_outputs_is_a_product():
    """Scores and categories each contribute their own factor, once."""
    theta, x = mixed()
    surrogates = randomize(build(theta, x))
    member = surrogates.members[0]
    y, categories = surrogates.outputs(x[:7])
    assert y.shape == (7, 3) and categories.shape == (7, 2)
    at = PRIOR.sample((3, 7))
    missing = torch.full_like(categories, -1)
    of_scores = member(at, y, missing)
    of_coin = member(at, y, torch.stack((categories[:, 0], missing[:, 1]), 1))
    of_values = member(at, y, torch.stack((missing[:, 0], categories[:, 1]), 1))
    torch.testing.assert_close(
        member(at, y, categories), of_coin + of_values - of_scores
    )
    assert (of_coin - of_scores).abs().median() > 0.1
    # The maf has the scores only.
    flow = surrogates.members[-1]
    assert torch.equal(flow(at, y, categories), flow(at, y, missing))


@pytest.mark.parametrize(
    ("columns", "num_members", "num_scores"),
    [
        ([1], 2, 1),  # one continuous output
        ([0], 2, 0),  # a coin
        ([0, 3], 2, 0),  # few values only
        ([0, 1, 3], 2, 1),
        ([1, 2], 4, 2),
        ([1, 4], 4, 2),  # counts of many values are continuous
        ([0, 1, 2, 3, 4], 4, 3),
    ],
)
def test_members(columns, num_members, num_scores):
    """Two continuous outputs or more are correlated, and none has no density."""
    theta, x = mixed(300)
    x = x[:, columns]
    surrogates = build(theta, x)
    assert len(surrogates) == len(surrogates.members) == num_members
    kinds = [IndependentLikelihood] * 2 + [CorrelatedLikelihood, FlowLikelihood]
    assert [type(m) for m in surrogates.members] == kinds[:num_members]
    assert (surrogates.members[0].coordinates is None) == (num_scores == 0)
    assert surrogates.outputs(x)[0].shape == (300, num_scores)
    log_l = surrogates(theta.expand(2, -1, -1), x)
    assert log_l.shape == (num_members, 2, 300)
    assert log_l.isfinite().all()


def test_every_pair_is_evaluated_at_its_own_outputs():
    """A batch of pairs has the log likelihoods that its pairs have one by one."""
    theta, x = mixed()
    surrogates = randomize(build(theta, x), 0.1)
    at = PRIOR.sample((3, 4))
    together = surrogates(at, x[:4])
    for s, b in itertools.product(range(3), range(4)):
        alone = surrogates(at[s : s + 1, b : b + 1], x[b : b + 1])
        torch.testing.assert_close(
            together[:, s, b], alone[:, 0, 0], atol=1e-4, rtol=1e-4
        )
    assert together.std(1).min() > 1e-2 and together.std(2).min() > 1e-2


def test_which_picks_the_surrogates_in_order():
    """Those asked for are returned; beside the first no others are evaluated."""
    theta, x = mixed(300)
    surrogates = randomize(build(theta, x), 0.1)
    at = PRIOR.sample((2, 300))
    every = surrogates(at, x)
    assert all((a - b).abs().mean() > 1e-2 for a, b in itertools.combinations(every, 2))
    for which in ([0], [2, 0], [1, 2], [0, 1, 2]):
        assert torch.equal(surrogates(at, x, which), every[which])
    surrogates.members[1] = nn.Linear(1, 1)  # cannot be called
    assert torch.equal(surrogates(at, x, [2]), every[[2]])


def test_loss_is_the_negative_log_likelihood():
    """The loss of simulations is that of the surrogate it is asked of, alone."""
    theta, x = mixed(300)
    surrogates = randomize(build(theta, x), 0.1)
    log_l = surrogates(theta[None], x)
    losses = surrogates.losses(theta, x, range(3))
    assert losses.shape == (3, 300)
    torch.testing.assert_close(-losses[0], log_l[0, 0])
    # All but the first are mixed with a hundredth of it.
    mixtures = (0.99 * (-losses[1:].double()).exp()) + 0.01 * (
        -losses[0].double()
    ).exp()
    torch.testing.assert_close(
        mixtures.log().float(), log_l[1:3, 0], atol=1e-4, rtol=1e-4
    )


def test_the_flow_is_mixed_with_a_density_of_the_same_scores():
    """The mixture integrates to one, though the two are densities of other scores."""

    class Same(Outputs):
        def forward(self, x):
            return x, torch.empty(len(x), 0, dtype=torch.long)

    theta, x = simulations()
    surrogates = build(theta, x[:, :2])
    surrogates.outputs.__class__ = Same
    _, coordinates = independent(surrogates)
    assert coordinates.log_abs_det(x[:1, :2]).abs() > 0.5  # else nothing is tested
    points, cell = grid(-120, 120, 800, 2)
    at = torch.tensor([[[0.5, -0.5]]])
    surrogates.eval()
    with torch.no_grad():
        log_l = torch.cat([
            surrogates(at.expand(1, len(part), -1), part.float(), [3])[0, 0]
            for part in points.split(80_000)
        ])
        # Of the first all but alone: where the flow has nothing.
        surrogates.members[3].forward = lambda z, y, c: torch.full(z.shape[:2], -1e9)
        rest = torch.cat([
            surrogates(at.expand(1, len(part), -1), part.float(), [3])[0, 0]
            for part in points.split(80_000)
        ])
    assert log_integral(log_l.double(), cell).exp() == pytest.approx(1.0, abs=3e-3)
    assert log_integral(rest.double(), cell).exp() == pytest.approx(0.01, abs=3e-4)


@pytest.mark.parametrize(("num", "expected"), [(0, 4), (1, 3)])
def test_of_many_outputs_none_are_correlated(num, expected):
    """Their pairs would be too many; the maf has them."""
    theta = PRIOR.sample((100,))
    x = theta.repeat(1, 17)[:, : MAX_CORRELATED + num]
    x = x + torch.randn_like(x)
    members = build(theta, x).members
    assert len(members) == expected
    assert isinstance(members[-1], FlowLikelihood)


def test_two_surrogates_have_dropout():
    """The second of two that are alike, and the correlated one, while they learn."""
    theta, x = simulations(300)

    def repeats(probability):
        surrogates = randomize(build(theta, x, dropout=probability), 0.1)
        result = []
        for mode in (True, False):
            surrogates.train(mode)
            twice = (surrogates.losses(theta, x, range(3)) for _ in range(2))
            result += [torch.equal(*pair) for pair in zip(*twice, strict=True)]
        return result

    assert repeats(0.1) == [True, False, False] + 3 * [True]
    assert repeats(0.0) == 6 * [True]


class Answers(nn.Module):
    """A surrogate that says what it was told to."""

    def __init__(self, answers):
        super().__init__()
        self.answers = torch.tensor([answers])

    def parts(self, z, y, categories):
        return self.answers, torch.zeros_like(self.answers)

    def forward(self, z, y, categories):
        return self.answers


def test_log_likelihoods_are_bounded():
    """What is not a number is unlikely, and nothing is certain."""
    theta, x = simulations(300)
    surrogates = build(theta, x)
    answers = [torch.nan, torch.inf, -torch.inf, 1e6, -1e6, 3.0]
    high = MAX_LOG_LIKELIHOOD
    bounded = torch.tensor([[-high, high, -high, high, -high, 3.0]])
    for of_first, others in ((answers, bounded), ([-20.0] * 6, torch.tensor(-20.0))):
        surrogates.members[0], surrogates.members[1] = (
            Answers(of_first),
            Answers(answers),
        )
        first, second = surrogates(theta[None, :6], x[:6], [0, 1])
        assert torch.equal(first, others.expand(1, 6))
        expected = torch.logaddexp(bounded + math.log(0.99), others + math.log(0.01))
        torch.testing.assert_close(second, expected)


def test_far_parameters_and_outputs_are_finite():
    """Parameters far from all simulations have a log likelihood and a slope."""
    theta, x = mixed(300)
    surrogates = randomize(build(theta, x), 0.1)
    far = torch.tensor([1e3, -1e6, 1e12]).reshape(3, 1, 1).expand(-1, 4, 2)
    far = far.clone().requires_grad_()
    outputs = torch.cat((x[:2], 1e9 * x[2:4]))
    log_l = surrogates(far, outputs)
    assert log_l.isfinite().all()
    (gradient,) = torch.autograd.grad(log_l.sum(), far)
    assert gradient.isfinite().all()


def test_slope_is_that_of_finite_differences():
    """The flow learns from the slope in the parameters, also that of the features."""
    theta, x = simulations()
    surrogates = randomize(build(theta, x), 0.05)
    at = (0.7 * PRIOR.sample((1, 50))).requires_grad_()
    (slope,) = torch.autograd.grad(surrogates(at, x[:50], [0]).sum(), at)
    step = 4e-3
    for k in (0, 1):
        move = step * torch.eye(2)[k]
        with torch.no_grad():
            up, down = (surrogates(at + s * move, x[:50], [0])[0, 0] for s in (1, -1))
        difference = (up - down) / (2 * step)
        # Normal scores have kinks at their knots, which some steps go across.
        error = (slope[0, :, k] - difference).abs()
        assert difference.abs().median() > 0.3
        assert error.median() < 0.02 * difference.abs().median()


def test_spacing_is_that_of_the_lattice():
    """Counts have the distance of their values, in any unit; others have none."""
    counts = torch.poisson(torch.full((2000,), 80.0))
    x = torch.stack(
        [
            counts,
            0.25 * counts - 7,
            torch.randn(2000),
            torch.randint(0, 3, (2000,)).float(),
            # Rarely the same twice: continuous, though rounded.
            torch.poisson(torch.full((2000,), 1e8)),
            counts.where(torch.arange(2000) % 2 == 0, torch.nan),
            # Seldom next to each other.
            (
                3 * torch.randint(0, 30, (2000,)) - (torch.arange(2000) == 7).int()
            ).float(),
        ],
        1,
    )
    spacing = Outputs(x, PRIOR.sample((2000,))).spacing.tolist()
    assert spacing == [1.0, 0.25, 0.0, 0.0, 0.0, 1.0, 1.0]


def test_counts_are_spread_over_their_cells_in_training_only():
    """In training they are uniform on half a distance to either side."""
    x = 0.5 * torch.poisson(torch.full((2000, 1), 80.0))
    x = torch.cat((x, torch.randn(2000, 1)), 1)
    outputs = Outputs(x, PRIOR.sample((2000,))).eval()
    seen = torch.tensor([[40.0, 0.3]]).expand(3000, -1)
    exact, _ = outputs(seen)
    spread, _ = outputs.train()(seen)
    assert torch.equal(spread[:, 1], exact[:, 1])
    # Scores increase with the output, so that the place in the cell is known.
    places = torch.linspace(39.75, 40.25, 501)
    at = torch.stack((places, torch.zeros(501)), 1)
    scores = outputs.eval()(at)[0][:, 0]
    assert (scores.diff() > 0).all()
    place = np.interp(spread[:, 0].numpy(), scores.numpy(), places.numpy())
    assert stats.kstest(place, stats.uniform(39.75, 0.5).cdf).pvalue > 0.001
    for _ in range(2):
        assert torch.equal(outputs.eval()(seen)[0], exact)


def test_categories_are_of_the_nearest_value():
    """A value not seen before has the category of the one next to it."""
    theta, x = mixed(500)
    outputs = Outputs(x, theta)
    assert outputs.discrete.tolist() == [0, 3]
    seen = torch.zeros(9, 5)
    seen[:, 0] = torch.tensor([0.0, 1.0, 0.4, 0.6, 5.0, -5.0, 1e6, -1e6, torch.nan])
    seen[:, 3] = torch.tensor([-1, 2.5, 7, 0.7, 0.8, 4.7, 4.8, 1e6, torch.inf])
    for mode in (True, False):
        categories = outputs.train(mode)(seen)[1]
        assert categories[:, 0].tolist() == [0, 1, 0, 1, 1, 0, 1, 0, -1]
        assert categories[:, 1].tolist() == [0, 1, 2, 0, 1, 1, 2, 2, -1]


def test_twenty_values_are_many():
    """Below they are categories, whichever they are; a missing value is none."""
    assert MIN_DISTINCT == 20
    index = torch.arange(400)
    x = torch.stack((index % 19, index % 20, index % 20), 1).float().sqrt()
    x[x[:, 2] == 0, 2] = torch.nan
    outputs = Outputs(x, PRIOR.sample((400,)))
    y, categories = outputs.eval()(x)
    assert outputs.discrete.tolist() == [0, 2]
    assert len(y[:, 0].unique()) == 20
    # Their order is that of the values.
    assert torch.equal(categories[:, 0], index % 19)
    assert torch.equal(categories[:, 1], index % 20 - 1)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_units_do_not_matter(scale):
    """Neither those of the parameters nor those of the outputs."""
    theta, x = simulations(300)
    prior = MultivariateNormal(torch.zeros(2), scale**2 * torch.eye(2))
    at = PRIOR.sample((3, 300))
    coordinates = ResidualCoordinates(
        theta * scale, x * scale, Features(x * scale), prior
    )
    other = SurrogateLikelihoods(theta * scale, x * scale, coordinates).eval()
    with torch.no_grad():
        expected = build(theta, x).eval()(at, x, [0])
        actual = other(at * scale, x * scale, [0])
    assert expected.std() > 1
    torch.testing.assert_close(actual, expected, atol=0.02, rtol=1e-3)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((10, 1), True),
        ((10, 200), True),
        ((10, 201), False),
        ((10, 3, 3), False),
        ((10, 1, 8, 8), False),
    ],
)
def test_which_outputs_have_a_likelihood(shape, expected):
    """Vectors that are not too long do, images and series do not."""
    assert has_likelihood(torch.randn(shape)) is expected


def test_outputs_that_never_vary_have_no_likelihood():
    """They say nothing of the parameters, as in density estimation without x."""
    assert not has_likelihood(torch.ones(10, 3))
    assert has_likelihood(torch.tensor([[1.0, 2.0], [1.0, 3.0]]))


def test_two_hundred_outputs_are_possible():
    """As many outputs as there may be, and more than simulations, are whitened."""
    theta = PRIOR.sample((120,))
    x = theta @ torch.randn(2, 200) + torch.randn(120, 200)
    surrogates = build(theta, x)
    log_l = surrogates(PRIOR.sample((5, 120)), x)
    assert log_l.shape == (3, 5, 120)
    assert (log_l.abs() < MAX_LOG_LIKELIHOOD).all()


def test_surrogates_survive_the_state_dict():
    """All they have learnt from simulations is in the state."""
    theta, x = mixed(300)
    surrogates = randomize(build(theta, x), 0.1)
    other_theta, other_x = mixed(300)
    other = randomize(build(other_theta, 2 * other_x), 0.1)
    at = PRIOR.sample((2, 300))
    assert not torch.equal(other(at, x), surrogates(at, x))
    other.load_state_dict(surrogates.state_dict())
    assert torch.equal(other(at, x), surrogates(at, x))
    torch.manual_seed(1)
    loss = surrogates.train().losses(theta, x, [0])[0]
    torch.manual_seed(1)
    assert torch.equal(other.train().losses(theta, x, [0])[0], loss)


def test_untrained_it_is_near_the_likelihood_of_a_linear_task():
    """Log likelihoods of two parameters differ as in closed form."""
    theta, x = simulations(4000)
    surrogates = build(theta, x).eval()
    noise = MultivariateNormal(torch.zeros(3), NOISE @ NOISE.T)
    at = theta[:500] + 0.3 * torch.randn(2, 500, 2)
    for k in (0, 1):
        member, _ = independent(surrogates, k)
        # Student's tails are too heavy for Gaussian noise, which training finds out.
        nn.init.constant_(member.tails, 1e4)
    with torch.no_grad():
        log_l = surrogates(at, x[:500], [0, 1])
    exact = noise.log_prob(x[:500] - at @ MIXING.T)
    difference = exact[1] - exact[0]
    assert difference.std() > 2
    for surrogate in log_l:
        error = surrogate[1] - surrogate[0] - difference
        assert error.abs().median() < 0.1 * difference.abs().median()


def test_regression_is_fitted_to_the_parameters_that_it_is_given():
    """Where outputs tell much, the likeliest parameters are the true ones."""
    prior = MultivariateNormal(torch.zeros(1), torch.eye(1))
    noise = 0.05
    theta = prior.sample((4000,))
    x = theta + noise * torch.randn(4000, 1)
    coordinates = ResidualCoordinates(theta, x, Features(x), prior)
    surrogates = SurrogateLikelihoods(theta, x, coordinates).eval()
    # Far from the average, where parameters are saturated.
    truth = torch.linspace(1.5, 2.5, 21)
    truth = torch.cat((truth, -truth))
    offsets = noise * torch.linspace(-4, 4, 801)
    at = truth + offsets.unsqueeze(1)
    with torch.no_grad():
        log_l = surrogates(at.unsqueeze(-1), truth.unsqueeze(-1), [0])[0]
    outwards = truth.sign() * offsets[log_l.argmax(0)] / noise
    # Normal scores are wrong by as much here and there, but not to one side.
    assert outwards.mean().abs() < 0.25


@pytest.mark.slow
def test_trained_it_is_near_the_likelihood_of_a_nonlinear_task():
    """Every surrogate learns means and scales that the regression cannot have."""

    def likelihood(theta):
        mean = torch.cat((theta**2, theta), -1)
        log_scale = torch.cat((0.5 * theta - 1, -0.5 * theta - 1), -1)
        return Normal(mean, log_scale.exp())

    prior = MultivariateNormal(torch.zeros(1), torch.eye(1))
    theta = prior.sample((3000,))
    x = likelihood(theta).sample()
    coordinates = ResidualCoordinates(theta, x, Features(x), prior)
    surrogates = SurrogateLikelihoods(theta, x, coordinates)
    at = prior.sample((1000,))
    outputs = likelihood(at).sample()
    pair = at + 0.5 * torch.randn(2, 1000, 1)
    exact = likelihood(pair).log_prob(outputs).sum(-1)

    def errors():
        with torch.no_grad():
            log_l = surrogates.eval()(pair, outputs)
        difference = log_l[:, 1] - log_l[:, 0]
        return (difference - exact[1] + exact[0]).abs().median(1).values

    before = errors()
    optimizer = torch.optim.Adam(surrogates.parameters(), 1e-2)
    for _ in range(8):
        surrogates.train()
        for batch in torch.randperm(len(theta)).split(200):
            losses = surrogates.losses(theta[batch], x[batch], range(4))
            optimizer.zero_grad()
            losses.sum(0).mean().backward()
            optimizer.step()
    # What is left is their own, of few epochs: they err by a third of the difference.
    assert (errors() < 0.6 * before).all()


def test_imagined_outputs_are_such_as_simulations_have():
    """Within their range, and those on an even lattice on it."""
    theta = torch.randn(900, 1)
    counts = torch.poisson(20 * (0.7 * theta).exp()) + 0.5
    positive = theta.square() + 0.5 + 0.2 * torch.rand_like(theta)
    x = torch.cat((counts, positive), 1)
    x[0, 0] = torch.nan
    surrogates = build(theta, x).eval()
    assert (surrogates.outputs.spacing > 0).tolist() == [True, False]
    for k in range(len(surrogates)):
        weights = torch.zeros(len(surrogates))
        weights[k] = 1.0
        drawn = surrogates.sample(theta, x, weights)
        assert drawn[0, 0].isnan()
        low, high = x[1:].amin(0), x[1:].amax(0)
        assert ((drawn[1:] >= low) & (drawn[1:] <= high)).all()
        torch.testing.assert_close(drawn[1:, 0].frac(), torch.full((899,), 0.5))
        # Those of flows that have not learnt are beyond it.
        assert k == 3 or (drawn[1:] == low).any(1).float().mean() < 0.4
        assert (drawn[1:, 1] != x[1:, 1]).float().mean() > 0.98
