"""Worktrees of runs, and what kills leave of them: real git, no servers."""

import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import psutil
import pytest
from dulwich.repo import Repo as DulwichRepo
from dvc.repo import Repo

from pipelines.params import read_yaml, to_yaml
from pipelines.surroundings import OF_A_CALLER
from pipelines.workspace import worktree
from pipelines.workspace.cache import collect_garbage, find_cache
from pipelines.workspace.git import STALE_SECONDS, fetch
from pipelines.workspace.processes import WORKTREE, start_group
from tests.projects import commit
from tests.running import ROOT, call, environment, have_settings

PARAMS = {
    "download": {"source": "shapes", "sha256": {}},
    "model": {"backbone_weights": "none"},
    "train": {"initial_weights": "none", "epochs": 1},
}
LOCK = "schema: '2.0'\nstages:\n  one:\n    cmd: 'true'\n"


@pytest.fixture
def root(tmp_path):
    """A clone with what a run needs of it."""
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").touch()
    (tmp_path / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n", encoding="utf-8")
    (tmp_path / ".gitignore").write_text("/scratch\n/artifacts\n", encoding="utf-8")
    (tmp_path / "params.yaml").write_text(to_yaml(PARAMS), encoding="utf-8")
    call(tmp_path, "git", "init", "--quiet", "--initial-branch=main")
    commit(tmp_path, "start", "--all")
    (tmp_path / "scratch").mkdir()
    return tmp_path


def epochs(number):
    def parameters(place):
        document = read_yaml(place / "params.yaml")
        document["train"]["epochs"] = number
        return document

    return parameters


def finish(place):
    """What the stages of a run leave that ended well."""
    (place / "dvc.lock").write_text(LOCK, encoding="utf-8")
    for name in ("evaluate/metrics.json", "register/version.json"):
        (place / "artifacts" / name).parent.mkdir(parents=True)
        (place / "artifacts" / name).write_text("{}", encoding="utf-8")


def killed(root, name="first", number=2, lock=LOCK):
    """The worktree of a run that was killed; its process leaves `lock`."""
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom pipelines import params\nfrom pipelines.workspace import worktree\n"
        "root, name, change, lock = Path(sys.argv[1]), *sys.argv[2:]\n"
        "with worktree.make_worktree(root, name, 'HEAD', lambda place: params.merge_parameters(place, None, [change])) as (place, _):\n"
        "    if lock:\n        (place / 'dvc.lock').write_text(lock)\n    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(root), name, f"train.epochs={number}", lock or ""], check=False, cwd=ROOT
    )
    assert done.returncode == -9
    return root / "scratch" / "worktrees" / name


def run(root, name="second", number=2, ref="HEAD"):
    """A run that ends well: its branch."""
    with worktree.make_worktree(root, name, ref, epochs(number)) as (place, branch):
        finish(place)
    return branch


def branches(root):
    return call(root, "git", "branch", "--list", "runs/*", "--format=%(refname:short)").split()


def assert_clean(root):
    assert call(root, "git", "worktree", "list").count("\n") == 1
    assert not list((root / "scratch/worktrees").glob("*"))
    assert not [path for path in (root / ".git").rglob("*.lock") if path.is_file()]
    assert call(root, "git", "status", "--porcelain") == ""
    assert call(root, "git", "log", "--format=%s", "main") == "start\n"


def test_a_run_that_ends_well_is_on_its_branch_and_one_that_fails_leaves_none(root):
    assert run(root) == "runs/second"
    assert (root / "scratch/runs/second/metrics.json").exists()
    assert call(root, "git", "show", "runs/second:dvc.lock") == LOCK
    with contextlib.suppress(InterruptedError), worktree.make_worktree(root, "third", "HEAD", epochs(3)) as (place, _):
        finish(place)  # but for the registration, before which results are kept
        raise InterruptedError
    assert branches(root) == ["runs/second"]
    assert_clean(root)


def test_a_branch_stays_for_a_run_whose_results_are_those_of_its_commit(root):
    call(root, "git", "switch", "--quiet", "--create", "other")
    (root / "dvc.lock").write_text(LOCK, encoding="utf-8")
    commit(root, "a lock", "--all")
    assert run(root, "same", 1) in branches(root)
    call(root, "git", "switch", "--quiet", "main")
    with (
        contextlib.suppress(InterruptedError),
        worktree.make_worktree(root, "killed", "other", epochs(1)) as (place, _),
    ):
        worktree.keep_results(place)  # before the registration, which names the commit
        raise InterruptedError
    assert branches(root) == ["runs/killed", "runs/same"]
    assert_clean(root)


