"""report.html: what is in the file; and in a real browser, what a reader can do with it."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vl_convert
from msgspec import structs

from command_line import invoke
from fourfold.records.results import Rival
from fourfold.release.report import plots as plots_module
from fourfold.release.report.about import About
from fourfold.release.report.card import card
from fourfold.release.report.charts import RATIO, charts
from fourfold.release.report.page import page
from fourfold.release.report.plots import plots
from fourfold.release.report.records import Records
from hostile import HOSTILE, Change

ABOUT = About(name="me/small-int4")
# Of what a reader does, the least of so many turns: 10 to 60 ms each, so that a busy machine passes.
LIMIT_MS, TURNS = 200, 5
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Waits until what an action caused is on the screen; its milliseconds.
TIMED = """async () => {
  const begin = performance.now();
  ACTION;
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  return performance.now() - begin;
}"""


class Page(HTMLParser):
    """Elements with their attributes, and the text of each script by its type."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.elements and self.lasttag == "script" and self.scripts:
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)

    @property
    def data(self) -> Any:
        return json.loads(next(text for attributes, text in self.scripts if attributes.get("id") == "data"))


def many(records: Records, layers: int = 40, experts: int = 256) -> Records:
    """With as many projections as Qwen3.6-35B-A3B has: 30,720."""
    draw = random.Random(0)
    found = [
        dataclasses.replace(
            records.projections[0],
            layer=layer,
            expert=expert,
            projection=projection,
            weight_error=draw.uniform(0.1, 0.2),
            relative_error=draw.lognormvariate(-6, 0.7),
            error_over_rtn=draw.uniform(0.1, 0.9),
            gptqmodel_loss=draw.lognormvariate(-9, 1),
            tokens=int(draw.lognormvariate(7, 1)),
            effective_tokens=float(draw.randrange(1000)),
            damping=0.05,
            passes=2,
        )
        for layer in range(layers)
        for expert in range(experts)
        for projection in ("down_proj", "gate_proj", "up_proj")
    ]
    decoder = SimpleNamespace(layers=range(layers), config=records.text)
    blueprint = dataclasses.replace(records.blueprint, decoder=decoder)
    return dataclasses.replace(records, projections=tuple(found), blueprint=blueprint)


def test_quiet(release: Path) -> None:
    answered = invoke("report", str(release), "--quiet")
    assert (answered.exit_code, answered.output) == (0, "")
    assert (release / "README.md").exists() and (release / "report.html").exists()


def test_it_is_one_file_that_asks_no_one(finished: Path) -> None:
    text = page(Records.open(finished), ABOUT)
    found = Page(text)
    assert not [tag for tag, _ in found.elements if tag in ("link", "iframe", "img", "object", "base")]
    assert not [attributes for tag, attributes in found.elements if tag == "script" and "src" in attributes]
    policy = next(a["content"] for t, a in found.elements if t == "meta" and a.get("http-equiv"))
    assert policy and policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy and "http" not in policy
    assert len(text) < 2_000_000


def test_every_projection_is_in_it(finished: Path) -> None:
    records = Records.open(finished)
    rows = Page(page(records, ABOUT)).data["rows"]
    for place, row in enumerate(records.projections):
        assert (rows["layer"][place], rows["expert"][place]) == (row.layer, row.expert)
        assert rows["projections"][rows["projection"][place]] == row.projection
        assert rows["methods"][rows["method"][place]] == row.method
        assert rows["relative_error"][place] == row.relative_error
    assert len(rows["layer"]) == 24


def test_each_chart_is_a_specification_that_vega_lite_takes(finished: Path) -> None:
    records = Records.open(finished)
    charts = Page(page(records, ABOUT, records)).data["charts"]
    assert set(charts) == {
        "errors", "coverage", "drift", "routers", "divergence", "distribution", "entropy", "seconds", "memory",
    }  # fmt: skip
    for id, spec in charts.items():
        assert spec["description"] and spec["usermeta"]["title"] and spec["data"]["values"]
        vega = vl_convert.vegalite_to_vega(spec)
        assert vega["marks"] and len(vega["legends"]) == 1 + (id == "errors"), (
            f"{spec['usermeta']['title']}: whose line is whose?"
        )


