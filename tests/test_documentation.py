"""What README, docs and examples say: their code runs, their commands and links are there, and nothing is left out."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import yaml
from conftest import ROOT
from documents import (
    DOCS,
    EXAMPLES,
    PAGES,
    SMALLER,
    Wrong,
    blocks_of,
    check_command,
    check_commands,
    check_links,
    name_of,
    run_example,
    run_page,
)

from kdkernels.backend import EXPLAINERS

for package in ("transformers", "accelerate", "peft", "safetensors"):
    pytest.importorskip(package)

pytestmark = pytest.mark.filterwarnings("ignore")  # of other packages, about themselves
WITH_CODE = [page for page in PAGES if blocks_of(page, "python")]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder for what is written there, and the same numbers on every run."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_of_a_page_runs(page, elsewhere):
    run_page(page)


@pytest.mark.parametrize("path", EXAMPLES, ids=name_of)
def test_example_runs_and_says_what_it_showed(path, elsewhere, capsys):
    run_example(path)
    assert capsys.readouterr().out.strip()
    assert not list(elsewhere.iterdir())  # it leaves nothing behind


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_a_page_can_be_given_and_its_links_lead_somewhere(page):
    check_commands(page)
    check_links(page)


def test_commands_are_found():
    assert check_commands(ROOT / "README.md") > 15
    assert check_commands(ROOT / "docs" / "command-line.md") > 10


def test_sizes_that_are_made_smaller_are_there():
    for name, sizes in SMALLER.items():
        code = "".join(block.text for block in blocks_of(ROOT / name, "python"))
        assert all(large in code for large in sizes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text\n\n```python\nx = 1\n```\n\n```python\n\nx.y\n```\n", "page.md:9: AttributeError"),
        ("```python\nx = = 1\n```\n", "page.md:2: SyntaxError"),
        ('``` { .python }\n--8<-- "examples/none.py"\n```\n', "page.md:2: there is no examples/none.py"),
    ],
)
def test_code_that_fails_is_named_by_page_and_line(text, message, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(Wrong, match=re.escape(message)):
        run_page(page)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n```sh\nmake test\npython -m kdkernels validte\n```\n", "page.md:4: .*invalid choice: 'validte'"),
        ("say `python -m kdtrainer digits --stepz 3` here", "page.md:1: .*unrecognized arguments: --stepz"),
        ("```sh\npython -m kdtrainer compress --states none\n```\n", "page.md:2: .*--states"),
        ("```sh\nmake none  # no such target\n```\n", "page.md:2: .*the Makefile has no none"),
        ("```sh\npython examples/none.py\n```\n", "page.md:2: .*there is no examples/none.py"),
        ("```sh\npip install .[none]\n```\n", "page.md:2: .*there is no extra none"),
        ("```sh\nrm -rf /\n```\n", "page.md:2: .*nothing here knows this command"),
    ],
)
def test_a_command_that_cannot_be_given_is_named_by_page_and_line(text, message, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(Wrong, match=message):
        check_commands(page)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a](none.md)", "page.md:1: there is no none.md"),
        ("# A heading\n\n[a](#a-heading) [b](#another)", "page.md:3: the page has no heading #another"),
    ],
)
def test_a_link_that_leads_nowhere_is_named_by_page_and_line(text, message, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(Wrong, match=message):
        check_links(page)


def test_every_operator_has_a_page():
    text = "".join(page.read_text() for page in (ROOT / "docs" / "operators").glob("*.md"))
    assert not [name for name in EXPLAINERS if not re.search(rf"\b{name}\b", text)]
    for page in (ROOT / "docs" / "operators").glob("*.md"):
        for heading in ("## Shapes and dtypes", "## Costs", "## When it wins and when it loses"):
            assert heading in page.read_text(), name_of(page)


def test_every_example_is_shown():
    shown = (ROOT / "docs" / "examples.md").read_text()
    assert not [path for path in EXAMPLES if f'--8<-- "{name_of(path)}"' not in shown]


def test_every_environment_variable_is_documented_and_nothing_else():
    sources = [ROOT / "setup.py", ROOT / "CMakeLists.txt", *(ROOT / "kdkernels").rglob("*.py")]
    sources += (ROOT / "csrc").rglob("*.cpp")
    read = {name for path in sources for name in re.findall(r"\bKDKERNELS_[A-Z]+\b", path.read_text())}
    told = set(re.findall(r"\bKDKERNELS_[A-Z]+\b", (ROOT / "docs" / "installation.md").read_text()))
    assert told == read


@pytest.mark.skipif(not (find_spec("mkdocs") and find_spec("material")), reason="needs mkdocs-material")
def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for page in DOCS:
        assert (tmp_path / page.relative_to(ROOT / "docs").with_suffix(".html")).exists()
    assert "get_peft_model" in (tmp_path / "examples.html").read_text()  # the script, not its name


def test_the_workflow_gives_commands_that_there_are():
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    given = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    made = [line for run in given for line in run.splitlines() if line.startswith("make ")]
    assert {"make lint", "make test", "make docs"} <= set(made)
    for line in made:
        check_command(line.split())


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="needs actionlint")
def test_the_workflow_passes_actionlint():
    done = subprocess.run(["actionlint", str(WORKFLOW)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
