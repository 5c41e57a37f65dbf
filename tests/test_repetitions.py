"""The study of repeated samples: its shares, and its table."""

import pandas as pd
import pytest

from sbi_jeffreys import JeffreysNPE
from tasks.studies import repetitions


def test_the_table_has_means_over_the_seeds():
    rows = pd.DataFrame([
        {
            "task": "a",
            "budget": 1000,
            "seed": seed,
            "variant": variant,
            "c2st": c2st + 0.01 * seed,
            "repeated": 0.1,
            "seconds": 1.0 + seed,
        }
        for variant, c2st in zip(
            (*repetitions.VARIANTS, repetitions.INDEPENDENT),
            (0.51, 0.55, 0.58, 0.5),
            strict=True,
        )
        for seed in (1, 3)
    ])
    text = repetitions.report(rows)
    last = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    of_variants = [
        cell for c2st in ("0.530", "0.570", "0.600") for cell in (c2st, "10.0%", "3.00")
    ]
    assert last == ["`a`", "0.520", *of_variants]
    assert "seed (1, 3)" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_resampling_by_itself_repeats_most(monkeypatch):
    train = JeffreysNPE.train
    monkeypatch.setattr(
        JeffreysNPE, "train", lambda self: train(self, max_num_epochs=12)
    )
    monkeypatch.setattr(repetitions, "NUM_OBSERVATIONS", 2)
    monkeypatch.setattr(repetitions, "NUM_SAMPLES", 300)
    monkeypatch.setattr(repetitions, "PLENTY", {})
    rows = pd.DataFrame(repetitions.run("slcp", 200, 2)).set_index("variant")
    repeated = rows.pop("repeated")
    others = repeated.drop("resampling alone")
    assert repeated["resampling alone"] > 0.05 > 2 * others.max()
    assert rows["c2st"].between(0.3, 1).all()
