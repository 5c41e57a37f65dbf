"""Bad data and bad luck: what goes wrong in the middle, and what is left then."""

import errno
import inspect
import math
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import (
    PRIOR,
    X_O,
    LinearGaussianFlow,
    assert_epochs_are_finite,
    assert_equal,
    interrupt_before,
    make,
    outcome,
    parameters,
    simulate,
    train,
)
from sbi.neural_nets import posterior_nn
from sbi.utils import BoxUniform
from torch.distributions import MultivariateNormal

from sbi_jeffreys import (
    AdaptiveWeights,
    JeffreysNPE,
    JeffreysObjective,
    NoTracker,
    energy_nn,
)
from sbi_jeffreys.energy import ConditionalEnergy, EnergyNet
from sbi_jeffreys.losses import Losses
from sbi_jeffreys.sample_sets import SampleSets
from sbi_jeffreys.stages import Stage

pytestmark = pytest.mark.filterwarnings(
    "ignore:Maximum number of epochs",
    "ignore:The passed prior has no support property",
    "ignore:No prior was given",
)

GAUSSIAN = MultivariateNormal(torch.zeros(2), torch.eye(2))


def assert_sound(inference, x_o=X_O):
    """Networks and summary are finite, and both posteriors sample."""
    assert parameters(inference._neural_net).isfinite().all()
    assert_epochs_are_finite(inference.summary)
    index = inference.val_indices
    theta, x, _ = inference.get_simulations()
    with torch.no_grad():
        loss = inference._neural_net.loss(theta[index], x[index]).mean().item()
    best = inference.summary["best_validation_loss"][-1]
    assert loss == pytest.approx(best, abs=1e-3, rel=1e-4)
    for sample_with in ("direct", "refined"):
        # sbi checks the prior's transform at two of its samples, to a thousandth: in
        # units of a million one pair of a hundred fails by rounding.
        torch.manual_seed(0)
        posterior = inference.build_posterior(sample_with=sample_with)
        samples = posterior.sample((20,), x=x_o, show_progress_bars=False)
        assert samples.isfinite().all()
        assert posterior.log_prob(samples, x=x_o).isfinite().all()


# -------------------------------------------------------------------------------- data


def test_duplicated_features():
    theta, x = simulate()
    inference = make()
    train(inference, data=(theta, torch.cat((x, x, x), 1)))
    assert_sound(inference, X_O.repeat(1, 3))


@pytest.mark.parametrize("prior", [PRIOR, None])
def test_duplicated_parameters_are_warned_of(prior):
    theta, x = simulate()
    inference = make(prior)
    with pytest.warns(UserWarning, match=r"Columns \[\(0, 1\)\] of theta are the same"):
        train(inference, data=(theta[:, :1].repeat(1, 2), x))
    assert_sound(inference)


@pytest.mark.parametrize(
    ("flow", "size"), [("maf", 1e8), ("maf", 1e30), ("maf", 3e38), ("nsf", 1e8)]
)
def test_outliers_in_x(flow, size):
    # The z-score of both networks suffers, as that of NPE's, and sbi says so.
    theta, x = simulate()
    x[3, 0], x[100, 1] = size, -size
    inference = make(
        density_estimator=posterior_nn(flow, hidden_features=8, num_transforms=2)
    )
    with pytest.warns(UserWarning, match="extreme outliers"):
        train(inference, data=(theta, x))
    assert_sound(inference)


