import argparse
import hashlib
import http.server
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

import pipelines.train
from detr import official
from detr.backbone import ResNet
from detr.checkpoint import Category, InputSize, load_model, save_model
from detr.coco import CocoDataset, ImageArchive, load_annotations
from detr.distributed import Process
from detr.model import ModelConfig, build_model
from detr.official import COCO_CATEGORIES, URLS, fetch, from_state, initialize, load_official
from detr.train import TrainConfig, fit
from detr.transforms import TrainTransform
from pipelines.params import from_document, merged, to_yaml
from pipelines.train import StopRequest
from tests.conftest import ROOT, TINY, TINY_MODEL, call

CONFIG = from_document(merged(ROOT, None, [*TINY, "train.evaluate_epochs=0"]), "train", TrainConfig)
R50, R101 = (3, 4, 6, 3), (3, 4, 23, 3)
SMALL = {"dim": 32, "feedforward": 48, "queries": 7, "encoder": 1, "decoder": 2}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


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


@pytest.mark.parametrize(
    ("blocks", "backbone", "stride", "millions"), [(R50, "resnet50", 32, 41.5), (R101, "resnet101", 16, 60.5)]
)
def test_every_published_tensor_lands_where_it_should(blocks, backbone, stride, millions):
    state = state_of(blocks)
    model = from_state(state, stride, "a")
    assert_all_landed(model, state)
    assert model.config == ModelConfig(
        backbone, 1.0, "frozen", "none", stride, "sine", 10000.0, 256, 8, 2048, 6, 6, 100, 0.1, 0.1, False
    )
    assert sum(v.numel() for v in state.values()) == pytest.approx(millions * 1e6, rel=0.01)
    assert (model.num_classes, model.training) == (80, False)


def test_the_categories_are_cocos():
    names = FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]  # by id, "N/A" where there is none
    expected = [Category(key, name) for key, name in enumerate(names) if name not in ("__background__", "N/A")]
    assert list(COCO_CATEGORIES) == expected
    assert (len(expected), len(names)) == (80, 91)


@pytest.mark.parametrize("name", [Path(url).name for url in URLS.values()])
def test_a_file_gives_what_load_model_gives(name, tmp_path):
    state = state_of(R101 if "r101" in name else R50, **SMALL)
    path = saved(tmp_path / name, state)
    model, categories, input_size = load_official(path)
    assert_all_landed(model, state)
    assert (model.config.backbone, model.config.stride) == (
        f"resnet{name[6:9].strip('-')}",
        16 if "dc5" in name else 32,
    )
    assert (categories, input_size) == (list(COCO_CATEGORIES), InputSize(800, 1333, 1))
    save_model(model, categories, input_size, "", tmp_path / "ours")
    again = load_model(tmp_path / "ours")
    assert again[1:] == (categories, input_size)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again[0].state_dict().items())


def test_a_stride_that_is_given_wins_over_the_name(tmp_path):
    path = saved(tmp_path / "dc5.pth", state_of(**SMALL))
    assert [load_official(str(path), stride)[0].config.stride for stride in (None, 16, 32)] == [16, 16, 32]


@pytest.mark.parametrize("zipped", [False, True])
def test_a_training_checkpoint_of_theirs_is_read_and_all_but_its_model_ignored(zipped, tmp_path):
    state = state_of(**SMALL)
    args = argparse.Namespace(lr=1e-4, masks=False, output_dir="out")
    optimizer = torch.optim.AdamW([torch.zeros(2)]).state_dict()
    document = {"model": state, "optimizer": optimizer, "lr_scheduler": {"last_epoch": 3}, "epoch": 3, "args": args}
    torch.save(document, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=zipped)
    assert_all_landed(load_official(tmp_path / "checkpoint.pth")[0], state)


