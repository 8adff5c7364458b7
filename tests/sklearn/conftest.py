"""What all tests of the estimators share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of such small products
    yield
    torch.set_num_threads(before)
