"""Tables and plots of the density studies, as the pages of the documentation have them.

For every study that the result table holds, a fragment `NAME_results.inc` with the
figures and a plot or two are written. Whether a claim holds is decided here, by rules
that were written before most of its rows existed, though not before the first.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from matplotlib.figure import Figure

from tasks.density.images import REFERENCES, images_path
from tasks.density.methods import LABELS
from tasks.density.sets import SETS, planar_density
from tasks.density.studies import MAP_SEED, NUM_TEST, STUDIES, grid, map_path
from tasks.density.table import FILE, read_table
from tasks.errors import InputError
from tasks.results import write_whole

# Parts of data frames, which the stubs of pandas take for arrays.
Frame = Any
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = {
    "nf": "#0072B2",
    "ebm": "#E69F00",
    "ebm_langevin": "#F0E442",
    "wgan": "#CC79A7",
    "jeffreys": "#009E73",
    "dual": "#D55E00",
    "penalty": "#999999",
}
# What the plots show.
ALT = {
    "dual_vs_penalty": "Test NLL and log partition function over training",
    "stability": "KL divergence to the truth over training",
    "planar": "Density maps of all methods",
    "tabular": "Test NLL over training",
    "images": "Images of all methods",
}
NUM_COLOURS = 64
# No verdict rests on fewer.
MIN_SEEDS = 3
# Rules of the verdicts, in nats. A curve that ends this far above its minimum rose.
RISE = 0.05
# A partition function within a factor of two of one is near one.
NEAR_ONE = float(np.log(2))
# A generator this far from the truth has failed.
FAILURE = 1.0


def write_report(results: Path, out: Path) -> Path:
    """Write tables and plots of all studies in a results folder.

    Args:
        results: Folder with the result table.
        out: Folder for the fragments; plots go to its `figures`.

    Returns:
        The folder.

    Raises:
        InputError: If the result table holds no finished run.
    """
    table: Frame = read_table(results)
    finished = table[table["status"] == "ok"]
    if finished.empty:
        raise InputError(
            f"{Path(results) / FILE} holds no finished run. Make some with "
            "`python -m tasks density`."
        )
    writers: dict[str, Callable[[Frame, Path, Path], str]] = {
        "dual_vs_penalty": _dual_vs_penalty,
        "stability": _stability,
        "planar": _planar,
        "tabular": _tabular,
        "images": _images,
    }
    for name, write in writers.items():
        rows = finished[finished["study"] == name]
        if rows.empty:
            write_whole(Path(out) / f"{name}_results.inc", "Not measured yet.\n")
            continue
        num_failed = int(((table["study"] == name) & (table["status"] != "ok")).sum())
        text = write(rows, Path(results), Path(out))
        files = sorted((Path(out) / "figures").glob(f"{name}*.png"))
        text += "".join(f"\n![{ALT[name]}](figures/{f.name})\n" for f in files)
        if num_failed:
            text += f"\n{num_failed} runs of this study failed and are left out.\n"
        write_whole(Path(out) / f"{name}_results.inc", text)
    numbers = finished.drop(columns=["curve", "error", "finished"])
    buffer = io.StringIO()
    numbers.to_csv(buffer, index=False, float_format="%.5g")
    write_whole(Path(out) / FILE, buffer.getvalue())
    return Path(out)


# ------------------------------------------------------------------------------ studies


def _dual_vs_penalty(rows: Frame, results: Path, out: Path) -> str:
    # Every method on the same seeds, or a method could be lucky with its data.
    rows = rows[rows["seed"].isin(_complete_seeds(rows))]
    if rows.empty:
        return "The study has no seed that is complete yet.\n"
    seeds = rows["seed"].nunique()
    rows = rows.assign(
        swing=[_swing(_curve(c, "nll")) for c in rows["curve"]],
        drift=[np.abs(_curve(c, "log_partition")).max() for c in rows["curve"]],
    )
    cells = rows.groupby(["method", "setting"])[
        ["nll_last", "nll_best", "swing", "drift"]
    ].agg(["mean", "std"])
    penalties = cells.loc["penalty"]
    best = str(penalties["nll_last"]["mean"].idxmin())
    dual = cells.loc[("dual", "")]
    rank = 1 + int((penalties["nll_last"]["mean"] < dual["nll_last"]["mean"]).sum())
    pairs = _paired(rows, "nll_last", ("dual", ""), ("penalty", best))
    lines = [
        f"{seeds} seeds, {len(penalties)} weightings. NLL on {NUM_TEST:,} test samples "
        "at the last epoch, in nats, mean ± standard deviation over seeds. *Swing* is "
        "the mean absolute change from one entry of the curve to the next in the "
        "second half of the training; *drift* the largest |log Z| of the training.",
        "",
        "| | NLL, last | NLL, best on validation | swing | drift |",
        "|---|---|---|---|---|",
    ]
    worst = str(penalties["nll_last"]["mean"].idxmax())
    middle = penalties.median()
    shown = [
        ("dual variables", dual),
        (f"best weighting, {_weights_text(best)}", penalties.loc[best]),
        ("equal weights, 1 : 1 : 1", penalties.loc["weights=1:1:1"]),
        ("median of the weightings", middle),
        (f"worst weighting, {_weights_text(worst)}", penalties.loc[worst]),
    ]
    shown += [
        (LABELS[m], cells.loc[(m, "")]) for m in ("nf", "jeffreys") if m in cells.index
    ]
    for label, cell in shown:
        parts = [_pm(cell[n]["mean"], cell[n]["std"]) for n in cells.columns.levels[0]]
        order = {n: p for n, p in zip(cells.columns.levels[0], parts, strict=True)}
        lines.append(
            f"| {label} | "
            + " | ".join(order[n] for n in ("nll_last", "nll_best", "swing", "drift"))
            + " |"
        )
    lines += [
        "",
        "- **At least as good as the best weighting:** "
        f"{_verdict(rank == 1, rows)}. The dual is number {rank} of "
        f"{len(penalties) + 1}, {_pm(pairs.mean(), pairs.sem())} nats from the best "
        "weighting (mean of paired differences ± standard error; positive is worse). "
        "The best of 25 is chosen by the same test samples, which favours it.",
        "- **Steadier:** "
        + _verdict(dual["swing"]["mean"] < middle["swing"]["mean"], rows)
        + f". Swing {dual['swing']['mean']:.3f} against {middle['swing']['mean']:.3f}, "
        "the median of the weightings.",
        "- **The partition function stays near one** (within a factor of two): "
        + _verdict(dual["drift"]["mean"] < NEAR_ONE, rows)
        + f". The largest |log Z| is {dual['drift']['mean']:.2f} with the dual and "
        f"{middle['drift']['mean']:.2f} in the median of the weightings.",
        "",
    ]
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
    for name, ax in zip(("nll", "log_partition"), axes, strict=True):
        for setting in penalties.index:
            chosen = rows[(rows["method"] == "penalty") & (rows["setting"] == setting)]
            epochs, mean, _ = _mean_curve(chosen, name)
            kwargs = {"lw": 1.6, "color": "black"} if setting == best else {}
            label = "best weighting" if setting == best else None
            ax.plot(
                epochs, mean, **({"lw": 0.6, "color": "#999999"} | kwargs), label=label
            )
        epochs, mean, std = _mean_curve(rows[rows["method"] == "dual"], name)
        _band(ax, epochs, mean, std, COLOURS["dual"], "dual variables")
        ax.set_xlabel("epoch")
    limits = rows["nll_last"].quantile([0, 0.9])
    axes[0].set_ylim(limits[0] - 0.1, limits[0.9] + 0.6)
    axes[0].set_ylabel("test NLL (nats)")
    axes[1].set_ylabel("log Z of the proxy")
    axes[1].set_ylim(-3, 3)
    axes[0].legend(frameon=False)
    _save(fig, out, "dual_vs_penalty")
    return "\n".join(lines)


def _stability(rows: Frame, results: Path, out: Path) -> str:
    entropy = rows["entropy"].to_numpy()
    curves = [_curve(c, "nll") for c in rows["curve"]]
    rows = rows.assign(
        kl_last=rows["nll_last"] - entropy,
        kl_low=[c.min() - e for c, e in zip(curves, entropy, strict=True)],
        kl_chosen=rows["nll_best"] - entropy,
    )
    rows = rows.assign(rise=rows["kl_last"] - rows["kl_low"])
    settings = sorted(rows["setting"].unique(), key=lambda s: float(s[3:]))
    methods = [m for m in COLOURS if m in set(rows["method"])]
    lines = [
        f"{rows['seed'].nunique()} seeds. KL(π‖p) in nats on {NUM_TEST:,} test "
        "samples, mean ± standard deviation over seeds: at the last epoch, at the "
        "epoch that validation samples choose, and how far the end lies above the "
        "lowest value of the training (*rise*).",
        "",
        "| learning rate | method | KL, last | KL, chosen | rise |",
        "|---|---|---|---|---|",
    ]
    cell = rows.groupby(["setting", "method"])[["kl_last", "kl_chosen", "rise"]].agg([
        "mean",
        "std",
    ])
    for setting in settings:
        for method in methods:
            if (setting, method) not in cell.index:
                continue
            c = cell.loc[(setting, method)]
            parts = [
                _pm(c[n]["mean"], c[n]["std"]) for n in ("kl_last", "kl_chosen", "rise")
            ]
            lines.append(
                f"| {setting[3:]} | {LABELS[method]} | " + " | ".join(parts) + " |"
            )

    def value(method: str, setting: str, name: str) -> float:
        if (setting, method) not in cell.index:
            return float("nan")
        return float(cell.loc[(setting, method), (name, "mean")])

    # Those of the study, of which some may be missing yet.
    rates = {s for _, s in STUDIES["stability"].cells}
    low, *_, high = sorted(rates, key=lambda s: float(s[3:]))
    rises = {s: value("nf", s, "rise") for s in (low, high)}
    wgan = {s: value("wgan", s, "kl_last") for s in (low, high)}
    lines += [
        "",
        f"- **NF overfits, its KL rises** (by more than {RISE} nats): "
        f"{_verdict(rises[low] > RISE, rows, rises[low])} at the low rate "
        f"({_number(rises[low])}), {_verdict(rises[high] > RISE, rows, rises[high])} "
        f"at the high rate ({_number(rises[high])}).",
        f"- **WGAN fails at the high rate** (KL above {FAILURE:g} nat): "
        f"{_verdict(wgan[high] > FAILURE, rows, wgan[high])} ({_number(wgan[high])}; "
        f"at the low rate {_number(wgan[low])}).",
    ]
    for method in ("jeffreys", "dual"):
        rise = {s: value(method, s, "rise") for s in (low, high)}
        holds = all(r < RISE for r in rise.values())
        lines.append(
            f"- **Stable in both: {LABELS[method]}** (rises by less than {RISE} nats): "
            f"{_verdict(holds, rows, *rise.values())} ({_number(rise[low])} at the "
            f"low, {_number(rise[high])} at the high rate)."
        )
    lines += ["", _cost(rows)]
    fig, axes = plt.subplots(
        1, len(settings), figsize=(9, 3.3), layout="constrained", sharey=True
    )
    for ax, setting in zip(np.atleast_1d(axes), settings, strict=True):
        for method in methods:
            chosen = rows[(rows["setting"] == setting) & (rows["method"] == method)]
            if len(chosen):
                epochs, mean, std = _mean_curve(chosen, "nll", subtract="entropy")
                _band(ax, epochs, mean, std, COLOURS[method], LABELS[method])
        ax.set_title(f"learning rate {setting[3:]}")
        ax.set_xlabel("epoch")
        ax.set_yscale("log")
    np.atleast_1d(axes)[0].set_ylabel("KL(π‖p) (nats)")
    np.atleast_1d(axes)[-1].legend(frameon=False, fontsize="x-small")
    _save(fig, out, "stability")
    return "\n".join([*lines, ""])


def _planar(rows: Frame, results: Path, out: Path) -> str:
    methods = [m for m in COLOURS if m in set(rows["method"])]
    datasets = [d for d in SETS if d in set(rows["dataset"])]
    columns = [*methods, "proxy", "refined"]
    lines = [f"{_seed_range(rows)} Test NLL in nats, mean ± standard deviation."]
    for metric, title in (
        ("nll_best", "At the epoch that validation samples choose"),
        ("nll_last", "At the last epoch"),
    ):
        shown = columns if metric == "nll_best" else methods
        heads = [LABELS.get(m, f"ours, {m}") for m in shown]
        lines += [
            "",
            f"**{title}**",
            "",
            "| | seeds | entropy of π | " + " | ".join(heads) + " |",
            "|---" * (len(shown) + 3) + "|",
        ]
        for dataset in datasets:
            part = rows[rows["dataset"] == dataset]
            # The same seeds for all methods.
            part = part[part["seed"].isin(_complete_seeds(part))]
            if part.empty:
                continue
            entropy = part["entropy"].mean()
            values = {m: part[part["method"] == m][metric] for m in methods}
            ours = part[part["method"] == "jeffreys"]
            values |= {m: ours[f"nll_{m}"] for m in ("proxy", "refined")}
            means = {m: v.mean() for m, v in values.items() if m in shown}
            lowest = min(means, key=lambda m: means[m])
            texts = [
                f"**{_pm(values[m].mean(), values[m].std())}**"
                if m == lowest
                else _pm(values[m].mean(), values[m].std())
                for m in shown
            ]
            known = f"{entropy:.2f}" if np.isfinite(entropy) else "not known"
            lines.append(
                f"| {dataset} | {part['seed'].nunique()} | {known} | "
                + " | ".join(texts)
                + " |"
            )
    lines.append("")
    for metric, when in (("nll_last", "the last"), ("nll_best", "the chosen")):
        for other in ("nf", "wgan", "ebm", "ebm_langevin"):
            better, total = _wins(rows, metric, "jeffreys", other)
            lines.append(
                f"- Our flow against {LABELS[other]}, at {when} epoch: better on "
                f"{better} of {total} sets."
            )
    for model in ("proxy", "refined"):
        better, total = _wins(rows, f"nll_{model}", "jeffreys", "nf", "nll_best")
        lines.append(
            f"- Ours, {model}, against {LABELS['nf']}, at the chosen epoch: better on "
            f"{better} of {total} sets."
        )
    lines += ["", _cost(rows)]
    _planar_maps(datasets, results, out)
    return "\n".join([*lines, ""])


def _planar_maps(datasets: list[str], results: Path, out: Path) -> None:
    """Plot data, truth and density maps, a row for every set."""
    panels = [
        ("data", None, None),
        ("truth", None, None),
        ("NF", "nf", "main"),
        ("EBM alone", "ebm", "main"),
        ("WGAN", "wgan", "main"),
        ("ours, flow", "jeffreys", "main"),
        ("ours, proxy", "jeffreys", "proxy"),
    ]
    have = [
        d for d in datasets if any(map_path(results, d, m).exists() for m in COLOURS)
    ]
    if not have:
        return
    size = (1.1 * len(panels), 1.12 * len(have) + 0.2)
    fig, axes = plt.subplots(len(have), len(panels), figsize=size, squeeze=False)
    for row, name in zip(axes, have, strict=True):
        density = planar_density(name)
        box = 2 * (-density.extent, density.extent)
        maps = {}
        for title, method, model in panels:
            path = None if method is None else map_path(results, name, method)
            if path is not None and path.exists():
                maps[title] = np.load(path)[model].astype(float)
        if density.log_prob is not None:
            maps["truth"] = np.exp(density.log_prob(grid(density.extent)))
        # One scale for a row, or sharp densities could not be told from flat ones.
        top = np.percentile(maps.get("truth", next(iter(maps.values()))), 99.5)
        for ax, (title, _, _) in zip(row, panels, strict=True):
            ax.set(xticks=[], yticks=[], xlim=box[:2], ylim=box[:2])
            if ax in axes[0]:
                ax.set_title(title, fontsize=7)
            if title == "data":
                data = density.sample(500, seed=MAP_SEED)
                ax.scatter(*data.T, s=0.4, color="black", linewidths=0)
                ax.set_ylabel(name, fontsize=6)
            elif title in maps:
                side = int(np.sqrt(maps[title].size))
                picture = maps[title].reshape(side, side)
                ax.imshow(picture, origin="lower", extent=box, vmin=0, vmax=top)
            else:
                ax.text(0, 0, "not known", ha="center", fontsize=6)
    fig.subplots_adjust(0.03, 0.01, 0.99, 0.96, 0.04, 0.04)
    _save(fig, out, "planar", dpi=100)


def _tabular(rows: Frame, results: Path, out: Path) -> str:
    methods = [m for m in COLOURS if m in set(rows["method"])]
    lines = [
        f"{_seed_range(rows, 'splits')} Held-out log-likelihood in nats a row, mean ± "
        "standard deviation over splits, at the epoch that validation rows choose. The "
        "last columns are paired differences to NF ± standard error; positive is "
        "better than NF.",
        "",
        "| | splits | "
        + " | ".join([*(LABELS[m] for m in methods), "ours, proxy", "ours, refined"])
        + " | our flow - NF | refined - NF |",
        "|---" * (len(methods) + 6) + "|",
    ]
    for dataset in rows["dataset"].unique():
        part = rows[rows["dataset"] == dataset]
        part = part[part["seed"].isin(_complete_seeds(part))]
        if not {"nf", "jeffreys"} <= set(part["method"]):
            continue
        by = {m: part[part["method"] == m].set_index("seed") for m in methods}
        values = [-by[m]["nll_best"] for m in methods]
        values += [-by["jeffreys"]["nll_proxy"], -by["jeffreys"]["nll_refined"]]
        gains = [
            by["nf"]["nll_best"] - by["jeffreys"][name]
            for name in ("nll_best", "nll_refined")
        ]
        lines.append(
            f"| {dataset} | {part['seed'].nunique()} | "
            + " | ".join(_pm(v.mean(), v.std()) for v in values)
            + " | "
            + " | ".join(_pm(g.mean(), g.sem()) for g in gains)
            + " |"
        )
    lines += ["", _cost(rows)]
    num_columns = rows["dataset"].nunique()
    fig, axes = plt.subplots(
        1, num_columns, figsize=(9, 2.8), layout="constrained", squeeze=False
    )
    for ax, dataset in zip(axes[0], rows["dataset"].unique(), strict=True):
        for method in methods:
            chosen = rows[(rows["dataset"] == dataset) & (rows["method"] == method)]
            if len(chosen):
                epochs, mean, std = _mean_curve(chosen, "nll")
                _band(ax, epochs, mean, std, COLOURS[method], LABELS[method])
        low = rows.loc[rows["dataset"] == dataset, "nll_best"].min()
        start = rows.loc[
            (rows["dataset"] == dataset) & (rows["method"] == "nf"), "nll_last"
        ].max()
        ax.set_ylim(low - 1, max(start, low) + 6)
        ax.set(title=dataset, xlabel="epoch")
    axes[0, 0].set_ylabel("test NLL (nats a row)")
    axes[0, 0].legend(frameon=False, fontsize="x-small")
    _save(fig, out, "tabular")
    return "\n".join([*lines, ""])


def _images(rows: Frame, results: Path, out: Path) -> str:
    lines = [
        f"{_seed_range(rows)} Mean ± standard deviation over seeds. Fréchet distance "
        "to the test images in the classifier's features (lower is better) and the "
        "part of it that the distance of the means makes, precision and recall "
        "(higher is better), test NLL of the latents.",
        "",
        "| images | | seeds | Fréchet | of which mean | precision | recall | "
        "NLL of latents |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (dataset, setting), part in rows.groupby(["dataset", "setting"], sort=False):
        for method in (*REFERENCES, *COLOURS):
            chosen = part[part["method"] == method]
            if chosen.empty:
                continue
            texts = [
                _pm(chosen[n].mean(), chosen[n].std())
                for n in ("frechet", "mean_shift", "precision", "recall", "nll_best")
            ]
            heads = [f"{dataset}, {setting}", LABELS.get(method, method)]
            cells = [*heads, str(len(chosen)), *texts]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", _cost(rows)]
    for (dataset, setting), part in rows.groupby(["dataset", "setting"], sort=False):
        _image_figure(dataset, setting, part, results, out)
        ours, others = (
            part[part["method"] == m].set_index("seed")["frechet"]
            for m in ("jeffreys", "nf")
        )
        gain = (others - ours).dropna()
        lines += [
            "",
            f"- **{dataset}: images of ours nearer to the test images than NF's:** "
            f"{_verdict(bool(gain.mean() > 2 * gain.sem()), part, gain.sem())}. "
            f"Fréchet distance of NF less ours: {_pm(gain.mean(), gain.sem())} "
            "(mean of paired differences ± standard error; two standard errors are "
            "asked for).",
        ]
    return "\n".join([*lines, ""])


def _image_figure(
    dataset: str, setting: str, rows: Frame, results: Path, out: Path
) -> None:
    """Plot samples of all methods side by side."""
    names = ["test", "reconstructions", "nf", "wgan", "jeffreys"]
    files = {
        n: images_path(results, dataset, setting, n, int(rows["seed"].min()))
        for n in names
    }
    have = [n for n in names if files[n].exists()]
    if not have:
        return
    fig, axes = plt.subplots(
        1, len(have), figsize=(2 * len(have), 2.2), layout="constrained", squeeze=False
    )
    titles = {"test": "test images", "nf": "NF", "wgan": "WGAN-GP", "jeffreys": "ours"}
    for ax, name in zip(axes[0], have, strict=True):
        pictures = np.load(files[name])
        side = int(np.sqrt(len(pictures)))
        height, width = pictures.shape[1:]
        tiles = pictures[: side**2].reshape(side, side, height, width)
        ax.imshow(
            tiles.transpose(0, 2, 1, 3).reshape(side * height, side * width),
            cmap="gray_r",
        )
        ax.set_title(titles.get(name, name), fontsize=9)
        ax.set_axis_off()
    _save(fig, out, f"images_{dataset}")


# ------------------------------------------------------------------------------ helpers


def _cost(rows: Frame) -> str:
    """Return a line on epochs and processor time of every method."""
    means = rows.groupby("method")[["epochs", "seconds"]].mean()
    parts = [
        f"{LABELS[method]} {cost['epochs']:.0f} epochs, {cost['seconds']:.0f} s"
        for method, cost in means.iterrows()
        if method in LABELS and np.isfinite(cost["seconds"])
    ]
    return "Training, mean processor time: " + "; ".join(parts) + "."


def _complete_seeds(rows: Frame) -> list[int]:
    """Return the seeds for which every method and setting has a row."""
    counts = rows.groupby("seed").size()
    cells = rows[["method", "setting"]].drop_duplicates()
    return [int(seed) for seed, count in counts.items() if count == len(cells)]


def _paired(
    rows: Frame, metric: str, first: tuple[str, str], second: tuple[str, str]
) -> Frame:
    """Return differences over seeds of two cells, each a method and a setting."""
    one, other = (
        rows[(rows["method"] == m) & (rows["setting"] == s)].set_index("seed")[metric]
        for m, s in (first, second)
    )
    return (one - other).dropna()


def _wins(
    rows: Frame, metric: str, method: str, other: str, other_metric: str = ""
) -> tuple[int, int]:
    """Return on how many sets a method has the lower mean, of how many."""
    results = []
    for _, part in rows.groupby("dataset"):
        part = part[part["seed"].isin(_complete_seeds(part))]
        one = part[part["method"] == method][metric].mean()
        two = part[part["method"] == other][other_metric or metric].mean()
        if np.isfinite(one) and not np.isnan(two):
            results.append(one < two)
    return sum(results), len(results)


def _curve(text: str, name: str) -> np.ndarray:
    return np.array(json.loads(text)[name], dtype=float)


def _swing(values: np.ndarray) -> float:
    """Return the mean absolute change between entries of the second half."""
    return float(np.abs(np.diff(values[len(values) // 2 :])).mean())


def _mean_curve(
    rows: Frame, name: str, subtract: str | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return epochs, and mean and standard deviation over rows."""
    curves = np.stack([_curve(text, name) for text in rows["curve"]])
    if subtract is not None:
        curves = curves - rows[subtract].to_numpy()[:, None]
    return _curve(rows["curve"].iloc[0], "epoch"), curves.mean(0), curves.std(0)


