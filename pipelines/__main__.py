"""The command line: python -m pipelines VERB."""

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from pipelines import params
from pipelines.arguments import PORTS, build_parser
from pipelines.files import write_json
from pipelines.labels import say_metric
from pipelines.registry import tracking
from pipelines.retraining import readiness
from pipelines.stage import command
from pipelines.surroundings import QUIET, bypass_proxies
from pipelines.workspace import interruption, worktree
from pipelines.workspace.git import check_repository, git, is_dirty
from pipelines.workspace.overrides import check_parameters
from pipelines.workspace.processes import signal_group, start_tied

PAGES = {"docs": Path("scratch/data_docs"), "dataset": Path("artifacts/validate/dataset")}


def check(document: Any, warn: bool = True) -> None:
    """Checks params.yaml as `agreement.check` does, and warns of what is seldom meant."""
    from pipelines import agreement

    agreement.check(document)
    for oddity in agreement.find_oddities(document) if warn else ():
        print(f"warning: {oddity}", file=sys.stderr, flush=True)


def run_pipeline(arguments: argparse.Namespace) -> None:
    """Runs the pipeline as a Prefect flow: here, or in a worktree of its own with a preset or overrides."""
    root, preset, overrides = Path.cwd(), arguments.preset, arguments.overrides
    here = preset is None and not overrides
    if not here:
        check_repository(root)
    dirty = not here and is_dirty(root)
    if not dirty:  # else the code of the commit checks what it has
        document = check_parameters(root, preset, overrides)
        check(document, warn=here)  # elsewhere the flow does
        readiness.require_source(root, document, arguments.refresh)
    os.environ["PREFECT_HOME"] = os.environ.get("PREFECT_HOME") or str(root / ".prefect")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    readiness.check(root)
    if here:
        with worktree.hold_run_lock(root, lambda line: print(line, flush=True)):
            from pipelines.retraining import flow, terminal

            terminal.run(flow.pipeline, "params.yaml", root, arguments.refresh)
        summarize(root / "artifacts/evaluate", root / "artifacts/register/version.json")
        with suppress(ValueError):  # where there is no git
            if git(root, "status", "--porcelain", "--", "dvc.lock"):
                print("to keep it  git add dvc.lock && git commit")
        return
    if dirty:
        print("warning: uncommitted changes are not part of this run; it works at the last commit", file=sys.stderr)
    from pipelines.retraining import flow, terminal

    branch = terminal.run(flow.retrain, preset or "none", overrides, refresh=arguments.refresh)
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


