"""Simulations of every shape, through sbi's embedding networks; theta of every size."""

import copy
import warnings

import pytest
import torch
from helpers import assert_epochs_are_finite
from sbi.inference import NPE
from sbi.neural_nets import embedding_nets, posterior_nn
from sbi.neural_nets.embedding_nets import (
    CNNEmbedding,
    CausalCNNEmbedding,
    FCEmbedding,
    LRUEmbedding,
    PermutationInvariantEmbedding,
    ResNetEmbedding1D,
    ResNetEmbedding2D,
    SpectralConvEmbedding,
    TransformerEmbedding,
)
from sbi.utils import BoxUniform
from torch.distributions import MultivariateNormal

from sbi_jeffreys import JeffreysNPE, NoTracker, check_fit, energy_nn

pytestmark = pytest.mark.filterwarnings("ignore:Maximum number of epochs")

PRIOR = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))

# ------------------------------------------------------------------------- simulators


def features(theta):
    """Twelve features, each a noisy mixture of the parameters."""
    angle = torch.arange(12) * 0.6
    mixed = theta @ torch.stack((angle.cos(), angle.sin()))
    return mixed + 0.5 * torch.randn_like(mixed)


def image(theta):
    """An image of shape (8, 8): a gradient along either axis, as steep as theta."""
    axis = torch.linspace(-1, 1, 8)
    x = theta[:, 0, None, None] * axis + theta[:, 1, None, None] * axis[:, None]
    return x + 0.5 * torch.randn_like(x)


def trials(theta):
    """Ten independent observations of the parameters."""
    return theta.unsqueeze(1) + torch.randn(len(theta), 10, 2)


def series(theta):
    """A time series: level and slope in noise."""
    time = torch.linspace(-1, 1, 16)
    x = theta[:, :1] + theta[:, 1:] * time
    return x + 0.5 * torch.randn_like(x)


def transformer(**kwargs):
    return TransformerEmbedding(
        feature_space_dim=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=1,
        intermediate_size=16,
        final_emb_dimension=8,
        **kwargs,
    )


# Simulator, embedding, and the standard deviation of the best estimate of either
# parameter, by linear regression on the sufficient statistics.
CASES = {
    "fully connected": (
        features,
        lambda: FCEmbedding(12, output_dim=8, num_hiddens=20),
        0.5 / 6**0.5,
    ),
    "CNN of images": (
        image,
        lambda: CNNEmbedding((8, 8), output_dim=8, num_linear_units=20, kernel_size=3),
        0.5 / (8 * torch.linspace(-1, 1, 8).square().sum().item()) ** 0.5,
    ),
    "CNN of series": (
        series,
        lambda: CNNEmbedding((16,), output_dim=8, num_linear_units=20, kernel_size=3),
        0.5 / torch.linspace(-1, 1, 16).square().sum().item() ** 0.5,
    ),
    "permutation invariant": (
        trials,
        lambda: PermutationInvariantEmbedding(
            FCEmbedding(2, output_dim=8, num_hiddens=10, num_layers=1),
            trial_net_output_dim=8,
            num_hiddens=20,
            output_dim=8,
        ),
        10**-0.5,
    ),
    "transformer of series": (
        series,
        transformer,
        0.5 / torch.linspace(-1, 1, 16).square().sum().item() ** 0.5,
    ),
    "transformer of images": (
        lambda theta: image(theta).unsqueeze(1),
        lambda: transformer(vit=True, image_size=8, patch_size=4, num_channels=1),
        None,
    ),
}

