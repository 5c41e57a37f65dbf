r"""Saving and loading: fitted networks, or a training to go on with.

A file holds tensors, numbers, strings and containers of these. It is read with
`torch.load(weights_only=True)`, which runs no code from the file. What is code, the
prior and the builders of the networks, is therefore not in it: `JeffreysNPE.load`
builds the networks anew with the builders of the object that it is called on, and
then fills them.

A training is resumed from its last complete epoch. `capture` takes all that the next
epoch depends on; after `restore` it is, on a CPU with the same number of threads, bit
for bit the epoch that it would have been.
"""

import os
import time
import uuid
import warnings
import zipfile
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Union

import numpy as np
import torch
from sbi.utils import RestrictedPrior
from sbi.utils.sbiutils import ImproperEmpirical, get_simulations_since_round
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.optim.adam import Adam
from torch.optim.optimizer import Optimizer

from sbi_jeffreys.base_measure import event_shape, is_inside
from sbi_jeffreys.best import Best
from sbi_jeffreys.estimator import JeffreysEstimator
from sbi_jeffreys.features import MIN_DISTINCT, num_values
from sbi_jeffreys.objective import Proposals, ProxySamples
from sbi_jeffreys.screening import outputs_taken
from sbi_jeffreys.stages import Stage
from sbi_jeffreys.version import __version__

if TYPE_CHECKING:
    from sbi_jeffreys.trainer import JeffreysNPE

PathLike = Union[str, "os.PathLike[str]"]

FORMAT = "sbi_jeffreys.JeffreysNPE"
#: Increased whenever a file of before can no longer be read.
FORMAT_VERSION = 13

# Parameters at which the prior of the file and that of the user are compared.
NUM_PRIOR_CHECKS = 8

# Of the time of training, what may be spent on writing checkpoints.
CHECKPOINT_TIME_SHARE = 0.05

# Appended only when a training has ended, and not by its epochs.
PER_TRAINING = ("epochs_trained", "best_validation_loss")

# ------------------------------------------------------------------- state of training


def capture(inference: "JeffreysNPE", epoch: int) -> Dict[str, Any]:
    """Return all that the epochs from `epoch` on depend on, as plain containers.

    Nothing in it changes when training goes on.

    Args:
        inference: An inference object between two epochs.
        epoch: Number of complete epochs.
    """
    optimizer = getattr(inference, "optimizer", None)
    return {
        "epoch": epoch,
        "stage": inference._stage.value,
        "stage_start": inference._stage_start,
        "candidate_start": inference._candidate_start,
        "best_of_candidate": inference._best_of_candidate,
        "proxy_share": inference._proxy_share,
        "is_new": inference._is_new,
        "max_num_epochs": inference._max_num_epochs,
        "networks": copy_of_networks(inference._estimator),
        "average": inference._average.state(),
        "base": _state_of_base(inference),
        "best": {name: tuple(best) for name, best in inference._best.items()},
        "optimizer": None if optimizer is None else copy_of_optimizer(optimizer),
        "weights": inference._weights.state_dict(),
        "summary": {
            name: list(values)
            for name, values in inference._summary.items()
            if name not in PER_TRAINING
        },
        "num_skipped_steps": inference._num_skipped_steps,
        "validation_loss": inference._val_loss,
        # They are drawn anew and never changed: no copy is needed.
        "proposals": {
            name: dict(vars(proposals))
            for name, proposals in inference._samples.proposals.items()
        },
        "proxy_samples": {
            name: dict(vars(samples))
            for name, samples in inference._samples.proxy_samples.items()
        },
        "imagined": inference._samples.imagined,
        "random_state": random_state(inference._device),
    }


