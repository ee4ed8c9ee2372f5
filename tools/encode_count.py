"""What coding a prompt, and a page of all layers, asks of a GPU, counted without one: launches, arithmetic, bytes moved and peak memory by stage, on tensors that have shapes and no numbers.

python tools/encode_count.py [result.json] [--tokens=8192] [--layers=32] [--batch=1] [--torch] [--once] [--names [--bytes]]: without the Triton kernel; without a first pass that makes tables; each operation. The milliseconds are what 8 us a launch on the host, 2.5 TB/s, 40 TFLOP/s in float32 and 400 in float16 come to: an estimate, no measurement. The check for finite states is left out.
"""
import json
import sys
import warnings
from collections import Counter as Counts, defaultdict
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig

from encode_7b import STAGES
from spectral_nb import attention, cache, encode_kernels, spectral
from spectral_nb.cache import SpectralCache
from spectral_nb.info import stamp

HOST_US, BANDWIDTH, FLOPS, HALF_FLOPS = 8., 2.5e12, 40e12, 400e12
FREE = {"prim::device"} | {"aten::" + n for n in "view reshape slice transpose t permute expand unsqueeze squeeze select split split_with_sizes unbind alias detach as_strided _unsafe_view unfold diagonal empty new_empty empty_like empty_strided lift_fresh chunk narrow".split()}


class Counter(TorchDispatchMode):
    "Counts what is dispatched, by stage, and the bytes of storages that are alive."
    def __init__(self): super().__init__(); self.names = Counts(); self.rows, self.stages, self.live, self.now, self.peak, self.at, self.base = defaultdict(lambda: dict(ops=0, flops=0, bytes=0, us=0.)), ["all"], {}, 0, 0, "", 0

    def __enter__(self): Counter.current = self; return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        ins, outs = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in ((args, kwargs), out))
        for t in outs: self.hold(t)
        if func._schema.name not in FREE:
            packet = func._overloadpacket
            self.add(func._schema.name, ins, outs, flop_registry[packet](*(a for a in args if not isinstance(a, torch.dtype)), **(kwargs or {}), out_val=out) if packet in flop_registry else 0, outs[0].dtype if outs else None)
        return out

    def add(self, name, ins, outs, flops, dtype):
        "One operation."
        moved = sum(t.numel() * t.element_size() for t in ins + outs)
        self.names[self.stages[-1], name] += moved / 1e9 if "--bytes" in sys.argv else 1
        for stage in set(self.stages):
            r = self.rows[stage]
            r["ops"] += 1; r["flops"] += flops; r["bytes"] += moved; r["us"] += max(HOST_US, 1e6 * max(moved / BANDWIDTH, flops / (HALF_FLOPS if dtype in (torch.float16, torch.bfloat16) else FLOPS)))

    def hold(self, t):
        s = t.untyped_storage()
        ref = StorageWeakRef(s)
        if ref.cdata not in self.live: self.live[ref.cdata] = ref, s.nbytes(); self.now += s.nbytes()
        if self.now > self.peak:
            self.live = {k: v for k, v in self.live.items() if not v[0].expired()}
            self.now = sum(n for _, n in self.live.values())
            if self.now > self.peak: self.peak, self.at = self.now, " < ".join(self.stages[::-1])

    @contextmanager
    def watching(self, stages):
        undo = []
        for owner, name, label in stages:
            def counted(*args, inner=getattr(owner, name), label=label, **kwargs):
                self.stages.append(label)
                try: return inner(*args, **kwargs)
                finally: self.stages.pop()
            undo.append((owner, name, getattr(owner, name)))
            setattr(owner, name, counted)
        try: yield
        finally:
            for o in undo: setattr(*o)


class Launches(encode_kernels.Encoder):
    "The kernels, believed; a launch counts as one operation that reads its inputs and writes its results."
    def can(self, x, layouts): return any(l.rank for l in layouts)

    def here(self, x): return True

    def measures(self, x): return True

    def run(self, x, kind, by_kernel, by_torch, same): return by_kernel()


class Kernel:
    def __init__(self, name, flops): self.name, self.flops = name, flops

    def __getitem__(self, grid): return self

    def __call__(self, *args, **kw): Counter.current.add(self.name, [], [t for t in args if isinstance(t, torch.Tensor)], self.flops(args, kw), torch.float16)


def given(pools, budget, floor=0.):
    "In place of `allocate`, which reads variances: what Mistral's shape gets at 8x, about."
    return [spectral.Layout((4, 3, 3, 2, 2, 1, 1) if i % 2 else (5, 4, 3, 2, 2, 1, 1)) for i, _ in enumerate(pools)]


