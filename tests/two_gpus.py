"""Layers on a GPU that is not the current one, as `device_map` spreads a model: kernels against PyTorch on the same codes.

`python tests/two_gpus.py OUT.json` on a host with two; run without them, it goes over the same on the CPU.
"""
import copy
import json
import random
import sys
import warnings
from dataclasses import replace
from pathlib import Path
import torch
from kernel_cases import CASES, case, error
from random_models import Pair, random_model
from torch.utils._pytree import tree_map
from spectral_nb import attention, encode_kernels, kernels
from spectral_nb.cache import SpectralCache
from spectral_nb.info import stamp


def layer_on(device, name):
    "Errors of a step, its repetition, a chunk of 40, and a step after pages were coded there."
    layer, q, k, v, mask, softcap = made = case(**{**CASES[name], "dtype": torch.float16, "device": device})
    errors = [error(kernels.attend(layer, q, k, v, mask, None, softcap)[0], *made) for _ in range(2)]
    new, past = [t.expand(-1, -1, 40, -1) for t in (q, k, v)], layer.get_seq_length()
    seen = attention.seen_slots(layer, None, 40)
    if mask is not None: seen = seen & torch.nn.functional.pad(mask[..., :past], (0, 40), value=True)
    want, got = attention.attend(layer, *(t.float() for t in new), seen, None, softcap)[0], kernels.attend(layer, *new, seen, None, softcap)[0]
    looks = seen.any(-1)[:, 0]
    layer.append(*(torch.randn(*k.shape[:2], 300, k.shape[3]).half().to(device) for _ in range(2)))
    made = layer, q, k, v, None if mask is None else torch.nn.functional.pad(mask, (0, 300), value=True), softcap
    return *errors, ((got.float() - want)[looks].norm() / want[looks].norm()).item(), error(kernels.attend(layer, q, k, v, made[4], None, softcap)[0], *made)


@torch.no_grad()
def model_over(devices, seed):
    "A random model whose second layer is elsewhere: largest difference of logits over some operations."
    r = random.Random(seed)
    torch.manual_seed(seed)
    while True:
        model, made = random_model(r, (64, 128), torch.float16 if devices[1] != "cpu" else torch.float32, devices[0])
        if made["family"] in ("llama", "qwen3", "mistral", "phi3", "granite"): break
    def move(device): return lambda module, args, kwargs: tree_map(lambda t: t.to(device) if isinstance(t, torch.Tensor) else t, (args, kwargs))
    model.model.layers[1].to(devices[1]).register_forward_pre_hook(move(devices[1]), with_kwargs=True)
    model.model.norm.register_forward_pre_hook(move(devices[0]), with_kwargs=True)
    a = SpectralCache(model.config, coding="spectral", layer_weights=[(1., 1.)] * 2, ratio=5., hot_buffer_size=64)
    pair = Pair(model, torch.ones(2, 700, dtype=torch.long, device=devices[0]), a)
    pair.mask[1, :130] = 0
    pair.worst = float("-inf")
    model(pair.some(700), attention_mask=pair.mask, past_key_values=a)
    assert [str(o.device) for o in a.layers] == list(devices)
    b = copy.deepcopy(a)
    for o in b.layers: o.config = replace(o.config, kernel="torch")
    pair.caches = a, b
    for name in "steps chunk page long step reorder steps crop step".split(): getattr(pair, name)(r, 128)
    return dict(**made, worst=pair.worst)


if __name__ == "__main__":
    gpus, rows = torch.cuda.device_count(), []
    if gpus: torch.backends.cuda.matmul.allow_tf32 = False # of the reference

    def note(row):
        rows.append(row)
        print(row, flush=True)
        assert not gpus or torch.cuda.current_device() == 0
        assert not kernels._broken and not encode_kernels.encoder.failed, (kernels._broken, encode_kernels.encoder.failed)
        Path(sys.argv[1]).write_text(json.dumps(dict(**stamp("python tests/two_gpus.py"), gpus=gpus, rows=rows), indent=1) + "\n") # after each, as time may be up

    warnings.simplefilter("error", UserWarning)
    for name in ("group4", "padded", "softcap", "dim96"):
        for device in ("cuda:1", "cuda:0", "cuda:1") if gpus else ("cpu",): note(dict(case=name, device=device, errors=layer_on(device, name)))
    warnings.simplefilter("ignore")
    for seed in range(4 if gpus else 1): note(model_over(("cuda:0", "cuda:1") if gpus else ("cpu", "cpu"), seed))
    assert all(max(r["errors"]) < 2e-3 if "case" in r else r["worst"] < .03 for r in rows), rows
