"A decode graph against single steps, across the ends of pages, beside what rounding alone does (the same steps with every row twice): `python tests/graph_gpu.py OUT.json`; needs a GPU."
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
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for batch in (1, 3):
        model = load_pocket()[0].to("cuda", dtype)
        model.set_attn_implementation("spectral")
        gen = torch.Generator("cuda").manual_seed(0)
        ids = torch.randint(0, 8192, (batch, 900), device="cuda", generator=gen)
        with torch.no_grad():
            a = spectral_cache(model, ratio=6, coding="spectral")
            model(ids, past_key_values=a)
            b, c = copy.deepcopy(a), copy.deepcopy(a) # fits of their own may differ in a width
            c.batch_repeat_interleave(2)
            off = lambda got, want: ((got - want).norm() / want.norm()).item()
            graph, worst, rounding = DecodeGraph(model, a), 0., 0.
            for i in range(200):
                one = torch.randint(0, 8192, (batch, 1), device="cuda", generator=gen)
                got = graph(one).float()
                at = torch.full_like(one, b.get_seq_length())
                want = model(one, position_ids=at, past_key_values=b).logits[:, -1].float()
                twice = model(one.repeat_interleave(2, 0), position_ids=at.repeat_interleave(2, 0), past_key_values=c).logits[::2, -1].float()
                worst, rounding = max(worst, off(got, want)), max(rounding, off(twice, want))
            graph.release()
        assert not kernels._broken, kernels._broken
        assert a.get_seq_length() == b.get_seq_length() == 1100
        rows.append(dict(dtype=str(dtype), batch=batch, steps=200, captures=graph.captures, worst_difference=worst, rounding=rounding))
        print(rows[-1], flush=True)
Path(sys.argv[1]).write_text(json.dumps(dict(**stamp("python tests/graph_gpu.py"), rows=rows), indent=1) + "\n")
assert all(r["worst_difference"] < 1e-2 and r["captures"] >= 2 for r in rows)
