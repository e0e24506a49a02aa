"""Training in one process: what a seed fixes, what is logged, what is refused."""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from vwn_ref import VWNConfig
from vwn_ref.experiments import train as module
from vwn_ref.experiments.checkpoint import CheckpointError
from vwn_ref.experiments.data import DataConfig, load_corpus
from vwn_ref.experiments.run import fixed_fields
from vwn_ref.experiments.train import (
    TrainConfig,
    load_run,
    lr_at,
    main,
    parse,
    train,
    train_batch,
    val_starts,
    windows,
)
from vwn_ref.experiments.world import World


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    config = tiny(out=str(tmp_path_factory.mktemp("runs") / "finished"))
    return config, train(config)


# ------------------------------------------------------------------------------------------------ pure parts


def test_learning_rate(tiny):
    config = tiny(steps=105, warmup=5, lr=1.0, final_lr=0.1)
    rates = [lr_at(config, step) for step in range(105)]
    assert rates[:6] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    assert rates[55] == pytest.approx(0.55)  # half-way
    assert all(a > b for a, b in itertools.pairwise(rates[5:]))
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    linear = replace(config, schedule="linear")
    assert [lr_at(linear, step) for step in (5, 30, 55)] == pytest.approx([1.0, 0.775, 0.55])
    assert lr_at(replace(config, schedule="constant"), 104) == 1.0
    assert lr_at(replace(config, warmup=0), 0) == 1.0


def test_batches_are_a_function_of_seed_and_step(tiny):
    tokens = np.arange(1000, dtype=np.uint16)
    config = tiny(batch_size=4096)
    batch = train_batch(tokens, config, 3)
    assert batch.shape == (4096, 17) and batch.dtype == np.int64
    assert np.array_equal(batch, train_batch(tokens, config, 3))
    assert not np.array_equal(batch, train_batch(tokens, config, 4))
    assert not np.array_equal(batch, train_batch(tokens, replace(config, seed=1), 3))
    assert np.array_equal(batch, batch[:, :1] + np.arange(17))
    assert batch.min() == 0 and batch.max() == 999  # every token is in reach


def test_validation_windows(tiny):
    config = tiny(val_tokens=160)
    tokens = np.arange(1000, dtype=np.uint16)
    starts = val_starts(tokens, config)
    assert len(starts) == 10 and np.diff(starts).min() >= 16 and starts[-1] > 800
    assert windows(tokens, starts, 16).max() < 1000
    every = val_starts(tokens, replace(config, val_tokens=10**9))
    assert np.array_equal(every, np.arange(62) * 16)
    assert np.array_equal(val_starts(np.arange(17), config), [0])


# -------------------------------------------------------------------------------------------------- the seed


def test_a_seed_fixes_everything(tiny):
    torch.manual_seed(1)
    first = train(tiny())
    torch.manual_seed(2)
    np.random.seed(2)
    second = train(tiny())
    assert first.log == second.log
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert train(tiny(seed=1)).log != first.log


def test_global_state_is_left_alone(tiny):
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    train(tiny(steps=2))
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


def test_plain_and_virtual_width_see_the_same_batches(tiny, monkeypatch):
    seen = []

    def record(tokens, config, step):
        seen.append(train_batch(tokens, config, step))
        return seen[-1]

    monkeypatch.setattr(module, "train_batch", record)
    plain = train(tiny(model={"m": None, "n": None}, steps=5))
    wide = train(tiny(steps=5))
    assert all(np.array_equal(a, b) for a, b in zip(seen[:5], seen[5:], strict=True))
    for name, weight in plain.model.unembedding.named_parameters():
        assert weight.shape == dict(wide.model.unembedding.named_parameters())[name].shape


@pytest.mark.parametrize("model", [{"m": None, "n": None}, {"dynamic": False}, {"n_experts": 2, "mtp_layers": 1}])
def test_it_learns(tiny, model):
    log = train(tiny(model=model, steps=60, lr=1e-2)).log
    assert log[0]["val_next"] == pytest.approx(math.log(280), rel=0.05)
    assert log[-1]["val_next"] < log[0]["val_next"] - 1
    assert (log[-1]["val_next2"] > 0) == (log[-1]["val_balance"] > 0) == ("mtp_layers" in model)


