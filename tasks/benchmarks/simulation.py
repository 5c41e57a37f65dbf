"""What simulations of each task cost.

    python -m tasks.benchmarks.simulation

Draws parameters from the prior and simulates them, 100,000 on one core if nothing else
is asked for, and prints the seconds of both together as a Markdown table. They are the
processor's, which other work on the machine does not add to.
"""

import argparse
import time

import torch

from tasks import TASKS
from tasks.run import simulate

NUM_SIMULATIONS = 100_000


def seconds(name: str, num_simulations: int) -> float:
    """Return what the simulations of a run with this budget take of the processor."""
    start = time.process_time()
    simulate(name, num_simulations, 1)
    return time.process_time() - start


def main() -> None:
    """Run the measurement from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--budget", type=int, default=NUM_SIMULATIONS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| task | seconds |\n|---|---|")
    for name in arguments.tasks:
        print(f"| {name} | {seconds(name, arguments.budget):.2f} |", flush=True)


if __name__ == "__main__":
    main()
