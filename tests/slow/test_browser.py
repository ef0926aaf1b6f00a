"""Prefect's and MLflow's user interfaces in a real browser. DETR_SCREENSHOTS=docs makes the README's pictures."""

import io
import os
import re
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlparse

import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from tests.orchestra import services
from tests.projects import commit, reference, small_project
from tests.running import needs

PICTURES = os.environ.get("DETR_SCREENSHOTS")
BETTER = [  # that the pictures show numbers above 0
    "download.shapes.num_train=3000",
    "download.shapes.num_val=150",
    "model.hidden_dim=64",
    "model.num_encoder_layers=2",
    "train.epochs=5",
    "train.batch_size=16",
    "train.micro_batch=8",
    "train.log_steps=25",
    "train.warmup_steps=50",
    "train.checkpoint_minutes=1.0",
    "evaluate.num_pictures=6",
]
EPOCHS = 8 if PICTURES else 1
SECONDS = 1200


@pytest.fixture(scope="module")
def browser():
    path = needs("chromium")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser):
    """A page, which asks nobody but servers here."""
    found, asked = browser.new_page(viewport={"width": 1280, "height": 900}), set()
    found.on("request", lambda request: asked.add(urlparse(request.url).hostname))
    found.on("websocket", lambda socket: asked.add(urlparse(socket.url).hostname))
    found.set_default_timeout(60_000)
    yield found
    found.close()
    assert asked <= {None, "127.0.0.1"}


@pytest.fixture(scope="module")
def served(browser, tmp_path_factory):
    """The servers of a project with a champion. Tests use it in turn."""
    folder = tmp_path_factory.mktemp("browser")
    project = small_project(folder, *BETTER) if PICTURES else reference(folder)
    if not PICTURES:
        commit(project, "the champion", "dvc.lock")
    with services(project) as found:
        if PICTURES:
            first = found.start("retrain/on-demand", note="The first model.")
            assert found.wait(first, SECONDS)["state_type"] == "COMPLETED", found.log(first)
        yield SimpleNamespace(services=found)


def picture(page, name, height=900):
    """Keeps a picture of the top of the page where it is asked for, in few colours."""
    if PICTURES:
        content = page.screenshot(animations="disabled", clip={"x": 0, "y": 0, "width": 1280, "height": height})
        path = Path(PICTURES) / f"{name}.png"
        Image.open(io.BytesIO(content)).convert("RGB").quantize(128).save(path, optimize=True)
        assert path.stat().st_size < 150_000


def close_assistant(page):
    """Closes what MLflow puts beside a page."""
    if (assistant := page.get_by_role("button", name="Close", exact=True)).is_visible():
        assistant.click()


def open_form(page, services, deployment="retrain/on-demand"):
    found = services.ask("GET", f"deployments/name/{deployment}")
    page.goto(f"{services.prefect}/deployments/deployment/{found['id']}")
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").first.click()
    page.get_by_role("button", name="Submit").wait_for()
    return found["parameter_openapi_schema"]["properties"]


def second(served, page):
    """The id of the run that the form has started, once it has ended; the form is used when it has not been yet."""
    if not hasattr(served, "second"):
        test_the_form_says_what_it_asks_refuses_nonsense_and_starts_a_run(served, page)
    assert served.services.wait(served.second, SECONDS)["state_type"] == "COMPLETED"
    return served.second


def test_the_form_says_what_it_asks_refuses_nonsense_and_starts_a_run(served, page):
    services = served.services
    for field in open_form(page, services).values():
        expect(page.get_by_text(f"{field['title']} (Optional)", exact=True)).to_be_visible()
        expect(page.get_by_text(field["description"], exact=True)).to_be_visible()
    page.get_by_role("button", name="none", exact=True).press("ArrowDown")
    expect(page.get_by_text("coco-detr-r50", exact=True)).to_be_visible()
    page.keyboard.press("Escape")
    known = {run["id"] for run in services.runs()}
    page.get_by_role("button", name="Add item").click()
    expect(page.locator("textarea")).to_have_count(3)
    page.locator("textarea").first.fill("nonsense")
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_text(re.compile("'nonsense' does not match"))).to_be_visible()
    assert {run["id"] for run in services.runs()} == known
    page.locator("textarea").first.fill(f"train.epochs={EPOCHS}")
    page.locator("textarea").last.fill("Is it the number of epochs?")
    expect(page.get_by_text(re.compile("does not match"))).to_be_hidden()
    page.get_by_text("Run Name").scroll_into_view_if_needed()
    picture(page, "form")
    answer = None
    while answer is None or answer.status == 503:  # while SQLite is locked: a person presses again
        with page.expect_response("**/create_flow_run") as answered:
            page.get_by_role("button", name="Submit").click()
        answer = answered.value
    assert answer.ok, answer.text()
    page.wait_for_url("**tab=Runs**")
    (started,) = services.wait_until(lambda: [run for run in services.runs() if run["id"] not in known], 60)
    assert started["parameters"]["overrides"] == [f"train.epochs={EPOCHS}"]
    served.second = started["id"]
    page.goto(f"{services.prefect}/runs/flow-run/{served.second}")
    expect(page.get_by_role("button", name="Cancel", exact=True)).to_be_visible()
    assert services.wait(served.second, SECONDS)["state_type"] == "COMPLETED", services.log(served.second)
    assert f"epoch {EPOCHS}/{EPOCHS}: loss" in services.log(served.second)


