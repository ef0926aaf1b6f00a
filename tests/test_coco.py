import io
import json
import multiprocessing
import pickle
import zipfile
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch.utils.data import DataLoader

from detr.batch import collate
from detr.coco import CocoDataset, ImageArchive, decode, load_annotations

SIZES_HW = {30: (40, 60), 10: (50, 20), 20: (32, 32)}
CATEGORIES = {90: "zebra", 2: "cat", 17: "dog"}


def annotation(image_id, category_id, bbox, **extra):
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "area": bbox[2] * bbox[3], **extra}


ANNOTATIONS = [
    annotation(20, 90, [1, 2, 10, 20], iscrowd=0),
    annotation(30, 2, [5.5, 6.25, 7, 8], iscrowd=0),
    annotation(30, 2, [0, 0, 60, 40], iscrowd=1),
    annotation(20, 17, [3, 3, 0, 9], iscrowd=0),
    annotation(30, 17, [50, 30, 40, 40]),
    annotation(20, 2, [31.9, -4, 8, 9], iscrowd=0),
    annotation(20, 2, [40, 4, 8, 9], iscrowd=0),
    annotation(20, 17, [4, 4, 5, -2], iscrowd=0),
]


def write_json(path, annotations=ANNOTATIONS):
    document = {
        "images": [{"id": k, "file_name": f"{k:03}.png", "height": h, "width": w} for k, (h, w) in SIZES_HW.items()],
        "annotations": [{"id": k, **a} for k, a in enumerate(annotations, start=1)],
        "categories": [{"id": k, "name": name} for k, name in CATEGORIES.items()],
    }
    path.write_text(json.dumps(document))
    return path


def pixels(image_id):
    return np.random.default_rng(image_id).integers(0, 256, (*SIZES_HW[image_id], 3), dtype=np.uint8)


def png(image_id):
    file = io.BytesIO()
    Image.fromarray(pixels(image_id)).save(file, "PNG")
    return file.getvalue()


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def dataset(tmp_path):
    archive = write_zip(tmp_path / "images.zip", {f"val/{k:03}.png": png(k) for k in SIZES_HW})
    record = load_annotations(write_json(tmp_path / "a.json"))
    return CocoDataset(record, ImageArchive(archive), lambda image, boxes, labels, key: (image, boxes, labels))


@pytest.mark.parametrize("annotations", [[], ANNOTATIONS[2:3], ANNOTATIONS])
def test_annotations_equal_pycocotools(annotations, tmp_path, capsys):
    path = write_json(tmp_path / "a.json", annotations)
    record, truth = load_annotations(path), COCO(str(path))
    assert record.image_ids.tolist() == list(SIZES_HW)
    assert record.sizes_hw.tolist() == [list(size) for size in SIZES_HW.values()]
    assert record.file_names.tolist() == [truth.imgs[k]["file_name"] for k in SIZES_HW]
    assert record.starts[0] == 0
    assert record.starts[-1] == len(record.labels) == len(record.boxes_xyxy)
    for index, image_id in enumerate(SIZES_HW):
        height, width = SIZES_HW[image_id]
        expected = []
        for a in truth.loadAnns(truth.getAnnIds(image_id, iscrowd=None)):
            x, y, w, h = a["bbox"]
            box = [min(max(x, 0), width), min(max(y, 0), height), min(max(x + w, 0), width), min(max(y + h, 0), height)]
            if not a.get("iscrowd") and box[2] > box[0] and box[3] > box[1]:
                expected.append((a["category_id"], pytest.approx(box)))
        owned = slice(record.starts[index], record.starts[index + 1])
        found = zip(record.category_ids[record.labels[owned]].tolist(), record.boxes_xyxy[owned].tolist(), strict=True)
        assert list(found) == expected


def test_category_ids_and_labels_are_mapped_both_ways(tmp_path):
    record = load_annotations(write_json(tmp_path / "a.json"))
    assert record.category_ids.tolist() == [2, 17, 90]
    assert record.category_names == ("cat", "dog", "zebra")
    assert record.labels.tolist() == [0, 1, 2, 0]
    assert record.labels.dtype == np.int64


