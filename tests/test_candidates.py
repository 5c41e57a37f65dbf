"""A flow chosen among several: who stands for all, who learns when, and who stays."""

import copy
import io
import math
import pickle

import pytest
import torch
from helpers import (
    PRIOR,
    X_O,
    LinearGaussianFlow,
    assert_epochs_are_finite,
    assert_equal,
    identical,
    interrupt_before,
    outcome,
    parameters,
    simulate,
    state_of,
)
from helpers import make as make_small
from helpers import train as train_small
from sbi.inference.posteriors import DirectPosterior
from sbi.neural_nets import posterior_nn
from sbi.neural_nets.estimators.nflows_flow import NFlowsFlow
from sbi.utils import BoxUniform

from sbi_jeffreys import (
    FixedWeights,
    JeffreysEstimator,
    JeffreysNPE,
    NoTracker,
    energy_nn,
)
from sbi_jeffreys.candidates import FlowCandidates, build_candidates
from sbi_jeffreys.energy import EnergyNet
from sbi_jeffreys.flow import check_has_rsample, rsample_and_log_prob
from sbi_jeffreys.objective import Proposals
from sbi_jeffreys.residual_flow import ResidualFlow

pytestmark = pytest.mark.filterwarnings(
    "ignore:Maximum number of epochs",
    "ignore:Training was interrupted",
    "ignore:When the inference object is pickled",
    "ignore:In one-dimensional output space",
)


def small(name):
    return posterior_nn(name, hidden_features=6, num_transforms=1)


def gaussian(theta, x):
    return LinearGaussianFlow(torch.zeros(2, 2), torch.zeros(2), torch.eye(2))


def of(*builders):
    """Return a builder of candidates."""
    return lambda theta, x: FlowCandidates([build(theta, x) for build in builders])


THREE = of(small("maf"), gaussian, small("zuko_nsf"))


def make(builder=THREE, prior=PRIOR, **kwargs):
    torch.manual_seed(0)
    return make_small(prior, density_estimator=builder, **kwargs)


def train(inference, num_epochs, data=None, **kwargs):
    """Train, of 150 simulations, in three steps an epoch."""
    kwargs = {"training_batch_size": 45, "learning_rate": 1e-2, **kwargs}
    return train_small(inference, num_epochs, data, **kwargs)


def record(inference):
    """Record, before and after every epoch, which is active, and all their states."""
    epochs = []
    train_epoch = inference._train_epoch

    def recording(*args):
        flow = inference._neural_net.flow
        before = [state_of(candidate) for candidate in flow.net]
        loss = train_epoch(*args)
        after = [state_of(candidate) for candidate in flow.net]
        epochs.append((flow.active, before, after))
        return loss

    inference._train_epoch = recording
    return epochs


def equal(a, b):
    return all(identical(a[name], b[name]) for name in a)


# ------------------------------------------------------------------ one stands for all


@pytest.fixture
def flows():
    theta, x = simulate(150)
    torch.manual_seed(3)
    gauss = gaussian(theta, x)
    with torch.no_grad():
        gauss.weight += 0.3 * torch.randn(2, 2)
    return FlowCandidates([small("maf")(theta, x), gauss, small("zuko_nsf")(theta, x)])


@pytest.mark.parametrize("index", range(3))
def test_the_active_one_answers(flows, index):
    theta, x = simulate(5)
    points = torch.stack((theta, theta.roll(1, 0)))
    assert (len(flows), flows.active) == (3, 0)
    assert flows.input_shape == flows.condition_shape == torch.Size([2])
    flows.active = index
    one = flows.net[index]
    assert flows.active == index
    assert flows.flow is one
    assert flows.embedding_net is one.embedding_net
    assert torch.equal(flows.log_prob(points, x), one.log_prob(points, x))
    assert torch.equal(flows.loss(theta, x), one.loss(theta, x))
    others = [flow for flow in flows.net if flow is not one]
    assert not any(torch.equal(flows.loss(theta, x), o.loss(theta, x)) for o in others)
    samples = []
    for flow in (flows, one):
        torch.manual_seed(7)
        samples.append(flow.sample(torch.Size((4, 3)), x))
    assert samples[0].shape == (4, 3, 5, 2)
    assert torch.equal(*samples)


