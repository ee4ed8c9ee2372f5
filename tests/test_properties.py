"The state of a layer depends on its tokens, not on how they came; what is exact stays exact."
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_nb.attention import attend
from spectral_nb.cache import SpectralLayer
from spectral_nb.codec import SpectralConfig
from spectral_nb.rope import RopeTable

settings.register_profile("ci", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("ci")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@st.composite
def cases(draw):
    D = draw(st.sampled_from([8, 16, 32]))
    c = SpectralConfig(block_size=draw(st.integers(1, 40)), k_rank_keys=draw(st.integers(1, D)), k_rank_values=draw(st.integers(1, D)),
                       hot_buffer_size=draw(st.integers(0, 30)), landmark_count=draw(st.integers(0, 6)))
    B, H, T = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 120))
    cuts = sorted(draw(st.lists(st.integers(0, T), max_size=5)))
    padding = torch.tensor(draw(st.lists(st.integers(0, T - 1), min_size=B, max_size=B)))
    return c, B, H, T, D, cuts, padding, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))


def fill(config, table, keys, values, cuts, padding):
    layer = SpectralLayer(config, table, padding=padding)
    for a, b in zip([0, *cuts], [*cuts, keys.shape[2]]):
        if b > a: layer.append(keys[:, :, a:b], values[:, :, a:b])
    return layer


