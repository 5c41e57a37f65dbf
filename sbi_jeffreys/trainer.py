"""`JeffreysNPE`: neural posterior estimation under the adaptive Jeffreys objective."""

import math
import traceback
import warnings
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import (
    Any,
    Callable,
    Dict,
    List,
    Literal,
    Optional,
    Sequence,
    Tuple,
    Union,
    get_args,
)

import numpy as np
import torch
from sbi.inference import NPE
from sbi.inference.posteriors.base_posterior import NeuralPosterior
from sbi.inference.trainers._contracts import LossArgs, LossArgsNPE, TrainConfig
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from sbi.neural_nets.estimators.base import ConditionalEstimatorBuilder
from sbi.sbi_types import Tracker
from sbi.utils.sbiutils import get_simulations_since_round
from sbi.utils.torchutils import assert_all_finite
from torch import Tensor
from torch.distributions import Distribution
from torch.nn import Module, Parameter
from torch.nn.utils.clip_grad import clip_grad_norm_
from torch.utils.data import BatchSampler, DataLoader, TensorDataset
from torch.utils.tensorboard.writer import SummaryWriter

from sbi_jeffreys.atomic import AtomicLosses, atomic_proxy_loss, check_batch
from sbi_jeffreys.autoregressive import invert_in_one_pass
from sbi_jeffreys.averaging import WeightAverage
from sbi_jeffreys.base_scale import fit_scale, give_scale, scaled_bases
from sbi_jeffreys.best import Best
from sbi_jeffreys.candidates import FlowCandidates, build_candidates
from sbi_jeffreys.checks import (
    check_columns,
    check_prior,
    check_same_shape,
    check_simulations,
)
from sbi_jeffreys.coordinates import hold_out
from sbi_jeffreys.energy import ConditionalEnergy
from sbi_jeffreys.energy_builder import EnergyBuilder, energy_nn
from sbi_jeffreys.epoch_metrics import (
    DUAL_METRICS,
    EPOCH_METRICS,
    TRAINING_METRICS,
    VALIDATION_METRICS,
    is_missing,
)
from sbi_jeffreys.estimator import JeffreysEstimator
from sbi_jeffreys.flow import check_has_rsample
from sbi_jeffreys.losses import REVERSE_INTERVAL, VALIDATION_CHUNK, Batch, Losses
from sbi_jeffreys.objective import (
    Divergences,
    JeffreysObjective,
)
from sbi_jeffreys.partition import log_mixture
from sbi_jeffreys.persistence import (
    PER_TRAINING,
    Checkpoint,
    PathLike,
    all_finite,
    capture,
    copy_of_state,
    from_content,
    keeping_random_state,
    random_state,
    read,
    record_built_with,
    restore,
    restore_samples,
    set_random_state,
    to_content,
    write,
)
from sbi_jeffreys.pooled_energy import PooledEnergy, choose_weights
from sbi_jeffreys.posterior import RefinedPosterior
from sbi_jeffreys.refinement import as_atoms, choose_exponent
from sbi_jeffreys.residual_flow import ResidualFlow, build_residual_flow
from sbi_jeffreys.sample_sets import VALIDATION_MULTIPLE, Part, SampleSets
from sbi_jeffreys.screening import outputs_taken
from sbi_jeffreys.spline import evaluate_one_bin
from sbi_jeffreys.stages import Stage
from sbi_jeffreys.tracking import NoTracker
from sbi_jeffreys.weights import (
    AdaptiveWeights,
    FixedWeights,
    ValidationDivergences,
    Weights,
)

# Simulations on which the proxy is validated.
NUM_VALIDATION_SIMULATIONS = 500
# Epochs in which the surrogates learn: they would go on to improve, ever more slowly.
# With many simulations so many steps are enough, but not fewer epochs than the last.
MAX_LIKELIHOOD_EPOCHS = 400
MAX_LIKELIHOOD_STEPS = 10_000
MIN_EPOCHS = 50
# Steps in which the flow learns from a proxy with surrogates of the likelihood, but not
# fewer than `MIN_EPOCHS`: it, too, would go on.
MAX_POOLED_STEPS = 800
# Steps without improvement after which a stage that sbi has not, or a candidate of the
# flow, ends before `stop_after_epochs`; and epochs that it has in any case. Epochs of
# many simulations have many steps, and are told apart by many simulations.
PATIENCE_STEPS = 400
MIN_PATIENCE = 5
# Steps of an epoch of a thousand simulations. Of fewer, epochs have a step or two and
# are told apart by a few tens of simulations: the patience of stages that sbi has not
# is then that many times longer.
STEPS_OF_EPOCH = 4
Preset = Literal["accurate", "fast"]
NUM_FAST_SAMPLES = 8
# Density estimators of sbi's without differentiable samples, refused when built.
MIXTURES = ("mdn", "made")
# Large, as weights are averaged.
LEARNING_RATE = 2e-3
# Epochs over which weights are averaged, in steps of the optimiser. Longer averages lag
# behind and are stopped before they have caught up.
NUM_AVERAGED_EPOCHS = 5
# Of a flow that learns from a proxy with surrogates of the likelihood: samples of the
# proxy are more than simulations, and their steps go on for long.
NUM_POOLED_AVERAGED_STEPS = 100
# Share of the flow's samples outside the prior above which another flow follows the
# proxy, and the name under which `_best` holds that one.
MAX_LEAKAGE = 0.2
LAST_CANDIDATE = "last candidate"
# `_best` holds surrogates of the likelihood under this name and their index.
LIKELIHOOD_PREFIX = "likelihood "
# Times in a row that an epoch is tried again after it turned NaN or infinite.
MAX_RETRIES = 3


class NonFiniteError(ValueError):
    """Training turned NaN or infinite."""


# What arithmetic and linear algebra raise, whoever calls them.
ARITHMETIC_ERRORS = (
    ArithmeticError,
    NonFiniteError,
    np.linalg.LinAlgError,
    torch.linalg.LinAlgError,  # type: ignore[attr-defined]
)
# What flows and distributions raise, too, when numbers turn NaN, as does much else.
NUMERICAL_ERRORS = (*ARITHMETIC_ERRORS, AssertionError, ValueError)
# Packages of which these errors tell of numbers. Not all of sbi, nor this one: what
# they raise elsewhere is of settings.
NUMERICAL_PACKAGES = (
    "nflows",
    "pyknos",
    "sbi.utils.torchutils",
    "torch.distributions",
    "zuko",
)


