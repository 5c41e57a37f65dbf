"""The benchmark tasks against scipy, quadrature and the published data."""

import io
import math
import pickle
import types
import warnings

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from sbi.inference import simulate_for_sbi
from sbi.utils.user_input_checks import process_prior
from torch import Tensor
from torch.distributions import MultivariateNormal

from sbi_jeffreys.metrics import c2st_many
from tasks import TASKS, get_task, reference
from tasks.bernoulli_glm import design_matrix
from tasks.importance import ImportancePosterior
from tasks.lotka_volterra import log_sizes
from tasks.ode import integrate
from tasks.sir import log_infected_fraction
from tasks.slcp_distractors import distractor_mixture
from tasks.truncated_normal import TruncatedNormal

# The posteriors of the two variants are those of other tasks.
POSTERIORS = [n for n in TASKS if n not in ("slcp_distractors", "bernoulli_glm_raw")]


@pytest.fixture(scope="session")
def published() -> None:
    """Skips a test where the published data cannot be had."""
    try:
        reference.wheel()
    except reference.ReferenceDataError as error:
        pytest.skip(f"needs the published data, which need a network once: {error}")


def draw(name: str, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return parameters from the prior and their simulations."""
    torch.manual_seed(seed)
    task = get_task(name)
    theta = task.prior.sample((n,))
    return theta, task.simulator(theta)


def test_names():
    assert TASKS == (
        "two_moons",
        "gaussian_mixture",
        "gaussian_linear",
        "gaussian_linear_uniform",
        "slcp",
        "slcp_distractors",
        "bernoulli_glm",
        "bernoulli_glm_raw",
        "sir",
        "lotka_volterra",
    )
    with pytest.raises(ValueError, match="no task 'moons'.*two_moons.*lotka_volterra"):
        get_task("moons")


@pytest.mark.parametrize("name", TASKS)
def test_task_fits_sbi(name):
    task = get_task(name)
    prior, num_parameters, _ = process_prior(task.prior)
    assert num_parameters == task.dim_parameters == len(task.labels)
    theta, x = simulate_for_sbi(
        task.simulator, prior, 20, num_workers=1, show_progress_bar=False
    )
    assert theta.shape == (20, task.dim_parameters) and theta.dtype == torch.float32
    assert x.shape == (20, task.dim_data) and x.dtype == torch.float32
    assert x.isfinite().all()

    torch.manual_seed(1)
    first = task.simulator(theta)
    torch.manual_seed(1)
    assert torch.equal(task.simulator(theta), first)
    assert not torch.equal(task.simulator(theta), first)
    # Workers get a copy.
    copy = pickle.loads(pickle.dumps(task))
    torch.manual_seed(1)
    assert torch.equal(copy.simulator(theta), first)


@pytest.mark.parametrize("name", TASKS)
def test_published_data_have_the_right_shapes(name, published):
    task = get_task(name)
    for n in (1, 10):
        assert task.observation(n).shape == (1, task.dim_data)
        assert task.true_parameters(n).shape == (1, task.dim_parameters)
        samples = task.reference_posterior_samples(n)
        assert samples.shape == (10_000, task.dim_parameters)
        assert samples.dtype == torch.float32
        assert task.prior.log_prob(samples).isfinite().all()


def test_input_is_checked():
    task = get_task("sir")
    theta, x = draw("sir", 3)
    with pytest.raises(ValueError, match=r"theta of sir .* \(n, 2\), but has \(3, 1\)"):
        task.simulator(theta[:, :1])
    with pytest.raises(ValueError, match=r"x of sir .* \(n, 10\), but has \(10,\)"):
        task.reference_posterior(x[0])
    with pytest.raises(ValueError, match="one row of data, but has 3"):
        task.reference_posterior(x)
    with pytest.raises(ValueError, match="theta has 3 rows and x 2"):
        task.log_likelihood(theta, x[:2])
    theta[1, 0] = math.nan
    with pytest.raises(ValueError, match="1 rows of theta .* not finite"):
        task.simulator(theta)
    for name, impossible in (("sir", 1001.0), ("sir", 0.5), ("lotka_volterra", -1.0)):
        x = torch.full((1, get_task(name).dim_data), impossible)
        with pytest.raises(ValueError, match="No parameters were found"):
            get_task(name).reference_posterior(x)
    with pytest.raises(ValueError, match=r"two_moons cannot give x = \[3.0, 0.0\]"):
        get_task("two_moons").reference_posterior(torch.tensor([[3.0, 0.0]]))


# Log likelihoods, from definitions that share no code with ours.


def two_moons_log_likelihood(theta: np.ndarray, x: np.ndarray) -> float:
    shift = np.array([-abs(theta.sum()), theta[1] - theta[0]]) / math.sqrt(2)
    u, v = x - shift - np.array([0.25, 0.0])
    r, a = math.hypot(u, v), math.atan2(v, u)
    log_prob = scipy.stats.norm(0.1, 0.01).logpdf(r)
    log_prob += scipy.stats.uniform(-math.pi / 2, math.pi).logpdf(a)
    return log_prob - math.log(r)


def gaussian_mixture_log_likelihood(theta: np.ndarray, x: np.ndarray) -> float:
    normal = scipy.stats.multivariate_normal
    return math.log(0.5 * normal(theta).pdf(x) + 0.5 * normal(theta, 0.01).pdf(x))


def gaussian_linear_log_likelihood(theta: np.ndarray, x: np.ndarray) -> float:
    return scipy.stats.norm(theta, math.sqrt(0.1)).logpdf(x).sum()


def slcp_log_likelihood(theta: np.ndarray, x: np.ndarray) -> float:
    s1, s2, rho = theta[2] ** 2, theta[3] ** 2, math.tanh(theta[4])
    covariance = np.array([[s1**2, rho * s1 * s2], [rho * s1 * s2, s2**2]])
    covariance += 1e-6 * np.eye(2)
    normal = scipy.stats.multivariate_normal(theta[:2], covariance)
    return normal.logpdf(x.reshape(4, 2)).sum()


def slcp_distractors_log_likelihood(theta: np.ndarray, x: np.ndarray) -> float:
    # Where the data of observation 7 of slcp are found in that of the variant.
    return slcp_log_likelihood(theta, x[[22, 33, 23, 67, 42, 21, 16, 90]])


def spikes_log_likelihood(theta: np.ndarray, x: np.ndarray) -> float:
    stimulus = np.random.RandomState(42).randn(100).astype(np.float32)
    drive = theta[0] + np.convolve(stimulus, theta[1:])[:100]
    return scipy.stats.bernoulli(scipy.special.expit(drive)).logpmf(x).sum()


def sir_solution(theta: np.ndarray) -> np.ndarray:
    def field(_, u):
        infections = theta[0] * u[0] * u[1] / 1e6
        return [-infections, infections - theta[1] * u[1]]

    return solve(field, [1e6 - 1, 1.0], 17.0 * np.arange(10))[1]


def sir_log_likelihood(theta: np.ndarray, x: np.ndarray) -> float:
    return scipy.stats.binom(1000, sir_solution(theta) / 1e6).logpmf(x).sum()


def lotka_volterra_solution(theta: np.ndarray) -> np.ndarray:
    def field(_, u):
        # For logarithms: the sizes themselves become too small for an absolute error.
        alpha, beta, gamma, delta = theta
        return [alpha - beta * math.exp(u[1]), delta * math.exp(u[0]) - gamma]

    return np.exp(solve(field, [math.log(30), 0.0], 2.1 * np.arange(10)).flatten())


def lotka_volterra_log_likelihood(theta: np.ndarray, x: np.ndarray) -> float:
    sizes = lotka_volterra_solution(theta)
    return scipy.stats.lognorm(0.1, scale=sizes).logpdf(x).sum()


def solve(field, start: list[float], times: np.ndarray) -> np.ndarray:
    solution = scipy.integrate.solve_ivp(
        field, times[[0, -1]], start, "DOP853", times, rtol=1e-11, atol=1e-12
    )
    return solution.y


LOG_LIKELIHOODS = {
    "two_moons": two_moons_log_likelihood,
    "gaussian_mixture": gaussian_mixture_log_likelihood,
    "gaussian_linear": gaussian_linear_log_likelihood,
    "gaussian_linear_uniform": gaussian_linear_log_likelihood,
    "slcp": slcp_log_likelihood,
    "slcp_distractors": slcp_distractors_log_likelihood,
    "bernoulli_glm_raw": spikes_log_likelihood,
    "sir": sir_log_likelihood,
    "lotka_volterra": lotka_volterra_log_likelihood,
}


@pytest.mark.parametrize("name", LOG_LIKELIHOODS)
def test_log_likelihood_is_that_of_scipy(name):
    theta, x = (values.double() for values in draw(name, 20))
    ours = get_task(name).log_likelihood(theta, x)
    theirs = [
        LOG_LIKELIHOODS[name](t, v)
        for t, v in zip(theta.numpy(), x.numpy(), strict=True)
    ]
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-4, atol=1e-4)


def test_sufficient_statistics_have_the_likelihood_of_the_spikes():
    theta, spikes = draw("bernoulli_glm_raw", 50)
    statistics = spikes.double() @ design_matrix()
    torch.testing.assert_close(
        get_task("bernoulli_glm").log_likelihood(theta, statistics),
        get_task("bernoulli_glm_raw").log_likelihood(theta, spikes),
    )
    torch.manual_seed(3)
    expected = get_task("bernoulli_glm_raw").simulator(theta).double() @ design_matrix()
    torch.manual_seed(3)
    simulated = get_task("bernoulli_glm").simulator(theta)
    torch.testing.assert_close(simulated.double(), expected, atol=1e-4, rtol=1e-4)


def test_likelihood_of_impossible_data():
    theta = torch.tensor([[0.4, 0.1]])
    counts = torch.zeros(1, 10)
    for value in (-1.0, 1001.0, 0.5):
        counts[0, 3] = value
        assert get_task("sir").log_likelihood(theta, counts) == -math.inf
    sizes = torch.ones(1, 20)
    sizes[0, 7] = 0.0
    log_likelihood = get_task("lotka_volterra").log_likelihood(torch.ones(1, 4), sizes)
    assert log_likelihood == -math.inf


@pytest.mark.parametrize("name", TASKS)
def test_simulator_has_the_likelihood(name):
    r"""$E_{x \sim p(x \mid \theta)} [p(x \mid \theta') / p(x \mid \theta)] = 1$."""
    task = get_task(name)
    theta, _ = draw(name, 1, seed=2)
    direction = theta.clone()
    direction[:, 1::2] *= -1
    if name == "two_moons":
        # Other ways the moon would move out of the first one's support.
        direction = -theta

    def log_ratio(x: Tensor, step: float) -> Tensor:
        moved = task.log_likelihood(theta + step * direction, x)
        return moved - task.log_likelihood(theta, x)

    # As far as the likelihoods still overlap well.
    step = 0.5
    pilot = task.simulator(theta.expand(500, -1))
    while True:
        spread = log_ratio(pilot, step)
        if spread[spread.isfinite()].std() < 0.8:
            break
        step *= 0.8
    ratio = log_ratio(task.simulator(theta.expand(20_000, -1)), step).exp()
    error = float(ratio.std()) / math.sqrt(len(ratio))
    assert 1e-3 < error < 1e-2
    assert abs(float(ratio.mean()) - 1) < 4.5 * error


# The differential equations.


def test_integration_is_accurate():
    corners = torch.cartesian_prod(*[torch.tensor([-2.5, 0.0, 2.5])] * 4)
    theta = (torch.tensor([-0.125, -3, -0.125, -3]) + 0.5 * corners).exp()
    ours = log_sizes(theta.double())
    for t, solution in zip(theta.double().numpy()[::4], ours[::4], strict=True):
        exact = np.log(lotka_volterra_solution(t).clip(1e-10, 1e4))
        np.testing.assert_allclose(solution.numpy(), exact, atol=2e-4)

    corners = torch.cartesian_prod(*[torch.tensor([-2.5, 0.0, 2.5])] * 2)
    scale = torch.tensor([0.5, 0.2])
    theta = (torch.tensor([0.4, 0.125]).log() + scale * corners).exp()
    ours = log_infected_fraction(theta.double())
    for t, solution in zip(theta.double().numpy(), ours, strict=True):
        np.testing.assert_allclose(
            solution.exp().numpy(), sir_solution(t) / 1e6, rtol=1e-4, atol=1e-10
        )


def test_lotka_volterra_conserves_what_is_conserved():
    theta, _ = draw("lotka_volterra", 2000)
    theta = theta.double()
    log_u, log_v = log_sizes(theta).chunk(2, dim=1)
    alpha, beta, gamma, delta = theta.T.unsqueeze(-1)
    parts = (delta * log_u.exp(), -gamma * log_u, beta * log_v.exp(), -alpha * log_v)
    constant = torch.stack(parts).sum(0)
    size = torch.stack(parts).abs().sum(0)
    inside = ((log_u > -23) & (log_v > -23)).all(1)
    assert inside.sum() > 1990
    drift = (constant - constant[:, :1]).abs() / size
    assert drift[inside].max() < 1e-5


@pytest.mark.parametrize("name", ["sir", "lotka_volterra"])
def test_no_parameters_of_the_prior_fail(name):
    task = get_task(name)
    corners = torch.cartesian_prod(*[torch.tensor([-4.5, 4.5])] * task.dim_parameters)
    base = task.prior.base_dist
    theta = torch.cat((
        (base.loc + base.scale * corners).exp(),
        draw(name, 20_000)[0],
    ))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert task.simulator(theta).isfinite().all()


def test_what_cannot_be_integrated_is_nan_and_said():
    def explode(u: Tensor, p: Tensor) -> Tensor:
        return p * u.square()

    start = torch.ones(3, 1, dtype=torch.float64)
    rate = torch.tensor([[0.5], [2.0], [0.1]], dtype=torch.float64)
    with pytest.warns(UserWarning, match="in 500 steps for 1 of 3"):
        u = integrate(explode, start, rate, (0.0, 0.25, 1.0), max_steps=500)
    # u = 1 / (1 - p t), which the second row cannot follow beyond t = 0.5.
    exact = torch.tensor([[1, 1 / 0.875, 2], [1, 2, math.nan], [1, 1 / 0.975, 1 / 0.9]])
    torch.testing.assert_close(
        u.squeeze(2), exact.double(), equal_nan=True, rtol=1e-5, atol=0
    )


# Constants that are made from numpy's generator instead of being read.


def test_constants_are_the_published_ones(published):
    def load(member: str, **kwargs):
        return torch.load(io.BytesIO(reference.read(member)), **kwargs)

    design = load("bernoulli_glm/files/design_matrix.pt", weights_only=True)
    assert torch.equal(design_matrix(), design.double())
    order = load("slcp/files/permutation_idx.torch", weights_only=True)
    assert torch.equal(distractor_mixture().order, order)

    class Inert:
        """Stands for every class in the file; holds state and does nothing."""

        def __init__(self, *_):
            pass

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            if (module, name) in (
                ("torch._utils", "_rebuild_tensor_v2"),
                ("collections", "OrderedDict"),
            ):
                return super().find_class(module, name)
            return type(name, (Inert,), {})

    inert = types.SimpleNamespace(
        __name__="inert",
        Unpickler=Unpickler,
        load=lambda file, **kwargs: Unpickler(file, **kwargs).load(),
    )
    mixture = load("slcp/files/gmm.torch", weights_only=False, pickle_module=inert)
    component = mixture._component_distribution.base_dist
    ours = distractor_mixture()
    torch.testing.assert_close(ours.loc, component.loc)
    torch.testing.assert_close(ours.scale_tril, component._unbroadcasted_scale_tril)
    assert (component.df == 2).all()
    assert (mixture._mixture_distribution.probs == 0.05).all()


def test_distractors_have_their_distribution():
    torch.manual_seed(0)
    mixture = distractor_mixture()
    sample = mixture.sample(40_000)
    # The first coordinate is a mixture of twenty univariate t distributions.
    t = scipy.stats.t(2, mixture.loc[:, 0], mixture.scale_tril[:, 0, 0].abs())

    def cdf(value: np.ndarray) -> np.ndarray:
        return t.cdf(np.asarray(value)[..., None]).mean(-1)

    assert scipy.stats.kstest(sample[:, 0].numpy(), cdf).pvalue > 1e-3


# Posteriors for any data.


def test_log_prob_integrates_to_one():
    def integral(name: str, x: list[float], low: Tensor, size: float, n: int) -> float:
        offsets = size * (torch.arange(n, dtype=torch.float64) + 0.5) / n
        grid = torch.cartesian_prod(low[0] + offsets, low[1] + offsets)
        posterior = get_task(name).reference_posterior(torch.tensor([x]))
        return float(posterior.log_prob(grid).exp().sum()) * (size / n) ** 2

    # Moons inside the prior's box, moons that it cuts, and moons that are cut where
    # they would meet, at theta_1 + theta_2 = 0.
    for x in ([0.0, 0.0], [-1.1, 0.1], [0.28, 0.2]):
        total = integral("two_moons", x, -torch.ones(2), 2.0, 2000)
        assert total == pytest.approx(1, abs=6e-3)
    for x in ([1.0, 2.0], [9.7, -10.05], [-10.9, 3.0]):
        # A square with edges where those of the box are.
        low = (torch.tensor(x) - 5).clamp(-10, 0).round()
        total = integral("gaussian_mixture", x, low, 10.0, 1000)
        assert total == pytest.approx(1, abs=2e-3)

    _, x = draw("sir", 1)
    posterior = get_task("sir").reference_posterior(x)
    samples = posterior.sample((2000,)).double().log()
    axes = [
        torch.linspace(float(m - 6 * s), float(m + 6 * s), 60, dtype=torch.float64)
        for m, s in zip(samples.mean(0), samples.std(0), strict=True)
    ]
    grid = torch.cartesian_prod(*axes)
    area = math.prod(float(axis[1] - axis[0]) for axis in axes)
    total = (posterior.log_prob(grid.exp()) + grid.sum(1)).exp().sum() * area
    assert isinstance(posterior, ImportancePosterior)
    error = math.sqrt((1 / posterior.efficiency - 1) / 5_000)
    assert abs(float(total) - 1) < 4 * error


@pytest.mark.parametrize("name", POSTERIORS)
def test_log_prob_beyond_the_prior(name):
    task = get_task(name)
    theta, x = draw(name, 1)
    posterior = task.reference_posterior(x)
    bounded = name not in ("gaussian_linear", "bernoulli_glm")
    assert posterior.log_prob(theta).isfinite().all()
    outside = torch.full_like(theta, -20.0)
    assert bool(posterior.log_prob(outside).isinf().all()) == bounded
    both = posterior.log_prob(torch.cat((theta, outside)))
    # Likelihoods are of single precision, and a batch of one is multiplied in another
    # order than one of two.
    alone = posterior.log_prob(theta)
    torch.testing.assert_close(both[:1].float(), alone.float())


def test_truncated_normal_is_that_of_scipy():
    loc = torch.tensor([0.0, 0.9, 1.5, -4.0, 9.0, -40.0])
    scale = torch.tensor([0.3, 0.3, 0.3, 0.5, 0.5, 0.5])
    ours = TruncatedNormal(loc, scale, -1.0, 1.0)
    torch.manual_seed(0)
    samples = ours.sample((20_000,))
    log_prob = ours.log_prob(samples[:50])
    total = np.zeros(50)
    for i, (m, s) in enumerate(zip(loc.tolist(), scale.tolist(), strict=True)):
        theirs = scipy.stats.truncnorm((-1 - m) / s, (1 - m) / s, m, s)
        total += theirs.logpdf(samples[:50, i].double().numpy())
        assert scipy.stats.kstest(samples[:, i].numpy(), theirs.cdf).pvalue > 1e-4
    np.testing.assert_allclose(log_prob.numpy(), total, rtol=1e-6)
    outside = torch.zeros(1, 6)
    outside[0, 2] = 1.01
    assert ours.log_prob(outside) == -math.inf
    assert ours.sample((3, 4)).shape == (3, 4, 6) and ours.sample().shape == (6,)


def test_importance_sampling_of_a_gaussian():
    torch.manual_seed(0)
    dim, noise = 6, 0.05
    mixing = torch.randn(dim, dim, dtype=torch.float64)
    x = mixing @ torch.randn(dim, dtype=torch.float64)

    def log_likelihood(u: Tensor) -> Tensor:
        square = ((u @ mixing.T - x) / noise).square().sum(1)
        return -0.5 * square - dim * math.log(noise * math.sqrt(2 * math.pi))

    def log_joint(u: Tensor) -> Tensor:
        log_prior = -0.5 * (u.square().sum(1) + dim * math.log(2 * math.pi))
        return log_prior + log_likelihood(u)

    ours = ImportancePosterior(log_likelihood, lambda u: u, log_joint, dim)
    eye = torch.eye(dim, dtype=torch.float64)
    precision = eye + mixing.T @ mixing / noise**2
    loc = torch.linalg.solve(precision, mixing.T @ x / noise**2)
    exact = MultivariateNormal(loc, precision_matrix=precision)
    evidence = MultivariateNormal(
        torch.zeros_like(x), mixing @ mixing.T + noise**2 * eye
    )
    error = math.sqrt((1 / ours.efficiency - 1) / 20_000)
    assert abs(ours.log_evidence - float(evidence.log_prob(x))) < 4.5 * error

    samples = ours.sample((10_000,)).double()
    assert samples.unique(dim=0).shape == samples.shape
    whitened = (samples - loc) @ torch.linalg.cholesky(precision)
    for i in range(dim):
        assert scipy.stats.kstest(whitened[:, i].numpy(), "norm").pvalue > 1e-4
    torch.testing.assert_close(
        ours.log_prob(samples), exact.log_prob(samples), atol=4.5 * error, rtol=0
    )
    for shape in ((), (0,), (3, 4)):
        assert ours.sample(shape).shape == (*shape, dim)


def test_slcp_evidence_is_that_of_prior_samples():
    task = get_task("slcp")
    _, x = draw("slcp", 1, seed=3)
    torch.manual_seed(0)
    theta = 6 * torch.rand(1_000_000, 5) - 3
    likelihood = task.log_likelihood(theta, x).exp()
    mean = float(likelihood.mean())
    error = float(likelihood.std()) / math.sqrt(len(theta)) / mean
    assert error < 0.1
    posterior = task.reference_posterior(x)
    assert isinstance(posterior, ImportancePosterior)
    assert abs(math.exp(posterior.log_evidence) / mean - 1) < 4 * error


@pytest.mark.parametrize(
    "name, num_pairs",
    [
        ("two_moons", 300),
        ("gaussian_mixture", 300),
        ("gaussian_linear", 300),
        ("gaussian_linear_uniform", 300),
        pytest.param("slcp", 40, marks=pytest.mark.slow),
        pytest.param("bernoulli_glm", 40, marks=pytest.mark.slow),
    ],
)
def test_true_parameters_rank_uniformly(name, num_pairs):
    """Simulation-based calibration, for data that are not published.

    The rank of the true parameters among 99 posterior samples is uniform, by each
    parameter and by the log density.
    """
    theta, x = draw(name, num_pairs, seed=4)
    ranks = []
    for t, v in zip(theta, x, strict=True):
        posterior = get_task(name).reference_posterior(v.unsqueeze(0))
        samples = torch.cat((t.unsqueeze(0), posterior.sample((99,))))
        values = torch.cat((samples, posterior.log_prob(samples)[:, None]), dim=1)
        ranks.append((values[1:] < values[0]).sum(0))
    for column in torch.stack(ranks).T:
        uniform = (column + torch.rand(num_pairs)) / 100
        assert scipy.stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-4


# Agreement with the published data.


@pytest.mark.parametrize("name", TASKS)
def test_observations_are_typical_of_the_true_parameters(name, published):
    """The log likelihood of the observations, among that of new simulations."""
    task = get_task(name)
    torch.manual_seed(0)
    ranks = []
    for n in range(1, 11):
        theta = task.true_parameters(n).expand(500, -1)
        simulated = task.log_likelihood(theta, task.simulator(theta))
        observed = task.log_likelihood(theta[:1], task.observation(n))
        below, ties = simulated < observed, simulated == observed
        ranks.append((below.sum() + torch.rand(()) * (1 + ties.sum())) / 501)
    assert scipy.stats.kstest(torch.stack(ranks).numpy(), "uniform").pvalue > 1e-3
    # A likelihood that were too wide or too narrow by far would be at the ends. One of
    # a hundred observations may be there by chance, but hardly two of one task.
    at_the_ends = sum(bool(rank < 2e-3 or rank > 1 - 2e-3) for rank in ranks)
    assert at_the_ends < 2


@pytest.mark.parametrize("name", ["two_moons", "slcp", "bernoulli_glm", "sir"])
def test_published_samples_predict_the_observations(name, published):
    """The likelihood of the observation among that of what its posterior predicts.

    What the posterior of another observation predicts is another thing.
    """
    task = get_task(name)
    torch.manual_seed(0)

    def rank(samples_of: int, n: int) -> float:
        theta = task.reference_posterior_samples(samples_of)[::20]
        simulated = task.log_likelihood(theta, task.simulator(theta))
        observed = task.log_likelihood(theta, task.observation(n))
        return float((observed > simulated).double().mean())

    own = [rank(n, n) for n in (1, 2, 3)]
    # Not uniform, as the data are used twice, but far from the end.
    assert min(own) > 0.05
    others = [rank(n % 3 + 1, n) for n in (1, 2, 3)]
    assert sorted(others)[1] < 0.01


@pytest.mark.parametrize("name", POSTERIORS)
def test_published_samples_have_our_density(name, published):
    task = get_task(name)
    torch.manual_seed(0)
    posterior = task.reference_posterior(task.observation(2))
    theirs = posterior.log_prob(task.reference_posterior_samples(2))
    ours = posterior.log_prob(posterior.sample((10_000,)))
    assert theirs.isfinite().all()
    error = math.sqrt(float(theirs.var() + ours.var()) / 10_000)
    assert abs(float(theirs.mean() - ours.mean())) < 4 * error


@pytest.mark.parametrize("name", POSTERIORS)
def test_published_samples_have_our_marginals(name, published):
    """Kolmogorov-Smirnov tests of each parameter and of twenty random projections."""
    task = get_task(name)
    torch.manual_seed(0)
    # Markov chains, of the Bernoulli GLM, are thinned to nearly independent samples.
    theirs = task.reference_posterior_samples(1)[::4]
    ours = task.reference_posterior(task.observation(1)).sample((10_000,))
    dim = task.dim_parameters
    directions = torch.cat((torch.eye(dim), torch.randn(20, dim) / ours.std(0)))
    for a, b in zip(directions @ theirs.T, directions @ ours.T, strict=True):
        assert scipy.stats.ks_2samp(a.numpy(), b.numpy()).pvalue > 2e-4


@pytest.mark.parametrize(
    "name",
    [
        "two_moons",
        "gaussian_mixture",
        "slcp",
        pytest.param("bernoulli_glm", marks=pytest.mark.slow),
        "sir",
        "lotka_volterra",
    ],
)
def test_published_samples_are_not_told_from_ours(name, published):
    task = get_task(name)
    torch.manual_seed(0)
    ours = task.reference_posterior(task.observation(1)).sample((2000,))
    theirs = task.reference_posterior_samples(1)[torch.randperm(10_000)[:2000]]
    pairs = list(zip(theirs.split(1000), ours.split(1000), strict=True))
    # Between published samples one accuracy scatters by 0.015 in ten dimensions, where
    # the classifiers overfit; so the mean of two by 0.011.
    assert abs(float(c2st_many(pairs).mean()) - 0.5) < 0.02 + 0.011


def test_variants_have_the_posterior_of_the_task(published):
    for name, variant in (
        ("slcp", "slcp_distractors"),
        ("bernoulli_glm", "bernoulli_glm_raw"),
    ):
        task, other = get_task(name), get_task(variant)
        samples = task.reference_posterior_samples(3)
        assert torch.equal(other.reference_posterior_samples(3), samples)
        log_probs = []
        for t in (task, other):
            torch.manual_seed(0)
            posterior = t.reference_posterior(t.observation(3))
            log_probs.append(posterior.log_prob(samples[:100]))
        torch.testing.assert_close(*log_probs, rtol=0, atol=1e-3)
