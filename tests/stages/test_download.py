"""The stage that downloads, as a process: killed, twice at once, on disks that are too small or not its own."""

import json
import os
import subprocess
import time
from dataclasses import asdict

import pytest

from pipelines.params import merge_parameters, to_yaml
from tests.bad_line import Answer
from tests.downloads import coco_site, same, urls
from tests.running import ROOT, environment

STAGE = ("python", "-m", "pipelines.download")


@pytest.fixture
def site(source):
    with coco_site(source) as site:
        yield site


def stage_in(folder, source=None):
    """A folder in which the stage can run as it is, by default on drawn scenes. It is quick to import."""
    overrides = [f"download.source={json.dumps(asdict(source))}"] if source else []
    folder.mkdir(exist_ok=True)
    (folder / "params.yaml").write_text(to_yaml(merge_parameters(ROOT, None, overrides)), encoding="utf-8")
    return {"cwd": folder, "env": environment(cold=True, PYTHONPATH=str(ROOT)), "text": True}


def run_stage_in(folder, prefix=(), source=None):
    return subprocess.run([*prefix, *STAGE], **stage_in(folder, source), capture_output=True, check=False)


def test_a_run_that_was_killed_is_gone_on_from(site, source, tmp_path):
    """What the server is asked for shows that no byte comes twice."""
    site.plan("/train.zip", Answer(cut=1000, ending="stall"), Answer())
    with subprocess.Popen(STAGE, **stage_in(tmp_path / "run", urls(site.base)), stderr=subprocess.DEVNULL) as stage:
        try:
            wait_for(lambda: 1000 in [p.stat().st_size for p in (tmp_path / "run" / "scratch").rglob("*.part")])
        finally:
            stage.kill()
    assert not list((tmp_path / "run" / "data" / "coco").iterdir())
    done = run_stage_in(tmp_path / "run", source=urls(site.base))
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "run" / "data" / "coco", source)
    assert site.ranges("/train.zip") == [None, "bytes=1000-"]


def wait_for(condition):
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_runs_at_once_do_not_write_one_file(site, source, tmp_path):
    """In worktrees that share scratch/, as those of retraining do. The second gets all when the first is done."""
    (tmp_path / "scratch").mkdir()
    for name in ("one", "two"):
        stage_in(tmp_path / name)
        (tmp_path / name / "scratch").symlink_to(tmp_path / "scratch")
    site.plan("/train.zip", Answer(cut=5000, ending="stall"), Answer())
    piped = {"stderr": subprocess.PIPE}
    with subprocess.Popen(STAGE, **stage_in(tmp_path / "one", urls(site.base)), **piped) as one:
        wait_for(lambda: site.ranges("/train.zip"))
        with subprocess.Popen(STAGE, **stage_in(tmp_path / "two", urls(site.base)), **piped) as two:
            assert "is fetching http://127.0.0.1" in two.stderr.readline()
            site.going_on.set()
            for run in (one, two):
                assert (run.communicate(timeout=600), run.returncode)[1] == 0
    assert same(tmp_path / "one" / "data" / "coco", source)
    assert same(tmp_path / "two" / "data" / "coco", source)
    assert site.ranges("/train.zip") == [None, "bytes=5000-", None]


@pytest.mark.parametrize(("small", "folder"), [("scratch", "scratch/downloads"), ("data", "data/coco")])
def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(site, tmp_path, small, folder):
    """On a real file system of 64 kB, mounted in a namespace of its own."""
    (tmp_path / small).mkdir()
    mount = f'mount -t tmpfs -o size=64k none {small}; "$@"'
    done = run_stage_in(tmp_path, ["unshare", "-rm", "sh", "-ec", mount, "sh"], urls(site.base))
    assert done.returncode == 1
    assert f"error: {folder} needs " in done.stderr
    free = "53.2kB" if small == "scratch" else "65.5kB"  # a lock of each file that is fetched lies in scratch
    assert f"{free} are free there; make room and run again" in done.stderr
    assert {method for method, *_ in site.asked} == {"HEAD"}


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """On a real file system of 200 kB, mounted in a namespace of its own."""
    (tmp_path / "data").mkdir()
    done = run_stage_in(
        tmp_path, ["unshare", "-rm", "sh", "-ec", 'mount -t tmpfs -o size=200k none data; "$@"; ls -RA data', "sh"]
    )
    assert done.returncode != 0
    assert "error: the disk is full at" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_without_permission_is_one_line(tmp_path):
    """As a user without rights: root may write anywhere."""
    (tmp_path / "data").mkdir(mode=0o555)
    prefix = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    done = run_stage_in(tmp_path, prefix)
    assert done.returncode == 1
    assert "error: no permission for data/" in done.stderr
    assert "Traceback" not in done.stderr
