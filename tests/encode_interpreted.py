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
    known = {(torch.device("cpu"), t, D, *n) for t in (torch.float32, torch.float16, torch.bfloat16) for n in (("moments",), ("feelings",), ("outputs", False), ("outputs", True), ("states", False), ("states", True), ("inverse",))} # compared below
    encoder.trusted = set(known)
    gen = torch.Generator().manual_seed(1)
    keys, values = later[:2] if name == "pocket" else (torch.randn(B, H, 128, D, generator=gen) * s.std(2, keepdim=True) + s.mean(2, keepdim=True) for s in (store.key_states(), store.value_states()))
    keys, values = (x.to(layer.dtype)[:, :, None] for x in (keys, values))
    weight = None if CASES.get(name, {}).get("padding") is None else (torch.rand(B, 1, 1, 128, generator=gen) > .3).float()
    want, errors = code_pages([store], keys, values, weight)
    Coded.kernel = encoder
    got, mine = code_pages([store], keys, values, weight)
    assert not encoder.failed and {k[3:] for k in encoder.trusted - known if k[-1] == "page"} == {(b, "page") for b in (False, True)}
    torch.testing.assert_close(mine, errors, rtol=1e-3, atol=1e-6)
    last, angles = store.segments[-1], (*spectral.anchor_angles(len(store), 128, store.table, keys.device), store.table.interleaved)
    n = sum(compare(g, w, c.layout, c.by_byte, edges(c, x[:, :, 0], a)) for g, w, c, x, a in zip(got[0], want[0], (last.keys, last.values), (keys, values), (angles, None)))
    encoder.moments, encoder.attends, encoder.inverse_factor = lambda *args: None, lambda x: False, lambda *args: None # float16 turns bases a little
    again, *_ = make() # the prompt by the kernel
    del encoder.moments, encoder.attends, encoder.inverse_factor
    if name == "group2_batch": # a first layer of rank 0 is not what the others are compared by
        encoder.trusted -= {k for k in encoder.trusted if k[-1] == "page"}
        for c, x, a in zip((last.keys, last.values), (keys, values), (angles, None)):
            none = Coded(spectral.Layout(()), c.basis[:, :, :0], c.scale[:, :, :0], c.offset, c.codes[..., :0], c.by_byte)
            (got, mine), (want, errors) = (spectral.code_together([none, c], x.repeat(1, 1, 2, 1, 1), None, a, k) for k in (True, False))
            torch.testing.assert_close(mine, errors, rtol=1e-3, atol=1e-6)
            assert not got[0].numel() and not encoder.failed
            compare(got[1], want[1], c.layout, c.by_byte, edges(c, x[:, :, 0], a))
    if D <= 128:
        matrix = torch.randn(2, 3 * D, D, generator=gen) * torch.logspace(0, -2, D) * torch.tensor([1e-3, 1e3])[:, None, None]
        inverse = encoder.inverse_factor(matrix := matrix.mT @ matrix, None)
        torch.testing.assert_close(inverse @ matrix @ inverse.mT, torch.eye(D).expand(2, D, D), rtol=0, atol=1e-3)
        assert not inverse.triu(1).any()
        past, cap = torch.randn(2, 2, B, H, 900, D, generator=gen), [None, 5.][name == "padded"] # keys and values of two layers
        v, G, o = torch.randn(2 * B, H, 3 * 128, D, generator=gen), torch.randn(2 * B, H, 3, D, D, generator=gen), torch.randn(2 * B, H, 3, 70, D, generator=gen)
        G, w = G @ G.mT, (torch.rand(2 * B, 1, 768, 1, generator=gen) > .2).float()
        seen = encoder.Seen(torch.randn(2 * B, H, 3 * 70, D, generator=gen) * D ** -.5, [*past[0]], torch.randint(1400, 1900, (2 * B, 70), generator=gen), 1000, cap)
        s = seen.queries @ past[0].flatten(0, 1).mT
        if cap: s = cap * torch.tanh(s / cap)
        a = torch.softmax(s.masked_fill(torch.arange(1000, 1900) > seen.slots.repeat(1, 3)[:, None, :, None], -torch.inf), -1)
        out, sums = encoder.outputs(seen, [*past[1]], None)
        torch.testing.assert_close(out, a @ past[1].flatten(0, 1), rtol=1e-3, atol=1e-3)
        of = lambda x, dim: x.narrow(dim, 0, 768).unflatten(dim, (6, 128)).movedim(dim, 0)[::2].movedim(0, dim)
        for x, y in zip(encoder.feelings(seen, sums, v, G, o @ G, (o @ G * o).sum(-1), w, 2, None), (*spectral._feelings(of(a, 3) * of(w, 2)[:, :, None, ..., 0], v[:, :, None], G, o @ G, o), a[..., :768].sum(2))): torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            w, angles = w[:, :, :640], (*spectral.anchor_angles(0, 640, store.table, w.device), store.table.interleaved)
            for turned in (angles, None):
                x = past[:, 0].to(layer.dtype)
                y = x.flatten(0, 1)[:, :, :640:3].float() if turned is None else spectral.turn(x.flatten(0, 1)[:, :, :640], turned[0], -turned[1], turned[2])[:, :, ::3]
                for a, b in zip(encoder.states([*x], w, 3, 2, turned, None), (*spectral.moments(y, w[:, :, ::3]), y[:, :, ::2])): torch.testing.assert_close(a.float(), b, rtol=1e-2 if layer.dtype == torch.bfloat16 else 2e-3, atol=1e-3)
        queries, felt, pages = torch.randn(B, 3 * H, 70, D, generator=gen).to(layer.dtype), torch.rand(B, 3 * H, 70, 3, generator=gen) ** 4, 128 * torch.arange(3) + 64
        at = spectral.query_at_anchors(queries, 0, 3, store.table)
        for a, b in zip(encoder.moments(queries, felt, (*store.table.rows(pages), store.table.interleaved), None), (torch.einsum("bhpqc,bhpqd,bhqp->bhcd", at, at, felt), torch.einsum("bhpqc,bhpqd->bhcd", at, at))): torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * b.abs().max().item())
    states = [[s.float() for s in o.get_kv()] for o in (layer, again)]
    error = max(((a - b).norm() / a.norm()).item() for a, b in zip(*states))
    assert error < 5e-3 and {k[3:] for k in encoder.trusted - known} == {(b, n) for b in (False, True) for n in ("page", "prompt")} | {("joined",)} | ({("steps",)} if D <= 128 else set()) and not encoder.failed, (error, encoder.trusted)
    print(name, [(s.keys.layout.bits, s.values.layout.bits) for s in store.segments], n, f"{error:.1e}", flush=True)
