"""Binary classifiers of one shape, trained side by side as one batched network."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# The defaults of scikit-learn's `MLPClassifier(solver="adam")`.
BATCH_SIZE = 200
LEARNING_RATE = 1e-3
BETA_1, BETA_2 = 0.9, 0.999
EPSILON = 1e-8
PENALTY = 1e-4
TOLERANCE = 1e-4
PATIENCE = 10


# The gradient of ReLU in one pass: zero where its output is.
_threshold = torch.ops.aten.threshold_backward.grad_input


class BatchedMLP:
    r"""E perceptrons with two hidden ReLU layers and a logistic unit, as one network.

    $$p = \sigma(w_3^\top h_2 + b_3), \quad h_2 = \max(0, W_2^\top h_1 + b_2), \quad
    h_1 = \max(0, W_1^\top x + b_1)$$

    The products are batched over the networks. All parameters lie in one flat buffer,
    and so do their gradients and Adam's moments, so that a step of the optimizer is a
    few element-wise operations however many networks there are. Gradients are written
    out by hand, which saves autograd's bookkeeping: at these sizes it costs as much as
    the arithmetic.

    Args:
        initial: Parameters W1, b1, W2, b2, w3, b3 of all networks, of shapes
            (E, D, H), (E, 1, H), (E, H, H), (E, 1, H), (E, 1, H), (E, 1, 1).
    """

    def __init__(self, initial: Sequence[Tensor]) -> None:
        self.num_networks = len(initial[0])
        self._shapes = [p.shape for p in initial]
        self._flat = torch.cat([p.reshape(-1) for p in initial])
        self._grad, self._scale, self._moment_1, self._moment_2 = (
            torch.zeros_like(self._flat) for _ in range(4)
        )
        self._num_steps = 0
        self.parameters = self._views(self._flat)
        self.gradients = self._views(self._grad)
        self._w2_transposed = self.parameters[2].transpose(1, 2)
        self._buffers: dict[int, list[Tensor]] = {}

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([shape.numel() for shape in self._shapes])
        return [part.view(s) for part, s in zip(parts, self._shapes, strict=True)]

    def _buffers_for(self, batch_size: int) -> list[Tensor]:
        """Return h1, h2, both transposed, their gradients, and p.

        They are made once per batch size, as all views are that every step needs.
        """
        if batch_size not in self._buffers:
            shape = (self.num_networks, batch_size, self._shapes[1][2])
            h1, h2, d1, d2 = self._flat.new_empty(4, *shape)
            p = self._flat.new_empty(self.num_networks, 1, batch_size)
            h1_transposed, h2_transposed = h1.transpose(1, 2), h2.transpose(1, 2)
            buffers = [h1, h1_transposed, h2, h2_transposed, d1, d2, p]
            self._buffers[batch_size] = buffers
        return self._buffers[batch_size]

    def forward(self, x: Tensor) -> Tensor:
        """Return the probabilities of label 1, shape (E, 1, B).

        They are overwritten by the next call.

        Args:
            x: Inputs, shape (E, B, D).
        """
        w1, b1, w2, b2, w3, b3 = self.parameters
        h1, _, h2, h2_transposed, _, _, p = self._buffers_for(x.shape[1])
        torch.baddbmm(b1, x, w1, out=h1).relu_()
        torch.baddbmm(b2, h1, w2, out=h2).relu_()
        return torch.bmm(w3, h2_transposed, out=p).add_(b3).sigmoid_()

    def backward(self, x: Tensor, residual: Tensor) -> None:
        r"""Fill `gradients` after `forward(x)`.

        Of $\frac{1}{B} \sum_i \text{BCE}(p_i, y_i) + \frac{\alpha}{2B} \sum W^2$, the
        biases being free of the penalty.

        Args:
            x: Inputs, shape (E, B, D), those of the preceding `forward`.
            residual: p - y, shape (E, 1, B).
        """
        w1, _, w2, _, w3, _ = self.parameters
        gw1, gb1, gw2, gb2, gw3, gb3 = self.gradients
        h1, h1_transposed, h2, _, d1, d2, _ = self._buffers_for(x.shape[1])
        alpha = 1.0 / x.shape[1]
        beta = PENALTY * alpha

        torch.baddbmm(w3, residual, h2, beta=beta, alpha=alpha, out=gw3)
        torch.mean(residual, 2, keepdim=True, out=gb3)
        torch.mul(residual.transpose(1, 2), w3, out=d2)
        _threshold(d2, h2, 0.0, grad_input=d2)
        torch.baddbmm(w2, h1_transposed, d2, beta=beta, alpha=alpha, out=gw2)
        torch.mean(d2, 1, keepdim=True, out=gb2)
        torch.bmm(d2, self._w2_transposed, out=d1)
        _threshold(d1, h1, 0.0, grad_input=d1)
        torch.baddbmm(w1, x.transpose(1, 2), d1, beta=beta, alpha=alpha, out=gw1)
        torch.mean(d1, 1, keepdim=True, out=gb1)

    def adam_step(self) -> None:
        """Move the parameters by one step of Adam along `gradients`."""
        self._num_steps += 1
        step_size = (
            LEARNING_RATE
            * math.sqrt(1.0 - BETA_2**self._num_steps)
            / (1.0 - BETA_1**self._num_steps)
        )
        self._moment_1.lerp_(self._grad, 1.0 - BETA_1)
        self._moment_2.mul_(BETA_2).addcmul_(self._grad, self._grad, value=1.0 - BETA_2)
        torch.sqrt(self._moment_2, out=self._scale).add_(EPSILON)
        self._flat.addcdiv_(self._moment_1, self._scale, value=-step_size)

    def penalty(self) -> Tensor:
        r"""Return $\frac{\alpha}{2} \sum W^2$ of each network, shape (E,)."""
        squares = [w.square().sum((1, 2)) for w in self.parameters[::2]]
        return 0.5 * PENALTY * torch.stack(squares).sum(0)

    def select(self, index: Tensor) -> "BatchedMLP":
        """Return the networks at `index` with their optimizer's state."""
        chosen = BatchedMLP([p[index] for p in self.parameters])
        for name in ("_moment_1", "_moment_2"):
            parts = self._views(getattr(self, name))
            setattr(chosen, name, torch.cat([p[index].reshape(-1) for p in parts]))
        chosen._num_steps = self._num_steps
        return chosen


