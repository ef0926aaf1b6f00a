"""The command line: python -m pipelines VERB."""

import argparse
import json
import os
import shlex
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from pipelines import params
from pipelines.files import write_json
from pipelines.labels import say_metric
from pipelines.registry import tracking
from pipelines.retraining import readiness
from pipelines.stage import command
from pipelines.surroundings import QUIET, past_proxies
from pipelines.workspace import interruption, worktree
from pipelines.workspace.git import check_repository, git, is_dirty
from pipelines.workspace.overrides import parameters

PORTS = {"prefect": 4200, "mlflow": 5000, "docs": 8000, "dataset": 8001}
PAGES = {"docs": Path("scratch/data_docs"), "dataset": Path("artifacts/validate/dataset")}


def check(document: Any) -> None:
    """Checks params.yaml as `agreement.check` does, and warns of what is seldom meant."""
    from pipelines import agreement

    agreement.check(document)
    for oddity in agreement.find_oddities(document):
        print(f"warning: {oddity}", file=sys.stderr, flush=True)


def run(preset: str | None, overrides: list[str], refresh: bool) -> None:
    """Runs the pipeline as a Prefect flow: here, or in a worktree of its own with a preset or overrides."""
    root = Path.cwd()
    here = preset is None and not overrides
    if not here:
        check_repository(root)
    dirty = not here and is_dirty(root)
    if not dirty:  # else the code of the commit checks what it has
        document = parameters(root, preset, overrides)
        check(document)
        readiness.require_source(root, document, refresh)
    os.environ["PREFECT_HOME"] = os.environ.get("PREFECT_HOME") or str(root / ".prefect")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    readiness.check(root)
    if here:
        with worktree.only_one(root, lambda line: print(line, flush=True)):
            from pipelines.retraining import flow, terminal

            terminal.run(flow.pipeline, "params.yaml", root, refresh)
        summarize(root / "artifacts/evaluate", root / "artifacts/register/version.json")
        with suppress(ValueError):  # where there is no git
            if git(root, "status", "--porcelain", "--", "dvc.lock"):
                print("to keep it  git add dvc.lock && git commit")
        return
    if dirty:
        print("warning: uncommitted changes are not part of this run; it works at the last commit", file=sys.stderr)
    from pipelines.retraining import flow, terminal

    branch = terminal.run(flow.retrain, preset or "none", overrides, refresh=refresh)
    kept = root / "scratch" / branch
    summarize(kept, kept / "version.json")
    print(f"branch    {branch}: git checkout {branch} && dvc checkout")


def summarize(evaluated: Path, registered: Path) -> None:
    """Prints the result of a run and where a person goes from here."""
    metrics, version = (
        json.loads(path.read_text(encoding="utf-8")) for path in (evaluated / "metrics.json", registered)
    )
    python = os.path.relpath(sys.executable)
    print()
    few = "  (so few images cannot rule it out)" if metrics["AP"] == 0 < metrics["AP_high"] else ""
    for name, value in metrics.items():
        print(f"{name:<20}{say_metric(value)}{few * (name == 'AP_high')}")
    print(f"\nmodel     {version['name']} version {version['version']}: models:/{version['name']}/{version['version']}")
    print(f"pictures  {os.path.relpath(evaluated / 'plots')}/")
    for title, verb in (
        ("Prefect UI", "prefect"),
        ("MLflow UI", "mlflow"),
        ("Data Docs", "docs"),
        ("Dataset", "dataset"),
    ):
        print(f"{title:<12}{python} -m pipelines ui {verb}")


