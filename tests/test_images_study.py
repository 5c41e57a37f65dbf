"""The study of images: its simulator, its figures, and that it goes on where it was."""

import sys

import pandas as pd
import pytest
import torch

from tasks.studies import images


def test_a_star_is_where_and_as_bright_as_its_parameters_say():
    theta = torch.tensor([[3.0, 8.0, 4.0], [9.0, 1.0, 2.0]])
    many = images.simulator(theta.repeat(4_000, 1)).unflatten(0, (4_000, 2))
    # Row and column of the brightest pixel of the mean image, and its value.
    mean = many.mean(0)
    for image, (column, row, brightness) in zip(mean, theta, strict=True):
        peak = image.argmax().item()
        assert divmod(peak, images.SIZE) == (row, column)
        # Ten standard errors of a pixel's noise would be 0.08.
        assert image.max().item() == pytest.approx(brightness.item(), abs=0.04)
    assert many.std(0).mean().item() == pytest.approx(images.NOISE, rel=0.01)


def test_gains_are_paired_and_seeds_are_not_run_again(monkeypatch, tmp_path, capsys):
    out = tmp_path / "rows.csv"
    losses = {"npe": 1.0, "flow": 0.75, "refined": 0.5}
    asked = []

    def run(seed):
        asked.append(seed)
        return [
            {"seed": seed, "model": m, "loss": v * seed, "gain": (1 - v) * seed}
            for m, v in losses.items()
        ]

    monkeypatch.setattr(images, "run", run)
    for arguments in (["--seeds", "1"], ["--seeds", "1", "3"], ["--report"]):
        monkeypatch.setattr(sys, "argv", ["images", "--out", str(out), *arguments])
        images.main()
    assert asked == [1, 3]
    assert len(pd.read_csv(out)) == 6
    last = capsys.readouterr().out.splitlines()[-1]
    cells = [cell.strip() for cell in last.strip("|").split("|")]
    # Of gains 0.25 and 0.75, and 0.5 and 1.5.
    assert cells[1:4] == ["2.00", "1.50", "1.00"]
    assert cells[4:] == ["0.50 ± 0.35", "1.00 ± 0.71"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_both_are_trained_on_the_same_images(monkeypatch):
    monkeypatch.setattr(images, "NUM_IMAGES", 60)
    rows = pd.DataFrame(images.run(1)).set_index("model")
    assert list(rows.index) == list(images.MODELS)
    assert rows["loss"].notna().all()
    torch.testing.assert_close(
        torch.tensor(rows["gain"].values),
        torch.tensor(rows["loss"]["npe"] - rows["loss"].values),
        atol=1e-5,
        rtol=1e-5,
    )
