"""What sbi does with the posterior of NPE, done with `JeffreysNPE` in NPE's place.

The task is Gaussian: theta ~ N(0, 1), x = theta + N(0, 0.25), in two dimensions. The
posterior is N(0.8 x, 0.2).
"""

import copy
import warnings

import matplotlib
import pytest
import torch
from sbi.analysis import (
    ActiveSubspace,
    conditional_corrcoeff,
    conditional_marginal_plot,
    conditional_pairplot,
    conditional_potential,
    marginal_plot,
    pairplot,
)
from sbi.inference import (
    NPE,
    DirectPosterior,
    EnsemblePosterior,
    ImportanceSamplingPosterior,
    MCMCPosterior,
    RejectionPosterior,
    VIPosterior,
    posterior_estimator_based_potential,
    simulate_for_sbi,
)
from sbi.neural_nets import posterior_nn
from sbi.utils import (
    BoxUniform,
    RestrictedPrior,
    RestrictionEstimator,
    get_density_thresholder,
)
from torch.distributions import MultivariateNormal

from sbi_jeffreys import (
    JeffreysNPE,
    NoTracker,
    RefinedPosterior,
    energy_nn,
    proxy_based_potential,
)

matplotlib.use("Agg")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Maximum number of epochs"),
    pytest.mark.filterwarnings("ignore:The following arguments are deprecated"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PRIOR = MultivariateNormal(torch.zeros(2), torch.eye(2))
X_O = torch.tensor([[1.0, -0.5]])
POSTERIOR = MultivariateNormal(0.8 * X_O[0], 0.2 * torch.eye(2))
# What training on 600 simulations leaves, in units of theta: the posterior's standard
# deviation is 0.45.
TRAINED = 0.12


def simulator(theta):
    return theta + 0.5 * torch.randn_like(theta)


def train(cls=JeffreysNPE, seed=1, prior=PRIOR, num=600, **kwargs):
    torch.manual_seed(0)
    theta = prior.sample((num,))
    x = simulator(theta)
    torch.manual_seed(seed)
    networks = {
        "density_estimator": posterior_nn(
            "zuko_maf", hidden_features=20, num_transforms=2
        )
    }
    if cls is JeffreysNPE:
        networks["energy_estimator"] = energy_nn(20, 1)
    inference = cls(prior, tracker=NoTracker(), show_progress_bars=False, **networks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inference.append_simulations(theta, x).train(**{
            "max_num_epochs": 120,
            "learning_rate": 5e-3,
            "training_batch_size": 100,
            **kwargs,
        })
    return inference


@pytest.fixture(scope="module")
def inference():
    return train()


@pytest.fixture(scope="module")
def others():
    """Return two more, of other seeds."""
    return [train(seed=seed, max_num_epochs=20, learning_rate=1e-2) for seed in (2, 3)]


@pytest.fixture(scope="module")
def npe():
    return train(NPE)


def assert_close_to(samples, mean, std, num_independent, bias=0.0):
    """Compare the moments of samples, by their standard errors and a bias."""
    error = 4.5 * std / num_independent**0.5
    assert ((samples.mean(0) - mean).abs() < error + bias).all()
    assert ((samples.std(0) - std).abs() < error + bias).all()


def flow_moments(inference):
    with torch.no_grad():
        samples = inference._neural_net.sample((20_000,), X_O).squeeze(1)
    return samples.mean(0), samples.std(0)


def proxy_moments(inference):
    """Return those of the proxy by quadrature: no sampler, no flow."""
    axis = torch.linspace(-3.5, 3.5, 141)
    theta = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_q = inference._neural_net.proxy.log_unnormalized(theta.unsqueeze(1), X_O)
    weights = torch.softmax(log_q.squeeze(1), 0).unsqueeze(1)
    mean = (weights * theta).sum(0)
    return mean, (weights * (theta - mean) ** 2).sum(0).sqrt()


# ------------------------------------------------------------------- build_posterior


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sample_with", "kwargs", "posterior_type", "num_independent"),
    [
        ("direct", {}, DirectPosterior, 2000),
        (
            "mcmc",
            {"mcmc_parameters": {"num_chains": 50, "warmup_steps": 20, "thin": 2}},
            MCMCPosterior,
            400,
        ),
        (
            "mcmc",
            {"mcmc_method": "slice_np", "mcmc_parameters": {"num_chains": 2}},
            MCMCPosterior,
            40,
        ),
        ("rejection", {}, RejectionPosterior, 2000),
        ("importance", {}, ImportanceSamplingPosterior, 500),
        ("vi", {}, VIPosterior, 2000),
    ],
)
def test_every_way_to_sample_the_flow(
    inference, sample_with, kwargs, posterior_type, num_independent
):
    posterior = inference.build_posterior(sample_with=sample_with, **kwargs)
    assert type(posterior) is posterior_type
    posterior.set_default_x(X_O)
    bias = 0.0
    if sample_with == "vi":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            posterior.train(max_num_iters=100, show_progress_bar=False)
        bias = 0.06  # of a variational family after 100 steps
    num = 60 if kwargs.get("mcmc_method") == "slice_np" else 2000
    samples = posterior.sample((num,), show_progress_bars=False)
    assert samples.shape == (num, 2)
    mean, std = flow_moments(inference)
    assert_close_to(samples, mean, std, num_independent, bias)
    assert_close_to(samples, POSTERIOR.mean, 0.2**0.5, num_independent, TRAINED + bias)
    # The potential is the flow's log density, whatever samples it.
    theta = PRIOR.sample((7,))
    with torch.no_grad():
        expected = inference._neural_net.log_prob(theta.unsqueeze(1), X_O).squeeze(1)
    torch.testing.assert_close(posterior.potential(theta), expected)


@pytest.mark.parametrize("sample_with", ["direct", "refined"])
def test_types_and_shapes_are_those_of_npe(inference, npe, sample_with):
    ours = inference.build_posterior(sample_with=sample_with).set_default_x(X_O)
    theirs = npe.build_posterior().set_default_x(X_O)
    theta = PRIOR.sample((5,))
    xs = PRIOR.sample((4,))
    for use in (
        lambda posterior: posterior.sample((3,)),
        lambda posterior: posterior.sample((3,), x=xs[0]),
        lambda posterior: posterior.sample_batched((3,), xs),
        lambda posterior: posterior.log_prob(theta),
        lambda posterior: posterior.potential(theta),
        lambda posterior: posterior.default_x,
        lambda posterior: posterior.prior.sample((2,)),
    ):
        got, expected = use(ours), use(theirs)
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        assert got.requires_grad == expected.requires_grad


def test_refined_posterior_lies_between_flow_and_proxy(inference):
    samples = {
        exponent: inference.build_posterior(
            sample_with="refined", refined_sampling_parameters={"exponent": exponent}
        ).sample((4000,), x=X_O)
        for exponent in (0.0, 1.0)
    }
    assert_close_to(samples[0.0], *flow_moments(inference), 4000)
    assert_close_to(samples[1.0], *proxy_moments(inference), 2500)
    assert_close_to(samples[1.0], POSTERIOR.mean, 0.2**0.5, 2500, TRAINED)


# ------------------------------------------------------------------------- potentials


def test_potential_of_the_flow_is_that_of_sbi(inference):
    estimator = inference._neural_net
    potential, transform = posterior_estimator_based_potential(estimator, PRIOR, X_O)
    reference, _ = posterior_estimator_based_potential(estimator.flow, PRIOR, X_O)
    theta = PRIOR.sample((9,))
    torch.testing.assert_close(potential(theta), reference(theta))
    posterior = MCMCPosterior(
        potential, PRIOR, transform, num_chains=50, warmup_steps=20, thin=2
    )
    samples = posterior.sample((1000,), show_progress_bars=False)
    assert_close_to(samples, *flow_moments(inference), 200)


@pytest.mark.parametrize("method", ["mcmc", "rejection", "importance"])
def test_any_sampler_takes_the_potential_of_the_proxy(inference, method):
    estimator = inference._neural_net
    potential, transform = proxy_based_potential(estimator, PRIOR, X_O)
    theta = PRIOR.sample((9,))
    with torch.no_grad():
        expected = (
            PRIOR.log_prob(theta) + estimator.proxy(theta.unsqueeze(1), X_O)[:, 0]
        )
    torch.testing.assert_close(potential(theta).detach(), expected)
    if method == "mcmc":
        posterior = MCMCPosterior(
            potential,
            proposal=PRIOR,
            theta_transform=transform,
            num_chains=50,
            warmup_steps=20,
            thin=2,
        )
    elif method == "rejection":
        posterior = RejectionPosterior(potential, PRIOR, transform)
    else:
        posterior = ImportanceSamplingPosterior(potential, PRIOR, transform)
    samples = posterior.sample((1000,), show_progress_bars=False)
    assert_close_to(samples, *proxy_moments(inference), 200)


def test_mcmc_on_the_proxy_knows_the_prior(inference):
    # Bounded: nothing beyond, and no gradient lost on the way through the transform.
    prior = BoxUniform(-torch.ones(2), torch.ones(2))
    potential, transform = proxy_based_potential(inference._neural_net, prior, X_O)
    outside = torch.tensor([[1.2, 0.0], [0.0, 0.0]])
    assert torch.isneginf(potential(outside)).tolist() == [True, False]
    posterior = MCMCPosterior(potential, prior, transform, num_chains=20, thin=1)
    samples = posterior.sample((200,), show_progress_bars=False)
    assert (samples.abs() <= 1).all()
    assert samples[:, 0].mean() > 0.4


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_several_observations(inference, exponent):
    xs = torch.tensor([[0.5, 0.0], [1.0, 0.4], [0.6, 0.2]])
    posterior = inference.build_posterior(
        sample_with="refined", refined_sampling_parameters={"exponent": exponent}
    )
    potential = copy.deepcopy(posterior.potential_fn)
    theta = PRIOR.sample((3,))
    # One for each parameter set, as sbi's potential of NPE reads them.
    potential.set_x(xs)
    expected = torch.cat([
        posterior.potential(t[None], x=x) for t, x in zip(theta, xs, strict=True)
    ])
    torch.testing.assert_close(potential(theta).detach(), expected)
    with pytest.raises(ValueError, match="3 observations need one parameter set each"):
        potential(theta[:2])
    # Or independent of each other.
    potential.set_x(xs, x_is_iid=True)
    expected = torch.stack([posterior.potential(theta, x=x) for x in xs]).sum(0)
    expected = expected - 2 * PRIOR.log_prob(theta)
    torch.testing.assert_close(potential(theta).detach(), expected)
    if exponent == 0.0:
        reference, _ = posterior_estimator_based_potential(
            inference._neural_net, PRIOR, None
        )
        for iid in (True, False):
            for potential_fn in (potential, reference):
                potential_fn.set_x(xs, x_is_iid=iid)
            expected = reference(theta).flatten()
            torch.testing.assert_close(potential(theta), expected)


def test_mcmc_on_several_independent_observations(inference):
    # Of three observations: precision 1 + 3 / 0.25, mean 12 / 13 of theirs.
    xs = torch.tensor([[0.5, 0.0], [1.0, 0.4], [0.6, 0.2]])
    potential, transform = proxy_based_potential(inference._neural_net, PRIOR, None)
    posterior = MCMCPosterior(
        potential, PRIOR, transform, num_chains=50, warmup_steps=20, thin=1
    )
    samples = posterior.sample((500,), x=xs, show_progress_bars=False)
    assert_close_to(samples, 12 / 13 * xs.mean(0), 13**-0.5, 200, 2 * TRAINED)


def test_potential_of_the_proxy_needs_one(npe):
    with pytest.raises(TypeError, match="proxy of a JeffreysEstimator"):
        proxy_based_potential(npe._neural_net, PRIOR, X_O)


# ------------------------------------------------------------------------ sbi.analysis


@pytest.mark.parametrize("sample_with", ["direct", "refined"])
def test_plots(inference, sample_with):
    posterior = inference.build_posterior(sample_with=sample_with).set_default_x(X_O)
    samples = posterior.sample((300,), show_progress_bars=False)
    limits = [[-3, 3], [-3, 3]]
    for figure, axes in (
        pairplot(samples, limits=limits, points=X_O),
        marginal_plot(samples, limits=limits),
        conditional_pairplot(
            density=posterior, condition=samples[0], limits=limits, resolution=10
        ),
        conditional_marginal_plot(
            density=posterior, condition=samples[0], limits=limits, resolution=10
        ),
    ):
        assert len(figure.axes) >= 2 and axes is not None
        matplotlib.pyplot.close(figure)


@pytest.mark.parametrize("sample_with", ["direct", "refined"])
def test_conditional_posterior(inference, sample_with):
    posterior = inference.build_posterior(sample_with=sample_with).set_default_x(X_O)
    condition = torch.tensor([[0.0, -0.4]])
    potential, transform, prior = conditional_potential(
        posterior.potential_fn,
        posterior.theta_transform,
        PRIOR,
        condition,
        dims_to_sample=[0],
    )
    conditional = MCMCPosterior(
        potential, prior, transform, num_chains=20, warmup_steps=20, thin=2
    ).set_default_x(X_O)
    samples = conditional.sample((1000,), x=X_O, show_progress_bars=False)
    assert samples.shape == (1000, 1)
    # Independent parameters: the conditional is the marginal.
    assert_close_to(samples, POSTERIOR.mean[:1], 0.2**0.5, 200, TRAINED)
    limits = torch.tensor([[-1.0, 3.0], [-2.5, 1.5]])
    correlation = conditional_corrcoeff(posterior, limits, condition, resolution=30)
    assert correlation.shape == (2, 2)
    assert abs(correlation[0, 1]) < 0.25


@pytest.mark.parametrize("sample_with", ["direct", "refined"])
def test_sensitivity(inference, sample_with):
    # The log density of a Gaussian: E[grad grad'] is its precision.
    posterior = inference.build_posterior(sample_with=sample_with).set_default_x(X_O)
    values, vectors = ActiveSubspace(posterior).find_directions(
        posterior_log_prob_as_property=True, num_monte_carlo_samples=500
    )
    # sbi divides the gradients by the number of samples.
    values = values * 500**2
    torch.testing.assert_close(values, torch.full((2,), 5.0), rtol=0.4, atol=0)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(2), atol=1e-4, rtol=0)


