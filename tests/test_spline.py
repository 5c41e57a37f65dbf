"""Splines of one bin against nflows', which compute all bins."""

import copy

import pytest
import torch
from nflows.nn.nets import ResidualNet
from nflows.transforms.coupling import PiecewiseRationalQuadraticCouplingTransform
from sbi.neural_nets import posterior_nn

from sbi_jeffreys.spline import OneBinSplineCouplingTransform, evaluate_one_bin


def coupling(bound=3.0, num_bins=7, **kwargs):
    def net(num_in, num_out):
        return ResidualNet(num_in, num_out, hidden_features=10, context_features=2)

    kwargs = {"tails": "linear", **kwargs}
    transform = PiecewiseRationalQuadraticCouplingTransform(
        torch.tensor([1, 0, 1]), net, num_bins, tail_bound=bound, **kwargs
    )
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter += torch.randn_like(parameter)
    return transform.double()


def one_bin(module):
    module = copy.deepcopy(module)
    evaluate_one_bin(module)
    return module


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("num_bins", [1, 2, 7])
def test_values_and_gradients_are_those_of_nflows(direction, num_bins):
    plain = coupling(num_bins=num_bins)
    ours = one_bin(plain)
    assert type(ours) is OneBinSplineCouplingTransform
    # A third of the points are outside; some are on a bound.
    points = 3 * torch.randn(200, 3).double()
    points[:5], points[5:10] = 3.0, -3.0
    context = torch.randn(200, 2).double()
    results = []
    for transform in (plain, ours):
        inputs = points.clone().requires_grad_()
        outputs, log_det = getattr(transform, direction)(inputs, context)
        loss = (outputs**2).sum() + (log_det**2).sum()
        wanted = [inputs, *transform.parameters()]
        results.append([outputs, log_det, *torch.autograd.grad(loss, wanted)])
    for got, wanted in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, wanted)
    outside = (points.abs() > 3).all(1)
    assert outside.any()
    assert torch.equal(results[1][0][outside], points[outside])


def test_inverse_is_the_inverse():
    ours = one_bin(coupling())
    z, context = 3 * torch.randn(500, 3).double(), torch.randn(500, 2).double()
    theta, log_det = ours.inverse(z, context)
    back, log_det_back = ours(theta, context)
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(log_det_back, -log_det)


def test_nan_stays_nan():
    ours = one_bin(coupling())
    points = torch.full((1, 3), torch.nan).double()
    for transform in (ours.forward, ours.inverse):
        assert transform(points, torch.zeros(1, 2).double())[0].isnan().all()


@pytest.mark.parametrize(
    "kwargs", [{"tails": None}, {"min_bin_width": 1e-2}, {"min_bin_height": 1e-2}]
)
def test_what_it_does_not_fit_is_left_as_it_is(kwargs):
    plain = coupling(bound=1.0, **kwargs)
    assert type(one_bin(plain)) is type(plain)


def test_a_flow_of_sbi_keeps_its_parameters_and_densities():
    theta, x = torch.randn(100, 3), torch.randn(100, 2)
    plain = posterior_nn("nsf")(theta, x)
    ours = one_bin(plain)
    assert OneBinSplineCouplingTransform in {type(part) for part in ours.modules()}
    assert list(ours.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(
        ours.loss(theta, x), plain.loss(theta, x), atol=1e-4, rtol=1e-4
    )
