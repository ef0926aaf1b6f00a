import datetime
import hashlib
import random
import ssl
import threading

import pytest
import requests
from urllib3.util import Retry

from pipelines import fetch
from pipelines.fetch import Interrupted, Remote, claimed, fetch_all, shown, sizes_of
from pipelines.part import UNKNOWN, Part, Stopped
from pipelines.stage import Progress
from tests.bad_line import DATE, Answer, Site, serving

CONTENT = random.Random(0).randbytes(10_000)
OTHER = random.Random(1).randbytes(9_000)
SUM = hashlib.sha256(CONTENT).hexdigest()
NO_VALIDATOR = {"ETag": None, "Last-Modified": None}
WEAK = {"ETag": 'W/"a"', "Last-Modified": None}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(fetch, "RETRY", Retry(total=3, backoff_factor=0.001, backoff_jitter=0.001, retry_after_max=0))
    monkeypatch.setattr(fetch, "REAL_PROGRESS", 1_000)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def site():
    with serving(Site(a=CONTENT)) as site:
        yield site


def get(folder, *addresses, sha256="", keep=False):
    """What a process that fetches one file has at the end. With `keep` it fails later and leaves its files."""
    remote = Remote(addresses, sha256)
    try:
        with claimed([remote], folder):
            data = fetch_all([remote], folder, sizes_of([remote]))[remote.url].read_bytes()
            if keep:
                raise InterruptedError
            return data
    except InterruptedError:
        return data


def kept(folder):
    return sorted(path.suffix for path in folder.iterdir())


@pytest.mark.parametrize("sha256", ["", SUM])
def test_a_file_comes_whole_and_is_gone_when_it_has_been_used(site, tmp_path, sha256):
    assert get(tmp_path / "new" / "folder", site.plan("/a"), sha256=sha256) == CONTENT
    assert site.asked == [("HEAD", "/a", None), ("GET", "/a", None)]
    assert site.headers["Accept-Encoding"] == "identity"
    assert kept(tmp_path / "new" / "folder") == [".lock"]


@pytest.mark.parametrize("sha256", ["", SUM])
@pytest.mark.parametrize("cut", [1, 4_000, 9_999])
def test_a_cut_goes_on_at_the_byte_where_it_was(site, tmp_path, sha256, cut):
    assert get(tmp_path, site.plan("/a", Answer(cut=cut), Answer()), sha256=sha256) == CONTENT
    assert site.ranges("/a") == [None, f"bytes={cut}-"]


@pytest.mark.parametrize(
    "answer",
    [
        Answer(cut=0),
        Answer(cut=4_000, ending="reset"),
        Answer(chunked=True, cut=4_000),
        Answer(longer=10),
        Answer(chunked=True),
        Answer(status=429, headers={"Retry-After": "3600"}),
        Answer(status=503, headers={"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT"}),
        Answer(status=503, headers={"Retry-After": "soon"}),
        Answer(status=500),
    ],
    ids=str,
)
@pytest.mark.parametrize("sha256", ["", SUM])
def test_trouble_that_passes_is_got_over(site, tmp_path, answer, sha256):
    assert get(tmp_path, site.plan("/a", answer, Answer()), sha256=sha256) == CONTENT


def test_a_server_that_stops_sending_is_given_up_and_asked_again(site, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(fetch, "TIMEOUT", (5, 0.3))
    assert get(tmp_path, site.plan("/a", Answer(cut=4_000, ending="stall"), Answer())) == CONTENT
    assert site.ranges("/a")[:2] == [None, "bytes=4000-"]
    assert "Read timed out., at 4000 of 10000 bytes; going on in 0.0 s" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("value", "least", "most"), [("7", 7, 7), ("3600", 300, 300), (None, None, None), ("soon", None, None)]
)
def test_the_pause_that_a_server_asks_for_is_taken_within_bounds(site, tmp_path, monkeypatch, value, least, most):
    monkeypatch.undo()
    with (
        requests.get(site.plan("/a", Answer(status=429, headers={"Retry-After": value})), stream=True) as answer,
        part_in(tmp_path) as part,
        pytest.raises(Interrupted, match="it answers 429") as caught,
    ):
        fetch._begin(answer, part, "")
    assert caught.value.pause == least == most


def part_in(folder):
    return Part(folder / "a.part", Progress(None, "a", 1, "B"), threading.Event())


def test_attempts_that_bring_something_are_not_counted(site, tmp_path):
    cuts = [Answer(cut=1_000)] * 9
    assert get(tmp_path, site.plan("/a", *cuts, Answer())) == CONTENT
    assert len(site.ranges("/a")) == 10


@pytest.mark.parametrize("answer", [Answer(cut=100), Answer(cut=9_000, ranges=False)], ids=str)
def test_attempts_that_bring_nothing_real_are_bounded(site, tmp_path, answer):
    with pytest.raises(
        ValueError, match=r"/a cannot be fetched: .* after 4 attempts; .* run again to go on from there"
    ):
        get(tmp_path, site.plan("/a", answer))
    assert len(site.ranges("/a")) <= 6


