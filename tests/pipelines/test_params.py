import os
from dataclasses import dataclass

import pytest
from dvc.utils.serialize import parse_yaml

from pipelines.__main__ import check
from pipelines.params import from_document, load, merge_parameters, read_yaml, to_yaml
from tests.running import ROOT

PRESETS = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))


@dataclass(frozen=True)
class Inner:
    rate: float
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Record:
    epochs: int
    where: str | Inner
    inner: Inner


def document(**changes):
    return {"train": {"epochs": 3, "where": "here", "inner": {"rate": 1e-4, "sizes": [1, 2]}} | changes}


def test_a_section_becomes_its_dataclass():
    assert from_document(document(), "train", Record) == Record(3, "here", Inner(1e-4, (1, 2)))


def test_a_union_takes_the_mapping_as_the_record():
    record = from_document(document(where={"rate": 1, "sizes": []}), "train", Record)
    assert record.where == Inner(1.0, ())


def test_numbers_without_a_point_are_numbers(tmp_path):
    (tmp_path / "params.yaml").write_text(
        "train: {epochs: 3, where: a, inner: {rate: 1e-4, sizes: []}}", encoding="utf-8"
    )
    assert load("train", Record, tmp_path / "params.yaml").inner.rate == 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "train lacks the key 'epochs'"),
        ({"epochs": 1, "epoch": 2}, "train has an unknown key 'epoch'; did you mean 'epochs'?"),
        ({"epochs": "many"}, "train.epochs is 'many': expected `int`, got `str`"),
        ({"epochs": 1.5}, "train.epochs is 1.5: expected `int`, got `float`"),
        ({"epochs": True}, "train.epochs is True: expected `int`, got `bool`"),
        ({"epochs": None}, "train.epochs is None"),
        ({"epochs": 1, "inner": 4}, "train.inner is 4, expected a section with the keys"),
        ({"epochs": 1, "inner": {"rate": 1.0, "sizes": ["a"]}}, "train.inner.sizes is .* expected `int`, got `str`"),
        (
            {"epochs": 1, "inner": {"rte": 1.0, "sizes": []}},
            "train.inner has an unknown key 'rte'; did you mean 'rate'",
        ),
    ],
)
def test_a_wrong_key_is_named_with_the_nearest_right_one(changes, message):
    base = document()["train"]
    base.pop("epochs")
    with pytest.raises(ValueError, match=message):
        from_document({"train": base | changes}, "train", Record)


def test_an_unknown_or_missing_section_is_named():
    with pytest.raises(ValueError, match="unknown section 'trian'; did you mean 'train'"):
        from_document({"trian": {}}, "train", Record)
    with pytest.raises(ValueError, match="lacks the section 'train'"):
        from_document({"model": {}}, "train", Record)


@pytest.mark.parametrize(("text", "message"), [("", "is empty"), ("- a", "not a mapping"), ("a: [", "not valid YAML")])
def test_a_file_that_is_no_mapping_is_named(tmp_path, text, message):
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_yaml(tmp_path / "params.yaml")


def test_a_missing_file_says_where_to_stand(tmp_path):
    with pytest.raises(ValueError, match="does not exist; run from the root of the project"):
        read_yaml(tmp_path / "params.yaml")


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_every_preset_passes_the_strict_check(preset):
    check(merge_parameters(ROOT, preset, []))


def test_overrides_come_last_and_presets_chain():
    both = merge_parameters(ROOT, "coco-detr-dc5-r101", ["train.epochs=7", "model.stride=32"])
    assert (both["model"]["backbone"], both["model"]["stride"], both["train"]["epochs"]) == ("resnet101", 32, 7)
    assert both["train"]["batch_size"] == 64


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "not of the form section.key=value"),
        ("train.epoch=3", "there is no key 'epoch' to override; did you mean 'epochs'"),
        ("tran.epochs=3", "there is no key 'tran' to override; did you mean 'train'"),
        ("train.epochs=[", "the value is not valid YAML"),
    ],
)
def test_a_wrong_override_is_refused(override, message):
    with pytest.raises(ValueError, match=message):
        merge_parameters(ROOT, None, [override])


