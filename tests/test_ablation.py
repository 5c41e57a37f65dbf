"""The held-out losses of the ablation study."""

import contextlib
import math
import signal

import pandas as pd
import pytest
import torch
from sbi.utils import BoxUniform
from scipy import stats

from sbi_jeffreys import JeffreysNPE, NoTracker
from tasks.studies import ablation, images
from tasks.studies.ablation import held_out_levels, held_out_losses, report
from tasks.studies.rows import read_rows, run_missing


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


@pytest.mark.parametrize("spread", [1.0, 2.0])
def test_levels_are_those_of_the_regions_of_highest_density(spread):
    torch.manual_seed(0)
    wide = BoxUniform(-50 * torch.ones(2), 50 * torch.ones(2))
    x = torch.zeros(2000, 2)
    theta = spread * torch.randn(2000, 2)
    levels = held_out_levels(Normal(), wide, theta, x)["flow"]
    # |theta|^2 / spread^2 is chi-squared. Among 2,000 the share has an error of 0.01.
    expected = stats.chi2(2).cdf(stats.chi2(2).ppf(0.9) / spread**2)
    assert (levels <= 0.9).float().mean().item() == pytest.approx(expected, abs=0.035)


def test_levels_count_what_lies_within_the_support():
    torch.manual_seed(0)
    prior = BoxUniform(torch.zeros(1), 10 * torch.ones(1))
    theta = torch.full((100, 1), 1.0)
    levels = held_out_levels(Normal(), prior, theta, torch.zeros(100, 1))["flow"]
    # A half normal: P(z < 1) is 0.683.
    assert levels.mean().item() == pytest.approx(0.683, abs=0.02)


def test_levels_of_the_refined_posterior_are_the_flows_at_exponent_zero(estimator):
    prior, theta, x, network = estimator
    network.exponent = 0.0
    levels = held_out_levels(network, prior, theta, x)
    torch.testing.assert_close(levels["refined"], levels["flow"])


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


@pytest.mark.parametrize("study", [ablation, images])
def test_report_without_rows_is_said(study, tmp_path, monkeypatch, capsys):
    path = str(tmp_path / "rows.csv")
    monkeypatch.setattr("sys.argv", ["study", "--out", path, "--report"])
    assert study.main() == 2
    assert "has no rows; run it without --report" in capsys.readouterr().err


@pytest.mark.parametrize("budget", ["0", "-5"])
def test_simulations_that_are_none_are_said(budget, tmp_path, monkeypatch, capsys):
    command = ["ablation", "--out", str(tmp_path / "rows.csv"), "--budget", budget]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match="2"):
        ablation.main()
    assert f"expected at least 1, got {budget}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_training_that_ctrl_c_cut_short_is_no_row(tmp_path):
    path = tmp_path / "rows.csv"

    def cut_short(seed):
        # As JeffreysNPE, which takes Ctrl-C for the wish to end its training.
        if seed == 2:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        return [{"seed": seed, "loss": 0.5}]

    with pytest.raises(KeyboardInterrupt):
        run_missing(path, [{"seed": seed} for seed in (1, 2, 3)], cut_short)
    assert read_rows(path)["seed"].tolist() == [1]


def test_studies_in_one_file_keep_each_others_rows(tmp_path, capsys):
    path = tmp_path / "new" / "rows.csv"
    keys = [{"task": "a", "seed": seed} for seed in (1, 2)]
    third = 1 / 3

    def other(task, seed):
        return [{"task": task, "seed": seed, "loss": third, "by": "other"}]

    def slow(task, seed):
        # While this one runs, another process does both.
        run_missing(path, keys, other)
        return [{"task": task, "seed": seed, "loss": 0.5, "by": "slow"}]

    run_missing(path, [{"task": "b", "seed": 1}, *keys], slow)
    rows = read_rows(path)
    assert rows[["task", "seed", "by"]].to_numpy().tolist() == [
        ["a", 1, "other"],
        ["a", 2, "other"],
        ["b", 1, "slow"],
    ]
    assert rows["loss"].tolist() == pytest.approx([third, third, 0.5])
    assert [file.name for file in path.parent.iterdir()] == ["rows.csv"]


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
