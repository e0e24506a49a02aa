"""A run that was killed, stopped or tampered with."""

import dataclasses
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vwn_ref.experiments import checkpoint, console
from vwn_ref.experiments import train as module
from vwn_ref.experiments.checkpoint import CheckpointError
from vwn_ref.experiments.train import Stopped, load_run, train

COMPARED = ("weights.safetensors", "log.jsonl", "config.json", "tokenizer.json")


def files(folder):
    return {name: (Path(folder) / name).read_bytes() for name in COMPARED}


@pytest.fixture(scope="module")
def unbroken(tiny, tmp_path_factory):
    config = tiny(out=str(tmp_path_factory.mktemp("unbroken") / "run"))
    train(config)
    return config, files(config.out)


def stop_after(monkeypatch, steps, number=signal.SIGINT):
    """Send this process a signal in the middle of a run."""
    counted = iter(range(1, 10**6))

    class Progress(console.Progress):
        def step(self):
            if next(counted) == steps:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(module, "Progress", Progress)


# ------------------------------------------------------------------------------------------------------ kills


def test_ten_kills(tiny, tmp_path, processes):
    config = tiny(steps=200, checkpoint_interval=2, log_interval=1, val_interval=50)
    one, other = replace(config, out=str(tmp_path / "one")), replace(config, out=str(tmp_path / "other"))
    whole = processes.Process(target=train, args=(one,))
    whole.start()
    draw = random.Random(time.time_ns())
    log = Path(other.out) / "log.jsonl"
    killed = 0
    for kill in range(10):
        child = processes.Process(target=train, args=(replace(other, resume=kill > 0),))
        child.start()
        # Wait until the run has come a random way further, then for a random moment of a step.
        goal = (kill + draw.random()) / 10 * 190
        deadline = time.monotonic() + 60
        while child.is_alive() and time.monotonic() < deadline:
            if log.exists() and log.read_bytes().count(b"\n") > goal:
                break
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        if (Path(other.out) / "checkpoint.safetensors").exists():
            load_run(other.out)  # whole at every moment
    assert killed == 10
    last = processes.Process(target=train, args=(replace(other, resume=True),))
    last.start()
    last.join()
    whole.join()
    assert (whole.exitcode, last.exitcode) == (0, 0)
    a, b = files(one.out), files(other.out)
    assert a["weights.safetensors"] == b["weights.safetensors"]
    assert a["log.jsonl"] == b["log.jsonl"]


def test_killed_before_anything_was_written(unbroken, tmp_path):
    config, wanted = unbroken
    config = replace(config, out=str(tmp_path / "run"), resume=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.tmp").write_text('{"half')
    train(config)
    assert files(config.out)["weights.safetensors"] == wanted["weights.safetensors"]


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "weights.safetensors", "summary.json", "config.json"])
def test_killed_before_a_file_took_its_place(unbroken, tmp_path, monkeypatch, name):
    config, wanted = unbroken
    config = replace(config, out=str(tmp_path / "run"))
    move = os.replace

    def die(source, target):
        if Path(target).name == name:
            raise KeyboardInterrupt
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    train(replace(config, resume=True))
    assert files(config.out)["weights.safetensors"] == wanted["weights.safetensors"]
    assert files(config.out)["log.jsonl"] == wanted["log.jsonl"]


# ---------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resuming_is_exact(unbroken, tmp_path, monkeypatch, number):
    config, wanted = unbroken
    config = replace(config, out=str(tmp_path / "run"))
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_after(patch, 17, number)  # between two lines of the log and two checkpoints
        with pytest.raises(Stopped, match="stopped after step 17 of 30"):
            train(config)
    assert signal.getsignal(number) is before
    with pytest.raises(FileExistsError, match="holds an unfinished run; add --resume"):
        train(config)
    result = train(replace(config, resume=True))
    assert files(config.out)["weights.safetensors"] == wanted["weights.safetensors"]
    assert files(config.out)["log.jsonl"] == wanted["log.jsonl"]
    assert len(result.log) == 7
    again = train(replace(config, resume=True))  # nothing is left to do
    assert again.log == result.log and again.summary == result.summary


