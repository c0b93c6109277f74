"""The page's contents: self-contained, inert strings, plots, pictures and curves taken from run folders."""

import base64
import hashlib
import html.parser
import io
import json
import re

import pytest
from PIL import Image
from records import metric, record

from pixlat.common.errors import UserError
from pixlat.evaluation.board import page
from pixlat.evaluation.board.attachments import attachment, grid_uri, losses, thinned
from pixlat.evaluation.board.columns import columns_of
from pixlat.evaluation.board.groups import Records, group, read_records
from pixlat.evaluation.board.page import ASSETS, pareto_front, plot_data, script_json, to_html
from pixlat.evaluation.records.published import read_published
from pixlat.evaluation.records.record import write_record

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>${data}<!--"


class Parts(html.parser.HTMLParser):
    """Scripts, attributes and tags of a page."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.attributes, self.tags, self._inside = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append((dict(attributes).get("type"), ""))

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, text):
        if self._inside:
            kind, before = self.scripts[-1]
            self.scripts[-1] = (kind, before + text)


def data_of(text):
    return json.loads(next(script for kind, script in Parts(text).scripts if kind == "application/json"))


def with_files(tmp_path, row, name="run", **files):
    """A run folder with a record and other files."""
    folder = tmp_path / name
    folder.mkdir(parents=True)
    write_record(row, folder / "result.json")
    for file, content in files.items():
        (folder / file.replace("_", ".", 1)).write_bytes(content)
    return folder


def png(size=(40, 30), colour=(200, 30, 30)):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


# -- one inert file ----------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_and_asks_for_nothing():
    parts = Parts(to_html(Records([record()], []), read_published()))
    loaded = [
        (tag, name, value)
        for tag, name, value in parts.attributes
        if name in ("src", "srcset", "action", "data") or (tag == "link" and name == "href")
    ]
    assert loaded == [("link", "href", "data:,")]
    policy = next(value for _, name, value in parts.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; img-src data:;")
    executed = [script for kind, script in parts.scripts if kind is None]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in executed]
    assert re.findall(r"sha256-([^']+)", policy) == digests and len(executed) == len(page.SCRIPTS)
    assert "@import" not in page.asset("page.css") and "url(" not in page.asset("page.css")


def test_nothing_in_a_record_becomes_markup():
    row = record(HOSTILE, notes=HOSTILE, metrics={"fd_embedded": metric(1.0)})
    text = to_html(Records([row], [HOSTILE]), [])
    assert Parts(text).tags == Parts(to_html(Records([record()], ["harmless"]), [])).tags
    data = data_of(text)
    assert data["leftOut"] == [HOSTILE]
    assert HOSTILE in [cell[0] for cell in data["sections"][0]["groups"][0]["table"]["rows"][0]]


def test_script_json_has_no_angle_bracket():
    value = {"<a>": ["</script>", "<!--", "&lt;", "\u2028"]}
    assert not set(script_json(value)) & set("<>&")
    assert json.loads(script_json(value)) == value


def test_vendored_files_are_what_their_authors_published():
    table = (ASSETS / "vendor" / "README.md").read_text()
    for file in (ASSETS / "vendor").glob("*.js"):
        assert f"{hashlib.sha256(file.read_bytes()).hexdigest()} |" in next(
            line for line in table.splitlines() if line.startswith(f"| {file.name} ")
        )
        assert (ASSETS / "vendor" / f"{file.name.split('.')[0]}.LICENSE.txt").exists()
    assert all("</script" not in page.asset(name).lower() and "<!--" not in page.asset(name) for name in page.SCRIPTS)
    assert sum(len(page.asset(name)) for name in page.SCRIPTS) < 700_000


def test_own_script_hands_no_string_to_the_parser():
    source = page.asset("page.js")
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|\.html\(", source
    )


def test_an_empty_board_is_a_page():
    data = data_of(to_html(Records([], []), []))
    assert data["rows"] == 0 and data["sections"] == [] and data["published"] == []


# -- plots -------------------------------------------------------------------------------------------------------------


def test_the_front_is_what_nothing_beats_in_both():
    points = [(0, 1.0, 9.0), (1, 2.0, 5.0), (2, 2.0, 6.0), (3, 3.0, 5.0), (4, 4.0, 1.0), (5, 9.0, 2.0)]
    assert pareto_front(points) == [0, 1, 4]
    assert pareto_front(points[::-1]) == [0, 1, 4]
    assert pareto_front([]) == []


def test_large_boards_draw_the_front_and_the_best(monkeypatch):
    monkeypatch.setattr(page, "DRAWN", 5)
    compute = record()["compute"]
    rows = [
        record(f"r{i}", 10.0 + i, compute={**compute, "macs_per_image": 10**9 * (i + 1 if i else 500)})
        for i in range(20)
    ]
    rows.append(record("cheap", 99.0, compute={**compute, "macs_per_image": 10**6}))
    rows.append(record("free", 1.0, compute={**compute, "macs_per_image": 0}))
    board = group(rows, "Unguided")
    plot = plot_data(board, columns_of(board), "macs_image")
    names = [board.ranked[i].row["name"] for i in plot["drawn"]]
    assert plot["of"] == 21 and len(names) == 5
    assert [board.ranked[i].row["name"] for i in plot["front"]] == ["cheap", "r1", "r0"]
    assert set(names) == {"cheap", "r1", "r0", "r2", "r3"}  # the costless one has no place on a logarithmic axis


def test_published_and_measured_never_share_a_plot_or_a_table():
    data = data_of(to_html(Records([record("ours", metrics={"fid": metric(3.0)})], []), read_published()))
    assert [len(section["groups"]) for section in data["sections"]] == [1]
    assert "JiT" not in json.dumps(data["sections"])
    assert "ours" not in json.dumps(data["published"])
    assert all(not marks for table in data["published"] for marks in table["table"]["best"])


# -- what lies beside a record -----------------------------------------------------------------------------------------


def test_grids_are_embedded_small_and_side_by_side(tmp_path):
    artifacts = {"grid_png": "samples.png", "log": "metrics.jsonl"}
    log = b"".join(
        json.dumps({"step": i, "images": 10 * i, "loss": 1 / i, "generator/loss": 2.0, "lr": 1}).encode() + b"\n"
        for i in range(1, 501)
    )
    with_files(tmp_path, record("a", 50.0, artifacts=artifacts), "a", samples_png=png((1440, 720)), metrics_jsonl=log)
    with_files(tmp_path, record("worse, same method", 60.0, artifacts=artifacts), "b", samples_png=png())
    with_files(tmp_path, record("guided", 55.0, guidance="cfg", artifacts=artifacts), "c", samples_png=png())
    with_files(tmp_path, record("no files", 1.0, guidance="cfg", artifacts=artifacts), "d")
    data = data_of(to_html(read_records(tmp_path), []))
    (grids,) = data["grids"]
    assert [figure["run"] for figure in grids["figures"]] == ["a", "guided"]
    first = grids["figures"][0]
    assert (first["width"], first["height"]) == (720, 360) and first["score"] == "fd_embedded 50.00"
    assert Image.open(io.BytesIO(base64.b64decode(first["src"].partition(",")[2]))).size == (720, 360)
    lines = data["sections"][0]["groups"][0]["losses"]
    assert [line["run"] for line in lines] == ["a, generator", "a"]
    assert len(lines[1]["points"]) <= 200
    assert data["leftOut"] == []


def test_files_outside_the_run_folder_are_not_opened(tmp_path):
    (tmp_path / "secret.png").write_bytes(png())
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png"):
        with pytest.raises(UserError, match="outside its folder"):
            attachment(folder, name)
    assert (
        attachment(folder, "missing.png") is None
        and attachment(folder, "") is None
        and attachment(folder, None) is None
    )
    assert attachment(folder, ".") is None


@pytest.mark.parametrize("content", [b"", b"not a picture", png()[:60], b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_a_broken_picture_is_named_and_the_page_renders(tmp_path, content):
    with_files(tmp_path, record(artifacts={"grid_png": "samples.png"}), samples_png=content)
    data = data_of(to_html(read_records(tmp_path), []))
    assert data["rows"] == 1 and data["grids"] == []
    assert len(data["leftOut"]) == 1 and "samples.png: cannot be read as a PNG" in data["leftOut"][0]


def test_pictures_too_large_are_refused(tmp_path, monkeypatch):
    (tmp_path / "grid.png").write_bytes(png((200, 200)))
    monkeypatch.setattr("pixlat.evaluation.board.attachments.MAX_PIXELS", 100 * 100)
    with pytest.raises(UserError, match="200 x 200 pixels are too many"):
        grid_uri(tmp_path / "grid.png")
    monkeypatch.setattr("pixlat.evaluation.board.attachments.MAX_BYTES", 10)
    with pytest.raises(UserError, match="the page does not show it"):
        attachment(tmp_path, "grid.png")


@pytest.mark.parametrize(
    "line", ["{", "1", '{"images": 1, "loss": "high"}', '{"loss": 1}', '{"images": 1, "loss": null}', "[" * 100_000]
)
def test_a_broken_log_is_named_and_the_page_renders(tmp_path, line):
    with_files(
        tmp_path,
        record(artifacts={"log": "metrics.jsonl"}),
        metrics_jsonl=f'{{"images": 1, "loss": 1.0}}\n{line}\n'.encode(),
    )
    data = data_of(to_html(read_records(tmp_path), []))
    assert data["rows"] == 1 and "metrics.jsonl: cannot be read as a log" in data["leftOut"][0]


def test_losses_keep_their_course(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        "".join(json.dumps({"images": i, "loss": float("nan") if i == 3 else 2.0 * i}) + "\n" for i in range(1, 6))
        + '{"images": 6'
    )
    assert losses(file) == {"loss": [(1, 2), (2, 4), (4, 8), (5, 10)]}
    thin = thinned([(i, i) for i in range(1000)])
    assert len(thin) == 200 and thin[0] == (2, 2) and thin[-1] == (997, 997)
    assert thinned([]) == []
