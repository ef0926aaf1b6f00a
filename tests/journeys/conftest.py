"""One stack of servers for all tests in this folder that need them. They use it in turn, so each looks at its own runs."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.orchestra import branch, listening, services, warm_runs
from tests.projects import quick_project
from tests.running import ROOT, call

PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted-aws+secret/1",
    "SOME_PREFECT_API_KEY": "planted-pnu-2",
    "MLFLOW_TRACKING_PASSWORD": "planted-password-4",
    "WAREHOUSE": "postgresql://somebody:planted-database-5@127.0.0.1:9/db",
}
NOTE = """A first try: <script>alert(1)</script> <img src=x onerror=alert(1)> {{ 7919 * 6101 }} {% raw %} $(touch FILE)

`touch FILE`
Signed-off-by: Somebody Else <somebody@else.example>
Co-authored-by: Somebody Else <somebody@else.example>"""
LOUD = """
import os, subprocess
print(dict(os.environ), flush=True)
print(*os.environ.values(), sep="\\n", flush=True)
subprocess.run("env; git remote --verbose", shell=True)
"""
FAILING = "raise ValueError(f'no {os.environ}: {os.environ[\"WAREHOUSE\"]}')\n"


@pytest.fixture(scope="package")
def hook():
    """A server that failures are told: its address, which is a secret, and what came."""
    with listening() as (address, came):
        yield f"{address}/services/planted-hook-3", came


@pytest.fixture(scope="package")
def outside():
    """Where every request to an address that is not loopback goes, by the variables of a proxy."""
    with listening() as found:
        yield found


@pytest.fixture(scope="package")
def env(hook, outside, tmp_path_factory):
    """The environment that `up` is called in."""
    folder = tmp_path_factory.mktemp("env")
    proxy = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), outside[0])
    late = {f"PREFECT_SERVER_SERVICES_LATE_RUNS_{name}_SECONDS": "1" for name in ("AFTER", "LOOP")}
    own = {"DETR_WEBHOOK_URL": hook[0], "DETR_DATA_ROOTS": str(folder / "shared")}
    return PLANTED | proxy | late | own | warm_runs(folder / "python")


@pytest.fixture(scope="package")
def served(env, tmp_path_factory):
    """A project with quick stages, secrets in its settings, and servers and a worker.

    It has branches with the real stages: `real`; `loud`, where one prints its environment; `failing`, where that fails.
    """
    project = quick_project(tmp_path_factory.mktemp("served"))
    branch(
        project,
        "real",
        lambda: (project / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text(encoding="utf-8"), encoding="utf-8"),
    )
    for name, lines in (("loud", LOUD), ("failing", LOUD + FAILING)):
        branch(project, name, lambda lines=lines: begin_main(project / "pipelines/validate.py", lines), "real")
    call(project, "git", "remote", "add", "origin", "https://planted-git-token-6@127.0.0.1:9/x.git")
    call(project, "dvc", "remote", "add", "--local", "--default", "far", "https://127.0.0.1:9/x")
    call(project, "dvc", "remote", "modify", "--local", "far", "password", "planted-dvc-7")
    with services(project, **env) as found:
        yield found


def begin_main(module: Path, lines: str) -> None:
    """Has the function `main` of a module begin with these lines."""
    head = "def main() -> None:\n"
    before, after = module.read_text(encoding="utf-8").split(head)
    added = "".join(f"    {line}\n" for line in lines.strip().splitlines())
    module.write_text(f"{before}{head}{added}{after}", encoding="utf-8")


@pytest.fixture(scope="package")
def real(served):
    """A run of all the real stages, of the branch `loud`, that may not be promoted, and what was before and after it.

    Its note would make a `file`."""

    def clone():
        return [call(served.project, "git", *a) for a in (["status", "--short"], ["rev-parse", "HEAD"])]

    before, versions = clone(), served.versions()
    asked = {"overrides": ["train.epochs=1"], "ref": "loud"}
    file = served.project.parent / "planted"
    run_id = served.start("retrain/on-demand", **asked, promote=False, note=NOTE.replace("FILE", str(file)))
    run = served.wait(run_id)
    assert run["state_type"] == "COMPLETED", served.log(run_id)
    (number,) = served.versions().keys() - versions.keys()
    return SimpleNamespace(
        id=run_id,
        run=run,
        asked=asked,
        branch=run["state"]["message"].removeprefix("branch "),
        clone=(before, clone()),
        number=number,
        tags=served.versions()[number],
        file=file,
    )
