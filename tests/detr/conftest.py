"""How the tests of the library run."""

import pytest

pytest.register_assert_rewrite("tests.detr.published", "tests.detr.trainings", "tests.golden")
