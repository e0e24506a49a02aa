"""Documents, their split, their tokens, and the cache of all that."""

import gzip
import json
import os
import random
import shutil
import socket
import stat
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vwn_ref.experiments import data
from vwn_ref.experiments.data import DataConfig, in_validation, load_corpus


@pytest.fixture(scope="module")
def config(text_folder):
    return DataConfig(files=(str(text_folder),), vocab_size=300)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **named):
        raise AssertionError("a network call")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_standard_library_without_network(no_network):
    corpus = load_corpus(DataConfig(max_bytes=400_000, vocab_size=400))
    assert 200_000 < corpus.train_bytes + corpus.val_bytes <= 400_000
    assert "def " in corpus.decode(corpus.train[:2000])


def test_standard_library_is_large_and_in_order():
    files = data.library_files()
    assert sum(path.stat().st_size for path in files) > 5_000_000
    assert files == sorted(files) and len(set(files)) == len(files)
    assert not any({"test", "tests", "site-packages", "idlelib"} & set(path.parts) for path in files)


def test_tokens_are_the_documents(config, documents):
    corpus = load_corpus(config)
    for tokens, wanted in ((corpus.train, False), (corpus.val, True)):
        assert tokens.dtype == np.uint16 and tokens.ndim == 1 and isinstance(tokens, np.memmap)
        assert tokens.max() < 300
        texts = corpus.decode(tokens).split(data.END)
        assert texts[-1] == "" and texts[:-1] == [text for text in documents if in_validation(text, config) is wanted]
    assert corpus.train_documents + corpus.val_documents == len(documents)
    assert corpus.train_bytes + corpus.val_bytes == sum(len(text.encode()) for text in documents)
    assert corpus.tokenizer.get_vocab_size() == 300


@pytest.mark.parametrize("text", ["", "a <|end|> b", "π — \x00\r\n\t 中文 🙂", " leading and trailing  "])
def test_encoding_loses_nothing(config, text):
    corpus = load_corpus(config)
    tokens = corpus.encode(text)
    assert corpus.decode(tokens) == text
    assert corpus.end not in tokens  # nobody ends a document by writing its mark


def test_bytes_alone_are_a_vocabulary(config):
    corpus = load_corpus(replace(config, vocab_size=257))
    assert len(corpus.encode("π")) == 2
    assert len(corpus.train) == corpus.train_bytes + corpus.train_documents


def test_wide_tokens_where_the_vocabulary_needs_them(tmp_path, config):
    texts = [f"text {i}" for i in range(50)]
    data.write_tokens(data.train_tokenizer(texts, 260), texts, replace(config, vocab_size=2**16 + 1), tmp_path)
    assert np.load(tmp_path / "train.npy").dtype == np.uint32


# ------------------------------------------------------------------------------------------------- the split


def test_split_is_by_content(config, documents):
    corpus = load_corpus(config)
    assert 0 < corpus.val_documents < corpus.train_documents
    many = [f"document {i}" for i in range(4000)]
    share = sum(in_validation(text, config) for text in many) / len(many)
    assert abs(share - config.val_fraction) < 0.02
    other = [in_validation(text, replace(config, split_seed=1)) for text in many]
    assert other != [in_validation(text, config) for text in many]
    wider = replace(config, val_fraction=0.3)  # a larger fraction keeps what was in validation there
    assert all(in_validation(text, wider) for text in many if in_validation(text, config))


def test_adding_documents_moves_none(tmp_path, config, documents):
    for i, text in enumerate([*documents, *documents[:20], *(f"new document {i}" for i in range(30))]):
        (tmp_path / f"{i:03}.txt").write_bytes(text.encode())
    before, after = load_corpus(config), load_corpus(replace(config, files=(str(tmp_path),)))
    sides = [set(after.decode(tokens).split(data.END)) - {""} for tokens in (after.train, after.val)]
    assert not sides[0] & sides[1]  # the twenty that are there twice too
    for tokens, side in zip((before.train, before.val), sides, strict=True):
        assert set(before.decode(tokens).split(data.END)) - {""} <= side


