"""Execute the lessons, and check the rules that every lesson keeps.

    python tests/notebooks/lessons.py execute notebooks/02_*.ipynb    # what `make notebooks` runs
    python tests/notebooks/lessons.py check notebooks/02_*.ipynb      # the rules alone, no execution

`execute` formats the source with ruff, runs every cell in a fresh kernel of this environment, normalises the
metadata, makes the pictures small and replaces the file; when a cell fails the file stays as it was. nbval then
compares what a second run prints with what is stored. The rules here are about what nbval does not look at: it passes
a cell that was never executed, ignores what a marker tells it to ignore, and does not mind how a notebook reads.
"""

import argparse
import ast
import base64
import glob
import hashlib
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# One thread a kernel, as under test: sums are then taken in the same order, and two notebooks fit on two cores.
# Set before anything can load OpenMP; kernels inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Jupyter's default event loop on Windows has no add_reader, of which zmq warns at length.
if sys.platform == "win32":
    import asyncio

    asyncio.set_event_loop_policy(asyncio.WindowsSelectorEventLoopPolicy())

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbval.kernel import CURRENT_ENV_KERNEL_NAME, NbvalKernelspecManager
from nbval.plugin import comment_markers, find_comment_markers, find_metadata_tags
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"

CELL_TIMEOUT = 300  # seconds; the same number stands in nbval.args
MAX_UNCHECKED = 0.30  # share of code cells whose output nbval may be told not to compare
SHORT_LINES, SHORT_SHARE = 12, 0.80  # at least this share of code cells have at most this many lines
MAX_BYTES = 500_000  # of the file: pictures are stored in it
MIME_TYPES = {"text/plain", "text/html", "text/markdown", "text/latex", "image/png"}


def all_lessons() -> list[Path]:
    return sorted(NOTEBOOKS.glob("*.ipynb")) + sorted(NOTEBOOKS.glob("solutions/*.ipynb"))


# ------------------------------------------------------------------------------------------------- executing


def normalise(nb: NotebookNode) -> NotebookNode:
    """Leave in `nb` only what does not depend on who ran it, when and with which editor. Changes `nb`."""
    nb.nbformat, nb.nbformat_minor = 4, 5
    nb.metadata = NotebookNode(
        kernelspec=NotebookNode(name="python3", display_name="Python 3 (ipykernel)", language="python"),
        language_info=NotebookNode(name="python", file_extension=".py", mimetype="text/x-python"),
    )
    seen: dict[str, int] = {}
    for cell in nb.cells:
        # An id from the source: the same for everyone, and editing one cell leaves the ids of the others alone.
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        # Tags steer nbval, these two fold a solution and an answer; anything else is an editor's or a clock's.
        kept = {}
        if tags := cell.metadata.get("tags"):
            kept["tags"] = sorted(tags)
        folded = cell.metadata.get("jupyter", {})
        if folded := {key: True for key in ("outputs_hidden", "source_hidden") if folded.get(key)}:
            kept["jupyter"] = folded
        cell.metadata = nbformat.from_dict(kept)
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = NotebookNode()
    return nb


def dumps(nb: NotebookNode) -> str:
    return nbformat.writes(nb, version=nbformat.NO_CONVERT).rstrip("\n") + "\n"


def read(path: Path) -> NotebookNode:
    return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)


def formatted(path: Path) -> NotebookNode:
    """The notebook in `path` with its code cells as `make lint` wants them."""
    text = dumps(normalise(read(path)))  # ruff leaves a notebook alone whose metadata does not say Python
    ruff = [sys.executable, "-m", "ruff", "format", "--quiet", "--stdin-filename", str(path), "-"]
    done = subprocess.run(ruff, input=text, capture_output=True, encoding="utf-8", cwd=ROOT)
    # What ruff cannot parse is executed as it is, so that Python says what is wrong and in which cell.
    return nbformat.reads(done.stdout if done.returncode == 0 and done.stdout else text, as_version=4)


