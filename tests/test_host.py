"What decode steps cost the host, and that launches which are kept never see an address that has moved; without a GPU, by kernels that do nothing (host_cases.py)."
import copy

import pytest
import torch
from host_cases import CountOps, no_kernels, steps, tiny
from kernel_cases import case

from spectral_nb import kernels
from spectral_nb.cache import SpectralCache
from spectral_nb.codec import SpectralConfig
from spectral_nb.integration import spectral
from spectral_nb.spectral import Sample


TABLES = "TAB PAIR CI CF MK MV".split() # Of anchors and layouts: they belong to no layer


def one(layer):
    B, H, _, D = layer.hot.keys.shape
    return [torch.randn(B, h, 1, D) for h in (4 * H, H, H)]


def current(layer, what):
    "Attend twice, the second time by launches that are kept, and compare every address in them with where things are now."
    q, k, v = one(layer)
    for _ in range(2): kernels.attend(layer, q, k, v)
    step = dict(query=q, key=k, value=v, out=torch.empty_like(q), length=torch.zeros(4, dtype=torch.int32))
    step["mask"] = step["length"]
    launches = kernels.plan_launches(layer, step, 128 ** -.5, None, kernels.tuning_for(q.device), False)[-3:] # of several segments the last one's
    if layer.hot.n < layer.hot.keys.shape[2]: launches.append(kernels._write_launch(layer.hot, step)) # there is room
    alive = {t.data_ptr() for t in kernels._kept[layer].alive} # whoever asks for a table later may get another one with the same content
    for l in launches:
        own = dict(l.own)
        for i, a in enumerate(l.args):
            if isinstance(a, torch.Tensor): assert i in own or l.fn.given[i] == a.data_ptr() or l.fn.arg_names[i] in TABLES and l.fn.given[i] in alive, f"{what}: {l.fn.name} reads {l.fn.arg_names[i]} where it was"
            else: assert l.fn.given[i] == a, f"{what}: {l.fn.name} is told {l.fn.arg_names[i]} = {l.fn.given[i]}, it is {a}"


def test_kept_launches_know_where_everything_is():
    "Whatever happens to a layer between two steps."
    layer, *_ = case(B=2, T=420)
    other, *_ = case(B=2, T=2000, seed=1)
    for x in layer.hot.tensors().values(): x[:, :, layer.hot.n:] = 0 # kernels that do nothing leave what is there
    def parts():
        s = layer.cold.segments[0]
        return dict(layer=layer, hot=layer.hot, segment=s, keys=s.keys, values=s.values, loss=s.loss)
    def move(part, name): setattr(parts()[part], name, getattr(parts()[part], name).clone())
    def page(n=130):
        for _ in range(n):
            q, k, v = one(layer)
            kernels.attend(layer, q, k, v)
            if not kernels.stored(layer, k): layer.append(k, v)
    def again():
        layer.sample = Sample(torch.randn(2, 8, 64, 128), torch.arange(200, 264), torch.eye(128).expand(8, 128, 128), 128 ** -.5, None)
        layer.cold.drifted = 2
        layer.append(*torch.randn(2, 2, 2, 600, 128))
        assert len(layer.cold.segments) == 2
    def restart():
        layer.reset()
        layer.append(*torch.randn(2, 2, 2, 420, 128))
    happens = dict(nothing=lambda: None, beams=lambda: layer.reorder_cache(torch.tensor([1, 0])), fewer=lambda: layer.batch_select_indices(torch.tensor([0, 0])), to=lambda: layer.map_(lambda t: t.clone()),
                   steps=lambda: page(40), page=page, cropped=lambda: layer.crop(-5), landmark=lambda: layer.add_landmarks(torch.tensor([layer.get_seq_length() - 1])), tables=kernels.layout_tables.cache_clear,
                   longer=lambda: current(other, "another layer"), drift=again, restart=restart)
    with no_kernels() as launched:
        current(layer, "first")
        moves = {f"{n} of {part} moved": lambda part=part, n=n: move(part, n) for part, o in parts().items() for n, x in vars(o).items() if isinstance(x, torch.Tensor)}
        assert len(moves) >= 18
        happens = moves | happens
        for what, f in happens.items():
            f()
            torch.randn(3, 100000) # what is free is taken
            current(layer, what)
        twin = copy.deepcopy(layer)
        current(twin, "a copy")
        current(layer, "the copied")
    assert min(launched.values()) > 2 * len(happens)