def test_a_document_without_images_has_no_samples(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    record = load_annotations(tmp_path / "a.json")
    assert record.starts.tolist() == [0]
    assert record.sizes_hw.shape == (0, 2)


@pytest.mark.parametrize("category_id", [1, 3, 91])
def test_a_category_that_is_not_listed_is_named(category_id, tmp_path):
    path = write_json(tmp_path / "a.json", [*ANNOTATIONS, annotation(20, category_id, [1, 1, 5, 5])])
    with pytest.raises(
        ValueError, match=rf"a\.json: annotations have category ids \[{category_id}\], which its categor"
    ):
        load_annotations(path)


def test_archives_equal_zipfile(tmp_path):
    contents = {f"train2017/{k}.jpg": bytes([k]) * (k * 1000) for k in range(6)} | {"top.jpg": b"abc"}
    path = write_zip(tmp_path / "a.zip", contents)
    archive = ImageArchive(path)
    with zipfile.ZipFile(path) as truth:
        for name in truth.namelist():
            assert archive.read(name) == archive.read(name.rsplit("/", 1)[-1]) == truth.read(name)


def test_archives_with_folders_extra_fields_and_comments(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.mkdir("folder")
        info = zipfile.ZipInfo("folder/ä b.jpg")
        info.extra = b"\xfe\xca\x04\x00abcd"
        archive.writestr(info, b"content")
        archive.comment = b"a comment"
    whole = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "prefixed.zip").write_bytes(b"#!/bin/sh\n" + whole)
    for name in ("a.zip", "prefixed.zip"):
        archive = ImageArchive(tmp_path / name)
        assert archive.read("ä b.jpg") == b"content"
        assert "folder/" not in archive.members


def test_a_full_path_wins_over_a_bare_name(tmp_path):
    archive = ImageArchive(write_zip(tmp_path / "a.zip", {"x/1.jpg": b"nested", "1.jpg": b"top", "y/1.jpg": b"other"}))
    assert [archive.read(name) for name in ("1.jpg", "x/1.jpg", "y/1.jpg")] == [b"top", b"nested", b"other"]


def test_a_compressed_archive_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"1.jpg": b"abc"}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"a\.zip: 1\.jpg is compressed; store images: zip -0"):
        ImageArchive(path)


@pytest.mark.parametrize("kept", [0, 1, 100, 3000, -1, -30])
def test_an_archive_cut_short_is_refused(kept, tmp_path):
    whole = write_zip(tmp_path / "whole.zip", {f"{k}.jpg": bytes(1000) for k in range(5)}).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:kept])
    with pytest.raises(ValueError, match=r"cut\.zip is not a whole zip file \(.*\); fetch it again"):
        ImageArchive(tmp_path / "cut.zip")


def test_an_archive_with_a_hole_is_refused(tmp_path):
    whole = write_zip(tmp_path / "whole.zip", {f"{k}.jpg": bytes([k]) * 1000 for k in range(5)}).read_bytes()
    (tmp_path / "hole.zip").write_bytes(whole[:1500] + whole[1700:])
    archive = ImageArchive(tmp_path / "hole.zip")
    assert archive.read("4.jpg") == bytes([4]) * 1000
    with pytest.raises(
        ValueError, match=r"hole\.zip is damaged: 0\.jpg is not where its directory says; fetch it again"
    ):
        archive.read("0.jpg")


def test_a_missing_member_is_named(tmp_path):
    archive = ImageArchive(write_zip(tmp_path / "a.zip", {"1.jpg": b"abc"}))
    with pytest.raises(FileNotFoundError, match=r"2\.jpg is not in .*a\.zip"):
        archive.read("2.jpg")


def test_archives_travel_to_spawned_processes(tmp_path):
    archive = ImageArchive(write_zip(tmp_path / "a.zip", {f"{k}.jpg": bytes([k]) * 99 for k in range(4)}))
    archive.read("0.jpg")
    assert pickle.loads(pickle.dumps(archive)).read("3.jpg") == bytes([3]) * 99
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(archive.read, ["2.jpg", "1.jpg"])) == [bytes([2]) * 99, bytes([1]) * 99]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_samples_are_the_images_and_their_objects(dataset, num_workers):
    before = dataset.annotations.boxes_xyxy.copy()
    keys = [[(0, 0), (0, 1)], [(0, 2)]]
    loader = DataLoader(dataset, batch_sampler=keys, num_workers=num_workers, collate_fn=list)
    samples = [sample for batch in loader for sample in batch]
    assert len(dataset) == len(samples) == 3
    for sample, image_id, count in zip(samples, SIZES_HW, (2, 0, 2), strict=True):
        assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), pixels(image_id))
        assert sample.image_id == image_id
        assert sample.original_size_hw == SIZES_HW[image_id]
        assert sample.boxes_xyxy.shape == (count, 4)
        assert sample.labels.shape == (count,)
    assert len(collate(samples)) == 3
    assert np.array_equal(dataset.annotations.boxes_xyxy, before)


def test_the_transform_is_given_the_key(dataset):
    dataset.transform = lambda image, boxes, labels, key: (image, boxes, torch.tensor(key))
    assert dataset[7, 2].labels.tolist() == [7, 2]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pictures_of_every_kind_decode_to_rgb(mode, kind):
    if kind == "JPEG" and mode in ("RGBA", "P"):
        mode = "CMYK"
    file = io.BytesIO()
    Image.fromarray(pixels(20)).convert(mode).save(file, kind)
    image = decode(file.getvalue(), "1")
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.uint8


@pytest.mark.parametrize("data", [b"", b"abc", png(20)[:200]])
def test_a_picture_that_does_not_decode_is_named(data):
    with pytest.raises(ValueError, match=r"000000000009\.jpg does not decode as an image: \w+"):
        decode(data, "000000000009.jpg")
