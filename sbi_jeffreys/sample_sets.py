"""Samples of flow and proxy that serve for many epochs, at all simulations at once.

The proxy learns with *proposals*, samples of the flow and of the prior, and the flow
follows *samples of the proxy*. While the model that they come from stands still they
need not be drawn in every step: a step takes a few at random from a set of many, whose
densities are known. Those at the validation simulations stay for the whole stage, so
that epochs are compared on the same noise.
"""

from typing import Callable, Dict, Literal, Optional, Tuple

import torch
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from torch import Tensor

from sbi_jeffreys.energy import MAX_AT_ONCE, ConditionalEnergy
from sbi_jeffreys.objective import (
    JeffreysObjective,
    Proposals,
    ProxySamples,
    concatenate,
)
from sbi_jeffreys.pooled_energy import PooledEnergy
from sbi_jeffreys.stages import Stage

# How many times a step's samples each validation simulation has. The partition function
# of few samples has a long tail, and the best of many epochs would be the luckiest.
VALIDATION_MULTIPLE = 8
# The set of proposal samples that the proxy learns with, while the flow stands still,
# holds so many of the flow's for every simulation, from which a step draws at random,
# as long as that does not fill the memory. With fewer the proxy overfits to them, and
# so it does with any that stay for long: its mass goes where there is none. They are
# drawn anew when each has been used about so many times.
NUM_POOL_SAMPLES = 64
MAX_POOL_SIZE = 4_000_000
NUM_PROPOSAL_USES = 5
# Samples of the proxy that the flow learns from are drawn among the proposals that the
# proxy has learnt with. A flow learns its samples by heart: when each has been used so
# many times, others are drawn among twice a step's samples of the flow as it is then.
NUM_PROXY_USES = 8
DISTILLATION_MULTIPLE = 2
NUM_PROXY_SAMPLES = 16
# A proxy with surrogates of the likelihood is sharper than the flow that proposes its
# samples: they are moved, and fewer of them.
NUM_POOLED_PROXY_SAMPLES = 8
NUM_MOVES = 8
NUM_VALIDATION_PROXY_SAMPLES = 16

Models = Tuple[ConditionalDensityEstimator, ConditionalEnergy]
#: Which simulations a set is of.
Part = Literal["training", "validation"]


