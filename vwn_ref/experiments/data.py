"""Text → documents → byte-level BPE → token arrays, cached by content.

    corpus = load_corpus(DataConfig())          # the Python standard library's own sources: no download
    corpus.train, corpus.val                    # memory-mapped token arrays, documents ended by corpus.end

Documents are read by `datasets`, the tokenizer is trained and run by `tokenizers`. A document goes to training
or validation by the hash of its content: adding documents moves none, and equal documents stay together.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import importlib.metadata
import itertools
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vwn_ref.config import check_bool, check_choice, check_float, check_int, check_text
from vwn_ref.experiments.storage import cached_folder, file_digest, json_digest

END = "<|end|>"
CACHE_VARIABLE = "VWN_REF_CACHE"
FORMAT = 1  # raised when the code below makes other arrays from the same files
SMALLEST_VOCABULARY = 257  # every byte, and the end of a document
LARGEST_VOCABULARY = 2**20

# Not prose, not code to learn from (tables of encodings, of help texts), or not part of every installation.
NOT_LIBRARY = {"__pycache__", "site-packages", "dist-packages", "encodings", "pydoc_data", "ensurepip"}
NOT_LIBRARY |= {"idlelib", "lib2to3", "turtledemo"}
TESTS = {"test", "tests", "idle_test"}
BROKEN_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)


@dataclass(frozen=True)
class DataConfig:
    """Everything that fixes a corpus and its tokens. The default needs no download.

    Raises ValueError at construction for every inconsistent choice, naming the field.
    """

    files: tuple[str, ...] = ()
    """Local files, folders or patterns: Parquet, JSON lines, or text (any other ending), gzipped or not. Empty:
    the sources of the running Python's standard library, or `dataset`."""
    dataset: str | None = None
    """A dataset on the hub, by name; it is streamed once, up to the caps below, and kept in the cache."""
    dataset_config: str | None = None
    """Which configuration of `dataset`, where it has several."""
    dataset_split: str = "train"
    """Which split of `dataset`; validation is cut out of it by document."""
    dataset_revision: str | None = None
    """Branch, tag or commit of `dataset`. None: the newest when it is first streamed."""
    text_column: str = "text"
    """Column that holds the text, in Parquet, JSON lines and `dataset`."""
    sample_by: Literal["document", "paragraph", "line"] = "document"
    """What is one document of a text file: the whole file, a paragraph (ended by a blank line), or a line."""
    library_tests: bool = False
    """Take the standard library's tests too: about three times as much text, where they are installed."""
    max_documents: int | None = None
    """Stop after this many documents. None: no cap."""
    max_bytes: int | None = None
    """Stop before the document that would bring the text over this many bytes of UTF-8. None: no cap."""
    vocab_size: int = 1024
    """Tokens of the byte-level BPE, 256 bytes and the end of a document among them. 257: plain bytes."""
    val_fraction: float = 0.1
    """Expected share of documents in validation; greater than 0, less than 1."""
    split_seed: int = 0
    """Another number gives another split into training and validation."""
    cache_dir: str | None = None
    """Where token arrays are kept. None: the environment's VWN_REF_CACHE, else the user's cache folder."""

    def __post_init__(self) -> None:
        if isinstance(self.files, str | os.PathLike) or not isinstance(self.files, Iterable):
            raise ValueError(f"data.files = {self.files!r}: must be a tuple of names, ({str(self.files)!r},)")
        object.__setattr__(self, "files", tuple(path_text("data.files", file) for file in self.files))
        if self.cache_dir is not None:
            object.__setattr__(self, "cache_dir", path_text("data.cache_dir", self.cache_dir))
        for name in ("dataset", "dataset_config", "dataset_split", "dataset_revision", "text_column"):
            if getattr(self, name) is not None or name in ("dataset_split", "text_column"):
                check_text(f"data.{name}", getattr(self, name))
        check_bool("data.library_tests", self.library_tests)
        check_int("data.vocab_size", self.vocab_size, least=SMALLEST_VOCABULARY)
        if self.vocab_size > LARGEST_VOCABULARY:
            raise ValueError(f"data.vocab_size = {self.vocab_size}: must be ≤ {LARGEST_VOCABULARY}")
        check_float("data.val_fraction", self.val_fraction, above=True)
        if self.val_fraction >= 1:
            raise ValueError(f"data.val_fraction = {self.val_fraction}: must be < 1, training needs documents")
        check_int("data.split_seed", self.split_seed, least=0)
        check_choice("data.sample_by", self.sample_by, ("document", "paragraph", "line"))
        for name in ("max_documents", "max_bytes"):
            if getattr(self, name) is not None:
                check_int(f"data.{name}", getattr(self, name))
        if self.files and self.dataset is not None:
            raise ValueError(f"data.files = {self.files}: must be empty where data.dataset = {self.dataset!r}")


