"""What a user may get wrong, and what is said of it."""

import logging
import math
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import assert_epochs_are_finite
from sbi.neural_nets import posterior_nn
from sbi.utils import BoxUniform
from torch import nn
from torch.distributions import Uniform

from sbi_jeffreys import (
    AdaptiveWeights,
    JeffreysEstimator,
    JeffreysNPE,
    NoTracker,
    energy_nn,
)

pytestmark = pytest.mark.filterwarnings("ignore:Maximum number of epochs")

PRIOR = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))


def simulate(num=200):
    theta = PRIOR.sample((num,))
    return theta, theta + 0.5 * torch.randn(num, 2)


def make(prior=PRIOR, **kwargs):
    return JeffreysNPE(
        prior,
        **{
            "density_estimator": posterior_nn(
                "maf", hidden_features=10, num_transforms=2
            ),
            "energy_estimator": energy_nn(10, 1),
            "tracker": NoTracker(),
            "show_progress_bars": False,
            **kwargs,
        },
    )


def train(theta, x, prior=PRIOR, exclude_invalid_x=None, **kwargs):
    inference = make(prior)
    inference.append_simulations(theta, x, exclude_invalid_x=exclude_invalid_x)
    inference.train(**{"max_num_epochs": 1, **kwargs})
    return inference


def assert_trained(inference):
    assert_epochs_are_finite(inference.summary)
    posterior = inference.build_posterior(sample_with="refined")
    shape = posterior.posterior_estimator.condition_shape
    samples = posterior.sample((20,), x=torch.zeros(1, *shape))
    assert torch.isfinite(samples).all()


# ------------------------------------------------------------------------ simulations


def test_failed_simulations_are_left_out_and_counted(caplog):
    theta, x = simulate(100)
    x[3, 0], x[5, 1], x[7] = math.nan, math.inf, -math.inf
    with caplog.at_level(logging.WARNING):
        inference = train(theta, x)
    assert "1 NaN simulations and 2 Inf simulations" in caplog.text
    assert "excluded from training" in caplog.text
    assert len(inference.train_indices) + len(inference.val_indices) == 97
    assert_trained(inference)


def test_failed_simulations_that_are_not_to_be_left_out():
    theta, x = simulate()
    x[::4, 0] = math.nan
    with pytest.raises((ValueError, AssertionError), match="NaN"):
        train(theta, x, exclude_invalid_x=False)


def test_a_failed_simulation_of_the_validation_set_is_not_swallowed():
    theta, x = simulate(100)
    torch.manual_seed(0)
    inference = make()
    inference.append_simulations(theta, x)
    inference.get_dataloaders(0)
    bad = inference.val_indices[0]
    x[bad] = math.nan
    torch.manual_seed(0)  # the same split again
    with pytest.raises((ValueError, AssertionError), match="NaN"):
        train(theta, x, exclude_invalid_x=False)


def test_all_simulations_failed():
    theta, x = simulate()
    with pytest.raises(AssertionError, match="No valid data entries left"):
        train(theta, x * math.nan)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_parameters_that_are_not_finite(value):
    theta, x = simulate(100)
    theta[3, 0] = theta[3, 1] = theta[8, 0] = value
    with pytest.raises(ValueError, match="2 of 100 parameter sets.*NaN or infinite"):
        make().append_simulations(theta, x)


def test_constant_features_do_no_harm():
    theta, x = simulate()
    with pytest.warns(UserWarning, match=r"constant values in dimension\(s\) \[2\]"):
        inference = train(theta, torch.cat((x, torch.full((200, 1), 7.0)), 1))
    assert_trained(inference)


def test_a_constant_parameter():
    theta, x = simulate()
    theta[:, 1] = 0.5
    with pytest.raises(ValueError, match=r"Column\(s\) \[1\] of theta are constant"):
        train(theta, x)


@pytest.mark.filterwarnings("ignore:Only one data sample provided")  # of x, sbi's
@pytest.mark.parametrize("num_replicates", [1, 10])
def test_parts_of_one_parameter_set_each(num_replicates):
    inference = make()
    for theta in PRIOR.sample((30,)):
        theta = theta.repeat(num_replicates, 1)
        inference.append_simulations(theta, theta + 0.5 * torch.randn_like(theta))
    inference.train(max_num_epochs=1)
    assert_trained(inference)


