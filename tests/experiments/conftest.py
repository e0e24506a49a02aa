"""A corpus of a few kilobytes, a model of a few thousand weights, and processes that cost little to start."""

import multiprocessing
import random

import pytest

from vwn_ref import VWNConfig
from vwn_ref.experiments.data import CACHE_VARIABLE, DataConfig
from vwn_ref.experiments.train import TrainConfig


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def cache(cache_folder):
    """Every corpus of these tests is built anew. One folder for all of them, but no other test is to know of it: it
    would compile every kernel again, into there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(cache_folder))
        yield


def make_documents(count=40, seed=0):
    words = ["width", "depth", "slot", "segment", "state", "matrix", "norm", "token", "layer", "residual"]
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=120)) + f"\nπ {i}\n" for i in range(count)]


@pytest.fixture(scope="session")
def documents():
    return make_documents()


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("text")
    for i, text in enumerate(documents):
        (folder / f"{i:03}.txt").write_bytes(text.encode())
    return folder


@pytest.fixture(scope="session")
def tiny(text_folder):
    """tiny(lr=…, model={"m": …}, data={…}) -> a TrainConfig that trains in well under a second."""

    def make(model=None, data=None, **changes):
        model = {"vocab_size": 280, "dim": 16, "n_layers": 1, "n_heads": 2, "m": 2, "n": 4, **(model or {})}
        data = {"files": (str(text_folder),), "vocab_size": model["vocab_size"], **(data or {})}
        base = {"steps": 30, "batch_size": 4, "seq_len": 16, "warmup": 5, "val_tokens": 300, "val_interval": 10}
        base |= {"log_interval": 5, "checkpoint_interval": 7, "progress": False, "device": "cpu", "threads": 1}
        return TrainConfig(model=VWNConfig(**model), data=DataConfig(**data), **{**base, **changes})

    return make


@pytest.fixture(scope="session")
def processes():
    """A multiprocessing context whose children start with everything imported."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs a system with forkserver")
    context = multiprocessing.get_context("forkserver")
    # torch imports its compiler, slowly, when the first optimizer is made
    context.set_forkserver_preload(["vwn_ref.experiments.train", "datasets", "torch._dynamo"])
    return context
