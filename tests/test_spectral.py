"Spectral coding: packed round trips, lossless limits, and attention from codes against attention over rebuilt states."
import copy
import math
import random
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_nb import cache, spectral
from spectral_nb.attention import attend
from spectral_nb.cache import SpectralCache, SpectralLayer, freeze_page
from spectral_nb.codec import SpectralConfig
from spectral_nb.evaluate import attention_implementation, parse_spec
from spectral_nb.rope import RopeTable
from spectral_nb.spectral import GROUP, PLANES, WIDTHS, Layout, Loss, Pool, Sample, allocate, pack, planes_of, unpack

settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("ci")


@given(st.sampled_from(PLANES), st.integers(1, 6), st.integers(0, 99))
def test_packing_round_trip(width, groups, seed):
    codes = torch.randint(0, 2 ** width, (3, 5, groups * GROUP), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, width)
    assert packed.nbytes == codes.numel() * width // 8
    assert torch.equal(unpack(packed, width), codes)


@given(st.lists(st.sampled_from(WIDTHS[1:]), max_size=8), st.integers(0, 99))
def test_layout_round_trip(bits, seed):
    layout, gen = Layout(tuple(sorted(bits, reverse=True))), torch.Generator().manual_seed(seed)
    codes = torch.cat([torch.randint(0, 2 ** b, (2, 7, GROUP), dtype=torch.uint8, generator=gen) for b in layout.bits] or [torch.zeros(2, 7, 0, dtype=torch.uint8)], -1)
    packed = layout.pack(codes)
    assert packed.shape[-1] == layout.nbytes
    assert torch.equal(layout.combine(layout.unpack(packed)), codes.float())


def test_planes_add_up():
    for b in WIDTHS: assert sum(w for w, _ in planes_of(b)) == b


