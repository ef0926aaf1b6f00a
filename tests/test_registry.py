import pytest

from pipelines.registry import champion, current_alias, decide, version_with
from pipelines.tracking import MODEL, connect


@pytest.mark.parametrize(
    ("candidate", "best", "gain", "alias"),
    [
        (0.0, None, 0.0, "champion"),
        (0.3, 0.2, 0.0, "champion"),
        (0.2, 0.2, 0.0, "challenger"),
        (0.1, 0.2, 0.0, "challenger"),
        (0.25, 0.2, 0.1, "challenger"),
        (0.5, 0.25, 0.25, "champion"),
    ],
)
def test_the_better_model_takes_the_place(candidate, best, gain, alias):
    assert decide(candidate, best, gain)[0] == alias


def test_champion_and_known_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    client = connect()
    assert champion(client) is None
    assert version_with(client, "w1") is None
    client.create_registered_model(MODEL)
    assert champion(client) is None
    (tmp_path / "model").mkdir()
    for weights in ("w1", "w2", "w3"):
        tags = {"weights_sha256": weights, "decision": "challenger"}
        client.create_model_version(MODEL, str(tmp_path / "model"), tags=tags)
    client.set_registered_model_alias(MODEL, "champion", "2")
    assert champion(client).version == 2
    assert version_with(client, "w1").version == 1
    assert [current_alias(client, version_with(client, w)) for w in ("w1", "w2", "w3")] == [
        "no alias",
        "champion",
        "challenger",
    ]
    assert client.get_model_version_by_alias(MODEL, "challenger").version == 3
