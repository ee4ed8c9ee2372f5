"Every kernel variant: numbers in Triton's interpreter, resources of builds for three architectures, and on a GPU the same cases in fp16 and bf16. Each in a process of its own, as the interpreter is chosen on import."
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
import pytest
import torch
from kernel_cases import CASES, case
from random_models import wrong
from spectral_nb import attention, encode_kernels, kernels

HERE, NAMES = Path(__file__).parent, list(CASES)
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")


def run(script, *args, **env):
    out = subprocess.run([sys.executable, HERE / script, *args], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", **env})
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-3000:]
    return out.stdout


@needs_triton
@pytest.mark.parametrize("kind", ["dot", "gemv"])
@pytest.mark.parametrize("part", range(4))
def test_numbers_in_the_interpreter(kind, part):
    "Within 2e-3 (bf16: 8e-3, the rounding of its output) of the PyTorch path in float32 on the same codes."
    assert len(run("kernels_interpreted.py", kind, *NAMES[part::4], TRITON_INTERPRET="1").splitlines()) == len(NAMES[part::4])


@needs_triton
@pytest.mark.parametrize("part", range(2))
def test_codes_in_the_interpreter(part):
    "The encoding kernel's are PyTorch's, but for coefficients within 1e-3 of a cell's edge."
    names = "group2_batch dim64 dim80 dim96 dim256 float16 bfloat16 one_bit many_bits padded interleaved partial_rotary pocket".split()[part::2] # the rest differ in queries only
    assert len(run("encode_interpreted.py", *names, TRITON_INTERPRET="1").splitlines()) == len(names)


