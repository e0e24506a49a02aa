"""Sweeps: what a file may say, and what happens to runs that are there, fail, are killed or are somebody else's."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from vwn_ref import VWNTransformer
from vwn_ref.cost import add, model_flops, model_parameters
from vwn_ref.experiments import sweep as module
from vwn_ref.experiments.checkpoint import load, save
from vwn_ref.experiments.compare import paired
from vwn_ref.experiments.finished import load_runs
from vwn_ref.experiments.run import fixed_fields
from vwn_ref.experiments.sweep import SweepArguments, check_folders, execute, kept_runs, read_sweep, shard, table
from vwn_ref.experiments.train import TrainConfig, load_run, train

STUDIES = sorted((Path(module.__file__).parent / "studies").glob("*.toml"))

FILE = """
seeds = [0, 1]
out = "runs/small"
[base]
steps = 60
batch_size = 4
seq_len = 16
warmup = 5
lr = 0.01
val_tokens = 300
val_interval = 20
log_interval = 1
checkpoint_interval = 10
device = "cpu"
data.files = ["{text}"]
data.vocab_size = 280
model.dim = 16
model.n_layers = 1
model.n_heads = 2
model.mtp_layers = 1
[variants.plain]
[variants."r1.5"]
model = {{ m = 2, n = 3, dynamic = false }}
"""


@pytest.fixture(scope="module")
def text(text_folder):
    return FILE.format(text=text_folder)


@pytest.fixture
def write(tmp_path, text):
    """write((old, new), …) -> a sweep's file with these replacements."""

    def make(*replacements):
        content = text
        for old, new in replacements:
            assert content.count(old) == 1
            content = content.replace(old, new)
        (tmp_path / "small.toml").write_text(content)
        return tmp_path / "small.toml"

    return make


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A sweep of four runs that nothing disturbed, one after the other: its file, and the folder of its runs."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "small.toml").write_text(text)
    for run in read_sweep(folder / "small.toml", folder / "runs").runs:
        train(run.config)
    return folder / "small.toml", folder / "runs"


@pytest.fixture
def copied(finished, tmp_path):
    """The same, free to be changed."""
    shutil.copytree(finished[1], tmp_path / "runs")
    return finished[0], tmp_path / "runs"


@pytest.fixture
def launch(processes, tmp_path):
    """launch(FILE, options) -> a process, the first of its own group, that runs the command; and its stderr's file."""
    started = []

    def start(*arguments):
        said = tmp_path / f"stderr{len(started)}"
        code = "import os, sys; os.setsid(); os.dup2(os.open({!r}, os.O_CREAT | os.O_WRONLY), 2); "
        code += "sys.argv = ['sweep', *{!r}]; from vwn_ref.experiments.sweep import main; main()"
        process = processes.Process(target=exec, args=(code.format(str(said), [str(a) for a in arguments]), {}))
        process.start()
        started.append(process)
        return process, said

    yield start
    for process in started:
        process.kill()
        process.join()


def lines(folder):
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*/log.jsonl"))


def wait_until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def logs(folder):
    return {path.parent.name: path.read_bytes() for path in folder.glob("*/log.jsonl")}


# ------------------------------------------------------------------------------------------------------ plans


def test_names_order_and_configs(write):
    file = write(("[variants.plain]", "[grid]\nlr = [0.01, 1]\ndata.split_seed = [3]\n[variants.plain]"))
    sweep = read_sweep(file)
    assert sweep.out == Path("runs/small")
    points = ("-lr0.01-split_seed3", "-lr1-split_seed3")
    names = [f"{variant}{point}-s{seed}" for seed in (0, 1) for point in points for variant in ("plain", "r1.5")]
    assert [run.name for run in sweep.runs] == names  # whole seeds first
    run = sweep.runs[3]
    assert (run.variant, run.base) == ("r1.5-lr1-split_seed3", "plain-lr1-split_seed3")  # paired within its point
    config = run.config
    assert type(config) is TrainConfig and type(config.lr) is float and config.lr == 1.0
    assert (config.seed, config.threads, config.data.split_seed, config.out) == (0, 1, 3, f"runs/small/{run.name}")
    assert (config.model.m, config.model.n, config.model.dim, config.model.vocab_size) == (2, 3, 16, 280)
    assert (config.resume, config.progress) == (True, False)
    assert read_sweep(file, "elsewhere").runs[0].folder == Path("elsewhere") / names[0]