@pytest.mark.parametrize("index", range(3))
def test_samples_come_with_their_own_densities_and_gradients(flows, index):
    _, x = simulate(5)
    flows.active = index
    check_has_rsample(flows, x)
    theta, log_prob = flows.sample_and_log_prob(torch.Size((4, 3)), x)
    assert theta.shape == (4, 3, 5, 2)
    assert log_prob.shape == (4, 3, 5)
    # Of flows of nflows sbi would give those of other conditions.
    torch.testing.assert_close(
        flows.log_prob(theta.flatten(0, 1), x).reshape(4, 3, 5),
        log_prob,
        atol=1e-3,
        rtol=1e-3,
    )
    torch.manual_seed(7)
    ours = rsample_and_log_prob(flows, 6, x)
    torch.manual_seed(7)
    theirs = rsample_and_log_prob(flows.net[index], 6, x)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    (ours[0].sum() + flows.loss(*simulate(5)).sum()).backward()
    moved = [
        any(p.grad is not None and p.grad.abs().sum() > 0 for p in flow.parameters())
        for flow in flows.net
    ]
    assert moved == [i == index for i in range(3)]


def test_an_estimator_of_candidates_goes_through_copies_and_files(flows):
    theta, x = simulate(5)
    flows.active = 2
    proxy = energy_nn(8, 1, likelihood="auto")(*simulate(150), PRIOR)
    estimator = JeffreysEstimator(flows, proxy).eval()
    expected = flows.net[2].loss(theta, x)
    assert torch.equal(estimator.loss(theta, x), expected)
    for other in (copy.deepcopy(estimator), pickle.loads(pickle.dumps(estimator))):
        assert other.flow.active == 2
        assert torch.equal(other.loss(theta, x), expected)
        other.flow.active = 0  # nothing of it is shared
        assert flows.active == 2
    file = io.BytesIO()
    torch.save(estimator.state_dict(), file)
    file.seek(0)
    fresh = JeffreysEstimator(
        THREE(*simulate(150)), energy_nn(8, 1, likelihood="auto")(*simulate(150), PRIOR)
    )
    assert fresh.flow.active == 0
    fresh.eval().load_state_dict(torch.load(file, weights_only=True))
    assert fresh.flow.active == 2
    assert torch.equal(fresh.loss(theta, x), expected)


# ---------------------------------------------------------------- what "auto" builds


def test_auto_builds_residual_flows_and_a_plain_one():
    theta, x = simulate(150)
    flows = build_candidates(theta, x, PRIOR)
    kinds = [type(flow) for flow in flows.net]
    assert kinds == [ResidualFlow, ResidualFlow, NFlowsFlow]
    splines = ["RationalQuadratic" in str(flow) for flow in flows.net]
    assert splines == [False, True, True]
    for index in range(3):
        flows.active = index
        check_has_rsample(flows, x[:3])
        assert flows.loss(theta, x).isfinite().all()
    # Not one is a part of another.
    ids = [{id(p) for p in flow.parameters()} for flow in flows.net]
    assert not ids[0] & ids[1] and not ids[1] & ids[2] and not ids[0] & ids[2]


def test_outputs_of_more_than_one_dimension_leave_out_the_plain_one():
    theta, x = simulate(150)
    images = torch.stack((x, -x), 1) + 0.1 * torch.randn(150, 2, 2)
    flows = build_candidates(theta, images, PRIOR)
    assert [type(flow) for flow in flows.net] == [ResidualFlow, ResidualFlow]
    inference = make("auto")
    train(inference, 6, (theta, images))
    assert inference.summary["stage"] == [
        stage for stage in ("flow", "proxy", "distillation") for _ in range(2)
    ]
    for sample_with in ("direct", "refined"):
        posterior = inference.build_posterior(sample_with=sample_with)
        samples = posterior.sample((20,), x=images[:1], show_progress_bars=False)
        assert samples.shape == (20, 2)
        assert samples.isfinite().all()