@pytest.mark.parametrize("prior", [GAUSSIAN, None])
def test_outliers_in_theta(prior):
    theta, x = simulate(prior=GAUSSIAN)
    theta[3, 0] = 1e8
    inference = make(prior)
    if prior is None:
        inference.append_simulations(theta, x)
    else:
        with pytest.warns(UserWarning, match="1 of 120 parameter sets are far in the"):
            inference.append_simulations(theta, x)
    train(inference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the weights have collapsed
        assert_sound(inference)


@pytest.mark.parametrize("flow", ["maf", "nsf"])
@pytest.mark.parametrize("with_prior", [True, False])
def test_parameters_in_units_that_differ(flow, with_prior):
    scale = torch.tensor([1e-6, 1e6])
    theta, x = simulate()
    prior = BoxUniform(-2 * scale, 2 * scale) if with_prior else None
    builder = posterior_nn(flow, hidden_features=8, num_transforms=2)
    losses = []
    for factor in (torch.ones(2), scale):
        inference = make(
            BoxUniform(-2 * factor, 2 * factor) if with_prior else prior,
            density_estimator=builder,
        )
        train(inference, 6, data=(theta * factor, x * factor))
        assert_sound(inference, X_O * factor)
        losses.append(inference.summary["validation_proxy_forward_kl"][-1])
    # The product of the scales is one: no loss may differ.
    assert losses[1] == pytest.approx(losses[0], abs=0.02)


def test_parameters_with_an_offset_beyond_single_precision():
    theta, x = simulate()
    with pytest.raises(ValueError, match=r"Column\(s\) \[1\] of theta vary by.*offset"):
        train(make(None), 2, data=(theta + torch.tensor([0.0, 1e7]), x))
    train(make(None), 2, data=(theta + torch.tensor([0.0, 1e3]), x))


def test_fewer_simulations_than_a_batch():
    inference = make()
    train(inference, data=simulate(25), training_batch_size=200)
    assert_sound(inference)


@pytest.mark.parametrize(
    ("prior", "match"),
    [
        (
            BoxUniform(10 * torch.ones(2), 11 * torch.ones(2)),
            "120 of 120 parameter sets lie outside",
        ),
        (
            MultivariateNormal(100 * torch.ones(2), torch.eye(2)),
            "120 of 120 parameter sets are far in the tails",
        ),
    ],
)
def test_a_prior_that_contradicts_the_parameters(prior, match):
    inference = make(prior)
    with pytest.warns(UserWarning, match=match):
        inference.append_simulations(*simulate())
    train(inference)
    assert parameters(inference._neural_net).isfinite().all()
    assert_epochs_are_finite(inference.summary)
    # With no sample of the flow inside, the refined posterior says so.
    posterior = inference.build_posterior(sample_with="refined")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert posterior.sample((20,), x=X_O).isfinite().all()
        except RuntimeError as err:
            assert "outside the prior's support" in str(err)


def test_parameters_of_the_prior_are_not_warned_of():
    heavy = torch.distributions.StudentT(torch.tensor([2.0, 2.0]))
    prior = torch.distributions.Independent(heavy, 1)
    for each in (PRIOR, GAUSSIAN, prior):
        torch.manual_seed(0)
        theta = each.sample((20_000,))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "Data has extreme outliers")
            make(each).append_simulations(theta, theta + torch.randn_like(theta))


# ----------------------------------------------------------------- NaN in the middle


def raise_in(module, error):
    """Raise an error as code of a module does."""
    exec("raise error", {"__name__": module, "error": error})


def poisoned_flow(times, how="nan"):
    """Return a builder of a flow that fails at calls of its density in training.

    Those of the forward divergences are counted; the score's have parameters with
    gradients.
    """

    class Poisoned(LinearGaussianFlow):
        calls = 0

        def log_prob(self, input, condition, **kwargs):
            log_prob = super().log_prob(input, condition)
            learns = self.training and torch.is_grad_enabled()
            # sbi tries the flow at two conditions before the first epoch.
            if learns and not input.requires_grad and len(condition) > 2:
                type(self).calls += 1
                if self.calls in times:
                    if how == "nan":
                        return log_prob * math.nan
                    if how == "parameters":
                        self.bias.data.fill_(math.nan)
                    elif how == "assertion":
                        splines = "nflows.transforms.splines.rational_quadratic"
                        raise_in(splines, AssertionError("discriminant"))
                    elif how == "wordless":
                        raise_in("nflows.transforms.base", AssertionError())
                    elif how == "error":
                        raise RuntimeError("CUDA out of memory")
                    elif how == "setting":
                        raise ValueError("unknown mode of pooling")
                    elif how == "parameters and setting":
                        self.bias.data.fill_(math.nan)
                        raise ValueError("no feature is finite")
            return log_prob

    def build(theta, x):
        return Poisoned(torch.zeros(2, 2), torch.zeros(2), torch.eye(2))

    return build


