"Every diagnostic finds a fault that was put in, passes a clean run, and says nothing where the dense model fails by itself."
import json
import math
import random

import numpy as np
import pytest
import torch
from tiny import tiny_model
from transformers import DynamicCache

from spectral_nb.cache import SpectralCache
from spectral_nb.codec import SpectralConfig
from spectral_nb.diagnostics import (CachedRun, DivergenceLog, attention_maps, cache_spectra, check_determinism, divergence_figure, find_loop,
                                     log_ground_truth, seeded, spectrum_of)
from spectral_nb.evaluate import attention_implementation, new_cache
from spectral_nb.faults import FAULTS, fault
from spectral_nb.integration import patch_unsloth_attention, unpatch_unsloth_attention
from spectral_nb.needle import Needle, plant
from spectral_nb.pocket import haystack, load_pocket
from spectral_nb.quality import (block_errors, degeneration_report, distinct_ngrams, errors_figure, memory_profile, needle_figure, needle_in_a_haystack,
                                 perplexity, quality_tuning, token_overlap)
from spectral_nb.tracing import cache_compatibility, check_import_contamination, snapshot, trace_forward, trace_methods, watch_calls

CODEC = "spectral:4x"
RANK = "rank:64/128"  # for models whose layer weights were not measured, which takes a while


@pytest.fixture(scope="module")
def pocket(): return load_pocket()


@pytest.fixture(scope="module")
def planted(pocket): return plant(pocket[1], haystack("tune")[0][:8000], Needle("the brass pigeon", "482913"), .2, 900)


@pytest.fixture(scope="module")
def book(pocket): return pocket[1](haystack("tune")[0][:8000]).input_ids


@pytest.fixture(scope="module")
def untrained(pocket):
    "The pocket model with random weights: it can do nothing."
    import copy
    model = copy.deepcopy(pocket[0])
    gen = torch.Generator().manual_seed(0)
    for p in model.parameters(): p.data.normal_(0, .02, generator=gen)
    return model


@pytest.fixture(scope="module")
def clean(pocket, planted): return log_ground_truth(*pocket, planted.ids, CODEC, 10, planted.answer)


def test_a_clean_log(pocket, planted, clean, tmp_path):
    assert clean.verdict and clean.dense[:len(planted.answer)] == planted.answer == clean.free[:len(planted.answer)]
    assert clean.prompt == planted.ids and len(clean.steps) == 10 and clean.kl < .05 and abs(clean.ratio - 4) < .2
    s = clean.steps[3]
    assert s.dense_top[0][0] == s.token and s.rank == 0 and len(s.layer_errors) == 6 and 0 < max(s.layer_errors) < 1
    assert all(abs(p - q) < .2 for p, q in clean.free_probs) and clean.loops == dict(dense=None, compressed=None)
    clean.to_json(tmp_path / "log.json")
    assert DivergenceLog.from_json(tmp_path / "log.json") == clean and json.loads((tmp_path / "log.json").read_text())["stamp"]["versions"]
    assert len(clean.frame()) == 10 and "482913" in clean._repr_markdown_() and len(divergence_figure(clean).data) == 2


def test_free_run_is_a_run_of_its_own(pocket, planted):
    log = log_ground_truth(*pocket, planted.ids, "spectral:16x", 12)  # too little for this prompt: it goes astray
    with CachedRun(pocket[0], "spectral:16x") as run:
        tokens = []
        for i in range(12): tokens.append(run(tokens[-1:] if i else planted.ids).argmax().item())
    assert log.free == tokens and log.first == next(i for i in range(12) if tokens[i] != log.dense[i])
    assert log.cause.step == log.first and log.cause.layer is not None and 0 < log.cause.lost <= 1 and 0 <= log.cause.slot < 900 + 12
    with torch.no_grad(): logits = pocket[0](torch.tensor([planted.ids + log.free])).logits[0, len(planted.ids) - 1:-1]
    assert np.allclose([p for p, _ in log.free_probs], torch.softmax(logits, -1).gather(1, torch.tensor(log.free)[:, None])[:, 0], atol=1e-3)


