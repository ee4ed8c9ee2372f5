"""Random models, batches and operations: a lossless cache against a dense one, and on a GPU kernels against PyTorch on the same codes.

`python tests/random_models.py OUT.json SECONDS [SEED]` needs a GPU; test_random.py runs a few on the CPU, test_kernels.py one with kernels in the interpreter.
"""
import copy
import json
import random
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from kernel_cases import error
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from spectral_nb import attention, chunk_kernels, encode_kernels, kernels # noqa: F401 (registers itself)
from spectral_nb.cache import SpectralCache, SpectralLayer
from spectral_nb.codec import SpectralConfig
from spectral_nb.graph import DecodeGraph
from spectral_nb.info import stamp

FAMILIES = "cohere gemma gemma2 gemma3_text glm granite llama mistral olmo2 phi phi3 qwen2 qwen3 stablelm".split()
WIDE = "cohere granite olmo2 phi phi3 qwen2 stablelm".split() # head_dim is hidden_size over heads
HEADS = (4, 1), (4, 2), (6, 2), (7, 1), (8, 2), (8, 8), (12, 2), (16, 1)
ROPE = None, None, dict(rope_type="llama3", factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=1024), dict(rope_type="linear", factor=2.)
OPERATIONS = "step step steps page chunk long crop reorder select repeat copy".split()


def random_model(r, dims, dtype, device):
    family, (heads, kv), D = r.choice(FAMILIES), r.choice(HEADS), r.choice(dims)
    settings = dict(hidden_size=heads * (D if family in WIDE else 32), vocab_size=300, intermediate_size=256, num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=kv,
                    max_position_embeddings=8192, bos_token_id=None, eos_token_id=None, pad_token_id=3, tie_word_embeddings=False)
    if family not in WIDE: settings["head_dim"] = D
    if family in ("llama", "mistral", "qwen2", "qwen3") and (rope := r.choice(ROPE)): settings["rope_parameters"] = dict(rope, rope_theta=1e4)
    if family == "granite": settings["attention_multiplier"] = D ** -.5
    if family.startswith("gemma") and family != "gemma": settings |= dict(query_pre_attn_scalar=D, sliding_window=64, layer_types=["sliding_attention", "full_attention"])
    if family == "mistral": settings["sliding_window"] = None
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="spectral").eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1: p.normal_(0, p.shape[-1] ** -.5)
    return model.to(device).to(dtype), dict(family=family, heads=heads, kv_heads=kv, head_dim=D)


