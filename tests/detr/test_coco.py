import io
import json
import multiprocessing
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from safetensors.numpy import save
from torch.utils.data import DataLoader

import detr.coco
from detr.batch import collate
from detr.coco import Annotations, CocoDataset, decode_image, load_annotations
from detr.images import open_images
from tests.detr.test_images import write_zip

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
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def pixels(image_id):
    return np.random.default_rng(image_id).integers(0, 256, (*SIZES_HW[image_id], 3), dtype=np.uint8)


def png(image_id):
    file = io.BytesIO()
    Image.fromarray(pixels(image_id)).save(file, "PNG")
    return file.getvalue()


def unchanged(image, boxes_xyxy, labels, key):
    return image, boxes_xyxy, labels


def dataset_in(folder, kind):
    path = folder / kind
    if kind == "archive":
        write_zip(path, {f"val/{k:03}.png": png(k) for k in SIZES_HW})
    else:
        path.mkdir()
        for k in SIZES_HW:
            (path / f"{k:03}.png").write_bytes(png(k))
    return CocoDataset(load_annotations(write_json(folder / "a.json")), open_images(path), unchanged)


@pytest.fixture(params=["archive", "folder"])
def dataset(request, tmp_path):
    return dataset_in(tmp_path, request.param)


def assert_same(found, expected):
    for field in fields(Annotations):
        one, other = (getattr(record, field.name) for record in (found, expected))
        if isinstance(other, np.ndarray):
            assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
            assert one.flags.writeable
        else:
            assert one == other


def hidden(folder):
    return sorted(path for path in folder.iterdir() if path.name.startswith("."))


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
    (tmp_path / "a.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}), encoding="utf-8")
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


def test_an_image_that_is_not_listed_is_named(tmp_path):
    path = write_json(tmp_path / "a.json", [*ANNOTATIONS, annotation(21, 2, [1, 1, 5, 5])])
    with pytest.raises(ValueError, match=r"a\.json: annotations have image ids \[21\], which its images do not list"):
        load_annotations(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"a\.json is not valid JSON: Expecting value"),
        ('{"images": [', r"a\.json is not valid JSON: Expecting value"),
        (
            '{"images": [], "categories": []}',
            r"a\.json: Object missing required field `annotations`; COCO's format has",
        ),
        ("[]", r"a\.json: Expected `object`, got `array`; COCO's format has lists"),
        (
            '{"images": [], "categories": [], "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1]}]}',
            r"a\.json: annotations\[0\]\.bbox is \[1\], expected four finite numbers below 2\^53, \[left, top, width, height\]",
        ),
    ],
)
def test_what_is_not_cocos_format_is_refused_and_not_kept(text, message, tmp_path):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_annotations(tmp_path / "a.json")
    assert not hidden(tmp_path)


def test_segmentations_change_nothing(tmp_path):
    outlines = [[[1.5, 2, 3, 4, 5, 6]], {"counts": [3, 4], "size": [40, 60]}, []]
    drawn = [a | {"segmentation": outlines[k % 3]} for k, a in enumerate(ANNOTATIONS)]
    plain = load_annotations(write_json(tmp_path / "plain.json"))
    assert_same(load_annotations(write_json(tmp_path / "drawn.json", drawn)), plain)


@pytest.mark.parametrize("annotations", [[], ANNOTATIONS])
def test_the_cache_equals_what_was_parsed(annotations, tmp_path):
    path = write_json(tmp_path / "a.json", annotations)
    parsed = load_annotations(path)
    (cache,) = hidden(tmp_path)
    written = cache.stat()
    assert_same(load_annotations(path), parsed)
    assert hidden(tmp_path) == [cache]
    assert (cache.stat().st_ino, cache.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)


def test_an_empty_document_is_kept_too(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}), encoding="utf-8")
    parsed = load_annotations(tmp_path / "a.json")
    assert_same(load_annotations(tmp_path / "a.json"), parsed)


def test_annotations_come_from_the_cache(tmp_path):
    path, other = write_json(tmp_path / "a.json"), write_json(tmp_path / "b.json", ANNOTATIONS[:2])
    load_annotations(path)
    (cache,) = hidden(tmp_path)
    detr.coco._store(load_annotations(other), cache, path)
    assert_same(load_annotations(path), load_annotations(other))


def test_a_cache_is_of_the_bytes_and_the_only_one_of_its_file(tmp_path):
    path = write_json(tmp_path / "[a]*.json")
    beside = write_json(tmp_path / "a.json", ANNOTATIONS[:2])
    load_annotations(beside)
    (kept,) = hidden(tmp_path)
    load_annotations(path)
    (old,) = set(hidden(tmp_path)) - {kept}
    (tmp_path / f".{old.name}.12.partial").write_bytes(b"of a process that was killed")
    write_json(path, ANNOTATIONS[:5])
    assert len(load_annotations(path).labels) == 3
    (new,) = set(hidden(tmp_path)) - {kept}
    assert new != old


