"A cache that loses nothing must give what the dense cache gives: logits, tokens, beams, turns, chunks."
import copy
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache
from tiny import CONFIGS, head_dim, prompt, tiny_model

from spectral_nb.attention import spectral_attention_forward  # noqa: F401  (registers 'spectral')
from spectral_nb.cache import SpectralCache
from spectral_nb.codec import SpectralConfig

NEW = 64


def lossless(model, mask=None, **kw):
    return SpectralCache(model.config, SpectralConfig.lossless(head_dim(model), **{"block_size": 32, "hot_buffer_size": 16, **kw}), attention_mask=mask)


@pytest.fixture(params=CONFIGS)
def model(request):
    m = tiny_model(request.param)
    m.set_attn_implementation("eager")
    yield m
    m.set_attn_implementation("eager")


def generate(model, inputs, **kw):
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, **kw})


@pytest.mark.parametrize("attn", ["spectral", "sdpa"])
@pytest.mark.parametrize("batch", [1, 3])
def test_generation_equals_dense(model, batch, attn):
    "Prompt of several blocks, decoding across block boundaries, padded batches; compressed attention and rebuilt states."
    inputs = prompt(batch)
    dense = generate(model, inputs)
    if attn == "sdpa" and model.config.model_type == "gemma2": pytest.skip("transformers' SDPA ignores Gemma 2's soft-capping")
    model.set_attn_implementation(attn)
    cache = lossless(model, inputs["attention_mask"])
    ours = generate(model, inputs, past_key_values=cache)
    assert torch.equal(ours.sequences, dense.sequences)
    assert (torch.stack(ours.logits) - torch.stack(dense.logits)).abs().max() < 1e-4
    if cache.spectral_layers: assert len(cache.spectral_layers[-1].cold) == (150 + NEW - 1 - 16) // 32 * 32


def test_beam_search(model):
    inputs = prompt(2)
    dense = generate(model, inputs, num_beams=3, max_new_tokens=24)
    model.set_attn_implementation("spectral")
    assert torch.equal(generate(model, inputs, num_beams=3, max_new_tokens=24, past_key_values=lossless(model)).sequences, dense.sequences)


def test_two_turns_on_one_cache(model):
    first, second = prompt(1, 120)["input_ids"], prompt(1, 90, seed=1)["input_ids"]
    def turns(cache):
        one = model.generate(first, max_new_tokens=20, do_sample=False, past_key_values=cache)
        return model.generate(torch.cat([one, second], 1), max_new_tokens=20, do_sample=False, past_key_values=cache)
    from transformers import DynamicCache
    dense = turns(DynamicCache(config=model.config))
    model.set_attn_implementation("spectral")
    assert torch.equal(turns(lossless(model)), dense)


def test_memory_is_free_with_the_cache_and_copies_are_their_own():
    model = tiny_model("llama")
    model.set_attn_implementation("spectral")
    new = lambda: SpectralCache(model.config, coding="spectral", bits=4., fit_length=256, hot_buffer_size=64)
    steps = lambda cache, n: [model(torch.full((1, 1), 5 + i % 50), past_key_values=cache) for i in range(n)]
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            first = new()
            model(prompt(1, 200)["input_ids"], past_key_values=first) # copied before bases are fitted, and gone when they are
            twin, straight = copy.deepcopy(first), copy.deepcopy(first)
            codes = weakref.ref(first)
            del first
            assert codes() is None
            twins = copy.deepcopy(twin)
            assert all(o.on_full.__self__.cache() is o.on_page.__self__.cache() is cache for cache in (twin, twins, straight) for o in cache.layers)
            for cache in (twin, twins, straight): steps(cache, 300)
        for cache in (twin, twins): assert all(o.cold.ready and len(o.cold) == len(s.cold) > 256 for o, s in zip(cache.layers, straight.layers)) and cache.nbytes == straight.nbytes
        held = weakref.ref(twin), weakref.ref(twin.layers[0].cold.segments[0].keys.codes)
        del twin, cache
        assert not any(r() for r in held)
    finally: gc.enable()


