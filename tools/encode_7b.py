"""Time and peak memory of spectral coding beside the prefill of a Mistral-7B shape (random weights), by stage: nbs/results/encode_7b.json.

With the encoding kernel and without. python tools/encode_7b.py [result.json] needs a GPU of 24 GB; `--small` runs a small shape, on a CPU too.
"""
import json
import statistics
import sys
import time
import warnings
from collections import defaultdict

import torch
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig

from spectral_nb import attention, cache, encode_kernels, spectral
from spectral_nb.cache import SpectralCache
from spectral_nb.info import stamp

SMALL, CUDA = "--small" in sys.argv, torch.cuda.is_available()
DEVICE, TOKENS = "cuda" if CUDA else "cpu", 1024 if SMALL else 8192
SHAPE = dict(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
if SMALL: SHAPE |= dict(vocab_size=1000, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2)
STAGES = [(cache.SpectralCache, "fit", "all of the encoding"), (attention, "sample_queries", "sample queries"), (attention, "output_gram", "  Gram of o_proj"), (cache, "check_finite", "finite?"),
          (spectral, "sensitivity", "sensitivity"), (cache, "measure_together", "  with turned sample"), (cache, "fit_bases", "bases (decorrelate)"),
          (spectral, "decorrelate", "  decorrelate alone"), (cache, "allocate", "allocate (CPU)"), (cache, "plan", "steps, quantizers"),
          (spectral, "best_step", "  step search alone"), (cache, "start_together", "code all tokens"), (spectral, "to_anchor", "  turn keys"),
          (spectral.Layout, "pack", "  pack"), (encode_kernels, "launch", "  encoding kernel"), (cache, "to_int8", "hot tokens to int8"), (cache, "add_losses", "losses of keys"), (cache, "settle", "read limits")]


def wait():
    if CUDA: torch.cuda.synchronize()


def peak(): return torch.cuda.max_memory_allocated() if CUDA else 0


def prefill(model, make, ids):
    "Seconds of a prefill and bytes of its peak above what was there before."
    c = make()
    wait()
    if CUDA: torch.cuda.reset_peak_memory_stats()
    base, start = torch.cuda.memory_allocated() if CUDA else 0, time.perf_counter()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(ids, past_key_values=c, logits_to_keep=1)
    wait()
    return time.perf_counter() - start, peak() - base, c


def by_stage(model, make, ids):
    "Milliseconds and calls of every stage, waiting for the device around each: they add up to more than the whole."
    spent, undo = defaultdict(lambda: [0., 0]), []
    def wrap(owner, name, label):
        orig = getattr(owner, name)
        def timed(*args, **kwargs):
            wait(); start = time.perf_counter()
            try: return orig(*args, **kwargs)
            finally: wait(); spent[label][0] += 1e3 * (time.perf_counter() - start); spent[label][1] += 1
        setattr(owner, name, timed); undo.append((owner, name, orig))
    for s in STAGES: wrap(*s)
    try: prefill(model, make, ids)
    finally:
        for s in undo: setattr(*s)
    return [dict(stage=label, ms=round(spent[label][0], 2), calls=spent[label][1]) for _, _, label in STAGES]


def solvers():
    "Milliseconds of `eigh` and of `decorrelate` for batches of 128 by 128 matrices."
    x = torch.randn(512 if CUDA else 8, 256, 128, device=DEVICE)
    c, rows = x.mT @ x, []
    for name, f in dict(eigh=torch.linalg.eigh, decorrelate=spectral.decorrelate, cholesky_ex=torch.linalg.cholesky_ex, bmm=lambda m: m @ m,
                        solve_triangular=lambda m: torch.linalg.solve_triangular(m, m, upper=True, left=False)).items():
        for n in (8, len(c)):
            f(c[:n]); wait(); start = time.perf_counter(); f(c[:n]); wait()
            rows.append(dict(solver=name, batch=n, ms=round(1e3 * (time.perf_counter() - start), 2)))
    return rows


def main():
    config = MistralConfig(**SHAPE, sliding_window=None, max_position_embeddings=131072)
    dtype = torch.float16 if CUDA else torch.float32
    torch.set_default_dtype(dtype)
    with torch.device(DEVICE): model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    torch.set_default_dtype(torch.float32)
    prompt, rows, stages = lambda: torch.randint(0, SHAPE["vocab_size"], (1, TOKENS), device=DEVICE), [], [] # another one each time: nothing is kept of the one before
    weights = [(1., 1.)] * SHAPE["num_hidden_layers"]
    compressed = lambda kernel: lambda: SpectralCache(config, coding="spectral", ratio=8., kernel=kernel, layer_weights=weights)
    codecs = (("dense", "sdpa", lambda: DynamicCache(config=config)), ("spectral:8x, PyTorch", "spectral", compressed("torch")), ("spectral:8x", "spectral", compressed("auto")))
    runs, ratios = defaultdict(list), {}
    for _ in range(2 if SMALL else 8): # in turns
        for name, impl, make in codecs:
            model.set_attn_implementation(impl)
            *run, held = prefill(model, make, prompt())
            runs[name].append(run); ratios[name] = getattr(held, "ratio", 1.)
            del held
    for name, impl, make in codecs:
        rows.append(dict(codec=name, tokens=TOKENS, prefill_ms=round(1e3 * statistics.median(r[0] for r in runs[name][1:]), 1), all_ms=[round(1e3 * r[0], 1) for r in runs[name]],
                         peak_mib_above_weights=round(min(r[1] for r in runs[name][1:]) / 2**20, 1), ratio=round(ratios[name], 3)))
        print(rows[-1], flush=True)
        model.set_attn_implementation(impl)
        if name != "dense": stages += [dict(codec=name, **s) for s in by_stage(model, make, prompt())]
    a, _, b = rows
    summary = dict(encode_ms=round(b["prefill_ms"] - a["prefill_ms"], 1), share_of_prefill_pct=round(100 * (b["prefill_ms"] / a["prefill_ms"] - 1), 1),
                   kernel_used=bool(encode_kernels.encoder.trusted) and not encode_kernels.encoder.failed, peak_mib_above_dense=round(b["peak_mib_above_weights"] - a["peak_mib_above_weights"], 1))
    print(summary, flush=True)
    for s in stages: print(f"{s['codec']:22} {s['stage']:32} {s['ms']:9.2f} ms {s['calls']:5} calls", flush=True)
    del model
    alone = solvers()
    for r in alone: print(r, flush=True)
    path = next((p for p in sys.argv[1:] if not p.startswith("-")), None)
    if path: open(path, "w").write(json.dumps(dict(**stamp(" ".join(["python", "tools/encode_7b.py", *sys.argv[1:]]), device=DEVICE), summary=summary, rows=rows, stages=stages, solvers=alone), indent=1) + "\n")


if __name__ == "__main__": main()
