"The real Unsloth on a CPU, patched: same tokens where nothing may be lost, recall where something is, and every bug of the earlier project by name."
import copy
import functools
import gc
import importlib.util
import inspect
import json
import logging
import re
import shutil
import sys
import types
import warnings
import weakref

import pytest

if importlib.util.find_spec("unsloth") is None: pytest.skip("unsloth is not installed; tests/run_unsloth.sh makes an environment with it", allow_module_level=True)
import unsloth_cpu  # noqa: E402,F401  (before anything that imports torch users)

MODULES = [m for n, m in sorted(sys.modules.items()) if n.startswith(("unsloth.models.", "transformers.models.", "transformers.generation.", "transformers.cache_utils"))]


def identities():
    "Which object every function and method of Unsloth and transformers is."
    out = {}
    for m in MODULES:
        for name, o in vars(m).items():
            if inspect.isfunction(o): out[m.__name__, name] = id(o)
            elif inspect.isclass(o) and o.__module__ == m.__name__:
                out |= {(m.__name__, name, k): id(v) for k, v in vars(o).items() if inspect.isfunction(v)}
    return out


BEFORE = identities()
import spectral_nb.cache as cache_module  # noqa: E402
import spectral_nb.integration as I  # noqa: E402

AFTER = identities()

import torch  # noqa: E402
import unsloth.models.llama as L  # noqa: E402
from host_cases import CountOps, LiveBytes, no_kernels, tiny  # noqa: E402
from tiny import BASE, CONFIGS, head_dim, prompt, tiny_model  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerFast  # noqa: E402
from unsloth import FastLanguageModel  # noqa: E402

from spectral_nb import calibrate  # noqa: E402
from spectral_nb.attention import attend  # noqa: E402
from spectral_nb.cache import SpectralCache, SpectralLayer  # noqa: E402
from spectral_nb.codec import SpectralConfig  # noqa: E402
from spectral_nb.integration import FastPathCache, check_unsloth, patch_unsloth_attention, spectral, unpatch_unsloth_attention  # noqa: E402
from spectral_nb.needle import answer_matches, make_needles, plant  # noqa: E402
from spectral_nb.pocket import data_path, haystack  # noqa: E402

FAST = "llama mistral mistral_window qwen2 qwen3 gemma gemma2".split()
NEW = 40
TMP = []


@pytest.fixture(scope="module", autouse=True)
def checkpoints(tmp_path_factory): TMP.append(tmp_path_factory.mktemp("tiny"))


def tokenizer():
    vocab = {f"t{i}": i for i in range(512)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab=vocab, unk_token="t0")), unk_token="t0", bos_token="t1", eos_token="t2",
                                   pad_token="t3", model_max_length=1024)


def checkpoint(name):
    "A tiny random checkpoint on disk; the embedding of the padding token is zero, as Unsloth makes it."
    path = TMP[0] / name
    if not path.exists():
        model = tiny_model.__wrapped__(name)
        with torch.no_grad(): model.get_input_embeddings().weight[3].zero_()
        model.save_pretrained(path)
        tokenizer().save_pretrained(path)
    return path


def load(path, dtype=torch.float32, length=512):
    return FastLanguageModel.from_pretrained(str(path), dtype=dtype, load_in_4bit=False, max_seq_length=length, use_gradient_checkpointing=False)[0]


@functools.cache
def loaded(name): return load(checkpoint(name))


@functools.cache
def reference(name): return AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture
def llama():
    m = loaded("llama")
    yield m
    unpatch_unsloth_attention(m)


def lossless(model, **kw): return SpectralConfig.lossless(head_dim(model), **{"coding": "rank", "block_size": 32, "hot_buffer_size": 16, **kw})
def lossy(**kw): return SpectralConfig(**{"coding": "rank", "block_size": 32, "hot_buffer_size": 16, "k_rank_keys": 8, "k_rank_values": 8, **kw})


def generate(model, inputs, **kw):
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 3, **kw})


def difference(a, b):
    "Largest difference of logits, relative to the largest logit."
    a, b = torch.stack(a.logits), torch.stack(b.logits)
    return ((a - b).abs().max() / b.abs().max()).item()


# --- the installed Unsloth is the one that the integration was written for

@pytest.mark.parametrize("family", I.FAST_TYPES)
def test_guard_factories_and_signatures(family):
    assert check_unsloth(family) == [], "Unsloth moved; plan B is used until spectral_nb.integration.LOOPS and DECODE_ARGS are brought up to date"


def test_guard_dispatch_list():
    "The families of the fast path are those that Unsloth's loader dispatches."
    from unsloth.models import loader
    source = re.sub("#.*", "", inspect.getsource(loader))
    found = re.findall(r'model_type == "(\w+)":(?:(?!model_type ==).)*?dispatch_model = (?:Fast\w+)', source, re.S)
    assert set(found) == set(I.FAST_TYPES), f"FastLanguageModel now dispatches {sorted(set(found))} to its fast path; bring FAST_TYPES and LOOPS up to date"


@pytest.mark.parametrize("name", FAST)
def test_guard_prefill(name):
    attn = loaded(name).model.layers[0].self_attn
    names = list(inspect.signature(attn.forward).parameters)
    assert not [a for a in I.PREFILL_ARGS if a not in names], f"prompt attention of {name} now takes {names}"
    assert attn._unsloth_fast_path, "Unsloth no longer marks the modules of its fast path"


def test_guard_shim_runs_the_gpu_code():
    assert "unsloth.models.llama" in sys.modules
    assert loaded("llama").generate.__name__ == "unsloth_fast_generate"


@pytest.mark.parametrize("name, length, padding, dense", [("mistral", 60, 0, False), ("mistral", 60, 9, True), ("mistral_window", 20, 0, False), ("mistral_window", 60, 0, True)])
def test_prompt_without_padding_needs_no_mask(name, length, padding, dense, monkeypatch):
    "Stock Mistral makes a mask of prompt length squared for every prompt; a patched one only where rows are padded or a window ends inside the prompt."
    import unsloth.models.mistral as M
    model, run, seen = loaded(name), M.run_attention, []
    monkeypatch.setattr(M, "run_attention", lambda **kw: seen.append(kw["context"].attention_mask) or run(**kw))
    inputs = prompt(2, length, padding=(0, padding))
    generate(model, inputs, max_new_tokens=2)
    assert all(m.shape[-2:] == (length, length) for m in seen) and len(seen) == 2
    with spectral(model, spectral_config=lossless(model)): generate(model, inputs, max_new_tokens=2)
    assert [m is not None for m in seen[2:]] == [dense] * 2


def test_importing_changes_nothing():
    assert AFTER == BEFORE


