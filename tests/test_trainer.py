"""`JeffreysNPE` from simulations to posterior, beside `sbi.inference.NPE`."""

import copy
import inspect
import io
import math
import pickle
import warnings

import pytest
import torch
from helpers import (
    LinearGaussianFlow,
    QuadraticEnergy,
    flat_gradient,
    gaussian_proxy,
    interrupt_before,
    mean_and_standard_error,
    steps_and_values,
    values_of,
)
from sbi.inference import NPE, DirectPosterior, MCMCPosterior, simulate_for_sbi
from sbi.neural_nets import posterior_nn
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from sbi.utils import BoxUniform, RestrictedPrior
from torch import nn
from torch.distributions import MultivariateNormal

from sbi_jeffreys import (
    AdaptiveWeights,
    FixedWeights,
    JeffreysEstimator,
    JeffreysNPE,
    JeffreysObjective,
    NoTracker,
    QuadraticRelaxation,
    RefinedPosterior,
    energy_nn,
)
from sbi_jeffreys.coordinates import ResidualCoordinates
from sbi_jeffreys.objective import ProxySamples
from sbi_jeffreys.stages import Stage

# What sbi and this library say where nothing is wrong.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Maximum number of epochs",
    "ignore:When the inference object is pickled",
)

PRIOR = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))

METRICS = {
    f"{part}_{name}"
    for part in ("training", "validation", "dual")
    for name in ("forward_kl", "reverse_kl", "proxy_forward_kl")
} | {
    "trust",
    "log_partition",
    "effective_sample_size",
    "training_likelihood_loss",
    "validation_likelihood_loss",
}
PER_EPOCH = METRICS | {"training_loss", "validation_loss", "epoch_durations_sec"}


def simulate(num, seed=0):
    torch.manual_seed(seed)
    theta = PRIOR.sample((num,))
    return theta, theta + 0.5 * torch.randn(num, 2)


def flow_builder(**kwargs):
    return posterior_nn("maf", hidden_features=10, num_transforms=2, **kwargs)


def make(cls=JeffreysNPE, prior=PRIOR, **kwargs):
    kwargs = {
        "density_estimator": flow_builder(),
        "tracker": NoTracker(),
        "show_progress_bars": False,
        **kwargs,
    }
    if cls is JeffreysNPE:
        kwargs.setdefault("energy_estimator", energy_nn(10, 1, likelihood="auto"))
    return cls(prior, **kwargs)


def train(inference, num=300, seed=1, data=None, **kwargs):
    theta, x = simulate(num) if data is None else data
    torch.manual_seed(seed)
    kwargs = {"max_num_epochs": 3, **kwargs}
    return inference.append_simulations(theta, x).train(**kwargs)