# Two steps an epoch of these: three with the flow, six without, and one in which it
# learns from the simulations and, in the next call, at imagined outputs.
@pytest.mark.parametrize(
    "how", ["nan", "parameters", "assertion", "parameters and setting"]
)
@pytest.mark.parametrize(("call", "epoch"), [(3, 1), (4, 1), (7, 9), (9, 9)])
def test_a_flow_that_turns_nan_recovers(how, call, epoch):
    inference = make(density_estimator=poisoned_flow({call}, how))
    said = f"After {epoch} complete epochs.*NaN or infinite"
    with pytest.warns(UserWarning, match=said):
        train(inference, 10, simulate())
    assert len(inference.summary["trust"]) == 10
    assert_sound(inference)
    lr = inference.optimizer.param_groups[0]["lr"]
    assert lr == pytest.approx(2.5e-3)


def test_a_flow_that_is_nan_at_imagined_outputs_leaves_the_step_out():
    inference = make(density_estimator=poisoned_flow({8}))
    with pytest.warns(UserWarning, match="1 training steps had gradients"):
        train(inference, 10, simulate())
    assert_sound(inference)
    assert inference.optimizer.param_groups[0]["lr"] == pytest.approx(5e-3)


@pytest.mark.parametrize(("call", "epoch"), [(5, 2), (7, 9)])
def test_a_flow_that_stays_nan_ends_with_the_best_network(call, epoch):
    inference = make(density_estimator=poisoned_flow(set(range(call, 1000))))
    match = f"Training was stopped after {epoch} epochs"
    with pytest.warns(UserWarning, match=match) as w:
        train(inference, 10, simulate())
    (said,) = (str(each.message) for each in w if "stopped after" in str(each.message))
    assert "NaN/Inf present in JeffreysNPE loss" in said
    losses = inference.summary["validation_loss"][:3]  # while the flow learned
    best = losses.index(min(losses))
    assert f"The best network so far, of epoch {best}, is kept" in said
    assert inference.summary["epochs_trained"] == [epoch]
    assert len(inference.summary["trust"]) == epoch
    assert_sound(inference)


def test_a_flow_that_is_nan_from_the_start():
    inference = make(density_estimator=poisoned_flow({1}))
    with pytest.raises(ValueError, match="NaN/Inf present in JeffreysNPE loss"):
        train(inference, 8, simulate())
    # Nothing is left of it: the same object trains.
    assert inference._neural_net is None
    train(inference, 4)
    assert inference.summary["epochs_trained"] == [4]
    assert_sound(inference)


def test_errors_without_words_are_given_some():
    inference = make(density_estimator=poisoned_flow({1}, "wordless"))
    with pytest.raises(ValueError, match=r"first epoch: AssertionError\(\).*lower"):
        train(inference, 8, simulate())


def test_values_too_large_for_a_flow_without_z_score():
    theta, x = simulate()
    inference = make(
        density_estimator=posterior_nn("zuko_nsf", hidden_features=8, z_score_x="none")
    )
    with pytest.raises(ValueError, match="extreme values.*z-score both"):
        train(inference, data=(theta, x * 1e30))


class Poisoned(EnergyNet):
    """A network that is NaN wherever it is asked but in training."""

    def forward(self, theta, x):
        f = super().forward(theta, x)
        return f if self.training else f * math.nan


def poisoned(likelihood):
    build = energy_nn(8, 1, likelihood=likelihood)

    def build_poisoned(theta, x, prior):
        proxy = build(theta, x, prior)
        proxy.net.__class__ = Poisoned
        return proxy

    return build_poisoned


