"""A download takes what a folder or files hold, packs it as the stages read it, and names what cannot be meant."""

import hashlib
import json
import os
import re
import zipfile
from dataclasses import replace

import pytest

import pipelines.download
from pipelines.data.layout import FILES
from pipelines.data.sources import FileSources, pictures_in, require_files, sources_in
from pipelines.download import DownloadParams
from pipelines.params import from_document, merge_parameters
from tests.downloads import fetch, unpacked
from tests.projects import SHAPES
from tests.running import ROOT


def test_shapes_give_the_four_files_and_nothing_else(drawn, tmp_path):
    fetch("shapes", tmp_path / "coco")
    assert sorted(p.name for p in (tmp_path / "coco").iterdir()) == sorted(FILES)
    assert (tmp_path / "coco" / "train.zip").read_bytes() == (drawn / "train.zip").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["coco"]


def test_a_folder_of_zips_is_taken_as_it_is(drawn, tmp_path):
    fetch(str(drawn), tmp_path / "coco")
    for name in FILES:
        assert (tmp_path / "coco" / name).read_bytes() == (drawn / name).read_bytes()


def test_a_folder_of_pictures_is_packed_stored_and_the_same_each_time(source, tmp_path):
    for split in ("train", "val"):
        with zipfile.ZipFile(source / f"{split}.zip") as archive:
            archive.extractall(source / split)
        (source / f"{split}.zip").unlink()
    fetch(str(source), tmp_path / "one")
    os.utime(source / "train")
    fetch(str(source), tmp_path / "two")
    assert (tmp_path / "one" / "train.zip").read_bytes() == (tmp_path / "two" / "train.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one" / "train.zip") as archive:
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        assert len(archive.namelist()) == SHAPES.num_train


def test_a_compressed_zip_is_repacked(source, tmp_path):
    members = unpacked(source / "train.zip")
    with zipfile.ZipFile(source / "train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"train2017/{name}", data)
    fetch(str(source), tmp_path / "coco")
    with zipfile.ZipFile(tmp_path / "coco" / "train.zip") as archive:
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    assert list(unpacked(tmp_path / "coco" / "train.zip").values()) == list(members.values())


def test_max_images_keeps_the_first_images_with_their_annotations(drawn, tmp_path):
    fetch(str(drawn), tmp_path / "coco", max_images=5)
    document = json.loads((tmp_path / "coco" / "instances_train.json").read_text(encoding="utf-8"))
    ids = {image["id"] for image in document["images"]}
    assert len(ids) == 5
    assert {a["image_id"] for a in document["annotations"]} <= ids
    assert sorted(unpacked(tmp_path / "coco" / "train.zip")) == sorted(i["file_name"] for i in document["images"])


def break_json(folder):
    (folder / "instances_val.json").unlink()


def break_zip(folder):
    data = (folder / "val.zip").read_bytes()
    (folder / "val.zip").write_bytes(data[: len(data) // 2])


def remove_zip(folder):
    (folder / "val.zip").unlink()


def garble_json(folder):
    (folder / "instances_val.json").write_text('{"images": [', encoding="utf-8")


def empty_json(folder):
    (folder / "instances_val.json").write_text('{"images": []}', encoding="utf-8")


def escape(folder):
    with zipfile.ZipFile(folder / "val.zip", "a") as archive:
        archive.writestr("../../evil.jpg", b"x")


def pipe(folder):
    (folder / "instances_val.json").unlink()
    os.mkfifo(folder / "instances_val.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pipe, "instances_val.json is missing"),
        (break_json, "instances_val.json is missing"),
        (break_zip, r"val.zip is not a whole zip file .* fetch it again"),
        (remove_zip, "neither val.zip nor a folder val/"),
        (garble_json, "instances_val.json is not valid JSON"),
        (empty_json, "Object missing required field `annotations`; COCO's format has lists"),
        (escape, "a path out of the archive"),
    ],
)
def test_a_broken_source_is_named_and_leaves_nothing(source, tmp_path, damage, message):
    damage(source)
    with pytest.raises(ValueError, match=message):
        fetch(str(source), tmp_path / "out" / "coco")
    assert list((tmp_path / "out").rglob("*")) == [tmp_path / "out" / "coco"]


def test_what_is_neither_file_nor_folder_is_not_waited_for(source, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    places = {"train_images": str(source / "train.zip"), "train_annotations": str(source / "instances_train.json")}
    four = FileSources(**places, val_images=str(source / "val.zip"), val_annotations=str(tmp_path / "pipe"))
    with pytest.raises(ValueError, match="pipe is neither a file nor a folder"):
        fetch(four, tmp_path / "coco")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"val_images": "gone"}, "gone does not exist; put it there, or correct params.yaml"),
        ({"val_images": "empty"}, "empty holds no pictures (.jpg, "),
        ({"val_images": "none.zip"}, "none.zip is empty; fetch it again"),
        ({"val_images": "train.tar"}, "train.tar is not a whole zip file (it has no directory at its end); fetch it"),
        ({"val_annotations": "empty"}, "empty is a folder, expected a JSON file"),
        ({"val_annotations": "train.zip"}, "train.zip is a zip file, expected JSON; name the file in it: PATH.zip#"),
        ({"val_annotations": "train.tar#x.json"}, "train.tar is not a whole zip file (it has no directory at its end)"),
        ({"val_annotations": f"{'a' * 300}.json"}, ".json cannot be read (File name too long); give this user access"),
    ],
    ids=str,
)
def test_a_file_that_cannot_be_what_it_is_given_for_is_named_at_once(source, changes, said):
    (source / "empty").mkdir()
    (source / "none.zip").touch()
    (source / "train.tar").write_bytes(b"no zip")
    require_files(sources_in(".", source), source)
    with pytest.raises(ValueError, match=re.escape(said)):
        require_files(replace(sources_in(".", source), **changes), source)