def parameters(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


# ---------------------------------------------------------------- as a drop-in of NPE


@pytest.mark.parametrize(
    "name", ["__init__", "append_simulations", "train", "build_posterior"]
)
def test_signatures_contain_those_of_npe(name):
    theirs = inspect.signature(getattr(NPE, name)).parameters
    ours = inspect.signature(getattr(JeffreysNPE, name)).parameters
    through = any(p.kind is p.VAR_KEYWORD for p in ours.values())
    # The defaults of its own, said in the documentation: the flow is chosen by
    # validation, and averages of weights allow for larger steps.
    own = {
        ("__init__", "density_estimator"): ("maf", "auto"),
        ("train", "learning_rate"): (5e-4, 2e-3),
    }
    for argument, parameter in theirs.items():
        if (name, argument) in own:
            defaults = parameter.default, ours[argument].default
            assert defaults == own[name, argument], argument
        elif argument in ours:
            assert ours[argument].default == parameter.default, argument
        else:
            assert through, argument
    # By position, too: the shared arguments come first and in their order.
    shared = [argument for argument in ours if argument in theirs]
    assert shared == list(theirs)[: len(shared)]
    assert list(ours)[: len(shared)] == shared


def test_every_argument_of_npe_is_accepted():
    inference = make(
        device="cpu", logging_level="ERROR", summary_writer=None, weights="fixed"
    )
    theta, x = simulate(200)
    estimator = inference.append_simulations(
        theta, x, proposal=None, exclude_invalid_x=True, data_device="cpu"
    ).train(
        num_atoms=5,
        training_batch_size=50,
        learning_rate=1e-3,
        validation_fraction=0.2,
        stop_after_epochs=5,
        max_num_epochs=2,
        clip_max_norm=None,
        calibration_kernel=lambda x: torch.ones(len(x)),
        resume_training=False,
        force_first_round_loss=False,
        discard_prior_samples=False,
        use_combined_loss=False,
        retrain_from_scratch=False,
        show_train_summary=True,
        dataloader_kwargs={"num_workers": 0},
    )
    assert isinstance(estimator, ConditionalDensityEstimator)
    for sample_with in ("direct", "rejection", "mcmc", "importance", "vi"):
        posterior = inference.build_posterior(
            estimator, PRIOR, sample_with, "slice_np_vectorized", "rKL"
        )
        assert type(posterior).__name__.lower().startswith(sample_with)
    posterior = inference.build_posterior(
        sample_with="mcmc", mcmc_parameters={"num_chains": 2, "warmup_steps": 1}
    )
    assert isinstance(posterior, MCMCPosterior)
    assert posterior.num_chains == 2


def test_split_is_that_of_npe():
    splits = []
    for cls in (NPE, JeffreysNPE):
        inference = make(cls)
        train(inference, max_num_epochs=1)
        splits.append((inference.train_indices, inference.val_indices))
    assert torch.equal(splits[0][0], splits[1][0])
    assert torch.equal(splits[0][1], splits[1][1])
    assert len(splits[0][1]) == 30


def test_batches_hold_every_simulation_of_their_part_once():
    inference = make()
    theta, x = simulate(205)
    inference.append_simulations(theta, x)
    train_loader, val_loader = inference.get_dataloaders(0, 50, 0.1)
    batches = list(train_loader)
    assert [len(batch[0]) for batch in batches] == [50, 50, 50]  # sbi drops the rest
    seen = torch.cat([batch[0] for batch in batches])
    training = theta[inference.train_indices]
    assert len(seen.unique(dim=0)) == 150
    assert all((training == row).all(1).any() for row in seen)
    for batch in batches:  # pairs stay pairs
        index = [(theta == row).all(1).nonzero().item() for row in batch[0]]
        assert torch.equal(batch[1], x[index])
    validation = torch.cat([batch[0] for batch in val_loader])
    assert len(validation) == len(inference.val_indices) == 21


@pytest.mark.usefixtures("without_averaging")
@pytest.mark.parametrize(
    ("name", "kernel"),
    [("maf", None), ("zuko_nsf", None), ("maf", lambda x: x[:, 0].exp())],
)
def test_without_proxy_it_is_npe(name, kernel):
    # One batch an epoch, and in round two all of it as atoms: the order of simulations,
    # which the proxy's samples change, plays no part. What is left must be NPE's, to
    # rounding.
    builder = posterior_nn(name, hidden_features=10, num_transforms=2)
    inferences = [
        make(cls, density_estimator=builder, **kwargs)
        for cls, kwargs in (
            (NPE, {}),
            (JeffreysNPE, {"weights": FixedWeights((1, 0, 0))}),
        )
    ]
    kwargs = {
        "max_num_epochs": 15,
        "training_batch_size": 1000,
        "learning_rate": 2e-3,
        "calibration_kernel": kernel,
    }
    estimators = [train(inference, **kwargs) for inference in inferences]
    assert_equal_flows(inferences, estimators)
    proposal = inferences[0].build_posterior().set_default_x(torch.zeros(1, 2))
    theta, x = simulate(100, seed=4)
    theta, x = theta / 2, -x  # not from the prior, and something new to learn
    for index, inference in enumerate(inferences):
        inference.append_simulations(theta, x, proposal=proposal)
        torch.manual_seed(5)
        estimators[index] = inference.train(
            num_atoms=1000, discard_prior_samples=True, **kwargs
        )
    assert_equal_flows(inferences, estimators, learnt=0.02)


def assert_equal_flows(inferences, estimators, learnt=0.1):
    losses = [
        torch.tensor(inference.summary["validation_loss"][-15:])
        for inference in inferences
    ]
    npe, ours = estimators[0], estimators[1].flow
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(parameters(ours), parameters(npe), rtol=1e-2, atol=1e-3)
    assert losses[0][0] - losses[0][-1] > learnt  # they did learn


def test_the_flow_learns_from_the_proxy():
    # The same with the reverse divergence: the flow must be another one.
    flows = []
    for weights in ((1, 0, 0), (1, 1, 1)):
        inference = make(weights=FixedWeights(weights))
        estimator = train(
            inference, max_num_epochs=5, training_batch_size=1000, learning_rate=5e-3
        )
        flows.append(parameters(estimator.flow))
    assert (flows[0] - flows[1]).abs().max() > 1e-3


def test_same_seed_same_network():
    results = []
    for seed in (1, 1, 2):
        inference = make()
        estimator = train(inference, seed=seed, training_batch_size=50)
        results.append((parameters(estimator), inference.summary["trust"]))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert not torch.equal(results[0][0], results[2][0])


def test_units_of_theta_change_no_dual_variable():
    # Metres to millimetres, and another origin: same simulations, same seed.
    names = ("forward_kl", "reverse_kl", "proxy_forward_kl")
    duals, metrics = [], []
    for scale, shift in ((1.0, 0.0), (1000.0, 5.0)):
        bound = 2 * scale * torch.ones(2)
        inference = make(prior=BoxUniform(shift - bound, shift + bound))
        theta, x = simulate(300)
        train(
            inference,
            data=(theta * scale + shift, x),
            max_num_epochs=11,
            learning_rate=2e-3,
            training_batch_size=50,
        )
        summary = {k: torch.tensor(inference.summary[k]) for k in METRICS}
        duals.append(torch.stack([summary[f"dual_{name}"] for name in names]))
        # The density of two parameters, each a thousand times as wide.
        constant = 2 * math.log(scale)
        metrics.append(
            torch.stack([
                summary["trust"],
                summary["validation_reverse_kl"],
                summary["validation_forward_kl"] - constant,
                summary["validation_proxy_forward_kl"] - constant,
            ])
        )
    assert (duals[0][:, -1] - 1).abs().max() > 0.01  # they moved
    # All is z-scored: what differs is the rounding of theta, not the random numbers.
    torch.testing.assert_close(duals[1], duals[0], rtol=1e-4, atol=1e-4)
    last = metrics[0][:, -3:]
    assert inference.summary["stage"][-3:] == ["distillation"] * 3
    assert last.isfinite().all()
    torch.testing.assert_close(
        metrics[1], metrics[0], rtol=1e-3, atol=1e-3, equal_nan=True
    )


# ---------------------------------------------------------------------------- records


class Recorder(NoTracker):
    def __init__(self):
        self.metrics = {}
        self.flushed = 0

    def log_metric(self, name, value, step=None):
        self.metrics.setdefault(name, []).append((step, value))

    def flush(self):
        self.flushed += 1


def test_summary_and_tracker_carry_every_epoch():
    tracker = Recorder()
    inference = make(tracker=tracker)
    train(inference, max_num_epochs=8)
    summary = inference.summary
    assert summary["epochs_trained"] == [9]  # sbi's budget is one short
    assert summary["stage"] == (
        ["flow"] * 2 + ["likelihood"] * 2 + ["proxy"] * 2 + ["distillation"] * 3
    )
    for name in PER_EPOCH:
        assert len(summary[name]) == 9, name
        assert all(isinstance(value, float) for value in summary[name]), name
        values = values_of(summary, name)
        assert len(values) >= 2, name
        assert all(math.isfinite(value) for value in values), name
        if name in METRICS:  # sbi logs its own, whatever they are
            assert tracker.metrics[name] == steps_and_values(summary, name), name
        else:
            assert len(tracker.metrics[name]) == 9, name
    assert tracker.metrics["epochs_trained"] == [(1, 9)]
    assert tracker.flushed
    assert all(ess >= 1 for ess in values_of(summary, "effective_sample_size"))
    assert all(0 <= trust <= 1 for trust in summary["trust"])
    # Of the flow that is kept, chosen from the epochs in which it followed the proxy.
    assert summary["best_validation_loss"] == [min(summary["validation_loss"][6:])]
    assert (
        tracker.metrics["best_validation_loss"][0][1]
        == (summary["best_validation_loss"][0])
    )
    assert summary["dual_reverse_kl"][-1] == pytest.approx(
        inference.weights.dual_variables[1].item()
    )


@pytest.mark.usefixtures("without_averaging")
def test_the_best_networks_are_returned():
    inference = make()
    # Which flow is kept is asked here, not how wide it then becomes.
    inference._fit_scale_of_flow = lambda: None
    # Overfitting on purpose: in no stage is the best epoch the last.
    estimator = train(
        inference,
        num=60,
        max_num_epochs=160,
        learning_rate=3e-2,
        stop_after_epochs=1000,
    )
    stages, losses = (inference.summary[name] for name in ("stage", "validation_loss"))
    assert stages == (
        ["flow"] * 40 + ["likelihood"] * 40 + ["proxy"] * 40 + ["distillation"] * 41
    )
    assert min(losses[:40]) < losses[39] - 0.02
    assert losses[40:120] == pytest.approx([min(losses[:40])] * 80, abs=1e-5)
    epoch = inference._best["flow"][1]
    best = losses[epoch]
    assert 120 <= epoch < 160
    assert best < losses[-1] - 0.02
    assert inference.summary["best_validation_loss"] == [best]
    theta, x = simulate(60)
    index = inference.val_indices
    with torch.no_grad():
        assert estimator.loss(theta[index], x[index]).mean().item() == pytest.approx(
            best, abs=1e-4
        )
        log_z = estimator.proxy.log_partition(x[index], estimator.flow, 5000)
        proxy_loss = log_z.debiased - estimator.proxy.log_unnormalized(
            theta[index][None], x[index]
        )
    # Of the likelihoods, every one at its best.
    likelihood_losses = inference.summary["validation_likelihood_loss"][40:80]
    with torch.no_grad():
        likelihoods = estimator.proxy.likelihoods(theta[index][None], x[index])
    loss = -likelihoods.mean().item()
    assert loss < min(likelihood_losses) + 1e-5
    assert loss < likelihood_losses[-1] - 0.05
    # Of the proxy the same, up to the error of log Z in training.
    proxy_losses = inference.summary["validation_proxy_forward_kl"][80:120]
    assert proxy_loss.mean().item() < min(proxy_losses) + 0.3
    assert max(proxy_losses) > min(proxy_losses) + 0.5
    assert min(proxy_losses) < proxy_losses[-1]
    assert not estimator.training
    assert all(parameter.grad is None for parameter in estimator.parameters())


def test_training_stops_when_no_model_improves():
    inference = make()
    # Which flow is kept is asked here, not how wide it then becomes.
    inference._fit_scale_of_flow = lambda: None
    train(
        inference,
        num=100,
        max_num_epochs=1000,
        learning_rate=3e-2,
        stop_after_epochs=3,
    )
    summary = inference.summary
    assert summary["epochs_trained"][0] < 400
    stages = summary["stage"]
    order = ["flow", "likelihood", "proxy", "distillation"]
    ends = {stage: len(stages) - stages[::-1].index(stage) for stage in set(stages)}
    assert stages == sorted(stages, key=order.index)
    starts = dict(zip(order, (0, *(ends[stage] for stage in order[:3])), strict=True))

    def best(name, stage):
        values = summary[name]
        return min(range(starts[stage], ends[stage]), key=lambda epoch: values[epoch])

    # Three epochs without an improvement end the flow's stage, and no fewer; four times
    # as many those that follow, as an epoch of so few simulations is a single step.
    assert inference._num_batches == 1
    assert best("validation_loss", "flow") == ends["flow"] - 4
    assert best("validation_proxy_forward_kl", "proxy") == ends["proxy"] - 13
    last = max(
        kept[1] for name, kept in inference._best.items() if "likelihood" in name
    )
    assert last == ends["likelihood"] - 13
    # In the last, improvement of what the flow is then chosen by.
    kept = inference._best["flow"]
    assert kept[1] == ends["distillation"] - 13
    assert kept[3] == summary["validation_loss"][kept[1]]


def test_a_bad_validation_epoch_does_not_cost_the_best_network():
    class Poisoned(LinearGaussianFlow):
        """Its loss is NaN in the third validation."""

        validations = 0

        def loss(self, input, condition, **kwargs):
            loss = super().loss(input, condition)
            if not self.training and not torch.is_grad_enabled():
                type(self).validations += 1
                if self.validations == 3:
                    return loss * math.nan
            return loss

    def build(theta, x):
        return Poisoned(torch.zeros(2, 2), torch.zeros(2), torch.eye(2))

    inference = make(density_estimator=build)
    try:
        train(inference, max_num_epochs=6, learning_rate=1e-2)
    except (AssertionError, ValueError) as err:
        # As NPE does, to say so is fine, too; to lose the network is not.
        assert "NaN" in str(err)
        return
    losses = inference.summary["validation_loss"]
    assert math.isnan(losses[2])
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert inference.summary["best_validation_loss"] == [min(finite)]


def test_resumed_training_goes_on():
    class Counting(AdaptiveWeights):
        updates = 0

        def update(self, validation):
            self.updates += 1
            super().update(validation)

    tracker = Recorder()
    inference = make(tracker=tracker, weights=Counting())
    train(inference, max_num_epochs=4)
    split = inference.train_indices.clone()
    before = inference._best["flow"]
    assert inference.summary["best_validation_loss"] == [before[3]]
    estimator = inference.train(resume_training=True, max_num_epochs=8)
    summary, flow = inference.summary, inference._best["flow"]
    assert torch.equal(inference.train_indices, split)
    assert summary["epochs_trained"] == [5, 9]  # as sbi counts
    # The stages stay those of the first training.
    assert summary["stage"] == ["flow", "likelihood", "proxy"] + ["distillation"] * 6
    for name in PER_EPOCH:
        assert len(summary[name]) == 9, name
        steps = [step for step, _ in tracker.metrics[name]]
        if name in METRICS:
            assert steps == [step for step, _ in steps_and_values(summary, name)], name
        else:
            assert steps == list(range(9)), name
    assert flow[0] <= before[0]  # by what it is chosen by
    assert summary["best_validation_loss"][1] == flow[3]
    assert flow[3] == summary["validation_loss"][flow[1]]
    assert inference.weights.updates == 6  # the duals go on, too
    assert isinstance(estimator, JeffreysEstimator)


def holds_out(inference):
    """Return whether simulations are taken out of the regressions that they are in."""
    modules = inference._estimator.modules()
    (said,) = {m.holds_out for m in modules if isinstance(m, ResidualCoordinates)}
    return said


def test_only_simulations_of_the_regression_are_taken_out_of_it(tmp_path):
    inference = make(density_estimator="maf")
    train(inference, max_num_epochs=1)
    assert holds_out(inference)
    inference.save(tmp_path / "training.pt")
    loaded = make(density_estimator="maf").load(tmp_path / "training.pt")
    loaded.train(resume_training=True, max_num_epochs=2)
    assert holds_out(loaded)
    # Another split, or more simulations: not all are in the regression.
    again = {"max_num_epochs": 1, "force_first_round_loss": True}
    inference.train(**again)
    assert not holds_out(inference)
    train(inference, num=50, **again)
    assert not holds_out(inference)
    inference.train(retrain_from_scratch=True, **again)
    assert holds_out(inference)


def test_a_following_flow_learns_simulations_as_by_its_loss():
    inference = make(density_estimator="maf")
    theta, x = simulate(30)
    flow = train(inference, data=(theta, x), max_num_epochs=1).flow.train()
    samples = ProxySamples(
        theta[None] + 0.1, torch.zeros(1, 30), torch.zeros(30), torch.ones(30)
    )
    with torch.no_grad():
        forward_kl, to_proxy = JeffreysObjective().forward_kls_of_flow(
            flow, theta, x, samples
        )
        assert torch.allclose(forward_kl, flow.loss(theta, x), atol=1e-5)
        log_p = flow.log_prob(samples.theta, x)[0]
        assert torch.allclose(to_proxy, -log_p, atol=1e-5)
        in_sample = -flow.log_prob(theta[None], x)[0]
        assert (forward_kl - in_sample).abs().max() > 0.01


def test_a_second_training_needs_to_be_asked_for():
    inference = make()
    train(inference, max_num_epochs=1)
    with pytest.raises(ValueError, match="already been trained"):
        inference.train(max_num_epochs=1)


def test_progress_is_shown(capsys):
    train(make(show_progress_bars=True), max_num_epochs=2)
    shown = capsys.readouterr().out
    assert "Epochs trained: 3" in shown
    assert "validation loss" in shown
    assert "dual variables" in shown
    train(make(show_progress_bars=False), max_num_epochs=2)
    assert "Epochs trained: 3" not in capsys.readouterr().out


# --------------------------------------------------------------------------- training


@pytest.mark.usefixtures("without_averaging")
def test_every_divergence_trains_what_it_should():
    def initial(part):
        torch.manual_seed(1)
        inference = make()
        estimator = train(inference, max_num_epochs=1, learning_rate=1e-12)
        return parameters(getattr(estimator, part))

    flow, proxy = initial("flow"), initial("proxy")
    for weights, moves, num_epochs in (
        ((1, 0, 0), {"flow"}, 15),
        ((0, 0, 1), {"proxy"}, 19),
        ((0, 1, 1), {"flow", "proxy"}, 39),
    ):
        inference = make(weights=FixedWeights(weights))
        estimator = train(
            inference,
            max_num_epochs=num_epochs,
            learning_rate=1e-2,
            stop_after_epochs=100,
            training_batch_size=50,
        )
        moved = {
            name
            for name, start in (("flow", flow), ("proxy", proxy))
            if (parameters(getattr(estimator, name)) - start).abs().max() > 1e-4
        }
        assert moved == moves, weights
        summary = inference.summary
        if weights == (0, 0, 1):
            # From the prior's 2.8 towards the posterior's entropy of about 1.4.
            assert min(values_of(summary, "validation_proxy_forward_kl")) < 2.6
        if weights[1]:
            # Of the flow to the proxy at rest. The proxy leaves the flow at rest, which
            # within the prior is as flat as itself, for the simulations.
            fall = summary["validation_reverse_kl"]
            assert summary["stage"][20:] == ["proxy"] * 10 + ["distillation"] * 10
            assert fall[20] < 0.05 < fall[29]
            assert fall[39] < 0.6 * fall[30]


def train_closed_forms(flow_shift=0.0, energy_shift=0.0, weights="adaptive", **kwargs):
    """Train Gaussians, of which all is known, so slowly that they stay.

    Those without shifts are the posterior of `simulate`, away from the prior's edges.
    """
    root = torch.eye(2) / 2
    flow = LinearGaussianFlow(torch.eye(2), torch.full((2,), flow_shift), root)
    net = QuadraticEnergy(
        torch.eye(2), torch.full((2,), energy_shift), torch.linalg.inv(root)
    )
    inference = make(
        weights=weights,
        density_estimator=lambda theta, x: flow,
        energy_estimator=lambda theta, x, prior: gaussian_proxy(net),
    )
    kwargs = {"learning_rate": 1e-12, "training_batch_size": 50, **kwargs}
    estimator = train(inference, num=500, **kwargs)
    return inference, estimator


def test_weights_that_have_collapsed_are_warned_of():
    # A proxy of a width of a hundredth: one in some thousand samples meets it.
    root = torch.eye(2) / 2
    flow = LinearGaussianFlow(torch.eye(2), torch.zeros(2), root)
    net = QuadraticEnergy(torch.eye(2), torch.zeros(2), 100 * torch.eye(2))
    kwargs = {"learning_rate": 1e-12, "training_batch_size": 50, "num": 500}
    inference = make(
        density_estimator=lambda theta, x: flow,
        energy_estimator=lambda theta, x, prior: gaussian_proxy(net),
    )
    with pytest.warns(UserWarning, match="400 samples .* are worth 1") as caught:
        train(inference, **kwargs)
    assert "sample_with='direct'" in str(caught[-1].message)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The importance weights")
        train_closed_forms()  # where they agree
        without_proxy = make(
            density_estimator=lambda theta, x: flow,
            energy_estimator=lambda theta, x, prior: gaussian_proxy(net),
            weights=FixedWeights((1, 0, 0)),
        )
        train(without_proxy, **kwargs)


@pytest.mark.parametrize("dataloader_kwargs", [None, {"num_workers": 0}])
@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_metrics_of_closed_forms(shift, dataloader_kwargs):
    inference, estimator = train_closed_forms(
        energy_shift=shift, dataloader_kwargs=dataloader_kwargs
    )
    theta, x = simulate(500)
    flow = estimator.flow.distribution(x)
    proxy = MultivariateNormal(x + shift, torch.eye(2) / 4)
    # Samples of one condition, taken for another's, would cost nats: the conditions
    # differ by two standard deviations and more.
    expected = {
        "forward_kl": -flow.log_prob(theta),
        "reverse_kl": torch.distributions.kl_divergence(flow, proxy),
        "proxy_forward_kl": -proxy.log_prob(theta),
    }
    parts = {"training": inference.train_indices, "validation": inference.val_indices}
    for part, index in parts.items():
        for name, values in expected.items():
            # Sixteen samples for log Z leave a bias of some hundredths.
            tolerance = 0.15
            if (part, name) == ("validation", "reverse_kl"):
                # Of four samples at each of fifty simulations, and of Gaussians of one
                # width: there the log ratio has twice the divergence as its variance.
                tolerance += 4 * math.sqrt(2 * values.mean().item() / 200)
            for value in values_of(inference.summary, f"{part}_{name}"):
                expected_value = values[index].mean().item()
                assert value == pytest.approx(expected_value, abs=tolerance), (
                    f"{part}_{name}"
                )
    assert inference.summary["stage"] == ["flow", "proxy"] + ["distillation"] * 2
    for value in values_of(inference.summary, "log_partition"):
        assert value == pytest.approx(math.log(2 * math.pi / 4), abs=0.15)


def test_exponent_is_chosen_by_validation():
    for flow_shift, energy_shift, low, high in (
        (0.0, 0.5, 0.0, 0.3),
        (0.5, 0.0, 0.7, 1.0),
        (0.4, -0.4, 0.3, 0.7),
    ):
        inference, estimator = train_closed_forms(flow_shift, energy_shift)
        assert low <= estimator.exponent <= high
        posterior = inference.build_posterior(sample_with="refined")
        x_o = torch.tensor([[0.2, -0.2]])
        samples = posterior.sample((4000,), x=x_o)
        torch.testing.assert_close(samples.mean(0), x_o[0], atol=0.15, rtol=0)


def test_trust_follows_the_better_model():
    for flow_shift, energy_shift, low, high in (
        (0.0, 0.5, 0, 0.05),
        (0.5, 0.0, 0.8, 1),
    ):
        inference, _ = train_closed_forms(flow_shift, energy_shift, max_num_epochs=45)
        assert low <= inference.weights.trust <= high


def test_the_flow_that_follows_has_the_gradient_of_both_divergences():
    class Half(FixedWeights):
        @property
        def flow_share(self):
            return 0.5

    inference, estimator = train_closed_forms(0.1, -0.2, weights=Half((1, 3, 1)))
    assert inference.summary["stage"][-1] == "distillation"
    flow, (_, x) = estimator.flow, simulate(500)
    x = x[inference.train_indices]
    proxy = MultivariateNormal(x - 0.2, torch.eye(2) / 4)
    jeffreys = torch.distributions.kl_divergence(
        flow.distribution(x), proxy
    ) + torch.distributions.kl_divergence(proxy, flow.distribution(x))
    # The dual variable, times the share of the flow.
    expected = flat_gradient(3 * 0.5 * jeffreys.mean(), flow)
    loader = inference.get_dataloaders(0, 450, 0.1, resume_training=True)[0]

    def estimate():
        # Every second step takes the reverse divergence, twice.
        inference._samples.proxy_samples = {}
        gradients = [
            flat_gradient(
                inference._losses.of_following_flow(
                    inference._batch(batch, "training"),
                    inference._flow_weight,
                    with_reverse,
                )[1].mean(),
                flow,
            )
            for with_reverse in (True, False)
            for batch in loader
        ]
        assert len(gradients) == 2
        return torch.stack(gradients).mean(0)

    mean, error = mean_and_standard_error(estimate, 40)
    assert expected.norm() > 1
    # Resampling from sixty-four samples is biased by some per cent.
    assert ((mean - expected).abs() < 4 * error + 0.05 * expected.norm()).all()
    assert error.norm() < 0.1 * expected.norm()


def test_calibration_kernel_weighs_all_divergences():
    # Both see the same samples, and the same networks, which stand still.
    once_only = (
        "training_reverse_kl",
        "training_proxy_forward_kl",
        "training_likelihood_loss",
        "validation_likelihood_loss",
    )
    summaries = []
    for weight in (1.0, 2.5):
        inference = make()
        train(
            inference,
            training_batch_size=1000,
            max_num_epochs=3,
            learning_rate=1e-12,
            calibration_kernel=lambda x, weight=weight: torch.full((len(x),), weight),
        )
        summaries.append(inference.summary)
    for part in ("training", "validation"):
        for name in ("forward_kl", "reverse_kl", "proxy_forward_kl", "likelihood_loss"):
            once, weighted = (
                torch.tensor(values_of(summary, f"{part}_{name}"))
                for summary in summaries
            )
            assert len(once) >= (1 if f"{part}_{name}" in once_only else 2)
            torch.testing.assert_close(
                weighted, 2.5 * once, rtol=1e-4, atol=1e-4, msg=f"{part}_{name}"
            )


def test_dataloader_keywords_are_used():
    sizes = []

    def collate(rows):
        sizes.append(len(rows))
        return torch.utils.data.default_collate(rows)

    train(
        make(),
        num=200,
        training_batch_size=45,
        dataloader_kwargs={"collate_fn": collate},
        max_num_epochs=1,
    )
    assert sizes == [45, 45, 45, 45, 20] * 2


@pytest.mark.parametrize("weights", ["adaptive", "fixed"])
def test_named_weights(weights):
    inference = make(weights=weights)
    train(inference, max_num_epochs=3)
    expected = AdaptiveWeights if weights == "adaptive" else FixedWeights
    assert type(inference.weights) is expected
    moved = inference.weights.dual_variables.tolist() != [1.0, 1.0, 1.0]
    assert moved == (weights == "adaptive")


def test_weights_of_the_users_are_copied():
    weights = AdaptiveWeights(QuadraticRelaxation(alpha=2.0))
    inference = make(weights=weights)
    train(inference, max_num_epochs=2)
    assert inference.weights is not weights
    assert weights.dual_variables.tolist() == [1.0, 1.0, 1.0]  # serves again
    assert isinstance(inference.weights.h, QuadraticRelaxation)


@pytest.mark.parametrize("num_epochs", [3, 8, 13, 18, 21])
def test_ctrl_c_keeps_the_best_network(num_epochs):
    tracker = Recorder()
    inference = make(tracker=tracker)
    interrupt_before(inference, num_epochs)
    said = f"interrupted after {num_epochs} epochs"
    with pytest.warns(UserWarning, match=said) as caught:
        estimator = train(inference, max_num_epochs=23)
    # In each of the stages once, and where the last begins.
    stages = [stage.value for stage in Stage for _ in range(6)]
    assert inference.summary["stage"] == stages[:num_epochs]
    assert any("resume_training=True" in str(w.message) for w in caught)
    summary = inference.summary
    assert summary["epochs_trained"] == [num_epochs]
    for name in METRICS:
        values = steps_and_values(summary, name)
        assert tracker.metrics.get(name, []) == values, name
    theta, x = simulate(300)
    index = inference.val_indices
    with torch.no_grad():
        loss = estimator.loss(theta[index], x[index]).mean().item()
    # The best of the last stage in which the flow has learnt.
    epochs = range(min(6, num_epochs)) if num_epochs <= 18 else range(18, num_epochs)
    kept = inference._best["flow"][1]
    assert kept in epochs
    if num_epochs <= 18:
        losses = summary["validation_loss"]
        assert kept == min(epochs, key=lambda epoch: losses[epoch])
    assert loss == pytest.approx(summary["validation_loss"][kept], abs=1e-5)
    assert summary["best_validation_loss"] == [summary["validation_loss"][kept]]
    assert not estimator.training
    posterior = inference.build_posterior().set_default_x(torch.zeros(1, 2))
    assert posterior.sample((5,), show_progress_bars=False).shape == (5, 2)
    # And training goes on from there.
    inference.train(resume_training=True, max_num_epochs=23)
    assert summary["stage"] == stages
    assert {len(summary[name]) for name in PER_EPOCH} == {24}


def test_ctrl_c_before_the_first_epoch_is_passed_on():
    inference = make()
    interrupt_before(inference, 0)
    with pytest.raises(KeyboardInterrupt):
        train(inference)


# ----------------------------------------------------------------------------- rounds


@pytest.mark.usefixtures("without_averaging")
@pytest.mark.parametrize("sample_with", ["direct", "refined"])
@pytest.mark.parametrize("options", [{}, {"use_combined_loss": True}])
def test_two_rounds_with_a_proposal(sample_with, options, capsys):
    inference = make(density_estimator=build_gaussian)
    x_o = torch.tensor([[0.8, -0.5]])
    train(inference, num=200, max_num_epochs=10, learning_rate=5e-2)
    proposal = inference.build_posterior(sample_with=sample_with).set_default_x(x_o)
    # 51 simulations for validation: a last batch of one, were it kept.
    theta, x = simulate_for_sbi(
        lambda theta: theta + 0.5 * torch.randn_like(theta),
        proposal,
        310,
        show_progress_bar=False,
    )
    inference.append_simulations(theta, x, proposal=proposal)
    estimator = inference.train(
        max_num_epochs=15, learning_rate=2e-2, training_batch_size=50, **options
    )
    assert len(inference.val_indices) == 51
    summary = inference.summary
    assert summary["epochs_trained"] == [11, 16]
    for name in PER_EPOCH:
        assert len(summary[name]) == 27, name
        assert all(map(math.isfinite, values_of(summary, name))), name
    assert summary["stage"][11:] == [stage.value for stage in Stage for _ in range(4)]
    for method in ("direct", "refined"):
        posterior = inference.build_posterior(estimator, sample_with=method)
        samples = posterior.sample((500,), x=x_o, show_progress_bars=False)
        torch.testing.assert_close(samples.mean(0), x_o[0], atol=0.3, rtol=0)


def round_from_elsewhere(corrected):
    """Return mean and deviation at x = 1 of both models, after a round from elsewhere.

    Parameters of the second round are N(1.4, 0.6^2), those of the first are left out.
    The posterior is N(0.8, 0.2); were the proposal the prior, N(1.16, 0.147).
    """
    torch.manual_seed(1)
    prior = MultivariateNormal(torch.zeros(1), torch.eye(1))
    proposal = MultivariateNormal(torch.tensor([1.4]), 0.36 * torch.eye(1))
    inference = JeffreysNPE(
        prior,
        "maf",
        energy_estimator=energy_nn(20, 1, likelihood="none"),
        tracker=NoTracker(),
        show_progress_bars=False,
    )
    for source, options in (
        (prior, {"max_num_epochs": 10}),
        (
            proposal,
            {
                "max_num_epochs": 150,
                "discard_prior_samples": True,
                "force_first_round_loss": not corrected,
            },
        ),
    ):
        theta = source.sample((1000,))
        x = theta + 0.5 * torch.randn_like(theta)
        of = None if source is prior else source
        inference.append_simulations(theta, x, proposal=of)
        estimator = inference.train(**options)
    points = torch.linspace(-3, 4, 701)
    theta, x = points.reshape(-1, 1, 1), torch.ones(1, 1)
    moments = {}
    with torch.no_grad():
        for name, log_prob in (
            ("flow", estimator.flow.log_prob(theta, x)),
            ("proxy", estimator.proxy.log_unnormalized(theta, x)),
        ):
            weights = torch.softmax(log_prob[:, 0], 0)
            mean = (weights * points).sum()
            variance = (weights * (points - mean).square()).sum()
            moments[name] = mean.item(), variance.sqrt().item()
    return moments


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The proposal you passed")
def test_both_models_are_corrected_for_the_proposal():
    # Over four seeds the means of the flow were 0.76 to 0.86, uncorrected ones 1.07
    # and 1.17.
    for mean, deviation in round_from_elsewhere(corrected=True).values():
        assert mean == pytest.approx(0.8, abs=0.12)
        assert deviation == pytest.approx(0.447, abs=0.08)
    for mean, _ in round_from_elsewhere(corrected=False).values():
        assert mean > 1.0


def test_later_rounds_compare_parameters():
    # Of the atomic losses, the proposal and the partition function cancel.
    inference, _ = train_closed_forms()
    proposal = inference.build_posterior().set_default_x(torch.zeros(1, 2))
    theta = (0.7 * torch.randn(500, 2)).clamp(-1.99, 1.99)
    x = theta + 0.5 * torch.randn(500, 2)
    inference.append_simulations(theta, x, proposal=proposal)
    inference.train(
        num_atoms=2, learning_rate=1e-12, max_num_epochs=2, training_batch_size=50
    )
    summary = {name: values[4:] for name, values in inference.summary.items()}
    assert summary["stage"] == ["flow", "proxy", "distillation"]
    for part in ("training", "validation"):
        flow, proxy = (
            values_of(summary, f"{part}_{name}")[-1]
            for name in ("forward_kl", "proxy_forward_kl")
        )
        # Telling one of two apart; log 2 would be guessing, -log q is above one.
        assert 0 < proxy < 0.6
        assert proxy == pytest.approx(flow, abs=0.1)  # the same Gaussian


def test_weights_are_told_of_every_round():
    class Counting(AdaptiveWeights):
        rounds = 0

        def start_round(self):
            self.rounds += 1
            super().start_round()

    inference = make(weights=Counting())
    train(inference, max_num_epochs=1)
    inference.train(resume_training=True, max_num_epochs=2)
    assert inference.weights.rounds == 1
    proposal = inference.build_posterior().set_default_x(torch.zeros(1, 2))
    inference.append_simulations(*simulate(100, seed=3), proposal=proposal)
    inference.train(max_num_epochs=1)
    assert inference.weights.rounds == 2


@pytest.mark.parametrize("from_scratch", [False, True])
def test_dual_variables_carry_over_to_the_next_round(from_scratch):
    inference = make()
    train(inference, num=100, max_num_epochs=1)
    inference.weights.dual_variables = torch.tensor([2.0, 3.0, 5.0])
    proposal = inference.build_posterior().set_default_x(torch.zeros(1, 2))
    inference.append_simulations(*simulate(100, seed=3), proposal=proposal)
    num_epochs = len(inference.summary["stage"])
    inference.train(
        max_num_epochs=1,
        retrain_from_scratch=from_scratch,
        discard_prior_samples=from_scratch,  # as sbi asks
    )
    assert inference.summary["stage"][num_epochs] == "flow"
    first = [
        inference.summary[f"dual_{name}"][num_epochs]
        for name in ("forward_kl", "reverse_kl", "proxy_forward_kl")
    ]
    # Before the first dual step. Networks that know nothing start at the initial ones.
    assert first == ([1.0, 1.0, 1.0] if from_scratch else [2.0, 3.0, 5.0])


def test_a_second_round_may_start_from_scratch():
    inference = make()
    estimator = train(inference, max_num_epochs=5)
    flow = estimator.flow
    proposal = inference.build_posterior().set_default_x(torch.zeros(1, 2))
    inference.append_simulations(*simulate(200, seed=5), proposal=proposal)
    other = inference.train(
        retrain_from_scratch=True, discard_prior_samples=True, max_num_epochs=1
    )
    assert other.flow is not flow
    # Networks that know nothing have earned nothing.
    trust = inference.summary["trust"]
    assert trust[-2] <= 0.2 + 1e-6
    assert len(trust) == 6 + 2


def test_more_simulations_from_the_prior():
    inference = make()
    train(inference, max_num_epochs=1)
    restricted = RestrictedPrior(
        PRIOR, lambda theta: theta[:, 0] > -1.9, sample_with="rejection"
    )
    inference.append_simulations(*simulate(100, seed=7), proposal=restricted)
    inference.train(force_first_round_loss=True, max_num_epochs=1)
    assert len(inference.train_indices) == 360


# --------------------------------------------------------------------------- networks


@pytest.mark.parametrize(
    "name", ["maf", "nsf", "maf_rqs", "zuko_nsf", "zuko_nice", "zuko_gf", "zuko_bpf"]
)
def test_flows_train(name):
    builder = posterior_nn(name, hidden_features=10, num_transforms=2)
    inference = make(density_estimator=builder)
    estimator = train(inference, num=150, max_num_epochs=2)
    assert torch.isfinite(parameters(estimator)).all()
    samples = inference.build_posterior().sample(
        (10,), x=torch.zeros(1, 2), show_progress_bars=False
    )
    assert (samples.abs() <= 2).all()


def test_flows_by_name():
    inference = JeffreysNPE(PRIOR, "nsf", tracker=NoTracker(), show_progress_bars=False)
    estimator = train(inference, num=100, max_num_epochs=1)
    assert "SplineCoupling" in str(estimator.flow)


def build_gaussian(theta, x):
    return LinearGaussianFlow(torch.zeros(2, 2), torch.zeros(2), torch.eye(2))


def test_a_builder_of_the_users():
    estimator = train(
        make(density_estimator=build_gaussian),
        num=1000,
        max_num_epochs=40,
        learning_rate=3e-2,
    )
    # Away from the prior's edges the posterior is N(x, 0.25).
    x = torch.tensor([[0.5, -0.5], [0.0, 0.0]])
    torch.testing.assert_close(estimator.flow.mean(x), x, atol=0.15, rtol=0)
    torch.testing.assert_close(
        estimator.flow.covariance(), 0.25 * torch.eye(2), atol=0.12, rtol=0
    )


class Embedding(nn.Module):
    """Of images of shape (2, 2)."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(1), nn.Linear(4, 3), nn.SiLU())

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("shared", [True, False])
def test_embedding_of_images_shared_or_not(shared):
    embedding = Embedding()
    inference = make(
        density_estimator=flow_builder(embedding_net=embedding, z_score_x="structured"),
        energy_estimator=energy_nn(
            10,
            1,
            embedding_net=embedding if shared else Embedding(),
            z_score_x="structured",
        ),
    )
    theta, x = simulate(120)
    x = torch.cat((x, x), 1).reshape(-1, 2, 2)
    # Long enough that flow and proxy are at their best in different epochs.
    estimator = train(
        inference,
        data=(theta, x),
        max_num_epochs=60,
        learning_rate=2e-2,
        stop_after_epochs=1000,
    )
    ids = [{id(p) for p in m.parameters()} for m in (estimator.flow, estimator.proxy)]
    assert len(ids[0] & ids[1]) == (2 if shared else 0)
    summary = inference.summary
    losses, proxy_losses = (
        summary[name] for name in ("validation_loss", "validation_proxy_forward_kl")
    )
    assert summary["stage"][20:40] == ["proxy"] * 20
    flow_best = inference._best["flow"][1]
    proxy_best = min(range(20, 40), key=lambda epoch: proxy_losses[epoch])
    assert flow_best >= 40
    # What is returned is the network that was best, not a mixture of two epochs. The
    # proxy and an embedding of both stand still while the flow goes on.
    index = inference.val_indices
    with torch.no_grad():
        loss = estimator.loss(theta[index], x[index]).mean().item()
        log_z = estimator.proxy.log_partition(x[index], estimator.flow, 5000)
        f = estimator.proxy.log_unnormalized(theta[index][None], x[index])
        proxy_loss = (log_z.debiased - f).mean().item()
    assert loss == pytest.approx(losses[flow_best], abs=1e-4)
    assert proxy_loss == pytest.approx(proxy_losses[proxy_best], abs=0.3)
    for sample_with in ("direct", "refined"):
        posterior = inference.build_posterior(sample_with=sample_with)
        samples = posterior.sample((20,), x=x[:1], show_progress_bars=False)
        assert samples.shape == (20, 2)


def test_one_parameter():
    prior = MultivariateNormal(torch.zeros(1), torch.eye(1))
    theta = prior.sample((300,))
    x = theta + 0.5 * torch.randn(300, 1)
    inference = make(prior=prior)
    train(inference, data=(theta, x), max_num_epochs=40, learning_rate=1e-2)
    for sample_with in ("direct", "refined"):
        posterior = inference.build_posterior(sample_with=sample_with)
        samples = posterior.sample(
            (2000,), x=torch.tensor([[1.0]]), show_progress_bars=False
        )
        assert samples.shape == (2000, 1)
        # N(0.8, 0.2) in truth.
        assert samples.mean().item() == pytest.approx(0.8, abs=0.2)
        assert samples.std().item() == pytest.approx(0.2**0.5, abs=0.15)


@pytest.mark.parametrize("sample_with", ["direct", "refined"])
def test_without_prior(sample_with):
    with pytest.warns(UserWarning, match="No prior was given"):
        inference = make(prior=None)
        train(inference, max_num_epochs=2)
    posterior = inference.build_posterior(sample_with=sample_with)
    samples = posterior.sample((20,), x=torch.zeros(1, 2), show_progress_bars=False)
    assert samples.shape == (20, 2)


# ----------------------------------------------------------------- posterior, pickling


def test_refined_posterior_is_built():
    inference = make()
    estimator = train(inference)
    posterior = inference.build_posterior(
        sample_with="refined",
        refined_sampling_parameters={"exponent": 0.5, "oversampling_factor": 2},
    )
    assert isinstance(posterior, RefinedPosterior)
    assert posterior.exponent == 0.5
    assert posterior.oversampling_factor == 2
    assert posterior.posterior_estimator is not estimator  # training may go on
    assert isinstance(inference.build_posterior(), DirectPosterior)
    default = inference.build_posterior(sample_with="refined")
    assert default.exponent == pytest.approx(estimator.exponent)


def test_inference_survives_pickling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # unpickled trainers log where they are
    inference = make()
    estimator = train(inference)
    other = pickle.loads(pickle.dumps(inference))
    theta, x = simulate(5)
    copied = other.build_posterior().posterior_estimator
    assert torch.equal(copied.loss(theta, x), estimator.loss(theta, x))
    assert torch.equal(other.weights.dual_variables, inference.weights.dual_variables)
    other.train(resume_training=True, max_num_epochs=5)
    assert len(other.summary["trust"]) == 6
    with torch.no_grad():  # the first is untouched
        assert len(inference.summary["trust"]) == 4


@pytest.mark.parametrize("sample_with", ["direct", "refined", "mcmc"])
def test_posteriors_survive_pickling(sample_with):
    inference = make()
    train(inference)
    posterior = inference.build_posterior(sample_with=sample_with)
    posterior.set_default_x(torch.zeros(1, 2))
    copied = pickle.loads(pickle.dumps(posterior))
    theta = PRIOR.sample((5,))
    assert torch.equal(copied.potential(theta), posterior.potential(theta))


def test_estimator_state_goes_through_a_file():
    estimator = train(make())
    file = io.BytesIO()
    torch.save(estimator.state_dict(), file)
    file.seek(0)
    other = train(make(), seed=9, max_num_epochs=1)
    theta, x = simulate(6)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.loss(theta, x), estimator.loss(theta, x))
    assert torch.equal(other.proxy(theta[None], x), estimator.proxy(theta[None], x))
    assert other.exponent == estimator.exponent
    copied = copy.deepcopy(estimator)
    assert torch.equal(copied.loss(theta, x), estimator.loss(theta, x))


def test_training_says_nothing_when_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Maximum number of epochs")
        warnings.filterwarnings("ignore", ".*triangular_solve.*")
        inference = make()
        train(inference)
        inference.build_posterior(sample_with="refined")


@pytest.mark.filterwarnings("ignore:Maximum number of epochs")
@pytest.mark.filterwarnings("ignore:No prior was given")
def test_without_a_prior_simulations_may_come_in_parts():
    theta = torch.randn(200, 2)
    x = theta + 0.1 * torch.randn(200, 2)
    inference = JeffreysNPE(tracker=NoTracker(), show_progress_bars=False)
    inference.append_simulations(theta[:120], x[:120])
    inference.append_simulations(theta[120:], x[120:])
    inference.train(max_num_epochs=1)
    assert len(inference.train_indices) + len(inference.val_indices) == 200
    for sample_with in ("direct", "refined"):
        posterior = inference.build_posterior(sample_with=sample_with)
        samples = posterior.sample((5,), x=x[:1], show_progress_bars=False)
        assert samples.shape == (5, 2)
        assert samples.isfinite().all()
