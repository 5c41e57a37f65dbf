"""The stages of training: which of the two models learns, and from what."""

from enum import Enum


class Stage(Enum):
    """The flow first, then the proxy, then both.

    Each stage ends when its models have not improved on validation simulations for
    `stop_after_epochs`, and the next begins with the best of them. A proxy that learns
    while the flow is still poor gets its partition function from samples that miss it,
    and grows where nothing samples it; and a flow that follows a poor proxy is dragged
    away. Against a trained flow that stands still the proxy learns from one set of
    samples, drawn once, at the price of its own small network.
    """

    FLOW = "flow"
    PROXY = "proxy"
    JOINT = "joint"

    @property
    def trains_flow(self) -> bool:
        """Whether the flow learns."""
        return self is not Stage.PROXY

    @property
    def trains_proxy(self) -> bool:
        """Whether the proxy learns."""
        return self is not Stage.FLOW

    @property
    def next(self) -> "Stage":
        """The stage that follows, the last one after itself."""
        return {Stage.FLOW: Stage.PROXY}.get(self, Stage.JOINT)
