"The commands: what they print and write, and one clear line for input that cannot be meant."
import json
import subprocess
import sys

import pytest
from tiny import tiny_model
from typer.testing import CliRunner

from spectral_nb.cli import app
from spectral_nb.pocket import haystack
from spectral_nb.training import train_tokenizer

ROW = {"codec", "ratio", "bytes", "dense_bytes", "recall", "kl", "ppl_change_pct", "context", "trials"}


def run(*args): return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A random model and a tokenizer of its size, as anybody's own would lie on disk."
    path = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(path)
    train_tokenizer([haystack("tune")[0][:50_000]], vocab_size=512, max_length=1024).save_pretrained(path)
    return path


def test_demo(tmp_path):
    page, data = tmp_path / "r.html", tmp_path / "d.json"
    got = run("demo", "--context", 700, "--report", page, "--json", data)
    assert got.exit_code == 0, got.output
    result = json.loads(data.read_text())
    rows = {r["codec"]: r for r in result["rows"]}
    assert list(rows)[0] == "dense" and {"rank:16/32", "rank:32/64", "rank:64/128"} <= set(rows)
    for name, r in rows.items():
        assert name in got.output
        assert {"answer", "recall", "bytes", "ratio", "tokens_per_s", "kl"} <= set(r)
        assert sum(r["tiers"].values()) == r["bytes"] > 0 and r["tokens_per_s"] > 0
    assert rows["dense"]["recall"] == 1 and rows["dense"]["kl"] == 0 and rows["dense"]["ratio"] == 1
    assert result["device"] and result["versions"]["torch"] and result["command"].startswith("spectral-nb demo")
    html = page.read_text()
    assert html.count("plotly-graph-div") >= 4 and "Singular values of keys" in html and "Recall by depth" in html and "Bytes by tier" in html
    assert "<script src=" not in html and "<link" not in html  # nothing is fetched


def test_report(folder, tmp_path):
    "One page that fetches nothing; a model that knows nothing gets no verdict on the codec's recall, and no crash."
    page, text = tmp_path / "r.html", tmp_path / "hay.txt"
    text.write_text(haystack("tune")[1][:20_000], encoding="utf-8")
    got = run("report", "--html", page, "--model", folder, "--codec", "rank:16/16", "--context", 800, "--haystack", text)
    assert got.exit_code == 0, got.output
    verdicts = {l.split()[0]: l.split()[1] for l in got.stdout.splitlines() if l.split()[1:2] and l.split()[1] in ("ok", "fault", "inconclusive")}
    assert len(verdicts) == 9 and verdicts["needle_in_a_haystack"] == verdicts["log_ground_truth"] == "inconclusive"
    assert verdicts["trace_forward"] == verdicts["memory_profile"] == verdicts["check_determinism"] == verdicts["check_import_contamination"] == "ok"
    html = page.read_text(encoding="utf-8")
    assert "<script src=" not in html and "<link" not in html and html.count("plotly-graph-div") >= 6 and all(f'id="{n}"' in html for n in verdicts)


def test_eval_on_the_pocket_model(tmp_path):
    out = tmp_path / "rows.json"
    got = run("eval", "--codec", "rank:64/128", "--context", 700, "--trials", 2, "--seed", 3, "--json", out)
    assert got.exit_code == 0, got.output
    result = json.loads(out.read_text())
    assert [r["codec"] for r in result["rows"]] == ["dense", "rank:64/128"]
    assert all(ROW <= set(r) and r["context"] == 700 and r["trials"] == 2 for r in result["rows"])
    assert result["seed"] == 3 and result["model"] == "pocket"
    assert result["rows"][0]["recall"] == 1 and result["rows"][0]["ratio"] == 1