@pytest.mark.parametrize("name", ["gqa_heads", "cosine_only", "fp16_softmax", "distance", "not_persistent"])
def test_log_finds(pocket, planted, clean, name):
    with fault(name): log = log_ground_truth(*pocket, planted.ids, CODEC, 10, planted.answer, tolerance=.1)
    assert log.verdict.status == "fault" and log.steps[0].kl < 1e-5  # the prompt's own attention is dense
    assert not log.kl < 20 * clean.kl
    if name == "fp16_softmax": assert "not finite" in log.verdict.why and len(log.steps) < 10


def test_log_draws_no_conclusion(pocket, planted, untrained):
    log = log_ground_truth(untrained, pocket[1], planted.ids, RANK, 4, planted.answer)
    assert log.verdict.status == "inconclusive" and "dense model" in log.verdict.why
    with fault("gqa_heads"): assert log_ground_truth(untrained, pocket[1], planted.ids, RANK, 4, planted.answer).verdict.status == "inconclusive"
    with pytest.raises(ValueError, match="longer than the model's 4096"): log_ground_truth(*pocket, planted.ids * 5, CODEC, 4)
    with pytest.raises(ValueError, match="new_tokens"): log_ground_truth(*pocket, planted.ids, CODEC, 0)


def test_loops():
    assert find_loop([9, 8] + [1, 2] * 5) == dict(start=2, period=2, times=5)
    assert find_loop(list(range(30))) is None and find_loop([1, 1, 1]) is None
    assert distinct_ngrams(list(range(9))) == 1