def test_columns_of_parts_are_not_judged_alone():
    parts = [simulate(100) for _ in range(4)]
    parts[0][0][:, 1] = 0.5  # held
    parts[1][0][:, 1] = parts[1][0][:, 0]  # a copy
    parts[2][0][:, 1] = torch.randint(2, (100,))
    inference = make()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Columns .* are the same")
        for part in parts:
            inference.append_simulations(*part)
        inference.train(max_num_epochs=1)
    assert_trained(inference)


@pytest.mark.filterwarnings("ignore:Only one data sample provided")  # of x, sbi's
@pytest.mark.parametrize(("num_parts", "num"), [(2, 40), (80, 1)])
@pytest.mark.parametrize(
    ("value", "what"),
    [(lambda part: 0.5, "constant"), (lambda part: part % 2, "discrete")],
)
def test_columns_of_all_parts_are_judged_when_training_begins(
    num_parts, num, value, what
):
    inference = make()
    for part in range(num_parts):
        theta, x = simulate(num)
        theta[:, 1] = value(part)
        inference.append_simulations(theta, x)
    with pytest.raises(ValueError, match=rf"Column\(s\) \[1\] of theta are {what}"):
        inference.train(max_num_epochs=1)
    assert inference._neural_net is None
    inference.append_simulations(*simulate())
    inference.train(max_num_epochs=1)
    assert len(inference.train_indices) + len(inference.val_indices) == 280
    assert_trained(inference)


def test_columns_are_judged_over_the_rounds_that_a_training_uses():
    inference = train(*simulate(100))
    networks, validation = inference._neural_net, inference.val_indices
    proposal = inference.build_posterior().set_default_x(torch.zeros(1, 2))
    theta, x = simulate(100)
    theta[:, 1] = 0.5
    inference.append_simulations(theta, x, proposal=proposal)
    with pytest.raises(ValueError, match=r"Column\(s\) \[1\] of theta are constant"):
        inference.train(max_num_epochs=1, discard_prior_samples=True)
    assert inference._neural_net is networks
    assert inference.val_indices is validation
    inference.train(max_num_epochs=1)
    assert_trained(inference)


def test_copied_parameters_are_told_where_training_was_called():
    theta, x = simulate()
    inference = make().append_simulations(theta[:, :1].repeat(1, 2), x)
    with pytest.warns(UserWarning, match="theta are the same") as caught:
        inference.train(max_num_epochs=1)
    told = [each for each in caught if "are the same" in str(each.message)]
    assert [each.filename for each in told] == [__file__]


def test_parameters_beyond_the_prior():
    theta, x = simulate()
    outside = ((1000 * theta).abs() > 2).any(1).sum().item()
    with pytest.warns(UserWarning, match=f"{outside} of 200 .*outside the prior"):
        make().append_simulations(1000 * theta, x)  # other units than the prior's


# ----------------------------------------------------------------------------- shapes


def test_outputs_of_another_shape_than_before_are_not_taken():
    theta, x = simulate(100)
    inference = make().append_simulations(theta, x)
    with pytest.raises(
        ValueError, match=r"features of shape \(3,\).* before have \(2,"
    ):
        inference.append_simulations(theta, torch.cat((x, x[:, :1]), 1))
    inference.append_simulations(theta + 0.01, x)
    inference.train(max_num_epochs=1)
    assert len(inference.train_indices) + len(inference.val_indices) == 200


def test_one_parameter_without_its_dimension():
    theta, x = simulate()
    with pytest.raises(ValueError, match=r"got \(200,\).*theta.reshape\(-1, 1\)"):
        make().append_simulations(theta[:, 0], x)


def test_one_feature_without_its_dimension():
    theta, x = simulate()
    with pytest.raises(ValueError, match=r"got \(200,\).*x.reshape\(-1, 1\)"):
        train(theta, x[:, 0])


def test_fewer_simulations_than_parameters():
    theta, x = simulate()
    with pytest.raises(ValueError, match="got 200 and 150"):
        make().append_simulations(theta, x[:150])


@pytest.mark.parametrize("num_parameters", [1, 3])
def test_prior_over_other_parameters(num_parameters):
    x = torch.randn(200, 2)
    theta = 2 * torch.rand(200, num_parameters) - 1
    with pytest.raises(ValueError, match=f"{num_parameters} parameter.*prior.*2"):
        train(theta, x)


