"Every kernel built for three architectures, and chunks in the interpreter: beside test_kernels.py, so that two processes share the work."
import json

import pytest
import torch
from test_kernels import HERE, NAMES, needs_triton, run


@needs_triton
@pytest.mark.parametrize("part", range(4))
def test_builds_for_three_architectures(part, tmp_path):
    "sm_75 stays within 48 KB of shared memory; no kernel spills more than 256 bytes a thread, or 768 there; with neighbours as rotary pairs 512."
    assert "'arch': 90" in run("kernels_compiled.py", tmp_path, *NAMES[part::4])


@needs_triton
@pytest.mark.parametrize("part", range(2))
def test_chunks_in_the_interpreter(part):
    "Many queries at once, in parts of heads and rows and in splits of the keys: within 2e-3 in float16, 8e-3 in bfloat16, 1e-4 in float32 of the PyTorch path in float32."
    assert len(run("chunks.py", "-", *NAMES[part::2], TRITON_INTERPRET="1").splitlines()) == len(NAMES[part::2])


@pytest.mark.gpu
def test_chunks_on_a_gpu(tmp_path):
    if not torch.cuda.is_available(): pytest.skip("needs a CUDA device; last result: nbs/results/chunks.json")
    run("chunks.py", tmp_path / "chunks.json")


def test_last_chunks_on_a_gpu():
    rows = json.loads((HERE.parent / "nbs/results/chunks.json").read_text())["rows"]
    assert {r["case"] for r in rows} == set(NAMES) and all(r["error"] < dict(float16=2e-3, bfloat16=8e-3, float32=1e-4)[r["dtype"]] for r in rows)
