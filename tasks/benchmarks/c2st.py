"""Our C2ST against scikit-learn's: accuracy on published posteriors, and speed.

    python -m tasks.benchmarks.c2st accuracy
    python -m tasks.benchmarks.c2st report
    python -m tasks.benchmarks.c2st speed

`accuracy` computes both on 38 pairs of sets of samples, from indistinguishable to
plainly different, with two seeds. It takes about two hours, nearly all of them
scikit-learn's; each finished pair is added to a table (`--out`), and the same
command resumes where it was stopped. `report` says what the table has. `speed` times
both side by side on 10,000 against 10,000 samples of two, five and ten parameters, one
pair and several at once.
"""

import argparse
import csv
import io
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from sbi_jeffreys.metrics import c2st, c2st_many
from tasks import get_task
from tasks.command import exit_status
from tasks.errors import InputError
from tasks.report import markdown_table
from tasks.results import write_whole
from tasks.sweep import check_threads

TASKS = (
    "two_moons",
    "gaussian_mixture",
    "sir",
    "lotka_volterra",
    "slcp",
    "gaussian_linear",
    "gaussian_linear_uniform",
    "bernoulli_glm",
)
SEEDS = (1, 2)
NUM_SAMPLES = 10_000


def scikit_learn_c2st(x: Tensor, y: Tensor, seed: int = 1) -> float:
    """Return the C2ST of the literature, computed with scikit-learn."""
    mean, std = x.mean(dim=0), x.std(dim=0)
    data = torch.cat(((x - mean) / std, (y - mean) / std)).numpy()
    label = np.arange(len(data)) >= len(x)
    hidden = 10 * data.shape[1]
    classifier = MLPClassifier((hidden, hidden), max_iter=10_000, random_state=seed)
    folds = KFold(n_splits=5, shuffle=True, random_state=seed)
    return float(cross_val_score(classifier, data, label, cv=folds).mean())


def published_pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, reference samples and the samples that they are compared with.

    Of the first published posterior of each task: one half of its samples against the
    other half; against the other half with noise; against the other half stretched
    about the mean; and all against the normal distribution of their mean and
    covariance.
    """
    for number, name in enumerate(TASKS):
        generator = torch.Generator().manual_seed(number)
        samples = get_task(name).reference_posterior_samples(1)
        samples = samples[torch.randperm(len(samples), generator=generator)]
        mean, std = samples.mean(dim=0), samples.std(dim=0)
        x, y = samples.tensor_split(2)
        yield f"{name}, same", x, y
        noise = torch.randn(y.shape, generator=generator)
        yield f"{name}, noisy", x, y + 0.15 * std * noise
        yield f"{name}, stretched", x, mean + 1.15 * (y - mean)
        noise = torch.randn(samples.shape, generator=generator)
        normal = mean + noise @ torch.linalg.cholesky(samples.T.cov()).T
        yield f"{name}, normal", samples, normal


def normal_pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield shifted normal distributions, with the best accuracy there is."""
    for dim in (2, 5, 10):
        for shift in (0.1, 1.0):
            generator = torch.Generator().manual_seed(dim)
            x, y = torch.randn(2, NUM_SAMPLES, dim, generator=generator)
            y[:, 0] += shift
            best = 0.5 * (1.0 + math.erf(shift / math.sqrt(8.0)))
            yield f"{dim}-D normal, shift {shift} (best {best:.3f})", x, y


def timed(function: Callable, *arguments: Any) -> tuple[Any, float, float]:
    """Return the result with the seconds on the clock and of the processors."""
    clock, processor = time.perf_counter(), time.process_time()
    result = function(*arguments)
    return result, time.perf_counter() - clock, time.process_time() - processor


COLUMNS = (
    "pair",
    "dim",
    "samples",
    *(f"sklearn_{seed}" for seed in SEEDS),
    *(f"ours_{seed}" for seed in SEEDS),
    "sklearn_seconds",
    "ours_seconds",
)


def accuracy(path: Path) -> None:
    """Compare on all pairs, with one thread each, and print the differences.

    Args:
        path: The table, to which pairs that are not in it are added.
    """
    torch.set_num_threads(1)
    done = {row["pair"] for row in _read(path)}
    for name, x, y in (*published_pairs(), *normal_pairs()):
        if name in done:
            continue
        theirs = [timed(scikit_learn_c2st, x, y, seed) for seed in SEEDS]
        ours = [timed(c2st, x, y, seed) for seed in SEEDS]
        row: list[Any] = [name, x.shape[1], len(x)]
        row += [f"{value:.5f}" for value, _, _ in (*theirs, *ours)]
        # Processor seconds: other work on the machine matters less to them.
        row += [f"{np.mean([run[2] for run in r]):.2f}" for r in (theirs, ours)]
        _append(path, row)
        print(*row, sep="\t", flush=True)
    print(report(_read(path)))


