import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from urllib3.util import Retry

import pipelines.fetch
from pipelines.download import DownloadParams, download
from pipelines.params import from_document, merged, to_yaml
from pipelines.sources import FileSources
from pipelines.stage import FILES
from tests.bad_line import Answer, Site, serving
from tests.conftest import ROOT, SHAPES, environment


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(pipelines.fetch, "RETRY", Retry(total=1))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def fetch(source, data, sha256=None, max_images=0, mirrors=None):
    config = DownloadParams(source, sha256 or {}, mirrors or {}, max_images, SHAPES)
    download(config, data, data.parent / "scratch" / "downloads")


def unpacked(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


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
    document = json.loads((tmp_path / "coco" / "instances_train.json").read_text())
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
    (folder / "instances_val.json").write_text('{"images": [')


def empty_json(folder):
    (folder / "instances_val.json").write_text('{"images": []}')


def escape(folder):
    with zipfile.ZipFile(folder / "val.zip", "a") as archive:
        archive.writestr("../../evil.jpg", b"x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_json, "instances_val.json is missing"),
        (break_zip, r"val.zip is not a whole zip file .* fetch it again"),
        (remove_zip, "neither val.zip nor a folder val/"),
        (garble_json, "instances_val.json is not valid JSON"),
        (empty_json, "has no list 'annotations'"),
        (escape, "a path out of the archive"),
    ],
)
def test_a_broken_source_is_named_and_leaves_nothing(source, tmp_path, damage, message):
    damage(source)
    with pytest.raises(ValueError, match=message):
        fetch(str(source), tmp_path / "out" / "coco")
    assert list((tmp_path / "out").rglob("*")) == [tmp_path / "out" / "coco"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such folder; give shapes, a folder, or four files"):
        fetch(str(tmp_path / "nowhere"), tmp_path / "coco")


def test_a_checksum_that_differs_names_both_sums(drawn, tmp_path):
    wrong = "0" * 64
    with pytest.raises(ValueError, match=f"has sha256 [0-9a-f]{{64}}, expected {wrong}"):
        fetch(str(drawn), tmp_path / "coco", {str(drawn / "train.zip"): wrong})
    right = hashlib.sha256((drawn / "train.zip").read_bytes()).hexdigest()
    fetch(str(drawn), tmp_path / "coco", {str(drawn / "train.zip"): right})


@pytest.fixture
def site(source):
    """A web server with the four files, and with the annotations in a zip as well."""
    with zipfile.ZipFile(source / "annotations.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for split in ("train", "val"):
            archive.write(source / f"instances_{split}.json", f"annotations/instances_{split}.json")
    with serving(Site(**{path.name: path.read_bytes() for path in source.iterdir()})) as site:
        yield site


def same(data, source):
    return all((data / name).read_bytes() == (source / name).read_bytes() for name in FILES)


def urls(base, annotations="annotations.zip#annotations/instances_{}.json"):
    places = {f"{s}_images": f"{base}/{s}.zip" for s in ("train", "val")}
    return FileSources(**places, **{f"{s}_annotations": f"{base}/{annotations.format(s)}" for s in ("train", "val")})


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


def test_a_member_that_the_zip_lacks_is_named(source, tmp_path):
    places = FileSources(
        str(source / "train.zip"),
        str(source / "val.zip"),
        f"{source}/train.zip#nothing.json",
        f"{source}/val.zip#n.json",
    )
    with pytest.raises(ValueError, match=r"holds no nothing.json; it holds"):
        fetch(places, tmp_path / "coco")


def test_mirrors_stand_in_for_the_beginning_of_a_url_and_the_sum_stays_with_the_url(site, source, tmp_path):
    places = urls("http://127.0.0.1:9/data")
    digest = hashlib.sha256((source / "train.zip").read_bytes()).hexdigest()
    mirrors = {"http://127.0.0.1:9/data/": [f"{site.base}/nowhere/", f"{site.base}/"], "http://other/": []}
    fetch(places, tmp_path / "coco", {places.train_images: digest}, mirrors=mirrors)
    assert same(tmp_path / "coco", source)
    assert site.ranges("/nowhere/train.zip") == site.ranges("/train.zip") == [None]
    with pytest.raises(ValueError, match=f"/train.zip has sha256 {digest}, expected {'0' * 64}; fetch it again or"):
        fetch(places, tmp_path / "coco", {places.train_images: "0" * 64}, mirrors=mirrors)


def test_the_preset_for_coco_has_a_mirror_and_a_checksum_for_each_file():
    config = from_document(merged(ROOT, "coco-detr-r50", []), "download", DownloadParams)
    remotes = pipelines.download._remotes(config, config.source)
    assert {remote.addresses for remote in remotes} == {
        (f"http://images.cocodataset.org/{path}", f"https://s3.amazonaws.com/images.cocodataset.org/{path}")
        for path in ("zips/train2017.zip", "zips/val2017.zip", "annotations/annotations_trainval2017.zip")
    }
    assert all(len(remote.sha256) == 64 for remote in remotes)


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


def test_the_users_own_files_stay_theirs(source, tmp_path):
    before = {path: (path.read_bytes(), path.stat()) for path in (source / name for name in FILES)}
    fetch(str(source), tmp_path / "coco")
    for path, (data, status) in before.items():
        assert (path.read_bytes(), path.stat().st_nlink, path.stat().st_ino) == (data, 1, status.st_ino)
        assert not os.path.samefile(path, tmp_path / "coco" / path.name)


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


@pytest.mark.parametrize(
    ("place", "message"), [("s3://bucket/coco", "has the scheme 's3'"), ("http://host/coco", "no such folder; give sh")]
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
        ({"max_images": -1}, "download.max_images is -1, expected a number of images, or 0 for all"),
    ],
)
def test_parameters_that_cannot_be_meant_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        DownloadParams(
            **{"source": "shapes", "sha256": {}, "mirrors": {}, "max_images": 0, "shapes": SHAPES, **changed}
        )


def test_numbers_that_are_not_json_pass_unchanged_for_validate_to_judge(source, tmp_path):
    text = '{"images": [], "annotations": [{"area": NaN, "bbox": [-Infinity,1,Infinity , 2]}], "categories": [], "a": "NaN, Infinity"}'
    (source / "instances_val.json").write_text(text)
    fetch(str(source), tmp_path / "coco")
    assert (tmp_path / "coco" / "instances_val.json").read_text() == text
    with pytest.raises(ValueError, match=r"instances_val.json holds NaN or Infinity, which JSON lacks .*; mend it, or"):
        fetch(str(source), tmp_path / "coco", max_images=3)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"a": [NaN',
        "{} x",
        "\ufeff{}",
        '{"images": [NaN NaN]}',
        '{"images": [-NaN]}',
        '{"images": [aNaN]}',
        "\0\0",
    ],
)
def test_garbage_is_refused_with_its_place(source, tmp_path, text):
    (source / "instances_val.json").write_text(text)
    with pytest.raises(ValueError, match=f"{source}/instances_val.json is not valid JSON: "):
        fetch(str(source), tmp_path / "coco")