def test_patched_models_are_refused(pocket):
    patch_unsloth_attention(pocket[0], ratio=4)
    try:
        with pytest.raises(ValueError, match="unpatch_unsloth_attention"): CachedRun(pocket[0], CODEC)
    finally: unpatch_unsloth_attention(pocket[0])


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral_window", "cohere", "qwen3"])
def test_other_models(name, pocket):
    "Soft caps, sliding windows, interleaved RoPE, normalised queries: a lossless cache passes, and attention is what eager attention says."
    model = tiny_model(name)
    ids = torch.randint(4, 512, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    d = model.config.hidden_size // model.config.num_attention_heads
    config = SpectralConfig.lossless(d, coding="rank", block_size=32, hot_buffer_size=16)
    log = log_ground_truth(model, pocket[1], ids, config, 6)
    assert log.kl < 1e-4 and log.free == log.dense
    spectra = spectrum_of(model, ids)
    assert [len(v) for v in spectra.values()] == [2, 2, 2] and spectra["values"][0].shape == (2, d)
    with CachedRun(model, config) as run: run(ids)
    layer = next(i for i, o in enumerate(run.cache.layers) if hasattr(o, "cold")) if name != "mistral_window" else None
    if layer is None:
        with pytest.raises(ValueError, match="sliding window"): attention_maps(model, ids, run.cache, 0, 0)
        return
    maps = attention_maps(model, ids, run.cache, layer, 3, [70, 149])
    with torch.no_grad(), attention_implementation(model, "eager"): eager = model(torch.tensor([ids]), output_attentions=True).attentions[layer][0, 3, [70, 149]]
    assert torch.allclose(maps.dense, eager, atol=2e-4) and maps.difference.abs().max() < 2e-3


def test_attention_maps_show_what_was_lost(pocket, planted):
    ids = planted.ids + planted.answer
    with CachedRun(pocket[0], CODEC) as run: run(planted.ids)
    good = attention_maps(pocket[0], ids, run.cache, 0, 2, [904])
    with fault("distance"): bad = attention_maps(pocket[0], ids, run.cache, 0, 2, [904])
    assert torch.equal(good.dense, bad.dense) and good.compressed.shape == (1, len(ids))
    assert bad.difference.abs().sum() > 3 * good.difference.abs().sum()
    with pytest.raises(ValueError, match="head must be from 0 to 5"): attention_maps(pocket[0], ids, run.cache, 0, 6)
    with pytest.raises(ValueError, match="queries must be slots"): attention_maps(pocket[0], ids, run.cache, 0, 0, [len(ids)])


def test_spectra(pocket, book):
    cache = DynamicCache(config=pocket[0].config)
    with torch.no_grad(): pocket[0](torch.tensor([book[:200]]), past_key_values=cache)
    s = cache_spectra(cache, pocket[0].config)
    assert np.allclose(s["keys_post_rope"][4][1], torch.linalg.svdvals(cache.layers[4].keys[0, 1].double()), rtol=1e-3, atol=1e-3)
    assert s["keys_pre_rope"][4].square().sum().item() == pytest.approx(s["keys_post_rope"][4].square().sum().item(), rel=1e-4)


def test_determinism(pocket, book):
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    report = check_determinism(*pocket, book[:530], CODEC, new_tokens=3)
    assert report.verdict and set(report.per_token) == {"same"} and len(report.tokens["dense"]) == len(report.tokens["compressed"]) == 4
    assert random.getstate() == state[0] and np.random.get_state()[1].tolist() == state[1] and torch.equal(torch.get_rng_state(), state[2])
    with fault("leaking_state"): report = check_determinism(*pocket, book[:530], CODEC, new_tokens=3)
    assert report.verdict.status == "fault" and "compressed 1" in report.verdict.why and "compressed differs" in report.per_token
    assert "dense differs" not in report.per_token
    with seeded(3): a = torch.rand(3), random.random(), np.random.rand()
    with seeded(3): b = torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(a[0], b[0]) and a[1:] == b[1:]


def test_determinism_of_a_dense_model_that_is_not(pocket, book):
    torch.manual_seed(0)
    noise = iter(range(1, 1000))
    handle = pocket[0].lm_head.register_forward_hook(lambda m, a, out: out + next(noise))  # the same tokens, other logits
    try: report = check_determinism(*pocket, book[:40], CODEC, new_tokens=3)
    finally: handle.remove()
    assert report.verdict.status == "inconclusive" and "dense" in report.verdict.why


def test_trace_forward(pocket, book):
    report = trace_forward(*pocket, book[:530], CODEC, 3)
    assert report.verdict and len(report.rows) == 18 and {r["length"] for r in report.rows} == {530, 531, 532}
    assert all("attend" in r["path"] for r in report.rows if r["phase"] == "decode")
    for name in ("decode_bypass", "not_persistent"):
        with fault(name): assert trace_forward(*pocket, book[:530], CODEC, 3).verdict.status == "fault"
    assert trace_forward(*pocket, book[:80], CODEC, 3).verdict.status == "inconclusive"
    assert trace_forward(*pocket, book[:80], None, 3).verdict
    assert trace_forward(*pocket, book[:80], None, 1).verdict.status == "inconclusive"
    pocket[0].generation_config.use_cache = False
    try: assert "no cache" in trace_forward(*pocket, book[:80], None, 3).verdict.why
    finally: pocket[0].generation_config.use_cache = True


def test_trace_of_a_patched_model(pocket, book):
    patched = patch_unsloth_attention(pocket[0], ratio=4)
    try: report = trace_forward(*pocket, book[:530], None, 3)
    finally: unpatch_unsloth_attention(pocket[0])
    assert report.verdict and {r["reads"] for r in report.rows if r["phase"] == "decode"} == {True} and min(patched.decode) == 2


def test_trace_methods(pocket, book):
    report = trace_methods(*pocket, book[:530], ["spectral_nb.attention.attend"], CODEC)
    assert report.verdict and [r for r in report.rows if r["function"] == "spectral_nb.attention.attend"][0]["decode 1"] == 6
    with fault("stale_copy"): report = trace_methods(*pocket, book[:530], ["patched_attention_forward"], CODEC)
    assert report.verdict.status == "fault" and "never ran" in report.verdict.why
    assert trace_methods(*pocket, book[:80], ["attend"], None, 1).verdict.status == "inconclusive"
    import sys
    old = sys.getprofile()
    with pytest.raises(RuntimeError), watch_calls(): raise RuntimeError
    assert sys.getprofile() is old


def test_contamination(pocket):
    from contextlib import ExitStack
    report = check_import_contamination(pocket[0])
    assert report.verdict and {r["stage"] for r in report.changes} == {"patch", "unpatch"} and not report.left
    assert any(r["where"] == "model.forward" for r in report.changes)
    with ExitStack() as stack: report = check_import_contamination(patch=lambda: stack.enter_context(fault("stale_copy")), unpatch=stack.close)
    assert report.verdict.status == "fault" and "attention implementation 'spectral'" in report.verdict.why
    with ExitStack() as stack: report = check_import_contamination(patch=lambda: stack.enter_context(fault("gqa_heads")), unpatch=lambda: None)
    assert report.verdict.status == "fault" and "not what they were" in report.verdict.why
    assert check_import_contamination(patch=lambda: None, unpatch=lambda: None).verdict.status == "inconclusive"
    with pytest.raises(ValueError, match="pass a model"): check_import_contamination()


def test_an_import_is_a_stage(tmp_path, monkeypatch):
    "A module that replaces a function of transformers while it is imported, as Unsloth does."
    (tmp_path / "rude_library.py").write_text("import transformers.models.llama.modeling_llama as m\nold = m.rotate_half\ndef rotate_half(x): return old(x)\nm.rotate_half = rotate_half\n")
    monkeypatch.syspath_prepend(tmp_path)
    import transformers.models.llama.modeling_llama as m
    old = m.rotate_half
    try: report = check_import_contamination(patch=lambda: None, unpatch=lambda: None, imports="rude_library")
    finally: m.rotate_half = old
    rows = [r for r in report.changes if r["stage"] == "import rude_library"]
    assert [(r["where"], r["now"]) for r in rows if not r["where"].endswith("closure 0")] == [("transformers.models.llama.modeling_llama.rotate_half", "rude_library.rotate_half")]


def test_faults_leave_nothing_behind(pocket):
    before = snapshot(pocket[0])
    for name in FAULTS:
        with fault(name): pass
    assert snapshot(pocket[0]) == before
    with pytest.raises(ValueError, match="unknown fault"):
        with fault("none"): pass


def test_cache_compatibility(pocket, book):
    report = cache_compatibility(*pocket, book[:530], CODEC, 3)
    assert report.verdict and len(report.rows) == 10 and max(r["kl"] or 0 for r in report.rows) < .01
    for name in ("rope_mix", "distance"):
        with fault(name): report = cache_compatibility(*pocket, book[:530], CODEC, 2, implementations=("sdpa",))
        assert report.verdict.status == "fault" and "goes elsewhere" in report.verdict.why
    assert cache_compatibility(*pocket, book[:80], CODEC, 3).verdict.status == "inconclusive"
    report = cache_compatibility(*pocket, book[:80], CODEC, 3, implementations=("sdpa", "no such attention"))
    assert report.verdict.status == "inconclusive" and any(r["error"] for r in report.rows)


def test_degeneration(pocket, book, untrained):
    report = degeneration_report(*pocket, book, CODEC, (700,), 16)
    assert report.verdict and report.rows[0]["coded"] == 512 and len(errors_figure(report.errors[700]).data) == 1
    for name in ("negative_index", "one_d_positions", "first_block_only"):
        with fault(name): report = degeneration_report(*pocket, book, FAULTS[name].codec, (1100,), 1)
        assert report.verdict.status == "fault", name
    assert degeneration_report(*pocket, book, CODEC, (300,), 4).verdict.status == "inconclusive"
    loop = degeneration_report(untrained, pocket[1], book, RANK, (600,), 30)
    assert loop.verdict.status == "inconclusive" and "repeats itself" in loop.verdict.why


def test_block_errors(pocket, book):
    with CachedRun(pocket[0]) as dense: dense(book[:700])
    with CachedRun(pocket[0], CODEC) as run: run(book[:700])
    rows = block_errors(dense.cache, run.cache)
    k, rebuilt = dense.cache.layers[2].keys[0, :, 128:256], run.cache.layers[2].get_kv()[0][0, :, 128:256]
    size = dense.cache.layers[2].keys.square().mean().sqrt()
    assert next(r for r in rows if (r["layer"], r["block"]) == (2, 1))["keys"] == pytest.approx(((rebuilt - k).square().mean().sqrt() / size).item(), abs=1e-3)


def test_overlap_and_perplexity(pocket, book):
    assert token_overlap([1, 2, 3, 4], [1, 2, 3, 4]).verdict and token_overlap([1, 2, 3, 4], [1, 2, 9, 4]).same == .75
    assert token_overlap([1, 2, 3, 4], [9, 2, 3, 4]).verdict.status == "fault"
    assert token_overlap([1] * 20, [1] * 20).verdict.status == "inconclusive"
    ok = perplexity(*pocket, book, CODEC, 700, 32)
    with torch.no_grad(): logits = pocket[0](torch.tensor([book[:732]])).logits[0, 699:731]
    assert ok.verdict and ok.dense == pytest.approx(math.exp(torch.nn.functional.cross_entropy(logits, torch.tensor(book[700:732])).item()), rel=1e-3)
    with fault("gqa_heads"): assert perplexity(*pocket, book, CODEC, 700, 32).verdict.status == "fault"
    shuffled = random.Random(0).sample(range(8192), 800)
    assert perplexity(*pocket, shuffled, CODEC, 700, 32).verdict.status == "inconclusive"
    with pytest.raises(ValueError, match="the text has"): perplexity(*pocket, book[:100], CODEC, 700)


def test_needles(pocket, untrained):
    texts = [haystack("tune")[0][:8000]]
    report = needle_in_a_haystack(*pocket, texts, (CODEC,), (800,), (.3,))
    assert report.verdict and report.recall(CODEC) == 1 and len(needle_figure(report, CODEC).data) == 1
    with fault("gqa_heads"): assert needle_in_a_haystack(*pocket, texts, (CODEC,), (800,), (.3,)).verdict.status == "fault"
    report = needle_in_a_haystack(untrained, pocket[1], texts, (RANK,), (800,), (.3,))
    assert report.verdict.status == "inconclusive" and report.recall(RANK) is None and needle_figure(report, RANK).data[0].z[0][0] is None


def test_memory(pocket, book):
    memory_profile(*pocket, book[:530], CODEC, 2) # tables that all caches share are made once
    report = memory_profile(*pocket, book[:530], CODEC, 2)
    assert report.verdict and all(r["unaccounted"] < 2 ** 14 for r in report.rows)
    with fault("decode_bypass"): report = memory_profile(*pocket, book[:530], CODEC, 2)
    assert report.verdict.status == "fault" and report.rows[2]["unaccounted"] > 500 * 2 * 2 * 128 * 4 * 6
    assert memory_profile(*pocket, book[:80], CODEC, 2).verdict.status == "inconclusive"


def test_quality_tuning(pocket, untrained):
    texts = [haystack("tune")[0][:8000]]
    report = quality_tuning(*pocket, texts, codecs=(CODEC, "rank:32/64"), context=640, trials=1, codes=1, continuation=8)
    assert report.verdict.status in ("ok", "inconclusive") and report.recommended == SpectralConfig(coding="spectral", ratio=4.) and report.chosen == CODEC
    rows = {r["codec"]: r for r in report.rows}
    assert rows["rank:32/64"]["key_error"] == pytest.approx(rows["rank:32/64"]["key_bound"], abs=.02) and rows[CODEC]["key_bound"] is None
    assert rows[CODEC]["key_explained"] == pytest.approx(1 - rows[CODEC]["key_error"] ** 2, abs=1e-3)
    assert [r["count"] for r in report.landmarks] == [0, 4, 16, 64] and [r["basis"] for r in report.weighting] == ["weighted", "plain"] * 2
    with fault("fp16_qr"): assert quality_tuning(*pocket, texts, codecs=("rank:64/128",), context=640, trials=1, codes=1, continuation=8).verdict.status == "fault"
    report = quality_tuning(untrained, pocket[1], texts, codecs=(RANK,), context=640, trials=1, codes=1, continuation=8)
    assert report.verdict.status == "inconclusive" and report.recommended is None
    with pytest.raises(ValueError, match="unknown codec"): quality_tuning(*pocket, texts, codecs=("zip",))


def test_codecs_in_every_form(pocket, book):
    for codec in (CODEC, SpectralConfig(coding="spectral", ratio=4), lambda m: SpectralCache(m.config, coding="spectral", ratio=4)):
        with CachedRun(pocket[0], codec) as run: run(book[:700])
        assert abs(run.cache.ratio - 4) < 4.1 and run.length == 700
    assert isinstance(new_cache(SpectralConfig(coding="spectral", ratio=4), pocket[0]), SpectralCache)
