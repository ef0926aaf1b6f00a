"""compose.yaml, its commands and settings run here as they are: with PostgreSQL and S3 behind Prefect and MLflow."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import pytest
from ruamel.yaml import YAML

from pipelines import services
from pipelines.automations import MOST_ATTEMPTS
from pipelines.params import to_yaml
from pipelines.stage import QUIET
from tests.conftest import ROOT, call, detections_like, environment, free_port, needs, small_project, trained_project
from tests.orchestra import Services, answers_page, listening

COMPOSE = YAML(typ="safe").load(ROOT / "compose.yaml")
PORTS = (5432, 9000, 5000, 4200, 8080)
SECRETS = {"POSTGRES_PASSWORD": "p@ss/word:1", "AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "s3cret-of-s3"}
AUTHOR = {f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
ONCE = "bucket"  # the service that ends


def interpolated(text, given):
    """As Compose fills a text in: ${NAME}, ${NAME:-default}, ${NAME:?what is missing}."""

    def value(found):
        name, kind, other = found.groups()
        if not given.get(name) and kind == ":?":
            raise ValueError(f"{name}: {other}")
        return given.get(name) or (other if kind == ":-" else "")

    return re.sub(r"\$\{(\w+)(?:(:[-?])([^}]*))?\}", value, text)


@dataclass
class Team:
    """The services of compose.yaml, each a process here, on free ports and in folders of its own."""

    folder: Path
    project: Path
    postgres: Path  # the folder of its programs
    given: dict[str, str]  # what .env holds
    ports: dict[int, int] = field(default_factory=lambda: {port: free_port() for port in PORTS})
    running: dict[str, subprocess.Popen] = field(default_factory=dict)

    def here(self, text):
        """A text of compose.yaml with the ports and folders of this machine."""
        text = text.replace("0.0.0.0", "127.0.0.1")
        for port, free in self.ports.items():
            text = re.sub(rf"(?<![\d.]){port}(?!\d)", str(free), text)
        places = {"/project": self.project, "/objects": self.folder / "objects", "/data": self.folder / "data"}
        for inside, outside in places.items():
            text = re.sub(rf"^{inside}\b", str(outside), text)
        return text.replace("/var/lib/prefect", str(self.folder / "prefect"))

    def environment(self, name):
        """A service's environment and nothing else of it."""
        named = {}
        for key, text in COMPOSE["services"][name].get("environment", {}).items():
            value = self.here(interpolated(text, self.given))
            value = re.sub(rf"(?<=[/@])({'|'.join(COMPOSE['services'])})(?=:\d)", "localhost", value)
            named[key] = "localhost" if key.endswith("_HOST") and value in COMPOSE["services"] else value
        env = environment(**named)
        return env | {"PATH": f"{self.postgres}{os.pathsep}{env['PATH']}", services.MARK: str(self.project)}

    def command(self, name):
        if name == "postgres":  # the image's own command, as its own user
            data = ["-D", str(self.folder / "postgres"), "-p", str(self.ports[5432])]
            return [
                *as_postgres(),
                "postgres",
                *data,
                "-c",
                "listen_addresses=127.0.0.1",
                "-c",
                "unix_socket_directories=",
            ]
        image = COMPOSE["services"][name]["image"]
        return [
            *(["rclone"] if image.startswith("rclone/") else []),
            *map(self.here, COMPOSE["services"][name]["command"]),
        ]

    def start(self, name):
        """Starts a service and waits until its own health check finds it well."""
        for other, how in COMPOSE["services"][name].get("depends_on", {}).items():
            assert other in self.running
            assert how["condition"] == ("service_completed_successfully" if other == ONCE else "service_healthy")
        with (self.folder / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                self.command(name),
                cwd=self.project if name == "worker" else self.folder,
                env=self.environment(name),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.running[name] = process
        deadline = time.monotonic() + services.START_SECONDS
        while not self.is_well(name):
            assert process.poll() is None or name == ONCE, self.log(name)[-3000:]
            assert time.monotonic() < deadline, self.log(name)[-3000:]
            time.sleep(0.5)

    def is_well(self, name):
        if name == ONCE:
            return self.running[name].poll() == 0
        kind, *check = COMPOSE["services"][name]["healthcheck"]["test"]
        assert kind == "CMD"
        check = list(map(self.here, check))
        return subprocess.run(check, env=self.environment(name), capture_output=True, check=False).returncode == 0

    def start_all(self):
        for name in COMPOSE["services"]:
            self.start(name)

    def stop_all(self):
        """Stops them as Compose does, the last first."""
        for name in reversed(list(self.running)):
            self.stop(name)

    def stop(self, name):
        process = self.running.pop(name)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT if name == "postgres" else signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60 if name == "worker" else 20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def initialize(self):
        """What the entrypoint of PostgreSQL's image does once."""
        settings = self.environment("postgres")
        user, data, password = settings["POSTGRES_USER"], self.folder / "postgres", self.folder / "password"
        for path in (data, password):
            path.mkdir() if path == data else path.write_text(settings["POSTGRES_PASSWORD"])
            if os.geteuid() == 0:
                shutil.chown(path, "postgres")
        access = ["--auth=scram-sha-256", f"--username={user}", f"--pwfile={password}"]
        run = [*as_postgres(), "initdb", *access, "--no-sync", "-D", str(data)]
        subprocess.run(run, env=settings, cwd=self.folder, check=True, capture_output=True)
        self.start("postgres")
        self.sql((ROOT / "deploy/databases.sql").read_text(), "postgres")

    def sql(self, statement, database):
        settings = self.environment("postgres")
        at = ["--host=127.0.0.1", f"--port={self.ports[5432]}", f"--username={settings['POSTGRES_USER']}"]
        return subprocess.run(
            ["psql", *at, "--no-psqlrc", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1", database],
            env=settings | {"PGPASSWORD": settings["POSTGRES_PASSWORD"]},
            input=statement,
            text=True,
            check=True,
            stdout=subprocess.PIPE,
        ).stdout

    def bucket(self):
        settings = self.environment("mlflow")
        s3 = boto3.resource("s3", endpoint_url=settings["MLFLOW_S3_ENDPOINT_URL"], **credentials(settings))
        return s3.Bucket("detr")


def credentials(settings):
    return {key.lower(): settings[key] for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")} | {
        "region_name": settings["AWS_DEFAULT_REGION"]
    }


def as_postgres():
    """PostgreSQL refuses to run as root."""
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []


@pytest.fixture(scope="module")
def hook():
    with listening() as found:
        yield found


@pytest.fixture(scope="module")
def team(tmp_path_factory, hook):
    """All services, up. Tests in this module use them in turn."""
    postgres = needs("postgresql").parent
    with tempfile.TemporaryDirectory(prefix="team") as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL's user gets through
        for inside in ("objects", "data", "prefect"):
            (folder / inside).mkdir()
        project = small_project(tmp_path_factory.mktemp("project"))
        found = Team(folder, project, postgres, SECRETS | {services.WEBHOOK: hook[0]})
        try:
            found.initialize()
            for service in list(COMPOSE["services"])[1:]:
                found.start(service)
            yield found
        finally:
            found.stop_all()
            services.down(project)


def served(team):
    return Services(team.project, f"http://127.0.0.1:{team.ports[4200]}", f"http://127.0.0.1:{team.ports[5000]}")


def client_environment(team):
    """Of a colleague with the clone, behind an SSH tunnel: the servers, and the keys of the DVC remote."""
    settings = team.environment("worker")
    keys = {key: settings[key] for key in settings if key.startswith("AWS_") and key != "AWS_ENDPOINT_URL"}
    places = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9000", "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"}
    return keys | {key: team.here(place) for key, place in places.items()}


@pytest.fixture(scope="module")
def retrained(team):
    """The branch of a retraining through the worker, started by its form."""
    prefect = served(team)
    run_id = prefect.start("retrain/on-demand", overrides=["train.epochs=1"], note="for the team")
    run = prefect.wait(run_id, 800)
    assert run["state_type"] == "COMPLETED", prefect.log(run_id)
    assert prefect.tasks(run_id) == dict.fromkeys(("download", "validate", "train", "evaluate", "register"), "Ran")
    return run["state"]["message"].removeprefix("branch ")


def test_a_retraining_lies_in_postgresql_and_s3(team, retrained):
    assert team.sql("SELECT count(*) FROM flow_run WHERE state_type = 'COMPLETED'", "prefect").strip() == "1"
    assert team.sql("SELECT name, version FROM model_versions", "mlflow").strip() == "detr|1"
    keys = [one.key for one in team.bucket().objects.filter(Prefix="mlflow/")]
    assert any(key.endswith("model.safetensors") for key in keys)
    assert any(key.endswith("dvc.lock") for key in keys)
    assert not [name for name in ("mlflow.db", "mlartifacts", "mlruns") if (team.project / name).exists()]
    prefect = served(team)
    (page,) = [artifacts["result"]["data"] for run in prefect.runs() if (artifacts := prefect.artifacts(run["id"]))]
    assert f"]({prefect.mlflow}/#/" in page  # where a browser is, not what containers call it
    assert "http://localhost" not in page
    for name in COMPOSE["services"]:
        assert not [
            secret for key, secret in SECRETS.items() if key != "AWS_ACCESS_KEY_ID" and secret in team.log(name)
        ]


def test_a_colleague_gets_the_data_from_the_same_storage_and_the_model_predicts(team, retrained, tmp_path):
    env = client_environment(team)
    dvc = ("python", "-m", "dvc")
    call(team.project, *dvc, "remote", "add", "--default", "team", "s3://detr/dvc")
    call(team.project, "git", "commit", "--quiet", "--all", "-m", "a remote", **AUTHOR)
    call(team.project, "git", "checkout", "--quiet", retrained)
    call(team.project, "git", "checkout", "--quiet", "main", "--", ".dvc/config")
    call(team.project, *dvc, "push", **env)
    call(team.project, "git", "checkout", "--quiet", "--force", "main")
    call(tmp_path, "git", "clone", "--quiet", "--branch", retrained, str(team.project), "clone")
    clone = tmp_path / "clone"
    shutil.copy(team.project / ".dvc/config", clone / ".dvc/config")
    call(clone, *dvc, "pull", **env)
    assert call(clone, *dvc, "status", "evaluate") == "Data and pipelines are up to date.\n"
    call(clone, "python", "-c", "from zipfile import ZipFile; ZipFile('data/coco/val.zip').extractall('pictures')")
    call(clone, "python", "-m", "pipelines", "predict", "pictures", "--threshold", "0", **env)
    assert (clone / "scratch/predictions").is_dir()


def test_two_registrations_at_once_both_count(team, retrained, drawn, tmp_path):
    env = environment(PYTHONPATH=str(ROOT), **client_environment(team))
    folders = [
        trained_project(tmp_path / mark, drawn, mark, detections_like(drawn / "instances_val.json", shift))
        for mark, shift in (("weak", 4.0), ("strong", 1.0))
    ]
    command = [sys.executable, "-m", "pipelines.register"]
    both = [
        subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for folder in folders
    ]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    numbers = [re.search(r"registered detr version (\d+) as", text)[1] for text in said]
    assert sorted(numbers) == ["2", "3"]
    aliases = dict(
        line.split("|") for line in team.sql("SELECT alias, version FROM registered_model_aliases", "mlflow").split()
    )
    assert aliases["champion"] == numbers[1]


def test_all_is_there_after_everything_was_restarted(team, retrained, hook):
    """Runs, a schedule that a person has turned on, and a run that fell silent when the host did: it goes on.

    One that fell silent again and again does not: it may be what the host dies of.
    """
    prefect = served(team)
    team.stop("worker")
    run_id = prefect.start("retrain/on-demand", overrides=["train.epochs=1"])
    failed, tired = (prefect.start("collect/collect", dry_run=True) for _ in range(2))
    for _ in range(MOST_ATTEMPTS):
        prefect.ask("POST", f"flow_runs/{tired}/set_state", state={"type": "RUNNING"}, force=True)
    silent = "no sign of life for 180 seconds; retry it"
    for one, message in ((run_id, silent), (tired, silent), (failed, "killed by a person")):
        state = {"type": "CRASHED", "name": "Crashed", "message": message}
        prefect.ask("POST", f"flow_runs/{one}/set_state", state=state, force=True)
    nightly = prefect.ask("GET", "deployments/name/retrain/nightly")
    (schedule,) = nightly["schedules"]
    prefect.ask("PATCH", f"deployments/{nightly['id']}/schedules/{schedule['id']}", active=True)
    ours = [one["id"] for one in prefect.runs() if one["deployment_id"] != nightly["id"]]
    prefect.wait_until(lambda: len(hook[1]) >= 3, what="three messages")
    for _, _, body in hook[1]:
        assert json.loads(body)["url"].startswith(f"{prefect.prefect}/runs/flow-run/")

    team.stop_all()
    team.start_all()
    assert [one["id"] for one in prefect.runs() if one["deployment_id"] != nightly["id"]] == ours
    (schedule,) = prefect.ask("GET", "deployments/name/retrain/nightly")["schedules"]
    assert schedule["active"]
    run = prefect.wait(run_id, 800)
    assert run["state_type"] == "COMPLETED", prefect.log(run_id)
    assert set(prefect.tasks(run_id).values()) <= {"Restored", "Unchanged", "Ran"}
    assert prefect.run(failed)["state"]["message"] == "killed by a person"
    ended = prefect.run(tired)["state"]
    assert ended["message"] == "it began 5 times within a day and never ended; find the cause, then retry it"
    assert ended["type"] == "CRASHED"
    assert team.sql("SELECT count(*) FROM model_versions", "mlflow").strip() == "3"  # these weights were there


def test_pages_of_others_cannot_call_prefects_server(team):
    url = f"{served(team).prefect}/api/flow_runs/filter"
    assert answers_page(url, served(team).prefect)
    assert not answers_page(url, "http://elsewhere")


def test_servers_answer_by_the_names_that_services_call_them_by(team):
    (port,) = (team.ports[5000],)
    for host, code in ((f"mlflow:{port}", 200), (f"127.0.0.1:{port}", 200), (f"elsewhere.example:{port}", 403)):
        path = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=1"
        with contextlib.suppress(urllib.error.HTTPError):
            request = urllib.request.Request(path, headers={"Host": host})
            try:
                with urllib.request.urlopen(request) as answer:
                    got = answer.status
            except urllib.error.HTTPError as error:
                error.close()
                got = error.code
        assert got == code, host


def test_what_runs_in_production_is_published_to_this_machine_alone_and_comes_back():
    published = [port for one in COMPOSE["services"].values() for port in one.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)
    for name, one in COMPOSE["services"].items():
        assert one["restart"] == ("no" if name == ONCE else "unless-stopped")
        assert ("healthcheck" in one) == (name != ONCE)
    volumes = {volume.split(":")[0] for one in COMPOSE["services"].values() for volume in one.get("volumes", [])}
    assert set(COMPOSE["volumes"]) <= volumes
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    assert COMPOSE["services"]["worker"]["image"] in dockerfile
    for name in ("prefect", "mlflow", "worker"):
        assert COMPOSE["services"][name]["environment"].items() >= QUIET.items()
    assert any(volume.endswith(":/project") for volume in COMPOSE["services"]["worker"]["volumes"])


def test_compose_reads_the_file_as_these_tests_do(tmp_path):
    program, given = needs("docker-compose"), {name: f"{k}@/:-" for k, name in enumerate(SECRETS)}
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in given.items()))

    def config(file):
        command = [program, "--env-file", file, "config"]
        return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)

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
        line.split("=") for line in (ROOT / "deploy/env.example").read_text().splitlines() if re.match(r"\w", line)
    )
    assert set(example) == asked
    assert not example["POSTGRES_PASSWORD"] + example["AWS_SECRET_ACCESS_KEY"]
    for key, value in ((k, v) for one in COMPOSE["services"].values() for k, v in one.get("environment", {}).items()):
        if re.search("PASSWORD|SECRET|AUTH_KEY", key):
            assert "${" in value, key
    with pytest.raises(ValueError, match="POSTGRES_PASSWORD: choose the password of the database, in .env"):
        interpolated(COMPOSE["services"]["postgres"]["environment"]["POSTGRES_PASSWORD"], {})
    assert "/.env" in (ROOT / ".gitignore").read_text().split()
