"""Many queries at once by the chunk kernel against the PyTorch path in float32 on the same codes.

`python tests/chunks.py OUT.json` on a GPU, in float16, bfloat16 and float32; run by test_kernel_builds.py with TRITON_INTERPRET=1: `python tests/chunks.py - [case ...]`.
"""
import json
import sys
import warnings
from pathlib import Path
import torch
from kernel_cases import CASES, case
from spectral_nb import attention, kernels
from spectral_nb.chunk_kernels import attend_chunk
from spectral_nb.info import stamp

warnings.simplefilter("error", UserWarning)
gpu = not kernels.interpreted()
if gpu: torch.backends.cuda.matmul.allow_tf32 = False # of the reference
BOUND = {torch.float16: 2e-3, torch.bfloat16: 8e-3, torch.float32: 1e-4}


def chunk_of(layer, q, k, v, mask, n, seed):
    "`n` queries, half of them drawn to something old, and a mask: causal, both ways, or with holes and a query that sees nothing."
    gen, past, (B, heads, _, D) = torch.Generator().manual_seed(seed), layer.get_seq_length(), q.shape
    new = [torch.randn(*t.shape[:2], n, D, generator=gen).to(t.dtype).to(t.device) for t in (q, k, v)]
    new[0] = 2 * new[0] + q * (torch.arange(n, device=q.device) % 2)[:, None]
    kind = ("causal", "both", "holes")[seed % 3]
    seen = torch.ones(B, 1, n, past + n, dtype=torch.bool).tril(past + (n if kind == "both" else 0))
    if kind == "holes":
        seen &= torch.rand(B, 1, n, past + n, generator=gen) < .8
        seen[0, 0, n // 2] = False
    seen = seen.to(q.device)
    if mask is not None: seen[..., :past] &= mask[..., :past]
    return (*new, None if kind == "causal" and mask is None else seen), seen.any(-1)[:, 0]


rows = []
for i, name in enumerate(sys.argv[2:] or CASES):
    for dtype in (torch.float16, torch.bfloat16, torch.float32) if gpu else (CASES[name].get("dtype", torch.float32),):
        layer, q, k, v, mask, softcap = case(**{**CASES[name], **(dict(dtype=dtype, device="cuda") if gpu else {})})
        for n, splits in ((33, None), (200, 3), (700, 1)) if gpu else ((40, 1 + i % 3),):
            (*new, m), looks = chunk_of(layer, q, k, v, mask, n, i + n)
            want = attention.attend(layer, *(t.float() for t in new), m, None, softcap)[0]
            few = attend_chunk(layer, *new, m, None, softcap, numbers=2 ** 16, most=1, splits=splits) # parts of heads, rows and queries
            error = max(((got.float() - want)[looks].norm() / want[looks].norm()).item() for got in (few, kernels.attend(layer, *new, m, None, softcap)[0]))
            assert few.isfinite().all() and few.dtype == dtype and not kernels._broken, name
            rows.append(dict(case=name, dtype=str(dtype)[6:], tokens=layer.get_seq_length(), queries=n, splits=splits, error=error))
            print(rows[-1], flush=True)
if gpu: Path(sys.argv[1]).write_text(json.dumps(dict(**stamp("python tests/chunks.py"), rows=rows), indent=1) + "\n")
assert all(r["error"] < BOUND[getattr(torch, r["dtype"])] for r in rows), [r for r in rows if r["error"] >= BOUND[getattr(torch, r["dtype"])]]