def test_it_begins_with_quality_and_weak_spots(release: Path, change: Change) -> None:
    """Drafts and tasks follow, where they were measured; charts and the table of all projections come last."""
    rule = {"by_position": [0.75, 0.5], "mean_length": 2.25, "interval": [2.1, 2.4]}
    drafts = {"protocol": {}, "release": {"greedy": rule, "sampled": rule}}
    tasks = {"lm_eval": "0.4.12", "tasks": {"arc": {"figures": {"acc,none": 0.5, "acc_stderr,none": 0.01}}}}
    titles = ["Weak spots", "Experts by layer", "Charts", "Projections", "Verified", "Not measured"]
    assert re.findall("<h2 id=.*?>(.*?)</h2>", page(Records.open(release), ABOUT)) == ["Quality", *titles]
    change("metrics.json", lambda metrics: metrics.update(drafts=drafts, tasks=tasks))
    records = Records.open(release)
    text = page(records, ABOUT)
    assert re.findall("<h2 id=.*?>(.*?)</h2>", text) == ["Quality", titles[0], "Drafts", "Tasks", *titles[1:]]
    for cells in (["greedy", "75.0% / 50.0%", "2.250", "2.100 to 2.400"], ["arc", "acc,none", "0.5000 ± 0.0100"]):
        assert "".join(f"<td>{cell}</td>" for cell in cells) in text
    spots = text.partition("Weak spots")[2].partition("<h2")[0]
    worst = max(records.projections, key=lambda row: row.error_over_rtn)
    cells = f"<td>{worst.layer}</td><td>{worst.expert}</td><td>{worst.projection}</td>"
    assert spots.index(cells) == spots.index("<td>"), "the worst projection is the first"
    assert "0 of 8 experts received no calibration token" in spots
    assert records.metrics is not None
    drifts = [f"<td>{row.hidden_error:.4f}</td>" for row in records.metrics.layers]
    assert drifts == sorted(drifts) and spots.index(drifts[1]) < spots.index(drifts[0]), "the largest drift first"


def guide(release: Path, change: Change) -> Records:
    layers = [{"layer": layer, "predicted": 0.7, "measured": {"gate_up": 0.72, "down": 0.66}} for layer in range(2)]
    change("fourfold.json", lambda state: state.update(guidance={"tokens": 512, "layers": layers}))
    return Records.open(release)


@pytest.mark.slow
def test_guidance_has_a_chart(release: Path, change: Change) -> None:
    spec = Page(page(guide(release, change), ABOUT)).data["charts"]["guidance"]
    assert vl_convert.vegalite_to_vega(spec)["marks"]
    assert {(value["layer"], value["series"], value["share"]) for value in spec["data"]["values"]} == {
        (layer, *row) for layer in (0, 1) for row in (("down, predicted", 0.7), ("down", 0.66), ("gate_up", 0.72))
    }


def test_a_second_release_is_shown_beside(finished: Path) -> None:
    records = Records.open(finished)
    halves = tuple(dataclasses.replace(row, relative_error=row.relative_error / 2) for row in records.projections[:-1])
    data = Page(page(records, ABOUT, dataclasses.replace(records, projections=halves))).data
    assert data["rows"]["ratio"] == [*[pytest.approx(2, rel=1e-5)] * 23, None], "no row of its own, no ratio"
    assert RATIO[0] in data["maps"]
    assert len({value["release"] for value in data["charts"]["drift"]["data"]["values"]}) == 2


def test_a_ratio_below_one_has_its_interval(release: Path, change: Change) -> None:
    """On the card too."""

    def below(metrics: Any) -> None:
        metrics["summary"]["perplexity_ratio"] = 0.99941
        metrics["intervals"]["perplexity_ratio"] = [0.99731, 1.00151]

    def both() -> tuple[str, str]:
        records = Records.open(release)
        return page(records, ABOUT), card(records, ABOUT, (), {})

    change("metrics.json", below)
    shown, written = both()
    assert shown.count("0.99941 ± 0.00210") == shown.count("0.99941") == 1
    assert "| 0.99941 ± 0.00210 |" in written and written.count("0.99941") == 1
    change("metrics.json", lambda metrics: metrics.update(intervals=None))
    for text in both():
        assert "0.99941" not in text and "one window gives no interval" in text and "top-1 agreement" in text


def test_without_metrics_there_is_no_chart_of_them(finished: Path) -> None:
    records = dataclasses.replace(Records.open(finished), metrics=None)
    text = page(records, ABOUT)
    assert set(Page(text).data["charts"]) == {"errors", "coverage", "seconds", "memory"}
    assert '<p class="verdict">Not measured.</p>' in text and "top-1" not in text


@pytest.mark.slow
def test_nothing_can_be_smuggled_into_a_page(release: Path, change: Change) -> None:
    change("verify.json", lambda verdict: verdict["checks"][0].update(name=HOSTILE, evidence=HOSTILE))
    records = Records.open(release)
    row = dataclasses.replace(records.projections[0], projection=HOSTILE, method=HOSTILE)
    hostile = dataclasses.replace(records, projections=(row, *records.projections[1:]))
    plain, found = Page(page(records, ABOUT)), Page(page(hostile, About(name=HOSTILE)))
    assert [tag for tag, _ in found.elements if tag in ("script", "img")] == ["script"] * 3
    assert {tag for tag, _ in found.elements} == {tag for tag, _ in plain.elements}
    assert HOSTILE in found.data["rows"]["projections"]


