"""Tables of measurements, made from the committed rows when the site is built."""

import csv
import math
from pathlib import Path
from statistics import geometric_mean, mean, stdev

REPOSITORY = Path(__file__).resolve().parents[1]
REPORTS = REPOSITORY / "tasks/reports"
BENCHMARK = REPORTS / "against_npe_1000/results.csv"
FEWER_SIMULATIONS = REPORTS / "against_npe_300/results.csv"
MORE_SIMULATIONS = REPORTS / "against_npe_10000/results.csv"
# The default before energies had a bound, and that without surrogates then.
UNBOUNDED = REPORTS / "unbounded_1000/results.csv"
# The default before outputs that say nothing were left out, where there are any.
UNSCREENED = REPORTS / "unscreened_1000/results.csv"
# The default before flows had a scale.
UNSCALED = REPORTS / "unscaled_1000/results.csv"
# The default before residuals were those of a regression without the simulation itself.
IN_SAMPLE = REPORTS / "in_sample_1000/results.csv"
# The default before outputs had scales of their own and surrogates imagined others.
NORMAL_SCORES = REPORTS / "normal_scores_1000/results.csv"
NETWORK = REPORTS / "network_1000/results.csv"
PRESETS = REPORTS / "presets_1000/rows.csv"
CALIBRATION = REPORTS / "calibration_1000"
# That of an earlier default, without surrogates of the likelihood.
CALIBRATION_BEFORE = REPORTS / "calibration_network_1000"
PUBLISHED = REPOSITORY / "tasks/published/c2st.csv"
DENSITY = REPOSITORY / "docs/density/results.csv"

PEERS = ("npe_maf", "npe_nsf")
# Posteriors of a training, each with the one that it is compared with.
Pairs = dict[str, tuple[str, str]]
SURROGATES: Pairs = {
    "refined": ("jeffreys_refined", "jeffreys_network_refined"),
    "flow": ("jeffreys", "jeffreys_network"),
}
NOW_AND_BEFORE: Pairs = {
    "refined": ("jeffreys_refined", "jeffreys_refined before"),
    "flow": ("jeffreys", "jeffreys before"),
}
# There the rows of ours without a scale have 10,000 samples, the others 2,000.
OF_TEN_DIMENSIONS = (
    "gaussian_linear",
    "gaussian_linear_uniform",
    "bernoulli_glm",
    "bernoulli_glm_raw",
)
# A loss below this shows as one of 0.000.
SHOWN = 0.0005
# Minutes that a training with 10,000 simulations should take at most.
AIM = 20

Rows = list[dict[str, str]]
# C2ST of (task, method, seed, observation).
Scores = dict[tuple[str, ...], float]
KEY = ("task", "method", "seed", "observation")