def test_an_energy_that_is_nan_in_validation_is_told():
    inference = make(energy_estimator=poisoned("none"))
    with pytest.warns(UserWarning, match="In 3 epochs validation_reverse_kl, valid"):
        train(inference, 5, simulate())
    assert inference._neural_net.exponent == 0  # the flow alone
    assert inference.build_posterior().sample((5,), x=X_O).isfinite().all()


def test_an_energy_that_is_nan_is_left_out_of_a_pool():
    inference = make(energy_estimator=poisoned("auto"))
    with pytest.warns(UserWarning, match="In 2 epochs validation_reverse_kl, valid"):
        train(inference, 8, simulate())
    weights = inference._neural_net.proxy.weights
    assert weights[0] == 0 and weights[1:].any()
    refined = inference.build_posterior(sample_with="refined")
    assert refined.sample((5,), x=X_O).isfinite().all()


def test_a_flow_that_cannot_be_inverted_in_the_end(monkeypatch):
    def failing(*args, **kwargs):
        raise AssertionError("discriminant")  # as splines of nflows

    monkeypatch.setattr("sbi_jeffreys.trainer.choose_exponent", failing)
    inference = make()
    with pytest.warns(UserWarning, match="cannot be sampled.*left as the flow's"):
        train(inference, 4, simulate())
    assert_sound(inference)
    assert inference._neural_net.exponent == 0


def test_settings_that_are_wrong_from_the_start_are_not_taken_for_numbers():
    inference = make(density_estimator=poisoned_flow({1}, "setting"))
    with pytest.raises(ValueError, match="^unknown mode of pooling$"):
        train(inference, 8, simulate())
    assert inference._neural_net is None


@pytest.mark.parametrize(("call", "epoch"), [(5, 2), (7, 9)])
@pytest.mark.parametrize(
    ("how", "kind", "match"),
    [
        ("error", RuntimeError, "out of memory"),
        ("setting", ValueError, "^unknown mode of pooling$"),
    ],
)
def test_errors_that_are_none_of_numbers_are_passed_on(how, kind, match, call, epoch):
    inference = make(density_estimator=poisoned_flow({call}, how))
    with pytest.raises(kind, match=match):
        train(inference, 10, simulate())
    # But the best network is kept, and training can go on.
    assert parameters(inference._neural_net).isfinite().all()
    assert len(inference.summary["trust"]) == epoch
    assert inference.build_posterior().sample((5,), x=X_O).isfinite().all()
    train(inference, 10, resume_training=True)
    expected = make(density_estimator=poisoned_flow(()))
    train(expected, 10, simulate())
    assert torch.equal(
        parameters(inference._neural_net), parameters(expected._neural_net)
    )


class PoisonedEnergy(EnergyNet):
    """An energy that turns NaN for a while, where it has gradients."""

    calls = 0
    times = ()

    def forward(self, theta, x):
        f = super().forward(theta, x)
        if torch.is_grad_enabled():
            type(self).calls += 1
            if self.calls in self.times:
                return f * math.nan
        return f


def poisoned_energy(times, likelihood="auto"):
    PoisonedEnergy.calls, PoisonedEnergy.times = 0, times
    build = energy_nn(8, 1, likelihood=likelihood)

    def build_poisoned(theta, x, prior):
        proxy = build(theta, x, prior)
        proxy.net.__class__ = PoisonedEnergy
        assert isinstance(proxy, ConditionalEnergy)
        return proxy

    return build_poisoned


# Three epochs of the proxy, of two steps each; then the flow asks it for its slope in
# every second step, if it is alone.
@pytest.mark.parametrize(
    ("call", "stage", "likelihood", "num_calls"),
    [(4, "proxy", "auto", 6), (4, "proxy", "none", 8), (7, "distillation", "none", 8)],
)
def test_a_step_with_an_energy_that_is_nan_is_left_out(
    call, stage, likelihood, num_calls
):
    energy = poisoned_energy({call}, likelihood)
    inference = make(energy_estimator=energy, weights="fixed")
    with pytest.warns(UserWarning, match="1 training steps had gradients"):
        train(inference, 11 if likelihood == "auto" else 8, simulate())
    assert PoisonedEnergy.calls == num_calls
    assert inference.summary["stage"].count(stage) == (3 if stage == "proxy" else 2)
    assert parameters(inference._neural_net).isfinite().all()
    assert math.isfinite(inference.summary["best_validation_loss"][-1])


