"""Residual coordinates, and the flow on them."""

import numpy as np
import pytest
import torch
from helpers import LinearGaussianFlow, flat_gradient
from sbi.inference import NPE
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from sbi.utils import BoxUniform, MultipleIndependent
from sklearn.linear_model import LinearRegression, Ridge, RidgeCV
from torch.distributions import (
    Exponential,
    Gamma,
    HalfNormal,
    LogNormal,
    MultivariateNormal,
    Normal,
)

from sbi_jeffreys.coordinates import PENALTIES, ResidualCoordinates, hold_out
from sbi_jeffreys.features import Features
from sbi_jeffreys.flow import score
from sbi_jeffreys.residual_flow import ResidualFlow, build_residual_flow


def linear_simulations(num=2000, seed=0):
    torch.manual_seed(seed)
    prior = MultivariateNormal(torch.zeros(3), torch.eye(3))
    theta = prior.sample((num,))
    mixing = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.3], [0.2, 0.0, 1.0]])
    return prior, theta, theta @ mixing.T + 0.3 * torch.randn(num, 3), mixing


def coordinates_of(theta, x, prior):
    features = Features(x)
    return ResidualCoordinates(theta, x, features, prior), features(x)


def test_residuals_of_a_linear_gaussian_task_are_standard_normal():
    prior, theta, x, mixing = linear_simulations()
    coordinates, features = coordinates_of(theta, x, prior)
    u = coordinates(theta, features)
    error = 5 / len(theta) ** 0.5
    assert u.mean(0).abs().max() < error
    assert (torch.cov(u.T) - torch.eye(3)).abs().max() < error
    # They are the posterior's own: mean and covariance in closed form.
    covariance = torch.linalg.inv(torch.eye(3) + mixing.T @ mixing / 0.3**2)
    mean = x @ (covariance @ mixing.T / 0.3**2).T
    whitened = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), (theta - mean).T, upper=False
    ).T
    assert (u - whitened).square().mean() < 0.02


def test_predictions_are_scikit_learns():
    prior, theta, x, _ = linear_simulations()
    coordinates, features = coordinates_of(theta, x, prior)
    z = ((theta - theta.mean(0)) / theta.std(0)).numpy()
    expected = LinearRegression().fit(features.numpy(), z).predict(features.numpy())
    # Of 2,000 simulations the ridge penalty takes next to nothing.
    assert np.abs(coordinates.predict(features).numpy() - expected).mean() < 0.01


def test_residuals_of_simulations_in_training_are_those_of_a_regression_without_them():
    prior, theta, x, _ = linear_simulations(num=40)
    coordinates, features = coordinates_of(theta, x, prior)
    z = coordinates.standardize(theta)
    coordinates.holds_out = True
    u = coordinates(theta[None], features, first_is_own=True)[0]
    penalties = RidgeCV(alphas=PENALTIES * 40 / 1000, alpha_per_target=True)
    penalties = penalties.fit(features.numpy(), z.numpy()).alpha_
    for j in (0, 7, 39):
        others = np.arange(40) != j
        left_out = [
            z[j, k]
            - Ridge(penalty)
            .fit(features[others].numpy(), z[others, k].numpy())
            .predict(features[j : j + 1].numpy())
            .item()
            for k, penalty in enumerate(penalties)
        ]
        expected = torch.stack(left_out).float() @ coordinates.whitening.T
        assert torch.allclose(u[j], expected, atol=1e-3)
    # Other parameters at the same outputs have the residuals of the whole regression,
    # and so have all in evaluation or where the regression is of other simulations.
    both = torch.stack((theta, theta))
    coordinates_of_both = coordinates(both, features, first_is_own=True)
    assert torch.equal(coordinates_of_both[0], u)
    plain = coordinates(both, features)
    assert torch.equal(coordinates_of_both[1], plain[1])
    coordinates.eval()
    assert torch.equal(coordinates(both, features, first_is_own=True), plain)
    coordinates.train()
    hold_out(coordinates, False)
    assert torch.equal(coordinates(both, features, first_is_own=True), plain)


