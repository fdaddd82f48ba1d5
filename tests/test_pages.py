"""The pages in a real browser: what they show, by mouse and by keyboard, wide and narrow, light and dark."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import browser, complaints, look
from networks import randomize_
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from torch import nn
from torchvision.models import resnet18

import elc_fx
from elc_fx.errors import Refusal
from elc_fx.report.charts import Point, accuracy_cost
from elc_fx.report.page import _rounded, page
from elc_fx.training.history import Epoch

X = torch.randn(1, 3, 64, 64)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def compressed() -> tuple[nn.Module, nn.Module, elc_fx.Diff]:
    """A ResNet-18, two regions of it merged after decoupling, its batch norms folded; and their diff."""
    model = randomize_(resnet18(weights=None)).eval()
    decoupled = elc_fx.decouple(model, elc_fx.Plan.of(model, X, collapse=["layer1.*", "layer2.0"]))
    elc_fx.set_gate(decoupled, 0)
    small = elc_fx.compile(elc_fx.merge(decoupled), X)
    return model, small, elc_fx.diff(model, small, X, names=("<b>original</b>", "small & merged"))


@pytest.fixture(scope="module")
def diff_file(compressed: tuple[nn.Module, nn.Module, elc_fx.Diff], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pages") / "diff.html"
    elc_fx.draw(compressed[2], file)
    return file


def texts(driver: Any, selector: str) -> list[str]:
    return [found.text for found in driver.find_elements("css selector", selector)]


def text(driver: Any, selector: str) -> str:
    return str(driver.find_element("css selector", selector).text)


def press(driver: Any, *keys: str) -> None:
    for key in keys:
        ActionChains(driver).send_keys(key).perform()


def shown(driver: Any) -> int:
    """Blocks that are displayed, those beyond the window too, whether the browser has drawn them already or not."""
    count: int = driver.execute_script(
        "return [...document.querySelectorAll('.block')].filter(b => b.checkVisibility()).length"
    )
    return count


def test_a_page_needs_nothing_but_itself(diff_file: Path) -> None:
    content = diff_file.read_text(encoding="utf-8")
    outside = re.findall(r"""(?:src|href)\s*=\s*["']?(?!data:|#)[^"'\s>]+|url\(|@import|fetch\(""", content)
    assert not outside
    assert "<b>original</b>" not in content  # what users call things is no HTML


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1400, 400])
def test_every_change_is_there_and_nothing_is_complained_of(
    width: int, dark: bool, driver: Any, diff_file: Path, compressed: tuple[Any, Any, elc_fx.Diff]
) -> None:
    look(driver, diff_file, width=width, dark=dark)
    assert complaints(driver) == []
    assert shown(driver) == len(compressed[2].changes)
    assert texts(driver, ".heads b") == ["<b>original</b>", "small & merged"]
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width  # only the parts scroll
    background = driver.execute_script("return getComputedStyle(document.querySelector('.diff')).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == dark
    visible = [e for e in driver.find_elements("css selector", ".name")[:20] if e.size["width"] > 8]
    assert len(visible) == 20


def test_a_click_shows_the_layers_before_and_after(driver: Any, diff_file: Path) -> None:
    look(driver, diff_file)
    names = driver.find_elements("css selector", ".block.merged .name")
    next(name for name in names if name.text == "layer1.1.bn2").click()
    panel = text(driver, "#panel")
    assert "merged: layer1.0.conv1" in panel
    assert "75,497,472 → 18,874,368 (−75.0 %)" in panel
    tables = [t.find_elements("css selector", "tbody tr") for t in driver.find_elements("css selector", "#panel table")]
    assert [len(rows) for rows in tables] == [13, 1]
    assert tables[1][0].text == "layer1.0.conv1 3×3 64→64 padding 1 3×3 1×64×16×16 18,874,368 36,928"
    assert len(texts(driver, ".block[aria-selected=true]")) == 1
    driver.find_element("css selector", "#panel .close").click()
    assert not driver.find_element("id", "panel").is_displayed()
    assert complaints(driver) == []


def test_the_search_goes_from_hit_to_hit(driver: Any, diff_file: Path) -> None:
    look(driver, diff_file)
    press(driver, "/", "downsample")
    assert text(driver, "#found") == "3 found"
    press(driver, Keys.ENTER)
    assert text(driver, "#found") == "1 of 3" and "layer2.0" in text(driver, "#panel h3")
    press(driver, Keys.ENTER)
    assert text(driver, "#found") == "2 of 3" and "layer3.0.downsample.0" in text(driver, "#panel h3")
    ActionChains(driver).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    assert text(driver, "#found") == "1 of 3"
    press(driver, "x")
    assert text(driver, "#found") == "none found"
    press(driver, Keys.ESCAPE)
    assert text(driver, "#found") == "" and not driver.find_elements("css selector", ".map.searching")
    assert complaints(driver) == []


def test_the_kinds_can_be_hidden(driver: Any, diff_file: Path, compressed: tuple[Any, Any, elc_fx.Diff]) -> None:
    look(driver, diff_file)
    counts = compressed[2].counts
    driver.find_element("css selector", ".chip.kept").click()
    assert shown(driver) == counts["merged"]
    press(driver, "/", "relu")
    assert text(driver, "#found") == "2 found"  # of what is shown
    press(driver, Keys.ESCAPE, "1")
    assert shown(driver) == len(compressed[2].changes)
    assert complaints(driver) == []


def test_all_of_it_by_keyboard(driver: Any, diff_file: Path) -> None:
    def focused() -> str:
        return str(driver.execute_script("return document.activeElement.getAttribute('aria-label')"))

    look(driver, diff_file)
    press(driver, "n")
    assert focused() == "merged: conv1" and "merged: conv1" in text(driver, "#panel")
    press(driver, "n")
    assert focused() == "merged: layer1.0.conv1"
    press(driver, "p", Keys.ARROW_DOWN)
    assert focused() == "kept: relu"
    press(driver, Keys.ENTER)
    assert "kept: relu" in text(driver, "#panel") and "before and after" in text(driver, "#panel")
    press(driver, Keys.END)
    assert focused() == "kept: output"
    press(driver, Keys.HOME, Keys.ESCAPE)
    assert focused() == "kept: x" and not driver.find_element("id", "panel").is_displayed()
    press(driver, "?")
    assert "Keys" in text(driver, "#panel")
    driver.find_element("css selector", "#panel .close").click()
    assert not driver.find_element("id", "panel").is_displayed()
    assert complaints(driver) == []


def test_from_change_to_change_it_stops_at_the_ends(driver: Any, diff_file: Path) -> None:
    look(driver, diff_file)
    press(driver, "n", Keys.HOME, "p")
    assert text(driver, "#panel h3") == "merged: conv1"  # before it is nothing that changed
    press(driver, Keys.END, "n")
    assert text(driver, "#panel h3") == "merged: conv1"
    assert complaints(driver) == []


def test_arrows_scroll_the_panel_that_has_the_focus(driver: Any, diff_file: Path) -> None:
    look(driver, diff_file, height=400)
    press(driver, "n", "n")
    driver.find_element("css selector", "#panel .close").send_keys(Keys.ARROW_DOWN)
    WebDriverWait(driver, 5).until(lambda d: d.execute_script("return document.getElementById('panel').scrollTop") > 0)
    assert driver.switch_to.active_element.get_attribute("class") == "close"
    assert complaints(driver) == []


def test_the_panel_has_room_for_costs(driver: Any, diff_file: Path) -> None:
    look(driver, diff_file)
    press(driver, "n", "n")
    for table in driver.find_elements("css selector", "#panel .wide"):
        assert driver.execute_script("return arguments[0].scrollWidth - arguments[0].clientWidth", table) == 0


def test_long_names_leave_room_for_the_diff(driver: Any, tmp_path: Path) -> None:
    model, file = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval(), tmp_path / "diff.html"
    elc_fx.draw(elc_fx.diff(model, elc_fx.compile(model), names=("x" * 3000, "y" * 3000)), file)
    look(driver, file)
    assert driver.find_element("css selector", ".heads").size["height"] < 100
    assert driver.find_element("css selector", ".block.merged").is_displayed()


def test_it_zooms_fits_and_pans(driver: Any, diff_file: Path) -> None:
    look(driver, diff_file)
    high = driver.execute_script("return document.querySelector('.row').getBoundingClientRect().height")
    press(driver, "+", "+")
    larger = driver.execute_script("return document.querySelector('.row').getBoundingClientRect().height")
    assert larger > 1.4 * high
    drawn = driver.find_element("id", "map")
    place = "return [arguments[0].scrollLeft, arguments[0].scrollTop]"
    before = driver.execute_script(place, drawn)
    ActionChains(driver).move_to_element(drawn).click_and_hold().move_by_offset(-120, -200).release().perform()
    after = driver.execute_script(place, drawn)
    assert [a - b for a, b in zip(after, before, strict=True)] == [120, 200]
    assert not driver.find_element("id", "panel").is_displayed()  # a drag is no click
    driver.find_element("id", "fit").click()
    driver.find_element("id", "fit").click()
    overflow = driver.execute_script("return arguments[0].scrollHeight - arguments[0].clientHeight", drawn)
    assert overflow <= 2
    assert complaints(driver) == []


def test_a_link_opens_the_change_that_it_names(driver: Any, diff_file: Path) -> None:
    look(driver, diff_file)
    driver.get(f"{diff_file.as_uri()}#change-12")
    driver.refresh()
    (block,) = driver.find_elements("css selector", ".block[aria-selected=true]")
    assert block.get_attribute("id") == "c12"
    top = driver.execute_script("return document.querySelector('.heads').getBoundingClientRect().bottom")
    assert block.rect["y"] >= top


def test_five_hundred_layers_can_be_read(driver: Any, tmp_path: Path) -> None:
    layers = [m for i in range(170) for m in (nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())]
    model = nn.Sequential(*layers).eval()
    file = tmp_path / "deep.html"
    elc_fx.draw(elc_fx.diff(model, elc_fx.compile(model)), file)
    look(driver, file)
    assert shown(driver) == 342
    loaded = driver.execute_script("return performance.timing.domContentLoadedEventEnd - performance.timing.fetchStart")
    assert loaded < 5000
    size = driver.execute_script("return parseFloat(getComputedStyle(document.querySelector('.name')).fontSize)")
    assert size >= 12
    press(driver, "/", "507")
    assert text(driver, "#found") == "1 found"
    assert driver.find_element("css selector", ".block.hit .name").is_displayed()
    assert complaints(driver) == []


def test_two_thousand_layers_fit(driver: Any, tmp_path: Path) -> None:
    layers = [m for i in range(670) for m in (nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU())]
    model, file = nn.Sequential(*layers).eval(), tmp_path / "deeper.html"
    elc_fx.draw(elc_fx.diff(model, model), file)
    look(driver, file)
    driver.find_element("id", "fit").click()
    drawn = driver.find_element("id", "map")
    assert driver.execute_script("return arguments[0].scrollHeight - arguments[0].clientHeight", drawn) <= 2
    assert complaints(driver) == []


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 "),
        (999, "999 "),
        (999_499, "999 k"),
        (999_999, "1 M"),
        (7_500_000, "7.5 M"),
        (1_984_000_000_000, "1.98 T"),
    ],
)
def test_counts_are_three_digits_and_a_letter(count: int, shown: str) -> None:
    assert _rounded(count) == shown


