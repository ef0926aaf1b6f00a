from dataclasses import replace

import pytest
import torch
import torchvision
from torchvision.ops import FrozenBatchNorm2d

from detr.backbone import ResNet, freeze_stem
from tests.projects import TINY_MODEL

TINY = replace(TINY_MODEL, backbone_norm="frozen")


def published(name, **options):
    """A torchvision network with random weights and statistics, and its feature map."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None, **options).eval()
    for key, value in network.state_dict().items():
        if key.endswith("running_mean") or (".bn" in key and key.endswith("bias")):
            value.normal_(0, 0.1)
        elif key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    features = torch.nn.Sequential(*list(network.children())[:-2])
    return network.state_dict(), features


def images(height=64, width=96):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "options", "stride"),
    [
        ("resnet18", {}, 32),
        ("resnet50", {}, 32),
        ("resnet50", {"replace_stride_with_dilation": [False, False, True]}, 16),
    ],
)
def test_features_equal_torchvision(name, options, stride):
    state, features = published(name, norm_layer=FrozenBatchNorm2d, **options)
    backbone = ResNet(name, 1.0, stride, "frozen").eval()
    backbone.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})
    with torch.no_grad():
        result, expected = backbone.double()(images().double()), features.double()(images().double())
    assert result.shape == (2, backbone.num_channels, 64 // stride, 96 // stride)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["resnet34", "resnet101"])
def test_other_depths_carry_torchvision_names(name):
    with torch.device("meta"):
        ours = ResNet(name, 1.0, 32, "frozen").state_dict()
        theirs = torchvision.models.get_model(name, weights=None, norm_layer=FrozenBatchNorm2d).state_dict()
    expected = {key: value.shape for key, value in theirs.items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in ours.items()} == expected


@pytest.mark.parametrize(("name", "width"), [("resnet10", 0.25), ("resnet18", 0.5), ("resnet50", 0.25)])
@pytest.mark.parametrize("stride", [16, 32])
@pytest.mark.parametrize("norm", ["frozen", "group"])
def test_widths_and_strides(name, width, stride, norm):
    backbone = ResNet(name, width, stride, norm)
    assert backbone.num_channels == int(width * (2048 if name == "resnet50" else 512))
    with torch.no_grad():
        features = backbone(images(49, 97))
    assert features.shape == (2, backbone.num_channels, -(-49 // stride), -(-97 // stride))
    assert features.isfinite().all()


@pytest.mark.parametrize("norm", ["frozen", "group"])
def test_batch_mates_change_nothing(norm):
    backbone = ResNet("resnet10", 0.25, 16, norm)
    with torch.no_grad():
        together = backbone(images())
        torch.testing.assert_close(backbone(images()[1:]), together[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["frozen", "group"])
def test_nothing_of_the_stem_and_first_stage_trains_when_frozen(norm):
    backbone = ResNet("resnet10", 0.25, 32, norm)
    freeze_stem(backbone)
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad is not name.startswith(("conv1", "bn1", "layer1"))


def test_freezing_leaves_the_features_as_they_are():
    backbone = ResNet("resnet10", 0.25, 32, "frozen")
    before = backbone(images())
    freeze_stem(backbone)
    assert torch.equal(backbone(images()), before)
