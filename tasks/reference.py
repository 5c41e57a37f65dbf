"""The published observations, true parameters and reference posterior samples.

They are the data files of the Python package sbibm 1.1.0 (Lueckmann et al. 2021,
"Benchmarking Simulation-Based Inference", MIT licence): ten observations of each task,
the parameters they were simulated from, and 10,000 posterior samples for each. That
package cannot be installed beside the sbi used here, and need not be: its wheel is a
zip archive, which is downloaded once with pip into a cache folder of the user's and
read without being installed or imported.

The cache folder is `$SBI_JEFFREYS_CACHE` if set, else `sbi_jeffreys` in the system's
folder for caches (`$XDG_CACHE_HOME` or `~/.cache`; `~/Library/Caches` on macOS;
`%LOCALAPPDATA%` on Windows).
"""

import bz2
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

REQUIREMENT = "sbibm==1.1.0"
WHEEL = "sbibm-1.1.0-py2.py3-none-any.whl"
SHA256 = "12ecc6b4d327b92f9225f08faa6405e4274fb8e75943d86a53157d1b1bcfaf74"


class ReferenceDataError(RuntimeError):
    """The published reference data are not at hand and could not be fetched."""


def cache_folder() -> Path:
    """Return the folder that the wheel is kept in. It need not exist yet."""
    if folder := os.environ.get("SBI_JEFFREYS_CACHE"):
        return Path(folder).expanduser()
    if folder := os.environ.get("XDG_CACHE_HOME"):
        parent = Path(folder)
    elif sys.platform == "win32":
        parent = Path(os.environ.get("LOCALAPPDATA", Path.home()))
    elif sys.platform == "darwin":
        parent = Path.home() / "Library" / "Caches"
    else:
        parent = Path.home() / ".cache"
    return parent / "sbi_jeffreys"


def wheel() -> Path:
    """Return the path of the wheel, after fetching it if it is missing or damaged.

    A file that is there is checked against its SHA-256 once in the life of a process.
    Several processes may call this at once: each downloads into a folder of its own,
    and a finished, verified file is put in place in one step.

    Raises:
        ReferenceDataError: If the wheel is not there and cannot be downloaded. The
            message says which file to put where.
    """
    path = cache_folder() / WHEEL
    if path not in _verified or not path.exists():
        if not (path.exists() and _sha256(path) == SHA256):
            _fetch(path)
        _verified.add(path)
    return path


def read(member: str) -> bytes:
    """Return the content of a file of the wheel.

    Args:
        member: Path below `sbibm/tasks/`, such as
            `"two_moons/files/num_observation_1/observation.csv"`. Files that are
            compressed with bzip2 (`.bz2`) are decompressed.

    Raises:
        ReferenceDataError: If the wheel is not there and cannot be downloaded.
    """
    with zipfile.ZipFile(wheel()) as archive:
        content = archive.read(f"sbibm/tasks/{member}")
    return bz2.decompress(content) if member.endswith(".bz2") else content


@lru_cache(maxsize=64)
def _array(member: str) -> np.ndarray:
    # The first line names the columns.
    text = io.BytesIO(read(member))
    return np.loadtxt(text, delimiter=",", skiprows=1, ndmin=2, dtype=np.float32)


def table(member: str) -> Tensor:
    """Return a table of numbers of the wheel.

    Args:
        member: Path of a `.csv` or `.csv.bz2` file below `sbibm/tasks/`.

    Returns:
        Tensor of shape (rows, columns), in single precision as published.

    Raises:
        ReferenceDataError: If the wheel is not there and cannot be downloaded.
    """
    return torch.from_numpy(_array(member).copy())


# The files found whole by this process; hashing 18 MB at each access would be slow.
_verified: set[Path] = set()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _fetch(path: Path) -> None:
    """Download the wheel and put it at `path`, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the move is within one file system.
        temporary = tempfile.TemporaryDirectory(dir=path.parent, prefix="fetch-")
    except OSError as error:
        raise _error(path, f"The folder cannot be written: {error}.") from error
    with temporary:
        command = [sys.executable, "-m", "pip", "download", REQUIREMENT, "--no-deps"]
        command += ["--only-binary=:all:", "--dest", temporary.name, "--quiet"]
        command += ["--disable-pip-version-check", "--no-input", "--retries", "2"]
        try:
            pip = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise _error(path, f"pip could not be started: {error}.") from error
        downloaded = Path(temporary.name) / WHEEL
        if pip.returncode != 0 or not downloaded.exists():
            reason = (pip.stderr or pip.stdout).strip() or "pip gave no reason"
            raise _error(path, f"pip could not download it: {reason[-500:]}")
        found = _sha256(downloaded)
        if found != SHA256:
            raise _error(path, f"What pip downloaded has SHA-256 {found}.")
        os.replace(downloaded, path)


def _error(path: Path, reason: str) -> ReferenceDataError:
    return ReferenceDataError(
        f"The published reference data are needed and not at hand. {reason}\n"
        f"Without a network, fetch the file on another machine with\n"
        f"    python -m pip download {REQUIREMENT} --no-deps\n"
        f"and put {WHEEL}\n"
        f"    (SHA-256 {SHA256})\n"
        f"into the folder {path.parent}\n"
        f"or into another one that the environment variable SBI_JEFFREYS_CACHE names."
    )
