"Random models, batches and operations, a few of them; `tests/random_models.py` runs as many as there is time for."
import pytest
from random_models import case


@pytest.mark.parametrize("seed", [*range(10), 65]) # 65: a crop takes all of a row
def test_a_lossless_cache_follows_a_dense_one(seed):
    row = case(seed)
    assert row["worst"] < 1e-3, row
