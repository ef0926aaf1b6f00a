"""The authors' files are fetched once, under their digest."""

import hashlib
import http.server
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from detr import official
from detr.official import URLS, fetch_weights, load_official
from tests.detr.published import SMALL, assert_all_landed, saved, state_of


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that a loopback server serves, its address, and the paths asked for."""
    folder, asked = tmp_path / "site", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_request(self, *_):
            asked.append(self.path)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def publish(folder, state, digits=None):
    """Puts a checkpoint on the site under its digest's first digits; the file's name."""
    path = saved(folder / "new", state)
    digits = digits or hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return path.rename(folder / f"detr-r50-dc5-{digits}.pth").name


def cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "home").rglob("*") if path.is_file())


def test_a_url_is_downloaded_once_and_a_damaged_copy_again(site, tmp_path):
    folder, address, asked = site
    state = state_of(**SMALL)
    name = publish(folder, state)
    for times in (1, 1):
        model = load_official(f"{address}/{name}?download=1")[0]
        assert_all_landed(model, state)
        assert (model.config.stride, len(asked), cached(tmp_path)) == (16, times, [name])
    fetch_weights(f"{address}/{name}").write_bytes(b"damaged")
    assert_all_landed(load_official(f"{address}/{name}")[0], state)
    assert len(asked) == 2


def test_a_short_name_is_a_url(site, monkeypatch):
    folder, address, _ = site
    assert list(URLS) == ["detr-r50", "detr-dc5-r50", "detr-r101", "detr-dc5-r101"]
    monkeypatch.setitem(official.URLS, "detr-dc5-r50", f"{address}/{publish(folder, state_of(**SMALL))}")
    assert load_official("detr-dc5-r50")[0].config.stride == 16


def test_several_may_fetch_at_once(site):
    folder, address, _ = site
    name = publish(folder, state_of(**SMALL))
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(fetch_weights, [f"{address}/{name}"] * 4))
    assert len(set(paths)) == 1
    assert paths[0].read_bytes() == (folder / name).read_bytes()


def test_a_download_with_another_digest_is_refused_and_not_kept(site, tmp_path):
    folder, address, _ = site
    name = publish(folder, state_of(**SMALL), digits="0123abcd")
    with pytest.raises(ValueError, match=rf'{name} was not fetched \(invalid hash value \(expected "0123abcd"'):
        load_official(f"{address}/{name}")
    assert cached(tmp_path) == []


@pytest.mark.parametrize("name", ["a.pth", "a-1234567.pth", "a-12345678.pth.html", ""])
def test_a_url_without_its_digest_is_refused_before_anything_is_fetched(name, site):
    _, address, asked = site
    with pytest.raises(ValueError, match=r"does not end as -DIGITS\.pth, 8 or more hex digits of its SHA-256"):
        load_official(f"{address}/{name}")
    assert asked == []


def test_a_server_that_has_no_such_file_is_named(site, tmp_path):
    with pytest.raises(ValueError, match=r"http://127.*/a-12345678\.pth was not fetched \(HTTP Error 404"):
        load_official(f"{site[1]}/a-12345678.pth")
    assert cached(tmp_path) == []
