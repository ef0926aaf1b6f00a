"""What of a version's lineage comes from git and files: the diff under people's settings, failures of git, digests."""

import os
import shutil
from pathlib import Path

import pytest

from pipelines.registry import lineage
from pipelines.registry.lineage import describe_validation, git_diff, read_commit, val_digest
from pipelines.workspace.git import git
from pipelines.workspace.worktree import apply
from tests.running import call, have_settings

SETTINGS = (
    "apply.ignoreWhitespace=change", "apply.whitespace=error", "color.diff=always", "color.ui=always", "core.autocrlf=true",
    "core.quotePath=true", "core.safecrlf=true", "core.whitespace=tab-in-indent", "diff.algorithm=patience", "diff.context=0",
    "diff.external=echo", "diff.ignoreSubmodules=all", "diff.interHunkContext=9", "diff.mnemonicPrefix=true",
    "diff.noprefix=true", "diff.orderFile=/nowhere", "diff.relative=true", "diff.renames=copies", "diff.srcPrefix=x/",
    "diff.submodule=log", "diff.suppressBlankEmpty=true", "diff.wordRegex=.", "status.showUntrackedFiles=no",
)  # fmt: skip
FILES = {
    "detr/loss.py": b"old = 1\n\n\nmore = 2\n   \nlast = 3",
    "detr/dos.py": b"old = 1\r\nmore = 2\r\n",
    "detr/moved.py": b"".join(b"line = %d\n" % k for k in range(20)),
    "presets/bytes.yaml": b"\0\xff\n",
    "params.yaml": b"a: 1\n",
    "dvc.lock": b"old\n",
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A clone with a change of every kind; it is the directory of the test."""
    root = tmp_path / "project"
    for name, content in FILES.items():
        write(root / name, content)
    (root / ".gitattributes").write_text("* -text\n", encoding="utf-8")
    call(root, "git", "init", "--quiet", "--initial-branch=main")
    call(root, "git", "add", "--all")
    call(root, "git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-m", "start")
    write(root / "detr/loss.py", b"new = 1\n\n\nmore = 2\t \n   \nlast = 3\n# added  ")
    write(root / "detr/dos.py", b"new = 1\r\nmore = 2\n")
    (root / "detr/moved.py").rename(root / "detr/ümoved there.py")
    write(root / "presets/bytes.yaml", b"\0\xfe\n")
    write(root / "new.py", b"new = 1\n")
    write(root / "notes.txt", b"no code\n")
    write(root / "dvc.lock", b"new\n")
    monkeypatch.chdir(root)
    return root


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def assert_it_applies(root, diff, folder):
    """To HEAD, as `reproduce` does."""
    (folder / "git.diff").write_bytes(diff.encode(errors="surrogateescape"))
    place = folder / "place"
    git(root, "worktree", "add", "--quiet", "--detach", str(place), "HEAD")
    apply(place, folder / "git.diff", ("dvc.lock",))
    code = ("detr/loss.py", "detr/dos.py", "detr/ümoved there.py", "presets/bytes.yaml", "new.py", "params.yaml")
    assert {name: (place / name).read_bytes() for name in code} == {name: (root / name).read_bytes() for name in code}
    assert not (place / "detr/moved.py").exists()
    assert not (place / "notes.txt").exists()
    assert (place / "dvc.lock").read_bytes() == b"old\n"


def test_the_diff_is_the_same_and_applies_under_every_setting(project, tmp_path, monkeypatch):
    plain = git_diff()
    for setting in SETTINGS:
        have_settings(monkeypatch, setting)
        assert git_diff() == plain, setting
    have_settings(monkeypatch, *SETTINGS)
    assert_it_applies(project, plain, tmp_path)


def test_the_diff_applies_with_external_tools_filters_and_a_callers_variables(project, tmp_path, monkeypatch):
    plain = git_diff()
    (project / ".git/info/attributes").write_text("*.py diff=shown\n", encoding="utf-8")
    call(project, "git", "config", "diff.shown.textconv", "cat -n")
    call(project, "git", "config", "diff.shown.command", "echo")
    hostile = {
        "GIT_EXTERNAL_DIFF": "echo",
        "GIT_DIFF_OPTS": "--unified=0",
        "GIT_DIR": str(tmp_path / "nowhere"),
        "GIT_INDEX_FILE": str(tmp_path / "no-index"),
        "GIT_LITERAL_PATHSPECS": "1",
        "GIT_WORK_TREE": str(tmp_path),
        "LC_ALL": "de_DE.UTF-8",
    }
    for name, value in hostile.items():
        monkeypatch.setenv(name, value)
    assert git_diff() == plain
    assert_it_applies(project, plain, tmp_path)


def test_the_diff_has_what_a_person_has_hidden_and_no_deletion_of_what_is_not_checked_out(project, tmp_path):
    call(project, "git", "update-index", "--assume-unchanged", "detr/loss.py", "params.yaml")
    write(project / "params.yaml", b"a: 2\n")
    assert "+a: 2" in git_diff()
    assert_it_applies(project, git_diff(), tmp_path)
    call(project, "git", "checkout", "--quiet", "-f", "main")
    call(project, "git", "sparse-checkout", "set", "--no-cone", "/detr/", "/params.yaml")
    assert not (project / "dvc.lock").exists()
    assert "deleted file" not in git_diff()


def test_nothing_of_the_repository_changes(project):
    def state():
        objects = sorted(path for path in (project / ".git").rglob("*") if path.is_file())
        return objects, (project / ".git/index").read_bytes(), call(project, "git", "status", "--porcelain")

    state()  # which refreshes the index
    before = state()
    assert lineage.ask_git()[0]["git_dirty"] == "true"
    assert state() == before


def test_a_diff_that_git_cannot_apply_is_a_failure(project, monkeypatch):
    monkeypatch.setattr("pipelines.registry.lineage.PLAIN", ("--patch", "--no-prefix"))
    with pytest.raises(ValueError, match="git apply --cached"):
        git_diff()


def refusals(folder):
    broken = folder / "broken"
    broken.write_text("[core\n", encoding="utf-8")
    empty = folder / "empty"
    empty.mkdir()
    return {
        "owner": ({"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}, "git config --global --add safe.directory"),
        "setting": ({"GIT_CONFIG_GLOBAL": str(broken)}, "bad config"),
        "no git": ({"PATH": str(empty)}, "install git"),
    }


@pytest.mark.parametrize("kind", ["owner", "setting", "no git"])
def test_what_git_refuses_is_said_and_unknown(project, kind, tmp_path, monkeypatch, capsys):
    env, words = refusals(tmp_path)[kind]
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    tags, diff = lineage.ask_git()
    assert {tags[f"git_{name}"] for name in ("commit", "branch", "dirty")} == {"unknown"}
    assert diff == ""
    assert words in tags["git_failure"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the version's lineage says unknown, ")
    assert words in line
    assert read_commit(tags) is None


def test_outside_of_git_the_lineage_is_unknown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tags, _ = lineage.ask_git()
    assert (tags["git_commit"], tags["git_dirty"]) == ("unknown", "unknown")
    assert "not a git repository" in tags["git_failure"]
    with pytest.raises(ValueError, match="not a git repository"):
        git_diff()
    assert read_commit({"git_commit": "none"}) is None
    assert read_commit({"git_commit": "f" * 40}) == "f" * 40


def test_a_clean_clone_is_clean_and_has_no_diff(project):
    call(project, "git", "checkout", "--quiet", "-f", "main")
    call(project, "git", "clean", "--quiet", "-fd")
    for leaving in (".venv", "dvc_plots", "mlruns"):  # a link, of DVC, of MLflow
        os.symlink("/nowhere", project / leaving)
    shutil.copy(Path(__file__).parents[2] / ".gitignore", project)
    call(project, "git", "add", ".gitignore")
    call(project, "git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-m", "ignored")
    tags, diff = lineage.ask_git()
    assert (tags["git_branch"], tags["git_dirty"], diff) == ("main", "false", "")


@pytest.mark.parametrize(
    ("outcomes", "text"),
    [
        ([], "0 of 0 hold, 0 warnings"),
        (["holds"] * 75, "75 of 75 hold, 0 warnings"),
        (["holds", "warning"], "1 of 2 hold, 1 warning"),
    ],
)
def test_the_validation_in_words(outcomes, text):
    assert describe_validation([{"outcome": outcome} for outcome in outcomes]) == text


def test_the_digest_of_the_validation_data_is_that_of_its_files(drawn, tmp_path):
    one, two = (Path(shutil.copytree(drawn, tmp_path / name)) for name in ("one", "two"))
    (two / "instances_train.json").write_text("{}", encoding="utf-8")
    assert val_digest(one) == val_digest(two)
    with (two / "val.zip").open("ab") as file:
        file.write(b"x")
    assert val_digest(one) != val_digest(two)


def test_the_digest_of_the_validation_data_is_that_of_the_archive_where_a_folder_lies_beside_it(drawn, tmp_path):
    data = shutil.copytree(drawn, tmp_path / "data")
    before = val_digest(data)
    write(data / "val/other.jpg", b"not read by evaluation")
    assert val_digest(data) == before