def test_tokenizer_sees_training_documents_only(tmp_path, config, documents):
    strange = (text for text in (f"zzzz qqqq {i} " * 200 for i in range(1000)) if in_validation(text, config))
    for i, text in enumerate(documents):
        text = next(strange) if in_validation(text, config) else text
        (tmp_path / f"{i:03}.txt").write_bytes(text.encode())
    before, after = load_corpus(config), load_corpus(replace(config, files=(str(tmp_path),)))
    assert after.tokenizer.to_str() == before.tokenizer.to_str()
    assert np.array_equal(after.train, before.train) and not np.array_equal(after.val, before.val)


# ---------------------------------------------------------------------------------------------- file formats


def write_as(folder, form, documents):
    folder.mkdir()
    if form in ("jsonl", "jsonl.gz"):
        lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)).encode()
        (folder / f"a.{form}").write_bytes(gzip.compress(lines, mtime=0) if form == "jsonl.gz" else lines)
    elif form == "parquet":
        for i, half in enumerate((documents[:15], documents[15:])):
            pq.write_table(pa.table({"text": half, f"other{i}": list(range(len(half)))}), folder / f"{i}.parquet")
    else:
        for i, text in enumerate(documents):
            raw = text.encode()
            (folder / f"{i:03}.{form}").write_bytes(gzip.compress(raw, mtime=0) if form.endswith("gz") else raw)


@pytest.mark.parametrize("form", ["md", "txt.gz", "jsonl", "jsonl.gz", "parquet"])
def test_every_format_gives_the_same_corpus(tmp_path, config, documents, form, no_network):
    folder = tmp_path / ".odd [name]* é"  # characters that patterns and shells care about
    write_as(folder, form, documents)
    corpus = load_corpus(replace(config, files=(str(folder),)))
    assert corpus.digest == load_corpus(config).digest


def test_patterns_and_order(tmp_path, config, documents, text_folder):
    same = load_corpus(replace(config, files=(str(text_folder / "0[01]*.txt"), str(text_folder / "*.txt"))))
    assert same.digest == load_corpus(config).digest  # overlapping patterns give a file once


def test_paragraphs_lines_and_caps(tmp_path, config):
    path = tmp_path / "one.txt"
    path.write_text("\n\n".join(f"paragraph {i}\nof two lines" for i in range(50)))
    config = replace(config, files=(str(path),), vocab_size=260)
    for sample_by, count in (("paragraph", 50), ("line", 100)):
        corpus = load_corpus(replace(config, sample_by=sample_by))
        assert corpus.train_documents + corpus.val_documents == count
    corpus = load_corpus(replace(config, sample_by="paragraph", max_documents=30))
    assert corpus.train_documents + corpus.val_documents == 30
    corpus = load_corpus(replace(config, sample_by="paragraph", max_bytes=1000))
    assert 900 < corpus.train_bytes + corpus.val_bytes <= 1000


def test_empty_and_missing_texts_are_left_out(tmp_path, config, documents):
    rows = [{"text": text} for text in ["", *documents]] + [{"text": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "empty.txt").write_text("")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    assert load_corpus(replace(config, files=(str(tmp_path),))).digest == load_corpus(config).digest


# ---------------------------------------------------------------------------------------------------- the hub


class Hub:
    """Stands in for `datasets.load_dataset`."""

    def __init__(self, documents):
        self.documents, self.calls, self.read = documents, 0, 0

    def __call__(self, name, config=None, *, split, revision, streaming):
        assert streaming
        self.calls += 1
        for text in self.documents:
            self.read += 1
            yield {"id": self.read, "body": text}


def test_hub_dataset_is_streamed_once_and_kept(monkeypatch, config, documents):
    hub = Hub([*documents, *documents])
    monkeypatch.setattr("datasets.load_dataset", hub)
    hub_config = replace(config, files=(), dataset="some/name", text_column="body", max_documents=len(documents))
    assert load_corpus(hub_config).digest == load_corpus(config).digest
    assert hub.read == len(documents)  # the cap is on what is downloaded
    load_corpus(replace(hub_config, vocab_size=290))
    assert hub.calls == 1  # other tokens, same text


def test_no_network_says_what_to_do(monkeypatch, config):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"'some/name': the hub cannot be reached.*local text with data.files"):
        load_corpus(replace(config, files=(), dataset="some/name"))


