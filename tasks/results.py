"""The result table: a folder with one small JSON file per row.

A row belongs to one (task, method, budget, seed, observation), its key, and lies in

    FOLDER/<task>/<method>/budget-<budget>_seed-<seed>_observation-<observation>.json

The name of the file is the key, so a row cannot be there twice. A file is written
under a temporary name and renamed, so it is there whole or not at all, whatever
happens to the process or to other processes that write into the same folder; nothing
is ever appended to or rewritten in place, and no lock is needed. What is missing from
a sweep is what has no file.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pandas as pd

from tasks.errors import InputError

Row = dict[str, Any]

METRICS = (
    "c2st",
    "mmd",
    "sliced_wasserstein",
    "marginal_c2st_mean",
    "marginal_c2st_max",
    "log_prob_true_parameters",
)
COSTS = (
    "simulation_seconds",
    "training_seconds",
    "sampling_seconds",
    "scoring_seconds",
    "epochs",
    "validation_loss",
    "peak_memory_mb",
    "threads",
)
VERSIONS = ("version_sbi_jeffreys", "version_sbi", "version_torch", "commit")
ERRORS = ("error_type", "error_message", "traceback")


class Key(NamedTuple):
    """What a row of the result table is about."""

    task: str
    method: str
    budget: int
    seed: int
    observation: int

    def path(self, folder: Path) -> Path:
        """Return the file of this row in the results folder `folder`."""
        name = (
            f"budget-{self.budget}_seed-{self.seed}"
            f"_observation-{self.observation:02d}.json"
        )
        return Path(folder) / self.task / self.method / name


COLUMNS = (
    *Key._fields,
    "status",
    *METRICS,
    *COSTS,
    *VERSIONS,
    "finished",
    "settings",
    "warnings",
    *ERRORS,
)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or, after a crash, as it was before.

    Args:
        path: The file. Its folder is made if it is missing.
        content: Text (written as UTF-8) or bytes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode()
    # In the same folder, since a rename is atomic only within one file system.
    temporary = path.with_name(f".unfinished-{uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(folder: Path) -> None:
    """Raise an OSError if no file can be written into a folder, which is made."""
    probe = Path(folder) / f".unfinished-{uuid4().hex}"
    write_whole(probe, "")
    probe.unlink()


def key_of(row: Row) -> Key:
    """Return the key of a row."""
    return Key(**{field: row[field] for field in Key._fields})


def write_row(folder: Path, row: Row) -> Path:
    """Write one row into the results folder, in place of an earlier one if any.

    Args:
        folder: The results folder.
        row: One value for every name in `COLUMNS`. NaN and infinities are written as
            Python's `json` does, since a log density of minus infinity is a result.

    Returns:
        The file of the row.
    """
    if set(row) != set(COLUMNS):
        raise InputError(
            f"a row has one value for each of {COLUMNS}; this one differs in "
            f"{sorted(set(row) ^ set(COLUMNS))}."
        )
    path = key_of(row).path(folder)
    ordered = {name: row[name] for name in COLUMNS}
    write_whole(path, json.dumps(ordered, indent=1) + "\n")
    return path


def read_rows(folder: Path) -> Iterator[Row]:
    """Yield every row of a results folder; none if the folder does not exist.

    Raises:
        InputError: If a file is not a row, with the file's name.
    """
    for path in sorted(Path(folder).glob("*/*/budget-*.json")):
        try:
            row = json.loads(path.read_text())
            key = key_of(row)
            # Rows made before there was the column do not say what made them.
            row.setdefault("commit", "")
            if missing := [name for name in COLUMNS if name not in row]:
                raise ValueError(f"it has no {', '.join(missing)}")
            _check_values(row)
            if key.path(folder) != path:
                raise ValueError(f"it is of {key}, which does not belong there")
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is not a row of a result table ({error}). Remove the file "
                "and run the sweep again; it will be made anew."
            ) from error
        yield row


def _check_values(row: Row) -> None:
    """Raise a ValueError if a value of a row is not of its type, with its name."""
    types: dict[str, tuple[type, ...]] = {
        **dict.fromkeys(("budget", "seed", "observation"), (int,)),
        **dict.fromkeys((*METRICS, *COSTS), (int, float)),
        "warnings": (list,),
    }
    for name, allowed in types.items():
        # JSON has no subclasses, and true is no number.
        if type(row[name]) not in allowed:
            expected = " or ".join(kind.__name__ for kind in allowed)
            raise ValueError(f"{name}: expected {expected}, got {row[name]!r}")
    if not all(isinstance(text, str) for text in row["warnings"]):
        raise ValueError(f"warnings: expected texts, got {row['warnings']}")
    _check_settings(row["settings"])


def _check_settings(settings: Any) -> None:
    """Raise a ValueError unless these may be the settings of a row."""
    if not isinstance(settings, dict) or type(settings.get("num_samples")) is not int:
        raise ValueError(
            "settings: expected a JSON object with a whole number num_samples, got "
            f"{settings!r}"
        )


def load(*sources: Path | str) -> pd.DataFrame:
    """Return result tables as one data frame with the columns `COLUMNS`.

    Args:
        sources: Results folders, or CSV files written by ``python -m tasks report``.

    Returns:
        One line per row, sorted by key. `settings` is JSON text, `warnings` is one
        text; what was not measured is NaN, and texts that are not known are empty.

    Raises:
        FileNotFoundError: If a source is missing or holds no row.
        InputError: If two sources hold the same row, or a file is not a result table.
    """
    tables = [_load_one(Path(source)) for source in sources]
    table = pd.concat(tables, ignore_index=True) if len(tables) > 1 else tables[0]
    doubled = table.duplicated(list(Key._fields))
    if doubled.any():
        first = table.loc[doubled, list(Key._fields)].iloc[0].to_dict()
        raise InputError(
            f"{int(doubled.sum())} rows are in more than one of "
            f"{[str(source) for source in sources]}, the first being {first}. Give "
            "result tables that do not overlap."
        )
    return table.sort_values(list(Key._fields), ignore_index=True)


def _load_one(source: Path) -> pd.DataFrame:
    """Return the data frame of one results folder or CSV file."""
    if source.is_dir():
        table = pd.DataFrame(
            [
                {
                    **row,
                    "settings": settings_text(row["settings"]),
                    "warnings": " | ".join(row["warnings"]),
                }
                for row in read_rows(source)
            ],
            columns=pd.Index(COLUMNS),
        )
    elif source.is_file():
        try:
            table = _read_csv(source)
        except ValueError as error:
            raise InputError(
                f"{source} is not a result table: {str(error).strip()}. Give a results "
                "folder or the results.csv of a report."
            ) from error
    else:
        raise FileNotFoundError(f"there is no results folder or CSV file {source}.")
    if table.empty:
        raise FileNotFoundError(
            f"{source} holds no results. Make some with "
            "`python -m tasks run` or `python -m tasks sweep`."
        )
    numbers = [*METRICS, *COSTS]
    table[numbers] = table[numbers].astype(float)
    for name in (*VERSIONS, "warnings", *ERRORS):
        table[name] = [text if isinstance(text, str) else "" for text in table[name]]
    return table


def _read_csv(path: Path) -> pd.DataFrame:
    """Return the rows of a CSV file.

    Raises:
        ValueError: If it is not a result table, with the column that is to blame.
    """
    # All as texts: neither a commit such as 863e46212345 nor a KeyError of 3 is a
    # number, and an error message of NA is not missing.
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    # Rows made before there was the column do not say what made them.
    table = table.assign(commit=table.get("commit", ""))
    if missing := set(COLUMNS) - set(table.columns):
        raise ValueError(f"the columns {sorted(missing)} are missing")
    for name in ("budget", "seed", "observation"):
        table[name] = _numbers(table[name], int)
    for name in (*METRICS, *COSTS):
        table[name] = _numbers(table[name], float)
    for text in table["settings"].unique():
        try:
            settings = json.loads(text)
        except ValueError as error:
            raise ValueError(f"settings: {text!r} is not JSON ({error})") from error
        _check_settings(settings)
    return pd.DataFrame(table, columns=pd.Index(COLUMNS))


def _numbers(texts: pd.Series, kind: Callable[[str], float]) -> list[float]:
    """Return the numbers of a column; what is empty is NaN."""
    try:
        return [kind(text or "nan") for text in texts]
    except ValueError as error:
        raise ValueError(f"{texts.name}: {error}") from error


def settings_text(settings: dict[str, Any]) -> str:
    """Return settings as JSON text, equal for equal settings."""
    return json.dumps(settings, sort_keys=True)