@given(st.integers(1, 4), st.floats(0.3, 6.), st.integers(0, 99))
def test_allocation_keeps_its_budget(n, bits, seed):
    gen = torch.Generator().manual_seed(seed)
    pools = [Pool(torch.rand(64, generator=gen).sort(descending=True).values, float(torch.rand(1, generator=gen)) + 1e-3, 4, 2048) for _ in range(n)]
    budget = bits * n * 64 * 4 * 2048
    layouts = allocate(pools, budget)
    spent = sum(GROUP * p.rows * (sum(l.bits) * p.tokens + len(l.bits) * p.overhead()) for p, l in zip(pools, layouts))
    assert spent <= budget
    step = GROUP * 4 * (2 * 2048 + pools[0].overhead())
    assert spent > budget - step or all(sum(l.bits) == 8 * 64 // GROUP for l in layouts)


def one_step_at_a_time(pools, budget, floor):
    "What `allocate` does, each group and each step alone."
    import numpy as np
    from spectral_nb.spectral import DISTORTION
    if budget < sum(p.rows * p.tokens * len(p.variance) for p in pools): floor = 0.
    widths, cost, rate, least, owner = np.array(WIDTHS, float), [], [], [], []
    for i, p in enumerate(pools):
        groups = p.variance.double().view(-1, GROUP).sum(-1).numpy() * p.weight * p.rows
        for j, v in enumerate(groups):
            cost.append(v * np.array([DISTORTION[b] for b in WIDTHS])); rate.append((widths * p.tokens + p.overhead() * (widths > 0)) * GROUP * p.rows)
            least.append(int(j < floor * len(groups))); owner.append(i)
    if sum(r[l] for r, l in zip(rate, least)) <= budget:
        for c, l in zip(cost, least): c[:l] = np.inf
    choose = lambda x: [int((c + 2. ** x * r).argmin()) for c, r in zip(cost, rate)]
    lo, hi, dear, pick = -200., 200., choose(-200.), choose(200.)
    while hi - lo > 1e-9 and dear != pick:
        mid = choose((lo + hi) / 2)
        if sum(r[k] for r, k in zip(rate, mid)) > budget: lo, dear = (lo + hi) / 2, mid
        else: hi, pick = (lo + hi) / 2, mid
    def step(among, way, most=np.inf):
        "The group to whom a step up gives most, or one down costs least, for each bit."
        found = [(way * (cost[g][pick[g]] - cost[g][pick[g] + way]) / (rate[g][pick[g] + way] - rate[g][pick[g]]), g) for g in among
                 if 0 <= pick[g] + way < len(widths) and rate[g][pick[g] + way] - rate[g][pick[g]] <= most and np.isfinite(cost[g][pick[g] + way])]
        if not found: return False
        pick[max(found, key=lambda o: (o[0], -o[1]))[1]] += way
        return True
    for i, p in enumerate(pools):
        mine = [g for g, o in enumerate(owner) if o == i]
        bits = lambda: sum(widths[pick[g]] for g in mine)
        way = 1 if bits() % p.unit > p.unit / 2 else -1
        while bits() % p.unit: way = way if step(mine, way) else -way
    free, spent = [g for g, o in enumerate(owner) if pools[o].unit == 1], lambda: sum(r[k] for r, k in zip(rate, pick))
    while spent() > budget and step(free, -1): pass
    while step(free, 1, budget - spent()): pass
    return [Layout(tuple(sorted((int(widths[k]) for k, o in zip(pick, owner) if o == i and k), reverse=True))) for i in range(len(pools))]


@given(st.integers(1, 5), st.sampled_from([.05, .4, .9, 1.5, 3.3, 9.]), st.sampled_from([0., .5, 1.]), st.integers(0, 99))
def test_allocation_is_that_of_single_steps(n, bits, floor, seed):
    gen = torch.Generator().manual_seed(seed)
    pools = [Pool((4 * torch.randn(64, generator=gen)).exp().sort(descending=True).values, float(torch.rand(1, generator=gen)) + 1e-3, 4, 128 * (1 + i), i // 2, 1 if i % 2 else 2 + 2 * (seed % 2)) for i in range(2 * n)] # where keys come in fours, they can take more than the budget at first
    budget = bits * sum(p.rows * p.tokens * 64 for p in pools) + .5
    assert allocate(pools, budget, floor) == one_step_at_a_time(pools, budget, floor)


def filled(B=1, H=2, T=900, D=32, dtype=torch.float32, padding=None, seed=0, sample=True, **kw):
    "A layer with structured states: few strong directions, slow drift, queries that attend."
    gen = torch.Generator().manual_seed(seed)
    table = RopeTable(1e4 ** (-torch.arange(0, D, 2) / D), D)
    mix = torch.linalg.qr(torch.randn(D, D, generator=gen))[0]
    kv = (torch.randn(2, B, H, T, D, generator=gen) * torch.logspace(.5, -1, D) @ mix).to(dtype)
    layer = SpectralLayer(SpectralConfig(**{"coding": "spectral", "bits": 3., **kw}), table, padding=padding)
    if sample: layer.sample = Sample(torch.randn(B, 2 * H, 64, D, generator=gen), torch.arange(T - 64, T), torch.eye(D).expand(2 * H, D, D), D ** -.5)
    layer.append(*kv)
    return layer, *kv


@pytest.mark.parametrize("B,padding", [(1, None), (3, [0, 100, 300])])
@pytest.mark.parametrize("q_len,D", [(1, 32), (5, 64), (1, 128)])
def test_attention_from_codes(B, padding, q_len, D):
    "Scores by anchors and values by codes equal those of rebuilt states, apart from the stated correction."
    layer, keys, values = filled(B, D=D, padding=None if padding is None else torch.tensor(padding))
    layer.cold.segments[0].loss = None
    gen = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(B, h, q_len, D, generator=gen) for h in (4, 2, 2))
    T = keys.shape[2]
    mask = torch.arange(T + q_len) <= T + torch.arange(q_len)[:, None]
    mask = mask & (torch.arange(T + q_len) >= layer.padding_per_row()[:, None, None])
    got, _ = attend(layer, q, k, v, mask[:, None])
    K, V = (torch.cat([a, b], 2).repeat_interleave(2, 1) for a, b in zip(layer.get_kv(), (k, v)))
    p = torch.softmax((q @ K.mT * D ** -.5).masked_fill(~mask[:, None], -1e30), -1)
    torch.testing.assert_close(got, (p @ V).transpose(1, 2), atol=3e-4, rtol=3e-3)


def test_more_bits_less_error():
    errors = []
    for bits in (1., 2., 4., 7.9):
        layer, keys, values = filled(bits=bits)
        errors.append(((layer.get_kv()[1] - values).norm() / values.norm()).item())
    assert all(a > b for a, b in zip(errors, errors[1:])) and errors[-1] < .02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_are_what_is_held(dtype):
    layer, keys, _ = filled(dtype=dtype)
    kinds = {n: t.dtype for (tier, n), t in layer.tensors().items() if tier == "cold"}
    assert kinds["keys_codes"] == kinds["values_codes"] == torch.uint8 and kinds["keys_basis"] == torch.int8
    seg = layer.cold.segments[0]
    assert seg.keys.codes.nbytes == 2 * len(seg) * seg.keys.layout.nbytes
    assert layer.hot.keys.dtype == torch.int8
    assert layer.get_kv()[0].dtype == dtype


def test_streaming_pages_share_the_basis():
    layer, keys, values = filled(T=900)
    n, basis = len(layer.cold), layer.cold.segments[0].keys.basis
    gen = torch.Generator().manual_seed(0)
    for _ in range(300): layer.append(keys[:, :, 100:101], values[:, :, 100:101])
    assert len(layer.cold) > n and len(layer.cold.segments) == 1 and layer.cold.segments[0].keys.basis is basis
    assert layer.hot_length < 64 + 128


def test_a_bad_token_is_noticed_before_it_is_coded():
    "A NaN that came alone, while nothing was coded, stops the page that would hold it."
    layer, keys, values = filled(T=900)
    layer.append(torch.full_like(keys[:, :, :1], torch.nan), values[:, :, :1])
    with pytest.raises(ValueError, match="not finite"):
        for _ in range(300): layer.append(keys[:, :, 100:101], values[:, :, 100:101])


def test_a_prompt_that_finds_no_memory_leaves_no_layer_half_coded(monkeypatch):
    "Layers that were coded before are whole; the others hold all of their tokens, and are coded by the next call."
    layers, calls, start = [filled(seed=i, T=300, fit_length=512)[0] for i in range(3)], [], cache.start_together
    for l in layers: l.on_full = lambda layer: None
    for l in layers: l.append(*torch.randn(2, 1, 2, 500, 32, generator=torch.Generator().manual_seed(0)))
    def fails(*args):
        calls.append(args)
        if len(calls) == 2: raise torch.cuda.OutOfMemoryError("no memory")
        start(*args)
    monkeypatch.setattr(cache, "start_together", fails)
    with pytest.raises(torch.cuda.OutOfMemoryError): cache.fit_layers(layers)
    done, *rest = layers
    (segment,) = done.cold.segments
    assert isinstance(segment.loss, Loss) and isinstance(segment.limits, tuple) and done.get_seq_length() == 800 and done.nbytes
    assert all((len(l.cold), l.hot_length) == (0, 800) for l in rest)
    cache.fit_layers(rest)
    assert all(len(l.cold) == len(done.cold) and l.get_seq_length() == 800 for l in rest)


@pytest.mark.parametrize("pad", [760, 850])
def test_a_row_of_mostly_padding_is_coded_as_well_later(pad):
    "A short prompt beside a long one: none, or few, of its tokens are among those that bases are fitted to."
    layer, keys, values = filled(B=2, padding=torch.tensor([0, pad]))
    n = len(layer.cold)
    assert n == 768
    for i in range(150): layer.append(keys[:, :, i:i + 1], values[:, :, i:i + 1])
    assert len(layer.cold) > n and len(layer.cold.segments) == 1
    for got, want in zip(layer.get_kv(), (keys, values)):
        error = (got[:, :, :900] - want)[:, :, pad:896].flatten(1).norm(dim=1) / want[:, :, pad:896].flatten(1).norm(dim=1)
        assert error[1] < 1.5 * error[0] < .75, error


@pytest.mark.parametrize("padding,settings", [([600], {}), ([600, 650], {}), ([250], dict(fit_length=1)), (None, dict(landmark_count=256, hot_buffer_size=256))])
def test_bases_wait_for_tokens_that_say_something(padding, settings):
    "A prompt of little but padding, in all rows, or of landmarks is no measure of the tokens after it."
    layer, keys, values = filled(B=len(padding or [0]), T=1400, bits=6., padding=padding and torch.tensor(padding), sample=False, **settings)
    parts = SpectralLayer(layer.config, layer.table, padding=layer.padding)
    for n in (slice(0, 400), *(slice(i, i + 1) for i in range(400, 1400))): parts.append(keys[:, :, n], values[:, :, n])
    assert len(parts.cold) >= 1024
    for i, pad in enumerate(padding or [0]):
        for got, want in zip(parts.get_kv(), (keys, values)): assert (got - want)[i, :, pad:].norm() < .4 * want[i, :, pad:].norm()


def test_no_token_has_to_stay_exact():
    "A prompt of whole pages goes cold to its last token."
    layer, keys, _ = filled(T=512, hot_buffer_size=0)
    assert (len(layer.cold), layer.hot_length) == (512, 0) and (layer.get_kv()[0] - keys).norm() < .5 * keys.norm()
    for i in range(130): layer.append(keys[:, :, i:i + 1], keys[:, :, i:i + 1])
    assert (len(layer.cold), layer.hot_length) == (640, 2) and torch.equal(layer.get_kv()[0][:, :, :4], keys[:, :, :4])


@pytest.mark.parametrize("fault", ["not finite", "no memory"])
def test_a_page_that_cannot_be_added_changes_nothing(fault, monkeypatch):
    "Codes, recent tokens and drift counts of all layers stay as they were; without the fault, the same page is coded."
    layers = [filled(seed=i)[0] for i in range(3)]
    for l in layers:
        l.on_page, l.cold.drifted, l.cold.segments[-1].limits = lambda layer: None, 1, (math.inf, math.inf)
        for _ in range(128): l.append(torch.ones(1, 2, 1, 32), torch.ones(1, 2, 1, 32))
    held = lambda: [t.clone() for l in layers for t in l.tensors().values()]
    before, good, bad = held(), layers[1].hot.values_scale.clone(), layers[1].hot.values_scale
    if fault == "not finite": bad[:, :, 5] = torch.nan
    else:
        calls = []
        def joined(parts, *args):
            calls.append(parts)
            if len(calls) == 4: raise torch.cuda.OutOfMemoryError("no memory")
            return [torch.cat(p, 2) for p in parts]
        monkeypatch.setattr(spectral, "ADD_BYTES", 1)
        monkeypatch.setattr(spectral, "joined", joined)
    with pytest.raises((ValueError, torch.cuda.OutOfMemoryError), match=fault): freeze_page(layers)
    bad.copy_(good)
    for a, b in zip(before, held(), strict=True): assert torch.equal(a, b)
    assert all(t.is_contiguous() for l in layers for t in l.cold.tensors().values()) and all(l.cold.drifted == 1 for l in layers)
    monkeypatch.undo()
    n = len(layers[0].cold)
    freeze_page(layers)
    assert all((len(l.cold), l.get_seq_length(), l.cold.drifted) == (n + 128, 1028, 0) for l in layers)


@pytest.mark.parametrize("op", ["token", "chunk", "crop", "rank"])
def test_a_layer_that_is_stopped_midway_is_as_before_or_after(op):
    "Whichever operation of PyTorch finds no memory: no token counts that is not there, and none is there twice."
    from torch.utils._python_dispatch import TorchDispatchMode
    class Stop(TorchDispatchMode):
        def __init__(self, at):
            super().__init__()
            self.left = at
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.left -= 1
            if not self.left: raise torch.cuda.OutOfMemoryError("injected")
            return func(*args, **(kwargs or {}))
    layer, keys, values = filled(T=600, bits=6., sample=False)
    if op == "rank":
        layer = SpectralLayer(SpectralConfig.lossless(32, block_size=32), layer.table)
        layer.append(keys, values)
    n = dict(token=1, chunk=300, rank=100, crop=-300)[op]
    run = lambda l: l.append(keys[:, :, :n], values[:, :, :n]) if n > 0 else l.crop(n)
    done, i = copy.deepcopy(layer), 0
    run(done)
    while True:
        one, i = copy.deepcopy(layer), i + (3 if op in ("chunk", "rank") else 1)
        try:
            with Stop(i) as stop: run(one)
        except torch.cuda.OutOfMemoryError: pass
        if stop.left > 0: break
        want = done if one.get_seq_length() == done.get_seq_length() else layer
        assert one.get_seq_length() == want.get_seq_length()
        for a, b in zip(one.get_kv(), want.get_kv()): assert (a - b).norm() < .3 * b.norm()
    assert i > 5


@pytest.mark.parametrize("padded", [False, True])
def test_layers_code_a_page_together(padded):
    "What a cache codes for all layers at once is what each would code alone; a layer that takes no tokens holds the others up for one page only."
    from transformers import LlamaConfig
    config = LlamaConfig(vocab_size=64, hidden_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=64)
    gen, mask = torch.Generator().manual_seed(0), torch.cat([torch.zeros(1, 200 if padded else 0), torch.ones(1, 700 - (200 if padded else 0))], 1)
    cache = SpectralCache(config, attention_mask=mask, bits=1.5, drift=1e6, fit_length=300)
    states = torch.randn(3, 2, 1, 2, 1100, 64, generator=gen) * torch.stack([torch.logspace(.5, -i, 64) for i in (0, 1, 3)])[:, None, None, None, None]
    for layer, (k, v) in zip(cache.layers, states): layer.append(k[:, :, :600], v[:, :, :600])
    cache.layers[1].add_landmarks(torch.tensor([650]))
    alone = copy.deepcopy(cache.layers)
    for o in alone: o.on_page = lambda layer: layer.freeze(layer.cold.page)
    for i in range(600, 1100):
        before = len(cache.layers[0].cold)
        for layer, one, (k, v) in zip(cache.layers, alone, states):
            one.append(k[:, :, i:i + 1], v[:, :, i:i + 1])
            assert len(cache.layers[0].cold) == before # until the last layer has its token
            layer.append(k[:, :, i:i + 1], v[:, :, i:i + 1])
    assert len({o.cold.segments[0].keys.layout.rank for o in alone}) > 1
    for a, b in zip(cache.layers, alone):
        assert len(a.cold) == len(b.cold) > 800
        for x, y in zip((*a.get_kv(), a.landmark_keys), (*b.get_kv(), b.landmark_keys)): torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    n = len(cache.layers[0].cold)
    for i in range(300): cache.layers[0].append(states[0, 0, :, :, :1], states[0, 1, :, :, :1])
    assert len(cache.layers[0].cold) > n


@pytest.mark.parametrize("turns", [[600, *[1] * 200, 600], [1] * 900])
def test_layers_stay_in_step(turns):
    "A call is counted once, however many layers have taken it, and layers whose bases no longer fit from different pages on do not wait for one another for ever."
    from transformers import LlamaConfig
    config, gen = LlamaConfig(vocab_size=64, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=64), torch.Generator().manual_seed(0)
    cache, turning = SpectralCache(config, ratio=4.), 1 in turns[:1]
    for i, n in enumerate([1000, *turns]):
        for j in range(3): cache.update(*torch.randn(2, 1, 2, n, 32, generator=gen), j)
        if turning and i in (10, 190): cache.layers[i // 100].cold.drifted = 2
        assert turning or all(o.cold.ready for o in cache.layers)
    assert all(o.cold.ready and o.hot_length < 256 for o in cache.layers)
    assert [len(o.cold.segments) for o in cache.layers] == ([2, 2, 1] if turning else [2, 2, 2])


def test_a_change_of_subject_fits_new_bases():
    layer, keys, values = filled(T=900)
    gen = torch.Generator().manual_seed(5)
    other = 3 * torch.randn(2, 1, 2, 900, 32, generator=gen) * torch.logspace(-1, .5, 32)
    for i in range(0, 900, 60): layer.append(other[0, :, :, i:i + 60], other[1, :, :, i:i + 60])
    assert len(layer.cold.segments) == 2
    got = layer.get_kv()[1][:, :, -300:-200]
    assert (got - other[1, :, :, -300:-200]).norm() < .5 * other[1, :, :, -300:-200].norm()


def test_splits_crop_and_rows():
    layer, keys, values = filled(B=2)
    before = layer.get_kv()
    layer.reorder_cache(torch.tensor([1, 1, 0]))
    assert torch.equal(layer.get_kv()[0], before[0][[1, 1, 0]])
    layer.crop(-500)
    assert layer.get_seq_length() == 400
    torch.testing.assert_close(layer.get_kv()[0], before[0][[1, 1, 0], :, :400], atol=5e-2, rtol=5e-2)


def test_queries_follow_their_rows():
    "Queries that wait for bases to be fitted are those of the rows that there are."
    layer, keys, values = filled(B=2, T=400)
    rows, late = torch.tensor([1, 0, 1]), torch.randn(2, 3, 2, 200, 32, generator=torch.Generator().manual_seed(2))
    other = SpectralLayer(layer.config, layer.table)
    other.append(keys[rows], values[rows])
    other.sample = layer.sample.of(rows)
    layer.batch_select_indices(rows)
    for o in (layer, other): o.append(*late)
    assert len(layer.cold) and all(torch.equal(a, b) for a, b in zip(layer.get_kv(), other.get_kv()))


def test_short_prompts_stay_exact_and_say_so():
    layer, keys, _ = filled(T=300)
    assert len(layer.cold) == 0 and torch.equal(layer.get_kv()[0], keys)


@pytest.fixture(scope="module")
def pocket():
    from spectral_nb.pocket import haystack, load_pocket
    model, tok = load_pocket()
    return model, tok(haystack("tune")[0], return_tensors="pt").input_ids


@pytest.mark.parametrize("ratio", [6, 10])
def test_ratio_is_met(pocket, ratio):
    model, ids = pocket
    cache = SpectralCache(model.config, SpectralConfig(coding="spectral", ratio=float(ratio), exact_dtype="float16"))
    with torch.no_grad(), attention_implementation(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids[:, :2000], past_key_values=cache)
    assert abs(cache.ratio / ratio - 1) < .03
    assert cache.nbytes == sum(r["nbytes"] for r in cache.ledger())


def test_unreachable_ratio_is_said(pocket):
    model, ids = pocket
    cache = SpectralCache(model.config, SpectralConfig(coding="spectral", ratio=30., exact_dtype="float16"))
    with torch.no_grad(), attention_implementation(model), pytest.warns(UserWarning, match="cannot be met with 700 tokens; the nearest is"):
        model(ids[:, :700], past_key_values=cache)


@pytest.mark.parametrize("first, length", [(560, 560), (520, 1500)])
def test_a_short_prompt_or_first_part_is_not_lost(first, length):
    "At 8x nothing would be left for the codes: a token gets half of its bits nevertheless, and the ratio is missed aloud."
    from spectral_nb.calibrate import spectral_cache
    from spectral_nb.needle import make_needles, plant
    from spectral_nb.pocket import data_path, haystack, load_pocket
    from transformers import AutoTokenizer
    model, tok = load_pocket()[0], AutoTokenizer.from_pretrained(data_path())
    model.set_attn_implementation("spectral")
    needle = make_needles(1, random.Random(2))[0]
    ids, code = torch.tensor([plant(tok, haystack("report")[1], needle, 150 / length, length).ids]), tok(needle.answer, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad(), pytest.warns(UserWarning, match=f"cannot be met with {first} tokens"):
        cache = spectral_cache(model, ratio=8, exact_dtype="float16")
        model(ids[:, :first], past_key_values=cache, logits_to_keep=1)
        ids = torch.cat([ids, code], 1)
        logits = torch.cat([model(part, past_key_values=cache).logits for part in (ids[:, first:length], ids[:, length:]) if part.numel()], 1)
        want = model(ids).logits[:, first:]
    right = [(o[:, -code.shape[1]:-1].argmax(-1) == code[:, 1:]).all() for o in (want, logits)]
    assert all(right), right


def test_pocket_recalls_at_8x(pocket):
    from spectral_nb.evaluate import evaluate, summarize
    from spectral_nb.pocket import haystack, load_pocket
    model, tok = load_pocket()
    rows = {r["codec"]: r for r in summarize(evaluate(model, tok, ["spectral:8x", "rank:16/32"], haystack("report"), 2048, trials=1, codes=5, continuation=64, progress=False), 2048)}
    assert rows["spectral:8x"]["recall"] == 1 and rows["rank:16/32"]["recall"] < 1
    assert rows["spectral:8x"]["ratio"] > 2 * rows["rank:16/32"]["ratio"]


def test_a_promise_is_kept_or_said(pocket):
    "Through generate of a patched model: more bits and a warning where the divergence asks for them, silence where not."
    from spectral_nb.integration import spectral
    model, ids = pocket
    ids = ids[:, :1100]
    kw = dict(attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, pad_token_id=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with spectral(model, ratio=8, max_kl=1., exact_dtype="float16") as patched: easy = model.generate(ids, **kw)
    assert easy.shape[1] == 1102 and patched.report["ratio"] > 7
    with spectral(model, ratio=8, max_kl=.004, exact_dtype="float16") as patched, pytest.warns(UserWarning, match="it was coded again at"): model.generate(ids, **kw)
    assert patched.report["ratio"] < 7
    with torch.no_grad(): assert model(ids, logits_to_keep=1).logits.shape[1] == 1 and not model._forward_hooks


def test_a_promise_to_padded_rows(pocket):
    "Where the attention implementation does not tell a cache what is padding, it is still known when a prompt is read again."
    from spectral_nb.calibrate import checked, spectral_cache
    model, ids = pocket
    ids = ids[:, :1600].view(2, 800)
    mask = torch.ones_like(ids)
    mask[1, :100] = 0
    cache = spectral_cache(model, attention_mask=mask, ratio=12)
    with checked(model, 1e-3), pytest.warns(UserWarning, match="coded again"), torch.no_grad(): model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), past_key_values=cache)
    assert cache.spectral_config.ratio < 12 and all(o.padding.tolist() == [0, 100] for o in cache.spectral_layers)


def test_a_check_leaves_the_cache_as_it_is(pocket):
    from spectral_nb.calibrate import check_cache, checked, spectral_cache
    model, ids = pocket
    cache = spectral_cache(model, ratio=6, exact_dtype="float16")
    with torch.no_grad(), attention_implementation(model):
        logits = model(ids[:, :900], past_key_values=cache, logits_to_keep=16).logits
        before = cache.layers[0].get_kv()
        assert 0 < check_cache(model, ids[:, :900], logits, cache).item() < .1
        assert cache.get_seq_length() == 900 and torch.equal(cache.layers[0].get_kv()[0], before[0])
        with pytest.raises(ValueError, match="not all exact"): check_cache(model, ids, model(ids[:, :900], logits_to_keep=600).logits, cache)
        with checked(model, .5): assert model(ids[:, :900], past_key_values=spectral_cache(model, ratio=6), logits_to_keep=1).logits.shape[1] == 1
    with pytest.raises(ValueError, match="above 0"), checked(model, 0.): pass


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_transformers_own_quantized_cache(pocket, backend):
    "Counted under the same rules, near the arithmetic that stands for it; without the backend an error says what to install."
    from importlib.util import find_spec
    from spectral_nb.evaluate import evaluate, parse_spec, summarize
    from spectral_nb.pocket import haystack, load_pocket
    model, tok = load_pocket()
    specs, kw = [f"hf-{backend}4", "hf-int4"], dict(trials=1, codes=1, continuation=32, progress=False)
    assert parse_spec(specs[0]) is None
    if not find_spec(dict(quanto="optimum", hqq="hqq")[backend]):
        with pytest.raises(ValueError, match="needs `pip install"): evaluate(model, tok, specs, haystack("tune"), 400, **kw)
        return
    own, ours = (r for r in summarize(evaluate(model, tok, specs, haystack("tune"), 400, **kw), 400) if r["codec"] != "dense")
    assert own["dense_bytes"] == ours["dense_bytes"] and abs(own["ratio"] / ours["ratio"] - 1) < .1 and own["kl"] < .1


@pytest.mark.parametrize("drift,again", [(1.2, True), (2., False)])
def test_english_then_code(pocket, drift, again):
    "Code moves the states of some layers out of the bases of English by a fifth or more, and never by a factor of two."
    from spectral_nb.calibrate import spectral_cache
    from spectral_nb.pocket import haystack, load_pocket
    model, ids = pocket
    code = load_pocket()[1](haystack("code")[0], return_tensors="pt").input_ids
    cache = spectral_cache(model, ratio=8, drift=drift, exact_dtype="float16")
    with torch.no_grad(), attention_implementation(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(ids[:, :1500], past_key_values=cache, logits_to_keep=1)
        for i in range(0, 1280, 128): model(code[:, i:i + 128], past_key_values=cache, logits_to_keep=1)
    assert any(len(o.cold.segments) > 1 or not o.cold.ready for o in cache.layers) == again


@pytest.mark.parametrize("dtype,eps", [(torch.float16, .01), (torch.bfloat16, .05)])
def test_metrics_in_half_precision(dtype, eps):
    "As on a GPU: values of a thousand and one wild token overflow nothing."
    from spectral_nb.spectral import sensitivity
    gen = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 2, 700, 64, generator=gen)
    values *= 60
    values[:, :, 5] *= 20
    sample = Sample(torch.randn(1, 4, 64, 64, generator=gen), torch.arange(636, 700), 5 * torch.eye(64).expand(4, 64, 64), 64 ** -.5)
    table = RopeTable(1e4 ** (-torch.arange(0, 64, 2) / 64), 64)
    want, got = (vars(sensitivity(sample, keys, values, torch.ones(1, 1, 640, 1), 0, table, d)) for d in (torch.float32, dtype))
    for n in want: assert (got[n] - want[n]).norm() < eps * want[n].norm(), n


@pytest.mark.parametrize("tokens,layers,option,launches,page", [(4096, 6, "--torch", 9000, 512), (8192, 1, "--torch", 9000, 512), (8192, 1, "--once", 1000, 64)])
def test_what_coding_a_prompt_asks_of_a_gpu(tmp_path, tokens, layers, option, launches, page):
    "Counted at the shape of Mistral-7B and 8192 tokens: no more memory than one layer's dense K/V above the dense prefill's (half as many: six), and a few launches a layer for a later page."
    import json, os, subprocess, sys
    from pathlib import Path
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, root / "tools/encode_count.py", tmp_path / "count.json", "--once", option, f"--tokens={tokens}"], check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(root)})
    got = json.loads((tmp_path / "count.json").read_text())
    ops = {r["stage"]: r["ops"] for r in got["rows"]}
    if tokens == 8192: assert got["summary"]["dense_peak_mib"] == pytest.approx(1956, abs=2) # as an H100 measured it
    assert got["summary"]["peak_mib_above_dense"] <= layers * tokens / 256
    assert ops["all of the encoding"] < launches and ops["a page of all layers"] < page