def test_micro_batches_give_the_same_gradients(tiny):
    whole, parts = train(tiny(steps=10)).log, train(tiny(steps=10, micro_batch=1)).log
    for a, b in zip(whole, parts, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_micro_batches_of_a_mixture_are_another_training(tiny, tmp_path):
    """The balance loss is a product of means over the sequences at once: not the same gradients, so no going on."""
    model = {"n_experts": 4, "top_k": 1}
    whole, parts = (train(tiny(steps=1, model=model, micro_batch=size)).log[-1] for size in (None, 1))
    assert whole["train_next"] == pytest.approx(parts["train_next"], abs=1e-6)
    assert abs(whole["train_balance"] - parts["train_balance"]) > 1e-4
    folder = str(tmp_path / "moe")
    train(tiny(steps=1, model=model, out=folder))
    with pytest.raises(ValueError, match="micro_batch: the run has None, asked for 1"):
        train(tiny(steps=1, model=model, out=folder, resume=True, micro_batch=1))
    for n_experts, seen in ((0, 0), (4, 1)):
        fixed = [fixed_fields({"model": {"n_experts": n_experts}, "micro_batch": size}) for size in (None, 2)]
        assert len(fixed[1]) - len(fixed[0]) == seen


def test_bfloat16(tiny):
    narrow, full = train(tiny(dtype="bfloat16")).log[-1], train(tiny()).log[-1]
    assert narrow["train_next"] != full["train_next"]
    assert narrow["train_next"] == pytest.approx(full["train_next"], rel=0.05)


def test_gradient_clipping(tiny):
    log = train(tiny(grad_clip=0.01, steps=5)).log
    assert log[-1]["grad_norm"] > 0.01  # what is logged is the norm before
    assert log != train(tiny(grad_clip=0.0, steps=5)).log


# --------------------------------------------------------------------------------------- folder, log, summary


def test_folder_of_a_run(finished):
    config, result = finished
    folder = module.Path(config.out)
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    kept = {"config.json", "tokenizer.json", "log.jsonl", "checkpoint.safetensors", "weights.safetensors"}
    assert names == kept | {"summary.json"}
    assert not list(folder.glob(".*.tmp"))
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert rows == result.log
    assert [row["step"] for row in rows] == [0, 5, 10, 15, 20, 25, 30]
    assert [row["step"] for row in rows if "val_next" in row] == [0, 10, 20, 30]
    assert all(row["tokens"] == row["step"] * 64 for row in rows)
    assert all({"lr", "grad_norm", "train_next", "train_next2"} <= set(row) for row in rows[1:])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == result.summary
    assert summary["parameters"] == sum(p.numel() for p in result.model.parameters())
    assert summary["tokens"] == 30 * 64 and summary["val_next"] == rows[-1]["val_next"]
    assert summary["seconds"] > 0 and summary["tokens_per_second"] > 0
    assert TrainConfig.from_dict(json.loads((folder / "config.json").read_text())) == config


def test_whoever_may_read_the_log_may_read_the_weights(tiny, tmp_path):
    before = os.umask(0o027)
    try:
        train(tiny(steps=1, out=str(tmp_path / "run")))
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")}
    assert modes == {0o640} or os.name == "nt"


def test_mean_of_the_log_is_over_all_steps_since(tiny):
    every = train(tiny(steps=10, log_interval=1, val_interval=100)).log
    fifth = train(tiny(steps=10, log_interval=5, val_interval=100)).log
    for row in fifth[1:]:
        losses = [r["train_next"] for r in every if row["step"] - 5 < r["step"] <= row["step"]]
        assert row["train_next"] == pytest.approx(np.mean(losses), rel=1e-6)


def test_load_run(finished):
    config, result = finished
    model, tokenizer, again = load_run(config.out)
    assert again == config and not model.training
    for a, b in zip(model.parameters(), result.model.parameters(), strict=True):
        assert torch.equal(a, b)
    corpus = load_corpus(config.data)
    assert tokenizer.to_str() == corpus.tokenizer.to_str()
    assert tokenizer.encode("a <|end|>").ids == corpus.encode("a <|end|>")
    tokens = model.generate(torch.tensor([corpus.encode("width")]), 3)
    assert tokens.shape[1] == len(corpus.encode("width")) + 3


def test_in_memory_nothing_is_written(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tiny(steps=2))
    assert not list(tmp_path.iterdir())


def test_progress(tiny, capsys):
    train(tiny(steps=10, progress=True))
    err = capsys.readouterr().err
    assert "step 10/10 train_next" in err and "tokens/s" in err and "left" in err
    assert err.count("\n") == 1 and "\r" not in err  # no terminal: lines, few of them
    train(tiny(steps=10))
    assert capsys.readouterr().err == ""


def test_what_resume_finds_is_told(tiny, tmp_path, capsys):
    """A mistyped folder holds nothing to go on from."""
    folder = str(tmp_path / "run")
    train(tiny(steps=4, out=folder, resume=True, progress=True))
    assert f"{folder}: starts, there is no checkpoint to go on from\n" in capsys.readouterr().err


def test_a_run_that_is_all_warm_up_is_told(text_folder, monkeypatch, capsys):
    """As many steps as warm-up never reach the rate; the run goes on."""
    line = f"--data.files {text_folder} --data.vocab-size 280 --model.dim 8 --model.n-heads 1 --model.n-layers 1 "
    line += "--steps 3 --batch-size 1 --seq-len 8 --val-tokens 8 --device cpu --no-progress"
    for more, told in (("", True), (" --warmup 2", False)):
        monkeypatch.setattr(sys, "argv", ["train", *(line + more).split()])
        main()
        assert ("warmup = 100: the run's 3 steps are all warm-up" in capsys.readouterr().err) == told


# --------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps = 0: must be an integer ≥ 1"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"micro_batch": 0}, "micro_batch = 0"),
        ({"lr": 0.0}, "lr = 0.0: must be a finite number > 0"),
        ({"lr": math.nan}, "lr = nan"),
        ({"beta2": 1.0}, "beta2 = 1.0: must be < 1"),
        ({"warmup": -1}, "warmup = -1"),
        ({"threads": 0}, "threads = 0"),
        ({"schedule": "step"}, "schedule = 'step': must be one of 'cosine'"),
        ({"dtype": "float16"}, "dtype = 'float16': must be one of"),
        ({"seq_len": 2000}, "seq_len = 2000: must be ≤ model.max_seq_len = 1024"),
        ({"seq_len": 1, "model": {"mtp_layers": 1}}, "seq_len = 1: must be ≥ 2"),
        ({"data": {"vocab_size": 300}}, "model.vocab_size = 280: must be data.vocab_size = 300"),
    ],
)
def test_bad_fields(tiny, changes, message):
    wrong_type = changes.get("schedule") or changes.get("dtype")
    with pytest.raises(Exception if wrong_type else ValueError, match=None if wrong_type else message):
        tiny(**changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(resume="yes"), "resume = 'yes': must be True or False"),
        (lambda: TrainConfig(compile=1), "compile = 1: must be True or False"),
        (lambda: TrainConfig(model={"dim": 8}), "model = {'dim': 8}: must be a VWNConfig"),
        (lambda: TrainConfig(data=None), "data = None: must be a DataConfig"),
        (lambda: TrainConfig(out=5), "out = 5: must be a string"),
        (lambda: TrainConfig(out=""), "out = '': must be a string, and not an empty one"),
        (lambda: TrainConfig(device=None), "device = None: must be a string"),
        (lambda: TrainConfig(seed=2**63), "seed = 9223372036854775808: must be < 2"),
        (lambda: DataConfig(files="a.txt"), r"data.files = 'a.txt': must be a tuple of names, \('a.txt',\)"),
    ],
)
def test_wrong_types(make, message, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_path_is_a_name(tmp_path, no_shape_checks):
    assert TrainConfig(out=tmp_path) == TrainConfig(out=str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 9999, "model": {"max_seq_len": 9999}}, "seq_len = 9999: must be < the tokens for validation, the"),
        ({"micro_batch": 3}, "micro_batch = 3: must divide the 4 sequences of a process"),
        ({"device": "cuda:99"}, "device = 'cuda:99': must be auto or a device of this machine"),
        ({"device": "abacus"}, "device = 'abacus': must be auto or"),
        ({"device": "meta"}, "device = 'meta': must be auto or a device that computes"),
        ({"resume": True}, "resume = True: must come with out"),
    ],
)
def test_bad_runs(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        train(tiny(**changes))


def test_batch_that_cannot_be_shared(tiny):
    with pytest.raises(ValueError, match="batch_size = 4: must be a multiple of the 3 processes"):
        module.check_share(tiny(), World(0, 3, torch.device("cpu")))


def test_a_loss_that_is_not_finite(tiny, monkeypatch):
    loss = module.VWNTransformer.loss

    def broken(model, tokens):
        losses = loss(model, tokens)
        return losses._replace(total=losses.total * math.nan)

    monkeypatch.setattr(module.VWNTransformer, "loss", broken)
    with pytest.raises(FloatingPointError, match=r"the loss at step 5 is nan: lr = 0.003 may be too high"):
        train(tiny())


def test_a_last_step_that_ruins_the_weights(tiny, tmp_path):
    """The losses of training are of the weights before an update: only validation sees what the last one did."""
    config = tiny(steps=1, warmup=0, lr=1e30, out=str(tmp_path / "run"))
    with pytest.raises(FloatingPointError, match=r"the validation loss after step 1 is nan: lr = 1e\+30 may be too hi"):
        train(config)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_start_that_fails_leaves_no_run_behind(tiny, tmp_path, monkeypatch):
    config = tiny(out=str(tmp_path / "run"))

    def fails(model, tokens):
        raise RuntimeError("no such kernels")

    with monkeypatch.context() as patched:
        patched.setattr(module.VWNTransformer, "loss", fails)
        with pytest.raises(RuntimeError, match="no such kernels"):
            train(config)
    assert [path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")] == []
    train(replace(config, lr=1e-3))  # another config, and no --resume
    assert (tmp_path / "run" / "summary.json").exists()


def test_folders_that_are_taken(tiny, finished, tmp_path):
    config, _ = finished
    with pytest.raises(FileExistsError, match="holds a finished run; choose another folder"):
        train(config)
    (tmp_path / "thesis.tex").write_text("x")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="holds files but no run"):
            train(tiny(out=str(tmp_path), resume=resume))
    for name in ("thesis.tex", "thesis.tex/run"):
        with pytest.raises(FileExistsError, match=r"thesis\.tex is a file, must be a folder"):
            train(tiny(out=str(tmp_path / name)))
    with pytest.raises(FileNotFoundError, match=r"must be the folder of a run, there is no config\.json"):
        load_run(tmp_path)


def test_weights_of_another_model(tiny, finished, tmp_path):
    other = tiny(model={"dim": 32}, out=str(tmp_path / "other"), steps=2)
    train(other)
    (tmp_path / "other" / "weights.safetensors").write_bytes(
        (module.Path(finished[0].out) / "weights.safetensors").read_bytes()
    )
    with pytest.raises(CheckpointError, match=r"holds another model than its config.json describes"):
        load_run(other.out)


@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "summary.json", "tokenizer.json", "weights.safetensors"])
@pytest.mark.parametrize("harm", ["cut", "[]"])
def test_a_damaged_file_is_named(finished, tmp_path, name, harm):
    folder = tmp_path / "run"
    shutil.copytree(finished[0].out, folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2] if harm == "cut" else harm.encode())
    if (name, harm) not in (("log.jsonl", "[]"), ("summary.json", "[]")):  # valid JSON, and nothing is read from it
        with pytest.raises(ValueError, match=re.escape(str(folder / name))):
            module.load_result(folder)


