"""The flow and its proxy as one density estimator of sbi."""

import copy
import io
import pickle

import pytest
import torch
from sbi.inference.posteriors import DirectPosterior
from sbi.neural_nets import posterior_nn
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from sbi.utils import BoxUniform
from torch import nn

from sbi_jeffreys import JeffreysEstimator, energy_nn
from sbi_jeffreys.residual_flow import build_residual_flow

PRIOR = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))


def build(name="maf", seed=0):
    torch.manual_seed(seed)
    theta = PRIOR.sample((200,))
    x = theta + 0.3 * torch.randn(200, 2)
    if name == "residual":
        flow = build_residual_flow("maf", theta, x, PRIOR)
    else:
        flow = posterior_nn(name, hidden_features=10, num_transforms=2)(theta, x)
    proxy = energy_nn(hidden_features=10, num_blocks=1)(theta, x, PRIOR)
    nn.init.normal_(proxy.net.final_layer.weight)
    return JeffreysEstimator(flow, proxy).eval()


@pytest.fixture(params=["maf", "zuko_nsf", "residual"])
def name(request):
    return request.param


@pytest.fixture
def estimator(name):
    return build(name)


@pytest.fixture
def x():
    return torch.tensor([[-1.0, 1.0], [0.0, 0.0], [1.5, -0.5]])


def test_every_module_has_the_mode_of_the_estimator(estimator):
    for mode in (True, False):
        assert estimator.train(mode) is estimator
        assert all(module.training is mode for module in estimator.modules())


def test_the_flow_answers(estimator, x):
    assert isinstance(estimator, ConditionalDensityEstimator)
    theta = PRIOR.sample((3,))
    flow = estimator.flow
    assert estimator.input_shape == flow.input_shape == (2,)
    assert estimator.condition_shape == flow.condition_shape == (2,)
    assert estimator.embedding_net is flow.embedding_net
    assert torch.equal(estimator.loss(theta, x), flow.loss(theta, x))
    assert torch.equal(
        estimator.log_prob(theta[None], x), flow.log_prob(theta[None], x)
    )
    torch.manual_seed(3)
    samples = estimator.sample(torch.Size((5, 4)), x)
    torch.manual_seed(3)
    assert torch.equal(samples, flow.sample(torch.Size((5, 4)), x))
    assert samples.shape == (5, 4, 3, 2)


@pytest.mark.parametrize("shape", [(), (6,), (5, 4)])
def test_densities_belong_to_samples(estimator, x, shape):
    theta, log_prob = estimator.sample_and_log_prob(torch.Size(shape), x)
    assert theta.shape == (*shape, 3, 2)
    assert log_prob.shape == (*shape, 3)
    expected = estimator.log_prob(theta.reshape(-1, 3, 2), x).reshape(*shape, 3)
    torch.testing.assert_close(log_prob, expected, rtol=1e-3, atol=1e-3)


def test_parameters_are_those_of_both_once(estimator):
    ids = [id(parameter) for parameter in estimator.parameters()]
    assert len(ids) == len(set(ids))
    assert set(ids) == {
        id(parameter)
        for model in (estimator.flow, estimator.proxy)
        for parameter in model.parameters()
    }


def test_state_dict_round_trip(estimator, name, x):
    estimator.exponent = 0.3
    file = io.BytesIO()
    torch.save(estimator.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = build(name, seed=1)
    theta = PRIOR.sample((4, 3))
    assert not torch.equal(other.log_prob(theta, x), estimator.log_prob(theta, x))
    other.load_state_dict(state)
    assert torch.equal(other.log_prob(theta, x), estimator.log_prob(theta, x))
    assert torch.equal(other.proxy(theta, x), estimator.proxy(theta, x))
    assert other.exponent == pytest.approx(0.3)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))]
)
def test_copies_answer_alike_and_share_nothing(estimator, x, duplicate):
    estimator.exponent = 0.6
    other = duplicate(estimator)
    theta = PRIOR.sample((4, 3))
    assert torch.equal(other.log_prob(theta, x), estimator.log_prob(theta, x))
    assert torch.equal(
        other.proxy.log_unnormalized(theta, x),
        estimator.proxy.log_unnormalized(theta, x),
    )
    assert other.exponent == pytest.approx(0.6)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        assert not torch.equal(other.loss(theta[0], x), estimator.loss(theta[0], x))
        # The copy's own network moved with its flow: they are one still.
        assert torch.equal(other.loss(theta[0], x), other.flow.loss(theta[0], x))
    other.exponent = 0.1
    assert estimator.exponent == pytest.approx(0.6)


def test_sbi_makes_its_posterior_of_it(estimator, x):
    posterior = DirectPosterior(estimator, PRIOR)
    samples = posterior.sample((50,), x=x[:1], show_progress_bars=False)
    assert samples.shape == (50, 2)
    assert (samples.abs() <= 2).all()
    assert torch.isfinite(posterior.log_prob(samples, x=x[:1])).all()
