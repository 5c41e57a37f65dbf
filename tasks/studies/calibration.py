r"""Calibration: whether the accuracy of JeffreysNPE costs coverage.

    python -m tasks.studies.calibration --seeds 201,202 --report DIR

All methods are trained on the same simulations, as the benchmark trains them: with the
benchmark's seeds these are the very posteriors of its tables. Over fresh simulations,
the same for all, `sbi_jeffreys.metrics.expected_coverage` measures two errors:

- SBC: the mean error of the distribution of a parameter's levels, in the mean over the
  parameters;
- ATC: the area between the expected coverage of TARP and the diagonal above one half.

Each training leaves one file for each of its posteriors, with the ranks themselves, so
that two methods can be compared on the same simulations. The same command makes only
what is missing.
"""

import argparse
import contextlib
import io
import json
import math
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import sbi
import torch
from sbi.diagnostics.tarp import get_tarp_references
from sbi.utils.sbiutils import seed_all_backends
from scipy.stats import kstwo, norm
from torch import Tensor
from tqdm import tqdm

import sbi_jeffreys
from sbi_jeffreys.metrics import Coverage, expected_coverage
from tasks import TASKS, get_task
from tasks.command import exit_status
from tasks.errors import InputError
from tasks.methods import METHODS, Method, Problem, get_method
from tasks.report import markdown_table
from tasks.results import settings_text, write_whole
from tasks.run import ctrl_c_ends, seed_of, simulate
from tasks.sweep import check_threads, parse_numbers

Row = dict[str, Any]

NAMES = ("jeffreys", "jeffreys_refined", "npe_maf", "npe_nsf")
PEERS = ("npe_maf", "npe_nsf")
METRICS = {"sbc": "SBC", "atc": "ATC"}

# Of a flow with almost nothing within the prior's support, for each observation.
_SAMPLING_LIMIT = 600.0
_BOOTSTRAP = 200


class Key(NamedTuple):
    """What a row is about."""

    task: str
    method: str
    budget: int
    seed: int

    def path(self, folder: Path) -> Path:
        """Return the file of this row in the results folder `folder`."""
        name = f"budget-{self.budget}_seed-{self.seed}.json"
        return Path(folder) / self.task / self.method / name


@dataclass(frozen=True)
class Unit:
    """The rows that come from one training.

    Args:
        task: Name of the task.
        names: Names of posteriors of one method.
        budget: Number of simulations to train on.
        seed: Seed of the simulations, the training and the samples.
        num_fresh: Number of fresh simulations.
        num_samples: Number of samples of the posterior for each of them.
    """

    task: str
    names: tuple[str, ...]
    budget: int
    seed: int
    num_fresh: int = 500
    num_samples: int = 200

    @property
    def keys(self) -> list[Key]:
        """Return the keys of the rows."""
        return [Key(self.task, name, self.budget, self.seed) for name in self.names]

    def settings(self, name: str) -> dict[str, Any]:
        """Return all settings behind the row of the posterior `name`."""
        return {
            **get_method(name).settings(name),
            "num_fresh": self.num_fresh,
            "num_samples": self.num_samples,
        }


