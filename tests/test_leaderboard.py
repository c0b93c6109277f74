"""The leaderboard's tables: grouping, ranking, formats, hostile strings, broken files,
published rows, the README's table.
"""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from records import fields, jackknifed, metric, parent_stage, protocol, record

from pixlat.evaluation import leaderboard
from pixlat.evaluation.board.columns import Cell, best, columns_of
from pixlat.evaluation.board.groups import Records, heading_of, read_records, section, sections
from pixlat.evaluation.board.notes import EMBEDDED_NOTE, budget_notes, training_macs, uncounted_parts
from pixlat.evaluation.board.published import from_record, published_tables
from pixlat.evaluation.board.styles import metric_style
from pixlat.evaluation.board.text import MARKERS, escape, latex_escape, to_latex, to_readme, to_terminal, with_table
from pixlat.evaluation.leaderboard import render
from pixlat.evaluation.records.parents import shipped_run
from pixlat.evaluation.records.published import STATUSES, read_published
from pixlat.evaluation.records.record import build_record, from_csv, validate, write_record
from pixlat.methods import get_spec

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = ("html", "md", "csv", "json", "tex")
HOSTILE = [
    "<script>alert(1)</script>", "a|b", "![x](http://y)", "**bold**", "`code`", "a\nb\n# heading", "\\", "_em_",
    "&lt;", "$x$", "~~s~~", "</script><b>",
    "\\input{/etc/passwd}", "=1+1", "\x1b[31m", "</style>", "<!-- x -->", "${data}", "ä 漢 🎈", "--- ''quoted'' \"\"",
]  # fmt: skip