def test_a_killed_run_is_taken_over_by_the_same_and_settled_by_another(root):
    left = killed(root)
    with worktree.make_worktree(root, "second", "HEAD", epochs(2)) as (place, branch):
        assert (place, branch) == (left, "runs/first")
        assert (place / "dvc.lock").read_text(encoding="utf-8") == LOCK
        finish(place)
    assert branches(root) == ["runs/first"]
    worktree.keep_results(killed(root, "third", 3))
    (root / "scratch/worktrees/third/dvc.lock").write_text(LOCK + "  two:\n    cmd: 'false'\n", encoding="utf-8")
    killed(root, "fourth", 4)
    assert run(root, "fifth", 5) == "runs/fifth"
    assert branches(root) == ["runs/fifth", "runs/first", "runs/third"]
    assert call(root, "git", "show", "runs/third:dvc.lock").startswith(f"{LOCK}  two:")
    assert_clean(root)


@pytest.mark.parametrize("lock", ["", "schema: '2.0'\nstages:\n  one:\n", LOCK + "    outs:\n    - pa", "schema: '2"])
def test_a_torn_lock_is_not_taken_and_not_committed(root, lock):
    left = killed(root)
    worktree.keep_results(left)
    (left / "dvc.lock").write_text(lock, encoding="utf-8")
    with worktree.make_worktree(root, "second", "HEAD", epochs(2)) as (place, _):
        assert (place / "dvc.lock").read_text(encoding="utf-8") == LOCK
        finish(place)
    left = killed(root, "third", 3, lock)
    run(root, "fourth", 4)
    assert branches(root) == ["runs/first", "runs/fourth"]
    assert_clean(root)


def test_locks_of_killed_processes_are_removed(root):
    left, own = killed(root), root / ".git/worktrees/first"
    old = [root / ".git/packed-refs.lock", root / ".git/config.lock", root / ".git/refs/heads/main.lock"]
    for lock in (*old, own / "index.lock", own / "HEAD.lock", root / ".git/refs/heads/runs/first.lock"):
        lock.touch()
        os.utime(lock, (0, time.time() - STALE_SECONDS))
    (left / ".dvc/tmp").mkdir()
    (left / ".dvc/tmp/rwlock").write_text("{", encoding="utf-8")
    (left / ".dvc/config.local").write_text("[cach", encoding="utf-8")
    assert run(root) == "runs/first"
    assert_clean(root)


def test_a_lock_of_a_living_process_is_waited_for(root):
    lock = root / ".git/packed-refs.lock"
    lock.touch()
    other = subprocess.Popen(["sh", "-c", f"sleep 2; rm {lock}"])
    assert run(root) == "runs/second"
    assert other.wait() == 0
    assert_clean(root)


@pytest.mark.parametrize("moment", ["locked", "no .git", "no dvc.lock", "on no branch", "no commit", "no index"])
def test_a_worktree_that_was_being_made_or_removed_is_removed(root, moment):
    left, own = killed(root, number=3), root / ".git/worktrees/first"
    worktree.keep_results(left)
    if moment == "locked":
        (own / "locked").write_text("initializing", encoding="utf-8")
        (own / "index.lock").touch()
    elif moment == "no .git":
        (left / ".git").unlink()
        (left / "params.yaml").unlink()
    elif moment == "no dvc.lock":
        (left / "dvc.lock").unlink()
    elif moment == "on no branch":
        call(left, "git", "switch", "--quiet", "--detach")
    elif moment == "no commit":
        call(left, "git", "reset", "--quiet", "--soft", "main")
    else:
        (own / "index").unlink()
    assert run(root) == "runs/second"
    if moment == "no commit":
        assert "runs/second" in branches(root)
    else:
        assert branches(root) == ["runs/first", "runs/second"]
        assert call(root, "git", "show", "runs/first:dvc.lock") == LOCK
    assert_clean(root)


def test_what_a_killed_run_had_started_is_ended(root):
    left = killed(root)
    orphan = subprocess.Popen(["sleep", "600"], env=environment(**{WORKTREE: str(left)}))
    assert run(root) == "runs/first"
    assert not psutil.pid_exists(orphan.pid)
    orphan.wait()


@pytest.mark.parametrize("name", ["../out", "a/b", "-f", "", "a b", "a..b", ".hidden", "x\n", "$(touch x)"])
def test_a_hostile_name_is_refused(root, name):
    with pytest.raises(ValueError, match="names no run"), worktree.make_worktree(root, name, "HEAD", epochs(1)):
        pass
    assert_clean(root)


@pytest.mark.parametrize("ref", ["nowhere", "--help", "HEAD;touch x", "main:params.yaml", "^main"])
def test_a_hostile_or_unknown_ref_is_refused(root, ref):
    with pytest.raises(ValueError, match="is no commit, branch or tag here"):
        run(root, ref=ref)
    assert_clean(root)


