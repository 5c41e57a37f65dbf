"""Result tables as CSV files: read as they were written, or refused by name."""

import json

import pandas as pd
import pytest

from tasks.__main__ import main
from tasks.errors import InputError
from tasks.results import COLUMNS, COSTS, METRICS, load, write_row

# What a reader of CSV files takes for numbers, for missing, or for its own syntax.
TEXTS = ("3", "007", "1e5", "NA", "None", "nan", " a ", 'a "b", c', "a\n\nb", "")


def row(seed: int, **columns) -> dict:
    return {
        **dict.fromkeys(COLUMNS, ""),
        **dict.fromkeys((*METRICS, *COSTS), float("nan")),
        "task": "two_moons",
        "method": "npe_nsf",
        "budget": 1000,
        "seed": seed,
        "observation": 1,
        "status": "ok",
        "settings": {"num_samples": 10_000},
        "warnings": [],
        **columns,
    }


def test_a_row_is_the_same_from_its_folder_and_from_a_table(tmp_path):
    folder, csv = tmp_path / "rows", tmp_path / "results.csv"
    names = ("commit", "version_sbi", "error_type", "error_message", "traceback")
    for seed, text in enumerate(TEXTS):
        # As of a KeyError, whose message is its key alone.
        of_text = dict.fromkeys((*names, "finished"), text)
        numbers = {"c2st": 0.1 + 0.2, "mmd": float("-inf"), "epochs": seed}
        failed = row(seed, status="failed", warnings=[text], **of_text, **numbers)
        write_row(folder, failed)
    table = load(folder)
    assert table["error_message"].tolist() == [*TEXTS]
    table.to_csv(csv, index=False)
    pd.testing.assert_frame_equal(load(csv), table, check_exact=True)


def changed(column: str, value: str) -> str:
    """Return a table with one row, of which one value is another."""
    text = {**row(1), "settings": json.dumps(row(1)["settings"]), "warnings": ""}
    return pd.DataFrame([{**text, column: value}]).to_csv(index=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "No columns"),
        ("a,b\n1,2\n1,2,3\n", "Expected 2 fields in line 3, saw 3"),
        (b"\x89PNG\xff", "codec can't decode"),
        ("a,b\n1,2\n", "the columns .*'budget'.* are missing"),
        (changed("c2st", "abc"), "c2st: .*'abc'"),
        (changed("threads", "two"), "threads: .*'two'"),
        (changed("seed", "1.5"), "seed: .*'1.5'"),
        (changed("budget", ""), "budget: "),
        (changed("settings", "{bad"), "settings: '{bad' is not JSON"),
        (changed("settings", "{}"), "settings: expected .*num_samples, got {}"),
        (changed("settings", "[1]"), "settings: expected a JSON object"),
        (changed("settings", ""), "settings: '' is not JSON"),
    ],
)
def test_files_that_are_no_tables_are_said(content, message, tmp_path, capsys):
    path = tmp_path / "x.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=f"x.csv is not a result table: .*{message}"):
        load(path)
    assert main(["report", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} is not a result table")
    assert error.count("\n") == 1


def test_tables_without_rows_are_said(tmp_path):
    (tmp_path / "x.csv").write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(FileNotFoundError, match="x.csv holds no results"):
        load(tmp_path / "x.csv")