@pytest.mark.slow
def test_the_same_inputs_give_the_same_page_and_plots(finished: Path) -> None:
    records = Records.open(finished)
    assert page(records, ABOUT) == page(records, ABOUT)
    first, second = list(plots(records)), list(plots(records))
    assert first == second
    assert [name for name, _, _ in first] == ["drift.png", "errors.png", "experts.png"]
    assert all(content.startswith(b"\x89PNG") for _, _, content in first)


def test_a_map_has_whole_pixels_for_each_expert_and_marks_within_its_range(finished: Path) -> None:
    """Of 256 experts 2 device pixels each, of 384 as well; a legend of decades where there are many."""
    records = Records.open(finished)
    for experts in (16, 256, 384):
        found = plots_module._map(many(records, 4, experts), "error", "output error")
        assert found["width"] % experts == 0 and found["width"] >= experts
        values = [cell["error"] for cell in found["data"]["values"]]
        assert len(values) == 4 * experts
        marks = found["encoding"]["color"]["legend"]["values"]
        assert marks and min(values) <= min(marks) and max(marks) <= max(values)
    assert plots_module._marks(90, 210_000) == [100, 1000, 10_000, 100_000]
    assert plots_module._marks(0.9, 6) == [1, 2, 5]


def test_a_plot_of_nothing_is_not_drawn(finished: Path) -> None:
    records = Records.open(finished)
    names = [name for name, _, _ in plots(dataclasses.replace(records, metrics=None))]
    assert names == ["errors.png", "experts.png"]
    assert records.metrics is not None
    peer = Rival(name="peer", format="AWQ", size_bytes=2 * 10**9, kl_mean=0.02)
    records = dataclasses.replace(records, metrics=structs.replace(records.metrics, rivals=[peer]))
    assert [name for name, _, _ in plots(records)] == ["drift.png", "rivals.png", "errors.png", "experts.png"]
    ours, theirs = charts(records, None)["rivals"]["data"]["values"]
    assert ours["release"] == "this release (compressed-tensors)"
    assert theirs == {"release": "peer (AWQ)", "GB": 2.0, "nats": 0.02}


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """For this module alone: as long as Playwright is on, its event loop runs in the main thread, and no other can."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} on PATH, so report.html was not opened in one")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser was driven")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="session")
def big(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = Records.open(finished)
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(many(records), ABOUT, many(records)), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser: Any, big: Path) -> Iterator[Any]:
    """The page, drawn. Whatever it complains of, or asks of others, fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield from _open(context, big)


def _open(context: Any, path: Path) -> Iterator[Any]:
    said: list[str] = []
    shown = context.new_page()
    shown.on("console", lambda message: said.append(message.text))
    shown.on("pageerror", lambda error: said.append(str(error)))
    shown.on("request", lambda request: said.append(request.url))
    shown.goto(path.as_uri())
    shown.wait_for_selector("html[data-ready=yes]", timeout=60_000)
    yield shown
    context.close()
    assert said == [path.as_uri()]


def middle(opened: Any) -> dict[str, float]:
    """In the map, within the cell of layer 13 of 40 and expert 128 of 256."""
    box = opened.locator("#cells").bounding_box()
    return {"x": box["width"] * 0.501, "y": box["height"] / 3}


@pytest.mark.browser
@pytest.mark.slow
def test_a_click_on_the_map_shows_the_experts_rows(opened: Any) -> None:
    for width in (1280, 700):
        opened.set_viewport_size({"width": width, "height": 900})
        opened.click("#clear")
        for _ in range(100):  # the map follows the window when Vega has seen it
            if opened.locator("#cells").bounding_box()["width"] < width:
                break
            opened.wait_for_timeout(50)
        else:
            pytest.fail(f"the map is wider than {width}")
        opened.click("#cells", position=middle(opened))
        assert opened.inner_text("#found") == "3 rows"
        cells = opened.locator("#space .row").all_inner_texts()
        assert [row.split("\n")[:3] for row in cells] == [
            ["13", "128", name] for name in ("down_proj", "gate_proj", "up_proj")
        ]


@pytest.mark.browser
@pytest.mark.slow
def test_a_cell_has_its_colour_and_says_what_it_is(opened: Any, big: Path) -> None:
    opened.select_option("#map-field", "loss")
    opened.wait_for_selector("#map[data-drawn='loss 0']")
    opened.hover("#cells", position=middle(opened))
    said = [line.split() for line in opened.locator("#vg-tooltip-element tr").all_inner_texts()]
    assert said[:4] == [["layer", "13"], ["expert", "128"], ["projection", "down_proj"], ["method", "gptq"]]
    rows = Page(big.read_text(encoding="utf-8")).data["rows"]
    down = [place for place, projection in enumerate(rows["projection"]) if projection == 0]
    read = "document.getElementById('cells').getContext('2d').getImageData(0, 0, 256, 40).data"
    shown = opened.evaluate(f"Array.from({read})")
    for end, colour in ((min, [68, 1, 84, 255]), (max, [253, 231, 37, 255])):  # of viridis
        place = end(down, key=lambda place: rows["loss"][place])
        pixel = rows["layer"][place] * 256 + rows["expert"][place]
        assert shown[4 * pixel : 4 * pixel + 4] == colour


