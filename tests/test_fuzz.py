"""A thousand random cases: whatever is put in, an answer or a message comes out.

An answer is networks, a summary and samples without NaN. A message is an error that
this library raises in its own words, or one that sbi's `NPE` raises on the same input.
Every case is made from its number alone: `run(number)` repeats it.
"""

import linecache
import math
import random
import traceback
import warnings
from pathlib import Path

import pytest
import sbi
import torch
from helpers import values_of
from sbi.inference import NPE
from sbi.neural_nets import posterior_nn
from sbi.utils import BoxUniform, MultipleIndependent
from torch import nn
from torch.distributions import (
    Beta,
    Exponential,
    Gamma,
    Independent,
    Laplace,
    LogNormal,
    MultivariateNormal,
    Normal,
    StudentT,
    Uniform,
)

import sbi_jeffreys
from sbi_jeffreys import FixedWeights, JeffreysNPE, NoTracker, energy_nn
from sbi_jeffreys.persistence import PER_TRAINING
from sbi_jeffreys.screening import MIN_SIMULATIONS

NUM_CASES = 1000

OURS = str(Path(sbi_jeffreys.__file__).parent)
SBIS = str(Path(sbi.__file__).parent)


def some_prior(rng, dim):
    """Return a prior over `dim` parameters, in units of any size."""
    scale = torch.tensor([10.0 ** rng.uniform(-1, 1) for _ in range(dim)])
    scale = scale * 10.0 ** rng.choice([0, 0, 0, -6, -3, 3, 6])
    shift = scale * rng.choice([0.0, 0.0, 1.0, -30.0])
    one = torch.ones(dim)
    kind = rng.choice([
        "box",
        "box",
        "gaussian",
        "gaussian",
        "correlated",
        "half-bounded",
        "beta",
        "heavy",
        "multiple",
        "unwrapped",
        "none",
    ])
    if kind == "box":
        return BoxUniform(shift - scale, shift + scale)
    if kind == "gaussian":
        return MultivariateNormal(shift, torch.diag(scale**2))
    if kind == "correlated":
        root = torch.diag(scale) @ (torch.eye(dim) + 0.5 * torch.rand(dim, dim).tril())
        return MultivariateNormal(shift, scale_tril=root)
    if kind == "half-bounded":
        family = rng.choice([Gamma, LogNormal, Exponential])
        if family is Exponential:
            return Independent(Exponential(1 / scale), 1)
        if family is Gamma:
            return Independent(Gamma(2 * one, 1 / scale), 1)
        return Independent(LogNormal(scale.log(), 0.5 * one), 1)
    if kind == "beta":
        return Independent(Beta(rng.choice([0.5, 1.0, 3.0]) * one, 2 * one), 1)
    if kind == "heavy":
        family = rng.choice([
            Laplace(shift, scale),
            StudentT(2 * one, shift, scale),
        ])
        return Independent(family, 1)
    if kind == "multiple":
        parts = [
            rng.choice([
                Normal(shift[i : i + 1], scale[i : i + 1]),
                Uniform(shift[i : i + 1] - scale[i : i + 1], shift[i : i + 1] + scale),
                Gamma(2 * one[:1], 1 / scale[i : i + 1]),
            ])
            if dim == 1
            else Normal(shift[i : i + 1], scale[i : i + 1])
            for i in range(dim - 1)
        ]
        parts.append(Gamma(2 * one[:1], 1 / scale[-1:]))
        return MultipleIndependent(parts) if dim > 1 else parts[0]
    if kind == "unwrapped":
        return Uniform(shift - scale, shift + scale)
    return None