class JeffreysNPE(NPE):
    r"""Neural posterior estimation under the adaptive constrained Jeffreys objective.

    A drop-in for `sbi.inference.NPE`. Beside the conditional flow $p(\theta \mid x)$
    an energy-based proxy $q(\theta \mid x)$ of the truth is trained on the same
    simulations:

    .. math:: \min_{p, q} \lambda_1 \mathrm{KL}(\pi \Vert p) +
        \lambda_2 \mathrm{KL}(p \Vert q) + \lambda_3 \mathrm{KL}(\pi \Vert q)

    with weights $\lambda$ set by dual ascent as training goes [1]. See
    `sbi_jeffreys.objective` and `sbi_jeffreys.weights`.

    [1] O. Ben-Dov and L. F. O. Chamon, "Adaptive Symmetrization of the KL Divergence",
    arXiv:2511.11159.

    Example:
    --------

    ::

        from sbi_jeffreys import JeffreysNPE

        inference = JeffreysNPE(prior)
        inference.append_simulations(theta, x).train()
        posterior = inference.build_posterior()
        samples = posterior.sample((10_000,), x=x_o)
    """

    _average: WeightAverage
    _parameters: Dict[Module, List[Parameter]]
    _losses: Losses
    _cut_short: List[Stage]

    def __init__(
        self,
        prior: Optional[Distribution] = None,
        density_estimator: Union[
            Literal["auto", "nsf", "maf", "mdn", "made"],
            ConditionalEstimatorBuilder[ConditionalDensityEstimator],
        ] = "auto",
        device: str = "cpu",
        logging_level: Union[int, str] = "WARNING",
        summary_writer: Optional[SummaryWriter] = None,
        tracker: Optional[Tracker] = None,
        show_progress_bars: bool = True,
        *,
        energy_estimator: Optional[EnergyBuilder] = None,
        weights: Union[Literal["adaptive", "fixed"], Weights] = "adaptive",
        objective: Optional[JeffreysObjective] = None,
        preset: Preset = "accurate",
    ):
        r"""Initialize JeffreysNPE.

        Args:
            prior: As in `sbi.inference.NPE`. Without one the proxy takes the Lebesgue
                measure as its base measure.
            density_estimator: As in `sbi.inference.NPE`: the flow. It must have
                samples with gradients, which mixtures ("mdn", "made") have not. With
                `"auto"` several are trained, and the best on validation simulations
                is kept, see `sbi_jeffreys.candidates`.
            device: As in `sbi.inference.NPE`, but for Apple's GPUs ("mps"), which have
                no double precision.
            logging_level: As in `sbi.inference.NPE`.
            summary_writer: As in `sbi.inference.NPE`.
            tracker: As in `sbi.inference.NPE`.
            show_progress_bars: As in `sbi.inference.NPE`.
            energy_estimator: Builder of the proxy, `energy_nn()` if not given.
            weights: `"adaptive"` for dual variables that follow the training,
                `"fixed"` for the penalty form with unit weights, or `Weights` of your
                own making, as `AdaptiveWeights(QuadraticRelaxation(alpha=2.0))`.
            objective: Numbers of samples behind the divergences, `JeffreysObjective()`
                if not given.
            preset: `"fast"` trains one flow, not several, and a proxy with half the
                samples, and leaves the last stage out, in which the flow learns from
                the proxy. What the proxy has learnt is in the refined posterior.
                `density_estimator` and `objective` go before it where given.

        Raises:
            ValueError: If `weights` or `preset` is an unknown name, or `device` has no
                double precision.
            TypeError: If `weights` is neither a name nor `Weights`, `objective` no
                `JeffreysObjective`, or `energy_estimator` no builder.
        """
        if preset not in get_args(Preset):
            raise ValueError(f'preset must be "accurate" or "fast", got {preset!r}.')
        _check_device(device)  # before sbi, which sets torch up for it
        self.preset = preset
        if density_estimator == "auto" and preset == "fast":
            density_estimator = "maf"
        if objective is None:
            objective = JeffreysObjective()
            if preset == "fast":
                objective = JeffreysObjective(NUM_FAST_SAMPLES, NUM_FAST_SAMPLES)
        chooses_flow = density_estimator == "auto"
        super().__init__(
            prior=prior,
            density_estimator="maf" if chooses_flow else density_estimator,  # type: ignore[arg-type]
            device=device,
            logging_level=logging_level,
            summary_writer=summary_writer,
            tracker=tracker,
            show_progress_bars=show_progress_bars,
        )
        self._build_flow = self._build_neural_net
        if chooses_flow:
            self._build_flow = self._build_candidates
        elif isinstance(density_estimator, str) and density_estimator not in MIXTURES:
            self._build_flow = partial(self._build_named_flow, density_estimator)
        self._build_proxy = (
            energy_nn() if energy_estimator is None else energy_estimator
        )
        self._build_neural_net = self._build_estimator
        self._initial_weights = _as_weights(weights)
        self.objective = objective
        if self._build_proxy is energy_nn:
            raise TypeError(
                "energy_estimator must be what energy_nn() returns, not energy_nn "
                "itself."
            )
        if not callable(self._build_proxy):
            raise TypeError(
                "energy_estimator must be a builder such as energy_nn(...) returns, "
                f"got {type(energy_estimator).__name__}."
            )
        if not isinstance(self.objective, JeffreysObjective):
            raise TypeError(
                "objective must be a JeffreysObjective, got "
                f"{type(objective).__name__}."
            )
        self._summary.update({name: [] for name in (*EPOCH_METRICS, "stage")})
        self._weights = deepcopy(self._initial_weights)
        self._samples = SampleSets(objective, self._device)
        self._epoch_metrics: Dict[str, float] = {}
        self._num_skipped_steps = 0
        self._is_new = True
        self._stage = Stage.FLOW
        self._stage_start = 0
        # First epoch of the flow's active candidate, and its lowest validation loss
        # with the epoch.
        self._candidate_start = 0
        self._best_of_candidate = (math.inf, 0)
        # Share of KL(q || p) by which flows are chosen while they learn from the proxy.
        self._proxy_share = 0.0
        self._best: Dict[str, Best] = {}
        # The training as it was after its last complete epoch.
        self._last_epoch: Optional[Dict[str, Any]] = None
        self._num_retries = 0
        self._finished = True  # no training is under way
        self._starting_round = 0
        self._built_with: Dict[str, Any] = {}
        self._checkpoint: Optional[Checkpoint] = None

    @property
    def weights(self) -> Weights:
        """The weights of the three divergences as they stand."""
        return self._weights

    def append_simulations(
        self,
        theta: Tensor,
        x: Tensor,
        proposal: Optional[Any] = None,
        exclude_invalid_x: Optional[bool] = None,
        data_device: Optional[str] = None,
    ) -> "JeffreysNPE":
        """Store simulations for training, see `sbi.inference.NPE.append_simulations`.

        They may come in parts, such as replicates of one parameter set: whether a
        column of `theta` is constant or discrete is judged by `train`.

        Raises:
            ValueError: If parameters are not finite, have another dimension than the
                prior, or are not as many as simulations, or if outputs have another
                shape than those appended before.
        """
        check_simulations(theta, x)
        if isinstance(theta, Tensor) and isinstance(x, Tensor):
            # Else each step would go back through the user's simulator, too.
            theta, x = theta.detach(), x.detach()
        if self._x_roundwise and isinstance(x, Tensor):
            check_same_shape(x, self._x_roundwise[0])
        if proposal is None:
            check_prior(self._prior, theta, self._device)
        parts = (
            self._data_round_index,
            self._prior_masks,
            self._theta_roundwise,
            self._x_roundwise,
            self._proposal_roundwise,
        )
        num_parts = len(self._data_round_index)
        try:
            return super().append_simulations(
                theta, x, proposal, exclude_invalid_x, data_device
            )
        except BaseException:
            for part in parts:  # appended all or not at all
                del part[num_parts:]
            raise

    def train(  # type: ignore[override]
        self,
        num_atoms: int = 10,
        training_batch_size: int = 200,
        learning_rate: float = LEARNING_RATE,
        *args: Any,
        checkpoint: Optional[PathLike] = None,
        **kwargs: Any,
    ) -> ConditionalDensityEstimator:
        """Train flow and proxy, see `sbi.inference.NPE.train`.

        Ctrl-C ends the training with the best networks so far. An epoch that turns
        NaN or infinite is tried again from the last complete one, with half the
        learning rate; when that does not help, training ends with the best networks.
        Errors that have nothing to do with numbers, such as those of an embedding
        network of your own, are raised as they are, with the best networks kept.

        With `resume_training=True` training goes on from the last complete epoch as if
        it had not ended there: with the networks, the optimizer, the dual variables
        and the random numbers of then. The caller's random numbers are left as they
        are.

        Args:
            num_atoms: As in `sbi.inference.NPE.train`.
            training_batch_size: As in `sbi.inference.NPE.train`.
            learning_rate: As in `sbi.inference.NPE.train`, but for its default, which
                is four times sbi's: averages of the weights take off the noise of
                large steps, and what these find is better, and found sooner.
            *args: As in `sbi.inference.NPE.train`.
            checkpoint: File to save the training to as it goes on, as `save` does.
                A process that is killed loses the last epoch, or 5 % of its time. To
                go on: `load(checkpoint)`, then `train(resume_training=True)`.
            **kwargs: As in `sbi.inference.NPE.train`.

        Returns:
            The `JeffreysEstimator`: the best flow and the best proxy.

        Raises:
            OSError: If the checkpoint cannot be written when training starts. Later
                it is warned of.
            ValueError: If there is no training to resume, if it is to be resumed from
                scratch or with other simulations, if networks are to be built by an
                object that was unpickled or copied, if a column of `theta` is
                constant, discrete or too coarse for single precision over all
                simulations of this training, or if the validation loss was never
                finite. After an error of `theta` more simulations can be appended.
        """
        before = dict(vars(self))
        networks = None if self._neural_net is None else copy_of_state(self._neural_net)
        weights = self._weights.state_dict()
        lengths = {name: len(values) for name, values in self._summary.items()}
        self._checkpoint = None if checkpoint is None else Checkpoint(checkpoint)
        try:
            return super().train(
                num_atoms, training_batch_size, learning_rate, *args, **kwargs
            )
        except BaseException:
            last_epoch = self._last_epoch
            if last_epoch is None or last_epoch is before["_last_epoch"]:
                # No epoch is worth keeping: not even the split is to be another.
                vars(self).clear()
                vars(self).update(before)
                if networks is not None:
                    self._neural_net.load_state_dict(networks)  # type: ignore[union-attr]
                    self._neural_net.eval()  # type: ignore[union-attr]
                self._weights.load_state_dict(weights)
                for name, length in lengths.items():
                    del self._summary[name][length:]
            raise
        finally:
            self._checkpoint = None

    def save(self, path: PathLike, simulations: bool = True) -> None:
        """Save what was trained, to `load` it in another process.

        The file holds the networks, the summary and, unless left out, the simulations
        and all that `train(resume_training=True)` needs. It holds no code: neither
        prior nor builders, which `load` takes from the object that it is called on.
        It is written whole or not at all.

        Args:
            path: Path of the file.
            simulations: Whether to save simulations and training, too. Without them
                the file is small, and good for `build_posterior` only.

        Raises:
            ValueError: If nothing was trained yet, or if the simulations are not here.
            OSError: If the file cannot be written. One of before is then as it was.
        """
        if self._neural_net is None:
            raise ValueError("There is no trained network yet: call .train() first.")
        if simulations and not self._theta_roundwise:
            raise ValueError(
                "The simulations are not here: this JeffreysNPE was loaded from a file "
                "without them. Use save(path, simulations=False)."
            )
        write(path, to_content(self, simulations))

    def load(self, path: PathLike) -> "JeffreysNPE":
        """Load what `save`, or `train(checkpoint=...)`, has saved.

        ::

            inference = JeffreysNPE(prior, density_estimator="nsf")  # as then
            inference.load("training.pt")
            inference.train(resume_training=True)  # if it had not ended
            posterior = inference.build_posterior()

        Args:
            path: Path of the file. No code in it is run.

        Returns:
            The object itself, now with the networks, the summary and the simulations
            of the file. If simulations were appended to it before, they must be those
            of the file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, of another kind or of another format
                version, or if prior, simulations, networks, weights or, with a
                training to go on with, preset and numbers of samples are others than
                those that it was saved with. The object is then as it was.
        """
        content = read(path)
        if self._build_flow is None:
            raise ValueError(
                "An unpickled JeffreysNPE has lost its builders, which load needs. "
                "Make a new one: JeffreysNPE(prior, ...).load(path)."
            )
        from_content(self, content)
        if self._last_epoch is not None and not self._finished:
            # A training that had not ended. What its end would have done, if it had
            # sbi's defaults: of a calibration kernel, which is code, nothing is known.
            self._restore_best()
            self._losses = self._make_losses(LossArgsNPE(calibration_kernel=_ones))
            self._fit_scale_of_flow()
            with keeping_random_state(self._device):
                stage, proxy = Stage(self._last_epoch["stage"]), self._estimator.proxy
                if stage is Stage.PROXY and isinstance(proxy, PooledEnergy):
                    restore_samples(self, self._last_epoch)
                    self._choose_weights(proxy)
                self._estimator.exponent = self._choose_exponent()
        return self

    def get_dataloaders(
        self,
        starting_round: int = 0,
        training_batch_size: int = 200,
        validation_fraction: float = 0.1,
        resume_training: bool = False,
        dataloader_kwargs: Optional[dict] = None,
    ) -> Tuple[DataLoader, DataLoader]:
        """Return dataloaders for training and validation.

        The split is that of sbi, for the same random seed. Batches carry the indices
        of their simulations. Unless `dataloader_kwargs` are given, they are cut from
        the tensors in one piece, which sbi's row-wise loader does not. Of batches by
        keywords that choose or put together simulations (`sampler`, `batch_sampler`,
        `collate_fn`) it is not known which simulations they hold: samples of flow and
        proxy are then drawn anew in every step, which takes many times as long.

        See `sbi.inference.NPE.get_dataloaders` for the arguments.

        Raises:
            ValueError: If training or validation would be left without simulations or
                without a batch of them, if a training is to be resumed with other
                simulations than before, or if columns of `theta` are such as `train`
                refuses.
        """
        if resume_training and self._last_epoch is None:
            raise ValueError(
                "There is no training to resume: no epoch was completed, or the "
                "simulations were left out when it was saved. Call .train() first."
            )
        if resume_training and starting_round != self._starting_round:
            raise ValueError(
                f"This training began with the simulations of round "
                f"{self._starting_round} on, and is to be resumed with those of round "
                f"{starting_round} on. Give the same discard_prior_samples as then."
            )
        num = sum(
            len(theta)
            for theta, round_ in zip(
                self._theta_roundwise, self._data_round_index, strict=True
            )
            if round_ >= starting_round
        )
        if resume_training:
            num_new = num - len(self.train_indices) - len(self.val_indices)
            if num_new > 0:
                raise ValueError(
                    f"{num_new} simulations were appended since this training began, "
                    "which cannot be resumed with them. Leave resume_training out to "
                    "train with all simulations; give force_first_round_loss=True if "
                    "all are of the prior."
                )
            # The split is that of then, of which sbi makes batches by the fraction; the
            # half keeps off what rounding could do to a whole number.
            validation_fraction = (len(self.val_indices) - 0.5) / num
        if not 2 <= int((1 - validation_fraction) * num) < num:
            raise ValueError(
                f"{num} valid simulations with validation_fraction="
                f"{validation_fraction} leave fewer than two for training or none for "
                "validation. At least 3 are needed; a useful fit needs hundreds."
            )
        # Before sbi splits anew: an error must leave the last training as it was. One
        # that is resumed was judged when it began.
        if not resume_training:
            theta = get_simulations_since_round(
                self._theta_roundwise, self._data_round_index, starting_round
            )
            check_columns(theta)
        loaders = super().get_dataloaders(
            starting_round,
            training_batch_size,
            validation_fraction,
            resume_training,
            dataloader_kwargs,
        )
        keywords = dataloader_kwargs or {}
        if not keywords.keys().isdisjoint(("sampler", "batch_sampler", "collate_fn")):
            return _with_batches(loaders)
        tensors = loaders[0].dataset.tensors  # type: ignore[attr-defined]
        dataset = TensorDataset(*tensors, torch.arange(len(tensors[0])))
        # sbi's loaders leave out what does not fill a batch. Of the few simulations
        # for validation that is a waste; but later rounds' loss needs full batches.
        drop_last = (True, self._round > 0)
        # Where among those for training, or for validation, a simulation is.
        self._position = torch.zeros(len(dataset), dtype=torch.long)
        for indices in (self.train_indices, self.val_indices):
            self._position[indices] = torch.arange(len(indices))

        def load(loader: DataLoader, drop: bool) -> DataLoader:
            own: Dict[str, Any] = {
                "sampler": loader.sampler,
                "batch_size": loader.batch_size,
                "drop_last": drop,
            }
            if dataloader_kwargs is None:  # in one piece
                batches = BatchSampler(loader.sampler, loader.batch_size or 1, drop)
                own = {"sampler": batches, "batch_size": None}
            return DataLoader(dataset, **{**own, **keywords})

        train, val = map(load, loaders, drop_last)
        return _with_batches((train, val))

    def build_posterior(  # type: ignore[override]
        self,
        density_estimator: Optional[ConditionalDensityEstimator] = None,
        prior: Optional[Distribution] = None,
        sample_with: Literal[
            "mcmc", "rejection", "vi", "importance", "direct", "refined"
        ] = "direct",
        *args: Any,
        refined_sampling_parameters: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
    ) -> NeuralPosterior:
        r"""Build the posterior, see `sbi.inference.NPE.build_posterior`.

        Args:
            density_estimator: As in `sbi.inference.NPE.build_posterior`.
            prior: As in `sbi.inference.NPE.build_posterior`.
            sample_with: As in `sbi.inference.NPE.build_posterior`, where all methods
                take the flow as the posterior's density; or `"refined"` for the
                flow's samples reweighted by the proxy, a `RefinedPosterior`.
            *args: As in `sbi.inference.NPE.build_posterior`.
            refined_sampling_parameters: Keywords of `RefinedPosterior`.
            **kwargs: As in `sbi.inference.NPE.build_posterior`.

        Returns:
            The posterior.

        Raises:
            TypeError: If there are keywords for another way to sample.
            ValueError: If nothing was trained yet, and no estimator is given.
        """
        if density_estimator is None and self._neural_net is None:
            raise ValueError("There is no trained network yet: call .train() first.")
        if sample_with != "refined":
            if refined_sampling_parameters:
                raise TypeError(
                    f"sample_with={sample_with!r} takes no refined_sampling_parameters."
                    " They are for sample_with='refined'."
                )
            return super().build_posterior(
                density_estimator, prior, sample_with, *args, **kwargs
            )
        if args or kwargs:
            unused = [*map(repr, args), *kwargs]
            raise TypeError(
                f"sample_with='refined' takes no {', '.join(unused)}. Its keywords go "
                "into refined_sampling_parameters={...}."
            )
        prior = self._resolve_prior(prior, "direct")
        estimator, device = self._resolve_estimator(density_estimator)
        self._posterior = RefinedPosterior(
            deepcopy(estimator),  # type: ignore[arg-type]
            prior,
            device=device,
            **(refined_sampling_parameters or {}),
        )
        return self._posterior

    def _build_candidates(self, theta: Tensor, x: Tensor):
        return build_candidates(theta, x, self._prior)

    def _build_named_flow(self, model: str, theta: Tensor, x: Tensor) -> ResidualFlow:
        return build_residual_flow(model, theta, x, self._prior)

    def _build_estimator(self, theta: Tensor, x: Tensor) -> JeffreysEstimator:
        flow = self._build_flow(theta, x)
        invert_in_one_pass(flow)
        evaluate_one_bin(flow)
        give_scale(flow)
        finite = x.flatten(1).isfinite().all(1)
        if finite.any():
            check_has_rsample(flow, x[finite][:3])
        proxy = self._build_proxy(theta, x, self._prior)
        if not isinstance(proxy, ConditionalEnergy):
            raise TypeError(
                "The builder given as `energy_estimator` must return a "
                f"ConditionalEnergy, got {type(proxy).__name__}."
            )
        # New networks owe nothing to the weights of those before.
        self._weights = deepcopy(self._initial_weights)
        self._is_new = True
        return JeffreysEstimator(flow, proxy)

    def _initialize_neural_network(
        self, retrain_from_scratch: bool, start_idx: int
    ) -> None:
        before, random = self._neural_net, random_state(self._device)
        if self._build_flow is None and (before is None or retrain_from_scratch):
            raise ValueError(
                "An unpickled or copied JeffreysNPE has lost its builders, which new "
                "networks need. Make a new one and append the simulations: "
                "JeffreysNPE(prior, ...).append_simulations(theta, x)."
            )
        super()._initialize_neural_network(retrain_from_scratch, start_idx)
        self._starting_round = start_idx
        if self._neural_net is not before:
            self._built_with = record_built_with(self, start_idx, random)
            self._warn_of_screening()

    @property
    def _was_built_with_these(self) -> bool:
        """Whether the networks were built with the simulations of this training."""
        built_with = self._built_with
        return (
            built_with["num_parts"] == len(self._theta_roundwise)
            and built_with["starting_round"] == self._starting_round
            and torch.equal(built_with["indices"], self.train_indices)
        )

    def _warn_of_screening(self) -> None:
        """Say that the networks leave outputs out."""
        outputs = outputs_taken(self._estimator)
        if outputs is not None:
            num_outputs = self._estimator.flow.condition_shape.numel()
            warnings.warn(
                f"{num_outputs - len(outputs)} of {num_outputs} simulation outputs say "
                "nothing of the parameters, as far as these simulations tell, and are "
                f"left out. Kept are {outputs.tolist()}. Networks of your own take all "
                "outputs: density_estimator=posterior_nn(...), and "
                "energy_estimator=energy_nn(embedding_net=FCEmbedding(...)).",
                stacklevel=6,
            )

    def _run_training_loop(
        self,
        train_loader: DataLoader,
        val_loader: DataLoader,
        train_config: TrainConfig,
        loss_args: Optional[LossArgs] = None,
        summarization_kwargs: Optional[Dict[str, Any]] = None,
    ) -> ConditionalDensityEstimator:
        resumed, random = train_config.resume_training, random_state(self._device)
        if resumed and train_config.retrain_from_scratch:
            raise ValueError(
                "resume_training goes on with the networks of then, which "
                "retrain_from_scratch would leave behind: give one of them."
            )
        self._finished = False
        self._num_retries = 0
        self._num_batches = len(train_loader)
        self._stop_after_epochs = train_config.stop_after_epochs
        self._validation_loader = val_loader
        self._estimator.to(self._device)  # sbi does so later; averages stay where made
        self._average = WeightAverage(self._estimator, self._num_averaged_steps)
        # To look for them among the modules takes longer than many a step's work.
        models = self._estimator.models
        self._parameters = {model: [*model.parameters()] for model in models}
        # sbi restores this state at the end of training; `_restore_best` then loads
        # each model's own.
        self._best_model_state_dict = self._estimator.state_dict()
        self._cut_short = []
        if resumed:
            assert self._last_epoch is not None  # get_dataloaders has seen to it
            restore(self, self._last_epoch)
            set_random_state(self._last_epoch["random_state"], self._device)
        else:
            self._best = {}
            self._samples = SampleSets(self.objective, self._device)
            self._stage, self._stage_start = Stage.FLOW, 0
            self._average.restart(self._num_averaged_steps)
            self._candidate_start, self._best_of_candidate = 0, (math.inf, -1)
            self._max_num_epochs = train_config.max_num_epochs
            self._num_skipped_steps = 0
            self._last_epoch = None
            self._weights.start_round()
            if not self._was_built_with_these:
                self._estimator.proxy.base.reach(
                    self.get_simulations(self._starting_round)[0]
                )
        assert isinstance(loss_args, LossArgsNPE)
        self._losses = self._make_losses(loss_args)
        hold_out(self._estimator, self._was_built_with_these)
        num_epochs = len(self._summary["validation_loss"])
        num_trainings = len(self._summary["epochs_trained"])
        while True:
            try:
                super()._run_training_loop(
                    train_loader,
                    val_loader,
                    train_config,
                    loss_args,
                    summarization_kwargs,
                )
                break
            except BaseException as error:
                for name in PER_TRAINING:
                    del self._summary[name][num_trainings:]
                reason = self._why_to_stop(error)
            if reason is not None:
                self._finish_early(reason, num_epochs)
                break
            train_config = replace(train_config, resume_training=True)
        if self._cut_short:
            stages = dict.fromkeys(stage.value for stage in self._cut_short)
            warnings.warn(
                "Maximum number of epochs: all stages share `max_num_epochs="
                f"{self._max_num_epochs}`, and models still improved when it ended "
                f"these: {', '.join(stages)}. Give more epochs, or none to let "
                "every stage end by itself: train(retrain_from_scratch=True, "
                "force_first_round_loss=True). A training that is resumed goes on in "
                "its last stage alone.",
                stacklevel=5,
            )
        if self._num_skipped_steps:
            warnings.warn(
                f"{self._num_skipped_steps} training steps had gradients that were not "
                "finite and were left out. Many of them ask for a lower learning_rate, "
                "or for outliers to be looked at.",
                stacklevel=5,
            )
        try:
            self._end_training(num_epochs)
        except KeyboardInterrupt:
            warnings.warn(
                "Training was interrupted at its very end: the networks may not be the "
                "best of it, and the refined posterior may be the flow's. "
                "`train(resume_training=True)` ends it.",
                stacklevel=5,
            )
            raise
        self._finished = True
        if self._checkpoint is not None:
            self._checkpoint.write(self, last=True)
        if resumed:
            set_random_state(random, self._device)
        return self._estimator

    def _end_training(self, num_epochs_before: int) -> None:
        """Go back to the best networks, choose the exponent, and warn of what is bad.

        Raises:
            ValueError: If no network of the flow had a finite loss.
        """
        self._restore_best()
        if self._stage is Stage.PROXY:  # ended early
            self._judge_proxy_afresh()
        self._best_val_loss = self._best["flow"].loss
        if not math.isfinite(self._best_val_loss):
            self._last_epoch = None
            raise ValueError(
                "The validation loss of the flow was never finite, so that no network "
                "can be chosen. Look for NaN, infinite or extreme values in theta and "
                "x, and try a lower learning_rate."
            )
        self._warn_of_nan(num_epochs_before)
        self._estimator.exponent = self._choose_exponent()
        if "proxy" in self._best:
            self._warn_of_collapse()

    def _is_missing(self, name: str, epoch: int) -> bool:
        """Return whether an epoch was of a stage without this metric."""
        return is_missing(name, Stage(self._summary["stage"][epoch]))

    def _warn_of_nan(self, num_epochs_before: int) -> None:
        """Warn of epochs whose divergences were not finite."""
        epochs = {
            name: [
                epoch
                for epoch, value in enumerate(self._summary[name])
                if epoch >= num_epochs_before
                and not math.isfinite(value)
                and not self._is_missing(name, epoch)
            ]
            for name in EPOCH_METRICS
            if name != "trust"  # of fixed weights there is none
        }
        names = [name for name in epochs if epochs[name]]
        if names:
            num = len(set().union(*epochs.values()))
            warnings.warn(
                f"In {num} epochs {', '.join(names)} were NaN or infinite: densities "
                "of flow or proxy left single precision. Look for extreme values in "
                "theta and x, and try a lower learning_rate.",
                stacklevel=7,
            )

    def _why_to_stop(self, error: BaseException) -> Optional[str]:
        """Go back to the last complete epoch after an error.

        Returns:
            Why training ends there; `None` if it is to be tried again.

        Raises:
            BaseException: The error, if no epoch was complete, or if it has nothing to
                do with numbers. The networks are then what they were before the
                training, or the best of it.
        """
        numerical = isinstance(error, ARITHMETIC_ERRORS)
        if isinstance(error, (*NUMERICAL_ERRORS, RuntimeError)):
            numerical = numerical or not all_finite(self._estimator)
        if isinstance(error, NUMERICAL_ERRORS):
            numerical = numerical or _raised_in(error, NUMERICAL_PACKAGES)
        state = self._last_epoch
        if state is None or not math.isfinite(state["best"]["flow"][0]):
            self._last_epoch = None
            if not numerical or isinstance(error, NonFiniteError):
                raise error
            raise NonFiniteError(
                f"Training failed in its first epoch: {str(error) or repr(error)} Look "
                "for NaN, infinite or extreme values in theta and x, and try a lower "
                "learning_rate."
            ) from error
        failed, failed_stage = self._candidate, self._stage
        restore(self, state)
        self._losses.forget_standing()
        num_epochs = state["epoch"]
        if isinstance(error, KeyboardInterrupt):
            return f"Training was interrupted after {num_epochs} epochs."
        if not numerical:
            self._restore_best()
            raise error
        if failed is not None and failed != self._candidate:
            self._start_candidate(failed)  # in its first epoch
        if self._num_retries == MAX_RETRIES:
            what = (
                f"after {num_epochs} epochs: the next one turned NaN or infinite "
                f"{MAX_RETRIES + 1} times ({error!r})."
            )
            passed_over = f"Candidate {failed} of the flow is"
            if failed_stage is Stage.LIKELIHOOD:
                passed_over = "Surrogates of the likelihood are"
                self._stage = failed_stage  # they may not have had an epoch
            elif failed is None:
                return f"Training was stopped {what}"
            warnings.warn(f"{passed_over} passed over {what}", stacklevel=6)
            self._num_retries = 0
            if not self._start_next_candidate():
                if not self._weights.dual_variables[1:].any():  # no stage follows
                    return f"Training was stopped {what}"
                self._start_next_stage()
                self._last_epoch = capture(self, num_epochs)  # not to come back here
            return None
        # Other random numbers and smaller steps.
        self._num_retries += 1
        if self._num_retries > 1 and failed is None:
            self._restore_best()  # the last complete epoch was no good start
            self._average.restart(self._num_averaged_steps)
        for group in self.optimizer.param_groups:
            group["lr"] /= 2**self._num_retries
        start = "last" if self._num_retries == 1 or failed is not None else "best"
        warnings.warn(
            f"After {num_epochs} complete epochs training turned NaN or infinite "
            f"({error!r}). It goes on from the {start} of them, with a learning "
            f"rate of {self.optimizer.param_groups[0]['lr']:.3g}.",
            stacklevel=6,
        )
        return None

    def _make_losses(self, loss_args: LossArgsNPE) -> Losses:
        """Return the losses of a training, of the round that it is of."""

        def of_flow(theta: Tensor, x: Tensor, masks: Tensor) -> Tensor:
            check_batch(theta)  # sbi divides by zero
            return -self._log_prob_proposal_posterior(
                theta,
                x,
                masks,
                loss_args.proposal,  # type: ignore[arg-type]
            )

        atomic = None
        if self._round > 0 and not loss_args.force_first_round_loss:
            atomic = AtomicLosses(
                of_flow,
                lambda theta, x: atomic_proxy_loss(
                    self._estimator.proxy, self._prior, theta, x, self._num_atoms
                ),
            )
        assert loss_args.calibration_kernel is not None  # sbi sets one of ones
        return Losses(
            self._estimator,
            self.objective,
            self._samples,
            self._device,
            self._simulations_of,
            partial(_weights_of_simulations, loss_args.calibration_kernel),
            atomic,
            num_training=len(self.train_indices),
            # Atoms are told apart in whole batches.
            num_judged=None if self._round > 0 else NUM_VALIDATION_SIMULATIONS,
        )

    def _simulations_of(self, part: Part) -> Tuple[Tensor, Tensor]:
        """Return the parameters and outputs of the simulations of a part."""
        indices = self.train_indices if part == "training" else self.val_indices
        theta, x, _ = self.get_simulations(self._starting_round)
        return theta[indices], x[indices]

    def _batch(self, tensors: Sequence[Tensor], part: Part) -> Batch:
        """Return what a loader of `get_dataloaders` gives as a batch.

        Some with keywords of the user's do not say which simulations they give.
        """
        theta, x, masks = (tensor.to(self._device) for tensor in tensors[:3])
        position = self._position[tensors[3]] if len(tensors) > 3 else None
        return Batch(theta, x, masks, part, position)

    def _train_epoch(
        self,
        train_loader: DataLoader,
        clip_max_norm: Optional[float],
        loss_args: Optional[LossArgs],
    ) -> float:
        epoch_of_stage = self.epoch - self._stage_start
        self._samples.renew(
            self._stage,
            epoch_of_stage,
            self._losses.num_proxy_samples * len(self.train_indices),
        )
        for model in self._standing_still:
            model.eval()  # what is drawn and normalised in passing stands still, too
        for group in self.optimizer.param_groups:
            # sbi's Adam takes ten operations a parameter, the fused one takes one; but
            # that refuses the complex parameters of some embedding nets.
            if all(parameter.is_floating_point() for parameter in group["params"]):
                group["fused"] = True
        means = []
        first = epoch_of_stage * len(train_loader)
        for step, tensors in enumerate(train_loader, start=first):
            batch = self._batch(tensors, "training")
            divergences, of_models = self._divergences(
                batch, step % REVERSE_INTERVAL == 0
            )
            if divergences.forward_kl is not None:
                assert_all_finite(divergences.forward_kl, "JeffreysNPE loss")
            kernel = self._losses.kernel(batch.x)
            lagrangian = kernel * self._lagrangian(divergences) + of_models
            if self._step(lagrangian.mean(), clip_max_norm):
                self._average.update()
            else:  # one bad batch must not cost the network
                self._num_skipped_steps += 1
            means.append(_means(divergences, kernel))
        epoch_means = torch.tensor(means).mean(0).tolist()
        self._epoch_metrics.update(zip(TRAINING_METRICS, epoch_means, strict=True))
        return epoch_means[0]

    def _divergences(
        self, batch: Batch, with_reverse_kl: bool
    ) -> Tuple[Divergences, Union[Tensor, float]]:
        """Return the divergences that the models lower which learn in this stage.

        Args:
            batch: The simulations.
            with_reverse_kl: Whether a flow that follows the proxy takes its step of
                the reverse divergence.

        Returns:
            The divergences, and those of the models from each other that the flow
            lowers, weighted, also by the calibration kernel.
        """
        losses = self._losses
        if self._stage is Stage.DISTILLATION:
            return losses.of_following_flow(batch, self._flow_weight, with_reverse_kl)
        if self._stage is Stage.PROXY:
            return losses.of_proxy(batch), 0.0
        if self._stage is Stage.LIKELIHOOD:
            loss = losses.of_likelihoods(batch, self._improving_likelihoods)
            return Divergences(likelihood_loss=loss), 0.0
        return Divergences(losses.of_flow(batch)), 0.0

    @property
    def _improving_likelihoods(self) -> List[int]:
        """The surrogates that have improved lately, or are too new to tell."""
        likelihoods = self._estimator.likelihoods
        assert likelihoods is not None
        return [
            k
            for k in range(len(likelihoods))
            if self.epoch - self._last_improvement(_likelihood_name(k))
            <= self._patience
        ]

    @property
    def _num_averaged_steps(self) -> int:
        """Steps over which weights are averaged."""
        num_steps = max(1, NUM_AVERAGED_EPOCHS * self._num_batches)
        if self._stage is Stage.DISTILLATION and self._has_likelihoods:
            return max(num_steps, NUM_POOLED_AVERAGED_STEPS)
        return num_steps

    @property
    def _patience(self) -> int:
        """Epochs without improvement after which a stage, or a candidate, ends."""
        is_sbis = self._stage is Stage.FLOW and not isinstance(
            self._estimator.flow, FlowCandidates
        )
        if is_sbis:
            return self._stop_after_epochs
        enough = math.ceil(PATIENCE_STEPS / self._num_batches)
        longest = self._stop_after_epochs
        if self._stage is not Stage.FLOW:
            longest *= max(1, STEPS_OF_EPOCH // self._num_batches)
        return min(longest, max(MIN_PATIENCE, enough))

    @property
    def _max_epochs_of_stage(self) -> float:
        """Epochs after which the models of a stage have learnt enough."""
        if self._stage is Stage.LIKELIHOOD:
            enough = math.ceil(MAX_LIKELIHOOD_STEPS / self._num_batches)
            return min(MAX_LIKELIHOOD_EPOCHS, max(MIN_EPOCHS, enough))
        if self._stage is Stage.DISTILLATION and self._has_likelihoods:
            return max(MIN_EPOCHS, math.ceil(MAX_POOLED_STEPS / self._num_batches))
        return math.inf

    def _last_improvement(self, name: str) -> int:
        """Epoch of this stage in which a model was at its best, or that before it."""
        before = self._stage_start - 1
        return max(before, self._best[name].epoch) if name in self._best else before

    @property
    def _stages(self) -> List[Stage]:
        """The stages of a training in which the proxy learns."""
        left_out = {Stage.DISTILLATION} if self.preset == "fast" else set()
        if self._estimator.likelihoods is None:
            left_out.add(Stage.LIKELIHOOD)
        return [stage for stage in Stage if stage not in left_out]

    @property
    def _next_stage(self) -> Optional[Stage]:
        """The stage that follows, `None` after the last."""
        order = list(Stage)
        later = order[order.index(self._stage) + 1 :]
        return next((stage for stage in later if stage in self._stages), None)

    @property
    def _standing_still(self) -> Tuple[Module, ...]:
        """The models that do not learn in this stage, though their gradients exist."""
        estimator = self._estimator
        models = {
            Stage.LIKELIHOOD: (estimator.flow,),
            Stage.PROXY: (estimator.flow,),
            Stage.DISTILLATION: (estimator.proxy,),
        }
        return models.get(self._stage, ())

    def _lagrangian(self, divergences: Divergences) -> Tensor:
        if divergences.likelihood_loss is not None:
            return divergences.likelihood_loss
        dual_variables = self._weights.dual_variables.tolist()
        if self._stage is Stage.DISTILLATION and self._has_likelihoods:
            # The network has learnt from the simulations what the flow has; the
            # surrogates of the likelihood have learnt more.
            dual_variables[0] *= self._weights.forward_share
        terms = [
            weight * divergence
            for weight, divergence in zip(
                dual_variables, divergences.losses, strict=True
            )
            if divergence is not None
        ]
        return torch.stack(terms).sum(0)

    @property
    def _has_likelihoods(self) -> bool:
        return self._estimator.likelihoods is not None

    @property
    def _flow_weight(self) -> float:
        """The weight of the divergence from the proxy that the flow lowers."""
        return self._weights.dual_variables[1].item() * self._weights.flow_share

    def _step(self, loss: Tensor, clip_max_norm: Optional[float]) -> bool:
        """Take one optimiser step, with the gradients of each network clipped.

        Returns:
            Whether it was taken; not if gradients are not finite.
        """
        self.optimizer.zero_grad()
        loss.backward()
        for model in self._standing_still:  # an embedding net may be of both
            for parameter in self._parameters[model]:
                parameter.grad = None
        for parameters in self._parameters.values():
            norm = clip_grad_norm_(
                [p for p in parameters if p.grad is not None],
                torch.inf if clip_max_norm is None else clip_max_norm,
            )
            if not torch.isfinite(norm):
                return False
        self.optimizer.step()
        return True

    def _validate_epoch(
        self, val_loader: DataLoader, loss_args: Optional[LossArgs]
    ) -> float:
        with self._average.applied():
            return self._validate(val_loader)

    @torch.no_grad()
    def _validate(self, val_loader: DataLoader) -> float:
        """Return the flow's validation loss, and keep the model if it is the best."""
        of_flow: List[Tensor] = []
        parts: List[Divergences] = []
        kernels: List[Tensor] = []
        distances: List[Tensor] = []
        of_likelihoods: List[Tensor] = []
        losses = self._losses
        flow_stands_still = self._estimator.flow in self._standing_still
        for tensors in val_loader:
            batch = self._batch(tensors, "validation")
            kernel = losses.kernel(batch.x)
            if flow_stands_still:
                forward_kl = losses.of_standing_flow(batch)
            else:
                forward_kl = losses.of_flow(batch)
            of_flow.append(kernel * forward_kl)
            if self._stage is Stage.LIKELIHOOD:
                of_likelihoods.append(kernel * losses.of_every_likelihood(batch))
            if self._stage in (Stage.FLOW, Stage.LIKELIHOOD):
                continue
            judged = losses.is_judged(batch)
            if not judged.any():
                continue
            batch, kernel = batch.at(judged), kernel[judged]
            if self._stage is Stage.DISTILLATION:
                divergences, to_proxy = losses.of_judged_flow(batch)
                distances.append(kernel * to_proxy)
            else:
                divergences = losses.of_judged_proxy(batch)
            divergences.forward_kl = forward_kl[judged]
            parts.append(divergences)
            kernels.append(kernel)
        val_loss = torch.cat(of_flow).mean().item()
        if parts:
            self._record_validation(parts, kernels)
        else:
            self._epoch_metrics.update(dict.fromkeys(VALIDATION_METRICS, math.nan))
            self._epoch_metrics["validation_forward_kl"] = val_loss
        if of_likelihoods:
            self._keep_best_likelihoods(torch.cat(of_likelihoods, 1).mean(1))
        if self._stage.trains_flow:
            distance = torch.cat(distances).mean().item() if distances else 0.0
            self._keep_best("flow", val_loss + self._proxy_share * distance, val_loss)
            if val_loss < self._best_of_candidate[0]:
                self._best_of_candidate = (val_loss, self.epoch)
                if self._is_last_candidate:
                    self._keep_best(LAST_CANDIDATE, val_loss, val_loss)
        for name, value in zip(
            DUAL_METRICS, self._weights.dual_variables.tolist(), strict=True
        ):
            self._epoch_metrics[name] = value
        self._epoch_metrics["trust"] = self._weights.trust
        return val_loss

    def _keep_best_likelihoods(self, losses: Tensor) -> None:
        """Keep every surrogate of the likelihood that is better than before."""
        self._epoch_metrics["validation_likelihood_loss"] = losses.mean().item()
        for k, loss in enumerate(losses.tolist()):
            self._keep_best(_likelihood_name(k), loss, loss)

    def _model(self, name: str) -> Module:
        """Return the model that `_best` has under this name."""
        if name in ("flow", "proxy"):
            return getattr(self._estimator, name)
        if name == LAST_CANDIDATE:
            flow = self._estimator.flow
            assert isinstance(flow, FlowCandidates)
            return flow.last
        likelihoods = self._estimator.likelihoods
        assert likelihoods is not None
        return likelihoods.members[int(name.removeprefix(LIKELIHOOD_PREFIX))]

    def _record_validation(
        self, parts: List[Divergences], kernels: List[Tensor]
    ) -> None:
        """Keep the best proxy, and update the weights when both models learn."""
        forward, reverse, proxy_forward = (
            torch.cat([
                kernel * losses[index]  # type: ignore[operator]
                for kernel, losses in zip(
                    kernels, (part.losses for part in parts), strict=True
                )
            ])
            for index in range(3)
        )
        validation = ValidationDivergences(forward, reverse, proxy_forward)
        if self._stage.trains_flow:
            self._weights.update(validation)
        if self._stage.trains_proxy:
            loss = validation.proxy_forward_kl
            is_best = self._keep_best("proxy", loss, loss)
            if is_best:
                self._weights.measure_trust(validation)
        partitions = [part.log_partition for part in parts if part.log_partition]
        self._epoch_metrics.update(
            validation_forward_kl=validation.forward_kl,
            validation_reverse_kl=validation.reverse_kl,
            validation_proxy_forward_kl=validation.proxy_forward_kl,
            validation_likelihood_loss=math.nan,
            log_partition=torch.cat([p.value for p in partitions]).mean().item(),
            effective_sample_size=torch
            .cat([p.effective_sample_size for p in partitions])
            .mean()
            .item(),
        )

    def _start_next_stage(self) -> None:
        following = self._next_stage
        assert following is not None
        for name in ("flow", "proxy"):
            if name in self._best:
                getattr(self._estimator, name).load_state_dict(self._best[name].state)
        self._restore_best_likelihoods()
        if self._stage is Stage.FLOW:
            self._fit_scale_of_flow()
        if self._stage is Stage.PROXY:
            self._judge_proxy_afresh()
        self._stage, self._stage_start = following, self.epoch
        self._losses.forget_standing()
        self._is_new = False
        self.optimizer.state.clear()
        proxy = self._estimator.proxy
        if following is Stage.PROXY and isinstance(proxy, PooledEnergy):
            proxy.reset_weights()  # its network learns by itself
        if following is Stage.DISTILLATION:
            # From here on a flow is also judged by what it has learnt from the proxy,
            # as far as that can be trusted.
            self._estimator.eval()  # the next epoch lets it train again
            self._weights.start_distillation(self._choose_exponent())
            self._proxy_share = self._weights.flow_share
            if self._proxy_share > 0:  # else the flows are compared as before
                del self._best["flow"]
                if self._has_likelihoods:
                    self._return_to_last_candidate()
        self._average.restart(self._num_averaged_steps)

    def _fit_scale_of_flow(self) -> None:
        """Let the best flow be as wide as validation simulations ask it to be."""
        flow, losses = self._estimator.flow, self._losses
        has_proxy = bool(self._weights.dual_variables[1:].any())
        # Without a proxy it is NPE's. Parameters from a proposal are not spread as the
        # posterior; the flow then keeps the scale of the rounds before.
        if not has_proxy or losses.atomic is not None or not scaled_bases(flow):
            return
        flow.eval()
        theta, x = self._validation_simulations()
        before = scaled_bases(flow)[0].scale.item()
        try:
            if fit_scale(flow, theta, x, losses.kernel(x)) == before:
                return
            loss_now = losses.mean_of_flow_on_validation()
        except NUMERICAL_ERRORS:
            flow.load_state_dict(self._best["flow"].state)
            return
        self._best["flow"] = self._best["flow"]._replace(
            score=loss_now,  # no later flow is compared with one of the distillation
            state=copy_of_state(flow),
            loss=loss_now,
        )

    def _judge_proxy_afresh(self) -> None:
        """Weigh the factors of the best proxy, and judge it, with other samples.

        Those that chose it among all epochs see it too well: where an energy has a
        hole that none of them has found, they see nothing.
        """
        if "proxy" not in self._best:
            return
        self._estimator.eval()
        self._samples.proposals.pop("validation", None)
        proxy, best = self._estimator.proxy, self._best.pop("proxy")
        try:
            if isinstance(proxy, PooledEnergy):
                self._choose_weights(proxy)
            self._validate(self._validation_loader)
            judged = self._best["proxy"]
            self._best["proxy"] = judged._replace(epoch=best.epoch)
        except NUMERICAL_ERRORS as err:  # must not cost the networks
            self._best["proxy"] = best
            proxy.load_state_dict(best.state)
            warnings.warn(
                _cannot_be_sampled(err, "the proxy is left as its network alone"),
                stacklevel=7,
            )

    @torch.no_grad()
    def _choose_weights(self, proxy: PooledEnergy) -> None:
        proxy.weights.copy_(choose_weights(*self._factors_on_validation(proxy)))

    def _factors_on_validation(self, proxy: PooledEnergy) -> Tuple[Tensor, Tensor]:
        """Return what `choose_weights` needs of the validation simulations."""
        theta, x = self._validation_simulations()
        if self._round > 0:  # parameters come from a proposal
            points = as_atoms(theta)
            log_prior = self._prior.log_prob(points.flatten(0, 1))  # type: ignore[union-attr]
            log_base = proxy.base.log_prob(points) - log_prior.reshape(points.shape[:2])
        else:
            proposals = self._samples.draw_proposals(
                self._estimator.models, x, VALIDATION_MULTIPLE
            )
            self._samples.proposals["validation"] = proposals
            points = torch.cat((theta.unsqueeze(0), proposals.theta))
            num_flow = len(proposals.log_ratio)
            log_weights = proxy.base.log_prob(theta) - log_mixture(
                self._estimator.flow.log_prob(theta.unsqueeze(0), x)[0],
                proxy.base.reference_log_prob(theta.unsqueeze(0))[0],
                num_flow,
                len(proposals.theta) - num_flow,
            )
            log_base = torch.cat((log_weights.unsqueeze(0), proposals.log_weights))
        chunks = torch.arange(len(x), device=x.device).split(VALIDATION_CHUNK)
        log_factors = [proxy.log_factors(points[:, c], x[c]) for c in chunks]
        return torch.cat(log_factors, 2), log_base

    @property
    def _candidate(self) -> Optional[int]:
        """Index of the flow's candidate that learns, `None` where there are none."""
        flow = self._estimator.flow
        if self._stage is Stage.FLOW and self._is_new:
            return flow.active if isinstance(flow, FlowCandidates) else None
        return None

    def _start_candidate(self, index: int) -> None:
        flow = self._estimator.flow
        assert isinstance(flow, FlowCandidates)
        flow.active = index
        self._candidate_start = self.epoch
        self._best_of_candidate = (math.inf, self.epoch - 1)

    @property
    def _is_last_candidate(self) -> bool:
        """Whether the flow's last candidate learns, and may have to follow a proxy."""
        flow = self._estimator.flow
        follows = self._has_likelihoods and Stage.DISTILLATION in self._stages
        is_last = isinstance(flow, FlowCandidates) and flow.flow is flow.last
        return self._candidate is not None and is_last and follows

    def _return_to_last_candidate(self) -> None:
        """Let the last candidate follow the proxy where the best leaves the prior.

        Residual coordinates move the bounds of the prior with the outputs, and no flow
        of them ends there. The last candidate has none; from simulations alone it
        learns more slowly.
        """
        flow, best = self._estimator.flow, self._best.pop(LAST_CANDIDATE, None)
        if best is None or not isinstance(flow, FlowCandidates):
            return
        if flow.flow is not flow.last and self._leakage() > MAX_LEAKAGE:
            flow.active = len(flow) - 1
            flow.last.load_state_dict(best.state)

    def _leakage(self) -> float:
        """Return the share of the flow's samples outside the prior's support."""
        if "validation" not in self._samples.proposals:
            return 0.0
        proposals = self._samples.proposals["validation"]
        theta = proposals.theta[: len(proposals.log_ratio)]
        is_outside = self._estimator.proxy.base.log_prob(theta).isneginf()
        return is_outside.double().mean().item()

    def _start_next_candidate(self) -> bool:
        """Let the flow's next candidate learn, and return whether there is one."""
        flow, index = self._estimator.flow, self._candidate
        if index is None or index + 1 == len(flow):  # type: ignore[arg-type]
            return False
        self._start_candidate(index + 1)
        return True

    def _keep_best(self, name: str, score: float, loss: float) -> bool:
        """Keep a model if it is the best so far.

        Args:
            name: `"flow"`, `"proxy"` or the name of a surrogate of the likelihood.
            score: What models are compared by.
            loss: Its validation loss.

        Returns:
            Whether it is.
        """
        model = self._model(name)
        score = math.inf if math.isnan(score) else score
        if name in self._best and not score < self._best[name].score:
            return False
        self._best[name] = Best(score, self.epoch, copy_of_state(model), loss)
        goes_with_flow = name == "flow" or self._stage is Stage.PROXY
        if goes_with_flow and self._estimator.shares_parameters:
            state = copy_of_state(self._estimator.proxy)
            self._best["flow's proxy"] = Best(score, self.epoch, state, loss)
        return True

    def _restore_best(self) -> None:
        estimator = self._estimator
        estimator.flow.load_state_dict(self._best["flow"].state)
        # With an embedding net of both, the proxy is that of the flow's best epoch, or
        # the best of those that learned while that flow stood still.
        proxy = "flow's proxy" if estimator.shares_parameters else "proxy"
        if proxy in self._best:
            estimator.proxy.load_state_dict(self._best[proxy].state)
        self._restore_best_likelihoods()
        estimator.eval()

    def _restore_best_likelihoods(self) -> None:
        for name in filter(_is_likelihood, self._best):
            self._model(name).load_state_dict(self._best[name].state)

    def _converged(self, epoch: int, stop_after_epochs: int) -> bool:
        """Return whether no model has improved on validation data for long."""
        if "flow" not in self._best:  # before the first epoch, or that of a stage
            return False
        self._best_val_loss = self._best["flow"].loss
        start = self._stage_start
        epochs = [best.epoch for best in self._best.values()]
        if self._stage is Stage.FLOW:
            start, epochs = self._candidate_start, [self._best_of_candidate[1]]
        self._epochs_since_last_improvement = epoch - 1 - max(start - 1, *epochs)
        stagnates = self._epochs_since_last_improvement >= self._patience
        # Without a weight on the proxy there is nothing to learn after the flow.
        has_proxy = bool(self._weights.dual_variables[1:].any())
        is_last = self._next_stage is None
        share = math.inf
        if has_proxy and not is_last:
            share = self._max_num_epochs / len(self._stages)
        num_epochs = epoch - self._stage_start
        is_cut = not stagnates and num_epochs >= share
        is_over = num_epochs >= min(share, self._max_epochs_of_stage)
        flow = self._estimator.flow
        if self._is_new and isinstance(flow, FlowCandidates) and share < math.inf:
            is_cut = not stagnates and epoch - start >= max(1, share // len(flow))
            stagnates = stagnates or is_cut
        if is_cut:
            self._cut_short.append(self._stage)
        if not (stagnates or is_over):
            return False
        if not is_over and self._start_next_candidate():
            return False
        if is_last or not has_proxy:
            return True
        self._start_next_stage()
        return False

    def _summarize_epoch(
        self,
        train_loss: float,
        val_loss: float,
        epoch_start_time: float,
        summarization_kwargs: Dict[str, Any],
    ) -> None:
        self._check_epoch()
        super()._summarize_epoch(
            train_loss, val_loss, epoch_start_time, summarization_kwargs
        )
        for name in EPOCH_METRICS:
            self._summary[name].append(self._epoch_metrics[name])
        self._summary["stage"].append(self._stage.value)
        self._last_epoch = capture(self, self.epoch + 1)
        self._num_retries = 0
        if self._checkpoint is not None:
            self._checkpoint.write(self)

    def _check_epoch(self) -> None:
        """Raise if the epoch was no good start for another."""
        for name, model in zip(("flow", "proxy"), self._estimator.models, strict=True):
            learns = model not in self._standing_still
            if learns and not all_finite(model):
                raise NonFiniteError(f"The {name} has NaN or infinite parameters.")
        last = 0 if self._last_epoch is None else self._last_epoch["num_skipped_steps"]
        if self._num_skipped_steps - last >= self._num_batches:
            raise NonFiniteError(
                "No training step had finite gradients. Look for extreme values in "
                "theta and x, and try a lower learning_rate."
            )

    def _summarize(self, round_: int) -> None:
        self._restore_best()
        self._fit_scale_of_flow()
        # sbi's is the lowest of any flow's, not that of the flow which is kept.
        self._summary["best_validation_loss"][-1] = self._best["flow"].loss
        offset = sum(self._summary["epochs_trained"][:-1])
        try:
            for name in EPOCH_METRICS:
                values = self._summary[name][offset:]
                for step, value in enumerate(values, start=offset):
                    if not self._is_missing(name, step):
                        self._tracker.log_metric(name=name, value=value, step=step)
            super()._summarize(round_)
        except OSError as err:  # a full disk must not cost the networks
            warnings.warn(
                f"The training log cannot be written ({err}). `inference.summary` "
                "holds the same.",
                stacklevel=7,
            )

    def _maybe_show_progress(self, show: bool, epoch: int) -> None:  # type: ignore[override]
        if show:
            metrics = self._epoch_metrics
            proxy_loss = f"{metrics['validation_proxy_forward_kl']:.3f}"
            if self._is_missing("validation_proxy_forward_kl", -1):
                proxy_loss = "to come"
            print(
                "\r",
                f"Training JeffreysNPE. Epochs trained: {epoch}, validation loss: flow "
                f"{metrics['validation_forward_kl']:.3f}, proxy {proxy_loss}, "
                "dual variables: "
                f"{metrics['dual_forward_kl']:.2f} {metrics['dual_reverse_kl']:.2f} "
                f"{metrics['dual_proxy_forward_kl']:.2f} ",
                end="",
            )

    def _finish_early(self, reason: str, num_epochs_before: int) -> None:
        """Do after Ctrl-C or a failure what sbi's loop does at its end."""
        num_epochs = len(self._summary["validation_loss"]) - num_epochs_before
        best_epoch = self._best["flow"].epoch
        warnings.warn(
            f"{reason} The best network so far, of epoch {best_epoch}, is kept; "
            "`train(resume_training=True)` goes on.",
            stacklevel=6,
        )
        self._summary["epochs_trained"].append(num_epochs)
        self._summary["best_validation_loss"].append(self._best["flow"].loss)
        self._summarize(self._round)
        self._estimator.zero_grad(set_to_none=True)

    def _validation_simulations(self) -> Tuple[Tensor, Tensor]:
        """Return the simulations that the proxy is validated on."""
        theta, x = (
            part[:NUM_VALIDATION_SIMULATIONS].to(self._device)
            for part in self._simulations_of("validation")
        )
        return theta, x

    def _choose_exponent(self) -> float:
        """Return the exponent of the refined posterior, see `choose_exponent`."""
        estimator = self._estimator
        theta, x = self._validation_simulations()
        # Parameters of later rounds come from a proposal, not from the posterior.
        prior = self._prior if self._round > 0 else None
        try:
            return choose_exponent(
                estimator.flow, estimator.proxy, theta, x, prior=prior
            )
        except NUMERICAL_ERRORS as err:  # must not cost the networks
            warnings.warn(
                _cannot_be_sampled(err, "the refined posterior is left as the flow's"),
                stacklevel=7,
            )
            return 0.0

    def _warn_of_collapse(self) -> None:
        """Warn where few samples stand behind the proxy's partition functions."""
        estimator = self._estimator
        _, x = self._validation_simulations()
        with (
            torch.no_grad(),
            suppress(*NUMERICAL_ERRORS),  # already warned of
            keeping_random_state(self._device),
        ):
            partitions = [
                estimator.proxy.log_partition(chunk, estimator.flow, 400)
                for chunk in x.split(VALIDATION_CHUNK)
            ]
            num_samples = partitions[0].num_samples
            sizes = torch.cat([part.effective_sample_size for part in partitions])
            size = sizes.median().item()
            if size < RefinedPosterior.min_relative_ess * num_samples:
                warnings.warn(
                    "The importance weights behind the proxy's partition functions "
                    f"have collapsed: {num_samples} samples of flow and "
                    f"prior are worth {size:.1f} at half of the validation "
                    "simulations. Flow and proxy disagree. Do not use the refined "
                    "posterior; that of the flow (sample_with='direct') is as good as "
                    "NPE's. More simulations or a longer training may mend it.",
                    stacklevel=7,
                )

    @property
    def _estimator(self) -> JeffreysEstimator:
        assert isinstance(self._neural_net, JeffreysEstimator)
        return self._neural_net

    def _default_tracker(self) -> Tracker:
        try:
            return super()._default_tracker()
        except OSError as err:
            warnings.warn(
                f"The training log cannot be written ({err}). Training goes on without "
                "it; pass `tracker=` to log elsewhere.",
                stacklevel=3,
            )
            return NoTracker()

    def __getstate__(self) -> Dict:
        state = super().__getstate__()
        # Builders are closures, which pickle refuses, as for sbi's own.
        state.update(_build_flow=None, _build_proxy=None)
        state.update(_samples=SampleSets(self.objective, self._device))
        state.update(_checkpoint=None)
        state.pop("_average", None)
        state.pop("_parameters", None)
        state.pop("_validation_loader", None)
        state.pop("_losses", None)
        return state


def _with_batches(
    loaders: Tuple[DataLoader, DataLoader],
) -> Tuple[DataLoader, DataLoader]:
    """Return dataloaders for training and validation that have batches, or raise."""
    for part, loader in zip(("training", "validation"), loaders, strict=True):
        if len(loader) == 0:
            raise ValueError(
                f"There are fewer simulations for {part} than a batch holds. Give a "
                "smaller training_batch_size, or batch_size of dataloader_kwargs."
            )
    return loaders


def _check_device(device: Union[str, torch.device]) -> None:
    """Raise if a device has no double precision."""
    is_mps = str(device).startswith("mps")
    if device == "gpu" and not torch.cuda.is_available():
        is_mps = torch.backends.mps.is_available()
    if is_mps:
        raise ValueError(
            f"device={str(device)!r} is Apple's GPU, which has no double precision, "
            "and JeffreysNPE needs it. Use device='cpu', which is as fast for networks "
            "as small as these."
        )


def _as_weights(weights: Union[str, Weights]) -> Weights:
    if isinstance(weights, Weights):
        return weights
    if not isinstance(weights, str):
        raise TypeError(
            "weights must be 'adaptive', 'fixed' or an instance of Weights, got "
            f"{type(weights).__name__}."
        )
    named = {"adaptive": AdaptiveWeights, "fixed": FixedWeights}
    if weights not in named:
        raise ValueError(
            f"weights must be 'adaptive', 'fixed' or an instance of Weights, got "
            f"{weights!r}."
        )
    return named[weights]()


def _raised_in(error: BaseException, packages: Sequence[str]) -> bool:
    """Return whether code of one of these packages raised an error, no other's."""
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def _ones(x: Tensor) -> Tensor:
    return torch.ones(len(x), device=x.device)


def _weights_of_simulations(kernel: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """Return what a calibration kernel of the user's gives, one weight a simulation.

    One of shape `(num, 1)` would multiply every simulation's loss by every weight, and
    have no effect.
    """
    weights = torch.as_tensor(kernel(x), device=x.device)
    if weights.shape not in ((), (len(x),)):
        raise ValueError(
            "calibration_kernel must return one weight for every simulation, of shape "
            f"({len(x)},) here, got {tuple(weights.shape)}."
        )
    return weights.expand(len(x))


def _cannot_be_sampled(error: Exception, consequence: str) -> str:
    return (
        f"The flow cannot be sampled at the validation simulations ({error!r}), so "
        f"that {consequence}. Look for extreme values in theta and x, and try a lower "
        "learning_rate."
    )


def _likelihood_name(index: int) -> str:
    return f"{LIKELIHOOD_PREFIX}{index}"


def _is_likelihood(name: str) -> bool:
    return name.startswith(LIKELIHOOD_PREFIX)


def _means(divergences: Divergences, kernel: Tensor) -> List[float]:
    return [
        math.nan if part is None else (kernel * part.detach()).mean().item()
        for part in (*divergences.losses, divergences.likelihood_loss)
    ]