@pytest.mark.parametrize("with_prior", [True, False])
@pytest.mark.filterwarnings("ignore:No prior was given")
@pytest.mark.filterwarnings("ignore:The passed prior has no support")
def test_one_parameter_and_a_prior_or_none(with_prior):
    prior = BoxUniform(-2 * torch.ones(1), 2 * torch.ones(1)) if with_prior else None
    theta = 4 * torch.rand(200, 1) - 2
    x = theta + 0.5 * torch.randn(200, 1)
    inference = make("auto", prior)
    estimator = train(inference, 12, (theta, x))
    assert len(estimator.flow) == 3
    assert_epochs_are_finite(inference.summary)
    for sample_with in ("direct", "refined"):
        posterior = inference.build_posterior(sample_with=sample_with)
        samples = posterior.sample((300,), x=torch.zeros(1, 1))
        assert samples.shape == (300, 1)
        assert samples.isfinite().all()


def test_auto_is_the_default_and_drops_in():
    torch.manual_seed(0)
    inference = JeffreysNPE(PRIOR, tracker=NoTracker(), show_progress_bars=False)
    train(inference, 9, simulate(150), stop_after_epochs=20)
    flow = inference._neural_net.flow
    assert isinstance(flow, FlowCandidates)
    posterior = inference.build_posterior().set_default_x(X_O)
    assert isinstance(posterior, DirectPosterior)
    copied = pickle.loads(pickle.dumps(posterior))
    theta = PRIOR.sample((5,))
    assert torch.equal(copied.potential(theta), posterior.potential(theta))


def test_outputs_that_are_not_numbers_are_built_from():
    theta, x = simulate(150)
    x[:, 0] = torch.nan
    assert len(build_candidates(theta, torch.nan_to_num(x), PRIOR)) == 3


# ------------------------------------------------------------------- who learns when


@pytest.mark.usefixtures("without_averaging")
def test_candidates_learn_one_after_the_other():
    inference = make()
    epochs = record(inference)
    train(inference, 37, simulate(150), stop_after_epochs=100)
    stages = ["flow"] * 9 + ["likelihood"] * 9 + ["proxy"] * 9 + ["distillation"] * 10
    assert inference.summary["stage"] == stages
    kept = inference._neural_net.flow.active
    # Three epochs each, a third of the flow's quarter.
    order = [0] * 3 + [1] * 3 + [2] * 3 + [kept] * 28
    assert [active for active, _, _ in epochs] == order
    for stage, (active, before, after) in zip(stages, epochs, strict=True):
        moved = [not equal(*pair) for pair in zip(before, after, strict=True)]
        learns = stage in ("flow", "distillation")
        assert moved == [i == active and learns for i in range(3)]
    # The one with the lowest validation loss, as it was then, is the flow from then on.
    losses = inference.summary["validation_loss"]
    best = losses.index(min(losses[:9]))
    assert kept == epochs[best][0]
    assert equal(epochs[9][1][kept], epochs[best][2][kept])
    assert losses[9:27] == pytest.approx([losses[best]] * 18)
    assert_epochs_are_finite(inference.summary)


@pytest.mark.usefixtures("without_averaging")
@pytest.mark.parametrize("leakage", [0.1, 0.3])
def test_the_last_follows_the_proxy_where_the_best_leaves_the_prior(
    leakage, monkeypatch
):
    inference = make(of(gaussian, small("maf")))
    monkeypatch.setattr(inference, "_leakage", lambda: leakage)
    epochs = record(inference)
    train(inference, 33, simulate(150), stop_after_epochs=100)
    stages = ["flow"] * 8 + ["likelihood"] * 8 + ["proxy"] * 8 + ["distillation"] * 9
    assert inference.summary["stage"] == stages
    losses = inference.summary["validation_loss"][:8]
    assert min(losses[:4]) < min(losses[4:])  # the first is the best
    assert inference._proxy_share > 0
    follows = int(leakage > 0.2)
    assert [active for active, _, _ in epochs[8:]] == [0] * 16 + [follows] * 9
    # As it was at its best.
    best_of_last = 4 + losses[4:].index(min(losses[4:]))
    starts_from = epochs[24][1][1]
    assert equal(starts_from, epochs[best_of_last][2][1]) == bool(follows)
    assert inference._neural_net.flow.active == follows


