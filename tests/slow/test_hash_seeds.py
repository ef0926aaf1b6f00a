"""What forks of one interpreter cannot show, because they share its hash seed: real interpreters, each with its own."""

from tests.projects import reference
from tests.running import call


def test_force_leaves_the_lock_byte_for_byte(tmp_path):
    project = reference(tmp_path)
    before = (project / "dvc.lock").read_bytes()
    said = call(project, "dvc", "repro", "--force", cold=True)
    assert said.count("Running stage") == 5
    assert (project / "dvc.lock").read_bytes() == before
