"""Plots of a training, in the manner of sbi: they return figure and axes."""

from typing import Any, Mapping, Sequence, Tuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart. Flow, proxy and
# coupling have the same one in every plot.
FLOW, PROXY, COUPLING = "#0072B2", "#D55E00", "#009E73"


def plot_training(
    summary: Mapping[str, Sequence[float]],
    fig_kwargs: Mapping[str, Any] = {"figsize": (13, 3.4)},  # noqa: B006
) -> Tuple[Figure, np.ndarray]:
    r"""Plot the dynamics of a training: divergences, dual variables, proxy.

    The first axes hold the forward divergences of both models, dashed on training and
    solid on validation simulations; the second the reverse divergence; the third the
    dual variables with the trust in the proxy; the fourth the partition function and
    the effective sample size of its estimate.

    Args:
        summary: `JeffreysNPE.summary` of a trained inference object.
        fig_kwargs: Keywords of `matplotlib.pyplot.subplots`.

    Returns:
        Figure and axes.

    Raises:
        ValueError: If the summary holds no epoch, or is not JeffreysNPE's.
    """
    if not summary.get("validation_proxy_forward_kl"):
        raise ValueError(
            "The summary holds no epoch of JeffreysNPE. Give `inference.summary` of a "
            "trained JeffreysNPE."
        )
    epochs = np.arange(1, len(summary["validation_proxy_forward_kl"]) + 1)
    fig, axes = plt.subplots(1, 4, layout="constrained", **fig_kwargs)

    def line(ax: Axes, name: str, **kwargs: Any) -> None:
        ax.plot(epochs, summary[name], **kwargs)

    line(axes[0], "training_forward_kl", color=FLOW, ls="--", lw=1)
    line(axes[0], "validation_forward_kl", color=FLOW, label="flow, $D_1$")
    line(axes[0], "training_proxy_forward_kl", color=PROXY, ls="--", lw=1)
    line(axes[0], "validation_proxy_forward_kl", color=PROXY, label="proxy, $D_3$")
    axes[0].set_title("Forward KL + entropy")
    axes[0].set_ylabel("nats (dashed: training)")
    # The first epochs, and spikes, must not hide the rest.
    tail = np.concatenate([
        summary["validation_forward_kl"],
        summary["validation_proxy_forward_kl"],
    ])
    low, high = np.nanpercentile(tail, [0, 95])
    axes[0].set_ylim(low - 0.15 * (high - low) - 0.1, high + 0.1)

    line(axes[1], "training_reverse_kl", color=COUPLING, ls="--", lw=1)
    line(axes[1], "validation_reverse_kl", color=COUPLING, label="KL(p ‖ q), $D_2$")
    axes[1].set_title("Reverse KL")
    axes[1].set_ylabel("nats (dashed: training)")

    line(axes[2], "dual_forward_kl", color=FLOW, label=r"$\lambda_1$")
    line(axes[2], "dual_reverse_kl", color=COUPLING, label=r"$\lambda_2$")
    line(axes[2], "dual_proxy_forward_kl", color=PROXY, label=r"$\lambda_3$")
    if np.isfinite(summary["trust"]).any():
        line(axes[2], "trust", color="black", ls=":", label=r"trust $\tau$")
    axes[2].set_title("Dual variables")
    axes[2].set_ylim(bottom=0)

    line(axes[3], "log_partition", color=PROXY, label=r"$\log Z$")
    axes[3].set_title("Partition function")
    axes[3].set_ylabel("nats")
    size = axes[3].twinx()
    size.plot(epochs, summary["effective_sample_size"], color="grey", lw=1, label="ESS")
    size.set_ylabel("effective sample size", color="grey")
    size.set_ylim(bottom=0)

    for ax in axes:
        ax.set_xlabel("epoch")
        ax.spines["top"].set_visible(False)
        # Below the axes, where it hides no curve.
        ax.legend(
            frameon=False,
            fontsize="small",
            ncols=4,
            columnspacing=1,
            handlelength=1.2,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.22),
        )
    return fig, axes
