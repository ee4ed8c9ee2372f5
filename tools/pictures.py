"""Pictures of the front page and of notebooks, drawn from stored results: nbs/results/*.json -> nbs/images/*.svg

The plots need kaleido (`pip install kaleido`) and a Chrome or Chromium (`BROWSER_PATH`); the bars and lines of the front page and of training need nothing.
"""
import json
import math
import re
from html import escape
from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

NBS = Path(__file__).parent.parent / "nbs"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"  # Okabe and Ito


def text(x, y, s, size=14, anchor="start", fill="#222222", weight="normal"):
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}">{escape(s)}</text>'


def svg(width, height, parts, label):
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{escape(label)}" font-family="system-ui, sans-serif">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *parts, "</svg>\n"])


def codecs(result):
    "Bars: bytes of each codec's cache, and the share of codes it gives back."
    rows, left, bar, gap, second = result["rows"], 150, 26, 14, 560
    top, w1, w2 = 78, 270, 270
    height, most = top + len(rows) * (bar + gap) + 34, max(r["bytes"] for r in rows)
    parts = [text(20, 30, f"A prompt of {rows[0]['context']} tokens: what each cache holds, and what it remembers", 18, weight="600"),
             text(left, 62, "cache, MiB", fill=GREY), text(second, 62, "planted codes given back, %", fill=GREY)]
    for i, r in enumerate(rows):
        y = top + i * (bar + gap)
        a, b = w1 * r["bytes"] / most, w2 * r["recall"]
        parts += [text(left - 12, y + 18, r["codec"], anchor="end"), f'<rect x="{left}" y="{y}" width="{a:.1f}" height="{bar}" fill="{BLUE}"/>',
                  text(left + a + 8, y + 18, f"{r['bytes'] / 2**20:.1f}" + (f"  ({r['ratio']:.1f}x smaller)" if r["ratio"] > 1 else "")),
                  f'<rect x="{second}" y="{y}" width="{w2}" height="{bar}" fill="#eeeeee"/>', f'<rect x="{second}" y="{y}" width="{b:.1f}" height="{bar}" fill="{GREEN}"/>',
                  text(second + w2 + 8, y + 18, f"{100 * r['recall']:.0f}")]
    parts.append(text(20, height - 14, f"{result['model']} model, {rows[0]['trials']} prompts of text that it was not trained on, one six-digit code in each", 12, fill=GREY))
    return svg(900, height, parts, "; ".join(f"{r['codec']}: {r['bytes'] / 2**20:.1f} MiB, {100 * r['recall']:.0f} % recalled" for r in rows))


