"""Equality of every published model with the authors': recorded numbers always, their code where it is installed."""

import pytest
from safetensors.torch import load_file

from benchmarks import authors
from tests import golden

present = pytest.mark.skipif(
    not (authors.FOLDER / "models").is_dir(), reason="the authors' code is absent: python benchmarks/authors.py"
)


@pytest.fixture(scope="module", params=authors.VARIANTS)
def variant(request):
    return request.param


@pytest.fixture(scope="module", params=golden.TOLERANCE, ids=str)
def computed(request, variant):
    """(variant, dtype, what this code computes)."""
    return variant, request.param, golden.ours(variant, request.param)


def test_equal_to_the_recorded_numbers(computed):
    variant, dtype, result = computed
    recorded = load_file(golden.FOLDER / f"{variant}.safetensors")
    golden.assert_equal(golden.digest(result), recorded, dtype)


@present
def test_equal_to_the_authors_code(computed):
    variant, dtype, result = computed
    golden.assert_equal(result, golden.theirs(variant, dtype), dtype)
