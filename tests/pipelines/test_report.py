"""The report: one file that stands alone, says what the numbers say, and opens in a browser."""

import base64
import io
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from pipelines.metrics import MetricRow
from pipelines.report import (
    ReportContent,
    figure_files,
    headline,
    percent,
    points,
    significant,
    write_report,
)
from pipelines.results import Results, Setting
from pipelines.routing_examples import RoutingExamples

BUDGETS = (0.2, 0.5, 1.0)
HOSTILE = '<script>alert("$x^{2$")</script> & "quoted\''
CHROMIUM = shutil.which("chromium")


def setting(budget, accuracy, macs=None):
    milliseconds = 4 + 36 * budget
    return Setting(
        effective_capacity=budget,
        realised_effective_capacity=budget - 0.004,
        accuracy=accuracy,
        loss=0.25,
        samples=400,
        macs=macs or int(4e7 * budget),
        latency_ms=milliseconds,
        latency_batch=8,
        images_per_second=8000 / milliseconds,
    )


def results(name, accuracies, budgets=BUDGETS):
    settings = tuple(setting(b, a) for b, a in zip(budgets, accuracies, strict=True))
    return Results(
        name=name,
        step=200,
        num_classes=10,
        settings=settings,
        machine="x86_64, 2 cores, cpu",
        torch="2.13.0",
        commit="abc123",
    )


def metric_rows():
    rows = [MetricRow(step=s, values={"loss": 2.3 * 0.99**s}) for s in range(10, 201, 10)]
    evaluated = [
        MetricRow(
            step=s,
            values={f"val_accuracy/ec_{b:.2f}": b * s / 200 for b in BUDGETS}
            | {f"val_loss/ec_{b:.2f}": 2 - b for b in BUDGETS},
        )
        for s in (100, 200)
    ]
    return (*rows, *evaluated)


def routing(images=2, size=32, names=("cat", "dog")):
    random = np.random.default_rng(0)
    return RoutingExamples(
        images_uint8=random.integers(0, 255, (images, size, size, 3), dtype=np.uint8),
        labels=(names[0],) * images,
        predictions=(names,) * images,
        budgets=(0.2, 0.5),
        expert=random.integers(0, 4, (2, images, 8, 8)),
        widths=(0.125, 0.25, 0.5, 1.0),
    )


def content(**changes):
    """What a comparison gives: results alone; `WHOLE` adds what a run has."""
    results_only = ReportContent(
        title="demo/run",
        summary=(("Recipe", "digits"), ("Parameters", "460,000")),
        rows=(),
        results=(results("demo/run", (0.8, 0.91, 0.93)),),
        routing=None,
        verdict=None,
        config_yaml="model:\n  dim: 96\n",
    )
    return replace(results_only, **changes)


WHOLE = {"rows": metric_rows(), "routing": routing()}


class Page(HTMLParser):
    """What a reader of the page meets: its words, pictures, links and tags."""

    def __init__(self, path):
        super().__init__()
        self.words, self.pictures, self.tags, self.links = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        fields = dict(attributes)
        self.tags.append(tag)
        self.links += [fields[name] for name in ("src", "href", "srcset") if name in fields]
        if tag == "img":
            self.pictures.append(fields)

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).replace("\N{NO-BREAK SPACE}", " ").split())


def page_of(tmp_path, **changes):
    path = tmp_path / "report.html"
    write_report(path, content(**changes))
    return Page(path)


