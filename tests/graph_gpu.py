"A decode graph against single steps, across the ends of pages: `python tests/graph_gpu.py OUT.json [float32] [float16] [bfloat16]`; needs a GPU. Each step also runs by itself on a copy of the cache as the graph found it: the same work, so the bound is tight. A third cache goes its own way from the prompt on: there, roundings of recent tokens to int8 and of pages to few bits fall apart in time, which is shown and not bounded."
import copy
import json
import sys
from pathlib import Path
import torch
from spectral_nb import kernels
from spectral_nb.calibrate import spectral_cache
from spectral_nb.graph import DecodeGraph
from spectral_nb.info import stamp
from spectral_nb.pocket import load_pocket

rows = []
for dtype in [getattr(torch, n) for n in sys.argv[2:] or ("float32", "float16", "bfloat16")]:
    for batch in (1, 3):
        model = load_pocket()[0].to("cuda", dtype)
        model.set_attn_implementation("spectral")
        gen = torch.Generator("cuda").manual_seed(0)
        ids = torch.randint(0, 8192, (batch, 900), device="cuda", generator=gen)
        step = lambda cache, one: model(one, position_ids=torch.full_like(one, cache.get_seq_length()), past_key_values=cache).logits[:, -1].float()
        off = lambda got, want: ((got - want).norm() / want.norm()).item()
        with torch.no_grad():
            a = spectral_cache(model, ratio=6, coding="spectral")
            model(ids, past_key_values=a)
            other = copy.deepcopy(a)
            graph, same, hot, drift = DecodeGraph(model, a), 0., 0., 0.
            for i in range(200):
                one = torch.randint(0, 8192, (batch, 1), device="cuda", generator=gen)
                alone = copy.deepcopy(a)
                got = graph(one).float()
                same, drift = max(same, off(got, step(alone, one))), max(drift, off(got, step(other, one)))
                for x, y in zip(a.layers, alone.layers): hot = max(hot, *(off(s.float(), t.float()) for s, t in zip(x.hot.states(), y.hot.states())))
            graph.release()
        assert not kernels._broken, kernels._broken
        assert a.get_seq_length() == other.get_seq_length() == 1100
        rows.append(dict(dtype=str(dtype), batch=batch, steps=200, captures=graph.captures, same_cache=same, hot_tier=hot, own_way=drift))
        print(rows[-1], flush=True)
Path(sys.argv[1]).write_text(json.dumps(dict(**stamp(" ".join(["python tests/graph_gpu.py OUT.json", *sys.argv[2:]])), rows=rows), indent=1) + "\n")
most = dict(float32=1e-3, float16=2e-3, bfloat16=8e-3) # two units of rounding in float16, one in bfloat16; float32: recent tokens are rounded to int8
for r in rows: assert max(r["same_cache"], r["hot_tier"]) < most[r["dtype"].split(".")[1]] and r["captures"] >= 2, r