# The others of sbi's: whether they train at all, and with how many complex parameters.
OTHERS = {
    "causal CNN of series": (
        series,
        lambda: CausalCNNEmbedding(
            (16,), num_conv_layers=2, pool_kernel_size=4, output_dim=8
        ),
        0,
    ),
    "residual network of features": (
        features,
        lambda: ResNetEmbedding1D(12, 8, n_blocks=2, c_internal=8, c_hidden_final=16),
        0,
    ),
    "residual network of images": (
        lambda theta: image(theta).unsqueeze(1),
        lambda: ResNetEmbedding2D(
            1, 8, c_hidden_fc=16, n_stages=1, blocks_per_stage=[1], c_stages=[4]
        ),
        0,
    ),
    "recurrent units of trials": (
        trials,
        lambda: LRUEmbedding(2, 8, state_dim=4, hidden_dim=8, num_blocks=1),
        2,
    ),
    "spectral convolutions of series": (
        lambda theta: series(theta).unsqueeze(1),
        lambda: SpectralConvEmbedding(1, modes=4, conv_channels=3, num_layers=2),
        3,
    ),
}


def make(theta, x, flow_embedding=None, energy_embedding=None, prior=PRIOR):
    """Return a flow and a proxy with an embedding each, the same one, or none."""
    parts = [
        {} if embedding is None else {"embedding_net": embedding}
        for embedding in (flow_embedding, energy_embedding)
    ]
    # "structured" is NaN for a single channel, in sbi's standardizing net.
    z_score = {2: "independent", 3: "structured"}.get(x.ndim, "none")
    if x.shape[1] == 1:
        z_score = "none"
    inference = JeffreysNPE(
        prior,
        posterior_nn(
            "zuko_maf",
            hidden_features=20,
            num_transforms=2,
            z_score_x=z_score,
            **parts[0],
        ),
        tracker=NoTracker(),
        show_progress_bars=False,
        energy_estimator=energy_nn(20, 1, z_score_x=z_score, **parts[1]),
    )
    return inference.append_simulations(theta, x)


