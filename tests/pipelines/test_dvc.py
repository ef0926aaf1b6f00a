"""How a stage's output and end are taken in."""

import re

import pytest

from pipelines.workspace.dvc import NUM_LINES, StageFailed, call, find_cause, list_stages, reproduce
from tests import running


def run(folder, code):
    (folder / "stage.py").write_text(code, encoding="utf-8")
    lines = []
    call(["stage"], folder, lines.append)
    return lines


def test_bytes_that_are_no_text_end_nothing(tmp_path):
    code = "import sys; sys.stdout.buffer.write('größe '.encode() + b'gr\\xf6\\xdfe\\n')"
    assert run(tmp_path, code) == ["größe gr\ufffd\ufffde"]


def test_a_failure_has_the_last_lines_and_the_message_among_them(tmp_path):
    code = f"import sys\nprint(*range({2 * NUM_LINES}), sep='\\n')\nprint('error: it is so')\nprint('good bye')\nsys.exit(3)"
    with pytest.raises(StageFailed, match="^it is so$") as caught:
        run(tmp_path, code)
    assert caught.value.lines == [*map(str, range(NUM_LINES + 2, 2 * NUM_LINES)), "error: it is so", "good bye"]
    with pytest.raises(StageFailed, match="^exit code 3$"):
        run(tmp_path, "raise SystemExit(3)")


TRACE = ["Traceback (most recent call last):", '  File "stage.py", line 1, in <module>', "    x", "KeyError: 'x'"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["error: it is so", "ERROR: failed to reproduce 'train'"], "it is so"),
        (["error: the first", "error: the last", "good bye"], "the last"),
        (["begins", *TRACE, "ERROR: failed to reproduce 'train'"], "KeyError: 'x'"),
        ([*TRACE, "error: it is so"], "it is so"),
        (["begins", "ERROR: unable to acquire lock"], "unable to acquire lock"),
        (["begins", "ends"], "ends"),
        ([], ""),
    ],
)
def test_the_cause_is_what_the_stage_says(lines, said):
    assert find_cause(lines) == said


def test_an_error_is_raised_and_not_logged(tmp_path):
    logged = []
    (tmp_path / "stage.py").write_text(
        "print('begins'); print('error: it is so'); raise SystemExit(1)", encoding="utf-8"
    )
    with pytest.raises(StageFailed, match="^it is so$"):
        call(["stage"], tmp_path, logged.append)
    assert logged == ["begins"]


@pytest.mark.usefixtures("warm_python")
def test_what_dvc_advises_to_type_is_left_out(tmp_path):
    """It is for a person who has typed its command, in their own clone."""
    running.call(tmp_path, "git", "init", "--quiet")
    running.call(tmp_path, "dvc", "init", "--quiet")
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  made:\n    cmd: echo hello > file\n    outs: [file]\n", encoding="utf-8"
    )
    said = running.call(tmp_path, "dvc", "repro")
    assert "git add" in said
    assert "dvc push" in said
    (tmp_path / "file").unlink()
    (tmp_path / "dvc.lock").unlink()
    logged = []
    assert reproduce("made", tmp_path, logged.append, force=True) == "ran"
    assert "Running stage 'made':" in logged
    assert [line for line in logged if re.search("git|autostage|push|staging", line)] == []


GRAPH = """\
stages:
  after:
    foreach: [one, two]
    do:
      cmd: touch ${item}
      deps: [b]
      outs: ["${item}"]
  second: {cmd: touch b, deps: [a, more/c], outs: [b]}
  first: {cmd: touch a, deps: [kept], outs: [a]}
"""


@pytest.fixture
def graph(tmp_path):
    """The dvc.yaml, still to be written, of a folder that DVC works in without git."""
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\nno_scm = true\n", encoding="utf-8")
    return tmp_path / "dvc.yaml"


def test_stages_run_in_the_order_of_the_graph_wherever_they_stand(tmp_path, graph):
    (tmp_path / "more").mkdir()
    (tmp_path / "more/dvc.yaml").write_text(
        "stages: {third: {cmd: touch c, outs: [c]}, alone: {cmd: 'true'}}", encoding="utf-8"
    )
    (tmp_path / "kept.dvc").write_text("outs: [{path: kept}]", encoding="utf-8")
    graph.write_text(GRAPH, encoding="utf-8")
    found = list_stages(tmp_path)
    assert sorted(found) == ["after@one", "after@two", "first", "kept.dvc", "more/dvc.yaml:third", "second"]
    assert found.index("kept.dvc") < found.index("first") < found.index("second") < found.index("after@one")
    assert found.index("more/dvc.yaml:third") < found.index("second") < found.index("after@two")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stages: [", "is not valid YAML"),
        ("stages: {a: {out: [x]}}", "validation failed"),
        ("stages: {a: {cmd: '${missing}'}}", "missing"),
        ("stages: {a: {cmd: 'true', deps: [x], outs: [x]}}", "a dependency and an output"),
        ("stages: {a: {cmd: 'true', outs: [x]}, b: {cmd: 'true', outs: [x]}}", "output 'x' is specified in"),
    ],
)
def test_a_graph_that_dvc_refuses_is_one_line(graph, text, said):
    graph.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{re.escape(str(graph))} .*{said}") as caught:
        list_stages(graph.parent)
    assert "\n" not in str(caught.value)
