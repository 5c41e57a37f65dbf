"""What flow, proxy and surrogates lower at a batch of simulations, by stage.

`sbi_jeffreys.objective` has the estimates of the divergences. Here they meet the
simulations of a training: in the first round as they are, in later ones by the losses
of atoms; with samples that serve for many epochs; and on validation simulations with
those that stay for the whole stage.
"""

from dataclasses import dataclass, field
from typing import Callable, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from sbi_jeffreys.atomic import AtomicLosses
from sbi_jeffreys.estimator import JeffreysEstimator
from sbi_jeffreys.likelihood import bounded
from sbi_jeffreys.objective import (
    Divergences,
    JeffreysObjective,
    Proposals,
    ProxySamples,
)
from sbi_jeffreys.partition import LogPartition
from sbi_jeffreys.pooled_energy import PooledEnergy
from sbi_jeffreys.sample_sets import VALIDATION_MULTIPLE, Part, SampleSets

# Of the samples of the proxy that the flow learns from, so many are used in a step.
NUM_PROXY_SAMPLES_PER_STEP = 2
# Of a proxy with surrogates of the likelihood, which is sharper.
NUM_POOLED_SAMPLES_PER_STEP = 4
# Where there are fewer simulations, the flow follows such a proxy at outputs that its
# surrogates imagine, too: so many in all. With two thousand it learns them by heart.
NUM_CONDITIONS = 5000
# The flow takes its step of the reverse divergence, with an inversion and two slopes
# the dearest of all, in every second batch, twice as long.
REVERSE_INTERVAL = 2
NUM_REVERSE_VALIDATION_SAMPLES = 4
# Validation simulations at which the flow's densities are taken at once, as these may
# be very many.
VALIDATION_CHUNK = 100


class Batch(NamedTuple):
    """Simulations of a batch, on the device of the training.

    Attributes:
        theta: Parameters of shape `(batch_dim, *input_shape)`.
        x: Simulation outputs of shape `(batch_dim, *condition_shape)`.
        masks: Whether the parameters are of the prior, as sbi's loaders tell.
        part: What the simulations are for.
        position: Where among the simulations of the part they are, `(batch_dim,)`.
            `None` if it is not known: some loaders do not say.
    """

    theta: Tensor
    x: Tensor
    masks: Tensor
    part: Part
    position: Optional[Tensor]

    def at(self, index: Tensor) -> "Batch":
        """Return the simulations `index` of the batch."""
        position = None if self.position is None else self.position[index.cpu()]
        return Batch(
            self.theta[index], self.x[index], self.masks[index], self.part, position
        )


