r"""Moving average of weights, which validation judges and training returns.

.. math:: \bar\phi \leftarrow \gamma_t \bar\phi + (1 - \gamma_t) \phi, \qquad
    \gamma_t = 1 - 1 / \min(n, \max(1, t / 4))

after the $t$-th optimiser step: over the last quarter of them at first, so that the
average does not lag behind a training that has just begun, and over $n$ in the end.
With few simulations an epoch has few steps, each of them noisy, and the weights of any
one epoch are off the middle of the valley by that noise; their average is not, and its
validation loss falls steadily enough that training does not stop at a lucky epoch [1].

[1] P. Izmailov, D. Podoprikhin, T. Garipov, D. Vetrov, A. G. Wilson, "Averaging
Weights Leads to Wider Optima and Better Generalization", UAI 2018.
"""

from contextlib import contextmanager
from typing import Any, Dict, Iterator, List

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
        num_steps: Number of optimiser steps that it reaches back at most, $n \ge 1$;
            with one it is the weights themselves.
    """

    def __init__(self, module: Module, num_steps: int) -> None:
        self._parameters: List[Tensor] = [*module.parameters()]
        self._averages: List[Tensor] = []
        self.restart(num_steps)

    def restart(self, num_steps: int) -> None:
        """Begin anew with the weights as they are.

        Args:
            num_steps: Number of optimiser steps that it reaches back at most from now.
        """
        self._num_steps = num_steps
        self._count = 0
        self._averages = [p.detach().clone() for p in self._parameters]

    def update(self) -> None:
        """Take in the weights after an optimiser step.

        Weights without a gradient have not moved, and are their own average.
        """
        self._count += 1
        decay = 1 - 1 / min(self._num_steps, max(1, self._count / 4))
        moved = [i for i, p in enumerate(self._parameters) if p.grad is not None]
        with torch.no_grad():
            get_ema_multi_avg_fn(decay)(
                [self._averages[index] for index in moved],
                [self._parameters[index] for index in moved],
                None,
            )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the module have the average for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self) -> Dict[str, Any]:
        """Return copies of the averages, in the parameters' order, $n$ and $t$."""
        return {
            "averages": [average.clone() for average in self._averages],
            "num_steps": self._num_steps,
            "count": self._count,
        }

    def load_state(self, state: Dict[str, Any]) -> None:
        """Take what `state` returned, to the device of the module."""
        self._num_steps, self._count = state["num_steps"], state["count"]
        self._averages = [
            average.to(parameter.device, copy=True)
            for average, parameter in zip(
                state["averages"], self._parameters, strict=True
            )
        ]

    def _swap(self) -> None:
        for index, parameter in enumerate(self._parameters):
            weights = parameter.data
            parameter.data = self._averages[index]
            self._averages[index] = weights