def small(picture: str) -> str:
    """A base64 PNG on white, with 256 colours at most: a third of the bytes, and a plot looks the same."""
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        drawn = image.convert("RGBA")
    white = Image.new("RGBA", drawn.size, "white")
    file = io.BytesIO()
    Image.alpha_composite(white, drawn).convert("RGB").quantize(256).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def execute(path: Path) -> float:
    """Run the notebook from top to bottom and replace its file, or raise and leave the file alone. Returns seconds."""
    nb = formatted(path)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        nb,
        timeout=CELL_TIMEOUT,
        # The kernel of this interpreter, whatever kernel called "python3" the user's home may hold: as in the tests.
        kernel_name=CURRENT_ENV_KERNEL_NAME,
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.create_kernel_manager()
    client.km.kernel_spec_manager = NbvalKernelspecManager()
    start = time.perf_counter()
    client.execute(stderr=subprocess.DEVNULL)  # the kernel's own log; what a cell writes there is stored all the same
    seconds = time.perf_counter() - start
    for output in (output for cell in nb.cells for output in cell.get("outputs", [])):
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = small(output.data["image/png"])
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(dumps(normalise(nb)), encoding="utf-8", newline="\n")
    os.replace(temporary, path)  # whole or not at all
    return seconds


# ------------------------------------------------------------------------------------------------- the rules


class Lesson:
    """A notebook as the rules look at it."""

    def __init__(self, path: Path):
        self.path = path
        self.text = path.read_text(encoding="utf-8")
        self.nb = nbformat.reads(self.text, as_version=4)
        self.code = [cell for cell in self.nb.cells if cell.cell_type == "code"]

    def outputs(self) -> Iterator[tuple[int, NotebookNode]]:
        for k, cell in enumerate(self.code, 1):
            for output in cell.outputs:
                yield k, output

    def printed(self) -> Iterator[tuple[int, str]]:
        for k, output in self.outputs():
            if "text" in output:
                yield k, output.text
            for mime, data in output.get("data", {}).items():
                if mime.startswith("text/"):
                    yield k, data


Complaints = Iterator[str]
RULES: dict[str, Callable[[Lesson], Complaints]] = {}


def rule(function: Callable[[Lesson], Complaints]):
    RULES[function.__name__] = function
    return function


def options_of(cell: NotebookNode) -> dict[str, bool]:
    """What nbval is told about this cell, by a tag or by a comment: read with nbval's own functions."""
    return dict(find_metadata_tags(cell.metadata)) | dict(find_comment_markers(cell.source))


def is_unchecked(cell: NotebookNode) -> bool:
    options = options_of(cell)
    return bool(options.get("skip") or options.get("check_exception") or options.get("check") is False)


@rule
def executed_in_order(lesson: Lesson) -> Complaints:
    """Every code cell was executed, once, from top to bottom: nbval passes a cell without a count unseen."""
    for k, cell in enumerate(lesson.code, 1):
        if not cell.source.strip():
            yield f"code cell {k} is empty"
        elif cell.execution_count != k:
            yield f"code cell {k} has execution count {cell.execution_count}, not {k}"


@rule
def clean_outputs(lesson: Lesson) -> Complaints:
    """No error, no stderr, no progress bar; pictures are PNG."""
    for k, output in lesson.outputs():
        if output.output_type == "error":
            yield f"code cell {k} stored an error: {output.ename}: {output.evalue}"
        elif output.output_type == "stream" and output.name != "stdout":
            yield f"code cell {k} stored {output.name}: {output.text[:80]!r}"
        for mime in sorted(set(output.get("data", {})) - MIME_TYPES):
            yield f"code cell {k} stored {mime}; allowed are {', '.join(sorted(MIME_TYPES))}"
    for k, text in lesson.printed():
        if "\r" in text or re.search(r"\d+%\|", text):
            yield f"code cell {k} stored a progress bar"


@rule
def no_machine_in_outputs(lesson: Lesson) -> Complaints:
    """Nothing that differs from one machine or one run to the next: addresses in memory, absolute paths."""
    here = {str(ROOT), str(Path.home()), sys.prefix} - {"/"}
    path = re.compile(r"(?<![\w.~:/])/(?:home|root|Users|tmp|var|opt|usr|mnt|private)/\S+|\b[A-Z]:\\\\?\w\S*")
    for k, text in lesson.printed():
        if found := re.search(r"\b0x[0-9a-fA-F]{6,}", text):
            yield f"code cell {k} stored a memory address: {found.group()}"
        if found := path.search(text):
            yield f"code cell {k} stored an absolute path: {found.group()}"
        elif any(prefix in text for prefix in here):
            yield f"code cell {k} stored a path of this machine"


