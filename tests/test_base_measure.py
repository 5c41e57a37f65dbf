"""Base measures inside, outside and on the edge of every kind of support."""

import math
import warnings

import pytest
import scipy.stats
import torch
from sbi.utils import BoxUniform, RestrictedPrior, process_prior
from sbi.utils.sbiutils import ImproperEmpirical
from torch.distributions import (
    Beta,
    Gamma,
    Independent,
    LogNormal,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    Uniform,
)
from torch.distributions.transforms import AffineTransform

from sbi_jeffreys.base_measure import LebesgueMeasure, PriorMeasure, make_base_measure

INF = torch.inf


class ScipyPrior:
    """A prior as a user without torch would write it."""

    def __init__(self, distribution):
        self.distribution = distribution

    def sample(self, sample_shape=()):
        return self.distribution.rvs(size=(*sample_shape, 2), random_state=0)

    def log_prob(self, theta):
        return self.distribution.logpdf(theta).sum(-1)


def process(prior, bounds=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sbi says that it wraps the prior
        return process_prior(prior, bounds)[0]


def custom_prior(distribution, **bounds):
    return process(ScipyPrior(distribution), bounds)


def ones(*values):
    return torch.tensor(values)


# Prior, lower and upper bound of its support: written down here, not asked of it.
PRIORS = {
    "box": (BoxUniform(ones(-1.0, 0.0), ones(1.0, 5.0)), ones(-1, 0), ones(1, 5)),
    "beta": (
        Independent(Beta(ones(2.0, 3.0), ones(2.0, 1.5)), 1),
        ones(0, 0),
        ones(1, 1),
    ),
    "lognormal": (
        Independent(LogNormal(torch.zeros(2), ones(0.5, 1.0)), 1),
        ones(0, 0),
        ones(INF, INF),
    ),
    "gamma": (
        Independent(Gamma(ones(2.0, 3.0), ones(1.0, 2.0)), 1),
        ones(0, 0),
        ones(INF, INF),
    ),
    "normal": (
        MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 2.0]])),
        ones(-INF, -INF),
        ones(INF, INF),
    ),
    "bounded custom": (
        custom_prior(
            scipy.stats.beta(2, 2),
            lower_bound=torch.zeros(2),
            upper_bound=torch.ones(2),
        ),
        ones(0, 0),
        ones(1, 1),
    ),
    "list": (
        process([
            Uniform(torch.zeros(1), torch.ones(1)),
            LogNormal(torch.zeros(1), torch.ones(1)),
        ]),
        ones(0, 0),
        ones(1, INF),
    ),
    "list with normal": (
        process([
            Normal(torch.zeros(1), torch.ones(1)),
            Uniform(-torch.ones(1), torch.ones(1)),
        ]),
        ones(-INF, -1),
        ones(INF, 1),
    ),
    "far box": (
        BoxUniform(ones(1000.0, -1e4), ones(1001.0, -9.99e3)),
        ones(1000, -1e4),
        ones(1001, -9.99e3),
    ),
}
BOUNDED = [name for name in PRIORS if name != "normal"]


def make(name, base="prior"):
    prior, low, high = PRIORS[name]
    return make_base_measure(base, prior, prior.sample(torch.Size((400,)))), low, high


def outside(measure, low, high):
    """Return points beyond every bound, in one dimension and in all."""
    inside = measure.sample(1, 1).reshape(-1)
    points = []
    for far in (0.1, 3.0):
        below = torch.where(torch.isfinite(low), low - far * measure.scale, inside)
        above = torch.where(torch.isfinite(high), high + far * measure.scale, inside)
        for beyond in (below, above):
            points.append(beyond)
            points += [
                torch.where(torch.arange(2) == i, beyond, inside) for i in (0, 1)
            ]
    points = torch.stack(points)
    return points[((points < low) | (points > high)).any(-1)]


def distance(theta, low, high):
    return (theta - theta.clamp(low, high)).norm(dim=-1)


