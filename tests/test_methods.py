"""The methods: same simulations and split for all, quiet, as sbi by hand."""

import inspect
from dataclasses import replace
from functools import partial

import pytest
import torch
from fake_method import mean_distances, need_published_data
from sbi.inference import NLE, NPE, NRE, ImportanceSamplingPosterior
from sbi.inference.posteriors.posterior_parameters import MCMCPosteriorParameters
from sbi.samplers.mcmc.slice_numpy import SliceSamplerVectorized

from tasks import get_task
from tasks.errors import InputError
from tasks.methods import METHODS, Problem, Sequential, SingleRound, draw, get_method
from tasks.results import METRICS
from tasks.run import Unit, run_unit, simulate

pytestmark = pytest.mark.filterwarnings("ignore:Maximum number of epochs")

ALL = {"-".join(m.names): m for m in METHODS.values()}
SINGLE_ROUND = {ids: m for ids, m in ALL.items() if m.amortized}


@pytest.fixture
def problem() -> Problem:
    need_published_data()
    theta, x = simulate("two_moons", 100, 1)
    task = get_task("two_moons")
    return Problem(task, theta, x, seed=7, train={"max_num_epochs": 1})


@pytest.fixture
def trainers(monkeypatch) -> list:
    """Collects the trainers that methods make."""
    made = []
    make = SingleRound._trainer

    def record(self, problem):
        made.append(make(self, problem))
        return made[-1]

    monkeypatch.setattr(SingleRound, "_trainer", record)
    return made


def test_every_wanted_method_is_there():
    wanted = "jeffreys jeffreys_refined "
    wanted += "jeffreys_network jeffreys_network_refined "
    wanted += "jeffreys_fixed jeffreys_fast jeffreys_fast_refined "
    wanted += "npe_maf npe_nsf npe_mdn npe_zuko_nsf fmpe npse nle nre "
    wanted += "sjeffreys sjeffreys_refined snpe snle snre"
    assert set(METHODS) == set(wanted.split())
    assert {name for name, m in METHODS.items() if not m.amortized} == {
        "sjeffreys",
        "sjeffreys_refined",
        "snpe",
        "snle",
        "snre",
    }


def test_unknown_method_is_named_with_the_known_ones():
    with pytest.raises(InputError, match="unknown method 'nsf'.*npe_nsf"):
        get_method("nsf")


