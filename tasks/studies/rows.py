"""The rows of a study in one CSV file, which a later run goes on with."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from tasks.results import Row, write_whole


def read_rows(path: Path) -> pd.DataFrame:
    """Return the rows of a file, none if it is not there."""
    return pd.read_csv(path) if path.exists() else pd.DataFrame()


def run_missing(
    path: Path, keys: Iterable[Row], run: Callable[..., list[dict[str, Any]]]
) -> None:
    """Add the rows of all keys that the file does not have, and print them.

    Args:
        path: The file, which is written whole after every key.
        keys: Values of the columns by which rows are told apart.
        run: Returns the rows of a key, whose values it takes in their order.
    """
    rows = read_rows(path)
    for key in keys:
        if len(rows) and (rows[list(key)] == list(key.values())).all(axis=1).any():
            continue
        new = pd.DataFrame(run(*key.values()))
        rows = pd.concat([rows, new], ignore_index=True)
        write_whole(path, rows.to_csv(index=False))
        print(new.to_string(index=False, header=False), flush=True)