def test_the_architecture_follows_from_names_and_shapes():
    state = state_of(dim=64, feedforward=24, queries=3, encoder=0, decoder=4)
    state |= {f"transformer.encoder.norm.{part}": torch.ones(64) for part in ("weight", "bias")}
    config = from_state(state, 16, "a").config
    assert (config.hidden_dim, config.dim_feedforward, config.num_queries) == (64, 24, 3)
    assert (config.num_encoder_layers, config.num_decoder_layers, config.pre_norm) == (0, 4, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("query_embed.weight"), r"query_embed.weight is \(100, 256\) in the model, absent in the file"),
        (
            lambda s: s.pop("backbone.0.body.layer3.4.conv2.weight"),
            r"does not fit resnet50: backbone.layer3.4.conv2.weight is \(256, 256, 3, 3\) in the model, absent in",
        ),
        (lambda s: s.pop("class_embed.bias"), r"class_embed.bias is \(81,\) in the model, absent in the file"),
        (lambda s: s.update(extra=torch.zeros(2)), r"extra is absent in the model, \(2,\) in the file"),
        (
            lambda s: s.update({"backbone.0.body.bn1.num_batches_tracked": torch.tensor(0)}),
            r"backbone.bn1.num_batches_tracked is absent in the model, \(\) in the file",
        ),
        (
            lambda s: s.update({"input_proj.weight": torch.zeros(256, 512, 1, 1)}),
            r"input_proj.weight is \(256, 2048, 1, 1\) in the model, \(256, 512, 1, 1\) in the file",
        ),
        (
            lambda s: s.update({"query_embed.weight": torch.zeros(7)}),
            r"query_embed.weight is \(100, 256\) in the model, \(7,\) in the file",
        ),
        (
            lambda s: s.update({"class_embed.weight": torch.zeros(251, 256)}),
            r"class_embed.weight is \(251, 256\), expected 92 rows",
        ),
        (
            lambda s: s.update({f"detr.{key}": s.pop(key) for key in list(s)}),
            "a segmentation model, which is not supported; give one that only detects",
        ),
        (lambda s: s.update({"mask_head.lay1.bias": torch.zeros(8)}), "a segmentation model, which is not supported"),
        (lambda s: s.clear(), r"absent in the file"),
    ],
)
def test_a_key_that_is_missing_left_over_or_of_another_shape_is_named(change, message):
    state = state_of()
    change(state)
    with pytest.raises(ValueError, match=f"^a.pth.*{message}"):
        from_state(state, 32, "a.pth")


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (self.victim,)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("key", ["model", "args"])
def test_code_in_a_checkpoint_is_refused_and_never_run(key, zipped, tmp_path):
    document = {"model": state_of(**SMALL), key: Malicious(str(tmp_path / "run"))}
    torch.save(document, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    message = r"evil\.pth is not a whole file of weights and nothing else \(it asks for posix\.mkdir\)"
    with pytest.raises(ValueError, match=message):
        load_official(tmp_path / "evil.pth")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>\n<html><body>Not Found</body></html>\n", "cut"])
def test_a_file_that_holds_something_else_is_named(content, tmp_path):
    if content == "cut":
        content = saved(tmp_path / "whole.pth", {"a": torch.zeros(99)}).read_bytes()[:-50]
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pth is not a whole file of weights and nothing else \(\w+\)"):
        load_official(tmp_path / "a.pth")


@pytest.mark.parametrize("document", [{"a": torch.zeros(1)}, {"model": {"a": 3}}, [1], {"model": {1: torch.zeros(1)}}])
def test_a_file_without_a_model_says_what_is_expected(document, tmp_path):
    torch.save(document, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r'a\.pth holds no tensors under "model"'):
        load_official(tmp_path / "a.pth")


def test_a_missing_file_names_the_choices():
    with pytest.raises(ValueError, match="/nowhere/a.pth is neither a file, a URL nor one of detr-r50, detr-dc5-r50"):
        load_official("/nowhere/a.pth")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that a loopback server serves, its address, and the paths asked for."""
    folder, asked = tmp_path / "site", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_request(self, *_):
            asked.append(self.path)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def publish(folder, state, digits=None):
    """Puts a checkpoint on the site under its digest's first digits; the file's name."""
    path = saved(folder / "new", state)
    digits = digits or hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return path.rename(folder / f"detr-r50-dc5-{digits}.pth").name


def cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "home").rglob("*") if path.is_file())


def test_a_url_is_downloaded_once_and_a_damaged_copy_again(site, tmp_path):
    folder, address, asked = site
    state = state_of(**SMALL)
    name = publish(folder, state)
    for times in (1, 1):
        model = load_official(f"{address}/{name}?download=1")[0]
        assert_all_landed(model, state)
        assert (model.config.stride, len(asked), cached(tmp_path)) == (16, times, [name])
    fetch(f"{address}/{name}").write_bytes(b"damaged")
    assert_all_landed(load_official(f"{address}/{name}")[0], state)
    assert len(asked) == 2


def test_a_short_name_is_a_url(site, monkeypatch):
    folder, address, _ = site
    assert list(URLS) == ["detr-r50", "detr-dc5-r50", "detr-r101", "detr-dc5-r101"]
    monkeypatch.setitem(official.URLS, "detr-dc5-r50", f"{address}/{publish(folder, state_of(**SMALL))}")
    assert load_official("detr-dc5-r50")[0].config.stride == 16


def test_several_may_fetch_at_once(site):
    folder, address, _ = site
    name = publish(folder, state_of(**SMALL))
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(fetch, [f"{address}/{name}"] * 4))
    assert len(set(paths)) == 1
    assert paths[0].read_bytes() == (folder / name).read_bytes()


def test_a_download_with_another_digest_is_refused_and_not_kept(site, tmp_path):
    folder, address, _ = site
    name = publish(folder, state_of(**SMALL), digits="0123abcd")
    with pytest.raises(ValueError, match=rf'{name} was not fetched \(invalid hash value \(expected "0123abcd"'):
        load_official(f"{address}/{name}")
    assert cached(tmp_path) == []


@pytest.mark.parametrize("name", ["a.pth", "a-1234567.pth", "a-12345678.pth.html", ""])
def test_a_url_without_its_digest_is_refused_before_anything_is_fetched(name, site):
    _, address, asked = site
    with pytest.raises(ValueError, match=r"does not end as -DIGITS\.pth, 8 or more hex digits of its SHA-256"):
        load_official(f"{address}/{name}")
    assert asked == []


def test_a_server_that_has_no_such_file_is_named(site, tmp_path):
    with pytest.raises(ValueError, match=r"http://127.*/a-12345678\.pth was not fetched \(HTTP Error 404"):
        load_official(f"{site[1]}/a-12345678.pth")
    assert cached(tmp_path) == []


def new_model(num_classes, **changes):
    return build_model(replace(TINY_MODEL, **changes), num_classes)


def trained_folder(folder, **changes):
    model = new_model(2, **changes)
    for value in model.state_dict().values():
        value.add_(0.01)
    save_model(model, [Category(3, "cat"), Category(44, "dog")], InputSize(96, 96, 96), "abc", folder)
    return str(folder)


@pytest.mark.parametrize("norm", ["group", "frozen"])
def test_training_starts_from_all_but_the_class_head_and_goes_on(norm, drawn, tmp_path):
    source = trained_folder(tmp_path / "trained", backbone_norm=norm)
    weights = load_file(tmp_path / "trained/model.safetensors")
    model = new_model(8, backbone_norm=norm, dropout=0.1, attention_dropout=0.1)
    head = [p.clone() for p in model.class_embed.parameters()]
    initialize(model, source)
    assert all(torch.equal(a, b) for a, b in zip(head, model.class_embed.parameters(), strict=True))
    for key, value in model.state_dict().items():
        assert key.startswith("class_embed.") or torch.equal(value, weights[key])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    names = {name for name, _ in model.named_parameters()}
    stem = {name for name in names if name.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer1"))}
    assert frozen == (stem if norm == "frozen" else set())
    annotations = load_annotations(drawn / "instances_train.json")
    dataset = CocoDataset(annotations, ImageArchive(drawn / "train.zip"), TrainTransform(CONFIG.transform, 0))
    list(fit(model, dataset, CONFIG, Process(0, 1, torch.device("cpu"))))
    after = dict(model.named_parameters())
    assert {key for key in names if key in weights and torch.equal(after[key], weights[key])} == frozen


def test_the_authors_weights_start_a_model_of_other_classes(tmp_path):
    state = state_of(**SMALL)
    path = saved(tmp_path / "a.pth", state)
    config = replace(load_official(path)[0].config, backbone_weights="imagenet", dropout=0.0)
    model = build_model(replace(config, backbone_weights="none"), 3)
    initialize(model, str(path))
    own = {k.replace("backbone.", "backbone.0.body.", 1): v for k, v in model.state_dict().items()}
    assert [k for k in own if not k.startswith("class_embed.") and not torch.equal(own[k], state[k])] == []
    assert model.class_embed.weight.shape == (4, 32)
    assert not any(p.requires_grad for p in model.backbone.layer1.parameters())


def test_the_preset_fits_the_published_weights(tmp_path):
    config = from_document(merged(ROOT, "finetune", []), "model", ModelConfig)
    path = saved(tmp_path / Path(URLS["detr-r50"]).name, state_of())
    model = build_model(config, 3)
    initialize(model, str(path))
    assert torch.equal(model.query_embed.weight, load_official(path)[0].query_embed.weight)
    document, plain = merged(ROOT, "finetune", []), merged(ROOT, None, [])
    assert document["train"]["initial_weights"] == "detr-r50"
    plain["validate"]["tolerated"] |= {"image_has_objects": 0, "object_single": 0}  # the demo's, of its drawn scenes
    assert (document["download"], document["validate"]) == (plain["download"], plain["validate"])


SAME_SHAPES = "every shape is the same, but what is computed is not"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_queries": 9},
            r"query_embed.weight is \(9, 32\) in the model, \(5, 32\) in the file; set model.num_queries=5 as in the",
        ),
        (
            {"num_decoder_layers": 1},
            r"transformer.decoder.layers.1.linear1.bias is absent in the model, \(64,\) in the file; "
            "set model.num_decoder_layers=2 as in the weights",
        ),
        (
            {"hidden_dim": 64, "num_heads": 8},
            r"bbox_embed.layers.0.bias is \(64,\) in the model, \(32,\) in the file; "
            "set model.hidden_dim=32, model.num_heads=4 as in the weights",
        ),
        ({"num_heads": 8}, f"{SAME_SHAPES}; set model.num_heads=4 as in the weights"),
        ({"stride": 16}, f"{SAME_SHAPES}; set model.stride=32 as in the weights"),
        ({"position_temperature": 1e4}, f"{SAME_SHAPES}; set model.position_temperature=20.0 as in the weights"),
        ({"backbone_norm": "frozen"}, r"set model.backbone_norm=group as in the weights"),
    ],
)
def test_weights_of_another_architecture_name_the_difference_and_what_to_set(change, message, tmp_path):
    source = trained_folder(tmp_path)
    model = new_model(8, **change)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"train.initial_weights {source} does not fit the model: .*{message}"):
        initialize(model, source)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Silent:
    """In MLflow's place, which is not what is tested here."""

    def __init__(self, *_):
        pass

    def put(self, *_):
        pass

    put_picture = close = put


@pytest.fixture
def trained(drawn, tmp_path, monkeypatch):
    """Trains as the stage does, and returns the folder of the result."""
    monkeypatch.setattr(pipelines.train, "Mirror", Silent)
    (tmp_path / "passed.json").write_text(json.dumps({"data": "digest"}))

    def run(name, model=TINY_MODEL, **changes):
        config = replace(CONFIG, epochs=1, checkpoint_minutes=1.0, **changes)
        folders = (drawn, tmp_path / "passed.json", tmp_path / name, tmp_path / "scratch")
        pipelines.train.train(model, config, *folders, StopRequest())
        return tmp_path / name

    return run


def test_the_stage_starts_from_a_folder_that_it_wrote(trained):
    first = trained("first", lr=0.0, lr_backbone=0.0)
    never = replace(TINY_MODEL, backbone_weights="/nowhere/never-read.pth")
    second = trained("second", never, lr=0.0, lr_backbone=0.0, seed=7, initial_weights=str(first))
    third = trained("third", seed=7, initial_weights=str(first))
    before, kept, changed = (load_file(folder / "model.safetensors") for folder in (first, second, third))
    differ = {key for key in before if not torch.equal(before[key], kept[key])}
    assert differ == {"class_embed.weight", "class_embed.bias"}
    assert len({key for key in before if torch.equal(before[key], changed[key])}) == 0
    assert load_model(second)[0].config == TINY_MODEL


def test_without_initial_weights_nothing_changes(trained, drawn):
    weights = load_file(trained("out") / "model.safetensors")
    torch.manual_seed(CONFIG.seed)
    annotations = load_annotations(drawn / "instances_train.json")
    model = build_model(TINY_MODEL, len(annotations.category_ids))
    transform = TrainTransform(CONFIG.transform, CONFIG.seed)
    dataset = CocoDataset(annotations, ImageArchive(drawn / "train.zip"), transform)
    list(fit(model, dataset, replace(CONFIG, epochs=1), Process(0, 1, torch.device("cpu"))))
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_a_training_never_starts_from_the_folder_that_it_replaces(trained, tmp_path):
    with pytest.raises(ValueError, match=r"train.initial_weights is .*out, which this training replaces; copy it"):
        trained("out", initial_weights=str(tmp_path / "here" / ".." / "out"))


def test_the_fingerprint_covers_the_content_of_local_weights(tmp_path):
    folder, file = trained_folder(tmp_path / "trained"), tmp_path / "backbone.safetensors"
    backbone = ResNet("resnet10", 0.25, 32, "group").state_dict()
    save_file(backbone, file)
    model, config = replace(TINY_MODEL, backbone_weights=str(file)), replace(CONFIG, initial_weights=folder)

    def mark():
        return pipelines.train.fingerprint(model, config, "data")

    marks = [mark(), mark()]
    save_file({key: value + 1 for key, value in backbone.items()}, file)
    marks.append(mark())
    for path in (tmp_path / "trained").iterdir():
        path.write_bytes(path.read_bytes() + b" ")
    marks.append(mark())
    assert marks[0] == marks[1]
    assert len(set(marks)) == 3


def test_weights_are_fetched_before_any_process_starts(tmp_path, monkeypatch):
    document = merged(ROOT, None, ["train.initial_weights=http://127.0.0.1:9/detr-12345678.pth"])
    (tmp_path / "params.yaml").write_text(to_yaml(document))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(pipelines.train, "launch", lambda: pytest.fail("launched"))
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/detr-12345678.pth was not fetched \("):
        pipelines.train.main()


def test_what_stops_a_training_process_is_one_line(tmp_path):
    document = merged(ROOT, None, ["train.initial_weights=artifacts/train"])
    (tmp_path / "params.yaml").write_text(to_yaml(document))
    said = call(tmp_path, sys.executable, "-m", "pipelines.train", code=1, PYTHONPATH=str(ROOT))
    assert said.splitlines()[-1].startswith("error: train.initial_weights is artifacts/train, which this training")
    assert "Traceback" not in said