def training(results):
    "Lines over minutes: loss on text, and share of codes answered exactly."
    width, left, right, panels = 900, 70, 30, [("loss on text, nats a token", "loss", 2, 6), ("codes answered exactly, %", "answer_exact", 0, 1)]
    end, parts = max(r["intervals"][-1]["seconds"] for r in results), []
    x = lambda s: left + (width - left - right) * s / end
    for p, (title, key, low, high) in enumerate(panels):
        top, h = 60 + p * 230, 160
        y = lambda v: top + h * (1 - (min(max(v, low), high) - low) / (high - low))
        parts.append(text(left, top - 14, title, fill=GREY))
        for i in range(5):
            v = low + (high - low) * i / 4
            parts += [f'<line x1="{left}" x2="{width - right}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#dddddd"/>', text(left - 8, y(v) + 5, f"{100 * v:.0f}" if high == 1 else f"{v:.0f}", 12, "end")]
        for r, colour, dash in zip(results, (BLUE, ORANGE), ("", "7 4")):
            points = " ".join(f"{x(i['seconds']):.1f},{y(i[key]):.1f}" for i in r["intervals"])
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>')
        parts += [text(x(60 * m), top + h + 20, f"{m} min", 12, "middle") for m in range(0, int(end // 60) + 1, 2)]
    for i, (r, colour) in enumerate(zip(results, (BLUE, ORANGE))):
        parts += [f'<rect x="{width - 210 + 100 * i}" y="22" width="14" height="14" fill="{colour}"/>', text(width - 190 + 100 * i, 34, r["arch"])]
    return svg(width, 490, parts, "Loss falls and recall of codes rises to 100 % within the first minutes")


def speed(attention, decode, encode):
    "Times of each benchmark beside the time that reading its bytes takes at the bandwidth of a copy (the roofline), on a scale of powers of ten."
    dense_bytes = lambda r: r["batch"] * r["tokens"] * 2 * 8 * 128 * 2  # keys and values of 8 heads of 128 in float16
    weights = 2 * (32 * (2 * 4096 ** 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 32000)  # of the Mistral-7B shape, bytes that a step reads
    rate = 1e9 * attention["copy_gb_s"]
    title = lambda r: f"{r['batch']} x {r['tokens'] // 1024}K"
    one = [(title(r), (("dense", min(t for n, t in r.items() if n.startswith("dense") and not isinstance(t, str)), 1e6 * dense_bytes(r) / rate), ("spectral", r["spectral_us"], r["gb_s"] * r["spectral_us"] / attention["copy_gb_s"]))) for r in attention["rows"]]
    ways = {(r["way"], r["batch"], r["tokens"]): r for r in decode["rows"]}
    all_layers = [(title(r), tuple((name, row["step_ms"], 1e3 * (weights + row["cache_mib"] * 2 ** 20) / rate) for name, row in (("dense", ways["static + CUDA graph", b, n]), ("spectral", r)))) for (way, b, n), r in ways.items() if way == "spectral + CUDA graph" and b == 1]
    pages = [(title(r), (("a step", r["graph_step_ms"], None), ("a page", r["page_ms"], None))) for r in encode["rows"]]
    panels = [("One layer's attention, microseconds", one, 1, 1000), ("A decode step of the whole model, in a CUDA graph, milliseconds", all_layers, 1, 100), ("Coding a page of all layers, beside a step, milliseconds", pages, 1, 100)]
    left, width, right, bar, parts, said, y = 170, 900, 100, 20, [], [], 78
    parts += [text(20, 30, "Measured times and the roofline", 18, weight="600")]
    for name, colour, at in (("dense", ORANGE, 430), ("spectral", BLUE, 520)): parts += [f'<circle cx="{at}" cy="25" r="6" fill="{colour}"/>', text(at + 12, 30, name)]
    parts += [f'<line x1="630" x2="630" y1="17" y2="33" stroke="{GREY}" stroke-width="3"/>', text(640, 30, "its bytes at a copy's bandwidth")]
    for head, rows, low, high in panels:
        x = lambda v: left + (width - left - right) * (math.log10(v) - math.log10(low)) / (math.log10(high) - math.log10(low))
        end = y + sum(bar * len(r) + 10 for _, r in rows)
        parts.append(text(20, y - 12, head, fill=GREY))
        for tick in (t * 10 ** e for e in range(4) for t in (1, 3)):
            if low <= tick <= high: parts += [f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{y}" y2="{end}" stroke="#dddddd"/>', text(x(tick), end + 14, f"{tick}", 12, "middle")]
        for label, bars in rows:
            parts.append(text(left - 70, y + bar * len(bars) / 2 + 5, label, anchor="end"))
            for i, (name, t, least) in enumerate(bars):
                colour, middle = GREY if name == "a step" else (ORANGE, BLUE)[i], y + bar * i + bar / 2
                if "a " in name: parts.append(text(left - 8, middle + 5, name, 12, "end", GREY))
                if least: parts += [f'<line x1="{x(least):.1f}" x2="{x(t):.1f}" y1="{middle}" y2="{middle}" stroke="{colour}" stroke-width="3" opacity=".4"/>', f'<line x1="{x(least):.1f}" x2="{x(least):.1f}" y1="{middle - 8}" y2="{middle + 8}" stroke="{GREY}" stroke-width="3"/>']
                parts += [f'<circle cx="{x(t):.1f}" cy="{middle}" r="6" fill="{colour}"/>', text(x(t) + 12, middle + 5, f"{t:g}" + (f"  ({bars[0][1] / t:.2f} times as fast)" if i and least else ""), 13)]
                said.append(f"{label} {name} {t:g}" + (f" of at least {least:.1f}" if least else ""))
            y += bar * len(bars) + 10
        y += 62
    parts.append(text(20, y - 24, f"{attention['device']}, Mistral-7B shape, float16, 8x; dense: PyTorch's fastest kernel, transformers' static cache; a copy: {attention['copy_gb_s'] / 1000:.1f} TB/s", 12, fill=GREY))
    return svg(width, y - 8, parts, "; ".join(said))


MODELS = dict(llama="Llama, head_dim 128", qwen3="Qwen3, head_dim 64")
FAMILIES = dict(spectral=(BLUE, "circle"), rank=(GREY, "x"), kivi=(ORANGE, "square"), hf=("#CC79A7", "diamond"), turbo=(GREEN, "triangle-up"))


def plot(fig, height=420):
    "One look for all plots."
    return fig.update_layout(template="plotly_white", font=dict(family="system-ui, sans-serif", size=14, color="#222222"), width=900, height=height, margin=dict(l=70, r=20, t=70, b=60), legend=dict(orientation="h", y=-.18))


def spectra(story):
    "Singular values of keys and values, one line a layer: what rank coding would have to live on."
    fig = make_subplots(1, 2, subplot_titles=("keys, before RoPE", "values"), shared_yaxes=True, horizontal_spacing=.04)
    layers = story["spectra"]["keys"]
    for col, kind in enumerate(("keys", "values"), 1):
        for i, curve in enumerate(story["spectra"][kind]):
            shade = f"rgb({int(0 + 200 * i / len(layers))},{int(114 - 20 * i / len(layers))},{int(178 - 178 * i / len(layers))})"
            fig.add_scatter(x=list(range(1, len(curve) + 1)), y=curve, mode="lines", line=dict(color=shade), name=f"layer {i}", legendgroup=str(i), showlegend=col == 1, row=1, col=col)
    fig.update_yaxes(type="log", range=[-3, .05], dtick=1, exponentformat="power").update_yaxes(title="singular value / largest", col=1).update_xaxes(title="component")
    return plot(fig)


def heat(stories, ratio="8"):
    "Bits of every group of 16 components, layers of both models."
    fig = make_subplots(1, 4, subplot_titles=[f"{MODELS[m].split(',')[0]}: {kv}" for m in stories for kv in ("keys", "values")], horizontal_spacing=.05)
    for j, story in enumerate(stories.values()):
        for k, kv in enumerate(("keys", "values")):
            z = [row[kv] for row in story["bits"][ratio]]
            x = [f"{16 * g + 1}-{16 * g + 16}" for g in range(len(z[0]))]
            fig.add_heatmap(z=z, x=x, y=[f"{i}" for i in range(len(z))], zmin=0, zmax=6, coloraxis="coloraxis", text=z, texttemplate="%{text}", xgap=2, ygap=2, row=1, col=2 * j + k + 1)
    fig.update_xaxes(type="category", tickangle=-60, tickfont=dict(size=10)).update_yaxes(type="category", autorange="reversed").update_yaxes(title="layer", col=1)
    fig.update_layout(coloraxis=dict(colorscale=[[0, "#f4f4f4"], [.01, "#dcebf5"], [1, BLUE]], colorbar=dict(title="bits")), title=f"Bits of each group of 16 components, at {ratio} times less memory")
    return plot(fig, 400)


def rate_distortion(stories):
    "Squared error of values against bits, and what no code can beat."
    fig = make_subplots(1, 2, subplot_titles=[MODELS[m] for m in stories], shared_yaxes=True, horizontal_spacing=.04)
    looks = dict(theory=dict(color=GREY, dash="dash"), spectral=dict(color=BLUE))
    for col, story in enumerate(stories.values(), 1):
        for i, (name, points) in enumerate(story["distortion"].items()):
            look = looks.get(name, dict(color=(ORANGE, GREEN)[i % 2]))
            title = dict(theory="bound for Gaussian components of this spectrum", spectral="spectral coding").get(name, name)
            fig.add_scatter(x=[p[0] for p in points], y=[p[1] for p in points], mode="lines" if name == "theory" else "lines+markers", line=look, name=title, legendgroup=name, showlegend=col == 1, row=1, col=col)
    fig.update_yaxes(type="log", dtick=1, exponentformat="power").update_yaxes(title="squared error / variance", col=1).update_xaxes(title="bits a number")
    return plot(fig.update_layout(title="Values: distortion against rate, mean over layers"))


def pareto(results, context):
    "Bytes against divergence, every codec; open marks lose codes."
    fig = make_subplots(1, 2, subplot_titles=[MODELS[m] for m in results], shared_yaxes=True, horizontal_spacing=.04)
    for col, result in enumerate(results.values(), 1):
        for family, (colour, symbol) in FAMILIES.items():
            rows = sorted((r for r in result["rows"] if r["codec"].startswith(family)), key=lambda r: r["ratio"])
            full = [r["recall"] >= .999 * result["rows"][0]["recall"] for r in rows]
            fig.add_scatter(x=[r["ratio"] for r in rows], y=[r["kl"] for r in rows], mode="lines+markers+text" if family == "spectral" else "markers+text", name=family, legendgroup=family, showlegend=col == 1,
                            marker=dict(color=colour, size=11, symbol=[symbol if f else f"{symbol}-open" for f in full]), line=dict(color=colour, width=1), row=1, col=col,
                            text=[r["codec"].split(":")[-1] + ("" if f else f" ({100 * r['recall']:.0f} %)") for r, f in zip(rows, full)], textposition="top center", textfont=dict(size=10, color=colour), cliponaxis=False)
    fig.update_yaxes(type="log", exponentformat="power", dtick=1).update_yaxes(title="KL from dense, nats a token", col=1).update_xaxes(title="times smaller than dense, all bytes", range=[2, 17.5])
    n = next(iter(results.values()))["rows"][0]["trials"]
    return plot(fig.update_layout(title=f"{context} tokens, {n} prompts: open marks lose codes (share given back)"), 480)


def save(fig, name):
    "A plot as SVG, without the random ids that would change it every time."
    text = fig.to_image("svg").decode()
    for i, old in enumerate(dict.fromkeys(re.findall(r'(?:id="[a-z]*|trace)([0-9a-f]{6})', text))): text = text.replace(old, f"{i:06x}")
    (NBS / "images" / f"{name}.svg").write_text(text + "\n")


def load(name): return json.loads((NBS / "results" / name).read_text())


def main(plots=True):
    (NBS / "images").mkdir(exist_ok=True)
    (NBS / "images" / "codecs.svg").write_text(codecs(load("eval_llama_4096.json")))
    (NBS / "images" / "training.svg").write_text(training([load("training_llama.json"), load("training_qwen3.json")]))
    (NBS / "images" / "speed.svg").write_text(speed(*(load(f"bench_{n}.json") for n in ("attention", "decode", "encode"))))
    if not plots: return
    stories = {m: load(f"story_{m}.json") for m in MODELS}
    save(spectra(stories["llama"]), "spectra")
    save(heat(stories), "bits")
    save(rate_distortion(stories), "distortion")
    save(pareto({m: load(f"eval_{m}_4096.json") for m in MODELS}, 4096), "pareto")


if __name__ == "__main__": main()