@pytest.mark.parametrize("k", [1, 2, 3, 7, 20])
def test_shards_are_an_exact_partition(write, k):
    runs = read_sweep(write(("seeds = [0, 1]", f"seeds = {list(range(5))}"))).runs
    parts = [shard(runs, f"{i}/{k}") for i in range(1, k + 1)]
    assert sorted(run.name for part in parts for run in part) == sorted(run.name for run in runs)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3"])
def test_bad_shards(part):
    with pytest.raises(ValueError, match=re.escape(f"shard = '{part}': must be i/k with 1 ≤ i ≤ k")):
        shard([], part)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr = 0.01", "rl = 0.01", "base.rl: no such field; must be one of steps, batch_size, "),
        ("model.dim", "model.width", "base.model.width: no such field; must be one of model.dim, "),
        ("model.dim", "mdl.dim", "base.mdl.dim: no such field; must be one of steps, "),
        ("model = {{", "dats = {{", "variants.r1.5.dats.m: no such field"),
        ("lr = 0.01", 'lr = "high"', "base.lr = 'high': must be float"),
        ("lr = 0.01", "lr = true", "base.lr = True: must be float"),
        ("steps = 60", "steps = 60.0", "base.steps = 60.0: must be int"),
        ("model.dim = 16", 'embed = 1\nmodel.m = "four"', "base.embed: no such field"),
        ("model.dim = 16", 'model.m = "four"', "base.model.m = 'four': must be int | None"),
        ("model.dim = 16", 'schedule = "step"', "base.schedule = 'step': must be Literal['cosine', 'linear', "),
        ('device = "cpu"', "compile = 1", "base.compile = 1: must be bool"),
        ("data.files = [", "data.files = [3, ", "base.data.files = [3, "),
        ("steps = 60", "steps = 0", "run plain-s0: steps = 0: must be an integer ≥ 1"),
        ("m = 2,", "m = 3,", "run r1.5-s0: m = 3: must divide dim = 16"),
        ("steps = 60", "seed = 3", "base.seed: must be left out, seeds gives it"),
        ("model.dim", "model.vocab_size", "base.model.vocab_size: must be left out, data.vocab_size gives it"),
        ("steps = 60", "resume = false", "base.resume: must be left out, a sweep always goes on"),
        ("seeds = [0, 1]", "seeds = []", "seeds = []: must be a list of one or more integers ≥ 0"),
        ("seeds = [0, 1]", "seeds = 3", "seeds = 3: must be a list"),
        ("seeds = [0, 1]", "seeds = [true]", "seeds = [True]: must be a list"),
        ("seeds = [0, 1]", "seeds = [-1]", "seeds = [-1]: must be a list"),
        ("seeds = [0, 1]", "", "seeds = None: must be a list"),
        ("seeds = [0, 1]", "seeds = [0, 0]", "run 'plain-s0': must be there once"),
        ("seeds = [0, 1]", "seeds = [0]\nsteps = 3", "steps: no such key; must be one of seeds, base_variant, "),
        ("seeds = [0, 1]", 'seeds = [0]\nbase_variant = "r2"', "base_variant = 'r2': must be one of the variants, pl"),
        (
            "seeds = [0, 1]",
            'seeds = [0]\nbase_variant = ["r2"]',
            "base_variant = ['r2']: must be one of the variants, pl",
        ),
        ("[variants.plain]", "[variants.other]", "base_variant = 'plain': must be one of the variants, other, r1.5"),
        ("[variants.plain]", '[variants."a/b"]\n[variants.plain]', "run 'a/b-s0': is a folder's name, must be made"),
        ("[variants.plain]", '[variants.plain]\n[variants.".a"]', "run '.a-s0': is a folder's name"),
        ("[variants.plain]", "[variants]\nx = 1\n[variants.plain]", "variants.x = 1: must be a table"),
        ("[variants.plain]", "[grid]\nlr = 0.1\n[variants.plain]", "grid.lr = 0.1: must be a list of one or more"),
        ("[variants.plain]", "[grid]\nlr = []\n[variants.plain]", "grid.lr = []: must be a list of one or more"),
        ("[variants.plain]", '[grid]\nlr = ["x"]\n[variants.plain]', "grid.lr = 'x': must be float"),
        ("[variants.plain]", "[grid]\nrl = [1]\n[variants.plain]", "grid.rl: no such field"),
        ("[variants.plain]", "[grid]\nlr = [1, 1]\n[variants.plain]", "run 'plain-lr1-s0': must be there once"),
        ('out = "runs/small"', "out = 3", "out = 3: must be the name of a folder"),
        ('out = "runs/small"', 'out = "', "Illegal character"),
        ('out = "runs/small"', "base = 1", "Cannot "),
    ],
)
def test_bad_files(write, text, old, new, message):
    old, new = (old.replace("{{", "{"), new.replace("{{", "{"))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_sweep(write((old, new)))
    assert str(error.value).count("small.toml") == 1


