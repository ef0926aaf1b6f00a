"""What the flows decide without a server."""

import pytest
from prefect.states import Failed

from pipelines.retraining.flow import RETRIES, RETRY_SECONDS, needs_time


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