# --------------------------------------------------------------- ensembles, map, many x


@pytest.mark.parametrize("sample_with", ["direct", "refined"])
def test_ensemble_over_seeds(inference, others, sample_with):
    parts = [
        trained.build_posterior(sample_with=sample_with)
        for trained in (inference, *others)
    ]
    ensemble = EnsemblePosterior(parts).set_default_x(X_O)
    samples = ensemble.sample((3000,), show_progress_bars=False)
    assert_close_to(samples, POSTERIOR.mean, 0.2**0.5, 1500, TRAINED)
    theta = POSTERIOR.sample((20,))
    expected = torch.stack([part.log_prob(theta, x=X_O) for part in parts])
    expected = expected.logsumexp(0) - torch.tensor(3.0).log()
    torch.testing.assert_close(ensemble.log_prob(theta), expected, atol=0.02, rtol=0)
    assert (ensemble.potential(theta) - expected).std() < 0.2
    batched = ensemble.sample_batched(
        torch.Size((40,)), PRIOR.sample((3,)), show_progress_bars=False
    )
    assert batched.shape == (40, 3, 2)
    mode = ensemble.map(num_iter=150, num_to_optimize=5, num_init_samples=100)
    torch.testing.assert_close(mode[0], POSTERIOR.mean, atol=0.25, rtol=0)


