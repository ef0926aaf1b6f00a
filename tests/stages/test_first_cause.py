"""A failure of one of two processes is the one error that is printed. All kinds of them: tests/pipelines/test_launch.py."""

import json
import zipfile

from benchmarks.kill_resume import prepare
from tests.running import call
from tests.training import COMMAND, quiet


def test_a_damaged_picture_is_named_while_the_other_process_loses_its_connection(tmp_path):
    """The first of the evaluation, which is process 0's; process 1 waits for its detections."""
    prepare(tmp_path, epochs=1)
    archive = tmp_path / "data/coco/val.zip"
    images = json.loads((tmp_path / "data/coco/instances_val.json").read_text(encoding="utf-8"))["images"]
    name = images[0]["file_name"]
    with zipfile.ZipFile(archive) as file:
        pictures = {member: file.read(member) for member in file.namelist()}
    with zipfile.ZipFile(archive, "w") as file:
        for member, content in (pictures | {name: b"no picture"}).items():
            file.writestr(member, content)
    (own := tmp_path / "temporary").mkdir()
    said = call(tmp_path, *COMMAND, code=1, **quiet(processes=2) | {"TMPDIR": str(own)})
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert errors[0].startswith(f"error: {name} ")
    assert "Traceback" not in said
    assert not list(own.iterdir())