def test_eval_on_a_folder_and_an_own_haystack(folder, tmp_path):
    text, out = tmp_path / "hay.txt", tmp_path / "rows.json"
    text.write_text(haystack("tune")[1][:20_000], encoding="utf-8")
    got = run("eval", "--model", folder, "--codec", "dense", "--codec", "rank:8/8", "--context", 700, "--trials", 1, "--haystack", text, "--device", "cpu", "--json", out)
    assert got.exit_code == 0, got.output
    dense, rank = json.loads(out.read_text())["rows"]
    assert dense["kl"] == 0 and rank["kl"] > 0 and rank["bytes"] < rank["dense_bytes"] == dense["bytes"]


def test_the_same_seed_gives_the_same_rows(tmp_path):
    rows = []
    for i in range(2):
        out = tmp_path / f"{i}.json"
        assert run("eval", "--codec", "rank:16/32", "--context", 600, "--trials", 1, "--json", out).exit_code == 0
        rows.append(json.loads(out.read_text())["rows"])
    assert rows[0] == rows[1]


def test_info():
    got = run("info")
    assert got.exit_code == 0
    for word in ("python", "torch", "transformers", "CUDA", "triton", "unsloth"): assert word in got.output
    for line in got.output.splitlines():
        if "missing" in line: assert "pip install '.[" in line


def one_line(code, text, words):
    lines = [o for o in text.splitlines() if o.strip()]
    assert code == 2 and len(lines) == 1, text
    assert lines[0].startswith("spectral-nb: ") and all(w in lines[0] for w in words), text


@pytest.mark.parametrize("args, words", [
    (["eval", "--codec", "dense", "--model", "/no/such/model"], ["/no/such/model", "does not exist"]),
    (["eval", "--codec", "dense", "--context", "5000"], ["5000", "4096"]),
    (["eval", "--codec", "dense", "--context", "10"], ["10", "too short"]),
    (["eval", "--codec", "zip"], ["'zip'", "known: dense, ", "rank:16/32"]),
    (["eval", "--codec", "rank:0/16"], ["k_rank_keys", "0"]),
    (["eval", "--codec", "dense", "--haystack", "/no/such/text"], ["/no/such/text", "does not exist"]),
    (["eval", "--codec", "dense", "--trials", "0"], ["trials", "0"]),
    (["eval", "--codec", "dense", "--device", "tpu9"], ["tpu9", "spectral-nb info"]),
    (["eval", "--codec", "dense", "--json", "/no/such/folder/o.json"], ["/no/such/folder"]),
    (["demo", "--context", "5000"], ["5000", "4096"]),
    (["demo", "--report", "/no/such/folder/r.html"], ["/no/such/folder"]),
    (["bench", "nothing"], ["nothing", "rsvd"]),
], ids=lambda o: " ".join(o[:5]) if isinstance(o, list) and o[0] in ("eval", "demo", "bench") else "")
def test_bad_input(args, words):
    got = run(*args)
    one_line(got.exit_code, got.output, words)


def test_bad_models(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for args, words in ((["--model", tmp_path], ["config.json"]), (["--model", folder, "--context", 2000], ["2000", "1024"])):
        got = run("eval", "--codec", "dense", *args)
        one_line(got.exit_code, got.output, words)
    gpt = tmp_path / "gpt"
    gpt.mkdir()
    (gpt / "config.json").write_text('{"model_type": "gpt2"}')
    got = run("eval", "--codec", "dense", "--model", gpt)
    one_line(got.exit_code, got.output, ["gpt2", "supported: cohere"])
    text = tmp_path / "short.txt"
    text.write_text("A short story.")
    got = run("eval", "--codec", "dense", "--model", folder, "--context", 400, "--haystack", text, "--trials", 1)
    assert got.exit_code == 2 and "the haystack has" in got.output


def test_as_a_program():
    "The exit code and the one line as a shell sees them."
    code = "import sys; from spectral_nb.cli import main; sys.argv = ['spectral-nb', 'eval', '--codec', 'dense', '--context', '100000']; main()"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    one_line(got.returncode, got.stderr, ["100000", "4096"])
    assert got.stdout == ""
