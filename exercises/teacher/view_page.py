"""Opens exercises/simplex.html in headless Chromium: its comparison with bandit.py, and a picture.

The browser is $CHROME_BIN, or a Chromium or Chrome on the path, or one that playwright installed.
Run: python -m exercises.teacher.view_page                     the counts of simplex.html#test
     python -m exercises.teacher.view_page --picture FILE.png  and the page as it looks; --width 390
                                                               --height 844 as on a phone
"""

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from bandit import one_line_errors
from exercises.teacher.embed_games import PAGE

NAMES = (
    "chromium",
    "chromium-browser",
    "chromium-headless-shell",
    "google-chrome",
    "google-chrome-stable",
)
PLAYWRIGHT = ("chrome-linux*/chrome", "chrome-linux*/headless_shell")


def find_browser():
    """The path of a Chromium or Chrome, None if there is none."""
    if os.environ.get("CHROME_BIN"):
        return os.environ["CHROME_BIN"]
    for name in NAMES:
        if shutil.which(name):
            return shutil.which(name)
    for pattern in PLAYWRIGHT:
        installed = sorted((Path.home() / ".cache" / "ms-playwright").glob(f"*/{pattern}"))
        if installed:
            return str(installed[-1])
    return None


def open_page(browser, address, *options):
    """What headless Chromium prints of an address.

    options:
        such as --dump-dom, which prints the page after its scripts ran.

    Raises RuntimeError with the browser's last line if it fails or takes over a minute.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # No sandbox: it refuses to run as root, which containers are, and opens our own file only.
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", *options, address]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{browser}: no answer within a minute") from None
        except OSError as error:
            raise RuntimeError(f"{browser}: {error.strerror}") from None
    if done.returncode:
        raise RuntimeError(f"{browser}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    return done.stdout


def agreement(browser, page=PAGE):
    """The lines that simplex.html#test shows, the counts first."""
    document = open_page(browser, f"{page.as_uri()}#test", "--dump-dom")
    section = re.search(r'<section id="agreement"[^>]*>(.*?)</section>', document, re.DOTALL)
    return re.findall(r"<p>(.*?)</p>", section.group(1))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Opens simplex.html in headless Chromium.")
    one_line_errors(parser, "view_page")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write the page as a .png")
    parser.add_argument("--width", type=int, default=1280, help="of the picture (default 1280)")
    parser.add_argument("--height", type=int, default=1180, help="of the picture (default 1180)")
    options = parser.parse_args(argv)
    if options.picture and not options.picture.resolve().parent.is_dir():
        parser.error(
            f"--picture {options.picture}: no such folder"
        )  # the browser would say nothing
    browser = find_browser()
    if browser is None:
        parser.error("no Chromium found: install one, or name it in CHROME_BIN")
    try:
        print("\n".join(agreement(browser)))
        if options.picture:
            size = f"--window-size={options.width},{options.height}"
            picture = f"--screenshot={options.picture.resolve()}"
            open_page(browser, PAGE.as_uri(), size, picture)
            print(f"picture: {options.picture}")
    except RuntimeError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
