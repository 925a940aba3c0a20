"""What the site says is so: links lead somewhere, names exist, commands parse, code is run.

The build of the site, which `.ci/run` does, runs every cell and describes every public name.
"""

import pkgutil
import re
import shlex
from pathlib import Path

import pytest

import lowrank_jax
from lowrank_jax.cli.main import build_parser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GENERATED = ("api", "pictures")  # folders that the build writes
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.parent.name not in GENERATED)
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "README.md", "RESULTS.md")]
TEXTS = {path: path.read_text() for path in [*PAGES, *OTHERS]}
TESTED = {  # pages whose Python runs in a test, and not in the build
    "README.md": "test_readme.py",
    "schemes.md": "factorization/test_schemes.py",
    "training.md": "training/test_docs.py",
}
each_page = pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))


def fences(text, language):
    """The blocks of a language, such as "sh" or "{code-cell} python"."""
    return re.findall(rf"^```{re.escape(language)}\n(.*?)^```", text, re.S | re.M)


def prose(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def anchors(text):
    """The anchors of a page's headings, as code hosts and the build make them."""
    heads = re.findall(r"^#+ (.*)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def links():
    found = []
    for page, text in TEXTS.items():
        targets = sorted(set(re.findall(r"\]\(([^)\s]+)\)", prose(text))))
        found += [(page, target) for target in targets if "://" not in target]
    return [pytest.param(*pair, id=f"{pair[0].stem}-{pair[1]}") for pair in found]


def commands():
    blocks = [block for text in TEXTS.values() for block in fences(text, "sh")]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return sorted({line for line in lines if line.startswith("lowrank-jax")})


def listed(page):
    """The pages that the tables of contents of a page name."""
    lines = "".join(fences(TEXTS[page], "{toctree}")).splitlines()
    names = [line for line in lines if line and not line.startswith(":")]
    return [(page.parent / f"{name}.md").resolve() for name in names]


@pytest.mark.parametrize("page, target", links())
def test_a_link_leads_somewhere(page, target):
    file, _, anchor = target.partition("#")
    path = (page.parent / file).resolve() if file else page
    if path.parent.name not in GENERATED:
        assert path.exists()
    if anchor:
        assert anchor in anchors(path.read_text())


def test_every_page_is_in_one_table_of_contents():
    tables = [listed(page) for page in PAGES]
    named = [path for table in tables for path in table if path.parent.name not in GENERATED]
    assert sorted([*named, DOCS / "index.md"]) == PAGES


@each_page
def test_the_names_on_a_page_exist(page):
    for name in sorted(set(re.findall(r"lowrank_jax(?:\.\w+)+", TEXTS[page]))):
        assert pkgutil.resolve_name(name) is not None
    for name in set(re.findall(r"\blr\.(\w+)", TEXTS[page])):
        assert hasattr(lowrank_jax, name)


@pytest.mark.parametrize("name", lowrank_jax.__all__)
def test_a_guide_explains_every_public_name(name):
    guides = " ".join(TEXTS[page] for page in PAGES if page.parent.name != "results")
    assert re.search(rf"\b(lr|lowrank_jax)\.{name}\b|`{name}\b", guides)


@pytest.mark.parametrize("line", commands())
def test_a_command_parses(line):
    command = shlex.split(line, comments=True)
    assert build_parser().parse_args(command[1:]).run


def test_what_contributors_run_is_what_the_checks_run():
    checks = (ROOT / ".ci" / "run").read_text()
    _, *blocks = fences(TEXTS[ROOT / "CONTRIBUTING.md"], "sh")  # the first one sets up
    steps = [step.strip() for block in blocks for step in block.split("&&")]
    assert len(steps) > 3 and all(step.removesuffix(" site") in checks for step in steps)


@each_page
def test_code_on_a_page_is_run(page):
    if page.name in TESTED:
        assert f'"{page.name}"' in (ROOT / "tests" / TESTED[page.name]).read_text()
    else:
        assert not fences(TEXTS[page], "python")


@each_page
def test_a_page_with_cells_says_how_it_runs(page):
    is_notebook = TEXTS[page].startswith("---\nfile_format: mystnb\n")
    assert is_notebook == bool(fences(TEXTS[page], "{code-cell} python"))
