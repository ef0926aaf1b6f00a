"""The first stage that DVC runs tells a mistake in any section of params.yaml, not the one that reads it hours later."""

import pytest

from pipelines.params import merge_parameters, to_yaml
from tests.running import ROOT, call

FEW = ["download.shapes.num_train=2", "download.shapes.num_val=1"]


def download(folder, text, code=0):
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    return call(folder, "python", "-m", "pipelines.download", code=code, PYTHONPATH=str(ROOT), DVC_STAGE="download")


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("  promote: true", "  promot: true", "register has an unknown key 'promot'; did you mean 'promote'?"),
        (
            "  num_resamples: 1000",
            "  num_resamples: many",
            "evaluate.num_resamples is 'many': expected `int`, got `str`",
        ),
        ("  min_ap_gain: 0.0", "  min_ap_gain: -1.0", "register.min_ap_gain is -1.0, expected "),
        ("evaluate:", "evalute:", "params.yaml has an unknown section 'evalute'; did you mean 'evaluate'?"),
    ],
)
def test_a_mistake_in_a_later_section_ends_the_first_stage(tmp_path, right, wrong, said):
    text = to_yaml(merge_parameters(ROOT, None, FEW))
    assert right in text
    printed = download(tmp_path, text.replace(right, wrong, 1), code=1)
    assert printed.startswith(f"error: {said}")
    assert printed.count("\n") == 1
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "scratch").exists()


def test_what_was_right_is_not_checked_again(tmp_path):
    text = to_yaml(merge_parameters(ROOT, None, FEW))
    download(tmp_path, text)
    mark = tmp_path / "scratch/checked"
    before = mark.stat().st_mtime_ns
    download(tmp_path, text)
    assert mark.stat().st_mtime_ns == before
    download(tmp_path, f"{text}# more\n")
    assert mark.stat().st_mtime_ns != before