def _band(ax, epochs, mean, std, colour: str, label: str) -> None:
    ax.plot(epochs, mean, color=colour, label=label, lw=1.6)
    low = np.maximum(mean - std, 0.2 * np.abs(mean)) if (mean > 0).all() else mean - std
    ax.fill_between(epochs, low, mean + std, color=colour, alpha=0.2, lw=0)


def _seed_range(rows: Frame, what: str = "seeds") -> str:
    counts = rows.groupby(["dataset", "method"]).size()
    low, high = int(counts.min()), int(counts.max())
    return f"{low} {what}." if low == high else f"{low} to {high} {what}."


def _pm(mean: float, spread: float) -> str:
    if not np.isfinite(mean):
        return "-" if np.isnan(mean) else f"{mean}"
    digits = 3 if abs(mean) < 10 else 2
    text = f"{mean:.{digits}f}"
    return text if np.isnan(spread) else f"{text} ± {spread:.{digits}f}"


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"


def _weights_text(setting: str) -> str:
    return " : ".join(setting.split("=")[1].split(":"))


def _verdict(holds: bool, rows: Frame, *measured: float) -> str:
    """Return a verdict, unless too little was measured for one."""
    if np.isnan(measured).any():
        return "not measured yet"
    if rows["seed"].nunique() < MIN_SEEDS:
        return f"open, with fewer than {MIN_SEEDS} seeds"
    return "holds" if holds else "does not hold"


def _save(fig: Figure, out: Path, name: str, dpi: int = 90) -> None:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi)
    plt.close(fig)
    # A palette makes maps of densities a third as large.
    with Image.open(buffer) as picture:
        buffer = io.BytesIO()
        picture.convert("RGB").quantize(NUM_COLOURS).save(
            buffer, format="png", optimize=True
        )
    write_whole(out / "figures" / f"{name}.png", buffer.getvalue())