@dataclass
class Losses:
    r"""The losses of the models of a training.

    Of a batch they have the shape `(batch_dim,)`, if nothing else is said.

    Attributes:
        estimator: Flow and proxy.
        objective: Estimates the divergences.
        samples: The samples of flow and proxy, by part.
        device: The device of the training.
        simulations: Returns parameters and outputs of all simulations of a part.
        kernel: sbi's calibration kernel, the weights of simulations by their outputs.
        atomic: The losses where parameters come from a proposal, else `None`.
        num_training: Number of simulations for training.
        num_judged: Number of validation simulations, the first of them, that the proxy
            is judged by; `None` for all.
    """

    estimator: JeffreysEstimator
    objective: JeffreysObjective
    samples: SampleSets
    device: str
    simulations: Callable[[Part], Tuple[Tensor, Tensor]]
    kernel: Callable[[Tensor], Tensor]
    atomic: Optional[AtomicLosses]
    num_training: int
    num_judged: Optional[int]
    _standing_flow: Optional[Tensor] = field(default=None, init=False)
    _standing_proxy: Optional[Tensor] = field(default=None, init=False)

    def forget_standing(self) -> None:
        """Forget the losses of models that stood still."""
        self._standing_flow = self._standing_proxy = None

    # ------------------------------------------------------------------ in training

    @property
    def num_proxy_samples(self) -> int:
        """Number of samples of the proxy that the flow learns from at every output."""
        if self.estimator.likelihoods is not None:
            return NUM_POOLED_SAMPLES_PER_STEP
        return NUM_PROXY_SAMPLES_PER_STEP

    def of_flow(self, batch: Batch) -> Tensor:
        r"""Return $-\log p(\theta \mid x)$, or the flow's loss of atoms."""
        if self.atomic is None:
            return self.estimator.flow.loss(batch.theta, batch.x)
        return self.atomic.of_flow(batch.theta, batch.x, batch.masks)

    def of_likelihoods(self, batch: Batch, members: Sequence[int]) -> Tensor:
        r"""Return $-\sum_k \log \ell_k(x \mid \theta)$ of some surrogates.

        Args:
            batch: The simulations.
            members: Indices of the surrogates.
        """
        likelihoods = self.estimator.likelihoods
        assert likelihoods is not None
        return likelihoods.losses(batch.theta, batch.x, members).sum(0)

    def of_proxy(self, batch: Batch) -> Divergences:
        """Return the divergences that the proxy lowers."""
        proxy = self.estimator.proxy
        reverse_kl, proxy_forward_kl, log_partition = self.objective.proxy_divergences(
            proxy, batch.theta, batch.x, self._proposals_at(batch)
        )
        if self.atomic is not None:
            proxy_forward_kl = self.atomic.of_proxy(batch.theta, batch.x)
        return Divergences(None, reverse_kl, proxy_forward_kl, log_partition)

    def of_following_flow(
        self, batch: Batch, weight: float, with_reverse_kl: bool
    ) -> Tuple[Divergences, Tensor]:
        """Return what the flow lowers when it learns from the proxy, too.

        Args:
            batch: The simulations.
            weight: The weight of the divergences of the models from each other.
            with_reverse_kl: Whether this step takes the reverse divergence.

        Returns:
            The divergence from the simulations, and those of the models from each
            other, weighted, also by the calibration kernel.
        """
        if weight == 0:
            forward_kl = self.of_flow(batch)
            return Divergences(forward_kl), torch.zeros_like(forward_kl)
        (flow, proxy), objective = self.estimator.models, self.objective
        if self.estimator.likelihoods is not None:
            forward_kl = self.of_flow(batch)
            x, samples = self._proxy_samples_anywhere(batch)
            drawn = samples.subset(self.num_proxy_samples)
            of_models = objective.forward_kl_to_proxy(flow, x, drawn)
            return Divergences(forward_kl), weight * self.kernel(x) * of_models
        samples = self._proxy_samples_at(batch)
        drawn = samples.subset(self.num_proxy_samples)
        if self.atomic is None:
            forward_kl, of_models = objective.forward_kls_of_flow(
                flow, batch.theta, batch.x, drawn
            )
        else:
            forward_kl = self.of_flow(batch)
            of_models = objective.forward_kl_to_proxy(flow, batch.x, drawn)
        if with_reverse_kl:
            reverse_kl = objective.reverse_kl_of_flow(
                flow, proxy, batch.x, samples.log_partition
            )
            of_models = of_models + REVERSE_INTERVAL * reverse_kl
        return Divergences(forward_kl), weight * self.kernel(batch.x) * of_models

    # -------------------------------------------------------- on validation simulations

    def is_judged(self, batch: Batch) -> Tensor:
        """Return which simulations of a batch the proxy is judged by."""
        if batch.position is None or self.num_judged is None:
            return torch.ones(len(batch.theta), dtype=torch.bool)
        return batch.position < self.num_judged

    def of_standing_flow(self, batch: Batch) -> Tensor:
        """Return `of_flow` of a flow that stands still, taken once for many epochs.

        Atoms are others in every epoch.
        """
        if batch.position is None or self.atomic is not None:
            return self.of_flow(batch)
        if self._standing_flow is None:
            self._standing_flow = self.of_flow_on_validation()
        return self._standing_flow[batch.position]

    @torch.no_grad()
    def of_flow_on_validation(self) -> Tensor:
        r"""Return $-\log p(\theta \mid x)$ at all validation simulations.

        In their order, of shape `(num_validation_simulations,)`.
        """
        theta, x = self.simulations("validation")
        chunks = zip(
            theta.split(VALIDATION_CHUNK), x.split(VALIDATION_CHUNK), strict=True
        )
        return torch.cat([
            self.estimator.flow.loss(*(part.to(self.device) for part in chunk))
            for chunk in chunks
        ])

    def mean_of_flow_on_validation(self) -> float:
        """Return the mean of `of_flow_on_validation` under the calibration kernel."""
        _, x = self.simulations("validation")
        chunks = x.split(VALIDATION_CHUNK)
        kernels = [self.kernel(chunk.to(self.device)) for chunk in chunks]
        return (torch.cat(kernels) * self.of_flow_on_validation()).mean().item()

    def of_every_likelihood(self, batch: Batch) -> Tensor:
        r"""Return $-\log \ell_k(x \mid \theta)$ of all surrogates, `(K, batch_dim)`."""
        likelihoods = self.estimator.likelihoods
        assert likelihoods is not None
        members = range(len(likelihoods))
        return -bounded(-likelihoods.losses(batch.theta, batch.x, members))

    def of_judged_proxy(self, batch: Batch) -> Divergences:
        """Return `of_proxy` with the partition function's bias taken off."""
        divergences = self.of_proxy(batch)
        forward_kl = divergences.proxy_forward_kl
        log_partition = divergences.log_partition
        if self.atomic is None:
            assert forward_kl is not None and log_partition is not None
            divergences.proxy_forward_kl = (
                forward_kl + log_partition.debiased - log_partition.value
            )
        return divergences

    def of_judged_flow(self, batch: Batch) -> Tuple[Divergences, Tensor]:
        r"""Return the divergences as the flow follows, and $\mathrm{KL}(q \Vert p)$."""
        (flow, proxy), objective = self.estimator.models, self.objective
        samples = self._proxy_samples_at(batch)
        log_z = samples.log_partition
        num_samples = VALIDATION_MULTIPLE * (
            objective.num_flow_samples + objective.num_reference_samples
        )
        divergences = Divergences(
            None,
            objective.reverse_kl(
                flow, proxy, batch.x, log_z, NUM_REVERSE_VALIDATION_SAMPLES
            ),
            self._of_standing_proxy(batch, log_z),
            LogPartition(log_z, samples.effective_sample_size, num_samples),
        )
        return divergences, objective.forward_kl_to_proxy(flow, batch.x, samples)

    def _of_standing_proxy(self, batch: Batch, log_partition: Tensor) -> Tensor:
        """Return the proxy's losses while it stands still, taken once as the flow's."""
        if self.atomic is not None:
            return self.atomic.of_proxy(batch.theta, batch.x)
        if batch.position is None or self.num_judged is None:
            return self._of_proxy_given(log_partition, batch.theta, batch.x)
        if self._standing_proxy is None:
            theta, x = self.simulations("validation")
            self._standing_proxy = self._of_proxy_given(
                self.samples.proxy_samples["validation"].log_partition,
                theta[: self.num_judged].to(self.device),
                x[: self.num_judged].to(self.device),
            )
        return self._standing_proxy[batch.position]

    def _of_proxy_given(
        self, log_partition: Tensor, theta: Tensor, x: Tensor
    ) -> Tensor:
        proxy = self.estimator.proxy
        log_q = proxy.base.extended_log_prob(theta) + proxy(theta[None], x)[0]
        return log_partition - log_q

    # ------------------------------------------------------------------- their samples

    def _proposals_at(self, batch: Batch) -> Proposals:
        """Return the proposal samples of a batch, of a set where it has a place."""
        models = self.estimator.models
        if batch.position is None:
            return self.objective.propose(*models, batch.x)
        return self.samples.proposals_at(
            models, batch.part, batch.position, lambda: self._outputs(batch.part)
        )

    def _proxy_samples_at(self, batch: Batch) -> ProxySamples:
        """Return the samples of the proxy of a batch, as `_proposals_at`."""
        models = self.estimator.models
        if batch.position is None:
            return self.samples.draw_proxy_samples(models, batch.x, batch.part)
        return self.samples.proxy_samples_at(
            models, batch.part, batch.position, lambda: self._outputs(batch.part)
        )

    def _proxy_samples_anywhere(self, batch: Batch) -> Tuple[Tensor, ProxySamples]:
        """Return outputs, as many as of a batch, and samples of the proxy at them.

        Where there are few simulations, outputs that were imagined are among them.
        """
        if self.num_training >= NUM_CONDITIONS:
            return batch.x, self._proxy_samples_at(batch)
        return self.samples.proxy_samples_at_imagined(
            self.estimator.models, len(batch.x), self._imagine
        )

    def _imagine(self) -> Tensor:
        """Return the outputs of all simulations, and such as there might be."""
        proxy = self.estimator.proxy
        assert isinstance(proxy, PooledEnergy)
        weights = proxy.weights[1:]
        if not weights.any():  # none adds to the network, but outputs they have alike
            weights = torch.ones_like(weights)
        theta, x = (part.to(self.device) for part in self.simulations("training"))
        index = torch.randint(len(theta), (NUM_CONDITIONS - len(theta),))
        drawn = proxy.likelihoods.sample(theta[index], x[index], weights)
        return torch.cat((x, drawn))

    def _outputs(self, part: Part) -> Tensor:
        """Return the outputs of the simulations that samples are kept for."""
        _, x = self.simulations(part)
        return x[: self.num_judged] if part == "validation" else x
