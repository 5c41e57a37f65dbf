"""The benchmark's command line: ``python -m tasks --help``."""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tasks.command import INTERRUPTED, exit_status


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The arguments; those of the process if None.

    Returns:
        The exit status: 0; 1 if rows failed; 2 for wrong input; 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    return exit_status(options.command, options)


def _run(options: argparse.Namespace) -> int:
    """Make the rows of one task, budget and seed."""
    from tasks.sweep import Sweep, parse_numbers

    sweep = Sweep(
        tasks=(options.task,),
        methods=tuple(options.method),
        budgets=(options.budget,),
        seeds=(options.seed,),
        observations=parse_numbers("observations", options.observations),
        num_samples=options.num_samples,
    )
    return _execute(sweep, options)


def _sweep(options: argparse.Namespace) -> int:
    """Make the rows of a sweep file."""
    from tasks.sweep import Sweep

    if options.results is None:
        options.results = Path("results") / options.file.stem
    return _execute(Sweep.from_toml(options.file), options)


def _execute(sweep, options: argparse.Namespace) -> int:
    """Make the rows of a sweep and say what became of them."""
    from tasks.sweep import run_sweep

    try:
        summary = run_sweep(
            sweep,
            options.results,
            jobs=options.jobs,
            dask=options.dask,
            retry_failed=options.retry_failed,
            threads=options.threads,
            scoring_device=options.scoring_device,
        )
    except KeyboardInterrupt:
        print(
            f"\ninterrupted; the finished rows are in {options.results}. The same "
            "command goes on from there.",
            file=sys.stderr,
        )
        return INTERRUPTED
    print(
        f"{options.results}: {summary.finished} rows added, {summary.found} were "
        f"there, {summary.failed} of them failed."
    )
    for metric, count in summary.unscored.items():
        print(f"{count} rows lack {metric}; remove them to have them made with it.")
    if summary.other_commits:
        print(
            f"{summary.other_commits} of the rows that were there are of other commits."
        )
    if summary.failed:
        print("`--retry-failed` runs failed rows again.")
    return 1 if summary.failed else 0


def _simulate(options: argparse.Namespace) -> int:
    """Write the simulations that the methods are given into a file."""
    from tasks.results import write_whole
    from tasks.run import Chunk, chunks
    from tasks.scale import executor
    from tasks.sweep import Sweep

    # For its checks of the input.
    Sweep((options.task,), ("npe_nsf",), (options.budget,), (options.seed,), (1,))
    parts = chunks(options.task, options.budget, options.seed)
    done = {}
    with executor(options.jobs, options.dask) as calls:
        stream = calls.stream(Chunk.simulate, parts)
        for index, result in tqdm(stream, total=len(parts), unit="chunk"):
            if isinstance(result, Exception):
                raise result
            done[index] = result
    theta, x = (
        np.concatenate([done[i][part].numpy() for i in range(len(parts))])
        for part in (0, 1)
    )
    file = io.BytesIO()
    np.savez_compressed(file, theta=theta, x=x)
    write_whole(options.out, file.getvalue())
    print(f"{options.out}: theta {theta.shape}, x {x.shape}.")
    return 0


def _report(options: argparse.Namespace) -> int:
    """Write tables and plots of results."""
    from tasks.report import write_report

    first = options.results[0]
    beside = first.with_suffix("") if first.is_file() else first
    out = options.out or beside / "report"
    print(write_report(options.results, out, reference=options.reference))
    return 0


def _density(options: argparse.Namespace) -> int:
    """Make the rows of the density studies."""
    import torch

    from tasks.density.studies import STUDIES, execute, planned_runs
    from tasks.density.table import run_all
    from tasks.sweep import check_threads, parse_numbers

    check_threads(options.threads)
    torch.set_num_threads(options.threads)
    seeds = parse_numbers("seeds", options.seeds)
    runs = planned_runs(
        list(STUDIES) if options.studies is None else options.studies, seeds
    )
    made = run_all(runs, execute, options.results, options.retry_failed)
    return _tell(options, *made)


def _images(options: argparse.Namespace) -> int:
    """Make the rows of the study of images."""
    from functools import partial

    import torch

    from tasks.density.images import ImageStudy, execute
    from tasks.density.table import run_all
    from tasks.sweep import check_threads, parse_numbers

    check_threads(options.threads)
    torch.set_num_threads(options.threads)
    study = ImageStudy(options.folder, options.size, options.latent, options.epochs)
    runs = study.runs(parse_numbers("seeds", options.seeds))
    made = run_all(runs, partial(execute, study), options.results, options.retry_failed)
    return _tell(options, *made)