def some_x(rng, theta):
    """Return simulation outputs of any shape and size, good and bad."""
    num, dim = theta.shape
    z = (theta - theta.mean(0)) / theta.std(0).clamp_min(1e-30) if num > 1 else theta
    width = rng.randint(1, 5)
    x = z @ torch.randn(dim, width) + rng.uniform(0, 1) * torch.randn(num, width)
    x = x * 10.0 ** rng.choice([0, 0, 0, -20, -6, 6, 20])
    x = x + rng.choice([0, 0, 0, 1, 1e4]) * x.abs().max()
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        row, column = rng.randrange(num), rng.randrange(width)
        what = rng.choice(["nan", "inf", "outlier", "constant", "copy", "integers"])
        if what in ("nan", "inf"):
            x[row, column] = rng.choice([1, -1]) * float(what)
        elif what == "outlier":
            x[row, column] = rng.choice([1e8, -1e8, 1e30, 3e38])
        elif what == "constant":
            x[:, column] = rng.choice([0.0, 1.0, 1e8])
        elif what == "copy":
            x = torch.cat((x, x[:, column : column + 1]), 1)
        else:
            x[:, column] = x[:, column].round()
    if num >= MIN_SIMULATIONS:  # and others, so many that most are screened out
        others = torch.randn(num, 25) * 10.0 ** rng.choice([0, 0, -6, 6])
        # A copy, or as good as constant.
        others[:, 0] = others[:, 1] + rng.choice([0.0, 1e8])
        x = torch.cat((others, x), 1)
    if rng.random() < 0.02:
        x = x * math.nan
    return x


