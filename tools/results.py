"""nbs/18_results.ipynb from nbs/results/*.json and nbs/images/*.svg: python tools/results.py (--check: exit 1 if it differs)."""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
NB, RESULTS = ROOT / "nbs" / "18_results.ipynb", ROOT / "nbs" / "results"
MODELS = dict(llama="Llama (pocket: 6 layers, 2 KV heads, head_dim 128)", qwen3="Qwen3 (qk-norm, 6 layers, 4 KV heads, head_dim 64)")
# at, KL limit as (factor, codec), limit of perplexity change in %, share of the dense recall
TARGETS = [("6x", (1.5, "hf-int4"), .4, 1.), ("8x", (.3, "kivi:2/2"), .9, 1.), ("10x", (1., "turbo:3/3"), 1.6, 1.), ("12x", None, None, .98), ("16x", None, None, .9)]
COLUMNS = dict(codec="codec", ratio="times smaller", recall="recall", kl="KL, nats a token", ppl_change_pct="perplexity, %")


def load(name): return json.loads((RESULTS / f"{name}.json").read_text())


def table(head, rows): return "\n".join("| " + " | ".join(str(x) for x in r) + " |" for r in (head, ["---"] * len(head), *rows))


def source(result): return f"`{result['command']}` on {result['device']}, torch {result['versions']['torch']}"


def verdict(met, value, limit): return f"{value} ({limit}) {'met' if met else '**missed**'}"


def targets():
    "What was aimed at, line by line, both models."
    rows = []
    for at, kl, ppl, recall in TARGETS:
        for model in MODELS:
            by = {r["codec"]: r for r in load(f"eval_{model}_4096")["rows"]}
            own, dense = by[f"spectral:{at}"], by["dense"]
            row = [at, MODELS[model].split(" ")[0], verdict(own["recall"] >= recall * dense["recall"], own["recall"], f"at least {recall * dense['recall']:g}")]
            if kl: row.append(verdict(own["kl"] <= kl[0] * by[kl[1]]["kl"], own["kl"], f"at most {kl[0] * by[kl[1]]['kl']:.5f}, {kl[0]:g} x {kl[1]}"))
            row += [] if kl else ["-"]
            row.append(verdict(own["ppl_change_pct"] <= ppl, own["ppl_change_pct"], f"at most {ppl}") if ppl else "-")
            rows.append(row)
    return table(["at", "model", "recall", "KL", "perplexity, %"], rows)


def evaluation(model, context):
    "One stored result."
    d = load(f"eval_{model}_{context}")
    return table(COLUMNS.values(), [[r[c] for c in COLUMNS] for r in d["rows"]]) + f"\n\n{d['rows'][0]['trials']} prompts; {source(d)}"


def encoding():
    "Cost of storing a prompt."
    d = load("encode_7b")
    parts = [table(["codec", "prompt, tokens", "prefill, ms", "peak above the weights, MiB"], [[r["codec"], r["tokens"], r["prefill_ms"], r["peak_mib_above_weights"]] for r in d["rows"]])]
    if "stages" in d: parts += ["By stage, with a wait for the device around each (so that they add up to more than the whole; indented ones are part of the line above):",
                                table(["stage", "ms", "calls"], [[s["stage"].replace("  ", "&nbsp;&nbsp;"), s["ms"], s["calls"]] for s in d["stages"] if s.get("codec", "spectral:8x") == "spectral:8x"])]
    return "\n\n".join([*parts, source(d)])


def reach():
    "What a perfect code would leave of the divergence at 10x."
    left = []
    for m, title in MODELS.items():
        kl = {r["codec"]: r["kl"] for r in load(f"eval_{m}_4096")["rows"]}
        curves = {n: dict(c) for n, c in load(f"story_{m}")["distortion"].items()}
        times = curves["spectral"][1] / curves["theory"][1]
        left.append(f"{title.split()[0]}: {times:.2f} times a perfect code's error, KL {kl['spectral:10x'] / times:.4f} without that, aimed at {kl['turbo:3/3']:.4f}")
    return "At 10x two thirds of the bytes are codes, about one bit a number. There a perfect code of Gaussian components with the same bits would still not reach the divergence that was aimed at, as far as KL goes with the squared error (" + "; ".join(left) + "). What more than a code could do, bits by the age of a token for one, is in [notebook 02b](02b_spectral.ipynb)."


