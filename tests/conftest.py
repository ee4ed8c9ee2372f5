"The models here are tiny: a second thread only waits for the first, for minutes when the machine is busy."
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def layer_weights_folder(tmp_path_factory):
    "Layer weights that tests measure are kept for the session, not in the user's cache folder."
    with pytest.MonkeyPatch.context() as m:
        m.setenv("SPECTRAL_NB_CACHE", str(tmp_path_factory.mktemp("layer_weights")))
        yield