def table_rows(markdown):
    """Cells of the Markdown tables' bodies that have a rank."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
        if re.match(r"\| +(\d+(-\d+)?|-)? +\|", line)
    ]


def contenders(markdown):
    """The rows that have a rank or could have one: all but that of real images."""
    return [row for row in table_rows(markdown) if row[0]]


def with_contact(text):
    """The rows of leaderboard.json as leaderboard.csv has them."""
    return [{**row, "judges_met": "none"} for row in json.loads(text)]


def pages(*rows, **more):
    return render(Records(list(rows), [], **more))


# -- tables ------------------------------------------------------------------------------------------------------------


def test_rows_are_ranked_and_formatted():
    made = pages(record("worse", 150.0), record("better", 50.0), record("unscored", metrics={}))
    rows = table_rows(made["md"])
    assert [row[:2] for row in rows] == [
        ["1", "better"],
        ["2", "worse"],
        ["-", "unscored"],
        ["", "held-out real images"],
    ]
    assert rows[0] == [
        "1", "better", "jit demo", "pixel", "**50.00 ± 2.50**", "10.00", "none", "-", "3", "99", "187", "1.95",
        "0.00", "2000", "6,900", "20.5", "12.0", "14.2", "0.500", "0.250", "0.750", "0.125", "0.625", "2026-11-22",
    ]  # fmt: skip
    assert rows[2][7] == "not evaluated"
    assert (
        "| fd_embedded ↓" in made["md"]
        and "| sampling (GMACs/image)" in made["md"]
        and "| KID (x1000) ↓" in made["md"]
        and "| IS ↑" in made["md"]
    )
    assert [row["name"] for row in json.loads(made["json"])] == ["worse", "better", "unscored"]
    assert from_csv(made["csv"]) == with_contact(made["json"])


def test_columns_without_content_are_left_out():
    bare = record(metrics={"fd_embedded": metric(1.0)}, pretrained_components=[])
    keys = [column.key for column in columns_of(sections([bare])[0].groups[0])]
    assert "fd_embedded" in keys
    assert not {"kid", "bias_corrected", "borrowed", "decoder", "tried", "sd_seeds"} & set(keys)
    assert "tried" in [
        column.key
        for column in columns_of(
            sections([record(selection={"n_configs": 9, "n_samples": 500, "swept": ["x"]})])[0].groups[0]
        )
    ]


def test_the_floor_is_carried_to_the_number_of_images():
    page = pages(record())["md"]
    assert (
        "500 held-out real images in the place of generated ones reach 200.00 (bias-corrected 100.00 ± 5.00), "
        "which makes 150.00 for 1000 images"
    ) in page
    real = next(row for row in table_rows(page) if row[1] == "held-out real images")
    assert real[0] == "" and "150.00 ± 5.00" in real and "0.738" in real
    assert EMBEDDED_NOTE in page
    bare = record(metrics={"fd_embedded": metric(1.0), "fd_floor": metric(2.0, value_bc=1.0)})
    assert "reach 2.00." in pages(bare)["md"]


def test_each_protocol_has_its_own_table():
    rows = [record("a", 50.0), record("b", 40.0, num_images=2000), record("c", 60.0)]
    made = pages(*rows)
    assert made["md"].count("\n## ") == 2
    assert sorted(tuple(row[:2]) for row in contenders(made["md"])) == [("1", "a"), ("1", "b"), ("2", "c")]
    assert made["tex"].count(r"\begin{tabular}") == 2
    with pytest.raises(ValueError, match="one table, one protocol"):
        section(rows)


def test_guided_rows_stand_apart():
    unguided, guided = pages(record("plain"), record("guided", guidance="cfg"))["md"].split("### Guided")
    assert [row[:2] for row in contenders(unguided)] == [["1", "plain"]]
    assert [row[:2] for row in contenders(guided)] == [["1", "guided"]]


def test_rows_trained_elsewhere_show_what_is_known():
    """Kind `evaluated` has no training, no cost, no guidance: no crash, no claim."""
    keep = ("name", "created_utc", "system", "data", "protocol", "metrics", "notes")
    row = build_record({key: fields()[key] for key in keep} | {"kind": "evaluated"})
    assert heading_of(row) == "Guidance not known"
    assert training_macs(row) is None
    made = pages(row, record("ours"))
    assert "### Guidance not known" in made["md"]
    assert json.loads(made["json"])[0]["kind"] == "evaluated"


def test_the_price_of_earlier_stages_counts():
    parent = parent_stage("tokenizer", "t", "m")
    assert training_macs(record()) == 2 * 10**18
    assert (
        training_macs(record(parents=[{**parent, "macs_total": 10**18}, {**parent, "macs_total": 5 * 10**17}]))
        == 35 * 10**17
    )
    unknown = record(parents=[{**parent, "macs_total": None}])
    assert training_macs(unknown) is None
    assert "| training (PMACs)" not in pages(unknown)["md"]


def test_a_metric_of_open_size_is_printed_to_the_place_of_its_error():
    """Embedded KID times 1000 is in the ten thousands, Inception's below one: no exponents,
    and no digits that the error makes meaningless.
    """
    kid = metric_style("kid")
    assert kid.text(26.6123, 0.499) == "26,610 ± 500" and kid.text(0.000512, 0.00002) == "0.512 ± 0.020"
    assert kid.text(26.6123) == "26,600" and kid.text(0.0) == "0" and kid.text(-0.001, 0.0, sign="+") == "-1.00 ± 0.00"
    assert (
        metric_style("fid").text(2.345, 0.04) == "2.35 ± 0.04" and metric_style("fid").text(2.345, sign="+") == "+2.35"
    )
    row = record(metrics={"fd_embedded": metric(1.0), "kid": metric(26.6123, se=0.499)})
    table = sections([row])[0].groups[0]
    (column,) = (column for column in columns_of(table) if column.key == "kid")
    cell = column.read(table.entries[0])
    assert (cell.text, cell.value, cell.error) == ("26,610 ± 500", pytest.approx(26612.3), pytest.approx(499))


def test_rows_that_were_trained_for_other_costs_are_told():
    """By the whole cost with earlier stages: two runs of as many MACs of their own differ by what
    the stage before one of them took.
    """
    parent = parent_stage("tokenizer", "t", "m")
    alike, staged, unknown = (
        record("a"),
        record("b", parents=[{**parent, "macs_total": 10**18}]),
        record("c", parents=[{**parent, "macs_total": None}]),
    )
    assert budget_notes([alike, record("d")]) == []
    assert budget_notes([alike, staged]) == [
        "Not one cost: training took from 2000 to 3000 PMACs, earlier stages included."
    ]
    assert budget_notes([alike, unknown]) == ["Of 1 of 2 trained rows the whole cost is not known."]
    assert any("Not one cost" in note for note in section([alike, staged]).notes)


def test_networks_that_others_trained_are_named_as_not_counted():
    """Whether the run used them or a run that it is built on; a stage of ours is no network of others."""
    lite0, ours, digest = (
        {"name": "embedded", "role": role, "params": 5, "sha256": sha, "used_at": "both"}
        for role, sha in (("teacher", "ab" * 32), ("tokenizer", "cd" * 32), ("perceptual loss", "ab" * 32))
    )
    parent = {
        "key": "tokenizer",
        "name": "a",
        "method": "vae",
        "row_id": None,
        "checkpoint_sha256": "cd" * 32,
        "images_seen": 9,
        "macs_total": 9,
        "device_seconds": 9,
    }
    direct = record("direct", pretrained_components=[lite0], parents=[])
    through = record("through", pretrained_components=[ours], parents=[parent | {"pretrained_components": [digest]}])
    plain = record("plain", pretrained_components=[ours], parents=[parent])
    assert (
        uncounted_parts(direct) == uncounted_parts(through) == ["EfficientNet-Lite0 on ImageNet"]
        and uncounted_parts(plain) == []
    )
    assert (
        "Not counted, because others trained them: EfficientNet-Lite0 on ImageNet (jit)."
        in section([direct, plain]).notes[-1]
    )
    assert not any("Not counted" in note for note in section([plain]).notes)


def test_the_records_of_the_readme_hold_the_cost_of_the_weights_in_the_package():
    """A record names the stage whose weights it used, with that stage's cost: today's in the package, or an earlier."""
    seen = set()
    for row in read_records(leaderboard.RESULTS, "*.json").rows:
        parents = {parent["key"]: parent for parent in row.get("parents", [])}
        for stage in get_spec(row["system"]["method"]).stages:
            places = {
                part["name"]: part["sha256"]
                for part in row.get("pretrained_components", [])
                if part["role"] == stage.key
            }
            for place in places.keys() & stage.shipped.keys():
                parent, shipped = parents[stage.key], shipped_run(stage, place)
                assert parent["checkpoint_sha256"] == places[place] and parent["macs_total"] > 0, row["name"]
                assert parent["checkpoint_sha256"] != shipped["checkpoint_sha256"] or parent == shipped, row["name"]
                seen.add(row["system"]["method"])
        assert 300 < row["metrics"]["fd_floor"]["n_eff"] < row["metrics"]["fd_floor"]["n"] == 507
    assert seen == {"sit", "repa", "reg"}


def test_the_mark_covers_what_two_standard_errors_do_not_separate():
    cells = [Cell("", 10.0, 1.0), Cell("", 12.0, 1.0), Cell("", 13.0, 1.0), Cell("", 11.0), Cell()]
    # 12 is 2 away, 2 x 1.41 separate; without an error of its own 11 is told apart
    assert best(cells, "lower") == {0, 1}
    assert best(cells, "higher") == {1, 2}
    assert best(cells, None) == set()
    assert best([Cell("", 1.0)], "lower") == set()


def test_the_terminal_shows_one_protocol():
    text = to_terminal(
        Records([record("a\x1b[2J", 50.0), record("b", 40.0, num_images=2000)], []), record()["protocol_hash"]
    )
    assert "a [2J" in text and "\x1b" not in text
    assert " b " not in text
    assert to_terminal(Records([], []), "nothing") == ""


# -- strings are data --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_markdown_shows_strings_and_never_interprets_them(name):
    page = pages(record(name))["md"]
    (row,) = contenders(page)
    assert row[1] == escape(name).strip()
    assert "<" not in page
    shown = re.sub(r"\\(.)", r"\1", row[1]).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert shown == "".join(character if character.isprintable() else " " for character in name).strip()
    unescaped = re.sub(r"\\.", "", row[1])
    assert not re.search(r"[`*\[\]|~$<>\\]", unescaped)


def test_names_stay_readable():
    assert escape("jit_rae-demo.v1 (x) #1") == "jit_rae-demo.v1 (x) #1"


@pytest.mark.parametrize("name", HOSTILE)
def test_latex_prints_strings_and_never_runs_them(name):
    text = to_latex(Records([record(name)], []))
    line = next(line for line in text.splitlines() if line.startswith("1 & "))
    assert line.startswith(f"1 & {latex_escape(name)} & ")
    harmless = re.sub(r"\\(text[a-z]+\{\}|[{}$&#%_]|textbf|pm)", "", latex_escape(name)).replace("-{}", "")
    assert not re.search(r"[\\{}$&#%_^~<>|\"]", harmless)
    assert text.count(r"\begin{") == text.count(r"\end{") == 2


def test_latex_compiles_whatever_the_names_and_fits_the_page(tmp_path):
    if not shutil.which("pdflatex"):
        reason = "LaTeX is not installed: apt-get install -y --no-install-recommends texlive-latex-recommended"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    characters = ["".join(map(chr, range(start, start + 32))) for start in range(0, 256, 32)]
    text = to_latex(
        Records(
            [record(name, 50.0 + i) for i, name in enumerate([*HOSTILE, *characters, "日本 \U0001f388", "x" * 200])], []
        )
    )
    preamble = text.splitlines()[0].removeprefix("% ")
    (tmp_path / "table.tex").write_text(
        f"\\documentclass{{article}}{preamble}\\begin{{document}}\n{text}\\end{{document}}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-draftmode", "table.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout, done.stdout


@pytest.mark.parametrize("name", HOSTILE)
def test_no_spreadsheet_formula_and_no_lost_character_in_csv_and_json(name):
    made = pages(record(name, notes=name))
    assert json.loads(made["json"])[0]["name"] == name
    assert from_csv(made["csv"]) == with_contact(made["json"])
    assert not [cell for row in csv.reader(io.StringIO(made["csv"])) for cell in row if cell[:1] in ("=", "+", "@")]


# -- files -------------------------------------------------------------------------------------------------------------


def test_broken_records_are_named_and_the_rest_renders(tmp_path, capsys):
    good = record("good")
    broken = {
        "empty": "", "cut": json.dumps(good)[:100],
        "unknown": json.dumps({**good, "extra": 1}), "type": json.dumps({**good, "name": 5}),
        "altered": json.dumps({**good, "name": "other"}), "deep": "[" * 100_000, "list": "[]",
        "nan": '{"a": NaN}', "huge": '{"a": ' + "9" * 5000 + "}",
    }  # fmt: skip
    for name, text in {**broken, "good": json.dumps(good), "copy": json.dumps(good), ".hidden": "x"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(text)
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "result.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder" / "result.json").mkdir(parents=True)
    records = read_records(tmp_path)
    assert [row["name"] for row in records.rows] == ["good"]
    assert leaderboard.main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    page, said = (tmp_path / "out" / "leaderboard.md").read_text(), capsys.readouterr()
    for name in (*broken, "binary", "folder"):
        assert sum(str(tmp_path / name / "result.json") in reason for reason in records.left_out) == 1, name
        assert str(tmp_path / name / "result.json") in said.err
        assert escape(str(tmp_path / name)) in page
    assert len(records.left_out) == len(broken) + 2
    assert said.out.split() == [str(tmp_path / "out" / f"leaderboard.{suffix}") for suffix in SUFFIXES]


def test_the_script_runs_alone_and_imports_no_torch(tmp_path):
    (tmp_path / "runs" / "one").mkdir(parents=True)
    write_record(record("one"), tmp_path / "runs" / "one" / "result.json")
    command = [
        sys.executable,
        "-X",
        "importtime",
        str(ROOT / "evaluation" / "leaderboard.py"),
        "--runs",
        str(tmp_path / "runs"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}
    )
    assert "| one" in (tmp_path / "runs" / "leaderboard.md").read_text()
    assert all((tmp_path / "runs" / f"leaderboard.{suffix}").exists() for suffix in SUFFIXES)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "pixlat.evaluation.records.record" in imported
    assert not imported & {"torch", "numpy", "timm", "matplotlib"}


def test_the_same_records_give_the_same_bytes():
    rows = [record("a"), record("b", 70.0), record("c", guidance="cfg")]
    assert pages(*rows) == pages(*rows)


def test_a_missing_folder_is_an_error_without_a_traceback(tmp_path, capsys):
    assert leaderboard.main(["--runs", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_no_module_shadows_a_library():
    """`python evaluation/leaderboard.py` puts evaluation/ on the path."""
    names = {path.stem for path in (ROOT / "evaluation").glob("*.py")}
    assert not names & set(sys.stdlib_module_names)
    assert not names & {
        "torch",
        "numpy",
        "tabulate",
        "jsonschema",
        "common",
        "methods",
        "launch",
        "tqdm",
        "timm",
        "safetensors",
        "PIL",
        "scipy",
    }


def test_ten_thousand_records_render_in_time():
    row = record()
    start = time.process_time()
    for _ in range(500):  # a twentieth of it here
        validate(row)
    rows = [
        {
            **row, "name": f"run {i}", "row_id": f"{i:064x}",
            "checkpoint": {**row["checkpoint"], "sha256": f"{i:064x}"},
            "metrics": {**row["metrics"], "fd_embedded": jackknifed(100.0 + i, range(20), value_bc=90.0 + i)},
        }
        for i in range(500)
    ]  # fmt: skip
    made = pages(*rows)
    assert len(contenders(made["md"])) == 500
    assert time.process_time() - start < 8  # about 1.5 s on an idle core


# -- published rows ----------------------------------------------------------------------------------------------------


def test_published_rows_are_whole_and_never_ranked():
    rows = read_published()
    assert len(rows) > 140
    assert {row["status"] for row in rows} == set(STATUSES)
    page = render(Records([record("ours", metrics={"fid": metric(3.0)})], []), rows)["md"]
    measured, published = page.split("## Published, not measured here")
    assert "JiT-H/16" in published and "JiT-H/16" not in measured and "ours" not in published
    assert not table_rows(published)
    assert "**" not in published
    assert [resolution for resolution, _ in published_tables(rows)] == ["256", "512", "1024"]


@pytest.mark.parametrize(
    ("system", "resolution", "fid"),
    [
        ("JiT-B/16", "256", "3.66"),
        ("pMF-B/32", "512", "3.70"),
        ("DiT-XL/2", "256", "2.27"),
        ("SiT-XL/2 + REG", "256", "1.36"),
        ("EDM2-XXL", "512", "1.91"),
    ],
)
def test_published_numbers_are_as_printed(system, resolution, fid):
    assert fid in [row["fid"] for row in read_published() if (row["system"], row["resolution"]) == (system, resolution)]


def test_published_records_join_the_published_rows():
    source = {
        "title": "A paper",
        "url": None,
        "table": "Table 6",
        "status": "seen-primary",
        "unverified_fields": ["fid"],
    }
    paper = {
        "kind": "published",
        "protocol": None,
        "protocol_hash": "published:a",
        "notes": "n",
        "name": "Theirs",
        "metrics": {"fid": metric(3.66)},
    }
    row = build_record({**paper, **{key: fields()[key] for key in ("system", "data")}, "source": source})
    assert sections([row]) == []
    assert from_record(row)["fid"] == "3.66"
    (line,) = [line for line in pages(row)["md"].splitlines() if "Theirs" in line]
    assert [cell.strip() for cell in line.split("|")][1:-1] == [
        "Theirs",
        "pixel",
        "3.66 ?",
        "A paper",
        "Table 6",
        "seen-primary",
        "n",
    ]


def test_a_broken_published_table_is_named(tmp_path):
    file = tmp_path / "published.csv"
    for text in (
        "system,resolution,source,status\na,256,x,guessed\n",
        "system,resolution,source,status\na,256,x\n",
        "nonsense\n1\n",
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"published\.csv, line 2"):
            read_published(file)
    with pytest.raises(ValueError, match="cannot be read"):
        read_published(tmp_path / "nowhere.csv")


# -- the README's table ------------------------------------------------------------------------------------------------


def readme_command(tmp_path, *flags):
    return leaderboard.main([*flags, "--results", str(tmp_path / "results"), "--readme", str(tmp_path / "README.md")])


def test_the_readme_table_is_written_and_checked(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    write_record(record("demo"), tmp_path / "results" / "demo.json")
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{MARKERS[0]}\nold\n{MARKERS[1]}\n\nafter\n")
    assert readme_command(tmp_path, "--check") == 2
    assert "stale" in capsys.readouterr().err and "old" in readme.read_text()
    assert readme_command(tmp_path, "--update-readme") == 0
    assert readme_command(tmp_path, "--check") == 0
    text = readme.read_text()
    assert text.startswith("# Title\n\n") and text.endswith(f"{MARKERS[1]}\n\nafter\n") and "| demo" in text
    write_record(record("second", 80.0), tmp_path / "results" / "second.json")
    assert readme_command(tmp_path, "--check") == 2


def test_a_readme_without_its_markers_is_refused(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(f"{MARKERS[1]}\n{MARKERS[0]}\n")
    assert readme_command(tmp_path, "--check") == 2
    assert "needs these two lines" in capsys.readouterr().err
    with pytest.raises(ValueError, match="needs these two lines"):
        with_table("no markers", to_readme(Records([], [])))


def test_a_name_cannot_close_the_readme_table():
    table = to_readme(Records([record(f"{MARKERS[1]} `", protocol=protocol())], []))
    assert with_table(f"{MARKERS[0]}{MARKERS[1]}", table) == table
