"""Several addresses of a file are tried in order, and several files are fetched at once."""

import pytest

from pipelines.data.fetch import Remote, ask_sizes, claim, fetch_all
from tests.bad_line import Answer
from tests.pipelines.fetching import CONTENT, OTHER, SUM, get

pytestmark = pytest.mark.usefixtures("impatient")


def test_sizes_are_those_of_the_first_address_that_tells(site):
    remote = Remote((f"{site.base}/nothing", "http://127.0.0.1:9/a", f"{site.base}/a"), "")
    assert ask_sizes([remote]) == {remote.url: 10_000}


def test_mirrors_are_tried_in_order_until_one_has_the_file(site, tmp_path):
    site.files["/c"] = CONTENT
    urls = [f"{site.base}{path}" for path in ("/nothing", "/b", "/c", "/a")]
    site.plan("/b", Answer(status=503))
    assert get(tmp_path, *urls) == CONTENT
    gets = [path for method, path, _ in site.asked if method == "GET"]
    assert gets == ["/nothing", "/b", "/b", "/b", "/b", "/c"]


def test_every_address_is_named_when_all_fail(site, tmp_path):
    with pytest.raises(ValueError, match=r"/b answers 404; check the address; http://.*/c answers 404"):
        get(tmp_path, f"{site.base}/b", f"{site.base}/c")


@pytest.mark.parametrize(
    ("sha256", "headers"),
    [(SUM, {"ETag": '"other"'}), ("", {}), ("", {"ETag": '"other"'})],
    ids=["checksum", "same validator", "other validator"],
)
@pytest.mark.parametrize("if_range", [True, False])
def test_a_part_goes_on_at_a_mirror_with_a_checksum_or_the_same_validator(site, tmp_path, sha256, headers, if_range):
    site.files["/b"] = CONTENT
    urls = site.plan("/a", Answer(cut=4_000), Answer(status=404)), f"{site.base}/b"
    site.plan("/b", Answer(headers=headers, if_range=if_range))
    assert get(tmp_path, *urls, sha256=sha256) == CONTENT
    refused = not sha256 and headers and not if_range
    assert site.ranges("/b") == ["bytes=4000-"] + [None] * bool(refused)


def test_another_file_at_a_mirror_is_not_stitched(site, tmp_path):
    site.files["/b"] = OTHER
    urls = site.plan("/a", Answer(cut=4_000), Answer(status=404)), f"{site.base}/b"
    assert get(tmp_path, *urls) == OTHER


def test_a_mirror_with_the_right_file_mends_one_with_a_wrong_file(site, tmp_path):
    site.files["/b"] = OTHER
    assert get(tmp_path, f"{site.base}/b", f"{site.base}/a", sha256=SUM) == CONTENT
    assert site.ranges("/b") == [None, None]


def test_several_files_come_at_once(site, tmp_path):
    site.files["/b"] = OTHER
    remotes = [Remote((site.plan("/a"),), SUM), Remote((site.plan("/b"),), "")]
    with claim(remotes, tmp_path):
        fetched = fetch_all(remotes, tmp_path, ask_sizes(remotes))
        assert [fetched[remote.url].read_bytes() for remote in remotes] == [CONTENT, OTHER]


def test_the_first_failure_stops_the_others_and_keeps_what_has_come(site, tmp_path):
    """The other file would come for ever."""
    endless = site.plan("/a", Answer(cut=4_000, ending="drip", longer=10**9))
    remotes = [Remote((endless,), ""), Remote((f"{site.base}/nothing",), "")]
    with pytest.raises(ValueError, match="nothing answers 404"), claim(remotes, tmp_path):
        fetch_all(remotes, tmp_path, ask_sizes(remotes))
    assert all(CONTENT[:4_000] == path.read_bytes()[:4_000] for path in tmp_path.glob("*.part"))
