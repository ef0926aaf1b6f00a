"""What stops a training before it starts, as a process."""

from pipelines.params import merge_parameters, to_yaml
from tests.running import ROOT, call


def test_what_stops_a_training_process_is_one_line(tmp_path):
    document = merge_parameters(ROOT, None, ["train.initial_weights=artifacts/train"])
    (tmp_path / "params.yaml").write_text(to_yaml(document), encoding="utf-8")
    said = call(tmp_path, "python", "-m", "pipelines.train", code=1, PYTHONPATH=str(ROOT))
    assert said.splitlines()[-1].startswith("error: train.initial_weights is artifacts/train, which this training")
    assert "Traceback" not in said
