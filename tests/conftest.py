"""What every test needs, and a fixture that some files share."""

import os

# Before torch looks. The tests' numbers are a CPU's, and a process that has used a GPU cannot fork.
# tests/test_gpu.py compares with one: CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_gpu.py
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

# isort: split
import pytest
import torch

import policy as policies

# The models are tiny: a second thread only waits, and on a busy machine for long.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def small_and_cached(tmp_path_factory):
    """Width 16 under the name tiny, and a cache of its own for datasets."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.SIZES, "tiny", dict(n_layer=1, n_head=2, n_embd=16))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield
