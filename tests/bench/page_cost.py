"""How large is the HTML page, and how soon is it seen? 80 layers × 200 checkpoints, opened from disk, network off.

Needs Chromium and its driver, plotly and selenium. Goals: under 6 MB; first paint under 2 s.

python tests/bench/page_cost.py [--write]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from results import ROOT, parser, publish, run_child, table
from selenium import webdriver

SIZES = ((6, 8), (80, 200))
LARGEST, SOONEST = 6e6, 2.0  # bytes, seconds
RENDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from long_series import series
from peelcli.report import render
results = series(int(sys.argv[2]), int(sys.argv[3]))
began = time.perf_counter()
text = render(results, "html")
seconds = time.perf_counter() - began
open(sys.argv[4], "w", encoding="ascii").write(text)
print(seconds, len(text))
"""
TIMES = """
const paint = performance.getEntriesByType("paint").find((entry) => entry.name === "first-contentful-paint");
return [paint.startTime / 1000, performance.now() / 1000];
"""
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1200,1000"),
)


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A browser of its own that reaches nothing but the disk."""
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        service = webdriver.ChromeService(executable_path="/usr/bin/chromedriver")
        driver = webdriver.Chrome(options=options, service=service)
        off = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        driver.execute_cdp_cmd("Network.enable", {})
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", off)
        try:
            yield driver
        finally:
            driver.quit()


def opened(path: Path) -> tuple[float, float]:
    """Seconds from opening a page in a fresh browser to its first paint, and to the last of its charts."""
    with chromium() as driver:
        driver.get(path.as_uri())
        while driver.execute_script("return document.documentElement.dataset.ready") is None:
            time.sleep(0.02)
        assert driver.execute_script("return document.documentElement.dataset.ready") == "yes"
        painted, drawn = driver.execute_script(TIMES)
        return painted, drawn


def main() -> None:
    """Measure, print, and keep the figures where asked."""
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=5)
    args = options.parse_args()
    rows, met = [], True
    with tempfile.TemporaryDirectory() as folder:
        for layers, runs in SIZES:
            path = Path(folder) / f"{layers}x{runs}.html"
            arguments = [str(ROOT / "tests" / "report"), str(layers), str(runs), str(path)]
            seconds, size = map(float, run_child(["-c", RENDER, *arguments], threads=1).stdout.split())
            painted, drawn = zip(*(opened(path) for _ in range(args.repeats)), strict=True)
            met = met and size < LARGEST and max(painted) < SOONEST
            shown = (
                f"{statistics.median(painted):.2f} ({max(painted):.2f})",
                f"{statistics.median(drawn):.2f}",
            )
            rows.append((f"{layers} × {runs}", f"{size / 1e6:.2f}", f"{seconds:.1f}", *shown))
    header = (
        "layers × checkpoints",
        "size, MB",
        "render, s",
        "first paint, s: median (worst)",
        "all drawn, s",
    )
    text = table(header, rows)
    text += f"\n\nA fresh headless Chromium each time, {args.repeats} times, network off.\n\n"
    goal = f"under {LARGEST / 1e6:.0f} MB, every first paint under {SOONEST:.0f} s"
    text += f"Goal ({goal}): {'met' if met else 'MISSED'}."
    publish("page_cost", text, write=args.write)


if __name__ == "__main__":
    main()
