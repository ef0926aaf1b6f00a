"""Where no secret of a run's environment may go, and what hostile strings from the form do: nothing."""

import json
import re
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
import requests
from ruamel.yaml import YAML

from tests.hostile import HOSTILE, WITH_PASSWORDS
from tests.orchestra import Services
from tests.running import call

pytestmark = pytest.mark.xdist_group("servers")


def everything(project: Path) -> dict[str, bytes]:
    """All that is kept of the runs, by place: files, rows of databases, objects of git; but not where we planted."""
    kept = {}
    for path in project.rglob("*"):
        own = path.relative_to(project).as_posix()
        if path.is_file() and not path.is_symlink() and own not in (".git/config", ".dvc/config.local"):
            kept[own] = path.read_bytes()
    for name in (".prefect/prefect.db", "mlflow.db"):
        with closing(sqlite3.connect(f"file:{project / name}?mode=ro", uri=True)) as database:
            kept[f"rows of {name}"] = "\n".join(database.iterdump()).encode()
    objects = ("git", "cat-file", "--batch", "--batch-all-objects", "--buffer")
    kept["git"] = subprocess.run(objects, cwd=project, capture_output=True, check=True).stdout
    return kept


def test_no_secret_of_the_environment_is_kept_of_runs_that_print_it(served: Services, real):
    """With the real stages, one of which prints its environment."""
    bad = served.start("retrain/on-demand", ref="failing")
    unreachable = served.start("retrain/on-demand", ref="origin/main")
    for run_id, said in ((bad, "validate: "), (unreachable, "git fetch")):
        run = served.wait(run_id)
        assert (run["state_type"], said in run["state"]["message"]) == ("FAILED", True), served.log(run_id)
    assert "WAREHOUSE=postgresql://127.0.0.1:9/db" in served.log(real.id)  # printed, without the password
    assert "AWS_SECRET_ACCESS_KEY=***" in served.log(real.id)
    secrets = [b"planted-" + name for name in (b"aws", b"pnu", b"hook", b"password", b"database", b"git", b"dvc")]
    found = {(place, s) for place, content in everything(served.project).items() for s in secrets if s in content}
    assert not found
    for path in ("block_documents", "automations", "deployments", "logs", "artifacts", "flow_runs", "task_runs"):
        assert "planted-" not in json.dumps(served.ask("POST", f"{path}/filter", limit=200)), path
    for run_id in (real.id, bad, unreachable):
        assert "planted-" not in served.log(run_id)
        assert "planted-" not in json.dumps(served.artifacts(run_id))

    git_log = ("git", "log", f"loud..{real.branch}")
    assert not call(served.project, *git_log, "--format=%(trailers)").strip()
    assert "> Signed-off-by: Somebody Else" in call(served.project, *git_log, "--format=%B")
    for run_id in (real.id, bad):
        for one in served.artifacts(run_id).values():
            if one["type"] != "image":
                text = f"{one['description']} {one['data']}"
                # a backslash has Markdown show it as it is
                assert not re.search(r"(?<!\\)<(script|img)|48313819", text)
    assert not real.file.exists()


def test_a_run_may_take_data_from_the_folders_that_its_worker_names(served: Services, env, drawn, tmp_path):
    folder = shutil.copytree(drawn, Path(env["DETR_DATA_ROOTS"]) / "coco")
    other = shutil.copytree(drawn, tmp_path / "other")
    taken = served.start("retrain/on-demand", overrides=[f"download.source={folder}", "train.epochs=1"])
    refused = served.start("retrain/on-demand", overrides=[f"download.source={other}", "train.epochs=1"])
    branch = served.completed(taken)
    committed = YAML(typ="safe").load(call(served.project, "git", "show", f"{branch}:params.yaml"))
    assert committed["download"]["source"] == str(folder)
    assert "outside of the project" in served.wait(refused)["state"]["message"]


def test_hostile_strings_from_the_form_run_nothing_and_are_told_in_one_line(served: Services, tmp_path):
    file = tmp_path / "planted"
    texts = [text.format(file=file) for text in HOSTILE]
    before = len(served.runs())
    for text in texts:
        for asked in ({"preset": text}, {"overrides": [text]}):
            with pytest.raises(requests.HTTPError, match=r"^(409|422): .*"):
                served.start("retrain/on-demand", **asked)
    for text in ("--upload-pack=touch x", "HEAD:params.yaml", "@{upstream}", "../x", "-x"):
        with pytest.raises(requests.HTTPError, match=r"^(409|422): "):
            served.start("retrain/on-demand", ref=text)
    with pytest.raises(requests.HTTPError, match="put a password into ~/.netrc"):
        served.start("retrain/on-demand", overrides=WITH_PASSWORDS[:1])
    assert len(served.runs()) == before

    started = [
        served.start("retrain/on-demand", overrides=[f"download.source=$(touch {file}); touch {file}"], ref="HEAD"),
        served.start("retrain/on-demand", overrides=[f"train.epochs=!!python/object/apply:os.system ['touch {file}']"]),
        served.start("retrain/on-demand", overrides=["model.backbone_weights=/etc/passwd"]),
        served.start("retrain/on-demand", ref=f"origin/$(touch${{IFS}}{file})".replace("{", "").replace("}", "")),
    ]
    for run_id in started:
        run = served.wait(run_id)
        assert run["state_type"] == "FAILED", served.log(run_id)
        assert "\n" not in run["state"]["message"].strip()
    assert not file.exists()
    assert not list((served.project / "scratch/worktrees").glob("*"))


def test_the_command_refuses_a_password_too(served: Services):
    said = call(served.project, "python", "-m", "pipelines", "run", "--set", WITH_PASSWORDS[0], code=1)
    assert re.fullmatch(r"error: source has a URL .*~/.netrc: machine HOST login USER password PASSWORD\n", said)
    assert "pa55word" not in said
