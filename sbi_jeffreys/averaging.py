r"""Moving average of weights, which validation judges and training returns.

.. math:: \bar\phi \leftarrow \gamma \bar\phi + (1 - \gamma) \phi, \qquad
    \gamma = 1 - 1 / n

after every optimiser step. With few simulations an epoch has few steps, each of them
noisy, and the weights of any one epoch are off the middle of the valley by that noise;
their average is not, and its validation loss falls steadily enough that training does
not stop at a lucky epoch [1].

[1] P. Izmailov, D. Podoprikhin, T. Garipov, D. Vetrov, A. G. Wilson, "Averaging
Weights Leads to Wider Optima and Better Generalization", UAI 2018.
"""

from contextlib import contextmanager
from typing import Iterator, List, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    r"""Exponential moving average of a module's parameters.

    Buffers are not averaged: running statistics of normalisation layers are moving
    averages by themselves.

    Args:
        module: The module that learns.
        num_steps: Number of optimiser steps that the average reaches back, $n \ge 1$;
            with one it is the weights themselves.
    """

    def __init__(self, module: Module, num_steps: int) -> None:
        self._parameters: List[Tensor] = [*module.parameters()]
        self._update = get_ema_multi_avg_fn(1 - 1 / num_steps)
        self._averages: List[Tensor] = []
        self.restart()

    def restart(self) -> None:
        """Begin anew with the weights as they are."""
        self._averages = [p.detach().clone() for p in self._parameters]

    def update(self) -> None:
        """Take in the weights after an optimiser step."""
        with torch.no_grad():
            self._update(self._averages, self._parameters, None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the module have the average for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self) -> List[Tensor]:
        """Return a copy of the average, in the order of the module's parameters."""
        return [average.clone() for average in self._averages]

    def load_state(self, state: Sequence[Tensor]) -> None:
        """Take the average that `state` returned, to the device of the module."""
        self._averages = [
            average.to(parameter.device, copy=True)
            for average, parameter in zip(state, self._parameters, strict=True)
        ]

    def _swap(self) -> None:
        for index, parameter in enumerate(self._parameters):
            weights = parameter.data
            parameter.data = self._averages[index]
            self._averages[index] = weights
