"""How a candidate is judged against a champion whose files are damaged, older, or gone."""

import json
import shutil

import pytest

from pipelines.registry import gate
from pipelines.registry.lineage import val_digest
from pipelines.registry.tracking import MODEL, connect

pytestmark = pytest.mark.usefixtures("warm_python")


def candidate(uri, projects, name="strong"):
    """A version made for judgement only, of the images that the champion was evaluated on."""
    client = connect()
    tags = {"val_digest": val_digest(projects[name] / "data/coco"), "data_digest": "0123"}
    run_id = client.create_run(client.get_experiment_by_name("detr").experiment_id).info.run_id
    return client, client.create_model_version(MODEL, "file:///nowhere", run_id, tags=tags)


def judged(uri, projects, **changes):
    client, version = candidate(uri, projects)
    folder = projects["strong"]
    config = gate.RegisterParams(0.0, 0.95, 200, 0, {}, True, **changes)
    found = json.loads((folder / "artifacts/evaluate/detections.json").read_text(encoding="utf-8"))
    return gate.judge(client, version, found, folder / "data/coco", config)


def spoil(root, *names):
    for name in names:
        found = list((root / "mlartifacts").rglob(name))
        assert found
        for path in found:
            path.write_bytes(path.read_bytes()[:100])


def test_a_champion_without_model_files_is_compared_by_its_detections(projects, uri, tmp_path):
    shutil.rmtree(tmp_path / "mlartifacts/models")
    decision = judged(uri, projects)
    assert (decision.alias, decision.champion.source) == ("champion", "its run's detections")
    assert decision.champion.low < decision.champion.ap < decision.champion.high


def test_a_champion_without_any_files_gives_up_its_place(projects, uri, tmp_path):
    shutil.rmtree(tmp_path / "mlartifacts")
    decision = judged(uri, projects)
    assert (decision.alias, decision.champion) == ("champion", None)
    assert decision.sentence.startswith(
        "the files of version 1, the champion, are gone, so it cannot serve: its place is"
    )


def test_a_champion_whose_detections_are_damaged_detects_again_by_its_own_code(projects, uri, tmp_path):
    spoil(tmp_path, "detections.json")
    decision = judged(uri, projects)
    assert decision.alias == "champion"
    assert decision.champion.source.startswith("evaluated again by its code: the detections of its run cannot be used")
    assert decision.champion.low is not None


def test_a_champion_that_cannot_be_judged_again_is_judged_by_its_tag(projects, uri, tmp_path):
    """Also one of an older release, whose run has no detections and whose tags know less."""
    client = connect()
    spoil(tmp_path, "detections.json", "model.safetensors")
    for name in ("val_digest", "detections_sha256", "AP_low", "AP_high", "decision"):
        client.delete_model_version_tag(MODEL, "1", name)
    for name, value, alias in (("AP", "0.001", "champion"), ("AP", "0.999", "challenger")):
        client.set_model_version_tag(MODEL, "1", name, value)
        decision = judged(uri, projects)
        assert (decision.alias, decision.champion.ap) == (alias, float(value))
        assert (
            "of the champion only its tag AP counts, which may be of other data (the detections of its run cannot be used"
            in decision.sentence
        )
        assert "it cannot be evaluated again" in decision.sentence
        assert decision.champion.per_class["ellipse"] == 0.25
    client.delete_model_version_tag(MODEL, "1", "AP")
    decision = judged(uri, projects)
    assert decision.alias == "champion"
    assert "can be judged by nothing, its place is free" in decision.sentence


def test_detections_of_other_weights_are_not_taken_for_the_champions(projects, uri, tmp_path):
    spoil(tmp_path, "model.safetensors")
    (path,) = (tmp_path / "mlartifacts").rglob("detections.json")
    path.write_text("[]", encoding="utf-8")
    assert "they are not those that it was registered with" in judged(uri, projects).sentence