def read(path: Path) -> Rows:
    """Return the rows of a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def seeds(rows: Rows) -> str:
    """Return the number of seeds, and which they are."""
    names = sorted({row["seed"] for row in rows}, key=int)
    plural = "seeds" if len(names) > 1 else "seed"
    return f"{len(names)} {plural} ({', '.join(names)})"


def scores(rows: Rows) -> Scores:
    """Return the C2ST of all rows that have one."""
    return {
        (row["task"], row["method"], row["seed"], row["observation"]): float(
            row["c2st"]
        )
        for row in rows
        if row["c2st"]
    }


def _differences(
    scores: Scores, task: str, ours: str, peer: str, by: int
) -> list[float]:
    """Return paired differences of C2ST, one for each seed (2) or observation (3)."""
    groups: dict[str, list[float]] = {}
    for key, score in scores.items():
        other = (task, peer, *key[2:])
        if key[:2] == (task, ours) and other in scores:
            groups.setdefault(key[by], []).append(score - scores[other])
    return [mean(group) for group in groups.values()]


def _mean(scores: Scores, task: str, method: str) -> float:
    found = [value for key, value in scores.items() if key[:2] == (task, method)]
    return mean(found) if found else math.nan


def _tasks(scores: Scores) -> list[str]:
    return sorted({key[0] for key in scores})


def _plus_minus(values: list[float], errors_of_mean: bool = False) -> str:
    """Return the mean ± the standard deviation, or ± the standard error."""
    text = f"{mean(values):+.3f}"
    if len(values) == 1:
        return text
    spread = stdev(values) / (math.sqrt(len(values)) if errors_of_mean else 1)
    return f"{text} ± {spread:.3f}"


def c2st(path: Path) -> str:
    """Return C2ST of every task and method, the best in bold.

    The mean is over all tasks, of the methods that were run on all. If there are others
    it is followed by that over the tasks that all methods were run on.
    """
    values = scores(read(path))
    tasks, methods = _tasks(values), sorted({key[1] for key in values})
    means = [[_mean(values, task, method) for method in methods] for task in tasks]
    lines = []
    for task, cells in zip(tasks, means, strict=True):
        best = min(filter(math.isfinite, cells))
        lines.append([f"`{task}`", *(_cell(value, value == best) for value in cells)])
    # Of a method that lacks a task the mean is no number.
    averages = [mean(column) for column in zip(*means, strict=True)]
    lines.append([f"mean of all {len(tasks)}", *map(_cell, averages)])
    complete = _of_all_methods(path)
    if 1 < len(complete) < len(tasks):
        averages = [mean(_mean(values, t, m) for t in complete) for m in methods]
        lines.append([f"mean of {_listed(complete)}", *map(_cell, averages)])
    return table(["task", *(f"`{method}`" for method in methods)], lines)


def _of_all_methods(path: Path) -> list[str]:
    """Return the tasks that all methods were run on."""
    values = scores(read(path))
    methods = {key[1] for key in values}
    run = {key[:2] for key in values}
    return [t for t in _tasks(values) if all((t, m) in run for m in methods)]


def _listed(names: list[str]) -> str:
    """Return names as a text lists them."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _cell(value: float, is_best: bool = False) -> str:
    text = f"{value:.3f}" if math.isfinite(value) else "–"
    return f"**{text}**" if is_best else text


def refined_mean(path: Path) -> str:
    """Return C2ST of the refined posterior in the mean over the tasks."""
    values = scores(read(path))
    means = [_mean(values, task, "jeffreys_refined") for task in _tasks(values)]
    return f"{mean(means):.3f}"


def _minutes(path: Path) -> dict[str, float]:
    rows = [row for row in read(path) if row["method"] == "jeffreys_refined"]
    return {row["task"]: float(row["training_seconds"]) / 60 for row in rows}


def minutes(path: Path) -> str:
    """Return how long a training of ours took on every task."""
    return ", ".join(f"{t} {value:.1f}" for t, value in sorted(_minutes(path).items()))


def slow(path: Path) -> str:
    """Return the tasks on which a training of ours took longer than it should."""
    return _listed(sorted(t for t, value in _minutes(path).items() if value > AIM))


def losses() -> str:
    """Return where, with any seed, NPE was better, or the flow than the refined one."""
    values = scores(read(BENCHMARK))
    pairs = [(us, peer) for us in ("jeffreys", "jeffreys_refined") for peer in PEERS]
    lines = []
    for us, peer in [*pairs, ("jeffreys_refined", "jeffreys")]:
        for task in _tasks(values):
            differences = _differences(values, task, us, peer, by=2)
            num = sum(difference > 0 for difference in differences)
            if num:
                lines.append([
                    f"`{task}`",
                    f"`{us}`",
                    f"`{peer}`",
                    f"{_mean(values, task, us):.3f}",
                    f"{_mean(values, task, peer):.3f}",
                    _plus_minus(differences),
                    f"{num} of {len(differences)}",
                ])
    if not lines:
        return (
            f"There is no loss. On none of the {len(_tasks(values))} tasks, with none "
            "of the seeds, was NPE (`npe_maf`, `npe_nsf`) better than the flow or the "
            "refined posterior, nor the flow better than the refined posterior."
        )
    header = ["task", "ours", "the other", "C2ST ours", "C2ST of the other"]
    return (
        "The table has every task on which one of ours lost with at least one seed, "
        "the refined posterior also to the flow. Differences are means over the seeds "
        "± their standard deviation.\n\n"
    ) + table([*header, "difference", "seeds with a loss"], lines)


