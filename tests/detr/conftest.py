"""How the tests of the library run."""

import pytest
import torch

pytest.register_assert_rewrite("tests.detr.published", "tests.detr.trainings", "tests.golden")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """The models are small, and several tests run at once: threads would wait for each other."""
    torch.set_num_threads(1)