def path_text(name: str, value: object) -> str:
    """A file's name as text, for JSON. Raises ValueError for an empty one, or what is neither a string nor a path."""
    text = str(value) if isinstance(value, os.PathLike) else value
    check_text(name, text)
    return text


@dataclass(frozen=True)
class Corpus:
    """Tokens of one corpus. `train` and `val` are 1-D memory maps, uint16 or uint32, every document followed by
    the token `end`."""

    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer
    train_documents: int
    val_documents: int
    train_bytes: int
    val_bytes: int
    digest: str
    """SHA-256 over tokenizer and tokens: two corpora with the same digest train the same model."""
    folder: Path

    @property
    def end(self) -> int:
        """Token id that ends a document."""
        return self.tokenizer.token_to_id(END)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; no end-of-document token is added, nor made from its spelling."""
        return encode(self.tokenizer, text)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Text of token ids; the end of a document shows as `<|end|>`."""
        return decode(self.tokenizer, tokens)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of `text`."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def decode(tokenizer: Tokenizer, tokens: Sequence[int] | np.ndarray) -> str:
    """Text of token ids."""
    return tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False)


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer kept by `load_corpus` or by a run. Raises ValueError where it is missing or damaged."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more exact
        raise ValueError(f"{path}: must be a tokenizer's JSON file: {error}") from error
    tokenizer.encode_special_tokens = True  # "<|end|>" inside a document is text; the file does not keep this
    return tokenizer


def cache_folder(config: DataConfig) -> Path:
    """Folder that holds every cached corpus: `config.cache_dir`, or VWN_REF_CACHE, or the user's cache."""
    from platformdirs import user_cache_dir

    chosen = config.cache_dir or os.environ.get(CACHE_VARIABLE) or user_cache_dir("vwn_ref", appauthor=False)
    return Path(chosen).expanduser()


def load_corpus(config: DataConfig) -> Corpus:
    """The corpus that `config` describes, from the cache where it is there and undamaged.

    The cache key covers the content of the files and every choice that changes the tokens, the versions of
    `tokenizers` and `datasets` among them.

    Raises FileNotFoundError for a missing file, ConnectionError where the hub cannot be reached, ValueError for
    everything about the content: unreadable file, wrong column, no documents, a vocabulary the text cannot fill.
    """
    # Nobody else may write beside what the kernels load as code: a umask of 002 would let the group.
    folder = cache_folder(config)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FileExistsError(f"data.cache_dir = {str(folder)!r}: must be a folder, or a new one: {error}") from error
    files = find_files(config)
    key = {
        "format": FORMAT,
        "files": [(kind(path), file_digest(path)) for path in files],
        "text_column": "text" if config.dataset else config.text_column,
        **{name: importlib.metadata.version(name) for name in ("datasets", "tokenizers")},
    }
    for name in ("sample_by", "max_documents", "max_bytes", "vocab_size", "val_fraction", "split_seed"):
        key[name] = getattr(config, name)
    folder = cache_folder(config) / "corpora" / json_digest(key)[:24]
    manifest = cached_folder(folder, lambda temporary: build(config, files, temporary))
    return Corpus(
        train=np.load(folder / "train.npy", mmap_mode="r"),
        val=np.load(folder / "val.npy", mmap_mode="r"),
        tokenizer=load_tokenizer(folder / "tokenizer.json"),
        **{name: manifest[name] for name in ("train_documents", "val_documents", "train_bytes", "val_bytes")},
        digest=json_digest(manifest["files"]),
        folder=folder,
    )


# ---------------------------------------------------------------------------------------------- which files


def find_files(config: DataConfig) -> list[Path]:
    """The files to read, in the order to read them; a dataset of the hub is brought to one local file first."""
    if config.dataset is not None:
        return [hub_file(config)]
    if not config.files:
        return library_files(config.library_tests)
    found: dict[Path, None] = {}  # an ordered set: patterns may overlap
    for pattern in config.files:
        path = Path(pattern).expanduser()
        if path.is_file():
            matches = [path]
        elif path.is_dir():
            matches = sorted(p for p in path.rglob("*") if p.is_file())
        else:
            matches = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not matches:
            raise FileNotFoundError(f"data.files: {pattern!r} must name a file, or a pattern or folder with files")
        found.update(dict.fromkeys(path.resolve() for path in matches))
    return list(found)