def ui(which: str, port: int | None) -> None:
    """Serves the Prefect UI, the MLflow UI, the Data Docs or the dataset's page on 127.0.0.1 until interrupted."""
    from pipelines.retraining import services

    root, port = Path.cwd(), port or PORTS[which]
    services.check_free(services.HOST, port, "--port")
    pages = root / PAGES.get(which, "")
    if not pages.exists():
        raise ValueError(f"{pages} does not exist; run the pipeline first: python -m pipelines run")
    database = tracking.database_of(tracking.tracking_uri()) or root / "mlflow.db"
    store = f"{tracking.SQLITE}{database}"
    if which == "mlflow":
        from pipelines.registry.database import prepare_database

        prepare_database(database)
    arguments = {
        "prefect": ["-m", "prefect", "--no-prompt", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        "mlflow": ["-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), "--backend-store-uri", store],
    }.get(which, ["-m", "http.server", "--bind", "127.0.0.1", "--directory", str(pages), str(port)])
    print(f"http://127.0.0.1:{port}  (Ctrl-C ends it)", flush=True)
    env = os.environ | QUIET
    env.setdefault("PREFECT_HOME", str(root / ".prefect"))
    env["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"  # what its page asks
    env.setdefault(services.ORIGINS, services.origins(services.HOST, port))
    os.execve(sys.executable, [sys.executable, *arguments], env)


def up(prefect_port: int, mlflow_port: int, host: str) -> None:
    """Starts everything for this machine in the background, and says where it is and how to use it from here."""
    from pipelines.retraining import services

    urls, died = services.up(Path.cwd(), prefect_port, mlflow_port, host)
    python = os.path.relpath(sys.executable)
    settings = {"PREFECT_API_URL": f"{urls['Prefect']}/api", "MLFLOW_TRACKING_URI": urls["MLflow"]}
    settings |= {"DO_NOT_TRACK": "true"} | past_proxies(host)
    for line in died:
        print(f"Run        {line}")
    print(f"""\
Prefect    {urls["Prefect"]}    runs; start one with a form: Deployments, on-demand, Run
MLflow     {urls["MLflow"]}    models and their training
Logs       {services.log_of(Path(), "{prefect,mlflow,worker}")}
Data Docs  {python} -m pipelines ui docs       the dataset's page: ui dataset
Stop       {python} -m pipelines down          a training goes on with the next `up`

In this shell, for the commands below:
export {" ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items())}

{python} -m prefect deployment run retrain/on-demand --param 'overrides=["train.epochs=4"]' --watch
{python} -m prefect deployment schedule ls retrain/nightly    # it is off; `schedule resume` turns it on""")
    if host != services.HOST:
        print(f"\nWho reaches {host} can read everything and start runs: let only a proxy with a login reach it")


def data(old: str | None, new: str | None, as_json: bool) -> None:
    """Prints the versions of the data in the history, or what changed from the one of `old` to that of `new`."""
    from pipelines.data import changes, versions
    from pipelines.workspace import history

    root = Path.cwd()
    opened = partial(history.open_version, root)
    if old is not None:
        document = changes.difference(history.data_version(root, old), history.data_version(root, new), opened)
        print(json.dumps(document, indent=1) if as_json else changes.report(document))
        return
    found, here = history.data_versions(root)
    store = root / "scratch" / "data_counts.json"
    known = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    rows = [versions.describe(version, opened, known) | {"current": version is here} for version in found]
    write_json(store, known)
    print(json.dumps(rows, indent=1) if as_json else versions.overview(rows))


def execute(arguments: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    if arguments.verb == "run":
        run(arguments.preset, arguments.overrides, arguments.refresh)
    elif arguments.verb == "params":
        document = params.merged(Path.cwd(), arguments.preset, arguments.overrides)
        check(document)
        print(params.to_yaml(document), end="")
    elif arguments.verb == "up":
        up(arguments.prefect_port, arguments.mlflow_port, arguments.host)
    elif arguments.verb == "down":
        from pipelines.retraining import services

        print(f"{services.down(Path.cwd())} processes stopped")
    elif arguments.verb == "automate":
        from pipelines.retraining import automations, services
        from pipelines.workspace.dvc import call

        automations.prepare(os.environ.get(services.WEBHOOK))
        if arguments.deploy:
            call(automations.deploy_command(Path.cwd()), Path.cwd(), print)
        if arguments.resume:
            for line in automations.resume_interrupted(automations.MOST_ATTEMPTS):
                print(line)
    elif arguments.verb == "data":
        data(arguments.old, arguments.new, arguments.json)
    elif arguments.verb == "predict":
        from pipelines.serving.predict import predict

        predict(arguments.paths, arguments.model, arguments.threshold, arguments.output)
    elif arguments.verb == "rollback":
        from pipelines.registry.aliases import rollback

        print(rollback())
    elif arguments.verb == "compare":
        from pipelines.registry.compare import compare

        print(compare(Path.cwd(), arguments.versions))
    elif arguments.verb == "reproduce":
        from pipelines.registry.reproduce import reproduce

        print(reproduce(Path.cwd(), arguments.model))
    elif arguments.verb == "table":
        from pipelines.registry.paper_table import table

        print(table(Path.cwd(), arguments.quick))
    else:
        ui(arguments.which, arguments.port)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipelines", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (("run", "run the pipeline as a Prefect flow"), ("params", "check and print the parameters")):
        one = verbs.add_parser(verb, help=text)
        one.add_argument("--preset", help="a name in presets/, merged over params.yaml for this run")
        one.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
        if verb == "run":
            one.add_argument("--refresh", action="store_true", help="download again: the source's content has changed")
    one = verbs.add_parser("ui", help="serve a user interface on 127.0.0.1")
    one.add_argument("which", choices=list(PORTS))
    one.add_argument("--port", type=int)
    one = verbs.add_parser("up", help="start the servers, the deployments and a worker in the background")
    for name in ("prefect", "mlflow"):
        one.add_argument(f"--{name}-port", type=int, default=PORTS[name])
    one.add_argument("--host", default="127.0.0.1", help="name or address to serve at; there is no authentication")
    verbs.add_parser("down", help="stop all that `up` has started")
    one = verbs.add_parser("automate", help="make work pool, queue and automations on the server of PREFECT_API_URL")
    one.add_argument(
        "--deploy", action="store_true", help="deploy prefect.yaml; schedules that are on stay as they are"
    )
    one.add_argument("--resume", action="store_true", help="have runs that died go on; no worker may be alive")
    one = verbs.add_parser("data", help="print the versions of the data, or what changed between two")
    one.add_argument("old", nargs="?", metavar="OLD", help="a commit")
    one.add_argument("new", nargs="?", metavar="NEW", help="a commit; without it, the working tree")
    one.add_argument("--json", action="store_true", help="print JSON")
    one = verbs.add_parser("predict", help="detect objects in pictures with a registered model")
    one.add_argument("paths", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    one.add_argument("--model", default="champion", help="an alias or the number of a version")
    one.add_argument("--threshold", type=float, default=0.5, help="lowest score that is shown")
    one.add_argument("--output", type=Path, default=Path("scratch/predictions"))
    one = verbs.add_parser("rollback", help="make the previous champion the champion again")
    one = verbs.add_parser("compare", help="compare registered versions")
    one.add_argument("versions", nargs="*", help="aliases or numbers; without any, champion and challenger")
    one = verbs.add_parser("reproduce", help="make a registered version again, and say whether it is the same")
    one.add_argument("model", help="models:/detr/3, models:/detr@champion, or only 3 or champion")
    one = verbs.add_parser("table", help="print the paper's table as it is on this machine")
    one.add_argument("--quick", action="store_true", help="fewer and smaller measurements")
    arguments = parser.parse_args()

    def act() -> None:
        with interruption.heeded():
            execute(arguments)

    command(act)


if __name__ == "__main__":
    main()
