"""What every test needs."""

import torch

# The models are tiny: a second thread only waits, and on a busy machine for long.
torch.set_num_threads(1)
