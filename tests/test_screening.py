"""Which of many simulation outputs are left out."""

import pytest
import torch
from helpers import assert_equal, make, simulate, state_of
from scipy import stats
from torch import nn

from sbi_jeffreys import energy_nn
from sbi_jeffreys.features import Features
from sbi_jeffreys.likelihood import SurrogateLikelihoods
from sbi_jeffreys.screening import (
    FAMILY_LEVEL,
    LEVEL,
    MAX_SHARE,
    MIN_OUTPUTS,
    SelectOutputs,
    _p_value_of_regression,
    _regressors,
    informative_outputs,
)

NUM_NOISE = 60


def noise(num: int = 1000, columns: int = NUM_NOISE) -> torch.Tensor:
    """Return outputs that say nothing, with long tails and with few values."""
    tails = torch.distributions.StudentT(2.0).sample(torch.Size((num, columns)))
    tails[:, ::3] = (tails[:, ::3] > 0).float()
    return tails


def kept(theta: torch.Tensor, x: torch.Tensor) -> set[int]:
    outputs = informative_outputs(theta, x)
    assert outputs is not None
    assert outputs.tolist() == sorted(outputs.tolist())
    return set(outputs.tolist())


# Of sixty outputs that say nothing one in a hundred is kept. One more is allowed for
# those that are taken for a part of a known output.
MOST_KEPT_BY_CHANCE = stats.binom.isf(1e-4, NUM_NOISE, LEVEL) + 1


@pytest.mark.parametrize("seed", range(5))
def test_outputs_that_depend_on_parameters_are_kept(seed):
    torch.manual_seed(seed)
    theta = torch.randn(1000, 3)
    e = torch.randn(1000, 6)
    says = torch.stack(
        (
            theta[:, 0] + e[:, 0],  # the mean depends on parameters
            theta[:, 1].exp() * e[:, 1],  # the spread
            theta[:, 0] * theta[:, 2] + e[:, 2],  # a product
            theta[:, 2].square() + 0.5 * e[:, 3],  # a square
            (theta[:, 1] + e[:, 4] > 0).float(),  # an event
            (theta[:, 2] + e[:, 5]) * 1e6 - 1e9,  # in other units
        ),
        1,
    )
    x = torch.cat((noise(), says), 1)
    found = kept(theta, x)
    assert found >= set(range(NUM_NOISE, NUM_NOISE + 6))
    assert len(found) - 6 <= MOST_KEPT_BY_CHANCE


@pytest.mark.parametrize(
    "contains",
    [
        lambda theta, e: theta + 2 * e,
        lambda theta, e: theta * e,  # the sign of the noise tells that of theta
        lambda theta, e: theta + e.abs(),
        lambda theta, e: theta * (1 + e.square()),
    ],
    ids=["sum", "product", "absolute", "scale"],
)
@pytest.mark.parametrize("seed", range(3))
def test_noise_that_another_output_contains_is_kept(contains, seed):
    torch.manual_seed(seed)
    theta, e = torch.randn(2, 1000, 1)
    x = torch.cat((contains(theta, e), e, noise()), 1)
    regressors = _regressors(theta.double())
    # By itself it says nothing.
    assert _p_value_of_regression(e.double(), regressors) > FAMILY_LEVEL / x.shape[1]
    found = kept(theta, x)
    assert found >= {0, 1}
    assert len(found) - 2 <= MOST_KEPT_BY_CHANCE


def test_levels_are_those_of_independent_outputs():
    # Over many draws the p-values of outputs that say nothing are uniform.
    torch.manual_seed(0)
    theta = torch.rand(500, 2).double()
    regressors = _regressors(theta)
    p_values = _p_value_of_regression(torch.randn(500, 2000).double(), regressors)
    assert stats.kstest(p_values.numpy(), "uniform").pvalue > 1e-3
    assert regressors.shape[1] == 5  # two parameters, their squares and product
    torch.testing.assert_close(
        regressors.T @ regressors, torch.eye(5, dtype=torch.double)
    )


def test_p_values_are_those_of_a_regression():
    torch.manual_seed(1)
    z = torch.randn(300, 1).double()
    y = 0.2 * z + torch.randn(300, 1).double()
    slope = z - z.mean()
    p_value = _p_value_of_regression(y, slope / slope.norm())
    expected = stats.linregress(z[:, 0].numpy(), y[:, 0].numpy()).pvalue
    assert p_value.item() == pytest.approx(expected, rel=1e-6)


def test_outputs_without_noise_are_kept():
    torch.manual_seed(0)
    for num_parameters in (1, 3, 30):  # of thirty parameters without products
        theta = torch.randn(2000, num_parameters)
        x = torch.cat((theta[:, :1], 2 - 3 * theta[:, -1:].exp(), noise(2000)), 1)
        assert kept(theta, x) >= {0, 1}
    # Scores of such outputs are regressed without a residual, or with one below zero.
    scores = theta.double() - theta.double().mean(0)
    regressors = torch.linalg.svd(scores, full_matrices=False)[0]
    weights = torch.randn(30, 200).double()
    assert (_p_value_of_regression(scores @ weights, regressors) < 1e-300).all()


