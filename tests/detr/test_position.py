import math

import pytest
import torch

from detr.position import LearnedPosition, NoPosition, SinePosition


def padding_of(sizes_hw, height, width):
    padding = torch.ones(len(sizes_hw), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes_hw):
        padding[i, :h, :w] = False
    return padding


@pytest.mark.parametrize("temperature", [20.0, 10000.0])
def test_sine_encoding_equals_the_formula(temperature):
    dim, height, width = 16, 3, 5
    result = SinePosition(dim, temperature)(padding_of([(height, width)], height, width))[0]
    for row in range(height):
        for column in range(width):
            expected = []
            for position in ((row + 1) / height, (column + 1) / width):
                for channel in range(dim // 2):
                    angle = 2 * math.pi * position / temperature ** (2 * (channel // 2) / (dim // 2))
                    expected.append(math.cos(angle) if channel % 2 else math.sin(angle))
            torch.testing.assert_close(result[:, row, column], torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size_hw", [(1, 1), (4, 6), (7, 2)])
@pytest.mark.parametrize("build", [SinePosition, LearnedPosition])
def test_padding_and_batch_mates_change_no_encoding(build, size_hw):
    encode = build(32)
    alone = encode(padding_of([size_hw], *size_hw))[0]
    together = encode(padding_of([(9, 3), size_hw, (2, 8)], 9, 8))[1]
    torch.testing.assert_close(together[:, : size_hw[0], : size_hw[1]], alone)


@pytest.mark.parametrize("build", [SinePosition, LearnedPosition])
def test_every_place_has_its_own_encoding(build):
    encoding = build(32)(padding_of([(6, 7)], 6, 7))[0].flatten(1).T
    distance = torch.cdist(encoding, encoding) + torch.eye(42)
    assert distance.min() > 1e-2


def test_learned_encodings_are_trained_and_sine_ones_are_not():
    assert not list(SinePosition(32).parameters())
    learned = LearnedPosition(32)
    learned(padding_of([(2, 3)], 2, 3)).sum().backward()
    assert learned.row_embed.weight.grad[:2].all()
    assert not learned.row_embed.weight.grad[2:].any()


def test_learned_encodings_have_an_end():
    with pytest.raises(
        ValueError, match="feature map is 2x51, learned position encodings reach 50; use position: sine"
    ):
        LearnedPosition(32)(padding_of([(2, 51)], 2, 51))


def test_sine_encoding_refuses_an_odd_size():
    with pytest.raises(ValueError, match="hidden_dim is 30; .* multiple of 4"):
        SinePosition(30)


def test_no_encoding_is_zero_for_any_size():
    assert torch.equal(NoPosition(32)(padding_of([(2, 3), (4, 5)], 4, 5)), torch.zeros(2, 32, 4, 5))