def make(case):
    config, B, H, T, D, cuts, padding, dtype, seed = case
    table = RopeTable(1e4 ** (-torch.arange(0, D, 2) / D), D)
    kv = torch.randn(2, B, H, T, D, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return table, *kv


@given(cases())
def test_any_split_gives_the_same_state(case):
    config, B, H, T, D, cuts, padding, dtype, _ = case
    table, keys, values = make(case)
    one, many = fill(config, table, keys, values, [], padding), fill(config, table, keys, values, cuts, padding)
    assert (len(one.cold), one.hot_length) == (len(many.cold), many.hot_length)
    room = many.hot.keys.shape[2] - many.hot_length # for single tokens to come
    assert 0 <= room < 32 and one.nbytes == many.nbytes - room * sum(t.nbytes // t.shape[2] for t in many.hot.tensors().values() if t.shape[2])
    assert torch.equal(one.landmark_slots, many.landmark_slots)
    for a, b in zip(one.get_kv(), many.get_kv()): torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


@given(cases())
def test_exact_tiers_are_exact_and_lengths_add_up(case):
    config, B, H, T, D, cuts, padding, dtype, _ = case
    table, keys, values = make(case)
    layer = fill(config, table, keys, values, cuts, padding)
    assert layer.get_seq_length() == T == len(layer.cold) + layer.hot_length
    assert len(layer.cold) % config.block_size == 0 and layer.hot_length >= min(T, config.hot_buffer_size)
    got = layer.get_kv()
    n = len(layer.cold)
    for a, b in zip(got, (keys, values)):
        assert a.dtype == dtype and a.shape == b.shape
        assert torch.equal(a[:, :, n:], b[:, :, n:])
        for row, pad in enumerate(padding.tolist()):
            assert torch.equal(a[row, :, pad:pad + config.landmark_count], b[row, :, pad:pad + config.landmark_count])


@given(cases(), st.integers(1, 7), st.sampled_from([1, 2, 3, 4]))
def test_compressed_attention_is_attention_over_rebuilt_states(case, q_len, group):
    "The dual projection, tiers and masks against plain softmax over what get_kv hands out."
    config, B, H, T, D, cuts, padding, dtype, seed = case
    table, keys, values = make((*case[:7], torch.float32, seed))
    layer = fill(config, table, keys, values, cuts, padding)
    gen = torch.Generator().manual_seed(seed + 1)
    q, k, v = (torch.randn(B, h, q_len, D, generator=gen) for h in (H * group, H, H))
    slots = torch.arange(T + q_len)
    mask = (slots <= T + torch.arange(q_len)[:, None]) & (slots >= padding[:, None, None])
    got, received = attend(layer, q, k, v, mask[:, None])
    K, V = (torch.cat([a, b], 2).repeat_interleave(group, 1) for a, b in zip(layer.get_kv(), (k, v)))
    p = torch.softmax((q @ K.mT * D ** -.5).masked_fill(~mask[:, None], -1e30), -1)
    torch.testing.assert_close(got, (p @ V).transpose(1, 2), atol=2e-4, rtol=2e-3)
    want = p[..., len(layer.cold):].unflatten(1, (H, group)).sum((2, 3))
    torch.testing.assert_close(received, want, atol=2e-4, rtol=2e-3)


@given(cases(), st.integers(0, 130))
def test_crop_keeps_what_it_keeps(case, removed):
    config, B, H, T, D, cuts, padding, dtype, _ = case
    table, keys, values = make(case)
    layer = fill(config, table, keys, values, cuts, padding)
    before, keep = layer.get_kv(), T - min(removed, T)
    layer.crop(-min(removed, T))
    assert layer.get_seq_length() == keep
    if keep:
        for a, b in zip(layer.get_kv(), before): torch.testing.assert_close(a, b[:, :, :keep], atol=2e-2, rtol=2e-2)


@given(cases())
def test_batch_operations_act_on_rows(case):
    config, B, H, T, D, cuts, padding, dtype, seed = case
    table, keys, values = make(case)
    layer = fill(config, table, keys, values, cuts, padding)
    before = layer.get_kv()
    idx = torch.randint(0, B, (4,), generator=torch.Generator().manual_seed(seed))
    layer.reorder_cache(idx)
    for a, b in zip(layer.get_kv(), before): torch.testing.assert_close(a, b[idx]) # products of more rows may round otherwise


@given(cases())
def test_padding_enters_no_basis(case):
    "Garbage in padded slots changes nothing that is seen."
    config, B, H, T, D, cuts, padding, dtype, _ = case
    table, keys, values = make(case)
    seen = (torch.arange(T) >= padding[:, None])[:, None, :, None]
    one = fill(config, table, keys, values, [], padding)
    two = fill(config, table, torch.where(seen, keys, 50 * keys), torch.where(seen, values, 50 * values), [], padding)
    for a, b in zip(one.get_kv(), two.get_kv()):
        torch.testing.assert_close(torch.where(seen, a, 0), torch.where(seen, b, 0), atol=2e-2, rtol=2e-2)


def test_landmarks_that_come_in_several_pages():
    "Also where a page had fewer tokens than there are landmarks, and where tokens in their place were cropped; a token that is named twice, or is one of another row's first, counts once."
    gen, D = torch.Generator().manual_seed(0), 16
    table, config = RopeTable(1e4 ** (-torch.arange(0, D, 2) / D), D), SpectralConfig.lossless(D, block_size=16, hot_buffer_size=16, landmark_count=40)
    keys, values, *new = torch.randn(4, 2, 2, 200, D, generator=gen)
    layer = fill(config, table, keys, values, [35], None)
    for a, b in zip(layer.get_kv(), (keys, values)): assert torch.equal(a[:, :, :40], b[:, :, :40])
    layer.crop(-175)
    layer.append(*new)
    for a, b, c in zip(layer.get_kv(), (keys, values), new): assert torch.equal(a[:, :, :40], torch.cat([b[:, :, :25], c[:, :, :15]], 2))
    layer = fill(SpectralConfig.lossless(D, block_size=16, hot_buffer_size=16), table, keys[:, :, :20], values[:, :, :20], [], torch.tensor([0, 6]))
    layer.add_landmarks(torch.tensor([7, 12, 12]))
    layer.append(keys[:, :, 20:], values[:, :, 20:])
    q, k, v = torch.randn(3, 2, 2, 1, D, generator=gen)
    K, V = (torch.cat(o, 2) for o in ((keys, k), (values, v)))
    seen = (torch.arange(201) >= torch.tensor([[0], [6]]))[:, None, None]
    want = torch.softmax((q @ K.mT * D ** -.5).masked_fill(~seen, -1e30), -1) @ V
    torch.testing.assert_close(attend(layer, q, k, v, seen)[0], want.transpose(1, 2), atol=1e-4, rtol=1e-3)
