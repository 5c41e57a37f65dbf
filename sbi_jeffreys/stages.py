"""The stages of training: which of the two models learns, and from what."""

from enum import Enum
from typing import Optional


class Stage(Enum):
    r"""The flow first, then the proxy, then the flow again, now from the proxy too.

    Each stage lowers the same Lagrangian over one of the two models, while the other
    stands still:

    - `FLOW`: $\lambda_1 \mathrm{KL}(\pi \Vert p)$ over the flow. There is no proxy to
      follow yet.
    - `PROXY`: $\lambda_2 \mathrm{KL}(p \Vert q) + \lambda_3 \mathrm{KL}(\pi \Vert q)$
      over the proxy, with one set of the flow's samples for all epochs.
    - `DISTILLATION`: $\lambda_1 \mathrm{KL}(\pi \Vert p) + \lambda_2 \beta \tau \,
      [\mathrm{KL}(p \Vert q) + \mathrm{KL}(q \Vert p)]$ over the flow.

    Each ends when its model has not improved on validation simulations for
    `stop_after_epochs`, and the next begins with the best of it. A proxy that learns
    beside a poor flow gets its partition function from samples that miss it, and a flow
    that follows a poor proxy is dragged away.
    """

    FLOW = "flow"
    PROXY = "proxy"
    DISTILLATION = "distillation"

    @property
    def trains_flow(self) -> bool:
        """Whether the flow learns."""
        return self is not Stage.PROXY

    @property
    def trains_proxy(self) -> bool:
        """Whether the proxy learns."""
        return self is Stage.PROXY

    @property
    def next(self) -> Optional["Stage"]:
        """The stage that follows, `None` after the last."""
        following = {Stage.FLOW: Stage.PROXY, Stage.PROXY: Stage.DISTILLATION}
        return following.get(self)
