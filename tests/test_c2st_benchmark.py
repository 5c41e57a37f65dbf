"""What the comparison of C2ST with scikit-learn's reports."""

import csv

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
