"""Priors of every kind, from training to the refined posterior."""

import math
import warnings

import pytest
import scipy.stats
import torch
from helpers import assert_epochs_are_finite
from sbi.inference import NPE, MCMCPosterior
from sbi.neural_nets import posterior_nn
from sbi.utils import BoxUniform, MultipleIndependent, RestrictedPrior, process_prior
from sbi.utils.sbiutils import ImproperEmpirical
from torch.distributions import (
    Beta,
    Exponential,
    Gamma,
    Independent,
    LogNormal,
    MultivariateNormal,
    Normal,
    Uniform,
)

from sbi_jeffreys import JeffreysNPE, NoTracker, energy_nn, proxy_based_potential
from sbi_jeffreys.base_measure import (
    LebesgueMeasure,
    PriorMeasure,
    is_inside,
    make_base_measure,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Maximum number of epochs"),
    pytest.mark.filterwarnings("ignore:The passed prior has no support property"),
    pytest.mark.filterwarnings("ignore:The passed discrete prior"),
]

INF = math.inf


class ScipyPrior:
    """A scipy distribution as a user wraps it for sbi."""

    def __init__(self, distribution):
        self.distribution = distribution

    def sample(self, sample_shape=()):
        seed = int(torch.randint(2**31, ()))
        return self.distribution.rvs(size=(*sample_shape, 2), random_state=seed)

    def log_prob(self, theta):
        return self.distribution.logpdf(theta).sum(-1)


class Ring:
    """A custom prior in torch, uniform on a ring that leaves its own mean out."""

    def sample(self, sample_shape=()):
        radius = (1 + 3 * torch.rand(*sample_shape, 1)).sqrt()
        angle = 2 * math.pi * torch.rand(*sample_shape, 1)
        return radius * torch.cat((angle.cos(), angle.sin()), -1)

    def log_prob(self, theta):
        squared = theta.square().sum(-1)
        inside = (squared > 1) & (squared < 4)
        return torch.where(inside, -math.log(3 * math.pi), -INF)


def process(prior, **bounds):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sbi says that it wraps the prior
        return process_prior(prior, bounds)[0]


def gamma(dtype):
    return Gamma(2 * torch.ones(1, dtype=dtype), torch.ones(1, dtype=dtype))


def halfplane():
    box = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
    return RestrictedPrior(box, lambda theta: theta[:, 0] > 0, sample_with="rejection")


# Prior and the bounds of its support, written down here and not asked of it.
PRIORS = {
    "box": (
        lambda: BoxUniform(torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 3.0])),
        [(-2, 2), (0, 3)],
    ),
    "normal": (
        lambda: MultivariateNormal(
            torch.ones(2), torch.tensor([[1.0, 0.6], [0.6, 2.0]])
        ),
        [(-INF, INF)] * 2,
    ),
    "independent": (
        lambda: MultipleIndependent([
            Uniform(torch.zeros(1), 2 * torch.ones(1)),
            Gamma(2 * torch.ones(1), torch.ones(1)),
        ]),
        [(0, 2), (0, INF)],
    ),
    "independent, correlated": (
        lambda: MultipleIndependent([
            MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 1.0]])),
            Exponential(torch.ones(1)),
        ]),
        [(-INF, INF), (-INF, INF), (0, INF)],
    ),
    "list": (
        lambda: process([
            Normal(torch.zeros(1), torch.ones(1)),
            Beta(2 * torch.ones(1), 2 * torch.ones(1)),
        ]),
        [(-INF, INF), (0, 1)],
    ),
    "half-bounded": (
        lambda: Independent(LogNormal(torch.zeros(2), 0.5 * torch.ones(2)), 1),
        [(0, INF)] * 2,
    ),
    "restricted": (halfplane, [(0, 2), (-2, 2)]),
    "scipy": (lambda: process(ScipyPrior(scipy.stats.norm(1, 2))), [(-INF, INF)] * 2),
    "scipy, bounded": (
        lambda: process(
            ScipyPrior(scipy.stats.beta(2, 3)),
            lower_bound=torch.zeros(2),
            upper_bound=torch.ones(2),
        ),
        [(0, 1)] * 2,
    ),
    "scipy, half-bounded": (
        lambda: process(ScipyPrior(scipy.stats.gamma(2)), lower_bound=torch.zeros(2)),
        [(0, INF)] * 2,
    ),
    "double": (
        lambda: process(
            MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
        ),
        [(-INF, INF)] * 2,
    ),
    "one parameter": (lambda: process(gamma(torch.float32)), [(0, INF)]),
    "one parameter, double": (lambda: process(gamma(torch.float64)), [(0, INF)]),
    "custom": (lambda: process(Ring()), [(-2, 2)] * 2),
}