def test_held_out_residuals_spread_as_those_of_fresh_simulations():
    prior, theta, x, _ = linear_simulations(num=4060)
    noise = torch.randn(len(x), 17)  # as many features as tell the two apart
    x = torch.cat((x, noise), 1)
    coordinates, features = coordinates_of(theta[:60], x[:60], prior)
    coordinates.holds_out = True
    own = coordinates(theta[None, :60], features, first_is_own=True)[0]
    in_sample = coordinates(theta[:60], features)
    fresh = coordinates(theta[60:], Features(x[:60])(x[60:]))
    assert in_sample.square().mean() < 0.75 * fresh.square().mean()
    # The mean square of 180 numbers, with the standard error 0.105 of its logarithm.
    ratio = own.square().mean() / fresh.square().mean()
    assert abs(ratio.log()) < 4 * 0.105


def test_inverse_undoes_the_coordinates():
    prior, theta, x, _ = linear_simulations()
    coordinates, features = coordinates_of(theta, x, prior)
    back = coordinates.inverse(coordinates(theta, features), features)
    torch.testing.assert_close(back, theta, atol=1e-5, rtol=1e-5)


def half_bounded():
    return MultipleIndependent(
        [
            LogNormal(torch.zeros(1), torch.ones(1)),
            Normal(torch.zeros(1), torch.ones(1)),
            Exponential(torch.ones(1)),
        ],
        validate_args=False,
    )


def test_log_abs_det_is_that_of_autograd():
    torch.manual_seed(0)
    prior = half_bounded()
    theta = prior.sample((500,))
    x = theta.log().nan_to_num() + 0.1 * torch.randn(500, 3)
    coordinates, features = coordinates_of(theta, x, prior)
    expected = [
        torch.linalg.slogdet(
            torch.autograd.functional.jacobian(
                lambda t, i=i: coordinates(t, features[i : i + 1]), theta[i : i + 1]
            ).reshape(3, 3)
        )[1]
        for i in range(10)
    ]
    torch.testing.assert_close(
        coordinates.log_abs_det(theta[:10]), torch.stack(expected), atol=1e-4, rtol=1e-4
    )


def test_parameters_bounded_on_one_side_enter_by_their_logarithm():
    torch.manual_seed(0)
    prior = half_bounded()
    theta = prior.sample((500,))
    coordinates, features = coordinates_of(theta, theta + 1, prior)
    logs = theta[:, [0, 2]].log()
    expected = (logs - logs.mean(0)) / logs.std(0)
    torch.testing.assert_close(
        coordinates.standardize(theta)[:, [0, 2]], expected, atol=1e-4, rtol=1e-4
    )
    u = 10 * torch.randn(500, 3)
    assert (coordinates.inverse(u, features)[:, [0, 2]] >= 0).all()


