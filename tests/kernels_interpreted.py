"Run by test_kernels.py with TRITON_INTERPRET=1: every variant against the PyTorch path on the CPU."
import sys
import warnings
from dataclasses import replace
import torch
from kernel_cases import CASES, case, error
from spectral_nb import kernels

warnings.simplefilter("error", UserWarning)
gemv, names = sys.argv[1] == "gemv", sys.argv[2:] or list(CASES)
small = replace(kernels.T4 if gemv else kernels.Tuning(), tokens=64, programs=6)
for name in names:
    made = case(**CASES[name])
    layer, q, k, v, mask, softcap = made
    assert kernels.unsupported(layer, q, v) is None, kernels.unsupported(layer, q, v)
    got = kernels.decode_attention(layer, q, k, v, None if mask is None else mask[:, 0, 0].view(torch.uint8), None, softcap, replace(small, projections=10 ** (list(CASES).index(name) % 2 * 6), multiprocessors=1 + list(CASES).index(name) % 2 * 131)) # few and many programs of `prepare` in turn
    e = error(got, *made)
    print(name, [(s.keys.layout.bits, s.values.layout.bits) for s in layer.cold.segments], f"{e:.1e}", flush=True)
    assert e < (8e-3 if q.dtype == torch.bfloat16 else 2e-3), name