def test_all_are_kept_where_there_is_little_to_gain_or_to_tell():
    torch.manual_seed(0)
    theta = torch.randn(1000, 2)
    says = theta[:, :1] + 0.1 * torch.randn(1000, 1)
    few = torch.cat((says, noise(columns=MIN_OUTPUTS - 1)), 1)
    assert informative_outputs(theta, few) is None
    half = says + 0.1 * torch.randn(1000, 20)
    assert informative_outputs(theta, torch.cat((half, noise(columns=19)), 1)) is None
    assert MAX_SHARE == 0.5
    assert kept(theta, torch.cat((half, noise(columns=40)), 1)) >= set(range(20))
    # Too few simulations, no vectors, nothing known.
    x = torch.cat((says, noise()), 1)
    assert kept(theta, x) >= {0}
    assert informative_outputs(theta[:50], x[:50]) is None
    assert informative_outputs(theta, x.reshape(1000, 1, -1)) is None
    assert informative_outputs(theta, noise()) is None
    assert informative_outputs(theta, torch.ones(1000, 30)) is None


def test_missing_and_constant_outputs_and_few_values_do_not_break_it():
    torch.manual_seed(0)
    theta = torch.randint(0, 2, (1000, 2)).float()  # squares are the parameters
    says = theta + 0.5 * torch.randn(1000, 2)
    x = torch.cat((says, noise(), torch.full((1000, 4), 3.0)), 1)
    x[::7, 0] = torch.nan
    x[::5, 9] = torch.inf
    found = kept(theta, x)
    assert found >= {0, 1}
    assert not found & set(range(x.shape[1] - 4, x.shape[1]))


@pytest.fixture(scope="module")
def screened():
    """Return an inference on simulations of which few outputs say something."""
    torch.manual_seed(0)
    theta, x = simulate(400)
    wide = torch.cat((noise(400, 25), x, noise(400, 25)), 1)
    inference = make(density_estimator="auto")
    with pytest.warns(UserWarning, match=r"simulation outputs say nothing"):
        inference.append_simulations(theta, wide).train(max_num_epochs=12)
    return inference, theta, wide


def test_no_network_sees_what_is_left_out(screened):
    inference, theta, x = screened
    estimator = inference._estimator
    indices = inference.train_indices
    outputs = informative_outputs(theta[indices], x[indices])
    assert outputs is not None and set(outputs.tolist()) >= {25, 26}
    left_out = torch.ones(x.shape[1], dtype=torch.bool)
    left_out[outputs] = False
    other = x.clone()
    other[:, left_out] = 1e3
    for index in range(len(estimator.flow)):
        estimator.flow.active = index
        ours = estimator.flow.log_prob(theta[None], x)
        assert torch.equal(ours, estimator.flow.log_prob(theta[None], other))
    assert isinstance(estimator.proxy.likelihoods, SurrogateLikelihoods)
    assert torch.equal(
        estimator.proxy.log_factors(theta[None], x),
        estimator.proxy.log_factors(theta[None], other),
    )
    # What is kept counts.
    other[:, 25] += 1.0
    assert not torch.equal(ours, estimator.flow.log_prob(theta[None], other))


@pytest.mark.parametrize("simulations", [True, False])
def test_it_is_saved(screened, tmp_path, simulations):
    inference, theta, x = screened
    inference.save(tmp_path / "screened.pt", simulations=simulations)
    loaded = make(density_estimator="auto").load(tmp_path / "screened.pt")
    for model in ("flow", "proxy"):
        a, b = (getattr(i._estimator, model) for i in (inference, loaded))
        assert_equal(state_of(a), state_of(b))


def test_networks_of_the_users_own_take_all(recwarn):
    torch.manual_seed(0)
    theta, x = simulate(200)
    x = torch.cat((x, noise(200)), 1)
    inference = make(
        density_estimator="maf",
        energy_estimator=energy_nn(embedding_net=nn.Linear(x.shape[1], 5)),
    )
    inference.append_simulations(theta, x).train(max_num_epochs=3)
    net = inference._estimator.proxy.net
    assert net.embedding_net[-1].weight.shape[1] == x.shape[1]


def test_sbi_takes_the_selection_for_an_embedding():
    x = torch.randn(5, 4)
    assert torch.equal(SelectOutputs(torch.tensor([2, 0]))(x), x[:, [2, 0]])
    features = Features(x, torch.tensor([3, 1]))
    assert torch.equal(features(x), Features(x[:, [3, 1]])(x[:, [3, 1]]))