def test_its_caches_are_removed_with_it(root):
    """DVC keeps some for every directory that it has worked in, in a folder of the machine."""
    with worktree.make_worktree(root, "first", "HEAD", epochs(2)) as (place, _):
        call(place, "dvc", "status")
        with Repo(place) as repo:
            caches = Path(repo.site_cache_dir)
        assert caches.is_relative_to(root / ".git/worktrees/first")
        assert list(caches.iterdir())
        finish(place)
    assert not (root / ".git/worktrees").exists()


def test_dvc_can_read_the_index_of_a_worktree_whatever_kind_a_person_has(root):
    for name, value in (("core.splitIndex", "true"), ("index.skipHash", "true"), ("splitIndex.maxPercentChange", "0")):
        call(root, "git", "config", name, value)
    call(root, "git", "update-index", "--split-index")
    with worktree.make_worktree(root, "first", "HEAD", epochs(1)) as (place, _):
        assert {".dvc/config", "params.yaml"} <= {name.decode() for name in DulwichRepo(str(place)).open_index()}
        finish(place)


def test_a_persons_hooks_do_not_run(root):
    """Those that `dvc install` makes fail where a commit's data is not in the cache."""
    for name in ("post-checkout", "pre-commit", "prepare-commit-msg", "commit-msg", "post-commit"):
        hook = root / ".git/hooks" / name
        hook.write_text("#!/bin/sh\necho ran >> scratch/hooks\nexit 1\n", encoding="utf-8")
        hook.chmod(0o755)
    with pytest.raises(AssertionError):
        call(root, "git", "switch", "--create", "by-hand")
    assert (root / "scratch/hooks").read_text(encoding="utf-8") == "ran\n"
    with worktree.make_worktree(root, "a", "HEAD", epochs(2)) as (place, branch):
        finish(place)
    assert branch == "runs/a"
    assert (root / "scratch/hooks").read_text(encoding="utf-8") == "ran\n"


SETTINGS = (  # of a person or of a company, for every clone
    "i18n.logOutputEncoding=UTF-16", "i18n.commitEncoding=UTF-16", "column.ui=always", "color.ui=always", "log.decorate=full",
    "log.showSignature=true", "format.pretty=raw", "status.short=true", "status.branch=true", "branch.sort=-committerdate",
    "commit.gpgSign=true", "gpg.program=/nowhere", "commit.verbose=true", "commit.template=/nowhere", "core.editor=false",
    "core.pager=false", "core.fsmonitor=true", "feature.manyFiles=true", "index.sparse=true", "worktree.guessRemote=true",
    "branch.autoSetupMerge=always", "user.useConfigOnly=true", "author.name=", "core.autocrlf=true", "core.eol=crlf",
    "core.logAllRefUpdates=false", "submodule.recurse=true", "commit.cleanup=scissors", "core.commentChar=P",
)  # fmt: skip


def test_no_setting_and_no_tag_of_a_person_loses_results(root, monkeypatch, tmp_path_factory):
    excludes = tmp_path_factory.mktemp("home") / "ignore"
    excludes.write_text("*.lock\n*.yaml\n", encoding="utf-8")
    monkeypatch.setenv("GIT_AUTHOR_NAME", "")
    have_settings(monkeypatch, *SETTINGS, f"core.excludesFile={excludes}")
    call(root, "git", "tag", "runs/second")  # which git takes for what is called so, before a branch
    assert run(root) == "runs/second"
    monkeypatch.undo()
    assert call(root, "git", "show", "heads/runs/second:dvc.lock") == LOCK
    assert (
        call(root, "git", "log", "-2", "--format=%s", "heads/runs/second").splitlines()[1] == "Parameters of run second"
    )
    assert_clean(root)


