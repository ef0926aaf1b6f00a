"""The gate's decisions as tables; aliases, rollback and turns with real MLflow and real processes."""

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from detr.bootstrap import match
from detr.judge import ap_per_class, coco_eval, from_results, precision_of
from pipelines.registry import aliases
from pipelines.registry.aliases import champion, place, rollback, turn, with_alias
from pipelines.registry.gate import (
    Judged,
    RegisterParams,
    ap_of_classes,
    as_json,
    as_markdown,
    check_protected,
    decide,
    names_of,
    same_images,
)
from pipelines.registry.tracking import MODEL, connect
from tests.projects import detections_like
from tests.running import ROOT, call, environment

CONFIG = RegisterParams(0.0, 0.95, 1000, 0, {}, True)
SURE, EVEN = np.linspace(0.00999, 0.01001, 1000), np.linspace(-0.01, 0.01, 1000)


def numbers(version, ap, num_images=500, **per_class):
    return Judged(version, ap, ap - 0.05, ap + 0.05, per_class, "its detections", num_images)


@pytest.mark.parametrize(
    ("candidate", "before", "gains", "changes", "alias", "said"),
    [
        (0.3, 0.2, SURE, {}, "champion", "AP 0.3000 against 0.2000 of version 1, the champion: +0.1000 [+0.0100, +0.0100], better in 100.0% of 1000 resamples"),
        (0.2, 0.2, np.zeros(1000), {}, "challenger", "it is not certain enough (95.0% are asked for)"),
        (0.1, 0.2, -SURE, {}, "challenger", "the gain is below 0, it is not certain enough"),
        (0.3, 0.2, EVEN, {}, "challenger", "better in 50.0% of 1000 resamples: it is not certain enough"),
        (0.3, 0.2, np.r_[np.ones(949), -np.ones(51)], {}, "challenger", "better in 94.9%"),
        (0.3, 0.2, np.r_[np.ones(950), -np.ones(50)], {}, "champion", "better in 95.0%"),
        (0.3, 0.2, np.r_[np.ones(600), -np.ones(400)], {"confidence": 0.6}, "champion", "better in 60.0%"),
        (0.25, 0.2, SURE, {"min_ap_gain": 0.1}, "challenger", "resamples: the gain is below 0.1"),
        (0.3, 0.2, SURE, {"min_ap_gain": 0.1}, "champion", "+0.1000"),
        (0.3, 0.2, SURE, {"protected": {"cat": 0.1}}, "champion", "+0.1000"),
        (0.3, 0.2, SURE, {"protected": {"cat": 0.09}}, "challenger", "resamples: cat loses 0.1000 AP, 0.09 allowed"),
        (0.3, 0.2, SURE, {"protected": {"dog": 0.0}}, "champion", "+0.1000"),
        (0.3, 0.2, SURE, {"protected": {"hen": 0.0}}, "champion", "the champion's AP of hen, protected, is unknown and was not compared"),
        (0.1, 0.2, -SURE, {"protected": {"cat": 0.0}}, "challenger", "the gain is below 0, it is not certain enough (95.0% are asked for), cat loses"),
    ],
)  # fmt: skip
def test_the_gate(candidate, before, gains, changes, alias, said):
    config = replace(CONFIG, **changes)
    new = numbers("2", candidate, cat=0.4, dog=0.5, hen=0.1)
    decision = decide(new, numbers("1", before, cat=0.5, dog=0.5), gains, config)
    assert decision.alias == alias
    assert said in decision.sentence
    assert json.loads(json.dumps(as_json(decision)))["gain"] == pytest.approx(candidate - before)
    page = as_markdown(decision, config)
    assert page.startswith(f"# Version 2: {alias}\n\n{decision.sentence}.\n")
    assert (
        f"| candidate | 2 | {candidate:.4f} | {candidate - 0.05:.4f} to {candidate + 0.05:.4f} | its detections |"
        in page
    )
    assert "| cat | 0.4000 | 0.5000 | -0.1000 |" in page
    assert f"| {'champion before' if alias == 'champion' else 'champion'} | 1 | {before:.4f} |" in page