def test_leakage_is_the_share_of_samples_outside_the_prior():
    inference = make()
    train(inference, 3, simulate(150))
    inference._samples.proposals.clear()
    assert inference._leakage() == 0.0  # nothing is known
    theta = PRIOR.sample((10, 15))
    theta[:4, :, 0] = 1e3
    theta[8:] = 1e3  # the reference's do not count
    weights = torch.zeros(10, 15)
    proposals = Proposals(theta, weights, weights[:8])
    inference._samples.proposals["validation"] = proposals
    assert inference._leakage() == 0.5


def test_a_candidate_that_no_longer_improves_makes_room():
    inference = make()
    epochs = record(inference)
    train(inference, 10_000, simulate(60), stop_after_epochs=3, learning_rate=5e-2)
    losses, stages = (inference.summary[name] for name in ("validation_loss", "stage"))
    start = 0
    for index in range(3):
        of_candidate = [
            loss
            for loss, stage, (active, _, _) in zip(losses, stages, epochs, strict=True)
            if stage == "flow" and active == index
        ]
        # Judged by itself: the better ones before it are not held against it.
        assert of_candidate.index(min(of_candidate)) == len(of_candidate) - 4
        assert losses[start : start + len(of_candidate)] == of_candidate
        start += len(of_candidate)
    assert stages.count("flow") == start < 300
    assert set(stages) == {"flow", "likelihood", "proxy", "distillation"}


