r"""What the Jeffreys objective is measured against, with the same networks.

- `NormalizingFlow`: maximum likelihood, $\min_p \mathrm{KL}(\pi \Vert p)$.
- `EnergyModel`: the energy-based model alone, $\min_q \mathrm{KL}(\pi \Vert q)$, with
  its partition function by importance sampling from the base measure, or with samples
  of persistent Langevin chains in its gradient [1].
- `WassersteinGAN`: a flow as generator, with a critic under a gradient penalty [2].

All hold back a tenth of the samples for validation, as sbi does, take Adam and clip
gradients at 5.

[1] Y. Du and I. Mordatch, "Implicit Generation and Modeling with Energy-Based Models",
NeurIPS 2019.
[2] I. Gulrajani et al., "Improved Training of Wasserstein GANs", NeurIPS 2017.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.clip_grad import clip_grad_norm_

from sbi_jeffreys.density import gaussian_of
from sbi_jeffreys.energy import ConditionalEnergy
from sbi_jeffreys.flow import rsample_and_log_prob
from tasks.density.networks import Networks

OnEpoch = Callable[[int], None]
CLIP_NORM = 5.0
VALIDATION_FRACTION = 0.1
# Samples behind the partition function of an energy-based model that is scored.
NUM_PARTITION_SAMPLES = 10_000


@dataclass
class Training:
    """How long and how fast to train.

    Attributes:
        epochs: Number of epochs; nothing stops earlier.
        batch_size: Samples of a step.
        learning_rate: Of Adam.
    """

    epochs: int
    batch_size: int
    learning_rate: float


class Baseline(ABC):
    """A density model without conditions.

    Args:
        networks: Sizes of the networks.
        training: How to train.
    """

    def __init__(self, networks: Networks, training: Training) -> None:
        self.networks = networks
        self.training = training
        self.condition = torch.zeros(1, 1)

    @abstractmethod
    def log_prob(self, theta: Tensor) -> Tensor:
        """Return log densities of shape `(num,)`."""

    @abstractmethod
    def sample(self, num_samples: int) -> Tensor:
        """Return samples of shape `(num_samples, dim)`."""

    @abstractmethod
    def build(self, theta: Tensor, x: Tensor) -> None:
        """Build networks and optimisers."""

    @abstractmethod
    def step(self, theta: Tensor) -> None:
        """Take one training step on a batch."""

    @abstractmethod
    def train(self, mode: bool) -> None:
        """Put the networks into training or evaluation mode."""

    def end_epoch(self) -> None:  # noqa: B027
        """Do what is due after an epoch."""

    def log_partition(self) -> float:
        """Return the log partition function, NaN where there is no energy."""
        return math.nan

    def fit(self, theta: Tensor, on_epoch: OnEpoch) -> "Baseline":
        """Fit to samples of shape `(num, dim)`.

        Args:
            theta: The samples.
            on_epoch: Called after every epoch with its number, from 0.
        """
        order = torch.randperm(len(theta))
        num_training = int((1 - VALIDATION_FRACTION) * len(theta))
        training = theta[order[:num_training]]
        #: Samples that the model is not fitted to.
        self.validation = theta[order[num_training:]]
        self.build(theta, torch.zeros(len(theta), 1))
        for epoch in range(self.training.epochs):
            self.train(True)
            for batch in self._batches(training):
                self.step(batch)
            self.train(False)
            with torch.no_grad():
                self.end_epoch()
                on_epoch(epoch)
        return self

    def _batches(self, theta: Tensor) -> Iterator[Tensor]:
        size = min(self.training.batch_size, len(theta))
        order = torch.randperm(len(theta))
        for start in range(0, len(theta) - size + 1, size):
            yield theta[order[start : start + size]]

    def _descend(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        """Take one step, unless its gradient is not finite."""
        parameters = optimizer.param_groups[0]["params"]
        optimizer.zero_grad()
        loss.backward()
        if torch.isfinite(clip_grad_norm_(parameters, CLIP_NORM)):
            optimizer.step()


class NormalizingFlow(Baseline):
    """The flow by maximum likelihood."""

    def build(self, theta: Tensor, x: Tensor) -> None:
        self.flow = self.networks.build_flow(theta, x)
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.flow.parameters(), self.training.learning_rate)

    def train(self, mode: bool) -> None:
        self.flow.train(mode)

    def log_prob(self, theta: Tensor) -> Tensor:
        return self.flow.log_prob(theta.unsqueeze(1), self.condition)[:, 0]

    def sample(self, num_samples: int) -> Tensor:
        return self.flow.sample(torch.Size((num_samples,)), self.condition)[:, 0]

    def step(self, theta: Tensor) -> None:
        self._descend(self.optimizer, -self.log_prob(theta).mean())


class WassersteinGAN(NormalizingFlow):
    r"""A Wasserstein GAN whose generator is the flow, so that it has a density.

    .. math:: \max_f \; \mathbb{E}_\pi f - \mathbb{E}_p f - \gamma \,
        \mathbb{E} (\lVert \nabla f \rVert - 1)^2, \qquad \max_p \mathbb{E}_p f

    Args:
        networks: Sizes of the networks; the critic is the energy's network.
        training: How to train; an epoch has as many generator steps as batches.
        num_critic_steps: Steps of the critic for one of the generator.
        gradient_penalty: $\gamma$.
    """

    def __init__(
        self,
        networks: Networks,
        training: Training,
        num_critic_steps: int = 3,
        gradient_penalty: float = 10.0,
    ) -> None:
        super().__init__(networks, training)
        self.num_critic_steps = num_critic_steps
        self.gradient_penalty = gradient_penalty

    def _optimizer(self) -> torch.optim.Optimizer:
        return self._adam(self.flow)

    def _adam(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        # The exponents of [2]: momentum makes a game of two players unstable.
        rate = self.training.learning_rate
        return torch.optim.Adam(model.parameters(), rate, betas=(0.5, 0.9))

    def build(self, theta: Tensor, x: Tensor) -> None:
        super().build(theta, x)
        build_critic = self.networks.energy(dropout=0.0)
        self.critic = build_critic(theta, x, gaussian_of(theta))
        self.critic_optimizer = self._adam(self.critic)

    def train(self, mode: bool) -> None:
        super().train(mode)
        self.critic.train(mode)

    def step(self, theta: Tensor) -> None:
        with torch.no_grad():  # the generator stands still: one pass for all steps
            samples = self.sample(self.num_critic_steps * len(theta))
        for generated in samples.chunk(self.num_critic_steps):
            self._descend(self.critic_optimizer, self._critic_loss(theta, generated))
        generated = rsample_and_log_prob(self.flow, len(theta), self.condition)[0]
        self._descend(self.optimizer, -self.critic(generated, self.condition).mean())

    def _critic_loss(self, theta: Tensor, generated: Tensor) -> Tensor:
        share = torch.rand(len(theta), 1)
        between = (share * theta + (1 - share) * generated).requires_grad_()
        f = self.critic(
            torch.stack((theta, generated, between)).flatten(0, 1).unsqueeze(1),
            self.condition,
        ).reshape(3, -1)
        (slope,) = torch.autograd.grad(f[2].sum(), between, create_graph=True)
        norm = (slope.square().sum(-1) + 1e-12).sqrt()
        penalty = (norm - 1).square().mean()
        return f[1].mean() - f[0].mean() + self.gradient_penalty * penalty


class EnergyModel(Baseline):
    r"""The energy-based model $q = b \exp f / Z$ alone, on a Gaussian $b$.

    Args:
        networks: Sizes of the networks.
        training: How to train.
        sampler: `"importance"` estimates $\log Z$ from eight samples of $b$ for every
            sample of the batch; `"langevin"` follows the gradient of $\mathbb{E}_\pi f
            - \mathbb{E}_q f$ with samples of persistent chains.
        num_steps: Langevin steps of every chain before a training step.
        step_size: Langevin step in units of the samples' spread.
    """

    def __init__(
        self,
        networks: Networks,
        training: Training,
        sampler: Literal["importance", "langevin"] = "importance",
        num_steps: int = 10,
        step_size: float = 0.1,
    ) -> None:
        super().__init__(networks, training)
        self.sampler = sampler
        self.num_steps = num_steps
        self.step_size = step_size

    def build(self, theta: Tensor, x: Tensor) -> None:
        build_energy = self.networks.energy()
        self.energy: ConditionalEnergy = build_energy(theta, x, gaussian_of(theta))
        self.scale = theta.std(0)
        self.optimizer = torch.optim.Adam(
            self.energy.parameters(), self.training.learning_rate
        )
        self.chains = self.energy.base.sample(self.training.batch_size, 1)[:, 0]

    def train(self, mode: bool) -> None:
        self.energy.train(mode)

    def log_prob(self, theta: Tensor) -> Tensor:
        x = self.condition
        return self.energy.log_prob(
            theta.unsqueeze(1), x, num_samples=NUM_PARTITION_SAMPLES
        )[:, 0]

    def log_partition(self) -> float:
        """Return log Z."""
        partition = self.energy.log_partition(
            self.condition, num_samples=NUM_PARTITION_SAMPLES
        )
        return partition.value.item()

    def sample(self, num_samples: int) -> Tensor:
        """Return samples by resampling the base measure's with the weights exp f."""
        theta = self.energy.base.sample(20 * num_samples, 1)
        log_weights = self.energy(theta, self.condition)[:, 0]
        index = torch.multinomial(log_weights.softmax(0), num_samples, replacement=True)
        return theta[index, 0]

    def step(self, theta: Tensor) -> None:
        data = self.energy(theta.unsqueeze(1), self.condition)
        if self.sampler == "importance":
            log_partition = self.energy.log_partition(
                self.condition, num_samples=8 * len(theta)
            )
            loss = log_partition.value.mean() - data.mean()
        else:
            self._walk()
            f = self.energy(self.chains.unsqueeze(1), self.condition)
            # The small square keeps f where Langevin steps are of use, as in [1].
            squares = f.square().mean() + data.square().mean()
            loss = f.mean() - data.mean() + 1e-3 * squares
        self._descend(self.optimizer, loss)

    def _walk(self) -> None:
        """Move the chains by Langevin steps; restart one of twenty."""
        fresh = self.energy.base.sample(len(self.chains), 1)[:, 0]
        restart = torch.rand(len(fresh), 1) < 0.05
        theta = torch.where(restart, fresh, self.chains)
        step = self.step_size * self.scale
        for _ in range(self.num_steps):
            theta.requires_grad_()
            log_q = self.energy.log_unnormalized(theta.unsqueeze(1), self.condition)
            (slope,) = torch.autograd.grad(log_q.sum(), theta)
            noise = torch.randn_like(theta)
            theta = (theta + 0.5 * step**2 * slope + step * noise).detach()
        self.chains = theta
