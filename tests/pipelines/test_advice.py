"""The advice on the page of a failure fits what has failed, not only where."""

import errno

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from detr.diagnosis import explain_memory
from pipelines.launch import explain_end
from pipelines.registry.tracking import connect_to_models
from pipelines.retraining.advice import AGAIN, STAGES, advise
from pipelines.stage import explain


def out_of_memory():
    batch = type("Batch", (), {"images": type("Images", (), {"shape": (2, 3, 64, 64)}), "__len__": lambda self: 2})()
    with pytest.raises(RuntimeError) as caught, explain_memory(batch, 2):
        raise MemoryError
    return str(caught.value)


@pytest.mark.parametrize(
    ("stage", "message", "said"),
    [
        ("evaluate", explain(OSError(errno.ENOSPC, "No space left on device", "data/x")), "Free space"),
        ("download", "/tmp needs 3 GB of disk, 1 GB are free there; make room and run again", "Free space"),
        ("train", explain(PermissionError(errno.EACCES, "Permission denied", "scratch")), "the right to"),
        ("train", out_of_memory(), "more memory"),
        ("train", explain_end(1, ProcessFailure(1, 7, -9, "none")), "more memory"),
        ("train", "a loader process died at image 3 (x); if memory ran out, lower DETR_WORKERS", "more memory"),
        ("train", "the training was asked to stop; the same command goes on from its last state", "goes on"),
        ("train", "loss is nan, gradient norm nan; images 3; it is not finite", "`train.lr`"),
        ("validate", "2 of 83 expectations on data/coco are broken, first box_inside", "`validate.tolerated`"),
        ("validate", "data/coco/instances_val.json is not valid JSON", STAGES["validate"]),
        ("evaluate", "KeyError: 'nothing'", "mistake"),
        ("evaluate", "ruamel.yaml.parser.ParserError: expected a comma", "mistake"),
        ("train", "train.batch_size is 4, train.micro_batch 8: it must be a multiple", "Change the parameter"),
        ("train", "params.yaml: train: there is no key 'epoch'", "Change the parameter"),
        ("download", "download.source: /nowhere does not exist", "Change the parameter"),
        ("download", "http://127.0.0.1:9/x: Connection refused", STAGES["download"]),
        ("train", "the connection to another process is lost (x); see the output of the other hosts", STAGES["train"]),
        ("register", "lineage is incomplete: dvc.lock does not exist; run dvc repro", STAGES["register"]),
        ("another", "it is so", AGAIN),
    ],
)
def test_the_advice_fits_the_failure(stage, message, said):
    assert said in advise(stage, message)


def test_where_mlflow_is_away_the_advice_is_about_mlflow(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ValueError, match="MLflow at http://127.0.0.1:9 is unreachable") as caught:
        connect_to_models()
    assert "See to MLflow" in advise("register", str(caught.value))
