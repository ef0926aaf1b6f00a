"""What the flows decide without a server."""

import pytest
from prefect.states import Failed

from pipelines.retraining.flow import RETRIES, RETRY_SECONDS, TITLE_LENGTH, needs_time, shorten


@pytest.mark.parametrize(
    ("message", "again"),
    [
        ("register: the registration stopped, MLflow at http://127.0.0.1:5000 failed: Connection refused", True),
        ("register: lineage is incomplete: dvc.lock does not exist; run dvc repro", False),
        (None, False),
    ],
)
def test_a_stage_is_tried_again_where_mlflow_was_not_there(message, again):
    """That its run completes then: tests/slow/test_retrain_faults.py."""
    assert needs_time(None, None, Failed(message=message)) is again
    assert RETRIES.keys() == {"register"}
    assert RETRIES["register"] * RETRY_SECONDS >= 180  # how long MLflow may be away


def test_the_name_of_a_run_is_short_however_much_it_changes():
    assert shorten("train.epochs=3  train.lr=1e-4\n@main") == "train.epochs=3 train.lr=1e-4 @main"
    name = shorten("train.epochs=3 " * 100)
    assert len(name) == TITLE_LENGTH
    assert name.startswith("train.epochs=3 train")
    assert name.endswith(" ...")