@pytest.mark.parametrize("sample_with", ["direct", "mcmc", "refined"])
def test_map(inference, sample_with):
    posterior = inference.build_posterior(sample_with=sample_with).set_default_x(X_O)
    if sample_with == "mcmc":
        posterior.num_chains, posterior.warmup_steps = 20, 5
    mode = posterior.map(num_iter=200, num_to_optimize=5, num_init_samples=100)
    assert mode.shape == (1, 2)
    torch.testing.assert_close(mode[0], POSTERIOR.mean, atol=0.25, rtol=0)
    # It is a mode: no sample is denser.
    theta = POSTERIOR.sample((1000,))
    assert posterior.potential(mode) >= posterior.potential(theta).max() - 1e-3


@pytest.mark.parametrize("sample_with", ["direct", "refined", "mcmc", "proxy"])
def test_many_observations(inference, sample_with):
    num_x = 5 if sample_with in ("mcmc", "proxy") else 300
    xs = 0.8 * PRIOR.sample((num_x,))
    if sample_with == "proxy":
        potential, transform = proxy_based_potential(inference._neural_net, PRIOR, None)
        posterior = MCMCPosterior(potential, PRIOR, transform)
    else:
        posterior = inference.build_posterior(sample_with=sample_with)
    if isinstance(posterior, MCMCPosterior):
        posterior.num_chains, posterior.warmup_steps, posterior.thin = 10, 20, 1
    samples = posterior.sample_batched((50,), xs, show_progress_bars=False)
    assert samples.shape == (50, num_x, 2)
    # Each of its own posterior: mixed-up observations would be off by their spread.
    error = samples.mean(0) - 0.8 * xs
    assert (error.square().mean() < (TRAINED**2 + 4 * 0.2 / 50)).all()