def run_unit(unit: Unit) -> list[Row]:
    """Train once and return the row of each posterior, whatever goes wrong.

    An error makes a failed row, which carries it and has no ranks.
    """
    task = get_task(unit.task)
    rows: list[Row] = []
    seconds = math.nan
    try:
        theta, x = simulate(unit.task, unit.budget, unit.seed)
        seed = seed_of("training", unit.task, unit.budget, unit.seed)
        start = time.perf_counter()
        # sbi's trainers print how they end.
        with ctrl_c_ends(), contextlib.redirect_stdout(io.StringIO()):
            fit = get_method(unit.names[0]).fit(Problem(task, theta, x, seed))
        seconds = time.perf_counter() - start
        theta, x, references = fresh_simulations(unit)
    except Exception as error:
        return [_row(unit, key, seconds, error=error) for key in unit.keys]
    for key in unit.keys:
        try:
            posterior = fit.posteriors[key.method]
            if isinstance(posterior, Exception):
                raise posterior
            seed_all_backends(seed_of("coverage", unit.task, unit.budget, unit.seed))
            start = time.perf_counter()
            coverage = expected_coverage(
                posterior,
                theta,
                x,
                references,
                unit.num_samples,
                show_progress_bar=False,
                max_sampling_time=_SAMPLING_LIMIT,
            )
            sampling_seconds = time.perf_counter() - start
            row = _row(unit, key, seconds, sampling_seconds, coverage)
        except Exception as error:
            row = _row(unit, key, seconds, error=error)
        rows.append(row)
    return rows


def fresh_simulations(unit: Unit) -> tuple[Tensor, Tensor, Tensor]:
    """Return parameters, data and TARP's reference points, the same for all methods."""
    task = get_task(unit.task)
    seed_all_backends(seed_of("fresh", unit.task, unit.budget, unit.seed))
    theta = task.prior.sample(torch.Size((unit.num_fresh,)))
    return theta, task.simulator(theta), get_tarp_references(theta)


def _row(
    unit: Unit,
    key: Key,
    training_seconds: float,
    sampling_seconds: float = math.nan,
    coverage: Coverage | None = None,
    error: Exception | None = None,
) -> Row:
    row = {
        **key._asdict(),
        "status": "ok",
        "training_seconds": training_seconds,
        "sampling_seconds": sampling_seconds,
        "version_sbi_jeffreys": sbi_jeffreys.__version__,
        "version_sbi": sbi.__version__,
        "version_torch": torch.__version__,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": unit.settings(key.method),
        "ranks": [],
        "distance_ranks": [],
        "error": "",
        "traceback": "",
    }
    if coverage is not None:
        row["ranks"] = coverage.ranks.int().tolist()
        row["distance_ranks"] = coverage.distance_ranks.int().tolist()
    if error is not None:
        row["status"] = "failed"
        row["error"] = f"{type(error).__name__}: {error}"
        row["traceback"] = "".join(traceback.format_exception(error))
    return row


def read_rows(folder: Path) -> dict[Key, Row]:
    """Return every row of a results folder, in order; none if it does not exist.

    Raises:
        InputError: If a file is not a row of this study.
    """
    rows = {}
    for path in sorted(Path(folder).glob("*/*/budget-*.json")):
        try:
            row = json.loads(path.read_text())
            key = Key(**{field: row[field] for field in Key._fields})
            if key.path(folder) != path or "distance_ranks" not in row:
                raise ValueError(f"it says it is of {key}")
            _place(key)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is not a row of a calibration study ({error}). Remove the "
                "file and run the study again, or name another folder."
            ) from error
        rows[key] = row
    return dict(sorted(rows.items(), key=lambda item: _place(item[0])))


def _place(key: Key) -> tuple[int, ...]:
    """Return the place of a row: by budget, task, method and seed."""
    task, method = list(TASKS).index(key.task), list(METHODS).index(key.method)
    return key.budget, task, method, key.seed