def test_the_pause_grows_while_nothing_comes(site, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(fetch, "RETRY", Retry(total=3, backoff_factor=0.05))
    get(tmp_path, site.plan("/a", *[Answer(status=503)] * 3, Answer()))
    pauses = [line.split()[-2] for line in capfd.readouterr().err.splitlines() if "going on in" in line]
    assert pauses == ["0.0", "0.1", "0.2"]


def test_pauses_grow_and_differ():
    def pauses():
        retry, found = fetch.RETRY, []
        for _ in range(3):
            retry = retry.increment(error=Interrupted("cut"))
            found.append(retry.get_backoff_time())
        return found

    one, two = pauses(), pauses()
    assert one[0] == 0 < one[1] < one[2]
    assert one[1:] != two[1:]


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


def test_the_sum_of_an_unchecked_file_is_told(site, tmp_path, capfd):
    get(tmp_path, site.plan("/a"))
    assert f"/a has sha256 {SUM}; with that in download.sha256 it would be checked" in capfd.readouterr().err


def test_redirects_are_followed_with_the_range(site, tmp_path):
    url = site.plan("/old", Answer(status=302, headers={"Location": "/a"}))
    site.plan("/a", Answer(cut=4_000), Answer())
    assert get(tmp_path, url) == CONTENT
    assert site.ranges("/a") == [None, "bytes=4000-"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(status=404), r"/a answers 404; check the address"),
        (Answer(status=401), r"/a answers 401; check the address"),
        (Answer(headers={"Content-Encoding": "gzip"}), "sends gzip where the file as it is was asked for"),
        (Answer(status=302, headers={"Location": "/a"}), "Exceeded 30 redirects."),
        (Answer(status=302, headers={"Location": "ftp://a/b"}), "No connection adapters were found for 'ftp://a/b'"),
    ],
)
def test_trouble_that_stays_is_named_at_once(site, tmp_path, answer, message):
    with pytest.raises(ValueError, match=message):
        get(tmp_path, site.plan("/a", answer))
    assert len(site.ranges("/a")) in (1, 31)


def test_a_server_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/a cannot be fetched: .*refused, at 0 of unknown bytes"):
        get(tmp_path, "http://127.0.0.1:9/a")


def test_a_bad_certificate_is_not_tried_again(tmp_path, capfd):
    certificate(tmp_path / "site.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "site.pem")
    expected = "has a certificate that is not good: self.signed certificate; use a mirror"
    with serving(Site(a=CONTENT), context) as site, pytest.raises(ValueError, match=expected):
        get(tmp_path, site.plan("/a"))
    assert "going on in" not in capfd.readouterr().err


def certificate(path):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(1)).sign(key, hashes.SHA256())
    kind = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    path.write_bytes(key.private_bytes(pem, *kind) + made.public_bytes(pem))


@pytest.mark.parametrize("head", [405, 500])
def test_a_server_that_refuses_head_is_of_unknown_size(site, tmp_path, head):
    site.head = head
    assert sizes_of([Remote((f"{site.base}/a",), "")]) == {f"{site.base}/a": 0}
    assert get(tmp_path, f"{site.base}/a") == CONTENT


def test_sizes_are_those_of_the_first_address_that_tells(site):
    remote = Remote((f"{site.base}/nothing", "http://127.0.0.1:9/a", f"{site.base}/a"), "")
    assert sizes_of([remote]) == {remote.url: 10_000}


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
    with claimed(remotes, tmp_path):
        fetched = fetch_all(remotes, tmp_path, sizes_of(remotes))
        assert [fetched[remote.url].read_bytes() for remote in remotes] == [CONTENT, OTHER]


def test_the_first_failure_stops_the_others_and_keeps_what_has_come(site, tmp_path):
    """The other file would come for ever."""
    endless = site.plan("/a", Answer(cut=4_000, ending="drip", longer=10**9))
    remotes = [Remote((endless,), ""), Remote((f"{site.base}/nothing",), "")]
    with pytest.raises(ValueError, match="nothing answers 404"), claimed(remotes, tmp_path):
        fetch_all(remotes, tmp_path, sizes_of(remotes))
    assert all(CONTENT[:4_000] == path.read_bytes()[:4_000] for path in tmp_path.glob("*.part"))


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


def test_progress_is_in_bytes_with_rate_and_time_and_counts_what_came_before(site, tmp_path, capfd):
    get(tmp_path, site.plan("/a", Answer(cut=4_000), Answer()))
    last = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fetch a:")][-1]
    assert last.startswith("fetch a: 100%|")
    assert "10.0k/10.0k [" in last
    assert last.endswith("B/s]")


def test_users_passwords_and_queries_are_used_but_never_shown(site, tmp_path, capfd):
    secret = site.base.replace("//", "//me:pass@") + "/a?token=hidden"
    site.files["/a?token=hidden"] = CONTENT
    site.plans["/a?token=hidden"] = [Answer(cut=4_000), Answer()]
    assert get(tmp_path, secret) == CONTENT
    assert site.headers["Authorization"] == "Basic bWU6cGFzcw=="
    nowhere = secret.replace(str(site.base.rpartition(":")[2]), "9")
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/a cannot be fetched") as caught:
        get(tmp_path, nowhere)
    with pytest.raises(ValueError, match=r"/b answers 404") as refused:
        get(tmp_path, secret.replace("/a?", "/b?"))
    with pytest.raises(ValueError, match=r"http://127.0.0.1:99999/a cannot be fetched: .* check the addr") as garbled:
        get(tmp_path, secret.replace(str(site.base.rpartition(":")[2]), "99999"))
    said = str(caught.value) + str(refused.value) + str(garbled.value) + capfd.readouterr().err
    assert not [word for word in ("me:", "pass", "token", "hidden") if word in said]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("http://a/b#c", "http://a/b#c"),
        ("http://u:p@w@a/b@c?d=e&f#g", "http://a/b@c#g"),
        ("two: https://u@a/b?c, 'http://v:w@d?e'", "two: https://a/b 'http://d'"),
        ("really? yes", "really yes"),
    ],
)
def test_text_is_shown_without_secrets(text, clean):
    assert shown(text) == clean