def simulate(prior, num):
    theta = prior.sample(torch.Size((num,)))
    return theta, theta + 0.3 * torch.randn_like(theta)


def train(prior, theta, x, **kwargs):
    inference = JeffreysNPE(
        prior,
        posterior_nn("zuko_maf", hidden_features=10, num_transforms=2),
        tracker=NoTracker(),
        show_progress_bars=False,
        energy_estimator=energy_nn(10, 1),
    )
    inference.append_simulations(theta, x)
    inference.train(**{
        "max_num_epochs": 15,
        "learning_rate": 1e-2,
        "training_batch_size": 50,
        **kwargs,
    })
    return inference


@pytest.mark.parametrize("name", PRIORS)
def test_from_training_to_posterior(name, capsys):
    make, bounds = PRIORS[name]
    prior = make()
    theta, x = simulate(prior, 400)
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Maximum number of epochs")
        inference = train(prior, theta, x)
    # sbi's RestrictedPrior reports every drawing; training draws hundreds of times.
    assert capsys.readouterr().out.count("rejected") <= 2
    assert_epochs_are_finite(inference.summary)
    estimator = inference._neural_net
    assert isinstance(estimator.proxy.base, PriorMeasure)
    low, high = torch.tensor(bounds, dtype=torch.float32).T
    # The proxy's base measure is the prior, up to a constant; zero outside.
    log_b = estimator.proxy.base.log_prob(theta)
    expected = prior.log_prob(theta)
    torch.testing.assert_close(
        log_b - log_b[0], expected - expected[0], atol=1e-4, rtol=1e-4
    )
    outside = torch.where(low.isfinite(), low - 0.1, theta[0])
    if low.isfinite().any():
        assert torch.isneginf(estimator.proxy.base.log_prob(outside[None])).all()
    theta_o, x_o = simulate(prior, 30)
    error = {}
    for sample_with in ("direct", "refined"):
        posterior = inference.build_posterior(sample_with=sample_with)
        samples = posterior.sample_batched((100,), x_o, show_progress_bars=False)
        assert samples.shape == (100, 30, theta.shape[1])
        restricted = name in ("restricted", "custom") and sample_with == "direct"
        if not restricted:  # of which sbi knows the surrounding box only
            flat = samples.flatten(0, 1)
            assert ((flat >= low) & (flat <= high)).all()
            assert is_inside(prior, flat).all()
        assert posterior.log_prob(samples[:5, 0], x=x_o[:1]).isfinite().all()
        error[sample_with] = (samples.mean(0) - theta_o).square().mean(0).sqrt()
    # The prior alone would be off by its spread; the best by what noise of 0.3 leaves.
    spread = theta.std(0)
    best = 0.3 * spread / (spread**2 + 0.09).sqrt()
    for values in error.values():
        if name == "custom":
            continue  # a ring is more than fifteen epochs can learn
        assert values.mean() < (0.3 * best + 0.7 * spread).mean() + 0.02


@pytest.mark.parametrize("name", ["independent", "scipy, bounded"])
def test_mcmc_on_the_proxy_stays_within(name):
    make, bounds = PRIORS[name]
    prior = make()
    theta, x = simulate(prior, 200)
    estimator = train(prior, theta, x, max_num_epochs=2)._neural_net
    potential, transform = proxy_based_potential(estimator, prior, x[:1])
    posterior = MCMCPosterior(
        potential, prior, transform, num_chains=10, warmup_steps=10, thin=1
    )
    samples = posterior.sample((100,), show_progress_bars=False)
    low, high = torch.tensor(bounds, dtype=torch.float32).T
    assert ((samples >= low) & (samples <= high)).all()
    assert len(samples.unique(dim=0)) > 90


