"""The tutorials run, and are committed with the outputs of a run from first to last."""

import re

import matplotlib
import nbformat
import pytest

matplotlib.use("Agg")

from tutorials.execute import FOLDER, clean, execute, notebooks

PATHS = pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
# Folders of a machine, beside what is hosted: https://... and the like.
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|Users|work|tmp|var|opt|usr)/\w")


def code_cells(path):
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_tutorials_are_numbered_without_gaps():
    numbers = [int(path.stem[:2]) for path in notebooks()]
    assert len(numbers) >= 8
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_index_names_every_tutorial():
    index = (FOLDER / "README.md").read_text()
    for path in notebooks():
        assert f"]({path.name})" in index


@PATHS
def test_notebook_is_committed_with_the_outputs_of_one_run(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    cells = code_cells(path)
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "run `make tutorials`"
    outputs = [output for cell in cells for output in cell.outputs]
    kinds = [output.output_type for output in outputs]
    assert "stream" in kinds, "no cell has printed anything"
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "error" not in kinds
    assert not any(output.get("name") == "stderr" for output in outputs)


@PATHS
def test_notebook_is_small_and_names_no_path_of_a_machine(path):
    assert path.stat().st_size < 600 * 1024
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        assert not MACHINE_PATH.search(cell.source)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            for text in (output.get("text", ""), data.get("text/plain", "")):
                assert not MACHINE_PATH.search(text), text
                assert "\r" not in text
    # `execute.py` has cleaned it: cleaning again changes nothing.
    before = nbformat.writes(notebook)
    assert nbformat.writes(clean(notebook)) == before


def test_clean_removes_what_depends_on_the_machine():
    notebook = nbformat.v4.new_notebook(metadata={"author": "somebody"})
    cell = nbformat.v4.new_code_cell("1", metadata={"execution": {"start": "now"}})
    new_output = nbformat.v4.new_output
    cell.outputs = [
        new_output("stream", name="stderr", text="/usr/lib/x.py: UserWarning"),
        new_output(
            "stream",
            name="stdout",
            text="\r Neural network successfully converged after 7 epochs.",
        ),
        new_output("stream", name="stdout", text=f"1 %\r 100 %\nin {FOLDER}\n"),
        new_output("execute_result", data={"text/plain": "<object at 0x7f1a>"}),
        new_output("display_data", data={"image/png": "AA==", "text/plain": "<Fig>"}),
    ]
    notebook.cells = [cell]
    cleaned = clean(notebook)
    assert set(cleaned.metadata) == {"kernelspec", "language_info"}
    assert not cell.metadata
    stdout, result, image = cell.outputs
    assert stdout.text == " 100 %\nin ./tutorials\n"
    assert result.data["text/plain"] == "<object>"
    assert set(image.data) == {"image/png"}


NUM_EPOCHS = 30
# The committed outputs are those of whole trainings; CI has not the time for them.
SHORT_TRAININGS = f"""
from sbi.inference.trainers.npe.npe_base import PosteriorEstimatorTrainer

whole_training = PosteriorEstimatorTrainer.train


def short_training(self, *args, max_num_epochs=None, **kwargs):
    return whole_training(self, *args, max_num_epochs={NUM_EPOCHS}, **kwargs)


PosteriorEstimatorTrainer.train = short_training
"""


@pytest.mark.slow
@PATHS
def test_notebook_runs(path):
    """A cell that raises fails; the outputs are of the same kind as those committed."""
    notebook = execute(path, SHORT_TRAININGS)
    cells = [cell for cell in notebook.cells[1:] if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    images = [
        sum("image/png" in output.get("data", {}) for output in cell.outputs)
        for cell in cells
    ]
    # Of a cell that needs data from the network there may be fewer.
    assert sum(images) > 0
