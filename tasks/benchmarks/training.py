"""What JeffreysNPE costs beside NPE: training, sampling, memory.

    python -m tasks.benchmarks.training epochs
    python -m tasks.benchmarks.training profile
    python -m tasks.benchmarks.training converged
    python -m tasks.benchmarks.training sampling
    python -m tasks.benchmarks.training flows
    python -m tasks.benchmarks.training memory

Each figure is a ratio of two measurements in one run, on one core, with the same
simulations, the same flow, the same batches and the same number of gradient steps.
Those of `flows` alternate; the others are made one after the other, so that other work
of the machine may slow one of them alone. `epochs` divides seconds per epoch: of each
stage of the training, and of all stages in equal parts, sets of samples included.
`converged` trains both until they stop, and divides seconds per epoch of the whole
training. `sampling` times 10,000 samples, their densities and the refined posterior.
`memory` compares peaks of processes that train three epochs on 100,000 simulations.
`flows` divides times of sbi's flows as this library runs them by those of sbi's.
`profile` is of JeffreysNPE alone: the share of each part of the work in the processor's
time of the epochs of each stage, sets of samples included.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout
from copy import deepcopy
from functools import partial, wraps
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from sbi.inference import NPE
from sbi.neural_nets import posterior_nn
from sbi.utils.user_input_checks_utils import move_distribution_to_device
from torch.utils.data import DataLoader

from sbi_jeffreys import FixedWeights, JeffreysNPE, NoTracker, objective, refinement
from sbi_jeffreys.autoregressive import invert_in_one_pass
from sbi_jeffreys.averaging import WeightAverage
from sbi_jeffreys.energy import ConditionalEnergy
from sbi_jeffreys.likelihood import SurrogateLikelihoods
from sbi_jeffreys.residual_flow import ResidualFlow
from sbi_jeffreys.spline import evaluate_one_bin
from sbi_jeffreys.stages import Stage
from tasks import get_task
from tasks.task import Task

TASKS = ("two_moons", "slcp", "bernoulli_glm")
# Epochs of a measurement by the number of simulations, two or more for each of the
# stages, and how often it is made: long ones are steady by themselves.
EPOCHS = {1_000: 90, 10_000: 30, 100_000: 8, 1_000_000: 8}
REPETITIONS = {1_000: 3, 10_000: 3, 100_000: 1, 1_000_000: 1}
NUM_SAMPLES = 10_000


class TimedNPE(NPE):
    """NPE that notes when its epochs end."""

    def _summarize_epoch(self, *args: Any, **kwargs: Any) -> None:
        super()._summarize_epoch(*args, **kwargs)
        vars(self).setdefault("ends", []).append(("npe", time.perf_counter()))


class TimedJeffreysNPE(JeffreysNPE):
    """JeffreysNPE that notes when its epochs end, and the stage of each."""

    def _summarize_epoch(self, *args: Any, **kwargs: Any) -> None:
        super()._summarize_epoch(*args, **kwargs)
        end = (self.summary["stage"][-1], time.perf_counter())
        vars(self).setdefault("ends", []).append(end)


class Stopwatch:
    """Seconds of the processor by part of the work; of nested parts, the inner one's.

    The processor's, so that other work of the machine moves the shares less.
    """

    def __init__(self) -> None:
        self.laps: list[tuple[str, dict[str, float]]] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._running = ["rest"]
        self._last = time.process_time()

    def _settle(self) -> None:
        now = time.process_time()
        self._seconds[self._running[-1]] += now - self._last
        self._last = now

    def timed(
        self, function: Callable[..., Any], part: str, without_gradients: str = ""
    ) -> Callable[..., Any]:
        """Return a function that counts as a part, or another without gradients."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._settle()
            is_other = without_gradients and not torch.is_grad_enabled()
            self._running.append(without_gradients if is_other else part)
            try:
                return function(*args, **kwargs)
            finally:
                self._settle()
                self._running.pop()

        return timed

    def lap(self, name: str) -> None:
        """Keep what was counted since the last lap under a name."""
        self._settle()
        self.laps.append((name, dict(self._seconds)))
        self._seconds.clear()


# Parts of an epoch, in the order of the table. The gradients are those of all networks
# that learn in the stage; those of the proxy's stage are the proxy's alone.
PARTS = {
    "inversion": "inversion of the flow",
    "densities": "densities of the flow",
    "proxy": "proxy",
    "judged": "proxy without gradients",
    "likelihoods": "likelihoods",
    "backward": "gradients",
    "step": "step of the optimiser",
    "batches": "batches",
    "rest": "rest",
}


