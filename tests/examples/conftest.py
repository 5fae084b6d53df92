import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # two wait for each other where another program has the second core
    yield
    torch.set_num_threads(before)