def restore(inference: "JeffreysNPE", state: Dict[str, Any]) -> None:
    """Put the training back to where `capture` took it, but for the random state."""
    inference.epoch = state["epoch"]
    inference._stage = Stage(state["stage"])
    inference._stage_start = state["stage_start"]
    inference._max_num_epochs = state["max_num_epochs"]
    inference._candidate_start = state["candidate_start"]
    inference._best_of_candidate = state["best_of_candidate"]
    inference._proxy_share = state["proxy_share"]
    inference._is_new = state["is_new"]
    load_networks(inference._estimator, state["networks"])
    inference._average.load_state(state["average"])
    _restore_base(inference, state["base"])
    _restore_best(inference, state)
    if state["optimizer"] is not None:
        # torch takes tensors of the right type as they are, and changes them.
        inference.optimizer.load_state_dict(deepcopy(state["optimizer"]))
    inference._weights.load_state_dict(state["weights"])
    for name, values in state["summary"].items():
        inference._summary[name][:] = values
    inference._num_skipped_steps = state["num_skipped_steps"]
    inference._val_loss = state["validation_loss"]
    restore_samples(inference, state)


def restore_samples(inference: "JeffreysNPE", state: Dict[str, Any]) -> None:
    """Put back the samples that `capture` took."""
    inference._samples.proposals = {
        name: Proposals(**_to(inference._device, proposals))
        for name, proposals in state["proposals"].items()
    }
    inference._samples.proxy_samples = {
        name: ProxySamples(**_to(inference._device, samples))
        for name, samples in state["proxy_samples"].items()
    }
    imagined = state["imagined"]
    if imagined is not None:
        imagined = imagined.to(inference._device)
    inference._samples.imagined = imagined


def _restore_best(inference: "JeffreysNPE", state: Dict[str, Any]) -> None:
    inference._best = {name: Best(*best) for name, best in state["best"].items()}


def _state_of_base(inference: "JeffreysNPE") -> Dict[str, Any]:
    """Return what the base measure of the proxy has learnt of its support."""
    base = inference._estimator.proxy.base
    state = {
        name: value
        for name, value in vars(base).items()
        if value is None or isinstance(value, (Tensor, bool, float))
    }
    restricted = getattr(base.reference, "prior", None)
    if isinstance(restricted, RestrictedPrior):  # sbi estimates it
        rate = restricted.acceptance_rate
        state["acceptance_rate"] = None if rate is None else float(rate)
    return state


def _restore_base(inference: "JeffreysNPE", state: Dict[str, Any]) -> None:
    base = inference._estimator.proxy.base
    state = _to(inference._device, state)
    if "acceptance_rate" in state:
        base.reference.prior.acceptance_rate = state.pop("acceptance_rate")  # type: ignore[attr-defined]
    vars(base).update(state)


def all_finite(model: nn.Module) -> bool:
    """Return whether all parameters of a module are finite."""
    # In one piece, as networks have hundreds of small ones.
    parameters = [p.detach().flatten() for p in model.parameters()]
    return not parameters or bool(torch.cat(parameters).isfinite().all())


def copy_of_state(model: nn.Module) -> Dict[str, Any]:
    """Return a copy of the state of a module.

    What modules of the user's keep beside tensors (`get_extra_state`) is any object.
    """
    return {
        key: value.clone() if isinstance(value, Tensor) else deepcopy(value)
        for key, value in model.state_dict().items()
    }


def copy_of_networks(estimator: JeffreysEstimator) -> Dict[str, Dict[str, Any]]:
    """Return copies of the states of flow and proxy."""
    return {name: copy_of_state(getattr(estimator, name)) for name in ("flow", "proxy")}


def copy_of_optimizer(optimizer: Optimizer) -> Dict[str, Any]:
    """Return a copy of the state of an optimizer, sooner than by `deepcopy`."""
    state = optimizer.state_dict()
    return {
        "state": {
            index: {name: value.clone() for name, value in moments.items()}
            for index, moments in state["state"].items()
        },
        "param_groups": [
            {**group, "params": list(group["params"])}
            for group in state["param_groups"]
        ],
    }


def load_networks(
    estimator: JeffreysEstimator, states: Dict[str, Dict[str, Any]]
) -> None:
    """Load the states of flow and proxy."""
    estimator.flow.load_state_dict(states["flow"])
    estimator.proxy.load_state_dict(states["proxy"])


