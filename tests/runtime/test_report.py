"""The page: everything in it, nothing from outside, nothing that text from a data set could break."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from fakes import Engine, Processor, manifest
from PIL import Image

from foveate.runtime import agreement
from foveate.runtime.datasets import Item, Turn
from foveate.runtime.errors import RunError
from foveate.runtime.evaluate import Settings, evaluate
from foveate.runtime.gate import Rule, judge
from foveate.runtime.latency import compare
from foveate.runtime.report import Comparison, render
from foveate.runtime.results import pairs
from foveate.runtime.session import Session

COST = {
    "recipe": "x",
    **{
        k: {
            "tokens": {"0": 20, "1": 20, "2": n},
            "vision_flops": 1e9,
            "prefill_flops": 1e9 * n,
            "decode_flops": 1e6,
            "kv_bytes": 1e6 * n,
            "decode_bytes": 1e6,
        }
        for k, n in (("before", 20), ("after", 8))
    },
}
HISTORY = [{"name": "drop-toy", "parameters": {"layer": 2}, "changed": True, "ms": 3.0, "nodes": [7, 11]}]
NASTY = "</script><script>alert('x')</script> & <b>\u2028"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    items = []
    for i in range(24):
        Image.new("RGB", (12, 8), (10 * (i % 3), 0, 0)).save(folder / f"{i}.png")
        items.append(
            Item(
                f"i{i}",
                (folder / f"{i}.png",),
                (Turn(NASTY if i == 1 else "what is this ?", ("this and ? w10",)),),
                ("read", "where")[i % 2],
            )
        )
    base, cand = (
        Session(
            Engine(kept=kept, keep=keep),
            Processor(),
            {**manifest(features_per_image=keep), "cost": COST, "history": HISTORY, "versions": {"foveate": "0"}},
        )
        for kept, keep in ((False, None), (True, 2))
    )
    runs = [evaluate(s, items, folder / f"{k}.jsonl", Settings(8, logits=True)) for k, s in enumerate((base, cand))]
    timed = compare(cand, base, images=items[0].pictures(), prompt="<image> what ?", repeat=6, warmup=1, batches=(1, 2), new_tokens=3)
    return Comparison(
        "cand",
        "base",
        judge(pairs(*runs), Rule()),
        runs[1],
        runs[0],
        agreement.compare(*runs),
        timed,
        cand.manifest,
        base.manifest,
        tuple(items),
        cand,
    )


def data(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_everything_is_there(comparison):
    page = render([comparison])
    for text in (
        "cand",
        "against base",
        comparison.verdict.status.value,
        "overall",
        "Tokens per layer",
        "drop-toy",
        "prefill GFLOPs",
        "2.50x",
        "foveate 0",
        "first-token KL",
        "peak memory",
        "×2",
    ):
        assert text in page, text
    assert len(page.encode()) < 3_000_000


def test_nothing_comes_from_outside(comparison):
    page = render([comparison])
    assert (
        not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:)", page)
        and "http" not in re.sub(r"http://www.w3.org\S*", "", page)
        and "@import" not in page
    )


def test_items_with_pictures_and_kept_tokens(comparison):
    (items,) = data(render([comparison]))["items"]
    lost = [i for i in items if i["scores"][1] < i["scores"][0]]
    assert lost == items[: len(lost)] and len(lost) == comparison.verdict.overall.losses > 0
    picture = items[0]["pictures"][0]
    assert picture["src"].startswith("data:image/png;base64,") and picture["grid"] == [2, 3]
    assert picture["sites"]["vision"] == [4, 5]


def test_text_of_the_data_cannot_break_out(comparison):
    page = render([comparison])
    assert page.count("<script") == 2 and "alert('x')</script>" not in page
    assert any(NASTY in i["questions"] for i in data(page)["items"][0])


def test_saved_results_alone_make_a_page(comparison):
    c = comparison
    page = render([Comparison("a", "b", c.verdict, c.candidate, c.baseline)])
    assert "Tokens per layer" not in page and "Latency" not in page and data(page)["items"][0][0]["pictures"] == []


def test_several_candidates_are_plotted(comparison):
    page = render([comparison, comparison])
    assert page.count("<circle") == 3 and "time of a whole request" in page
    with pytest.raises(RunError, match="nothing to report"):
        render([])


def test_a_long_comparison_stays_small(comparison, monkeypatch):
    from foveate.runtime import report

    monkeypatch.setattr(report, "BUDGET", 300)
    (items,) = data(render([comparison]))["items"]
    assert items and sum(bool(i["pictures"]) for i in items) < len(items)


def test_agreement_figures(comparison):
    a = comparison.agreement
    same = [comparison.candidate.results[i].answers == r.answers for i, r in comparison.baseline.results.items()]
    assert a.items == 24 and a.same_answers == pytest.approx(np.mean(same)) and 0 < a.same_first_token < 1 and a.first_token_kl > 0
    assert agreement.compare(comparison.baseline, comparison.baseline).first_token_kl == 0


def test_divergence_is_exact_when_the_vocabulary_was_saved_whole():
    from foveate.runtime.evaluate import log_softmax, top

    p, q = (log_softmax(np.random.default_rng(k).normal(size=16)) for k in (0, 1))
    assert agreement.divergence(top(p), top(q)) == pytest.approx(float((np.exp(p) * (p - q)).sum()), rel=1e-4)  # six digits were saved


def test_likelihood_gap():
    s = [Session(Engine(), Processor(), manifest()) for _ in range(2)]
    item = Item("x", (Image.new("RGB", (8, 8), (10, 0, 0)).tobytes(),), (Turn("what ?"),))
    object.__setattr__(item, "images", ())
    gap, per_item = agreement.likelihood_gap(*s, [item], 6)
    assert gap == 0 and per_item == [0.0]


# -- in a real browser

BROWSER = next((b for b in ("chromium", "chromium-browser", "google-chrome", "chrome") if shutil.which(b)), None)
# Runs in the page after its own script: walks the browser through its controls and writes what happened where --dump-dom shows it.
PROBE = """<script>
window.foveateErrors = [];
window.addEventListener("error", e => window.foveateErrors.push(e.message));
window.addEventListener("securitypolicyviolation", e => window.foveateErrors.push("csp " + e.blockedURI));
</script>"""
WALK = """<script>
window.addEventListener("load", () => setTimeout(() => {
  const text = () => document.getElementById("item0").innerText, place = () => document.getElementById("place0").textContent, out = {};
  out.first = text(); out.place = place();
  out.kept = [...document.querySelectorAll("#item0 canvas")].map(c => c.dataset.ready).join();
  document.querySelector('[data-move="1"]').click(); out.second = place();
  const which = document.querySelector('[data-which="0"]'); which.value = "gained";
  which.dispatchEvent(new Event("change", { bubbles: true })); out.gained = place();
  out.scroll = document.documentElement.scrollWidth <= window.innerWidth + 1;
  out.errors = window.foveateErrors;
  const pre = document.createElement("pre"); pre.id = "probe"; pre.textContent = JSON.stringify(out); document.body.appendChild(pre);
}, 500));
</script>"""


def browse(folder, page, *flags):
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=5000",
        f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr",
        *flags,
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("size", ["1200,900", "500,900"])  # headless Chromium's narrowest window is 500 pixels
def test_the_page_works_and_says_nothing_on_the_console(comparison, tmp_path, size):
    page = render([comparison]).replace("<head>", "<head>" + PROBE, 1).replace("</body>", WALK + "</body>", 1)
    dom, console = browse(tmp_path, page, f"--window-size={size}", "--dump-dom")
    assert not console, console
    got = json.loads(html.unescape(re.search(r'<pre id="probe">(.*?)</pre>', dom, re.S)[1]))
    losses = comparison.verdict.overall.losses
    assert (
        got["errors"] == []
        and got["place"] == f"1 of {losses}"
        and got["second"] == f"2 of {losses}"
        and got["gained"] == f"1 of {comparison.verdict.overall.gains}"
    )
    assert "baseline" in got["first"] and "candidate" in got["first"] and got["kept"] == "2"
    assert got["scroll"], "the page is wider than the window"