class ProfiledJeffreysNPE(JeffreysNPE):
    """JeffreysNPE that takes the time of the parts of its epochs."""

    stopwatch: Stopwatch

    def _summarize_epoch(self, *args: Any, **kwargs: Any) -> None:
        super()._summarize_epoch(*args, **kwargs)
        self.stopwatch.lap(self.summary["stage"][-1])

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train with a stopwatch at each part."""
        self.stopwatch = watch = Stopwatch()
        iterate = DataLoader.__iter__

        def batches(loader: DataLoader) -> Iterator[Any]:
            iterator = watch.timed(iterate, "batches")(loader)
            following = watch.timed(lambda: next(iterator, None), "batches")
            return iter(following, None)

        with ExitStack() as stack:
            for owner, name, *parts in (
                (objective, "rsample_and_log_prob", "inversion"),
                (refinement, "rsample_and_log_prob", "inversion"),
                (ResidualFlow, "log_prob", "densities"),
                (ConditionalEnergy, "forward", "proxy", "judged"),
                (SurrogateLikelihoods, "forward", "likelihoods"),
                (SurrogateLikelihoods, "losses", "likelihoods"),
                (torch.Tensor, "backward", "backward"),
                (torch.autograd, "grad", "backward"),
                (ProfiledJeffreysNPE, "_step", "step"),  # less the gradients in it
                (WeightAverage, "update", "step"),
            ):
                timed = watch.timed(getattr(owner, name), *parts)
                stack.enter_context(mock.patch.object(owner, name, timed))
            stack.enter_context(mock.patch.object(DataLoader, "__iter__", batches))
            return super().train(*args, **kwargs)


def trainer(
    kind: type, task: Task, budget: int, device: str = "cpu", **kwargs: Any
) -> Any:
    """Return a trainer with simulations."""
    torch.manual_seed(0)
    theta = task.prior.sample((budget,))
    prior = deepcopy(task.prior)  # moved in place
    inference = kind(
        move_distribution_to_device(prior, device),
        device=device,
        tracker=NoTracker(),
        show_progress_bars=False,
        **kwargs,
    )
    return inference.append_simulations(theta, task.simulator(theta))


def time_epochs(
    kind: type, task: Task, budget: int, batch_size: int, **kwargs: Any
) -> dict[str, float]:
    """Train for some epochs; return seconds per epoch of each stage and of all.

    The time before the first epoch, in which networks are built, is left out.
    """
    inference = trainer(kind, task, budget, **kwargs)
    # NPE's epochs are all alike. Tests of convergence must not end a stage of ours
    # before its share of the epochs.
    epochs = EPOCHS[budget] // 2 if kind is TimedNPE else EPOCHS[budget]
    inference.train(
        training_batch_size=batch_size,
        max_num_epochs=epochs - 1,
        stop_after_epochs=epochs,
    )
    ends = inference.ends
    seconds: dict[str, list[float]] = defaultdict(list)
    for (_, before), (stage, end) in zip(ends[:-1], ends[1:], strict=True):
        seconds[stage].append(end - before)
    result = {stage: sum(s) / len(s) for stage, s in seconds.items()}
    result["all"] = sum(result.values()) / len(result)
    return result


def best_of(
    function: Callable[[], dict[str, float]], repetitions: int
) -> dict[str, float]:
    """Return the shortest times of several runs: other work can only add."""
    runs = [function() for _ in range(repetitions)]
    return {name: min(run[name] for run in runs) for name in runs[0]}


def epochs(
    tasks: list[str], budgets: list[int], batch_size: int, **kwargs: Any
) -> None:
    """Print seconds per epoch over NPE's."""
    print(
        "| task | simulations | NPE, ms per epoch | $D_1$ alone | flow | likelihood "
        "| proxy | distillation | all | fast |\n" + 10 * "|---" + "|"
    )
    for name in tasks:
        for budget in budgets:
            kinds = (
                (TimedNPE, {}),
                (TimedJeffreysNPE, {"weights": FixedWeights((1.0, 0.0, 0.0))}),
                (TimedJeffreysNPE, {}),
                (TimedJeffreysNPE, {"preset": "fast"}),
            )
            npe, alone, ours, fast = (
                best_of(
                    partial(
                        time_epochs,
                        kind,
                        get_task(name),
                        budget,
                        batch_size,
                        **kwargs,
                        **own,
                    ),
                    REPETITIONS[budget],
                )
                for kind, own in kinds
            )
            ratios = [alone["all"], *(ours[stage.value] for stage in Stage)]
            ratios += [ours["all"], fast["all"]]
            cells = " | ".join(f"{r / npe['all']:.2f}" for r in ratios)
            print(
                f"| {name} | {budget} | {1e3 * npe['all']:.0f} | {cells} |", flush=True
            )


