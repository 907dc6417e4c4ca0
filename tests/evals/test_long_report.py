"""The report: what it says, and how it fits into a browser, wide and narrow, light and dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from reports import LENGTHS, TASKS, make_run

from rwkvx_evals.compare.pairs import Run, compare
from rwkvx_evals.compare.report import write_comparison
from rwkvx_evals.long.report import write_report
from rwkvx_evals.long.report.charts import round_ticks, score_curve
from rwkvx_evals.long.report.page import render_page

COLOURS = ("background", "text")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    results, rows = make_run(1, "a-model-with-a-name-that-is-rather-long-0.2B-64k-Base")
    write_report(results, rows, out)
    return out


class Tags(HTMLParser):
    """Every attribute that loads or leads somewhere; the tags that are open."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.ids: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action"):
                self.targets.append(value or "")
            if name == "id":
                self.ids.add(value or "")
        if tag not in ("meta", "link", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_alone_and_well_formed(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    outside = [t for t in tags.targets if not t.startswith("#")]
    assert outside == ["data:,"]
    assert not re.search(r"https?://|@import|url\(", text)
    assert {t[1:] for t in tags.targets if t.startswith("#")} <= tags.ids


def test_every_wrong_answer_is_there(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    results, rows = make_run(1, "a-model-with-a-name-that-is-rather-long-0.2B-64k-Base")
    wrong = [row for row in rows if row["status"] != "ok" or row["score"] < 1]
    assert len(wrong) > 100
    for row in rows:
        assert (f"<dd>{row['id']} " in text) is (row in wrong)
    assert "<b>&amp;</b>" not in text
    assert html.escape("<b>&amp;</b>") in text
    markdown = (folder / "report.md").read_text()
    assert f"Wrong or failed: {len(wrong)}" in markdown
    for name in TASKS:
        assert f"| {name} | 1,024 | 20 | 20 | 0 |" in markdown


def test_all_right_is_no_proof_of_certainty(folder: Path) -> None:
    markdown = (folder / "report.md").read_text()
    assert "100.0 % (84–100)" in markdown
    assert "100.0 % | 0.0 % |" not in markdown
    assert (folder / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_of_the_loss_alone_and_one_without(tmp_path: Path) -> None:
    results, _ = make_run(1, "m")
    write_report(results | {"tasks": {}}, [], tmp_path / "loss")
    assert not (tmp_path / "loss" / "scores.png").exists()
    results, rows = make_run(1, "m", tasks=TASKS[:1])
    results.pop("loss_by_position")
    write_report(results, rows, tmp_path / "task")
    assert "Loss by position" not in (tmp_path / "task" / "report.html").read_text()


def test_a_curve_leaves_out_what_has_no_score() -> None:
    entry = {"score": 0.5, "low": 0.2, "high": 0.8}
    none = dict.fromkeys(entry)
    chart = score_curve([(1024, entry), (2048, none), (4096, entry)], "<name>")
    assert chart.count("<circle") == 2
    assert "&lt;name&gt;" in chart
    assert "<circle" not in score_curve([(1024, none)], "x")


@pytest.mark.parametrize(("low", "high"), [(2.21, 3.28), (0.0, 0.0), (5.0, 5.004), (1e-3, 900.0)])
def test_ticks_enclose(low: float, high: float) -> None:
    ticks = round_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 9


MEASURE = """
<!doctype html><html><body style="margin:0">
<iframe id="f" style="width:%(width)dpx;height:900px;border:0" srcdoc="%(page)s"></iframe>
<pre id="found"></pre>
<script>
document.getElementById("f").onload = () => {
  const doc = document.getElementById("f").contentDocument;
  doc.querySelectorAll("details").forEach(d => d.open = true);
  const width = doc.documentElement.clientWidth, wide = [];
  doc.querySelectorAll("body *").forEach(e => {
    if (e.closest(".scroll") && !e.matches(".scroll")) return;
    if (e.closest("svg") && !e.matches("svg")) return;
    const r = e.getBoundingClientRect();
    if (r.right > width + 1 || r.left < -1) wide.push(e.tagName + "." + e.className);
    if (!e.matches(".scroll, pre") && e.scrollWidth > e.clientWidth + 1 && e.clientWidth)
      wide.push("inside " + e.tagName + "." + e.className);
  });
  const colour = e => getComputedStyle(e);
  document.getElementById("found").textContent = JSON.stringify({
    width, page: doc.documentElement.scrollWidth, wide: wide.slice(0, 9),
    background: colour(doc.body).backgroundColor, text: colour(doc.body).color,
    foldable: doc.querySelectorAll("details > summary").length,
  });
};
</script></body></html>
"""


def browse(page: Path, profile: Path, *more: str) -> str:
    """What the browser prints."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-sync", f"--user-data-dir={profile}",
        "--window-size=1300,900", *more, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120)
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_overflows_in_a_browser(folder: Path, tmp_path: Path, dark: bool) -> None:
    results, rows = make_run(2, "another-model", tasks=TASKS[:2], samples=3)
    few = tmp_path / "few.html"
    few.write_text(render_page(results, rows))
    runs = [Run(folder, name, results, {r["id"]: r for r in rows}, {}) for name in ("a", "b")]
    write_comparison(runs, [compare(*runs)], tmp_path)
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    for number, page in enumerate((folder / "report.html", few, tmp_path / "compare.html")):
        for width in (360, 1200):
            wrapper = tmp_path / f"wrapper-{number}-{width}.html"
            content = html.escape(page.read_text(), quote=True)
            wrapper.write_text(MEASURE % {"width": width, "page": content})
            printed = browse(wrapper, tmp_path / "profile", scheme, "--dump-dom")
            found: dict[str, Any] = json.loads(
                html.unescape(re.search(r'<pre id="found">(.*?)</pre>', printed, re.S)[1])  # type: ignore[index]
            )
            assert found["width"] <= width
            assert found["page"] <= found["width"], found
            assert found["wide"] == [], found
            assert found["foldable"] > 1 or number == 2
            back, text = (sum(map(int, re.findall(r"\d+", found[part])[:3])) for part in COLOURS)
            assert (back < text) is dark


def test_lengths_are_labelled(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    for length in LENGTHS:
        assert f'id="ruler_vt-{length}"' in text
