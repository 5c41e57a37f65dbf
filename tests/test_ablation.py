"""The held-out losses of the ablation study."""

import math

import pandas as pd
import pytest
import torch
from sbi.utils import BoxUniform
from scipy import stats

from sbi_jeffreys import JeffreysNPE, NoTracker
from tasks.studies.ablation import held_out_losses, report


class Normal:
    """p(theta | x) = N(x, 1), which leaks out of the prior's support."""

    def log_prob(self, theta, x):
        return torch.distributions.Normal(x, 1.0).log_prob(theta).sum(-1)

    def sample(self, shape, x):
        return x + torch.randn(*shape, *x.shape)


def test_loss_of_a_flow_is_that_within_the_support():
    torch.manual_seed(0)
    prior = BoxUniform(-torch.ones(1), torch.ones(1))
    theta = prior.sample((400,))
    x = theta + torch.randn(400, 1)
    loss = held_out_losses(Normal(), prior, theta, x)["flow"]
    location = x.numpy()
    low, high = -1 - location, 1 - location
    density = stats.truncnorm.logpdf(theta.numpy(), low, high, loc=location)
    expected = -density.mean()
    # The share of 300 samples inside has an error of about a tenth where it is small.
    assert loss.mean().item() == pytest.approx(expected, abs=0.03)


@pytest.fixture(scope="module")
def estimator():
    torch.manual_seed(0)
    prior = BoxUniform(-torch.ones(2), torch.ones(2))
    theta = prior.sample((200,))
    x = theta + 0.3 * torch.randn(200, 2)
    inference = JeffreysNPE(prior, "maf", tracker=NoTracker(), show_progress_bars=False)
    inference.append_simulations(theta, x)
    with pytest.warns(UserWarning, match="max_num_epochs"):
        return prior, theta, x, inference.train(max_num_epochs=6)


def test_loss_of_a_proxy_without_energy_is_the_priors(estimator):
    prior, theta, x, network = estimator
    network.proxy.weights.zero_()
    loss = held_out_losses(network, prior, theta, x)["proxy"]
    # log Z is zero but for the error of 600 samples.
    assert loss.mean().item() == pytest.approx(math.log(4), abs=0.05)


def test_refined_loss_is_the_flows_at_exponent_zero(estimator):
    prior, theta, x, network = estimator
    network.exponent = 0.0
    losses = held_out_losses(network, prior, theta, x)
    difference = (losses["refined"] - losses["flow"]).abs().mean().item()
    # One more sample, the parameters themselves, among 300.
    assert difference < 0.02


def test_report_is_a_table_of_means_over_seeds():
    rows = pd.DataFrame({
        "task": ["a", "a", "b", "b"],
        "variant": "v",
        "budget": 1000,
        "seed": [0, 1, 0, 1],
        "model": "flow",
        "loss": [1.0, 2.0, -1.0, -2.0],
        "standard_error": 0.1,
        "seconds": 10.0,
    })
    assert report(rows) == (
        "1000 simulations, 2 seed(s)\n\n"
        "| variant | model | a | b | mean | seconds |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| v | flow | 1.50 | -1.50 | 0.00 | 10.00 |"
    )
