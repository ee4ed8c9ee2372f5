"Run by test_kernels.py with TRITON_INTERPRET=1: several queries at once by the kernels are PyTorch's steps, one after the other."
import copy
import warnings
import torch
from kernel_cases import CASES, case
from transformers import AutoModelForCausalLM, LlamaConfig
from spectral_nb import attention, kernels
from spectral_nb.cache import SpectralCache
from spectral_nb.codec import SpectralConfig

warnings.simplefilter("error", UserWarning)
for name in ("group4", "bfloat16", "padded", "softcap", "segments", "group16_dim64"):
    layer, q, k, v, mask, softcap = case(**CASES[name])
    n, past, gen = 3, layer.get_seq_length(), torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(*t.shape[:2], n, t.shape[3], generator=gen).to(t.dtype) for t in (q, k, v))
    if mask is not None: mask = torch.cat([mask[..., :past].expand(-1, -1, n, -1), torch.ones(len(q), 1, n, n, dtype=torch.bool).tril()], -1)
    single = copy.deepcopy(layer)
    want = []
    for i in range(n):
        new = [t[:, :, i:i + 1] for t in (q, k, v)]
        want.append(attention.attend(single, *(t.float() for t in new), None if mask is None else mask[:, :, i:i + 1, :past + i + 1], None, softcap)[0])
        single.append(*new[1:])
    got = kernels.attend(layer, q, k, v, mask, None, softcap)[0].float()
    assert layer.get_seq_length() == past and layer.hot not in kernels._written and not kernels._broken
    e = ((got - torch.cat(want, 1)).norm() / torch.cat(want, 1).norm()).item()
    layer.append(k, v)
    for a, b in zip(layer.hot.states(), single.hot.states()): assert (a - b).float().norm() < (5e-3 if q.dtype == torch.bfloat16 else 1e-6) * b.float().norm(), name
    print(name, f"{e:.1e}", flush=True)
    assert e < (8e-3 if q.dtype == torch.bfloat16 else 2e-3), name
for name in ("padded", "group2_batch", "group16_dim64"): # a mask may hide from a query its own token, here one that would draw all
    layer, q, k, v, mask, _ = case(**CASES[name])
    mask = torch.ones(len(q), 1, 1, layer.get_seq_length() + 1, dtype=torch.bool) if mask is None else mask.clone()
    mask[-1, ..., -1], k = False, 2 * q[:, :k.shape[1]]
    got, want = (f(layer, q, k, v, mask)[0] for f in (kernels.attend, attention.attend))
    assert ((got - want).flatten(1).norm(dim=1) < 2e-3 * want.flatten(1).norm(dim=1)).all(), name

layer, q, k, v, *_ = case()
for n, both in ((3, True), (kernels.QUERIES + 1, False)): # a query that sees a later token, and more queries than the decode kernels take: PyTorch without `chunk_kernels`
    q, k, v = (t[:, :, :1].expand(-1, -1, n, -1) for t in (q, k, v))
    mask = torch.ones(1, 1, n, layer.get_seq_length() + n, dtype=torch.bool) if both else None
    assert torch.equal(kernels.attend(layer, q, k, v, mask)[0], attention.attend(layer, q, k, v, mask)[0])

config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32, bos_token_id=None, eos_token_id=None, pad_token_id=3)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config, attn_implementation="spectral").eval()
ids = torch.randint(4, 100, (1, 20)).repeat(1, 20)[:, :384]
tokens, lengths, taken = [], [], []
attend = attention.BACKENDS["triton"]
def counted(layer, *states):
    taken.append(states[0].shape[2])
    return attend(layer, *states)
counted.stored, attention.BACKENDS["triton"] = attend.stored, counted
for kernel in ("triton", "torch"):
    cache = SpectralCache(config, SpectralConfig(coding="spectral", bits=6., fit_length=256, hot_buffer_size=16, kernel=kernel))
    tokens.append(model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=6))
    lengths.append((cache.get_seq_length(), len(cache.layers[0].cold)))
print("prompt lookup", sorted(set(taken)), lengths, flush=True)
assert torch.equal(*tokens) and lengths[0] == lengths[1] and max(taken) > 1 and not kernels._broken
