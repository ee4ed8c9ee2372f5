"Widgets without a browser: controls change the picture, a stop takes effect within one token, errors are shown in place."
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("ipywidgets", reason="ipywidgets is not installed: pip install '.[notebook]'")
from tiny import tiny_model
from transformers import GenerationConfig

from spectral_nb import widgets
from spectral_nb.diagnostics import log_ground_truth
from spectral_nb.integration import spectral
from spectral_nb.needle import Needle
from spectral_nb.pocket import haystack, load_pocket
from spectral_nb.widgets import AttentionExplorer, DenseTwin, DivergenceExplorer, LiveGeneration, SpectrumExplorer, stream

FACT = Needle("the amber lantern", "482913")


@pytest.fixture(scope="module")
def pocket(): return load_pocket()


@pytest.fixture(scope="module")
def prompt(): return haystack()[0][:1500] + FACT.planted + haystack()[0][1500:3000] + FACT.question


@pytest.fixture
def live(pocket, prompt):
    out = LiveGeneration(*pocket, prompt, ratio=4, max_new_tokens=100)
    out.widget()
    yield out
    out.stop(None)


@pytest.fixture(scope="module")
def spectra(pocket, prompt):
    out = SpectrumExplorer(*pocket, prompt, layer=2)
    out.widget()
    return out


@pytest.fixture(scope="module")
def attention(pocket, prompt):
    out = AttentionExplorer(*pocket, prompt, codec="spectral:16x", needle=FACT.statement, new_tokens=8)
    out.widget()
    return out


@pytest.fixture(scope="module")
def divergence(pocket, prompt):
    out = DivergenceExplorer(log_ground_truth(*pocket, prompt, codec="spectral:16x", new_tokens=8, expected=FACT.answer))
    out.widget()
    return out


def drawn(explorer):
    "Data of the picture in the widget's `Output`."
    return explorer.output.outputs[0]["data"]["application/vnd.plotly.v1+json"]["data"]


def ticking(live): return getattr(live.controls["clock"], "playing" if live.controls["clock"].has_trait("playing") else "_playing") # ipywidgets 8, and 7 as in Colab


def until(live, n):
    while len(live.steps) < n and live.running: live.thread.join(.005)


def click_through(explorer, values):
    "Set each control; the picture and the attribute must follow."
    for name, value in values.items():
        before = drawn(explorer)
        explorer.controls[name].value = value
        assert getattr(explorer, name) == value and explorer.error is None, name
        assert drawn(explorer) != before, f"{name} changed nothing"


def test_start_and_stop_within_one_token(live):
    c = live.controls
    c["start"].click()
    assert live.running and c["start"].disabled and c["ratio"].disabled and not c["stop"].disabled and ticking(live)
    until(live, 4)
    c["clock"].value += 1
    first = drawn(live)
    until(live, 8)
    c["clock"].value += 1
    assert drawn(live) != first and len(drawn(live)[0]["x"]) >= 8
    c["stop"].click()
    held = len(live.steps)
    live.thread.join(10)
    assert live.state == "stopped" and held <= len(live.steps) <= held + 1 < 100
    c["clock"].value += 1
    assert not c["start"].disabled and c["stop"].disabled and not ticking(live)
    assert "stopped" in live.message.value and live.text in live.message.value.replace("&#x27;", "'").replace("&quot;", '"')


def test_a_stop_while_the_prompt_is_read(live):
    live.start()
    live.stop(None)
    assert live.state == "stopped" and len(live.steps) <= 1


def test_the_ratio_slider_takes_effect_with_the_next_start(live):
    live.set(max_new_tokens=2)
    live.run()
    assert abs(live.steps[0].ratio / 4 - 1) < .05
    live.controls["ratio"].value = 8.
    assert "ratio 8 from the next start on" in live.message.value
    live.run()
    assert abs(live.steps[0].ratio / 8 - 1) < .05 and "from the next start" not in live.message.value