def initial_parameters(
    dim: int, hidden: int, random_state: np.random.RandomState
) -> list[Tensor]:
    """Draw one network's parameters by Glorot's uniform rule, biases included.

    In scikit-learn's order, so that equal seeds give equal networks.
    """
    parameters = []
    for fan_in, fan_out in ((dim, hidden), (hidden, hidden), (hidden, 1)):
        bound = math.sqrt(6.0 / (fan_in + fan_out))
        for rows in (fan_in, 1):
            draw = random_state.uniform(-bound, bound, (1, rows, fan_out))
            parameters.append(torch.from_numpy(draw.astype(np.float32)))
    parameters[4] = parameters[4].transpose(1, 2)
    return parameters


class Examples:
    """The training sets of E networks, in the order in which an epoch takes them.

    Examples come first, so that reordering copies whole rows and the batches of all
    networks lie side by side. Views of the batches are made once.

    Args:
        x: Inputs, shape (N, E, D).
        y: Labels 0 or 1 as floats, shape (N, E).
        batch_size: Examples in a batch; the last one may have fewer.

    Attributes:
        batches: Of each batch the inputs, shape (E, B, D), labels, (E, 1, B), and space
            for the residuals p - y, (E, 1, B).
    """

    def __init__(self, x: Tensor, y: Tensor, batch_size: int) -> None:
        self._x, self._y, self._batch_size = x, y, batch_size
        self._x_epoch, self._y_epoch = torch.empty_like(x), torch.empty_like(y)
        self._residuals = torch.empty_like(y)
        self.batches = [
            # The memory of (B, E) residuals is taken as (E, 1, B) to be contiguous.
            (x.transpose(0, 1), y.t().unsqueeze(1), residual.view(y.shape[1], 1, -1))
            for x, y, residual in zip(
                self._x_epoch.split(batch_size),
                self._y_epoch.split(batch_size),
                self._residuals.split(batch_size),
                strict=True,
            )
        ]

    def reorder(self, order: Tensor) -> None:
        """Take the examples in the given order."""
        torch.index_select(self._x, 0, order, out=self._x_epoch)
        torch.index_select(self._y, 0, order, out=self._y_epoch)

    def cross_entropy(self) -> Tensor:
        """Return the mean over all residuals, shape (E,), and overwrite them.

        Probabilities are kept from 0 and 1 by the rounding unit as in scikit-learn.
        """
        eps = torch.finfo(self._residuals.dtype).eps
        # The likelihood of a label is one minus the absolute residual.
        likelihood = self._residuals.abs_().neg_().add_(1.0).clamp_(eps, 1.0 - eps)
        log_likelihood = likelihood.log_()
        num_examples, num_networks = self._y.shape
        num_last = num_examples % self._batch_size
        full = log_likelihood[: num_examples - num_last]
        last = log_likelihood[num_examples - num_last :]
        total = full.view(-1, num_networks, self._batch_size).sum((0, 2))
        total += last.view(num_networks, num_last).sum(1)
        return -total / num_examples

    def select(self, index: Tensor) -> "Examples":
        """Return the training sets of the networks at `index`."""
        x, y = self._x.index_select(1, index), self._y.index_select(1, index)
        return Examples(x, y, self._batch_size)