def test_ctrl_c_prints_the_command(text_folder, tmp_path, monkeypatch, capsys):
    line = f"--model.dim 16 --model.n-layers 1 --data.files {text_folder} --data.vocab-size 280 --seq-len 16"
    arguments = [*line.split(), "--out", str(tmp_path / "a run")]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    stop_after(monkeypatch, 3)
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 130
    err = capsys.readouterr().err
    assert f"python -m vwn_ref.experiments.train {line} --out '{tmp_path}/a run' --resume\n" in err
    assert module.parse([*arguments, "--resume"]).resume


# ------------------------------------------------------------------------------------- what resuming depends on


@pytest.fixture
def half(unbroken, tmp_path, monkeypatch):
    """A run stopped after 17 steps of 30, and what it must end as."""
    config = replace(unbroken[0], out=str(tmp_path / "half"))
    with monkeypatch.context() as patch:
        stop_after(patch, 17)
        with pytest.raises(Stopped):
            train(config)
    return replace(config, resume=True), unbroken[1]


def test_resume_without_the_optimizer_would_be_seen(half, monkeypatch):
    config, wanted = half
    monkeypatch.setattr(checkpoint, "load_optimizer", lambda *arguments: None)
    train(config)
    assert files(config.out)["weights.safetensors"] != wanted["weights.safetensors"]


def test_every_optimizer_tensor_matters(half):
    config, wanted = half
    path = Path(config.out) / "checkpoint.safetensors"
    tensors, state = checkpoint.load(path)
    entries = {name.rsplit("/")[-1] for name in tensors if name.startswith("optimizer/")}
    assert entries == {"step", "exp_avg", "exp_avg_sq"}
    checkpoint.save(path, {n: x + 1 if n.endswith("/step") else x for n, x in tensors.items()}, state)
    train(config)
    assert files(config.out)["weights.safetensors"] != wanted["weights.safetensors"]


def test_lines_past_the_checkpoint_are_cut(half):
    config, wanted = half
    with (Path(config.out) / "log.jsonl").open("ab") as log:
        log.write(b'{"step": 20, "train_next": 0.0}\n{"st')
    train(config)
    assert files(config.out)["log.jsonl"] == wanted["log.jsonl"]


@pytest.mark.parametrize("harm", ["edit", "cut", "remove"])
def test_a_log_that_does_not_fit(half, harm):
    config, _ = half
    path = Path(config.out) / "log.jsonl"
    content = path.read_bytes()
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(content.replace(b"0", b"1", 1) if harm == "edit" else content[:-10])
    with pytest.raises(CheckpointError, match=r"log.jsonl is damaged"):
        train(config)


def test_resume_with_another_config(half):
    config, _ = half
    other = replace(config, lr=1e-2, data=replace(config.data, split_seed=3))
    with pytest.raises(ValueError, match=r"another config:\n  data.split_seed: the run has 0, asked for 3\n  lr: "):
        train(other)
    result = train(replace(config, checkpoint_interval=100, progress=True, device="auto"))  # these may change
    assert result.log[-1]["step"] == 30
    assert '"checkpoint_interval": 7' in (Path(config.out) / "config.json").read_text()  # what the run began with


def test_resume_on_another_corpus(half, text_folder, tmp_path, monkeypatch):
    config, _ = half
    real = module.load_corpus(config.data)
    monkeypatch.setattr(module, "load_corpus", lambda data: replace(real, digest="other"))
    with pytest.raises(ValueError, match="was trained on another corpus"):
        train(config)


def test_a_tokenizer_that_is_not_the_corpus_s(half, unbroken):
    """Taken away it is written anew."""
    config, wanted = half[0], unbroken[1]
    path = Path(config.out) / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json is not the corpus's tokenizer: remove it"):
        train(config)
    path.unlink()
    train(config)
    assert path.read_bytes() == wanted["tokenizer.json"]


