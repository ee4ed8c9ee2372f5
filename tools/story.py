"""What the pictures of notebooks 02b and 18 show, measured on one text (part "tune") of 4096 tokens: nbs/results/story_*.json. `python tools/story.py`, a minute on a CPU."""
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from spectral_nb.calibrate import spectral_cache
from spectral_nb.demo import spectra
from spectral_nb.evaluate import prefill
from spectral_nb.info import stamp
from spectral_nb.peers import TurboStore, dequantize_minmax, quantize_minmax
from spectral_nb.codec import SpectralConfig
from spectral_nb.pocket import haystack, load_pocket
from spectral_nb.spectral import GROUP, Coded, Pool, allocate, error_of, moments, spectrum

ROOT = Path(__file__).parent.parent
TOKENS, RATIOS = 4096, (6, 8, 12)


def bits(cache):
    "Bits of each group of 16 components, by layer, keys and values."
    out = []
    for layer in cache.layers:
        s = layer.cold.segments[-1]
        out.append({n: list(c.layout.bits) + [0] * (c.basis.shape[-1] // GROUP - len(c.layout.bits)) for n, c in (("keys", s.keys), ("values", s.values))})
    return out


def water(variance, bits):
    "Mean distortion of Gaussian components at a mean rate, by reverse water-filling: what no code can beat."
    lo, hi = 0., variance.max().item()
    for _ in range(60):
        mid = (lo + hi) / 2
        rate = (.5 * torch.log2(variance / mid)).clamp_min(0).mean().item()
        lo, hi = (mid, hi) if rate > bits else (lo, mid)
    return variance.clamp_max(hi).sum().item()


@torch.no_grad()
def distortion(cache):
    "Relative squared error of values, mean over layers, against bits a number for codes and scales (bases shared by the prompt are left out, as in the theory)."
    curves = {n: [] for n in ("theory", "spectral", "one scale for 32 numbers of a token", "random rotation, Lloyd-Max")}
    for layer in cache.layers:
        x = layer.values.float()
        one = torch.ones_like(x[:, :1, :, :1])
        s = spectrum(*moments(x, one), torch.eye(x.shape[-1]).expand(*x.shape[:2], -1, -1), ridge=0.)
        total, n = error_of(x, s.mean, one).item(), x.shape[2]
        pool = Pool(s.variance.mean((0, 1)), 1., x.shape[1], n)
        pool.overhead = lambda: 0
        for b in (.5, 1, 1.5, 2, 2.5, 3, 4):
            curves["theory"].append((b, sum(water(v, b) for v in s.variance[0]) / x.shape[1] / total))
            layout, = allocate([pool], b * x.shape[1] * n * x.shape[-1])
            coded = Coded.fit(s, x, one, torch.full_like(x[..., :1], 1 / n), layout)
            curves["spectral"].append((b, error_of(x, coded.states(), one).item() / total))
        for b in (2, 3, 4):
            curves["one scale for 32 numbers of a token"].append((b + 1, error_of(x, dequantize_minmax(quantize_minmax(x, b, 32), b), one).item() / total))
            turbo = TurboStore(SpectralConfig(coding="turbo", peer_bits=(b, b)), None)
            curves["random rotation, Lloyd-Max"].append((b + 16 / x.shape[-1], error_of(x, turbo.decode(turbo.encode(x, 1), 1), one).item() / total))
    mean = lambda points: [[b, sum(e for a, e in points if a == b) / sum(a == b for a, _ in points)] for b in sorted({a for a, _ in points})]
    return {n: mean(p) for n, p in curves.items()}


def main():
    pocket, tok = load_pocket()
    qwen3 = AutoModelForCausalLM.from_pretrained(ROOT / "tests" / "models" / "qwen3", dtype=torch.float32).eval()
    ids = tok(haystack("tune")[0], return_tensors="pt", verbose=False).input_ids[:, :TOKENS]
    for name, model in dict(llama=pocket, qwen3=qwen3).items():
        dense, *caches = DynamicCache(config=model.config), *(spectral_cache(model, ratio=r, exact_dtype="float16") for r in RATIOS)
        prefill(model, ids, [dense, *caches])
        result = dict(**stamp("python tools/story.py"), tokens=TOKENS, spectra=spectra(dense, model.config), bits={r: bits(c) for r, c in zip(RATIOS, caches)}, distortion=distortion(dense))
        (ROOT / "nbs" / "results" / f"story_{name}.json").write_text(json.dumps(result, indent=None) + "\n")


if __name__ == "__main__": main()
