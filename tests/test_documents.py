"""The documents: every command parses, every link leads somewhere; the product stands alone."""

import ast
import glob
import importlib
import os
import re
import shlex

import pytest

from run import HERE
from tools import memory

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(glob.glob("docs/*.md", root_dir=HERE))]
COMMAND = re.compile(
    r"(?:\bpython|torchrun --nproc-per-node \d+) "
    r"(?:-m ((?:tools|lab)\.\w+)|(\w+)\.py)([^\n&|#`;<>]*)"
)


def text_of(page):
    with open(os.path.join(HERE, page)) as stream:
        return stream.read()


def commands(page):
    """(module, arguments) of each command of ours on a page, in code blocks or in a line."""
    for module, script, line in COMMAND.findall(text_of(page).replace("\\\n", " ")):
        yield module or script, shlex.split(line)


def parse_commands(page):
    for name, argv in commands(page):
        if name == "verify" or "--help" in argv:
            continue
        if page == "docs/forking.md":
            continue  # those need their diffs: test_forking.py
        importlib.import_module(name).parse_args(argv)


def follow_links(page):
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        path = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        assert os.path.exists(os.path.join(HERE, path)), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", text_of(path), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, target


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse_and_links_lead_somewhere(page):
    parse_commands(page)
    follow_links(page)


def test_every_script_and_tool_is_in_a_document():
    named = {name for page in PAGES for name, _ in commands(page)}
    tools = {path for path in glob.glob("tools/*.py", root_dir=HERE) if "def main" in text_of(path)}
    tools = {path[:-3].replace("/", ".") for path in tools}
    assert named >= tools | {"opsd", "rlvr", "sft", "eval", "verify"}


def test_the_product_does_not_know_the_laboratory():
    """Pages that lead there aside: README.md, CONTRIBUTING.md, docs/findings.md."""
    files = sum((glob.glob(f"{f}*.py", root_dir=HERE) for f in ("", "tools/", "tests/")), [])
    files += glob.glob("docs/*.md", root_dir=HERE) + ["tools/gpu_check.sh", "tools/show.html"]
    files = set(files) - {"tests/test_documents.py", "docs/findings.md"}
    for path in files:
        assert not re.search(r"\blab/|\b(import|from|-m) lab\b", text_of(path)), path


def test_the_memory_table_is_fresh():
    made = text_of("docs/gpus.md").split("<!-- memory -->\n")[1].split("\n<!-- end -->")[0]
    assert made == memory.table(), "python -m tools.memory"


@pytest.mark.parametrize("page", PAGES)
def test_snippets_import_what_is_there(page):
    for snippet in re.findall(r"python - <<'END'[^\n]*\n(.*?)\nEND\n", text_of(page), re.DOTALL):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and os.path.exists(f"{HERE}/{node.module}.py"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names), node.module