def profile(tasks: list[str], budgets: list[int], flow: str) -> None:
    """Print the share of every part in the processor's time of each stage, in %."""
    print(
        f"| task | simulations | stage | ms per epoch | {' | '.join(PARTS.values())} |"
    )
    print("|---" * (4 + len(PARTS)) + "|")
    for name in tasks:
        for budget in budgets:
            inference = trainer(
                ProfiledJeffreysNPE, get_task(name), budget, density_estimator=flow
            )
            inference.train(
                max_num_epochs=EPOCHS[budget] - 1, stop_after_epochs=EPOCHS[budget]
            )
            # The first also built the networks.
            laps = inference.stopwatch.laps[1:]
            for stage in dict.fromkeys(stage for stage, _ in laps):
                of_stage = [seconds for key, seconds in laps if key == stage]
                means = {
                    part: sum(seconds.get(part, 0.0) for seconds in of_stage)
                    / len(of_stage)
                    for part in PARTS
                }
                total = sum(means.values())
                cells = [f"{100 * means[part] / total:.1f}" for part in PARTS]
                print(
                    f"| {name} | {budget} | {stage} | {1e3 * total:.0f} "
                    f"| {' | '.join(cells)} |",
                    flush=True,
                )


def converged(tasks: list[str], budgets: list[int], flow: str) -> None:
    """Print seconds and epochs until trainings stop, and seconds per epoch over NPE's.

    The epochs are in the parts that the stages take of a full training.
    """
    kinds = {
        "NPE": (NPE, {}),
        "JeffreysNPE": (JeffreysNPE, {}),
        "fast": (JeffreysNPE, {"preset": "fast"}),
    }
    columns = [f"{name}, s | {name}, epochs" for name in kinds]
    columns += [f"{name} / NPE, s per epoch" for name in list(kinds)[1:]]
    print(f"| task | simulations | {' | '.join(columns)} |\n" + 10 * "|---" + "|")
    for name in tasks:
        for budget in budgets:
            runs = []
            for kind, kwargs in kinds.values():
                inference = trainer(
                    kind, get_task(name), budget, density_estimator=flow, **kwargs
                )
                start = time.perf_counter()
                with redirect_stdout(sys.stderr):  # sbi prints how it ends
                    inference.train()
                seconds = time.perf_counter() - start
                runs.append((seconds, len(inference.summary["validation_loss"])))
            cells = [f"{seconds:.0f} | {number}" for seconds, number in runs]
            npe, *ours = (seconds / number for seconds, number in runs)
            cells += [f"{each / npe:.2f}" for each in ours]
            print(f"| {name} | {budget} | {' | '.join(cells)} |", flush=True)


def sampling(tasks: list[str], flow: str) -> None:
    """Print seconds for samples and densities over those of NPE's."""
    print("| task | samples | densities | refined samples / the flow's |")
    print("|---|---|---|---|")
    for name in tasks:
        task = get_task(name)
        fits = []
        for kind in (NPE, JeffreysNPE):
            inference = trainer(kind, task, 1_000, density_estimator=flow)
            inference.train(max_num_epochs=60)
            fits.append(inference)
        x = task.simulator(task.prior.sample((1,)))
        npe, ours = (fit.build_posterior() for fit in fits)
        refined = fits[1].build_posterior(sample_with="refined")
        theta = task.prior.sample((NUM_SAMPLES,))

        def sample(posterior: Any, x: torch.Tensor = x) -> dict[str, float]:
            start = time.perf_counter()
            posterior.sample((NUM_SAMPLES,), x=x, show_progress_bars=False)
            return {"seconds": time.perf_counter() - start}

        def density(
            posterior: Any, theta: torch.Tensor = theta, x: torch.Tensor = x
        ) -> dict[str, float]:
            start = time.perf_counter()
            # The normalising constant of a bounded prior is another draw of samples.
            posterior.log_prob(theta, x=x, norm_posterior=False)
            return {"seconds": time.perf_counter() - start}

        times = [
            best_of(lambda f=f, p=p: f(p), REPETITIONS[1_000])["seconds"]
            for f, p in (
                (sample, npe),
                (sample, ours),
                (density, npe),
                (density, ours),
                (sample, refined),
            )
        ]
        ratios = (times[1] / times[0], times[3] / times[2], times[4] / times[1])
        print(
            f"| {name} | " + " | ".join(f"{r:.2f}" for r in ratios) + " |", flush=True
        )