def test_fresh_prompt_after_reset(model):
    model.set_attn_implementation("spectral")
    used = SpectralCache(model.config, block_size=32, k_rank_keys=8, k_rank_values=8)
    generate(model, prompt(1, seed=1), past_key_values=used)
    used.reset()
    fresh = SpectralCache(model.config, block_size=32, k_rank_keys=8, k_rank_values=8)
    again, new = (generate(model, prompt(1), past_key_values=c) for c in (used, fresh))
    assert torch.equal(again.sequences, new.sequences)
    assert torch.equal(torch.stack(again.logits), torch.stack(new.logits))


def test_padding_of_an_earlier_prompt_is_forgotten():
    "After a reset, tokens where the last prompt was padded count like any others."
    model = tiny_model("llama")
    model.set_attn_implementation("spectral")
    used, fresh = (SpectralCache(model.config, block_size=32, k_rank_keys=8, k_rank_values=8) for _ in range(2))
    with torch.no_grad():
        model(**prompt(3), past_key_values=used)
        used.reset()
        for cache in (used, fresh): model(prompt(3, padding=())["input_ids"], past_key_values=cache)
    for a, b in zip(used.spectral_layers[0].get_kv(), fresh.spectral_layers[0].get_kv()): assert torch.equal(a, b)
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("batch", [1, 3])
def test_chunked_prefill_equals_whole(model, batch):
    "Of a row, the first part may be nothing but padding."
    inputs = prompt(batch)
    model.set_attn_implementation("spectral")
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    whole, parts = lossless(model), lossless(model)
    with torch.no_grad():
        want = model(**inputs, position_ids=positions, past_key_values=whole).logits[:, -1]
        for a, b in ((0, 50), (50, 100), (100, 101), (101, 150)):
            got = model(inputs["input_ids"][:, a:b], attention_mask=inputs["attention_mask"][:, :b], position_ids=positions[:, a:b], past_key_values=parts).logits[:, -1]
    assert (got - want).abs().max() < 1e-4
    for one, two in zip(whole.spectral_layers, parts.spectral_layers):
        assert torch.equal(one.padding_per_row(), two.padding_per_row()) and torch.equal(one.landmark_slots, two.landmark_slots)
        for a, b in zip(one.get_kv(), two.get_kv()): assert (a - b)[inputs["attention_mask"][:, None].expand(a.shape[:3]) > 0].abs().max() < 1e-4


def test_a_call_of_nothing_but_padding():
    "Within a conversation that comes in parts it is no new prompt, although its positions are 0."
    model, inputs = tiny_model("llama"), prompt(1, 210)
    mask = inputs["attention_mask"].index_fill(1, torch.arange(150, 190), 0)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    def logits(cache, attn):
        model.set_attn_implementation(attn)
        with torch.no_grad():
            for n in (slice(0, 150), slice(150, 170), slice(170, 210)):
                out = model(inputs["input_ids"][:, n], attention_mask=mask[:, :n.stop], position_ids=positions[:, n], past_key_values=cache).logits
        return out[:, -20:]
    want, cache = logits(DynamicCache(config=model.config), "sdpa"), lossless(model)
    got = logits(cache, "spectral")
    model.set_attn_implementation("eager")
    assert cache.get_seq_length() == 210 and (got - want).abs().max() < 1e-4


def test_restart_without_reset():
    "A prompt at position 0 on a filled cache starts it afresh."
    model = tiny_model("llama")
    model.set_attn_implementation("spectral")
    cache, ids = lossless(model), prompt(1)["input_ids"]
    with torch.no_grad():
        model(prompt(1, seed=5)["input_ids"], past_key_values=cache)
        got = model(ids, position_ids=torch.arange(150)[None], past_key_values=cache).logits[:, -1]
        want = model(ids, past_key_values=lossless(model)).logits[:, -1]
    assert cache.get_seq_length() == 150
    assert torch.equal(got, want)
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("attn", ["spectral", "sdpa"])
def test_a_call_that_was_stopped_midway(attn):
    "What some layers have taken and others have not is no state to go on from; a reset is."
    model, ids = tiny_model("llama"), prompt(1)["input_ids"]
    model.set_attn_implementation(attn)
    def stop(*args): raise KeyboardInterrupt
    cache = lossless(model)
    with torch.no_grad():
        for part in (ids, ids[:, :1]): # the prompt, and a step of decoding
            hook = model.model.layers[0].mlp.register_forward_hook(stop)
            with pytest.raises(KeyboardInterrupt): model(part, past_key_values=cache)
            hook.remove()
            with pytest.raises(RuntimeError, match="stopped midway: layers hold"): model(ids[:, :1], past_key_values=cache)
            cache.reset()
            model(ids, past_key_values=cache)
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    model = tiny_model("llama")
    inputs = prompt(1)
    dense = model(**inputs).logits[:, -1]
    half = tiny_model.__wrapped__("llama").to(dtype)
    half.set_attn_implementation("spectral")
    with torch.no_grad():
        for m, ctx in ((half, torch.autocast("cpu", enabled=False)), (model, torch.autocast("cpu", dtype=torch.bfloat16))):
            m.set_attn_implementation("spectral")
            cache = lossless(m)
            with ctx:
                m(inputs["input_ids"][:, :-1], past_key_values=cache)
                got = m(inputs["input_ids"][:, -1:], past_key_values=cache).logits[:, -1].float()
            assert torch.nn.functional.cosine_similarity(got, dense).item() > 0.99
    model.set_attn_implementation("eager")