def test_a_cache_is_of_the_code(tmp_path):
    path = write_json(tmp_path / "a.json")
    parsed = load_annotations(path)
    (old,) = hidden(tmp_path)
    (tmp_path / "changed.py").write_text(
        Path(detr.coco.__file__).read_text(encoding="utf-8") + "# changed\n", encoding="utf-8"
    )
    spec = spec_from_file_location("changed", tmp_path / "changed.py")
    changed = sys.modules["changed"] = module_from_spec(spec)
    spec.loader.exec_module(changed)
    del sys.modules["changed"]
    assert_same(changed.load_annotations(path), parsed)
    assert hidden(tmp_path) != [old]
    assert len(hidden(tmp_path)) == 1


def flipped(whole, share):
    place = int(share * len(whole))
    return whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]


DAMAGES = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[:-1],
    "garbage": lambda whole: b"\xff" * len(whole),
    "longer": lambda whole: whole + b"1",
    "no checksum": lambda whole: save({"names": np.zeros(2, np.uint8)}),
    **{f"byte {share:.0%}": partial(flipped, share=share) for share in (0.01, 0.3, 0.6, 0.9, 0.999)},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_parsed_again_and_repaired(damage, tmp_path):
    path = write_json(tmp_path / "a.json")
    parsed = load_annotations(path)
    (cache,) = hidden(tmp_path)
    whole = cache.read_bytes()
    cache.write_bytes(damage(whole))
    assert_same(load_annotations(path), parsed)
    assert hidden(tmp_path) == [cache]
    assert cache.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    path = write_json(tmp_path / "a.json")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))  # as on a full disk
    try:
        parsed = load_annotations(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not hidden(tmp_path)
    assert_same(load_annotations(path), parsed)
    with path.open(encoding="utf-8") as file:
        assert_same(load_annotations(Path(f"/proc/self/fd/{file.fileno()}")), parsed)  # where nobody can write


def test_processes_open_one_file_at_the_same_time(tmp_path):
    path = write_json(tmp_path / "a.json", ANNOTATIONS * 500)
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as pool:
        found = list(pool.map(load_annotations, [path] * 16))
    parsed = load_annotations(path)
    for record in found:
        assert_same(record, parsed)
    assert len(hidden(tmp_path)) == 1


@pytest.mark.parametrize("method", [None, "fork"])
def test_samples_are_the_images_and_their_objects(dataset, method):
    before = dataset.annotations.boxes_xyxy.copy()
    keys = [[(0, 0), (0, 1)], [(0, 2)]]
    workers = {"num_workers": 2, "multiprocessing_context": method} if method else {}
    loader = DataLoader(dataset, batch_sampler=keys, collate_fn=list, **workers)
    samples = [sample for batch in loader for sample in batch]
    assert len(dataset) == len(samples) == 3
    assert_samples(samples)
    assert np.array_equal(dataset.annotations.boxes_xyxy, before)


def assert_samples(samples):
    """They are the three of the annotations."""
    for sample, image_id, count in zip(samples, SIZES_HW, (2, 0, 2), strict=True):
        assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), pixels(image_id))
        assert sample.image_id == image_id
        assert sample.original_size_hw == SIZES_HW[image_id]
        assert sample.boxes_xyxy.shape == (count, 4)
        assert sample.labels.shape == (count,)
    assert len(collate(samples)) == 3


class Datasets(list):
    """Several datasets as one: a key is the number of one and a key of it."""

    def __getitem__(self, key):
        return super().__getitem__(key[0])[key[1]]


def test_a_spawned_worker_gives_the_same_samples_of_archives_and_folders(tmp_path):
    """Both in one loader, whose worker takes long to start."""
    datasets = Datasets(dataset_in(tmp_path, kind) for kind in ("archive", "folder"))
    before = [dataset.annotations.boxes_xyxy.copy() for dataset in datasets]
    keys = [[(number, (0, index)) for index in part] for number in (0, 1) for part in ((0, 1), (2,))]
    loader = DataLoader(datasets, batch_sampler=keys, collate_fn=list, num_workers=1, multiprocessing_context="spawn")
    samples = [sample for batch in loader for sample in batch]
    assert len(samples) == 6
    assert_samples(samples[:3])
    assert_samples(samples[3:])
    assert all(np.array_equal(d.annotations.boxes_xyxy, b) for d, b in zip(datasets, before, strict=True))


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
    image = decode_image(file.getvalue(), "1")
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.uint8


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"abc", "is no picture: its 3 bytes begin neither as a JPEG nor as a PNG"),
        (png(20)[:200], "is damaged or cut short: it does not end as a PNG ends"),
    ],
)
def test_a_picture_that_does_not_decode_is_named(data, problem):
    with pytest.raises(ValueError, match=f"^000000000009.jpg {problem}$"):
        decode_image(data, "000000000009.jpg")


def test_a_png_of_sixteen_bits_is_read_by_its_upper_eight():
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    image = decode_image(buffer.getvalue(), "deep.png")
    assert (image.dtype, image.shape) == (torch.uint8, (3, 16, 16))
    assert np.array_equal(image[0], values >> 8)