def random_state(device: Union[str, torch.device] = "cpu") -> Dict[str, Any]:
    """Return the state of all random numbers that training may use.

    Of torch on the CPU and on `device`; of numpy, since priors of scipy draw from it.
    """
    _, keys, *rest = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy_keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": [*rest],
    }
    if torch.device(device).type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(
    state: Dict[str, Any], device: Union[str, torch.device] = "cpu"
) -> None:
    """Set the state of all random numbers to what `random_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    keys = state["numpy_keys"].cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, *state["numpy_rest"]))
    if "cuda" in state and torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


@contextmanager
def keeping_random_state(device: Union[str, torch.device] = "cpu") -> Iterator[None]:
    """Leave the caller's random numbers as they were."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)


# ------------------------------------------------------------------------------- files


def write(path: PathLike, content: Dict[str, Any]) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: If it cannot be written. A file of before is then as it was.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        with open(temporary, "xb") as file:
            torch.save(_plain(content), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    # When the disk is full torch's writer raises a RuntimeError.
    except (OSError, RuntimeError) as err:
        raise OSError(
            f"{path} cannot be written: {err}. Free or choose another disk or folder; "
            "a file that was there before is as it was."
        ) from err
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_writable(path: PathLike) -> None:
    """Raise now if `write` would later.

    Raises:
        OSError: If no file can be written there.
    """
    path = Path(os.path.realpath(path))
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as err:
        raise OSError(f"{path} cannot be written: {err}.") from err


class Checkpoint:
    """A file that a training is written to as it goes on.

    Not after every epoch where epochs are short: writing is to take no more than
    `CHECKPOINT_TIME_SHARE` of the time.

    Args:
        path: Path of the file.

    Raises:
        OSError: If it cannot be written.
    """

    def __init__(self, path: PathLike) -> None:
        check_writable(path)
        self._path = path
        self._earliest = -float("inf")
        self._failed = False

    def write(self, inference: "JeffreysNPE", last: bool = False) -> None:
        """Write the file, if it is due or the training's last.

        A disk that is full must not cost the training: it is warned of once.
        """
        start = time.monotonic()
        if start < self._earliest and not last:
            return
        try:
            write(self._path, to_content(inference, simulations=True))
        except OSError as err:
            if not self._failed:
                warnings.warn(
                    f"The checkpoint failed: {err} Training goes on.", stacklevel=2
                )
            self._failed = True
        duration = time.monotonic() - start
        self._earliest = start + duration / CHECKPOINT_TIME_SHARE


def read(path: PathLike) -> Dict[str, Any]:
    """Read what `write` has written, without running code from the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, of another kind or of another format version.
    """
    path = Path(path)
    if not path.is_file():
        what = "It is a folder" if path.is_dir() else "There is no such file"
        raise FileNotFoundError(f"{path} cannot be loaded. {what}.")
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} cannot be loaded: it is truncated, or not a file that "
            "JeffreysNPE.save has written."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not look at the checksums
        if damaged is not None:
            raise zipfile.BadZipFile(f"The checksum of {damaged} is wrong.")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # whatever unzipping and unpickling may stumble over
        raise ValueError(
            f"{path} cannot be loaded: it is damaged, or not a file that "
            "JeffreysNPE.save has written."
        ) from err
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a file that JeffreysNPE.save has written. The state of a "
            "bare estimator is loaded with estimator.load_state_dict(torch.load(...))."
        )
    if content.get("version") != FORMAT_VERSION:
        writer = content.get("written_by")
        raise ValueError(
            f"{path} has format version {content.get('version')} and was written by "
            f"sbi_jeffreys {writer}. This is sbi_jeffreys {__version__}, which reads "
            f"version {FORMAT_VERSION}: load the file with sbi_jeffreys {writer}."
        )
    return content


def _plain(value: Any) -> Any:
    """Return containers of tensors on the CPU that hold no more than they show.

    Numbers of numpy become Python's: they are not read without running code.
    """
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        return value if whole else value.clone()
    return value.item() if isinstance(value, np.generic) else value


