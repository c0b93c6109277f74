"""The page in headless Chromium: sorting, filtering, hovering, themes, keyboard, phone.

Screenshots go to $PIXLAT_ARTEFACTS where that is set.
"""

import io
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image
from records import judged, met, metric, record

from pixlat.evaluation import leaderboard
from pixlat.evaluation.records.claims import write_claim
from pixlat.evaluation.records.record import write_record
from pixlat.evaluation.studies.claim_tools.framework import Claim, Criterion, Estimate, Evidence, build_record

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
if CHROMIUM is None or shutil.which("chromedriver") is None:
    pytest.skip("no Chromium with chromedriver: apt-get install chromium chromium-driver", allow_module_level=True)

webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install -e '.[test]'")
By = pytest.importorskip("selenium.webdriver.common.by").By
ActionChains, Keys = webdriver.ActionChains, webdriver.Keys

HOSTILE = "<img src=x onerror=window.broken=1><script>window.broken=1</script> & <b>bold</b>"
SYSTEMS = [  # method, space, score, GMACs an image, M parameters, guidance
    ("alpha", "pixel", 700.0, 1.3, 3.6, "none"),
    ("beta", "latent_vae", 650.0, 0.8, 3.5, "none"),
    ("gamma", "latent_rae", 720.0, 1.1, 4.2, "none"),
    ("alpha", "pixel", 600.0, 2.5, 3.6, "cfg"),
    ("beta", "latent_vae", 610.0, 1.4, 3.5, "cfg"),
]


def a_row(name, system, seed=0, **changes):
    method, space, score, macs, params, guidance = system
    base = record(name, score + 5 * seed, guidance=guidance)
    return record(
        name, score + 5 * seed, guidance,
        system={**base["system"], "method": method, "space": space},
        compute={**base["compute"], "macs_per_image": int(macs * 1e9)},
        params={**base["params"], "gen_total": int(params * 1e6)},
        artifacts={"grid_png": "samples.png", "log": "metrics.jsonl"},
        **changes,
    )  # fmt: skip


def keep_claim(folder):
    """The record and the picture of a checked claim."""
    folder.mkdir()
    criterion = Criterion("a", HOSTILE, "at most", 1.0)
    claim = Claim(HOSTILE, "paper", HOSTILE, "setting", (criterion,), lambda budget: None, (1.0, 1.0))
    evidence = Evidence(
        {"a": Estimate(1.0, 0.5, 3)}, ["name", "value"], [[HOSTILE, "1 ± 0.5"]], figure=None, remarks=[HOSTILE]
    )
    write_claim(build_record(claim, evidence, quick=True, seconds=1.0, device="cpu"), folder)
    Image.linear_gradient("L").resize((400, 200)).convert("RGB").save(folder / "claim.png")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A board with two protocols, guided and unguided rows, a hostile name, an unscored row and a broken record."""
    runs = tmp_path_factory.mktemp("runs")
    rows = [a_row(f"{system[0]}-{system[5]}-{seed}", system, seed) for system in SYSTEMS for seed in (0, 1)]
    rows += [
        a_row(HOSTILE, SYSTEMS[0], 2),
        record("other protocol", num_images=5000),
        a_row("unscored", SYSTEMS[1], metrics={"is": metric(2.0)}),
    ]
    for number, row in enumerate(rows):
        folder = runs / str(number)
        folder.mkdir()
        write_record(row, folder / "result.json")
        Image.linear_gradient("L").resize((300, 300)).convert("RGB").save(folder / "samples.png")
        log = "".join(json.dumps({"images": 100 * i, "loss": 1 / i}) + "\n" for i in range(1, 50))
        (folder / "metrics.jsonl").write_text(log)
    keep_claim(runs / "claim")
    (runs / "broken").mkdir()
    (runs / "broken" / "result.json").write_text(json.dumps({HOSTILE: 1}))
    assert leaderboard.main(["--runs", str(runs), "--out", str(runs)]) == 0
    return (runs / "leaderboard.html").as_uri()


@pytest.fixture(scope="module")
def judged_page(tmp_path_factory):
    """A board of embedded-v2: several trainings an entry, two settings of one method, rows without a rank."""
    runs = tmp_path_factory.mktemp("judged")
    lite0 = [met("embedded-v1", "encoder"), met("embedded-v1", "perceptual loss", "autoencoder32 (in the package)")]
    rows = [judged(f"jit-toy-demo-seed{seed}-abcde{seed}", 2.5 + 0.1 * seed, seed) for seed in range(3)]
    rows += [
        judged(f"jit-toy-demo-seed{seed}-bbcde{seed}", 2.9 + 0.1 * seed, seed, {"model.prediction": "v"})
        for seed in range(3)
    ]
    rows += [judged(f"rae-seed{seed}", (3.0, 3.3, 3.1)[seed], seed, method="rae", contact=lite0) for seed in range(3)]
    rows += [
        judged("copies", 1.1, method="copycat", copies=0.61, params={**rows[0]["params"], "gen_total": 10**6}),
        judged("taught", 1.3, method="taught", contact=[met("plain", "teacher")], judged_by=["residual", "vit"]),
    ]
    for number, row in enumerate(rows):
        (runs / str(number)).mkdir()
        write_record(row, runs / str(number) / "result.json")
    assert leaderboard.main(["--runs", str(runs), "--out", str(runs)]) == 0
    return (runs / "leaderboard.html").as_uri()


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--window-size=1400,1000",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield started
    started.quit()


@pytest.fixture
def browser(driver, page):
    """The page freshly loaded at 1400 px, light; a console message of any kind fails the test."""
    return opened(driver, page)


@pytest.fixture(autouse=True)
def no_console_messages(driver):
    driver.get_log("browser")
    yield
    assert driver.get_log("browser") == []


def opened(driver, page, width=1400, scheme="light"):
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    driver.get(page)
    assert driver.execute_script("return document.body.dataset.ready") == "true"
    return driver


def until(condition, seconds=10.0):
    """Waits for what the page does by itself: a delay of typing, a plot that is drawn when seen."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the page did not react"
        time.sleep(0.05)


