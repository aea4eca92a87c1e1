"""The verdict: what it says with and without round-to-nearest, and of a release that is not better."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Any

import pytest
from msgspec import convert, structs

from fourfold.cli.console import open_console
from fourfold.cli.tables.run import show_summary
from fourfold.records.results import Drafted, Drafts, Figures, LengthDifference, Measured, Metrics, RoundToNearest
from fourfold.release.report.about import About
from fourfold.release.report.card import card
from fourfold.release.report.page import page
from fourfold.release.report.quality import draft_head, figure_grid, verdict
from fourfold.release.report.records import Records

RTN_ENDS = (0.00312, 0.00340)


def figures(kld: float, agreement: float) -> Figures:
    rest = dict.fromkeys(Figures.__struct_fields__, 1)
    return convert(rest | {"kl_mean": kld, "top1_agreement": agreement}, Figures)


def rounded(kld: float = 0.00326, release: float = 0.00095, **more: Any) -> RoundToNearest:
    found = RoundToNearest(
        windows=8,
        summary=figures(kld, 0.951),
        intervals={"kl_mean": RTN_ENDS},
        release=figures(release, 0.977),
    )
    return structs.replace(found, **more)


def measured(rtn: RoundToNearest | None = None, **more: Any) -> Metrics:
    """On all windows a mean KLD of 0.001, on every second one what `rtn` has."""
    found = {
        "measured_by": "quantize",
        "protocol": {"text": "a text", "windows": 16},
        "summary": figures(0.001, 0.97),
        "intervals": {"kl_mean": (0.0008, 0.0012), "top1_agreement": (0.965, 0.975)},
        "layers": [],
    }
    return structs.replace(convert(found, Metrics), rtn=rtn, **more)


def test_beside_round_to_nearest() -> None:
    assert verdict(measured(rounded())) == (
        "Mean KLD 0.00095 nats (8 windows), 29% of round-to-nearest's 0.00326 (95%: 0.00312 to 0.00340); "
        "top-1 agreement 97.70%, RTN 95.10%."
    )


def test_without_round_to_nearest() -> None:
    assert verdict(measured()) == (
        "Mean KLD 0.00100 nats (95%: 0.00080 to 0.00120), "
        "top-1 agreement 97.00% (95%: 96.50% to 97.50%), on 16 windows."
    )
    alone = verdict(measured(intervals=None))
    assert alone == "Mean KLD 0.00100 nats, top-1 agreement 97.00%, on 16 windows."


def test_a_quantized_draft_head_is_paired_with_the_sources() -> None:
    rule = {"by_position": [0.7], "mean_length": 2.7, "interval": None}
    drafted = convert({"greedy": rule, "sampled": rule}, Drafted)
    other = LengthDifference(mean_length=2.5, difference=-0.005, interval=(-0.01, 0.0025))
    found = measured(drafts=Drafts(protocol={}, release=structs.replace(drafted, source_head=other)))
    assert draft_head(found) == (
        "Quantized draft head: -0.2% (95%: -0.4% to +0.1%) tokens per step against the BF16 head on the same text."
    )
    assert draft_head(measured()) == draft_head(measured(drafts=Drafts(protocol={}, release=drafted))) == ""


def test_nothing_measured() -> None:
    assert verdict(None) == verdict(measured(summary=None)) == "Not measured."


@pytest.mark.parametrize(
    ("release", "better"), [(0.00311, True), (RTN_ENDS[0], False), (0.00330, False), (0.00500, False)]
)
def test_better_is_below_the_interval(release: float, better: bool) -> None:
    said = verdict(measured(rounded(release=release)))
    ending = " Not better than RTN on this text: the release's mean KLD is not below RTN's 95% interval."
    assert said.endswith(ending) != better
    assert f"{release / 0.00326:.0%} of round-to-nearest's" in said


def test_one_window_is_compared_with_the_figure() -> None:
    one = {"intervals": None, "windows": 1}
    assert "(1 window), 29% of round-to-nearest's 0.00326; top-1" in verdict(measured(rounded(**one)))
    assert "Not better" not in verdict(measured(rounded(**one)))
    assert verdict(measured(rounded(release=0.00326, **one))).endswith("mean KLD is not below RTN's.")
    assert "Mean KLD 0.00095 nats (1 window), round-to-nearest's 0.00000;" in verdict(measured(rounded(0.0, **one)))


def test_the_table_has_a_column_for_it() -> None:
    header, rows = figure_grid(measured(rounded()))
    assert header == ("", "this release", "RTN (8 windows)")
    assert ("mean KLD (nats)", "0.00100 ± 0.00020", "0.00326 ± 0.00014") in rows
    other = convert({"summary": figures(0.5, 0.5), "layers": []}, Measured)
    header, rows = figure_grid(measured(), [("other", other), ("third", None)])
    assert header == ("", "this release", "other", "third")
    assert ("top-1 agreement", "97.00% ± 0.50%", "50.00%", "not measured") in rows


def test_card_page_and_terminal_say_the_same(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = Records.open(release)
    said = verdict(records.metrics)
    assert re.search(r"\(1 window\), \d+% of round-to-nearest's", said)
    about = About(name="x")
    written, shown = card(records, about, (), {}), page(records, about)
    assert said in written.partition("## Quality")[2].partition("|")[0]
    assert said.replace("'", "&#39;") in shown.partition("<main>")[0]
    assert "RTN (1 window)" in written and "RTN (1 window)" in shown
    summary = types.SimpleNamespace(
        out=str(release), partial=False, projections=1, methods={}, tokens_per_input={}, bytes_before=0, bytes_after=0,
        metrics={}, seconds={}, peak_memory_bytes={}, planned_memory_bytes={}, workers=(), notes=(),
    )  # fmt: skip
    show_summary(open_console(), summary, "model")  # type: ignore[arg-type]
    assert capsys.readouterr().out.splitlines()[-2:-1] == [said]
