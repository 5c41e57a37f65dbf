"""What the comparison of C2ST with scikit-learn's reports."""

import csv

import pytest

from tasks.benchmarks import c2st


def test_differences_and_ratios_are_those_of_the_rows(tmp_path):
    path = tmp_path / "rows.csv"
    rows = [
        ("a, same", 2, 100, 0.50, 0.52, 0.51, 0.53, 8.0, 1.0),
        ("a, other", 2, 100, 0.70, 0.70, 0.70, 0.69, 2.0, 1.0),
        ("b, same", 10, 100, 0.60, 0.61, 0.60, 0.61, 3.0, 1.0),
    ]
    for row in rows[:2]:
        c2st._append(path, [*row])
    with open(path, "a", newline="") as file:
        # What was appended once: cut short by a kill, and gone on with.
        csv.writer(file).writerow(["c, other", 10, 100, 0.5, "0.", *rows[2]])
        file.write('"b, other",10,100,0.5')
    c2st._append(path, [*rows[2]])
    text = c2st.report(c2st._read(path))
    # Pairs differ by 0.01, -0.005 and 0: their mean, and its standard error.
    assert "mean +0.00167 ± 0.00441" in text
    assert "mean absolute 0.00500, largest 0.01000." in text  # (0.01 + 0.01 + 0.01) / 6
    assert "mean absolute 0.01000, largest 0.02000." in text
    assert "in 2 dimensions, geometric mean: 4.0." in text
    assert "in 10 dimensions, geometric mean: 3.0." in text
    assert "| b, same | 10 | 100 | 0.6 | 0.61 | 0.6 | 0.61 | 3.0 | 1.0 |" in text
    assert "b, other" not in text and "c, other" not in text
    assert len(path.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "--out", "nothere.csv"], "nothere.csv has no rows; run `accuracy`"),
        (["report", "--out", "empty.csv"], "empty.csv has no rows"),
        (["report", "--out", "other.csv"], "other.csv is no table of pairs, whose "),
        (["report", "--out", "plot.png"], "plot.png is not a CSV file: "),
        (["accuracy", "--out", "other.csv"], "other.csv is no table of pairs"),
        (["speed", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["speed", "--pairs", "0"], "--pairs must be at least 1, got 0"),
    ],
)
def test_wrong_input_is_said(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.csv").write_text("task,seed\nslcp,1\n")
    (tmp_path / "empty.csv").write_text(",".join(c2st.COLUMNS) + "\n")
    (tmp_path / "plot.png").write_bytes(b"\x89PNG\xff")
    assert c2st.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert (tmp_path / "other.csv").read_text() == "task,seed\nslcp,1\n"
