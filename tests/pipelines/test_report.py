"""Pages of a run: what they say, what they link, and that text from anywhere stays text."""

import base64
import io
import json
import shutil

import pytest
from markdown_it import MarkdownIt
from PIL import Image

from pipelines.registry.markdown import escape_text, fence_lines, format_table
from pipelines.retraining import advice, report
from pipelines.retraining.montage import draw_montage
from tests.running import free_port

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(1)> [a](javascript:alert(1)) **b** `c` | d \\| http://evil.example"
    " www.evil.example a@b.c # h ~~s~~ _i_ a_b <!-- x --> &lt; ![i](http://x/y.png) \\"
)
STAGES = [report.Stage("train", "ran", 185.0), report.Stage("register", "unchanged", 1.0)]


def rendered(text):
    return MarkdownIt("gfm-like", {"linkify": False}).render(text)


def shown(text):
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def test_data_docs_of_other_data_are_told_from_those_of_what_passed(tmp_path):
    docs, passed = tmp_path / "scratch/data_docs/data.sha256", tmp_path / "artifacts/validate/passed.json"
    assert not report.has_other_docs(tmp_path)
    for path, content in ((docs, "one"), (passed, '{"data": "other"}')):
        path.parent.mkdir(parents=True)
        path.write_text(content, encoding="utf-8")
    assert report.has_other_docs(tmp_path)
    docs.write_text("other", encoding="utf-8")
    assert not report.has_other_docs(tmp_path)


def test_text_stays_text():
    text = f"# {escape_text(HOSTILE)}\n\n- {escape_text(HOSTILE)}\n\n{format_table([['', 'x'], [escape_text(HOSTILE), escape_text('a|b')]])}\n"
    page = rendered(text)
    for tag in ("h1", "li", "td"):
        assert f"<{tag}>{shown(HOSTILE)}</{tag}>" in page
    assert ">a|b</td>" in page
    assert "<script" not in page
    assert "<img" not in page
    assert "<a " not in page
    assert escape_text("1\n# x\x1b[31m\x00") == "1 \\# x"


def test_nothing_ends_a_fence():
    page = rendered(fence_lines(["```", "`````", "</code></pre><b>x</b>", "\x1b[31mred"]))
    assert page.count("<pre>") == 1
    assert "```\n`````\n&lt;/code&gt;&lt;/pre&gt;&lt;b&gt;x&lt;/b&gt;\nred\n</code></pre>" in page


@pytest.mark.parametrize("stage", ["download", "validate", "train", "evaluate", "register"])
def test_a_failure_says_how_to_go_on(stage, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hunter2hunter2")
    lines = [f"line {k}" for k in range(49)] + ["error: ``` hunter2hunter2 http://me:pass@host/"]
    page = report.compose_failure(stage, f"{stage}: {HOSTILE}", lines)
    assert page.startswith(f"# {stage} failed\n\n\\<script\\>")
    assert advice.STAGES[stage] in page
    assert "Retry" in advice.AGAIN
    assert "## The last 50 lines" in page
    assert "line 0\n" in page
    assert "hunter2" not in page
    assert "me:pass" not in page
    assert "<script" not in rendered(page)


def test_pictures_are_small_and_whole(tmp_path):
    paths = [tmp_path / f"worst_{k:02d}.png" for k in range(3)]
    for k, path in enumerate(paths):
        Image.effect_noise((900 + 100 * k, 500), 60).convert("RGB").save(path)
    kind, _, content = draw_montage(paths).partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert (kind, image.format, image.width) == ("data:image/jpeg", "JPEG", 968)
    assert draw_montage(paths[:1]).startswith("data:image/png;base64,")


@pytest.fixture
def place(tmp_path):
    """What the report reads of a worktree."""
    plots = tmp_path / "artifacts/evaluate/plots"
    plots.mkdir(parents=True)
    Image.new("RGB", (30, 20), "red").save(plots / "confusion.png")
    metrics = {"AP": 0.25, "AP_small": -1.0, "AP_low": 0.2, "AP_high": 0.3}
    (tmp_path / "artifacts/evaluate/metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    (tmp_path / "artifacts/register").mkdir()
    (tmp_path / "artifacts/register/version.json").write_text('{"name": "detr", "version": 7}', encoding="utf-8")
    (tmp_path / "params.yaml").write_text("register:\n  confidence: 0.9\n", encoding="utf-8")
    return tmp_path


def test_without_mlflow_the_report_has_what_the_files_have_and_says_what_is_missing(place, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    found = report.compose_result(place, place, "runs/x-1", HOSTILE, STAGES)
    assert found.headline == "Version 7: AP 0.250"
    assert len(found.missing) == 1
    assert "what MLflow has of version 7" in found.missing[0]
    assert "git checkout runs/x-1 && dvc checkout" in found.markdown
    assert "Missing here: " in found.markdown
    assert "0.2000 to 0.3000" in found.markdown
    assert "90% interval" in found.markdown
    assert "3 min 5 s" in found.markdown
    assert "<script" not in rendered(found.markdown)
    assert shown(HOSTILE) in rendered(found.markdown)
    assert [row["metric"] for row in found.metrics] == ["AP", "AP_low", "AP_high"]
    assert set(found.pictures) == {"confusion"}
    shutil.rmtree(place / "artifacts/evaluate/plots")


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds, said):
    assert report.format_duration(seconds) == said