def test_another_prompt(live):
    live.controls["prompt"].value = "Once upon a time"
    live.controls["max_new_tokens"].value = 3
    live.run()
    assert "(4 asked; the prompt is too short for it)" in live.message.value
    assert len(live.steps) == 3 and live.steps[-1].dense_nbytes == 6 * 2 * 2 * 128 * 2 * (live.tokenizer("Once upon a time", return_tensors="pt").input_ids.shape[1] + 2)


def test_divergence_where_asked(pocket, prompt):
    "The same as the log that reads the dense model's tokens, as long as the tokens agree."
    live = LiveGeneration(*pocket, prompt, ratio=8, max_new_tokens=5, kl=True).run()
    log = log_ground_truth(*pocket, prompt, codec="spectral:8x", new_tokens=5)
    same = 5 if log.first is None else log.first + 1
    assert same > 1 and max(s.kl for s in live.steps) > 1e-5
    assert [s.kl for s in live.steps[:same]] == pytest.approx([s.kl for s in log.steps[:same]], rel=.01, abs=1e-6)
    assert "KL (nats)" in str(live.figure().layout) and "nats a token" in live.summary()


def test_the_dense_twin_is_the_dense_model(pocket, prompt):
    model, tok = pocket
    ids = tok(prompt, return_tensors="pt").input_ids
    with torch.no_grad(): dense = model(ids).logits[0, -4:]
    with spectral(model, ratio=8):
        twin = DenseTwin(model)
        got = torch.cat([twin(ids[:, :-3]), *(twin(ids[:, i:i + 1]) for i in range(ids.shape[1] - 3, ids.shape[1]))])
    assert torch.allclose(got, dense, atol=2e-3)


def test_errors_are_shown_in_place(live, monkeypatch):
    def broken(*args, **kwargs): raise RuntimeError("out of <memory>")
    monkeypatch.setattr(widgets, "stream", broken)
    live.controls["start"].click()
    live.thread.join()
    live.controls["clock"].value += 1
    assert live.state == "failed" and "out of &lt;memory&gt;" in live.message.value and "Traceback" in live.message.value
    assert not live.controls["start"].disabled
    with pytest.raises(RuntimeError, match="out of <memory>"): live.wait()
    monkeypatch.undo()
    live.set(max_new_tokens=1)
    live.run()
    assert live.state == "finished" and live.failure is None


def test_an_error_inside_generation_leaves_the_model_as_it_was(live, pocket):
    model, n = pocket[0], 0
    def hook(module, args, out):
        nonlocal n
        n += 1
        if n == 3: raise RuntimeError("layer on fire")
    handle = model.model.layers[2].register_forward_hook(hook)
    try: live.start(); live.thread.join()
    finally: handle.remove()
    live.controls["clock"].value += 1
    assert "layer on fire" in live.message.value and len(live.steps) == 2
    assert "forward" not in model.__dict__ and model.config._attn_implementation == "sdpa" and not model._forward_hooks and model not in widgets.BUSY


def test_one_generation_at_a_time(live, pocket, prompt):
    other = LiveGeneration(*pocket, prompt, max_new_tokens=2)
    live.start()
    until(live, 1)
    with pytest.raises(RuntimeError, match="under way"): live.start()
    with pytest.raises(RuntimeError, match="generating already"): other.run()
    live.stop(None)
    assert len(other.run().steps) == 2


def test_interrupting_the_cell_is_a_stop(pocket, prompt):
    model, tok = pocket
    live = LiveGeneration(model, tok, prompt, max_new_tokens=9)
    live.steps_seen = 0
    def interrupt(module, args, out):
        live.steps_seen += 1
        if live.steps_seen == 3: raise KeyboardInterrupt
    handle = model.register_forward_hook(interrupt)
    try: live.run()
    finally: handle.remove()
    assert live.state == "stopped" and len(live.steps) == 2 and "forward" not in model.__dict__


def test_generate_arguments_and_end_of_text(pocket):
    model, tok = pocket
    steps, ids = [], tok("The", return_tensors="pt").input_ids
    stream(model, tok, ids, steps.append, max_new_tokens=6, generation_config=GenerationConfig(eos_token_id=None), do_sample=True, temperature=1.5)
    assert len(steps) == 6
    again = []
    stream(model, tok, ids, again.append, max_new_tokens=6, eos_token_id=steps[0].token, do_sample=False, suppress_tokens=[i for i in range(model.config.vocab_size) if i != steps[0].token])
    assert len(again) == 1