@pytest.mark.parametrize(
    ("num_images", "confidence", "alias"),
    [(1, 0.95, "challenger"), (4, 0.95, "challenger"), (5, 0.95, "champion"), (1, 0.5, "champion")],
)
def test_some_images_cannot_make_a_gain_certain(num_images, confidence, alias):
    gains = np.full(1000, 0.1)
    decision = decide(
        numbers("2", 0.3, num_images), numbers("1", 0.2, num_images), gains, replace(CONFIG, confidence=confidence)
    )
    assert decision.alias == alias
    assert decision.gain_low < 0.1 < decision.gain_high
    said = f"{num_images} images cannot make it certain (95.0% are asked for)"
    assert (said in decision.sentence) == (alias == "challenger")


def test_the_first_is_the_champion():
    decision = decide(numbers("1", 0.0), None, None, CONFIG)
    assert (decision.alias, decision.sentence) == ("champion", "there was no champion")
    assert "| champion" not in as_markdown(decision, CONFIG)


def test_an_ap_of_minus_one_takes_and_holds_no_place():
    """Also where it is the first, or seems to be better for certain."""
    for before, gains in ((None, None), (numbers("1", -1.0), np.zeros(1000)), (numbers("1", -2.0), SURE)):
        decision = decide(numbers("2", -1.0), before, gains, CONFIG)
        assert (decision.alias, decision.gain) == ("challenger", None)
        assert decision.sentence.startswith("its AP is -1, for no validation image has an object to judge it by")
    decision = decide(numbers("2", 0.0), numbers("1", -1.0), SURE, CONFIG)
    assert (decision.alias, decision.gain, decision.champion) == ("champion", None, None)
    assert decision.sentence == "version 1, the champion, has an AP of -1, which is none: its place is free"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"min_ap_gain": -0.1}, "min_ap_gain is -0.1"),
        ({"confidence": 1.0}, "confidence 1.0"),
        ({"num_resamples": 0}, "num_resamples 0"),
        ({"protected": {"cat": -1.0}}, "register.protected: {'cat': -1.0}; expected of each the AP that it may lose"),
        ({"protected": {"cat": float("nan")}}, "register.protected: {'cat': nan}"),
    ],
)
def test_wrong_parameters_are_named(changes, said):
    with pytest.raises(ValueError, match="register") as error:
        replace(CONFIG, **changes)
    assert said in str(error.value)


def test_an_unknown_protected_category_is_an_error(drawn, tmp_path):
    path = drawn / "instances_val.json"
    check_protected(replace(CONFIG, protected={"ellipse": 0.0}), path)
    with pytest.raises(ValueError, match="names 'elipse', no category; did you mean 'ellipse'"):
        check_protected(replace(CONFIG, protected={"elipse": 0.0}), path)
    document = json.loads(path.read_text(encoding="utf-8"))
    gone = {c["id"] for c in document["categories"] if c["name"] == "ellipse"}
    document["annotations"] = [a for a in document["annotations"] if a["category_id"] not in gone]
    (tmp_path / "other.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ValueError, match="names 'ellipse', of which .*other.json has no object"):
        check_protected(replace(CONFIG, protected={"ellipse": 0.0}), tmp_path / "other.json")


def test_the_ap_of_classes_is_cocos(drawn):
    path = drawn / "instances_val.json"
    found = detections_like(path, 4.0)
    expected = [ap for _, ap, *_ in ap_per_class(precision_of(coco_eval(path, from_results(found))))]
    ours = ap_of_classes(match(path, found), names_of(path))
    assert list(ours.values()) == pytest.approx([ap for ap in expected if ap >= 0], abs=1e-12)
    assert list(ours) == [name for name, ap in zip(names_of(path), expected, strict=True) if ap >= 0]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"val_digest": "a", "data_digest": "x"}, {"val_digest": "a", "data_digest": "y"}, True),
        ({"val_digest": "a", "data_digest": "x"}, {"val_digest": "b", "data_digest": "x"}, False),
        ({"data_digest": "x"}, {"val_digest": "a", "data_digest": "x"}, True),
        ({"data_digest": "x"}, {"val_digest": "a", "data_digest": "y"}, False),
        ({}, {}, False),
    ],
)
def test_whether_the_images_are_the_same(one, other, same):
    assert same_images(one, other) is same_images(other, one) is same


