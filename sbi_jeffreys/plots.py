"""Plots of trainings and posteriors, in sbi's manner: they return figure and axes.

Of a training (`plot_training`), of both models' densities at an observation
(`plot_densities`), of several posteriors over each other (`plot_corner`), of their
calibration (`plot_calibration`) and of their C2ST against the number of simulations
(`plot_c2st`). Everything is told apart by line, marker or place as well as by colour,
for print without colours.
"""

from typing import Any, List, Mapping, Optional, Sequence, Tuple, Union

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cbook import normalize_kwargs
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from sbi.analysis import eval_conditional_density, pairplot
from sbi.inference.posteriors.base_posterior import NeuralPosterior
from scipy.stats import kstwo
from torch import Tensor

from sbi_jeffreys.estimator import JeffreysEstimator
from sbi_jeffreys.posterior import RefinedPosterior

# Okabe and Ito's colours, which the colour-blind can tell apart. Flow, proxy and
# coupling have the same one in every plot.
FLOW, PROXY, COUPLING = "#0072B2", "#D55E00", "#009E73"
# Of posteriors in the order in which they are given.
COLORS = (FLOW, PROXY, COUPLING, "#E69F00", "#CC79A7", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")
# Of marked points, which lie on all of these.
_MARKED = ("black", "0.5")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# In points: what is smaller cannot be read.
_SMALLEST_FONT = 5.0


def plot_training(
    summary: Mapping[str, Sequence[float]],
    fig_kwargs: Optional[Mapping[str, Any]] = None,
    plot_kwargs: Optional[Mapping[str, Any]] = None,
) -> Tuple[Figure, np.ndarray]:
    r"""Plot the dynamics of a training: divergences, dual variables, proxy.

    The first axes hold the forward divergences of both models, dashed on training and
    solid on validation simulations, those of the proxy with dots; the second the
    reverse divergence; the third the dual variables with the trust in the proxy; the
    fourth the partition function and, dashed, the effective sample size of its
    estimate. Grey vertical lines are where one stage ends and the next begins. The
    names of the stages are above the first axes: in their order, each over its stage
    where there is room.

    Args:
        summary: `JeffreysNPE.summary` of a trained inference object.
        fig_kwargs: Keywords of `matplotlib.pyplot.subplots`.
        plot_kwargs: Keywords of `matplotlib.axes.Axes.plot` for all curves, such as
            `{"alpha": 0.7}`, in the place of those that a curve has by itself.

    Returns:
        Figure and axes.

    Raises:
        TypeError: If the summary is no mapping.
        ValueError: If the summary holds no epoch, or is not JeffreysNPE's.
    """
    _check_mapping("summary", summary, "inference.summary")
    if not summary.get("validation_proxy_forward_kl"):
        raise ValueError(
            "The summary holds no epoch of JeffreysNPE. Give `inference.summary` of a "
            "trained JeffreysNPE."
        )
    epochs = np.arange(1, len(summary["validation_proxy_forward_kl"]) + 1)
    defaults = {"figsize": (13, 3.4), "layout": "constrained"}
    fig, axes = plt.subplots(1, 4, **{**defaults, **(fig_kwargs or {})})

    def line(ax: Axes, name: str, **kwargs: Any) -> None:
        ax.plot(epochs, summary[name], **_line_style(kwargs, plot_kwargs))

    dots = {"marker": "o", "ms": 3, "markevery": max(1, len(epochs) // 15)}
    line(axes[0], "training_forward_kl", color=FLOW, ls="--", lw=1)
    line(axes[0], "validation_forward_kl", color=FLOW, label="flow, $D_1$")
    line(axes[0], "training_proxy_forward_kl", color=PROXY, ls="--", lw=1, **dots)
    line(
        axes[0],
        "validation_proxy_forward_kl",
        color=PROXY,
        label="proxy, $D_3$",
        **dots,
    )
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
    line(axes[2], "dual_reverse_kl", color=COUPLING, ls="--", label=r"$\lambda_2$")
    line(axes[2], "dual_proxy_forward_kl", color=PROXY, ls="-.", label=r"$\lambda_3$")
    if np.isfinite(summary["trust"]).any():
        line(axes[2], "trust", color="black", ls=":", label=r"trust $\tau$")
    axes[2].set_title("Dual variables")
    axes[2].set_ylabel("weight")
    axes[2].set_ylim(bottom=0)

    line(axes[3], "log_partition", color=PROXY, label=r"$\log Z$")
    axes[3].set_title("Partition function")
    axes[3].set_ylabel("nats")
    size = axes[3].twinx()
    line(size, "effective_sample_size", color="0.4", ls="--", lw=1)
    size.set_ylabel("effective sample size (dashed)", color="0.4")
    size.set_ylim(bottom=0)

    stages = list(summary.get("stage", ()))
    starts = [i for i in range(1, len(stages)) if stages[i] != stages[i - 1]]
    names = []
    if stages and len(starts) <= 3:  # of one training there is room for the names
        firsts, ends = (0, *starts), (*starts, len(stages))
        names = [
            axes[0].text(
                (first + 1 + end) / 2,
                1.01,
                stages[first],
                transform=axes[0].get_xaxis_transform(),
                ha="center",
                va="bottom",
                color="0.4",
                fontsize="small",
                # The title keeps the room above the axes. Beside them there is to be
                # none: the names do not stay where they are before `_spread`.
                in_layout=False,
            )
            for first, end in zip(firsts, ends, strict=True)
        ]
    for ax in axes:
        for start in starts:
            ax.axvline(start + 0.5, color="0.8", lw=0.8, zorder=0)
        ax.set_title(ax.get_title(), pad=16)  # above the names of the stages
        ax.set_xlabel("epoch")
        ax.set_xlim(0, len(epochs) + 1)
        ax.spines["top"].set_visible(False)
        # Below the axes, where it hides no curve.
        ax.legend(
            frameon=False,
            fontsize="small",
            ncols=4,
            columnspacing=1,
            handlelength=2.2,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.22),
        )
    # The layout is made for the ticks that the axes have before it. Those of the
    # smaller axes may be wider, and would be cut off without a second one.
    fig.draw_without_rendering()
    _spread(axes[0], names)
    return fig, axes


def plot_densities(
    posterior: NeuralPosterior,
    x_o: Tensor,
    limits: Optional[Union[Sequence[Sequence[float]], Tensor]] = None,
    dims: Tuple[int, int] = (0, 1),
    condition: Optional[Tensor] = None,
    points: Optional[Tensor] = None,
    labels: Optional[Sequence[str]] = None,
    levels: Sequence[float] = (0.5, 0.9),
    resolution: int = 100,
    fig_kwargs: Optional[Mapping[str, Any]] = None,
    contour_kwargs: Optional[Mapping[str, Any]] = None,
) -> Tuple[Figure, np.ndarray]:
    r"""Plot the densities of flow and proxy at an observation beside each other.

    Both are evaluated on the same grid and normalised there, so that neither has an
    error of sampling. Shades are densities on one scale; the lines bound the smallest
    regions that hold the masses `levels`.

    With more than two parameters it is the density of two of them given all others,
    not their marginal: $p(\theta_i, \theta_j \mid \theta_{\setminus ij}, x)$.

    Args:
        posterior: What `JeffreysNPE.build_posterior` returns, with
            `sample_with="refined"` or without.
        x_o: One observation.
        limits: Lower and upper limit of every parameter, `(num_parameters, 2)`. If not
            given, those of the central samples of flow and posterior and a margin,
            and of the points.
        dims: The two parameters.
        condition: Values of the others, `(num_parameters,)`; those at `dims` are not
            used. The median of the posterior's samples if not given.
        points: Parameters to be marked, such as the true ones, `(num,
            num_parameters)` or `(num_parameters,)`.
        labels: Names of all parameters.
        levels: Masses between 0 and 1.
        resolution: Number of grid points in either direction.
        fig_kwargs: Keywords of `matplotlib.pyplot.subplots`.
        contour_kwargs: Keywords of `matplotlib.axes.Axes.contour` for the lines, such
            as `{"linestyles": ["--", "-"]}`, from the outer line to the inner.

    Returns:
        Figure and the axes of flow and proxy.

    Raises:
        TypeError: If the posterior is not of a `JeffreysNPE`.
        ValueError: If there are fewer than two parameters, if `dims`, `condition` or
            `points` are not of these, or if a model has no density within the limits.
    """
    estimator = getattr(posterior, "posterior_estimator", None)
    if not isinstance(estimator, JeffreysEstimator):
        raise TypeError(
            "The densities of flow and proxy are those of a posterior that "
            f"JeffreysNPE.build_posterior returned, got {type(posterior).__name__}. "
            "Use sample_with='direct' or 'refined'."
        )
    num = estimator.input_shape.numel()
    if num < 2:
        raise ValueError(
            "The densities of a single parameter are no plane. Draw samples of it with "
            'plot_corner({"flow": samples, "refined": refined_samples}).'
        )
    if any(not -num <= d < num for d in dims) or len({d % num for d in dims}) != 2:
        raise ValueError(
            f"Two different parameters of {num} are needed, from 0 to {num - 1}; got "
            f"dims={tuple(dims)}."
        )
    first, second = (d % num for d in dims)
    marked = None if points is None else _rows("points", points, num)
    prior = posterior.prior  # type: ignore[attr-defined]  # as those two have one
    models = {
        name: RefinedPosterior(estimator, prior, exponent)
        for name, exponent in (("flow", 0.0), ("proxy", 1.0))
    }
    if limits is None or condition is None:
        samples = posterior.sample((1000,), x=x_o, show_progress_bars=False)
        condition = samples.median(0).values if condition is None else condition
        if limits is None:
            # Both models are normalised within the limits: a flow that is wider than
            # the refined samples would look narrower than it is.
            of_flow = models["flow"].sample((1000,), x=x_o)
            limits = _limits([samples.cpu(), of_flow.cpu()], marked)
    limits = torch.as_tensor(limits)
    condition = _rows("condition", condition, num).float()
    if len(condition) != 1:
        raise ValueError(f"One condition is needed, got {len(condition)}.")

    densities = []
    for name, model in models.items():
        model.set_default_x(x_o)
        density = eval_conditional_density(
            _Unnormalised(model), condition, limits, first, second, resolution
        ).cpu()
        if not density.sum() > 0:
            raise ValueError(
                f"The {name} has no density within the limits {limits.tolist()}."
            )
        densities.append(density / density.sum())

    defaults = {
        "figsize": (8, 3.8),
        "layout": "constrained",
        "sharex": True,
        "sharey": True,
    }
    fig, axes = plt.subplots(1, 2, **{**defaults, **(fig_kwargs or {})})
    grid = [
        np.linspace(float(limits[d, 0]), float(limits[d, 1]), resolution)
        for d in (first, second)
    ]
    top = max(density.max().item() for density in densities)
    names = _names(num) if labels is None else labels
    for ax, density, title, cmap in zip(
        axes,
        densities,
        (r"flow $p(\theta \mid x_o)$", r"proxy $q(\theta \mid x_o)$"),
        ("Blues", "Oranges"),
        strict=True,
    ):
        ax.pcolormesh(
            *grid,
            density,
            cmap=cmap,
            vmin=0,
            vmax=top,
            shading="nearest",
            rasterized=True,
        )
        thresholds = sorted({_threshold(density, mass) for mass in levels})
        lines: dict[str, Any] = {"colors": "black", "linewidths": 0.8}
        lines.update(contour_kwargs or {})
        ax.contour(*grid, density, levels=thresholds, **lines)
        if marked is not None:
            ax.plot(marked[:, first], marked[:, second], "k+", ms=10, mew=2)
        ax.set_title(title)
        ax.set_xlabel(names[first])
        ax.label_outer()
    axes[0].set_ylabel(names[second])
    return fig, axes


def plot_corner(
    samples: Mapping[str, Union[Tensor, np.ndarray]],
    points: Optional[Union[Tensor, np.ndarray, List]] = None,
    limits: Optional[Union[List, Tensor]] = None,
    labels: Optional[List[str]] = None,
    levels: Sequence[float] = (0.5, 0.9),
    colors: Sequence[str] = COLORS,
    bins: int = 100,
    figsize: Optional[Tuple[float, float]] = None,
    **kwargs: Any,
) -> Tuple[Figure, np.ndarray]:
    """Plot several posteriors over each other: marginals of one and two parameters.

    `sbi.analysis.pairplot` with names for the posteriors, a legend, and contours and
    lines that are told apart without colours.

    Example:
    --------

    ::

        plot_corner({"NPE": samples_npe, "refined": samples}, points=theta_true)

    Args:
        samples: Samples of every posterior by its name, `(num, num_parameters)`, the
            same parameters for all.
        points: Parameters to be marked, `(num, num_parameters)`, or a list of such.
        limits: Limits of every parameter, `(num_parameters, 2)`; those of all samples
            but for outliers, and of the points, if not given.
        labels: Names of the parameters.
        levels: Masses within the contours, between 0 and 1.
        colors: Colours of the posteriors.
        bins: Number of points in every direction at which densities are estimated.
        figsize: Size of the figure.
        **kwargs: Further arguments of `pairplot`. A mapping as `upper_kwargs`,
            `lower_kwargs` or `diag_kwargs` is added to what every posterior gets here,
            such as `{"bw_method": 0.1}` for narrow modes; a list takes its place.

    Returns:
        Figure and axes, as `pairplot`.

    Raises:
        TypeError: If the samples have no names.
        ValueError: If there are no samples, or samples of different parameters.
    """
    _check_mapping("samples", samples, '{"flow": samples}')
    shapes = {name: tuple(part.shape) for name, part in samples.items()}
    if len({shape[1:] for shape in shapes.values()}) != 1 or any(
        len(shape) != 2 for shape in shapes.values()
    ):
        raise ValueError(
            "samples must be (num, num_parameters), with the same parameters for every "
            f"posterior; got {shapes}."
        )
    styles = [
        (colors[i % len(colors)], LINES[i % len(LINES)]) for i in range(len(samples))
    ]
    num = next(iter(shapes.values()))[1]
    size = max(4.0, 2.2 * num)
    options: dict[str, Any] = {"upper": "contour", "diag": "kde", **kwargs}
    for place in ("upper", "lower", "diag"):
        kinds, given = options.get(place), options.get(f"{place}_kwargs")
        if kinds is None or not isinstance(given, Mapping | None):
            continue
        if isinstance(kinds, str):
            kinds = [kinds] * len(styles)
        options[f"{place}_kwargs"] = [
            _corner_kwargs(place, kind, *style, bins, sorted(levels), given or {})
            for kind, style in zip(kinds, styles, strict=True)
        ]
    sets = [] if points is None else points
    sets = sets if isinstance(sets, list) else [sets]
    fig_kwargs = {
        "points_colors": [_MARKED[i % len(_MARKED)] for i in range(len(sets))],
        "points_diag": {"linewidth": 0.8},
        "points_offdiag": {"marker": "+", "markersize": 10},
        "fig_subplots_adjust": {"top": 0.97, "right": 0.97},
        **(options.pop("fig_kwargs", None) or {}),
    }
    # sbi leaves samples with NaN out; it cannot be asked for limits without outliers.
    parts = [torch.as_tensor(part).cpu() for part in samples.values()]
    # Quantiles are of single or double precision alone.
    parts = [p if p.dtype == torch.float64 else p.float() for p in parts]
    parts = [part[part.isfinite().all(1)] for part in parts]
    empty = [
        name for name, part in zip(samples, parts, strict=True) if not part.numel()
    ]
    if empty:
        raise ValueError(f"No finite samples of {', '.join(empty)}.")
    marked = [_rows("points", part, num) for part in sets]
    if limits is None:
        limits = _limits(parts, torch.cat(marked) if marked else None).tolist()
    fig, axes = pairplot(
        parts,
        points=points,
        limits=limits,
        labels=_names(num) if labels is None else labels,
        figsize=(size, size) if figsize is None else figsize,
        fig_kwargs=fig_kwargs,
        **options,
    )
    handles = [
        Line2D([], [], color=color, ls=line, label=name)  # type: ignore[arg-type]
        for name, (color, line) in zip(samples, styles, strict=True)
    ]
    fig.legend(handles=handles, loc="lower left", frameon=False)
    return fig, np.asarray(axes)  # type: ignore[return-value]


def plot_calibration(
    ranks: Optional[Mapping[str, Union[Tensor, np.ndarray]]] = None,
    coverage: Optional[Mapping[str, Tuple[Tensor, Tensor]]] = None,
    num_posterior_samples: Optional[int] = None,
    num_simulations: Optional[int] = None,
    labels: Optional[Sequence[str]] = None,
    confidence: float = 0.95,
    fig_kwargs: Optional[Mapping[str, Any]] = None,
    styles: Optional[Mapping[str, Mapping[str, Any]]] = None,
) -> Tuple[Figure, np.ndarray]:
    r"""Plot how well several posteriors are calibrated: SBC and expected coverage.

    For every parameter the distribution function of its ranks (simulation-based
    calibration [1]), and after them the expected coverage of credible regions
    (TARP [2]). A calibrated posterior is on the diagonal. The grey band holds the
    whole curve of one with probability `confidence` (Kolmogorov's test).

    Ranks above the diagonal and then below it, an S: too many true parameters lie at
    the ends of the posterior. It is too narrow, or fills the space between modes at its
    ends. Below and then above: too wide. All above: the parameter is overestimated; all
    below: underestimated. Of the expected coverage it is the right half that tells:
    below the diagonal too narrow, or biased; above it too wide.

    Example:
    --------

    ::

        posteriors = {
            "flow": inference.build_posterior(),
            "refined": inference.build_posterior(sample_with="refined"),
        }
        ranks = {k: run_sbc(theta, x, p)[0] for k, p in posteriors.items()}
        coverage = {k: run_tarp(theta, x, p) for k, p in posteriors.items()}
        plot_calibration(ranks, coverage, num_posterior_samples=1000)  # run_sbc's

    Args:
        ranks: Ranks of every posterior by its name, the first that
            `sbi.diagnostics.run_sbc` returns, `(num_simulations, num_parameters)`.
        coverage: Expected coverage and credibility levels, what
            `sbi.diagnostics.run_tarp` returns.
        num_posterior_samples: Number of samples among which the ranks are, as
            `run_sbc` was given it; needed with ranks.
        num_simulations: Number of simulations behind `coverage`, for its band; that of
            the ranks if not given.
        labels: Names of the parameters.
        confidence: Probability that a calibrated posterior is within the band.
        fig_kwargs: Keywords of `matplotlib.pyplot.subplots`.
        styles: Keywords of `matplotlib.axes.Axes.plot` for posteriors by their names,
            in the place of the colour and line that it would get by its place.

    Returns:
        Figure and axes, one for each parameter and one for the coverage.

    Raises:
        TypeError: If ranks or coverage have no names.
        ValueError: If there is nothing to plot, if ranks are of different shapes, not
            from 0 to `num_posterior_samples` or come without, or if `confidence` is not
            between 0 and 1.

    [1] S. Talts et al., "Validating Bayesian Inference Algorithms with Simulation-Based
    Calibration", arXiv:1804.06788.

    [2] P. Lemos et al., "Sampling-Based Accuracy Testing of Posterior Estimators for
    General Inference", ICML 2023.
    """
    _check_mapping("ranks", {} if ranks is None else ranks, '{"flow": ranks}')
    _check_mapping(
        "coverage", {} if coverage is None else coverage, '{"flow": (ecp, alpha)}'
    )
    tables = {k: np.asarray(v, dtype=float) for k, v in (ranks or {}).items()}
    if not tables and not coverage:
        raise ValueError("Nothing to plot: give ranks, coverage or both.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}.")
    shapes = {name: table.shape for name, table in tables.items()}
    if len(set(shapes.values())) > 1 or any(len(s) != 2 for s in shapes.values()):
        raise ValueError(
            "ranks must be (num_simulations, num_parameters), the same for every "
            f"posterior; got {shapes}."
        )
    if tables:
        # It cannot be told from the ranks, as the largest may not be reached.
        if num_posterior_samples is None:
            raise ValueError(
                "Ranks need num_posterior_samples, the number of samples among which "
                "they are. Give the number that run_sbc was given, or its default, "
                "1000."
            )
        for name, table in tables.items():
            if not ((table >= 0) & (table <= num_posterior_samples)).all():
                raise ValueError(
                    f"Ranks are from 0 to num_posterior_samples={num_posterior_samples}"
                    f"; those of {name} are from {table.min():g} to {table.max():g}. "
                    "Give run_sbc's ranks, and the number that it was given."
                )
        tables = {name: t / num_posterior_samples for name, t in tables.items()}
    num_runs, num_parameters = next(iter(shapes.values()), (None, 0))
    num_panels = num_parameters + bool(coverage)
    num_columns = min(num_panels, 4)
    num_rows = -(-num_panels // num_columns)
    defaults = {
        "figsize": (0.4 + 2.6 * num_columns, 0.4 + 2.6 * num_rows),
        "layout": "constrained",
    }
    fig, grid = plt.subplots(
        num_rows, num_columns, squeeze=False, **{**defaults, **(fig_kwargs or {})}
    )
    axes = grid.ravel()[:num_panels]
    for ax in grid.ravel()[num_panels:]:
        ax.set_visible(False)
    names: List[str] = list(dict.fromkeys([*tables, *(coverage or {})]))
    style = {
        name: _line_style(
            {
                "color": COLORS[i % len(COLORS)],
                "linestyle": LINES[i % len(LINES)],
                "label": name,
            },
            (styles or {}).get(name),
        )
        for i, name in enumerate(names)
    }
    for i in range(num_parameters):
        name = (_names(num_parameters) if labels is None else labels)[i]
        _diagonal(axes[i], num_runs, confidence)
        axes[i].set_xlabel(f"rank of {name}, as a share")
        axes[i].set_ylabel("share of simulations")
        for method, table in tables.items():
            # Not sbi's sbc_rank_plot: its bins end at the smallest and largest rank
            # that were seen, which hides ends that the posterior never reaches.
            values = np.sort(table[:, i])
            steps = np.concatenate(([0.0], values, [1.0]))
            shares = np.append(np.arange(len(values) + 1) / len(values), 1.0)
            axes[i].step(steps, shares, where="post", **style[method])
    if coverage:
        ax = axes[-1]
        _diagonal(ax, num_simulations or num_runs, confidence)
        ax.set_xlabel("credibility level")
        ax.set_ylabel("expected coverage")
        for method, (ecp, alpha) in coverage.items():
            ax.plot(_values(alpha), _values(ecp), **style[method])
    for ax in axes:
        ax.set(xlim=(0, 1), ylim=(0, 1), box_aspect=1)
    handles = {}
    for ax in axes:
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    fig.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
    )
    return fig, axes


def plot_c2st(
    c2st: Mapping[str, Mapping[int, Union[float, Sequence[float], np.ndarray, Tensor]]],
    ax: Optional[Axes] = None,
    styles: Optional[Mapping[str, Mapping[str, Any]]] = None,
    fig_kwargs: Optional[Mapping[str, Any]] = None,
) -> Tuple[Figure, Axes]:
    r"""Plot C2ST of several methods against the number of simulations.

    Markers are means over the seeds, bars their standard deviation; of a single seed
    there is no bar. The line at 0.5 is where a classifier cannot tell a posterior from
    the reference.

    Example:
    --------

    ::

        plot_c2st({
            "one method": {1_000: [0.71, 0.74, 0.70], 10_000: [0.62, 0.60, 0.63]},
            "another": {1_000: [0.77, 0.78, 0.80], 10_000: [0.57, 0.58, 0.57]},
        })

        fig, axes = plt.subplots(1, 2, sharey=True)  # a panel for each simulator
        for ax, (name, c2st) in zip(axes, results.items()):
            plot_c2st(c2st, ax=ax)
            ax.set_title(name)
        axes[0].legend()

    Args:
        c2st: C2ST of every method by its name and the number of simulations: one value
            for each seed, or a number. See `sbi_jeffreys.metrics.c2st`.
        ax: Axes to draw into, to which no legend is added. If not given, those of a new
            figure with a legend.
        styles: Keywords of `matplotlib.axes.Axes.errorbar` for methods by their names,
            in the place of the colour, line and marker that it would get by its place.
        fig_kwargs: Keywords of `matplotlib.pyplot.subplots`.

    Returns:
        Figure and axes.

    Raises:
        TypeError: If values have no names, or no numbers of simulations.
        ValueError: If a method has no values, or there is none, if values are not
            finite, or if numbers of simulations are not positive.
    """
    _check_mapping("c2st", c2st, '{"NPE": {1_000: [0.7, 0.8]}}')
    for name, by_budget in c2st.items():
        _check_mapping(f"c2st[{name!r}]", by_budget, "{1_000: [0.7, 0.8]}")
    curves = {
        name: {num: _values(part) for num, part in sorted(by_budget.items())}
        for name, by_budget in c2st.items()
    }
    empty = [k for k, v in curves.items() if not v or not all(map(len, v.values()))]
    if empty or not curves:
        raise ValueError(f"Nothing to plot: no C2ST of {', '.join(empty) or 'any'}.")
    for name, curve in curves.items():
        for num, values in curve.items():
            if num <= 0 or not np.isfinite(values).all():
                raise ValueError(
                    "C2ST must be finite, and numbers of simulations positive, or they "
                    f"are in no plot; got c2st[{name!r}][{num}] = {values.tolist()}."
                )
    defaults = {"figsize": (5, 3.8), "layout": "constrained"}
    axes: Axes = (
        plt.subplots(**{**defaults, **(fig_kwargs or {})})[1] if ax is None else ax
    )
    axes.axhline(0.5, color="0.8", lw=1, zorder=0)
    for i, (name, curve) in enumerate(curves.items()):
        style = _line_style(
            {
                "color": COLORS[i % len(COLORS)],
                "linestyle": LINES[i % len(LINES)],
                "marker": MARKERS[i % len(MARKERS)],
                "capsize": 2,
                "label": name,
            },
            (styles or {}).get(name),
        )
        means = [values.mean() for values in curve.values()]
        # NaN is no bar: one of length zero would say that seeds agree.
        spread = [v.std(ddof=1) if len(v) > 1 else np.nan for v in curve.values()]
        bars = spread if np.isfinite(spread).any() else None
        axes.errorbar(list(curve), means, yerr=bars, **style)
    axes.set_xscale("log")
    lowest = min(v.mean() for curve in curves.values() for v in curve.values())
    bottom = min(0.48, lowest - 0.02)
    if not axes.get_autoscaley_on():  # of a panel that shares its axis with others
        bottom = min(bottom, axes.get_ylim()[0])
    axes.set_ylim(bottom, 1.02)
    axes.set_xlabel("simulations")
    axes.set_ylabel("C2ST (0.5 is perfect)")
    if ax is None:
        axes.legend(frameon=False)
    return axes.figure, axes  # type: ignore[return-value]


def _names(num: int) -> List[str]:
    """Return the names of parameters that have none."""
    return [rf"$\theta_{{{i + 1}}}$" for i in range(num)]


def _check_mapping(name: str, value: object, example: str) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name} must be a mapping, such as {example}; got {type(value).__name__}."
        )


