"""The stages of training: which of the models learns, and from what."""

from enum import Enum


class Stage(Enum):
    r"""The flow first, then the proxy, then the flow again, now from the proxy too.

    Each stage lowers the same Lagrangian over one of the two models, while the other
    stands still:

    - `FLOW`: $\lambda_1 \mathrm{KL}(\pi \Vert p)$ over the flow. There is no proxy to
      follow yet.
    - `LIKELIHOOD`: $\sum_k \mathbb{E}_\pi[-\log \ell_k(x \mid \theta)]$ over the
      surrogates of the likelihood that the proxy may have as factors, see
      `sbi_jeffreys.likelihood`. Left out where it has none.
    - `PROXY`: $\lambda_2 \mathrm{KL}(p \Vert q) + \lambda_3 \mathrm{KL}(\pi \Vert q)$
      over the proxy's own network, with samples of the flow that serve for several
      epochs. At its end the proxy's factors are weighed, see
      `sbi_jeffreys.pooled_energy`.
    - `DISTILLATION`: $\lambda_1 \mathrm{KL}(\pi \Vert p) + \lambda_2 \beta \tau \,
      [\mathrm{KL}(p \Vert q) + \mathrm{KL}(q \Vert p)]$ over the flow. Where the proxy
      has surrogates of the likelihood, the first term has the weight $1 - \beta \tau$;
      the flow then lowers $\mathrm{KL}(q \Vert p)$ alone, at outputs that the
      surrogates imagine, too, where there are few simulations
      (`sbi_jeffreys.losses.NUM_CONDITIONS`), for 800 steps or fifty epochs, whichever
      are more. Where more than a fifth of its samples lie outside the prior, the last
      candidate takes its place (`sbi_jeffreys.candidates`).

    The preset `"fast"` ends with the proxy.

    Each ends when its model has not improved on validation simulations for
    `stop_after_epochs`, and the next begins with the best of it. Where an epoch has
    more than twenty steps, 400 steps or five epochs without improvement are enough,
    except for a flow that the user has named. Where it has one step, or two, the stages
    after the flow's wait for four times as many epochs, or twice. A proxy that learns
    beside a poor flow gets its partition function from samples that miss it, and a flow
    that follows a poor proxy is dragged away.
    """

    FLOW = "flow"
    LIKELIHOOD = "likelihood"
    PROXY = "proxy"
    DISTILLATION = "distillation"

    @property
    def trains_flow(self) -> bool:
        """Whether the flow learns."""
        return self in (Stage.FLOW, Stage.DISTILLATION)

    @property
    def trains_proxy(self) -> bool:
        """Whether the proxy learns."""
        return self is Stage.PROXY