# -------------------------------------------------------------------- truncated rounds


@pytest.mark.parametrize("sample_with", ["direct", "refined"])
def test_densities_of_several_calls_compare(inference, sample_with):
    posterior = inference.build_posterior(sample_with=sample_with).set_default_x(X_O)
    theta = POSTERIOR.sample((5,))
    first = posterior.log_prob(theta)
    assert torch.equal(posterior.log_prob(theta), first)
    posterior.set_default_x(-X_O)
    assert not torch.isclose(posterior.log_prob(theta), first, atol=0.1).any()


@pytest.mark.parametrize("sample_with", ["direct", "refined"])
def test_truncated_prior(inference, sample_with):
    posterior = inference.build_posterior(sample_with=sample_with).set_default_x(X_O)
    accept = get_density_thresholder(
        posterior, quantile=0.05, num_samples_to_estimate_support=100_000
    )
    # The region that holds 95 % of the posterior: a circle of radius
    # sqrt(-2 log(0.05) * 0.2) around its mean.
    theta = POSTERIOR.sample((4000,))
    assert accept(theta).double().mean().item() == pytest.approx(0.95, abs=0.04)
    area = 3.1416 * 0.2 * -2 * torch.tensor(0.05).log().item()
    box = BoxUniform(-3 * torch.ones(2), 3 * torch.ones(2))
    # A standard error of 1 %; what is left is a posterior wider by 8 %.
    share = accept(box.sample((200_000,))).double().mean().item()
    assert 36 * share == pytest.approx(area, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sample_with", "method"),
    [("direct", "rejection"), ("direct", "sir"), ("refined", "rejection")],
)
def test_truncated_rounds(sample_with, method):
    prior = BoxUniform(-3 * torch.ones(2), 3 * torch.ones(2))
    options = {"learning_rate": 1e-2, "training_batch_size": 50}
    inference = train(prior=prior, num=300, max_num_epochs=20, **options)
    for _ in range(2):
        posterior = inference.build_posterior(sample_with=sample_with)
        posterior.set_default_x(X_O)
        accept = get_density_thresholder(
            posterior, quantile=1e-3, num_samples_to_estimate_support=5000
        )
        proposal = RestrictedPrior(
            prior, accept, posterior=posterior, sample_with=method
        )
        theta = proposal.sample((200,), oversampling_factor=32)
        inference.append_simulations(theta, simulator(theta), proposal=proposal)
        inference.train(force_first_round_loss=True, max_num_epochs=8, **options)
    assert len(inference.train_indices) + len(inference.val_indices) == 700
    # Far from the prior's edges the posterior is N(x, 0.25).
    for final in ("direct", "refined"):
        samples = inference.build_posterior(sample_with=final).sample((2000,), x=X_O)
        assert_close_to(samples, X_O[0], 0.5, 1000, TRAINED)


