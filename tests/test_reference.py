"""The published data: where they are kept, how they are fetched, what goes wrong."""

import bz2
import hashlib
import io
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tasks import get_task, reference
from tasks.reference import WHEEL, ReferenceDataError


def make_wheel() -> bytes:
    buffer = io.BytesIO()
    files = "sbibm/tasks/two_moons/files/num_observation_1/"
    samples = bz2.compress(b"a,b\n1.5,2\n3,4\n")
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(files + "observation.csv", "data_1,data_2\n0.25,-1e-3\n")
        archive.writestr(files + "reference_posterior_samples.csv.bz2", samples)
    return buffer.getvalue()


class FakePip:
    """Stands in for `subprocess.run`: puts `content` where pip is told to."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.online = True
        self.calls: list[list[str]] = []
        self.barrier: threading.Barrier | None = None

    def __call__(self, command, **_) -> subprocess.CompletedProcess:
        self.calls.append(command)
        if self.barrier is not None:
            self.barrier.wait(timeout=10)
        if not self.online:
            return subprocess.CompletedProcess(command, 1, "", "no such host")
        folder = Path(command[command.index("--dest") + 1])
        (folder / WHEEL).write_bytes(self.content)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch, tmp_path) -> Iterator[FakePip]:
    """A fake pip, an empty cache folder and the checksum of a small wheel."""
    content = make_wheel()
    pip = FakePip(content)
    monkeypatch.setattr(reference.subprocess, "run", pip)
    monkeypatch.setattr(reference, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(reference, "_verified", set())
    monkeypatch.setenv("SBI_JEFFREYS_CACHE", str(tmp_path / "cache"))
    reference._array.cache_clear()
    yield pip
    reference._array.cache_clear()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_data_are_fetched_once_and_read(pip, tmp_path):
    task = get_task("two_moons")
    assert torch.equal(task.observation(1), torch.tensor([[0.25, -1e-3]]))
    samples = task.reference_posterior_samples(1)
    assert torch.equal(samples, torch.tensor([[1.5, 2.0], [3.0, 4.0]]))
    assert len(pip.calls) == 1
    assert pip.calls[0][1:5] == ["-m", "pip", "download", "sbibm==1.1.0"]
    assert "--no-deps" in pip.calls[0]
    # Nothing is left of the download but the file itself.
    assert names(tmp_path / "cache") == [WHEEL]
    # What the caller does with the data must not change what the next one gets.
    samples.zero_()
    assert task.reference_posterior_samples(1).any()


def test_file_is_hashed_once_a_process(pip, tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / WHEEL).write_bytes(pip.content)
    hashed = []
    sha256 = reference._sha256
    monkeypatch.setattr(reference, "_sha256", lambda p: hashed.append(p) or sha256(p))
    for _ in range(3):
        reference.read("two_moons/files/num_observation_1/observation.csv")
    assert len(hashed) == 1 and not pip.calls


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_damaged_file_is_fetched_again(pip, tmp_path, damage):
    content = {
        "truncated": pip.content[:-20],
        "flipped": bytes([pip.content[0] ^ 1]) + pip.content[1:],
        "empty": b"",
    }[damage]
    path = tmp_path / "cache" / WHEEL
    path.parent.mkdir()
    path.write_bytes(content)
    assert reference.wheel() == path
    assert path.read_bytes() == pip.content
    assert len(pip.calls) == 1


def test_file_removed_while_running_is_fetched_again(pip):
    reference.wheel().unlink()
    assert reference.wheel().read_bytes() == pip.content


def test_offline_error_says_which_file_to_put_where(pip, tmp_path):
    pip.online = False
    with pytest.raises(ReferenceDataError) as error:
        get_task("two_moons").observation(1)
    message = str(error.value)
    for part in (WHEEL, reference.SHA256, str(tmp_path / "cache"), "no such host"):
        assert part in message
    assert isinstance(error.value, RuntimeError)
    assert names(tmp_path / "cache") == []

    # Doing what the message says is enough.
    (tmp_path / "cache" / WHEEL).write_bytes(pip.content)
    assert get_task("two_moons").observation(1).shape == (1, 2)


def test_download_with_another_hash_is_refused(pip, tmp_path):
    pip.content = b"something else"
    with pytest.raises(ReferenceDataError, match="What pip downloaded has SHA-256"):
        reference.wheel()
    assert names(tmp_path / "cache") == []


def test_pip_that_cannot_be_started(pip, monkeypatch):
    def fail(*_, **__):
        raise FileNotFoundError("no python")

    monkeypatch.setattr(reference.subprocess, "run", fail)
    with pytest.raises(ReferenceDataError, match="could not be started.*no python"):
        reference.wheel()


def test_folder_that_cannot_be_written(pip, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SBI_JEFFREYS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ReferenceDataError, match="cannot be written"):
        reference.wheel()


def test_two_that_fetch_at_once_do_no_harm(pip, tmp_path):
    # Both are in the middle of their download at the same time.
    pip.barrier = threading.Barrier(2)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(reference.wheel()))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    path = tmp_path / "cache" / WHEEL
    assert len(pip.calls) == 2 and results == [path, path]
    assert path.read_bytes() == pip.content
    assert names(tmp_path / "cache") == [WHEEL]


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SBI_JEFFREYS_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert reference.cache_folder() == tmp_path / "a"
    monkeypatch.delenv("SBI_JEFFREYS_CACHE")
    assert reference.cache_folder() == tmp_path / "b" / "sbi_jeffreys"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(reference.sys, "platform", "linux")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert reference.cache_folder() == tmp_path / ".cache" / "sbi_jeffreys"


@pytest.mark.parametrize("n", [0, 11, -1, 1.5, "1"])
def test_number_of_the_observation_is_checked(pip, n):
    with pytest.raises(ValueError, match="observations 1 to 10"):
        get_task("two_moons").observation(n)
    assert not pip.calls
