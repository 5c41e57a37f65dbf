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
from tasks.command import exit_status
from tasks.errors import InputError
from tasks.results import Row, write_whole
from tasks.run import ctrl_c_ends


def read_rows(path: Path) -> pd.DataFrame:
    """Return the rows of a file, none if it is not there.

    Raises:
        InputError: If it is no table.
    """
    try:
        return pd.read_csv(path) if path.exists() else pd.DataFrame()
    except ValueError as error:  # pandas' own, and of bytes that are no text
        raise InputError(_no_table(path, str(error).strip())) from error


def _no_table(path: Path, why: str) -> str:
    return (
        f"{path} is no table of this study: {why}. Name a file that it has written, or "
        "a new one."
    )


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

    Raises:
        InputError: If the file is there and is of something else.
    """
    for key in keys:
        there = read_rows(path)
        if len(there) and (missing := [name for name in key if name not in there]):
            raise InputError(_no_table(path, f"it has no column {missing[0]!r}"))
        if _has(there, key):
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


def run_study(
    parser: argparse.ArgumentParser,
    keys: Callable[[argparse.Namespace], Iterable[Row]],
    run: Callable[..., list[dict[str, Any]]],
    report: Callable[[pd.DataFrame], str],
) -> int:
    """Be the command of a study: run what is not in its file yet, or report what is.

    Args:
        parser: The parser, to which `--out` and `--report` are added.
        keys: Returns the keys of all rows that the options ask for.
        run: As in `run_missing`.
        report: Returns the rows as Markdown.

    Returns:
        The exit status: 0; 2 for wrong input; 130 after Ctrl-C.
    """
    parser.add_argument("--out", type=Path, required=True, help="CSV file of the rows")
    parser.add_argument("--report", action="store_true", help="print the tables only")

    def command(options: argparse.Namespace) -> int:
        torch.set_num_threads(1)
        if not options.report:
            run_missing(options.out, keys(options), run)
            return 0
        rows = read_rows(options.out)
        if rows.empty:
            raise InputError(f"{options.out} has no rows; run it without --report.")
        try:
            print(report(rows))
        except KeyError as error:
            why = f"it has no column {error}"
            raise InputError(_no_table(options.out, why)) from error
        return 0

    return exit_status(command, parser.parse_args())


def positive(text: str) -> int:
    """Return the positive number that a text is; argparse tells what it raises."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def run_trainings(
    description: str,
    seeds: Sequence[int],
    run: Callable[[str, int, int], list[dict[str, Any]]],
    report: Callable[[pd.DataFrame], str],
) -> int:
    """Be the command of a study with one training for each task, budget and seed.

    Args:
        description: What the study is about, in a line.
        seeds: Those that are run if none are named.
        run: Returns the rows of a task, a budget and a seed.
        report: Returns the rows as Markdown.

    Returns:
        As `run_study`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--budget", type=positive, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))

    def keys(options: argparse.Namespace) -> list[Row]:
        return [
            {"task": task, "budget": options.budget, "seed": seed}
            for seed in options.seeds
            for task in options.tasks
        ]

    return run_study(parser, keys, run, report)
