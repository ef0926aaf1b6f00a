"""A source that changes: what DVC, which knows its parameters alone, would not notice."""

import json
import os
import shutil
import time

import pytest

from pipelines import download
from pipelines.data import looks
from pipelines.data.looks import look_at_path
from pipelines.data.sources import split_place
from pipelines.params import merge_parameters
from pipelines.workspace.freshness import reproduce_download
from tests.projects import quick_project
from tests.running import ROOT, call


@pytest.fixture(scope="module")
def project(drawn, tmp_path_factory):
    """A small project whose data are those of its folder `set`. Tests in this module use it in turn."""
    project = quick_project(tmp_path_factory.mktemp("fresh"), "download.source=set")
    shutil.copytree(drawn, project / "set", copy_function=shutil.copyfile)
    settle(project / "set")
    return project


def settle(place):
    """Waits until what is written next to a file, or to those in a folder, has another time."""
    paths = [path for path in (place, *place.rglob("*")) if path.is_file()]
    while time.time_ns() - max(path.stat().st_ctime_ns for path in paths) < looks.FINE:
        pass


def taken(project):
    """The outcome of the stage, what was said of the source, and whether the data are those of the source."""
    lines = []
    outcome = reproduce_download(project, lines.append)
    same = (project / "data/coco/instances_train.json").read_bytes() == (
        project / "set/instances_train.json"
    ).read_bytes()
    return outcome, [line for line in lines if line.startswith(("source: ", "warning: "))], same


def rewrite(project, name, description):
    """Writes the same JSON with another description; of equal lengths they give equal sizes."""
    path = project / "set" / name
    document = json.loads(path.read_text(encoding="utf-8")) | {"info": {"description": description}}
    path.write_text(json.dumps(document), encoding="utf-8")
    settle(path)
    return path


def test_the_same_command_takes_a_source_as_it_is_now(project, warm_python):
    outcome, (line,), same = taken(project)
    assert (outcome, same) == ("ran", True)
    assert line.startswith("source: set (")
    assert line.endswith("looked at for the first time")
    outcome, (line,), _ = taken(project)
    assert outcome == "unchanged"
    assert ", unchanged since it was taken on 2" in line

    path = rewrite(project, "instances_train.json", "mended")
    outcome, (line,), same = taken(project)
    assert (outcome, same) == ("ran", True)
    assert line.endswith(", and taken again: train_annotations")

    before = path.stat()
    rewrite(project, "instances_train.json", "MENDED")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    settle(path)
    outcome, (line,), same = taken(project)
    assert (outcome, same) == ("ran", True)
    assert line.endswith(", and taken again: train_annotations")


def test_what_dvc_has_of_another_time_is_not_what_is_used(project, warm_python):
    for description in ("one", "two"):
        rewrite(project, "instances_train.json", description)
        assert taken(project)[2]
    call(project, "git", "rm", "--quiet", "--cached", "--ignore-unmatch", "dvc.lock")
    (project / "dvc.lock").unlink()
    lines = taken(project)
    assert lines[2], lines


def test_a_source_that_is_gone_leaves_what_was_taken_of_it(project, warm_python):
    assert taken(project)[2]
    (project / "set").rename(project / "gone")
    lines = []
    assert reproduce_download(project, lines.append) == "unchanged"
    assert lines[-1].startswith("warning: the source cannot be looked at, so its data is what was taken before: down")
    (project / "gone").rename(project / "set")


def test_a_repro_by_hand_leaves_a_record_by_which_the_registration_warns(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    document = merge_parameters(ROOT, None, [f"download.source={source}"])
    (tmp_path / "params.yaml").write_text(json.dumps(document), encoding="utf-8")
    settle(source)
    download.main()
    capsys.readouterr()
    looks.warn_of_other_source(tmp_path)
    assert capsys.readouterr().err == ""
    (source / "instances_val.json").touch()
    looks.warn_of_other_source(tmp_path)
    assert "warning: the source of the data has changed since 2" in capsys.readouterr().err


def unpack(source):
    shutil.unpack_archive(source / "train.zip", source / "train")
    settle(source)
    return source / "train"


@pytest.mark.parametrize(
    "change",
    [
        lambda picture, other: picture.unlink(),
        lambda picture, other: picture.rename(picture.with_name("renamed.jpg")),
        lambda picture, other: shutil.copy2(picture, picture.with_name("more.jpg")),
        lambda picture, other: os.replace(shutil.copy2(picture, picture.with_name("new.txt")), picture),
        lambda picture, other: (picture.unlink(), picture.symlink_to(other)),
        lambda picture, other: shutil.copystat(other, picture) or picture.write_bytes(picture.read_bytes()),
    ],
    ids=["removed", "renamed", "added", "replaced with its time", "made a link", "written anew"],
)
def test_every_change_in_a_folder_of_pictures_shows(source, change):
    folder = unpack(source)
    before = {"x": look_at_path(folder)}
    assert looks.is_as_it_was(before, {"x": look_at_path(folder)})
    change(*sorted(path for path in folder.rglob("*.*") if path.is_file())[:2])
    assert not looks.is_as_it_was(before, {"x": look_at_path(folder)})


def test_a_file_of_just_now_is_looked_at_again(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(b"a")
    assert look_at_path(path)[looks.EXACT] != look_at_path(path)[looks.EXACT]


@pytest.mark.parametrize(
    ("place", "parts"),
    [
        ("set", ("set", "")),
        ("set #2", ("set #2", "")),
        ("C#3", ("C#3", "")),
        ("a.zip#inside/x.json", ("a.zip", "inside/x.json")),
        ("a#b.zip", ("a#b.zip", "")),
        ("a#b.zip#x#y", ("a#b.zip", "x#y")),
        ("a.zip#", ("a.zip", "")),
        ("missing.zip#x", ("missing.zip", "x")),
        ("missing #2", ("missing #2", "")),
        ("https://host/a.zip#x", ("https://host/a.zip", "x")),
    ],
)
def test_a_number_sign_is_part_of_what_exists_and_else_leads_into_a_zip(tmp_path, place, parts):
    for name in ("set", "set #2", "C#3"):
        (tmp_path / name).mkdir()
    for name in ("a.zip", "a#b.zip"):
        (tmp_path / name).touch()
    assert split_place(place, tmp_path) == parts