def published_losses() -> str:
    """Return where a published method was better than ours."""
    published = [row for row in read(PUBLISHED) if row["source"] == "lueckmann2021"]
    lines = []
    for path, budget in ((BENCHMARK, 1000), (MORE_SIMULATIONS, 10_000)):
        values = scores(read(path))
        for us in ("jeffreys_refined", "jeffreys"):
            for task in _tasks(values):
                ours = _mean(values, task, us)
                better = [
                    f"{row['method']} {float(row['c2st_mean']):.3f}"
                    for row in published
                    if (row["task"], int(row["budget"])) == (task, budget)
                    and float(row["c2st_mean"]) < ours
                ]
                if better:
                    cells = [f"`{task}`", f"`{us}`", f"{ours:.3f}", ", ".join(better)]
                    lines.append([f"{budget:,}", *cells])
    header = ["simulations", "task", "ours", "C2ST ours", "published and better"]
    return table(header, lines)


def _with_network_alone() -> Scores:
    """Return C2ST with surrogates and without, of the seeds that both have."""
    values, alone = scores(read(UNBOUNDED)), scores(read(NETWORK))
    both = {key[2] for key in values} & {key[2] for key in alone}
    return {key: v for key, v in {**values, **alone}.items() if key[2] in both}


def surrogates() -> str:
    """Return C2ST with surrogates of the likelihood and without, the best in bold."""
    return _beside(_with_network_alone(), SURROGATES, "without")


def _now_and_before(now: Scores, before: Scores) -> Scores:
    """Return C2ST of two versions of the library, on the same simulations."""
    renamed = {
        (task, f"{method} before", *rest): value
        for (task, method, *rest), value in before.items()
    }
    return {key: now[key] for key in before} | renamed


def bound() -> str:
    """Return C2ST of bounded energies and of unbounded ones, the best in bold."""
    now = scores(read(UNSCALED)) | scores(read(UNSCREENED))
    both = _now_and_before(now, scores(read(UNBOUNDED)))
    return _beside(both, NOW_AND_BEFORE, "before")


def screening() -> str:
    """Return C2ST with and without outputs that say nothing, the best in bold."""
    both = _now_and_before(scores(read(UNSCALED)), scores(read(UNSCREENED)))
    return _beside(both, NOW_AND_BEFORE, "before")


def scale() -> str:
    """Return C2ST with and without the flow's scale, of as many samples for both."""
    before = {
        key: value
        for key, value in scores(read(UNSCALED)).items()
        if key[0] not in OF_TEN_DIMENSIONS
    }
    both = _now_and_before(scores(read(IN_SAMPLE)), before)
    return _beside(both, NOW_AND_BEFORE, "without the scale")


def held_out() -> str:
    """Return C2ST with residuals of a regression without the simulation, and of all."""
    both = _now_and_before(scores(read(NORMAL_SCORES)), scores(read(IN_SAMPLE)))
    return _beside(both, NOW_AND_BEFORE, "in sample")


def own_scales() -> str:
    """Return C2ST with scales of the outputs and imagined outputs, and before both."""
    both = _now_and_before(scores(read(BENCHMARK)), scores(read(NORMAL_SCORES)))
    return _beside(both, NOW_AND_BEFORE, "before")