def run_study(
    folder: Path, units: Iterable[Unit], retry_failed: bool = False
) -> tuple[int, int, int]:
    """Make the rows that are not in the folder yet.

    Args:
        folder: The results folder.
        units: What to make.
        retry_failed: Whether to make failed rows again.

    Returns:
        Number of rows made, of rows that were there, and how many of both failed.

    Raises:
        InputError: If the folder holds a row of these made with other settings.
    """
    there = read_rows(folder)
    if retry_failed:
        # As if they were not there, whatever they were made with.
        there = {key: row for key, row in there.items() if row["status"] != "failed"}
    missing = []
    num_found = num_failed = 0
    for unit in units:
        for key in unit.keys:
            if key not in there:
                continue
            old, new = there[key]["settings"], unit.settings(key.method)
            if settings_text(old) != settings_text(new):
                raise InputError(
                    f"{folder} holds the row of {key} with other settings: {old} "
                    f"instead of {new}. Name another folder with --results, or give "
                    "the same options; --retry-failed makes failed rows again."
                )
            num_found += 1
            num_failed += there[key]["status"] == "failed"
        names = tuple(key.method for key in unit.keys if key not in there)
        if names:
            missing.append(replace(unit, names=names))
    num_made = 0
    for unit in (bar := tqdm(missing, unit="training", mininterval=10)):
        bar.set_postfix_str(f"{unit.task} {' '.join(unit.names)} {unit.seed}")
        for key, row in zip(unit.keys, run_unit(unit), strict=True):
            write_whole(key.path(folder), json.dumps(row) + "\n")
            num_made += 1
            num_failed += row["status"] == "failed"
    return num_made, num_found, num_failed


def planned_units(
    tasks: Sequence[str],
    names: Sequence[str],
    budget: int,
    seeds: Sequence[int],
    num_fresh: int = 500,
    num_samples: int = 200,
) -> list[Unit]:
    """Return the trainings of a grid; posteriors of one method share a training.

    Raises:
        InputError: If a name is not known, a method is trained for one observation, or
            a number is not positive.
    """
    for what, number, least in (
        ("--budget", budget, 1),
        ("--fresh", num_fresh, 2),
        ("--num-samples", num_samples, 1),
    ):
        if number < least:
            raise InputError(f"{what} must be at least {least}, got {number}.")
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"unknown task {task!r}. Known: {', '.join(TASKS)}.")
    by_method: dict[Method, list[str]] = {}
    for name in dict.fromkeys(names):
        method = get_method(name)
        if not method.amortized:
            raise InputError(
                f"{name} is trained for one observation, so that its coverage over "
                f"{num_fresh} is not known. Methods trained for all: "
                f"{', '.join(name for name, m in METHODS.items() if m.amortized)}."
            )
        by_method.setdefault(method, []).append(name)
    return [
        Unit(task, tuple(group), budget, seed, num_fresh, num_samples)
        for seed in seeds
        for task in dict.fromkeys(tasks)
        for group in by_method.values()
    ]


def coverage_of(row: Row) -> Coverage:
    """Return what a row measured."""
    return Coverage(
        torch.tensor(row["ranks"]),
        torch.tensor(row["distance_ranks"]),
        row["settings"]["num_samples"],
    )


def errors_of(coverage: Coverage) -> dict[str, float]:
    """Return the two errors that methods are compared by; zero is best."""
    return {"sbc": coverage.sbc_area.mean().item(), "atc": abs(coverage.atc)}


def measure(rows: dict[Key, Row]) -> pd.DataFrame:
    """Return what each row measured, one line for a row; NaN where it failed."""
    lines = []
    for key, row in rows.items():
        line = {
            **key._asdict(),
            **{name: row[name] for name in ("status", "error")},
            **{name: row["settings"][name] for name in ("num_fresh", "num_samples")},
        }
        if row["status"] == "ok":
            coverage = coverage_of(row)
            line |= {
                "sbc_area": coverage.sbc_area.mean().item(),
                "sbc_error": coverage.sbc_error.max().item(),
                "sbc_p": coverage.sbc_p_value.min().item(),
                "interval_50": coverage.intervals(0.5).mean().item(),
                "interval_90": coverage.intervals(0.9).mean().item(),
                "atc": coverage.atc,
                "atc_standard_error": coverage.atc_standard_error,
                "tarp_error": coverage.tarp_error,
                "tarp_p": coverage.tarp_p_value,
            }
        line |= {
            name: row[name]
            for name in ("training_seconds", "sampling_seconds", "version_torch")
        }
        lines.append(line)
    columns = [*Key._fields, "status", "error"]
    return pd.DataFrame(lines, columns=None if lines else pd.Index(columns))