def _tell(
    options: argparse.Namespace, num_made: int, num_found: int, num_failed: int
) -> int:
    """Say what became of the rows of a density study, and plot them."""
    print(
        f"{options.results}: {num_made} rows added, {num_found} were there, "
        f"{num_failed} of them failed."
    )
    if options.report is not None:
        from tasks.density.report import write_report

        print(f"{write_report(options.results, options.report)} written.")
    if num_failed:
        print("`--retry-failed` runs failed rows again.")
    return 1 if num_failed else 0


def _demo(options: argparse.Namespace) -> int:
    """Run the demonstration."""
    from tasks.demo import main as demo

    demo()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tasks",
        description="Simulate, train, sample, score and report: see tasks/README.md.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    where = argparse.ArgumentParser(add_help=False)
    where.add_argument(
        "--jobs", type=int, default=1, help="processes on this machine (default 1)"
    )
    where.add_argument(
        "--dask",
        metavar="ADDRESS",
        help="use the workers of this Dask scheduler, such as tcp://host:8786",
    )
    work = argparse.ArgumentParser(add_help=False)
    work.add_argument(
        "--retry-failed", action="store_true", help="make failed rows again"
    )
    work.add_argument(
        "--threads", type=int, default=1, help="torch threads of a process (default 1)"
    )

    score = argparse.ArgumentParser(add_help=False)
    score.add_argument(
        "--scoring-device",
        default="cpu",
        metavar="DEVICE",
        help="where the classifiers of C2ST are trained, such as cuda (default cpu)",
    )

    run = commands.add_parser(
        "run", parents=[where, work, score], help="one task, budget and seed"
    )
    run.add_argument("--task", required=True, help="such as two_moons")
    run.add_argument(
        "--method", required=True, nargs="+", help="one or more, such as npe_nsf"
    )
    run.add_argument("--budget", type=int, required=True, help="simulations")
    run.add_argument("--seed", type=int, default=1, help="default 1")
    run.add_argument(
        "--observations", default="1-10", help="such as 4, 1-10 (default) or 1-3,7"
    )
    run.add_argument(
        "--num-samples", type=int, default=10_000, help="of a posterior (default 10000)"
    )
    run.add_argument(
        "--results",
        type=Path,
        default=Path("results/run"),
        help="folder of the result table (default results/run)",
    )
    run.set_defaults(command=_run)

    sweep = commands.add_parser(
        "sweep", parents=[where, work, score], help="the grid of a TOML file"
    )
    sweep.add_argument("file", type=Path, metavar="FILE.toml")
    sweep.add_argument(
        "--results",
        type=Path,
        help="folder of the result table (default results/NAME of NAME.toml)",
    )
    sweep.set_defaults(command=_sweep)

    simulate = commands.add_parser(
        "simulate",
        parents=[where],
        help="write the simulations of a task, budget and seed into a file",
    )
    simulate.add_argument("--task", required=True)
    simulate.add_argument("--budget", type=int, required=True, help="simulations")
    simulate.add_argument("--seed", type=int, default=1, help="default 1")
    simulate.add_argument("--out", type=Path, required=True, metavar="FILE.npz")
    simulate.set_defaults(command=_simulate)

    report = commands.add_parser("report", help="tables and plots of results")
    report.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="results folders, or CSV files of earlier reports",
    )
    report.add_argument("--out", type=Path, help="folder (default DIR/report)")
    report.add_argument(
        "--reference",
        default="jeffreys",
        help="method that the others are compared with in pairs (default jeffreys)",
    )
    report.set_defaults(command=_report)

    studies = argparse.ArgumentParser(add_help=False)
    studies.add_argument(
        "--seeds", default="1-5", help="such as 1, 1-5 (default) or 1-3,7"
    )
    studies.add_argument(
        "--results",
        type=Path,
        default=Path("results/density"),
        help="folder of the result table (default results/density)",
    )
    studies.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="write tables and plots of all results into this folder afterwards",
    )

    density = commands.add_parser(
        "density",
        parents=[studies, work],
        help="the paper's experiments on densities",
    )
    density.add_argument(
        "--studies",
        nargs="*",
        metavar="STUDY",
        help="dual_vs_penalty, stability, planar, tabular (default all; no name after "
        "--studies for none)",
    )
    density.set_defaults(command=_density)

    images = commands.add_parser(
        "images",
        parents=[studies, work],
        help="images through the latent space of an autoencoder",
    )
    images.add_argument(
        "--folder",
        type=Path,
        help="folder of images, subfolders being classes (default scikit-learn's "
        "digits)",
    )
    images.add_argument(
        "--size", type=int, default=32, help="pixels of a folder's images (default 32)"
    )
    images.add_argument(
        "--latent", type=int, default=16, help="latent dimensions (default 16)"
    )
    images.add_argument(
        "--epochs", type=int, default=90, help="of the density models (default 90)"
    )
    images.set_defaults(command=_images)

    demo = commands.add_parser("demo", help="NPE and JeffreysNPE on two_moons")
    demo.set_defaults(command=_demo)
    return parser


if __name__ == "__main__":
    sys.exit(main())
