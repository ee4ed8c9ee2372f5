"Random models, batches and operations, a few of them; `tests/random_models.py` runs as many as there is time for."
import json
from pathlib import Path

import pytest
from random_models import FAMILIES, case


@pytest.mark.parametrize("seed", [*range(10), 65]) # 65: a crop takes all of a row
def test_a_lossless_cache_follows_a_dense_one(seed):
    row = case(seed)
    assert row["worst"] < 1e-3, row


def test_last_result_on_a_gpu():
    rows = json.loads((Path(__file__).parent.parent / "nbs/results/random_models.json").read_text())["rows"]
    assert {r["family"] for r in rows} == set(FAMILIES) and not any(r["failed"] for r in rows) and all(r["worst"] < (.03 if r["dtype"] == "bfloat16" else .01) for r in rows)
