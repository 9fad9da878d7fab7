import sys
from pathlib import Path

import pytest
import torch

# The tiny models and the plain attention of the executor's unit tests serve here too.
sys.path.append(str(Path(__file__).parents[1] / "unit" / "executor"))


@pytest.fixture(autouse=True)
def _needs_cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
