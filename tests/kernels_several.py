"Run by test_kernels.py with TRITON_INTERPRET=1: several queries at once by the kernels are PyTorch's steps, one after the other."
import copy
import warnings
import torch
from kernel_cases import CASES, case
from spectral_nb import attention, kernels

warnings.simplefilter("error", UserWarning)
for name in ("group4", "bfloat16", "padded", "softcap", "segments", "group16_dim64"):
    layer, q, k, v, mask, softcap = case(**CASES[name])
    n, past, gen = 3, layer.get_seq_length(), torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(*t.shape[:2], n, t.shape[3], generator=gen).to(t.dtype) for t in (q, k, v))
    if mask is not None: mask = torch.cat([mask[..., :past].expand(-1, -1, n, -1), torch.ones(len(q), 1, n, n, dtype=torch.bool).tril()], -1)
    single = copy.deepcopy(layer)
    want = []
    for i in range(n):
        new = [t[:, :, i:i + 1] for t in (q, k, v)]
        want.append(attention.attend(single, *(t.float() for t in new), None if mask is None else mask[:, :, i:i + 1, :past + i + 1], None, softcap)[0])
        single.append(*new[1:])
    got = kernels.attend(layer, q, k, v, mask, None, softcap)[0].float()
    assert layer.get_seq_length() == past and layer.hot not in kernels._written and not kernels._broken
    e = ((got - torch.cat(want, 1)).norm() / torch.cat(want, 1).norm()).item()
    layer.append(k, v)
    for a, b in zip(layer.hot.states(), single.hot.states()): assert (a - b).float().norm() < (5e-3 if q.dtype == torch.bfloat16 else 1e-6) * b.float().norm(), name
    print(name, f"{e:.1e}", flush=True)
    assert e < (8e-3 if q.dtype == torch.bfloat16 else 2e-3), name
layer, q, k, v, *_ = case()
for n, both in ((3, True), (17, False)): # a query that sees a later token, and more queries than the kernels take
    q, k, v = (t[:, :, :1].expand(-1, -1, n, -1) for t in (q, k, v))
    mask = torch.ones(1, 1, n, layer.get_seq_length() + n, dtype=torch.bool) if both else None
    assert torch.equal(kernels.attend(layer, q, k, v, mask)[0], attention.attend(layer, q, k, v, mask)[0])