def forgotten():
    "Why the second model forgets first."
    d = load("rare_tokens")
    rows = [[r["model"].split("/")[-1], r["layer"], r["median_token"], r["code_tokens"], r["times"]] for r in d["rows"] if r["codec"] == "spectral:10x" and r["of"] == "keys"]
    return ("Recall that is missed at 10x and 12x: tokens of a code are rare ones, and bases and steps are fitted to the usual ones. Keys are off by, as a share of their norm, at 10x:\n\n"
            + table(["model", "layer", "median token", "tokens of the code", "times"], rows) + f"\n\n{d['rows'][0]['prompts']} prompts, means over heads; {source(d)}")


def cells():
    url = "https://colab.research.google.com"
    yield "markdown", f"""# Results

> What each codec forgets, on two models, and what storing a prompt costs

[![Open in Colab]({url}/assets/colab-badge.svg)]({url}/github/spectral-nb/spectral-nb/blob/main/nbs/18_results.ipynb)"""
    yield "code", """#| hide
import sys
if "google.colab" in sys.modules: # elsewhere the clone is there already
    !git clone -q https://github.com/spectral-nb/spectral-nb && pip install -q './spectral-nb[dev]'
    %cd spectral-nb/nbs"""
    yield "markdown", """This page is made from the JSON files in `nbs/results` by `python tools/results.py`; nothing here is typed in. Every ratio counts every byte of the cache, codes, scales, bases, exact tokens and rotary tables, against a dense cache of 16 bits.
Recall: a six-digit code is planted in a text of which the model has never seen a word, and has to be given back exactly. KL and perplexity are taken on the 256 tokens that follow the prompt. Settings were chosen on other texts (part `tune`) than these (part `report`)."""
    yield "markdown", "## What was aimed at\n\nRecall beside dense, divergence beside the peers of the same run, at 4096 tokens:\n\n" + targets()
    yield "markdown", "## Every codec at 4096 tokens\n\n![Times smaller against KL, both models](images/pareto.svg)"
    for m, title in MODELS.items(): yield "markdown", f"### {title}\n\n{evaluation(m, 4096)}"
    for context in (2048, 1024):
        yield "markdown", f"## {context} tokens" + ("\n\nBases and exact tokens weigh more in a short prompt: 12x and 16x are not met, since a token gets at least half of the bits that the ratio allows for good." if context == 1024 else "")
        for m, title in MODELS.items(): yield "markdown", f"### {title}\n\n{evaluation(m, context)}"
    yield "markdown", f"""## Why

Singular values of the pocket model's keys and values fall slowly: whatever rank is kept, what tells one digit from another lies partly beyond it.

![Singular values of keys and values](images/spectra.svg)

So every component is kept, at the bits that it is worth. Layers differ more than components do: what an error in each costs at the output was measured (`spectral_nb.calibrate`).

![Bits of each group of components, layer by layer](images/bits.svg)

Values of these small models are nearly white, so a basis gains little for them, and the distance to the bound is that of scalar quantizers at one to two bits. A vector quantizer could win back a part of it.

![Distortion against rate](images/distortion.svg)

{reach()}

{forgotten()}"""
    yield "markdown", f"## Storing a prompt\n\nA random model of the shape of Mistral-7B (32 layers, 8 KV heads, head_dim 128):\n\n{encoding()}"
    yield "markdown", "The two models and how they were trained: [notebook 12](12_training.ipynb)."


def notebook():
    out = []
    for i, (kind, text) in enumerate(cells()):
        c = dict(cell_type=kind, id=f"result{i:02}", metadata={}, source=text.splitlines(True))
        out.append(c if kind == "markdown" else dict(c, execution_count=None, outputs=[]))
    meta = dict(kernelspec=dict(display_name="python3", language="python", name="python3"))
    return json.dumps(dict(cells=out, metadata=meta, nbformat=4, nbformat_minor=5), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv: sys.exit(None if NB.read_text(encoding="utf-8") == notebook() else "nbs/18_results.ipynb is not what nbs/results say: run python tools/results.py")
    NB.write_text(notebook(), encoding="utf-8")
