"The models here are tiny: a second thread only waits for the first, for minutes when the machine is busy."
import torch

torch.set_num_threads(1)
