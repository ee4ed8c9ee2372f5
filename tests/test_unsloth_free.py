"The same one-liners on plain transformers models, where Unsloth is not needed."
import logging

import pytest
import torch
from tiny import CONFIGS, head_dim, prompt, tiny_model
from transformers import DynamicCache, GenerationConfig

from spectral_nb import calibrate
from spectral_nb.cache import SpectralCache
from spectral_nb.codec import SpectralConfig
from spectral_nb.integration import model_route, patch_unsloth_attention, spectral, unpatch_unsloth_attention

NEW = 40


@pytest.fixture(params=CONFIGS)
def model(request):
    m = tiny_model(request.param)
    yield m
    unpatch_unsloth_attention(m)
    m.set_attn_implementation("eager")


@pytest.fixture
def llama():
    m = tiny_model("llama")
    yield m
    unpatch_unsloth_attention(m)
    m.set_attn_implementation("eager")


def lossless(model, **kw): return SpectralConfig.lossless(head_dim(model), **{"coding": "rank", "block_size": 32, "hot_buffer_size": 16, **kw})
def lossy(**kw): return SpectralConfig(**{"coding": "rank", "block_size": 32, "hot_buffer_size": 16, "k_rank_keys": 8, "k_rank_values": 8, **kw})


def generate(model, inputs, **kw):
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, **kw})


def logits(out): return torch.stack(out.logits)


def test_same_as_dense_and_restored(model):
    inputs = prompt(3)
    dense, names = generate(model, inputs), {id(m): set(m.__dict__) for m in model.modules()}
    with spectral(model, spectral_config=lossless(model)) as patched:
        assert patched.route == "transformers" and model.config._attn_implementation == "spectral"
        got, again = generate(model, inputs), generate(model, inputs)
    assert torch.equal(got.sequences, dense.sequences) and torch.equal(logits(got), logits(again))
    assert (logits(got) - logits(dense)).abs().max() / logits(dense).abs().max() < 2e-5
    assert isinstance(got.past_key_values, SpectralCache) and got.past_key_values is not again.past_key_values
    assert patched.prefill == [2, 2] and patched.decode == [2 * (NEW - 1)] * 2
    assert model.config._attn_implementation == "eager" and {id(m): set(m.__dict__) for m in model.modules()} == names
    assert torch.equal(logits(generate(model, inputs)), logits(dense))


def test_beam_search(model):
    inputs = prompt(2)
    kw = dict(num_beams=3, max_new_tokens=24, output_logits=False)
    dense = generate(model, inputs, **kw)
    with spectral(model, spectral_config=lossless(model)): assert torch.equal(generate(model, inputs, **kw).sequences, dense.sequences)


@pytest.mark.parametrize("spectral_attention", [True, False])
def test_rebuilt_states_with_padding(llama, spectral_attention):
    with spectral(llama, spectral_config=lossy()): want = generate(llama, prompt(3))
    with spectral(llama, spectral_config=lossy(), use_spectral_attention=spectral_attention): got = generate(llama, prompt(3))
    assert torch.equal(got.sequences, want.sequences)
    assert (logits(got) - logits(want)).abs().max() < 2e-2  # a code may round the other way


def test_turns_sampling_and_prompt_lookup(llama):
    first, second = prompt(1, 120), prompt(1, 60, seed=1)["input_ids"]
    def turns():
        one = generate(llama, first, max_new_tokens=20)
        return generate(llama, dict(input_ids=torch.cat([one.sequences, second], 1)), past_key_values=one.past_key_values).sequences
    def sample():
        torch.manual_seed(0)
        return generate(llama, prompt(2), do_sample=True, top_p=.9).sequences
    def lookup(): return llama.generate(prompt(1)["input_ids"].repeat(1, 2), max_new_tokens=NEW, do_sample=False, prompt_lookup_num_tokens=3)
    want = [f() for f in (turns, sample, lookup)]
    with spectral(llama, spectral_config=lossless(llama)): got = [f() for f in (turns, sample, lookup)]
    for a, b in zip(want, got): assert torch.equal(a, b)


@pytest.mark.parametrize("early, late", [((0, 10, 0), (0, 0, 0)), ((3, 12, 5), (3, 9, 20))])
def test_turns_of_rows_that_end_early_or_begin_late(llama, early, late):
    "Padding between turns, also where every row has it: no sequence that starts again."
    first, second = prompt(3, 120), prompt(3, 60, seed=1, padding=late)
    def turns():
        one = generate(llama, first, max_new_tokens=20)
        said = (torch.arange(20) < 20 - torch.tensor(early)[:, None]).long()
        inputs = dict(input_ids=torch.cat([one.sequences, second["input_ids"]], 1), attention_mask=torch.cat([first["attention_mask"], said, second["attention_mask"]], 1))
        return generate(llama, inputs, past_key_values=one.past_key_values)
    want = turns()
    with spectral(llama, spectral_config=lossless(llama)): got = turns()
    assert got.past_key_values.get_seq_length() == want.past_key_values.get_seq_length() and torch.equal(got.sequences, want.sequences)


