"The front page runs top to bottom and still says what is stored; its links lead somewhere."
import json
import re
import subprocess
import sys
from pathlib import Path

from execnb.shell import CaptureShell
from fastcore.nbio import read_nb
from fastcore.xtras import working_directory

ROOT = Path(__file__).parent.parent


def tables(nb): return ["".join(o["data"]["text/markdown"]) for c in nb["cells"] for o in c.get("outputs") or [] if "text/markdown" in o.get("data", {})]


def test_it_runs_and_shows_what_is_stored():
    stored = json.loads((ROOT / "index.ipynb").read_text())
    nb = read_nb(ROOT / "index.ipynb")
    with working_directory(ROOT): CaptureShell(ROOT / "index.ipynb").run_all(nb, exc_stop=True)
    assert len(tables(stored)) >= 3
    assert tables(nb) == tables(stored), "run: python tools/readme.py --refresh"


def test_pictures_are_of_the_stored_results():
    sys.path.insert(0, str(ROOT / "tools"))
    import pictures
    assert (ROOT / "nbs/images/codecs.svg").read_text() == pictures.codecs(pictures.load("eval_llama_4096.json"))
    assert (ROOT / "nbs/images/speed.svg").read_text() == pictures.speed(*(pictures.load(f"bench_{n}.json") for n in ("attention", "decode", "encode")))
    assert (ROOT / "nbs/images/training.svg").read_text() == pictures.training([pictures.load("training_llama.json"), pictures.load("training_qwen3.json")])


def test_results_notebook_is_made_from_the_stored_results():
    subprocess.run([sys.executable, ROOT / "tools" / "results.py", "--check"], check=True, cwd=ROOT)


def test_relative_links_lead_to_files():
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        if "://" not in target: assert (ROOT / target).exists(), target
