"""Reparametrised samples of every flow, their densities, gradients and scores."""

import pytest
import torch
from helpers import LinearGaussianFlow, flat_gradient
from sbi.neural_nets import posterior_nn
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from sbi_jeffreys.flow import check_has_rsample, rsample_and_log_prob, score

# Every flow that posterior_nn knows, and how exactly it is inverted: in closed form,
# by splines, or by bisection (gf, bpf, naf, unaf).
FLOWS = {
    "maf": 1e-4,
    "maf_rqs": 1e-3,
    "nsf": 1e-3,
    "zuko_nice": 1e-4,
    "zuko_maf": 1e-4,
    "zuko_nsf": 1e-3,
    "zuko_ncsf": 1e-3,
    "zuko_sospf": 1e-3,
    "zuko_naf": 1e-3,
    "zuko_unaf": 1e-3,
    "zuko_gf": 2e-2,
    "zuko_bpf": 1e-3,
}
INVERTED_NUMERICALLY = {"zuko_naf", "zuko_unaf", "zuko_gf", "zuko_bpf"}


def build(name, spread=0.1):
    theta = torch.rand(200, 2) * 2 - 1
    x = theta + 0.3 * torch.randn(200, 2)
    flow = posterior_nn(name, hidden_features=10, num_transforms=2)(theta, x)
    with torch.no_grad():  # away from the identity that some flows start as
        for parameter in flow.parameters():
            parameter += spread * torch.randn_like(parameter)
    return flow


@pytest.fixture
def double():
    """Double precision for finite differences, also in what nflows makes itself."""
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


@pytest.fixture
def gaussian():
    torch.manual_seed(0)
    return LinearGaussianFlow(
        weight=torch.tensor([[1.0, 0.5, 0.0], [0.0, -1.0, 2.0]]),
        bias=torch.tensor([0.3, -0.2]),
        scale_tril=torch.tensor([[0.5, 0.0], [0.4, 0.8]]),
    )


@pytest.mark.parametrize("name", FLOWS)
def test_densities_belong_to_samples(name):
    flow = build(name)
    x = torch.tensor([[-1.0, -1.0], [0.0, 0.5], [1.0, 0.0]])
    theta, log_prob = rsample_and_log_prob(flow, 100, x)
    assert theta.shape == (100, 3, 2)
    assert log_prob.shape == (100, 3)
    error = (flow.log_prob(theta, x) - log_prob).abs()
    assert error.quantile(0.95) < FLOWS[name]
    # The densities of another condition are far off: the test would see a mix-up.
    other = (flow.log_prob(theta, x.roll(1, 0)) - log_prob).abs()
    assert other.median() > 2 * FLOWS[name]


@pytest.mark.parametrize("name", FLOWS)
def test_samples_carry_gradients_to_the_flow(name, double):
    # As built: where zuko's bisection leaves its bracket no gradient is right.
    flow = build(name, spread=0.0)
    x = torch.tensor([[-1.0, -1.0], [1.0, 0.0]])
    start = parameters_to_vector(flow.parameters()).detach()
    weights = torch.randn(5, 2, 2)

    def statistic(parameters):
        vector_to_parameters(parameters, flow.parameters())
        torch.manual_seed(1)  # the same noise
        theta, _ = rsample_and_log_prob(flow, 5, x)
        return (weights * theta).sum()

    gradient = flat_gradient(statistic(start), flow)
    directions = torch.randn(6, len(start))
    directions[0] = gradient
    directions /= directions.norm(dim=1, keepdim=True)
    step = 1e-2 if name in INVERTED_NUMERICALLY else 1e-4
    finite_differences = torch.stack([
        (statistic(start + step * d) - statistic(start - step * d)) / (2 * step)
        for d in directions
    ]).detach()
    error = (directions @ gradient - finite_differences).norm()
    tolerance = 0.1 if name in INVERTED_NUMERICALLY else 0.02
    assert error < tolerance * finite_differences.norm()
    assert gradient.norm() > 0.1