@pytest.mark.browser
@pytest.mark.slow
def test_the_map_goes_by_keyboard(opened: Any) -> None:
    opened.focus("#map")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown"):
        opened.keyboard.press(key)
    assert opened.inner_text("#map-said").startswith("Layer 1, expert 2: calibration tokens ")
    opened.keyboard.press("Enter")
    assert opened.input_value("#search") == "layer 1 expert 2"
    assert opened.inner_text("#found") == "3 rows"


@pytest.mark.browser
@pytest.mark.slow
def test_search_and_sort(opened: Any, big: Path) -> None:
    rows = Page(big.read_text(encoding="utf-8")).data["rows"]
    worst = max(range(len(rows["layer"])), key=lambda place: rows["error_over_rtn"][place])
    cells = opened.locator("#space .row").first.locator("span").all_inner_texts()
    assert cells[:2] == [str(rows["layer"][worst]), str(rows["expert"][worst])], "the worst is first"
    assert opened.get_attribute("#head [data-column=error_over_rtn]", "aria-sort") == "descending"
    opened.fill("#search", "layer 3 up_proj")
    assert opened.inner_text("#found") == "256 rows"
    opened.click("#head button:has-text('relative error')")
    found = opened.locator("#space .row span:nth-child(5)").all_inner_texts()
    assert [float(value) for value in found] == sorted(float(value) for value in found)
    opened.click("#head button:has-text('relative error')")
    assert float(opened.locator("#space .row span:nth-child(5)").first.inner_text()) > float(found[-1])
    opened.click("#clear")
    assert opened.inner_text("#found") == "30,720 rows"
    assert opened.locator("#space .row").count() < 60, "only rows in sight are elements"


def mouse(*kinds: str) -> str:
    """Events over one cell of the map, another in each turn."""
    return f"""const cells = document.getElementById('cells'), box = cells.getBoundingClientRect();
    const at = {{ clientX: box.x + box.width * Math.random(), clientY: box.y + box.height / 2, bubbles: true }};
    for (const kind of {list(kinds)}) cells.dispatchEvent(new MouseEvent(kind, at))"""


@pytest.mark.browser
@pytest.mark.parametrize(
    "action",
    [
        "const s = document.getElementById('search'); s.value = 'up'; s.dispatchEvent(new Event('input'))",
        "document.getElementById('clear').click()",
        "document.querySelectorAll('#head button')[4].click()",
        "const t = document.getElementById('table'); t.scrollTop = 400000 - t.scrollTop",
        mouse("mousemove"),
        mouse("mousemove", "click"),
        "document.getElementById('map').dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight' }))",
        "const m = document.getElementById('map'), s = document.getElementById('map-field');"
        "s.value = s.value === 'loss' ? 'relative_error' : 'loss'; const want = s.value + ' 0';"
        "s.dispatchEvent(new Event('change'));"
        "while (m.dataset.drawn !== want) await new Promise((done) => setTimeout(done, 1))",
    ],
    ids=["search", "show all", "sort", "scroll", "hover", "click", "keyboard", "map"],
)
@pytest.mark.slow
def test_30720_rows_are_quick(opened: Any, action: str) -> None:
    taken = [opened.evaluate(TIMED.replace("ACTION", action)) for _ in range(TURNS)]
    assert min(taken) < LIMIT_MS, taken


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.slow
def test_a_phone_shows_it_without_scrolling_sideways(browser: Any, big: Path, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    for shown in _open(context, big):
        assert shown.evaluate("document.documentElement.scrollWidth") == 390
        back = shown.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (back == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.browser
@pytest.mark.slow
def test_hostile_names_are_text_in_a_browser(browser: Any, finished: Path, tmp_path: Path) -> None:
    records = Records.open(finished)
    row = dataclasses.replace(records.projections[0], projection=HOSTILE, method=HOSTILE, error_over_rtn=9.0)
    path = tmp_path / "report.html"
    path.write_text(page(dataclasses.replace(records, projections=(row, *records.projections[1:])), ABOUT), "utf-8")
    for shown in _open(browser.new_context(), path):
        assert shown.locator("img").count() == 0
        assert HOSTILE.split("\n")[0] in shown.locator("#space .row").first.inner_text()
