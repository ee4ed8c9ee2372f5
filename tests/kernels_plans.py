"Run by test_kernels.py with TRITON_INTERPRET=1, and on a GPU by `python tests/kernels_plans.py cuda`: launches that a layer keeps follow all that can happen to it."
import copy
import sys
import torch
from kernel_cases import case, error
from spectral_nb import kernels

small = kernels.Tuning(tokens=64, programs=6, pages=16, projections=8)
place = dict(device="cuda", dtype=torch.float16) if "cuda" in sys.argv else {}
layer, q, k, v, *_ = case(B=2, T=420, **place)
gen = torch.Generator().manual_seed(3)
states = lambda *shape: torch.randn(*shape, generator=gen).to(**place)


def check(what, layer):
    e = error(kernels.decode_attention(layer, q, k, v, None, None, None, small), layer, q, k, v, None, None)
    print(what, f"{e:.1e}", flush=True)
    assert e < 2e-3, what


for i in range(3):
    check(f"step {i}", layer)
    layer.append(*(states(2, 2, 1, 128) for _ in range(2)))
q1, k1, v1 = (states(2, h, 1, 128) for h in (8, 2, 2))
twin = copy.deepcopy(layer)
kernels.attend(layer, q1, k1, v1) # writes the token on the way
assert kernels.stored(layer, k1)
kernels.HotTier.write, write = None, kernels.HotTier.write
twin.append(k1, v1)
kernels.HotTier.write = write
for a, b in zip(layer.hot.states(), twin.hot.states()): assert a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-2)
check("written on the way", layer)
layer.reorder_cache(torch.tensor([1, 0], device=q.device))
check("reordered", layer)
for idx in ([1, 1], [0, 1]): layer.reorder_cache(torch.tensor(idx, device=q.device))
check("reordered twice", layer)
check("copied", copy.deepcopy(layer))
layer.crop(-3)
check("cropped", layer)
for _ in range(130): layer.append(*(states(2, 2, 1, 128) for _ in range(2)))
check("a page longer", layer)
other, *_ = case(B=2, T=900, seed=1, **place)
check("after a longer layer", layer)
check("a longer layer", other)
check("and back", layer)
tables = kernels.layout_tables.cache_info().currsize
kernels.layout_tables.cache_clear() # whoever needs a table keeps it
junk = [states(64, 64, 64) for _ in range(8)]
check("tables forgotten", layer)
layer.hot.values = layer.hot.values.clone()
k1 = states(2, 2, 1, 128)
layer.append(k1, 2 * k1)
for a, b in zip(layer.hot.states(layer.hot.n - 1), (k1, 2 * k1)): assert torch.allclose(a.float(), b.float(), atol=5e-2), "values moved alone"
check("values moved alone", layer)
if place: # two streams at once
    both, outs = [torch.cuda.Stream() for _ in range(2)], [[], []]
    torch.cuda.synchronize()
    for i in range(100):
        for stream, l, out in zip(both, (layer, other), outs):
            with torch.cuda.stream(stream): out.append(kernels.decode_attention(l, q, k, v, None, None, None, small))
    torch.cuda.synchronize()
    for l, out in zip((layer, other), outs):
        check("one stream", l)
        assert all(torch.equal(o, out[0]) for o in out) and error(out[0], l, q, k, v, None, None) < 2e-3, "two streams"
assert tables and not kernels._broken
print("done")