@pytest.mark.parametrize("spectral_attention", [True, False])
def test_chunks_of_nothing_but_padding(llama, spectral_attention):
    inputs = prompt(3)
    want = generate(llama, inputs).sequences
    with spectral(llama, spectral_config=lossless(llama), use_spectral_attention=spectral_attention): got = generate(llama, inputs, prefill_chunk_size=29)
    assert torch.equal(got.sequences, want)


def test_first_layers_that_draft(llama):
    "They have a cache of their own, of fewer layers."
    ids = prompt(1)["input_ids"].repeat(1, 2)
    run = lambda: llama.generate(ids, max_new_tokens=NEW, do_sample=False, assistant_early_exit=1)
    want = run()
    with spectral(llama, coding="spectral", bits=8., fit_length=512, layer_weights=[(1., 1.)] * 2): assert torch.equal(run(), want)
    assert llama.config.num_hidden_layers == 2


def test_loop_by_hand(llama):
    ids = prompt(1)["input_ids"]
    with torch.no_grad():
        want = llama(ids).logits[:, -1]
        with spectral(llama, spectral_config=lossless(llama)) as patched:
            past = llama(ids[:, :-1]).past_key_values
            assert isinstance(past, SpectralCache)
            torch.testing.assert_close(llama(ids[:, -1:], past_key_values=past).logits[:, -1], want, atol=1e-4, rtol=1e-4)
        assert patched.prefill == [1, 1] and patched.decode == [1, 1]


def test_another_cache_in_the_generation_config(llama):
    "Hub models ask for static or hybrid caches in their generation config; that wish is dropped and put back."
    want = generate(llama, prompt(1)).sequences
    llama.generation_config.cache_implementation = "static"
    try:
        with spectral(llama, spectral_config=lossless(llama)):
            assert torch.equal(generate(llama, prompt(1)).sequences, want)
            with pytest.raises(ValueError, match="asks for another cache"): generate(llama, prompt(1), cache_implementation="static")
        assert llama.generation_config.cache_implementation == "static"
    finally: llama.generation_config.cache_implementation = None


def test_dense_states_are_refused(llama):
    dense = DynamicCache(config=llama.config)
    ids = prompt(1)["input_ids"]
    llama(ids, past_key_values=dense)
    with spectral(llama, layer_weights="equal"), pytest.raises(ValueError, match="computed without compression"): llama(ids[:, -1:], past_key_values=dense)


def test_an_empty_cache_of_transformers_is_not_lost_in_silence(llama):
    "A loop by hand that counts on its DynamicCache being filled in place; `generate` reads the whole prompt again."
    ids, cache = prompt(1)["input_ids"], DynamicCache(config=llama.config)
    want = generate(llama, prompt(1)).sequences
    with torch.no_grad(), spectral(llama, spectral_config=lossless(llama)):
        assert isinstance(llama(ids[:, :-1], past_key_values=cache).past_key_values, SpectralCache)
        with pytest.raises(ValueError, match="this DynamicCache comes a second time and is empty"): llama(ids[:, -1:], past_key_values=cache)
        for _ in range(2): assert torch.equal(generate(llama, prompt(1), past_key_values=cache).sequences, want)


def test_a_generation_config_by_position(llama):
    ids = prompt(1)["input_ids"]
    for wish in (dict(cache_implementation="static"), dict(use_cache=False)):
        config = GenerationConfig(max_new_tokens=NEW, do_sample=False, **wish)
        want = llama.generate(ids, config)
        with spectral(llama, spectral_config=lossless(llama)) as patched: assert torch.equal(llama.generate(ids, config), want)
        assert patched.decode == [NEW - 1 if wish.get("use_cache", True) else 0] * 2


@pytest.mark.parametrize("outer", [False, True])
def test_a_patch_inside_a_context_ends_with_it(llama, outer):
    want = generate(llama, prompt(1)).sequences
    if outer: first = patch_unsloth_attention(llama, spectral_config=lossless(llama))
    with spectral(llama, spectral_config=lossless(llama), use_spectral_attention=not outer): patch_unsloth_attention(llama, spectral_config=lossless(llama), use_spectral_attention=outer)
    assert llama.__dict__.get("_spectral_patch") is (first if outer else None) and llama.config._attn_implementation == ("spectral" if outer else "eager")
    assert torch.equal(generate(llama, prompt(1)).sequences, want)


def test_cache_that_stands_still_raises(llama, monkeypatch):
    from spectral_nb.cache import SpectralLayer
    with spectral(llama, spectral_config=lossless(llama)):
        append = SpectralLayer.append
        monkeypatch.setattr(SpectralLayer, "append", lambda self, k, v, **kw: append(self, k, v, **kw) if k.shape[2] > 1 else None)
        with pytest.raises(RuntimeError, match="decoding did not reach the spectral cache"): generate(llama, prompt(1))