def test_unknown_dataset(monkeypatch, config):
    from datasets.exceptions import DatasetNotFoundError

    def load_dataset(name, *arguments, **named):
        raise DatasetNotFoundError(f"{name} doesn't exist")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"data.dataset = 'no/such': must be a dataset of the hub.*doesn't exist"):
        load_corpus(replace(config, files=(), dataset="no/such"))


def test_hub_column(monkeypatch, config, documents):
    monkeypatch.setattr("datasets.load_dataset", Hub(documents))
    with pytest.raises(ValueError, match=r"data.text_column = 'text': must be a column of dataset 'a/b': id, body"):
        load_corpus(replace(config, files=(), dataset="a/b"))


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 256}, "data.vocab_size = 256: must be an integer ≥ 257"),
        ({"vocab_size": 2**20 + 1}, "data.vocab_size = 1048577: must be ≤ 1048576"),
        ({"val_fraction": 0.0}, "data.val_fraction = 0.0: must be"),
        ({"val_fraction": 1.0}, "data.val_fraction = 1.0: must be < 1"),
        ({"split_seed": -1}, "data.split_seed = -1"),
        ({"max_documents": 0}, "data.max_documents = 0"),
        ({"max_bytes": 0}, "data.max_bytes = 0"),
        ({"files": ("",)}, "data.files = '': must be a string, and not an empty one"),
        ({"dataset": ""}, "data.dataset = '': must be a string"),
        ({"text_column": ""}, "data.text_column = '': must be a string"),
        ({"files": ("a",), "dataset": "b"}, "data.files = .*: must be empty where data.dataset = 'b'"),
    ],
)
def test_bad_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": None}, "data.files = None: must be a tuple of names"),
        ({"files": (3,)}, "data.files = 3: must be a string"),
        ({"cache_dir": 5}, "data.cache_dir = 5: must be a string"),
        ({"text_column": None}, "data.text_column = None: must be a string"),
        ({"dataset": 5}, "data.dataset = 5: must be a string"),
        ({"library_tests": "yes"}, "data.library_tests = 'yes': must be True or False"),
    ],
)
def test_fields_of_another_type(changes, message, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        DataConfig(**changes)


def test_paths_are_names(tmp_path, no_shape_checks):
    given = DataConfig(files=(tmp_path / "a.txt",), cache_dir=tmp_path)
    assert given == DataConfig(files=(str(tmp_path / "a.txt"),), cache_dir=str(tmp_path))
    json.dumps(asdict(given))


def test_a_cap_that_lets_nothing_in_is_named(config):
    with pytest.raises(ValueError, match=r"no document with text in files .* within data.max_bytes = 1"):
        load_corpus(replace(config, max_bytes=1))


def test_a_cache_that_is_a_file(tmp_path, config):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        with pytest.raises(FileExistsError, match=f"data.cache_dir = .*{name}': must be a folder"):
            load_corpus(replace(config, cache_dir=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "the corpus is empty: no document with text in files"),
        ("a.jsonl", b"", "the corpus is empty"),
        ("a.txt", b"one document!", "data.val_fraction = 0.1: leaves no document for val, the corpus has 1"),
        ("a.txt", b"\xff\xfe\x00", "a.txt must be UTF-8 text"),
        ("a.jsonl", b'{"body": "x"}\n', r"data.text_column = 'text': must be a column of .*a.jsonl: body"),
        ("a.jsonl", b'{"text": 3}\n', "data.text_column = 'text': must hold text in .*a.jsonl, holds int 3"),
        ("a.jsonl", b'{"text": "x"\n{', "a.jsonl cannot be read as json"),
        ("a.parquet", b"PAR1 no more", "a.parquet cannot be read as parquet"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_corpus(DataConfig(files=(str(tmp_path / name),)))


WHOLE = gzip.compress(random.Random(0).randbytes(9000).hex().encode(), mtime=0)  # the same bytes in every process


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.txt", b"\xff\xfe", "b.txt must be UTF-8 text"),
        ("b.txt.gz", gzip.compress(b"\xff\xfe", mtime=0), "b.txt.gz must be UTF-8 text"),
        ("b.txt.gz", WHOLE[:-500], "b.txt.gz must be a whole gzip file: Compressed file ended"),
        ("b.txt.gz", WHOLE[:3000] + bytes(500) + WHOLE[3500:], "b.txt.gz must be a whole gzip file"),
        ("b.txt.gz", b"not gzipped", "b.txt.gz must be a whole gzip file: Not a gzipped file"),
        ("b.jsonl.gz", WHOLE[:-500], "b.jsonl.gz must be a whole gzip file"),
    ],
)
def test_the_bad_file_of_several_is_named(tmp_path, name, content, message):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a good one", mtime=0))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_corpus(DataConfig(files=(str(tmp_path),)))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.files: '.*\*.txt' must name a file"):
        load_corpus(DataConfig(files=(str(tmp_path / "*.txt"),)))