@pytest.mark.parametrize(
    ("num_epochs", "active"),
    [
        (2, [0]),
        (3, [0]),
        (5, [0]),
        (6, [0, 1]),
        (10, [0, 1, 2]),
        (17, [0, 1, 2]),
        (25, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_a_budget_smaller_than_the_candidates(num_epochs, active):
    inference = make()
    epochs = record(inference)
    train(inference, num_epochs, simulate(150), stop_after_epochs=100)
    stages = inference.summary["stage"]
    assert len(stages) == num_epochs
    assert stages.count("flow") == len(active)
    assert [each for each, _, _ in epochs[: len(active)]] == active
    losses = inference.summary["validation_loss"][: len(active)]
    assert inference._neural_net.flow.active == active[losses.index(min(losses))]
    assert inference.build_posterior().sample((5,), x=X_O).isfinite().all()


@pytest.mark.parametrize("stop_after_epochs", [3, 6])
def test_without_weight_on_the_proxy_each_has_its_time(stop_after_epochs):
    inference = make(weights=FixedWeights((1, 0, 0)))
    epochs = record(inference)
    options = {"stop_after_epochs": stop_after_epochs, "learning_rate": 5e-2}
    train(inference, 10_000, simulate(60), **options)
    assert set(inference.summary["stage"]) == {"flow"}
    losses = inference.summary["validation_loss"]
    for index in range(3):
        of_candidate = [
            loss
            for loss, (active, _, _) in zip(losses, epochs, strict=True)
            if active == index
        ]
        best = of_candidate.index(min(of_candidate))
        assert best == len(of_candidate) - 1 - stop_after_epochs
    best = losses.index(min(losses))
    assert inference._neural_net.flow.active == epochs[best][0]
    assert inference.summary["best_validation_loss"] == [min(losses)]


# ------------------------------------------------------------------------ the choice


def test_the_better_candidate_stays_for_a_posterior_of_two_modes():
    """Of the square of a parameter no Gaussian knows the sign."""

    def data(num, seed):
        torch.manual_seed(seed)
        theta = PRIOR.sample((num,))
        return theta, theta**2 + 0.2 * torch.randn(num, 2)

    spline = posterior_nn("zuko_nsf", hidden_features=10, num_transforms=2)
    theta_o, x_o = data(500, 9)
    for builder, better in ((of(gaussian, spline), 1), (of(spline, gaussian), 0)):
        inference = make(builder)
        epochs = record(inference)
        interrupt_before(inference, 20)  # two epochs after the flow's stage
        options = {"training_batch_size": 75, "stop_after_epochs": 100}
        estimator = train(inference, 80, data(500, 0), learning_rate=2e-2, **options)
        assert inference.summary["stage"] == ["flow"] * 18 + ["likelihood"] * 2
        assert estimator.flow.active == better
        losses = inference.summary["validation_loss"][:18]
        lowest = [
            min(
                loss
                for loss, (active, _, _) in zip(losses, epochs[:18], strict=True)
                if active == index
            )
            for index in range(2)
        ]
        assert lowest[better] < lowest[1 - better] - 0.2
        # And the posterior is its own, better than that of the other on fresh data.
        with torch.no_grad():
            fresh = [flow.loss(theta_o, x_o).mean() for flow in estimator.flow.net]
            own = estimator.loss(theta_o, x_o).mean()
        assert own == fresh[better] < fresh[1 - better] - 0.2
        samples = inference.build_posterior().sample(
            (1000,), x=torch.ones(1, 2), show_progress_bars=False
        )
        # Both modes, at plus and minus one, and little at zero between them.
        share = (samples > 0).double().mean(0)
        assert ((share > 0.2) & (share < 0.8)).all()
        assert ((samples.abs() - 1).abs() < 0.5).double().mean() > 0.7


def test_a_later_round_goes_on_with_the_flow_of_the_first():
    inference = make()
    train(inference, 10, simulate(150))
    first = inference._neural_net.flow.active
    proposal = inference.build_posterior().set_default_x(torch.zeros(1, 2))
    theta = proposal.sample((90,), show_progress_bars=False)
    inference.append_simulations(theta, theta + torch.randn(90, 2), proposal=proposal)
    epochs = record(inference)
    train(inference, 10)
    assert [active for active, _, _ in epochs] == [first] * 10
    # From scratch, they all begin anew.
    del epochs[:]
    train(inference, 10, retrain_from_scratch=True)
    assert [active for active, _, _ in epochs[:3]] == [0, 1, 2]


# --------------------------------------------------------------------------- mishaps


def poisoned(times, bound=1000):
    """Return a builder of a flow that turns NaN at some calls of its loss."""

    class Poisoned(LinearGaussianFlow):
        calls = 0

        def loss(self, input, condition, **kwargs):
            loss = super().loss(input, condition)
            if self.training:
                type(self).calls += 1
                if self.calls > bound:
                    pytest.fail("It is tried again without end.")
                if self.calls in times:
                    return loss * math.nan
            return loss

    # So far off that it is not the best in the epochs in which it is well.
    far = torch.full((2,), 3.0)
    return lambda theta, x: Poisoned(torch.zeros(2, 2), far, torch.eye(2))


def assert_sound(inference):
    estimator = inference._neural_net
    assert parameters(estimator).isfinite().all()
    assert_epochs_are_finite(inference.summary)
    index = inference.val_indices
    theta, x, _ = inference.get_simulations()
    with torch.no_grad():
        loss = estimator.loss(theta[index], x[index]).mean().item()
    best = inference.summary["best_validation_loss"][-1]
    assert loss == pytest.approx(best, abs=1e-4)
    assert inference.build_posterior().sample((5,), x=X_O).isfinite().all()


def test_a_candidate_that_turns_nan_once_goes_on():
    inference = make(of(gaussian, poisoned({4}), small("maf")))
    epochs = record(inference)
    with pytest.warns(UserWarning, match="After 6 complete epochs.*NaN or infinite"):
        train(inference, 61, simulate(150), stop_after_epochs=100)
    # It has lost nothing but the epoch that failed.
    assert [active for active, _, _ in epochs[:15]] == [0] * 5 + [1] * 5 + [2] * 5
    assert inference.summary["stage"] == (
        ["flow"] * 15 + ["likelihood"] * 15 + ["proxy"] * 15 + ["distillation"] * 16
    )
    assert_sound(inference)


# Three steps an epoch: in the third epoch of one, and in the first.
@pytest.mark.parametrize(("index", "call"), [(0, 7), (1, 1), (1, 7), (2, 1), (2, 7)])
def test_a_candidate_that_stays_nan_is_passed_over(index, call):
    builders = [gaussian, small("zuko_nice"), small("maf")]
    builders[index] = poisoned(range(call, 10_000))
    inference = make(of(*builders))
    epochs = record(inference)
    with pytest.warns(UserWarning, match="turned NaN or infinite") as said:
        train(inference, 61, simulate(150), stop_after_epochs=100)
    assert sum("passed over" in str(each.message) for each in said) == 1
    # It has the epochs in which it was well, and all others theirs.
    num = [5, 5, 5]
    num[index] = 0 if call == 1 else 2
    order = [active for active, before, after in epochs[: sum(num)]]
    assert order == [0] * num[0] + [1] * num[1] + [2] * num[2]
    assert inference.summary["stage"] == (
        ["flow"] * sum(num)
        + ["likelihood"] * 15
        + ["proxy"] * 15
        + ["distillation"] * (31 - sum(num))
    )
    assert_sound(inference)


def test_candidates_that_all_stay_nan_end_with_the_best_before():
    inference = make(of(gaussian, *[poisoned(range(7, 10_000)) for _ in range(2)]))
    with pytest.warns(UserWarning, match="turned NaN or infinite"):
        train(inference, 46, simulate(150), stop_after_epochs=100)
    assert_sound(inference)


def test_a_last_candidate_that_stays_nan_ends_a_training_without_proxy():
    builder = of(gaussian, poisoned(range(1, 10_000)))
    inference = make(builder, weights=FixedWeights((1, 0, 0)))
    with pytest.warns(UserWarning, match="Training was stopped after"):
        train(inference, 10_000, simulate(60), stop_after_epochs=3, learning_rate=5e-2)
    assert set(inference.summary["stage"]) == {"flow"}
    estimator, losses = inference._neural_net, inference.summary["validation_loss"]
    assert estimator.flow.active == 0
    assert parameters(estimator).isfinite().all()
    assert inference.summary["best_validation_loss"] == [min(losses)]


@pytest.mark.parametrize("likelihood", ["auto", "none"])
def test_a_proxy_that_stays_nan_after_such_a_candidate_ends_the_training(likelihood):
    class Poisoned(EnergyNet):
        def forward(self, theta, x):
            f = super().forward(theta, x)
            return f * math.nan if torch.is_grad_enabled() else f

    def build_energy(theta, x, prior):
        proxy = energy_nn(8, 1, likelihood=likelihood)(theta, x, prior)
        proxy.net.__class__ = Poisoned
        return proxy

    builder = of(gaussian, poisoned(range(1, 10_000)))
    inference = make(builder, energy_estimator=build_energy)
    with pytest.warns(UserWarning, match="stopped.*No training step had finite grad"):
        train(inference, 40, simulate(150), stop_after_epochs=100)
    expected = {"flow", "likelihood"} if likelihood == "auto" else {"flow"}
    assert set(inference.summary["stage"]) == expected
    assert_sound(inference)


def test_a_first_candidate_that_is_nan_from_the_start_is_said():
    inference = make(of(poisoned(range(1, 10_000)), gaussian))
    with pytest.raises(ValueError, match="NaN/Inf present in JeffreysNPE loss"):
        train(inference, 20, simulate(150))
    assert inference._neural_net is None


@pytest.mark.usefixtures("without_averaging")
@pytest.mark.parametrize("num_epochs", [1, 2, 4, 6, 8])
def test_ctrl_c_keeps_the_best_candidate_so_far(num_epochs):
    inference = make()
    epochs = record(inference)
    interrupt_before(inference, num_epochs)
    with pytest.warns(UserWarning, match=f"interrupted after {num_epochs} epochs"):
        train(inference, 25, simulate(150), stop_after_epochs=100)
    losses = inference.summary["validation_loss"][:6]
    best = losses.index(min(losses))
    flow = inference._neural_net.flow
    assert flow.active == epochs[best][0]
    assert equal(state_of(flow.flow), epochs[best][2][flow.active])
    assert_sound(inference)


# -------------------------------------------------------------- files and resumption


@pytest.fixture(scope="module")
def whole():
    inference = make()
    train(inference, 25, simulate(150))
    assert inference.summary["stage"] == (
        ["flow"] * 6 + ["likelihood"] * 6 + ["proxy"] * 6 + ["distillation"] * 7
    )
    return outcome(inference)


# After every epoch of the candidates, and in the later stages.
@pytest.mark.parametrize("num_epochs", [1, 2, 3, 4, 5, 6, 9, 12, 15, 20])
def test_a_training_is_resumed_among_candidates(whole, tmp_path, num_epochs):
    part = make()
    interrupt_before(part, num_epochs)
    train(part, 25, simulate(150))
    assert len(part.summary["stage"]) == num_epochs
    path = tmp_path / "training.pt"
    part.save(path)
    loaded = make().load(path)
    assert loaded._neural_net.flow.active == part._neural_net.flow.active
    torch.manual_seed(77)  # what another process would have done
    train(loaded, 25, seed=9, resume_training=True)
    assert_equal(outcome(loaded), whole)
    train(part, 25, seed=9, resume_training=True)
    assert_equal(outcome(part), whole)


@pytest.mark.parametrize("into_candidate", [0, 1, 2])
def test_a_resumed_candidate_knows_how_long_it_has_not_improved(
    tmp_path, into_candidate
):
    options = {"stop_after_epochs": 3, "learning_rate": 5e-2}
    whole, part = make(), make()
    epochs = record(whole)
    train(whole, 10_000, simulate(60), **options)
    order = [active for active, _, _ in epochs]
    # Before the last of the three epochs in which it has not improved.
    stages = whole.summary["stage"]
    num = max(
        i
        for i, (active, stage) in enumerate(zip(order, stages, strict=True))
        if active == into_candidate and stage == "flow"
    )
    interrupt_before(part, num)
    train(part, 10_000, simulate(60), **options)
    part.save(tmp_path / "training.pt")
    loaded = make().load(tmp_path / "training.pt")
    train(loaded, 10_000, seed=9, resume_training=True, **options)
    assert_equal(outcome(loaded), outcome(whole))


def test_a_pickled_training_is_resumed_among_candidates(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # unpickled trainers log where they are
    part = make()
    interrupt_before(part, 3)
    train(part, 25, simulate(150))
    other = pickle.loads(pickle.dumps(part))
    other._show_progress_bars = False
    train(other, 25, seed=9, resume_training=True)
    assert_equal(outcome(other), whole)


def test_a_file_of_candidates(tmp_path):
    inference = make("auto")
    train(inference, 9, simulate(150))
    path = tmp_path / "fit.pt"
    inference.save(path, simulations=False)
    loaded = make("auto").load(path)
    flow = inference._neural_net.flow
    assert loaded._neural_net.flow.active == flow.active
    assert equal(state_of(loaded._neural_net), state_of(inference._neural_net))
    for sample_with in ("direct", "refined"):
        samples = []
        for each in (inference, loaded):
            torch.manual_seed(3)
            posterior = each.build_posterior(sample_with=sample_with)
            samples.append(posterior.sample((20,), x=X_O, show_progress_bars=False))
        assert torch.equal(*samples)
    with pytest.raises(ValueError, match="flow of the file does not fit"):
        make("maf").load(path)
