"""A file is fetched in spite of trouble that passes; trouble that stays is named, and nothing that is secret."""

import datetime
import ssl

import pytest
import requests
from urllib3.util import Retry

from pipelines.data import fetch
from pipelines.data.fetch import Interrupted, Remote, ask_sizes
from pipelines.redaction import redact_url
from tests.bad_line import Answer, Site, serving
from tests.pipelines.fetching import CONTENT, SUM, get, kept, part_in

pytestmark = pytest.mark.usefixtures("impatient")


@pytest.mark.parametrize("sha256", ["", SUM])
def test_a_file_comes_whole_and_is_gone_when_it_has_been_used(site, tmp_path, sha256):
    assert get(tmp_path / "new" / "folder", site.plan("/a"), sha256=sha256) == CONTENT
    assert site.asked == [("HEAD", "/a", None), ("GET", "/a", None)]
    assert site.headers["Accept-Encoding"] == "identity"
    assert kept(tmp_path / "new" / "folder") == [".lock"]


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
    monkeypatch.setattr(fetch, "TIMEOUT", (60, 1))
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


def test_the_sum_of_an_unchecked_file_is_told(site, tmp_path, capfd):
    get(tmp_path, site.plan("/a"))
    assert f"/a has sha256 {SUM}; with that in download.sha256 it would be checked" in capfd.readouterr().err


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
    assert ask_sizes([Remote((f"{site.base}/a",), "")]) == {f"{site.base}/a": 0}
    assert get(tmp_path, f"{site.base}/a") == CONTENT


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
    assert redact_url(text) == clean
