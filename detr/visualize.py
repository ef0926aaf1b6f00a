"""Pictures of detections. h w image size."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

COLOURS = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#46f0f0", "#f032e6", "#bcf60c")


def draw(image: Tensor, boxes_xyxy: Tensor, labels: list[int], captions: list[str], scale: int = 1) -> Tensor:
    """The image [3, h, w] uint8, enlarged `scale` times, with its boxes [t, 4] in one colour per label."""
    if scale > 1:
        image = F.interpolate(image[None], scale_factor=scale, mode="nearest")[0]
    if not len(boxes_xyxy):
        return image
    height, width = image.shape[1:]
    limit = torch.tensor([width - 1, height - 1, width - 1, height - 1])
    boxes = torch.minimum((boxes_xyxy * scale).clamp(min=0), limit)
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    return draw_bounding_boxes(image, boxes, captions, colours, width=2)


def side_by_side(left: Tensor, right: Tensor, gap: int = 6) -> Tensor:
    """Two images [3, h, w] of one size beside each other on white."""
    return torch.cat([left, torch.full((3, left.shape[1], gap), 255, dtype=torch.uint8), right], dim=2)