@pytest.fixture
def client(local, tmp_path, monkeypatch):
    """Of a registry with three versions, without aliases."""
    monkeypatch.chdir(tmp_path)
    client = connect()
    client.create_registered_model(MODEL)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/MLmodel").touch()
    for weights in ("w1", "w2", "w1"):
        client.create_model_version(MODEL, str(tmp_path / "model"), tags={"weights_sha256": weights})
    return client


def aliases_of(client):
    found = client.get_registered_model(MODEL).aliases
    return {name: int(version) for name, version in found.items()}


def test_champion_and_known_weights(client, tmp_path):
    assert champion(client) is None
    assert aliases.version_with(client, "w3") is None
    assert int(aliases.version_with(client, "w1").version) == 1
    (tmp_path / "model/MLmodel").unlink()
    assert aliases.version_with(client, "w1") is None, "its files are gone"
    for number, alias in ((1, "champion"), (2, "challenger"), (3, "champion"), (3, "champion")):
        place(client, client.get_model_version(MODEL, str(number)), alias, lambda: None)
    assert aliases_of(client) == {"champion": 3, "challenger": 2, "previous_champion": 1}


def test_a_rollback_changes_places_and_back(client):
    with pytest.raises(ValueError, match="there is no previous champion to go back to; the champion is none"):
        rollback()
    client.set_registered_model_alias(MODEL, "champion", "1")
    with pytest.raises(ValueError, match="there is no previous champion to go back to; the champion is version 1"):
        rollback()
    place(client, client.get_model_version(MODEL, "2"), "champion", lambda: None)
    said = call(ROOT, "python", "-m", "pipelines", "rollback", MLFLOW_TRACKING_URI=os.environ["MLFLOW_TRACKING_URI"])
    assert said.splitlines()[-1] == "detr version 1 is the champion again, version 2 the previous one"
    assert aliases_of(client) == {"champion": 1, "previous_champion": 2}
    assert rollback() == "detr version 2 is the champion again, version 1 the previous one"


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_rollback_that_was_killed_is_completed(client, steps):
    done = [
        partial(client.set_registered_model_tag, MODEL, "rollback", "2 1"),
        partial(client.set_registered_model_alias, MODEL, "champion", "1"),
        partial(client.set_registered_model_alias, MODEL, "previous_champion", "2"),
    ]
    place(client, client.get_model_version(MODEL, "1"), "champion", lambda: None)
    place(client, client.get_model_version(MODEL, "2"), "champion", lambda: None)
    for step in done[:steps]:
        step()
    assert rollback() == "detr version 1 is the champion again, version 2 the previous one"
    assert aliases_of(client) == {"champion": 1, "previous_champion": 2}
    assert "rollback" not in client.get_registered_model(MODEL).tags


def test_without_a_registry_there_is_nothing_to_go_back_to(tmp_path):
    uri = f"sqlite:///{tmp_path}/none.db"
    said = call(ROOT, "python", "-m", "pipelines", "rollback", MLFLOW_TRACKING_URI=uri, code=1)
    assert said == f"error: nothing is registered yet: {uri} does not exist; python -m pipelines run\n"
    assert not list(tmp_path.iterdir())