@pytest.mark.parametrize("spec,head_dim,multiple", [("spectral:8x", 40, 16), ("turbo:3/3", 40, 16), ("kivi:2/2", 80, 32), ("hf-int4", 96, 64)])
def test_a_head_dim_that_a_codec_cannot_take_is_refused_at_once(spec, head_dim, multiple):
    layer = SpectralLayer(parse_spec(spec), RopeTable(torch.ones(head_dim // 2), head_dim=head_dim))
    with pytest.raises(ValueError, match=f"multiple of {multiple}, got {head_dim}.*coding='rank'"): layer.append(*torch.zeros(2, 1, 1, 4, head_dim))


def test_a_mask_that_adds_numbers_is_refused_and_nothing_is_stored():
    from tiny import tiny_model
    model = tiny_model("llama")
    cache, ids, sees = SpectralCache(model.config, ratio=4), torch.randint(4, 512, (1, 40)), torch.ones(40, 40, dtype=torch.bool).tril()[None, None]
    mask = torch.zeros(1, 1, 40, 40).masked_fill(~sees, torch.finfo(torch.float32).min)
    with attention_implementation(model), torch.no_grad():
        with pytest.raises(ValueError, match="adds numbers to scores"): model(ids, attention_mask=mask - .1 * torch.arange(40).flip(0), past_key_values=cache)
        got = model(ids, attention_mask=mask, past_key_values=cache).logits
    assert cache.get_seq_length() == 40 and torch.allclose(got, model(ids).logits, atol=1e-4)