def _append(path: Path, row: list[Any]) -> None:
    """Write the table again with one more row, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows(there.values() for there in _read(path))
    writer.writerow(row)
    write_whole(path, text.getvalue())


def _read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table that are whole.

    Tables were once appended to: after a kill a line may lack columns, or hold those
    of the next row, too.

    Raises:
        InputError: If it is another table, or none.
    """
    if not path.exists():
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        try:
            # Where a row is longer than the header the surplus has the name None.
            rows = list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not a CSV file: {error}.") from error
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise InputError(
            f"{path} is no table of pairs, whose columns are {', '.join(COLUMNS)}. "
            "Name one that `accuracy` has written, or a new file."
        )
    return [row for row in rows if set(row) == set(COLUMNS) and all(row.values())]


def report(rows: list[dict[str, str]]) -> str:
    """Return what a table of pairs says, in Markdown."""
    value = {c: np.array([float(row[c]) for row in rows]) for c in COLUMNS[1:]}
    # The seeds of a pair are averaged first: a pair counts once.
    pairs = np.stack([value[f"ours_{s}"] - value[f"sklearn_{s}"] for s in SEEDS])
    mean = pairs.mean(0)
    error = mean.std(ddof=1) / math.sqrt(len(mean))
    seeds = abs(value["sklearn_1"] - value["sklearn_2"])
    ratios = value["sklearn_seconds"] / value["ours_seconds"]
    lines = [
        f"{len(rows)} pairs with {len(SEEDS)} seeds each.",
        "",
        f"- Ours - scikit-learn's: mean {mean.mean():+.5f} ± {error:.5f} (standard "
        f"error), mean absolute {abs(pairs).mean():.5f}, largest "
        f"{abs(pairs).max():.5f}.",
        f"- scikit-learn's with one seed - with the other: mean absolute "
        f"{seeds.mean():.5f}, largest {seeds.max():.5f}.",
        *(
            f"- Processor seconds of scikit-learn's over ours in {dim:.0f} dimensions, "
            f"geometric mean: {np.exp(np.log(ratios[value['dim'] == dim]).mean()):.1f}."
            for dim in np.unique(value["dim"])
        ),
        "",
    ]
    header = ["pair", "dimensions", "samples", *COLUMNS[3:]]
    return "\n".join([
        *lines,
        markdown_table(header, [[*row.values()] for row in rows]),
    ])


def speed(threads: int, num_pairs: int) -> None:
    """Time both side by side with the same number of threads.

    Args:
        threads: Threads of torch; those of scikit-learn's products are set by
            OMP_NUM_THREADS, which should be the same.
        num_pairs: Number of pairs for `c2st_many`.
    """
    torch.set_num_threads(threads)
    for dim in (2, 5, 10):
        torch.manual_seed(dim)
        pairs = list(
            torch.randn(num_pairs, 2, NUM_SAMPLES, dim)
            + torch.tensor([0.0, 0.3])[:, None, None] / math.sqrt(dim)
        )
        theirs, ours, many = (
            timed(scikit_learn_c2st, *pairs[0]),
            timed(c2st, *pairs[0]),
            timed(c2st_many, pairs),
        )
        print(f"{dim}-D, {NUM_SAMPLES} against {NUM_SAMPLES} samples:")
        for name, (value, *seconds), count in (
            ("scikit-learn", theirs, 1),
            ("c2st", ours, 1),
            (f"c2st_many, {num_pairs} pairs", many, num_pairs),
        ):
            first = value if count == 1 else float(value[0])
            clock, processor = (s / count for s in seconds)
            print(
                f"  {name:24s} {first:.4f}  {clock:7.2f} s ({theirs[1] / clock:.1f}x), "
                f"processors {processor:7.2f} s ({theirs[2] / processor:.1f}x) a pair",
                flush=True,
            )


def main(arguments: list[str] | None = None) -> int:
    """Run a study from the command line.

    Args:
        arguments: The arguments; those of the process if None.

    Returns:
        The exit status: 0; 2 for wrong input; 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    studies = parser.add_subparsers(dest="study", required=True)
    study = studies.add_parser("accuracy", help="agreement on 38 pairs")
    study.add_argument("--out", type=Path, default=Path("c2st_accuracy.csv"))
    study = studies.add_parser("report", help="what the table of pairs says")
    study.add_argument("--out", type=Path, default=Path("c2st_accuracy.csv"))
    study = studies.add_parser("speed", help="seconds in 2, 5 and 10 dimensions")
    study.add_argument("--threads", type=int, default=torch.get_num_threads())
    study.add_argument("--pairs", type=int, default=10, help="pairs for c2st_many")
    return exit_status(_run, parser.parse_args(arguments))


def _run(options: argparse.Namespace) -> int:
    if options.study == "accuracy":
        accuracy(options.out)
    elif options.study == "report":
        rows = _read(options.out)
        if not rows:
            raise InputError(
                f"{options.out} has no rows; run `accuracy` with this --out first."
            )
        print(report(rows))
    else:
        check_threads(options.threads)
        if options.pairs < 1:
            raise InputError(f"--pairs must be at least 1, got {options.pairs}.")
        speed(options.threads, options.pairs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