def test_charts_show_names_as_they_are() -> None:
    """Folders of earlier runs are named by users; a $ is no formula, and a long name does not push the chart away."""
    names = ("a$\\foo$", "<b>", "x" * 300)
    with warnings.catch_warnings(action="error"):
        drawn = accuracy_cost([Point(name, i + 1, 0.9) for i, name in enumerate(names)])
    assert "a$\\foo$" in drawn and "&lt;b&gt;" in drawn and f"…{'x' * 23}<" in drawn


@pytest.fixture(scope="module")
def report_file(compressed: tuple[nn.Module, nn.Module, elc_fx.Diff], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, small, diff = compressed
    report = elc_fx.report_of(small)
    plan = elc_fx.Plan.of(model, X, collapse=["layer1.*", "layer2.0"])
    epochs = tuple(Epoch(i, 1 / i, max(0, 1 - i / 4), 1e-3, 900.0, 0.1 * i) for i in range(1, 9))
    refused = (Refusal("a<b", "it stays & why"), *report.refused)
    made = elc_fx.Report(report.merged, refused, report.opaque, report.totals, plan, epochs)
    summary = [("accuracy on test images", "91.00%", "90.10%", "-0.90 points"), ("FLOPs", "2", "1", "-50.0%")]
    points = [Point("original", 297_000_000, 0.91), Point("half", 150_000_000, 0.9), Point("third", 90_000_000, 0.85)]
    file = tmp_path_factory.mktemp("pages") / "report.html"
    file.write_text(page(summary, made, diff, points), encoding="utf-8")
    return file


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1400, 400])
def test_a_report_shows_what_a_decision_needs(width: int, dark: bool, driver: Any, report_file: Path) -> None:
    look(driver, report_file, width=width, dark=dark)
    assert complaints(driver) == []
    summary = driver.find_element("css selector", ".summary")
    assert "91.00% 90.10% -0.90 points" in summary.text.replace("\n", " ")
    assert summary.rect["y"] + summary.rect["height"] < 900  # on the first screen
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    for part in texts(driver, "nav a"):
        link = driver.find_element("link text", part)
        assert driver.find_elements(
            "css selector", link.get_attribute("href").partition("file://")[2].rpartition("html")[2]
        )
    assert {"half", "third"} <= set(texts(driver, "#curve text"))
    assert "gate (right)" in texts(driver, "#training text, #training + figure text")
    assert "a<b: it stays & why" in text(driver, "ul")
    bars = driver.find_elements("css selector", ".costs tbody tr")
    assert len(bars) == 16 and "layer1.0.conv1 (13 layers)" in " ".join(bar.text for bar in bars)


def test_the_diff_in_a_report_is_the_same(driver: Any, report_file: Path) -> None:
    look(driver, report_file)
    driver.find_element("css selector", ".chip.kept").click()
    driver.find_element("css selector", ".block.merged .name").click()
    assert "merged: conv1" in text(driver, "#panel")
    assert complaints(driver) == []