def unread():
    "What a GPU would do otherwise: its choices of dtypes and sizes, and reads of the device, which have no answer here."
    encode_kernels.encode, cache.HotTier.write = Kernel("encode", lambda args, kw: 3 * 2 * args[0].numel() * kw["D"]), lambda tier, *new: True # a launch each
    encode_kernels.query_moments, encode_kernels.try_steps = Kernel("query_moments", lambda args, kw: 2 * 2 * args[4].numel() * kw["D"] ** 2), Kernel("try_steps", lambda args, kw: 0)
    encode_kernels.query_attends, encode_kernels.query_shares = Kernel("query_attends", lambda args, kw: 4 * args[5].numel() * args[18]), Kernel("query_shares", lambda args, kw: 2 * args[0].numel() * args[15])
    encode_kernels.state_moments = Kernel("state_moments", lambda args, kw: 2 * args[7].numel() // 8 * args[14])
    encode_kernels.query_feels = Kernel("query_feels", lambda args, kw: 2 * args[10].numel() * spectral.PAGE * kw["D"] * 3)
    encode_kernels.copy_rows, encode_kernels.invert_bases = Kernel("copy_rows", lambda args, kw: 0), Kernel("invert_bases", lambda args, kw: 3 * args[5].numel() * kw["RP"])
    encode_kernels.invert_factor = Kernel("invert_factor", lambda args, kw: args[0].numel() * kw["D"])
    FakeTensor.is_cuda, FakeTensor.data_ptr = property(lambda self: True), lambda self: 0
    spectral.most_numbers = cache.most_numbers = lambda device, gpu, cpu: gpu
    spectral.Coded.kernel = Launches() if "--torch" not in sys.argv else None
    cache.allocate, cache.check_finite = given, lambda layer, most: None
    cache.settle = lambda stores: [setattr(o.segments[-1], "limits", (1e9, 1e9)) for o in stores]
    def add_pages(stores, pages, errors):
        grown = spectral.joined([[c.codes, p] for o, new in zip(stores, pages) for c, p in zip((o.segments[-1].keys, o.segments[-1].values), new)])
        for o, *new in zip(stores, grown[::2], grown[1::2]): o.segments[-1].keys.codes, o.segments[-1].values.codes = new
    cache.add_pages = spectral.add_pages = add_pages
    class Stand(SimpleNamespace): # a subclass of Tensor cannot be made of such tensors
        def __init__(self, layer, like, length): super().__init__(layer=layer, shape=(*like.shape[:2], length, like.shape[3]))
    cache.CompressedStates = attention.CompressedStates = Stand
    cache.SpectralLayer.last_special = property(lambda self: self.config.landmark_count - 1)


def count(tokens, layers, batch=1, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128):
    "Rows for dense prefill, prefill with coding, and the step that codes a page."
    config = MistralConfig(vocab_size=32000, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, sliding_window=None, max_position_embeddings=131072)
    out = {}
    unread()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = torch.get_default_dtype()
        torch.set_default_dtype(torch.float16)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
        torch.set_default_dtype(old)
        ids = torch.randint(0, 32000, (batch, tokens))
        for name, impl, make in (("dense", "sdpa", lambda: DynamicCache(config=config)), ("spectral", "spectral", lambda: SpectralCache(config, coding="spectral", ratio=8., layer_weights=[(1., 1.)] * layers))):
            model.set_attn_implementation(impl)
            for _ in range(1 if "--once" in sys.argv else 2): # the second time tables are there
                c = Counter()
                for t in (*model.parameters(), *model.buffers()): c.hold(t)
                c.base = c.now
                with c, c.watching(STAGES if impl == "spectral" else []):
                    held = make()
                    model(ids, past_key_values=held, logits_to_keep=1)
            out[name] = c
        page = [(cache, "freeze_page", "a page of all layers"), (cache, "code_pages", "  codes"), (cache, "add_pages", "  added"), (cache.HotTier, "drop", "  hot tokens dropped")]
        new = [torch.randn(batch, kv_heads, 1, head_dim, dtype=torch.float16) for _ in range(2)]
        for _ in range(2):
            c = out["page"] = Counter()
            for o in held.layers: o.hot.reserve(o.config.hot_buffer_size + o.cold.page); o.hot.n = o.config.hot_buffer_size + o.cold.page - 1
            before = sum(len(o.cold) for o in held.layers)
            with c, c.watching(page):
                for o in held.layers: o.append(*new)
            assert sum(len(o.cold) for o in held.layers) == before + layers * spectral.PAGE
    return out


def main():
    option = lambda name, default: next((int(a.split("=")[1]) for a in sys.argv[1:] if a.startswith(f"--{name}=")), default)
    tokens, layers, batch = option("tokens", 8192), option("layers", 32), option("batch", 1)
    got = count(tokens, layers, batch)
    mib, one = 2 ** 20, 2 * tokens * batch * 8 * 128 * 2
    summary = dict(tokens=tokens, layers=layers, batch=batch, one_layer_mib=one / mib, dense_peak_mib=round((got["dense"].peak - got["dense"].base) / mib, 1), spectral_peak_mib=round((got["spectral"].peak - got["spectral"].base) / mib, 1), peak_mib_above_dense=round((got["spectral"].peak - got["dense"].peak) / mib, 1),
                   dense_peak_at=got["dense"].at, spectral_peak_at=got["spectral"].at, page_mib=round(got["page"].peak / mib, 1))
    rows = [dict(stage=label, ops=r["ops"], gflop=round(r["flops"] / 1e9, 1), gb=round(r["bytes"] / 1e9, 2), estimated_ms=round(r["us"] / 1e3, 2)) for c in (got["spectral"], got["page"]) for label, r in c.rows.items()]
    for r in [summary, *rows]: print(r, flush=True)
    if "--names" in sys.argv: print(*(f"{n:8.2f} {stage}: {name}" for c in (got["spectral"], got["page"]) for (stage, name), n in c.names.most_common() if stage != "all" or c is got["page"]), sep="\n")
    path = next((p for p in sys.argv[1:] if not p.startswith("-")), None)
    if path: open(path, "w").write(json.dumps(dict(**stamp(" ".join(["python", "tools/encode_count.py", *sys.argv[1:]])), summary=summary, rows=rows), indent=1) + "\n")


if __name__ == "__main__": main()
