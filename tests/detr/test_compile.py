"""A compiled model is one graph for all shapes: the graph of dynamo here, that of autograd in tests/slow/test_compile.py."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from detr.train import compile_model, fit
from tests.detr.trainings import CONFIG, CPU, dataset_of, new_model, rows_of
from tests.projects import TINY_MODEL

SMALL = replace(TINY_MODEL, num_decoder_layers=1)  # a layer more is more to trace, and no other shape


@pytest.fixture
def dataset(drawn):
    return dataset_of(drawn)


@pytest.fixture
def backend():
    return "eager"


@pytest.fixture
def counters(backend, monkeypatch):
    """What dynamo counts, from nothing; without the last stage, whose C++ takes minutes to build."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters


def test_one_compiled_graph_serves_all_shapes_though_the_first_is_square(counters):
    runner = compile_model(new_model(config=SMALL))
    for batch, height, width in ((3, 96, 96), (4, 64, 96), (2, 96, 64), (3, 96, 96)):
        runner(torch.rand(batch, 3, height, width), torch.zeros(batch, height, width, dtype=torch.bool))
    assert counters["stats"]["unique_graphs"] == 1


def test_one_compiled_graph_serves_all_shapes(dataset, counters):
    model, expected = new_model(config=SMALL), new_model(config=SMALL)
    config = replace(CONFIG, log_steps=1)
    rows = rows_of(fit(model, dataset, replace(config, compile=True), CPU))
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["graph_break"] == {}
    for row, other in zip(rows, rows_of(fit(expected, dataset, config, CPU)), strict=True):
        assert row == pytest.approx(other, rel=1e-3)
    assert model.state_dict().keys() == expected.state_dict().keys()