@needs_triton
@pytest.mark.parametrize("fault", ["codes", "offset", "launch"])
def test_a_wrong_encoding_kernel_is_never_used(monkeypatch, fault):
    "Wrong codes, wrong sums or a failing launch: one warning, and PyTorch's codes."
    from spectral_nb import encode_kernels
    from spectral_nb.spectral import Coded
    with monkeypatch.context() as m:
        m.setattr(Coded, "kernel", None)
        want, *_ = case(T=500)
        for _ in range(130): want.append(*(t[:, :, :1] for t in want.hot.states()))
    def launch(x, layouts, analysis, bias, basis, scale, offset, *args, **kw):
        if fault == "launch": raise RuntimeError("no such instruction")
        (B, H, n, D), N = x[0].shape, len(x)
        shape = B, H, n // 128, -(-layouts[0].nbytes // 4) * 4 * 128
        pages = torch.randint(0, 256, shape, dtype=torch.uint8) if fault == "codes" else torch.zeros(shape, dtype=torch.uint8)
        return [pages], torch.ones(B, H, N, n // 128, *(() if offset is not None else (D,)))
    encoder = encode_kernels.Encoder()
    monkeypatch.setattr(encode_kernels, "launch", launch)
    monkeypatch.setattr(encoder, "can", lambda x, layouts: x.device not in encoder.failed)
    monkeypatch.setattr(Coded, "kernel", encoder)
    with pytest.warns(UserWarning, match="encoding kernel failed.*by PyTorch") as said:
        got, *_ = case(T=500)
        for _ in range(130): got.append(*(t[:, :, :1] for t in got.hot.states()))
    assert len(said) == 1 and len(got.cold) == len(want.cold)
    for a, b in zip(got.get_kv(), want.get_kv()): assert torch.equal(a, b)


@needs_triton
def test_states_that_are_not_finite_say_nothing_of_a_kernel():
    "They come to it before the error that they raise: no reason to do without it from then on."
    from spectral_nb.encode_kernels import Encoder
    encoder, nan, one = Encoder(), torch.tensor([torch.nan, 1.]), torch.ones(2)
    run = lambda got, want: encoder.run(one, ("kind",), lambda: got, lambda: ([want], want), lambda a, b: torch.equal(a, b[1]))
    assert run(nan, nan) is None and not encoder.failed and not encoder.trusted
    assert run(one, one) is one and encoder.trusted
    encoder.trusted.clear()
    with pytest.warns(UserWarning, match="differ from PyTorch's"): assert run(nan, one) is None and encoder.failed


@pytest.mark.gpu
def test_numbers_on_a_gpu(tmp_path):
    if not torch.cuda.is_available(): pytest.skip("needs a CUDA device; last result: nbs/results/kernels.json")
    run("kernels_gpu.py", tmp_path / "kernels.json")


def test_last_result_on_a_gpu():
    rows = json.loads((HERE.parent / "nbs/results/kernels.json").read_text())["rows"]
    assert {r["case"] for r in rows} == set(NAMES) and all(r["repeats"] and r["error"] < (2e-3 if r["dtype"] == "torch.float16" else 8e-3) for r in rows)


def test_what_kernels_cannot_do_goes_to_pytorch():
    layer, q, k, v, mask, softcap = case(T=500)
    assert kernels.unsupported(layer, q, v) in ("states are not on a GPU", "Triton is not installed")
    assert torch.equal(kernels.attend(layer, q, k, v, mask)[0], attention.attend(layer, q, k, v, mask)[0])


def test_a_layer_cropped_to_its_first_page_goes_to_pytorch(monkeypatch):
    "Its hot tier is int8 and no page is left: kernels would write nothing."
    layer, q, k, v, *_ = case(T=500)
    monkeypatch.setattr(kernels, "interpreted", lambda: kernels.triton is not None)
    layer.crop(100 - layer.get_seq_length())
    assert layer.hot.keys_scale is not None and len(layer.cold) == 0
    assert kernels.unsupported(layer, q, v) in ("nothing is coded", "Triton is not installed")


def test_tokens_after_a_prompt_in_inference_mode():
    "Tensors made there cannot be written to outside: room is made anew."
    with torch.inference_mode(): layer, q, k, v, *_ = case(T=500)
    n = layer.get_seq_length()
    for _ in range(130): layer.append(k, v)
    assert layer.get_seq_length() == n + 130 and torch.isfinite(layer.get_kv()[0]).all()


@needs_triton
def test_a_failing_kernel_falls_back_once_and_says_so(monkeypatch):
    layer, q, k, v, mask, softcap = case(T=500)
    monkeypatch.setattr(kernels, "unsupported", lambda *_: None)
    monkeypatch.setattr(kernels, "_broken", set())
    def broken(*_): raise RuntimeError("no such instruction")
    monkeypatch.setattr(kernels, "decode_attention", broken)
    want = attention.attend(layer, q, k, v, mask)[0]
    with pytest.warns(UserWarning, match="no such instruction.*falls back to PyTorch"): assert torch.equal(kernels.attend(layer, q, k, v, mask)[0], want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(kernels.attend(layer, q, k, v, mask)[0], want)


@needs_triton
@pytest.mark.parametrize("settings", [dict(), dict(B=3, padding=[0, 100, 300]), dict(softcap=5.), dict(segments=2)])
def test_a_kernel_with_wrong_numbers_is_noticed_on_first_use(monkeypatch, settings):
    layer, q, k, v, mask, softcap = case(**settings)
    want = attention.attend(layer, q, k, v, mask, None, softcap)[0]
    monkeypatch.setattr(kernels, "unsupported", lambda *_: None)
    monkeypatch.setattr(kernels, "_broken", set())
    monkeypatch.setattr(kernels, "_agreed", set())
    monkeypatch.setattr(kernels, "decode_attention", lambda *_: want * 1.001)
    assert torch.equal(kernels.attend(layer, q, k, v, mask, None, softcap)[0], want * 1.001)
    kernels._agreed.clear()
    monkeypatch.setattr(kernels, "decode_attention", lambda *_: want * 1.1)
    with pytest.warns(UserWarning, match="10.0% off.*falls back to PyTorch"): assert torch.equal(kernels.attend(layer, q, k, v, mask, None, softcap)[0], want)


def test_a_mask_that_is_too_short_is_refused(monkeypatch):
    layer, q, k, v, *_ = case(T=500)
    monkeypatch.setattr(kernels, "unsupported", lambda *_: None)
    with pytest.raises(ValueError, match="attention_mask covers 3 keys"): kernels.attend(layer, q, k, v, torch.ones(1, 1, 1, 3, dtype=torch.bool))


@needs_triton
def test_kept_launches_follow_their_layer():
    "Through steps, beam search, copies, cropping, new pages and scratch memory that moves."
    assert "done" in run("kernels_plans.py", TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_kept_launches_on_a_gpu():
    if not torch.cuda.is_available(): pytest.skip("needs a CUDA device; not run yet")
    run("kernels_plans.py", "cuda")


@needs_triton
def test_a_graph_decodes_like_single_steps():
    "Across the end of a page, with replays that see only what Python saw at the capture."
    assert "same logits and hot tiers" in run("graph_interpreted.py", TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_a_graph_on_a_gpu(tmp_path):
    if not torch.cuda.is_available(): pytest.skip("needs a CUDA device; not run yet in this form")
    run("graph_gpu.py", tmp_path / "graph.json")


def test_streams_read_tables_of_their_own(monkeypatch):
    "A table that one stream is still waiting for is not read by another."
    layer, _, k, v, *_ = case(T=300)
    coded, dev, found = [layer.cold.segments[0].keys], k.device, []
    monkeypatch.setattr(encode_kernels, "invert_bases", {(2,): lambda basis, scale, offset, sizes, *args, **kwargs: found.append(sizes)})
    for stream in (1, 2, 1):
        for module in (kernels, encode_kernels): monkeypatch.setattr(module, "stream_of", lambda _: stream)
        encode_kernels.pseudo_inverses(coded, torch.stack([c.offset for c in coded], 2))
        found += kernels.anchor_table(layer.table, 3, dev) + (kernels._length(layer.hot, 3, dev),)
    for a, b, c in zip(found[:4], found[4:8], found[8:]): assert a is c and a is not b and torch.equal(a, b)


@needs_triton
def test_several_queries_in_the_interpreter():
    "Those of candidates: steps of the kernels, one after the other; nothing is left behind in the hot tier."
    assert len(run("kernels_several.py", TRITON_INTERPRET="1").splitlines()) == 7


@needs_triton
def test_a_random_model_in_the_interpreter(tmp_path):
    "Each attention of steps and chunks is PyTorch's, in float32 on the same codes, whatever was done to the cache before."
    run("random_models.py", tmp_path / "rows.json", "1", "309", TRITON_INTERPRET="1")
    row, = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["errors"] and max(row["errors"].values()) > 0 and not wrong(row), row


@needs_triton
def test_the_first_chunk_of_a_kind_is_compared_with_pytorch(monkeypatch):
    "Wrong numbers: one warning, PyTorch's instead, and not that kernel from then on; decode keeps its own. What padding gets, which sees nothing, says nothing of a kernel."
    layer, q, k, v, *_ = case(T=500)
    q, k, v = (torch.randn(*t.shape[:2], 40, t.shape[3]) for t in (q, k, v))
    seen = attention.seen_slots(layer, None, 40).clone()
    seen[:, :, 3] = False
    want, *_ = attention.attend(layer, q, k, v, seen)
    right = lambda *args: torch.where(seen.any(-1)[0, 0][None, :, None, None], want, 0.)
    def wrong(*args): return 2 * want
    for f in (right, wrong): f.fits = lambda *_: True
    for name, value in dict(_agreed=set(), _broken=set(), interpreted=lambda: True, attend_chunk=right).items(): monkeypatch.setattr(kernels, name, value)
    assert torch.equal(kernels.attend(layer, q, k, v, seen)[0], right())
    kernels._agreed.clear()
    monkeypatch.setattr(kernels, "attend_chunk", wrong)
    with pytest.warns(UserWarning, match="off on cpu.*falls back to PyTorch"): assert torch.equal(kernels.attend(layer, q, k, v, seen)[0], want)
    assert kernels._broken == {("chunk", q.device)} and torch.equal(kernels.attend(layer, q, k, v, seen)[0], want)


@pytest.mark.parametrize("shape", [(1, 4, 40, 543), (2, 1, 40, 543), (1, 1, 20, 543), (40, 543)])
def test_a_mask_of_another_shape_is_refused(shape):
    layer, q, k, v, *_ = case(T=500)
    q, k, v = (t.expand(-1, -1, 40, -1) for t in (q, k, v))
    assert layer.get_seq_length() == 503
    for f in (attention.attend, kernels.attend):
        with pytest.raises(ValueError, match="attention_mask has shape"): f(layer, q, k, v, torch.ones(shape, dtype=torch.bool))


def test_what_does_not_fit_a_layer_is_refused(monkeypatch):
    "By name, and it says nothing of a kernel."
    layer, q, k, v, *_ = case(T=500)
    q, k, v = (t.expand(-1, -1, 40, -1) for t in (q, k, v))
    for name, value in dict(interpreted=lambda: True, attend_chunk=lambda *_: 1 / 0).items(): monkeypatch.setattr(kernels, name, value)
    kernels.attend_chunk.fits = lambda *_: True
    two, mask = (lambda t: torch.cat([t, t])), torch.ones(1, 1, 40, 543, dtype=torch.bool)
    for states in ((two(q), two(k), two(v)), (two(q), k, v), (q, k[:, :1], v[:, :1]), (q, k, v[:, :, :20])):
        with pytest.raises(ValueError, match="do not fit a layer of 1 sequences, 2 KV heads and head_dim 128"): kernels.attend(layer, *states)
    with pytest.raises(ValueError, match="attention_mask is on meta, the cache on cpu"): attention.attend(layer, q, k, v, mask.to("meta"))
    assert not kernels._broken


def test_a_bias_of_recent_keys_is_kept():
    "Products of int8 and float16 scales are not rounded to 16 bits: of keys with a bias of 100 that shifted scores by .1."
    layer, q, *_ = case(bias=100., dtype=torch.float16)
    keys = layer.hot.keys[:, :, :layer.hot.n].double() * layer.hot.keys_scale[:, :, :layer.hot.n].double()
    L = layer.landmark_slots.shape[1]
    got, _ = attention.exact_parts(layer, *(torch.zeros(1, 2, 0, 128) for _ in range(2)))
    assert (got[:, :, L:] - keys).abs().max() < 1e-5 < (layer.hot.states()[0] - keys).abs().max()


def test_pytorchs_path_against_float64(monkeypatch):
    "Values are added up in parts: one float32 sum over 131072 tokens was 4e-3 off."
    sys.path.insert(0, str(HERE.parent / "tools"))
    import precision
    from spectral_nb import spectral
    shape = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=64, dtype=torch.float32)
    whole = precision.compare(1500, 5, **shape)["pytorch"]
    monkeypatch.setattr(spectral, "SUMMED", 384)
    assert whole < 1e-4 and precision.compare(1500, 5, **shape)["pytorch"] < 1e-4
    rows = json.loads((HERE.parent / "nbs/results/precision.json").read_text())["rows"]
    assert all(r[way] < 1e-3 for r in rows for way in ("pytorch", "steps", "chunk"))


def test_a_crop_of_recent_tokens_keeps_their_place():
    "Candidates are cropped at every step of assisted generation: launches are kept by the tensors that they read."
    layer, q, k, v, *_ = case(T=500)
    keys, held = layer.hot.keys, layer.hot.states()
    layer.crop(torch.tensor(-2)) # as transformers has it
    assert layer.hot.keys is keys and type(layer.hot.n) is int and layer.get_seq_length() == 501 and not kernels.has_written(layer.hot, None, layer.hot.n)
    for a, b in zip(layer.hot.states(), held): assert torch.equal(a, b[:, :, :-2])
    layer.append(k, v)
    assert layer.hot.keys is keys
