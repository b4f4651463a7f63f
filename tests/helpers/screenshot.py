"""Takes the README's picture: `python -m tests.helpers.screenshot URL`; URL: a gateway with the demo pair."""

import shutil
import sys

from playwright.sync_api import expect, sync_playwright

from tests.helpers.paths import ROOT

IMAGE = ROOT / "docs" / "images" / "playground.png"
PROMPT = "The book has 695 pages and costs £89.56."
BUDGET = 10
"""Budget, in percent."""
FLAGS = ["--no-sandbox", "--disable-gpu"]


def main() -> None:
    """Ask the playground, and photograph the answer."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 1000, "height": 620}, device_scale_factor=2)
        page.goto(sys.argv[1])
        page.get_by_label("Teacher budget").press("Home")
        for _ in range(BUDGET):
            page.get_by_label("Teacher budget").press("ArrowRight")
        page.get_by_role("textbox", name="Prompt").fill(PROMPT)
        page.get_by_role("button", name="Write").click()
        expect(page.locator("#facts")).to_contain_text("of the answer", timeout=60_000)
        IMAGE.parent.mkdir(exist_ok=True)
        page.screenshot(path=IMAGE)
        browser.close()


if __name__ == "__main__":
    main()
