"The shape of the repository: layers point one way, README and front page agree, one address."
import ast
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = ("rsvd rope codec spectral peers cache attention calibrate kernels encode_kernels chunk_kernels graph integration info needle pocket evaluate faults diagnostics tracing quality widgets training bench speed demo report cli").split()


def imports(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            name = ("spectral_nb." + (node.module or "")) if node.level else node.module or ""
            parts = name.rstrip(".").split(".")
            if parts[0] == "spectral_nb": yield from [parts[1]] if len(parts) > 1 else [a.name for a in node.names]


def test_layers_point_one_way():
    for path in (ROOT / "spectral_nb").glob("[a-z]*.py"):
        assert path.stem in LAYERS, f"{path.stem} has no place in LAYERS"
        for other in imports(path):
            if other in LAYERS: assert LAYERS.index(other) <= LAYERS.index(path.stem), f"{path.stem} imports the higher module {other}"


def test_every_module_comes_from_its_notebook():
    for path in (ROOT / "spectral_nb").glob("[a-z]*.py"):
        assert list((ROOT / "nbs").glob(f"*_{path.stem}.ipynb")), f"{path.name} has no notebook"


def test_imports_without_extras():
    "The package and every module import without triton, unsloth, ipywidgets, jupyterlab, pandas and nbdev."
    block = "import sys\nfor m in ('triton','unsloth','ipywidgets','jupyterlab','nbdev','pandas'): sys.modules[m] = None\n"
    names = [p.stem for p in (ROOT / "spectral_nb").glob("[a-z]*.py")]
    subprocess.run([sys.executable, "-c", block + "\n".join(f"import spectral_nb.{n}" for n in names)], check=True, cwd=ROOT)


def test_readme_is_the_front_page():
    subprocess.run([sys.executable, ROOT / "tools" / "readme.py", "--check"], check=True, cwd=ROOT)


def test_one_address():
    "Badges and links use git_url of settings.ini."
    cp = ConfigParser(interpolation=None)
    cp.read(ROOT / "settings.ini")
    url = cp["DEFAULT"]["git_url"]
    slug = url.removeprefix("https://github.com/")
    for nb in [ROOT / "index.ipynb", *(ROOT / "nbs").rglob("*.ipynb")]:
        text = "\n".join("".join(c["source"]) for c in json.loads(nb.read_text())["cells"])
        for found in re.findall(r"colab\.research\.google\.com/github/([^/]+/[^/]+)/", text): assert found == slug, nb
        for found in re.findall(r"github\.com/([\w.-]+/spectral[\w-]*)", text): assert found == slug, nb


def test_every_notebook_opens_in_colab():
    "The badge names the notebook itself, and a cell installs the package there."
    for nb in [ROOT / "index.ipynb", *(ROOT / "nbs").rglob("[!.]*.ipynb")]:
        cells = ["".join(c["source"]) for c in json.loads(nb.read_text())["cells"]]
        path = nb.relative_to(ROOT).as_posix()
        assert f"/blob/main/{path})" in "\n".join(cells[:2]), f"{path}: no Open-in-Colab badge under the title"
        assert "google.colab" in "".join(cells) and any("pip install" in c and "spectral-nb/spectral-nb" in c for c in cells), f"{path}: no cell that installs the package in Colab (copy that of nbs/00_rsvd.ipynb)"
