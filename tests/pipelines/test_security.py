"""What a form, an environment or a repository may hold of hostile strings and secrets, and where none of it may go."""

import re

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prefect.utilities.callables import parameter_schema
from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML

from pipelines.params import read_yaml, to_yaml
from pipelines.redaction import redact
from pipelines.retraining import flow
from pipelines.workspace.git import resolve_commit
from pipelines.workspace.overrides import DATA_ROOTS, check_parameters, confine, make_paths_absolute
from tests.hostile import BOMB, HOSTILE, WITH_PASSWORDS
from tests.running import ROOT

SCHEMA = parameter_schema(flow.retrain).model_dump()
TYPES = {"preset": flow.Preset, "overrides": flow.Overrides, "ref": flow.Ref, "note": flow.Note}


def refused(name, value):
    """Whether the server refuses a value by the schema of its form; it must where the flow does."""
    schema = {"properties": {name: SCHEMA["properties"][name]}}
    by_server = not jsonschema.Draft202012Validator(schema).is_valid({name: value})
    assert by_server or not by_flow(name, value)
    return by_server


def by_flow(name, value):
    """Whether the flow's own types refuse a value, however it came there."""
    try:
        TypeAdapter(TYPES[name]).validate_python(value)
    except ValidationError:
        return True
    return False


@pytest.mark.parametrize("text", [text.format(file="x") for text in HOSTILE])
def test_a_hostile_text_is_no_preset_and_no_control_character_passes(text):
    assert refused("preset", text)
    assert by_flow("preset", text) == (re.fullmatch(r"[\w-]{1,100}", text, re.ASCII) is None)
    assert refused("note", text) == (len(text) > 1000 or bool(re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)))
    assert refused("overrides", [f"download.source={text}"]) == refused("note", f"download.source={text}")
    assert refused("overrides", [f"{text}=1"]) or re.fullmatch(r"[a-z_0-9]+(\.[^.=\s]+)+", text)


@pytest.mark.parametrize(
    "ref", ["../x", "-x", "--upload-pack=x", "HEAD:params.yaml", "@{upstream}", "main@{yesterday}", ":/start", "^main",
            "a b", "a\x00", "/etc/passwd", "~", "", "main^{/x}", "a\\b", "*", "x" * 201],
)  # fmt: skip
def test_such_a_ref_is_refused_before_anything_is_stored(ref):
    assert refused("ref", ref)


@pytest.mark.parametrize(
    "ref", ["HEAD", "main", "HEAD~2", "v1.2^", "origin/main", "runs/none-20260101-000000", "größe"]
)
def test_what_git_calls_a_commit_is_a_ref(ref):
    assert not refused("ref", ref)


@pytest.mark.parametrize("ref", ["refs/../..", "main..main", "x/../../y", "HEAD~99999999999999999999"])
def test_a_ref_that_names_no_commit_is_told_in_one_line(ref):
    with pytest.raises(ValueError, match="is no commit, branch or tag here") as caught:
        resolve_commit(ROOT, ref)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", WITH_PASSWORDS)
def test_a_password_in_a_url_is_refused_before_it_is_stored_by_form_flow_and_command(override, tmp_path):
    schema = {"properties": {"overrides": SCHEMA["properties"]["overrides"]}}
    with pytest.raises(jsonschema.ValidationError, match="put a password into ~/.netrc"):
        jsonschema.validate({"overrides": [override]}, schema)
    for name, value in (("overrides", [override]), ("note", override)):
        with pytest.raises(ValidationError, match="put a password into ~/.netrc"):
            TypeAdapter(TYPES[name]).validate_python(value)
    with pytest.raises(ValueError, match="put a password into ~/.netrc") as caught:
        check_parameters(ROOT, None, [override])
    assert not re.search("pa55word|to-ken|p%40ss|u:p|s1gned", str(caught.value))


@pytest.mark.parametrize(
    "query", ["version=3&design=a", "versionId=aB3", "path=a;b=c", "keys=3&monkey=1", "x=1#token=2"]
)
def test_an_address_with_a_query_that_is_no_secret_is_taken(query):
    override = f"download.source=https://host/data.zip?{query}"
    assert not refused("overrides", [override])
    assert check_parameters(ROOT, None, [override])["download"]["source"].endswith(query)


@pytest.mark.parametrize("text", [f"[{BOMB}]".replace("*a", "x"), "[" * 400 + "]" * 400])
def test_a_few_letters_do_not_become_billions_of_values(text):
    with pytest.raises(ValueError, match="more than 10000 values|is not valid YAML|maximum") as caught:
        check_parameters(ROOT, None, [f"register.protected={text}"])
    assert len(str(caught.value)) < 2000


