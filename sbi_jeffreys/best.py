"""A model at its best on validation simulations."""

from typing import Any, Dict, NamedTuple


class Best(NamedTuple):
    """A model as it was in its best epoch.

    Flow, proxy and surrogates need not be at their best in the same epoch. In files it
    is a plain tuple.

    Attributes:
        score: What epochs are compared by; lower is better.
        epoch: The epoch.
        state: The state of the module then.
        loss: Its validation loss.
    """

    score: float
    epoch: int
    state: Dict[str, Any]
    loss: float
