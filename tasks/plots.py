"""The plots of the report.

Colours are those of Okabe and Ito, which readers with any colour vision tell apart;
methods of one family share a colour. No two have both marker and line in common, for
print without colours.
"""

# pandas' own annotations say of most results that they may be one of several types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

import itertools
import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sbi_jeffreys.plots import plot_c2st

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"

_STYLES = {
    "jeffreys": (VERMILLION, "o", "-"),
    "jeffreys_refined": (VERMILLION, "s", "--"),
    "jeffreys_fast": (VERMILLION, "X", "-"),
    "jeffreys_fast_refined": (VERMILLION, "P", "--"),
    "jeffreys_network": (BLACK, "P", "-"),
    "jeffreys_network_refined": (BLACK, "X", "--"),
    "jeffreys_fixed": (VERMILLION, "^", ":"),
    "npe_nsf": (BLUE, "D", "-"),
    "npe_maf": (BLUE, "v", "--"),
    "npe_mdn": (BLUE, "<", ":"),
    "npe_zuko_nsf": (BLUE, ">", "-."),
    "fmpe": (GREEN, "p", "-"),
    "npse": (GREEN, "h", "--"),
    "nle": (ORANGE, "d", "-"),
    "nre": (PURPLE, "*", "-"),
    "sjeffreys": (SKY, "o", "-."),
    "sjeffreys_refined": (SKY, "s", ":"),
    "snpe": (SKY, "v", "-"),  # an octagon is taken for the circle of sjeffreys
    "snle": (ORANGE, "d", "--"),
    "snre": (PURPLE, "*", "--"),
}
# For methods that a user adds.
_OTHERS = list(itertools.product((BLACK, SKY), "H1234", ("-.", ":")))

# Published curves, drawn thin and grey for comparison.
_PUBLISHED = {"NPE": ("--", "x"), "NLE": (":", "+")}


