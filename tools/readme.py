"""README.md from index.ipynb.

python tools/readme.py            write README.md
python tools/readme.py --check    exit 1 if README.md differs
python tools/readme.py --refresh  first draw the pictures and run index.ipynb, after a result changed"""
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
INDEX, README = ROOT / "index.ipynb", ROOT / "README.md"


def fence(s, language=""): return f"```{language}\n{s.rstrip()}\n```"


def shown(output):
    "An output as Markdown; pictures and progress bars are left out."
    if output["output_type"] == "stream": return fence("".join(output["text"])) if output["name"] == "stdout" else ""
    data = output.get("data", {})
    if "text/markdown" in data: return "".join(data["text/markdown"])
    return fence("".join(data["text/plain"])) if "text/plain" in data else ""


def readme():
    "Markdown cells as they are, code cells fenced, outputs after them; `#| hide` hides a cell, `#| echo: false` its source."
    parts = []
    for cell in json.loads(INDEX.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        flags = re.findall(r"^#\| *(.+?) *$", source, re.M) if cell["cell_type"] == "code" else []
        if "hide" in flags or not source.strip(): continue
        if cell["cell_type"] == "markdown": parts.append(source.strip())
        else:
            if "echo: false" not in flags: parts.append(fence(re.sub(r"^#\|.*\n", "", source, flags=re.M).strip(), "python"))
            parts += [s.strip() for o in cell["outputs"] if (s := shown(o))]
    return "<!-- made from index.ipynb by tools/readme.py -->\n\n" + "\n\n".join(parts) + "\n"


def refresh():
    import pictures
    pictures.main(plots=False)
    for command in (["nbdev-test", "index.ipynb", "--save"], ["nbdev-clean", "--fname", "index.ipynb"]): subprocess.run(command, check=True, cwd=ROOT)


if __name__ == "__main__":
    if "--refresh" in sys.argv: refresh()
    if "--check" in sys.argv: sys.exit(None if README.exists() and README.read_text(encoding="utf-8") == readme() else "README.md is not what index.ipynb says: run python tools/readme.py")
    README.write_text(readme(), encoding="utf-8")
