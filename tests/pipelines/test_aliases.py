"""Aliases and rollback with a real MLflow."""

import os
from functools import partial

import pytest

from pipelines.files import write_json
from pipelines.registry import aliases
from pipelines.registry.aliases import get_champion, place, rollback
from pipelines.registry.tracking import MODEL
from tests.running import ROOT, call


def aliases_of(client):
    found = client.get_registered_model(MODEL).aliases
    return {name: int(version) for name, version in found.items()}


def test_champion_and_known_weights(client, tmp_path):
    assert get_champion(client) is None
    config = tmp_path / "model/artifacts/config.json"
    write_json(config, {"categories": ["box"], "fingerprint": "a"})
    write_json(tmp_path / "same.json", {"fingerprint": "b", "categories": ["box"]})
    write_json(tmp_path / "other.json", {"fingerprint": "a", "categories": ["crate"]})
    assert aliases.find_version_of(client, "w3", config) is None
    assert int(aliases.find_version_of(client, "w1", tmp_path / "same.json").version) == 1
    assert aliases.find_version_of(client, "w1", tmp_path / "other.json") is None
    (tmp_path / "model/MLmodel").unlink()
    assert aliases.find_version_of(client, "w1", config) is None, "its files are gone"
    for number, alias in ((1, "champion"), (2, "challenger"), (3, "champion"), (3, "champion")):
        place(client, client.get_model_version(MODEL, str(number)), alias, lambda: None)
    assert aliases_of(client) == {"champion": 3, "challenger": 2, "previous_champion": 1}


def test_a_rollback_changes_places_and_back(client):
    with pytest.raises(ValueError, match="there is no previous champion to go back to; the champion is none"):
        rollback()
    client.set_registered_model_alias(MODEL, "champion", "1")
    with pytest.raises(ValueError, match="there is no previous champion to go back to; the champion is version 1"):
        rollback()
    place(client, client.get_model_version(MODEL, "2"), "champion", lambda: None)
    said = call(ROOT, "python", "-m", "pipelines", "rollback", MLFLOW_TRACKING_URI=os.environ["MLFLOW_TRACKING_URI"])
    assert said.splitlines()[-1] == "detr version 1 is the champion again, version 2 the previous one"
    assert aliases_of(client) == {"champion": 1, "previous_champion": 2}
    assert rollback() == "detr version 2 is the champion again, version 1 the previous one"


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_rollback_that_was_killed_is_completed(client, steps):
    done = [
        partial(client.set_registered_model_tag, MODEL, "rollback", "2 1"),
        partial(client.set_registered_model_alias, MODEL, "champion", "1"),
        partial(client.set_registered_model_alias, MODEL, "previous_champion", "2"),
    ]
    place(client, client.get_model_version(MODEL, "1"), "champion", lambda: None)
    place(client, client.get_model_version(MODEL, "2"), "champion", lambda: None)
    for step in done[:steps]:
        step()
    assert rollback() == "detr version 1 is the champion again, version 2 the previous one"
    assert aliases_of(client) == {"champion": 1, "previous_champion": 2}
    assert "rollback" not in client.get_registered_model(MODEL).tags


def test_without_a_registry_there_is_nothing_to_go_back_to(tmp_path):
    uri = f"sqlite:///{tmp_path}/none.db"
    said = call(ROOT, "python", "-m", "pipelines", "rollback", MLFLOW_TRACKING_URI=uri, code=1)
    assert said == f"error: nothing is registered yet: {uri} does not exist; python -m pipelines run\n"
    assert not list(tmp_path.iterdir())