@pytest.mark.parametrize("method", SINGLE_ROUND.values(), ids=SINGLE_ROUND)
def test_methods_share_simulations_and_split_and_are_quiet(
    method, problem, trainers, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    fit = method.fit(problem)
    # sbi's default tracker would have made the folder sbi-logs.
    assert list(tmp_path.iterdir()) == []

    reference = NPE(prior=problem.task.prior, show_progress_bars=False)
    reference.append_simulations(problem.theta, problem.x)
    torch.manual_seed(problem.seed)
    reference.train(max_num_epochs=1)

    (trainer,) = trainers
    theta, x, _ = trainer.get_simulations()
    assert torch.equal(theta, problem.theta) and torch.equal(x, problem.x)
    assert torch.equal(trainer.train_indices, reference.train_indices)
    assert torch.equal(trainer.val_indices, reference.val_indices)

    assert tuple(fit.posteriors) == method.names
    assert fit.epochs == 2  # sbi counts one more than max_num_epochs
    for posterior in fit.posteriors.values():
        assert not isinstance(posterior, Exception), posterior


@pytest.mark.slow
@pytest.mark.parametrize("method", ALL.values(), ids=ALL)
def test_every_method_gives_whole_rows(method, monkeypatch):
    """As in a sweep, but for the lengths of training, chains and samples."""
    need_published_data()
    monkeypatch.setattr("tasks.run.metrics.c2st_many", mean_distances)
    monkeypatch.setattr(
        "sbi.inference.posteriors.mcmc_posterior.SliceSamplerVectorized",
        partial(SliceSamplerVectorized, tuning=2, init_width=2.0),
    )
    for name, arguments in method.posteriors.items():
        if "posterior_parameters" in arguments:
            parameters = replace(
                arguments["posterior_parameters"],
                num_chains=5,
                warmup_steps=2,
                init_strategy_parameters={"num_candidate_samples": 10},
            )
            short = {**arguments, "posterior_parameters": parameters}
            monkeypatch.setitem(method.posteriors, name, short)
    rows = run_unit(
        Unit(
            task="two_moons",
            method=method,
            # NRE cannot validate on the one simulation that 10 of a round would leave.
            budget=100 if method.amortized else 200,
            seed=1,
            rows=tuple((name, 1) for name in method.names),
            num_samples=50,
            train={"max_num_epochs": 1},
        )
    )
    assert [row["method"] for row in rows] == list(method.names)
    for row in rows:
        assert row["status"] == "ok", row["traceback"]
        scored = {name for name in METRICS if row[name] == row[name]}
        assert scored >= set(METRICS) - {"log_prob_true_parameters"}
        # sbi counts one more than max_num_epochs, in each round.
        assert row["epochs"] == 2 * (1 if method.amortized else 10)


def test_sequential_methods_have_ten_rounds():
    for name in ("snpe", "snle", "snre", "sjeffreys"):
        method = METHODS[name]
        assert isinstance(method, Sequential)
        assert method.rounds == 10
        assert method.settings(name)["rounds"] == 10


def test_jeffreys_variants_come_from_one_method():
    assert METHODS["jeffreys"] is METHODS["jeffreys_refined"]
    assert METHODS["jeffreys"] is not METHODS["jeffreys_fixed"]
    flow, refined, fixed = (
        METHODS[name].settings(name)
        for name in ("jeffreys", "jeffreys_refined", "jeffreys_fixed")
    )
    assert refined == {**flow, "posterior": {"sample_with": "refined"}}
    assert fixed["constructor"] == {"weights": "fixed"}


def test_posterior_that_cannot_be_built_does_not_cost_the_others(problem):
    method = SingleRound(NPE, {"good": {}, "bad": {"sample_with": "nonsense"}})
    fit = method.fit(problem)
    assert isinstance(fit.posteriors["bad"], Exception)
    assert draw(fit.posteriors["good"], 5, problem.task.observation(1)).shape == (5, 2)


_FEW_STEPS = {
    "posterior_parameters": MCMCPosteriorParameters(
        num_chains=5, warmup_steps=20, init_strategy="proposal"
    )
}


@pytest.mark.parametrize(
    ("trainer", "arguments"), [(NPE, {}), (NLE, _FEW_STEPS), (NRE, _FEW_STEPS)]
)
def test_sequential_spends_the_budget_and_starts_from_the_shared_simulations(
    trainer, arguments, problem, trainers, monkeypatch
):
    simulated = []
    task = problem.task
    monkeypatch.setattr(
        task, "simulator", lambda theta: simulated.append(theta) or theta.clone()
    )
    method = Sequential(trainer, {"s": arguments}, rounds=3)
    x_o = task.observation(2)
    fit = method.fit(Problem(task, problem.theta, problem.x, 7, problem.train, x_o))

    (made,) = trainers
    assert [len(theta) for theta in made._theta_roundwise] == [34, 33, 33]
    assert made._data_round_index == [0, 1, 2]
    assert torch.equal(made._theta_roundwise[0], problem.theta[:34])
    assert torch.equal(made._x_roundwise[0], problem.x[:34])
    assert [len(theta) for theta in simulated] == [33, 33]
    assert torch.equal(made._theta_roundwise[2], simulated[1])
    assert fit.epochs == sum(made.summary["epochs_trained"])
    assert len(made.summary["epochs_trained"]) == 3
    assert fit.share_of_simulations == 0.34
    assert method.settings("s")["rounds"] == 3


def test_sequential_draws_the_next_round_from_the_last_posterior(problem, trainers):
    method = Sequential(NPE, {"s": {}, "t": {"sample_with": "importance"}}, rounds=2)
    x_o = problem.task.observation(2)
    method.fit(Problem(problem.task, problem.theta, problem.x, 7, problem.train, x_o))
    (made,) = trainers
    assert isinstance(made._proposal_roundwise[1], ImportanceSamplingPosterior)
    assert {method.settings(name)["proposal"] for name in "st"} == {"t"}


def test_sequential_needs_an_observation_and_enough_simulations(problem):
    method = Sequential(NPE, {"s": {}})
    with pytest.raises(InputError, match="one observation"):
        method.fit(problem)
    few = Problem(problem.task, problem.theta[:9], problem.x[:9], 1, {}, problem.x[:1])
    with pytest.raises(InputError, match="9 simulations cannot be divided over 10"):
        method.fit(few)


def test_unknown_train_argument_is_named():
    with pytest.raises(InputError, match="epochs of NPE_C.train.*max_num_epochs"):
        METHODS["npe_nsf"].check_train_arguments({"epochs": 3, "learning_rate": 1e-3})
    METHODS["npe_nsf"].check_train_arguments({"learning_rate": 1e-3})


def test_sampling_is_limited_in_time_where_sbi_can(problem):
    seen = {}

    class Posterior:
        def sample(self, shape, x, show_progress_bars, max_sampling_time):
            seen.update(limit=max_sampling_time, bars=show_progress_bars)
            return torch.zeros(shape)

    assert draw(Posterior(), 3).shape == (3,)
    assert seen["limit"] > 0 and seen["bars"] is False
    mcmc = SingleRound(NLE, {"nle": _FEW_STEPS}).fit(problem).posteriors["nle"]
    assert "max_sampling_time" not in inspect.signature(mcmc.sample).parameters
    assert draw(mcmc, 10, problem.task.observation(1)).shape == (10, 2)