def test_without_a_cache(llama):
    want = generate(llama, prompt(1), use_cache=False).sequences
    with spectral(llama, layer_weights="equal"): assert torch.equal(generate(llama, prompt(1), use_cache=False).sequences, want)


def test_attention_that_bypasses_the_interface_gets_rebuilt_states(llama, caplog):
    "As Unsloth's Gemma 3 does: it touches the states before the attention function sees them."
    import transformers.models.llama.modeling_llama as M
    eager = M.eager_attention_forward
    want = generate(llama, prompt(3)).sequences
    old = M.LlamaAttention.forward
    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **kw):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = M.apply_rotary_pos_emb(q, k, *position_embeddings)
        k, v = past_key_values.update(k, v, self.layer_idx)
        out = eager(self, q, k * 1, v, attention_mask, scaling=self.scaling)[0]
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None
    M.LlamaAttention.forward = forward
    try:
        with caplog.at_level(logging.WARNING), spectral(llama, spectral_config=lossless(llama)): out = generate(llama, prompt(3))
    finally: M.LlamaAttention.forward = old
    assert torch.equal(out.sequences, want) and "cold states are rebuilt" in caplog.text
    for layer in out.past_key_values.layers: assert layer.padding_per_row().tolist() == [0, 31, 70]


def test_lora():
    peft = pytest.importorskip("peft")
    model = tiny_model.__wrapped__("qwen3")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    want = generate(model, prompt(3)).sequences
    with spectral(model, spectral_config=lossless(model)) as patched:
        assert torch.equal(generate(model, prompt(3)).sequences, want) and patched.decode == [NEW - 1] * 2
    assert model.get_base_model().config._attn_implementation == "eager"


def test_text_and_image():
    "Gemma 3 with its vision tower, which keeps the attention implementation that it had."
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration
    text = {k: v for k, v in CONFIGS["gemma3"].to_dict().items() if k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "query_pre_attn_scalar", "sliding_window", "layer_types", "pad_token_id")}
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=500, boi_token_index=501, eoi_token_index=502)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1: p.normal_(0, .08)
    model.set_attn_implementation({"": "eager", "text_config": "eager", "vision_config": "sdpa"})
    inputs = prompt(2)
    inputs["input_ids"][:, 80:84] = 500
    inputs |= dict(pixel_values=torch.randn(2, 3, 28, 28), token_type_ids=(inputs["input_ids"] == 500).long())
    want, before = generate(model, inputs), calibrate.implementations(model)
    with spectral(model, spectral_config=lossless(model.model.language_model)) as patched: got = generate(model, inputs)
    assert torch.equal(got.sequences, want.sequences) and patched.decode == [NEW - 1] * 2 and len(got.past_key_values.layers[1].cold)
    calibrate.layer_weights(model, progress=False, ids=prompt(1, 600)["input_ids"], tokens=600)
    assert calibrate.implementations(model) == before and before["vision_config"] == "sdpa"


def test_unsupported_models_are_left_alone():
    from transformers import AutoConfig, AutoModelForCausalLM
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    before = dict(model.__dict__)
    with pytest.raises(ValueError, match="'gpt2' is not supported; supported: cohere"): patch_unsloth_attention(model)
    assert model.__dict__ == before and model_route(model) == "transformers"


@pytest.mark.parametrize("spectral_attention", [True, False])
def test_an_unknown_model_is_measured_once(llama, tmp_path, monkeypatch, spectral_attention):
    "By a patch, whatever its settings, as by `spectral_cache`; a model that cannot be measured is told of."
    want = calibrate.layer_weights(llama, tmp_path / "plain", progress=False)
    monkeypatch.setenv("SPECTRAL_NB_CACHE", str(tmp_path / "ours"))
    llama.train()
    with spectral(llama, ratio=8, use_spectral_attention=spectral_attention) as patched: ours = patched.layer_weights
    assert llama.training and llama.config._attn_implementation == "eager" and not any(patched.prefill + patched.decode)
    llama.eval()
    assert [x for w in ours for x in w] == pytest.approx([x for w in want for x in w], rel=.05)
    monkeypatch.setattr(calibrate, "probe_layers", None)
    with spectral(llama, ratio=8) as patched: assert patched.layer_weights == calibrate.spectral_cache(llama, ratio=8).layer_weights == ours
    monkeypatch.setenv("SPECTRAL_NB_CACHE", str(tmp_path / "nothing"))
    with pytest.warns(UserWarning, match="could not be measured .TypeError.* lower ratio"), spectral(llama, ratio=8) as patched: assert patched.layer_weights is None
    assert llama.config._attn_implementation == "eager"


def test_stopped_while_measuring(llama, tmp_path, monkeypatch):
    "The model is not left patched."
    def stop(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setenv("SPECTRAL_NB_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrate, "probe_layers", stop)
    with pytest.raises(KeyboardInterrupt): patch_unsloth_attention(llama, ratio=8)
    assert not [k for k in llama.__dict__ if k.startswith("_spectral") or k in ("forward", "generate")] and llama.config._attn_implementation == "eager"