@pytest.mark.parametrize("name", ["out", "keep"])
def test_folders_without_a_name(write, name):
    with pytest.raises(ValueError, match=f"{name} = '': must be the name of a folder"):
        execute(SweepArguments(str(write()), **{name: ""}), "")


@pytest.mark.parametrize("dry", [True, False])
def test_text_that_is_not_there_is_refused_before_anything_starts(write, text_folder, tmp_path, dry):
    file = write((str(text_folder), "nowhere.txt"))
    with pytest.raises(FileNotFoundError, match=r"data\.files: 'nowhere\.txt' must name a file"):
        execute(SweepArguments(str(file), out=str(tmp_path / "runs"), dry_run=dry), "")
    assert not (tmp_path / "runs").exists()


def test_a_byte_order_mark_is_no_statement(write):
    file = write()
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(read_sweep(file).runs) == 4


def test_tables_that_are_none():
    for content in ({"base": 1}, {"variants": []}, {"grid": "lr"}):
        with pytest.raises(ValueError, match="must be a table"):
            module.planned({"seeds": [0], **content}, "x")
    with pytest.raises(ValueError, match="variants: must have one or more tables"):
        module.planned({"seeds": [0]}, "x")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.toml: no such file; must be the TOML file of a sweep"):
        read_sweep(tmp_path / "gone.toml")


def test_every_field_can_be_set():
    """The names are TrainConfig's own."""
    names = set(module.flat(dataclasses.asdict(TrainConfig())))
    assert set(module.field_types(TrainConfig)) == names and names > set(module.NOT_HERE)


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_the_studies(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "find_files", lambda data: [])  # of the folder that the command is called in
    assert execute(SweepArguments(str(file), dry_run=True), "") == 0
    runs = read_sweep(file).runs
    assert capsys.readouterr().out.endswith(f"{len(runs)} runs, 0 finished\n")
    assert not list(tmp_path.iterdir())
    configs = [json.dumps(dataclasses.asdict(run.config) | {"out": ""}) for run in runs]
    assert len(set(configs)) == len(runs)  # no run is another one under a second name
    seeds = tomllib.loads(file.read_text())["seeds"]
    for base in {run.base for run in runs}:
        assert [run.config.seed for run in runs if run.variant == base] == seeds


def test_studies_that_share_a_folder_share_runs():
    """C and E take what A has made: one name there is one config."""
    seen = {}
    for file in STUDIES:
        for run in read_sweep(file).runs:
            seen.setdefault(run.folder, set()).add(json.dumps(dataclasses.asdict(run.config)))
    assert {len(configs) for configs in seen.values()} == {1}
    names = [{run.folder for run in read_sweep(file).runs} for file in STUDIES if file.stem in ("a_r_sweep", "c_m")]
    assert len(names[0] & names[1]) == 12  # plain, r2, r4, r8 with three seeds


