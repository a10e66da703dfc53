"""The laboratory's pages: every command parses, every link leads somewhere, tables are fresh."""

import glob
import importlib

import pytest

from lab import table
from run import HERE
from tests.test_documents import commands, follow_links, parse_commands, text_of

PAGES = sorted(glob.glob("lab/*.md", root_dir=HERE))
RESULTS = sorted(glob.glob("lab/results/*.md", root_dir=HERE))


@pytest.mark.parametrize("page", [*PAGES, *RESULTS, "lab/reproduce.sh"])
def test_commands_parse_and_links_lead_somewhere(page):
    if page.endswith(".sh"):
        modules = [name for name, _ in commands(page)]
        assert len(modules) > 8 and all(map(importlib.import_module, modules))
    else:
        parse_commands(page)
        follow_links(page)


def test_every_script_is_in_a_document():
    named = {name for page in PAGES for name, _ in commands(page)}
    scripts = [path for path in glob.glob("lab/*.py", root_dir=HERE) if "def main" in text_of(path)]
    assert named >= {path[:-3].replace("/", ".") for path in scripts}


# Here, not among the product's tests: an entry of a fork's own must break none of those.
def test_the_front_page_is_short_and_files_are_readable():
    lines = text_of("README.md").split("\n")
    assert len(lines) <= 111 and max(map(len, lines)) <= 100
    for path in glob.glob("*.py", root_dir=HERE) + glob.glob("tools/*.py", root_dir=HERE):
        if not path.startswith("test_"):
            assert text_of(path).count("\n") <= 450, path


def test_the_tables_are_fresh(capsys):
    with pytest.raises(SystemExit) as stop:
        table.main(["--check"])
    assert stop.value.code == 0, capsys.readouterr().out
