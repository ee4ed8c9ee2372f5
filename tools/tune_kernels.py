"What each field of `kernels.Tuning` does to the time of a step, and what each kernel takes: `python tools/tune_kernels.py OUT.json [seconds]`; needs a GPU (elsewhere: a dry run on tiny layers)."
import copy
import json
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median
import torch
from spectral_nb import kernels
from spectral_nb.info import stamp
from spectral_nb.speed import clocks, coded_layer, graph_us

gpu = torch.cuda.is_available()
device = torch.device("cuda" if gpu else "cpu")
SHAPES = ((1, 131072), (8, 32768), (8, 8192), (1, 32768), (1, 8192)) if gpu else ((1, 512),)
FIELDS = dict(pdl=(False,), projections=(264, 528, 1056, 2112), rows=(64, 128), pages=(32, 64, 128), prepare_warps=(4, 8), hot=(16, 32, 64, 128), tokens=(64, 128), programs=(792, 1056, 1584, 2112), stages=(1, 2, 3), merge_warps=(4, 8), parts=(32, 64, 128), dims=(32, 64, 128))
until = time.time() + float(sys.argv[2] if len(sys.argv) > 2 else 240)


def parts_us(call) -> dict:
    "Median time of each kernel, of a step on its own."
    if not gpu: return {}
    for _ in range(3): call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        for _ in range(20): call()
        torch.cuda.synchronize()
    times = defaultdict(list)
    for e in p.events(): times[e.name.split("(")[0]].append(e.device_time)
    return {n: round(median(t), 1) for n, t in times.items() if n in ("prepare", "decode", "merge")}


rows, best = [], {}
for batch, tokens in SHAPES:
    layer, step = coded_layer(batch, tokens, **(dict(dtype=torch.float16) if gpu else dict(num_attention_heads=8, num_key_value_heads=2)), device=device)
    copies = max(2, min(8, 2 * 10 ** 8 // layer.nbytes)) if gpu else 1
    layers, tuning = [layer] + [copy.deepcopy(layer) for _ in range(copies - 1)], kernels.tuning_for(device)
    def us(t): return round(graph_us([lambda l=l: kernels.decode_attention(l, *step, tuning=t) for l in layers], 10), 1) if gpu or kernels.interpreted() else 0.
    least = us(tuning)
    rows.append(dict(batch=batch, tokens=tokens, us=least, layouts=[str(o.layout.bits) for o in (layer.cold.segments[0].keys, layer.cold.segments[0].values)], **parts_us(lambda: kernels.decode_attention(layer, *step, tuning=tuning) if gpu else None)))
    print(rows[-1], flush=True)
    for name, choices in FIELDS.items():
        for c in choices:
            if c == getattr(tuning, name) or time.time() > until: continue
            try: t = us(replace(tuning, **{name: c}))
            except Exception as e: t = f"{type(e).__name__}: {str(e)[:80]}"
            rows.append(dict(batch=batch, tokens=tokens, field=name, value=c, us=t))
            print(rows[-1], flush=True)
            if isinstance(t, float) and t < .98 * least: least, tuning = t, replace(tuning, **{name: c})
    best[f"{batch}x{tokens}"] = dict(us=least, **{n: getattr(tuning, n) for n in FIELDS if getattr(tuning, n) != getattr(kernels.tuning_for(device), n)}, **parts_us(lambda: kernels.decode_attention(layer, *step, tuning=tuning) if gpu else None))
    print("best", best[f"{batch}x{tokens}"], flush=True)
    Path(sys.argv[1]).write_text(json.dumps(dict(**stamp(f"python tools/tune_kernels.py {' '.join(sys.argv[1:])}"), clocks=clocks(), best=best, rows=rows), indent=1) + "\n")
    del layers, layer
