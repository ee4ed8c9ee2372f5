"Random models, batches and operations, a few of them; `tests/random_models.py` runs as many as there is time for."
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_models import FAMILIES, case, wrong
from two_gpus import model_over

HERE = Path(__file__).parent


@pytest.mark.parametrize("seed", [*range(10), 65]) # 65: a crop takes all of a row
def test_a_lossless_cache_follows_a_dense_one(seed):
    row = case(seed)
    assert row["worst"] < 1e-3, row


def test_last_result_on_a_gpu():
    rows = json.loads((HERE.parent / "nbs/results/random_models.json").read_text())["rows"]
    assert {r["family"] for r in rows} == set(FAMILIES) and not any(map(wrong, rows))


def test_a_model_in_two_places():
    "What `tests/two_gpus.py` does on a host with two GPUs."
    assert model_over(("cpu", "cpu"), 0)["worst"] == 0.


@pytest.mark.gpu
def test_layers_on_a_second_gpu(tmp_path):
    if torch.cuda.device_count() < 2: pytest.skip("needs two CUDA devices; last result: nbs/results/two_gpus.json")
    subprocess.run([sys.executable, HERE / "two_gpus.py", tmp_path / "two.json"], check=True, cwd=HERE)


def test_last_result_on_two_gpus():
    rows = json.loads((HERE.parent / "nbs/results/two_gpus.json").read_text())["rows"]
    errors = [e for r in rows if r.get("device") == "cuda:1" for e in r["errors"]]
    assert len(errors) > 20 and max(errors) < 2e-3 and all(r["worst"] < .03 for r in rows if "worst" in r)
