"""JupyterLab in headless Chromium opens the tour, runs it, and uses every widget with keyboard and mouse.

SPECTRAL_NB_SCREENSHOTS=FOLDER keeps pictures of the widgets: the ones under nbs/images are made so."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [m for m in ("playwright", "jupyterlab", "ipywidgets") if find_spec(m) is None] + ([] if CHROMIUM else ["chromium"])
pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(MISSING), reason=f"missing: {', '.join(MISSING)}")]
SETTINGS = {"apputils-extension/notification": dict(fetchNews="false", checkForUpdates=False), "notebook-extension/tracker": dict(windowingMode="none")}


def eventually(f, seconds=90):
    "Wait until `f` is true; the front end follows the kernel in its own time."
    end = time.time() + seconds
    while True:
        try:
            if result := f(): return result
        except Exception: # between two pictures
            if time.time() > end: raise
        assert time.time() < end, f"not within {seconds} s"
        time.sleep(.05)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "Address of a JupyterLab whose only file is the tour, without outputs."
    home = tmp_path_factory.mktemp("lab")
    nb = json.loads((ROOT / "nbs/tutorials/tour.ipynb").read_text())
    for c in nb["cells"]:
        if c["cell_type"] == "code": c.update(outputs=[], execution_count=None)
    (home / "files").mkdir()
    (home / "files/tour.ipynb").write_text(json.dumps(nb))
    for name, values in SETTINGS.items():
        path = home / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **{f"JUPYTER_{n}_DIR": str(home / n.lower()) for n in ("CONFIG", "DATA", "RUNTIME")}}
    with open(home / "log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=tour",
                                   f"--ServerApp.root_dir={home / 'files'}", f"--LabApp.user_settings_dir={home / 'settings'}", "--LabApp.expose_app_in_browser=True"], env=env, stdout=log, stderr=log)
        try: yield f"http://127.0.0.1:{port}/lab/tree/tour.ipynb?token=tour"
        finally: server.terminate(); server.wait(20)


@pytest.fixture(scope="module")
def page(lab):
    "The tour, all cells run."
    from playwright.sync_api import Error, sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport=dict(width=1200, height=1300))
        page.set_default_timeout(300_000)
        for i in range(150):
            try: page.goto(lab); break
            except Error: time.sleep(.2)
        page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")
        page.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.wait_for_function("""() => { const cells = [...window.jupyterapp.shell.currentWidget.content.model.cells].filter(c => c.type === 'code')
            const failed = cells.some(c => c.sharedModel.outputs.some(o => o.output_type === 'error'))
            return failed || cells.every(c => c.executionCount) }""")
        failed = page.evaluate("[...window.jupyterapp.shell.currentWidget.content.model.cells].flatMap(c => c.type === 'code' ? c.sharedModel.outputs.filter(o => o.output_type === 'error').map(o => o.evalue) : [])")
        assert not failed, failed
        yield page
        browser.close()


class Widget:
    "One widget on the page, found by its title."
    def __init__(self, page, title):
        self.page, self.box = page, page.locator(f".widget-vbox:has(> .widget-html h3:text-is('{title}'))").last
        self.box.scroll_into_view_if_needed()
        self.plot.wait_for()
        eventually(self.words)

    @property
    def plot(self): return self.box.locator(".js-plotly-plot").last
    def words(self): return self.box.locator("[role=status]").inner_text()
    def picture(self): return re.sub(r"[0-9a-f]{6}-?|clip\w+", "", self.plot.inner_html()) # without plotly's random ids
    def slider(self, name): return self.box.locator(f".widget-hslider:has(.widget-label:text-is('{name}')) [role=slider]")
    def button(self, name): return self.box.get_by_role("button", name=name)

    def changes(self, act):
        "Do something; words and picture must change."
        words, picture = self.words(), self.picture()
        act()
        eventually(lambda: self.words() not in ("", words) and self.picture() != picture)
        return self.words()

    def says(self, start): return eventually(lambda: self.words().startswith(start))

    def keep(self, name):
        "A picture for the documentation, where asked."
        if folder := os.environ.get("SPECTRAL_NB_SCREENSHOTS"):
            self.page.wait_for_timeout(500)
            self.box.screenshot(path=Path(folder) / f"{name}.png")


def test_sliders_of_the_spectrum_by_keyboard(page):
    w = Widget(page, "Spectra")
    w.keep("spectrum_explorer")
    assert "layer 3, head 0" in w.words() and "relative error" in w.words()
    before = w.words()
    assert "layer 4" in w.changes(lambda: w.slider("layer").press("ArrowRight"))
    less = w.changes(lambda: w.slider("rank").press("PageDown"))
    more = w.changes(lambda: w.slider("bits (mean)").press("ArrowRight"))
    assert len({before, less, more}) == 3


def test_steps_of_attention(page):
    w = Widget(page, "Attention")
    w.keep("attention_explorer")
    step = int(re.search(r"step (\d+)", w.words())[1])
    assert f"step {step + 1}" in w.changes(lambda: w.slider("step").press("ArrowRight"))
    w.changes(lambda: w.box.locator("select").select_option("1"))


def test_a_click_on_a_token(page):
    w = Widget(page, "Divergence")
    chosen = lambda: w.box.locator("text=/^chosen: step/").inner_text()
    w.keep("divergence_explorer")
    before, picture = chosen(), w.picture()
    w.box.locator(".widget-hbox button:has-text('≠')").last.click()
    eventually(lambda: chosen() != before and "of the compressed run" in chosen() and w.picture() != picture)


def tokens(words): return int(re.search(r"(\d+) tokens", words)[1])


def test_start_and_stop(page):
    "The picture moves while it runs, a stop is quick, and the ratio slider counts at the next start."
    w = Widget(page, "Live generation")
    assert w.words().startswith("finished, 160 tokens")
    w.keep("live_generation")
    w.slider("ratio (dense bytes / bytes)").press("ArrowRight")
    w.slider("new tokens").press("End")
    w.button("Start").press("Enter")
    w.says("generating")
    for _ in range(3): moving = w.changes(lambda: None)
    assert moving.startswith("generating") and "(8.5 asked)" in moving and w.button("Start").is_disabled()
    start = time.time()
    w.button("Stop").click()
    w.says("stopped")
    assert time.time() - start < 20 and tokens(w.words()) < 512
    eventually(lambda: not w.button("Start").is_disabled() and w.button("Stop").is_disabled())
    words = w.words()
    page.wait_for_timeout(600)
    assert w.words() == words
    w.button("Start").click()
    w.says("generating")
    w.button("Stop").press("Space")
    w.says("stopped")


def test_an_error_is_shown_in_place(page):
    w = Widget(page, "Live generation")
    w.box.locator("textarea").fill("word " * 5000)
    w.box.locator("textarea").blur()
    w.button("Start").click()
    page.wait_for_selector("[role=alert]:has-text(\"longer than the model's 4096\")")
    assert w.says("failed") and eventually(lambda: not w.button("Start").is_disabled())
