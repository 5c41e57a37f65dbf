"""The result table of the density studies: one CSV file, one row for every run.

The file is read whole and written whole after every run, so that a killed process
leaves all finished rows behind and the same command goes on from there. One process
at a time writes into a folder.
"""

import io
import traceback
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from tqdm import tqdm

from tasks.results import write_whole
from tasks.run import ctrl_c_ends


class Run(NamedTuple):
    """What a row is about.

    Attributes:
        study: Name of the study.
        dataset: Name of the data.
        method: Name of the method.
        setting: What else sets it apart, such as `lr=0.02`; may be empty.
        seed: Seed of data, networks and training, or number of the split.
    """

    study: str
    dataset: str
    method: str
    setting: str
    seed: int


METRICS = (
    "nll_best",
    "nll_last",
    "nll_proxy",
    "nll_refined",
    "entropy",
    "log_partition_last",
    "frechet",
    "mean_shift",
    "precision",
    "recall",
    "epochs",
    "seconds",
)
COLUMNS = (*Run._fields, "status", *METRICS, "curve", "error", "finished")
FILE = "results.csv"


def read_table(folder: Path) -> pd.DataFrame:
    """Return the result table of a folder, empty if there is none."""
    path = Path(folder) / FILE
    if not path.exists():
        return pd.DataFrame(columns=pd.Index(COLUMNS))
    # A folder of images may be called 007.
    texts = dict.fromkeys(set(COLUMNS) - {"seed", *METRICS}, str)
    table = pd.read_csv(path, dtype=texts)
    table = table.reindex(columns=list(COLUMNS))  # of an older version, some lack
    return table.fillna(dict.fromkeys(texts, ""))


def run_all(
    runs: Iterable[Run],
    execute: Callable[[Run, Path], dict[str, Any]],
    folder: Path,
    retry_failed: bool = False,
) -> tuple[int, int, int]:
    """Make the rows that are not there yet.

    A run that Ctrl-C cut short leaves no row.

    Args:
        runs: The rows, in the order in which they are made.
        execute: Makes the metrics and the curve of one row; may leave files in the
            folder. An error becomes a row with the status `failed`.
        folder: Folder of the result table.
        retry_failed: Whether to make failed rows again.

    Returns:
        Number of rows made, of rows that were there, and how many of both failed.
    """
    folder = Path(folder)
    table = read_table(folder)
    rows = {_key(row): row for row in table.to_dict("records")}
    runs = list(dict.fromkeys(runs))
    missing = [
        run
        for run in runs
        if run not in rows or (retry_failed and rows[run]["status"] == "failed")
    ]
    for run in (progress := tqdm(missing, unit="run", mininterval=10)):
        progress.set_postfix_str(" ".join(map(str, run)))
        row = dict.fromkeys(COLUMNS) | run._asdict() | {"status": "ok"}
        try:
            with ctrl_c_ends():
                row |= execute(run, folder)
        except Exception as error:  # one run must not cost the others
            row |= {"status": "failed", "error": _text(error)}
        row["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        rows[run] = row
        write_table(folder, rows.values())
    num_failed = sum(rows[run]["status"] == "failed" for run in runs)
    return len(missing), len(runs) - len(missing), num_failed


def write_table(folder: Path, rows: Iterable[Any]) -> None:
    """Write the result table whole."""
    table = pd.DataFrame(list(rows), columns=pd.Index(COLUMNS))
    buffer = io.StringIO()
    table.to_csv(buffer, index=False)
    write_whole(Path(folder) / FILE, buffer.getvalue())


def _key(row: dict[Any, Any]) -> Run:
    texts = {name: str(row[name]) for name in Run._fields if name != "seed"}
    return Run(**texts, seed=int(row["seed"]))


def _text(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.name}, line {last.lineno})"