def compare(rows: dict[Key, Row], peers: Sequence[str] = PEERS) -> pd.DataFrame:
    r"""Return by how much the errors of each method exceed those of each peer.

    The difference on one seed has the standard error of a bootstrap over the fresh
    simulations, the same resamples for both methods; that of the mean over S seeds is
    $(\sum_s \mathrm{SE}_s^2)^{1/2} / S$. Where the errors, which have no sign, are
    nearly zero, it is up to a third too large. It does not hold what other trainings
    would change; `std_seeds` tells that, where there are several seeds.

    Args:
        rows: Rows by their keys, as `read_rows` gives them.
        peers: Methods with which the others are compared.

    Returns:
        One line for each budget, task, method, peer and metric (`sbc`: mean over the
        parameters; `atc`: without its sign), with `verdict` "worse" or "better" where
        the difference exceeds two standard errors.
    """
    good = {key: coverage_of(row) for key, row in rows.items() if row["status"] == "ok"}
    replicates = {key: _bootstrap(coverage) for key, coverage in good.items()}
    lines = []
    cells = dict.fromkeys((key.budget, key.task, key.method) for key in good)
    for budget, task, method in cells:
        if method in peers:
            continue
        for peer in peers:
            pairs = [
                (key, key._replace(method=peer))
                for key in good
                if (key.budget, key.task, key.method) == (budget, task, method)
                and key._replace(method=peer) in good
            ]
            if not pairs:
                continue
            for pair in pairs:
                sizes = [len(good[key].ranks) for key in pair]
                if sizes[0] != sizes[1]:
                    raise InputError(
                        f"{pair[0]} and {pair[1]} are of {sizes[0]} and {sizes[1]} "
                        "fresh simulations. Make them with the same --fresh."
                    )
            for metric in METRICS:
                differences = [
                    errors_of(good[ours])[metric] - errors_of(good[theirs])[metric]
                    for ours, theirs in pairs
                ]
                variances = [
                    (replicates[ours][metric] - replicates[theirs][metric]).var().item()
                    for ours, theirs in pairs
                ]
                difference = sum(differences) / len(pairs)
                error = math.sqrt(sum(variances)) / len(pairs)
                verdict = ""
                if abs(difference) > 2 * error:
                    verdict = "worse" if difference > 0 else "better"
                lines.append({
                    "budget": budget,
                    "task": task,
                    "method": method,
                    "peer": peer,
                    "metric": metric,
                    "difference": difference,
                    "standard_error": error,
                    "std_seeds": pd.Series(differences).std(),
                    "seeds": len(pairs),
                    "verdict": verdict,
                })
    return pd.DataFrame(lines)


def _bootstrap(coverage: Coverage) -> dict[str, Tensor]:
    """Return the errors over resampled simulations, the same for equal numbers."""
    size = len(coverage.ranks)
    generator = torch.Generator().manual_seed(size)
    found = []
    for _ in range(_BOOTSTRAP):
        index = torch.randint(size, (size,), generator=generator)
        found.append(
            errors_of(
                Coverage(
                    coverage.ranks[index],
                    coverage.distance_ranks[index],
                    coverage.num_posterior_samples,
                )
            )
        )
    return {
        metric: torch.tensor([errors[metric] for errors in found]) for metric in METRICS
    }


def write_report(folder: Path, out: Path, peers: Sequence[str] = PEERS) -> str:
    """Write report.md, rows.csv and comparison.csv of a results folder.

    Args:
        folder: The results folder.
        out: The folder to write into.
        peers: Methods with which the others are compared.

    Returns:
        One line that says what was written.

    Raises:
        InputError: If there are no rows.
    """
    rows = read_rows(folder)
    if not rows:
        raise InputError(f"{folder} holds no rows. Name tasks with --tasks.")
    measured, compared = measure(rows), compare(rows, peers)
    write_whole(out / "rows.csv", measured.to_csv(index=False))
    write_whole(out / "comparison.csv", compared.to_csv(index=False))
    write_whole(out / "report.md", _markdown(measured, compared))
    num_failed = int((measured["status"] == "failed").sum())
    return f"{out / 'report.md'}: {len(rows)} rows, {num_failed} of them failed."


