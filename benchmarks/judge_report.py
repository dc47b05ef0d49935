"""The report in docs/: a random drop and a mild recipe against the original, on the testbed, with its picture. One command, resumable.

    python -m benchmarks.judge_report [--limit 608] [--output docs] [--work build/judge-report]

Latencies are of the machine while this runs: leave it alone meanwhile. The page must stay below 3 MB.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from foveate.cli import execute

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "examples" / "testbed" / "checkpoint"
RECIPES = {"drop-random-14": "drop-random{layer=2,keep=14}", "drop-fastv-72": "drop-fastv{layer=5,keep=72}"}
LARGEST = 3_000_000  # bytes
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def run(*arguments: object) -> None:
    code = execute([str(a) for a in arguments])
    if code != 0:
        sys.exit(f"foveate {' '.join(map(str, arguments))}: exit code {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=608, help="items: thirty-two of every slice")
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "judge-report")
    args = parser.parse_args()
    work, data = args.work, args.work / f"data-{args.limit}"
    work.mkdir(parents=True, exist_ok=True)
    if not (data / "items.jsonl").is_file():
        command = [sys.executable, "examples/testbed/make_data.py", "--split", "test", "--out", str(data.absolute()), "--limit", str(args.limit)]
        subprocess.run(command, cwd=ROOT, check=True)
    for name, recipe in {"original": None, **RECIPES}.items():
        if not (work / name).is_dir():
            run("optimize", CHECKPOINT, "-o", work / name, *(["-r", recipe] if recipe else []), "-q")
    page = args.output / "report.html"
    run("report", *(work / n for n in RECIPES), "-b", work / "original", "-d", data, "-o", page, "--batch", 16, "--work", work / "results")
    if page.stat().st_size >= LARGEST:
        sys.exit(f"{page} has {page.stat().st_size} bytes, the most is {LARGEST}")
    picture(page)


def picture(page: Path) -> None:
    """A screenshot beside the page."""
    browser = next((b for b in BROWSERS if shutil.which(b)), None)
    if browser is None:
        sys.exit(f"wrote {page}; no Chromium here, so no picture of it")
    target = page.with_suffix(".png").absolute()
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,1900", "--virtual-time-budget=4000"]
    subprocess.run([browser, *flags, f"--screenshot={target}", page.absolute().as_uri()], check=True, capture_output=True, timeout=180)


if __name__ == "__main__":
    main()