def _line_style(
    style: Mapping[str, Any], given: Optional[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return a line's keywords, with those that were given in their place."""
    # By their full names: matplotlib refuses `lw` beside `linewidth`.
    parts = (normalize_kwargs(dict(part or {}), Line2D) for part in (style, given))
    return {key: value for part in parts for key, value in part.items()}


def _spread(ax: Axes, names: Sequence[Text], gap: float = 6.0) -> None:
    """Move texts along the axes by as little as keeps them from each other.

    They keep their order, and stay between the ends of the axes: smaller, where those
    are too narrow for all, and beyond the right end where not even that is enough.

    Args:
        ax: The axes, with a layout that has been made. The place of the texts along
            them is in data coordinates.
        names: The texts, centred, from left to right.
        gap: Space between two of them, in points.
    """
    space = gap * ax.figure.dpi / 72
    left, right = ax.get_window_extent().intervalx
    free = right - left - space * (len(names) - 1)
    total = sum(name.get_window_extent().width for name in names)
    if total > free:
        for name in names:
            # Widths follow the size of a font only nearly: glyphs are set on pixels.
            share = 0.95 * max(free, 0) / total
            name.set_fontsize(max(share * float(name.get_fontsize()), _SMALLEST_FONT))
    halves = [name.get_window_extent().width / 2 for name in names]
    right = max(right, left + 2 * sum(halves) + space * (len(names) - 1))
    to_pixels = ax.transData
    places = [to_pixels.transform((name.get_position()[0], 0))[0] for name in names]
    for order, sign, end in ((1, 1, left), (-1, -1, right)):  # from either end
        for i in range(len(names))[::order]:
            least = end + sign * halves[i]
            places[i] = max(places[i], least) if sign > 0 else min(places[i], least)
            end = places[i] + sign * (halves[i] + space)
    for name, place in zip(names, places, strict=True):
        name.set_x(to_pixels.inverted().transform((place, 0))[0])


class _Unnormalised:
    """A density known up to a constant, as `eval_conditional_density` asks for it."""

    def __init__(self, posterior: RefinedPosterior) -> None:
        self.posterior = posterior

    def log_prob(self, theta: Tensor) -> Tensor:
        # In parts, which bounds the memory of a large network.
        return torch.cat([
            self.posterior.log_prob(part, norm_posterior=False)
            for part in theta.split(10_000)
        ])


def _values(
    values: Union[float, Sequence[float], np.ndarray, Tensor],
) -> np.ndarray:
    """Return one value or several as a vector."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
    return np.atleast_1d(np.asarray(values, dtype=float)).ravel()


def _limits(parts: Sequence[Tensor], points: Optional[Tensor] = None) -> Tensor:
    """Return limits that hold nearly all samples and the points.

    Outliers would leave the rest in a corner.

    Args:
        parts: Samples of several posteriors, `(num, num_parameters)`.
        points: Of shape `(num, num_parameters)`.

    Returns:
        Of shape `(num_parameters, 2)`.
    """
    lows, highs = [], []
    for samples in parts:
        low, high = samples.quantile(torch.tensor([0.005, 0.995]).to(samples), 0)
        margin = 0.15 * (high - low)
        lows.append(torch.maximum(low - margin, samples.min(0).values))
        highs.append(torch.minimum(high + margin, samples.max(0).values))
    limits = torch.stack((torch.stack(lows).amin(0), torch.stack(highs).amax(0)), 1)
    if points is None:
        return limits
    # A marker on the edge is cut in half.
    margin = 0.05 * (limits[:, 1] - limits[:, 0])
    first, last = points.amin(0), points.amax(0)
    low = torch.where(first < limits[:, 0], first - margin, limits[:, 0])
    high = torch.where(last > limits[:, 1], last + margin, limits[:, 1])
    return torch.stack((low, high), 1)


def _rows(name: str, values: Any, num_parameters: int) -> Tensor:
    """Return parameters as `(num, num_parameters)`, or say that they are not."""
    rows = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if rows.ndim not in (1, 2) or rows.shape[-1] != num_parameters:
        raise ValueError(
            f"{name} must hold {num_parameters} parameters, in shape (num, "
            f"{num_parameters}) or ({num_parameters},); got {tuple(rows.shape)}."
        )
    return torch.atleast_2d(rows)


def _corner_kwargs(
    place: str,
    kind: Optional[str],
    color: str,
    line: str,
    bins: int,
    levels: List[float],
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the keywords of one posterior in one place of a corner plot.

    Args:
        place: One of "diag", "upper", "lower".
        kind: How it is drawn there, as `pairplot` calls it.
        color: Its colour.
        line: Its line.
        bins: Number of points in every direction of densities.
        levels: Masses within contours.
        given: The user's keywords.
    """
    kwargs: dict[str, Any] = {}
    if kind in ("kde", "contour"):
        kwargs["bins"] = bins
    if kind == "contour":
        kwargs["levels"] = levels
        mpl_kwargs: dict[str, Any] = {"colors": [color], "linestyles": [line]}
    elif kind in ("scatter", "bar"):
        mpl_kwargs = {"color": color}
    else:  # pictures off the diagonal have no colour
        mpl_kwargs = {"color": color, "linestyle": line} if place == "diag" else {}
    mpl_kwargs |= given.get("mpl_kwargs", {})
    return {**kwargs, **given, "mpl_kwargs": mpl_kwargs}


def _threshold(density: Tensor, mass: float) -> float:
    """Return the density above which there is the share `mass` of the grid."""
    ordered = density.flatten().sort(descending=True).values
    index = torch.searchsorted(ordered.cumsum(0), mass * ordered.sum())
    return ordered[index.clamp(max=len(ordered) - 1)].item()


def _diagonal(ax: Axes, num: Optional[int], confidence: float) -> None:
    """Draw what a calibrated posterior is expected to give."""
    ax.axline((0, 0), slope=1, color="0.4", lw=0.8, zorder=0)
    if num is None:
        return
    # Kolmogorov's distance, which no point of the curve exceeds.
    width = float(kstwo.ppf(confidence, num))
    line = np.linspace(0, 1, 201)
    ax.fill_between(
        line,
        (line - width).clip(0),
        (line + width).clip(max=1),
        color="0.88",
        zorder=-1,
        label=f"calibrated, {100 * confidence:g} %",
    )