@pytest.mark.parametrize("num", [0, 1, 2])
def test_too_few_simulations(num):
    theta, x = simulate(num)
    with pytest.raises(ValueError, match="simulations"):
        train(theta, x)


def test_very_few_simulations_train():
    assert_trained(train(*simulate(12)))


def test_all_simulations_for_training():
    theta, x = simulate(5)
    with pytest.raises(ValueError, match="validation_fraction=0.9"):
        train(theta, x, validation_fraction=0.9)


def test_simulations_with_gradients():
    """Of a simulator that is made of networks, say; its gradients are not ours."""
    theta, x = simulate()
    scale = torch.ones(2, requires_grad=True)
    losses = []
    for data in ((theta, x), (theta.clone().requires_grad_(), x * scale)):
        torch.manual_seed(0)
        losses.append(train(*data).summary["validation_loss"])
    assert losses[0] == losses[1]
    assert scale.grad is None


@pytest.mark.parametrize(
    "collate", [{}, {"collate_fn": torch.utils.data.default_collate}]
)
def test_batches_larger_than_what_there_is(collate):
    # sbi divides by zero; a batch size of `train` it cuts down to what there is.
    with pytest.raises(ValueError, match="fewer simulations for training than a batch"):
        train(*simulate(50), dataloader_kwargs={"batch_size": 46, **collate})


@pytest.mark.parametrize("sample_with", ["direct", "refined"])
@pytest.mark.parametrize(
    ("x_o", "error", "message"),
    [
        (torch.zeros(1, 3), RuntimeError, r"Expected trailing dimensions \(2,\)"),
        (torch.full((1, 2), math.nan), ValueError, "NaN|Nan"),
    ],
)
def test_observation(sample_with, x_o, error, message):
    posterior = train(*simulate(50)).build_posterior(sample_with=sample_with)
    with pytest.raises(error, match=message):
        posterior.sample((5,), x=x_o)


# ------------------------------------------------------------------------------ types


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda theta, x: (theta.numpy(), x), "theta must be a `torch.Tensor`"),
        (lambda theta, x: (theta, x.numpy()), "must be a `torch.Tensor`"),
        (lambda theta, x: (theta.double(), x), "parameters must be float32"),
        (lambda theta, x: (theta, x.double()), "outputs must be float32"),
        (lambda theta, x: (theta, x.int()), "outputs must be float32"),
    ],
)
def test_types_of_simulations(convert, message):
    with pytest.raises(AssertionError, match=message):
        make().append_simulations(*convert(*simulate()))


class PriorWithoutDensity:
    def sample(self, sample_shape=()):
        return torch.zeros(*sample_shape, 2)


@pytest.mark.parametrize(
    "prior", [PriorWithoutDensity(), scipy.stats.norm(), "uniform", object()]
)
def test_priors_that_are_none(prior):
    # sbi's words; what they advise is what is needed.
    with pytest.raises(AssertionError, match="process_prior"):
        make(prior)


def test_prior_of_independent_parameters_unwrapped():
    # NPE takes it: the batch shape is meant for the event's.
    prior = Uniform(-2 * torch.ones(2), 2 * torch.ones(2))
    assert_trained(train(*simulate(), prior=prior))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"weights": "auto"}, ValueError, "'adaptive', 'fixed'.*got 'auto'"),
        ({"weights": (1.0, 1.0, 1.0)}, TypeError, "instance of Weights, got tuple"),
        ({"weights": AdaptiveWeights}, TypeError, "an instance of Weights"),
        ({"energy_estimator": "mlp"}, TypeError, r"energy_nn\(.*got str"),
        # The brackets forgotten.
        ({"energy_estimator": energy_nn}, TypeError, "not energy_nn itself"),
        ({"objective": "jeffreys"}, TypeError, "JeffreysObjective, got str"),
        ({"density_estimator": 3}, AssertionError, "string or a function"),
    ],
)
def test_arguments_of_the_trainer(kwargs, error, message):
    with pytest.raises(error, match=message):
        make(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"density_estimator": "mdn"}, ValueError, "needs samples with gradients"),
        ({"density_estimator": "made"}, ValueError, "needs samples with gradients"),
        ({"density_estimator": "cnn"}, NotImplementedError, "cnn"),
        (
            {"density_estimator": lambda theta, x: nn.Linear(2, 2)},
            TypeError,
            "ConditionalDensityEstimator.*got Linear",
        ),
        (
            {"energy_estimator": lambda theta, x, prior: nn.Linear(2, 2)},
            TypeError,
            "ConditionalEnergy, got Linear",
        ),
    ],
)
def test_builders(kwargs, error, message):
    inference = make(**kwargs)
    inference.append_simulations(*simulate(50))
    with pytest.raises(error, match=message):
        inference.train(max_num_epochs=1)


