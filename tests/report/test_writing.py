"""One record becomes a page, Markdown with pictures, and JSON; none of them needs another file."""

import json
import re
import shlex
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax.cli.main import build_parser
from lowrank_jax.report.drawing import NO_PICTURES
from lowrank_jax.report.next_steps import Setting, after_finetune
from lowrank_jax.report.page import to_html
from lowrank_jax.report.record import Highlight, Report, Section, Table
from lowrank_jax.report.writing import to_markdown, write_report

COMMANDS = ["demo", "plan", "compress", "finetune", "paper"]


class Reader(HTMLParser):
    """Collects the text of a page and the addresses that it names."""

    def __init__(self):
        super().__init__()
        self.text, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_data(self, data):
        self.text.append(data.replace("\u00a0", " "))


def read(page):
    reader = Reader()
    reader.feed(page)
    return reader


@pytest.mark.parametrize("command", COMMANDS)
def test_the_files_of_a_report_are_whole_and_name_no_other_file(reports, folders, command):
    report, folder = reports[command], folders[command]
    pictures = {f"{picture.name}.png" for picture in report.pictures}
    assert pictures and len(pictures) == len(report.pictures)
    others = {"report.html", "report.md", "report.json"}
    assert {path.name for path in folder.iterdir()} == pictures | others
    text = (folder / "report.md").read_text()
    assert set(re.findall(r"\]\((.*?)\)", text)) == pictures
    links = read((folder / "report.html").read_text()).links
    assert len(links) > 2 * len(pictures) and all(link.startswith("data:") for link in links)
    facts = json.loads((folder / "report.json").read_text())
    assert facts["summary"] == report.summary and facts.keys() > report.facts.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_page_and_markdown_say_the_same(reports, command):
    report = reports[command]
    page, text = " ".join(read(to_html(report, {})).text), to_markdown(report, {})
    for section in report.sections:
        parts = [section.title, *section.text.split("\n\n"), section.code]
        cells = [cell for row in section.table.rows for cell in row] if section.table else []
        assert all(part in page and part in text for part in [*parts, *cells])


def test_a_report_is_the_same_bytes_each_time(reports, folders, tmp_path):
    write_report(tmp_path, reports["paper"])
    first = {path.name: path.read_bytes() for path in folders["paper"].iterdir()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_without_matplotlib_there_is_one_sentence_in_place_of_the_pictures(
    reports, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_report(tmp_path, reports["compress"])
    names = ["report.html", "report.json", "report.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "report.md").read_text().count(NO_PICTURES) == 1
    assert "lowrank-jax[demo]" in "".join(read((tmp_path / "report.html").read_text()).text)


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1)


@given(TEXT, TEXT, TEXT)
def test_any_text_stands_in_the_page_as_it_is(name, value, code):
    section = Section(title=name, text=value, table=Table(rows=[(name,), (value,)]), code=code)
    highlight = Highlight(label=name, value=value, note=code)
    report = Report(
        title=name, summary=value, machine=code, highlights=[highlight], sections=[section]
    )
    assert {name, value, code} <= set(read(to_html(report, {})).text)


@pytest.mark.parametrize("command, following", [("plan", "compress"), ("compress", "finetune")])
def test_the_next_command_is_one_that_the_parser_takes(reports, command, following):
    codes = [section.code for section in reports[command].sections if section.code]
    name, *given = shlex.split(codes[0])
    args = build_parser().parse_args(given)
    assert name == "lowrank-jax" and args.command == following
    assert args.model == "nets:ResNet" and args.model_kwargs == {"train": False}


def test_a_module_of_nnx_runs_by_its_own_verbs():
    setting = Setting(
        checkpoint="a.npz", options=[], imports="from m import N", apply="", model="N()"
    )
    code = after_finetune(setting, Path("w.npz"))[0].code
    assert "lr.nnx.rebuilt(N(), lr.load_weights('w.npz'))" in code
    compile(code, "next_step", "exec")


@pytest.mark.parametrize("command", ["compress", "finetune"])
def test_the_python_of_the_next_step_is_python(reports, command):
    code = reports[command].sections[-1].code
    assert "lr.fast(ResNet().apply, small, images, train=False)" in code
    compile(code, "next_step", "exec")
