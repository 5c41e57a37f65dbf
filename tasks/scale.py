"""Many independent calls at once: in this process, in processes, or on a cluster.

One option chooses: `jobs` processes on this machine, which joblib runs, or the workers
of a Dask cluster by the address of its scheduler. joblib has a Dask backend too, but
version 1.6 of it waits for ever for a call that Dask has given up, because every
worker that took it died; so the cluster is spoken to directly.
"""

import concurrent.futures
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import joblib

from tasks.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

# Seconds to wait for the scheduler before giving up.
_CONNECT_SECONDS = 10


class WorkerDied(RuntimeError):
    """The process that worked on a call ended without an answer."""

    def __init__(self, cause: str):
        super().__init__(
            "the worker process died again and again while it worked on this; most "
            f"often the system killed it for want of memory ({cause})."
        )


class Executor(ABC):
    """Where calls are made."""

    @abstractmethod
    def stream(
        self, function: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result | WorkerDied]]:
        """Yield the index and the result of each call, in the order they finish.

        An exception of `function` ends the stream. A worker that dies does not: the
        calls that are lost with it are made again, and one that kills its worker
        again has a `WorkerDied` as its result.

        Args:
            function: What to call; it and its results must be picklable.
            items: The argument of each call.
        """


class InProcess(Executor):
    """Makes calls in this process, one after another."""

    def stream(
        self, function: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result | WorkerDied]]:
        """See `Executor.stream`; here a death is the death of all."""
        for index, item in enumerate(items):
            yield index, function(item)


class Processes(Executor):
    """Makes calls in processes of one thread each on this machine.

    Args:
        jobs: Number of processes.
    """

    def __init__(self, jobs: int):
        self.jobs = jobs

    def stream(
        self, function: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result | WorkerDied]]:
        """See `Executor.stream`."""
        pending = list(range(len(items)))
        while pending:
            try:
                for index, result in self._call(function, items, pending):
                    pending.remove(index)
                    yield index, result
            except concurrent.futures.BrokenExecutor:
                # Calls start in the order of the items, so the first ones that are
                # not done were running: one of them is to blame. Each is tried alone.
                for index in pending[: self.jobs]:
                    pending.remove(index)
                    try:
                        ((_, result),) = self._call(function, items, [index])
                    except concurrent.futures.BrokenExecutor as error:
                        result = WorkerDied(type(error).__name__)
                    yield index, result

    def _call(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        indices: Sequence[int],
    ) -> Iterator[tuple[int, Result]]:
        """Yield index and result for `indices`, in the order they finish."""
        with joblib.parallel_config(
            backend="loky", n_jobs=self.jobs, inner_max_num_threads=1
        ):
            parallel = joblib.Parallel(
                # The calls are long.
                batch_size=1,  # pyright: ignore[reportArgumentType]
                # No more than fit into loky's queue: what waits before it is
                # forgotten by half when Ctrl-C ends loky, and a thread dies loudly.
                pre_dispatch=2 * self.jobs,  # pyright: ignore[reportArgumentType]
                return_as="generator_unordered",
            )
            yield from parallel(  # pyright: ignore[reportReturnType]
                joblib.delayed(_indexed)(function, index, items[index])
                for index in list(indices)
            )


class DaskWorkers(Executor):
    """Makes calls on the workers of a Dask cluster.

    Dask itself makes calls again whose worker died, until it gives them up after the
    number of deaths in its setting `distributed.scheduler.allowed-failures`.

    Args:
        client: A `distributed.Client`.
    """

    def __init__(self, client: Any):
        self.client = client

    def stream(
        self, function: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result | WorkerDied]]:
        """See `Executor.stream`."""
        from distributed import as_completed
        from distributed.scheduler import KilledWorker

        # All at once, so that workers that join a growing cluster find work.
        futures = self.client.map(function, list(items), pure=False)
        indices = {future: index for index, future in enumerate(futures)}
        try:
            for future in as_completed(futures, loop=self.client.loop):
                index = indices.pop(future)
                try:
                    result = future.result()
                except KilledWorker as error:
                    result = WorkerDied(type(error).__name__)
                yield index, result
        finally:
            # After Ctrl-C; otherwise none are left.
            self.client.cancel(list(indices))


@contextmanager
def executor(jobs: int = 1, dask: str | None = None) -> Iterator[Executor]:
    """Open a place to make calls in.

    Args:
        jobs: Number of processes on this machine; 1 calls in this process.
        dask: Address of a Dask scheduler, such as "tcp://host:8786", whose workers are
            used instead.

    Raises:
        InputError: If `jobs` is not positive, both options are given, or Dask is asked
            for and not installed.
        ConnectionError: If there is no scheduler at the address, or its workers run
            more than one thread.
    """
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {jobs}.")
    if dask is None:
        yield InProcess() if jobs == 1 else Processes(jobs)
        return
    if jobs != 1:
        raise InputError(
            "--jobs and --dask exclude each other: with --dask the number of processes "
            "is that of the cluster's workers."
        )
    with _connect(dask) as client:
        yield DaskWorkers(client)


def _connect(address: str) -> Any:
    """Return a Dask client of the scheduler at `address`, checked."""
    if importlib.util.find_spec("distributed") is None:
        raise InputError(
            "--dask needs the optional packages dask and distributed. Install them "
            "with `pip install dask distributed`."
        )
    from distributed import Client

    try:
        client: Any = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"no Dask scheduler answers at {address!r} ({error}). Give the address "
            "that `dask scheduler` prints, such as tcp://host:8786."
        ) from error
    threaded = {name: n for name, n in client.nthreads().items() if n != 1}
    if threaded:
        client.close()
        raise ConnectionError(
            f"workers of {address} run more than one thread ({threaded}); a sweep "
            "needs processes, since random seeds are of a process. Start them with "
            "`dask worker ADDRESS --nworkers N --nthreads 1`."
        )
    return client


def _indexed(
    function: Callable[[Item], Result], index: int, item: Item
) -> tuple[int, Result]:
    """Return the result with its index."""
    return index, function(item)