COUNT = """
import sys, time
from pathlib import Path
from pipelines.registry import aliases
from pipelines.registry.tracking import connect
client, file = connect(), Path(sys.argv[1])
for _ in range(int(sys.argv[2])):
    with aliases.turn(client) as check:
        count = int(file.read_text())
        time.sleep(0.05)
        check()
        file.with_suffix(".new").write_text(str(count + 1))
        file.with_suffix(".new").replace(file)
"""


def counting(tmp_path, times):
    env = environment(cold=True, PYTHONPATH=str(ROOT), MLFLOW_TRACKING_URI=os.environ["MLFLOW_TRACKING_URI"])
    command = ["python", "-c", COUNT, str(tmp_path / "count"), str(times)]
    return subprocess.Popen(command, cwd=tmp_path, env=env, start_new_session=True, stdout=subprocess.DEVNULL)


def test_processes_take_turns_from_the_first_on_and_a_killed_one_is_passed_over(client, tmp_path):
    """Three that begin at once, of which one is killed in the middle of its turn."""
    (tmp_path / "count").write_text("0", encoding="utf-8")
    one, two, three = (counting(tmp_path, times) for times in (4, 4, 10**6))
    try:
        while True:
            assert three.poll() is None
            experiment = client.get_experiment_by_name(aliases.TURNS)
            params = client.search_runs([experiment.experiment_id])[0].data.params if experiment else {}
            if f" {three.pid} " in params.get(f"turn-{aliases._last(params)}", "") and len(params) > 4:
                break
            time.sleep(0.01)
        os.kill(three.pid, signal.SIGKILL)
        assert (one.wait(), two.wait()) == (0, 0)
    finally:
        for process in (one, two, three):
            process.kill()
            process.wait()
    params = client.search_runs([client.get_experiment_by_name(aliases.TURNS).experiment_id])[0].data.params
    turns = [params[f"turn-{k}"].split()[2] for k in range(1, aliases._last(params) + 1)]
    assert (turns.count(str(one.pid)), turns.count(str(two.pid))) == (4, 4)
    ended = sum(name.startswith("end-") for name in params)
    assert len(turns) - 1 <= ended <= len(turns)
    assert int((tmp_path / "count").read_text(encoding="utf-8")) in (ended, ended + 1), "no update is lost"
    assert len(client.search_experiments(filter_string="name LIKE 'detr-registrations%'")) == 1


def test_a_silent_process_on_another_host_loses_its_turn(client, monkeypatch):
    monkeypatch.setattr(aliases, "STALE_SECONDS", 2.0)
    run_id = aliases._turns(client)
    with turn(client) as check:
        client.log_param(run_id, "turn-2", "elsewhere pid:[1] 1 0.0 abc")
        with pytest.raises(RuntimeError, match="gave no sign for 2 seconds, another registers now"):
            check()
    with turn(client) as check:
        check()
        assert aliases._last(client.get_run(run_id).data.params) == 3


def test_whoever_gives_signs_from_another_host_keeps_its_turn(client, monkeypatch, capsys):
    monkeypatch.setattr(aliases, "STALE_SECONDS", 2.0)
    run_id = aliases._turns(client)
    client.log_param(run_id, "turn-1", "elsewhere pid:[1] 7 0.0 abc")
    begun, beats = time.monotonic(), 0

    def sleep(seconds, really=time.sleep):
        nonlocal beats
        if time.monotonic() - begun < 5:
            beats += 1
            client.set_tag(run_id, "beat", f"1 {beats}")
        else:
            client.log_param(run_id, "end-1", "x")
        really(seconds)

    monkeypatch.setattr(aliases.time, "sleep", sleep)
    with turn(client):
        assert "end-1" in client.get_run(run_id).data.params
    assert "waiting for process 7 on elsewhere, which changes the registry" in capsys.readouterr().out


def test_a_deleted_log_of_turns_is_restored(client):
    with turn(client):
        pass
    client.delete_experiment(client.get_experiment_by_name(aliases.TURNS).experiment_id)
    with turn(client) as check:
        check()
    assert with_alias(client, "champion") is None