def train(*args, **kwargs):
    """Train what `make` returns."""
    inference = make(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inference.train(**{
            "max_num_epochs": 24,
            "learning_rate": 5e-3,
            "training_batch_size": 100,
            **kwargs,
        })
    return inference


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("name", CASES)
def test_embedding_networks_of_sbi(name, shared):
    simulator, build, best = CASES[name]
    torch.manual_seed(2)
    theta = PRIOR.sample((500,))
    embedding = build()
    other = embedding if shared else build()
    before = [copy.deepcopy(e.state_dict()) for e in (embedding, other)]
    short = {"max_num_epochs": 2} if best is None or not shared else {}
    inference = train(theta, simulator(theta), embedding, other, **short)
    estimator = inference._neural_net
    assert estimator.shares_parameters is shared
    # Both learn: that of the flow from the flow, that of the proxy from the proxy.
    for part, state in zip((embedding, other), before, strict=True):
        moved = [
            (value - state[key]).abs().max() > 1e-4
            for key, value in part.state_dict().items()
            if value.is_floating_point() and value.numel()
        ]
        assert sum(moved) > len(moved) / 2
    ids = [{id(p) for p in m.parameters()} for m in (estimator.flow, estimator.proxy)]
    for part, own in ((embedding, ids[0]), (other, ids[1])):
        assert {id(p) for p in part.parameters()} <= own
    # Observations with and without the batch's dimension, one and many.
    theta_o = 0.6 * PRIOR.sample((40,))
    x_o = simulator(theta_o)
    for sample_with in ("direct", "refined"):
        posterior = inference.build_posterior(sample_with=sample_with)
        samples = posterior.sample_batched((50,), x_o, show_progress_bars=False)
        assert samples.shape == (50, 40, 2)
        assert samples.isfinite().all()
        if not short:
            error = (samples.mean(0) - theta_o).square().mean().sqrt().item()
            assert error < best + 0.3  # the prior alone would leave 0.7
        one = posterior.sample((5,), x=x_o[:1], show_progress_bars=False)
        assert one.shape == (5, 2)
        assert posterior.log_prob(one, x=x_o[:1]).isfinite().all()
    check = check_fit(inference, x_o[0])
    assert "embedding" in check.p_values


def test_all_embedding_networks_of_sbi_are_tried():
    kinds = {
        value
        for value in vars(embedding_nets).values()
        if isinstance(value, type) and issubclass(value, torch.nn.Module)
    }
    tried = {type(case[1]()) for case in (*CASES.values(), *OTHERS.values())}
    assert len(kinds) >= 9
    assert kinds <= tried


@pytest.mark.parametrize("name", OTHERS)
def test_other_embedding_networks_of_sbi(name, tmp_path):
    simulator, build, num_complex = OTHERS[name]
    torch.manual_seed(3)
    theta = PRIOR.sample((200,))
    x = simulator(theta)
    embedding = build()
    embedding(x[:3])  # some layers learn their size from the first input
    before = copy.deepcopy(embedding.state_dict())
    inference = train(theta, x, embedding, embedding, max_num_epochs=2)
    assert sum(p.is_complex() for p in embedding.parameters()) == num_complex
    # All that learns has learnt, complex parameters in both their parts.
    for key, parameter in embedding.named_parameters():
        moved = (parameter - before[key]).detach()
        parts = [moved.real, moved.imag] if moved.is_complex() else [moved]
        assert all(part.abs().max() > 1e-5 for part in parts), key
    assert_epochs_are_finite(inference.summary)
    x_o = x[:3]
    for sample_with in ("direct", "refined"):
        posterior = inference.build_posterior(sample_with=sample_with)
        samples = posterior.sample_batched((20,), x_o, show_progress_bars=False)
        assert samples.shape == (20, 3, 2)
        assert samples.isfinite().all()
    # Through a file, and on from where the training ended.
    inference.save(tmp_path / "training.pt")
    num_epochs = len(inference.summary["stage"])
    embedding = build()
    loaded = make(theta, x, embedding, embedding).load(tmp_path / "training.pt")
    for each in (inference, loaded):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            each.train(resume_training=True, max_num_epochs=4)
    states = [each._neural_net.state_dict() for each in (inference, loaded)]
    # Bounds that there are none of are NaN.
    torch.testing.assert_close(*states, rtol=0, atol=0, equal_nan=True)
    assert len(loaded.summary["stage"]) > num_epochs


@pytest.mark.parametrize("simulations", [True, False])
def test_many_outputs_enter_by_their_embedding_alone(simulations, tmp_path):
    """Their regression would take minutes."""
    torch.manual_seed(5)
    theta = PRIOR.sample((150,))
    x = theta.repeat(1, 550) + torch.randn(150, 1100)
    inference = train(theta, x, FCEmbedding(1100, 5), FCEmbedding(1100, 5))
    net = inference._neural_net.proxy.net
    assert net.features(x).shape == (150, 0)
    # Its coordinates are then those of the parameters alone.
    z = net.coordinates.standardize(theta)
    u = net.coordinates.residual(z, net.features(x))
    assert torch.allclose(torch.cov(u.T), torch.eye(2), atol=0.05)
    inference.save(tmp_path / "training.pt", simulations=simulations)
    loaded = make(theta, x, FCEmbedding(1100, 5), FCEmbedding(1100, 5))
    loaded.load(tmp_path / "training.pt")
    states = [each._neural_net.state_dict() for each in (inference, loaded)]
    torch.testing.assert_close(*states, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 4, 3), (2, 1, 2, 2)])
def test_x_of_any_shape(shape):
    # The flow needs one for more than one dimension, as in NPE; the proxy flattens.
    theta = PRIOR.sample((120,))
    x = theta[:, :1].reshape(-1, *[1] * len(shape)) + torch.randn(120, *shape)
    embedding = torch.nn.Sequential(
        torch.nn.Flatten(1), torch.nn.Linear(x[0].numel(), 4)
    )
    inference = train(theta, x, embedding, None, max_num_epochs=2)
    assert inference._neural_net.condition_shape == shape
    for sample_with in ("direct", "refined"):
        posterior = inference.build_posterior(sample_with=sample_with)
        for x_o in (x[:1], x[0]):
            samples = posterior.sample((4,), x=x_o, show_progress_bars=False)
            assert samples.shape == (4, 2)
        batched = posterior.sample_batched((4,), x[:5], show_progress_bars=False)
        assert batched.shape == (4, 5, 2)


