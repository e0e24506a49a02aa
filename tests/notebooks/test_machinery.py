"""Does the notebook suite turn red when it should? Faults are planted in small notebooks, and the suite is run on them.

The suite itself is copied into an empty project and started there with the options of `make test`, once, over one
notebook for each fault: a fault has to turn its own notebook red and no other.
"""

import base64
import io
import re
import shutil
import subprocess
import sys

import lessons
import nbformat
import numpy as np
import pytest
from lessons import RULES, Lesson, all_lessons, dumps, normalise
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from nbval.plugin import get_sanitize_patterns
from PIL import Image

SUITE = [
    "pyproject.toml",
    "tests/conftest.py",
    "tests/notebooks/lessons.py",
    "tests/notebooks/test_lessons.py",
    "tests/notebooks/nbval.args",
    "tests/notebooks/sanitize.cfg",
]


def code(source: str, stdout: str | None = None, **kwargs):
    outputs = [] if stdout is None else [new_output("stream", name="stdout", text=stdout)]
    return new_code_cell(source, outputs=outputs, **kwargs)


def sound() -> nbformat.NotebookNode:
    """A lesson without a fault, as `make notebooks` would leave it."""
    nb = new_notebook(cells=[new_markdown_cell("# Title\n\nWords.")])
    nb.cells += [code("x = 2"), code("print(x + 1)", "3\n"), code("print(x / 4)", "0.5\n"), code("y = x")]
    return finished(nb)