def test_prefects_own_address_leads_to_pages_that_ask_nobody_elsewhere(served, page):
    page.goto(served.services.prefect)
    expect(page.get_by_text("Flow Runs", exact=True).first).to_be_visible()
    page.wait_for_load_state("networkidle")
    assert "/v2/" not in page.url


def test_the_page_of_a_run_shows_its_stages_and_its_artifacts(served, page):
    services, run_id = served.services, second(served, page)
    page.goto(f"{services.prefect}/runs/flow-run/{run_id}")
    expect(page.get_by_text(f"train.epochs={EPOCHS}").first).to_be_visible()
    page.get_by_text("Artifacts", exact=True).click()
    expect(page.get_by_text("What came out, and where it is")).to_be_visible()
    page.get_by_text("Task Runs", exact=True).click()
    for stage in ("download", "validate", "train", "evaluate", "register"):
        expect(page.get_by_role("link", name=stage, exact=True)).to_be_visible()
    expect(page.get_by_text("Restored").first).to_be_visible()
    expect(page.get_by_text("Ran", exact=True).first).to_be_visible()
    picture(page, "run")


def test_the_artifacts_are_rendered(served, page):
    services, run_id = served.services, second(served, page)
    made = services.artifacts(run_id)

    def visit(key):
        page.goto(f"{services.prefect}/artifacts/artifact/{made[key]['id']}")

    visit("result")
    expect(page.get_by_role("heading", name=re.compile(r"^Version \d is "))).to_be_visible()
    for text in ("1, the champion", "train.epochs", "How long it took", "Is it the number of epochs?"):
        expect(page.get_by_text(text).first).to_be_visible()
    picture(page, "result")
    for link in ("^Data Docs$", "^the dataset's page$", "^model version", "^run$", "^compared with version"):
        expect(page.get_by_role("link", name=re.compile(link))).to_have_attribute(
            "href", re.compile(re.escape(services.mlflow))
        )
    visit("metrics")
    expect(page.get_by_role("columnheader", name="champion")).to_be_visible()
    expect(page.get_by_text("AP50", exact=True)).to_be_visible()
    visit("training")
    expect(page.get_by_text("Progress: 100%")).to_be_visible()
    best = ["best-images"] if PICTURES else []  # a training of seconds gets nothing right
    for key in ("precision-recall", "worst-images", "confusion", *best):
        visit(key)
        image = page.locator("img[src^='data:image/']").first
        image.wait_for()
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0


def test_the_page_of_a_failed_run_shows_the_failure(served, page):
    services = served.services
    run_id = services.start("retrain/on-demand", overrides=["train.lr=1e30"])
    assert services.wait(run_id, SECONDS)["state_type"] == "FAILED"
    page.goto(f"{services.prefect}/runs/flow-run/{run_id}")
    page.get_by_text("Artifacts", exact=True).click()
    page.get_by_text("train failed").first.click()
    expect(page.get_by_role("heading", name="train failed")).to_be_visible()
    expect(page.get_by_role("heading", name="How to go on")).to_be_visible()
    expect(page.get_by_text("train.lr", exact=True)).to_be_visible()
    assert services.artifacts(run_id)["failure"]["data"].count("\n") >= 10


def test_mlflow_shows_the_version_and_compares_two(served, page):
    services = served.services
    run_id = second(served, page)
    text = services.artifacts(run_id)["result"]["data"]
    urls = {name.rstrip(" 0123456789"): url for name, url in re.findall(r"\[([^\]]+)\]\((http[^)]+)\)", text)}
    page.goto(urls["model version"])
    expect(page.get_by_text(re.compile("champion|challenger")).first).to_be_visible()
    close_assistant(page)
    picture(page, "version", 700)
    page.goto(urls["compared with version"])
    expect(page.get_by_text(re.compile("Comparing 2 Runs")).first).to_be_visible()
    close_assistant(page)
    page.get_by_role("button", name="Artifacts").scroll_into_view_if_needed()
    for metric in ("AP", "AP50", "AP75"):  # the panes of names and values scroll apart: the first rows are in line
        expect(page.get_by_role("link", name=metric, exact=True)).to_be_visible()
    for run in re.findall(r"(?<=%22)[0-9a-f]{32}", urls["compared with version"]):
        expect(page.locator(f"a[href$='/runs/{run}']").first).to_be_attached()
    picture(page, "compare", 420)
