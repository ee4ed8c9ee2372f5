"The widgets on a model that the real Unsloth has loaded, on its fast path and on a CPU: the same numbers as from transformers."
import importlib.util

import pytest

if importlib.util.find_spec("unsloth") is None: pytest.skip("unsloth is not installed; tests/run_unsloth.sh makes an environment with it", allow_module_level=True)
import unsloth_cpu  # noqa: E402,F401  (before anything that imports torch users)

import torch  # noqa: E402
from unsloth import FastLanguageModel  # noqa: E402

from spectral_nb import cache  # noqa: E402
from spectral_nb.diagnostics import log_ground_truth  # noqa: E402
from spectral_nb.integration import SpectralPatch, model_route  # noqa: E402
from spectral_nb.needle import Needle  # noqa: E402
from spectral_nb.pocket import data_path, haystack, load_pocket  # noqa: E402
from spectral_nb.widgets import AttentionExplorer, DivergenceExplorer, LiveGeneration, SpectrumExplorer  # noqa: E402

FACT = Needle("the amber lantern", "482913")
PROMPT = haystack()[0][:1500] + FACT.planted + haystack()[0][1500:3000] + FACT.question


@pytest.fixture(scope="module")
def pair():
    "Unsloth's model, transformers' model, and their tokenizer."
    model = FastLanguageModel.from_pretrained(str(data_path()), dtype=torch.float32, load_in_4bit=False, max_seq_length=2048, use_gradient_checkpointing=False)[0]
    FastLanguageModel.for_inference(model)
    assert model_route(model) == "fast"
    return model, *load_pocket()


def test_live_generation(pair):
    "Tokens, bytes and divergence are those of the transformers model; a stop takes effect within one token."
    fast, plain, tok = pair
    a, b = (LiveGeneration(m, tok, PROMPT, ratio=8, max_new_tokens=6, kl=True).run() for m in (fast, plain))
    assert a.text == b.text == " 48291" and a.steps[-1].ratio == pytest.approx(b.steps[-1].ratio, rel=.02)
    assert [s.kl for s in a.steps] == pytest.approx([s.kl for s in b.steps], rel=.2, abs=1e-4)
    live = LiveGeneration(fast, tok, PROMPT, max_new_tokens=200)
    live.start()
    while len(live.steps) < 3 and live.running: live.thread.join(.005)
    live.stopping.set()
    held = len(live.steps)
    live.wait()
    assert live.state == "stopped" and len(live.steps) <= held + 1


def test_spectra(pair):
    fast, plain, tok = pair
    a, b = (SpectrumExplorer(m, tok, PROMPT, layer=2) for m in (fast, plain))
    assert a.code(2.) == pytest.approx(b.code(2.), rel=.01) and a.figure().data


def test_attention(pair):
    fast, plain, tok = pair
    a, b = (AttentionExplorer(m, tok, PROMPT, codec="spectral:8x", needle=FACT.statement, new_tokens=6) for m in (fast, plain))
    assert (a.layer, a.head, a.step) == (b.layer, b.head, b.step) and a.figure().data
    assert torch.allclose(a.maps().dense, b.maps().dense, atol=1e-3) and torch.allclose(a.maps().compressed, b.maps().compressed, atol=.05)


def test_divergence(pair):
    "The log is the transformers model's, errors of single layers on Unsloth's decode path included, and the widget shows them."
    fast, plain, tok = pair
    a, b = (log_ground_truth(m, tok, PROMPT, codec="spectral:8x", new_tokens=6) for m in (fast, plain))
    assert a.dense == b.dense and a.ratio == pytest.approx(b.ratio, rel=.02) and [s.kl for s in a.steps] == pytest.approx([s.kl for s in b.steps], rel=.2, abs=1e-4)
    for x, y in zip(a.steps, b.steps): assert len(x.layer_errors) == 6 and x.layer_errors == pytest.approx(y.layer_errors, rel=.05, abs=1e-4)
    assert min(e for s in a.steps[1:] for e in s.layer_errors) > .01
    assert (a.cause.layer, a.cause.slot) == (b.cause.layer, b.cause.slot) and a.cause.moved == pytest.approx(b.cause.moved, rel=.05, abs=1e-3)
    shown = DivergenceExplorer(a, step=3).figure()
    assert not any(o.text == "not recorded" for o in shown.layout.annotations)
    assert list([o for o in shown.data if o.type == "bar"][-1].y) == pytest.approx([100 * e for e in a.steps[3].layer_errors])


@pytest.mark.parametrize("layer", [1, 2])
def test_divergence_names_the_damaged_layer(pair, monkeypatch, layer):
    "One layer's stored values are wrong: its own output is off, those below it are as before."
    fast, _, tok = pair
    clean = log_ground_truth(fast, tok, PROMPT, codec="spectral:6x", new_tokens=3)
    fit = cache.fit_layers
    def damaged(layers, *args):
        fit(layers, *args)
        for s in layers[layer].cold.segments: s.values.basis = -8 * s.values.basis.roll(1, -1)
    monkeypatch.setattr(cache, "fit_layers", damaged)
    log = log_ground_truth(fast, tok, PROMPT, codec="spectral:6x", new_tokens=3)
    assert log.cause.layer == layer and f"in layer {layer} (" in log.cause.text
    a, b = (o.steps[log.cause.step].layer_errors for o in (clean, log))
    assert b[:layer] == pytest.approx(a[:layer], rel=.01) and b[layer] > 4 * a[layer]


def test_divergence_tells_a_fault_of_the_patch_from_one_of_the_coding(pair, monkeypatch):
    fast, _, tok = pair
    monkeypatch.setattr(SpectralPatch, "turn", lambda self, q, k, rows: (q, k)) # decode steps without rotary embedding
    log = log_ground_truth(fast, tok, PROMPT, codec="spectral:6x", new_tokens=4)
    assert log.verdict.status == "fault" and "in the patch, not in the coding" in log.verdict.why