def test_patching_changes_no_class_and_no_module(llama):
    now = identities()
    with spectral(llama): assert identities() == now
    assert identities() == now


def test_contamination_check_of_the_diagnostics(llama):
    "It finds what the patch replaces, all of it on this model's instances, and no copy of a replaced function elsewhere."
    from spectral_nb.tracing import check_import_contamination
    report = check_import_contamination(llama)
    assert report.verdict.status == "ok" and not report.stale and not report.left
    assert report.changes and all(r["where"].startswith("model.") for r in report.changes)


# --- nothing lost: same tokens and logits as plain transformers

@pytest.mark.parametrize("plan", ["A", "B"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", FAST)
def test_same_as_transformers(name, batch, plan):
    model, inputs = loaded(name), prompt(batch)
    want, stock = generate(reference(name), inputs), generate(model, inputs)
    with spectral(model, spectral_config=lossless(model), plan=plan) as patched:
        got = generate(model, inputs)
        assert patched.plan == plan
    assert torch.equal(got.sequences, want.sequences)
    assert difference(got, want) < 1e-5
    assert patched.prefill == [1, 1] and patched.decode == [NEW - 1] * 2
    cache = got.past_key_values
    assert isinstance(cache, FastPathCache) and cache.get_seq_length() == 150 + NEW - 1
    for layer in cache.cache.spectral_layers: assert len(layer.cold) == (150 + NEW - 1 - 16) // 32 * 32
    again = generate(model, inputs)
    assert torch.equal(again.sequences, stock.sequences) and torch.equal(torch.stack(again.logits), torch.stack(stock.logits))


@pytest.mark.parametrize("name", ["cohere", "granite", "gemma3", "qwen3_moe"])
def test_fastmodel_families(name):
    "By a transformers cache; Gemma 3 and Qwen 3 MoE compute attention by themselves and get rebuilt states."
    model = loaded(name)
    for batch in (1, 3):
        inputs = prompt(batch)
        stock = generate(model, inputs)
        want = stock if name in ("gemma3", "qwen3_moe") else generate(reference(name), inputs)  # Unsloth computes these two in half precision
        with spectral(model, spectral_config=lossless(model)) as patched: got = generate(model, inputs)
        assert patched.route == "fastmodel"
        assert torch.equal(got.sequences, want.sequences)
        assert difference(got, want) < (1e-2 if want is stock else 1e-5)
        assert isinstance(got.past_key_values, SpectralCache)
        assert patched.prefill == [1, 1] and patched.decode == [NEW - 1] * 2
        again = generate(model, inputs)
        assert torch.equal(torch.stack(again.logits), torch.stack(stock.logits))


@pytest.mark.parametrize("name", ["cohere", "granite"])
def test_fastmodel_turns_sampling_beams_and_refusals(name):
    "Stock FastModel takes no cache for generate at all, since it forces a static one."
    model, first, second = loaded(name), prompt(1, 120)["input_ids"], prompt(1, 60, seed=1)["input_ids"]
    def turns(m):
        one = generate(m, dict(input_ids=first, attention_mask=torch.ones_like(first)), max_new_tokens=20)
        ids = torch.cat([one.sequences, second], 1)
        return generate(m, dict(input_ids=ids, attention_mask=torch.ones_like(ids)), max_new_tokens=20, past_key_values=one.past_key_values)
    def sample():
        torch.manual_seed(0)
        return generate(model, prompt(3), do_sample=True, temperature=.8, top_p=.9).sequences
    def beams(): return generate(model, prompt(2), num_beams=3, max_new_tokens=24, output_logits=False).sequences
    want, sampled, searched = turns(reference(name)), sample(), beams()
    with spectral(model, spectral_config=lossless(model)):
        got = turns(model)
        assert torch.equal(got.sequences, want.sequences) and difference(got, want) < 1e-5
        assert got.past_key_values.get_seq_length() == 120 + 20 + 60 + 20 - 1
        assert torch.equal(sample(), sampled) and torch.equal(beams(), searched)
        with pytest.raises(ValueError, match="prompt-lookup decoding"): generate(model, prompt(1), prompt_lookup_num_tokens=3)
        with pytest.raises(ValueError, match="another cache"): generate(model, prompt(1), cache_implementation="static")
    assert torch.equal(sample(), sampled)


@pytest.mark.parametrize("name", FAST)
def test_beam_search(name):
    model, inputs = loaded(name), prompt(2)
    kw = dict(num_beams=3, max_new_tokens=24, output_logits=False)
    want = generate(model, inputs, **kw) # not plain transformers', whose beam search fails once Unsloth is loaded
    for plan in ("A", "B"):
        with spectral(model, spectral_config=lossless(model), plan=plan): assert torch.equal(generate(model, inputs, **kw).sequences, want.sequences)


@pytest.mark.parametrize("plan", ["A", "B"])
@pytest.mark.parametrize("name", FAST)
def test_turns_on_a_returned_cache(name, plan):
    model, first, second = loaded(name), prompt(1, 120)["input_ids"], prompt(1, 60, seed=1)["input_ids"]
    def turns(m):
        one = generate(m, dict(input_ids=first, attention_mask=torch.ones_like(first)), max_new_tokens=20)
        ids = torch.cat([one.sequences, second], 1)
        return generate(m, dict(input_ids=ids, attention_mask=torch.ones_like(ids)), max_new_tokens=20, past_key_values=one.past_key_values)
    want = turns(reference(name))
    with spectral(model, spectral_config=lossless(model), plan=plan): got = turns(model)
    assert torch.equal(got.sequences, want.sequences) and difference(got, want) < 1e-5
    assert got.past_key_values.get_seq_length() == 120 + 20 + 60 + 20 - 1


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("batch", [1, 3])
def test_chunked_prefill(name, batch):
    "By hand, outside inference mode, without position ids; then one step of decoding."
    model, inputs = loaded(name), prompt(batch)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        want = reference(name)(ids, attention_mask=mask, position_ids=positions).logits[:, -1]
        with spectral(model, spectral_config=lossless(model)):
            past = None
            for a, b in ((0, 50), (50, 100), (100, 101), (101, 149), (149, 150)): # of the shortest row, the first part is nothing but padding
                out = model(input_ids=ids[:, a:b], attention_mask=mask[:, :b], past_key_values=past, use_cache=True, **({} if past else dict(position_ids=positions[:, a:b])))
                past = out.past_key_values
    assert past.get_seq_length() == 150 and all(o.padding_per_row().tolist() == [0, 31, 70][:batch] for o in past.cache.spectral_layers)
    assert ((out.logits[:, -1] - want).abs().max() / want.abs().max()) < 1e-5


def test_generate_with_prefill_chunk_size(llama):
    inputs = prompt(1)
    want = generate(reference("llama"), inputs)
    with spectral(llama, spectral_config=lossless(llama)): got = generate(llama, inputs, prefill_chunk_size=64)
    assert torch.equal(got.sequences, want.sequences)


@pytest.mark.parametrize("patched", [True, False])
def test_padding_that_sees_everything(patched):
    "Masks that transformers makes let it, once Unsloth is loaded. A row's padding may fill whole chunks."
    model, inputs = reference("cohere"), prompt(3)
    want = generate(model, inputs)
    if patched:
        with spectral(model, spectral_config=lossless(model)): whole, parts = (generate(model, inputs, prefill_chunk_size=n) for n in (150, 29))
    else:
        model.set_attn_implementation("spectral")
        whole, parts = (generate(model, inputs, prefill_chunk_size=n, past_key_values=SpectralCache(model.config, lossless(model))) for n in (150, 29))
        model.set_attn_implementation("eager")
    for got in (whole, parts):
        assert torch.equal(got.sequences, want.sequences)
        for layer in got.past_key_values.layers: assert layer.padding_per_row().tolist() == [0, 31, 70]


def test_gemma2_without_padding_or_mask():
    "Prompts of a Gemma 2 without padding get a mask of the longest prompt there may be."
    model, inputs = loaded("gemma2"), prompt(3, padding=())
    want = generate(reference("gemma2"), inputs)
    with spectral(model, spectral_config=lossless(model, use_attention_weighted_svd=True)): got = generate(model, inputs)
    assert torch.equal(got.sequences, want.sequences)
    ids = inputs["input_ids"]
    with torch.no_grad(), spectral(model, spectral_config=lossless(model)):
        past = model(input_ids=ids[:, :100], use_cache=True).past_key_values
        out = model(input_ids=ids[:, 100:], past_key_values=past, use_cache=True)
    assert ((out.logits[:, -1] - want.logits[0]).abs().max() / want.logits[0].abs().max()) < 1e-5


@pytest.mark.parametrize("name", FAST)
def test_sampling(name):
    model = loaded(name)
    def sample():
        torch.manual_seed(0)
        return generate(model, prompt(3), do_sample=True, temperature=.8, top_p=.9).sequences
    want = sample()
    assert not torch.equal(want, generate(model, prompt(3)).sequences)
    with spectral(model, spectral_config=lossless(model)): assert torch.equal(sample(), want)


def test_without_an_attention_mask(llama):
    ids = prompt(1)["input_ids"]
    want = generate(reference("llama"), prompt(1))
    with spectral(llama, spectral_config=lossless(llama)): got = generate(llama, dict(input_ids=ids))
    assert torch.equal(got.sequences, want.sequences) and difference(got, want) < 1e-5


@pytest.mark.parametrize("plan", ["A", "B"])
def test_autocast_and_inference_mode_by_hand(plan):
    "A cache that was begun in inference mode under autocast goes on outside of both, and the other way round; no arithmetic of the cache is autocast."
    model = load(checkpoint("llama"), torch.float32)
    ids, steps = prompt(1)["input_ids"], []
    modes = dict(plain=lambda: torch.no_grad(), inference=lambda: torch.inference_mode(), autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    def run(first, then):
        past = None
        for mode, (a, b) in zip((first, then, first), ((0, 60), (60, 149), (149, 150))):
            with torch.no_grad(), modes[mode](): out = model(input_ids=ids[:, a:b], past_key_values=past, use_cache=True)
            past = out.past_key_values
        return out.logits[:, -1].float(), past
    want = reference("llama")(ids).logits[:, -1]
    error = lambda got: ((got - want).abs().max() / want.abs().max()).item()
    with spectral(model, spectral_config=lossless(model), plan=plan):
        for first, then in (("plain", "inference"), ("inference", "plain")):
            assert error(run(first, then)[0]) < 1e-5
        for first, then in (("autocast", "plain"), ("plain", "autocast"), ("autocast", "autocast")):
            got, past = run(first, then)
            assert error(got) < .1
            for layer in past.cache.spectral_layers:
                basis = layer.cold.keys.basis.float()
                assert (basis @ basis.mT - torch.eye(basis.shape[-1])).abs().max() < 1e-4, "bases were fitted under autocast"


def test_rebuilt_states_give_the_same(llama):
    inputs = prompt(3)
    with spectral(llama, spectral_config=lossy()): compressed = generate(llama, inputs)
    with spectral(llama, spectral_config=lossy(), use_spectral_attention=False): rebuilt = generate(llama, inputs)
    assert torch.equal(compressed.sequences, rebuilt.sequences) and difference(compressed, rebuilt) < 1e-4


def test_rank_coding_error_is_bounded(llama):
    "First decoded logits under int8 coefficients of half the rank."
    inputs = prompt(1)
    want = generate(llama, inputs, max_new_tokens=2)
    with spectral(llama, spectral_config=lossy(k_rank_keys=32, k_rank_values=32, hot_buffer_size=0)): full = difference(generate(llama, inputs, max_new_tokens=2), want)
    with spectral(llama, spectral_config=lossy(k_rank_keys=16, k_rank_values=16, hot_buffer_size=0)): half = difference(generate(llama, inputs, max_new_tokens=2), want)
    assert 0 < full < .02 and full < half < .5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    "Unsloth runs generate under autocast in the model's dtype (on this CPU it makes float16 of bfloat16)."
    model = load(checkpoint("llama"), dtype)
    stock = generate(model, prompt(3), max_new_tokens=8)
    with spectral(model, spectral_config=lossless(model)) as patched: got = generate(model, prompt(3), max_new_tokens=8)
    assert patched.decode == [7, 7]
    assert difference(got, stock) < .03
    assert all(t.dtype == model.dtype for t in (got.past_key_values.layers[0].landmark_keys, got.past_key_values.layers[0].get_kv()[0]))


def test_bfloat16(monkeypatch):
    "On a device that Unsloth takes to support it."
    rebound = unsloth_cpu.rebind("SUPPORTS_BFLOAT16", True)
    try: model = load(checkpoint("qwen2"), torch.bfloat16)
    finally: unsloth_cpu.rebind("SUPPORTS_BFLOAT16", False)
    assert rebound and model.dtype == torch.bfloat16
    stock = generate(model, prompt(3), max_new_tokens=8)
    for plan in ("A", "B"):
        with spectral(model, spectral_config=lossless(model), plan=plan) as patched: got = generate(model, prompt(3), max_new_tokens=8)
        assert patched.decode == [7, 7]
        assert ((got.logits[1] - stock.logits[1]).abs().max() / stock.logits[1].abs().max()).item() < .05
        layer = got.past_key_values.layers[0]
        assert layer.landmark_keys.dtype == layer.get_kv()[0].dtype == torch.bfloat16
    with spectral(model, coding="spectral", bits=6, fit_length=144, hot_buffer_size=16, layer_weights="equal"): got = generate(model, prompt(3), max_new_tokens=8)
    assert torch.isfinite(torch.stack(got.logits)).all() and len(got.past_key_values.layers[0].cold) == 128


@pytest.mark.parametrize("name", ["mistral", "qwen3", "gemma2"])
def test_lora(name):
    model = FastLanguageModel.get_peft_model(load(checkpoint(name)), r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], use_gradient_checkpointing=False)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n: p.normal_(0, .05)
    base = calibrate.fingerprint(reference(name))
    assert all(calibrate.same_model(calibrate.fingerprint(m), base) for m in (model, model.get_base_model())), "layer weights of the base model are not found for it with LoRA"
    FastLanguageModel.for_inference(model)
    inputs = prompt(3)
    plain = generate(reference(name), inputs)
    want = generate(model, inputs)
    for plan in ("A", "B"):
        with spectral(model, spectral_config=lossless(model), plan=plan) as patched: got = generate(model, inputs)
        assert patched.decode == [NEW - 1] * 2
        assert torch.equal(got.sequences, want.sequences) and difference(got, want) < 1e-5
    assert difference(want, plain) > 1e-3
    assert torch.equal(torch.stack(generate(model, inputs).logits), torch.stack(want.logits))


def test_attention_weighted_bases(llama):
    with spectral(llama, spectral_config=lossy(use_attention_weighted_svd=True)): weighted = generate(llama, prompt(3))
    with spectral(llama, spectral_config=lossy()): plain = generate(llama, prompt(3))
    assert weighted.past_key_values.layers[0].importance is not None
    assert 0 < difference(weighted, plain)


def test_prompt_queries_are_those_of_the_model(llama):
    "What codings get to see of the prompt's queries, against those that Unsloth's own rotary embedding makes."
    seen, ours = [], []
    rope = L.fast_rope_embedding
    def spy(Q, K, cos, sin, idx=None):
        out = rope(Q, K, cos, sin, idx)
        seen.append(out[0])
        return out
    queries = I.some_queries
    try:
        L.fast_rope_embedding, I.some_queries = spy, lambda *a, **k: ours.append(queries(*a, **k)) or ours[-1]
        with spectral(llama, spectral_config=lossy(use_attention_weighted_svd=True)): generate(llama, prompt(3), max_new_tokens=1)
    finally: L.fast_rope_embedding, I.some_queries = rope, queries
    assert len(ours) == 2
    for a, b in zip(ours, seen): torch.testing.assert_close(a, b[:, :, -a.shape[2]:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "granite"])
def test_spectral_coding_is_what_plain_transformers_gives(name):
    "Bases are fitted to the same queries on all routes: those recomputed here, those that pass through transformers' attention there."
    config = SpectralConfig(coding="spectral", bits=3, fit_length=144, hot_buffer_size=16)
    with spectral(loaded(name), spectral_config=config, layer_weights="equal"): ours = generate(loaded(name), prompt(3), max_new_tokens=8)
    with spectral(reference(name), spectral_config=config, layer_weights="equal"): plain = generate(reference(name), prompt(3), max_new_tokens=8)
    dense = generate(reference(name), prompt(3), max_new_tokens=8)
    layers = [o for o in ours.past_key_values.layers if isinstance(o, SpectralLayer)]
    assert layers and all(len(o.cold) == 128 for o in layers)
    assert difference(ours, plain) < .1 * difference(dense, plain)


@pytest.mark.parametrize("name", ["mistral_window", "gemma2", "qwen3", "cohere"])
def test_divergence_is_recorded_on_every_route(name):
    "Errors of each layer's attention output, layers with a sliding window included; nothing coded, no error."
    from spectral_nb.diagnostics import log_ground_truth
    model, ids = loaded(name), prompt(1)["input_ids"]
    tok = AutoTokenizer.from_pretrained(checkpoint(name))
    coded, exact = (log_ground_truth(model, tok, ids, config, new_tokens=4) for config in (lossy(), lossless(model)))
    some = any(isinstance(o, SpectralLayer) for o in SpectralCache(model.config, lossy()).layers)
    assert [len(s.layer_errors) for s in coded.steps] == [2] * 4
    assert max(max(s.layer_errors) for s in exact.steps) < 1e-4
    for s in coded.steps[1:]: assert (max(s.layer_errors) > .01) == some


@pytest.mark.parametrize("kind, batch", [("llama", 1), ("mistral", 4)])
def test_torch_operations_of_a_decode_step(kind, batch, monkeypatch):
    "What limits decoding on a GPU: per layer and token, fewer operations than stock Unsloth and four kernels, the same for padded rows."
    path = TMP[0] / f"host_{kind}"
    if not path.exists():
        tiny(8, kind).save_pretrained(path)
        tokenizer().save_pretrained(path)
    model, ids, rope = load(path, length=2048), torch.randint(4, 512, (batch, 700)), lambda *args, **kw: True # Unsloth's kernel for one token's rotary embedding
    for m in [m for n, m in sys.modules.items() if n.startswith("unsloth.models.") and "decode_rope_inplace" in vars(m)]: monkeypatch.setattr(m, "decode_rope_inplace", rope)
    mask = (torch.arange(704) >= 20 * torch.arange(batch)[:, None]).long() # of several rows some are padded
    def count():
        "Operations of one step, after some."
        with torch.inference_mode():
            past = model(input_ids=ids, attention_mask=mask[:, :700], use_cache=True, return_dict=True).past_key_values
            for i in range(4):
                with CountOps() as c: past = model(input_ids=ids[:, :1], attention_mask=mask[:, :701 + i], position_ids=torch.full((batch, 1), 700 + i), past_key_values=past, use_cache=True, return_dict=True).past_key_values
        return sum(c.seen.values()) / 8
    stock = count()
    with no_kernels() as launched, spectral(model, ratio=8, use_triton_kernel=True, layer_weights="equal") as patched:
        patched.turn_in_place = rope
        ours = count()
    assert ours < stock - 5 and ours < 56, (ours, stock) # what a step does once counts here as an eighth
    assert launched == dict.fromkeys(("prepare", "decode", "merge", "_write"), 4 * 8)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_prompt_is_coded_when_nothing_else_is_alive(kind, monkeypatch):
    "Live bytes when bases are fitted: the states themselves, a few sampled queries and the model's output; no activation of the last layer, no copy of its keys and values."
    path, begun = TMP[0] / f"host_{kind}", []
    if not path.exists():
        tiny(8, kind).save_pretrained(path)
        tokenizer().save_pretrained(path)
    model, ids = load(path, length=2048), torch.randint(4, 512, (1, 1500))
    fit, live = cache_module.fit_layers, LiveBytes()
    def begin(layers, *args):
        live.hold(torch.empty(1).untyped_storage()) # count now
        begun.append((live.now, sum(t.untyped_storage().nbytes() for o in layers for t in o.tensors().values())))
        return fit(layers, *args)
    monkeypatch.setattr(cache_module, "fit_layers", begin)
    with torch.inference_mode(), spectral(model, ratio=8, exact_dtype="float32", layer_weights="equal"):
        model(input_ids=ids[:, :300], use_cache=True, return_dict=True) # tables are made
        with live: past = model(input_ids=ids, use_cache=True, return_dict=True, logits_to_keep=1).past_key_values
    (alive, held), one = begun[-1], 2 * 2 * 1500 * 64 * 4 # a layer's keys and values
    assert held > 8 * one and len(past.layers[7].cold) and alive < held + one, (alive / one, held / one)


# --- recall of a trained model

@functools.cache
def pocket(kind):
    "The pocket model as a checkpoint of another model type: the same weights, zero biases where the type has some."
    path = TMP[0] / f"pocket_{kind}"
    shutil.copytree(data_path(), path)
    if kind != "llama":
        old = AutoModelForCausalLM.from_pretrained(data_path(), dtype=torch.float32)
        c = old.config.to_dict()
        keep = "vocab_size hidden_size num_hidden_layers intermediate_size max_position_embeddings tie_word_embeddings num_attention_heads num_key_value_heads rope_parameters rms_norm_eps bos_token_id eos_token_id pad_token_id".split()
        config = AutoConfig.for_model(kind, **{k: c[k] for k in keep}, head_dim=c["head_dim"], **(dict(sliding_window=None) if kind == "mistral" else {}))
        new = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        missing, unexpected = new.load_state_dict(old.state_dict(), strict=False)
        assert not unexpected and all(k.endswith("bias") for k in missing)
        with torch.no_grad():
            for k, p in new.named_parameters():
                if k.endswith("bias"): p.zero_()
            new.resize_token_embeddings(8256, mean_resizing=False).weight[8192:] = 0 # the tokenizer class of qwen2 adds tokens of its own
        new.save_pretrained(path)
        about = json.loads((path / calibrate.WEIGHTS_FILE).read_text())
        (path / calibrate.WEIGHTS_FILE).write_text(json.dumps(about | dict(fingerprint=calibrate.fingerprint(new))))
    return load(path, length=2048), AutoTokenizer.from_pretrained(data_path())


CODECS = dict(rank=dict(coding="rank", block_size=128, k_rank_keys=64, k_rank_values=128, hot_buffer_size=32))
CODECS["spectral"] = dict(ratio=6)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_recall_on_the_pocket_model(kind, codec):
    import random
    model, tok = pocket(kind)
    rng, trials = random.Random(0), []
    for depth in (.1, .5, .9):
        needle = make_needles(1, rng)[0]
        trials.append((plant(tok, haystack("report")[0], needle, depth, 1000), needle))
    def recall():
        ids = torch.tensor([t.ids for t, _ in trials])
        out = generate(model, dict(input_ids=ids, attention_mask=torch.ones_like(ids)), max_new_tokens=8, pad_token_id=2)
        return [answer_matches(tok.decode(o[1000:]), n) for o, (_, n) in zip(out.sequences, trials)], out
    dense, stock = recall()
    assert all(dense), "the dense model itself fails"
    with spectral(model, **CODECS[codec]) as patched: ours, out = recall()
    a, b = stock.logits[1], out.logits[1] # of the first step that attends to the cache
    assert 0 < ((a - b).norm(dim=-1) / a.norm(dim=-1)).max() < .1
    if codec == "spectral": assert len(patched.layer_weights) == 6, "weights measured beside the checkpoint were not found for the model as Unsloth loaded it"
    assert all(ours)
    assert all(len(o.cold) for o in out.past_key_values.layers)


# --- what errors of each layer cost

@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_a_16_bit_model_are_found_and_recall(dtype, monkeypatch):
    "Two codes in 3000 tokens at 8x, that are lost where every layer gets the same share."
    import random
    monkeypatch.setattr(calibrate, "probe_layers", None)
    model, tok, dtype = load(data_path(), torch.float16, 4096), AutoTokenizer.from_pretrained(data_path()), getattr(torch, dtype)
    model.to(dtype).config.dtype = dtype # on a CPU Unsloth loads bfloat16 as float16
    rng, trials = random.Random(0), []
    for depth in (.1, .3, .5, .7, .9):
        needle = make_needles(1, rng)[0]
        trials.append((plant(tok, haystack("report")[0], needle, depth, 3000), needle))
    trials = trials[::4]
    ids = torch.tensor([t.ids for t, _ in trials])
    with spectral(model, ratio=8) as patched: out = generate(model, dict(input_ids=ids, attention_mask=torch.ones_like(ids)), max_new_tokens=8, pad_token_id=2)
    assert [list(w) for w in patched.layer_weights] == json.loads((data_path() / calibrate.WEIGHTS_FILE).read_text())["weights"]
    assert [answer_matches(tok.decode(o[3000:]), n) for o, (_, n) in zip(out.sequences, trials)] == [True] * len(trials)
    assert out.past_key_values.ratio > 7


@pytest.mark.parametrize("name,tokens", [("llama", 512), ("qwen3", 512), ("gemma2", 512), ("granite", 1024)]) # Unsloth's own inference was loaded for 512
def test_an_unknown_model_is_measured_once(name, tokens, tmp_path, monkeypatch):
    "Through the patch, with the numbers of plain transformers; the second patch reads the file."
    want = calibrate.layer_weights(reference(name), tmp_path / "plain", tokens=tokens, progress=False)
    monkeypatch.setenv("SPECTRAL_NB_CACHE", str(tmp_path / "ours"))
    model = loaded(name)
    model.train()
    with spectral(model, ratio=8) as patched:
        assert not any(patched.prefill + patched.decode) and model.training
        ours = patched.layer_weights
    model.eval()
    assert [x for w in ours for x in w] == pytest.approx([x for w in want for x in w], rel=.05)
    assert any(x > 0 for w in ours for x in w) and len(list((tmp_path / "ours").iterdir())) == 1
    monkeypatch.setattr(calibrate, "probe_layers", None)
    with spectral(model, ratio=8) as patched: assert patched.layer_weights == ours


def test_a_model_that_cannot_be_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTRAL_NB_CACHE", str(tmp_path))
    model = load(checkpoint("llama"), length=256) # the text to measure on is longer
    with pytest.warns(UserWarning, match="could not be measured .ValueError: need at least 512 tokens, got 256.. Every layer gets the same share .* layer_weights='equal'"):
        patched = patch_unsloth_attention(model, ratio=8)
    assert patched.layer_weights is None and not list(tmp_path.iterdir())
    assert generate(model, prompt(1), max_new_tokens=2).sequences.shape[1] == 152
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kw in (dict(layer_weights="equal"), dict(layer_weights=[(1., 1.)] * 2), dict(k_rank_keys=8)): patch_unsloth_attention(model, **{"ratio": None if "k_rank_keys" in kw else 8, **kw})
    with pytest.raises(ValueError, match="'equal' or None, got 'same'"): patch_unsloth_attention(model, ratio=8, layer_weights="same")


# --- settings, refusals, restoring

def test_patching_twice_is_harmless(llama):
    one = patch_unsloth_attention(llama, spectral_config=lossless(llama))
    assert patch_unsloth_attention(llama, spectral_config=lossless(llama)) is one
    want = generate(reference("llama"), prompt(1))
    assert torch.equal(generate(llama, prompt(1)).sequences, want.sequences)
    assert one.prefill == [1, 1]
    unpatch_unsloth_attention(llama)
    unpatch_unsloth_attention(llama)
    assert not [k for m in llama.modules() for k in m.__dict__ if k.startswith("_spectral")]
    assert "forward" not in llama.__dict__ and "forward" not in llama.model.layers[0].self_attn.__dict__


def test_context_inside_a_patched_model(llama):
    outer = patch_unsloth_attention(llama, spectral_config=lossy())
    with spectral(llama, spectral_config=lossless(llama), plan="B") as inner: assert inner.plan == "B"
    assert llama._spectral_patch is outer and outer.config == lossy() and outer.plan == "A"
    generate(llama, prompt(1), max_new_tokens=3)
    assert outer.decode == [2, 2]


def test_settings_reach_the_cache(llama):
    with spectral(llama, block_size=64, k_rank_keys=4, k_rank_values=5, hot_buffer_size=7, landmark_count=2, use_attention_weighted_svd=True) as patched:
        assert patched.config == SpectralConfig(coding="rank", block_size=64, k_rank_keys=4, k_rank_values=5, hot_buffer_size=7, landmark_count=2, use_attention_weighted_svd=True)
    with spectral(llama, ratio=5, landmark_count=1, layer_weights="equal") as patched: assert patched.config == SpectralConfig(coding="spectral", ratio=5, landmark_count=1)
    with pytest.raises(ValueError, match="pass one or the other"): patch_unsloth_attention(llama, ratio=5, k_rank_keys=3)
    with pytest.raises(ValueError, match="either a SpectralConfig or its fields, got both: block_size"): patch_unsloth_attention(llama, block_size=3, spectral_config=lossy())


@pytest.mark.parametrize("break_it, match", [
    (lambda m: setattr(m.config, "model_type", "gpt2"), "'gpt2' is not supported; supported: cohere"),
    (lambda m: setattr(m, "vllm_engine", object()), "fast_inference=False"),
    (lambda m: setattr(m.model.layers[1].self_attn, "_unsloth_tp_heads", 4), "without tensor parallelism"),
    (lambda m: setattr(m, "_tp_size", 2), "without tensor parallelism"),
])
def test_unsupported_models_are_refused_untouched(break_it, match):
    model = copy.copy(loaded("llama"))
    model.__dict__ = dict(model.__dict__)
    model.config = copy.deepcopy(model.config)
    try:
        break_it(model)
        before = {id(m): set(m.__dict__) for m in model.modules()}
        with pytest.raises(ValueError, match=match): patch_unsloth_attention(model)
        assert {id(m): set(m.__dict__) for m in model.modules()} == before
    finally: loaded("llama").model.layers[1].self_attn.__dict__.pop("_unsloth_tp_heads", None)


def test_qwen_with_windows_in_some_layers_is_refused():
    model = types.SimpleNamespace(config=AutoConfig.for_model("qwen2", **{k: v for k, v in BASE.items() if k != "head_dim"}, use_sliding_window=True, max_window_layers=1, sliding_window=16),
                                  generate=1, modules=lambda: [], _unsloth_fast_path=True)
    with pytest.raises(ValueError, match="use_sliding_window=False"): I.check_supported(model)


@pytest.mark.parametrize("kw, match", [
    (dict(prompt_lookup_num_tokens=3), "prompt-lookup decoding"), (dict(assistant_model=object()), "assisted decoding"), (dict(cache_implementation="static"), "another cache"),
])
def test_unsupported_generation_is_refused(llama, kw, match):
    with spectral(llama):
        with pytest.raises(ValueError, match=match): generate(llama, prompt(1), **kw)


def test_dense_states_are_refused(llama):
    dense = DynamicCache(config=llama.config)
    dense.update(*torch.zeros(2, 1, 2, 5, 32), 0)
    with spectral(llama):
        for past in (dense, ((torch.zeros(1, 2, 5, 32),) * 2,) * 2):
            with pytest.raises(ValueError, match="computed without compression"): llama(input_ids=prompt(1)["input_ids"], past_key_values=past)
            with pytest.raises(ValueError, match="computed without compression"): generate(llama, prompt(1), past_key_values=past)


def test_own_cache_for_generate(llama):
    cache = SpectralCache(llama.config, lossless(llama, block_size=16))
    with spectral(llama, spectral_config=lossy()):
        got = generate(llama, prompt(1), past_key_values=cache)
        assert got.past_key_values.cache is cache and cache.layers[0].config.block_size == 16
        other = generate(llama, prompt(1))
        assert other.past_key_values.cache is not cache
    assert torch.equal(got.sequences, generate(llama, prompt(1)).sequences)


@pytest.mark.parametrize("spectral_attention", [True, False])
def test_no_gradients_are_no_silent_zeros(llama, spectral_attention):
    ids = prompt(1)["input_ids"]
    embeds = llama.get_input_embeddings()(ids).detach().requires_grad_()
    with spectral(llama, spectral_config=lossless(llama), use_spectral_attention=spectral_attention):
        past = llama(input_ids=ids[:, :100], use_cache=True).past_key_values
        out = llama(inputs_embeds=embeds[:, 100:], past_key_values=past, use_cache=True)
    with pytest.raises(RuntimeError, match="gives no gradients"): out.logits.sum().backward()


def test_training_and_scoring_are_left_alone(llama):
    with spectral(llama) as patched:
        loss = llama(input_ids=prompt(1)["input_ids"], labels=prompt(1)["input_ids"], use_cache=False)
        assert patched.forwards == 0 and loss is not None
        plain = llama(input_ids=prompt(1)["input_ids"], use_cache=False)
        assert plain.past_key_values is None and patched.forwards == 0


def test_prompt_longer_than_the_model_was_loaded_for(llama):
    with spectral(llama), pytest.raises(ValueError, match="max_seq_length=600"): llama(input_ids=torch.ones(1, 600, dtype=torch.long))


def test_triton_kernel_says_when_it_falls_back(llama, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "spectral_nb.kernels", None)
    with caplog.at_level(logging.WARNING), spectral(llama, use_triton_kernel=True) as patched: assert patched.attend is attend
    assert "falls back to PyTorch" in caplog.text


def test_triton_kernel_is_taken_and_says_so(llama, monkeypatch, capsys):
    "With a stand-in for the kernel: every layer of every decode step calls it, for all that it is told."
    calls = []
    def kernel(layer, q, k, v, mask=None, scaling=None, softcap=None):
        calls.append((q.shape, k.shape, mask, scaling, softcap))
        return attend(layer, q, k, v, mask, scaling, softcap)
    for name in ("kernels", "encode_kernels", "chunk_kernels"): monkeypatch.setitem(sys.modules, f"spectral_nb.{name}", types.SimpleNamespace(attend=kernel))
    want = generate(reference("llama"), prompt(1))
    with spectral(llama, spectral_config=lossless(llama), use_triton_kernel=True, verbose=True) as patched: got = generate(llama, prompt(1))
    assert patched.attend is kernel and "Triton kernel" in capsys.readouterr().out
    assert torch.equal(got.sequences, want.sequences) and len(calls) == 2 * (NEW - 1)
    assert set(calls) == {(torch.Size([1, 8, 1, 32]), torch.Size([1, 2, 1, 32]), None, llama.model.layers[0].self_attn.scaling, None)}


def test_verbose_and_trace(llama, capsys):
    with spectral(llama, spectral_config=lossy(), verbose=True, debug_logging=True) as patched:
        generate(llama, prompt(1), max_new_tokens=3)
        assert "plan A" in capsys.readouterr().out
        assert [(t["phase"], t["layer"], t["length"]) for t in patched.trace] == [("prefill", 0, 150), ("prefill", 1, 150), ("decode", 0, 151), ("decode", 1, 151), ("decode", 0, 152), ("decode", 1, 152)]
        assert patched.report["tokens"] == 152


def test_plan_b_takes_over_when_unsloth_moves(llama, monkeypatch, caplog):
    monkeypatch.delattr(L, "_LlamaModel_fast_forward_inference")
    with caplog.at_level(logging.WARNING), spectral(llama, spectral_config=lossless(llama)) as patched:
        assert patched.plan == "B"
        got = generate(llama, prompt(1))
        assert patched.decode == [NEW - 1] * 2
    assert "_LlamaModel_fast_forward_inference is gone" in caplog.text
    assert torch.equal(got.sequences, generate(reference("llama"), prompt(1)).sequences)
    with pytest.raises(RuntimeError, match="plan A is not possible"): patch_unsloth_attention(llama, plan="A")
    assert "_spectral_patch" not in llama.__dict__ and "forward" not in llama.__dict__


def test_hooks_go_inside_those_of_accelerate(llama):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
    calls = []
    class Spy(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs
    attn = llama.model.layers[0].self_attn
    for m in (attn, llama): add_hook_to_module(m, Spy())
    try:
        with spectral(llama, spectral_config=lossless(llama)) as patched: got = generate(llama, prompt(1))
        assert patched.decode == [NEW - 1] * 2 and attn in calls and llama in calls
        generate(llama, prompt(1))
    finally:
        for m in (attn, llama): remove_hook_from_module(m)
    assert torch.equal(got.sequences, generate(llama, prompt(1)).sequences)


# --- a path that does not reach us raises

def test_bypassed_prompt_raises(llama):
    with spectral(llama) as patched:
        attn = llama.model.layers[1].self_attn
        attn.__dict__["forward"] = attn._spectral[1]
        with pytest.raises(RuntimeError, match="layer 1 holds 0 tokens after 150 new ones.*the prompt did not reach"): generate(llama, prompt(1))
        assert patched.decode == [0, 0]


def test_bypassed_decode_raises(llama):
    def elsewhere(self, **kw):
        from transformers.modeling_outputs import CausalLMOutputWithPast
        return CausalLMOutputWithPast(logits=torch.zeros(1, 1, 512))
    with spectral(llama) as patched:
        patched.decode_forward = elsewhere
        with pytest.raises(RuntimeError, match="layer 0 holds 150 tokens after 1 new ones, and held 150 before: decoding did not reach"): generate(llama, prompt(1))


@pytest.mark.parametrize("plan", ["A", "B"])
def test_a_call_that_was_stopped_midway(llama, plan, monkeypatch):
    "A cache of which some layers have taken a token and others have not is refused; a new one is not touched by it."
    want, inputs = generate(llama, prompt(1)), prompt(1)
    with spectral(llama, spectral_config=lossless(llama), plan=plan) as patched:
        cache, count = patched.new_cache(), I.SpectralPatch.count
        def stop(self, idx, tokens, layer, *args):
            count(self, idx, tokens, layer, *args)
            if idx == 0 and layer.get_seq_length() == 160: raise KeyboardInterrupt
        monkeypatch.setattr(I.SpectralPatch, "count", stop)
        with pytest.raises(KeyboardInterrupt): generate(llama, inputs, past_key_values=cache)
        monkeypatch.setattr(I.SpectralPatch, "count", count)
        with pytest.raises(RuntimeError, match="stopped midway: layers hold 159 to 160"): generate(llama, dict(input_ids=want.sequences[:, :165]), past_key_values=cache)
        assert torch.equal(generate(llama, inputs).sequences, want.sequences)


def test_replaced_forward_raises(llama):
    with spectral(llama):
        llama.__dict__["forward"] = llama._spectral[1]
        with pytest.raises(RuntimeError, match="without a single call of the patched forward"): generate(llama, prompt(1))


def test_rotary_embedding_that_is_not_the_configs_raises(llama, monkeypatch):
    rope = L.fast_rope_embedding
    with spectral(llama):
        monkeypatch.setattr(L, "fast_rope_embedding", lambda Q, K, cos, sin, idx=None: rope(Q, K, cos, -sin, idx))
        with pytest.raises(RuntimeError, match="rotary embedding is not what its config says"): generate(llama, prompt(1))


# --- bugs of the earlier project, by name

def test_bug_heads_of_gqa(llama):
    "States are kept at the number of key-value heads, not of query heads."
    with spectral(llama, spectral_config=lossy()): cache = generate(llama, prompt(1)).past_key_values
    for layer in cache.layers: assert layer.landmark_keys.shape[1] == layer.cold.keys.codes.shape[1] == 2
    assert cache.dense_nbytes == 2 * 2 * 2 * 32 * 4 * cache.get_seq_length()


def test_bug_cache_that_stood_still_at_17_tokens(llama):
    "Decoding went past the cache: it kept the prompt's 17 tokens for ever."
    with spectral(llama, spectral_config=lossy()):
        out = generate(llama, prompt(1, 17), max_new_tokens=50)
        assert [o.get_seq_length() for o in out.past_key_values.layers] == [17 + 49] * 2


def test_bug_closure_capture(llama):
    "Every layer has its own cache layer, and a copy of a patched model has its own hooks."
    with spectral(llama, spectral_config=lossless(llama)) as patched:
        one, two = generate(llama, prompt(1)).past_key_values.layers
        assert one is not two and not torch.equal(one.get_kv()[0], two.get_kv()[0])
        twin = copy.deepcopy(llama)
        before = patched.prefill, patched.decode
        twin.model.layers[0].self_attn.o_proj.weight.data.zero_()
        generate(twin, prompt(1))
        assert (patched.prefill, patched.decode) == before and twin._spectral_patch.decode == [2 * (NEW - 1)] * 2
        assert torch.equal(generate(llama, prompt(1)).sequences, generate(reference("llama"), prompt(1)).sequences)


def test_bug_wildcard_copies(llama):
    "Ten modules of Unsloth hold their own copy of the decode functions; none of them is touched, and decoding is reached all the same."
    names = "LlamaAttention_fast_forward", "LlamaAttention_fast_forward_inference", "LlamaModel_fast_forward_inference"
    holders = lambda: {(m.__name__, n): id(vars(m)[n]) for m in MODULES for n in names if n in vars(m)}
    before = holders()
    assert len({m for m, _ in before}) >= 6
    with spectral(llama, spectral_config=lossy()) as patched:
        generate(llama, prompt(1))
        assert holders() == before and patched.decode == [NEW - 1] * 2


@pytest.mark.parametrize("plan", ["A", "B"])
def test_bug_positions_with_one_axis(llama, plan):
    ids = prompt(1)["input_ids"]
    with torch.no_grad():
        want = reference("llama")(ids).logits[:, -1]
        with spectral(llama, spectral_config=lossless(llama), plan=plan):
            for positions in (torch.tensor([149]), torch.tensor([[149]]), torch.arange(150)[None]):
                past = llama(input_ids=ids[:, :-1], position_ids=torch.arange(149), use_cache=True).past_key_values
                got = llama(input_ids=ids[:, -1:], position_ids=positions, past_key_values=past).logits[:, -1]
                assert (got - want).abs().max() / want.abs().max() < 1e-5


def test_bug_cosine_only_rope_in_the_hot_window(llama):
    "Hot keys are complete, turned keys: those that the dense model caches."
    ids = prompt(1, 50)["input_ids"]
    with torch.no_grad():
        dense = reference("llama")(ids, use_cache=True).past_key_values
        with spectral(llama, hot_buffer_size=64): ours = llama(input_ids=ids, use_cache=True).past_key_values
    for a, b in zip(ours.layers, dense.layers):
        assert a.hot_length == 50
        for ours, theirs in zip(a.get_kv(), (b.keys, b.values)): torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_bug_fp16_qr():
    "Bases are fitted in float32 whatever the model's dtype and autocast."
    model = load(checkpoint("llama"), torch.float16)
    with spectral(model, spectral_config=lossy()): out = generate(model, prompt(1), max_new_tokens=8)
    for layer in out.past_key_values.layers:
        assert torch.isfinite(layer.get_kv()[0]).all()
        basis = layer.cold.keys.basis.float()
        assert (basis @ basis.mT - torch.eye(8)).abs().max() < 5e-3


def test_bug_fp16_softmax_overflow():
    "Scores far beyond the range of float16 give finite attention."
    model = load(checkpoint("llama"), torch.float16)
    with torch.no_grad():
        for layer in model.model.layers:
            for p in (layer.self_attn.q_proj, layer.self_attn.k_proj): p.weight.mul_(40)
    with spectral(model, spectral_config=lossy()): out = generate(model, prompt(1), max_new_tokens=8)
    assert torch.isfinite(torch.stack(out.logits)).all()


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_bug_negative_table_index(llama, length):
    "Prompts shorter than the landmarks, and rows that are nearly all padding."
    for inputs in (prompt(1, length), prompt(2, length, padding=(0, length - 1))):
        want = generate(reference("llama"), inputs)
        with spectral(llama, spectral_config=lossless(llama)): got = generate(llama, inputs)
        assert torch.equal(got.sequences, want.sequences) and difference(got, want) < 1e-5


def test_bug_pre_and_post_rope_mixed_after_a_short_prompt(llama):
    "A prompt shorter than a block, whose tokens are turned back only when decoding fills the block."
    inputs = prompt(1, 10)
    want = generate(reference("llama"), inputs, max_new_tokens=100)
    with spectral(llama, spectral_config=lossless(llama)): got = generate(llama, inputs, max_new_tokens=100)
    assert len(got.past_key_values.layers[0].cold) == 64
    assert torch.equal(got.sequences, want.sequences) and difference(got, want) < 1e-5


def test_bug_state_leaking_between_generations(llama):
    with spectral(llama, spectral_config=lossy()) as patched:
        first = generate(llama, prompt(1))
        generate(llama, prompt(3, seed=5))
        again = generate(llama, prompt(1))
        assert torch.equal(torch.stack(first.logits), torch.stack(again.logits))
        held = weakref.ref(again.past_key_values.cache)
        gc.disable()
        del again
        gc.enable()
        assert held() is None, "a patched model keeps the cache of a finished generation alive"
        assert not any(hasattr(o.self_attn, "paged_attention") for o in llama.model.layers), "Unsloth's own dense buffers were filled"
        assert patched.filling is None and patched.rows is None


def test_bug_only_the_first_block_compressed(llama):
    with spectral(llama, spectral_config=lossy()): cache = generate(llama, prompt(1), max_new_tokens=100).past_key_values
    for layer in cache.layers:
        assert len(layer.cold) == (249 - 16) // 32 * 32 and layer.cold.keys.codes.shape[2] == 7
        assert layer.hot_length < 16 + 32
        assert all(layer.cold.keys[i].codes.any() for i in range(7))
