"""How a command ends: its exit status, and what is said where it did not finish."""

import argparse
import sys
from collections.abc import Callable

from tasks.errors import InputError
from tasks.reference import ReferenceDataError

INTERRUPTED = 130


def exit_status(
    command: Callable[[argparse.Namespace], int],
    options: argparse.Namespace,
    interrupted: str = "interrupted.",
) -> int:
    """Run a command and return the exit status of its process.

    Errors that a user can mend end it with their message on the standard error;
    others, which are ours, are passed on.

    Args:
        command: What to run; it returns its exit status.
        options: Its options.
        interrupted: What to say after Ctrl-C.

    Returns:
        The status that the command returned; 2 for wrong input, files that cannot be
        read or written and reference data that cannot be had; 130 after Ctrl-C.
    """
    try:
        return command(options)
    except (InputError, ReferenceDataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return INTERRUPTED