def not_comparable(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the means of C2ST of other rows, or numbers of samples, than most."""
    is_c2st = (summary["quantity"] == "c2st") & summary["mean"].notna()
    return summary[is_c2st & ~summary["comparable"]]


def c2st_against_budget(
    rows: pd.DataFrame, summary: pd.DataFrame, published: pd.DataFrame
) -> Figure:
    """Return C2ST against the number of simulations, a panel for each task.

    Means that are not comparable have hollow marks.

    Args:
        rows: A result table, see `tasks.results.load`.
        summary: What `tasks.report.summarise` returns of them.
        published: What `tasks.report.published` returns.
    """
    good = rows[rows["status"] == "ok"].dropna(subset=["c2st"])
    # One value for each seed, as in `tasks.report.summarise`.
    seeds = good.groupby(["task", "method", "budget", "seed"])["c2st"].mean()
    theirs = published[published["source"] == "lueckmann2021"]
    styles = {
        f"{method}, published": {
            "linestyle": line,
            "marker": marker,
            "color": "0.5",
            "linewidth": 1,
            "markersize": 4,
        }
        for method, (line, marker) in _PUBLISHED.items()
    } | _styles(good["method"])
    hollow = not_comparable(summary)
    figure, panels = _panels(sorted(good["task"].unique()))
    for task, axes in panels.items():
        curves = {}
        for method in _PUBLISHED:
            of_task = (theirs["task"] == task) & (theirs["method"] == method)
            curve = theirs[of_task].set_index("budget")["c2st_mean"]
            if len(curve):
                curves[f"{method}, published"] = curve.to_dict()
        for method in _styles(good["method"]):
            if (task, method) in seeds:
                by_budget = seeds[task, method].groupby("budget")
                curves[method] = by_budget.apply(np.asarray).to_dict()
        plot_c2st(curves, axes, styles)
        here = hollow[hollow["task"] == task]
        for method, budget, mean in zip(
            here["method"], here["budget"], here["mean"], strict=True
        ):
            axes.plot(
                budget,
                mean,
                marker=styles[method]["marker"],
                color=styles[method]["color"],
                markerfacecolor="white",
                zorder=3,
            )
    _finish(figure, panels)
    return figure


def c2st_against_time(summary: pd.DataFrame) -> Figure:
    """Return C2ST against the seconds of one training, a panel for each task.

    Larger budgets have larger markers; means that are not comparable have hollow ones.

    Args:
        summary: What `tasks.report.summarise` returns.
    """
    means = summary.pivot(
        index=["task", "budget", "method"], columns="quantity", values="mean"
    )
    means = means.dropna(subset=["c2st", "training_seconds"]).reset_index()
    hollow = not_comparable(summary)[["task", "budget", "method"]]
    means = means.merge(hollow.assign(is_hollow=True), how="left")
    figure, panels = _panels(sorted(means["task"].unique()))
    sizes = {
        budget: 25 + 30 * rank
        for rank, budget in enumerate(sorted(means["budget"].unique()))
    }
    for task, axes in panels.items():
        for method, style in _styles(means["method"]).items():
            curve = means[(means["task"] == task) & (means["method"] == method)]
            curve = curve.sort_values("budget")
            axes.plot(
                curve["training_seconds"],
                curve["c2st"],
                style["linestyle"],
                color=style["color"],
                linewidth=1,
            )
            axes.scatter(
                curve["training_seconds"],
                curve["c2st"],
                s=curve["budget"].map(sizes),
                color=style["color"],
                marker=style["marker"],
                label=method,
            )
            # On top of the others, whose marks the legend has.
            some = curve[curve["is_hollow"].notna()]
            axes.scatter(
                some["training_seconds"],
                some["c2st"],
                s=some["budget"].map(sizes),
                color="white",
                edgecolors=style["color"],
                marker=style["marker"],
            )
        budgets = ", ".join(f"{budget:,}" for budget in sizes)
        axes.axhline(0.5, color="0.8", linewidth=1, zorder=0)
        axes.set_xscale("log")
        # They are there where the axis has hardly a decade, and lie on each other.
        axes.tick_params(axis="x", which="minor", labelsize=6)
        axes.set_ylim(0.48, 1.02)
        axes.set_xlabel(f"seconds of one training\n({budgets} simulations)")
        axes.set_ylabel("C2ST (0.5 is perfect)")
    _finish(figure, panels)
    return figure


def paired_differences(
    differences: pd.DataFrame, pairs: pd.DataFrame, reference: str
) -> Figure:
    """Return the difference of C2ST to each peer, a panel for each budget.

    A small mark is one task and seed, tasks in their own rows; the large mark is the
    mean over tasks with its 95 % interval. It is hollow where pairs are missing.

    Args:
        differences: What `tasks.report.paired_differences` returns.
        pairs: What `tasks.report.summarise_pairs` returns.
        reference: The method that the others are compared with.
    """
    budgets = sorted(differences["budget"].unique())
    peers = list(dict.fromkeys(differences["peer"]))
    tasks = sorted(differences["task"].unique())
    height = 1.6 + len(peers) * (0.35 + 0.06 * len(tasks))
    figure = Figure(figsize=(1.5 + 4.5 * len(budgets), height), layout="constrained")
    row = figure.subplots(1, len(budgets), squeeze=False, sharey=True)[0]
    # Ten marks and seven colours: seventy tasks before a pair comes again.
    colors = itertools.cycle((BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION, BLACK))
    marks = itertools.cycle("osD^vP*Xhd")
    styles = dict(zip(tasks, zip(marks, colors, strict=False), strict=False))
    for axes, budget in zip(row, budgets, strict=True):
        axes.axvline(0.0, color="0.6", linewidth=1)
        for place, peer in enumerate(peers):
            axes.axhline(place - 0.15, color="0.9", linewidth=1)
            here = (differences["budget"] == budget) & (differences["peer"] == peer)
            for rank, task in enumerate(tasks):
                values = differences[here & (differences["task"] == task)]
                marker, color = styles[task]
                axes.scatter(
                    values["difference"],
                    np.full(len(values), place + 0.2 + 0.6 * rank / len(tasks)),
                    s=14,
                    marker=marker,
                    color=color,
                    label=task,
                )
            of_peer = pairs[(pairs["budget"] == budget) & (pairs["peer"] == peer)]
            overall = of_peer[of_peer["task"] == "all tasks"]
            overall = of_peer if overall.empty else overall
            if len(overall) == 1:
                line = overall.iloc[0]
                axes.plot(
                    [line["low"], line["high"]], [place, place], color=BLACK, lw=2
                )
                is_whole = line["tasks"] == line["all_tasks"]
                is_whole &= line["rows"] == line["expected"]
                axes.plot(
                    line["mean"],
                    place,
                    "o",
                    color=BLACK,
                    markerfacecolor=BLACK if is_whole else "white",
                    markersize=7,
                    zorder=3,
                )
        axes.set_yticks(range(len(peers)), peers)
        axes.set_ylim(len(peers) - 0.1, -0.2)
        axes.set_title(f"{budget:,} simulations")
        axes.set_xlabel(f"C2ST of {reference} − C2ST of the peer\n(negative: better)")
    _legend(figure, row)
    return figure


def _styles(methods: Iterable[str]) -> dict[str, dict]:
    """Return colour, marker and line of each method, always the same ones."""
    present = set(methods)
    styles = {name: style for name, style in _STYLES.items() if name in present}
    added = sorted(present - set(styles))
    styles.update(zip(added, itertools.cycle(_OTHERS)))
    return {
        name: {"color": color, "marker": marker, "linestyle": line}
        for name, (color, marker, line) in styles.items()
    }


def _panels(tasks: list[str]) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure with a panel for each task, five in a row at most."""
    columns = min(len(tasks), 5)
    rows = math.ceil(len(tasks) / columns)
    figure = Figure(
        figsize=(1.5 + 2.8 * columns, 1.4 + 2.6 * rows), layout="constrained"
    )
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.ravel()[len(tasks) :]:
        axes.set_visible(False)
    return figure, dict(zip(tasks, grid.ravel(), strict=False))


def _finish(figure: Figure, panels: dict[str, Axes]) -> None:
    """Give the panels their titles, labels at the edges alone, and one legend."""
    for task, axes in panels.items():
        axes.set_title(task, fontsize=10)
        axes.xaxis.label.set_size(9)
        axes.yaxis.label.set_size(9)
        axes.label_outer()
    _legend(figure, list(panels.values()))


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """Add one legend below the figure."""
    entries = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        # As many columns as the width has room for, of about 1.7 inches each.
        ncols=max(1, min(5, len(entries), int(figure.get_figwidth() / 1.7))),
        fontsize=8,
        frameon=False,
    )