def test_what_study_E_says_of_its_plain_models():
    models = {run.variant: run.config.model for run in read_sweep(STUDIES[0].with_name("e_parts.toml")).runs}

    def size(model):
        return sum(model_parameters(model).values())

    def flops(model):
        return add(*model_flops(model, 64).values()).total

    def nearest(count, wide, field, values):
        wanted = count(models[wide])
        return min(values, key=lambda value: abs(count(replace(models["plain"], **{field: value})) - wanted))

    def percent(count, plain, wide):
        return round(100 * (count(models[plain]) / count(models[wide]) - 1))

    assert (size(models["r2"]), round(flops(models["r2"]), -3)) == (45_840, 112_000)
    assert (size(models["r4"]), round(flops(models["r4"]), -3)) == (68_816, 158_000)
    widths, depths = range(16, 48, 4), range(4, 24)
    assert (nearest(size, "r2", "dim", widths), nearest(size, "r4", "dim", widths)) == (20, 24)
    assert (nearest(size, "r4", "n_layers", depths), nearest(flops, "r4", "dim", widths)) == (14, 24)
    assert (nearest(flops, "r2", "n_layers", depths), nearest(flops, "r4", "n_layers", depths)) == (6, 10)
    sizes = [percent(size, *pair) for pair in (("plain-d20", "r2"), ("plain-d24", "r4"), ("plain-d28", "r4"))]
    assert (*sizes, percent(size, "plain-l14", "r4")) == (1, -12, 16, -2)
    work = [percent(flops, *pair) for pair in (("plain-d20", "r2"), ("plain-d24", "r4"), ("plain-l6", "r2"))]
    assert (*work, percent(flops, "plain-l10", "r4")) == (6, -3, -2, -2)


# ------------------------------------------------------------------------------------ finished and other folders


def test_finished_runs_are_left_alone(copied, capsys):
    file, out = copied
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert execute(SweepArguments(str(file), str(out)), "") == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert "4 of 4 runs are finished, 0 of them now; 0.00 CPU-hours in 4 runs" in capsys.readouterr().err


def test_the_table(copied, capsys):
    file, out = copied
    shutil.rmtree(out / "plain-s1")
    (out / "r1.5-s1" / "summary.json").unlink()
    (out / "not-of-this-sweep").mkdir()
    assert execute(SweepArguments(str(file), str(out), table=True), "") == 0
    runs = load_runs(out)
    (plain,), (wide,) = runs["plain"], runs["r1.5"]
    size = sum(p.numel() for p in VWNTransformer(load_run(out / "r1.5-s0")[2].model).parameters())
    losses = [wide.summary["val_next"], wide.summary["val_next"] - plain.summary["val_next"]]
    losses += [wide.summary["val_next2"], wide.summary["val_next2"] - plain.summary["val_next2"]]
    row = "| r1.5 | {:,} | 1 | {:.4f} | {:+.4f} (no interval) | {:.4f} | {:+.4f} (no interval) |".format(size, *losses)
    text = capsys.readouterr().out
    assert row in text.splitlines()
    assert "\nNot finished, 2 of 4 runs: plain-s1, r1.5-s1.\n" in text


def test_kept_runs_are_those_of_the_sweep_in_its_order(copied):
    file, out = copied
    names = list(dict.fromkeys(run.variant for run in read_sweep(file, out).runs))
    (out / f"{names[0]}-s0" / "summary.json").unlink()  # so that the first variant's first run comes late
    shutil.copytree(out / f"{names[1]}-s0", out / "another-s0")  # of another study
    found = kept_runs(read_sweep(file, out))
    assert list(found) == names and [run.seed for run in found[names[0]]] == [1]
    (out / f"{names[0]}-s1" / "summary.json").unlink()
    assert list(kept_runs(read_sweep(file, out))) == names[1:]


def test_the_table_of_all(finished):
    runs = load_runs(finished[1])
    difference = str(paired(runs["r1.5"], runs["plain"], "val_next2"))
    text = table(read_sweep(*finished))
    assert "±" in difference and text.splitlines()[-1].endswith(f"| {difference} |")
    assert "Not finished" not in text