@pytest.mark.parametrize(
    "text", ["[]", "1", '{"images": {}, "annotations": [], "categories": []}', '{"annotations": []}']
)
def test_json_that_is_not_cocos_is_named(source, tmp_path, text):
    (source / "instances_val.json").write_text(text)
    with pytest.raises(ValueError, match="instances_val.json has no list 'images'; COCO's format has images"):
        fetch(str(source), tmp_path / "coco")


def test_the_kept_records_keep_their_bytes(source, tmp_path):
    images = [
        '{"id": "b", "file_name": "é.jpg", "x": 1.50}',
        '{"id":1.0,"file_name":"two.jpg"}',
        '{"id":2,"file_name":"c"}',
    ]
    annotations = ['{"image_id":1, "id": 1e-7}', '{ "image_id": 2 }', '{"image_id": "b","bbox": [0.10, 2]}']
    text = '{"info": {"a" : 1}, "images": [%s], "annotations": [%s], "categories": [ ]}'
    (source / "instances_val.json").write_text(text % (", ".join(images), ", ".join(annotations)))
    for _ in range(2):
        fetch(str(source), tmp_path / "coco", max_images=2)
        kept = '{"info":{"a" : 1},"images":[%s],"annotations":[%s],"categories":[ ]}'
        expected = kept % (",".join(images[:2]), ",".join(annotations[::2]))
        assert (tmp_path / "coco" / "instances_val.json").read_text() == expected


@pytest.mark.parametrize(
    ("images", "annotations", "message"),
    [
        ('[{"id": 1}]', "[]", "Object missing required field `file_name`"),
        ("[3]", "[]", "Expected `object`, got `int`"),
        ("[]", '[{"id": 1}]', "Object missing required field `image_id`"),
    ],
)
def test_an_entry_that_cannot_be_chosen_by_is_named(source, tmp_path, images, annotations, message):
    text = f'{{"images": {images}, "annotations": {annotations}, "categories": []}}'
    (source / "instances_val.json").write_text(text)
    with pytest.raises(ValueError, match=f"instances_val.json: an entry is not as COCO's format has it: {message}"):
        fetch(str(source), tmp_path / "coco", max_images=1)


@pytest.mark.parametrize("max_images", [0, 10])
def test_annotations_are_not_made_into_objects(source, tmp_path, max_images):
    """Which would take ten times the size of the file."""
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1.5, 2.5, 3.5, 4.5], "segmentation": [[1.5] * 20]}
    document = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [annotation] * 50_000, "categories": []}
    (source / "instances_train.json").write_text(json.dumps(document))
    tracemalloc.start()
    try:
        fetch(str(source), tmp_path / "coco", max_images=max_images)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (2 if max_images == 0 else 3) * (source / "instances_train.json").stat().st_size


def stage_in(folder, source=None):
    """A folder in which the stage can run as it is, by default on drawn scenes."""
    overrides = [f"download.source={json.dumps(asdict(source))}"] if source else []
    folder.mkdir(exist_ok=True)
    (folder / "params.yaml").write_text(to_yaml(merged(ROOT, None, overrides)))
    return {"cwd": folder, "env": environment(PYTHONPATH=str(ROOT)), "text": True}


STAGE = (sys.executable, "-m", "pipelines.download")


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
    deadline = time.monotonic() + 60
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
            assert "another process is fetching http://127.0.0.1" in two.stderr.readline()
            site.going_on.set()
            for run in (one, two):
                assert (run.communicate(timeout=60), run.returncode)[1] == 0
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
    assert "65.5kB are free there; make room and run again" in done.stderr
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