@pytest.mark.parametrize("flow", ["maf", "nsf", "zuko_maf"])
def test_one_parameter(flow):
    prior = MultivariateNormal(torch.zeros(1), torch.eye(1))
    theta = prior.sample((1000,))
    inference = JeffreysNPE(
        prior,
        posterior_nn(flow, hidden_features=20, num_transforms=2),
        tracker=NoTracker(),
        show_progress_bars=False,
        energy_estimator=energy_nn(20, 1),
    )
    x = theta + 0.5 * torch.randn(1000, 1)
    inference.append_simulations(theta, x)
    inference.train(max_num_epochs=40, learning_rate=1e-2, training_batch_size=100)
    for sample_with in ("direct", "refined"):
        posterior = inference.build_posterior(sample_with=sample_with)
        samples = posterior.sample(
            (2000,), x=torch.ones(1, 1), show_progress_bars=False
        )
        assert samples.shape == (2000, 1)
        assert samples.mean().item() == pytest.approx(0.8, abs=0.2)
        assert samples.std().item() == pytest.approx(0.2**0.5, abs=0.15)


def test_a_hundred_parameters():
    prior = MultivariateNormal(torch.zeros(100), torch.eye(100))
    theta = prior.sample((500,))
    x = theta + torch.randn(500, 100)
    theta_o = prior.sample((200,))
    x_o = theta_o + torch.randn(200, 100)
    losses = {}
    for cls in (NPE, JeffreysNPE):
        torch.manual_seed(1)
        networks = {
            "density_estimator": posterior_nn(
                "zuko_nice", hidden_features=50, num_transforms=2
            )
        }
        if cls is JeffreysNPE:
            networks["energy_estimator"] = energy_nn(50, 1)
        inference = cls(
            prior, tracker=NoTracker(), show_progress_bars=False, **networks
        )
        inference.append_simulations(theta, x)
        estimator = inference.train(max_num_epochs=8, training_batch_size=100)
        with torch.no_grad():
            losses[cls] = estimator.loss(theta_o, x_o).mean().item()
    # In nats, of 141. Of 500 simulations neither learns much of a hundred parameters.
    assert losses[JeffreysNPE] < losses[NPE] + 3
    assert_epochs_are_finite(inference.summary)
    for sample_with in ("direct", "refined"):
        posterior = inference.build_posterior(sample_with=sample_with)
        samples = posterior.sample_batched((20,), x_o[:5], show_progress_bars=False)
        assert samples.shape == (20, 5, 100)
        assert samples.isfinite().all()
        assert posterior.log_prob(samples[:, 0], x=x_o[:1]).isfinite().all()


# --------------------------------------------------------------------- discrete columns


@pytest.mark.parametrize(
    ("column", "is_discrete"),
    [
        (lambda n: torch.randint(2, (n,)).float(), True),
        (lambda n: torch.randint(200, (n,)).float(), True),
        (lambda n: torch.randint(4, (n,)) / 8, True),
        (lambda n: torch.randint(10_000_000, (n,)).float(), False),
        (lambda n: 1e12 * torch.rand(n), False),  # all integers to a float
        (lambda n: 1000 + torch.rand(n), False),  # few floats between
        (lambda n: (100 * torch.rand(n)).round() / 100, False),  # rounded
        (lambda n: torch.rand(n // 10).repeat(10), False),  # simulated ten times
        (lambda n: torch.randn(n), False),
    ],
)
def test_discrete_columns_of_theta(column, is_discrete):
    theta = torch.stack((torch.randn(500), column(500)), 1)
    inference = JeffreysNPE(tracker=NoTracker(), show_progress_bars=False)
    inference.append_simulations(theta, torch.randn(500, 2))
    if is_discrete:
        with pytest.raises(ValueError, match=r"Column\(s\) \[1\].*discrete.*MNPE"):
            inference.train()
    else:
        inference.get_dataloaders()  # columns are judged here, without a training


def test_a_few_simulations_are_not_called_discrete():
    inference = JeffreysNPE(tracker=NoTracker(), show_progress_bars=False)
    inference.append_simulations(torch.randn(3, 2), torch.randn(3, 2))
    inference.get_dataloaders()
