"""Versions of the data with real DVC and git: one copy on the disk, remotes, the history and its differences."""

import hashlib
import json
import shutil
import zipfile
from importlib.util import find_spec

import pytest

from pipelines.data.layout import FILES
from pipelines.data.versions import read_version
from tests.projects import commit, reference, small_project
from tests.running import call

MADE = (
    "artifacts/evaluate/detections.json",
    "artifacts/train/history.jsonl",
    "artifacts/train/model.safetensors",
    "artifacts/validate/passed.json",
    "data/coco/train.zip",
    "data/coco/instances_train.json",
)


def pipelines(folder, *arguments, code=0):
    return call(folder, "python", "-m", "pipelines", *arguments, code=code)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def objects(folder):
    """The names and MD5s of the files in the DVC cache of a project."""
    cache = folder / ".dvc/cache/files/md5"
    return {path.parent.name + path.name.removesuffix(".dir"): md5(path) for path in cache.glob("??/*")}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A small project after one `dvc repro`, its lock committed. Tests in this module use it in turn."""
    folder = reference(tmp_path_factory.mktemp("project"))
    commit(folder, "data", "dvc.lock")
    return folder


def test_the_data_is_on_the_disk_once(project):
    if "reflink" in call(project, "dvc", "version").partition("Cache types:")[2].splitlines()[0]:
        pytest.skip("this file system shares blocks, which no file's number shows")
    for name in FILES:
        path = project / "data/coco" / name
        key = md5(path)
        assert path.samefile(project / ".dvc/cache/files/md5" / key[:2] / key[2:])


def test_another_clone_pulls_the_same_bytes_and_trains_nothing(project, tmp_path):
    """With symlinks, which are what is left where the cache lies on another file system."""
    call(project, "dvc", "remote", "add", "--default", "storage", str(tmp_path / "remote"))
    commit(project, "remote", ".dvc/config")
    call(project, "dvc", "push")
    clone = tmp_path / "clone"
    call(tmp_path, "git", "clone", "--quiet", str(project), str(clone))
    call(clone, "dvc", "config", "--local", "cache.type", "symlink")
    call(clone, "dvc", "pull")
    assert all((clone / name).is_symlink() for name in MADE)
    for name in MADE:
        assert (clone / name).read_bytes() == (project / name).read_bytes()
    assert json.loads(call(clone, "dvc", "status", "--json")) == {"register": ["always changed"]}
    said = call(clone, "dvc", "repro")
    for stage in ("download", "validate", "train", "evaluate"):
        assert f"Stage '{stage}' didn't change, skipping" in said
    assert "registered detr version 1 as champion" in said
    assert call(clone, "git", "status", "--porcelain") == ""


def test_stages_run_by_hand_leave_the_cache_alone(project):
    """Outputs are links to the cache: a stage that wrote into one would change what DVC keeps of another version."""
    before = objects(project)
    assert all(name == content for name, content in before.items())
    old = {name: md5(project / name) for name in MADE}
    params = project / "params.yaml"
    text = params.read_text(encoding="utf-8")
    for was, now in (("num_train: 48", "num_train: 40"), ("epochs: 2", "epochs: 1"), ("seed: 0", "seed: 1")):
        assert was in text
        text = text.replace(was, now)
    params.write_text(text, encoding="utf-8")
    for stage in ("download", "validate", "train", "evaluate", "register"):
        call(project, "python", "-m", f"pipelines.{stage}")
    assert objects(project) == before
    assert not [name for name in MADE if md5(project / name) == old[name]]
    outputs = [p for place in ("data/coco", "artifacts") for p in (project / place).rglob("*") if p.is_file()]
    assert not [path for path in outputs if path.is_symlink() or path.stat().st_nlink > 1]
    call(project, "git", "checkout", "params.yaml")
    call(project, "dvc", "checkout", "--force")
    assert json.loads(call(project, "dvc", "status", "--json")) == {"register": ["always changed"]}
    assert {name: md5(project / name) for name in MADE} == old


def test_the_digest_of_a_version_is_that_of_the_validated_data(project):
    (row,) = json.loads(pipelines(project, "data", "--json"))
    passed = json.loads((project / "artifacts/validate/passed.json").read_text(encoding="utf-8"))
    assert (row["digest"], row["problem"], row["current"]) == (passed["data"], None, True)
    assert f" {passed['data'][:12]} " in pipelines(project, "data")


def edit(folder, split, change):
    path = folder / f"instances_{split}.json"
    held = json.loads(path.read_text(encoding="utf-8"))
    change(held)
    path.write_text(json.dumps(held), encoding="utf-8")


def fewer(held):
    gone = held["images"].pop(0)["id"]
    held["annotations"] = [a for a in held["annotations"] if a["image_id"] != gone]


def moved(held):
    held["annotations"][0]["bbox"][2] -= 1
    held["categories"][0]["name"] = "oval"


@pytest.fixture(scope="module")
def history(drawn, tmp_path_factory):
    """A project whose data has changed twice and back: commits a, b, a again, and c that only the working tree has."""
    source = tmp_path_factory.mktemp("source") / "data"
    shutil.copytree(drawn, source)
    folder = small_project(tmp_path_factory.mktemp("history"), f"download.source={source}")
    kept = {"empty": call(folder, "git", "rev-parse", "--short", "HEAD").strip(), "source": source}

    def download(name, save=True):
        call(folder, "dvc", "repro", "--force", "--single-item", "download")
        kept[name] = {file: (folder / "data/coco" / file).read_bytes() for file in FILES}
        return commit(folder, name, "dvc.lock") if save else None

    kept["first"] = download("a")
    edit(source, "train", fewer)
    edit(source, "val", moved)
    with zipfile.ZipFile(drawn / "train.zip") as old, zipfile.ZipFile(source / "train.zip", "w") as new:
        for k, info in enumerate(old.infolist()):
            new.writestr(info, old.read(info) + b"!" * (k == 5))
    kept["second"] = download("b")
    shutil.copytree(drawn, source, dirs_exist_ok=True)
    kept["third"] = download("again")
    edit(source, "train", fewer)
    download("c", save=False)
    return folder, kept


def counts(data, split):
    return {kind: len(held) for kind, held in json.loads(data[f"instances_{split}.json"]).items() if kind != "info"}


def test_the_history_is_listed_newest_first_with_its_counts(history):
    folder, kept = history
    rows = json.loads(pipelines(folder, "data", "--json"))
    assert [row["commit"] for row in rows] == [None, kept["second"], kept["first"]]
    for row, name in zip(rows, ("c", "b", "a"), strict=True):
        for split in ("train", "val"):
            size = sum(len(kept[name][file]) for file in FILES if split in file)
            assert row[split] == counts(kept[name], split) | {"bytes": size}
        assert (row["problem"], row["digest"], row["current"]) == (None, None, name == "c")
    today = call(folder, "git", "log", "-1", "--format=%cs").strip()
    lines = pipelines(folder, "data").splitlines()
    assert lines[0].split() == ["commit", "date", "digest", "images", "annotations", "categories", "bytes"]
    assert lines[1].split()[:5] == ["*", "-", "-", "-", "23/12"]
    assert lines[3].split()[:4] == [kept["first"], today, "-", "24/12"]
    assert lines[-1] == "- is in no commit yet: git add dvc.lock && git commit"


def test_two_commits_are_compared(history):
    folder, kept = history
    found = json.loads(pipelines(folder, "data", kept["first"], "HEAD~1", "--json"))
    assert (found["old"]["commit"], found["new"]["commit"]) == (kept["first"], kept["second"])
    old, new = (json.loads(kept[name]["instances_train.json"]) for name in "ab")
    train, val = found["train"], found["val"]
    assert (train["images"]["removed"], train["images"]["added"]) == ([old["images"][0]["id"]], [])
    assert train["images"]["altered"] == [old["images"][5]["id"]]
    assert train["images"]["fields"] == {"file_name": 0, "size": 0, "picture": 1}
    gone = {a["id"] for a in old["annotations"]} - {a["id"] for a in new["annotations"]}
    assert set(train["annotations"]["removed"]) == gone
    (altered,) = val["annotations"]["altered"]
    assert altered == json.loads(kept["a"]["instances_val.json"])["annotations"][0]["id"]
    assert val["categories"]["names"] == [{"id": 3, "before": "ellipse", "after": "oval"}]


def test_a_commit_is_compared_with_the_working_tree(history):
    said = pipelines(history[0], "data", "HEAD").splitlines()
    assert said[0].endswith(" to the working tree")
    assert next(line.split() for line in said if line.startswith("images ")) == ["images", "24", "23", "0", "1", "0"]


@pytest.mark.parametrize("ref", ["nowhere", "-x", "--all", "^HEAD", "HEAD~1..HEAD", "HEAD:dvc.lock", ""])
def test_what_is_no_commit_is_refused(history, ref):
    said = pipelines(history[0], "data", "--", ref, code=1)
    assert said == f"error: {ref!r} is no commit here; list those with data: python -m pipelines data\n"


def test_a_commit_without_data_is_refused(history):
    folder, kept = history
    said = pipelines(folder, "data", kept["empty"], code=1)
    assert said == f"error: dvc.lock of {kept['empty']} names no data; run dvc repro and commit dvc.lock\n"


def test_a_project_that_has_never_run_says_so(tmp_path):
    said = pipelines(small_project(tmp_path), "data", code=1)
    assert (
        said == "error: no dvc.lock names any data, here or in a commit of this branch; run dvc repro and commit it\n"
    )


@pytest.fixture
def copied(history, tmp_path):
    """A copy of the history to break, without counts."""
    folder = tmp_path / "copy"
    shutil.copytree(history[0], folder, symlinks=True, ignore=shutil.ignore_patterns("scratch"))
    return folder


def test_old_versions_are_read_from_the_remote_of_today(history, copied):
    remote = copied.parent / "remote"
    call(copied, "dvc", "remote", "add", "--local", "--default", "storage", str(remote))
    call(copied, "dvc", "push", "--all-commits")
    (copied / ".dvc/config.local").unlink()
    call(copied, "dvc", "remote", "add", "--default", "storage", str(remote))
    shutil.rmtree(copied / ".dvc/cache/files")
    assert pipelines(copied, "data") == pipelines(history[0], "data")
    expected = pipelines(history[0], "data", "HEAD~2", "HEAD~1")
    assert pipelines(copied, "data", "HEAD~2", "HEAD~1") == expected
    shutil.rmtree(copied / "scratch")
    shutil.rmtree(remote)
    assert "nor in the remote storage; push it from where it is: dvc push --all-commits" in pipelines(copied, "data")
    call(copied, "dvc", "remote", "modify", "storage", "url", "gs://nowhere/data")
    if find_spec("dvc_gs") is None:
        said = pipelines(copied, "data", "HEAD~1", code=1)
        assert "cannot be read (remote: storage): gs is supported, but requires 'dvc-gs' to be installed" in said


def test_a_version_that_is_nowhere_is_listed_without_counts(history, copied):
    _, kept = history
    shutil.rmtree(copied / ".dvc/cache/files")
    lines = pipelines(copied, "data").splitlines()
    assert lines[1].split()[4:7] == ["23/12", *lines[1].split()[5:7]]
    assert lines[3].split()[3:6] == ["?/?", "?/?", "?/?"]
    hint = "is not in the DVC cache and there is no remote; add one: dvc remote add --default NAME URL"
    assert any(kept["first"] in line and line.endswith(hint) for line in lines)
    assert pipelines(copied, "data", "HEAD", code=1).endswith(f"{hint}\n")


def test_counts_are_kept_by_content(copied):
    first = pipelines(copied, "data")
    shutil.rmtree(copied / ".dvc/cache/files")
    assert pipelines(copied, "data") == first


def test_a_file_changed_by_hand_is_not_taken_for_what_the_lock_names(copied):
    path = copied / "data/coco/instances_train.json"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data + b" ")
    message = f"{path.relative_to(copied)} of the working tree is not what dvc.lock names; put it back: dvc checkout"
    assert f"? {message}" in pipelines(copied, "data")
    assert pipelines(copied, "data", "HEAD", code=1) == f"error: {message}\n"


@pytest.mark.parametrize("text", ["", "[", "stages: 3", "stages: {}", "stages: {download: {outs: [{path: a}]}}"])
def test_a_lock_without_data_names_none(text):
    assert read_version(text, "abc", "2026-01-01") is None