def test_an_energy_that_is_nan_for_long_is_gone_back_from():
    inference = make(energy_estimator=poisoned_energy(range(3, 9)))
    said = "After 11 complete epochs.*No training step had finite gradients"
    with pytest.warns(UserWarning, match=said):
        train(inference, 20, simulate())
    assert inference.summary["stage"] == [s.value for s in Stage for _ in range(5)]
    assert_sound(inference)


def test_an_energy_that_stays_nan_leaves_the_flow():
    inference = make(energy_estimator=poisoned_energy(range(3, 1000)))
    said = "stopped after 11 epochs.*No training step had finite gradients"
    with pytest.warns(UserWarning, match=said):
        train(inference, 20, simulate())
    assert inference.summary["stage"] == (["flow"] * 5 + ["likelihood"] * 5 + ["proxy"])
    assert_sound(inference)


def poisoned_likelihood(index, times):
    """Return a builder of a proxy with a surrogate that fails in some calls.

    Calls with gradients are counted from one; those without have number zero.
    """

    def build_poisoned(theta, x, prior):
        proxy = energy_nn(8, 1, likelihood="auto")(theta, x, prior)
        member = proxy.likelihoods.members[index]
        num_calls = [0]

        def poison(module, inputs, output):
            with_gradients = torch.is_grad_enabled()
            num_calls[0] += with_gradients
            if (num_calls[0] if with_gradients else 0) in times:
                return output * math.nan
            return output

        # Of all that a surrogate says the hidden units are the source.
        getattr(member, "hidden", member).register_forward_hook(poison)
        return proxy

    return build_poisoned


@pytest.mark.parametrize("index", range(3))
def test_a_step_with_a_likelihood_that_is_nan_is_left_out(index):
    inference = make(energy_estimator=poisoned_likelihood(index, {4}))
    with pytest.warns(UserWarning, match="1 training steps had gradients"):
        train(inference, 12, simulate())
    assert inference.summary["stage"] == [s.value for s in Stage for _ in range(3)]
    assert parameters(inference._neural_net).isfinite().all()
    assert inference._neural_net.proxy.weights.isfinite().all()


# From its second epoch on, and from its first.
@pytest.mark.parametrize(("call", "num_epochs"), [(3, 1), (1, 0)])
@pytest.mark.parametrize("index", [0, 2])
def test_a_likelihood_that_stays_nan_is_passed_over(index, call, num_epochs):
    energy = poisoned_likelihood(index, range(call, 10_000))
    inference = make(energy_estimator=energy)
    with pytest.warns(UserWarning, match="turned NaN or infinite") as said:
        train(inference, 20, simulate(), stop_after_epochs=100)
    passed_over = [str(w.message) for w in said if "passed over" in str(w.message)]
    assert len(passed_over) == 1
    assert f"likelihood are passed over after {5 + num_epochs} epochs" in passed_over[0]
    # The others go on to the end.
    assert inference.summary["stage"] == (
        ["flow"] * 5
        + ["likelihood"] * num_epochs
        + ["proxy"] * 5
        + ["distillation"] * (10 - num_epochs)
    )
    assert_sound(inference)


def test_a_likelihood_that_is_nan_in_validation_has_no_weight():
    inference = make(energy_estimator=poisoned_likelihood(0, {0}))
    train(inference, 20, simulate())
    assert inference.summary["stage"] == [s.value for s in Stage for _ in range(5)]
    weights = inference._neural_net.proxy.weights
    assert weights[1] < 1e-6
    assert weights[2:].any()
    assert_sound(inference)


def test_steps_that_blow_up_are_told():
    inference = make()
    with pytest.raises((ValueError, ArithmeticError), match="NaN|infinite"):
        train(inference, 8, simulate(), learning_rate=1e20)
    train(inference)  # at the rate of a sane user
    assert_sound(inference)