class SampleSets:
    """The samples at the simulations for training and at those for validation.

    Args:
        objective: Says how many samples a step takes, and draws them.
        device: Where samples are drawn and kept.

    Attributes:
        proposals: Samples of flow and prior, by part.
        proxy_samples: Samples of the proxy, by part.
        imagined: Outputs that those for training are of, `None` if of the simulations.
    """

    def __init__(self, objective: JeffreysObjective, device: str) -> None:
        self._objective = objective
        self._device = device
        self.proposals: Dict[Part, Proposals] = {}
        self.proxy_samples: Dict[Part, ProxySamples] = {}
        self.imagined: Optional[Tensor] = None

    def renew(self, stage: Stage, epoch_of_stage: int, num_per_epoch: int) -> None:
        """Forget, before an epoch of training, what has been used often enough.

        Args:
            stage: The stage of the epoch.
            epoch_of_stage: The number of epochs of the stage before.
            num_per_epoch: Number of samples of the proxy that an epoch uses.
        """
        if epoch_of_stage > 0 and "training" in self.proxy_samples:
            num_in_set = self.proxy_samples["training"].log_prob.numel()
            num_epochs = max(1, NUM_PROXY_USES * num_in_set // num_per_epoch)
            if epoch_of_stage % num_epochs == 0:
                del self.proxy_samples["training"]
                self.imagined = None
        if stage is Stage.PROXY and "training" in self.proposals:
            num_in_set = len(self.proposals["training"].log_ratio)
            num_epochs = NUM_PROPOSAL_USES * num_in_set
            if epoch_of_stage % (num_epochs // self._objective.num_flow_samples) == 0:
                del self.proposals["training"]

    def proposals_at(
        self, models: Models, part: Part, index: Tensor, x: Callable[[], Tensor]
    ) -> Proposals:
        """Return the proposals of a step, or of validation, at some simulations.

        Args:
            models: Flow and proxy.
            part: What the simulations are for.
            index: Which simulations of the part, of shape `(batch_dim,)`.
            x: Returns the outputs of all simulations of the part, at which the set is
                drawn if there is none.
        """
        objective = self._objective
        validates = part == "validation"
        if part not in self.proposals:
            in_set = max(1, NUM_POOL_SAMPLES // objective.num_flow_samples)
            multiple = VALIDATION_MULTIPLE if validates else in_set
            self.proposals[part] = self.draw_proposals(models, x(), multiple)
        proposals = self.proposals[part].at(index)
        if validates:
            return proposals
        return proposals.subset(
            objective.num_flow_samples, objective.num_reference_samples
        )

    def proxy_samples_at(
        self, models: Models, part: Part, index: Tensor, x: Callable[[], Tensor]
    ) -> ProxySamples:
        """Return the samples of the proxy at some simulations.

        The same flow, the one that the stage began with, proposes those at the
        validation simulations in all epochs, so that these are judged alike. Arguments
        as those of `proposals_at`.
        """
        if part not in self.proxy_samples:
            # Used once: the flow that drew them has moved on when the next are needed.
            proposals = self.proposals.pop(part, None)
            samples = self.draw_proxy_samples(models, x(), part, proposals)
            self.proxy_samples[part] = samples
        return self.proxy_samples[part].at(index)

    def proxy_samples_at_imagined(
        self, models: Models, num_conditions: int, imagine: Callable[[], Tensor]
    ) -> Tuple[Tensor, ProxySamples]:
        """Return random outputs of a set, and samples of the proxy at them.

        Args:
            models: Flow and proxy.
            num_conditions: Number of outputs to return.
            imagine: Returns a set, which is taken if there is none.

        Returns:
            Outputs of shape `(num_conditions, *condition_shape)`, and the samples.
        """
        if self.imagined is None:
            self.proposals.pop("training", None)  # they are at other outputs
            imagined = imagine().to(self._device)
            samples = self.draw_proxy_samples(models, imagined, "training")
            self.imagined, self.proxy_samples["training"] = imagined, samples
        index = torch.randint(len(self.imagined), (num_conditions,))
        index = index.to(self._device)
        return self.imagined[index], self.proxy_samples["training"].at(index)

    def draw_proposals(self, models: Models, x: Tensor, multiple: int) -> Proposals:
        """Draw samples of flow and prior.

        Args:
            models: Flow and proxy.
            x: Outputs of shape `(num_simulations, *condition_shape)`.
            multiple: How many times a step's samples, if they do not fill the memory.
        """
        objective = self._objective
        num_samples = objective.num_flow_samples + objective.num_reference_samples
        multiple = min(multiple, max(1, MAX_POOL_SIZE // (num_samples * len(x))))
        num_conditions = max(1, MAX_AT_ONCE // (multiple * num_samples))
        parts = (
            objective.propose(*models, chunk.to(self._device), multiple)
            for chunk in x.split(num_conditions)
        )
        return concatenate(parts, len(x))

    def draw_proxy_samples(
        self,
        models: Models,
        x: Tensor,
        part: Part,
        proposals: Optional[Proposals] = None,
    ) -> ProxySamples:
        """Draw samples of the proxy among proposals.

        Args:
            models: Flow and proxy, of which the proxy stands still.
            x: Outputs of shape `(num_simulations, *condition_shape)`.
            part: What the samples are for.
            proposals: The proposals at `x`; the flow's of now if not given.
        """
        flow, proxy = models
        was_training = flow.training
        flow.eval()
        proxy.eval()
        validates = part == "validation"
        num, num_moves = NUM_PROXY_SAMPLES, 0
        if isinstance(proxy, PooledEnergy):
            num, num_moves = NUM_POOLED_PROXY_SAMPLES, NUM_MOVES
        num = NUM_VALIDATION_PROXY_SAMPLES if validates else num
        if proposals is None:
            multiple = VALIDATION_MULTIPLE if validates else DISTILLATION_MULTIPLE
            proposals = self.draw_proposals(models, x, multiple)
        num_conditions = max(1, MAX_AT_ONCE // len(proposals.theta))
        parts = (
            self._objective.sample_proxy(
                proxy, x[index].to(self._device), proposals.at(index), num, num_moves
            )
            for index in torch.arange(len(x)).split(num_conditions)
        )
        samples = concatenate(parts, len(x))
        flow.train(was_training)
        proxy.eval()  # it stands still, with an embedding net of both
        return samples