def test_a_remote_that_does_not_answer_is_an_error_and_leaves_no_process(root, monkeypatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x.git"
        call(root, "git", "remote", "add", "origin", url)
        with pytest.raises(ValueError, match="git fetch .* did not end within 2 seconds"):
            fetch(root, "origin/main", seconds=2)
        speakers = [one for one in psutil.process_iter(["cmdline"]) if url in (one.info["cmdline"] or [])]
        assert not psutil.wait_procs(speakers, timeout=10)[1]  # a killed one may not have ended yet


def test_fetches_take_turns(root, tmp_path_factory):
    far = tmp_path_factory.mktemp("far")
    call(far, "git", "clone", "--quiet", "--bare", str(root), "far.git")
    call(root, "git", "remote", "add", "origin", str(far / "far.git"))
    code = "import sys; from pathlib import Path; from pipelines.workspace.git import fetch; fetch(Path(sys.argv[1]), 'origin/main')"
    command = [sys.executable, "-c", code, str(root)]
    with (root / "scratch/fetch.lock").open("a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        both = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
        time.sleep(2)
        assert [one.poll() for one in both] == [None, None]
    assert [one.wait(60) for one in both] == [0, 0]
    assert call(root, "git", "rev-parse", "origin/main") == call(root, "git", "rev-parse", "main")


@pytest.mark.parametrize("level", ["local", "global"])
def test_the_cache_is_that_of_the_clone_wherever_it_was_set(root, level, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("settings")))
    shared = tmp_path_factory.mktemp("cache")
    asked = str(shared) if level == "global" else os.path.relpath(shared, root)
    call(root, "dvc", "cache", "dir", f"--{level}", asked, XDG_CONFIG_HOME=os.environ["XDG_CONFIG_HOME"])
    with worktree.make_worktree(root, "a", "HEAD", epochs(2)) as (place, _):
        said = call(place, "dvc", "cache", "dir", XDG_CONFIG_HOME=os.environ["XDG_CONFIG_HOME"])
        assert said.strip() == str(shared) == str(find_cache(root))
        finish(place)


def test_a_clone_can_move_with_what_a_killed_run_has_left_and_scratch_can_be_a_link(root, tmp_path_factory):
    away = tmp_path_factory.mktemp("away")
    shutil.rmtree(root / "scratch")
    (away / "scratch").mkdir()
    (root / "scratch").symlink_to(away / "scratch")
    killed(root)
    moved = Path(shutil.move(root, away / "moved"))
    assert run(moved) == "runs/first"
    assert_clean(moved)


def test_a_clone_in_a_folder_of_any_name_shares_its_cache_and_collects_it(root, tmp_path_factory):
    moved = Path(shutil.move(root, tmp_path_factory.mktemp("away") / 'größe 行人, it\'s #1 of $HOME\n "100%"'))
    with worktree.make_worktree(moved, "a", "HEAD", epochs(2)) as (place, _):
        assert find_cache(place) == moved / ".dvc/cache"
        finish(place)
    (moved / ".dvc/cache/files/md5/00").mkdir(parents=True)
    (moved / ".dvc/cache/files/md5/00/11").write_text("of nobody", encoding="utf-8")
    (moved / "dvc.yaml").write_text("stages: {}", encoding="utf-8")
    assert collect_garbage(moved, {"one": LOCK}, print) == len("of nobody")


def test_a_folder_that_git_makes_no_worktree_of_is_refused_in_a_line(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for place in (root / "inside", other / "new", other / "damaged"):
        place.mkdir()
    call(other / "damaged", "git", "init", "--quiet", "--initial-branch=main")
    (other / "damaged/.git/refs/heads/main").write_text(f"{'1' * 40}\n", encoding="utf-8")
    call(other / "new", "git", "init", "--quiet")
    add = ("-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(root), "sub")
    call(other / "new", "git", *add)
    for place, said in (
        (other, "a run in a worktree needs git: .*not a git repository.*; clone the project with git"),
        (root / "inside", f"is a folder of the repository {root}"),
        (other / "new", "has no commit yet"),
        (other / "damaged", r"git rev-parse --verify HEAD\^{commit} failed in .*/damaged: "),
        (other / "new/sub", f"is a submodule of {other}/new"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            run(place)
        assert "\n" not in str(caught.value)
        assert not (place / "scratch").exists()


def test_what_a_git_that_calls_us_says_reaches_no_git_of_ours(root, monkeypatch):
    call(root, "git", "worktree", "add", "--quiet", "-b", "mine", str(root / "scratch/mine"))
    linked = root / "scratch/mine"
    (linked / "staged").write_text("staged, not committed", encoding="utf-8")
    call(linked, "git", "add", "staged")
    own = call(linked, "git", "rev-parse", "--absolute-git-dir").strip()
    for name, value in (("DIR", own), ("INDEX_FILE", f"{own}/index"), ("WORK_TREE", str(linked)), ("PREFIX", "x/")):
        monkeypatch.setenv(f"GIT_{name}", value)
    with worktree.make_worktree(linked, "a", "HEAD", epochs(2)) as (place, _):
        with start_group(["env"], place, deque(), {}) as process:
            assert process.stdout is not None
            assert not {line.partition("=")[0] for line in process.stdout} & OF_A_CALLER
        finish(place)
    monkeypatch.undo()
    assert call(linked, "git", "branch", "--show-current").strip() == "mine"
    assert call(linked, "git", "status", "--porcelain", "staged").strip() == "A  staged"
    assert call(root, "git", "log", "--format=%s", "mine") == "start\n"