def test_units_of_the_parameters_do_not_matter():
    prior, theta, x, _ = linear_simulations()
    units = torch.tensor([1e6, 1.0, 1e-6])
    coordinates, features = coordinates_of(theta, x, prior)
    scaled = MultivariateNormal(torch.zeros(3), torch.diag(units**2))
    other, _ = coordinates_of(theta * units, x, scaled)
    torch.testing.assert_close(
        other(theta * units, features), coordinates(theta, features), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("unit", [1e-9, 1.0, 100.0, 1e9])
def test_samples_have_their_gradient_in_any_unit(unit):
    """In units of u it is the Cholesky factor; of a logarithm times the distance."""
    torch.manual_seed(0)
    prior = half_bounded()
    theta = prior.sample((500,))
    x = theta + torch.randn(500, 3)
    scale = torch.tensor([1.0, unit, 1.0])
    units = MultipleIndependent([
        LogNormal(torch.zeros(1), torch.ones(1)),
        Normal(torch.zeros(1), unit * torch.ones(1)),
        Exponential(torch.ones(1)),
    ])
    coordinates, features = coordinates_of(theta * scale, x, units)
    u = torch.randn(10, 3)
    jacobian = torch.autograd.functional.jacobian(
        lambda u: coordinates.inverse(u, features[:10]).sum(0), u
    ).transpose(0, 1)
    samples = coordinates.inverse(u, features[:10])
    slopes = torch.stack(
        (samples[:, 0], torch.full((10,), unit * theta[:, 1].std()), samples[:, 2]), 1
    )
    slopes[:, [0, 2]] *= coordinates.scale[[0, 2]]
    expected = slopes.unsqueeze(-1) * coordinates.cholesky
    torch.testing.assert_close(jacobian / scale[:, None], expected / scale[:, None])


def test_samples_of_a_very_skewed_parameter_are_numbers():
    """The logarithm of a Gamma(0.1) variable has a standard deviation of ten."""
    torch.manual_seed(0)
    prior = MultipleIndependent([Gamma(0.1 * torch.ones(1), torch.ones(1))] * 2)
    theta = prior.sample((200,))
    flow = build_residual_flow("maf", theta, theta + 0.1 * torch.randn(200, 2), prior)
    with torch.no_grad():
        samples, _ = flow.sample_and_log_prob((2000,), theta[:3])
        assert (samples > 0).all() and samples.isfinite().all()
        assert flow.log_prob(samples, theta[:3]).isfinite().all()


def test_more_outputs_than_simulations_give_finite_coordinates():
    torch.manual_seed(0)
    prior = BoxUniform(-torch.ones(2), torch.ones(2))
    theta, x = prior.sample((1000,)), torch.randn(1000, 200)
    features = Features(x[:100])
    coordinates = ResidualCoordinates(theta[:100], x[:100], features, prior)
    # The regression could pass through all simulations and leave nothing; leave-one-out
    # errors know that noise predicts nothing, so that new residuals are of size one.
    u = coordinates(theta[100:], features(x[100:]))
    assert 0.5 < u.std() < 2


@pytest.mark.parametrize("model", ["maf", "nsf"])
def test_samples_of_the_flow_have_its_density(model):
    torch.manual_seed(1)
    prior = half_bounded()
    theta = prior.sample((500,))
    x = torch.randn(500, 3) + theta.log().nan_to_num()
    flow = build_residual_flow(model, theta, x, prior)
    assert isinstance(flow, ConditionalDensityEstimator)
    samples, log_prob = flow.sample_and_log_prob(torch.Size((20,)), x[:4])
    assert samples.shape == (20, 4, 3)
    assert samples.requires_grad
    torch.testing.assert_close(
        flow.log_prob(samples, x[:4]), log_prob, atol=2e-3, rtol=1e-3
    )
    torch.testing.assert_close(
        flow.loss(theta[:5], x[:5]), -flow.log_prob(theta[None, :5], x[:5])[0]
    )


@pytest.fixture
def gaussian_flow():
    """A flow that is Gaussian in the residual coordinates, and so in the parameters."""
    prior, theta, x, _ = linear_simulations(500)
    coordinates, inputs = coordinates_of(theta, x, prior)
    flow = LinearGaussianFlow(
        0.2 * torch.randn(3, inputs.shape[1]),
        torch.tensor([0.3, -0.2, 0.0]),
        torch.tensor([[0.8, 0.0, 0.0], [0.3, 1.2, 0.0], [-0.5, 0.1, 0.9]]),
    )
    flow = ResidualFlow(flow, coordinates, Features(x), theta[0].shape, x[0].shape)
    return flow, theta[:4], x[:4]


def parameters_distribution(flow, x):
    """Return the Gaussian of `gaussian_flow` in the parameters, in closed form."""
    coordinates, features = flow.coordinates, flow.features(x)
    root = coordinates.scale.unsqueeze(1) * coordinates.cholesky
    center = coordinates.mean + coordinates.scale * coordinates.predict(features)
    return MultivariateNormal(
        center + flow.flow.mean(features) @ root.T,
        root @ flow.flow.covariance() @ root.T,
    )


def test_density_and_score_of_a_gaussian_flow(gaussian_flow):
    flow, theta, x = gaussian_flow
    points = theta + 0.3 * torch.randn(6, 4, 3)
    target = parameters_distribution(flow, x)
    torch.testing.assert_close(
        flow.log_prob(points, x), target.log_prob(points), atol=1e-3, rtol=1e-3
    )
    expected = -torch.einsum(
        "ijk,bik->bij", target.precision_matrix, points - target.mean
    )
    torch.testing.assert_close(
        score(flow, points, x), expected.detach(), atol=1e-2, rtol=1e-3
    )


def test_samples_of_a_gaussian_flow_and_their_gradients(gaussian_flow):
    flow, _, x = gaussian_flow
    target = parameters_distribution(flow, x)
    num = 20_000
    samples, _ = flow.sample_and_log_prob(torch.Size((num,)), x)
    # In closed form the expectation of the square is that of mean and covariance.
    variance = target.variance
    error = (variance / num).sqrt()
    assert ((samples.mean(0) - target.mean).abs() < 4.5 * error).all()
    square_error = ((4 * target.mean**2 + 2 * variance) * variance / num).sqrt()
    squares = target.mean**2 + variance
    assert ((samples.square().mean(0) - squares).abs() < 4.5 * square_error).all()
    gradients = (
        flat_gradient(value, flow.flow)
        for value in (samples.square().mean(0).sum(), squares.sum())
    )
    estimated, exact = gradients
    assert exact.norm() > 0.1
    assert (estimated - exact).norm() < 0.03 * exact.norm()
    torch.manual_seed(3)
    drawn = flow.sample(torch.Size((5, 2)), x)
    torch.manual_seed(3)
    again, log_prob = flow.sample_and_log_prob(torch.Size((5, 2)), x)
    assert drawn.shape == (5, 2, 4, 3) and log_prob.shape == (5, 2, 4)
    torch.testing.assert_close(drawn, again)


@pytest.mark.parametrize("model", ["maf", "nsf"])
def test_density_of_the_flow_integrates_to_one(model):
    torch.manual_seed(2)
    prior = HalfNormal(torch.ones(1))
    theta = prior.sample((500,))
    x = theta + 0.2 * torch.randn(500, 1)
    flow = build_residual_flow(model, theta, x, prior)
    # An untrained "maf" is broad, and broader in the logarithm.
    log_grid = torch.linspace(-85, 85, 200_000)
    with torch.no_grad():
        log_prob = flow.log_prob(log_grid.exp().reshape(-1, 1, 1), x[:1]).flatten()
    integral = torch.trapezoid((log_prob + log_grid).exp(), log_grid).item()
    assert integral == pytest.approx(1, abs=0.01)


@pytest.mark.slow
def test_a_thousand_linear_simulations_are_enough_for_the_flow():
    """The flow starts where sbi's has to get to: it is nearer to the closed form."""
    from sbi_jeffreys import FixedWeights, JeffreysNPE, NoTracker

    prior, theta, x, mixing = linear_simulations(3000, seed=3)
    covariance = torch.linalg.inv(torch.eye(3) + mixing.T @ mixing / 0.3**2)
    mean = x @ (covariance @ mixing.T / 0.3**2).T
    truth = MultivariateNormal(mean, covariance).log_prob(theta)[1000:]

    def excess(estimator):
        with torch.no_grad():
            log_prob = estimator.log_prob(theta[None, 1000:], x[1000:])[0]
        return (truth - log_prob).mean().item()

    excesses = []
    for trainer, keywords in (
        (NPE, {}),
        (JeffreysNPE, {"weights": FixedWeights((1.0, 0.0, 0.0))}),
    ):
        inference = trainer(
            prior, tracker=NoTracker(), show_progress_bars=False, **keywords
        )
        inference.append_simulations(theta[:1000], x[:1000])
        torch.manual_seed(0)
        excesses.append(excess(inference.train(max_num_epochs=60)))
    assert 0 < excesses[1] < 0.5 * excesses[0]
