import torch
from torchvision.ops import box_convert

from detr.postprocess import postprocess


def outputs(num_layers=2, num_images=3, num_queries=4, num_classes=5):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(num_layers, num_images, num_queries, num_classes + 1, generator=generator)
    return logits, torch.rand(num_layers, num_images, num_queries, 4, generator=generator)


SIZES_HW = torch.tensor([[480, 640], [100, 10], [7, 7]])


def test_detections_equal_a_naive_loop():
    logits, boxes = outputs()
    scores, labels, boxes_xyxy = postprocess(logits, boxes, SIZES_HW)
    for image, (height, width) in enumerate(SIZES_HW.tolist()):
        for query in range(4):
            probability = logits[-1, image, query].exp() / logits[-1, image, query].exp().sum()
            best = max(range(5), key=lambda label, p=probability: p[label])
            assert labels[image, query] == best
            torch.testing.assert_close(scores[image, query], probability[best])
            corners = box_convert(boxes[-1, image, query], "cxcywh", "xyxy")
            expected = corners * torch.tensor([width, height, width, height])
            torch.testing.assert_close(boxes_xyxy[image, query], expected)


def test_no_object_is_a_low_score_and_never_an_answer():
    logits, boxes = outputs()
    logits[..., -1] = 20
    scores, labels, _ = postprocess(logits, boxes, SIZES_HW)
    assert labels.max() < 5
    assert scores.max() < 1e-3


def test_the_last_layer_alone_counts():
    logits, boxes = outputs()
    expected = postprocess(logits[-1:], boxes[-1:], SIZES_HW)
    for result, value in zip(postprocess(logits, boxes, SIZES_HW), expected, strict=True):
        assert torch.equal(result, value)


def test_half_precision_outputs_give_float32_detections():
    logits, boxes = (x.bfloat16() for x in outputs())
    scores, _, boxes_xyxy = postprocess(logits, boxes, SIZES_HW)
    assert scores.dtype == boxes_xyxy.dtype == torch.float32
    assert torch.equal(boxes_xyxy, postprocess(logits.float(), boxes.float(), SIZES_HW)[2])