def test_keeps_finished_runs_of_this_sweep(copied, tmp_path):
    file, out = copied
    (out / "r1.5-s1" / "summary.json").unlink()
    shutil.copytree(out / "plain-s0", out / "other-s0")
    assert execute(SweepArguments(str(file), str(out), keep=str(tmp_path / "kept")), "") == 0
    kept = {path.relative_to(tmp_path / "kept").as_posix() for path in (tmp_path / "kept").glob("*/*")}
    files = ("config.json", "log.jsonl", "summary.json")
    assert kept == {f"{run}/{name}" for run in ("plain-s0", "plain-s1", "r1.5-s0") for name in files}
    kept_table = execute(SweepArguments(str(file), str(tmp_path / "kept"), table=True), "")  # kept data will do
    assert kept_table == 0


def test_another_config_is_refused_before_anything_starts(copied, write, text):
    _, out = copied
    shutil.rmtree(out / "plain-s0")
    path = out / "r1.5-s1" / "config.json"
    path.write_text(path.read_text().replace('"lr": 0.01', '"lr": 0.02').replace('"m": 2', '"m": 4'))
    with pytest.raises(ValueError, match=r"r1.5-s1 is a run with another config:\n  lr: the run has 0.02, asked for 0"):
        execute(SweepArguments(str(write()), str(out)), "")
    assert not (out / "plain-s0").exists()
    with pytest.raises(ValueError, match=r"model.m: the run has 4, asked for 2"):
        execute(SweepArguments(str(write()), str(out), table=True), "")
    shutil.rmtree(out / "r1.5-s1")
    (out / "r1.5-s1").mkdir()
    (out / "r1.5-s1" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="holds files but no run"):
        execute(SweepArguments(str(write()), str(out)), "")


def test_runs_from_before_a_field_are_the_same_runs(copied):
    """config.json of older runs lacks `decay_static`; what they did is its default."""
    file, out = copied
    for path in out.glob("*-s0/config.json"):
        config = json.loads(path.read_text())
        assert config.pop("decay_static") is False
        path.write_text(json.dumps(config))
    assert TrainConfig.from_dict(config).decay_static is False
    check_folders(read_sweep(file, out).runs)
    assert {name: len(runs) for name, runs in load_runs(out).items()} == {"plain": 2, "r1.5": 2}
    run = read_sweep(file, out).runs[1]
    other = replace(run, config=replace(run.config, decay_static=True))
    with pytest.raises(ValueError, match="decay_static: the run has False, asked for True"):
        check_folders([other])


def test_checkpoints_from_before_a_field(copied):
    """A checkpoint keeps a digest of the config: it is that of the fields there were, and CPU time was not counted."""
    file, out = copied
    run = read_sweep(file, out).runs[0]
    assert "decay_static" not in fixed_fields(dataclasses.asdict(run.config))
    path = run.folder / "checkpoint.safetensors"
    tensors, state = load(path)
    assert state.pop("cpu_seconds") > 0
    save(path, tensors, state)
    (run.folder / "summary.json").unlink()
    assert train(run.config).summary["cpu_seconds"] is None
    others = json.loads((run.folder / "summary.json").read_text())["seconds"]
    said = module.cpu_hours(read_sweep(file, out).runs)
    assert said.endswith(
        f" CPU-hours in 3 runs; {others / 3600:.2f} thread-hours of training in 1 that did not count it"
    )


def test_static_matrices_decay_when_asked(tiny):
    """Static A and B end smaller than without; by default nothing shrinks them."""
    model = {"dynamic": False}
    same, decayed = (train(tiny(model=model, decay_static=flag)).model for flag in (False, True))
    pairs = zip(same.connections, decayed.connections, strict=True)
    assert all(b.A.norm() < a.A.norm() and b.B.norm() < a.B.norm() for a, b in pairs)


# ------------------------------------------------------------------------------------------ runs that go wrong


