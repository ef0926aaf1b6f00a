from dataclasses import replace

import pytest
import torch
from torch import nn

from detr.transformer import Attention, DecoderLayer, EncoderLayer, LayerShape, Transformer

DIM, HEADS = 32, 4
SHAPE = LayerShape(DIM, HEADS, 64, 0.0, 0.0, False)


def randomised(module):
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return module


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padding(*lengths, size):
    return torch.arange(size)[None] >= torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("self_attention", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_equals_torch(self_attention, masked):
    ours, theirs = randomised(Attention(DIM, HEADS, 0.0)), nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    key, value = features(2, 7, DIM), features(2, 7, DIM, seed=1)
    query = key if self_attention else features(2, 5, DIM, seed=2)
    hidden = padding(7, 4, size=7) if masked else None
    result = ours(query, key, value, None if hidden is None else ~hidden[:, None, None])
    torch.testing.assert_close(result, theirs(query, key, value, key_padding_mask=hidden)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_encoder_layer_equals_torch(pre_norm):
    ours = randomised(EncoderLayer(replace(SHAPE, pre_norm=pre_norm)))
    theirs = nn.TransformerEncoderLayer(DIM, HEADS, 64, 0.0, batch_first=True, norm_first=pre_norm)
    theirs.load_state_dict(ours.state_dict())
    x, hidden = features(2, 7, DIM), padding(7, 4, size=7)
    result = ours(x, torch.zeros(2, 7, DIM), ~hidden[:, None, None])
    torch.testing.assert_close(result, theirs(x, src_key_padding_mask=hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_decoder_layer_equals_torch(pre_norm):
    ours = randomised(DecoderLayer(replace(SHAPE, pre_norm=pre_norm)))
    theirs = nn.TransformerDecoderLayer(DIM, HEADS, 64, 0.0, batch_first=True, norm_first=pre_norm)
    theirs.load_state_dict(ours.state_dict())
    x, memory, hidden = features(2, 5, DIM), features(2, 7, DIM, seed=1), padding(7, 4, size=7)
    result = ours(x, torch.zeros(2, 5, DIM), memory, memory, ~hidden[:, None, None])
    expected = theirs(x, memory, memory_key_padding_mask=hidden)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_positions_enter_queries_and_keys_but_not_values():
    layer = randomised(EncoderLayer(SHAPE))
    attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    attention.load_state_dict(layer.self_attn.state_dict())
    x, position = features(1, 6, DIM), features(1, 6, DIM, seed=3)
    mixed = layer.norm1(x + attention(x + position, x + position, x)[0])
    expected = layer.norm2(mixed + layer.linear2(layer.linear1(mixed).relu()))
    torch.testing.assert_close(layer(x, position, None), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=[False, True], ids=["post_norm", "pre_norm"])
def transformer(request):
    return randomised(Transformer(2, 3, replace(SHAPE, pre_norm=request.param)))


def test_outputs_of_every_layer_are_normed_alike(transformer):
    outputs = transformer(features(2, 7, DIM), features(2, 7, DIM), padding(7, 4, size=7), features(5, DIM))
    assert outputs.shape == (3, 2, 5, DIM)
    norm = transformer.decoder.norm
    plain = (outputs - norm.bias) / norm.weight
    torch.testing.assert_close(plain.mean(-1), torch.zeros(3, 2, 5), rtol=0, atol=1e-4)


def test_padding_and_batch_mates_change_nothing(transformer):
    queries, place = features(5, DIM, seed=5), features(3, 9, DIM, seed=6)
    x, lengths = features(3, 9, DIM), (9, 4, 1)
    together = transformer(x, place, padding(*lengths, size=9), queries)
    for i, length in enumerate(lengths):
        alone = transformer(x[i : i + 1, :length], place[i : i + 1, :length], padding(length, size=length), queries)
        torch.testing.assert_close(together[:, i], alone[:, 0], rtol=1e-4, atol=1e-5)


def test_features_in_the_padding_change_nothing(transformer):
    queries, place, hidden = features(5, DIM, seed=5), features(2, 9, DIM, seed=6), padding(9, 4, size=9)
    x = features(2, 9, DIM)
    noisy = torch.where(hidden[..., None], 100 * features(2, 9, DIM, seed=7), x)
    torch.testing.assert_close(
        transformer(noisy, place, hidden, queries), transformer(x, place, hidden, queries), rtol=1e-5, atol=1e-5
    )


def test_the_order_of_queries_and_of_places_changes_nothing(transformer):
    queries, x, place, hidden = features(5, DIM), features(1, 9, DIM), features(1, 9, DIM, seed=1), padding(6, size=9)
    outputs = transformer(x, place, hidden, queries)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(transformer(x, place, hidden, queries[order]), outputs[:, :, order])
    places = torch.tensor([4, 8, 0, 6, 2, 5, 1, 7, 3])
    shuffled = transformer(x[:, places], place[:, places], hidden[:, places], queries)
    torch.testing.assert_close(shuffled, outputs, rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_only():
    model = Transformer(1, 1, replace(SHAPE, dropout=0.5, attention_dropout=0.5))
    arguments = features(1, 4, DIM), features(1, 4, DIM), padding(4, size=4), features(3, DIM)
    assert not torch.equal(model(*arguments), model(*arguments))
    model.eval()
    assert torch.equal(model(*arguments), model(*arguments))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="model.hidden_dim is 30, not divisible by 4 heads"):
        Attention(30, 4, 0.0)


@pytest.mark.parametrize("masked", [True, False])
def test_attention_dropout_keeps_the_mean_and_the_mask(masked):
    attention = randomised(Attention(DIM, HEADS, 0.3))
    key, value = features(1, 7, DIM).expand(5000, -1, -1), features(1, 7, DIM, seed=1).expand(5000, -1, -1)
    attend = ~padding(4, size=7)[:, None, None] if masked else None
    torch.manual_seed(0)
    draws = attention(key, key, value, attend)
    expected = attention.eval()(key[:1], key[:1], value[:1], attend)
    assert draws.std(dim=0).min() > 0.1
    torch.testing.assert_close(draws.mean(dim=0), expected[0], rtol=0, atol=0.1)
