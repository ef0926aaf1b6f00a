"""compose.yaml run here: its commands, settings and health checks as they are, each service a process of this machine."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import boto3
from ruamel.yaml import YAML

from pipelines.retraining import services
from tests.running import ROOT, environment, free_port

COMPOSE = YAML(typ="safe").load(ROOT / "compose.yaml")
PORTS = (5432, 9000, 5000, 4200, 8080)
SECRETS = {"POSTGRES_PASSWORD": "p@ss/word:1", "AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "s3cret-of-s3"}
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
        env = environment(cold=True, **named)
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
        with (self.folder / f"{name}.log").open("a", encoding="utf-8") as log:
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
        return (self.folder / f"{name}.log").read_text(encoding="utf-8")

    def initialize(self):
        """What the entrypoint of PostgreSQL's image does once."""
        settings = self.environment("postgres")
        user, data, password = settings["POSTGRES_USER"], self.folder / "postgres", self.folder / "password"
        for path in (data, password):
            path.mkdir() if path == data else path.write_text(settings["POSTGRES_PASSWORD"], encoding="utf-8")
            if os.geteuid() == 0:
                shutil.chown(path, "postgres")
        access = ["--auth=scram-sha-256", f"--username={user}", f"--pwfile={password}"]
        run = [*as_postgres(), "initdb", *access, "--no-sync", "-D", str(data)]
        subprocess.run(run, env=settings, cwd=self.folder, check=True, capture_output=True)
        self.start("postgres")
        self.sql((ROOT / "deploy/databases.sql").read_text(encoding="utf-8"), "postgres")

    def sql(self, statement, database):
        settings = self.environment("postgres")
        at = ["--host=127.0.0.1", f"--port={self.ports[5432]}", f"--username={settings['POSTGRES_USER']}"]
        return subprocess.run(
            ["psql", *at, "--no-psqlrc", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1", database],
            env=settings | {"PGPASSWORD": settings["POSTGRES_PASSWORD"]},
            input=statement,
            encoding="utf-8",
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
