"""The page, in a headless Chromium."""

import shutil
import threading

import pytest
from PIL import Image

from kinoflow.data.video import probe
from kinoflow.sample.serve.app import ServeConfig
from tests.sample.serve.fake import TOKEN, FakeMaker, running, until

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium; install one: chromium")
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
FOCUSED = """() => {
    const element = document.activeElement;
    return (element.labels?.[0] ?? element).firstChild?.textContent.trim();
}"""
EVIL = '<script>window.bad = 1</script><img src=x onerror="window.bad = 1"> & "a red star"'


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser):
    """A fresh profile; what its console says is an error of the page's, but for answers with 4xx.

    And for a server that is gone: it ends before the page, which may be asking it just then.
    """
    context = browser.new_context(viewport=WIDE, accept_downloads=True)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    yield page
    context.close()
    usual = ("the server responded with a status of 4", "Failed to load resource: net::ERR_")
    assert [line for line in said if not any(each in line for each in usual)] == []


@pytest.fixture
def served(tmp_path):
    """The address of a server with a queue of one, its gate, and its folder."""
    gate = threading.Event()
    config = ServeConfig(folder=tmp_path / "serve", queue=1)
    with running(FakeMaker(gate.is_set), config) as address:
        yield address, gate


def test_a_prompt_is_reworded_where_the_server_can_and_the_person_wants_it(page, tmp_path):
    maker, config = FakeMaker(lambda: True), ServeConfig(folder=tmp_path / "serve")
    with running(maker, config) as address:
        page.goto(address)
        page.get_by_role("button", name="Make").wait_for()
        until(lambda: page.get_by_label("Steps").input_value() == "50")
        assert not page.get_by_label("language model").is_visible()
        maker.rewrites = True
        page.goto("about:blank")  # it would ask a server that is gone, and say so
    with running(maker, config) as address:
        page.goto(address)
        page.get_by_label("language model").wait_for()
        for check in (False, True):
            page.get_by_label("Prompt").fill("a ring")
            page.get_by_label("language model").set_checked(check)
            page.get_by_role("button", name="Make").click()
            page.locator("video").nth(int(check)).wait_for()
        reworded = page.get_by_text("Reworded by it: a ring, slowly")
        assert reworded.count() == 1
        card = page.get_by_role("listitem").filter(has=reworded)
        card.get_by_role("button", name="Again").click()
        until(lambda: reworded.count() == 2)


def test_a_person_makes_watches_keeps_repeats_and_deletes_clips(page, served, tmp_path):
    address, gate = served
    page.goto(address)
    page.get_by_label("Prompt").fill(EVIL)
    page.get_by_label("Seed").fill(str(2**63 - 1))
    page.get_by_label("Seed").press("Enter")
    bar = page.get_by_role("progressbar")
    until(lambda: bar.count() == 1 and bar.get_attribute("value") == "50")
    gate.set()
    clip = page.locator("video")
    clip.wait_for()
    until(lambda: clip.evaluate("video => video.readyState") == 4)
    clip.evaluate("video => video.play()")
    until(lambda: clip.evaluate("video => video.currentTime") > 0)
    assert clip.evaluate("video => [video.videoWidth, video.videoHeight]") == [32, 32]
    card = page.get_by_role("listitem")
    assert EVIL in card.inner_text() and f"seed {2**63 - 1}" in card.inner_text()
    assert page.get_by_role("status").inner_text() == f"Finished: {EVIL}"
    assert page.evaluate("window.bad") is None and page.locator("li img").count() == 0
    with page.expect_download() as download:
        card.get_by_role("link", name="Download").click()
    download.value.save_as(tmp_path / "kept.mp4")
    assert probe(tmp_path / "kept.mp4").metadata["prompt"] == EVIL
    card.get_by_role("button", name="Again").click()
    page.locator("li:nth-child(2) video").wait_for()
    page.locator("li:nth-child(1) video").wait_for()
    texts = page.get_by_role("listitem").all_inner_texts()
    assert [EVIL in text for text in texts] == [True, True]
    assert [f"seed {2**63 - 1}" in text for text in texts] == [False, True]
    page.get_by_role("listitem").nth(1).get_by_role("button", name="Delete").click()
    until(lambda: page.get_by_role("listitem").count() == 1)
    assert page.evaluate("document.activeElement.id") == "clips-title"


