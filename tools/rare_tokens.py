"""How far the keys and values of a planted code's tokens are off, beside those of all other tokens: nbs/results/rare_tokens.json.

python tools/rare_tokens.py OUT.json [--trials=8] [--seed=1]
"""
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import torch
from spectral_nb import evaluate
from spectral_nb.cli import load_model
from spectral_nb.info import stamp
from spectral_nb.pocket import haystack

option = lambda name, default: next((int(a.split("=")[1]) for a in sys.argv[1:] if a.startswith(f"--{name}=")), default)
specs, rows = ("spectral:8x", "spectral:10x", "spectral:12x"), []
for name in ("pocket", "tests/models/qwen3"):
    model, tok = load_model(name)
    found = defaultdict(list)
    for t in evaluate.make_trials(tok, haystack("report"), 4096, option("trials", 8), 1, 256, option("seed", 1)):
        dense, *caches = (evaluate.new_cache(s, model) for s in ("dense", *specs))
        evaluate.prefill(model, torch.tensor([t.ids], device=model.device), [dense, *caches])
        code = tok(" " + t.needles[0].code, add_special_tokens=False).input_ids
        at = next(i for i in range(len(t.ids)) if t.ids[i:i + len(code)] == code)
        for spec, cache in zip(specs, caches):
            for i, (coded, exact) in enumerate(zip(cache.layers, dense.layers)):
                n = len(coded.cold)
                if at + len(code) > n: continue
                for kv, got, want in zip(("keys", "values"), coded.get_kv(), (exact.keys, exact.values)):
                    off = ((got - want).norm(dim=-1) / want.norm(dim=-1))[0, :, :n]
                    found[spec, i, kv].append((off.median(-1).values.mean().item(), off[:, at:at + len(code)].mean().item()))
    for (spec, layer, kv), pairs in sorted(found.items()):
        every, mine = (statistics.mean(p) for p in zip(*pairs))
        rows.append(dict(model=name, codec=spec, layer=layer, of=kv, prompts=len(pairs), median_token=round(every, 3), code_tokens=round(mine, 3), times=round(mine / every, 2)))
        print(rows[-1], flush=True)
Path(sys.argv[1]).write_text(json.dumps(dict(**stamp(" ".join(["python", "tools/rare_tokens.py", *sys.argv[1:]])), rows=rows), indent=1) + "\n")