def some_case(number):
    """Return prior, parameters, simulations and options of a case."""
    rng = random.Random(number)
    torch.manual_seed(number)
    dim = rng.choice([1, 2, 2, 3, 4])
    num = rng.choice([1, 3, 5, 8, 12, 20, 20, 20, 30, 30, 30, 40, 40, 60])
    if rng.random() < 0.05:
        num = MIN_SIMULATIONS + 20
    prior = some_prior(rng, dim)
    source = some_prior(rng, dim) if prior is None or rng.random() < 0.1 else prior
    if source is None:
        source = MultivariateNormal(torch.zeros(dim), torch.eye(dim))
    theta = source.sample((num,)).reshape(num, -1)
    x = some_x(rng, theta)
    shape = x.shape[1:]
    if rng.random() < 0.15:  # images
        x = x.unsqueeze(-1).repeat(1, 1, rng.randint(1, 3))
        shape = x.shape[1:]
    spoil = rng.random()
    if spoil < 0.02:
        theta = theta.to(rng.choice([torch.float64, torch.int64, torch.float16]))
    elif spoil < 0.04:
        x = x.to(rng.choice([torch.float64, torch.float16]))
    elif spoil < 0.06:
        theta = rng.choice([theta[:, 0], theta.unsqueeze(0), theta[: num // 2]])
    elif spoil < 0.08:
        x = rng.choice([x.flatten(1)[:, 0], x[: num // 2]])
    elif spoil < 0.10:
        theta = torch.cat((theta, theta[:, :1]), 1)
    elif spoil < 0.12:
        theta[rng.randrange(num), 0] = rng.choice([math.nan, math.inf, 1e8])
    elif spoil < 0.14:
        theta[:, -1] = rng.choice([0.0, 1e6])
    elif spoil < 0.145:
        theta = (theta / theta.abs().max()).round()
    flow = rng.choice(["maf"] * 12 + ["nsf", "nsf", "maf_rqs", "zuko_nice", "zuko_gf"])
    z_score = rng.choice(["independent", "independent", "structured", "none"])
    embedding = nn.Identity()
    if len(shape) > 1:
        embedding = nn.Sequential(nn.Flatten(1), nn.Linear(shape.numel(), 2))
        z_score = "structured"
    options_rng = random.Random(f"options {number}")  # all else stays as it was
    options = {
        "builder": posterior_nn(
            flow,
            z_score_x=z_score,
            hidden_features=4,
            num_transforms=rng.choice([1, 2]),
            embedding_net=embedding,
        ),
        "energy": energy_nn(
            4,
            1,
            z_score_x=z_score,
            embedding_net=embedding,
            base_measure=rng.choice(["prior", "prior", "lebesgue"]),
            # Few: they take longer than all else.
            likelihood="auto" if options_rng.random() < 0.05 else "none",
        ),
        "weights": rng.choice(["adaptive", "adaptive", "fixed"]),
        "preset": options_rng.choice(["accurate", "accurate", "fast"]),
    }
    training = {
        "training_batch_size": rng.choice([1, 5, 10, 200]),
        "validation_fraction": rng.choice([0.1, 0.1, 0.3, 0.5, 0.9]),
        "learning_rate": rng.choice([5e-4, 5e-3, 5e-3, 0.1, 10.0, 1e6]),
        "clip_max_norm": rng.choice([5.0, 5.0, None]),
        "max_num_epochs": 2,  # one epoch of every stage
    }
    return prior, theta, x, options, training


def train_ours(case):
    prior, theta, x, options, training = case
    inference = JeffreysNPE(
        prior,
        options["builder"],
        energy_estimator=options["energy"],
        weights=options["weights"],
        preset=options["preset"],
        tracker=NoTracker(),
        show_progress_bars=False,
    )
    inference.append_simulations(theta, x).train(**training)
    return inference


def train_npe(case):
    prior, theta, x, options, training = case
    inference = NPE(
        prior, options["builder"], tracker=NoTracker(), show_progress_bars=False
    )
    inference.append_simulations(theta, x).train(**training)
    return inference


def is_explicit(error, folder):
    """Return whether an error was raised in words in the source files of a folder."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return (
        frame.filename.startswith(folder)
        and line.startswith(("raise ", "assert "))
        and len(str(error)) > 20
    )


def problems_of(inference, case, said):
    """Return what is wrong with a training that raised nothing."""
    estimator = inference._neural_net
    bad = [
        f"parameter {name} is not finite"
        for name, parameter in estimator.named_parameters()
        if not parameter.isfinite().all()
    ]
    for name, values in inference.summary.items():
        if name == "stage":
            continue
        if name not in PER_TRAINING:
            values = values_of(inference.summary, name)
        # Fixed weights have no trust.
        fixed = isinstance(inference.weights, FixedWeights)
        finite = all(map(math.isfinite, values)) or (name == "trust" and fixed)
        if not finite and not any(name in each for each in said):
            bad.append(f"summary of {name}: {values}, unsaid")
    x = inference.get_simulations()[1][:1]
    for exponent in (estimator.exponent, 0.0):
        try:
            posterior = inference.build_posterior(
                sample_with="refined",
                refined_sampling_parameters={"exponent": exponent},
            )
            samples = posterior.sample((5,), x=x)
            log_prob = posterior.log_prob(samples, x=x, num_samples=20)
        except Exception as error:
            if not (is_explicit(error, OURS) or is_explicit(error, SBIS)):
                text = traceback.format_exc()
                try:  # as NPE's posterior would, asked for as many
                    estimator.flow.sample(torch.Size((40_000,)), x)
                except type(error):
                    continue
                bad.append(f"sampling: {text}")
            continue
        if not samples.isfinite().all():
            bad.append(f"samples: {samples}")
        # Of networks thrown off by a rate of ten, densities leave single precision.
        if log_prob.isnan().any() and case[-1]["learning_rate"] < 1:
            bad.append(f"log_prob: {log_prob}")
    return bad


def run(number):
    """Return what came out of a case, and what is wrong with that."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            inference = train_ours(some_case(number))
        except Exception as error:
            if is_explicit(error, OURS):
                return "our message", []
            text = traceback.format_exc()
            try:
                train_npe(some_case(number))
            except Exception as theirs:
                if type(theirs) is type(error):
                    return "sbi's message", []
                return "another error", [f"{text}\nNPE: {theirs!r}"]
            return "error", [f"{text}\nNPE trains."]
        said = [str(each.message) for each in caught]
        return "answer", problems_of(inference, some_case(number), said)


@pytest.mark.slow
def test_a_thousand_cases():
    counts, failures = {}, []
    for number in range(NUM_CASES):
        kind, bad = run(number)
        counts[kind] = counts.get(kind, 0) + 1
        failures += [f"case {number}: {problem}" for problem in bad]
    assert not failures, f"{len(failures)} of {counts}:\n" + "\n".join(failures[:20])
    # The cases are of both kinds, and not all the same.
    assert counts["answer"] > NUM_CASES / 2
    assert counts["our message"] > NUM_CASES / 20
