"""Execute the tutorials in place: ``make tutorials``.

Notebooks are committed with their outputs, so that they can be read online. What
depends on the machine is left out of them: paths, times, progress bars and warnings
(all that a cell writes to its standard error).
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
#: Seconds that a cell may take, many times what the slowest takes.
CELL_TIMEOUT = 1200
# What sbi prints as it trains, without an end of line.
PROGRESS = re.compile(
    r"\r? ?Neural network successfully converged after \d+ epochs\.|"
    r"Using \w+ with atomic loss\n"
)


def notebooks() -> list[Path]:
    """Return the paths of all tutorials, in their order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))


def execute(path: Path, preamble: str = "") -> NotebookNode:
    """Execute the code of a notebook on one thread, in the folder of the tutorials.

    Args:
        path: Path of the notebook, which is left as it is.
        preamble: Code to execute before its first cell.

    Returns:
        The notebook with its new outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    if preamble:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(preamble))
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    # One thread, so that the figures are the same on machines of other sizes.
    return client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})


def clean(notebook: NotebookNode) -> NotebookNode:
    """Return a notebook without what depends on the machine or the moment.

    Args:
        notebook: The notebook, which is changed in place.
    """
    notebook.metadata = NotebookNode(
        kernelspec={
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        language_info={"name": "python"},
    )
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id = f"cell-{number}"
        cell.metadata = NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = _clean_outputs(cell.outputs)
    return notebook


def _clean_outputs(outputs: list[NotebookNode]) -> list[NotebookNode]:
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        # What was printed bit by bit is one text.
        if "text" in output and kept and "text" in kept[-1]:
            kept[-1].text += output.text
        else:
            kept.append(output)
    kept = [_clean_output(output) for output in kept]
    return [output for output in kept if output.get("text") != ""]


def _clean_output(output: NotebookNode) -> NotebookNode:
    if "text" in output:
        output.text = _clean_text(output.text)
    data = output.get("data", {})
    if "image/png" in data:
        data.pop("text/plain", None)
    if "text/plain" in data:
        data["text/plain"] = _clean_text(data["text/plain"])
    return output


def _clean_text(text: str) -> str:
    text = text.replace(str(FOLDER.parent), ".").replace(str(Path.home()), "~")
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    text = PROGRESS.sub("", text)
    # Of a line that was written again and again its last state.
    return "\n".join(line.rsplit("\r", 1)[-1] for line in text.split("\n"))


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook whole or not at all.

    Args:
        notebook: The notebook.
        path: Where to.
    """
    temporary = path.with_suffix(".unfinished")
    try:
        nbformat.write(notebook, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> None:
    """Execute notebooks one after the other and write them back.

    Args:
        arguments: Paths of notebooks; all tutorials without any.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all")
    paths = parser.parse_args(arguments).notebooks or notebooks()
    for path in paths:
        start = time.perf_counter()
        write(clean(execute(path)), path)
        seconds = time.perf_counter() - start
        size = path.stat().st_size / 1024
        print(f"{path.name}: {seconds:.0f} s, {size:.0f} KB", flush=True)


if __name__ == "__main__":
    sys.exit(main())
