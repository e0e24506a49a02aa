"""What README.md says is so: its examples run, its links lead somewhere, the names in its tables exist."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest
import tyro

import vwn_ref
from vwn_ref.experiments.readme import PARTS, rewritten

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
FIGURES = (ROOT / "figures" / "README.md").read_text(encoding="utf-8")


def test_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(blocks) == 2
    scope: dict = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
        expected = re.search(r"print\(.*\)  # (.*)", block).group(1)
        assert capsys.readouterr().out.strip() == expected


def test_commands_parse():
    """Every training command line in README is one that the program takes."""
    from vwn_ref.experiments.train import parse

    text = (TEXT + FIGURES).replace("\\\n", " ").replace("$s", "0")  # lines joined, the loop's variable filled in
    lines = re.findall(r"-m vwn_ref\.experiments\.train ([^#\n;]*)", text)
    assert len(lines) >= 4
    for line in lines:
        assert parse(line.split()).steps > 0


COMMANDS = {
    "compare": "CompareConfig", "downstream": "DownstreamArguments", "parts": "PartsConfig",
    "scaling": "ScalingConfig", "step_times": "StepTimesConfig", "sweep": "SweepArguments",
    "windows": "WindowsConfig",
}  # fmt: skip


def test_other_commands_parse():
    """So are those of the other programs, and the files and kept folders that they name are there."""
    found = re.findall(r"-m vwn_ref\.experiments\.(\w+) ([^#\n;`|]+)", TEXT + FIGURES)
    found = [(name, arguments.split()) for name, arguments in found if name in COMMANDS]
    assert {name for name, _ in found} == set(COMMANDS)
    for name, arguments in found:
        module = importlib.import_module(f"vwn_ref.experiments.{name}")
        assert tyro.cli(getattr(module, COMMANDS[name]), args=arguments) is not None
        for path in arguments:
            assert not path.startswith(("figures/", "vwn_ref/")) or (ROOT / path).exists(), path


@pytest.mark.parametrize("page", ["README.md", "notebooks/paper_notes.md", "figures/README.md"])
def test_links_lead_to_files(page):
    path = ROOT / page
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    for link in links:
        if not link.startswith("http"):
            assert (path.parent / link).exists(), link


def test_names_in_the_equation_table_exist():
    rows = [row.split("|") for row in TEXT.split("## From equation to code")[1].split("\n## ")[0].splitlines()]
    rows = [row for row in rows if len(row) == 5 and "`" in row[3]]
    assert len(rows) >= 10
    for *_, where, _ in rows:
        file, *names = re.findall(r"`([^`]+)`", where)
        module = importlib.import_module(f"vwn_ref.{Path(file).stem}")
        for name in names:
            assert hasattr(module, name.split("(")[0]), (file, name)


def test_results_are_those_of_the_kept_data():
    """What stands between the comment lines is what `make figures` writes there."""
    assert rewritten("README.md", TEXT) == TEXT
    assert rewritten("figures/README.md", FIGURES) == FIGURES


def test_estimates_in_prose_stand_in_the_tables_too():
    """Prose is written by hand, so each "−0.076 ± 0.017" in it must be a number that the generated parts have."""
    written, prose = "", TEXT + FIGURES
    for name in PARTS:
        part = re.search(rf"<!-- {name}: begin.*?<!-- {name}: end -->", prose, re.S).group()
        written, prose = written + part, prose.replace(part, "")
    number = re.compile(r"[−+-]?\d+\.\d+ ± \d+\.\d+")
    known, said = (set(number.findall(text.replace("\u00a0", " "))) for text in (written, prose))
    assert len(said) > 20 and not said - known, said - known


def test_one_version_everywhere():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    cited = re.search(r"version = \{(.*)\}", TEXT).group(1)
    assert declared == cited == vwn_ref.__version__
