r"""Tables and plots of a result table.

The spread of a metric m of one (task, budget, method) has two parts. With m(s, o) for
seed s and observation o,

- over seeds: the standard deviation over s of the mean over o of m(s, o);
- over observations: the standard deviation over o of the mean over s of m(s, o).

Both are sample standard deviations (divided by n − 1), and not given for n = 1.

The paired view compares a reference method with each peer on the same simulations: the
difference of a seed is the mean over observations of C2ST(reference) − C2ST(peer), over
those observations that both have with as many samples. The 95 % intervals are Student's
t: that of a task over its seeds, that of the mean over tasks over the means of tasks.
A bootstrap of three seeds would be their range, which holds the mean in three cases of
four.
"""

# pandas' own annotations say of most results that they may be one of several types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t as student_t

from tasks import TASKS, plots
from tasks.errors import InputError
from tasks.methods import METHODS
from tasks.results import COSTS, METRICS, load, settings_text, write_whole
from tasks.sweep import NUM_REFERENCE_SAMPLES

CELL = ["task", "budget", "method"]
_PUBLISHED = Path(__file__).parent / "published" / "c2st.csv"
_SOURCES = {
    "lueckmann2021": "Lueckmann et al. 2021",
    "gensbi": "GenSBI's documentation",
}


def published() -> pd.DataFrame:
    """Return the published C2ST figures; see tasks/published/README.md.

    Returns:
        One line per source, task, budget and method with the columns `source`, `task`,
        `budget`, `method`, `c2st_mean`, `c2st_std` (over observations),
        `observations`.
    """
    return pd.read_csv(_PUBLISHED)


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Return mean and spread of every metric and cost by task, budget and method.

    Args:
        rows: A result table, see `tasks.results.load`.

    Returns:
        One line per task, budget, method and quantity with the columns `mean` (over
        seeds, of the mean over observations), `std_seeds`, `std_observations`, `rows`
        (that have the quantity), `failed`, `expected` (distinct seeds and observations
        that any method has for this task and budget), `num_samples` and
        `most_samples` (of a posterior, the least and the most of its rows),
        `comparable` and `best`. A mean of C2ST is comparable if it is of all the
        expected rows, all with as many samples as most methods of this task and budget
        have (the more, if two numbers are as frequent); the best is the least of
        those.
    """
    rows = _with_num_samples(rows)
    expected = expected_rows(rows)
    cells = []
    for cell, group in rows.groupby(CELL, sort=False):
        failed = int((group["status"] == "failed").sum())
        good = group[group["status"] == "ok"]
        sizes = (good if len(good) else group)["num_samples"]
        for quantity in (*METRICS, *COSTS):
            values = good.pivot_table(
                index="seed", columns="observation", values=quantity, aggfunc="mean"
            )
            by_seed, by_observation = values.mean(axis=1), values.mean(axis=0)
            cells.append({
                **dict(zip(CELL, cell, strict=True)),
                "quantity": quantity,
                "mean": by_seed.mean(),
                "std_seeds": by_seed.std(ddof=1),
                "std_observations": by_observation.std(ddof=1),
                "rows": int(values.notna().to_numpy().sum()),
                "failed": failed,
                "num_samples": sizes.min(),
                "most_samples": sizes.max(),
            })
    summary = pd.DataFrame(cells).join(expected, on=["task", "budget"])
    whole = summary[
        (summary["quantity"] == "c2st")
        & (summary["rows"] == summary["expected"])
        & (summary["num_samples"] == summary["most_samples"])
    ]
    # `mode` is in ascending order.
    usual = whole.groupby(["task", "budget"])["num_samples"].transform(
        lambda sizes: sizes.mode().iloc[-1]
    )
    comparable = whole[whole["num_samples"] == usual]
    least = comparable.groupby(["task", "budget"])["mean"].transform("min")
    summary["comparable"] = summary.index.isin(comparable.index)
    summary["best"] = summary["mean"] == least.reindex(summary.index)
    return summary


def expected_rows(rows: pd.DataFrame) -> pd.Series:
    """Return the number of seeds and observations that any method has.

    Args:
        rows: A result table.

    Returns:
        The number by task and budget.
    """
    return (
        rows
        .groupby(["task", "budget"])[["seed", "observation"]]
        .apply(lambda group: len(group.drop_duplicates()))
        .rename("expected")
    )


def _with_num_samples(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a result table with the number of samples of each posterior."""
    return rows.assign(
        num_samples=[json.loads(text)["num_samples"] for text in rows["settings"]]
    )