def test_spectrum_controls(spectra):
    click_through(spectra, dict(bits=4., rank=64, layer=4, head=1, kind="values"))
    assert "values of layer 4, head 1" in spectra.message.value


def test_more_bits_cost_more_and_lose_less(spectra):
    spectra.set(kind="keys_pre_rope", layer=2, head=0, rank=128)
    points = [spectra.code(b) for b in (.5, 1., 2., 4., 8.)]
    errors, sizes = zip(*points)
    assert list(errors) == sorted(errors, reverse=True) and list(sizes) == sorted(sizes) and errors[-1] < .02
    truncated = [(spectra.set(rank=r), spectra.code(8.)[0])[1] for r in (16, 64, 128)]
    exact = [(1 - (spectra.singular["keys_pre_rope"][2][0][:r] ** 2).sum() / (spectra.singular["keys_pre_rope"][2][0] ** 2).sum()).item() ** .5 for r in (16, 64)]
    assert truncated == sorted(truncated, reverse=True) and all(t == pytest.approx(e, rel=.15) for t, e in zip(truncated, exact))


def test_attention_controls(attention):
    "It opens where the needle is looked at, and every control changes the maps."
    maps = attention.maps()
    assert maps.dense[attention.step, slice(*attention.needle)].sum() > .5 and "on the needle" in attention.message.value
    click_through(attention, dict(step=7, head=0, layer=1))
    maps = attention.maps()
    assert torch.allclose(maps.dense.sum(-1), torch.ones(8), atol=1e-4) and torch.allclose(maps.compressed.sum(-1), torch.ones(8), atol=1e-4)
    dense, compressed, _ = (o for o in attention.figure().data if o.type == "heatmap")
    assert dense.z.shape == compressed.z.shape == (8, len(dense.x)) and abs(dense.z - compressed.z).max() > .01


def test_columns_add_up(attention):
    "Tokens that share a column: nothing is lost."
    wide, narrow = (attention.figure(columns=c) for c in (4096, 100))
    assert sum(wide.data[4].y) == pytest.approx(sum(narrow.data[4].y), rel=1e-4) == pytest.approx(100, rel=1e-3)
    assert len(narrow.data[4].y) <= 100 and len(wide.data[4].y) == len(attention.ids) + 7


def test_a_click_on_a_token(divergence):
    log, c = divergence.log, divergence.controls
    assert divergence.step == (log.first or 0) and [len(divergence.buttons[r]) for r in ("dense", "compressed")] == [8, 8]
    before = drawn(divergence)
    divergence.buttons["compressed"][7].click()
    assert (divergence.run, divergence.step, c["run"].value, c["step"].value) == ("compressed", 7, "compressed", 7) and drawn(divergence) != before
    assert divergence.buttons["compressed"][7].layout.border == "2px solid #0072B2" and "transparent" in divergence.buttons["dense"][7].layout.border
    c["run"].value = "dense"
    c["step"].value = 3
    assert (divergence.run, divergence.step) == ("dense", 3) and "step 3 of the dense run" in divergence.message.value
    bars = [o for o in divergence.figure().data if o.type == "bar"]
    assert sum(bars[0].x) == pytest.approx(100 * sum(p for _, p in log.steps[3].dense_top), rel=.01) # alternatives with the same visible text would share a bar
    assert list(bars[2].y) == pytest.approx([100 * e for e in log.steps[3].layer_errors])


def test_a_log_from_a_file(divergence, tmp_path):
    divergence.log.to_json(tmp_path / "log.json")
    again = DivergenceExplorer(type(divergence.log).from_json(tmp_path / "log.json"))
    assert again.spans("dense").replace("outline:2px solid #0072B2;", "") == divergence.spans("dense").replace("outline:2px solid #0072B2;", "")


