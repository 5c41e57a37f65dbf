"""The rows of a study in one CSV file, which a later run goes on with."""

import argparse
import contextlib
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tasks import TASKS
from tasks.results import Row, write_whole
from tasks.run import ctrl_c_ends


def read_rows(path: Path) -> pd.DataFrame:
    """Return the rows of a file, none if it is not there."""
    return pd.read_csv(path) if path.exists() else pd.DataFrame()


def run_missing(
    path: Path, keys: Iterable[Row], run: Callable[..., list[dict[str, Any]]]
) -> None:
    """Add the rows of all keys that the file does not have, and print them.

    Several processes may add to one file: each looks before a run, and again before it
    writes, which is in the file by now. A run that Ctrl-C cut short adds nothing.

    Args:
        path: The file, which is written whole after every key.
        keys: Values of the columns by which rows are told apart.
        run: Returns the rows of a key, whose values it takes in their order.
    """
    for key in keys:
        if _has(read_rows(path), key):
            continue
        with ctrl_c_ends():
            new = pd.DataFrame(run(*key.values()))
        with _alone_in(path.parent):
            rows = read_rows(path)
            if _has(rows, key):
                continue
            rows = pd.concat([rows, new], ignore_index=True)
            write_whole(path, rows.to_csv(index=False))
        print(new.to_string(index=False, header=False), flush=True)


def _has(rows: pd.DataFrame, key: Row) -> bool:
    """Return whether there are rows of a key."""
    return bool(len(rows) and (rows[list(key)] == list(key.values())).all(axis=1).any())


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block, which ends with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    # A lock of the folder leaves no file behind.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def print_report(
    path: Path,
    report: Callable[[pd.DataFrame], str],
    parser: argparse.ArgumentParser,
) -> None:
    """Print what a study reports of the rows of a file, or end if it has none."""
    rows = read_rows(path)
    if rows.empty:
        parser.error(f"{path} has no rows; run it without --report first.")
    print(report(rows))


def run_trainings(
    description: str,
    seeds: Sequence[int],
    run: Callable[[str, int, int], list[dict[str, Any]]],
    report: Callable[[pd.DataFrame], str],
) -> None:
    """Be the command of a study with one training for each task, budget and seed.

    It runs what is not in its file yet, or reports what is.

    Args:
        description: What the study is about, in a line.
        seeds: Those that are run if none are named.
        run: Returns the rows of a task, a budget and a seed.
        report: Returns the rows as Markdown.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="CSV file of the rows")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--budget", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--report", action="store_true", help="print the tables only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.report:
        print_report(arguments.out, report, parser)
        return
    keys = (
        {"task": task, "budget": arguments.budget, "seed": seed}
        for seed in arguments.seeds
        for task in arguments.tasks
    )
    run_missing(arguments.out, keys, run)