KEYS = [f"{name}.{key}" for name, section in read_yaml(ROOT / "params.yaml").items() for key in section]
PIECES = st.sampled_from([text.format(file="x") for text in HOSTILE if len(text) < 1000])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(KEYS), st.one_of(st.text(max_size=60), PIECES, st.lists(PIECES, max_size=4).map("".join)))
def test_whatever_an_override_holds_it_is_data_of_one_key_or_refused_in_one_line(key, text):
    override = f"{key}={text}"
    if refused("overrides", [override]):
        return
    said = ""
    try:
        document = check_parameters(ROOT, None, [override])
        confine(document, ROOT)
        make_paths_absolute(document, ROOT)
    except ValueError as error:
        said = str(error)
    assert "\n" not in said.strip()
    if said:
        return
    written = YAML(typ="safe", pure=True).load(to_yaml(document))
    before = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    section, name = key.split(".")
    written[section].pop(name), before[section].pop(name)
    for one in (written, before):  # made absolute
        for place in (("download", "source"), ("model", "backbone_weights"), ("train", "initial_weights")):
            one[place[0]].pop(place[1], None)
    assert written == before


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The root of a project with links that lead out of it, and a folder that the worker lets parameters name."""
    root = tmp_path / "project"
    for folder in (root / "data/mine", root / "data/linked", tmp_path / "outside", tmp_path / "shared"):
        folder.mkdir(parents=True)
    (tmp_path / "outside/x.pth").write_text("secret", encoding="utf-8")
    (root / "out").symlink_to(tmp_path / "outside")
    (root / "data/linked/train").symlink_to(tmp_path / "outside")
    (root / "loop").symlink_to(root / "loop")
    monkeypatch.setenv(DATA_ROOTS, str(tmp_path / "shared"))
    return root


def confined(root, override):
    confine(check_parameters(ROOT, None, [override]), root)


FOUR = "{{train_images: {0}, val_images: data/mine, train_annotations: data/mine, val_annotations: data/mine}}"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("download.source=/etc", "outside of the project"),
        ("download.source=..", "outside of the project"),
        ("download.source=../outside", "outside of the project"),
        ("download.source=data/mine/../../../outside", "outside of the project"),
        ("download.source=out", "leads to .*outside, outside of the project"),
        ("download.source=data/linked", "leads to .*outside, outside of the project"),
        ("download.source=loop", "no path that can be followed"),
        (f"download.source={'a' * 300}", "no path that can be followed"),
        ('download.source="a\\0b"', "no path that can be followed"),
        ("download.source=file:///etc", "only http:// and https:// work"),
        ("download.source=s3://bucket/x", "only http:// and https:// work"),
        ("download.source=" + FOUR.format("/etc/passwd"), "train_images is '/etc/passwd', outside of the project"),
        ("download.source=" + FOUR.format("../outside/a.zip#x"), "outside of the project"),
        ("download.sha256={/etc/passwd: a}", "outside of the project"),
        ("model.backbone_weights=/etc/passwd", "model.backbone_weights is '/etc/passwd', outside"),
        ("model.backbone_weights=out/x.pth", "leads to"),
        ("train.initial_weights=../../x.pth", "train.initial_weights is '../../x.pth', outside"),
        ("train.initial_weights=out/x.pth", "leads to"),
    ],
)  # fmt: skip
def test_no_parameter_leads_out_of_the_project(place, override, said):
    with pytest.raises(ValueError, match=said) as caught:
        confined(place, override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    ["download.source=data/mine", "download.source=shapes", "download.source=https://host/x", "model.backbone_weights=imagenet",
     "train.initial_weights=detr-r50", "download.source={shared}", "train.initial_weights={shared}/x.pth",
     "download.source=" + FOUR.format("data/mine/a.zip#../x")],
)  # fmt: skip
def test_what_lies_in_the_project_or_where_the_worker_allows_is_taken(place, override):
    shared = place.parent / "shared"
    confined(place, override.replace("{shared}", str(shared)))


@pytest.mark.parametrize(
    ("section", "value", "said"),
    [
        ("download", {"sources": "shapes", "sha256": {}}, "download lacks the key 'source'; did you mean 'sources'?"),
        ("download", {"source": "shapes", "sha256": 5}, "download.sha256 is 5: expected `object`, got `int`"),
        ("model", {}, "model lacks the key 'backbone_weights'"),
        ("train", None, "params.yaml lacks the section 'train'"),
    ],
)
def test_parameters_of_another_version_of_the_project_are_refused_by_name(place, section, value, said):
    document = read_yaml(ROOT / "params.yaml") | {section: value}
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        confine(document, place)
    assert "\n" not in str(caught.value)


def test_mirrors_are_addresses_of_the_web():
    from pipelines.__main__ import check

    with pytest.raises(ValueError, match="http, https and local paths work"):
        check(check_parameters(ROOT, None, ["download.mirrors={https://host/: ['file:///etc/']}"]))


def test_a_stage_prints_no_secret_of_the_environment(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", 'a "quoted" one\nwith lines')
    monkeypatch.setenv("DATABASE", "postgresql://somebody:p%40ss%2Fword@host/db")
    monkeypatch.setenv("SITE", "https://gh0-to-ken@host/x.git")
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Somebody")
    for text in (
        'it is a "quoted" one',
        "and with lines",
        r"{'x': 'a \"quoted\" one'}",
        "the password p@ss/word is wrong",
        "p%40ss%2Fword",
        "p%40ss/word",
        "postgresql://somebody:p%40ss%2Fword@host/db",
        "gh0-to-ken",
        "https://u:p@ss@host",
    ):
        assert not re.search(r"quoted|with lines|p@ss|p%40ss|gh0-to-ken", redact(text)), redact(text)
    assert redact("Somebody at https://host/a@b and models:/detr@champion") == (
        "Somebody at https://host/a@b and models:/detr@champion"
    )
