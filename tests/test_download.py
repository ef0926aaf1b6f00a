import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from pipelines.download import DownloadParams, FileSources, download
from pipelines.stage import FILES
from tests.conftest import ROOT, SHAPES, environment


def fetch(source, data, sha256=None, max_images=0):
    download(DownloadParams(source, sha256 or {}, max_images, SHAPES), data)


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


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder with ranges; cuts the first answer for train.zip in the middle."""

    cuts: list[str]

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if path.name in self.cuts:
            self.cuts.remove(path.name)
            self.wfile.write(data[start : start + 1000])
            self.connection.close()
            return
        self.wfile.write(data[start:])

    def log_message(self, *args):
        pass


@contextmanager
def served(folder, cuts=()):
    handler = type("Handler", (Handler,), {"cuts": list(cuts)})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as server:
        server.handle_error = lambda *args: None
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def urls(base, annotations="annotations.zip#annotations/instances_{}.json"):
    places = {f"{s}_images": f"{base}/{s}.zip" for s in ("train", "val")}
    return FileSources(**places, **{f"{s}_annotations": f"{base}/{annotations.format(s)}" for s in ("train", "val")})


def test_urls_with_annotations_inside_a_zip_and_a_connection_that_is_cut(source, tmp_path):
    with zipfile.ZipFile(source / "annotations.zip", "w") as archive:
        for split in ("train", "val"):
            archive.write(source / f"instances_{split}.json", f"annotations/instances_{split}.json")
    with served(source, cuts=["train.zip"]) as base:
        digest = hashlib.sha256((source / "train.zip").read_bytes()).hexdigest()
        fetch(urls(base), tmp_path / "coco", {f"{base}/train.zip": digest})
    for name in FILES:
        assert (tmp_path / "coco" / name).read_bytes() == (source / name).read_bytes()


def test_an_address_that_does_not_exist_is_named(source, tmp_path):
    with served(source) as base, pytest.raises(ValueError, match=r"nothing.zip answers 404; check the address"):
        fetch(replace(urls(base, "instances_{}.json"), val_images=f"{base}/nothing.zip"), tmp_path / "coco")


def test_a_member_that_the_zip_lacks_is_named(source, tmp_path):
    places = FileSources(
        str(source / "train.zip"),
        str(source / "val.zip"),
        f"{source}/train.zip#nothing.json",
        f"{source}/val.zip#n.json",
    )
    with pytest.raises(ValueError, match=r"holds no nothing.json; it holds"):
        fetch(places, tmp_path / "coco")


def run_stage_in(folder, prefix=()):
    (folder / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    return subprocess.run(
        [*prefix, sys.executable, "-m", "pipelines.download"],
        cwd=folder,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=False,
    )


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