@pytest.mark.parametrize("name", ["maf", "nsf", "zuko_nsf", "zuko_gf"])
def test_score_against_finite_differences(name, double):
    flow = build(name)
    x = torch.tensor([[-1.0, -1.0], [1.0, 0.0]])
    theta = torch.rand(4, 2, 2) - 0.5
    result = score(flow, theta, x)
    for i in range(2):
        step = torch.zeros(2)
        step[i] = 1e-5
        slope = (flow.log_prob(theta + step, x) - flow.log_prob(theta - step, x)) / 2e-5
        torch.testing.assert_close(result[..., i], slope, rtol=1e-4, atol=1e-4)


def test_score_of_a_gaussian(gaussian):
    x = torch.randn(4, 3)
    theta = torch.randn(6, 4, 2)
    precision = torch.linalg.inv(gaussian.covariance())
    expected = -(theta - gaussian.mean(x)) @ precision
    result = score(gaussian, theta, x)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_score_freezes_the_flow_and_works_without_grad(gaussian):
    x, theta = torch.randn(4, 3), torch.randn(6, 4, 2)
    result = score(gaussian, theta, x)
    assert not result.requires_grad
    assert all(parameter.grad is None for parameter in gaussian.parameters())
    with torch.no_grad():
        assert torch.equal(score(gaussian, theta, x), result)


def test_a_gaussian_flow_of_the_users_is_accepted(gaussian):
    check_has_rsample(gaussian, torch.randn(3, 3))


@pytest.mark.parametrize("name", FLOWS)
def test_flows_of_posterior_nn_are_accepted(name):
    check_has_rsample(build(name), torch.randn(3, 2))


@pytest.mark.parametrize("name", ["mdn", "made"])
def test_mixtures_are_refused(name):
    # Of a mixture the choice of the component has no gradient.
    estimator = build(name)
    with pytest.raises(ValueError, match="needs samples with gradients") as error:
        check_has_rsample(estimator, torch.randn(3, 2))
    assert "'nsf'" in str(error.value)  # what to take instead
    assert "sbi.inference.NPE" in str(error.value)


def test_mixed_discrete_posteriors_are_refused():
    theta = torch.cat((torch.randn(200, 2), torch.randint(0, 3, (200, 1))), 1)
    estimator = posterior_nn("mnpe", hidden_features=10)(theta, torch.randn(200, 2))
    with pytest.raises(ValueError, match="needs samples with gradients"):
        check_has_rsample(estimator, torch.randn(3, 2))


def test_detached_samples_are_refused(gaussian):
    class Detached(LinearGaussianFlow):
        def sample(self, sample_shape, condition, **kwargs):
            return super().sample(sample_shape, condition).detach()

    flow = Detached(gaussian.weight, gaussian.bias, gaussian.scale_tril)
    with pytest.raises(ValueError, match="Samples of Detached carry no gradient"):
        check_has_rsample(flow, torch.randn(3, 3))


def test_densities_of_other_conditions_are_refused(gaussian):
    class Mixed(LinearGaussianFlow):
        def sample_and_log_prob(self, sample_shape, condition, **kwargs):
            theta = self.sample(sample_shape, condition)
            return theta, self.log_prob(theta, condition.roll(1, 0))

    flow = Mixed(gaussian.weight, gaussian.bias, gaussian.scale_tril)
    with pytest.raises(ValueError, match="differ from its log_prob"):
        check_has_rsample(flow, 3 * torch.randn(3, 3))


def test_an_estimator_without_densities_is_refused(gaussian):
    class Implicit(LinearGaussianFlow):
        def log_prob(self, input, condition, **kwargs):
            raise NotImplementedError("no density")

    flow = Implicit(gaussian.weight, gaussian.bias, gaussian.scale_tril)
    with pytest.raises(ValueError, match="cannot draw samples with densities"):
        check_has_rsample(flow, torch.randn(3, 3))


@pytest.mark.parametrize("junk", [None, "maf", nn.Linear(2, 2)])
def test_junk_is_refused(junk):
    with pytest.raises(TypeError, match=f"got {type(junk).__name__}"):
        check_has_rsample(junk, torch.randn(3, 2))