class Pair:
    "Two caches of one model that take the same calls, and how far their logits have been apart."
    def __init__(self, model, mask, *caches): self.model, self.mask, self.caches, self.worst = model, mask, caches, 0.

    def feed(self, ids, new=True):
        "More tokens of each row."
        if new: self.mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
        self.note(*(self.model(ids, attention_mask=self.mask, position_ids=(self.mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1]:], past_key_values=c).logits for c in self.caches))

    def note(self, got, want):
        off = (got.float() - want.float()).norm(dim=-1) / want.float().norm(dim=-1)
        self.worst = max(self.worst, off[self.mask[:, -off.shape[1]:] > 0].mean().item())

    def some(self, n): return torch.randint(4, 300, (len(self.mask), n), device=self.mask.device)

    def step(self, r, page): self.feed(self.some(1))
    def steps(self, r, page):
        for _ in range(r.choice([7, 20])): self.feed(self.some(1))
    def page(self, r, page):
        for _ in range(page + 12): self.feed(self.some(1))
    def chunk(self, r, page): self.feed(self.some(r.choice([2, 5, page - 1, page + 1])))
    def long(self, r, page): self.feed(self.some(r.choice([2, 5]) * page + r.choice([0, 17])))
    def copy(self, r, page): self.caches = [copy.deepcopy(c) for c in self.caches]

    def crop(self, r, page):
        if not all(isinstance(o, SpectralLayer) for o in self.caches[0].layers): return # windows have forgotten
        n = r.choice([1, 3, page // 2, page + 9])
        for c in self.caches: c.crop(-n)
        self.mask = self.mask[:, :-n]

    def reorder(self, r, page):
        rows = torch.tensor([r.randrange(len(self.mask)) for _ in self.mask], device=self.mask.device)
        for c in self.caches: c.reorder_cache(rows)
        self.mask = self.mask[rows]

    def select(self, r, page):
        rows = torch.tensor(sorted(r.sample(range(len(self.mask)), max(1, len(self.mask) - 1))), device=self.mask.device)
        for c in self.caches: c.batch_select_indices(rows)
        self.mask = self.mask[rows]

    def repeat(self, r, page):
        if len(self.mask) > 3: return
        for c in self.caches: c.batch_repeat_interleave(2)
        self.mask = self.mask.repeat_interleave(2, 0)

    def graph(self, r, page):
        "Steps in a CUDA graph against single ones."
        a, b = self.caches
        if not self.mask.all() or not all(isinstance(o, SpectralLayer) for o in a.layers): return
        graph = DecodeGraph(self.model, a)
        for _ in range(r.choice([4, page + 12])):
            ids = self.some(1)
            self.mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
            self.note(graph(ids).clone()[:, None], self.model(ids, past_key_values=b).logits)


@contextmanager
def checked(errors):
    "Each attention by kernels once more by PyTorch in float32, of the same queries to the same codes: relative errors by what was called."
    inner = attention.BACKENDS["triton"]
    def both(layer, q, k, v, mask=None, scaling=None, softcap=None):
        out = inner(layer, q, k, v, mask, scaling, softcap)
        if q.is_cuda and torch.cuda.is_current_stream_capturing(): return out
        name = "step" if q.shape[2] == 1 else "few" if q.shape[2] <= kernels.QUERIES else "chunk"
        errors[name] = max(errors.get(name, 0.), error(out[0], layer, q, k, v, mask, softcap, scaling))
        return out
    attention.BACKENDS["triton"] = both
    try: yield errors
    finally: attention.BACKENDS["triton"] = inner


@torch.no_grad()
def case(seed, device="cpu"):
    "What was made, what was done, how far logits were apart and how far attention was at most."
    r, gpu = random.Random(seed), device == "cuda"
    fast, page, dims, dtypes, sizes, names = gpu or kernels.interpreted(), 128, (64, 80, 96, 128, 256), [torch.float16, torch.bfloat16, torch.float32], [4, 5, 8, 16], OPERATIONS
    if gpu: names = [*names, "graph"]
    elif fast: dims, dtypes, sizes, names = dims[:4], dtypes[::2], sizes[:2], [o for o in names if o != "page"] # the interpreter takes its time, and multiplies the bits of bfloat16
    else: page, dims = 32, (16, 32)
    torch.manual_seed(seed)
    dtype = r.choice(dtypes) if fast else torch.float32
    model, made = random_model(r, dims, dtype, device)
    B, n = r.choice([1, 1, 2, 3]), r.choice(sizes) * page + r.choice([8, 63, 127])
    mask = torch.ones(B, n, dtype=torch.long, device=device)
    for row in mask[1:]: row[:r.choice([0, 3, page + 1, n - page // 4])] = 0
    common = dict(hot_buffer_size=page // 2, landmark_count=r.choice([0, 4, 16]))
    if fast: a = SpectralCache(model.config, coding="spectral", layer_weights=[(1., 1.)] * 2, **(dict(ratio=r.choice([3., 5., 8., 10.])) if r.random() < .7 else dict(bits=r.choice([1., 2., 4.]))), **common)
    else: a = SpectralCache(model.config, SpectralConfig.lossless(made["head_dim"], coding="rank", block_size=page, **common))
    b = DynamicCache(config=model.config)
    pair = Pair(model, mask, a, b)
    pair.feed(pair.some(n), new=False)
    if fast: # the same codes, by PyTorch
        b = copy.deepcopy(a)
        for o in b.layers:
            if isinstance(o, SpectralLayer): o.config = replace(o.config, kernel="torch")
        pair.caches = a, b
    done = [r.choice(names) for _ in range(8)]
    with checked({}) as errors:
        for name in done: getattr(pair, name)(r, page)
    return dict(seed=seed, **made, dtype=str(dtype)[6:], rows=B, tokens=n, padding=(n - mask.sum(1)).tolist(), done=done, worst=pair.worst, errors=errors)


def wrong(row):
    "What is further off than its kind may be. A few candidates are steps, which read those before them as int8; PyTorch as they are."
    coarse = row["dtype"] == "bfloat16"
    limits = dict(step=(2e-3, 8e-3)[coarse], chunk=(2e-3, 8e-3)[coarse], few=.015, worst=.01 if row["dtype"] == "float32" else .03) # of logits more: pages are coded by kernels in one cache and by PyTorch in the other
    return {name: e for name, e in [*row.get("errors", {}).items(), ("worst", row["worst"])] if not e < limits[name]} | ({"failed": row["failed"]} if row["failed"] else {})


if __name__ == "__main__":
    out, seconds, seed = Path(sys.argv[1]), float(sys.argv[2]), int((sys.argv + [0])[3])
    rows, start = [], time.time()
    warnings.simplefilter("ignore")
    while time.time() - start < seconds:
        rows.append(dict(case(seed, "cuda" if torch.cuda.is_available() else "cpu"), failed=[str(d) for d in (*kernels._broken, *encode_kernels.encoder.failed)]))
        kernels._broken.clear(); encode_kernels.encoder.failed.clear()
        if wrong(rows[-1]): print(rows[-1], flush=True)
        seed += 1
        out.write_text(json.dumps(dict(**stamp("python tests/random_models.py"), rows=rows), indent=1) + "\n")
    print(len(rows), "cases, worst", max(o["worst"] for o in rows))
