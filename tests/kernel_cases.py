"Layers to decode from, and float32 references; used by tests/test_kernels.py in processes of their own."
import torch
from spectral_nb import attention
from spectral_nb.cache import SpectralLayer
from spectral_nb.codec import SpectralConfig
from spectral_nb.rope import RopeTable
from spectral_nb.spectral import Sample

CASES = dict( # name: settings of `case`
    group4=dict(),
    group1=dict(G=1, H=3),
    group2_batch=dict(B=2, G=2),
    group16=dict(G=16, H=1),
    group7=dict(G=7, H=1),
    dim64=dict(D=64),
    dim80=dict(D=80),
    dim96=dict(D=96, G=2),
    dim256=dict(D=256, H=1),
    float16=dict(dtype=torch.float16),
    bfloat16=dict(dtype=torch.bfloat16, H=1),
    one_bit=dict(bits=.8),
    many_bits=dict(bits=5.5),
    padded=dict(B=3, padding=[0, 100, 300], H=1),
    softcap=dict(softcap=5.),
    interleaved=dict(interleaved=True),
    partial_rotary=dict(rotary=64),
    one_page=dict(T=300),
    segments=dict(segments=2),
    no_landmarks=dict(landmark_count=0),
    many_landmarks=dict(landmark_count=16, D=64),
    group16_dim64=dict(G=16, H=1, D=64, B=2, padding=[0, 100]),
    biased=dict(bias=40.),
    biased_float16=dict(bias=40., dtype=torch.float16, H=1),
)


def case(B=1, H=2, G=4, D=128, T=450, dtype=torch.float32, bits=2., padding=None, softcap=None, interleaved=False, rotary=None, segments=1, bias=0., seed=0, device="cpu", **kw):
    "A filled layer and one step: `(layer, query, key, value, mask, softcap)`; `bias` is one that all keys have in a dimension that turns slowly, as Qwen2's do, and a quarter of it queries."
    gen = torch.Generator().manual_seed(seed)
    r = rotary or D
    table = RopeTable(1e4 ** (-torch.arange(0, r, 2) / r), D, interleaved)
    mix = torch.linalg.qr(torch.randn(D, D, generator=gen))[0]
    slow = bias * (torch.arange(D) == r - 1)
    def states(n): return ((torch.randn(2, B, H, n, D, generator=gen) * torch.logspace(.5, -1, D) + torch.randn(2, 1, H, 1, D, generator=gen)) @ mix + torch.stack([slow, 0 * slow])[:, None, None, None]).to(dtype).to(device)
    layer = SpectralLayer(SpectralConfig(**{"coding": "spectral", "bits": bits, "fit_length": 256, **kw}), table, padding=None if padding is None else torch.tensor(padding, device=device))
    for i in range(segments):
        n = len(layer.cold) + layer.hot_length
        layer.sample = Sample((torch.randn(B, G * H, 64, D, generator=gen) + slow / 4).to(device), torch.arange(n + T - 64, n + T, device=device), torch.eye(D, device=device).expand(G * H, D, D), D ** -.5, softcap)
        if i: layer.cold.drifted = 2
        layer.append(*states(T))
    assert len(layer.cold.segments) == segments
    for _ in range(3): layer.append(*states(1)) # one by one, as decoding does: there is room beyond them
    q = (3 * torch.randn(B, G * H, 1, D, generator=gen) + slow / 4).to(dtype).to(device)
    k, v = ((torch.randn(B, H, 1, D, generator=gen) + x).to(dtype).to(device) for x in (slow, 0 * slow))
    mark = torch.cat([layer.landmark_keys[:, :, -1:], k], 2)[:, :, :1].float()
    q[:, ::2] += (12 * mark / mark.norm(dim=-1, keepdim=True).clamp_min(1e-6)).repeat_interleave(-(-G // 2), 1)[:, :q[:, ::2].shape[1]].to(dtype) # every other head looks at a landmark
    mask = None
    if padding is not None: mask = (torch.arange(layer.get_seq_length() + 1, device=device) >= layer.padding_per_row()[:, None])[:, None, None]
    return layer, q, k, v, mask, softcap


def error(got, layer, q, k, v, mask, softcap, scaling=None):
    "Relative error against the PyTorch path in float32 on the same codes."
    want, _ = attention.attend(layer, q.float(), k.float(), v.float(), mask, scaling, softcap)
    return ((got.float() - want).norm() / want.norm()).item()
