"""The same seed gives the same network, also in another process."""

import hashlib
import os
import subprocess
import sys

import pytest

SCRIPT = """
import hashlib, torch
from sbi.neural_nets import posterior_nn
from sbi.utils import BoxUniform
from sbi_jeffreys import JeffreysNPE, NoTracker, energy_nn

torch.set_num_threads(1)
torch.manual_seed(3)
prior = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
theta = prior.sample((200,))
x = theta + 0.5 * torch.randn(200, 2)
for name in ("maf", "nsf", "zuko_nsf", "likelihood", "auto"):
    flow, likelihood = "auto", "none"
    if name == "likelihood":
        likelihood = "auto"
    if name != "auto":
        model = "maf" if name == "likelihood" else name
        flow = posterior_nn(model, hidden_features=8, num_transforms=2)
    inference = JeffreysNPE(
        prior,
        flow,
        energy_estimator=energy_nn(8, 1, likelihood=likelihood),
        tracker=NoTracker(),
        show_progress_bars=False,
    )
    torch.manual_seed(4)
    estimator = inference.append_simulations(theta, x).train(
        max_num_epochs=4, learning_rate=5e-3
    )
    posterior = inference.build_posterior(sample_with="refined")
    result = [*estimator.state_dict().values(), posterior.sample((100,), x=x[:1])]
    summary = {k: v for k, v in inference.summary.items() if "sec" not in k}
    digest = hashlib.sha256(str(summary).encode())
    for tensor in result:
        digest.update(tensor.detach().numpy().tobytes())
    print(name, digest.hexdigest())
"""


def run(script, hash_seed):
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        # The order of sets, which no result may depend on.
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    return [line for line in lines if len(line.split()) == 2 and len(line) > 64]


@pytest.mark.slow
def test_same_seed_same_network_in_two_processes():
    first, second = run(SCRIPT, 1), run(SCRIPT, 2)
    assert len(first) == 5
    assert first == second
    # The digests do tell networks apart.
    digests = {line.split()[1] for line in first}
    assert len(digests) == 5
    assert hashlib.sha256(b"").hexdigest() not in digests
