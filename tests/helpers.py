"""What tests share: models with closed forms, and small networks quickly trained."""

import math
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import numpy as np
import torch
from sbi.neural_nets import posterior_nn
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from sbi.utils import BoxUniform
from torch import Tensor, nn
from torch.distributions import Distribution, MultivariateNormal

from sbi_jeffreys import JeffreysNPE, NoTracker, energy_nn
from sbi_jeffreys.base_measure import make_base_measure
from sbi_jeffreys.energy import ConditionalEnergy
from sbi_jeffreys.persistence import PER_TRAINING


class LinearGaussianFlow(ConditionalDensityEstimator):
    r"""$p(\theta \mid x) = N(A x + b, L L^\top)$ with reparametrised samples.

    Args:
        weight: $A$, of shape `(dim_theta, dim_x)`.
        bias: $b$, of shape `(dim_theta,)`.
        scale_tril: $L$, lower triangular, of shape `(dim_theta, dim_theta)`.
    """

    def __init__(self, weight: Tensor, bias: Tensor, scale_tril: Tensor) -> None:
        dim_theta, dim_x = weight.shape
        super().__init__(nn.Module(), torch.Size([dim_theta]), torch.Size([dim_x]))
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())
        self.root = nn.Parameter(scale_tril.detach().clone())

    @property
    def scale_tril(self) -> Tensor:
        return self.root.tril()

    def mean(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias

    def covariance(self) -> Tensor:
        return self.scale_tril @ self.scale_tril.T

    def distribution(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean(x), scale_tril=self.scale_tril)

    def log_prob(self, input: Tensor, condition: Tensor, **kwargs) -> Tensor:
        return self.distribution(condition).log_prob(input)

    def loss(self, input: Tensor, condition: Tensor, **kwargs) -> Tensor:
        return -self.log_prob(input.unsqueeze(0), condition)[0]

    def sample(self, sample_shape: torch.Size, condition: Tensor, **kwargs) -> Tensor:
        return self.distribution(condition).rsample(torch.Size(sample_shape))


class QuadraticEnergy(nn.Module):
    r"""$f(\theta, x) = s - \tfrac12 (\theta - W x - c)^\top P (\theta - W x - c)$.

    With $P = R R^\top$. The Lebesgue measure makes it the Gaussian
    $N(W x + c, P^{-1})$.
    """

    def __init__(self, weight: Tensor, center: Tensor, root: Tensor, shift: float = 0):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.center = nn.Parameter(center.clone())
        self.root = nn.Parameter(root.clone())
        self.shift = nn.Parameter(torch.tensor(float(shift), dtype=weight.dtype))

    def mean(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.center

    def precision(self) -> Tensor:
        return self.root @ self.root.T

    def forward(self, theta: Tensor, x: Tensor) -> Tensor:
        projected = (theta - self.mean(x)) @ self.root
        return self.shift - 0.5 * projected.square().sum(-1)


def gaussian_proxy(
    net: QuadraticEnergy, prior: Optional[MultivariateNormal] = None
) -> ConditionalEnergy:
    """Return the proxy of a quadratic energy, on the prior or on Lebesgue measure."""
    dim_theta, dim_x = net.weight.shape
    theta = torch.randn(500, dim_theta, dtype=net.weight.dtype)
    if prior is not None:
        theta = prior.sample(torch.Size((500,)))
    wide = MultivariateNormal(
        torch.zeros(dim_theta, dtype=net.weight.dtype),
        9 * torch.eye(dim_theta, dtype=net.weight.dtype),
    )
    base = make_base_measure(
        "lebesgue" if prior is None else "prior", prior or wide, theta
    )
    return ConditionalEnergy(net, base, torch.Size([dim_theta]), torch.Size([dim_x]))


def gaussian_proxy_posterior(
    net: QuadraticEnergy, x: Tensor, prior: Optional[MultivariateNormal] = None
) -> tuple[MultivariateNormal, Tensor]:
    r"""Return the normalised `gaussian_proxy` at $x$ and its $\log Z(x)$, exactly."""
    precision, mean = net.precision(), net.mean(x)
    if prior is None:
        q = MultivariateNormal(mean, precision_matrix=precision)
        log_z = net.shift - q.log_prob(mean)
        return q, log_z
    total = precision + prior.precision_matrix
    natural = mean @ precision + prior.precision_matrix @ prior.mean
    q = MultivariateNormal(
        torch.linalg.solve(total, natural.T).T, precision_matrix=total
    )
    # log Z = log b + f - log q at any point.
    log_z = prior.log_prob(mean) + net.shift - q.log_prob(mean)
    return q, log_z


class DistributionFlow(ConditionalDensityEstimator):
    """A fixed distribution as a flow that ignores its condition."""

    def __init__(self, distribution: Distribution, dim_x: int = 1) -> None:
        super().__init__(nn.Linear(1, 1), distribution.event_shape, torch.Size([dim_x]))
        self.distribution = distribution

    def log_prob(self, input: Tensor, condition: Tensor, **kwargs) -> Tensor:
        log_prob = self.distribution.log_prob(input)
        return log_prob.expand(len(input), len(condition))

    def loss(self, input: Tensor, condition: Tensor, **kwargs) -> Tensor:
        return -self.distribution.log_prob(input)

    def sample(self, sample_shape: torch.Size, condition: Tensor, **kwargs) -> Tensor:
        shape = (*sample_shape, len(condition))
        return self.distribution.sample(torch.Size(shape))


def grid(low: float, high: float, num: int, dim: int) -> tuple[Tensor, float]:
    """Return midpoints of a regular grid on a cube, `(num**dim, dim)`, and its cell."""
    width = (high - low) / num
    axis = low + width * (torch.arange(num, dtype=torch.double) + 0.5)
    points = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    return points, width**dim


def log_integral(log_density: Tensor, cell: float) -> Tensor:
    """Return the logarithm of the integral of a density given on a `grid`."""
    return torch.logsumexp(log_density, 0) + math.log(cell)


def mean_and_standard_error(
    estimate: Callable[[], Tensor], repeats: int
) -> tuple[Tensor, Tensor]:
    """Return the mean of independent estimates and its standard error."""
    values = torch.stack([estimate() for _ in range(repeats)])
    return values.mean(0), values.std(0) / math.sqrt(repeats)


def flat_gradient(loss: Tensor, module: nn.Module) -> Tensor:
    """Return the gradient of `loss` to all parameters of a module as one vector."""
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(
        loss, parameters, retain_graph=True, allow_unused=True
    )
    return torch.cat([
        (torch.zeros_like(p) if g is None else g).flatten()
        for p, g in zip(parameters, gradients, strict=True)
    ])


# Of small trainings: two parameters, and two data of them with Gaussian noise.
PRIOR = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
X_O = torch.tensor([[0.5, -0.3]])


def simulator(theta: Tensor) -> Tensor:
    """Return the parameters with noise of standard deviation one half."""
    return theta + 0.5 * torch.randn_like(theta)


def simulate(
    num: int = 120, seed: int = 0, prior: Any = PRIOR
) -> Tuple[Tensor, Tensor]:
    """Return parameters of the prior and their simulations, always the same ones."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    theta = prior.sample((num,))
    return theta, simulator(theta)


def make(prior: Any = PRIOR, **kwargs: Any) -> JeffreysNPE:
    """Return an inference object with small networks; any argument can be replaced."""
    return JeffreysNPE(
        prior,
        **{
            "density_estimator": posterior_nn(
                "maf", hidden_features=8, num_transforms=2
            ),
            "energy_estimator": energy_nn(8, 1, likelihood="auto"),
            "tracker": NoTracker(),
            "show_progress_bars": False,
            **kwargs,
        },
    )


def train(
    inference: JeffreysNPE,
    num_epochs: int = 4,
    data: Optional[Tuple[Tensor, Tensor]] = None,
    seed: int = 1,
    **kwargs: Any,
) -> ConditionalDensityEstimator:
    """Train for a number of epochs, two or more, after appending `data`."""
    if data is not None:
        inference.append_simulations(*data)
    torch.manual_seed(seed)
    np.random.seed(seed)
    kwargs = {"training_batch_size": 40, "learning_rate": 5e-3, **kwargs}
    # sbi's budget is one short, and at least one.
    return inference.train(max_num_epochs=num_epochs - 1, **kwargs)


def parameters(model: nn.Module) -> Tensor:
    """Return a copy of all parameters as one vector."""
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def outcome(inference: JeffreysNPE) -> Dict[str, Any]:
    """Return all that training has made, to be compared bit for bit."""
    summary = {
        name: values
        for name, values in inference.summary.items()
        if name not in ("epoch_durations_sec", *PER_TRAINING)
    }
    return {
        "networks": state_of(inference._neural_net),
        "summary": {name: list(values) for name, values in summary.items()},
        "best": inference.summary["best_validation_loss"][-1],
        "weights": inference.weights.state_dict(),
    }


def assert_equal(a: Any, b: Any, path: str = "") -> None:
    """Values, and all that containers hold, are equal to the bit; NaN is NaN."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{path}/{index}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert identical(a, b), path
    else:
        assert a == b or (math.isnan(a) and math.isnan(b)), path


# What the summary has no values of while a model does not learn yet, or stands still.
TRAINING_METRICS_OF_FLOW = ("training_forward_kl", "training_loss")
TRAINING_METRICS_OF_PROXY = ("training_reverse_kl", "training_proxy_forward_kl")
VALIDATION_METRICS_OF_PROXY = (
    "validation_reverse_kl",
    "validation_proxy_forward_kl",
    "log_partition",
    "effective_sample_size",
)
METRICS_OF_PROXY = TRAINING_METRICS_OF_PROXY + VALIDATION_METRICS_OF_PROXY
METRICS_OF_LIKELIHOOD = ("training_likelihood_loss", "validation_likelihood_loss")
MISSING = {
    "flow": METRICS_OF_PROXY + METRICS_OF_LIKELIHOOD,
    "likelihood": TRAINING_METRICS_OF_FLOW + METRICS_OF_PROXY,
    "proxy": TRAINING_METRICS_OF_FLOW + METRICS_OF_LIKELIHOOD,
    "distillation": TRAINING_METRICS_OF_PROXY + METRICS_OF_LIKELIHOOD,
}


def steps_and_values(
    summary: Mapping[str, List[Any]], name: str
) -> List[Tuple[int, float]]:
    """Return the epochs that have a metric with its values; the others must be NaN."""
    stages, values = summary["stage"], summary[name]
    assert len(values) == len(stages), name
    for stage, value in zip(stages, values, strict=True):
        assert name not in MISSING[stage] or math.isnan(value), (name, stage)
    return [
        (step, value)
        for step, (stage, value) in enumerate(zip(stages, values, strict=True))
        if name not in MISSING[stage]
    ]


def values_of(summary: Mapping[str, List[Any]], name: str) -> List[float]:
    """Return the values of a metric in those epochs that have it."""
    return [value for _, value in steps_and_values(summary, name)]


def interrupt_before(inference: Any, epoch: int) -> None:
    """Let an inference object's training be interrupted, once, before an epoch."""
    train_epoch = inference._train_epoch
    to_come = [epoch]

    def interrupted(*args: Any, **kwargs: Any) -> float:
        if inference.epoch in to_come:
            to_come.clear()
            del inference._train_epoch
            raise KeyboardInterrupt
        return train_epoch(*args, **kwargs)

    inference._train_epoch = interrupted


def state_of(model: nn.Module) -> Dict[str, Tensor]:
    """Return a copy of all parameters and buffers."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def identical(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors are equal to the bit; unlike `torch.equal`, NaN is NaN."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def assert_epochs_are_finite(summary: Mapping[str, List[Any]]) -> None:
    """Every epoch has all metrics of its stage, finite; the others are NaN."""
    for name, values in summary.items():
        if name in ("stage", "epochs_trained"):
            continue
        if name != "best_validation_loss":
            values = values_of(summary, name)
        assert all(map(math.isfinite, values)), (name, values)


class Centered(nn.Module):
    """A layer that learns in passing, as batch normalisation does."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class StatefulEmbedding(nn.Sequential):
    """With parameters, running means and random numbers of its own."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 6), Centered(), nn.SiLU(), nn.Dropout(0.2))