def test_checkpoint_of_another_run(half, unbroken, tiny, tmp_path):
    config, _ = half
    for changes in ({"lr": 1e-2}, {"model": {"dim": 32}}):
        other = tiny(out=str(tmp_path / f"other{len(changes)}{'lr' in changes}"), steps=2, **changes)
        train(other)
        source = Path(other.out) / "checkpoint.safetensors"
        (Path(config.out) / "checkpoint.safetensors").write_bytes(source.read_bytes())
        with pytest.raises(CheckpointError, match="belongs to a run with another config"):
            train(config)


@pytest.mark.parametrize("harm", ["empty", "cut", "half", "longer"])
def test_a_checkpoint_of_the_wrong_length(half, harm):
    config, _ = half
    path = Path(config.out) / "checkpoint.safetensors"
    content = path.read_bytes()
    lengths = {"empty": b"", "cut": content[:-1], "half": content[: len(content) // 2], "longer": content + b"0"}
    path.write_bytes(lengths[harm])
    with pytest.raises(CheckpointError, match=r"checkpoint.safetensors is damaged"):
        train(config)


def test_a_bit_flip_anywhere_is_seen_or_harmless(half):
    config, _ = half
    path = Path(config.out) / "checkpoint.safetensors"
    content = path.read_bytes()
    tensors, state = checkpoint.load(path)
    draw = random.Random(0)
    header = int.from_bytes(content[:8], "little")
    places = [*range(8), *(draw.randrange(8, 8 + header) for _ in range(100))]
    places += [draw.randrange(8 + header, len(content)) for _ in range(50)]
    seen = 0
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            got, got_state = checkpoint.load(path)
        except CheckpointError:
            seen += 1
        else:  # only spelling may differ, such as white space in the header
            assert place < 8 + header and got_state == state and got.keys() == tensors.keys()
            assert all(torch.equal(got[name], tensors[name]) for name in tensors)
    assert seen > len(places) - 10


def test_experts_go_on_in_as_many_processes(tiny, tmp_path, monkeypatch):
    config = tiny(out=str(tmp_path / "run"), model={"n_experts": 2, "top_k": 1})
    stop_after(monkeypatch, 4)
    with pytest.raises(Stopped):
        train(config)
    path = tmp_path / "run" / "checkpoint.safetensors"
    tensors, state = checkpoint.load(path)
    assert state["processes"] == 1
    checkpoint.save(path, tensors, {**state, "processes": 2})
    with pytest.raises(ValueError, match="was trained by 2 processes, these are 1; with experts must be as many"):
        train(replace(config, resume=True))
    del state["processes"]  # an older checkpoint
    checkpoint.save(path, tensors, state)
    monkeypatch.undo()
    assert train(replace(config, resume=True)).summary["processes"] == 1


def test_two_processes_in_one_folder(half):
    config, _ = half
    run = module.Run(Path(config.out), dataclasses.asdict(config))
    run.open("{}", resume=True)
    try:
        with pytest.raises(RuntimeError, match="another process is training in this folder"):
            train(config)
    finally:
        run.close()
    train(config)


def test_a_run_that_appeared_after_the_first_look(tiny, unbroken, tmp_path, monkeypatch):
    """Reading the corpus takes a while: another process may start and finish a run meanwhile. It is not touched."""
    config = tiny(out=str(tmp_path / "run"))
    load = module.load_corpus

    def slow(data):
        monkeypatch.setattr(module, "load_corpus", load)
        train(config)
        return load(data)

    monkeypatch.setattr(module, "load_corpus", slow)
    with pytest.raises(FileExistsError, match="holds a finished run"):
        train(config)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == unbroken[1]["log.jsonl"]


def test_a_checkpoint_that_cannot_be_written(tmp_path):
    """Safetensors has an exception of its own for that; the command line knows OSError."""
    with pytest.raises(OSError, match=r"gone.x\.safetensors cannot be written"):
        checkpoint.save(tmp_path / "gone" / "x.safetensors", {"a": torch.zeros(3)}, {})


def test_no_pickle():
    for path in Path(module.__file__).parent.glob("*.py"):
        source = path.read_text()
        assert "import pickle" not in source and "torch.load" not in source and "torch.save" not in source
