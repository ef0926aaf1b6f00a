"""A download from the web: places in archives, mirrors, checksums, and what waits when a later step fails."""

import hashlib
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from urllib3.util import Retry

import pipelines.data.fetch
from pipelines.data.layout import FILES
from pipelines.data.sources import FileSources
from pipelines.download import DownloadParams, download
from tests.bad_line import Answer
from tests.downloads import coco_site, fetch, same, unpacked, urls
from tests.projects import SHAPES


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(pipelines.data.fetch, "RETRY", Retry(total=1))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def site(source):
    with coco_site(source) as site:
        yield site


def test_urls_with_annotations_inside_a_zip_and_a_connection_that_is_cut(site, source, tmp_path):
    site.plan("/train.zip", Answer(cut=1000), Answer())
    digest = hashlib.sha256((source / "train.zip").read_bytes()).hexdigest()
    fetch(urls(site.base), tmp_path / "coco", {f"{site.base}/train.zip": digest})
    for name in FILES:
        assert (tmp_path / "coco" / name).read_bytes() == (source / name).read_bytes()
    assert site.ranges("/train.zip") == [None, "bytes=1000-"]
    assert site.ranges("/annotations.zip") == [None]
    assert {path.suffix for path in (tmp_path / "scratch" / "downloads").iterdir()} == {".lock"}


def test_an_address_that_does_not_exist_is_named(site, tmp_path):
    with pytest.raises(ValueError, match=r"nothing.zip answers 404; check the address"):
        fetch(replace(urls(site.base, "instances_{}.json"), val_images=f"{site.base}/nothing.zip"), tmp_path / "coco")


def test_mirrors_stand_in_for_the_beginning_of_a_url_and_the_sum_stays_with_the_url(site, source, tmp_path):
    places = urls("http://127.0.0.1:9/data")
    digest = hashlib.sha256((source / "train.zip").read_bytes()).hexdigest()
    mirrors = {"http://127.0.0.1:9/data/": [f"{site.base}/nowhere/", f"{site.base}/"], "http://other/": []}
    fetch(places, tmp_path / "coco", {places.train_images: digest}, mirrors=mirrors)
    assert same(tmp_path / "coco", source)
    assert site.ranges("/nowhere/train.zip") == site.ranges("/train.zip") == [None]
    with pytest.raises(ValueError, match=f"/train.zip has sha256 {digest}, expected {'0' * 64}; fetch it again or"):
        fetch(places, tmp_path / "coco", {places.train_images: "0" * 64}, mirrors=mirrors)


def test_what_was_fetched_waits_when_a_later_step_fails_and_is_then_moved_not_copied(site, source, tmp_path):
    """The files in `data` are those that were fetched first: the same inodes, under no other name."""
    sums = {f"{site.base}/{name}": hashlib.sha256((source / name).read_bytes()).hexdigest() for name in FILES[:2]}
    broken = replace(urls(site.base), val_annotations=f"{site.base}/annotations.zip#nothing.json")
    with pytest.raises(ValueError, match="annotations.zip holds no nothing.json; it holds annotations/instances_tr"):
        fetch(broken, tmp_path / "coco", sums)
    assert list((tmp_path / "coco").iterdir()) == []
    downloads = tmp_path / "scratch" / "downloads"
    waiting = {path.stat().st_ino for path in downloads.glob("*.part")}
    assert len(waiting) == 3
    fetch(urls(site.base), tmp_path / "coco", sums)
    assert same(tmp_path / "coco", source)
    assert site.ranges("/train.zip") == site.ranges("/val.zip") == [None]
    for name in FILES[:2]:
        assert (tmp_path / "coco" / name).stat().st_ino in waiting
        assert (tmp_path / "coco" / name).stat().st_nlink == 1
    assert {path.suffix for path in downloads.iterdir()} == {".lock"}


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no second file system here")
def test_what_was_fetched_to_another_file_system_is_copied(site, source, tmp_path):
    shared = Path("/dev/shm") / f"{os.getpid()}-downloads"
    try:
        download(DownloadParams(urls(site.base), {}, {}, 0, SHAPES), tmp_path / "coco", shared)
        assert same(tmp_path / "coco", source)
    finally:
        shutil.rmtree(shared)


def test_one_file_serves_both_splits(site, source, tmp_path):
    fetch(replace(urls(site.base), val_images=f"{site.base}/train.zip"), tmp_path / "coco")
    assert (tmp_path / "coco" / "val.zip").read_bytes() == (source / "train.zip").read_bytes()
    assert (tmp_path / "coco" / "train.zip").read_bytes() == (source / "train.zip").read_bytes()


def test_everything_may_lie_in_one_archive_behind_a_query(site, source, tmp_path):
    with zipfile.ZipFile(source / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in FILES:
            archive.write(source / name, f"all/{name}")
    path = "/all.zip?key=1"
    site.files[path] = (source / "all.zip").read_bytes()
    places = {key: f"{site.base}{path}#all/{key.split('_')[0]}.zip" for key in ("train_images", "val_images")}
    for split in ("train", "val"):
        places[f"{split}_annotations"] = f"{source}/all.zip#all/instances_{split}.json"
    fetch(FileSources(**places), tmp_path / "coco")
    assert same(tmp_path / "coco", source)
    assert site.ranges(path) == [None]


def test_folders_files_and_urls_go_together(site, source, tmp_path):
    with zipfile.ZipFile(source / "val.zip") as archive:
        archive.extractall(source / "pictures")
    places = replace(urls(site.base), val_images=str(source / "pictures"), val_annotations=str(source / FILES[3]))
    fetch(places, tmp_path / "coco")
    assert unpacked(tmp_path / "coco" / "val.zip") == unpacked(source / "val.zip")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3://bucket/train.zip", "s3://bucket/train.zip has the scheme 's3'; http, https and local paths work: mount"),
        ("gs://me:secret@bucket/train.zip?x", "gs://bucket/train.zip has the scheme 'gs'"),
        ("nowhere/train.zip#a", "download.source: nowhere/train.zip does not exist"),
    ],
)
def test_a_place_that_cannot_be_read_is_named_before_anything_is_fetched(site, tmp_path, place, message):
    with pytest.raises(ValueError, match=message):
        fetch(replace(urls(site.base), val_images=place), tmp_path / "coco")
    assert site.asked == []
