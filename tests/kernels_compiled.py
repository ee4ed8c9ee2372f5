"Run by test_kernel_builds.py without a GPU: every kernel builds for sm_75, sm_80 and sm_90; prints registers, stack and shared memory."
import re
import subprocess
import sys
from pathlib import Path
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernel_cases import CASES, case
from spectral_nb import chunk_kernels, encode_kernels, kernels
from spectral_nb.spectral import anchor_angles

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64"}
cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


CHUNKS = "group4", "group1", "dim64", "dim80", "dim96", "dim256", "bfloat16", "softcap" # the rest differ in numbers only


class Compiled:
    "Stands in for a kernel: a launch compiles it for `arch` and notes what it takes."
    rows, arch, seen = [], None, set()

    def __init__(self, fn): self.fn = fn

    def __getitem__(self, grid): return self.launch

    def launch(self, *args, num_warps=4, num_stages=3, launch_pdl=False, maxnreg=None, **kw):
        sig, attrs = {}, {}
        for i, (n, v) in enumerate(zip(self.fn.arg_names, args)):
            sig[n] = "*" + TYPES[v.dtype] if isinstance(v, torch.Tensor) else "fp32" if isinstance(v, float) else "i32"
            if isinstance(v, torch.Tensor) or (isinstance(v, int) and v % 16 == 0 and not self.fn.params[i].do_not_specialize): attrs[(i,)] = [["tt.divisibility", 16]] # as a launch would find
        key = self.fn.__name__, self.arch, str(sig), str(attrs), str(kw), num_warps, maxnreg
        if key in self.seen: return
        self.seen.add(key)
        k = triton.compile(ASTSource(self.fn, {**sig, **dict.fromkeys(kw, "constexpr")}, kw, attrs=attrs), target=GPUTarget("cuda", self.arch, 32), options=dict(num_warps=num_warps, num_stages=num_stages, launch_pdl=launch_pdl, maxnreg=maxnreg))
        path = Path(sys.argv[1]) / f"{self.fn.__name__}.cubin"
        path.write_bytes(k.asm["cubin"])
        used = subprocess.run([cuobjdump, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
        regs, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", used).groups())
        self.rows.append(dict(kernel=self.fn.__name__, arch=self.arch, case=self.case, shared=k.metadata.shared, registers=regs, stack=stack))
        print(self.rows[-1], flush=True)


for name in ("prepare", "decode", "decode_gemv", "merge"): setattr(kernels, name, Compiled(getattr(kernels, name)))
for name in ("encode", "query_attends", "query_shares", "query_feels", "state_moments", "query_moments", "try_steps", "copy_rows", "invert_factor", "invert_bases"): setattr(encode_kernels, name, Compiled(getattr(encode_kernels, name)))
for name in ("rebuild", "chunk"): setattr(chunk_kernels, name, Compiled(getattr(chunk_kernels, name)))
encoder = encode_kernels.Encoder()
encoder.here, encoder.measures, encoder.run = lambda x: True, lambda x: x.shape[-1] <= 128 and Compiled.arch > 75, lambda x, kind, by_kernel, *_: by_kernel()
for name in sys.argv[2:] or CASES:
    for arch, tuning in ((75, kernels.T4), (80, kernels.Tuning()), (90, kernels.Tuning(multiprocessors=1, prepare_registers=(160, 128), pdl=True))):
        layer, q, k, v, mask, softcap = case(**CASES[name])
        if arch == 75 and (q.dtype == torch.bfloat16 or q.shape[-1] > 128): continue # no such type there; refused by `unsupported` and `Encoder.can`
        Compiled.arch, Compiled.case, store, encode_kernels.tuning_for = arch, name, layer.cold, lambda device: tuning
        cos, sin = anchor_angles(0, len(store), store.table, q.device)
        for c, x, turned in ((store.segments[-1].keys, store.key_states(), encode_kernels.factors((cos, sin, store.table.interleaved), q.shape[-1])), (store.segments[-1].values, store.value_states(), None)):
            x = x.to(torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float16 if name != "group1" else torch.float32)
            for offset in (None, c.offset): encode_kernels.launch([x], (c.layout,), *encode_kernels.pseudo_inverses([c], c.offset[:, :, None]), [c.basis], [c.scale], offset, c.by_byte, None if mask is None else [torch.ones(len(q), 1, x.shape[2], 1)], turned, arch == 75)
        encoder.joined([[c.codes, c.codes] for c in (store.segments[-1].keys, store.segments[-1].values)], 0, None)
        encoder.inverse_factor(torch.eye(q.shape[-1]).expand(2, -1, -1), None)
        encoder.moments(q.expand(-1, -1, 64, -1), torch.ones(*q.shape[:2], 64, 2), (cos[::128][:2], sin[::128][:2], store.table.interleaved), None)
        v, G, o, own, w = (torch.ones(2, 2, *s, dtype=kind) for s, kind in (((256, q.shape[-1]), x.dtype), ((4, q.shape[-1], q.shape[-1]), torch.float32), ((4, 64, q.shape[-1]), torch.float32), ((4, 64), torch.float32), ((256, 1), torch.float32)))
        if encoder.measures(v) and v.dtype != torch.float32: seen = encoder.Seen(v, [v], torch.ones(2, 64, dtype=torch.long), 0, softcap); encoder.feelings(seen, encoder.outputs(seen, [v], None)[1], v, G, o, own, w[:, :1], 1, None); encoder.states([v], w[:, :1], 2, 2, (*anchor_angles(0, 256, store.table, q.device), store.table.interleaved), None)
        encoder.steps(*(torch.ones(2, 2, n, d) for n, d in ((512, q.shape[-1]), (512, 1), (1, q.shape[-1]), (1, q.shape[-1]))), torch.ones(8), None)
        kernels.decode_attention(layer, q, k, v, None if mask is None else mask[:, 0, 0].view(torch.uint8), None, softcap, tuning)
        if arch == 75 or name not in CHUNKS: continue # none there
        chunk_kernels.large, at = lambda device: arch == 90, len(Compiled.rows)
        for n, cap in ((8, softcap), (40, softcap), (40, 5.)): chunk_kernels.attend_chunk(layer, *(t.expand(-1, -1, n, -1).to(t.dtype if name in ("group4", "bfloat16") else torch.float16) for t in (q, k, k)), None, None, cap)
        for r in Compiled.rows[at:]: assert r["shared"] <= (101376 if arch == 80 else 232448), r # a consumer card's, an H100's
for r in Compiled.rows:
    if r["arch"] == 75 or r["kernel"] in ("encode", "try_steps"): assert r["shared"] <= 48 * 1024, r
    assert r["stack"] <= (768 if r["arch"] == 75 else 512 if r["case"] == "interleaved" else 256), r # spilled bytes a thread
