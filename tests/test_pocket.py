"The pocket model: its size, its bytes, that damage is noticed, and that it recalls."
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spectral_nb import calibrate, pocket
from spectral_nb.needle import answer_matches, make_needle, plant
from spectral_nb.pocket import SHA256, check_sha256, data_path, haystack, load_pocket

WEIGHTS = data_path("pocket/model.safetensors")


def test_size():
    model, tok = load_pocket()
    config = model.config
    assert model.num_parameters() <= 16e6 and WEIGHTS.stat().st_size <= 32e6
    assert config.model_type == "llama" and config.head_dim == 128 and config.max_position_embeddings == 4096
    assert config.num_attention_heads > config.num_key_value_heads
    assert len(tok) == config.vocab_size
    check_sha256(WEIGHTS, SHA256)


def test_loads_as_any_model():
    ours, plain = load_pocket()[0], AutoModelForCausalLM.from_pretrained(data_path(), dtype=torch.float32)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters()): assert torch.equal(a, b), name
    assert AutoTokenizer.from_pretrained(data_path()).encode("7 codes") == load_pocket()[1].encode("7 codes")


def test_damage_is_noticed(tmp_path, monkeypatch):
    copy = tmp_path / "pocket"
    shutil.copytree(data_path(), copy)
    raw = bytearray(WEIGHTS.read_bytes())
    raw[len(raw) // 2] ^= 1
    (copy / "model.safetensors").write_bytes(raw)
    monkeypatch.setattr(pocket, "data_path", lambda name="pocket": tmp_path / name)
    pocket._checked.cache_clear()
    with pytest.raises(ValueError, match="model.safetensors is damaged"): load_pocket()
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="is missing; reinstall"): load_pocket()


def test_haystack_is_text_that_was_held_out():
    from spectral_nb.training import held_out
    titles = [d.split("\n", 1)[0] for d in haystack("all")]
    assert len(titles) > 5 and all(held_out(t.lower()) for t in titles)
    assert 0.9e6 < data_path("haystack.txt").stat().st_size < 1.2e6


@torch.no_grad()
def test_recall_of_unseen_codes():
    "Ten codes, 5 to 95 % deep in text that was not trained on, through generate."
    model, tok = load_pocket()
    rng, docs = random.Random(11), [tok.encode(d, add_special_tokens=False) for d in haystack("report")]
    for i in range(10):
        needle, doc = make_needle(rng), rng.choice(docs)
        ids = torch.tensor([plant(tok, doc, needle, .05 + .1 * i, 1024, start=rng.randrange(len(doc) - 1024)).ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=tok.pad_token_id)
        assert answer_matches(tok.decode(out[0, 1024:]), needle), f"{needle.statement} at depth {5 + 10 * i} %"


@pytest.mark.parametrize("chunk", [256, 700])
def test_a_prompt_in_parts_recalls_and_keeps_its_ratio(chunk):
    "Later parts get bases and bits of their own: a short first one is hardly worth any."
    from spectral_nb.calibrate import spectral_cache
    model, tok = load_pocket()
    model.set_attn_implementation("spectral")
    fact = make_needle(random.Random(5))
    text = haystack()[0]
    ids = tok(text[:8000] + fact.planted + text[8000:11000] + fact.question, return_tensors="pt").input_ids
    cache = spectral_cache(model, ratio=8, exact_dtype="float16")
    with torch.no_grad(), pytest.warns(UserWarning, match="cannot be met"):
        for at in range(0, chunk * 3, chunk): model(ids[:, at:at + chunk], past_key_values=cache)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=10, do_sample=False)
    assert answer_matches(tok.decode(out[0, ids.shape[1]:]), fact)
    assert len(cache.layers[0].cold.segments) > 1 and 6 < cache.ratio < 11


@pytest.mark.parametrize("path", ["spectral_nb/data/pocket", "tests/models/qwen3"])
def test_layer_weights_are_found_in_every_dtype(path, tmp_path, monkeypatch):
    "Those beside the model, but not for a model of the same shapes; files that are none of ours do no harm."
    monkeypatch.setenv("SPECTRAL_NB_CACHE", str(tmp_path))
    path = Path(__file__).parent.parent / path
    want = [tuple(w) for w in json.loads((path / calibrate.WEIGHTS_FILE).read_text())["weights"]]
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=t) for t in (torch.float32, torch.float16, torch.bfloat16)]
    for model in models: assert calibrate.known_layer_weights(model) == want, model.dtype
    name = calibrate.fingerprint(model)["shapes"]
    for i, text in enumerate(("", "[]", '{"fingerprint": "d819a809006d603a", "weights": []}')): (tmp_path / f"{name}-{i}.json").write_text(text)
    with torch.no_grad(): model.model.layers[3].self_attn.v_proj.weight *= 1.05
    assert calibrate.known_layer_weights(model) is None
    calibrate.keep_weights(model, [(1., 2.)])
    assert calibrate.known_layer_weights(model) == [(1., 2.)] and calibrate.known_layer_weights(models[0]) == want
    with torch.no_grad(): model.get_input_embeddings().weight[model.config.vocab_size // 3] = 0 # Unsloth does that to the padding token
    assert calibrate.known_layer_weights(model) == [(1., 2.)]
    monkeypatch.setenv("SPECTRAL_NB_CACHE", str(tmp_path / f"{name}-0.json"))
    with pytest.warns(UserWarning, match="cannot be kept in .* set SPECTRAL_NB_CACHE"): assert calibrate.keep_weights(model, [(1., 2.)]) is None
