"""Features of the simulation outputs."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from sbi_jeffreys.features import (
    MAX_SCORE,
    MAX_SIMULATIONS,
    MIN_DISTINCT,
    Features,
    is_continuous,
    num_values,
)


def skewed(num: int = 1000, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 2, generator=generator).mul(2).exp()


def test_standard_scores_are_those_of_the_simulations():
    x = (torch.randn(500, 3) + 5) * torch.tensor([1.0, 1e6, 1e-6])
    features = Features(x)(x)[:, :3]
    torch.testing.assert_close(
        features,
        torch.from_numpy(stats.zscore(x.double().numpy(), ddof=0)).float(),
        atol=1e-3,
        rtol=1e-3,
    )


def test_normal_scores_are_those_of_scipy_ranks():
    x = skewed()
    normal = Features(x)(x)[:, 2:]
    ranks = stats.rankdata(x.numpy(), axis=0)
    expected = stats.norm.ppf((ranks - 0.5) / len(x))
    # Exact at the hundred knots, linear between.
    assert np.abs(normal.numpy() - expected).max() < 0.1
    assert np.abs(normal.numpy() - expected).mean() < 0.01


@pytest.mark.parametrize("num", [20, 100, 1000, 20_000])
def test_outputs_beyond_all_simulations_have_the_score_of_the_outermost(num):
    torch.manual_seed(0)
    x = torch.randn(num, 1)
    ends = torch.stack((x.amin(0), x.amax(0)))
    scores = Features(x).normal_scores(torch.cat((ends, ends + ends.sign(), 9 * ends)))
    outermost = float(stats.norm.ppf(1 - 0.5 / num))
    expected = torch.tensor(3 * [[-outermost], [outermost]])
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-3)


def test_normal_scores_increase_with_the_output():
    x = skewed()
    ordered = torch.linspace(0, 100, 300).unsqueeze(1).expand(-1, 2)
    normal = Features(x)(ordered)[:, 2:]
    assert (normal.diff(dim=0) >= 0).all()


@pytest.mark.parametrize("outlier", [1e6, 1e12, 3e38])
def test_one_output_far_out_leaves_the_others_their_scores(outlier):
    torch.manual_seed(0)
    x = torch.randn(1000, 1)
    x[0] = outlier
    features = Features(x)(x)
    assert features.isfinite().all()
    expected = stats.norm.ppf((stats.rankdata(x.numpy()) - 0.5) / 1000)
    assert np.abs(features[:, 1].numpy() - expected).max() < 0.1


def test_long_tails_leave_the_bulk_its_scores():
    # Over thirty decades: of standard scores nearly all would be the same number.
    x = (10 * torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))).exp()
    normal = Features(x).normal_scores(x)[:, 0]
    expected = stats.norm.ppf((stats.rankdata(x[:, 0].numpy()) - 0.5) / 2000)
    assert np.abs(normal.numpy() - expected).mean() < 0.05


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_units_do_not_matter(scale):
    x = skewed()
    torch.testing.assert_close(
        Features(x * scale)(x * scale), Features(x)(x), atol=1e-3, rtol=1e-3
    )


def test_discrete_outputs_have_a_standard_score_only():
    x = torch.cat((torch.randint(0, 2, (300, 4)).float(), torch.randn(300, 1)), 1)
    features = Features(x)
    assert features.numel == 6
    assert features(x).shape == (300, 6)


def test_outliers_and_constants_stay_finite():
    x = torch.cat((torch.randn(300, 2), torch.full((300, 1), 3.0)), 1)
    features = Features(x)
    outlier = torch.tensor([[1e30, -1e30, 5.0]])
    assert features(outlier).abs().max() <= MAX_SCORE
    assert (features(x)[:, 2] == 0).all()


@pytest.mark.parametrize("missing", [torch.nan, torch.inf, -torch.inf])
def test_missing_outputs_are_average(missing):
    x = torch.randn(300, 2, 2) * 3 + 5
    holes = x.clone()
    holes[::3, 0, 1] = missing
    features = Features(holes)
    assert features.numel == 8
    result = features(holes)
    assert result.isfinite().all()
    assert (result[::3, 1] == 0).all()
    # The normal score of the mean: of a normal sample the median is next to it.
    error = ((math.pi / 2 - 1) / 200) ** 0.5
    assert result[::3, 5].abs().max() < 4 * error
    # What is not missing has the scores of the simulations that have it.
    seen = torch.ones(300, dtype=torch.bool)
    seen[::3] = False
    torch.testing.assert_close(
        result[seen][:, [1, 5]], Features(x[seen])(x[seen])[:, [1, 5]]
    )
    # A hole in one output leaves the others be.
    torch.testing.assert_close(result[:, [0, 2, 3]], Features(x)(x)[:, [0, 2, 3]])


def test_an_output_that_is_always_missing():
    x = torch.cat((torch.randn(300, 1), torch.full((300, 1), torch.nan)), 1)
    features = Features(x)
    assert features.numel == 3
    assert (features(x)[:, 1] == 0).all()
    assert features(torch.ones(1, 2)).isfinite().all()


def test_tied_values_share_a_score():
    x = torch.randint(0, 40, (2000, 1)).float()
    features = Features(x)
    zeros = (x == 0).float().mean().item()
    expected = stats.norm.ppf(zeros / 2)
    assert features(torch.zeros(1, 1))[0, 1].item() == pytest.approx(expected, abs=0.05)


def test_features_survive_the_state_dict():
    x = skewed()
    features, other = Features(x), Features(skewed(seed=1))
    other.load_state_dict(features.state_dict())
    assert torch.equal(other(x), features(x))


def test_normal_scores_are_the_features_without_the_standard_scores():
    """They are of the continuous outputs alone, in their order and of any shape."""
    x = torch.randn(400, 2, 3).exp()
    x[:, 0, 1] = x[:, 0, 1].round()
    features = Features(x)
    assert features.continuous.tolist() == [0, 2, 3, 4, 5]
    normal = features.normal_scores(x)
    assert torch.equal(normal, features(x)[:, 6:])
    expected = stats.norm.ppf((stats.rankdata(x[:, 0, 2].numpy()) - 0.5) / 400)
    # Exact at the hundred knots, linear between.
    assert np.abs(normal[:, 1].numpy() - expected).max() < 0.1


def test_there_are_no_normal_scores_of_discrete_outputs():
    """Where all outputs are discrete there is a score of none."""
    x = torch.randint(0, 3, (300, 2)).float()
    assert Features(x).normal_scores(x).shape == (300, 0)


@pytest.mark.parametrize("missing", [torch.nan, torch.inf, -torch.inf])
def test_normal_scores_of_missing_outputs_are_those_of_the_average(missing):
    """A missing output looks like one at its mean."""
    x = skewed()
    holes = x[:5].clone()
    holes[2, 1] = missing
    normal = Features(x).normal_scores(holes)
    holes[2, 1] = x[:, 1].mean()
    at_mean = Features(x).normal_scores(holes)[2, 1]
    torch.testing.assert_close(normal[2, 1], at_mean, rtol=1e-4, atol=1e-4)
    seen = torch.ones(5, 2, dtype=torch.bool)
    seen[2, 1] = False
    assert torch.equal(normal[seen], Features(x).normal_scores(x[:5])[seen])


def test_number_of_values():
    """It is that of numpy, without what is missing."""
    x = torch.cat(
        (
            torch.randint(0, 7, (500, 1)).float(),
            torch.randn(500, 1),
            torch.full((500, 1), 2.0),
            torch.full((500, 1), torch.nan),
            torch.tensor([0.0, 1.0, torch.nan, torch.inf, -torch.inf]).repeat(100)[
                :, None
            ],
            torch.tensor([-0.0, 0.0]).repeat(250)[:, None],
        ),
        1,
    )
    expected = [len(np.unique(c[np.isfinite(c)])) for c in x.numpy().T]
    assert expected == [7, 500, 1, 0, 2, 1]
    assert num_values(x).tolist() == expected
    assert num_values(x.reshape(500, 2, 3)).tolist() == expected
    assert num_values(x[:, :0].reshape(500, 0)).shape == (0,)


def test_continuous_outputs_have_twenty_values():
    """Those that come after the first simulations are not waited for."""
    assert MIN_DISTINCT == 20
    index = torch.arange(MAX_SIMULATIONS + 1000)
    late = (index - MAX_SIMULATIONS).clamp_min(0)
    x = torch.stack((index % 19, index % 20, late), 1).float()
    assert num_values(x).tolist() == [19, 20, 1]
    assert is_continuous(x).tolist() == [False, True, False]