def library_files(tests: bool = False) -> list[Path]:
    """Sources of the running Python's standard library that are UTF-8, by relative path."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = NOT_LIBRARY if tests else NOT_LIBRARY | TESTS
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    files = [paths[name] for name in sorted(paths) if skipped.isdisjoint(Path(name).parts) and is_text(paths[name])]
    if not files:
        raise FileNotFoundError(
            f"no sources of the standard library in {root}: name text with data.files, or install them"
        )
    return files


def is_text(path: Path) -> bool:
    """Whether a file, gzipped or not, is UTF-8; a few of the library's tests are not, on purpose."""
    content = path.read_bytes()
    try:
        (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (UnicodeDecodeError, *BROKEN_GZIP):
        return False
    return True


def hub_file(config: DataConfig) -> Path:
    """A dataset of the hub as one local Parquet file with a column `text`, streamed on first use."""
    fields = ("dataset", "dataset_config", "dataset_split", "dataset_revision", "text_column")
    key = {name: getattr(config, name) for name in (*fields, "max_documents", "max_bytes")}
    folder = cache_folder(config) / "hub" / json_digest(key)[:24]

    def build(temporary: Path) -> dict:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema({"text": pa.string()})
        texts = capped(hub_documents(config), config)
        with pq.ParquetWriter(temporary / "text.parquet", schema) as writer:
            for batch in batches(texts, 1000):
                writer.write_table(pa.table({"text": batch}, schema=schema))
        return key

    cached_folder(folder, build)
    return folder / "text.parquet"


def hub_documents(config: DataConfig) -> Iterator[str]:
    """The texts of `config.dataset`, streamed."""
    datasets = import_datasets()
    try:
        rows = datasets.load_dataset(
            config.dataset,
            config.dataset_config,
            split=config.dataset_split,
            revision=config.dataset_revision,
            streaming=True,
        )
        yield from column(rows, config.text_column, f"dataset {config.dataset!r}")
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(f"data.dataset = {config.dataset!r}: must be a dataset of the hub: {error}") from error
    except OSError as error:  # ConnectionError and what the transport raises half-way
        raise ConnectionError(
            f"data.dataset = {config.dataset!r}: the hub cannot be reached ({error}). Go online for the first use "
            "(it is kept in the cache after that), or name local text with data.files, or leave both out for the "
            "standard library's sources"
        ) from error


# -------------------------------------------------------------------------------------------- documents


def kind(path: Path) -> str:
    """What reads a file: "json", "parquet", or "text" for every other ending."""
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    return {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}.get(suffix, "text")


def import_datasets() -> ModuleType:
    """The package `datasets`: slow to import, and in a notebook it warns of a progress bar that nothing here uses."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")
        import datasets
    return datasets


def read_documents(files: Sequence[Path], config: DataConfig) -> Iterator[str]:
    """Non-empty documents of local files, in order, up to the caps. Makes no network call.

    The readers are called directly: `load_dataset("text", ...)` would tell the hub about every use.
    """
    IterableDataset = import_datasets().IterableDataset
    from pyarrow.parquet import read_metadata

    def rows_of(group: list[Path], what: str) -> Iterator[str]:
        paths = [glob.escape(str(path)) for path in group]  # `datasets` takes them for patterns
        if what == "text":
            return column(IterableDataset.from_text(paths, sample_by=config.sample_by), "text", "text")
        if what == "parquet" and not read_metadata(group[0]).num_rows:  # of which `datasets` makes an error
            return iter(())
        read = IterableDataset.from_json if what == "json" else IterableDataset.from_parquet
        name = "text" if config.dataset else config.text_column
        return column(read(paths), name, str(group[0]))

    def every() -> Iterator[str]:
        for what, group in itertools.groupby((p for p in files if p.stat().st_size), kind):
            group = list(group)
            # Text in one call, it is faster; tables one by one: their columns may differ.
            for part in [group] if what == "text" else [[path] for path in group]:
                try:
                    yield from rows_of(part, what)
                except (UnicodeDecodeError, *BROKEN_GZIP) as error:
                    bad = next((path for path in part if not is_text(path)), part[0])
                    what = "UTF-8 text" if isinstance(error, UnicodeDecodeError) else "a whole gzip file"
                    raise ValueError(f"data.files: {bad} must be {what}: {error}") from error
                except (ValueError, RuntimeError, StopIteration) as error:  # StopIteration: a file without rows
                    if str(error).startswith("data."):
                        raise
                    raise ValueError(f"data.files: {part[0]} cannot be read as {what}: {error}") from error

    return capped(every(), config)


def column(rows: Iterable[dict], name: str, where: str) -> Iterator[str]:
    """Texts in column `name`; empty and missing ones are left out."""
    for row in rows:
        if name not in row:
            raise ValueError(f"data.text_column = {name!r}: must be a column of {where}: {', '.join(row)}")
        text = row[name]
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"data.text_column = {name!r}: must hold text in {where}, holds {type(text).__name__} {text!r:.60}"
            )
        if text:
            yield text


def capped(texts: Iterable[str], config: DataConfig) -> Iterator[str]:
    """`texts` up to `max_documents` and `max_bytes`."""
    total = 0
    for text in itertools.islice(texts, config.max_documents):
        total += n_bytes(text)
        if config.max_bytes is not None and total > config.max_bytes:
            return
        yield text


def n_bytes(text: str) -> int:
    """Length in UTF-8."""
    return len(text.encode(errors="surrogatepass"))


def in_validation(text: str, config: DataConfig) -> bool:
    """Whether a document is for validation: by its content and the seed alone."""
    digest = hashlib.sha256(f"{config.split_seed}:".encode() + text.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8]) < config.val_fraction * 2**64


def batches(items: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of `size` items, the last one shorter."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


# ------------------------------------------------------------------------------------------------ tokens


def build(config: DataConfig, files: Sequence[Path], folder: Path) -> dict:
    """Write tokenizer.json, train.npy and val.npy into `folder`; returns what the manifest keeps."""
    documents = {"train": 0, "val": 0}
    size = {"train": 0, "val": 0}
    for text in read_documents(files, config):
        part = "val" if in_validation(text, config) else "train"
        documents[part] += 1
        size[part] += n_bytes(text)
    total = documents["train"] + documents["val"]
    if not total:
        within = "" if config.max_bytes is None else f" within data.max_bytes = {config.max_bytes}"
        raise ValueError(f"the corpus is empty: no document with text in {source(config)}{within}")
    for part in ("train", "val"):
        if not documents[part]:
            raise ValueError(
                f"data.val_fraction = {config.val_fraction}: leaves no document for {part}, the corpus has {total}; "
                "more documents are needed (data.sample_by cuts text files into paragraphs or lines), or another "
                "fraction or data.split_seed"
            )

    tokenizer = train_tokenizer(
        (text for text in read_documents(files, config) if not in_validation(text, config)), config.vocab_size
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_tokens(load_tokenizer(folder / "tokenizer.json"), read_documents(files, config), config, folder)
    return {
        "train_documents": documents["train"],
        "val_documents": documents["val"],
        "train_bytes": size["train"],
        "val_bytes": size["val"],
        "source": source(config),
    }


def source(config: DataConfig) -> str:
    """Where the text comes from, in words."""
    if config.dataset is not None:
        return f"dataset {config.dataset!r}, split {config.dataset_split!r}"
    return f"files {', '.join(config.files)}" if config.files else "the standard library"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` tokens: lossless for every text, no unknown token.

    Raises ValueError if `texts` do not hold so many merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"data.vocab_size = {vocab_size}: too large, the training documents give only "
            f"{tokenizer.get_vocab_size()} tokens; it must be no more than that"
        )
    return tokenizer


def write_tokens(tokenizer: Tokenizer, texts: Iterable[str], config: DataConfig, folder: Path) -> None:
    """Encode `texts` to train.npy and val.npy, a batch in memory at a time."""
    dtype = np.uint16 if config.vocab_size <= 2**16 else np.uint32
    end = tokenizer.token_to_id(END)
    raw = {part: folder / f"{part}.raw" for part in ("train", "val")}
    with raw["train"].open("wb") as train, raw["val"].open("wb") as val:
        for batch in batches(texts, 256):
            encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            for text, encoding in zip(batch, encodings, strict=True):
                file = val if in_validation(text, config) else train
                file.write(np.array([*encoding.ids, end], dtype=dtype).tobytes())
    for part, path in raw.items():  # the header of a .npy needs the length, known only now
        tokens = np.memmap(path, dtype=dtype, mode="r")
        np.save(folder / f"{part}.npy", tokens)
        del tokens
        path.unlink()


def describe(corpus: Corpus) -> str:
    """One line for people."""
    return (
        f"{corpus.train_documents:,} + {corpus.val_documents:,} documents, "
        f"{(corpus.train_bytes + corpus.val_bytes) / 1e6:.1f} MB, "
        f"{len(corpus.train):,} + {len(corpus.val):,} tokens of {corpus.tokenizer.get_vocab_size():,}"
    )


def main() -> None:
    """Build the default corpus and print what it is: `python -m vwn_ref.experiments.data --vocab-size 4096`; errors are
    told in a line."""
    import tyro

    from vwn_ref.experiments.console import told

    config = tyro.cli(DataConfig, prog="python -m vwn_ref.experiments.data")
    with told():
        corpus = load_corpus(config)
    print(json.dumps({"corpus": describe(corpus), "folder": str(corpus.folder)}, indent=1))


if __name__ == "__main__":
    main()