def decode(uri):
    """Decode a data URI as the picture that it claims to be; returns its media type."""
    kind, data = re.fullmatch(r"data:(image/[a-z+]+);base64,(.+)", uri).groups()
    raw = base64.b64decode(data, validate=True)
    if kind == "image/svg+xml":
        assert ElementTree.fromstring(raw).tag.endswith("svg")
    else:
        Image.open(io.BytesIO(raw)).load()
    return kind


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Path of a report with every section."""
    path = tmp_path_factory.mktemp("whole") / "report.html"
    write_report(path, content(**WHOLE))
    return path


def test_every_picture_is_inline_decodes_and_says_what_it_shows(whole):
    page = Page(whole)

    kinds = [decode(picture["src"]) for picture in page.pictures]
    assert sorted(kinds) == ["image/png", *["image/svg+xml"] * 4]
    assert all(len(picture["alt"]) > 20 for picture in page.pictures)


def test_the_file_refers_to_nothing_outside_itself(whole):
    page = Page(whole)

    assert all(link.startswith("data:") for link in page.links)
    assert "script" not in page.tags
    assert not re.search(r"https?://|@import|url\(", whole.read_text())


def test_names_from_outside_are_shown_and_never_become_markup(tmp_path):
    page = page_of(
        tmp_path,
        title=HOSTILE,
        summary=((HOSTILE, HOSTILE),),
        results=(results(HOSTILE, (0.8, 0.9, 0.93)), results("other", (0.7, 0.8, 0.9))),
        routing=routing(names=(HOSTILE, "dog")),
        verdict=HOSTILE,
        config_yaml=f"name: {HOSTILE}",
    )

    assert "script" not in page.tags
    # title, heading, fact (name and value), comparison, group of the table, verdict, config, ...
    assert page.text.count(HOSTILE) >= 8
    for picture in page.pictures:
        decode(picture["src"])


def test_the_table_holds_every_budget_with_its_numbers(whole):
    text = Page(whole).text

    assert "0.50 0.496 20.0 50 % 91.0 % ± 1.4 0.250 22.0 364" in text
    assert "one standard error over 400 samples" in text
    assert "a batch of 8" in text
    assert "x86_64, 2 cores, cpu, torch 2.13.0, commit abc123" in text


def test_one_evaluation_has_no_comparison(whole):
    assert "side by side" not in Page(whole).text


def test_several_evaluations_are_compared_to_the_first(tmp_path):
    champion = results("champion", (0.8, 0.91, 0.94))
    challenger = results("challenger", (0.82, 0.91, 0.93))

    text = page_of(tmp_path, results=(champion, challenger), verdict="challenger is promoted").text

    assert "champion 80.0 % 91.0 % 94.0 %" in text
    assert "challenger 82.0 % +2.0 91.0 % ±0.0 93.0 % \N{MINUS SIGN}1.0" in text
    assert "challenger is promoted" in text


def test_evaluations_without_a_common_budget_are_listed_but_not_compared(tmp_path):
    small, large = results("small", (0.8,), (0.3,)), results("large", (0.9,), (0.7,))

    text = page_of(tmp_path, results=(small, large)).text

    assert "side by side" not in text
    assert "large is best: right on 90.0 % of validation samples at effective capacity 0.7" in text
    assert "small at 0.3, is right on 80.0 % with 43 % of the arithmetic" in text


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"rows": metric_rows()[:1]}, "Training"),
        ({"results": ()}, "What each budget costs and gives"),
        ({"results": ()}, "Accuracy and time against compute"),
        ({"results": (results("empty", (), ()),)}, "What each budget costs and gives"),
        ({"routing": None}, "Where the compute goes"),
        ({"config_yaml": ""}, "Configuration"),
    ],
)
def test_what_is_missing_leaves_out_its_section(tmp_path, whole, changes, gone):
    assert gone in Page(whole).text
    assert gone not in page_of(tmp_path, **changes).text


def test_a_report_of_nothing_still_says_what_it_is_about(tmp_path):
    page = page_of(tmp_path, results=(), summary=(), config_yaml="")

    assert page.pictures == []
    assert page.text.count("demo/run") == 2  # the tab and the heading


def test_values_that_are_not_finite_are_counted(tmp_path):
    broken = MetricRow(step=210, values={"loss": float("nan"), "grad_norm": float("inf")})

    assert "2 logged values are not finite" in page_of(tmp_path, rows=(*metric_rows(), broken)).text


def test_a_second_report_replaces_the_first_and_leaves_no_other_file(tmp_path):
    page_of(tmp_path)
    page = page_of(tmp_path, title="second")

    assert "second" in page.text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_figures_come_by_name_for_the_tracker():
    files = figure_files(content(**WHOLE))

    assert list(files) == [
        "accuracy-by-compute.svg",
        "latency-by-compute.svg",
        "loss.svg",
        "accuracy.svg",
        "routing.png",
    ]
    assert figure_files(content(results=())) == {}


def test_eight_photographs_at_four_budgets_stay_below_three_megabytes(tmp_path):
    y, x = np.mgrid[:224, :224]
    waves = 127 + 60 * np.sin(x / 9) + 60 * np.cos(y / 7)
    grain = np.random.default_rng(0).normal(0, 6, (8, 224, 224, 3))  # like a camera's
    photographs = (waves[None, ..., None] + grain).clip(0, 255).astype(np.uint8)
    budgets = (0.2, 0.3, 0.5, 0.7)
    expert = np.random.default_rng(1).choice(4, (4, 8, 14, 14), p=(0.4, 0.25, 0.15, 0.2))
    examples = replace(
        routing(),
        images_uint8=photographs,
        labels=("cat",) * 8,
        predictions=(("cat",) * 4,) * 8,
        budgets=budgets,
        expert=expert,
    )

    page_of(tmp_path, routing=examples)

    assert (tmp_path / "report.html").stat().st_size < 3_000_000


@pytest.mark.parametrize(
    ("accuracies", "sentence"),
    [
        ((0.8, 0.91, 0.93), "2.0 points below the 93.0 % of the full model"),
        ((0.8, 0.94, 0.93), "1.0 points above the 93.0 % of the full model"),
        ((0.8, 0.93, 0.9301), "level with the 93.0 % of the full model"),
    ],
)
def test_the_headline_weighs_half_the_compute_against_the_full_model(accuracies, sentence):
    found = headline([results("run", accuracies)]).replace("\N{NO-BREAK SPACE}", " ")

    assert found.startswith("At effective capacity 0.5, the model is right on")
    assert found.endswith(f"{sentence}, with 50 % of the arithmetic and 55 % of the time.")


def test_the_headline_speaks_of_the_largest_budget_where_the_full_model_was_not_run():
    found = headline([results("run", (0.8, 0.9), budgets=(0.3, 0.6))])

    assert found.startswith("At effective capacity 0.3, the model")
    assert "of effective capacity 0.6" in found


def test_the_headline_of_one_budget_names_its_cost():
    found = headline([results("run", (0.9,), budgets=(0.5,))]).replace("\N{NO-BREAK SPACE}", " ")

    assert found == (
        "At effective capacity 0.5, the model is right on 90.0 % of 400 validation samples, "
        "for 20.0 MMACs per image."
    )


def test_the_headline_of_two_says_who_is_ahead():
    champion = results("champion", (0.8, 0.90, 0.95))
    challenger = results("challenger", (0.8, 0.92, 0.93))

    found = headline([champion, challenger]).replace("\N{NO-BREAK SPACE}", " ")

    assert found == (
        "At effective capacity 0.5, challenger is right on 92.0 % of validation samples, "
        "2.0 points above the 90.0 % of champion."
    )


def test_the_headline_of_many_names_the_best_and_the_last():
    trials = [results(f"trial {i}", (0.5, 0.5 + i / 10, 0.9)) for i in range(3)]

    found = headline(trials)

    assert "trial 2, best of 3, is right on" in found
    assert found.endswith("of trial 0.")


def test_the_headline_names_nobody_where_all_are_equal():
    assert "all 2 are right on" in headline([results("a", (0.5,) * 3), results("b", (0.5,) * 3)])


def test_no_results_make_no_headline():
    assert headline([]) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.04213, "0.0421"), (4.2, "4.20"), (99.96, "100"), (421.4, "421"), (42149, "42,100")],
)
def test_numbers_are_told_to_three_digits(value, text):
    assert significant(value) == text


@pytest.mark.parametrize(
    ("difference", "text"),
    [(0.012, "+1.2"), (-0.012, "\N{MINUS SIGN}1.2"), (0.0, "±0.0"), (-0.0004, "±0.0")],
)
def test_differences_carry_their_sign(difference, text):
    assert points(difference) == text


def test_percentages_do_not_break_from_their_sign():
    assert percent(0.5) == "50.0\N{NO-BREAK SPACE}%"


def chromium(tmp_path, page, *flags):
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        *flags,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


MEASURE = """<script>addEventListener("load", () => {
  const root = document.documentElement;
  root.dataset.pictures = [...document.images].map(i => i.naturalWidth).join(" ");
  root.dataset.overflow = root.scrollWidth - root.clientWidth;
});</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package `chromium`")
def test_a_browser_shows_every_picture_and_nothing_wider_than_a_phone(tmp_path, whole):
    html = whole.read_text()
    # The page itself forbids scripts: a copy without that policy lets the browser measure it.
    open_to_scripts = re.sub(r"<meta http-equiv[^>]+>", "", html).replace("</body>", MEASURE)
    measured = tmp_path / "measured.html"
    measured.write_text(open_to_scripts)

    dom = chromium(tmp_path, measured, "--window-size=500,900", "--dump-dom")

    widths = re.search(r'data-pictures="([\d ]+)"', dom).group(1).split()
    assert len(widths) == 5
    assert all(int(width) > 300 for width in widths)
    assert 'data-overflow="0"' in dom


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package `chromium`")
def test_a_browser_paints_the_page_under_its_own_policy(tmp_path, whole):
    shot = tmp_path / "shot.png"

    chromium(tmp_path, whole, "--window-size=1200,3000", f"--screenshot={shot}")

    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    blue = (np.abs(pixels - (0x00, 0x72, 0xB2)).max(axis=2) < 12).sum()  # the line of a chart
    orange = (np.abs(pixels - (0xD5, 0x5E, 0x00)).max(axis=2) < 12).sum()  # outlines of tokens
    assert blue > 300
    assert orange > 300
