"""Ordinary differential equations for a whole batch at once."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# The method of Dormand and Prince (1980), of order 5. The last row of stages is the
# step itself, so its slope is the first of the next step; the difference to an embedded
# solution of order 4 estimates the error.
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)

# Rows integrated together: few enough to stay in the processor's cache.
_CHUNK = 8192


def integrate(
    field: Callable[[Tensor, Tensor], Tensor],
    state: Tensor,
    parameters: Tensor,
    times: Sequence[float],
    tolerance: float = 1e-7,
    max_steps: int = 100_000,
) -> Tensor:
    r"""Integrate $\dot u = f(u, \theta)$ with a step of its own for each row.

    Dormand and Prince's method of order 5. The error of each step of a row is kept
    below `tolerance`, absolutely: where a relative error is meant, write the equations
    for logarithms. Rows that arrive early leave the batch, so that a few stiff rows do
    not hold up the others.

    Args:
        field: The right-hand side $f$. Takes the state, shape (dim, n), and the
            parameters, shape (dim_parameters, n), and returns the slopes, shape
            (dim, n).
        state: State at the first time, shape (n, dim), in double precision.
        parameters: Parameters, shape (n, dim_parameters), in double precision.
        times: Increasing times.
        tolerance: Largest estimated error of a step.
        max_steps: Largest number of steps between two times.

    Returns:
        States, shape (n, len(times), dim). Those of a row are NaN from the time on that
        is not reached in `max_steps` steps.

    Reference:
        Hairer, Norsett and Wanner (1993), "Solving Ordinary Differential Equations I".
    """
    solutions = []
    for u, p in zip(state.split(_CHUNK), parameters.split(_CHUNK), strict=True):
        u, p = u.T.contiguous(), p.T.contiguous()
        h = torch.full_like(u[0], 1e-3)
        solution = [u]
        for begin, end in zip(times[:-1], times[1:], strict=True):
            u, h = _advance(field, u, p, end - begin, h, tolerance, max_steps)
            solution.append(u)
        solutions.append(torch.stack(solution).permute(2, 0, 1))
    result = torch.cat(solutions)
    if failed := int(result[:, -1].isnan().any(1).sum()):
        warnings.warn(
            f"The equations could not be integrated in {max_steps} steps for {failed} "
            f"of {len(result)} parameters. Their solution is NaN.",
            stacklevel=2,
        )
    return result


def _advance(
    field: Callable[[Tensor, Tensor], Tensor],
    u: Tensor,
    p: Tensor,
    duration: float,
    h: Tensor,
    tolerance: float,
    max_steps: int,
) -> tuple[Tensor, Tensor]:
    """Return the state after `duration` and the steps to go on with."""
    stages = [u.new_tensor(weights) for weights in _STAGES]
    error_weights = u.new_tensor(_ERROR)
    end_u, end_h = torch.full_like(u, torch.nan), h

    rows = u.isfinite().all(0).nonzero().squeeze(1)
    u, p, h = u[:, rows], p[:, rows], h[rows]
    left = torch.full_like(h, duration)
    slope = field(u, p)
    for _ in range(max_steps):
        slopes = u.new_empty(7, *u.shape)
        slopes[0] = slope
        step = torch.minimum(h, left)
        new = u
        for i, weights in enumerate(stages, start=1):
            new = u + step * torch.tensordot(weights, slopes[:i], 1)
            slopes[i] = field(new, p)
        error = step * torch.tensordot(error_weights, slopes, 1)
        error = error.abs().amax(0) / tolerance
        # Where a stage overflows, the step was far too long.
        factor = (0.9 * error.nan_to_num(torch.inf).pow(-0.2)).clamp(0.2, 5.0)

        accept = error <= 1
        u = torch.where(accept, new, u)
        slope = torch.where(accept, slopes[6], slope)
        # A step cut short by the end says nothing against the longer one before it.
        cut = accept & (left < h)
        h = torch.where(cut, torch.maximum(h, step * factor), step * factor)
        left = torch.where(accept, left - step, left)

        # Rows that have arrived stand still; moving them out has a cost, too.
        done = left <= 0
        num_done = int(done.sum())
        if 8 * num_done >= len(rows):
            end_u[:, rows[done]] = u[:, done]
            end_h = end_h.index_put((rows[done],), h[done])
            if num_done == len(rows):
                break
            keep = (~done).nonzero().squeeze(1)
            rows, left, h = rows[keep], left[keep], h[keep]
            u, p, slope = u[:, keep], p[:, keep], slope[:, keep]
    return end_u, end_h
