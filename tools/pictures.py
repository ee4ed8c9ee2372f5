"Pictures of the front page and the training notebook, drawn from stored results: nbs/results/*.json -> nbs/images/*.svg"
import json
from html import escape
from pathlib import Path

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


def load(name): return json.loads((NBS / "results" / name).read_text())


def main():
    (NBS / "images").mkdir(exist_ok=True)
    (NBS / "images" / "codecs.svg").write_text(codecs(load("eval_llama_4096.json")))
    (NBS / "images" / "training.svg").write_text(training([load("training_llama.json"), load("training_qwen3.json")]))


if __name__ == "__main__": main()