def finished(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    for count, cell in enumerate((cell for cell in nb.cells if cell.cell_type == "code"), 1):
        cell.execution_count = count
    return normalise(nb)


def wrong_number(nb):
    nb.cells[2].outputs[0].text = "4\n"


def missing_output(nb):
    nb.cells[3].outputs = []


def unexecuted_cell(nb):
    nb.cells[4].execution_count = None


def long_ignored_list(nb):
    for k in (2, 3):  # two of four cells
        nb.cells[k].source = "# NBVAL_IGNORE_OUTPUT\nassert x == 2\n" + nb.cells[k].source
    normalise(nb)


def long_ignored_list_by_tag(nb):
    for k, tag in ((1, "nbval-ignore-output"), (4, "nbval-skip")):
        nb.cells[k].source = "x = 2\nassert x == 2"
        nb.cells[k].metadata["tags"] = [tag]
    normalise(nb)


# fault -> what has to go red: a rule, or a cell that nbval executes
FAULTS = {
    wrong_number: "Cell 1",
    missing_output: "Cell 2",
    unexecuted_cell: "executed_in_order",
    long_ignored_list: "few_unchecked_cells",
    long_ignored_list_by_tag: "few_unchecked_cells",
}


def warns_on_this_machine(nb):
    """stderr that was not there when the notebook was executed: not compared."""
    nb.cells[4].source = "import sys\n\nprint('a warning', file=sys.stderr)"
    normalise(nb)


def other_time_measured(nb):
    """A measured time, evened out by sanitize.cfg."""
    nb.cells[3] = code("print('1.25 ms, 3.1x measured')", "7.5 ms, 2x measured\n")
    finished(nb)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Failed test ids of the suite, run once over all the notebooks below."""
    project = tmp_path_factory.mktemp("project")
    for name in SUITE:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(lessons.ROOT / name, project / name)
    (project / "notebooks" / "solutions").mkdir(parents=True)
    for change in [None, warns_on_this_machine, other_time_measured, *FAULTS]:
        nb = sound()
        if change:
            change(nb)
        name = change.__name__ if change else "solutions/no_fault"
        (project / "notebooks" / f"{name}.ipynb").write_text(dumps(nb), encoding="utf-8")
    options = ["@tests/notebooks/nbval.args", "tests", "notebooks", "-rfE", "--color=no", "-p", "no:cacheprovider"]
    # One process: under `make test` the other core is at work on other tests.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=project, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_fault_turns_the_suite_red(suite, fault):
    assert [line for line in suite if f"{fault.__name__}.ipynb" in line and FAULTS[fault] in line], suite


@pytest.mark.parametrize("change", [None, warns_on_this_machine, other_time_measured])
def test_sound_notebook_is_green(suite, change):
    name = f"{change.__name__ if change else 'solutions/no_fault'}.ipynb"
    assert not [line for line in suite if name in line]


def test_nothing_else_is_red(suite):
    assert len(suite) == len(FAULTS), suite


# --------------------------------------------------------------- the rules one by one, without running anything


def bad(change) -> nbformat.NotebookNode:
    nb = sound()
    change(nb)
    return nb


def in_source(text: str):
    def change(nb):
        nb.cells[4].source = text
        normalise(nb)

    return change


def in_output(text: str, name: str = "stdout"):
    def change(nb):
        nb.cells[4].outputs = [new_output("stream", name=name, text=text)]

    return change


def display(mime: str):
    def change(nb):
        nb.cells[4].outputs = [new_output("display_data", {mime: "x", "text/plain": "x"})]

    return change


def error_output(nb):
    nb.cells[4].outputs = [new_output("error", ename="ValueError", evalue="x", traceback=[])]


def no_title(nb):
    nb.cells.pop(0)


def executed_out_of_order(nb):
    nb.cells[3].execution_count, nb.cells[4].execution_count = 4, 3


def empty_cell(nb):
    nb.cells[4].source = ""
    normalise(nb)


def editor_metadata(nb):
    nb.metadata.kernelspec.name = "my-env"


def time_stamps(nb):
    nb.cells[1].metadata["execution"] = {"iopub.execute_input": "2025-01-01T00:00:00Z"}


def misspelt_tag(nb):
    nb.cells[1].metadata["tags"] = ["nbval-ignore-outputs"]


BROKEN = [
    ("executed_in_order", executed_out_of_order),
    ("executed_in_order", empty_cell),
    ("clean_outputs", in_output("UserWarning: ...", "stderr")),
    ("clean_outputs", in_output("  10%|#         | 1/10 [00:01<00:09]")),
    ("clean_outputs", in_output("step 1\rstep 2")),
    ("clean_outputs", display("image/svg+xml")),
    ("clean_outputs", display("image/jpeg")),
    ("clean_outputs", display("application/javascript")),
    ("clean_outputs", error_output),
    ("no_machine_in_outputs", in_output("<object at 0x7f3a5c0de110>")),
    ("no_machine_in_outputs", in_output("saved to /home/ada/run.json")),
    ("no_machine_in_outputs", in_output(r"saved to C:\Users\ada\run.json")),
    ("no_machine_in_outputs", in_output(f"{lessons.ROOT}")),
    ("self_contained_source", in_source("!pip install x")),
    ("self_contained_source", in_source("%matplotlib widget")),
    ("self_contained_source", in_source("import sys\n\nsys.path.append('..')")),
    ("self_contained_source", in_source("open('/data/corpus/train.txt')")),
    ("self_contained_source", in_source("open('~/train.txt')")),
    ("self_contained_source", in_source("from tqdm.auto import tqdm")),
    ("markers_are_read", in_source("y = x  # NBVAL_IGNORE_OUTPUT")),
    ("markers_are_read", in_source("# NBVAL_IGNORE\ny = x")),
    ("markers_are_read", misspelt_tag),
    ("few_unchecked_cells", in_source("# NBVAL_IGNORE_OUTPUT\ny = x")),  # asserts nothing
    ("short_cells", in_source("\n".join(["y = x"] * 13))),
    ("opens_with_words", no_title),
    ("small_file", in_source("# " + "x" * lessons.MAX_BYTES)),
    ("normalised", editor_metadata),
    ("normalised", time_stamps),
]


@pytest.mark.parametrize(("rule", "change"), BROKEN, ids=[f"{rule}-{k}" for k, (rule, _) in enumerate(BROKEN)])
def test_rule_sees_its_fault(tmp_path, rule, change):
    (tmp_path / "x.ipynb").write_text(dumps(bad(change)), encoding="utf-8")
    assert list(RULES[rule](Lesson(tmp_path / "x.ipynb")))


def test_every_rule_has_a_fault():
    assert set(RULES) == {rule for rule, _ in BROKEN}


@pytest.mark.parametrize(
    "change",
    [
        in_source("# NBVAL_IGNORE_OUTPUT\nassert x == 2"),
        in_source("y = 1 / 2  # / as in 1/2, not a path"),
        in_output("a/b, 1/2, n/m; 50% of https://example.org/tmp/x"),
        display("image/png"),
        display("text/html"),
    ],
)
def test_rules_let_through(tmp_path, change):
    (tmp_path / "x.ipynb").write_text(dumps(bad(change)), encoding="utf-8")
    assert lessons.complaints(tmp_path / "x.ipynb") == []


# ------------------------------------------------------------------------------------------ execute and sanitize


def test_execute_is_repeatable_and_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.ipynb"
    nb = new_notebook(cells=[new_markdown_cell("# Title"), new_code_cell("x=2"), new_code_cell("print( x )\nx")])
    nb.metadata["kernelspec"] = {"name": "nobody-has-this", "display_name": "Other"}
    path.write_text(dumps(nb), encoding="utf-8")
    lessons.execute(path)
    assert lessons.complaints(path) == []
    first = path.read_bytes()
    cells = lessons.read(path).cells
    assert cells[2].source == "print(x)\nx", "formatted by ruff"
    assert [output.output_type for output in cells[2].outputs] == ["stream", "execute_result"]

    lessons.execute(path)
    assert path.read_bytes() == first

    nb.cells[2].source = "1 / 0"
    path.write_text(dumps(nb), encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(lessons.CellExecutionError, match="ZeroDivisionError"):
        lessons.execute(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.ipynb"]


def test_small_pictures():
    """Soft transitions between two colours and nothing: fewer bytes, white for nothing, no pixel far off."""
    wide = np.zeros((60, 200, 4), np.uint8)
    wide[..., 0], wide[..., 2], wide[30:, :, 3] = np.arange(200), 255 - np.arange(200), 255
    file = io.BytesIO()
    Image.fromarray(wide).save(file, "PNG")
    found = base64.b64decode(lessons.small(base64.b64encode(file.getvalue()).decode()))
    with Image.open(io.BytesIO(found)) as image:
        seen = np.asarray(image.convert("RGB")).astype(int)
        assert image.mode == "P"
    assert seen.shape == (60, 200, 3) and (seen[:30] == 255).all()
    assert abs(seen[30:] - wide[30:, :, :3]).max() <= 4


def test_normalise_twice_is_normalise_once():
    nb = sound()
    nb.cells[-1].metadata["jupyter"] = {"outputs_hidden": True, "source_hidden": True, "other": True}
    nb.cells += [code("y = x"), code("y = x")]  # equal sources still get ids of their own
    once = dumps(normalise(nb))
    assert dumps(normalise(nb)) == once
    assert len({cell.id for cell in nb.cells}) == len(nb.cells)
    assert [cell.metadata.jupyter for cell in nb.cells if cell.metadata] == [
        {"outputs_hidden": True, "source_hidden": True}
    ]
    nbformat.validate(nb)


def test_every_sanitize_pattern_is_read():
    text = (lessons.ROOT / "tests/notebooks/sanitize.cfg").read_text(encoding="utf-8")
    patterns = get_sanitize_patterns(text)
    assert len(patterns) == len(re.findall("^regex", text, re.MULTILINE)) == len(re.findall("^replace", text, re.M))
    for regex, replacement in patterns:
        re.sub(regex, replacement, "")


@pytest.mark.parametrize(
    ("text", "evened_out"),
    [
        ("1.25 ms", True),
        ("took 3 s.", True),
        ("12.5 GB/s", True),
        ("3 slots", False),
        ("m = 4, s = 2", False),
        ("r = 1.5x", False),
        ("1.5x measured", True),
        ("v1.2 s", False),
    ],
)
def test_sanitize_touches_measured_times_only(text, evened_out):
    after = text
    for regex, replacement in get_sanitize_patterns(
        (lessons.ROOT / "tests/notebooks/sanitize.cfg").read_text(encoding="utf-8")
    ):
        after = re.sub(regex, replacement, after)
    assert (after != text) == evened_out


def test_one_timeout():
    args = (lessons.ROOT / "tests/notebooks/nbval.args").read_text(encoding="utf-8").split()
    assert f"--nbval-cell-timeout={lessons.CELL_TIMEOUT}" in args


def test_all_lessons_are_those_git_would_ship():
    assert not [path for path in all_lessons() if ".ipynb_checkpoints" in path.parts]
