"""sbi's diagnostics of the posteriors of `JeffreysNPE`.

On a Gaussian task whose posterior is known, the diagnostics must pass the exact
posterior and fail a wrong one; and give for `JeffreysNPE` what they give for NPE.
"""

import pytest
import torch
from helpers import LinearGaussianFlow, QuadraticEnergy, gaussian_proxy
from sbi.diagnostics import (
    check_sbc,
    check_tarp,
    run_sbc,
    run_tarp,
)
from sbi.diagnostics.lc2st import LC2ST
from sbi.diagnostics.misspecification import (
    calc_misspecification_logprob,
    calc_misspecification_mmd,
)
from sbi.inference import NPE, MarginalTrainer
from sbi.neural_nets import posterior_nn
from sbi.neural_nets.embedding_nets import FCEmbedding
from sklearn.linear_model import LogisticRegression
from torch.distributions import MultivariateNormal

from sbi_jeffreys import JeffreysNPE, NoTracker, energy_nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:Maximum number of epochs"),
    pytest.mark.filterwarnings("ignore:Number of SBC samples"),
    pytest.mark.filterwarnings("ignore:.*posterior samples for ranking"),
]

PRIOR = MultivariateNormal(torch.zeros(2), torch.eye(2))


def simulate(num, noise=0.5):
    theta = PRIOR.sample((num,))
    return theta, theta + noise * torch.randn(num, 2)


def train_gaussians(shift=0.0):
    """Train closed forms so slowly that they stay: the posterior, moved by `shift`."""
    root = 0.2**0.5 * torch.eye(2)
    flow = LinearGaussianFlow(0.8 * torch.eye(2), torch.full((2,), shift), root)
    # The likelihood on the prior is the posterior.
    net = QuadraticEnergy(torch.eye(2), torch.zeros(2), 2 * torch.eye(2))
    inference = JeffreysNPE(
        PRIOR,
        lambda theta, x: flow,
        tracker=NoTracker(),
        show_progress_bars=False,
        energy_estimator=lambda theta, x, prior: gaussian_proxy(net, PRIOR),
    )
    inference.append_simulations(*simulate(200))
    inference.train(learning_rate=1e-12, max_num_epochs=1)
    torch.manual_seed(1)  # whatever training has drawn
    return inference


def build(shift, sample_with):
    """Return the flow's posterior, or what the proxy, which is exact, makes of it."""
    if sample_with == "direct":
        return train_gaussians(shift).build_posterior()
    return train_gaussians(shift).build_posterior(
        sample_with="refined", refined_sampling_parameters={"exponent": 1.0}
    )


CASES = pytest.mark.parametrize(
    ("sample_with", "shift", "passes"),
    [
        ("direct", 0.0, True),
        ("direct", 0.3, False),
        ("refined", 0.0, True),
        ("refined", 0.3, True),
    ],
)


@CASES
def test_sbc(sample_with, shift, passes):
    posterior = build(shift, sample_with)
    # One in a hundred p-values of the exact posterior is below 0.01, too.
    torch.manual_seed(1)
    theta, x = simulate(400)
    for reduce_fns in ("marginals", posterior.log_prob):
        if reduce_fns != "marginals":
            if not passes:
                continue  # levels see less of a shift than marginals do
            theta, x = theta[:80], x[:80]  # a normalisation for every x
        ranks, dap = run_sbc(
            theta,
            x,
            posterior,
            num_posterior_samples=100,
            reduce_fns=reduce_fns,
            show_progress_bar=False,
        )
        checks = check_sbc(ranks, PRIOR.sample((len(theta),)), dap, 100)
        ks = checks["ks_pvals"].min().item()
        assert (ks > 0.01) if passes else (ks < 0.01)


@CASES
def test_tarp(sample_with, shift, passes):
    theta, x = simulate(3000)
    ecp, alpha = run_tarp(
        theta,
        x,
        build(shift, sample_with),
        num_posterior_samples=200,
        show_progress_bar=False,
    )
    error = (ecp - alpha).abs().max().item()
    # Of the exact posterior 0.02 to 0.03, of the other 0.05 to 0.08.
    assert (error < 0.04) if passes else (error > 0.045)
    _, p_value = check_tarp(ecp, alpha)
    assert p_value > 0.05 or not passes


@CASES
def test_lc2st(sample_with, shift, passes):
    theta, x = simulate(500)
    posterior = build(shift, sample_with)
    samples = posterior.sample_batched((1,), x, show_progress_bars=False)[0]
    lc2st = LC2ST(
        prior_samples=theta,
        xs=x,
        posterior_samples=samples,
        classifier=LogisticRegression,  # of shifted Gaussians the right one
        num_trials_null=100,
        seed=1,
    )
    lc2st.train_under_null_hypothesis(verbosity=0).train_on_observed_data(verbosity=0)
    x_o = torch.tensor([[0.3, -0.2]])
    theta_o = posterior.sample((500,), x=x_o, show_progress_bars=False)
    p_value = lc2st.p_value(theta_o, x_o)
    assert (p_value > 0.02) if passes else (p_value <= 0.02)


def networks(cls):
    embedding = FCEmbedding(2, output_dim=3, num_layers=1, num_hiddens=8)
    flow = posterior_nn(
        "maf", hidden_features=8, num_transforms=2, embedding_net=embedding
    )
    kwargs = {"density_estimator": flow}
    if cls is JeffreysNPE:
        kwargs["energy_estimator"] = energy_nn(8, 1, embedding_net=embedding)
    return kwargs


@pytest.mark.parametrize("mode", ["x_space", "embedding"])
def test_misspecification_by_mmd(mode):
    torch.manual_seed(1)
    theta, x = simulate(200)
    p_values = {}
    for cls in (NPE, JeffreysNPE):
        inference = cls(
            PRIOR, tracker=NoTracker(), show_progress_bars=False, **networks(cls)
        )
        inference.append_simulations(theta, x).train(max_num_epochs=2)
        for name, x_o in (
            ("good", simulate(20)[1]),
            ("far", simulate(20)[1] + 4),
        ):
            p_values[cls, name], _ = calc_misspecification_mmd(
                x_o, x, inference, mode=mode, n_shuffle=100, max_samples=200
            )
    for cls in (NPE, JeffreysNPE):
        assert p_values[cls, "good"] > 0.02
        assert p_values[cls, "far"] < 0.02


@pytest.mark.filterwarnings("ignore:.*Proceeding with logprob test")
def test_misspecification_by_log_prob():
    # It asks nothing of NPE; it runs on the simulations that JeffreysNPE was given.
    inference = train_gaussians()
    _, x, _ = inference.get_simulations()
    trainer = MarginalTrainer("maf", tracker=NoTracker(), show_progress_bars=False)
    estimator = trainer.append_samples(x).train(max_num_epochs=20)
    _, x_val = simulate(100)
    for x_o, is_rejected in (
        (torch.zeros(1, 2), False),
        (torch.full((1, 2), 8.0), True),
    ):
        _, rejected = calc_misspecification_logprob(x_val, x_o, estimator)
        assert bool(rejected) is is_rejected