# ------------------------------------------------------------------- content of a file


def record_built_with(
    inference: "JeffreysNPE", starting_round: int, random: Dict[str, Any]
) -> Dict[str, Any]:
    """Return what it takes to build the networks again.

    Args:
        inference: Whose networks have just been built, with its training split.
        starting_round: The earliest round of simulations that it was built with.
        random: The random state before.
    """
    theta, x, _ = inference.get_simulations(starting_round)
    indices = inference.train_indices
    theta = theta[indices].cpu()
    with keeping_random_state(inference._device):
        sign_of_prior = _sign_of_prior(inference, theta)
    return {
        "theta": theta,
        "x_shape": list(x.shape[1:]),
        "x_num_values": num_values(x[indices]).clamp_max(MIN_DISTINCT).tolist(),
        "outputs": outputs_taken(inference._estimator),
        "starting_round": starting_round,
        "num_parts": len(inference._theta_roundwise),
        "indices": indices,
        "random_state": random,
        "sign_of_prior": sign_of_prior,
    }


def to_content(inference: "JeffreysNPE", simulations: bool) -> Dict[str, Any]:
    """Return what a file holds of an inference object."""
    estimator = inference._estimator
    content = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "written_by": __version__,
        "networks": copy_of_networks(estimator),
        "exponent": estimator.exponent,
        "floor": estimator.proxy.base.floor,
        "settings": _settings(inference),
        "kind_of_weights": type(inference._weights).__name__,
        "weights": inference._weights.state_dict(),
        "summary": inference._summary,
        "round": inference._round,
        "starting_round": inference._starting_round,
        "finished": inference._finished,
        "built_with": inference._built_with,
        "simulations": None,
        "training": None,
    }
    if simulations:
        content["training"] = inference._last_epoch
        content["simulations"] = {
            "theta": inference._theta_roundwise,
            "x": inference._x_roundwise,
            "prior_masks": inference._prior_masks,
            "round_index": inference._data_round_index,
            "train_indices": inference.train_indices,
            "val_indices": inference.val_indices,
            "on_cpu": inference._theta_roundwise[0].device.type == "cpu",
        }
    return content


def _settings(inference: "JeffreysNPE") -> Dict[str, Union[str, int]]:
    """Return the settings that a training is to be gone on with."""
    objective = inference.objective
    return {
        "preset": inference.preset,
        "num_flow_samples": objective.num_flow_samples,
        "num_reference_samples": objective.num_reference_samples,
        "num_reverse_samples": objective.num_reverse_samples,
    }


def from_content(inference: "JeffreysNPE", content: Dict[str, Any]) -> None:
    """Make an inference object what it was when its content was taken.

    Raises:
        ValueError: If prior, simulations, networks, weights, preset or numbers of
            samples are not those of the content. The object is then as it was.
    """
    before = dict(vars(inference))
    try:
        with keeping_random_state(inference._device):
            _fill(inference, content)
    except BaseException:
        vars(inference).clear()
        vars(inference).update(before)
        raise