def test_a_failing_run_and_a_locked_one(write, tmp_path, capsys):
    """The third is made all the same."""
    variants = "[variants.short]\ndata.max_bytes = 1\n[variants.locked]\nlr = 0.02\n[variants.plain]\nsteps = 9"
    file = write(("[variants.plain]", variants), ("seeds = [0, 1]", "seeds = [0]"), ('[variants."r1.5"]', ""))
    file.write_text(file.read_text().rpartition("model = {")[0])
    out = tmp_path / "runs"
    (out / "locked-s0").mkdir(parents=True)
    with FileLock(out / "locked-s0" / ".lock"):
        assert execute(SweepArguments(str(file), str(out), jobs=3), "") == 1
    said = capsys.readouterr().err
    assert "plain-s0: finished, val_next " in said
    assert "short-s0: failed, exit status 1\nerror: " in said
    assert "locked-s0: another process is at it, left to that" in said
    assert "1 of 3 runs are finished, 1 of them now" in said
    assert said.endswith("at another process: locked-s0\nfailed: short-s0\n")
    assert not (out / "locked-s0" / "config.json").exists()


def test_ctrl_c(write, launch, tmp_path):
    """As a terminal sends it: to every process of the group."""
    file, out = write(("steps = 60", "steps = 5000")), tmp_path / "runs"
    process, said = launch(file, "--out", out, "--jobs", "2")
    wait_until(lambda: lines(out) > 20)
    os.killpg(process.pid, signal.SIGINT)
    process.join(300)
    assert process.exitcode == 130
    assert said.read_text().endswith(
        f"go on with:\n  python -m vwn_ref.experiments.sweep {file} --out {out} --jobs 2\n"
    )
    assert "failed" not in said.read_text()
    begun = [path for path in out.glob("*/log.jsonl") if b"\n" in path.read_bytes()]
    assert begun
    for log in begun:  # each stopped by itself, with a checkpoint at its last step
        step = load(log.parent / "checkpoint.safetensors")[1]["step"]
        assert step == json.loads(log.read_bytes().splitlines()[-1])["step"]


def test_children_stop_when_the_sweep_is_killed(write, launch, tmp_path):
    file, out = write(("steps = 60", "steps = 5000")), tmp_path / "runs"
    process, _ = launch(file, "--out", out, "--jobs", "1")
    log, lock = out / "plain-s0" / "log.jsonl", out / "plain-s0" / ".lock"
    wait_until(lambda: lines(out) > 20)
    process.kill()
    wait_until(lambda: lock_is_free(lock), 60)
    assert not (out / "plain-s0" / "summary.json").exists()
    step = load(out / "plain-s0" / "checkpoint.safetensors")[1]["step"]
    assert 20 <= step == json.loads(log.read_bytes().splitlines()[-1])["step"] < 5000


def lock_is_free(path):
    lock = FileLock(path)
    try:
        with lock.acquire(timeout=0):
            return True
    except TimeoutError:
        return False


def test_five_kills(finished, launch, tmp_path):
    """SIGKILL to the sweep and its children, at random moments; then the same command to the end."""
    file, whole = finished
    out = tmp_path / "runs"
    every = lines(whole)
    draw = random.Random(time.time_ns())
    done = {}  # finished runs and when
    halves = 0
    for kill in range(5):
        process, _ = launch(file, "--out", out, "--jobs", 1 + (kill == 2))
        goal = (kill + draw.random()) / 5 * 0.9 * every
        if kill == 0:
            time.sleep(draw.uniform(0, 3))  # before there is anything
        else:
            wait_until(lambda goal=goal: lines(out) > goal)
        time.sleep(draw.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        done |= {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}
        halves += len(list(out.glob("*/log.jsonl"))) > len(list(out.glob("*/summary.json")))
    assert halves >= 2 and len(done) < 4
    last, said = launch(file, "--out", out, "--jobs", "2")
    last.join(300)
    assert last.exitcode == 0, said.read_text()
    assert table(read_sweep(file, out)) == table(read_sweep(file, whole))
    assert logs(out) == logs(whole)
    assert {path: path.stat().st_mtime_ns for path in done} == done  # no finished run was made again
