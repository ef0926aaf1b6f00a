"""Exported models of more kinds than the one of tests/detr/test_export.py, and the paper's."""

from functools import cache

import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from detr.export import export_onnx, export_program
from tests.detr import test_export as of_one
from tests.detr.test_export import (
    METADATA,
    SIZES_HW,
    another_model,
    assert_apart,
    assert_left_alone,
    assert_same,
    batch_of,
    eager,
    export_case,
    test_both_forms_equal_the_model,  # noqa: F401
    test_onnx_takes_images_of_less_than_a_stride,  # noqa: F401
    test_the_file_says_what_it_is,  # noqa: F401
    test_the_padding_counts_in_both_forms,  # noqa: F401
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A case by its name, exported once."""
    return cache(lambda name: export_case(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(params=["frozen_dilated", "learned_pre_norm", "group"])
def case(request, exported):
    """The cases of every test that comes from tests/detr; others name their own."""
    return exported(request.param)


def of(name):
    return pytest.mark.parametrize("case", [name], indirect=True)


@of("paper")
@pytest.mark.parametrize("sizes_hw", SIZES_HW)
def test_both_forms_equal_the_papers_model(case, sizes_hw):
    of_one.test_both_forms_equal_the_model(case, sizes_hw)


@of("learned_pre_norm")
def test_group_norms_are_exact_over_wide_padding(case):
    of_one.test_group_norms_are_exact_over_wide_padding(case)


@of("frozen_dilated")
def test_the_program_needs_no_gradients_and_refuses_what_it_cannot_take(case):
    of_one.test_the_program_needs_no_gradients_and_refuses_what_it_cannot_take(case)


@of("learned_pre_norm")
def test_learned_positions_end_in_both_forms(case):
    inside, outside = batch_of((64, 1600)), batch_of((64, 1601))
    for form in (case.call, case.run):
        assert_same(form(*inside), eager(case.model, *inside))
    with pytest.raises(AssertionError, match=r"Guard failed: images.size\(\)\[3\] <= 1600"):
        case.call(*outside)
    with pytest.raises(Fail, match="mismatched dimensions of 51 and 50"):
        case.run(*outside)


@of("group")
def test_export_is_quiet_repeatable_and_leaves_the_model_alone(case, tmp_path, capfd):
    model = another_model(case)
    capfd.readouterr()
    program = export_program(model)
    export_onnx(model, tmp_path / "new/model.onnx", METADATA)
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "new/model.onnx").read_bytes() == case.path.read_bytes()
    assert_left_alone(model, case)
    assert_apart(program, model, case)