def flows() -> None:
    """Print times of sbi's flows as JeffreysNPE runs them, over those of sbi's."""
    print(
        "| flow | dimensions | samples | densities | step of 200 |\n" + 5 * "|---" + "|"
    )
    for model in ("maf", "nsf"):
        for dim in (2, 5, 10):
            torch.manual_seed(0)
            theta, x = torch.randn(2, 1_000, dim)
            plain = posterior_nn(model)(theta, x)
            ours = deepcopy(plain)
            invert_in_one_pass(ours)
            evaluate_one_bin(ours)
            many = torch.randn(NUM_SAMPLES, 1, dim)

            def measure(
                flow: Any,
                theta: torch.Tensor = theta,
                x: torch.Tensor = x,
                many: torch.Tensor = many,
            ) -> dict[str, float]:
                seconds = [time.perf_counter()]
                with torch.no_grad():
                    flow.sample((NUM_SAMPLES,), x[:1])
                    seconds.append(time.perf_counter())
                    flow.log_prob(many, x[:1])
                    seconds.append(time.perf_counter())
                flow.loss(theta[:200], x[:200]).mean().backward()
                seconds.append(time.perf_counter())
                return {str(i): b - a for i, (a, b) in enumerate(pairwise(seconds))}

            # In turns, so that other work of the machine slows both alike.
            runs = [(measure(plain), measure(ours)) for _ in range(20)]
            cells = []
            for name in runs[0][0]:
                theirs, our_own = (min(run[k][name] for run in runs) for k in (0, 1))
                cells.append(f"{our_own / theirs:.2f}")
            print(f"| {model} | {dim} | {' | '.join(cells)} |", flush=True)


def memory(tasks: list[str], flow: str) -> None:
    """Print peaks of memory over NPE's: of the process, and less that of imports."""
    print(
        "| task | NPE, MB | JeffreysNPE / NPE | NPE less imports, MB "
        "| JeffreysNPE less imports, MB |\n|---|---|---|---|---|"
    )
    for name in tasks:
        peaks = []
        for kind in ("NPE", "JeffreysNPE"):
            command = [sys.executable, "-m", "tasks.benchmarks.training", "peak"]
            run = subprocess.run(
                [*command, kind, name, "--flow", flow],
                check=True,
                capture_output=True,
                text=True,
            )
            peaks.append([float(word) for word in run.stdout.split()[-2:]])
        (before, npe), (ours_before, ours) = peaks
        print(
            f"| {name} | {npe:.0f} | {ours / npe:.2f} | {npe - before:.0f} "
            f"| {ours - ours_before:.0f} |",
            flush=True,
        )


def peak(kind: str, name: str, flow: str) -> None:
    """Train three epochs on 100,000 simulations; print peaks before and after in MB."""
    task = get_task(name)
    trainer(NPE, task, 1_000, density_estimator=flow).train(max_num_epochs=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kinds = {"NPE": NPE, "JeffreysNPE": JeffreysNPE}
    inference = trainer(kinds[kind], task, 100_000, density_estimator=flow)
    inference.train(max_num_epochs=2)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(before / 1024, after / 1024)


def main() -> None:
    """Run a measurement from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measurements = parser.add_subparsers(dest="measurement", required=True)
    measurements.add_parser("flows")
    for name in ("epochs", "profile", "converged", "sampling", "memory", "peak"):
        measurement = measurements.add_parser(name)
        if name == "peak":
            measurement.add_argument("kind", choices=("NPE", "JeffreysNPE"))
            measurement.add_argument("task", choices=TASKS)
        else:
            measurement.add_argument(
                "--tasks", nargs="+", choices=TASKS, default=list(TASKS)
            )
        measurement.add_argument("--flow", default="maf")
        if name in ("epochs", "profile", "converged"):
            measurement.add_argument(
                "--budgets", type=int, nargs="+", choices=EPOCHS, default=[1_000]
            )
        if name == "epochs":
            measurement.add_argument("--batch-size", type=int, default=200)
            measurement.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measurement == "epochs":
        epochs(
            arguments.tasks,
            arguments.budgets,
            arguments.batch_size,
            density_estimator=arguments.flow,
            device=arguments.device,
        )
    elif arguments.measurement == "profile":
        profile(arguments.tasks, arguments.budgets, arguments.flow)
    elif arguments.measurement == "converged":
        converged(arguments.tasks, arguments.budgets, arguments.flow)
    elif arguments.measurement == "sampling":
        sampling(arguments.tasks, arguments.flow)
    elif arguments.measurement == "flows":
        flows()
    elif arguments.measurement == "memory":
        memory(arguments.tasks, arguments.flow)
    else:
        peak(arguments.kind, arguments.task, arguments.flow)


if __name__ == "__main__":
    main()