def serve_ui(arguments: argparse.Namespace) -> None:
    """Serves the Prefect UI, the MLflow UI, the Data Docs or the dataset's page on 127.0.0.1 until interrupted."""
    from pipelines.retraining import services

    root, which, port = Path.cwd(), arguments.which, arguments.port or PORTS[arguments.which]
    services.check_free(services.HOST, port, "--port")
    pages = root / PAGES.get(which, "")
    if not pages.exists():
        raise ValueError(f"{pages} does not exist; run the pipeline first: python -m pipelines run")
    database = tracking.find_database(tracking.get_tracking_uri()) or root / "mlflow.db"
    store = f"{tracking.SQLITE}{database}"
    if which == "mlflow":
        from pipelines.registry.database import prepare_database

        prepare_database(database)
    module = {
        "prefect": ["prefect", "--no-prompt", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        "mlflow": ["mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
    }.get(which, ["http.server", "--bind", "127.0.0.1", "--directory", str(pages), str(port)])
    print(f"http://127.0.0.1:{port}  (Ctrl-C ends it)", flush=True)
    env = os.environ | QUIET | {"MLFLOW_BACKEND_STORE_URI": store, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    env.setdefault("PREFECT_HOME", str(root / ".prefect"))
    env["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"  # what its page asks
    env.setdefault(services.ORIGINS, services.list_origins(services.HOST, port))
    server = start_tied(module, env)
    try:
        sys.exit(server.wait())
    finally:
        signal_group(server.pid, signal.SIGKILL)  # what it stores is whole at any moment


def start_services(arguments: argparse.Namespace) -> None:
    """Starts everything for this machine in the background, and says where it is and how to use it from here."""
    from pipelines.retraining import services

    host = arguments.host
    urls, died = services.up(Path.cwd(), arguments.prefect_port, arguments.mlflow_port, host)
    python = os.path.relpath(sys.executable)
    settings = {"PREFECT_API_URL": f"{urls['Prefect']}/api", "MLFLOW_TRACKING_URI": urls["MLflow"]}
    settings |= {"DO_NOT_TRACK": "true"} | bypass_proxies(host)
    for line in died:
        print(f"Run        {line}")
    print(f"""\
Prefect    {urls["Prefect"]}    runs; start one with a form: Deployments, on-demand, Run
MLflow     {urls["MLflow"]}    models and their training
Logs       {services.find_log(Path(), "{prefect,mlflow,worker}")}
Data Docs  {python} -m pipelines ui docs       the dataset's page: ui dataset
Stop       {python} -m pipelines down          a training goes on with the next `up`

In this shell, for the commands below:
export {" ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items())}

{python} -m prefect deployment run retrain/on-demand --param 'overrides=["train.epochs=4"]' --watch
{python} -m prefect deployment schedule ls retrain/nightly    # it is off; `schedule resume` turns it on""")
    if host != services.HOST:
        print(f"\nWho reaches {host} can read everything and start runs: let only a proxy with a login reach it")


def print_data(arguments: argparse.Namespace) -> None:
    """Prints the versions of the data in the history, or what changed from the one of `old` to that of `new`."""
    from pipelines.data import changes, versions
    from pipelines.workspace import history

    root = Path.cwd()
    opened = partial(history.open_version, root)
    if arguments.old is not None:
        one, other = (history.read_data_version(root, ref) for ref in (arguments.old, arguments.new))
        document = changes.find_changes(one, other, opened)
        print(json.dumps(document, indent=1) if arguments.json else changes.report(document))
        return
    found, here = history.list_data_versions(root)
    store = root / "scratch" / "data_counts.json"
    known = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    rows = [versions.describe(version, opened, known) | {"current": version is here} for version in found]
    write_json(store, known)
    print(json.dumps(rows, indent=1) if arguments.json else versions.format_overview(rows))


def print_params(arguments: argparse.Namespace) -> None:
    document = params.merge_parameters(Path.cwd(), arguments.preset, arguments.overrides)
    check(document)
    print(params.to_yaml(document), end="")


def detect_objects(arguments: argparse.Namespace) -> None:
    from pipelines.serving.predict import predict

    predict(arguments.paths, arguments.model, arguments.threshold, arguments.output)


def compare_versions(arguments: argparse.Namespace) -> None:
    from pipelines.registry.compare import compare

    print(compare(Path.cwd(), arguments.versions))


def roll_back(_: argparse.Namespace) -> None:
    from pipelines.registry.aliases import rollback

    print(rollback())


def reproduce_version(arguments: argparse.Namespace) -> None:
    from pipelines.registry.reproduce import reproduce

    print(reproduce(Path.cwd(), arguments.model))


def print_table(arguments: argparse.Namespace) -> None:
    from pipelines.registry.paper_table import write_table

    print(write_table(Path.cwd(), arguments.quick))


def stop_services(_: argparse.Namespace) -> None:
    from pipelines.retraining import services

    print(f"{services.down(Path.cwd())} processes stopped")


def prepare_server(arguments: argparse.Namespace) -> None:
    from pipelines.retraining import automations, services
    from pipelines.workspace.dvc import call

    automations.prepare(os.environ.get(services.WEBHOOK))
    if arguments.deploy:
        call(automations.deploy_command(Path.cwd()), Path.cwd(), print)
    if arguments.resume:
        for line in automations.resume_interrupted(automations.MOST_ATTEMPTS):
            print(line)


VERBS: dict[str, Callable[[argparse.Namespace], None]] = {
    "run": run_pipeline,
    "params": print_params,
    "data": print_data,
    "predict": detect_objects,
    "compare": compare_versions,
    "rollback": roll_back,
    "reproduce": reproduce_version,
    "table": print_table,
    "ui": serve_ui,
    "up": start_services,
    "down": stop_services,
    "automate": prepare_server,
}


def main() -> None:
    parser = build_parser()
    arguments = parser.parse_args()
    if arguments.verb is None:
        parser.print_help()
        return

    def act() -> None:
        with interruption.heed_signals():
            VERBS[arguments.verb](arguments)

    command(act)


if __name__ == "__main__":
    main()