def test_without_a_prior_the_measure_is_lebesgues():
    theta = 0.5 * torch.randn(400, 2) + torch.tensor([3.0, -1.0])
    x = theta + 0.3 * torch.randn(400, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inference = train(None, theta, x, max_num_epochs=40)
    said = [str(w.message) for w in caught if "Lebesgue measure" in str(w.message)]
    assert len(said) == 1  # once, and in clear
    assert "No prior was given" in said[0]
    base = inference._neural_net.proxy.base
    assert isinstance(base, LebesgueMeasure)
    assert base.log_prob(100 * theta[:5]).eq(0).all()
    # The posterior of parameters N(m, 0.25): halfway and more from m to x.
    x_o = torch.tensor([[3.5, -1.5]])
    weight = 0.25 / (0.25 + 0.09)
    expected = weight * x_o[0] + (1 - weight) * torch.tensor([3.0, -1.0])
    for sample_with in ("direct", "refined"):
        posterior = inference.build_posterior(sample_with=sample_with)
        samples = posterior.sample((1000,), x=x_o, show_progress_bars=False)
        torch.testing.assert_close(samples.mean(0), expected, atol=0.15, rtol=0)
    # Other ways to sample need bounds, or a proposal: given late.
    late = MultivariateNormal(theta.mean(0), torch.eye(2))
    with pytest.raises(ValueError, match="You did not pass a prior"):
        inference.build_posterior(sample_with="mcmc")
    assert inference.build_posterior(prior=late, sample_with="mcmc").sample(
        (5,), x=x_o, num_chains=2, warmup_steps=2, show_progress_bars=False
    ).shape == (5, 2)


def test_an_improper_prior_is_refused_as_by_npe():
    improper = ImproperEmpirical(torch.randn(100, 2), torch.ones(100))
    messages = []
    for cls in (NPE, JeffreysNPE):
        with pytest.raises(NotImplementedError) as caught:
            cls(improper, tracker=NoTracker())
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_lebesgue_by_choice_is_no_surprise():
    theta = torch.randn(100, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Maximum number of epochs")
        inference = JeffreysNPE(
            density_estimator=posterior_nn("maf", hidden_features=5, num_transforms=1),
            tracker=NoTracker(),
            show_progress_bars=False,
            energy_estimator=energy_nn(5, 1, base_measure="lebesgue"),
        )
        inference.append_simulations(theta, theta + torch.randn(100, 2))
        inference.train(max_num_epochs=1)


# ------------------------------------------------------------------------- restrictions


def test_restricted_prior_is_a_density():
    prior = halfplane()
    measure = make_base_measure("prior", prior, prior.sample((200,)))
    theta = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [3.0, 0.0]])
    log_b = measure.log_prob(theta)
    assert log_b[0].item() == pytest.approx(-math.log(8), abs=0.1)  # half of 4 by 4
    assert torch.isneginf(log_b[1:]).all()
    samples = measure.sample(50, 3)
    assert samples.shape == (50, 3, 2)
    assert (samples[..., 0] > 0).all()
    assert is_inside(prior, theta).tolist() == [True, False, False]
    # What leaks is led back, and costs.
    theta.requires_grad_()
    extended = measure.extended_log_prob(theta)
    assert extended.isfinite().all()
    assert (extended[1:] < extended[0] - 1).all()
    (gradient,) = torch.autograd.grad(extended.sum(), theta)
    assert gradient[1, 0] > 0 and gradient[2, 0] < 0


@pytest.mark.parametrize("num_parameters", [1, 2])
def test_restricted_prior_of_independent_parameters_unwrapped(num_parameters):
    """sbi takes a batch of priors for one over all parameters."""
    unit = Uniform(torch.zeros(num_parameters), torch.ones(num_parameters))
    prior = RestrictedPrior(unit, lambda theta: theta[:, 0] < 0.5, "rejection")
    measure = make_base_measure("prior", prior, prior.sample((200,)))
    theta = torch.tensor([[0.2, 0.1], [0.7, 0.1], [0.4, 0.9]])[:, :num_parameters]
    log_b = measure.log_prob(theta)
    assert log_b[::2].tolist() == pytest.approx(2 * [math.log(2)], abs=0.1)
    assert log_b[1] == -INF


def test_parameters_that_a_restricted_prior_rejects_are_counted(capsys):
    inference = JeffreysNPE(halfplane(), tracker=NoTracker(), show_progress_bars=False)
    theta = torch.rand(100, 2)
    theta[:7] *= -1
    with pytest.warns(UserWarning, match="7 of 100 .*outside the prior"):
        inference.append_simulations(theta, torch.randn(100, 2))
    with pytest.raises(ValueError, match="3 parameters, but the prior is over 2"):
        inference.append_simulations(torch.rand(100, 3), torch.randn(100, 2))


@pytest.mark.parametrize("name", ["custom", "restricted"])
def test_a_support_without_its_mean(name):
    if name == "custom":
        prior = process(Ring())
    else:
        box = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
        prior = RestrictedPrior(box, lambda theta: theta.norm(dim=1) > 1)
    measure = make_base_measure("prior", prior, prior.sample((500,)))
    theta = torch.tensor([[0.1, 0.0], [0.0, -0.5], [5.0, 0.0]], requires_grad=True)
    extended = measure.extended_log_prob(theta)
    assert extended.isfinite().all()
    (gradient,) = torch.autograd.grad(extended.sum(), theta)
    assert gradient.isfinite().all() and gradient[2, 0] < 0
    inside = torch.isfinite(measure.log_prob(measure.center.unsqueeze(0)))
    assert inside.all()
