"""The scale of a flow's base distribution: its density, its fit, and in training."""

import math

import pytest
import torch
from helpers import X_O, make, simulate, simulator, train
from sbi.neural_nets import posterior_nn

from sbi_jeffreys import FixedWeights
from sbi_jeffreys.base_scale import ScaledNormal, fit_scale, give_scale
from sbi_jeffreys.candidates import FlowCandidates, build_candidates
from sbi_jeffreys.flow import rsample_and_log_prob


def flow_of(model, dim=2, num=500):
    """Return an untrained flow of sbi's, and the outputs that it was built with."""
    torch.manual_seed(0)
    theta, x = torch.randn(num, dim), torch.randn(num, 3)
    return posterior_nn(model)(theta, x), x


def base_of(flow):
    (base,) = [m for m in flow.modules() if isinstance(m, ScaledNormal)]
    return base


@pytest.mark.parametrize("model", ["maf", "nsf"])
def test_a_scale_of_one_changes_nothing(model):
    flow, x = flow_of(model)
    theta = torch.randn(4, len(x), 2)
    before = flow.log_prob(theta, x)
    torch.manual_seed(1)
    samples = flow.sample(torch.Size((3,)), x)
    give_scale(flow)
    assert torch.equal(flow.log_prob(theta, x), before)
    torch.manual_seed(1)
    assert torch.equal(flow.sample(torch.Size((3,)), x), samples)


@pytest.mark.parametrize("model", ["maf", "nsf"])
def test_density_has_mass_one_and_is_that_of_the_samples(model):
    flow, x = flow_of(model, dim=1)
    give_scale(flow)
    base_of(flow).scale.fill_(1.7)
    # An untrained maf is ten times as wide as its base.
    points = torch.arange(-200, 200, 0.01)
    with torch.no_grad():
        density = flow.log_prob(points[:, None, None], x[:1]).exp()
        theta, log_prob = rsample_and_log_prob(flow, 50, x[:20])
        torch.testing.assert_close(
            flow.log_prob(theta, x[:20]), log_prob, atol=1e-3, rtol=0
        )
    assert density.sum().item() * 0.01 == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("dim", [1, 2, 6])
@pytest.mark.parametrize("true_scale", [1.2, 1.6])
def test_fit_finds_the_scale_of_the_parameters(true_scale, dim):
    flow, x = flow_of("maf", dim, num=4000)
    give_scale(flow)
    base = base_of(flow)
    base.scale.fill_(true_scale)
    with torch.no_grad():
        theta = flow.sample(torch.Size((1,)), x)[0]
    base.scale.fill_(1.3)  # where it stood before does not matter
    scale = fit_scale(flow, theta, x, torch.ones(len(x)))
    # The root mean square of n normal values has standard error s / sqrt(2 n), Huber's
    # estimate of up to 1.1 times as much.
    error = 1.1 * true_scale / math.sqrt(2 * 4000 * dim)
    assert scale == pytest.approx(true_scale, abs=3 * error)
    assert base.scale.item() == scale


def test_a_flow_is_never_made_narrower():
    flow, x = flow_of("maf", num=500)
    give_scale(flow)
    base_of(flow).scale.fill_(0.5)
    with torch.no_grad():
        theta = flow.sample(torch.Size((1,)), x)[0]
    assert fit_scale(flow, theta, x, torch.ones(len(x))) == 1.0


def test_few_simulations_far_out_do_not_make_all_posteriors_wide():
    flow, x = flow_of("maf", num=1000)
    give_scale(flow)
    with torch.no_grad():
        base_of(flow).scale.fill_(1.3)
        theta = flow.sample(torch.Size((1,)), x)[0]
        base_of(flow).scale.fill_(100.0)
        far = flow.sample(torch.Size((1,)), x)[0]
    without = fit_scale(flow, theta, x, torch.ones(len(x)))
    theta[:20] = far[:20]
    theta[20] = 1e8
    scale = fit_scale(flow, theta, x, torch.ones(len(x)))
    # Each counts as at most 6 instead of 2 in the mean of 1.8; maximum likelihood
    # would be beyond 10.
    assert without < scale < 1.05 * without


