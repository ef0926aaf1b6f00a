"""A process that hardly waits when it fetches, a server with one file, and a registry with three versions."""

import pytest
from urllib3.util import Retry

from pipelines.data import fetch
from pipelines.registry.tracking import MODEL, connect
from tests.bad_line import Site, serving
from tests.pipelines.fetching import CONTENT


@pytest.fixture
def impatient(monkeypatch):
    """Fetching hardly waits between attempts, and asks 127.0.0.1 itself."""
    monkeypatch.setattr(fetch, "RETRY", Retry(total=3, backoff_factor=0.001, backoff_jitter=0.001, retry_after_max=0))
    monkeypatch.setattr(fetch, "REAL_PROGRESS", 1_000)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def site():
    with serving(Site(a=CONTENT)) as site:
        yield site


@pytest.fixture
def client(local, tmp_path, monkeypatch):
    """Of a registry with three versions, without aliases."""
    monkeypatch.chdir(tmp_path)
    client = connect()
    client.create_registered_model(MODEL)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/MLmodel").touch()
    for weights in ("w1", "w2", "w1"):
        client.create_model_version(MODEL, str(tmp_path / "model"), tags={"weights_sha256": weights})
    return client
