"""A trained model for machines without this code. B images, Q queries, C classes, H W padded size, S output stride.

Both forms take `images` float32 [B, 3, H, W], normalised as by `detr.normalize`, and `padding` bool [B, H, W], True
outside each image. Both give `logits` [B, Q, C+1], the last of them "no object", and `boxes_cxcywh` [B, Q, 4] (0..1),
of the last decoder layer. B, H and W are free, up to the reach of learned positions.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from detr.checkpoint import write_atomically
from detr.model import DETR, for_inference


class _LastLayer(nn.Module):
    """Logits [B, Q, C+1] and boxes_cxcywh [B, Q, 4]."""

    def __init__(self, model: DETR) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        logits, boxes_cxcywh = self.model(images, padding)
        return logits[-1], boxes_cxcywh[-1]


class _GroupNorm(nn.Module):
    """Group norm of [B, C, H, W] with means along one axis after another.

    A sum over all pixels at once, as onnxruntime takes it, is inexact where many are equal, as they are in padding.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.num_groups, self.eps, self.weight, self.bias = norm.num_groups, norm.eps, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        centred = x.unflatten(1, (self.num_groups, -1))  # [B, groups, C/groups, H, W]
        centred = centred - _mean(centred)
        normed = centred * (_mean(centred.square()) + self.eps).rsqrt()
        return normed.flatten(1, 2) * self.weight[:, None, None] + self.bias[:, None, None]


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=4, keepdim=True).mean(dim=3, keepdim=True).mean(dim=2, keepdim=True)


def export_program(model: DETR) -> ExportedProgram:
    """The model for inference on the CPU, for `torch.export.save` or AOTInductor; `model` stays as it is.

    H and W are more than S: pad smaller images. The program refuses what it cannot take. One that AOTInductor has
    compiled does not check its inputs; they must be contiguous, which those of `detr.normalize` are not.
    """
    inference = _LastLayer(for_inference(model).cpu().float().to(memory_format=torch.contiguous_format))
    for parent in list(inference.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.GroupNorm):
                setattr(parent, name, _GroupNorm(module))
    batch, height, width = 2, 2 * model.config.stride, 3 * model.config.stride  # any: the program is not bound to them
    free = Dim.DYNAMIC
    return torch.export.export(
        inference.eval(),
        (torch.zeros(batch, 3, height, width), torch.zeros(batch, height, width, dtype=torch.bool)),
        dynamic_shapes={"images": {0: free, 2: free, 3: free}, "padding": {0: free, 1: free, 2: free}},
    )


def export_onnx(model: DETR | ExportedProgram, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes the model, or its program, as one ONNX file with its weights inside (2 GB at most).

    `model` stays as it is; H and W are any. `metadata` travels in the file: onnxruntime gives it as
    `get_modelmeta().custom_metadata_map`. The file names no path of this machine. Raises ModuleNotFoundError
    without the packages of the `onnx` extra.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"no module {' nor '.join(missing)}, which write ONNX; pip install onnx onnxscript")
    program = torch.onnx.export(
        model if isinstance(model, ExportedProgram) else export_program(model),
        input_names=["images", "padding"],
        output_names=["logits", "boxes_cxcywh"],
        dynamic_shapes=({0: "batch", 2: "height", 3: "width"}, None),  # names alone; those of `padding` are the same
        dynamo=True,
        verbose=False,
    )
    proto = program.model_proto  # type: ignore[union-attr]
    graph = proto.graph
    for item in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        del item.metadata_props[:]  # stack traces
    for key, value in (metadata or {}).items():
        proto.metadata_props.add(key=key, value=value)
    write_atomically(path, lambda file: file.write(proto.SerializeToString(deterministic=True)))
