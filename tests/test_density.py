"""`JeffreysDensityEstimator` against closed forms, quadrature and scikit-learn."""

import pickle

import numpy as np
import pytest
import torch
from sbi.utils import BoxUniform
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from sbi_jeffreys import FixedWeights, JeffreysDensityEstimator
from sbi_jeffreys.density import SharedPartitionObjective, gaussian_of
from sbi_jeffreys.objective import JeffreysObjective, Proposals
from sbi_jeffreys.partition import from_log_weights
from tests.helpers import LinearGaussianFlow, QuadraticEnergy, gaussian_proxy

pytestmark = pytest.mark.filterwarnings("ignore:Maximum number of epochs")

MEAN, COVARIANCE = np.array([1.0, -20.0]), np.array([[4.0, 1.2], [1.2, 0.5]])


def small(**kwargs) -> JeffreysDensityEstimator:
    """Return an estimator of a few steps with small networks."""
    defaults = dict(
        flow="zuko_nsf",
        training_batch_size=400,
        learning_rate=3e-3,
        max_num_epochs=45,
        stop_after_epochs=100,
        random_state=0,
    )
    return JeffreysDensityEstimator(**{**defaults, **kwargs})


def gaussian_samples(num: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.multivariate_normal(MEAN, COVARIANCE, num)


@pytest.fixture(scope="module")
def fitted() -> JeffreysDensityEstimator:
    """An estimator fitted to a Gaussian."""
    return small(max_num_epochs=24).fit(gaussian_samples(2000, seed=1))


@pytest.fixture(params=["flow", "proxy", "refined"])
def each(request, fitted):
    """The same estimator with each of its densities in turn."""
    yield fitted.set_params(model=request.param)
    fitted.set_params(model="flow")


def test_the_log_likelihood_is_that_of_the_gaussian(each):
    test = gaussian_samples(4000, seed=2)
    truth = multivariate_normal(MEAN, COVARIANCE).logpdf(test)
    # The mean of log π - log p is the KL divergence, here a few hundredths.
    assert 0 <= (truth - each.score_samples(test)).mean() + 0.01 < 0.08
    assert each.score(test) == pytest.approx(each.score_samples(test).mean())


def test_density_of_an_outlier_is_zero(each, monkeypatch):
    # Where the flow's is zero, too, which their ratio does not bear.
    monkeypatch.setattr(each, "exponent_", 0.5)
    assert np.isneginf(each.score_samples([[1e30, 1e30], [-1e35, 1e30]])).all()


def grid_around(extent: float, size: int) -> tuple[np.ndarray, float]:
    """Return points of a grid in whitened coordinates, and the area of a cell."""
    axis = (np.arange(size) + 0.5) / size * 2 * extent - extent
    white = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    root = np.linalg.cholesky(COVARIANCE)
    area = (2 * extent / size) ** 2 * np.linalg.det(root)
    return MEAN + white @ root.T, area


def test_every_density_integrates_to_one(each):
    points, area = grid_around(7.0, 150)
    total = np.exp(each.score_samples(points)).sum() * area
    assert total == pytest.approx(1.0, abs=0.03)


def test_samples_are_those_of_the_density(each):
    points, area = grid_around(7.0, 150)
    mass = np.exp(each.score_samples(points)) * area
    mean = (mass[:, None] * points).sum(0) / mass.sum()
    samples = each.sample(8000, random_state=3)
    assert samples.shape == (8000, 2)
    standard_error = samples.std(0) / np.sqrt(8000)
    # Resampled samples are worth a fourth of as many independent ones, or more.
    np.testing.assert_array_less(np.abs(samples.mean(0) - mean), 8 * standard_error)


def test_log_prob_has_gradients(each):
    theta = torch.tensor([[1.3, -19.8]], requires_grad=True)
    (slope,) = torch.autograd.grad(each.log_prob(theta).sum(), theta)
    step = torch.tensor([[0.02, 0.0]])
    with torch.no_grad():
        difference = each.log_prob(theta + step) - each.log_prob(theta - step)
    assert slope[0, 0].item() == pytest.approx(difference.item() / 0.04, abs=0.05)


def test_history_has_an_entry_for_every_epoch(fitted):
    history = fitted.history_
    assert {len(values) for values in history.values()} == {len(history["stage"])}
    for name in ("validation_forward_kl", "dual_reverse_kl", "log_partition"):
        assert name in history
    # The proxy is validated once it learns.
    assert np.isfinite(history["log_partition"][-1])
    assert fitted.flow_ is fitted.estimator_.flow
    assert fitted.n_features_in_ == 2
    assert 0 <= fitted.exponent_ <= 1
    assert fitted.refined_posterior().effective_sample_size(num_samples=500) > 50


def test_same_seed_same_fit_and_callers_random_numbers_stay():
    X = gaussian_samples(100, seed=1)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    epochs = []
    first = small(max_num_epochs=6).fit(
        X, on_epoch=lambda epoch, _: epochs.append((epoch, torch.rand(1)))
    )
    assert torch.rand(1) == expected
    second = small(max_num_epochs=6).fit(X)
    # What is drawn after an epoch changes nothing either.
    np.testing.assert_array_equal(first.score_samples(X), second.score_samples(X))
    assert [epoch for epoch, _ in epochs] == list(range(len(epochs)))
    assert len(epochs) == len(first.history_["stage"])
    np.testing.assert_array_equal(first.sample(5, 1), second.sample(5, 1))
    other = small(max_num_epochs=6, random_state=1).fit(X)
    assert not np.array_equal(first.score_samples(X), other.score_samples(X))


def test_a_given_base_measure_bounds_proxy_and_refined_density():
    rng = np.random.default_rng(0)
    X = rng.beta(2, 5, (300, 2))
    base = BoxUniform(torch.zeros(2), torch.ones(2))
    density = small(max_num_epochs=9, base_measure=base, model="proxy").fit(X)
    outside = np.array([[-0.1, 0.5], [0.5, 1.01]])
    assert np.isneginf(density.score_samples(outside)).all()
    axis = (np.arange(60) + 0.5) / 60
    points = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    total = np.exp(density.score_samples(points)).mean()
    assert total == pytest.approx(1.0, abs=0.03)
    samples = density.sample(200, random_state=0)
    assert ((samples >= 0) & (samples <= 1)).all()


@pytest.mark.parametrize("base_measure", ["gaussian", "lebesgue"])
def test_the_base_measure_is_what_it_is_called(base_measure):
    X = gaussian_samples(200, seed=1)
    density = small(max_num_epochs=3, base_measure=base_measure).fit(X)
    theta = torch.as_tensor(X[:5], dtype=torch.float32)
    expected = torch.zeros(5)
    if base_measure == "gaussian":
        train = X[density.inference_.train_indices.numpy()]
        logpdf = multivariate_normal(train.mean(0), np.cov(train.T)).logpdf(X[:5])
        expected = torch.as_tensor(logpdf, dtype=torch.float32)
    base = density.proxy_.base.log_prob(theta)
    torch.testing.assert_close(base, expected, atol=0.02, rtol=0)


def test_one_dimension_and_fixed_weights():
    X = np.random.default_rng(0).standard_normal((200, 1))
    density = small(weights=FixedWeights((1.0, 0.5, 0.5)), max_num_epochs=6).fit(X)
    assert density.history_["dual_reverse_kl"][-1] == 0.5
    axis = np.linspace(-8, 8, 801)[:, None]
    total = np.exp(density.score_samples(axis)).sum() * 0.02
    assert total == pytest.approx(1.0, abs=0.01)


@pytest.mark.slow
def test_the_proxy_finds_eight_modes():
    # The entropy of eight Gaussians that do not overlap is known.
    scale, angles = 0.25, np.arange(8) * np.pi / 4
    centres = 2 * np.stack((np.cos(angles), np.sin(angles)), axis=1)
    rng = np.random.default_rng(0)
    noise = scale * rng.standard_normal((3000, 2))
    X = centres[rng.integers(8, size=3000)] + noise
    density = JeffreysDensityEstimator(
        model="proxy",
        training_batch_size=100,
        max_num_epochs=150,
        stop_after_epochs=10,
        random_state=0,
    ).fit(X[:1000])
    entropy = np.log(8 * 2 * np.pi * np.e * scale**2)
    # The mean of a fitted density is off by 0.02 for sampling; one that had found but
    # the circle of the modes would be off by 0.8.
    assert -density.score(X[1000:]) - entropy < 0.2


def test_pipeline_and_grid_search():
    X = gaussian_samples(90, seed=1)
    pipeline = make_pipeline(StandardScaler(), small(max_num_epochs=3))
    search = GridSearchCV(
        pipeline, {"jeffreysdensityestimator__learning_rate": [1e-3, 3e-3]}, cv=2
    )
    search.fit(X)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.score(X) == pytest.approx(search.score_samples(X).mean())


def test_clone_and_pickle():
    density = small(max_num_epochs=3, weights="fixed")
    assert clone(density).get_params() == density.get_params()
    density.fit(gaussian_samples(60, seed=1))
    copy = pickle.loads(pickle.dumps(density))
    X = gaussian_samples(10, seed=2)
    np.testing.assert_array_equal(copy.score_samples(X), density.score_samples(X))
    np.testing.assert_array_equal(copy.sample(3, 0), density.sample(3, 0))


def test_wrong_input_is_told():
    X = gaussian_samples(50, seed=1)
    with pytest.raises(NotFittedError):
        JeffreysDensityEstimator().score_samples(X)
    with pytest.raises(ValueError, match="model must be 'flow', 'proxy' or 'refined'"):
        small(model="both").fit(X)
    with pytest.raises(ValueError, match="base_measure must be 'gaussian', 'lebesgue'"):
        small(base_measure="prior").fit(X)
    with pytest.raises(ValueError, match="constant"):
        small().fit(np.column_stack((X, np.ones(50))))
    with pytest.raises(ValueError, match="NaN"):
        small().fit(np.where(X > 0, np.nan, X))
    density = small(max_num_epochs=3).fit(X)
    with pytest.raises(ValueError, match="n_samples must be at least 1, got 0"):
        density.sample(0)
    with pytest.raises(ValueError, match="3 features"):
        density.score_samples(np.zeros((2, 3)))


def test_all_samples_share_one_partition_function():
    # Against the estimate from all weights at once, and the closed form of a Gaussian.
    net = QuadraticEnergy(
        torch.zeros(2, 1), torch.tensor([0.3, -0.2]), torch.diag(torch.tensor([1.5, 1]))
    )
    proxy = gaussian_proxy(net)
    flow = LinearGaussianFlow(torch.zeros(2, 1), torch.zeros(2), torch.eye(2))
    theta, x = torch.randn(300, 2), torch.zeros(300, 1)
    shared, alone = SharedPartitionObjective(8, 8), JeffreysObjective(8, 8)
    proposals = shared.propose(flow, proxy, x)
    assert isinstance(proposals, Proposals)
    reverse, forward, partition = shared.proxy_divergences(proxy, theta, x, proposals)
    weights = proxy(proposals.theta, x) + proposals.log_weights
    pooled = from_log_weights(weights.reshape(-1, 1))
    torch.testing.assert_close(partition.value, pooled.value.expand(300))
    torch.testing.assert_close(
        partition.effective_sample_size, pooled.effective_sample_size.expand(300)
    )
    exact = np.log(2 * np.pi) - np.log(1.5)
    error = pooled.standard_error.item()
    assert abs(partition.value[0].item() - exact) < 4 * error
    # Apart from log Z the divergences are those of the objective itself.
    reverse_alone, forward_alone, each = alone.proxy_divergences(
        proxy, theta, x, proposals
    )
    torch.testing.assert_close(reverse - reverse_alone, partition.value - each.value)
    torch.testing.assert_close(forward - forward_alone, partition.value - each.value)


def test_samples_of_the_proxy_come_from_all_proposals():
    net = QuadraticEnergy(torch.zeros(1, 1), torch.tensor([1.0]), torch.tensor([[2.0]]))
    proxy = gaussian_proxy(net)  # N(1, 1/4)
    flow = LinearGaussianFlow(torch.zeros(1, 1), torch.zeros(1), torch.eye(1))
    x = torch.zeros(2000, 1)
    objective = SharedPartitionObjective(1, 1)
    drawn = objective.sample_proxy(proxy, x, objective.propose(flow, proxy, x), 3)
    assert drawn.theta.shape == (3, 2000, 1) and drawn.log_prob.shape == (3, 2000)
    ess = drawn.effective_sample_size[0].item()
    assert abs(drawn.theta.mean().item() - 1) < 5 * 0.5 / np.sqrt(ess)
    truth = torch.distributions.Normal(1.0, 0.5).log_prob(drawn.theta[..., 0])
    torch.testing.assert_close(drawn.log_prob, truth, atol=5 / np.sqrt(ess), rtol=0)


def test_the_gaussian_of_few_samples_is_proper():
    theta = torch.randn(4, 6)
    gaussian = gaussian_of(theta)
    assert torch.isfinite(gaussian.log_prob(theta)).all()
    many = torch.randn(5000, 2) * torch.tensor([1.0, 1e-4])
    scale = gaussian_of(many).covariance_matrix.diagonal().sqrt()
    torch.testing.assert_close(scale, torch.tensor([1.0, 1e-4]), rtol=0.05, atol=0)


@pytest.mark.slow
def test_scikit_learns_own_checks():
    check_estimator(
        JeffreysDensityEstimator("zuko_nsf", max_num_epochs=3),
        expected_failed_checks={
            "check_estimators_dtypes": "Integers are discrete: they have no density.",
            "check_methods_subset_invariance": "Equal in single precision only.",
        },
    )
