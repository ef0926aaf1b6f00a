"""Whether the data's source changed, by what real servers of files and real folders tell."""

import json
import shutil
import threading
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipelines.data import looks
from pipelines.data.shapes import write_shapes
from pipelines.data.sources import sources_in
from pipelines.params import merge_parameters, to_yaml
from pipelines.retraining import watch
from tests.projects import SHAPES, commit, quick_project
from tests.running import ROOT, call, free_port

DAYS = ("Mon, 02 Nov 2026 10:00:00 GMT", "Tue, 03 Nov 2026 10:00:00 GMT")


class Site:
    """A web server whose answers a test sets: `headers` by method, or a status."""

    def __init__(self):
        self.head, self.get, self.calls, self.hang = {}, {}, [], threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, told, body):
                site.calls.append((self.command, self.headers.get("Range")))
                if told == "hang":
                    site.hang.wait(30)
                    return
                if isinstance(told, int):
                    self.send_error(told)
                    return
                self.send_response(206 if "Content-Range" in told else 200)
                for name, value in told.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def do_HEAD(self):
                self.answer(site.head, b"")

            def do_GET(self):
                self.answer(site.get, b"x")

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/"

    def close(self):
        self.hang.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def site():
    found = Site()
    yield found
    found.close()


@pytest.fixture
def another_site():
    found = Site()
    yield found
    found.close()


def document(source, mirrors=None):
    return {"download": {"source": source, "mirrors": mirrors or {}, "max_images": 0, "shapes": asdict(SHAPES)}}


def seen(site, mirrors=None, place="train.zip?signature=hush"):
    return looks.look(ROOT, document({"train_images": f"{site.url}{place}"}, mirrors))


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"source": "shapes", "max_images": 0, "mirrors": {}}, "download lacks the key 'shapes'"),
        ({"source": 5, "max_images": 0, "mirrors": {}, "shapes": {}}, "download.source is 5"),
        ({"source": "x", "max_images": 0, "mirrors": ["x"], "shapes": {}}, "download.mirrors is \\['x'\\]"),
        (None, "params.yaml lacks the section 'download'"),
    ],
)
def test_parameters_of_another_version_of_the_project_are_refused_by_name(section, said):
    with pytest.raises(ValueError, match=said):
        looks.look(ROOT, {"download": section})


def test_an_address_is_told_apart_by_etag_date_and_size(site):
    known = {"ETag": '"a"', "Last-Modified": DAYS[0], "Content-Length": "7"}
    site.head = dict(known)
    before = seen(site)
    assert looks.describe_changes(before, seen(site)) == []
    assert "hush" not in json.dumps(before)
    for name, value, said in (
        ("ETag", '"b"', 'ETag was "a", is "b"'),
        ("Last-Modified", DAYS[1], f"Last-Modified was {DAYS[0]}, is {DAYS[1]}"),
        ("Content-Length", "8", "bytes was 7, is 8"),
    ):
        site.head = known | {name: value}
        assert looks.describe_changes(before, seen(site)) == [f"download.source.train_images: {said}"]
    site.head = {"Last-Modified": DAYS[0]}
    only_a_date = seen(site)
    site.head = {"Last-Modified": DAYS[1]}
    assert len(looks.describe_changes(only_a_date, seen(site))) == 1
    assert {method for method, _ in site.calls} == {"HEAD"}


@pytest.mark.parametrize("refusal", [403, 405, 501, {}])
def test_without_head_the_first_byte_tells(site, refusal):
    site.head, site.get = refusal, {"ETag": '"a"', "Content-Range": "bytes 0-0/70", "Content-Length": "1"}
    before = seen(site)
    assert before["download.source.train_images"]["bytes"] == 70
    assert site.calls == [("HEAD", None), ("GET", "bytes=0-0")]
    site.get |= {"Content-Range": "bytes 0-0/71"}
    assert looks.describe_changes(before, seen(site)) == ["download.source.train_images: bytes was 70, is 71"]


def test_what_cannot_be_looked_at_is_an_error_that_says_so(site, monkeypatch):
    monkeypatch.setattr(looks, "TIMEOUT", (0.5, 0.5))
    for answer, said in (
        (404, r"train.zip answers 404; check the address"),
        ({}, r"train.zip tells neither ETag, Last-Modified nor size; it cannot be watched"),
        ("hang", r"train.zip cannot be reached: .*timed out"),
    ):
        site.head = site.get = answer
        with pytest.raises(ValueError, match=said) as caught:
            seen(site)
        assert "hush" not in str(caught.value)
    gone = f"http://user:hush@127.0.0.1:{free_port()}/train.zip"
    with pytest.raises(ValueError, match="train.zip cannot be reached") as caught:
        looks.look(ROOT, document({"train_images": gone}))
    assert "hush" not in str(caught.value)


