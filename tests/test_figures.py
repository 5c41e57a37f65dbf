"""The pictures of the page on figures: all that it shows are made, small, and right."""

import re
from functools import partialmethod

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from sbi_jeffreys import JeffreysNPE
from tasks import figures

FOLDER = figures.ROOT / "docs/how_to"


def shown():
    """Return the names of the pictures on the page."""
    return re.findall(r"\]\(figures/(\w+)\.png\)", (FOLDER / "figures.md").read_text())


@pytest.mark.parametrize("name", shown())
def test_committed_pictures_are_small(name):
    assert 5_000 < (FOLDER / f"figures/{name}.png").stat().st_size < 80_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_picture_of_the_page_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "NUM_SIMULATIONS", 100)
    monkeypatch.setattr(figures, "NUM_TESTS", 10)
    short = partialmethod(JeffreysNPE.train, max_num_epochs=3)
    monkeypatch.setattr(JeffreysNPE, "train", short)
    figures.main(["--out", str(tmp_path)])
    assert {path.stem for path in tmp_path.iterdir()} == set(shown())
    assert len(shown()) == 5
    for path in tmp_path.iterdir():
        assert plt.imread(path).std() > 0.01  # not blank


def test_the_picture_of_c2st_shows_the_report():
    ((name, figure),) = figures.of_the_benchmark()
    drawn = {part.get_label(): part.lines[0] for part in figure.axes[0].containers}
    report = pd.read_csv(figures.RESULTS.parent / "c2st.csv")
    report = report[report["task"] == "two_moons"].set_index(["source", "method"])
    for method, label in figures.METHODS.items():
        expected = [1_000, report.loc[("measured", method), "mean"]]
        assert drawn[label].get_xydata()[0] == pytest.approx(expected)
    for method in ("NPE", "SNPE"):
        expected = report.loc[("lueckmann2021", method), "mean"]
        assert drawn[f"{method}, published"].get_xydata()[0, 1] == expected
    assert name == "c2st"
    plt.close(figure)