def _markdown(measured: pd.DataFrame, compared: pd.DataFrame) -> str:
    sizes = sorted(measured["num_fresh"].unique())
    # Mean and standard deviation of the area under a Brownian bridge.
    by_chance = " and ".join(
        f"{0.3133 / size**0.5:.3f} ± {0.1360 / size**0.5:.3f} and "
        f"{kstwo.mean(size):.3f} ± {kstwo.std(size):.3f} over {size} simulations"
        for size in sizes
    )
    parts = [
        "# Calibration",
        "Expected coverage over fresh simulations, in the mean over the seeds.",
        "- **SBC**: mean error of the distribution of a parameter's levels, in the "
        "mean over the parameters; **worst parameter**: its largest error, with the "
        "smallest p-value of all seeds. Of the true posterior, for one parameter: "
        f"{by_chance}.\n"
        "- **50 %, 90 %**: share of the parameters within the central intervals of "
        "that posterior probability.\n"
        "- **ATC**: area between TARP's expected coverage and the diagonal above one "
        "half, ± its standard error over simulations. Below 0: too narrow, or beside "
        "the point; above 0: too wide. Of the true posterior: 0.\n"
        "- **against**: difference of SBC and of the ATC without its sign, "
        "± two standard errors over the fresh simulations, which both methods share. "
        "Positive: less calibrated than that peer; in bold if beyond two standard "
        "errors.",
    ]
    if len(compared):
        parts += ["## Who is worse", _verdicts(compared)]
    for (budget, task), group in measured.groupby(["budget", "task"], sort=False):  # type: ignore[misc]
        parts.append(f"## {task}, {budget} simulations")
        parts.append(_task_table(group, compared))
    failed = measured.query("status == 'failed'")
    if len(failed):
        parts += ["## Failed", _failures_table(failed)]
    return "\n\n".join(parts) + "\n"


def _verdicts(compared: pd.DataFrame) -> str:
    """Return how often each method is worse than each peer, and where."""
    lines = []
    keys = ["budget", "method", "peer", "metric"]
    for (budget, method, peer, metric), group in compared.groupby(keys, sort=False):  # type: ignore[misc]
        worse = group.loc[group["verdict"] == "worse", "task"]
        better = group.loc[group["verdict"] == "better", "task"]
        lines.append([
            str(budget),
            str(method),
            str(peer),
            METRICS[str(metric)],
            f"{group['difference'].mean():+.3f}",
            f"{len(worse)} of {len(group)}" + _names(worse),
            f"{len(better)} of {len(group)}" + _names(better),
        ])
    chance = norm.sf(2)
    table = markdown_table(
        ["budget", "method", "against", "error", "mean difference", "worse", "better"],
        lines,
    )
    return (
        f"{table}\n\nOf {len(compared)} comparisons, "
        f"{(compared['verdict'] == 'worse').sum()} are worse and "
        f"{(compared['verdict'] == 'better').sum()} better beyond two standard errors. "
        f"Chance alone would give about {chance * len(compared):.1f} of each between "
        "equals."
    )


def _names(tasks: pd.Series) -> str:
    return f": {', '.join(tasks)}" if len(tasks) else ""


