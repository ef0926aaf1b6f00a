"""A fetch goes on where it was cut, and never joins what does not belong together."""

import hashlib

import pytest
from urllib3.util import Retry

from pipelines.data import fetch
from tests.bad_line import DATE, Answer
from tests.pipelines.fetching import CONTENT, OTHER, SUM, get, kept

pytestmark = pytest.mark.usefixtures("impatient")

NO_VALIDATOR = {"ETag": None, "Last-Modified": None}
WEAK = {"ETag": 'W/"a"', "Last-Modified": None}


@pytest.mark.parametrize("sha256", ["", SUM])
@pytest.mark.parametrize("cut", [1, 4_000, 9_999])
def test_a_cut_goes_on_at_the_byte_where_it_was(site, tmp_path, sha256, cut):
    assert get(tmp_path, site.plan("/a", Answer(cut=cut), Answer()), sha256=sha256) == CONTENT
    assert site.ranges("/a") == [None, f"bytes={cut}-"]


def test_a_server_without_ranges_is_read_from_the_start(site, tmp_path, capfd):
    assert get(tmp_path, site.plan("/a", Answer(cut=4_000), Answer(ranges=False))) == CONTENT
    assert site.ranges("/a") == [None, "bytes=4000-"]
    assert "fetch a: 100%|" in (said := capfd.readouterr().err)
    assert "10.0k/10.0k [" in said


@pytest.mark.parametrize(
    "answer",
    [
        Answer(headers={"Content-Range": "bytes 3999-9999/10000"}),
        Answer(headers={"Content-Range": "bytes 4000-9999/10001"}),
        Answer(headers={"Content-Range": None}),
        Answer(headers={"Content-Range": "lines 1-2/3"}),
        Answer(status=416),
    ],
    ids=str,
)
@pytest.mark.parametrize("sha256", ["", SUM])
def test_a_range_that_does_not_fit_is_not_stitched(site, tmp_path, answer, sha256):
    assert get(tmp_path, site.plan("/a", Answer(cut=4_000), answer, Answer()), sha256=sha256) == CONTENT
    assert site.ranges("/a") == [None, "bytes=4000-", None]


def test_ranges_that_end_early_are_put_together(site, tmp_path):
    step = Answer(headers={"Content-Range": "bytes 4000-4999/10000", "Content-Length": "1000"})
    assert get(tmp_path, site.plan("/a", Answer(cut=4_000), step, Answer())) == CONTENT
    assert site.ranges("/a") == [None, "bytes=4000-", "bytes=5000-"]


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("other", [OTHER, OTHER + CONTENT[9_000:]], ids=["smaller", "of one size"])
def test_a_file_that_has_changed_since_the_cut_is_not_stitched(site, tmp_path, monkeypatch, if_range, other):
    monkeypatch.setattr(fetch, "RETRY", Retry(total=0))
    url = site.plan("/a", Answer(cut=4_000))
    with pytest.raises(ValueError, match="at 4000 of 10000 bytes, after 1 attempts"):
        get(tmp_path, url)
    monkeypatch.setattr(fetch, "RETRY", Retry(total=1))
    site.files["/a"] = other
    assert get(tmp_path, site.plan("/a", Answer(if_range=if_range))) == other
    assert site.ranges("/a")[1:] == ["bytes=4000-"] + [None] * (not if_range)


def test_an_answer_with_more_than_it_announced_is_not_kept(site, tmp_path):
    etag = f'"{hashlib.sha256(CONTENT).hexdigest()[:9]}"'
    grown = Answer(headers={"Content-Range": "bytes 4000-9999/10000", "ETag": etag}, if_range=False)
    with pytest.raises(ValueError, match="of 10000 bytes, after 4 attempts"):
        get(tmp_path, site.plan("/a", Answer(cut=4_000), Answer(cut=0)))
    site.files["/a"] = CONTENT + OTHER
    assert get(tmp_path, site.plan("/a", grown, Answer())) == CONTENT + OTHER
    assert site.ranges("/a")[-2:] == ["bytes=4000-", None]


@pytest.mark.parametrize("headers", [NO_VALIDATOR, WEAK], ids=["none", "weak"])
def test_without_a_validator_only_a_checksum_lets_a_part_go_on(site, tmp_path, headers):
    for sha256, second in (("", None), (SUM, "bytes=4000-")):
        site.asked.clear()
        url = site.plan("/a", Answer(cut=4_000, headers=headers), Answer(headers=headers))
        assert get(tmp_path, url, sha256=sha256) == CONTENT
        assert site.ranges("/a") == [None, second]


def test_the_date_serves_where_there_is_no_etag(site, tmp_path):
    dated = {"ETag": None, "Last-Modified": DATE}
    assert get(tmp_path, site.plan("/a", Answer(cut=4_000, headers=dated), Answer(headers=dated))) == CONTENT
    assert site.headers["If-Range"] == DATE
    assert site.ranges("/a") == [None, "bytes=4000-"]


def test_a_checked_file_that_was_not_used_is_not_asked_for_again(site, tmp_path):
    assert get(tmp_path, site.plan("/a"), sha256=SUM, keep=True) == CONTENT
    assert kept(tmp_path) == [".json", ".lock", ".part"]
    assert get(tmp_path, site.plan("/a"), sha256=SUM) == CONTENT
    assert site.ranges("/a") == [None]


def test_an_unchecked_file_that_was_not_used_is_compared_with_the_servers(site, tmp_path):
    get(tmp_path, site.plan("/a"), keep=True)
    assert get(tmp_path, site.plan("/a"), keep=True) == CONTENT
    site.files["/a"] = OTHER
    assert get(tmp_path, site.plan("/a")) == OTHER
    assert site.ranges("/a") == [None, "bytes=10000-", "bytes=10000-"]


def test_a_part_is_gone_on_from_without_its_record(site, tmp_path):
    get(tmp_path, site.plan("/a"), sha256=SUM, keep=True)
    for record in tmp_path.glob("*.json"):
        record.write_bytes(b"\0\0")
    assert get(tmp_path, site.plan("/a"), sha256=SUM) == CONTENT
    assert site.ranges("/a") == [None, "bytes=10000-"]


@pytest.mark.parametrize("wrong", [Answer(flip=True), Answer(longer=-10)], ids=["flipped", "too short"])
def test_a_wrong_checksum_is_given_one_more_chance_from_scratch(site, tmp_path, wrong, capfd):
    assert get(tmp_path, site.plan("/a", wrong, Answer()), sha256=SUM) == CONTENT
    assert site.ranges("/a") == [None, None]
    assert f"expected {SUM}; fetching it once more" in capfd.readouterr().err
    with pytest.raises(ValueError, match=f"has sha256 [0-9a-f]{{64}}, expected {SUM}; fetch it again or correct"):
        get(tmp_path, site.plan("/a", wrong), sha256=SUM)
    assert site.ranges("/a") == [None] * 4
    assert kept(tmp_path) == [".lock"]


def test_what_was_spoilt_before_a_cut_is_found(site, tmp_path):
    """The bytes of both attempts are in the sum."""
    assert get(tmp_path, site.plan("/a", Answer(cut=4_000, flip=True), Answer()), sha256=SUM) == CONTENT
    assert site.ranges("/a") == [None, "bytes=4000-", None]


def test_redirects_are_followed_with_the_range(site, tmp_path):
    url = site.plan("/old", Answer(status=302, headers={"Location": "/a"}))
    site.plan("/a", Answer(cut=4_000), Answer())
    assert get(tmp_path, url) == CONTENT
    assert site.ranges("/a") == [None, "bytes=4000-"]