# ------------------------------------------------------------------------------ Ctrl-C


class Interrupter:
    """Raises `KeyboardInterrupt` at the n-th call of what it was hung into."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.num_calls = 0
        self.at = None

    def hang_into(self, owner, name):
        original = getattr(owner, name)

        def interrupting(*args, **kwargs):
            self.num_calls += 1
            if self.num_calls == self.at:
                raise KeyboardInterrupt
            result = original(*args, **kwargs)
            self.num_calls += 1
            if self.num_calls == self.at:
                raise KeyboardInterrupt
            return result

        self.monkeypatch.setattr(owner, name, interrupting)


def test_a_flow_that_cannot_be_sampled_costs_the_pool_alone():
    """The proxy is judged once more at the end of its stage."""
    inference = make()
    judge, states = inference._judge_proxy_afresh, []

    def judging():
        def failing(*args):
            raise AssertionError("inputs.min() < 0")

        states.append(inference._best["proxy"])
        samples = inference._samples
        samples.draw_proposals = failing
        judge()
        states.append(inference._best["proxy"])
        del samples.draw_proposals

    inference._judge_proxy_afresh = judging
    with pytest.warns(UserWarning, match="proxy is left as its network alone"):
        train(inference, 12, simulate())
    assert states[0] is states[1]
    assert_sound(inference)
    weights = inference._neural_net.proxy.weights
    assert weights.tolist() == [1.0, *[0.0] * (len(weights) - 1)]


INTERRUPTED = """
import signal

# Processes of a shell's background are born to ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)

import torch
from torch.distributions import MultivariateNormal
from sbi_jeffreys import JeffreysNPE, NoTracker

prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
theta = prior.sample((200,))
inference = JeffreysNPE(prior, "maf", tracker=NoTracker(), show_progress_bars=False)
inference.append_simulations(theta, theta + torch.randn(200, 2))
show = inference._maybe_show_progress
def showing(show_bars, epoch):
    show(show_bars, epoch)
    if epoch == 5:
        print("five", flush=True)
inference._maybe_show_progress = showing
estimator = inference.train()
print(len(inference.summary["stage"]))
inference.save("fit.pt")
posterior = inference.build_posterior()
samples = posterior.sample((3,), x=torch.zeros(1, 2), show_progress_bars=False)
print(samples.isfinite().all().item())
"""


@pytest.mark.slow
def test_ctrl_c_from_outside(tmp_path):
    """The signal itself, whenever it comes, to a process that trains."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )
    assert process.stdout is not None
    while process.stdout.readline() not in ("five\n", ""):
        pass
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "Training was interrupted after" in errors
    num_epochs, is_finite = output.split()[-2:]
    assert 5 <= int(num_epochs) < 100
    assert is_finite == "True"
    assert [path.name for path in tmp_path.iterdir()] == ["fit.pt"]
    saved = JeffreysNPE(GAUSSIAN, "maf", tracker=NoTracker())
    saved.load(tmp_path / "fit.pt")
    assert saved.summary["epochs_trained"] == [int(num_epochs)]


# Every stage of building, training, validating and ending.
STAGES = [
    (JeffreysNPE, "_build_estimator"),
    (JeffreysNPE, "_train_epoch"),
    (JeffreysNPE, "_step"),
    (Losses, "of_flow"),
    (Losses, "of_likelihoods"),
    (Losses, "of_proxy"),
    (Losses, "of_following_flow"),
    (JeffreysNPE, "_validate_epoch"),
    (JeffreysNPE, "_keep_best"),
    (JeffreysNPE, "_keep_best_likelihoods"),
    (JeffreysNPE, "_judge_proxy_afresh"),
    (JeffreysNPE, "_summarize_epoch"),
    (JeffreysNPE, "_check_epoch"),
    (JeffreysNPE, "_maybe_show_progress"),
    (JeffreysNPE, "_converged"),
    (JeffreysNPE, "_restore_best"),
    (JeffreysNPE, "_choose_exponent"),
    (JeffreysNPE, "_start_next_stage"),
    (Losses, "of_judged_proxy"),
    (Losses, "of_judged_flow"),
    (SampleSets, "renew"),
    (SampleSets, "draw_proposals"),
    (SampleSets, "draw_proxy_samples"),
    (JeffreysObjective, "propose"),
    (JeffreysObjective, "proxy_divergences"),
    (JeffreysObjective, "sample_proxy"),
    (JeffreysObjective, "forward_kl_to_proxy"),
    (JeffreysObjective, "forward_kls_of_flow"),
    (JeffreysObjective, "reverse_kl"),
    (JeffreysObjective, "reverse_kl_of_flow"),
    (AdaptiveWeights, "measure_trust"),
    (AdaptiveWeights, "update"),
]