def test_sliding_windows():
    "Layers that hold a window only are left out, and asking for one says so."
    model, tok = tiny_model("gemma2"), SimpleNamespace(decode=lambda ids, **kw: f" {ids}", eos_token_id=None, pad_token_id=0)
    ids = torch.randint(5, model.config.vocab_size, (1, 640), generator=torch.Generator().manual_seed(0))
    spectra = SpectrumExplorer(model, tok, ids)
    attention = AttentionExplorer(model, tok, ids, codec="spectral:3x", new_tokens=2)
    assert list(spectra.layers) == sorted(attention.calls) == [i for i, k in enumerate(model.config.layer_types) if k == "full_attention"]
    assert spectra.figure().data and attention.figure().data and LiveGeneration(model, tok, ids, ratio=3, max_new_tokens=2, kl=True).run().steps[1].tiers["sliding"]
    with pytest.raises(ValueError, match="layer 0 holds a sliding window only"): SpectrumExplorer(model, tok, ids, layer=0)
    with pytest.raises(ValueError, match="compresses no layer"): AttentionExplorer(model, tok, ids, codec="dense", new_tokens=1)


def test_bad_input(pocket, prompt, divergence):
    model, tok = pocket
    with pytest.raises(ValueError, match="'the silver spoon' is not in the prompt"): AttentionExplorer(model, tok, prompt, needle="the silver spoon", new_tokens=1)
    with pytest.raises(ValueError, match="has no steps"): DivergenceExplorer(replace(divergence.log, steps=[]))
    with pytest.raises(AttributeError, match="no state 'layers_'"): divergence.set(layers_=3)


def test_pages_need_nothing(spectra, attention, divergence, live, tmp_path):
    live.set(max_new_tokens=2)
    live.run()
    for explorer in (spectra, attention, divergence, live):
        page = explorer.to_html(tmp_path / "page.html")
        assert len(repr(page)) < 60
        assert (tmp_path / "page.html").read_text() == page and not re.search(r"<(script|link)[^>]+(src|href)=", page)
        assert explorer.title in page and page.count("plotly-graph-div") == 1


def test_figures_say_what_they_show(spectra, attention, divergence, live):
    live.set(max_new_tokens=2)
    live.run()
    for explorer in (spectra, attention, divergence, live):
        layout = explorer.figure().to_plotly_json()["layout"]
        titles = {k: v.get("title", {}).get("text") for k, v in layout.items() if re.match(r"[xy]axis", k)}
        hidden = {k for k, v in layout.items() if re.match(r"[xy]axis", k) and (v.get("showticklabels") is False)}
        assert {k for k, v in titles.items() if not v} <= hidden | ({"yaxis3"} if explorer is spectra else set()), titles # rows of the heat map say "layer 0"


def test_in_colab(spectra, monkeypatch):
    "There the picture is displayed in the `Output`, as `interact` does it."
    import IPython.display
    shown = []
    monkeypatch.setitem(sys.modules, "google.colab", type(sys)("google.colab"))
    monkeypatch.setattr(IPython.display, "clear_output", lambda wait=False: shown.append("cleared"))
    monkeypatch.setattr(IPython.display, "display", lambda data, raw=False: shown.append(data))
    spectra.set(bits=3.)
    assert shown[0] == "cleared" and shown[1]["application/vnd.plotly.v1+json"]["data"]


def test_without_ipywidgets():
    "Pictures and pages work, controls say what to install."
    code = """
import sys; sys.modules['ipywidgets'] = None
import torch; torch.set_num_threads(1)
from spectral_nb.pocket import load_pocket
from spectral_nb.widgets import LiveGeneration
live = LiveGeneration(*load_pocket(), "Once upon a time", max_new_tokens=2).run()
assert 'Live generation' in live.to_html() and 'application/vnd.plotly.v1+json' in live._repr_mimebundle_()
try: live.widget()
except ImportError as e: assert "pip install ipywidgets" in str(e)
else: raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_the_front_page_shows_a_generation():
    "Its lines for a notebook work as they are."
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    code = next(b for b in re.findall(r"^```\w*\n(.*?)^```$", readme, re.S | re.M) if "LiveGeneration" in b)
    *lines, last = code.strip().splitlines()
    names = {}
    exec("\n".join([*lines, f"live = {last}"]), names)
    names["live"].set(max_new_tokens=2)
    assert len(names["live"].run().steps) == 2
