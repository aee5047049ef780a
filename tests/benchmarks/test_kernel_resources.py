"""The Triton kernels compile for GPUs that are not here, and what they take of them is kept as rows."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys

import pytest
from timing import RESULTS, ROOT

from sape2.runs.rows import read_rows

KERNELS = ["forward", "query_gradients", "key_gradients"]
CODE = """
import json, sys
import kernel_resources
print(json.dumps([kernel_resources.resources(*case) for case in json.loads(sys.argv[1])]))
"""

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def compiled(cases):
    """Rows of (kernel, capability, dtype, head_dim, places), from a process that compiles: the tests' own interprets."""
    paths = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "src")])
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    command = [sys.executable, "-c", CODE, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def check(rows):
    """No sum depends on the order in which programs happen to run, and nothing is spilled."""
    assert [row["atomics"] for row in rows] == [0] * len(rows)
    assert [row["spilled_bytes"] for row in rows] == [0] * len(rows)
    assert all(0 < row["registers"] <= 255 for row in rows)
    assert all(0 < row["shared_bytes"] <= 163 * 1024 for row in rows)  # what a block may have on an A100


def test_the_kernels_compile_for_devices_that_are_not_here():
    check(
        compiled([(kernel, capability, "bfloat16", 32, 16) for kernel, capability in zip(KERNELS, (80, 90, 90), strict=True)])
    )


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_every_dtype(capability):
    cases = itertools.product(KERNELS, [capability], ["bfloat16", "float16", "float32"], [64], [16])
    assert len(compiled(list(cases))) == 9


def test_every_kernel_has_kept_rows():
    rows = read_rows(RESULTS / "kernel_resources.jsonl")
    assert {(row["kernel"], row["capability"]) for row in rows} == set(itertools.product(KERNELS, (80, 90)))
    assert {"triton", "ptxas", "torch", "commit"} <= set.intersection(*(set(row) for row in rows))
    assert not any(row["atomics"] for row in rows)