TEXTS = ["/a/set #2", "C:#", "a: b", "yes", "~", "null", "1e3", "007", "2026-11-28", "*a", "&a", "@a", "%a", "!a", "- a", "? a", "| a",
         "> a", " a ", "a,b", "a]", "it's", 'say "a"', "行人/Käse", "a\\b", "=", "<<", "$HOME", "x=y", "\ta", ".", "---", "# a"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("key", ["download.source", "train.initial_weights", "download.source.train_images"])
def test_a_text_is_taken_as_it_stands(key, text):
    document = merge_parameters(ROOT, None, [f"{key}={text}"])
    for part in key.split("."):
        document = document[part]
    assert document == text
    assert parse_yaml(to_yaml({"text": text}), "params.yaml") == {"text": text}


@pytest.mark.parametrize(
    ("text", "value"),
    [('"/a/set #2"', "/a/set #2"), ("'it''s'", "it's"), ('"a\\tb"', "a\tb"), ("{a: 'b #c'}", {"a": "b #c"})],
)
def test_a_text_in_quotes_and_a_mapping_are_yaml(text, value):
    assert merge_parameters(ROOT, None, [f"download.source={text}"])["download"]["source"] == value


@pytest.mark.parametrize(
    "override",
    ["train.epochs=3 # few", "download.source='a' # b", "download.source={a: b #c\n}", "register.protected={#\na: 1}"],
)
def test_what_yaml_would_drop_is_refused_by_its_character(override):
    with pytest.raises(ValueError, match="YAML drops what follows '#'; put the value into quotes"):
        merge_parameters(ROOT, None, [override])


def test_bytes_of_another_encoding_are_refused_in_words():
    with pytest.raises(ValueError, match=r"'download.source=/a/K\\udce4se' has bytes that are no UTF-8; rename"):
        merge_parameters(ROOT, None, [os.fsdecode(b"download.source=/a/K\xe4se")])


@pytest.mark.parametrize("override", ["train.epochs=0", "model.stride=8", "train.schedule=linear", "train=3"])
def test_an_override_out_of_range_is_refused(override):
    with pytest.raises(ValueError, match=override.split("=")[0]):
        check(merge_parameters(ROOT, None, [override]))


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="no preset 'coco-detr-r5'; did you mean 'coco-detr-r50'"):
        merge_parameters(ROOT, "coco-detr-r5", [])


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        *((preset, []) for preset in [None, *PRESETS]),
        (
            None,
            ["download.mirrors={http://a.org/: [http://b.org/, https://c.org/x]}", "download.source=http://d.org/e#f"],
        ),
        (None, ["train.transform.scales=[96, 128]", "train.initial_weights=http://a.org/w.pth"]),
    ],
)
def test_dvc_reads_what_a_run_writes(preset, overrides):
    document = merge_parameters(ROOT, preset, overrides)
    assert parse_yaml(to_yaml(document), "params.yaml") == document


@pytest.mark.parametrize(
    ("preset", "overrides", "said"),
    [
        (None, ["train.batch_size=4"], "train.batch_size is 4, expected a multiple of train.micro_batch, 8"),
        (None, ["download.max_images=8"], "train.batch_size is 16, but download.max_images is 8"),
        (None, ["download.shapes.num_train=8"], "train.batch_size is 16, but download.shapes.num_train is 8"),
        ("detr-r50", ["train.lr_drop_epoch=0"], "train.lr_drop_epoch is 0 with train.schedule step"),
        ("finetune", ["model.stride=16"], "is 'detr-r50', which is another architecture; set model.stride=32"),
        ("finetune", ["train.initial_weights=detr-r101"], "is another architecture; set model.backbone=resnet101"),
        ("finetune", ["train.initial_weights=detr-r5"], "is 'detr-r5': no such file or folder, no URL"),
        ("finetune", ["train.initial_weights=detr"], "is 'detr', a folder that lacks config.json"),
        ("photos", ["model.backbone_weights=x.pth"], "model.backbone_weights is 'x.pth': no such file"),
        (
            "photos",
            ["model.backbone=resnet10", "model.backbone_width=0.5"],
            "set model.backbone to resnet18, 34, 50 or 101, model.b",
        ),
        (None, ["model.position=learned", "train.transform.max_size=1333"], "'learned', which reaches 800 pixels"),
        (None, ["register.protected={elipse: 0.1}"], "names 'elipse', no category .* did you mean 'ellipse'?"),
        (None, ["register.seed=-1"], "register.seed is -1, expected a number of at least 0"),
        (None, ["evaluate.seed=-1"], "evaluate.seed is -1, expected a number of at least 0"),
        (
            None,
            ["download.shapes.crowd_share=2"],
            "download.shapes.crowd_share is 2.0, expected a number of at least 0 and at most 1",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_starts(preset, overrides, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=said) as caught:
        check(merge_parameters(ROOT, preset, overrides))
    assert "\n" not in str(caught.value)


def test_more_processes_than_micro_batches_are_refused(monkeypatch):
    monkeypatch.setenv("PET_NPROC_PER_NODE", "4")
    with pytest.raises(ValueError, match="feeds 2 processes, and PET_NPROC_PER_NODE asks for 4; lower that or"):
        check(merge_parameters(ROOT, None, []))


def test_what_is_seldom_meant_is_said(capsys):
    check(
        merge_parameters(ROOT, "detr-r50", ["train.epochs=3", "model.backbone_weights=none", "train.warmup_steps=1000"])
    )
    check(merge_parameters(ROOT, None, []))
    assert capsys.readouterr().err.splitlines() == [
        "warning: train.lr_drop_epoch is 400 of 3 epochs: the rate never drops",
        "warning: model.backbone_norm is frozen without any weights: from random ones group learns better",
        "warning: train.warmup_steps is 1000 of 513 steps: train.lr is never reached",
    ]