def test_restriction_estimator_and_its_prior():
    # Simulations with theta_0 < 0 fail; the restricted prior learns to avoid them.
    torch.manual_seed(3)
    prior = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
    theta = prior.sample((500,))
    x = simulator(theta)
    x[theta[:, 0] < 0] = torch.nan
    restriction = RestrictionEstimator(prior=prior)
    restriction.append_simulations(theta, x)
    restriction.train(max_num_epochs=30)
    restricted = restriction.restrict_prior()
    theta_2 = restricted.sample((300,))
    x_2 = simulator(theta_2)
    x_2[theta_2[:, 0] < 0] = torch.nan
    assert x_2.isnan().any(1).double().mean() < 0.2
    inference = JeffreysNPE(
        prior,
        posterior_nn("zuko_maf", hidden_features=20, num_transforms=2),
        tracker=NoTracker(),
        show_progress_bars=False,
        energy_estimator=energy_nn(20, 1),
    )
    inference.append_simulations(theta, x)
    inference.append_simulations(theta_2, x_2, proposal=restricted)
    inference.train(max_num_epochs=20, learning_rate=5e-3, training_batch_size=50)
    samples = inference.build_posterior().sample((500,), x=torch.ones(1, 2))
    assert (samples[:, 0] > -0.2).double().mean() > 0.95
    assert samples[:, 0].mean().item() == pytest.approx(1.0, abs=0.25)


# ---------------------------------------------------------------------- sbi's shortcuts


def test_simulate_for_sbi_with_the_posterior_as_proposal(inference):
    for sample_with in ("direct", "refined"):
        proposal = inference.build_posterior(sample_with=sample_with)
        proposal.set_default_x(X_O)
        theta, x = simulate_for_sbi(simulator, proposal, 400, show_progress_bar=False)
        assert_close_to(theta, POSTERIOR.mean, 0.2**0.5, 200, TRAINED)
        assert x.shape == (400, 2)


def test_refined_posterior_finds_its_device(inference):
    posterior = RefinedPosterior(inference._neural_net, PRIOR)
    assert posterior._device == "cpu"


def test_one_sample_of_each_of_many_observations_is_refined(inference):
    # Four candidates for one sample would leave it the flow's.
    posterior = inference.build_posterior(
        sample_with="refined", refined_sampling_parameters={"exponent": 1.0}
    )
    samples = posterior.sample_batched((1,), X_O.expand(2000, 2))[0]
    assert_close_to(samples, *proxy_moments(inference), 2000, bias=0.01)