def test_no_gradients_are_no_silent_zeros():
    "A prompt may be read without no_grad, copied and trained on; what attends to the cache has no gradients, and says so."
    model, ids = tiny_model("llama"), prompt(1)["input_ids"]
    model.set_attn_implementation("spectral")
    cache = SpectralCache(model.config)
    model(ids, past_key_values=cache)
    copy.deepcopy(cache)
    out = model(ids[:, :3], past_key_values=cache).logits
    with pytest.raises(RuntimeError, match="gives no gradients"): out.sum().backward()
    want, got = (torch.autograd.grad(model(ids, **kw).logits.square().sum(), model.model.layers[0].self_attn.k_proj.weight)[0] for kw in (dict(use_cache=False), dict(past_key_values=SpectralCache(model.config))))
    torch.testing.assert_close(got, want)
    model.set_attn_implementation("eager")


def test_a_mask_that_hides_a_part_for_a_while():
    "Two documents that do not see each other, and a question that sees both: the first is no padding."
    model, ids = tiny_model("llama"), prompt(1)["input_ids"]
    q, k = torch.arange(150)[:, None], torch.arange(150)
    mask = ((k <= q) & ~((q >= 70) & (q < 140) & (k < 70)))[None, None]
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        want = model(ids, attention_mask=mask).logits[:, -10:]
        model.set_attn_implementation("spectral")
        cache = lossless(model)
        model(ids[:, :140], attention_mask=mask[:, :, :140, :140], past_key_values=cache)
        got = model(ids[:, 140:], attention_mask=mask[:, :, 140:], position_ids=torch.arange(140, 150)[None], past_key_values=cache).logits
    model.set_attn_implementation("eager")
    assert len(cache.layers[0].cold) and (got - want).abs().max() < 1e-4


def test_unknown_model_is_refused():
    from transformers import AutoConfig
    with pytest.raises(ValueError, match="'gpt2' is not supported; supported: cohere"): SpectralCache(AutoConfig.for_model("gpt2"))


def test_unsupported_attention_features_are_refused():
    with pytest.raises(ValueError, match="learned attention sinks"):
        spectral_attention_forward(None, torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8), None, s_aux=torch.ones(2))
    model = tiny_model("llama")
    model.set_attn_implementation("spectral")
    with pytest.raises(ValueError, match="eager"): spectral_attention_forward(model.model.layers[0].self_attn, *torch.ones(3, 1, 2, 1, 8), None, output_attentions=True)
    cache, ids = lossless(model), prompt(1)["input_ids"]
    with pytest.raises(ValueError, match="eager"): model(ids, past_key_values=cache, output_attentions=True)
    assert cache.get_seq_length() == 0 and torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits) # nothing is left of the call that was refused
    model.set_attn_implementation("eager")


def test_prompt_lookup_decoding():
    "Rolling back a few tokens loses nothing."
    model, ids = tiny_model("llama"), prompt(1)["input_ids"].repeat(1, 2)
    dense = model.generate(ids, max_new_tokens=40, do_sample=False)
    model.set_attn_implementation("spectral")
    assert torch.equal(model.generate(ids, max_new_tokens=40, do_sample=False, prompt_lookup_num_tokens=3, past_key_values=lossless(model)), dense)
    model.set_attn_implementation("eager")