def _beside(values: Scores, pairs: Pairs, of_the_other: str) -> str:
    """Return C2ST of the posteriors of each pair, the best of it in bold."""
    tasks = _tasks(values)
    methods = [method for pair in pairs.values() for method in pair]
    means = [[_mean(values, task, method) for method in methods] for task in tasks]
    means.append([mean(column) for column in zip(*means, strict=True)])
    lines = []
    for name, of_methods in zip([*tasks, "mean"], means, strict=True):
        cells = [f"{value:.3f}" for value in of_methods]
        for pair in (slice(0, 2), slice(2, 4)):
            best = min(cells[pair]) if len(set(cells[pair])) > 1 else None
            cells[pair] = [f"**{c}**" if c == best else c for c in cells[pair]]
        lines.append([name if name == "mean" else f"`{name}`", *cells])
    header = [cell for name in pairs for cell in (name, f"{name}, {of_the_other}")]
    return table(["", *header], lines)


def surrogate_losses() -> str:
    """Return where the surrogates of the likelihood made C2ST worse."""
    values = _with_network_alone()
    lines = []
    for name, (ours, alone) in SURROGATES.items():
        for task in _tasks(values):
            differences = _differences(values, task, ours, alone, by=2)
            if mean(differences) >= SHOWN:
                lines.append([
                    f"`{task}`",
                    name,
                    f"{_mean(values, task, ours):.3f}",
                    f"{_mean(values, task, alone):.3f}",
                    _plus_minus(differences),
                ])
    header = ["task", "posterior", "C2ST with surrogates", "C2ST without"]
    return table([*header, "difference"], lines)


def calibration_losses() -> str:
    """Return where NPE was better calibrated beyond two standard errors."""
    columns = {"sbc": "sbc_area", "atc": "atc"}
    rows = read(CALIBRATION / "rows.csv")

    def value(row: dict[str, str], method: str) -> str:
        metric = row["metric"]
        value = mean(
            float(other[columns[metric]])
            for other in rows
            if (other["task"], other["method"], other["budget"])
            == (row["task"], method, row["budget"])
        )
        return f"{value:+.3f}" if metric == "atc" else f"{value:.3f}"

    lines = [
        [
            f"`{row['task']}`",
            f"`{row['method']}`",
            f"`{row['peer']}`",
            {"sbc": "SBC", "atc": "TARP (ATC)"}[row["metric"]],
            value(row, row["method"]),
            value(row, row["peer"]),
            f"{float(row['difference']):+.3f} ± {2 * float(row['standard_error']):.3f}",
        ]
        for row in read(CALIBRATION / "comparison.csv")
        if row["verdict"] == "worse"
    ]
    header = ["task", "ours", "NPE", "error", "ours", "NPE's", "worse by"]
    return table(header, lines)


def calibration() -> str:
    """Return the error by SBC of two earlier defaults and of NPE."""
    now, before = (
        {
            (row["task"], row["method"]): float(row["sbc_area"])
            for row in read(folder / "rows.csv")
            if row["sbc_area"]
        }
        for folder in (CALIBRATION, CALIBRATION_BEFORE)
    )
    lines = []
    for task in sorted({task for task, _ in now}):
        cells = [
            *(now.get((task, ours), math.nan) for ours, _ in SURROGATES.values()),
            *(before.get((task, ours), math.nan) for _, ours in SURROGATES.values()),
            *(now.get((task, peer), math.nan) for peer in PEERS),
        ]
        lines.append([f"`{task}`", *map(_cell, cells)])
    header = [*SURROGATES, *(f"{name} without surrogates" for name in SURROGATES)]
    return table(["task", *header, "NPE (maf)", "NPE (nsf)"], lines)


