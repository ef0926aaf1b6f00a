"""The reference project's champion, made again with every real part: DVC, git, MLflow, a training."""

import pytest

from pipelines.registry.tracking import connect, find_version, sha256
from tests.projects import reference
from tests.reproductions import everything_of, made_again, written


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A small project after one `dvc repro`, whose dvc.lock is not committed. Tests in this module use it in turn."""
    return reference(tmp_path_factory.mktemp("project"))


@pytest.fixture
def client(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
    return connect()


def test_the_champion_is_bit_identical_and_nothing_else_changes(project, client):
    """Other versions, interruptions and kills: tests/slow/test_reproduce.py."""
    before = everything_of(project, client)
    said = made_again(project, "models:/detr@champion")
    for stage in ("validate", "train", "evaluate"):
        assert f"Running stage '{stage}'" in said
    assert "starting with" in said
    assert "models:/detr/1 is bit-identical\n" in said
    assert "warning" not in said
    assert "data        from the DVC cache" in said
    assert f"weights     identical, sha256 {sha256(project / 'artifacts/train/model.safetensors')}" in said
    assert not (project / "scratch/worktrees/reproduce-1").exists()
    assert everything_of(project, client) == before
    assert not list(project.glob("scratch/*/*state*"))
    document = written(project, 1)
    assert (document["verdict"], document["first_difference"], document["warnings"]) == ("bit-identical", "", [])
    assert client.get_model_version("detr", "1").tags["reproduced"] == f"bit-identical, {document['date']}"


def test_what_is_not_there_is_said(project, client, tmp_path):
    said = made_again(project, "77", 1)
    assert "has no 77; versions of detr: 1" in said
    assert "aliases: " in said
    assert "champion (" in said
    assert "is of the model 'other'" in made_again(project, "models:/other/1", 1)
    commit = client.get_model_version("detr", "1").tags["git_commit"]
    for tag, expected in (("f" * 40, "which is not in this clone"), ("none", "was registered outside of git")):
        client.set_model_version_tag("detr", "1", "git_commit", tag)
        assert expected in made_again(project, "1", 1)
    client.set_model_version_tag("detr", "1", "git_commit", commit)
    said = made_again(project, "1", 1, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/none.db")
    assert said.startswith("error: nothing is registered yet: ")
    assert not (tmp_path / "none.db").exists()
    assert find_version(client, "models:/detr@champion").version == find_version(client, "champion").version