def test_a_config_of_another_version(finished, tmp_path):
    shutil.copytree(finished[0].out, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    for change in ({"from_the_future": 1}, {"model": {"width": 3}}, {"data": {}}):
        path.write_text(json.dumps(dataclasses.asdict(finished[0]) | change))
        with pytest.raises(CheckpointError, match=r"config\.json is damaged, or of another version"):
            load_run(path.parent)


# ---------------------------------------------------------------------------------------------- command line


def test_every_field_is_on_the_command_line():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        parse(["--help"])
    text = out.getvalue()
    for kind, prefix in ((TrainConfig, ""), (VWNConfig, "model."), (DataConfig, "data.")):
        for field in dataclasses.fields(kind):
            shown = f"--{prefix}{field.name.replace('_', '-')}" in re.split(r"[\s,]+", text)
            assert shown == (prefix + field.name not in ("model", "data", "model.vocab_size")), field.name
    assert "Optimizer steps." in text and "Fraction rate" in text  # help is the fields' docstrings


def test_command_line():
    line = "--model.m 4 --model.n 8 --data.vocab-size 2048 --data.files a.txt b.txt --steps 7 --lr 0.01 --resume"
    config = parse(line.split())
    assert (config.model.m, config.model.n, config.steps, config.lr, config.resume) == (4, 8, 7, 0.01, True)
    assert config.model.vocab_size == config.data.vocab_size == 2048  # set once
    assert config.data.files == ("a.txt", "b.txt")
    assert type(config) is TrainConfig and type(config.model) is VWNConfig
    assert parse([]) == TrainConfig()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--data.files nowhere.txt", "error: data.files: 'nowhere.txt' must name a file"),
        ("--model.m 4", "give both, or neither"),
        ("--data.vocab-size 100", "data.vocab_size = 100: must be an integer ≥ 257"),
        ("--device abacus", "error: device = 'abacus'"),
    ],
)
def test_errors_are_told_without_a_traceback(monkeypatch, capsys, line, message):
    monkeypatch.setattr(sys, "argv", ["train", *line.split()])
    with pytest.raises(SystemExit) as stop:
        module.main()
    said = capsys.readouterr()
    said = f"{said.out} {said.err} {stop.value}".replace("│", " ")
    assert message in " ".join(said.split()) and "Traceback" not in said
    assert stop.value.code not in (0, None)