def test_simulations_without_weight_do_not_count():
    flow, x = flow_of("maf", num=400)
    give_scale(flow)
    theta = torch.randn(400, 2)
    theta[200:] *= 3
    kernel = torch.cat((torch.ones(200), torch.zeros(200)))
    scale = fit_scale(flow, theta, x, kernel)
    alone = fit_scale(flow, theta[:200], x[:200], torch.ones(200))
    assert scale == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("unit", [1e-4, 100.0])
def test_the_unit_of_the_kernel_does_not_matter(unit):
    flow, x = flow_of("maf", num=100)
    give_scale(flow)
    base_of(flow).scale.fill_(1.5)
    with torch.no_grad():
        theta = flow.sample(torch.Size((1,)), x)[0]
    kernel = torch.rand(100)
    scale = fit_scale(flow, theta, x, kernel)
    assert scale > 1.1
    assert fit_scale(flow, theta, x, unit * kernel) == pytest.approx(scale, rel=1e-5)


def test_densities_that_are_not_finite_leave_it_as_it_was():
    flow, x = flow_of("maf", num=100)
    give_scale(flow)
    base_of(flow).scale.fill_(1.2)
    theta = torch.full((100, 2), torch.nan)
    assert fit_scale(flow, theta, x, torch.ones(100)) == pytest.approx(1.2)


def test_flows_of_other_libraries_are_left_alone():
    flow, x = flow_of("zuko_maf", num=100)
    before = flow.log_prob(torch.zeros(1, 100, 2), x)
    give_scale(flow)
    assert fit_scale(flow, torch.randn(100, 2), x, torch.ones(100)) == 1.0
    assert torch.equal(flow.log_prob(torch.zeros(1, 100, 2), x), before)


def test_only_the_active_candidate_is_fitted():
    theta = torch.randn(200, 2)
    x = theta + 0.1 * torch.randn(200, 2)
    flow = build_candidates(theta, x, None)
    assert isinstance(flow, FlowCandidates)
    give_scale(flow)
    flow.active = 1
    scale = fit_scale(flow, 100 * theta, x, torch.ones(200))
    scales = [base_of(candidate).scale.item() for candidate in flow.net]  # type: ignore[union-attr]
    assert scales == [1.0, scale, 1.0] and scale > 1.0


def fitted(**kwargs):
    inference = make(**kwargs)
    train(inference, 12, simulate())
    return inference


def fitted_with_a_narrow_flow():
    def too_narrow(theta, x):
        return posterior_nn("maf", hidden_features=8)(theta / 100, x)

    inference = make(density_estimator=too_narrow)
    train(inference, 12, simulate(), learning_rate=1e-6)
    return inference


def test_after_training_the_flow_is_as_wide_as_validation_asks():
    inference = fitted_with_a_narrow_flow()
    flow = inference._neural_net.flow
    scale = base_of(flow).scale.item()
    assert scale > 1.5
    theta, x, _ = inference.get_simulations()
    index = inference.val_indices
    again = fit_scale(flow, theta[index], x[index], torch.ones(len(index)))
    assert again == pytest.approx(scale, rel=1e-4)


def test_without_a_proxy_the_flow_is_that_of_npe():
    inference = fitted(weights=FixedWeights((1.0, 0.0, 0.0)))
    assert base_of(inference._neural_net.flow).scale.item() == 1.0


def test_simulations_of_a_proposal_leave_the_scale_of_the_rounds_before():
    inference = fitted()
    scale = base_of(inference._neural_net.flow).scale.item()
    proposal = inference.build_posterior().set_default_x(X_O)
    theta = proposal.sample((80,), show_progress_bars=False)
    inference.append_simulations(theta, simulator(theta), proposal=proposal)
    train(inference)
    assert base_of(inference._neural_net.flow).scale.item() == scale


def test_the_validation_loss_is_that_of_the_flow_that_is_kept():
    inference = fitted_with_a_narrow_flow()
    theta, x, _ = inference.get_simulations()
    index = inference.val_indices
    with torch.no_grad():
        loss = inference._neural_net.loss(theta[index], x[index]).mean().item()
    best = inference.summary["best_validation_loss"][-1]
    assert best == pytest.approx(loss, rel=1e-5)
    assert best < inference.summary["validation_loss"][0] - 1
