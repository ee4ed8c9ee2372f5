"Run by test_kernels.py with TRITON_INTERPRET=1: the encoding kernel against PyTorch, later pages and prompts, every layout and head_dim that kernel_cases.py knows."
import sys
import warnings
import numpy as np
import torch
from kernel_cases import CASES, case
from triton import language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from transformers import DynamicCache
from spectral_nb import spectral
from spectral_nb.cache import SpectralLayer
from spectral_nb.codec import SpectralConfig
from spectral_nb.encode_kernels import encoder
from spectral_nb.rope import rope_table
from spectral_nb.spectral import Coded, code_pages, from_pages

warnings.simplefilter("error", UserWarning)
dot, number = InterpreterBuilder.create_dot, lambda o: TensorHandle((o.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if o.dtype.scalar == tl.bfloat16 else o
InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, number(a), number(b), *rest) # Triton's own multiplies the bits of bfloat16


def compare(got, want, layout, by_byte, edge):
    "Codes are equal but for coefficients within 1e-3 of a cell's edge."
    a, b = (layout.combine(layout.unpack(from_pages(p, layout.nbytes, by_byte))) for p in (got, want))
    differ = a != b
    assert not differ.any() or (edge[differ].abs().max() < 1e-3 and (a - b).abs().max() <= 1), (differ.sum(), edge[differ].abs().max())
    return differ.sum().item()


def edges(coded, x, angles):
    "How far each coefficient is from the edge of a cell."
    if angles is not None: x = spectral.turn(x, angles[0], -angles[1], angles[2])
    y = (x.float() - coded.offset) @ spectral.analysis_together([coded])[3][:, :, 0].mT[..., :coded.layout.rank]
    return (y + .5 - torch.round(y + .5))


@torch.no_grad()
def pocket_layer(tokens=700):
    "The middle layer of the pocket model, which has read a text, and the text's later states."
    from spectral_nb.pocket import haystack, load_pocket
    model, tok = load_pocket()[:2]
    cache = DynamicCache(config=model.config)
    model(tok(haystack("tune")[0], return_tensors="pt").input_ids[:, :tokens + 128], past_key_values=cache, logits_to_keep=1)
    layer, held = SpectralLayer(SpectralConfig(bits=2.), rope_table(model.config)), cache.layers[3]
    layer.append(held.keys[:, :, :tokens], held.values[:, :, :tokens])
    n = len(layer.cold)
    return layer, *(s[:, :, n:n + 128, :] for s in (held.keys, held.values))


for name in sys.argv[1:] or [*CASES, "pocket"]:
    Coded.kernel = None
    make = pocket_layer if name == "pocket" else lambda: case(**CASES[name])
    layer, *later = make()
    store, (B, H, _, D) = layer.cold, layer.landmark_keys.shape
    known = {(torch.device("cpu"), t, D, n) for t in (torch.float32, torch.float16, torch.bfloat16) for n in ("moments", "feelings")} # compared below
    encoder.trusted = set(known)
    gen = torch.Generator().manual_seed(1)
    keys, values = later[:2] if name == "pocket" else (torch.randn(B, H, 128, D, generator=gen) * s.std(2, keepdim=True) + s.mean(2, keepdim=True) for s in (store.key_states(), store.value_states()))
    keys, values = (x.to(layer.dtype)[:, :, None] for x in (keys, values))
    weight = None if CASES.get(name, {}).get("padding") is None else (torch.rand(B, 1, 1, 128, generator=gen) > .3).float()
    want, errors = code_pages([store], keys, values, weight)
    Coded.kernel = encoder
    got, mine = code_pages([store], keys, values, weight)
    assert not encoder.failed and len(encoder.trusted - known) == 2
    torch.testing.assert_close(mine, errors, rtol=1e-3, atol=1e-6)
    last, angles = store.segments[-1], (*spectral.anchor_angles(len(store), 128, store.table, keys.device), store.table.interleaved)
    n = sum(compare(g, w, c.layout, c.by_byte, edges(c, x[:, :, 0], a)) for g, w, c, x, a in zip(got[0], want[0], (last.keys, last.values), (keys, values), (angles, None)))
    encoder.moments = encoder.feelings = lambda *args: None # float16 turns bases a little
    again, *_ = make() # the prompt by the kernel
    del encoder.moments, encoder.feelings
    if D <= 128:
        a, v, G, o = torch.rand(B, H, 3 * 70, 900, generator=gen), torch.randn(B, H, 3 * 128, D, generator=gen), torch.randn(1, H, 3, D, D, generator=gen), torch.randn(B, H, 3, 70, D, generator=gen)
        G, w = G @ G.mT, (torch.rand(B, 1, 768, 1, generator=gen) > .2).float()
        of = lambda x, dim: x.narrow(dim, 0, 768).unflatten(dim, (6, 128)).movedim(dim, 0)[::2].movedim(0, dim)
        for x, y in zip(encoder.feelings(a, v, G, o @ G, (o @ G * o).sum(-1), w, 2, None), spectral._feelings(of(a, 3) * of(w, 2)[:, :, None, ..., 0], v[:, :, None], G, o @ G, o)): torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)
        queries, felt, pages = torch.randn(B, 3 * H, 70, D, generator=gen).to(layer.dtype), torch.rand(B, 3 * H, 70, 3, generator=gen) ** 4, 128 * torch.arange(3) + 64
        at = spectral.query_at_anchors(queries, 0, 3, store.table)
        for a, b in zip(encoder.moments(queries, felt, (*store.table.rows(pages), store.table.interleaved), None), (torch.einsum("bhpqc,bhpqd,bhqp->bhcd", at, at, felt), torch.einsum("bhpqc,bhpqd->bhcd", at, at))): torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * b.abs().max().item())
    states = [[s.float() for s in o.get_kv()] for o in (layer, again)]
    error = max(((a - b).norm() / a.norm()).item() for a, b in zip(*states))
    assert error < 5e-3 and len({k[3:] for k in encoder.trusted - known}) == 4 + (D <= 128) and not encoder.failed, (error, encoder.trusted)
    print(name, [(s.keys.layout.bits, s.values.layout.bits) for s in store.segments], n, f"{error:.1e}", flush=True)