def test_a_link_to_itself_is_no_picture(tmp_path):
    (tmp_path / "a.png").symlink_to("a.png")
    (tmp_path / "b.png").touch()
    assert list(pictures_in(tmp_path)) == ["b.png"]


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_bytes(b"cut")])
def test_a_picture_that_changes_while_its_folder_is_read_is_named(source, tmp_path, monkeypatch, change):
    with zipfile.ZipFile(source / "val.zip") as zipped:
        zipped.extractall(source / "val")
    (source / "val.zip").unlink()
    last = max((source / "val").iterdir())

    def listed(folder):
        found = pictures_in(folder)
        change(last)
        return found

    monkeypatch.setattr(pipelines.download, "pictures_in", listed)
    with pytest.raises(ValueError, match=f"{last} was changed while its folder was read; run again when"):
        fetch(str(source), tmp_path / "out/coco")
    assert list((tmp_path / "out").rglob("*")) == [tmp_path / "out/coco"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such folder; give shapes, a folder, or four files"):
        fetch(str(tmp_path / "nowhere"), tmp_path / "coco")


def test_a_checksum_that_differs_names_both_sums(drawn, tmp_path):
    wrong = "0" * 64
    with pytest.raises(ValueError, match=f"has sha256 [0-9a-f]{{64}}, expected {wrong}"):
        fetch(str(drawn), tmp_path / "coco", {str(drawn / "train.zip"): wrong})
    right = hashlib.sha256((drawn / "train.zip").read_bytes()).hexdigest()
    fetch(str(drawn), tmp_path / "coco", {str(drawn / "train.zip"): right})


def test_a_member_that_the_zip_lacks_is_named(source, tmp_path):
    places = FileSources(
        str(source / "train.zip"),
        str(source / "val.zip"),
        f"{source}/train.zip#nothing.json",
        f"{source}/val.zip#n.json",
    )
    with pytest.raises(ValueError, match=r"holds no nothing.json; it holds"):
        fetch(places, tmp_path / "coco")


def test_the_preset_for_coco_has_a_mirror_and_a_checksum_for_each_file():
    config = from_document(merge_parameters(ROOT, "coco-detr-r50", []), "download", DownloadParams)
    remotes = pipelines.download._remotes(config, config.source)
    assert {remote.addresses for remote in remotes} == {
        (f"http://images.cocodataset.org/{path}", f"https://s3.amazonaws.com/images.cocodataset.org/{path}")
        for path in ("zips/train2017.zip", "zips/val2017.zip", "annotations/annotations_trainval2017.zip")
    }
    assert all(len(remote.sha256) == 64 for remote in remotes)


def test_the_users_own_files_stay_theirs(source, tmp_path):
    before = {path: (path.read_bytes(), path.stat()) for path in (source / name for name in FILES)}
    fetch(str(source), tmp_path / "coco")
    for path, (data, status) in before.items():
        assert (path.read_bytes(), path.stat().st_nlink, path.stat().st_ino) == (data, 1, status.st_ino)
        assert not os.path.samefile(path, tmp_path / "coco" / path.name)


@pytest.mark.parametrize(
    ("place", "message"), [("s3://bucket/coco", "has the scheme 's3'"), ("http://host/coco", "one URL; give shapes")]
)
def test_a_folder_on_the_web_is_refused(tmp_path, place, message):
    with pytest.raises(ValueError, match=message):
        fetch(place, tmp_path / "coco")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sha256": {"http://me:secret@a/b": "0"}}, "download.sha256 of http://a/b has 1 characters, expected 64"),
        ({"mirrors": {"http://a/": ["/mnt/a/"]}}, "download.mirrors has '/mnt/a/', expected the beginning of an http"),
        ({"mirrors": {"http://a/": ["ftp://a/"]}}, "ftp://a/ has the scheme 'ftp'"),
        ({"max_images": -1}, "download.max_images is -1, expected a number of at least 0"),
    ],
)
def test_parameters_that_cannot_be_meant_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        DownloadParams(
            **{"source": "shapes", "sha256": {}, "mirrors": {}, "max_images": 0, "shapes": SHAPES, **changed}
        )