def test_a_mirror_that_steps_in_is_compared_by_size_alone(site, another_site):
    mirrors = {site.url: [another_site.url]}
    site.head = {"ETag": '"a"', "Content-Length": "7"}
    another_site.head = {"ETag": '"b"', "Content-Length": "7"}
    before = seen(site, mirrors)
    assert another_site.calls == []
    site.head = site.get = 404
    mirrored = seen(site, mirrors)
    assert looks.describe_changes(before, mirrored) == []
    another_site.head |= {"ETag": '"c"'}
    assert len(looks.describe_changes(mirrored, seen(site, mirrors))) == 1
    another_site.head |= {"Content-Length": "8"}
    assert looks.describe_changes(before, seen(site, mirrors)) == ["download.source.train_images: bytes was 7, is 8"]


def unpacked(source):
    """The source folder with its training pictures in a folder."""
    shutil.unpack_archive(source / "train.zip", source / "train")
    (source / "train.zip").unlink()
    return source


def local(source):
    return looks.look(source.parent, document(source.name))


def test_local_files_are_told_apart_as_the_download_stage_takes_them(source):
    before = local(source)
    places = {one["place"] for name, one in before.items() if name != "download"}
    assert places == set(asdict(sources_in("source", source.parent)).values())
    (source / "instances_val.json").write_bytes((source / "instances_val.json").read_bytes())
    (line,) = looks.describe_changes(before, local(source))
    assert line.startswith("download.source.val_annotations: modified was ")
    (source / "instances_val.json").unlink()
    with pytest.raises(ValueError, match="source/instances_val.json is missing: a source folder holds"):
        local(source)
    shutil.rmtree(source)
    with pytest.raises(ValueError, match="'source': no such folder"):
        local(source)


def test_a_folder_of_pictures_is_told_apart_by_names_sizes_and_times(source):
    before = local(source)
    shutil.unpack_archive(source / "train.zip", source / "train")
    (source / "train.zip").unlink()
    last = local(source)
    assert "download.source.train_images: pictures was none, is 24" in looks.describe_changes(before, last)
    picture, other = sorted(path for path in (source / "train").rglob("*") if path.is_file())[:2]
    (source / "train" / "notes.txt").write_text("no picture", encoding="utf-8")
    assert looks.describe_changes(last, local(source)) == []
    renamed = picture.with_name(f"a{picture.name}")
    for change, said in (
        (lambda: picture.rename(renamed), ("digest",)),
        (lambda: renamed.write_bytes(renamed.read_bytes()[::-1]), ("newest", "digest")),
        (lambda: other.unlink(), ("pictures", "bytes", "digest")),
    ):
        change()
        lines = looks.describe_changes(last, last := local(source))
        assert [line.split()[1] for line in lines] == list(said)


@pytest.fixture(scope="module")
def project(tmp_path_factory, drawn):
    """A small project that takes its data from its folder `source`. Tests in this module use it in turn."""
    folder = tmp_path_factory.mktemp("watch")
    project = quick_project(folder, "download.source=source")
    shutil.copytree(drawn, project / "source")
    return project


def outside(document):
    raise ValueError("outside")


def watched(project, ref="HEAD", preset=None):
    with watch.watch(project, preset, ref, lambda document: None) as changes:
        return changes


def test_a_look_is_remembered_by_preset_and_ref_after_the_event_is_out(project):
    call(project, "git", "switch", "--quiet", "--create", "looks")
    assert watched(project) is None
    assert watched(project) == []
    write_shapes(replace(SHAPES, seed=5), project / "source")
    with pytest.raises(ConnectionError), watch.watch(project, None, "HEAD", lambda document: None) as changes:
        raise ConnectionError
    assert changes
    assert watched(project, "main") is None
    assert watched(project) == changes
    assert watched(project) == []
    with pytest.raises(ValueError, match="outside"), watch.watch(project, None, "HEAD", outside):
        pass
    assert call(project, "git", "status", "--short", "--untracked-files=no") == ""

    (project / "params.yaml").write_text(
        to_yaml(merge_parameters(project, None, ["download.source=shapes"])), encoding="utf-8"
    )
    assert watched(project) == []
    commit(project, "more", "params.yaml")
    assert any("num_train was none, is 48" in line for line in watched(project))
    assert watched(project) == []
    outs = [{"path": f"data/coco/{name}", "md5": "1" * 32, "size": 1} for name in watch.FILES]
    (project / "dvc.lock").write_text(
        json.dumps({"schema": "2.0", "stages": {"download": {"cmd": "none", "outs": outs}}}), encoding="utf-8"
    )
    assert watched(project) == []
    commit(project, "more", "dvc.lock")
    assert watched(project)[0] == f"dvc.lock: train.zip was none, is {'1' * 32}"
    (state,) = [path for path in (project / "scratch/watch").iterdir() if "shapes" in path.read_text(encoding="utf-8")]
    state.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is damaged; remove it"):
        watched(project)
    with pytest.raises(ValueError, match="'nothing' is no commit"):
        watched(project, "nothing")
    with pytest.raises(ValueError, match="there is no preset 'nothing'"):
        watched(project, preset="nothing")
    assert watched(project, preset="detr-r50") is None
    call(project, "git", "switch", "--quiet", "main")
    shutil.rmtree(project / "scratch/watch")