def test_a_clip_begins_with_a_picture_and_so_does_the_next(page, served, tmp_path):
    address, gate = served
    gate.set()
    Image.new("RGB", (40, 20), (90, 90, 90)).save(tmp_path / "first.png")
    page.goto(address)
    page.get_by_label("First picture").wait_for()
    shown = page.locator("#first-image")
    for _ in range(2):
        page.get_by_label("First picture").set_input_files(tmp_path / "first.png")
        until(lambda: shown.is_visible() and shown.evaluate("image => image.naturalWidth") == 40)
        page.get_by_label("Prompt").fill("a ring")
        page.get_by_role("button", name="Without it").click()
        assert not shown.is_visible() and page.get_by_label("First picture").evaluate("i => i.value") == ""
    page.get_by_label("First picture").set_input_files(tmp_path / "first.png")
    page.get_by_role("button", name="Make").click()
    page.locator("video").wait_for()
    page.get_by_role("button", name="Again").click()
    until(lambda: page.locator("video").count() == 2)
    assert [" from a picture " in text for text in page.get_by_role("listitem").all_inner_texts()] == [
        True
    ] * 2
    kept = sorted((tmp_path / "serve" / "clips").glob("*.first.png"))
    assert [path.read_bytes() for path in kept] == [(tmp_path / "first.png").read_bytes()] * 2


def test_a_bad_setting_and_a_full_queue_are_said(page, served):
    address, gate = served
    page.goto(address)
    page.wait_for_load_state("networkidle")  # its own first requests are answered
    page.get_by_label("Prompt").fill("a red star")
    page.get_by_label("Steps").fill("300")
    alert, button = page.get_by_role("alert"), page.get_by_role("button", name="Make")
    until(lambda: button.click() or "num_inference_steps: 300" in alert.inner_text())
    page.get_by_label("Steps").fill("5")
    for number in range(2):
        page.get_by_role("button", name="Make").click()
        until(lambda number=number: page.get_by_role("listitem").count() == number + 1)
        page.get_by_role("progressbar").wait_for()
    page.get_by_label("Prompt").press("Control+Enter")
    until(lambda: "the queue of 1 is full" in alert.inner_text())
    gate.set()
    until(lambda: page.locator("video").count() == 2)
    page.get_by_label("Prompt").fill("a bug with a puple star")
    page.get_by_role("button", name="Make").click()
    until(lambda: "Failed: the server failed" in page.get_by_role("listitem").first.inner_text())
    assert alert.inner_text() == ""


def test_wide_and_narrow_with_keys_alone(page, served):
    address, gate = served
    gate.set()
    page.goto(address)
    page.locator("#clip").select_option(index=2)
    page.get_by_label("Prompt").fill("a puple star " + "goesonandonwithoutanyend" * 20)
    page.keyboard.press("Control+Enter")
    page.locator("video").wait_for()
    assert "This release does not know: puple" in page.get_by_role("listitem").inner_text()
    for size in (WIDE, NARROW):
        page.set_viewport_size(size)
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    page.get_by_label("Prompt").focus()
    names = []
    for _ in range(25):  # a video has stations of its own
        page.keyboard.press("Tab")
        names.append(page.evaluate(FOCUSED))
    order = ["Steer away from", "First picture", "Clip", "Steps", "Guidance", "Seed"]
    order += ["Make", "Download", "Again", "Delete"]
    assert [name for name in dict.fromkeys(names) if name in order] == order


def test_the_page_asks_for_the_token(page, tmp_path):
    config = ServeConfig(folder=tmp_path / "serve", token=TOKEN)
    with running(FakeMaker(), config) as address:
        page.goto(address)
        field = page.get_by_label("Token")
        assert not page.get_by_label("Prompt").is_visible()
        field.fill("a wrong one")
        field.press("Enter")
        until(lambda: "not the server's token" in page.get_by_role("alert").inner_text())
        field.fill(TOKEN)
        field.press("Enter")
        page.get_by_label("Prompt").fill("a red star")
        page.get_by_role("button", name="Make").click()
        page.locator("video").wait_for()
        assert page.get_by_role("alert").inner_text() == ""
        page.reload()
        page.locator("video").wait_for()
