"""A compiled model is one graph for all shapes, by the compiler but for the C++ that takes minutes to build."""

import pytest
import torch

from tests.detr.test_compile import (
    counters,  # noqa: F401
    dataset,  # noqa: F401
    test_one_compiled_graph_serves_all_shapes,  # noqa: F401
    test_one_compiled_graph_serves_all_shapes_though_the_first_is_square,  # noqa: F401
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def backend():
    return "aot_eager"