@rule
def self_contained_source(lesson: Lesson) -> Complaints:
    """Code cells are plain Python that finds `vwn_ref` where it is installed: no magics, no paths of a machine."""
    for k, cell in enumerate(lesson.code, 1):
        try:
            tree = ast.parse(cell.source)
        except SyntaxError:
            yield f"code cell {k} is not plain Python (magics and ! commands are not used in the lessons)"
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path":
                yield f"code cell {k} changes sys.path"
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if re.match(r"/(?:\w+/)+\w|[A-Za-z]:\\\w|~/", text):
                yield f"code cell {k} holds an absolute path: {text!r}"
            names = [a.name for a in getattr(node, "names", [])] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.split(".")[0] in {"requests", "urllib", "datasets", "tqdm"}:
                    yield f"code cell {k} imports {name}: a lesson runs offline and without progress bars"


@rule
def markers_are_read(lesson: Lesson) -> Complaints:
    """A marker that nbval would not recognise (end of a line of code, misspelt) is worse than none."""
    for k, cell in enumerate(lesson.code, 1):
        for line in cell.source.splitlines():
            if "NBVAL" in line and line.strip().lstrip("#").strip() not in comment_markers:
                yield f"code cell {k}: not a marker on a line of its own: {line.strip()!r}"
        for tag in cell.metadata.get("tags", []):
            if tag.startswith("nbval") and not dict(find_metadata_tags({"tags": [tag]})):
                yield f"code cell {k}: nbval knows no tag {tag!r}"


@rule
def few_unchecked_cells(lesson: Lesson) -> Complaints:
    """At most 30 % of the code cells may ask not to be compared, and whoever asks asserts something instead."""
    unchecked = [k for k, cell in enumerate(lesson.code, 1) if is_unchecked(cell)]
    if len(unchecked) > MAX_UNCHECKED * len(lesson.code):
        yield f"{len(unchecked)} of {len(lesson.code)} code cells are not compared: cells {unchecked}"
    for k in unchecked:
        source = lesson.code[k - 1].source
        if not re.search(r"^\s*assert\b|\bassert_\w+\(", source, re.MULTILINE):
            yield f"code cell {k} is not compared and asserts nothing"


@rule
def short_cells(lesson: Lesson) -> Complaints:
    """A cell fits on a screen together with its output and the words about it."""
    long = [k for k, cell in enumerate(lesson.code, 1) if len(cell.source.splitlines()) > SHORT_LINES]
    if len(long) > (1 - SHORT_SHARE) * len(lesson.code):
        yield f"{len(long)} of {len(lesson.code)} code cells are longer than {SHORT_LINES} lines: cells {long}"


@rule
def opens_with_words(lesson: Lesson) -> Complaints:
    """The first cell is the lesson's title and what the lesson is about."""
    cells = lesson.nb.cells
    if not cells or cells[0].cell_type != "markdown" or not cells[0].source.startswith("# "):
        yield "the first cell is not Markdown that starts with '# '"


@rule
def small_file(lesson: Lesson) -> Complaints:
    """A clone stays small, and a diff readable."""
    if (size := len(lesson.text.encode())) > MAX_BYTES:
        yield f"the file has {size:,} bytes, more than {MAX_BYTES:,}: smaller or fewer pictures"


@rule
def normalised(lesson: Lesson) -> Complaints:
    """The file is what `make notebooks` writes: no editor's or clock's metadata, one kernel name, stable ids."""
    if dumps(normalise(nbformat.from_dict(lesson.nb))) != lesson.text:
        yield "the file is not as `make notebooks` writes it; run `make notebooks NB=...` on it"


def complaints(path: Path) -> list[str]:
    lesson = Lesson(path)
    return [f"{name}: {complaint}" for name, check in RULES.items() for complaint in check(lesson)]


# ------------------------------------------------------------------------------------------------ the command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["execute", "check"])
    parser.add_argument("notebooks", nargs="*", help="files or patterns; all lessons when none is given")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="how many notebooks run at a time")
    args = parser.parse_args()
    # Patterns are expanded here as well: not every shell does it.
    paths = [Path(f) for p in args.notebooks for f in (sorted(glob.glob(p)) or [p])] or all_lessons()

    def act(path: Path) -> tuple[str, list[str]]:
        note = ""
        if args.action == "execute":
            try:
                note = f"{execute(path):6.1f} s  "
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
                return "  failed  ", [str(error), "the file was left as it was"]
        return note, complaints(path)

    failed = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for path, (note, found) in zip(paths, pool.map(act, paths), strict=True):
            print(f"{note}{path}", *found, sep="\n    ", flush=True)
            failed += bool(found)
    print(f"{len(paths)} notebooks, {failed} with complaints")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