# ------------------------------------------------------------------------- order, files


def test_training_without_simulations():
    with pytest.raises(RuntimeError, match="call .append_simulations"):
        make().train()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"training_batch_size": 0}, "training_batch_size"),
        ({"validation_fraction": 1.5}, "validation_fraction"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"max_num_epochs": 0}, "max_num_epochs"),
    ],
)
def test_arguments_of_training(kwargs, message):
    with pytest.raises(ValueError, match=message):
        train(*simulate(50), **kwargs)


def test_calibration_kernel_with_a_dimension_too_many():
    # sbi takes it: every loss is multiplied by every weight, which has no effect.
    with pytest.raises(ValueError, match=r"of shape \(200,\) here, got \(200, 1\)"):
        train(
            *simulate(300), calibration_kernel=lambda x: torch.exp(-x[:, :1].square())
        )


def test_calibration_kernels_that_are_numbers_or_of_numpy():
    kernels = [
        lambda x: torch.full((len(x),), 2.0),
        lambda x: 2.0,
        lambda x: torch.tensor(2.0),
        lambda x: np.full(len(x), 2.0, dtype=np.float32),
    ]
    losses = []
    for kernel in kernels:
        torch.manual_seed(0)
        inference = train(*simulate(), calibration_kernel=kernel)
        losses.append(inference.summary["validation_loss"])
    assert all(loss == losses[0] for loss in losses)


def test_posterior_of_an_estimator_without_proxy():
    inference = train(*simulate(50))
    flow = inference._neural_net.flow
    with pytest.raises(TypeError, match="proxy of a JeffreysEstimator.*NFlowsFlow"):
        inference.build_posterior(flow, sample_with="refined")
    assert isinstance(inference._neural_net, JeffreysEstimator)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"oversampling_factor": 8},
            "oversampling_factor.*refined_sampling_parameters",
        ),
        ({"mcmc_method": "slice_np"}, "mcmc_method"),
        ({"refined_sampling_parameters": {"nonsense": 1}}, "nonsense"),
    ],
)
def test_keywords_that_the_refined_posterior_does_not_take(kwargs, message):
    inference = train(*simulate(50))
    with pytest.raises(TypeError, match=message):
        inference.build_posterior(sample_with="refined", **kwargs)


@pytest.mark.parametrize("sample_with", ["direct", "mcmc", "refined"])
def test_posterior_before_training(sample_with):
    with pytest.raises(ValueError, match=r"no trained network yet: call .train\(\)"):
        make().build_posterior(sample_with=sample_with)


@pytest.mark.parametrize("sample_with", ["direct", "mcmc"])
def test_keywords_that_only_the_refined_posterior_takes(sample_with):
    inference = train(*simulate(50))
    with pytest.raises(TypeError, match=f"{sample_with}.*for sample_with='refined'"):
        inference.build_posterior(
            sample_with=sample_with, refined_sampling_parameters={"num_moves": 3}
        )


def test_unknown_way_to_sample():
    inference = train(*simulate(50))
    with pytest.raises(NotImplementedError, match="hmc"):
        inference.build_posterior(sample_with="hmc")


def test_training_goes_on_where_the_log_cannot_be_written(tmp_path, monkeypatch):
    # A file where sbi wants its folder: no permission that root would overrule.
    (tmp_path / "sbi-logs").write_text("in the way")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="training log cannot be written.*tracker="):
        inference = make(tracker=None)
    inference.append_simulations(*simulate(50))
    inference.train(max_num_epochs=1)
    assert_trained(inference)
    assert (tmp_path / "sbi-logs").read_text() == "in the way"


def test_the_log_is_written_where_it_can_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inference = make(tracker=None)
    inference.append_simulations(*simulate(50))
    inference.train(max_num_epochs=1)
    assert list((tmp_path / "sbi-logs" / "JeffreysNPE").glob("*/events.*"))