@pytest.mark.slow
def test_ctrl_c_at_any_point(monkeypatch):
    """Whatever is interrupted: resumed or begun anew, nothing is lost or broken."""
    data = simulate(60)
    options = {"training_batch_size": 20, "stop_after_epochs": 100}
    expected = make()
    train(expected, 4, data, **options)
    interrupter = Interrupter(monkeypatch)
    for stage in STAGES:
        interrupter.hang_into(*stage)
    train(make(), 4, data, **options)
    num_points = interrupter.num_calls
    assert num_points > 100
    num_early = num_kept = num_passed_on = 0
    for at in range(1, num_points + 1, 3):
        inference = make()
        interrupter.num_calls, interrupter.at = 0, at
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                train(inference, 4, data, **options)
                num_kept += 1
                assert_sound(inference)
            except KeyboardInterrupt:
                num_passed_on += 1
        assert interrupter.num_calls >= at
        interrupter.at = None
        started = inference._last_epoch is not None
        num_early += not started
        if not started:
            assert inference._neural_net is None
        train(inference, 4, resume_training=started, **options)
        assert torch.equal(
            parameters(inference._neural_net), parameters(expected._neural_net)
        ), at
        assert inference.summary["trust"] == expected.summary["trust"], at
        assert inference._neural_net.exponent == expected._neural_net.exponent
    assert min(num_early, num_kept, num_passed_on) > 5


@pytest.mark.parametrize("where", ["_restore_best", "_choose_exponent"])
def test_ctrl_c_at_the_very_end_is_told(monkeypatch, where):
    expected, inference = make(), make()
    train(expected, 4, simulate(60))
    with monkeypatch.context() as patch:
        interrupter = Interrupter(patch)
        interrupter.hang_into(JeffreysNPE, where)
        train(make(), 4, simulate(60))
        interrupter.num_calls, interrupter.at = 0, interrupter.num_calls
        with (
            pytest.warns(UserWarning, match="interrupted at its very end") as caught,
            pytest.raises(KeyboardInterrupt),
        ):
            train(inference, 4, simulate(60))
    (told,) = [w for w in caught if "very end" in str(w.message)]
    assert told.filename == inspect.getfile(train)  # said of the user's line
    train(inference, 4, resume_training=True)
    assert torch.equal(
        parameters(inference._neural_net), parameters(expected._neural_net)
    )
    assert inference._neural_net.exponent == expected._neural_net.exponent > 0


def test_ctrl_c_in_a_later_round_before_its_first_epoch(monkeypatch):
    inference = make()
    train(inference, 4, simulate())
    before, weights = parameters(inference._neural_net), inference.weights.state_dict()
    proposal = inference.build_posterior().set_default_x(X_O)
    inference.append_simulations(*simulate(60, seed=3), proposal=proposal)
    interrupter = Interrupter(monkeypatch)
    interrupter.hang_into(JeffreysNPE, "_step")
    interrupter.at = 4
    for options in ({}, {"retrain_from_scratch": True}):
        interrupter.num_calls = 0
        with pytest.raises(KeyboardInterrupt):
            train(inference, 4, **options)
        assert torch.equal(parameters(inference._neural_net), before)
        assert str(inference.weights.state_dict()) == str(weights)
        assert inference.build_posterior().sample((5,), x=X_O).isfinite().all()
        assert len(inference.train_indices) + len(inference.val_indices) == 120
    interrupter.at = None
    train(inference, 4)
    assert inference.summary["epochs_trained"] == [4, 4]


