"Unsloth with its real kernels, stock against patched; the last results are nbs/results/unsloth_gpu_*.json."
import importlib.util
import types

import pytest
import torch

if not torch.cuda.is_available() or importlib.util.find_spec("unsloth") is None: pytest.skip("needs a CUDA device and unsloth", allow_module_level=True)
import gpu_unsloth as G  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def parity(tmp_path_factory):
    args = types.SimpleNamespace(json=tmp_path_factory.mktemp("parity") / "parity.json", small=False, dtypes=["float16", "bfloat16"])
    return G.parity(args)


def test_nothing_is_lost(parity):
    for r in parity:
        assert "error" not in r, r
        if r["what"] == "unpatched again": assert r["bit_for_bit"], r
        if r["what"] == "lossless": assert r["prefill"] == [1, 1] and r["decode"] == [23, 23] and max(r["first_logits"], r["second_logits"]) < (.02 if r["dtype"] == "float16" else .1), r


def test_recall_is_kept(parity):
    rows = [r for r in parity if r["what"] == "pocket"]
    assert rows and all(r["recall"] == 1 for r in rows), rows


@pytest.mark.parametrize("four_bit", [False, True])
def test_memory(tmp_path, four_bit):
    args = types.SimpleNamespace(model=tmp_path / "model", json=tmp_path / "bench.json", small=False, four_bit=four_bit, turns=1, layers=4, ratio=8, new=24, lengths=[4096, 16384], batches=[1], ways=["stock", "spectral"])
    G.make(args)
    stock, ours = (sorted((r for r in G.bench(args) if r["way"] == w), key=lambda r: r["length"]) for w in args.ways)
    for a, b in zip(stock, ours):
        assert b["cache_nbytes"] * 6 < a["cache_nbytes"] and b["peak_nbytes"] < a["peak_nbytes"], (a, b)