@torch.inference_mode()
def train_and_score(
    x_train: Tensor,
    y_train: Tensor,
    x_test: Tensor,
    y_test: Tensor,
    hidden: int,
    seed: int,
    max_epochs: int,
) -> Tensor:
    """Train E classifiers on E training sets and return their test accuracies.

    Args:
        x_train: Inputs, shape (E, N, D).
        y_train: Labels 0 or 1 as floats, shape (E, N).
        x_test: Inputs, shape (E, M, D).
        y_test: Labels, shape (E, M).
        hidden: Units of each of the two hidden layers.
        seed: Seed of the initial parameters and of the order of the examples, the same
            for every network as in `cross_val_score`.
        max_epochs: Epochs after which an unfinished network stops.

    Returns:
        Accuracies, shape (E,).
    """
    num_networks, num_train, dim = x_train.shape
    device = x_train.device
    random_state = np.random.RandomState(seed)
    nets = BatchedMLP([
        p.to(device).expand(num_networks, -1, -1)
        for p in initial_parameters(dim, hidden, random_state)
    ])
    examples = Examples(
        x_train.transpose(0, 1).contiguous(),
        y_train.transpose(0, 1).contiguous(),
        batch_size=min(BATCH_SIZE, num_train),
    )
    accuracy = torch.empty(num_networks, device=device)
    active = torch.arange(num_networks, device=device)
    best = torch.full((num_networks,), math.inf, device=device)
    stale = torch.zeros(num_networks, dtype=torch.long, device=device)
    order = np.arange(num_train)
    for epoch in range(1, max_epochs + 1):
        permutation = np.arange(num_train)
        random_state.shuffle(permutation)
        order = order[permutation]
        examples.reorder(torch.from_numpy(order).to(device))
        for x, y, residual in examples.batches:
            torch.sub(nets.forward(x), y, out=residual)
            nets.backward(x, residual)
            nets.adam_step()

        # The penalty's share of the loss changes by far less than the tolerance within
        # an epoch, so it is taken at the epoch's end rather than at every step.
        penalty = nets.penalty() * (len(examples.batches) / num_train)
        loss = examples.cross_entropy() + penalty
        # A loss of NaN, which is not lower either, is never mended.
        stale = torch.where(loss <= best - TOLERANCE, 0, stale + 1)
        best = torch.minimum(best, loss)
        done = stale > PATIENCE
        if epoch == max_epochs:
            done.fill_(True)
        if bool(done.any()):
            stopped, rest = done.nonzero().squeeze(1), (~done).nonzero().squeeze(1)
            finished = active[stopped]
            p = nets.select(stopped).forward(x_test[finished]).squeeze(1)
            hits = (p > 0.5) == (y_test[finished] > 0.5)
            accuracy[finished] = hits.float().mean(1)
            if len(rest) == 0:
                break
            active, best, stale = active[rest], best[rest], stale[rest]
            nets, examples = nets.select(rest), examples.select(rest)
    return accuracy
