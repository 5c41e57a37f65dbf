"""Logistic regressions of discrete outputs."""

import pytest
import torch
from torch.nn import functional as F

from sbi_jeffreys.features import Features
from sbi_jeffreys.logistic import MAX_SIMULATIONS, LogisticRegressions

MISSING = -1


def simulations(num=500):
    """Return parameters and a coin, one of three values, and a constant."""
    z = torch.randn(num, 2)
    coin = torch.distributions.Bernoulli(logits=z @ torch.tensor([1.5, -0.5])).sample()
    logits = z @ torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]])
    value = torch.distributions.Categorical(logits=logits).sample()
    return z, torch.stack((coin.long(), value, torch.zeros_like(value)), 1)


def logits_of(regressions, features, z):
    return regressions(features(z)).unflatten(-1, (-1, 3))


@pytest.mark.parametrize("num_missing", [0, 100])
def test_the_penalised_likelihood_is_stationary(num_missing):
    """Outputs that are missing do not count."""
    z, categories = simulations()
    categories[:num_missing, 0] = MISSING
    categories[-num_missing or len(z) :, 1] = MISSING
    features = Features(z)
    regressions = LogisticRegressions(features, z, categories, 3)
    regressions.weight.requires_grad_()
    regressions.bias.requires_grad_()
    logits = logits_of(regressions, features, z)
    # The second side of the coin has the only logit; of three values all have one.
    coin, known = categories[:, 0], categories[:, 0] >= 0
    loss = F.binary_cross_entropy_with_logits(
        logits[known, 0, 1], coin[known].float(), reduction="sum"
    ) + F.cross_entropy(
        logits[:, 1], categories[:, 1], ignore_index=MISSING, reduction="sum"
    )
    loss = loss + 0.5 * regressions.weight.square().sum()
    for gradient in torch.autograd.grad(loss, (regressions.weight, regressions.bias)):
        assert gradient.abs().max() < 0.1  # of sums over hundreds of simulations
    # Neither the first side nor what has one value says anything.
    weight = regressions.weight.detach().unflatten(0, (3, 3))
    assert (weight[0, [0, 2]] == 0).all() and (weight[2] == 0).all()
    assert (weight[0, 1] != 0).any() and (weight[1] != 0).any(1).all()


def test_known_coefficients_are_found():
    z, categories = simulations(MAX_SIMULATIONS)
    features = Features(z)
    regressions = LogisticRegressions(features, z, categories, 3)
    at = torch.randn(500, 2)
    logits = logits_of(regressions, features, at)
    # Two features of every parameter: a standard error of the logit of about 0.08.
    error = logits[:, 0, 1] - at @ torch.tensor([1.5, -0.5])
    assert error.abs().median() < 0.2
    error = logits[:, 1, 0] - logits[:, 1, 2] - 2 * at[:, 0]
    assert error.abs().median() < 0.2


def test_values_that_were_not_simulated_have_no_logit():
    z, categories = simulations()
    categories[:, 0] *= 2  # the first and the third value
    features = Features(z)
    weight = LogisticRegressions(features, z, categories, 3).weight.unflatten(0, (3, 3))
    assert (weight[0, :2] == 0).all() and (weight[0, 2] != 0).any()


def test_there_may_be_no_outputs():
    z, categories = simulations()
    features = Features(z)
    regressions = LogisticRegressions(features, z, categories[:, :0], 1)
    assert regressions(features(z)).shape == (500, 0)


def test_a_value_of_later_simulations_starts_as_rare():
    """Beyond those that are fitted to, as one that half a simulation had."""
    num = MAX_SIMULATIONS + 100
    z = torch.randn(num, 1)
    categories = torch.zeros(num, 2, dtype=torch.long)
    categories[1::3, 0] = 1
    categories[MAX_SIMULATIONS:] = 2
    features = Features(z)
    regressions = LogisticRegressions(features, z, categories, 3)
    probabilities = logits_of(regressions, features, z).softmax(-1)
    assert (probabilities[:, 0, 2] < 1e-4).all() and (probabilities[:, 0, 2] > 0).all()
    assert probabilities[:, 0, 1].mean().item() == pytest.approx(1 / 3, abs=0.02)
    assert (probabilities[:, 1, 0] > 0.999).all()
