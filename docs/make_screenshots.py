"""Take the pictures of the documentation from a report, in a headless Chromium.

    python -m dbnet.synth --out demo/data --train 1 --val 12 --test 1 --size 960 --seed 1 --lines
    python evaluate.py weights/lite.pt --data demo/data --report report.html --lang en
    python docs/make_screenshots.py report.html

Writes report.jpg, all images, and report-image.jpg, the worst of them, beside this script. Needs Chromium, its
driver (Debian: apt install chromium chromium-driver) and `pip install selenium`.
"""

import argparse
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="page that evaluate.py --report wrote")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="DIR", help="folder of the pictures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as profile:
        browser = start_browser(Path(profile))
        try:
            browser.get(args.report.resolve().as_uri())
            wait_for_pictures(browser)
            save(browser, args.out / "report.jpg")
            browser.execute_script("arguments[0].click()", browser.find_element(By.CSS_SELECTOR, ".card"))
            wait_for_pictures(browser)
            save(browser, args.out / "report-image.jpg")
        finally:
            browser.quit()


def start_browser(profile: Path, width: int = 1360, height: int = 900) -> webdriver.Chrome:
    """Debian's Chromium with a fresh profile in the folder `profile`, which must outlive it."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))


def wait_for_pictures(browser: webdriver.Chrome) -> None:
    """Wait until the visible pictures are decoded and painted."""
    script = """
        const images = [...document.querySelectorAll("image[href]")];
        return images.length && Promise.all(images.map(image => image.decode()))
            .then(() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true)))));
    """
    WebDriverWait(browser, 30).until(lambda browser: browser.execute_script(script))


def save(browser: webdriver.Chrome, path: Path) -> None:
    """Save the content of the window as a JPEG."""
    Image.open(BytesIO(browser.get_screenshot_as_png())).convert("RGB").save(path, quality=82, optimize=True)
    print(f"{path} ({path.stat().st_size // 1000} kB)")


if __name__ == "__main__":
    main()
