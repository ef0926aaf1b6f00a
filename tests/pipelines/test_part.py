"""A part of a file counts, shows and keeps what has come of it."""

import hashlib

import pytest

from pipelines.data.part import UNKNOWN, Stopped
from tests.pipelines.fetching import part_in


def test_a_part_ends_where_it_is_told_to_stop(tmp_path):
    with part_in(tmp_path) as part:
        part.append(b"a")
        part.stop.set()
        with pytest.raises(Stopped):
            part.append(b"b")


def test_a_part_shows_the_rate_of_what_comes_not_of_what_was_there(tmp_path):
    (tmp_path / "a.part").write_bytes(b"there")
    with part_in(tmp_path) as part:
        part.append(b"new")
        assert (part.bar.initial, part.bar.n) == (5, 8)
        assert part.digest.digest() == hashlib.sha256(b"therenew").digest()


def test_a_part_that_starts_anew_leaves_the_bytes_to_their_other_name(tmp_path):
    with part_in(tmp_path) as part:
        part.append(b"first")
        part.sync()
        (tmp_path / "linked").hardlink_to(part.path)
        part.restart(UNKNOWN)
        part.append(b"second")
    assert ((tmp_path / "linked").read_bytes(), part.path.read_bytes()) == (b"first", b"second")