def _task_table(measured: pd.DataFrame, compared: pd.DataFrame) -> str:
    peers = list(dict.fromkeys(compared["peer"])) if len(compared) else []
    lines = []
    for (budget, task, method), group in measured.groupby(  # type: ignore[misc]
        ["budget", "task", "method"], sort=False
    ):
        good = group.query("status == 'ok'")
        line = [str(method), f"{len(good)}/{len(group)}"]
        if len(good):
            p_value = good["sbc_p"].min()
            # Of the mean over seeds, whose fresh simulations are independent.
            error = np.linalg.norm(good["atc_standard_error"]) / len(good)
            line += [
                f"{good['sbc_area'].mean():.3f}",
                f"{good['sbc_error'].mean():.3f} "
                + ("(p < 0.001)" if p_value < 1e-3 else f"(p = {p_value:.3f})"),
                f"{100 * good['interval_50'].mean():.0f} %",
                f"{100 * good['interval_90'].mean():.0f} %",
                f"{good['atc'].mean():+.4f} ± {error:.4f}",
            ]
        else:
            line += ["–"] * 5
        line += [_against(compared, budget, task, method, peer) for peer in peers]
        lines.append(line)
    header = ["method", "seeds", "SBC", "worst parameter", "50 %", "90 %", "ATC"]
    return markdown_table([*header, *(f"against {peer}" for peer in peers)], lines)


def _against(
    compared: pd.DataFrame, budget: int, task: str, method: str, peer: str
) -> str:
    keys = ["budget", "task", "method", "peer"]
    these = compared[(compared[keys] == [budget, task, method, peer]).all(axis=1)]
    texts = []
    for _, line in these.iterrows():
        text = f"{line['difference']:+.3f} ± {2 * line['standard_error']:.3f}"
        if line["verdict"]:
            text = f"**{text} {line['verdict']}**"
        texts.append(f"{METRICS[line['metric']]} {text}")
    return ", ".join(texts) or "–"


def _failures_table(failed: pd.DataFrame) -> str:
    columns = [*Key._fields, "error"]
    lines = [
        [str(value).replace("|", "\\|").replace("\n", " ") for value in line]
        for line in failed[columns].itertuples(index=False)
    ]
    return markdown_table(columns, lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The arguments; those of the process if None.

    Returns:
        The exit status: 0; 1 if rows failed; 2 for wrong input; 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    return exit_status(
        _run, options, interrupted="interrupted; the same command goes on from here."
    )


def _run(options: argparse.Namespace) -> int:
    """Make the rows that are missing, and the report if one is wanted."""
    check_threads(options.threads)
    torch.set_num_threads(options.threads)
    units = planned_units(
        options.tasks,
        options.methods,
        options.budget,
        parse_numbers("seeds", options.seeds),
        options.fresh,
        options.num_samples,
    )
    made, found, failed = run_study(options.results, units, options.retry_failed)
    print(
        f"{options.results}: {made} rows added, {found} were there, {failed} of them "
        "failed."
    )
    if options.report is not None:
        print(write_report(options.results, options.report, options.against))
    if failed:
        print("`--retry-failed` runs failed rows again.")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.studies.calibration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--tasks",
        nargs="*",
        default=list(TASKS),
        metavar="TASK",
        help="default all; no name after --tasks for none, to report only",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(NAMES),
        metavar="METHOD",
        help=f"default {' '.join(NAMES)}",
    )
    parser.add_argument(
        "--budget", type=int, default=1_000, help="simulations (default 1000)"
    )
    parser.add_argument(
        "--seeds", default="201", help="such as 201 (default) or 201-203"
    )
    parser.add_argument(
        "--fresh", type=int, default=500, help="fresh simulations (default 500)"
    )
    parser.add_argument(
        "--num-samples",
        type=int,
        default=200,
        help="of the posterior for each fresh simulation (default 200)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("results/calibration"),
        help="folder of the rows (default results/calibration)",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="write the tables of all rows into this folder afterwards",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        default=list(PEERS),
        metavar="METHOD",
        help=f"methods to compare with (default {' '.join(PEERS)})",
    )
    parser.add_argument(
        "--retry-failed", action="store_true", help="make failed rows again"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads (default 1)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