@pytest.mark.parametrize("name", PRIORS)
def test_inside_all_agree_with_the_prior(name):
    measure, _, _ = make(name)
    prior = PRIORS[name][0]
    theta = measure.sample(50, 3)
    assert theta.shape == (50, 3, 2)
    assert theta.dtype == torch.float32
    expected = prior.log_prob(theta.reshape(-1, 2)).reshape(50, 3)
    torch.testing.assert_close(measure.log_prob(theta), expected)
    torch.testing.assert_close(measure.reference_log_prob(theta), expected)
    torch.testing.assert_close(measure.extended_log_prob(theta), expected)


@pytest.mark.parametrize("name", BOUNDED)
def test_outside_is_minus_infinity(name):
    measure, low, high = make(name)
    theta = outside(measure, low, high)
    assert len(theta) > 2
    assert torch.equal(measure.log_prob(theta), torch.full((len(theta),), -INF))
    both = torch.cat((theta, measure.sample(1, 1)[0]))
    log_prob = measure.log_prob(both)
    assert torch.isneginf(log_prob[:-1]).all() and torch.isfinite(log_prob[-1])
    single = measure.log_prob(theta[:1])
    assert single.shape == (1,) and torch.isneginf(single).all()


@pytest.mark.parametrize("base", ["prior", "lebesgue"])
@pytest.mark.parametrize("name", BOUNDED)
def test_what_leaks_is_led_back(name, base):
    measure, low, high = make(name, base)
    theta = outside(measure, low, high).requires_grad_()
    extended = measure.extended_log_prob(theta)
    assert torch.isfinite(extended).all()
    (gradient,) = torch.autograd.grad(extended.sum(), theta)
    assert torch.isfinite(gradient).all()
    # A small step, in units of the spread of the parameters.
    step = 1e-3 * measure.scale**2 * gradient
    before = distance(theta.detach(), low, high)
    after = distance(theta.detach() + step, low, high)
    assert (after < before).all()
    # Coordinates within the support are left where they are, by the cost at least.
    if base == "lebesgue":
        within = (theta > low) & (theta < high)
        assert (gradient[within] == 0).all()