def _fill(inference: "JeffreysNPE", content: Dict[str, Any]) -> None:
    if content["training"] is not None:  # networks alone do not depend on them
        _check_settings(_settings(inference), content["settings"])
    stored = content["simulations"]
    built_with = content["built_with"]
    theta = built_with["theta"]
    if stored is None:
        # Those that the object had are of a training before.
        for name in ("train_indices", "val_indices"):
            vars(inference).pop(name, None)
        x = _x_like_that_built_with(built_with)
        all_theta = theta
        # Simulations that are appended later are others.
        built_with = {**built_with, "num_parts": 0}
    else:
        _take_simulations(inference, stored)
        if built_with["num_parts"] == 0:
            x = _x_like_that_built_with(built_with)
        else:
            x = _x_built_with(inference, built_with)
        all_theta = inference.get_simulations()[0]
    if inference._prior is None:
        all_theta = all_theta.to(inference._device)
        ones = torch.ones(len(all_theta), device=all_theta.device)
        inference._prior = ImproperEmpirical(all_theta, ones)
    _check_same_prior(inference, theta, built_with["sign_of_prior"])
    inference._built_with = built_with
    inference._summary = {name: list(v) for name, v in content["summary"].items()}
    inference._round = content["round"]
    inference._starting_round = content["starting_round"]
    inference._finished = content["finished"]

    set_random_state(built_with["random_state"])
    estimator = inference._build_estimator(theta.cpu(), x.cpu())
    for name, state in content["networks"].items():
        _check_fits(name, getattr(estimator, name).state_dict(), state)
    load_networks(estimator, content["networks"])
    estimator.exponent = content["exponent"]
    base = estimator.proxy.base
    # Simulations of later rounds may have lowered it. Older files do not hold it.
    base.floor = content.get("floor", base.floor)
    estimator.to(inference._device).eval()
    inference._neural_net = estimator
    kind, own_kind = content["kind_of_weights"], type(inference._weights).__name__
    if kind != own_kind:
        raise ValueError(
            f"The file was saved with {kind}, but this JeffreysNPE has {own_kind}. "
            "Make it with the same weights as then."
        )
    inference._weights.load_state_dict(content["weights"])
    inference._posterior = None  # type: ignore[assignment]

    state = content["training"]
    inference._last_epoch = state
    # A later round does not try all candidates of the flow again.
    inference._is_new = state is not None and state["is_new"]
    if state is not None:
        _restore_best(inference, state)
        # Its learning rate, as all its state, comes with the resumed training.
        inference.optimizer = Adam(list(estimator.parameters()))


def _check_settings(own: Dict[str, Any], stored: Dict[str, Any]) -> None:
    """Raise unless a training would go on here as it began."""
    for name, value in stored.items():
        if own[name] != value:
            raise ValueError(
                f"The training of the file has {name}={value!r}, but this JeffreysNPE "
                f"has {own[name]!r}. Make it with the same preset and objective as "
                "then."
            )


def _take_simulations(inference: "JeffreysNPE", stored: Dict[str, Any]) -> None:
    for name, own in (
        ("theta", inference._theta_roundwise),
        ("x", inference._x_roundwise),
    ):
        same = len(own) == len(stored[name]) and all(
            _same(a.cpu(), b) for a, b in zip(own, stored[name], strict=True)
        )
        if own and not same:
            raise ValueError(
                f"The simulations appended here differ in {name} from those of the "
                "file, which holds its own. Load into a new JeffreysNPE without "
                "simulations, and append more afterwards."
            )
    if not inference._theta_roundwise:
        device = "cpu" if stored["on_cpu"] else inference._device
        inference._theta_roundwise = _to(device, stored["theta"])
        inference._x_roundwise = _to(device, stored["x"])
        inference._prior_masks = _to(device, stored["prior_masks"])
        inference._data_round_index = list(stored["round_index"])
        # Proposals are code. Training does not need them: the atomic losses hold for
        # any proposal, and whether there was one is told by the round.
        inference._proposal_roundwise = [None] * len(stored["theta"])
    inference.train_indices = stored["train_indices"]
    inference.val_indices = stored["val_indices"]


