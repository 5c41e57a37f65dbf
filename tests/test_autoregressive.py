"""Inversion in one pass against nflows' own, one pass for every dimension."""

import copy
import pickle

import pytest
import torch
from nflows.transforms.autoregressive import MaskedAffineAutoregressiveTransform
from nflows.transforms.made import MADE
from sbi.neural_nets import posterior_nn
from torch.nn.functional import relu

from sbi_jeffreys import JeffreysNPE, NoTracker
from sbi_jeffreys.autoregressive import (
    OnePassAffineAutoregressiveTransform,
    invert_in_one_pass,
)
from sbi_jeffreys.flow import rsample_and_log_prob


def rough(module, spread=0.3):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += spread * torch.randn_like(parameter)
    return module


def transform(dim, context_features=3, **kwargs):
    kwargs = {"use_residual_blocks": False, "activation": torch.tanh, **kwargs}
    return rough(
        MaskedAffineAutoregressiveTransform(dim, 20, context_features, **kwargs)
    )


def one_pass(module):
    module = copy.deepcopy(module)
    invert_in_one_pass(module)
    return module


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 25])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"activation": relu, "num_blocks": 1},
        {"random_mask": True},
        {"context_features": None, "num_blocks": 3},
        {"dropout_probability": 0.3},  # which is off in evaluation
    ],
)
def test_inverse_is_that_of_nflows(dim, kwargs):
    plain = transform(dim, **kwargs).double().eval()
    ours = one_pass(plain)
    assert type(ours) is OnePassAffineAutoregressiveTransform
    z = torch.randn(50, dim, dtype=torch.double)
    x = torch.randn(50, 3, dtype=torch.double)
    x = None if "context_features" in kwargs else x
    theta, log_det = ours.inverse(z, x)
    for got, wanted in zip((theta, log_det), plain.inverse(z, x), strict=True):
        torch.testing.assert_close(got, wanted)
    # And it is an inverse.
    back, log_det_back = ours(theta, x)
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(log_det_back, -log_det)


def test_gradients_are_those_of_nflows():
    plain = transform(4).double()
    ours = one_pass(plain)
    z, x = torch.randn(30, 4).double(), torch.randn(30, 3).double()
    gradients = []
    for module in (plain, ours):
        inputs = [z.clone().requires_grad_(), x.clone().requires_grad_()]
        theta, log_det = module.inverse(*inputs)
        loss = (theta**3).sum() + log_det.square().sum()
        gradients.append(torch.autograd.grad(loss, inputs + list(module.parameters())))
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_a_condition_that_all_share_goes_through_its_layer_once(direction):
    plain = transform(4).double()
    ours = one_pass(plain)
    rows = []
    layer = ours.autoregressive_net.context_layer
    layer.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    inputs = torch.randn(30, 4, dtype=torch.double)
    one = torch.randn(1, 3, dtype=torch.double)
    for x, num_rows in ((one.expand(30, 3), 1), (one.repeat(30, 1), 30)):
        rows.clear()
        results = []
        for module in (ours, plain):
            outputs = getattr(module, direction)(inputs, x)
            loss = sum(output.sin().sum() for output in outputs)
            gradients = torch.autograd.grad(loss, tuple(module.parameters()))
            results.append((*outputs, *gradients))
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted)
        assert rows == [num_rows]


def test_one_of_many_parameters_has_the_density_of_one_alone():
    theta, x = torch.randn(100, 3), torch.randn(100, 2)
    ours = one_pass(rough(posterior_nn("maf", z_score_x="none")(theta, x), 0.1))
    together = ours.log_prob(theta[:, None], x[:1])
    alone = [ours.log_prob(theta[i : i + 1, None], x[:1]) for i in range(100)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_what_it_does_not_fit_is_left_as_it_is():
    class OtherNetwork(MADE):
        pass

    other = transform(3)
    other.autoregressive_net.__class__ = OtherNetwork
    for module in (
        other,
        transform(3, use_residual_blocks=True),
        transform(3, use_batch_norm=True),
        posterior_nn("maf_rqs")(torch.randn(20, 3), torch.randn(20, 2)),
    ):
        before = [type(part) for part in module.modules()]
        invert_in_one_pass(module)
        assert [type(part) for part in module.modules()] == before


def test_dropout_in_training_is_that_of_nflows():
    plain = transform(4, dropout_probability=0.5)
    z, x = torch.randn(10, 4), torch.randn(10, 3)
    results = []
    for module in (plain, one_pass(plain)):
        torch.manual_seed(1)
        results.append(module.inverse(z, x)[0])
    assert torch.equal(*results)


def test_a_flow_of_sbi_keeps_its_parameters_and_its_samples():
    theta, x = torch.randn(100, 3), torch.randn(100, 2)
    plain = rough(posterior_nn("maf")(theta, x), 0.1)
    ours = one_pass(plain)
    assert list(ours.state_dict()) == list(plain.state_dict())
    for flow in (plain, ours, pickle.loads(pickle.dumps(ours))):
        torch.manual_seed(1)
        samples, log_prob = rsample_and_log_prob(flow, 100, x[:5])
        if flow is plain:
            wanted, wanted_log_prob = samples, log_prob
        torch.testing.assert_close(samples, wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(log_prob, wanted_log_prob, atol=1e-4, rtol=1e-4)
        torch.manual_seed(1)
        again = flow.sample((100,), x[:5])
        torch.testing.assert_close(again, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Maximum number of epochs")
@pytest.mark.parametrize("density_estimator", ["auto", "maf", posterior_nn("maf")])
def test_jeffreys_npe_has_it(density_estimator):
    inference = JeffreysNPE(
        torch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3)),
        density_estimator,
        tracker=NoTracker(),
        show_progress_bars=False,
    )
    theta = torch.randn(60, 3)
    inference.append_simulations(theta, theta + torch.randn(60, 3))
    inference.train(max_num_epochs=1, training_batch_size=20)
    kinds = [type(module) for module in inference._neural_net.flow.modules()]
    assert kinds.count(OnePassAffineAutoregressiveTransform) == 5
    assert MaskedAffineAutoregressiveTransform not in kinds
