"""compose.yaml read: what it publishes and asks for, and that Compose reads it as the tests do that run it."""

import re
import subprocess

import pytest
from ruamel.yaml import YAML

from pipelines.params import to_yaml
from pipelines.surroundings import QUIET
from tests.compose import COMPOSE, ONCE, SECRETS, interpolated
from tests.running import ROOT, environment, needs


def test_what_runs_in_production_is_published_to_this_machine_alone_and_comes_back():
    published = [port for one in COMPOSE["services"].values() for port in one.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)
    for name, one in COMPOSE["services"].items():
        assert one["restart"] == ("no" if name == ONCE else "unless-stopped")
        assert ("healthcheck" in one) == (name != ONCE)
    volumes = {volume.split(":")[0] for one in COMPOSE["services"].values() for volume in one.get("volumes", [])}
    assert set(COMPOSE["volumes"]) <= volumes
    dockerfile = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8")
    assert COMPOSE["services"]["worker"]["image"] in dockerfile
    for name in ("prefect", "mlflow", "worker"):
        assert COMPOSE["services"][name]["environment"].items() >= QUIET.items()
    assert any(volume.endswith(":/project") for volume in COMPOSE["services"]["worker"]["volumes"])


def test_compose_reads_the_file_as_these_tests_do(tmp_path):
    program, given = needs("docker-compose"), {name: f"{k}@/:-" for k, name in enumerate(SECRETS)}
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in given.items()), encoding="utf-8")

    def config(file):
        command = [program, "--env-file", file, "config"]
        return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, encoding="utf-8", check=False)

    done = config(tmp_path / ".env")
    assert (done.returncode, done.stderr) == (0, "")
    read = YAML(typ="safe").load(done.stdout)
    assert read["services"].keys() == COMPOSE["services"].keys()
    assert read["volumes"].keys() == COMPOSE["volumes"].keys()
    for name, one in COMPOSE["services"].items():
        there = read["services"][name]
        wanted = {key: interpolated(text, given) for key, text in one.get("environment", {}).items()}
        assert there.get("environment", {}) == wanted, name
        assert there.get("command") == one.get("command"), name
        assert there.get("healthcheck", {}).get("test") == one.get("healthcheck", {}).get("test"), name
        conditions = {other: how["condition"] for other, how in there.get("depends_on", {}).items()}
        assert conditions == {other: how["condition"] for other, how in one.get("depends_on", {}).items()}
    done = config(ROOT / "deploy/env.example")
    assert done.returncode
    assert "choose the password of the database, in .env" in done.stderr


def test_no_password_is_in_the_repository_and_a_missing_one_is_asked_for():
    text = to_yaml(COMPOSE["services"])
    asked = set(re.findall(r"\$\{(\w+):\?", text))
    assert asked == set(SECRETS)
    example = dict(
        line.split("=")
        for line in (ROOT / "deploy/env.example").read_text(encoding="utf-8").splitlines()
        if re.match(r"\w", line)
    )
    assert set(example) == asked
    assert not example["POSTGRES_PASSWORD"] + example["AWS_SECRET_ACCESS_KEY"]
    for key, value in ((k, v) for one in COMPOSE["services"].values() for k, v in one.get("environment", {}).items()):
        if re.search("PASSWORD|SECRET|AUTH_KEY", key):
            assert "${" in value, key
    with pytest.raises(ValueError, match="POSTGRES_PASSWORD: choose the password of the database, in .env"):
        interpolated(COMPOSE["services"]["postgres"]["environment"]["POSTGRES_PASSWORD"], {})
    assert "/.env" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()