def _check_settings(rows: pd.DataFrame) -> None:
    """Raise an InputError if a mean would be of rows with different settings.

    Other numbers of samples are marked instead.
    """
    for (task, budget, method), group in rows.groupby(CELL, sort=False):
        settings = [json.loads(text) for text in group["settings"].unique()]
        for of_rows in settings:
            del of_rows["num_samples"]
        different = sorted(set(map(settings_text, settings)))
        if len(different) > 1:
            raise InputError(
                f"rows of {method} on {task} at {budget:,} simulations were made with "
                f"different settings, such as {different[0]} and {different[1]}. Their "
                "mean would be of neither: report them apart."
            )


def _train_table(rows: pd.DataFrame) -> str:
    """Return the table of what `train` was given, empty if no method was given any."""
    lines = []
    for method in in_order(rows["method"].unique()):
        of_method = rows.loc[rows["method"] == method, "settings"].unique()
        given = sorted({
            settings_text(json.loads(s).get("train", {})) for s in of_method
        })
        lines.append([method, ", ".join(given)])
    if all(given == "{}" for _, given in lines):
        return ""
    return markdown_table(["method", "arguments of train"], lines)


def paired_differences(rows: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Return the difference of C2ST of the reference to each peer on the same seeds.

    Args:
        rows: A result table.
        reference: The method that the others are compared with.

    Returns:
        One line per peer, budget, task and seed with `difference`, the mean over
        observations of C2ST(reference) − C2ST(peer), negative where the reference is
        better, and `observations`, the number of observations that both have with as
        many samples.
    """
    index = ["budget", "task", "seed"]
    wide = _by_method(rows, [*index, "observation", "num_samples"])
    parts = []
    for peer in in_order(wide.columns.drop(reference, errors="ignore")):
        difference = (wide[reference] - wide[peer]).dropna()
        part = difference.groupby(level=index).agg(
            difference="mean", observations="size"
        )
        parts.append(part.reset_index().assign(peer=peer))
    columns = ["peer", *index, "difference", "observations"]
    return pd.concat(parts)[columns] if parts else pd.DataFrame(columns=columns)


def count_unequal_pairs(rows: pd.DataFrame, reference: str) -> int:
    """Return how many rows of peers have other numbers of samples than the reference.

    Args:
        rows: A result table.
        reference: The method that the others are compared with.
    """
    index = ["budget", "task", "seed", "observation"]
    pairs, equal = (
        wide.drop(columns=reference)[wide[reference].notna()].notna().to_numpy().sum()
        for wide in (
            _by_method(rows, [*index, *more]) for more in ([], ["num_samples"])
        )
    )
    return int(pairs - equal)


def _by_method(rows: pd.DataFrame, index: list[str]) -> pd.DataFrame:
    """Return C2ST with a column for each method."""
    good = _with_num_samples(rows[rows["status"] == "ok"])
    return good.pivot(index=index, columns="method", values="c2st")


def summarise_pairs(differences: pd.DataFrame, expected: pd.Series) -> pd.DataFrame:
    """Return mean paired differences with 95 % intervals of Student's t.

    Args:
        differences: What `paired_differences` returns.
        expected: What `expected_rows` returns of the same rows.

    Returns:
        One line per budget, peer and task, and one for the mean over tasks, with `task`
        "all tasks"; with the columns `mean`, `low`, `high` (the interval, over seeds
        or over tasks; NaN for a single one), `seeds` (pairs of trainings), `better`,
        the number of those with a negative difference, `rows` (pairs), `expected` (of
        these tasks), `tasks` and `all_tasks`, the number that the budget has.
    """
    lines = []
    for (budget, peer), group in differences.groupby(["budget", "peer"], sort=False):
        of_budget = expected.xs(budget, level="budget")
        means = group.groupby("task")["difference"].mean()
        levels = [
            (str(task), part, part["difference"])
            for task, part in group.groupby("task")
        ]
        if len(means) > 1:
            levels.append(("all tasks", group, means))
        for task, part, values in levels:
            low, high = _t_interval(values.to_numpy(float))
            tasks = part["task"].unique()
            lines.append({
                "budget": budget,
                "peer": peer,
                "task": task,
                "mean": values.mean(),
                "low": low,
                "high": high,
                "seeds": len(part),
                "better": int((part["difference"] < 0).sum()),
                "rows": int(part["observations"].sum()),
                "expected": int(of_budget[tasks].sum()),
                "tasks": len(tasks),
                "all_tasks": len(of_budget),
            })
    columns = ["budget", "peer", "task", "mean", "low", "high", "seeds", "better"]
    columns += ["rows", "expected", "tasks", "all_tasks"]
    return pd.DataFrame(lines, columns=pd.Index(columns))


def write_report(
    sources: Sequence[Path], out: Path, reference: str = "jeffreys"
) -> str:
    """Write tables and plots of result tables into a folder.

    Written are report.md (the tables with the plots), results.csv (all rows, which this
    function reads again), summary.csv (every quantity by task, budget and method),
    c2st.csv (C2ST with the published figures), paired.csv, and the plots as PNG.

    Args:
        sources: Results folders, or CSV files written by an earlier report.
        out: The folder to write into.
        reference: The method that the others are compared with in pairs.

    Returns:
        One line that says what was written.
    """
    rows = load(*sources)
    _check_settings(rows)
    if reference not in set(rows["method"]) and reference not in METHODS:
        raise InputError(
            f"unknown method {reference!r} to compare with. These results have: "
            f"{', '.join(in_order(rows['method'].unique()))}."
        )
    summary = summarise(rows)
    comparison = _with_published(summary)
    good = set(rows.loc[rows["status"] == "ok", "method"])
    differences = pairs = pd.DataFrame(columns=pd.Index(["budget", "peer"]))
    if reference in good and len(good) > 1:
        differences = paired_differences(rows, reference)
        pairs = summarise_pairs(differences, expected_rows(rows))
    # First of all: nothing that goes wrong in a plot must cost the tables.
    for name, table in (
        ("results.csv", rows),
        ("summary.csv", summary),
        ("c2st.csv", comparison),
        ("paired.csv", pairs),
    ):
        write_whole(out / name, table.to_csv(index=False))

    figures = {}
    means = summary.pivot(index=CELL, columns="quantity", values="mean")
    if means["c2st"].notna().any():
        figures["c2st_against_budget.png"] = plots.c2st_against_budget(
            rows, summary, published()
        )
    if means[["c2st", "training_seconds"]].notna().all(axis=1).any():
        figures["c2st_against_time.png"] = plots.c2st_against_time(summary)
    if len(pairs):
        figures["paired_differences.png"] = plots.paired_differences(
            differences, pairs, reference
        )
    for name, figure in figures.items():
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=150)
        write_whole(out / name, image.getvalue())
    text = _markdown(rows, summary, comparison, pairs, reference, list(figures))
    write_whole(out / "report.md", text)
    failed = int((rows["status"] == "failed").sum())
    return f"{out / 'report.md'}: {len(rows)} rows, {failed} of them failed."


def in_order(names: Iterable[str]) -> list[str]:
    """Return names of methods in the order of `METHODS`, others last."""
    known = list(METHODS)
    return sorted(
        names, key=lambda name: (known.index(name) if name in known else 1000, name)
    )


def _tasks_in_order(table: pd.DataFrame) -> list[str]:
    """Return the tasks of a table in the order of `TASKS`, others last."""
    known = list(TASKS)
    return sorted(
        table["task"].unique(),
        key=lambda task: (known.index(task) if task in known else 1000, task),
    )


def _t_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of Student's t of a mean; NaN for a single value."""
    if len(values) < 2:
        return float("nan"), float("nan")
    half = student_t.ppf(0.975, len(values) - 1) * values.std(ddof=1)
    half /= np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def _with_published(summary: pd.DataFrame) -> pd.DataFrame:
    """Return C2ST by task, budget and method, with the published figures of those."""
    ours = summary[summary["quantity"] == "c2st"].drop(columns="quantity")
    theirs = published().rename(
        columns={
            "c2st_mean": "mean",
            "c2st_std": "std_observations",
            "observations": "rows",
        }
    )
    measured = set(zip(ours["task"], ours["budget"], strict=True))
    here = [
        pair in measured for pair in zip(theirs["task"], theirs["budget"], strict=True)
    ]
    ours = ours.assign(source="measured")
    return pd.concat([ours, theirs[here]], ignore_index=True)[
        ["source", *ours.columns.drop("source")]
    ]


def _markdown(
    rows: pd.DataFrame,
    summary: pd.DataFrame,
    comparison: pd.DataFrame,
    pairs: pd.DataFrame,
    reference: str,
    figures: list[str],
) -> str:
    """Return the report as Markdown."""
    failed = rows[rows["status"] == "failed"]
    versions = ", ".join(
        f"{name} {' and '.join(sorted(rows[f'version_{name}'].unique()))}"
        for name in ("sbi_jeffreys", "sbi", "torch")
    )
    parts = [
        "# Benchmark report",
        f"{len(rows)} rows (task, method, budget, seed, observation), {len(failed)} of "
        f"them failed. Versions: {versions}.",
        "C2ST is sbibm's: 0.5 is perfect, 1 is worst. Each cell is the mean ± standard "
        "deviation over seeds (of the mean over observations), and in parentheses the "
        "standard deviation over observations (of the mean over seeds). The least mean "
        "of each column is bold. † marks a cell that lacks rows which other methods "
        "have, with their number; such a cell is never the best, and its mean is not "
        "comparable. Published figures, in italics, are copied from their sources "
        "(tasks/published/README.md), with the standard deviation over observations.",
    ]
    if comparison.apply(_has_few_samples, axis=1).any():
        parts.append(
            f"‡ marks C2ST of fewer samples than the {NUM_REFERENCE_SAMPLES:,} of the "
            "published figures (`num_samples` in c2st.csv). A classifier that sees "
            "fewer tells them apart less well: compare such cells with each other."
        )
    if comparison.apply(_has_other_samples, axis=1).any():
        parts.append(
            "§ marks C2ST of other numbers of samples than most methods have there "
            "(`num_samples` and `most_samples` in c2st.csv); such a cell is never the "
            "best, and its mean is not comparable."
        )
    for budget in sorted(comparison["budget"].unique()):
        parts += [
            f"## C2ST at {budget:,} simulations",
            _c2st_table(comparison[comparison["budget"] == budget]),
        ]
    for figure, title in (
        ("c2st_against_budget.png", "C2ST against the number of simulations"),
        ("c2st_against_time.png", "C2ST against the time of one training"),
    ):
        if figure in figures:
            parts += [f"## {title}", f"![{title}]({figure})"]
            if len(plots.not_comparable(summary)):
                parts.append("Hollow marks are means that are not comparable (†, §).")
    if len(pairs):
        parts += [
            f"## {reference} against each peer, in pairs",
            f"C2ST of {reference} minus C2ST of the peer on the same simulations and "
            "observations: negative where it is better. In brackets the 95 % interval "
            "of Student's t: for a task over its seeds, for all tasks over the means "
            "of those that both have, as if tasks were drawn from many; none of a "
            "single one. `better` counts the seeds with a negative difference. † marks "
            "where pairs of rows are missing, with their number."
            + (
                f" Left out are {unequal:,} rows of peers whose number of samples is "
                f"not that of {reference}."
                if (unequal := count_unequal_pairs(rows, reference))
                else ""
            ),
            _pairs_table(pairs),
            "![Paired differences](paired_differences.png)",
        ]
    parts += [
        "## Costs",
        "Means over the tasks, seeds and observations that a method has; `tasks` and "
        "`rows` say how many: those of other tasks are not comparable. A training is "
        "shared by the posteriors and observations that it serves; sampling and "
        "scoring are for one observation. Peak memory is that of the process while it "
        "simulates, trains and samples, libraries included. `÷ npe_nsf` is the "
        "geometric mean of the ratio of the training time to npe_nsf's, over the tasks "
        "and seeds that both have.",
        _costs_table(rows),
        *(["## Arguments of train", table] if (table := _train_table(rows)) else []),
        "## Versions",
        "Commits of the clone that made the rows, with the number of rows.",
        _versions_table(rows),
        "## Failed rows",
        _failures_table(failed) if len(failed) else "None.",
    ]
    return "\n\n".join(parts) + "\n"


def _c2st_table(comparison: pd.DataFrame) -> str:
    """Return the table of one budget: methods down, tasks across."""
    tasks = _tasks_in_order(comparison)
    lines, means = [], []
    ours = comparison[comparison["source"] == "measured"]
    labels = {("measured", name): name for name in in_order(ours["method"].unique())}
    for origin, citation in _SOURCES.items():
        theirs = comparison.loc[comparison["source"] == origin, "method"]
        for name in sorted(theirs.unique()):
            labels[origin, name] = f"*{name}, {citation}*"
    for (source, name), label in labels.items():
        of_method = comparison[
            (comparison["source"] == source) & (comparison["method"] == name)
        ].set_index("task")
        cells = [
            _cell(of_method.loc[task]) if task in of_method.index else "–"
            for task in tasks
        ]
        # A mean over other rows than the rest of the column would mislead.
        whole = of_method["mean"].notna()
        if source == "measured":
            whole &= of_method["comparable"].astype(bool)
        is_whole = set(tasks) <= set(of_method.index[whole])
        mean = of_method["mean"].mean() if is_whole else float("nan")
        lines.append([label, *cells, _number(mean)])
        means.append(mean if source == "measured" else float("nan"))
    if not np.isnan(means).all():
        best = lines[int(np.nanargmin(means))]
        best[-1] = f"**{best[-1]}**"
    return markdown_table(["method", *tasks, "mean"], lines)


def _cell(line: pd.Series) -> str:
    """Return the text of one cell of the C2ST table."""
    if pd.isna(line["mean"]):
        return f"failed † 0/{line['expected']:.0f}" if line["failed"] else "–"
    text = f"{line['mean']:.3f}"
    if line["source"] == "measured":
        text += f" ± {_number(line['std_seeds'])}"
    text += f" ({_number(line['std_observations'])})"
    if line["best"] is True:
        text = f"**{text}**"
    if line["source"] == "measured" and line["rows"] < line["expected"]:
        text += f" † {line['rows']:.0f}/{line['expected']:.0f}"
    elif _has_other_samples(line):
        text += " §"
    if _has_few_samples(line):
        text += " ‡"
    return text


def _has_few_samples(line: pd.Series) -> bool:
    """Return whether a cell was measured with fewer samples than published ones."""
    return line["source"] == "measured" and line["num_samples"] < NUM_REFERENCE_SAMPLES


def _has_other_samples(line: pd.Series) -> bool:
    """Return whether a cell has other numbers of samples than most of its column."""
    return (
        line["source"] == "measured"
        and line["rows"] == line["expected"]
        and not line["comparable"]
    )


def _pairs_table(pairs: pd.DataFrame) -> str:
    """Return the table of paired differences: peers down, tasks across."""
    tasks = _tasks_in_order(pairs)
    lines = []
    for (budget, peer), group in pairs.groupby(["budget", "peer"], sort=False):
        by_task = group.set_index("task")
        cells = []
        for task in tasks:
            if task not in by_task.index:
                cells.append("–")
                continue
            line = by_task.loc[task]
            text = f"{line['mean']:+.3f} [{_signed(line['low'])}, "
            text += f"{_signed(line['high'])}], better {line['better']}/{line['seeds']}"
            if task == "all tasks":
                text += f", {line['tasks']} of {line['all_tasks']} tasks"
            if line["rows"] < line["expected"]:
                text += f" † {line['rows']}/{line['expected']}"
            cells.append(text)
        lines.append([f"{budget:,}", str(peer), *cells])
    return markdown_table(["budget", "peer", *tasks], lines)


def _costs_table(rows: pd.DataFrame) -> str:
    """Return the table of costs: methods by budget."""
    good = rows[rows["status"] == "ok"]
    columns = ["training_seconds", "sampling_seconds", "scoring_seconds", "epochs"]
    columns += ["peak_memory_mb"]
    trainings = good.groupby(["budget", "task", "seed", "method"])["training_seconds"]
    logs = np.log(trainings.mean()).unstack("method")
    methods = in_order(good["method"].unique())
    expected = expected_rows(rows)
    lines = []
    for (budget, method), group in good.groupby(["budget", "method"]):
        ratio = "–"
        if "npe_nsf" in logs:
            logarithm = (logs[method] - logs["npe_nsf"]).loc[budget].dropna()
            ratio = f"{np.exp(logarithm.mean()):.2f}" if len(logarithm) else "–"
        means = group[columns].mean()
        of_budget = expected.xs(budget, level="budget")
        lines.append([
            budget,
            method,
            f"{means['training_seconds']:.1f}",
            ratio,
            f"{means['sampling_seconds']:.2f}",
            f"{means['scoring_seconds']:.2f}",
            f"{means['epochs']:.0f}",
            f"{means['peak_memory_mb']:.0f}",
            f"{group['task'].nunique()} of {len(of_budget)}",
            f"{len(group)}/{of_budget.sum()}",
        ])
    lines.sort(key=lambda line: (line[0], methods.index(line[1])))
    return markdown_table(
        [
            "budget",
            "method",
            "training s",
            "÷ npe_nsf",
            "sampling s",
            "scoring s",
            "epochs",
            "peak memory MB",
            "tasks",
            "rows",
        ],
        [[f"{line[0]:,}", *line[1:]] for line in lines],
    )


def _versions_table(rows: pd.DataFrame) -> str:
    """Return the table of the commits that made the rows of each method."""
    lines = []
    for method in in_order(rows["method"].unique()):
        counts = rows.loc[rows["method"] == method, "commit"].value_counts()
        texts = [f"{commit or 'unknown'} ({num})" for commit, num in counts.items()]
        lines.append([method, ", ".join(texts)])
    return markdown_table(["method", "commits"], lines)


def _failures_table(failed: pd.DataFrame) -> str:
    """Return the table of failed rows, equal errors together."""
    lines = []
    columns = ["task", "method", "budget", "error_type", "error_message"]
    for cell, group in failed.groupby(columns):
        task, method, budget, error, message = map(str, cell)
        short = " ".join(message.split())[:200].replace("|", "\\|")
        which = "; ".join(
            f"seed {seed}: {', '.join(map(str, part['observation']))}"
            for seed, part in group.groupby("seed")
        )
        lines.append([
            task,
            method,
            budget,
            str(len(group)),
            which,
            f"{error}: {short}",
        ])
    return markdown_table(
        ["task", "method", "budget", "rows", "observations", "error"], lines
    )


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def _number(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.3f}"


def _signed(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:+.3f}"