@pytest.mark.parametrize("how", ["build", "loaders", "first epoch"])
def test_a_training_that_does_not_begin_leaves_the_one_before(tmp_path, how):
    """It is resumed, saved and loaded as if no other had been tried."""

    def build(theta, x):
        if fails:
            raise KeyboardInterrupt
        builder = posterior_nn("maf", hidden_features=8, num_transforms=2)
        return builder(theta, x)

    fails = []
    expected = make()
    train(expected, 8, simulate())
    inference = make(density_estimator=build)
    interrupt_before(inference, 3)
    train(inference, 8, simulate())
    if how == "build":
        fails.append(True)
    if how == "first epoch":
        interrupt_before(inference, 0)
    keywords = {"of": "nobody"} if how == "loaders" else None
    with pytest.raises((KeyboardInterrupt, TypeError)):
        train(
            inference,
            8,
            seed=5,
            retrain_from_scratch=True,
            force_first_round_loss=True,
            dataloader_kwargs=keywords,
        )
    inference.save(tmp_path / "training.pt")
    for resumed in (inference, make().load(tmp_path / "training.pt")):
        train(resumed, 8, resume_training=True)
        assert_equal(outcome(resumed), outcome(expected))


@pytest.mark.parametrize("options", [{}, {"training_batch_size": 1}])
def test_a_later_round_with_nothing_to_tell_apart(options):
    """Of ten simulations one is for validation: atoms need two."""
    inference = make()
    train(inference, 4, simulate())
    before = parameters(inference._neural_net)
    proposal = inference.build_posterior().set_default_x(X_O)
    inference.append_simulations(*simulate(10, seed=3), proposal=proposal)
    with pytest.raises(ValueError, match="a batch of 1.*validation_fraction"):
        train(inference, 4, discard_prior_samples=True, **options)
    assert torch.equal(parameters(inference._neural_net), before)
    train(inference, 4, discard_prior_samples=True, validation_fraction=0.3)


def test_simulations_are_appended_whole_or_not_at_all(monkeypatch):
    inference = make()

    def interrupted(*args):
        raise KeyboardInterrupt

    theta, x = simulate()
    inference.append_simulations(theta, x)
    with monkeypatch.context() as patch:
        patch.setattr(
            "sbi.inference.trainers.npe.npe_base.mask_sims_from_prior", interrupted
        )
        with pytest.raises(KeyboardInterrupt):
            inference.append_simulations(theta, x)
    assert len(inference.get_simulations()[0]) == len(theta)
    train(inference)
    # sbi appends before it says that a proposal needs a prior.
    proposal = inference.build_posterior().set_default_x(X_O)
    bare = make(None)
    with pytest.raises(ValueError, match="did not pass a prior"):
        bare.append_simulations(theta, x, proposal=proposal)
    assert not bare._theta_roundwise
    bare.append_simulations(theta, x)
    train(bare)


# --------------------------------------------------------------------------- log, disk


class FullDisk(NoTracker):
    """The disk is full when training has ended."""

    def log_metric(self, name, value, step=None):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_that_cannot_be_written_does_not_cost_the_network():
    inference = make(tracker=FullDisk())
    with pytest.warns(UserWarning, match="training log cannot be written.*No space"):
        train(inference, 4, simulate())
    assert_sound(inference)


def test_a_build_that_fails_can_be_repeated():
    failing = [True]
    builder = posterior_nn("maf", hidden_features=8, num_transforms=2)

    def build(theta, x):
        if failing:
            raise RuntimeError("no such file: weights.pt")
        return builder(theta, x)

    inference = make(density_estimator=build)
    with pytest.raises(RuntimeError, match=re.escape("weights.pt")):
        train(inference, 4, simulate())
    failing.clear()
    train(inference, 4)
    assert_sound(inference)
