"""State dicts with the names and shapes of those that the authors publish, of any size."""

import torch

from detr.official import COCO_CATEGORIES

R50, R101 = (3, 4, 6, 3), (3, 4, 23, 3)
SMALL = {"dim": 32, "feedforward": 48, "queries": 7, "encoder": 1, "decoder": 2}


def published(blocks, dim=256, feedforward=2048, queries=100, encoder=6, decoder=6):
    """Names and shapes of the authors' state dict, with or without DC5; compared with their package, version 0.1.4."""
    shapes = {}

    def put(name, out, *rest, parts=("weight", "bias")):
        shapes.update({f"{name}.{part}": (out, *rest) if part == "weight" else (out,) for part in parts})

    def conv(conv_name, norm_name, out, inside, size):
        put(f"backbone.0.body.{conv_name}", out, inside, size, size, parts=("weight",))
        put(f"backbone.0.body.{norm_name}", out, parts=("weight", "bias", "running_mean", "running_var"))

    conv("conv1", "bn1", 64, 3, 7)
    inside = 64
    for stage, depth in enumerate(blocks, start=1):
        planes = 32 * 2**stage
        for block in (f"layer{stage}.{index}" for index in range(depth)):
            conv(f"{block}.conv1", f"{block}.bn1", planes, inside, 1)
            conv(f"{block}.conv2", f"{block}.bn2", planes, planes, 3)
            conv(f"{block}.conv3", f"{block}.bn3", 4 * planes, planes, 1)
            if block.endswith(".0"):
                conv(f"{block}.downsample.0", f"{block}.downsample.1", 4 * planes, inside, 1)
            inside = 4 * planes
    for part, depth, attentions in (("encoder", encoder, ["self"]), ("decoder", decoder, ["self", "multihead"])):
        for layer in (f"transformer.{part}.layers.{index}" for index in range(depth)):
            for attention in attentions:
                shapes[f"{layer}.{attention}_attn.in_proj_weight"] = (3 * dim, dim)
                shapes[f"{layer}.{attention}_attn.in_proj_bias"] = (3 * dim,)
                put(f"{layer}.{attention}_attn.out_proj", dim, dim)
            put(f"{layer}.linear1", feedforward, dim)
            put(f"{layer}.linear2", dim, feedforward)
            for norm in range(1, len(attentions) + 2):
                put(f"{layer}.norm{norm}", dim)
    put("transformer.decoder.norm", dim)
    put("class_embed", 92, dim)
    for layer, out in enumerate((dim, dim, 4)):
        put(f"bbox_embed.layers.{layer}", out, dim)
    put("query_embed", queries, dim, parts=("weight",))
    put("input_proj", dim, 2048, 1, 1)
    return shapes


def state_of(blocks=R50, **sizes):
    """A state dict of these names and shapes: tensor k is full of k and takes no room; class_embed is random."""
    shapes = published(blocks, **sizes)
    state = {name: torch.tensor(float(k)).expand(shape) for k, (name, shape) in enumerate(shapes.items())}
    return state | {name: torch.randn(shapes[name]) for name in ("class_embed.weight", "class_embed.bias")}


def saved(path, state, **options):
    torch.save({"model": state}, path, **options)
    return path


def assert_all_landed(model, state):
    own = {k.replace("backbone.", "backbone.0.body.", 1): v for k, v in model.state_dict().items()}
    assert own.keys() == state.keys()
    heads = {"class_embed.weight", "class_embed.bias"}
    assert [key for key in own.keys() - heads if not torch.equal(own[key], state[key])] == []
    for key in heads:
        assert torch.equal(own[key][-1], state[key][91])
        for label, category in enumerate(COCO_CATEGORIES):
            assert torch.equal(own[key][label], state[key][category.id])
