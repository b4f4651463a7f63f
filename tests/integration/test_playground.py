"""The playground in a real browser, against the real gateway."""

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Route, expect, sync_playwright

from measuring.pair import Serving
from server.http.routes import PLAYGROUND

# Otherwise Chromium itself would contact hosts that cannot be reached.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
PATIENCE = 300_000  # milliseconds: engines and browser share the cores
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.fail("the playground is tested in Chromium: install it (Debian: chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, stack: Serving) -> Iterator[Page]:
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    problems: list[str] = []

    def watch(message: ConsoleMessage) -> None:
        # A refused request is for the page to show, and not an error in it.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            problems.append(message.text)

    page.on("console", watch)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(stack.gateway) else problems.append(r.url))
    page.goto(stack.gateway)
    yield page
    page.close()
    assert not problems  # no script error, and no request to any server but the gateway


def set_budget(page: Page, percent: int) -> None:
    """Set the budget with the keyboard: Home is 0, and each arrow is one percent."""
    page.get_by_label("Teacher budget").press("Home")
    for _ in range(percent):
        page.get_by_label("Teacher budget").press("ArrowRight")


def test_the_teachers_words_are_marked_with_their_reasons(page: Page) -> None:
    set_budget(page, 50)
    expect(page.locator("#budget-value")).to_have_text("50 %")
    page.get_by_role("textbox", name="Prompt").fill("The book has 695 pages and costs £89.56.")
    page.get_by_role("button", name="Write").click()
    expect(page.locator("#facts")).to_contain_text("of the answer, budget 50 %")
    expect(page.locator("#facts")).to_contain_text("The teacher cost 0.0")
    marked = page.locator("#text .teacher")
    expect(marked).not_to_have_count(0)
    marked.first.focus()
    expect(page.get_by_role("tooltip")).to_contain_text("Written by the teacher")
    share = page.locator("#facts").inner_text()
    tokens = int(share.split(" of ")[0].removeprefix("The teacher wrote "))
    assert tokens > 0
    assert (
        0
        < page.locator("#meter-rate").bounding_box()["width"]
        < page.locator(".meter").bounding_box()["width"]
    )
    assert len(page.locator("#text").inner_text()) > len("".join(marked.all_inner_texts()))


def test_budget_zero_marks_nothing(page: Page) -> None:
    set_budget(page, 0)
    page.get_by_role("textbox", name="Prompt").fill("The train leaves at 17:45.")
    page.get_by_role("textbox", name="Prompt").press("Control+Enter")
    expect(page.locator("#facts")).to_contain_text("0 of")
    assert page.locator("#text").inner_text()
    expect(page.locator("#text .teacher")).to_have_count(0)


def test_answers_at_several_budgets_are_shown_side_by_side(page: Page) -> None:
    page.get_by_role("button", name="Compare budgets").click()
    rows = page.locator("#rows tr")
    expect(rows.nth(4).locator("td.n")).to_have_count(3)
    rates = [float(rows.nth(i).locator("td.n").first.inner_text().removesuffix("%")) for i in range(5)]
    assert rates[0] == 0
    assert rates[4] == 100


def test_a_click_before_the_page_has_loaded_is_not_interrupted(page: Page) -> None:
    """A click before the examples have arrived waits for one. The opening answer does not stop it."""
    held: list[Route] = []
    page.route("**/playground/examples", lambda route: held.append(route))
    with page.expect_request("**/playground/examples"):
        page.reload()
    page.get_by_role("button", name="Compare budgets").click()
    page.wait_for_timeout(300)
    held[0].continue_()
    expect(page.locator("#rows tr").nth(4).locator("td.n")).to_have_count(3)
    assert page.get_by_role("textbox", name="Prompt").input_value()


def test_the_page_opens_with_an_answer(page: Page) -> None:
    expect(page.locator("#facts")).to_contain_text("of the answer, budget 10 %")
    assert page.get_by_role("textbox", name="Prompt").input_value()
    assert page.locator("#text").inner_text()


def test_on_a_telephone_everything_is_visible(page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    prompt = page.get_by_role("textbox", name="Prompt")
    # Spelled out, this is a word of 47 letters, wider than the page.
    prompt.fill("Here is the answer to your question: Karl got 24,926 votes and Ben got 460. Many thanks!")
    page.get_by_role("button", name="Compare budgets").click()
    expect(page.locator("#rows tr").nth(4).locator("td.n")).to_have_count(3)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    for cell in page.locator("#rows td").all():
        box = cell.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390


def test_errors_are_shown(page: Page) -> None:
    page.get_by_role("textbox", name="Prompt").fill("word " * 2000)  # longer than the model's context
    page.get_by_role("button", name="Write").click()
    expect(page.locator("#facts .error")).to_contain_text("context")


def test_the_chart_moves(page: Page) -> None:
    page.get_by_role("button", name="Random example").click()
    expect(page.locator("#live")).to_contain_text("Since startup")
    for series in ("rate", "price"):
        expect(page.locator(f"#chart path.{series}")).not_to_have_attribute("d", "")


def test_the_page_works_under_a_root_path_and_without_an_admins_key(browser: Browser) -> None:
    """The page sends its requests below its own address, and explains why it shows no numbers."""
    asked: list[str] = []

    def answer(route: Route) -> None:
        path = route.request.url.removeprefix("http://gateway")
        asked.append(path)
        if path == "/api/":
            route.fulfill(body=PLAYGROUND.read_text(), content_type="text/html")
        elif path == "/api/playground/examples":
            route.fulfill(json=["Hello"])
        else:
            route.fulfill(status=401, json={"error": {"message": "no"}})

    page = browser.new_page()
    page.route("**/*", answer)
    page.goto("http://gateway/api/")
    expect(page.locator("#live")).to_have_text("To see the metrics of this gateway, enter an admin's key.")
    page.get_by_role("textbox", name="Prompt").fill("Hi")
    page.get_by_role("button", name="Write").click()
    expect(page.locator("#facts")).to_contain_text("needs an API key")
    page.close()
    assert {"/api/metrics", "/api/v1/models", "/api/playground/examples"} <= set(asked)
    assert all(path.startswith("/api/") or path == "/favicon.ico" for path in asked)