@pytest.mark.parametrize("name", BOUNDED)
def test_cost_grows_with_the_distance(name):
    measure, low, high = make(name, "lebesgue")
    inside = PRIORS[name][0].sample(torch.Size((1,)))[0]
    bound, sign = (low, -1) if torch.isfinite(low).all() else (high, 1)
    for i in range(2):
        if not torch.isfinite(bound[i]):
            continue
        sigmas = torch.tensor([0.5, 1.0, 2.0])
        theta = inside.repeat(3, 1)
        theta[:, i] = bound[i] + sign * sigmas * measure.scale[i]
        cost = -measure.extended_log_prob(theta, slope=7.0)
        # b = 1 inside: only the cost is left, 7 nats a standard deviation.
        torch.testing.assert_close(cost, 7.0 * sigmas, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", BOUNDED)
def test_bounds_themselves_are_finite(name):
    measure, low, high = make(name)
    inside = PRIORS[name][0].sample(torch.Size((1,)))[0]
    edges = torch.stack([
        torch.where(torch.isfinite(bound), bound, inside) for bound in (low, high)
    ]).requires_grad_()
    extended = measure.extended_log_prob(edges)
    assert torch.isfinite(extended).all()
    (gradient,) = torch.autograd.grad(extended.sum(), edges)
    assert not gradient.isnan().any()


def test_gradient_inside_is_that_of_the_prior():
    measure, _, _ = make("gamma")
    theta = measure.sample(20, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(measure.extended_log_prob(theta).sum(), theta)
    # d/dt [(a - 1) log t - r t]
    expected = ones(1.0, 2.0) / theta - ones(1.0, 2.0)
    torch.testing.assert_close(gradient, expected)


def test_gradient_of_a_prior_that_leaves_torch():
    prior = custom_prior(scipy.stats.norm(1.0, 2.0))
    measure = make_base_measure("prior", prior, prior.sample((400,)))
    theta = torch.randn(10, 1, 2, requires_grad=True)
    extended = measure.extended_log_prob(theta)
    expected = Normal(1.0, 2.0).log_prob(theta).sum(-1)
    torch.testing.assert_close(extended, expected)
    (gradient,) = torch.autograd.grad(extended.sum(), theta)
    torch.testing.assert_close(gradient, -(theta - 1) / 4, rtol=1e-3, atol=1e-3)


class Detaching(ScipyPrior):
    def log_prob(self, theta):
        return super().log_prob(torch.as_tensor(theta).detach().numpy())


@pytest.mark.parametrize("num_points, num_copies", [(10, 1), (1, 1), (1, 3)])
def test_gradient_of_a_prior_that_detaches(num_points, num_copies):
    prior = process(Detaching(scipy.stats.norm(1.0, 2.0)))
    measure = make_base_measure("prior", prior, prior.sample((400,)))
    points = torch.randn(num_points, 1, 2).repeat(num_copies, 1, 1)
    theta = points.requires_grad_()
    extended = measure.extended_log_prob(theta).sum()
    assert extended.requires_grad
    (gradient,) = torch.autograd.grad(extended, theta)
    torch.testing.assert_close(gradient, -(theta - 1) / 4, rtol=1e-3, atol=1e-3)


def test_a_prior_without_gradient_is_not_asked_beyond_its_support():
    class Strict(Detaching):
        def log_prob(self, theta):
            log_prob = super().log_prob(theta)
            if not torch.isfinite(torch.as_tensor(log_prob)).all():
                raise ValueError("outside")
            return log_prob

    bounds = {"lower_bound": torch.zeros(2), "upper_bound": torch.ones(2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prior = process_prior(Strict(scipy.stats.beta(2, 1)), bounds)[0]
    measure = make_base_measure("prior", prior, torch.rand(400, 2))
    theta = torch.tensor([[0.5, 0.25], [0.9999, 0.4]], requires_grad=True)
    (gradient,) = torch.autograd.grad(measure.extended_log_prob(theta).sum(), theta)
    # d/dt log t; none in the direction of the bound that a step would cross.
    expected = torch.tensor([[2.0, 4.0], [0.0, 2.5]])
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)


def test_custom_prior_without_bounds_stays_finite():
    # sbi takes the support of a prior that says nothing of it for all reals.
    prior = custom_prior(scipy.stats.uniform(0, 1))
    measure = make_base_measure("prior", prior, prior.sample((400,)))
    theta = torch.tensor([[0.5, 0.5], [1.5, 0.5], [-1.0, 2.0]], requires_grad=True)
    assert torch.isneginf(measure.log_prob(theta)).tolist() == [False, True, True]
    extended = measure.extended_log_prob(theta)
    assert torch.isfinite(extended).all()
    (gradient,) = torch.autograd.grad(extended.sum(), theta)
    low, high = torch.zeros(2), torch.ones(2)
    after = distance(theta.detach() + 1e-3 * gradient, low, high)
    assert (after[1:] < distance(theta.detach(), low, high)[1:]).all()


def test_a_density_that_is_nan_beyond_its_bounds_is_zero_there():
    """Torch takes the support of a Beta on another interval for all reals."""
    unit = Beta(ones(2.0, 2.0), ones(2.0, 2.0))
    stretched = TransformedDistribution(unit, [AffineTransform(5.0, 3.0)])
    prior = process(Independent(stretched, 1))
    theta = torch.tensor([[6.0, 7.0], [4.0, 7.0], [6.0, 9.0]])
    assert prior.log_prob(theta).isnan().tolist() == [False, True, True]
    for name in ("prior", "lebesgue"):
        measure = make_base_measure(name, prior, prior.sample((400,)))
        # 6 u (1 - u) / 3 in each direction.
        expected = math.log(4 / 9) * 2 if name == "prior" else 0.0
        for log_b in (measure.log_prob(theta), measure.extended_log_prob(theta)):
            assert log_b[0] == pytest.approx(expected, abs=1e-5)
        assert (measure.log_prob(theta[1:]) == -INF).all()
        assert (measure.reference_log_prob(theta[1:]) == -INF).all()
        assert measure.extended_log_prob(theta).isfinite().all()


def test_restricted_prior():
    box = BoxUniform(torch.zeros(2), torch.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prior = RestrictedPrior(
            box, lambda theta: theta.sum(-1) < 1, sample_with="rejection"
        )
    measure = make_base_measure("prior", prior, prior.sample((400,)))
    theta = torch.tensor([[0.2, 0.2], [0.9, 0.9], [1.5, 0.2]], requires_grad=True)
    assert torch.isneginf(measure.log_prob(theta)).tolist() == [False, True, True]
    extended = measure.extended_log_prob(theta)
    assert torch.isfinite(extended).all()
    # No box: the way back leads to the mean.
    (gradient,) = torch.autograd.grad(extended.sum(), theta)
    before = (theta - measure.center).norm(dim=-1)
    after = (theta + 1e-3 * gradient - measure.center).norm(dim=-1)
    assert (after < before)[1:].all()


def test_lebesgue_measure_is_one_on_the_support():
    measure, _, _ = make("box", "lebesgue")
    assert isinstance(measure, LebesgueMeasure)
    theta = torch.tensor([[0.0, 1.0], [0.5, 4.9], [2.0, 1.0]])
    assert measure.log_prob(theta).tolist() == [0.0, 0.0, -INF]
    # Its reference, from which the partition function draws, is the prior.
    torch.testing.assert_close(
        measure.reference_log_prob(theta),
        torch.tensor([0.1, 0.1, 0.0]).log(),
    )


@pytest.mark.parametrize("empirical", [False, True])
def test_without_prior_the_reference_covers_the_parameters(empirical):
    theta = torch.randn(2000, 2) @ torch.tensor([[1.0, 0.9], [0.0, 0.3]]) + 5
    prior = ImproperEmpirical(theta, torch.ones(len(theta))) if empirical else None
    with pytest.warns(UserWarning, match="No prior was given"):
        measure = make_base_measure("prior", prior, theta)
    assert isinstance(measure, LebesgueMeasure)
    assert measure.log_prob(theta).eq(0).all()
    samples = measure.sample(4000, 1)[:, 0]
    torch.testing.assert_close(samples.mean(0), theta.mean(0), atol=0.15, rtol=0)
    torch.testing.assert_close(samples.T.cov(), 4 * theta.T.cov(), rtol=0.1, atol=0.05)
    expected = MultivariateNormal(theta.mean(0), 4 * theta.T.cov()).log_prob(samples)
    torch.testing.assert_close(
        measure.reference_log_prob(samples), expected, rtol=1e-3, atol=1e-3
    )


def test_without_prior_nothing_depends_on_units():
    theta = torch.randn(2000, 2, dtype=torch.double)
    units = torch.tensor([1e-4, 1e4], dtype=torch.double)
    measure = make_base_measure("lebesgue", None, theta)
    rescaled = make_base_measure("lebesgue", None, theta * units)
    points = torch.randn(20, 2, dtype=torch.double)
    torch.testing.assert_close(
        rescaled.reference_log_prob(points * units) + units.log().sum(),
        measure.reference_log_prob(points),
    )


def test_lebesgue_without_prior_is_no_surprise():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_base_measure("lebesgue", None, torch.randn(100, 2))


def test_prior_measure_is_chosen_by_name():
    prior = PRIORS["box"][0]
    theta = prior.sample((10,))
    assert isinstance(make_base_measure("prior", prior, theta), PriorMeasure)
    assert isinstance(make_base_measure("lebesgue", prior, theta), LebesgueMeasure)


def test_constant_parameter_has_a_unit_scale():
    theta = torch.stack((torch.randn(100), torch.full((100,), 3.0)), 1)
    measure = make_base_measure("lebesgue", PRIORS["normal"][0], theta)
    assert measure.scale[1] == 1
    assert torch.isfinite(measure.extended_log_prob(theta)).all()


@pytest.mark.parametrize("name", ["prior", "lebesgue"])
def test_the_measure_ends_where_the_prior_is_negligible(name):
    """Ten nats below its least density at a simulation, in closed form."""
    prior = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    theta = torch.tensor([[0.0, 0.0], [3.0, 0.0], [-1.0, 2.0]])
    base = make_base_measure(name, prior, theta)
    # log b falls by r^2 / 2 from the centre: at the outermost simulation by 4.5.
    radius = torch.tensor(2 * (4.5 + 10.0)).sqrt()
    direction = torch.tensor([0.6, -0.8])
    points = torch.stack((0.999 * radius * direction, 1.001 * radius * direction))
    if name == "lebesgue":  # which is nowhere negligible
        assert (base.log_prob(points) == 0).all()
        return
    inside, outside = base.log_prob(points)
    assert inside == pytest.approx(prior.log_prob(points[0]).item(), rel=1e-6)
    assert outside == -INF
    # The reference has samples everywhere.
    assert base.reference_log_prob(points).isfinite().all()


def test_the_measure_reaches_simulations_of_a_later_round():
    """A proposal may lie beyond where the prior's own simulations let it end."""
    prior = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    base = make_base_measure("prior", prior, torch.tensor([[0.0, 0.0], [3.0, 0.0]]))
    far = torch.tensor([[8.0, 0.0], [0.0, 8.1], [0.0, 0.0]])
    before = base.log_prob(far)
    assert (before == torch.tensor([-INF, -INF, before[2]])).all()
    base.reach(far[:1])
    torch.testing.assert_close(base.log_prob(far), prior.log_prob(far))
    # Ten nats below, in closed form, and it does not come back.
    radius = torch.tensor(2 * (32 + 10.0)).sqrt()
    end = torch.tensor([[0.999], [1.001]]) * radius * torch.tensor([0.6, -0.8])
    for theta in (far[2:], far[:1]):
        base.reach(theta)
        assert (base.log_prob(end).isfinite() == torch.tensor([True, False])).all()


def test_a_negligible_tail_is_left_by_a_gradient_that_is_finite():
    """Near its bound the density of a lognormal falls without end, and so steeply."""
    prior = Independent(LogNormal(torch.zeros(1), 0.5 * torch.ones(1)), 1)
    torch.manual_seed(0)
    base = make_base_measure("prior", prior, prior.sample(torch.Size((500,))))
    theta = torch.tensor([[1e-30], [1e-6], [1e-3], [-0.5]], requires_grad=True)
    assert (base.log_prob(theta) == -INF).all()
    log_b = base.extended_log_prob(theta)
    (slope,) = torch.autograd.grad(log_b.sum(), theta)
    assert (slope > 0).all()  # back, to larger parameters
    assert slope.amax() == pytest.approx((10 / base.scale).item())
    assert log_b.isfinite().all() and (log_b > -100).all()
    assert (log_b.argsort(descending=True) == torch.tensor([2, 1, 0, 3])).all()


def test_simulations_outside_the_prior_end_nothing():
    prior = BoxUniform(torch.zeros(2), torch.ones(2))
    base = make_base_measure("prior", prior, 5 + torch.rand(20, 2))
    assert (base.log_prob(torch.rand(50, 2)) == 0).all()


class Elsewhere(Independent):
    """A prior on a device without data, until it is moved."""

    def __init__(self):
        super().__init__(Normal(torch.zeros(2), torch.ones(2)), 1)
        self.device = "meta"

    def to(self, device):
        self.device = str(device)

    def sample(self, sample_shape=torch.Size()):
        return super().sample(sample_shape).to(self.device)

    def log_prob(self, value):
        assert str(value.device) == self.device, "data on two devices"
        return super().log_prob(value)


@pytest.mark.parametrize("name", ["prior", "lebesgue"])
def test_the_measure_is_where_the_parameters_are(name):
    """sbi builds networks on the CPU, while the prior is where they are trained."""
    prior, theta = Elsewhere(), torch.randn(50, 2)
    before = torch.random.get_rng_state()
    base = make_base_measure(name, prior, theta)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert prior.device == "meta"  # the user's own has not been moved
    assert base.log_prob(theta).isfinite().all()
    assert base.sample(3, 4).device == theta.device
