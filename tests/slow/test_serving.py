"""A registered version in an environment of its own requirements, which pip installs anew."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests import registered
from tests.pipelines.test_serving import assert_it_runs_alone
from tests.running import ROOT, call


@pytest.fixture
def own():
    """A new virtual environment, on the disk: with torch it would fill the memory that tests use as a disk."""
    with tempfile.TemporaryDirectory() as folder:
        call(Path(folder), "python", "-m", "venv", "own", cold=True)
        yield Path(folder) / "own"


@pytest.mark.timeout(2400)  # an installation of torch
def test_a_version_answers_in_an_environment_of_its_own_requirements(own, drawn, tmp_path):
    model = registered.write_model(tmp_path / "trained", registered.categories(drawn))
    registered.register(tmp_path, model, "champion", registered.pictures(drawn)[0])
    (folder,) = tmp_path.glob("mlartifacts/models/*/artifacts")
    alone = shutil.copytree(folder, tmp_path / "alone")
    python = str(own / "bin/python")
    pip = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "REQUESTS_"))}
    call(tmp_path, python, "-m", "pip", "install", "--quiet", "-r", str(alone / "requirements.txt"), **pip)
    path = assert_it_runs_alone(python, alone, tmp_path, model, drawn)
    assert not [entry for entry in path if entry.startswith(str(ROOT))]
