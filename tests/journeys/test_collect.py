"""The disk is freed, and every registered version stays whole: real git, DVC and MLflow, stages of a second."""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.params import to_yaml
from pipelines.registry import tracking
from pipelines.workspace.cache import count_bytes, find_cache
from tests.collecting import OLD, collectable, collected, parameters, register, run, weights_in_cache
from tests.running import ROOT, call, environment, free_port

PYTHON = sys.executable  # a killed one frees its locks at once
RUN = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.collecting import run
run(Path.cwd(), "killed", 7, ends=lambda: os.kill(os.getpid(), signal.SIGKILL))
"""
COLLECT = """
import sys
from pathlib import Path
from pipelines.retraining.collect import collect
print(collect(Path.cwd(), 0, False, False, print).headline)
"""


@pytest.fixture
def project(empty_registry, tmp_path, monkeypatch):
    return collectable(tmp_path / "project", empty_registry, monkeypatch)


def fail():
    raise OSError("it failed")


def branches(root):
    return sorted(call(root, "git", "branch", "--list", "runs/*", "--format=%(refname:short)").split())


def assert_whole(root, folder):
    """Every version can be checked out with its data and weights, from the cache alone."""
    client = tracking.connect()
    for version in tracking.list_versions(client):
        place = folder / f"{version.version}-{time.monotonic_ns()}"
        call(root, "git", "worktree", "add", "--quiet", "--detach", str(place), version.tags["git_commit"])
        lock = place / "dvc.lock"
        if not lock.exists() or tracking.sha256(lock) != version.tags["dvc_lock_sha256"]:
            tracking.fetch_artifact(client, version.run_id, "dvc.lock", place)
        (place / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {root}/.dvc/cache\n", encoding="utf-8")
        call(place, "dvc", "--wait-for-lock", "checkout")  # that of a killed collection may still be held
        assert tracking.sha256(place / "artifacts/train/model.safetensors") == version.tags["weights_sha256"]
        assert len(list((place / "data/coco/plots").iterdir())) == 2
        call(root, "git", "worktree", "remove", "--force", str(place))


def age(root):
    """Makes all in scratch/ a month old."""
    for path in (root / "scratch").rglob("*"):
        os.utime(path, (OLD, OLD), follow_symlinks=False)


def everything(root):
    files = {p: (p.lstat().st_size, p.lstat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}
    kept = {
        path: found
        for path, found in files.items()
        if not {"tmp", "run.lock"} & {*path.parts} or "scratch" in path.parts
    }
    return {path: found for path, found in kept.items() if path.name != "run.lock" and ".git" not in path.parts}


def in_place(root, seed):
    """A registration from uncommitted parameters, whose dvc.lock is in no commit; the working tree goes back."""
    (root / "params.yaml").write_text(to_yaml(parameters(seed, root)), encoding="utf-8")
    call(root, "dvc", "repro")
    number = register(root)
    call(root, "git", "checkout", "--quiet", "params.yaml")
    (root / "dvc.lock").unlink()
    return number


def test_versions_stay_whole_and_all_else_goes(project, tmp_path):
    kept = [run(project, f"good-{seed}", seed, registered=True) for seed in (1, 2)]
    in_place(project, 3)
    run(project, "unregistered", 4)
    on_top = run(project, "on-top", 5, ref=kept[0])
    with pytest.raises(OSError, match="it failed"):
        run(project, "failed", 6, ends=fail)
    killed = subprocess.run(
        ["python", "-c", RUN, str(ROOT)],
        cwd=project,
        env=os.environ | environment(),
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert (project / "scratch/worktrees/killed").exists()
    for name in ("0123456789abcdef/state", "downloads/a.part", "reproductions/1.json", "services/worker.log"):
        (project / "scratch" / name).parent.mkdir(parents=True, exist_ok=True)
        (project / "scratch" / name).write_bytes(b"x" * 1000)
    before = everything(project)
    said = collected(project, dry_run=True)
    assert everything(project) == before
    assert said.headline.startswith("would free ")
    assert said.went["states"] == [("0123456789abcdef", 1000)]
    assert {name for name, _ in said.went["branches"]} == {"runs/unregistered", "runs/failed", on_top}

    young = collected(project, days=14)
    assert {kind for kind, rows in young.went.items() if rows} <= {"worktrees", "DVC cache"}
    assert branches(project) == sorted([*kept, "runs/unregistered", "runs/failed", "runs/killed", on_top])
    size = count_bytes(project / ".dvc/cache")
    done = collected(project)
    assert branches(project) == kept
    (freed,) = [size for _, size in done.went["DVC cache"]]
    assert freed == size - count_bytes(project / ".dvc/cache") > 4 * 100_000
    assert dict(done.went["results of runs"]).keys() == {"runs/unregistered", "runs/on-top"}
    assert f"| DVC cache | 1 | {freed:,} |" in done.markdown
    for kind, name in (("downloads", "downloads/a.part"), ("logs", "services/worker.log")):
        assert done.went[kind] == [(name, 1000)]
    assert sorted(path.name for path in (project / "scratch/runs").iterdir()) == ["good-1", "good-2"]
    assert_whole(project, tmp_path)
    assert collected(project).bytes == 0

    again = run(project, "unregistered", 4)  # what the run cache still knew of it must not be believed
    assert again == "runs/unregistered"
    held = weights_in_cache(project, again)
    assert hashlib.md5(held.read_bytes()).hexdigest() == held.parent.name + held.name


def test_the_disk_is_bounded_and_a_kill_anywhere_does_no_harm(project, tmp_path):
    run(project, "good", 1, registered=True)
    in_place(project, 2)
    sizes = set()
    env = environment(MLFLOW_TRACKING_URI=os.environ["MLFLOW_TRACKING_URI"], PYTHONPATH=str(ROOT))
    command = ["python", "-c", COLLECT]
    ends = []
    for seed, moment in ((3, None), (4, "branch"), (5, "state"), (6, "weights")):  # the last that goes before the kill
        name = run(project, f"other-{seed}", seed)
        state = project / "scratch" / f"{seed:016x}" / "state"
        state.parent.mkdir()
        state.write_bytes(b"x" * 1000)
        there = {
            "branch": project / ".git/refs/heads" / name,
            "state": state,
            "weights": weights_in_cache(project, name),
        }
        assert all(path.exists() for path in there.values())
        process = subprocess.Popen(command, cwd=project, env=env, stdout=subprocess.PIPE, start_new_session=True)
        while process.poll() is None and (moment is None or there[moment].exists()):
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        ends.append(process.returncode)
        assert_whole(project, tmp_path)
        collected(project)
        assert branches(project) == ["runs/good"]
        sizes.add(
            (
                count_bytes(project / ".dvc/cache"),
                count_bytes(project / "scratch") - (project / "scratch/run.lock").stat().st_size,
            )
        )
    assert len(sizes) == 1, sizes
    assert ends[0] == 0
    assert -signal.SIGKILL in ends
    assert_whole(project, tmp_path)


def test_nothing_is_removed_where_the_need_is_not_known(project, tmp_path, monkeypatch):
    run(project, "other", 4)
    age(project)
    before = everything(project)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ValueError, match="is unreachable"):
        collected(project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(ValueError, match="nothing is registered yet"):
        collected(project)
    assert everything(project) == before
    assert branches(project) == ["runs/other"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")

    number = in_place(project, 5)
    client = tracking.connect()
    version = client.get_model_version(tracking.MODEL, number)
    artifact = Path(client.get_run(version.run_id).info.artifact_uri.removeprefix("file://")) / "dvc.lock"
    artifact.rename(tmp_path / "dvc.lock")
    size = count_bytes(project / ".dvc/cache")
    said = collected(project, days=14).headline
    assert f"stays as it is: what version {number} of detr needs is neither in a commit nor in MLflow" in said
    assert count_bytes(project / ".dvc/cache") == size
    (tmp_path / "dvc.lock").rename(artifact)

    shared = tmp_path / "shared"
    (project / ".dvc/cache").rename(shared)
    (project / ".dvc/config.local").write_text("[cache]\n    dir = ../../shared\n", encoding="utf-8")
    assert find_cache(project) == shared.resolve()
    done = collected(project)
    assert "may be shared with other clones" in done.headline
    assert (branches(project), count_bytes(shared)) == ([], size)
    (project / ".dvc/config.local").unlink()
    (project / ".dvc/cache").symlink_to(shared)
    assert "may be shared with other clones" in collected(project).headline
    assert count_bytes(shared) == size
    assert collected(project, shared_cache=True).went["DVC cache"][0][1] > 0


def test_with_another_registry_nothing_is_removed(project, tmp_path, monkeypatch):
    """One that is empty, and one that another project fills: neither knows what this one needs."""
    kept = run(project, "good", 1, registered=True)
    run(project, "other", 4)
    client = tracking.connect()
    age(project)
    before = everything(project)
    for versions in (0, 1):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/{versions}.db")
        another = tracking.connect()
        another.create_registered_model(tracking.MODEL)
        if versions:
            run_id = tracking.find_run(another, f"{9:016x}", "of somebody else")
            another.create_model_version(tracking.MODEL, "file:///nowhere", run_id, tags={"fingerprint": f"{9:016x}"})
        with pytest.raises(
            ValueError, match=r"does not know the run that scratch/runs/good/version.json tells of; set"
        ):
            collected(project)
        assert everything(project) == before
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")

    (version,) = tracking.list_versions(client)
    client.delete_model_version(tracking.MODEL, version.version)
    client.delete_run(version.run_id)  # by a person, who wants no more of it
    (project / "scratch/runs/other/version.json").write_text('{"fing', encoding="utf-8")  # torn by a kill
    collected(project)
    assert branches(project) == []
    assert kept == "runs/good"


def test_what_is_in_use_stays(project, tmp_path):
    """A branch that somebody has checked out or committed to since, the state of a training, the log of a service."""
    for name in ("looked-at", "other"):
        run(project, name, 4)
    call(project, "git", "worktree", "add", "--quiet", str(tmp_path / "mine"), "runs/looked-at")
    state = project / "scratch/0123456789abcdef"
    log = project / "scratch/services/worker.log"
    for path in (state / "state", state / "lock", log, log.with_name("old.log")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x", encoding="utf-8")
    age(project)
    hold = "import fcntl, sys, time; a, b = (open(p, 'a') for p in sys.argv[1:]); fcntl.flock(a, fcntl.LOCK_EX); print(flush=True); time.sleep(600)"
    holder = subprocess.Popen([PYTHON, "-c", hold, state / "lock", log], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        done = collected(project, days=14)
        assert (done.went["states"], done.went["logs"]) == ([], [("services/old.log", 1)])
    finally:
        holder.kill()
        holder.communicate()
    assert collected(project, days=14).went["states"] == [("0123456789abcdef", 2)]
    collected(project)
    assert branches(project) == ["runs/looked-at"]