def density_losses() -> str:
    """Return where another density estimator was better in the mean of the seeds."""
    quantities = (
        ("nll_best", "nll_best", "flow, NLL at the chosen epoch"),
        ("nll_last", "nll_last", "flow, NLL at the last epoch"),
        ("nll_refined", "nll_best", "refined, NLL at the chosen epoch"),
        ("frechet", "frechet", "flow, Fréchet distance of images"),
    )
    peers = {
        "nf": "NF, maximum likelihood",
        "ebm": "EBM, importance sampling",
        "ebm_langevin": "EBM, Langevin",
        "wgan": "WGAN-GP",
        "dual": "the paper's algorithm",
    }
    rows = {
        (row["study"], row["dataset"], row["setting"], row["method"], row["seed"]): row
        for row in read(DENSITY)
    }
    lines = []
    for of_us, of_peer, name in quantities:
        for peer, label in peers.items():
            pairs: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
            for (*cell, method, seed), row in rows.items():
                other = rows.get((*cell, peer, seed), {})
                if method == "jeffreys" and row[of_us] and other.get(of_peer):
                    pair = float(row[of_us]), float(other[of_peer])
                    pairs.setdefault(tuple(cell), []).append(pair)
            for (study, dataset, setting), values in pairs.items():
                differences = [ours - theirs for ours, theirs in values]
                if mean(differences) > 0:
                    lines.append([
                        f"{study}: {dataset} {setting}".strip(),
                        name,
                        label,
                        f"{mean(ours for ours, _ in values):.3f}",
                        f"{mean(theirs for _, theirs in values):.3f}",
                        _plus_minus(differences, errors_of_mean=True),
                        str(len(values)),
                    ])
    header = ["data", "what", "the other", "ours", "the other's", "worse by", "seeds"]
    return table(header, lines)


def _ratios(variant: str, peer: str) -> list[float]:
    """Return the training times of a variant over a peer's, one for every task."""
    seconds = {
        (row["variant"], row["task"]): float(row["seconds"])
        for row in read(PRESETS)
        if row["model"] == "flow"
    }
    tasks = sorted({task for _, task in seconds})
    return [seconds[variant, task] / seconds[peer, task] for task in tasks]


def training_ratio() -> str:
    """Return the geometric mean over the tasks of the ratio of training times."""
    return " and ".join(
        f"{geometric_mean(_ratios('jeffreys', peer)):.1f} times as long as NPE ({flow})"
        for flow, peer in (("maf", "npe, maf"), ("nsf", "npe, nsf"))
    )


def training_table() -> str:
    """Return the ratios of training times, with the least and the largest."""
    lines = []
    for variant, name in (("jeffreys", "default"), ("jeffreys, fast", "fast")):
        for peer in ("npe, maf", "npe, nsf"):
            ratios = _ratios(variant, peer)
            lines.append([
                name,
                peer.replace("npe, ", "NPE "),
                f"**{geometric_mean(ratios):.1f}**",
                f"{min(ratios):.1f} to {max(ratios):.1f}",
                str(len(ratios)),
            ])
    return table(["", "over", "times as long", "single trainings", "tasks"], lines)


def substitutions() -> dict[str, str]:
    """Return what the pages have between double braces."""
    return {
        "c2st_table": c2st(BENCHMARK),
        "c2st_table_300": c2st(FEWER_SIMULATIONS),
        "c2st_table_10000": c2st(MORE_SIMULATIONS),
        "losses": losses(),
        "published_loss_table": published_losses(),
        "surrogate_table": surrogates(),
        "bound_table": bound(),
        "screening_table": screening(),
        "scale_table": scale(),
        "held_out_table": held_out(),
        "own_scales_table": own_scales(),
        "surrogate_loss_table": surrogate_losses(),
        "calibration_loss_table": calibration_losses(),
        "calibration_table": calibration(),
        "density_loss_table": density_losses(),
        "training_ratio": training_ratio(),
        "training_table": training_table(),
        "seeds": seeds(read(BENCHMARK)),
        "seeds_300": seeds(read(FEWER_SIMULATIONS)),
        "seeds_10000": seeds(read(MORE_SIMULATIONS)),
        "refined_10000": refined_mean(MORE_SIMULATIONS),
        "minutes_10000": minutes(MORE_SIMULATIONS),
        "slow_10000": slow(MORE_SIMULATIONS),
        "bound_seeds": seeds(read(UNBOUNDED)),
        "screening_seeds": seeds(read(UNSCREENED)),
        "surrogate_seeds": seeds([
            {"seed": seed} for seed in {key[2] for key in _with_network_alone()}
        ]),
        "calibration_seeds": seeds(read(CALIBRATION / "rows.csv")),
    }