def cells(browser, column, table=0):
    """Texts of a visible column, by its header."""
    script = """
      const table = document.querySelectorAll("table.dataTable")[arguments[0]];
      const heads = [...table.querySelectorAll("thead th")];
      const at = heads.findIndex((th) => th.querySelector(".dt-column-title").textContent.startsWith(arguments[1]));
      return [...table.tBodies[0].rows].map((row) => row.cells[Math.min(at, row.cells.length - 1)].textContent);
    """
    return browser.execute_script(script, table, column)


def header(browser, column, table=0):
    headers = browser.find_elements(By.CSS_SELECTOR, "table.dataTable")[table].find_elements(
        By.CSS_SELECTOR, "thead th"
    )
    found = next(each for each in headers if each.text.startswith(column))
    browser.execute_script("arguments[0].scrollIntoView({ block: 'nearest', inline: 'center' })", found)
    return found


def plots(browser):
    browser.execute_script("document.querySelector('.plots').scrollIntoView()")
    until(lambda: len(browser.find_elements(By.CSS_SELECTOR, ".plots svg")) >= 3)
    return browser.find_elements(By.CSS_SELECTOR, ".plots svg")


def keep(browser, name):
    """A screenshot of the whole page as an artefact of CI; checked to be a picture with something on it."""
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")  # draws what has not been seen yet
    assert not browser.execute_script(
        "return [...document.querySelectorAll('.plots figure')].filter((each) => !each.querySelector('svg')).length"
    )
    height, width = browser.execute_script("return [document.documentElement.scrollHeight, innerWidth]")
    size = {"width": width, "height": min(height, 6000), "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_script("scrollTo(0, 0)")
    picture = browser.get_screenshot_as_png()
    if folder := os.environ.get("PIXLAT_ARTEFACTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"leaderboard-{name}.png").write_bytes(picture)
    return Image.open(io.BytesIO(picture)).convert("RGB")


# -- what is there -----------------------------------------------------------------------------------------------------


def test_everything_is_drawn_and_nothing_fetched(browser):
    headings = [each.text for each in browser.find_elements(By.TAG_NAME, "h2")]
    parts = ["Samples, side by side", "Claims of the papers, checked here", "Published, not measured here", "Left out"]
    assert headings == ["toy, 32 px, 1,000 images", "toy, 32 px, 5,000 images", *parts]
    assert browser.find_element(
        By.CSS_SELECTOR, "#claims h3"
    ).text == f"{HOSTILE}: inconclusive" and browser.find_elements(By.CSS_SELECTOR, "#claims img")
    assert [each.text for each in browser.find_elements(By.CSS_SELECTOR, "section:first-child h3")] == [
        "Unguided",
        "Guided",
    ]
    assert cells(browser, "run")[:2] == ["beta-none-0", "beta-none-1"]
    assert cells(browser, "#")[-2:] == ["6-7", "-"]
    fetched = browser.execute_script(
        "return performance.getEntriesByType('resource').map((e) => e.name).filter((name) => !name.startsWith('data:'))"
    )
    assert fetched == []


def test_hostile_strings_are_text(browser):
    assert HOSTILE in cells(browser, "run")
    assert browser.execute_script("return window.broken") is None
    assert (
        browser.execute_script(
            "return document.querySelectorAll('main script, main b, main img:not([src^=\"data:\"])').length"
        )
        == 0
    )
    assert HOSTILE[:60] in browser.find_element(By.CSS_SELECTOR, "#left-out li").text


def test_the_best_is_marked_within_one_table(browser):
    marked = browser.execute_script(
        "return [...document.querySelectorAll('table.dataTable')].map((t) => t.querySelectorAll('td.best').length)"
    )
    assert all(count > 0 for count in marked[:2]) and marked[2] == 0  # a table of one row has no best
    assert sum(marked[3:]) == 0  # published rows
    assert "best" in browser.find_element(By.XPATH, "//td[.='beta-none-0']/following-sibling::td[2]").get_attribute(
        "class"
    )


# -- what a reader does ------------------------------------------------------------------------------------------------


def test_a_header_sorts_both_ways_and_says_so(browser):
    header(browser, "params").click()
    assert header(browser, "params").get_attribute("aria-sort") == "ascending"
    ascending = [float(text) for text in cells(browser, "params")]
    assert ascending == sorted(ascending) and ascending[0] < ascending[-1]
    header(browser, "params").click()
    assert header(browser, "params").get_attribute("aria-sort") == "descending"
    assert [float(text) for text in cells(browser, "params")] == ascending[::-1]
    header(browser, "fd_embedded").click()
    assert cells(browser, "fd_embedded")[-1] == "-"
    header(browser, "fd_embedded").click()
    assert cells(browser, "fd_embedded")[-1] == "-"  # what is absent stays last
    assert cells(browser, "fd_embedded")[0].startswith("725.00")


def test_the_keyboard_sorts_filters_and_opens(browser):
    header(browser, "params")  # on the page
    button = header(browser, "params").find_element(By.CSS_SELECTOR, ".dt-column-order")
    assert (
        button.get_attribute("role") == "button"
        and button.get_attribute("tabindex") == "0"
        and "params" in button.get_attribute("aria-label")
    )
    button.send_keys(Keys.ENTER)
    assert header(browser, "params").get_attribute("aria-sort") == "ascending"
    button.send_keys(Keys.SPACE)
    assert header(browser, "params").get_attribute("aria-sort") == "descending"
    browser.find_element(By.ID, "columns").send_keys(Keys.ENTER)
    assert browser.find_element(By.ID, "columns").get_attribute("aria-pressed") == "true"
    assert cells(browser, "space")[0]
    summary = browser.find_element(By.XPATH, "//summary[contains(., 'protocol')]")
    summary.send_keys(Keys.ENTER)
    assert '"extractor"' in summary.find_element(By.XPATH, "../pre").text
    zoom = browser.find_element(By.CSS_SELECTOR, ".grids button")
    zoom.send_keys(Keys.ENTER)
    assert browser.find_element(By.ID, "zoom").is_displayed()
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    until(lambda: not browser.find_element(By.ID, "zoom").is_displayed())


def test_the_first_tab_stops_lead_to_the_tables(browser):
    stops = []
    for _ in range(10):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        stops.append(
            browser.execute_script("const e = document.activeElement; return e.id || e.textContent || e.className")
        )
    assert stops[0] == "Skip to the tables"
    assert stops[-3:] == ["filter", "columns", "theme"]


def test_the_filter_narrows_tables_and_plots(browser):
    plots(browser)
    faint = (
        "return document.querySelector('.plots svg').querySelectorAll('[aria-label=dot] "
        'path[fill-opacity="0.12"]\').length'
    )
    field = browser.find_element(By.ID, "filter")
    field.send_keys("latent")  # of a column that is not shown
    until(lambda: set(cells(browser, "method")) == {"beta demo", "gamma demo"})
    until(lambda: browser.execute_script(faint) == 3)  # alpha twice and the hostile name
    field.send_keys(" and nothing else")
    until(lambda: cells(browser, "run") == ["no row passes the filter"])
    field.clear()
    field.send_keys(" ")
    until(lambda: len(cells(browser, "run")) == 8)
    until(lambda: browser.execute_script(faint) == 0)


def test_hovering_tells_what_a_point_is(browser):
    chart = plots(browser)[0]
    dot = chart.find_elements(By.CSS_SELECTOR, "[aria-label=dot] path")[0]
    ActionChains(browser).move_to_element(dot).move_by_offset(1, 1).perform()
    until(lambda: chart.find_elements(By.CSS_SELECTOR, "[aria-label=tip] text"))
    told = chart.find_element(By.CSS_SELECTOR, "[aria-label=tip] text").get_attribute("textContent")
    assert "fd_embedded: " in told and " ± " in told and "sampling: " in told and "GMACs/image" in told


def test_themes_follow_the_system_and_the_button(driver, page):
    def paper():
        return driver.execute_script("return getComputedStyle(document.body).backgroundColor")

    opened(driver, page, scheme="dark")
    dark = paper()
    assert driver.find_element(By.ID, "theme").text == "Light"
    driver.find_element(By.ID, "theme").click()
    light = paper()
    assert light != dark
    driver.get(page)
    assert paper() == light  # remembered
    driver.execute_script("localStorage.clear()")
    driver.get(page)
    assert paper() == dark


def test_real_images_stand_below_whatever_sorts_and_filters(driver, judged_page):
    opened(driver, judged_page)

    def foot():
        rows = driver.find_elements(By.CSS_SELECTOR, "table.dataTable tfoot tr")
        return [row.text for row in rows if row.text]

    assert cells(driver, "run") == ["jit-toy-demo", "jit-toy-demo", "rae", "copies", "taught"]
    assert cells(driver, "#") == ["1", "2-3", "2-3", "-", "-"]
    assert len(foot()) == 1 and foot()[0].startswith("held-out real images") and "1.00 ± 0.06" in foot()[0]
    header(driver, "fd_ratio").click()
    assert cells(driver, "run")[0] == "copies" and len(foot()) == 1
    driver.find_element(By.ID, "filter").send_keys("rae")
    until(lambda: cells(driver, "run") == ["rae"])
    assert foot()[0].startswith("held-out real images")
    driver.find_element(By.ID, "columns").click()
    assert "kid_ratio" in [head.text.split(" ")[0] for head in driver.find_elements(By.CSS_SELECTOR, "thead th")]
    assert driver.execute_script("""
      const table = document.querySelector("table.dataTable");
      return table.tHead.rows[0].cells.length === table.tFoot.rows[0].cells.length;
    """)


def test_the_page_says_who_met_a_judge_and_what_each_judge_says(driver, judged_page):
    opened(driver, judged_page)
    assert cells(driver, "judges met")[2:] == [
        "EfficientNet-Lite0: encoder, perceptual loss of autoencoder32",
        "none",
        "plain: teacher",
    ]
    assert cells(driver, "not ranked")[3:] == ["61 % of its images are copies of training images", "met plain"]
    assert cells(driver, "model.prediction")[:3] == ["preset's", "v", "preset's"]
    tables = {
        table.get_attribute("aria-label"): table.text for table in driver.find_elements(By.CSS_SELECTOR, "table.plain")
    }
    ranks, agreement = (
        next(text for name, text in tables.items() if title in name) for title in ("Ranks", "Agreement")
    )
    assert "(met)" in ranks
    assert "plain and EfficientNet-Lite0" in agreement
    hollow = "return document.querySelectorAll('.plots svg [aria-label=dot] path[fill=\"var(--card)\"]').length"
    plots(driver)
    assert driver.execute_script(hollow) == 6  # two rows without a rank in three plots


# -- what it looks like ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (1400, "dark"), (375, "light"), (375, "dark")])
def test_it_fits_the_screen(driver, page, width, scheme):
    opened(driver, page, width, scheme)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    picture = keep(driver, f"{width}-{scheme}")
    ground = picture.getpixel((2, 2))
    assert (sum(ground) < 200) == (scheme == "dark")
    assert len(picture.getcolors(2**24)) > 200


@pytest.mark.parametrize("width", [390, 1366, 1920])
def test_a_board_of_several_judges_fits_the_screen(driver, judged_page, width):
    opened(driver, judged_page, width)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    keep(driver, f"judged-{width}")
    overflowing = """
      const parts = document.querySelectorAll("main h2, main h3, main h4, main p, main td.long, main th");
      return [...parts].filter((part) => part.scrollWidth > part.clientWidth + 1).length;
    """
    assert driver.execute_script(overflowing) == 0


def test_a_phone_shows_the_score_without_scrolling(driver, page):
    opened(driver, page, 375)
    right = driver.execute_script("return document.querySelector('td.best').getBoundingClientRect().right")
    assert right <= 375
