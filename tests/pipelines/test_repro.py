"""How a stage's output and end are taken in."""

import pytest

from pipelines.repro import NUM_LINES, StageFailed, call


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
