"""A process that has served may fork, as docs/serving.md says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# The child runs what the parent has run before, fused blocks with their tables and caches included.
FORK = """
import os, torch
from finegates import optimize_for_cpu
from serving_case import pruned
torch.set_num_threads({before})
model = {model}
optimize_for_cpu(model)
ids = torch.randint(3, 60, (4, 30))
x = torch.randn(64, 512)

@torch.no_grad()
def serve():
    return model(x) if isinstance(model, torch.nn.Sequential) else model(ids).logits

expected = serve()
torch.set_num_threads({at_fork})
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(serve(), expected) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
MODELS = {
    "linear": "torch.nn.Sequential(torch.nn.Linear(512, 512))",
    "bert": "pruned('bert', hidden_size=96, intermediate_size=384)",
    "llama": "pruned('llama', hidden_size=96, intermediate_size=384, head_dim=24)",
}


@pytest.mark.parametrize(("before", "at_fork"), [(1, 1), (2, 1)])
@pytest.mark.parametrize("model", MODELS)
def test_a_forked_child_serves_with_one_thread(model: str, before: int, at_fork: int) -> None:
    """As docs/serving.md says: GNU OpenMP's threads don't survive a fork."""
    code = FORK.format(before=before, at_fork=at_fork, model=MODELS[model])
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        timeout=240,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
