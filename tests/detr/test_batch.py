import pickle

import pytest
import torch
from torchvision.transforms.v2.functional import normalize as torchvision_normalize

from detr.batch import IMAGENET_MEAN, IMAGENET_STD, Sample, collate, normalize
from detr.boxes import cxcywh_to_xyxy


def sample(size_hw, boxes_xyxy=(), image_id=1):
    generator = torch.Generator().manual_seed(image_id)
    return Sample(
        torch.randint(1, 256, (3, *size_hw), dtype=torch.uint8, generator=generator),
        torch.tensor(boxes_xyxy, dtype=torch.float32).reshape(-1, 4),
        torch.arange(len(boxes_xyxy)),
        image_id,
        (2 * size_hw[0], 3 * size_hw[1]),
    )


SAMPLES = {
    "no_objects": [sample((20, 30))],
    "no_objects_twice": [sample((20, 30)), sample((40, 10), image_id=2)],
    "one_empty": [sample((20, 30), [(1, 2, 11, 12)]), sample((40, 10), image_id=2)],
    "several": [
        sample((20, 30), [(1, 2, 11, 12)]),
        sample((40, 10), [(0, 0, 10, 40), (2, 5, 8, 25)], image_id=2),
        sample((33, 17), [(0, 3, 17, 30)], image_id=9),
    ],
}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("multiple", [1, 16])
def test_a_batch_gives_back_its_samples(name, multiple):
    samples = SAMPLES[name]
    batch = collate(samples, size_multiple=multiple)
    height, width = batch.images.shape[2:]
    largest = [max(s.image.shape[k] for s in samples) for k in (1, 2)]
    assert len(batch) == len(samples)
    assert height % multiple == width % multiple == 0
    assert all(0 <= size - needed < multiple for size, needed in zip((height, width), largest, strict=True))
    targets = batch.targets
    assert targets.counts == tuple(len(s.labels) for s in samples)
    assert targets.owners.tolist() == [i for i, s in enumerate(samples) for _ in s.labels]
    for i, one in enumerate(samples):
        h, w = one.image.shape[1:]
        inside = ~batch.padding[i]
        assert inside[:h, :w].all()
        assert inside.sum() == h * w
        assert torch.equal(batch.images[i, :, :h, :w], one.image)
        assert batch.images[i].sum(dtype=torch.int64) == one.image.sum(dtype=torch.int64)
        own = targets.owners == i
        boxes = cxcywh_to_xyxy(targets.boxes_cxcywh[own]) * torch.tensor([w, h, w, h])
        torch.testing.assert_close(boxes, one.boxes_xyxy)
        assert torch.equal(targets.labels[own], one.labels)
        assert batch.image_ids[i] == one.image_id
        assert tuple(batch.original_sizes_hw[i].tolist()) == one.original_size_hw


def test_a_sample_is_the_same_alone_and_in_a_batch():
    alone, together = collate(SAMPLES["several"][1:2]), collate(SAMPLES["several"])
    assert torch.equal(alone.targets.boxes_cxcywh, together.targets.boxes_cxcywh[1:3])
    assert alone.targets.counts == together.targets.counts[1:2]


def test_normalize_equals_torchvision_and_is_zero_in_the_padding():
    batch = collate(SAMPLES["several"])
    result = normalize(batch.images, batch.padding)
    expected = torchvision_normalize(batch.images.float() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    torch.testing.assert_close(result, expected.masked_fill(batch.padding[:, None], 0.0), rtol=1e-5, atol=1e-5)


def test_pixels_in_the_padding_change_nothing():
    batch = collate(SAMPLES["several"])
    noisy = torch.where(batch.padding[:, None], torch.randint_like(batch.images, 256), batch.images)
    assert not torch.equal(noisy, batch.images)
    assert torch.equal(normalize(noisy, batch.padding), normalize(batch.images, batch.padding))


def test_batches_move_between_devices_and_processes():
    batch = collate(SAMPLES["several"])
    moved = batch.to(torch.device("meta"))
    assert {moved.padding.device.type, moved.targets.labels.device.type} == {"meta"}
    assert moved.targets.counts == batch.targets.counts
    again = pickle.loads(pickle.dumps(batch))
    assert again.targets.counts == batch.targets.counts
    for name in ("images", "padding", "image_ids", "original_sizes_hw"):
        assert torch.equal(getattr(again, name), getattr(batch, name))
    for name in ("boxes_cxcywh", "labels", "owners"):
        assert torch.equal(getattr(again.targets, name), getattr(batch.targets, name))


def test_memory_that_is_given_is_used_again():
    small, large = collate(SAMPLES["no_objects"]), collate(SAMPLES["several"])
    out = torch.empty(0)
    first = normalize(large.images, large.padding, out)
    assert torch.equal(first, normalize(large.images, large.padding))
    place = out.data_ptr()
    assert torch.equal(normalize(small.images, small.padding, out), normalize(small.images))
    assert out.data_ptr() == place
