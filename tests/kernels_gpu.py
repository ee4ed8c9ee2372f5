"Every case on a GPU: `python tests/kernels_gpu.py OUT.json [case ...]`; prints and writes errors against the PyTorch path in float32 on the same codes."
import json
import sys
from dataclasses import replace
from pathlib import Path
import torch
from kernel_cases import CASES, case, error
from spectral_nb import kernels
from spectral_nb.info import stamp

rows = []
for name in sys.argv[2:] or CASES:
    for dtype in (torch.float16, torch.bfloat16):
        layer, q, k, v, mask, softcap = made = case(**{**CASES[name], "dtype": dtype, "device": "cuda"})
        poison = [t.fill_(float("nan")) for t in kernels.scratch.held.values() if t.is_floating_point()]
        got, _ = kernels.attend(layer, q, k, v, mask, None, softcap)
        assert not kernels._broken, kernels._broken
        e, again = error(got, *made), kernels.attend(layer, q, k, v, mask, None, softcap)[0]
        large = kernels.decode_attention(layer, q, k, v, None if mask is None else mask[:, 0, 0].view(torch.uint8), None, softcap, replace(kernels.tuning_for(q.device), projections=1))
        rows.append(dict(case=name, dtype=str(dtype), tokens=layer.get_seq_length(), error=max(e, error(large, *made)), repeats=bool((got == again).all())))
        print(rows[-1], flush=True)
Path(sys.argv[1]).write_text(json.dumps(dict(**stamp("python tests/kernels_gpu.py"), rows=rows), indent=1) + "\n")
assert all(r["error"] < (8e-3 if "bfloat" in r["dtype"] else 2e-3) for r in rows)