def test_vocabulary_larger_than_the_text_can_fill(config):
    with pytest.raises(ValueError, match=r"data.vocab_size = 30000: too large, the training documents give only \d+"):
        load_corpus(replace(config, vocab_size=30_000))


# -------------------------------------------------------------------------------------------------- the cache


def test_cache_is_used_and_keyed(monkeypatch, config, text_folder):
    corpus = load_corpus(config)
    others = [{"vocab_size": 301}, {"val_fraction": 0.2}, {"split_seed": 5}, {"max_documents": 35}]
    folders = {load_corpus(replace(config, **change)).folder for change in others}
    assert len(folders) == 4 and corpus.folder not in folders
    monkeypatch.setattr(data, "build", None)  # a call would raise
    assert load_corpus(config).digest == corpus.digest
    version = data.importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda name: version(name) + ".1")
    with pytest.raises(TypeError, match="not callable"):
        load_corpus(config)


def test_cache_folder_is_chosen(tmp_path, monkeypatch, config):
    assert data.cache_folder(replace(config, cache_dir=str(tmp_path))) == tmp_path
    monkeypatch.setenv(data.CACHE_VARIABLE, str(tmp_path / "b"))
    assert data.cache_folder(config) == tmp_path / "b"
    monkeypatch.delenv(data.CACHE_VARIABLE)
    assert "vwn_ref" in data.cache_folder(config).parts


def test_a_new_cache_is_its_owners_alone(tmp_path, config):
    """It holds compiled kernels too, which are not loaded from a folder that the group may write to."""
    before = os.umask(0o002)
    try:
        load_corpus(replace(config, cache_dir=str(tmp_path / "new")))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["train.npy", "val.npy", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damaged_cache_is_rebuilt(tmp_path, config, name, harm):
    config = replace(config, cache_dir=str(tmp_path), max_documents=30, vocab_size=270)
    corpus = load_corpus(config)
    path = corpus.folder / name
    before = path.read_bytes()
    if harm == "flip":
        flip(path)
    elif harm == "cut":
        path.write_bytes(before[: len(before) // 2])
    else:
        path.unlink()
    again = load_corpus(config)
    assert again.digest == corpus.digest and path.read_bytes() == before


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch, config):
    config = replace(config, cache_dir=str(tmp_path))
    monkeypatch.setattr(data, "write_tokens", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_corpus(config)
    assert not [path for path in (tmp_path / "corpora").iterdir() if path.is_dir()]


def test_processes_that_build_at_once(tmp_path, config, processes):
    config = replace(config, cache_dir=str(tmp_path))
    children = [processes.Process(target=load_corpus, args=(config,)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0, 0]
    (folder,) = (path for path in (tmp_path / "corpora").iterdir() if path.is_dir())
    assert load_corpus(config).folder == folder


def test_what_a_killed_build_left_is_not_read(tmp_path, config):
    config = replace(config, cache_dir=str(tmp_path))
    corpus = load_corpus(config)
    half = corpus.folder.with_name(f".{corpus.folder.name}.0.tmp")
    shutil.move(corpus.folder, half)
    (half / "val.npy").unlink()
    assert load_corpus(config).digest == corpus.digest
    assert not half.exists()


def test_the_command_tells_of_an_error_in_a_line(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["data", "--files", str(tmp_path / "nowhere.txt")])
    with pytest.raises(SystemExit, match=r"error: .*nowhere"):
        data.main()
