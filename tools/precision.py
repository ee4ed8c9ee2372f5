"""PyTorch's path, steps of the decode kernels and the chunk kernel against float64 on the same codes: python tools/precision.py [OUT.json]

test_kernels.py compares PyTorch's path with `truth` on a CPU; rotary pairs are halves apart here.
"""
import json
import sys
from pathlib import Path

import torch

from spectral_nb import attention, kernels
from spectral_nb.chunk_kernels import attend_chunk
from spectral_nb.info import stamp
from spectral_nb.spectral import PAGE, anchor_angles
from spectral_nb.speed import coded_layer


def turn(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def states(coded): return coded.offset.double() + coded.planes().double() @ coded.plane_rows().double()


def truth(layer, q, k, v):
    "`attention.attend` of causal queries, in float64: `[B, q_len, heads, D]`."
    (B, heads, Q, D), H, start, scores, values = q.shape, k.shape[1], 0, [], []
    g = q.double().view(B, H, -1, D)
    for s in layer.cold.segments:
        cos, sin = (t.double() for t in anchor_angles(start, len(s), layer.table, q.device))
        lost = 0.
        if s.loss is not None:
            turned = turn(s.loss.directions.double()[:, :, None], cos[::PAGE, None], sin[::PAGE, None])
            lost = (turned.flatten(2, 3) @ g.mT).square().unflatten(2, (turned.shape[2], -1)).sum(3) + s.loss.rest.double() * g.square().sum(-1)[:, :, None]
            lost = .5 * s.scaling * lost.mT.repeat_interleave(PAGE, 3)
        scores.append(g @ turn(states(s.keys), cos, sin).mT + lost); values.append(states(s.values))
        start += len(s)
    exact = [t.double() for t in attention.exact_parts(layer, k, v)]
    scores, values = torch.cat([*scores, g @ exact[0].mT], -1) * D ** -.5, torch.cat([*values, exact[1]], 2)
    seen = attention.seen_keys(layer, attention.seen_slots(layer, None, Q))[:, 0].repeat(1, heads // H, 1)[:, None]
    return (scores.masked_fill(~seen, -1e300).softmax(-1) @ values).view(B, heads, Q, D).transpose(1, 2)


def compare(tokens, queries, **shape):
    layer, step = coded_layer(1, tokens, 8., **shape)
    new = [t.expand(-1, -1, queries, -1).contiguous() for t in step]
    want = truth(layer, *new)
    ways = dict(pytorch=lambda: attention.attend(layer, *(t.float() for t in new))[0])
    if want.is_cuda: ways |= dict(steps=lambda: kernels.one_by_one(layer, *new, None, None), chunk=lambda: attend_chunk(layer, *new))
    return dict(tokens=tokens, queries=queries, **{n: float(f"{((f().double() - want).norm() / want.norm()).item():.1e}") for n, f in ways.items()})


if __name__ == "__main__":
    gpu = torch.cuda.is_available()
    shape = dict(dtype=torch.float16, device="cuda") if gpu else dict(num_attention_heads=8, num_key_value_heads=2, dtype=torch.float32)
    rows = []
    for tokens in (32768, 131072) if gpu else (1024,):
        for queries in (2, 8, 16):
            rows.append(compare(tokens, queries, **shape))
            print(rows[-1], flush=True)
    if sys.argv[1:]: Path(sys.argv[1]).write_text(json.dumps(dict(**stamp("python tools/precision.py"), rows=rows), indent=1) + "\n")