@pytest.mark.parametrize("name", ["keys", "values", "keys_scale", "values_scale"])
def test_a_single_token_is_written_where_the_tier_is(name):
    layer, *_ = case(T=420)
    with no_kernels():
        for i in range(3):
            _, k, v = one(layer)
            layer.append(k, v)
            given = kernels._write.given
            if i == 1: setattr(layer.hot, name, getattr(layer.hot, name).clone())
        assert [given[kernels._write.arg_names.index(n)] for n in kernels._write.arg_names[2:6]] == [getattr(layer.hot, n).data_ptr() for n in ("keys", "values", "keys_scale", "values_scale")]


def test_a_token_is_counted_once():
    "`stored` takes in what `attend` wrote, and nothing else; at the end of a page, without room and under importance `append` has to do more."
    layer, *_ = case(T=420)
    with no_kernels() as launched:
        q, k, v = one(layer)
        assert not kernels.stored(layer, k) # not written
        kernels.attend(layer, q, k, v)
        assert not kernels.stored(layer, k.clone())
        n = layer.get_seq_length()
        assert kernels.stored(layer, k) and layer.get_seq_length() == n + 1
        assert not kernels.stored(layer, k) # the next place is another
        while layer.hot.n < layer.hot.keys.shape[2]: layer.append(*one(layer)[1:])
        kernels.attend(layer, q, k, v)
        assert not kernels.stored(layer, k) # no room
        while layer.hot.n + 1 < layer.config.hot_buffer_size + layer.cold.page: layer.append(*one(layer)[1:])
        kernels.attend(layer, q, k, v)
        before, cold = launched["_write"], len(layer.cold)
        assert not kernels.stored(layer, k) # a page is full
        layer.append(k, v)
        assert launched["_write"] == before and len(layer.cold) == cold + layer.cold.page


def test_a_mask_that_was_changed_is_read_again():
    layer, *_ = case(B=2, T=420)
    n, seen = layer.get_seq_length() + 1, []
    mask = torch.ones(2, 1, 1, n, dtype=torch.bool)
    with no_kernels():
        decode = kernels.decode_attention
        kernels.decode_attention = lambda *args: seen.append(args[4]) or decode(*args)
        for hidden in (0, 3):
            mask[0, :, :, :hidden] = False
            kernels.attend(layer, *one(layer), mask)
    assert [o.sum().item() for o in seen] == [2 * n, 2 * n - 3]


@torch.inference_mode()
def decode_step(model, cache, length):
    "One step after another of a model of transformers."
    at = [length]
    def step():
        model(torch.full((1, 1), 5), past_key_values=cache, position_ids=torch.full((1, 1), at[0]), use_cache=True)
        at[0] += 1
    return step


def counted(step, layers):
    step()
    step()
    with CountOps() as c: step()
    return sum(c.seen.values()) / layers, c.seen


def test_torch_operations_of_a_decode_step():
    "Not more for each layer and token than a dense cache of transformers takes."
    from transformers import DynamicCache
    model, ids = tiny(8), torch.randint(4, 512, (1, 700))
    with torch.inference_mode(), no_kernels():
        dense = DynamicCache(config=model.config)
        model(ids, past_key_values=dense)
        stock, names = counted(decode_step(model, dense, 700), 8)
        model.set_attn_implementation("spectral")
        cache = SpectralCache(model.config, SpectralConfig(ratio=8))
        model(ids, past_key_values=cache)
        ours, seen = counted(decode_step(model, cache, 700), 8)
    print(stock, ours, {k: (seen[k] - names[k]) / 8 for k in seen | names if seen[k] != names[k]})
    assert ours <= stock + 1