def _same(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are equal, where NaN, a missing value, equals NaN."""
    if first.shape != second.shape:
        return False
    return bool(((first == second) | (first.isnan() & second.isnan())).all())


def _x_built_with(inference: "JeffreysNPE", built_with: Dict[str, Any]) -> Tensor:
    """Return the simulation outputs that the networks were built with."""
    num = built_with["num_parts"]
    x = get_simulations_since_round(
        inference._x_roundwise[:num],
        inference._data_round_index[:num],
        built_with["starting_round"],
    )
    return x[built_with["indices"]]


def _x_like_that_built_with(built_with: Dict[str, Any]) -> Tensor:
    """Return outputs of which the builders make the same networks.

    They need the shape, how many values outputs have that have few, and which outputs
    say something of the parameters; all else is in the state of the networks.
    """
    theta, outputs = built_with["theta"], built_with["outputs"]
    num_values = built_with["x_num_values"]
    kept = range(len(num_values)) if outputs is None else outputs.tolist()
    # Ranks of a parameter, which no screening takes for noise.
    rank = theta[:, 0].argsort().argsort()
    x = torch.zeros(len(theta), len(num_values))
    for column in kept:
        num = num_values[column]
        if num == 0:
            x[:, column] = torch.nan
        elif num < MIN_DISTINCT:
            x[:, column] = (rank * num // len(rank)).float()
        else:
            x[:, column] = rank.float()
    return x.reshape(-1, *built_with["x_shape"])


def log_prior(prior: Distribution, theta: Tensor) -> Tensor:
    """Return the prior's log density, up to the constant of a `RestrictedPrior`.

    Args:
        prior: The prior.
        theta: Parameters of shape `(batch_dim, *input_shape)` on its device.

    Returns:
        Of shape `(batch_dim,)`, minus infinity outside the support.
    """
    inside = is_inside(prior, theta)
    while isinstance(prior, RestrictedPrior):  # it would estimate its constant
        prior = prior._prior
    log_prob = torch.full((len(theta),), -torch.inf, device=theta.device)
    if inside.any():
        values = prior.log_prob(theta[inside]).detach().to(log_prob)
        # One for every parameter, where sbi takes a batch of priors for one over all.
        log_prob[inside] = values.reshape(len(values), -1).sum(1)
    return log_prob


def _sign_of_prior(inference: "JeffreysNPE", theta: Tensor) -> List[float]:
    """Return the prior's log density at a few parameters, to know it again."""
    prior = inference._prior
    if prior is None or isinstance(prior, ImproperEmpirical):
        return []
    theta = theta[:NUM_PRIOR_CHECKS].to(inference._device)
    return log_prior(prior, theta).tolist()


def _check_same_prior(
    inference: "JeffreysNPE", theta: Tensor, expected: List[float]
) -> None:
    prior = inference._prior
    if isinstance(prior, ImproperEmpirical) != (not expected):
        had, has = ("a", "none") if expected else ("no", "one")
        raise ValueError(
            f"The networks of the file were trained with {had} prior, but this "
            f"JeffreysNPE has {has}. Make it with the same prior as then."
        )
    if not expected:
        return
    shape = event_shape(prior)  # type: ignore[arg-type]
    if shape != theta.shape[1:]:
        raise ValueError(
            f"The networks of the file are of {theta.shape[1]} parameters, but the "
            f"prior given here is over {shape.numel()}."
        )
    own = _sign_of_prior(inference, theta)
    if not np.allclose(own, expected, rtol=1e-3, atol=1e-3):
        raise ValueError(
            "The prior given here is not the one that the networks of the file were "
            "trained with: its log density at their parameters is another. Make "
            "JeffreysNPE with the same prior; another prior for the posterior alone "
            "goes into build_posterior(prior=...)."
        )


def _check_fits(name: str, own: Dict[str, Any], stored: Dict[str, Any]) -> None:
    """Raise unless a network of the file fits into that of the builder."""
    differences = [
        f"{key} is {_shape(stored, key)} in the file and {_shape(own, key)} here"
        for key in sorted({*own, *stored})
        if _shape(own, key) != _shape(stored, key)
    ]
    if differences:
        raise ValueError(
            f"The {name} of the file does not fit into that of the builder given "
            f"here: {differences[0]} ({len(differences)} differences). Make "
            "JeffreysNPE with the same density_estimator and energy_estimator as when "
            "the file was saved."
        )


def _shape(state: Dict[str, Any], key: str) -> str:
    if key not in state:
        return "absent"
    value = state[key]
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "none"


def _to(device: Union[str, torch.device], value: Any) -> Any:
    """Move the tensors in containers to a device."""
    if isinstance(value, dict):
        return {key: _to(device, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to(device, item) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value
