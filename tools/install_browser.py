"""Find the Chromium that the report's tests open it in, or install it where a package manager can without asking."""

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    """The path of an installed one."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


def main() -> None:
    if find_browser():
        return
    if shutil.which("apt-get") and os.geteuid() == 0:
        for arguments in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            subprocess.run(["apt-get", "-q", *arguments], check=True, stdout=sys.stderr)
    if not find_browser():
        sys.exit(f"the report's tests need Chromium; install it so that one of {', '.join(NAMES)} is on the PATH")


if __name__ == "__main__":
    main()
