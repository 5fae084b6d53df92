import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # two wait for each other where another program has the second core
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_cpu():
    """The same, and no GPU, from the module's first fixture on: runs of training are compared bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
    torch.set_num_threads(before)
