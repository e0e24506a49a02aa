"""Downstream tasks on models whose answers are known, on text that can be counted by hand."""

import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from vwn_ref.experiments import downstream as module
from vwn_ref.experiments.checkpoint import load, save
from vwn_ref.experiments.code_text import Bracket, Name, Stream, encode_text, read_code
from vwn_ref.experiments.data import DataConfig, load_tokenizer, train_tokenizer
from vwn_ref.experiments.downstream import (
    DownstreamArguments,
    Part,
    Settings,
    Text,
    brackets,
    closer_tokens,
    copying,
    draw_copies,
    estimate,
    evaluate,
    execute,
    find_runs,
    heldout,
    identifiers,
    keep,
    load_text,
    package_files,
    score,
    sort_names,
    table,
    tile,
    trained_on,
    view,
)
from vwn_ref.experiments.train import train

BYTES = 257
TOLERANCE = 1e-5  # of nats: logits, softmax and logarithm in float32


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    """A tokenizer whose tokens are bytes: of ASCII, character i of the first document is token i + 1 of the stream."""
    path = tmp_path_factory.mktemp("bytes") / "tokenizer.json"
    train_tokenizer(["a"], BYTES).save(str(path))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A tokenizer with tokens such as `self`, `._`, `((`, `)),` and ` )`."""
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.json"
    text = "self._bar(self._foo((1)), (self, [2]), {3: [4]}) )\n" * 3
    train_tokenizer([text], BYTES + 18).save(str(path))
    return load_tokenizer(path)


def uniform(tokens):
    return torch.zeros(*tokens.shape, BYTES)


def unigram(tokens):
    """Every token costs something else, and the same wherever it stands."""
    return (torch.arange(BYTES) * 0.01).expand(*tokens.shape, BYTES)


def unigram_nats(ids):
    logits = np.arange(BYTES) * 0.01
    return np.log(np.exp(logits).sum()) - logits[ids]


def copier(tokens):
    """Sure of what followed the last earlier occurrence of the token, or of the token itself where there was none."""
    logits = torch.zeros(*tokens.shape, BYTES)
    for row, line in enumerate(tokens.tolist()):
        followed = {}
        for i, token in enumerate(line):
            if i:
                followed[line[i - 1]] = token
            logits[row, i, followed.get(token, token)] = 50.0
    return logits


def successor(tokens):
    """Sure of the next number."""
    return torch.nn.functional.one_hot((tokens + 1) % BYTES, BYTES) * 50.0


def cost(i):
    """Nats of target i under the ruler; no straight line, so that a shift shows in differences too."""
    return 5e-4 * i**2


def ruler(stream):
    """A model that reads the stream in one window and knows by its place what each target costs."""

    def model(tokens):
        nats = cost(torch.arange(1, tokens.shape[1] + 1))
        rest = torch.log(-torch.expm1(-nats) / (BYTES - 1))  # shared by all other tokens
        logits = rest[:, None].repeat(1, BYTES)
        known = stream.tokens[1 : len(nats) + 1]
        logits[torch.arange(len(known)), torch.from_numpy(known)] = -nats[: len(known)]
        return logits[None]

    return model


def matcher(tokenizer):
    """Sure of the closing bracket that the innermost open one in view needs, of ")" where none is open."""
    names = {bracket: tokenizer.encode(bracket, add_special_tokens=False).ids[0] for bracket in "([{)]}"}
    closes = {names[a]: names[b] for a, b in (")(", "][", "}{") for a, b in [(b, a)]}

    def model(tokens):
        logits = torch.zeros(*tokens.shape, BYTES)
        for row, line in enumerate(tokens.tolist()):
            opened = []
            for i, token in enumerate(line):
                if token in closes:
                    opened.append(closes[token])
                elif opened and token == opened[-1]:
                    opened.pop()
                logits[row, i, opened[-1] if opened else names[")"]] = 50.0
        return logits

    return model


def stream_of(*tokens):
    return Stream(np.array(tokens, dtype=np.int64), [], [], 1, 1)


# --------------------------------------------------------------------------------------------------- statistics


def test_estimates():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    alone = estimate(Part(values, np.arange(4)))
    assert alone == {"mean": 4.0, "se": pytest.approx(values.std(ddof=1) / 2), "n": 4}
    # Clusters of equal values know no more than one value each
    thrice = estimate(Part(values.repeat(3), np.arange(4).repeat(3)))
    assert (thrice["mean"], thrice["se"], thrice["n"]) == (4.0, pytest.approx(alone["se"]), 12)
    # Paired by cluster: what both have falls out of the difference
    other = values + np.array([0.0, 0.5, 0.0, 0.5])
    difference = estimate(Part(other, np.arange(4)), Part(values, np.arange(4), -1.0))
    assert difference["mean"] == pytest.approx(0.25)
    assert difference["se"] == pytest.approx(np.std([0, 0.5, 0, 0.5], ddof=1) / 2)
    # Apart: variances add up, n / (n − 1) taken of all four clusters
    apart = estimate(Part(np.array([1.0, 3.0]), np.array([0, 1])), Part(np.array([0.0, 4.0]), np.array([2, 3]), -1.0))
    assert apart["se"] == pytest.approx(math.sqrt(4 / 3 * (2 * 0.5**2 + 2 * 1.0**2)))
    assert estimate(Part(values, np.zeros(4)))["se"] is None
    assert estimate(Part(values, np.arange(4)), Part(values[:0], np.arange(0))) is None


# ------------------------------------------------------------------------------------------------ the whole text


def test_windows_cover_every_target_once():
    assert tile(np.arange(8), 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 7, 7]]
    assert tile(np.arange(7), 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
    assert tile(np.arange(3), 8).tolist() == [[0, 1, 2, 2, 2, 2, 2, 2, 2]]


@pytest.mark.parametrize("seq_len", [1, 2, 3, 5, 8, 40])
def test_targets_are_in_their_place(characters, seq_len):
    stream = stream_of(200, 1, 2, 3, 1, 2, 5, 200)
    seen = view(successor, characters, stream, seq_len)
    assert seen.right.tolist() == [False, True, True, False, True, False, False]
    view_of_unigram = view(unigram, characters, stream, seq_len)
    assert view_of_unigram.nats == pytest.approx(unigram_nats([1, 2, 3, 1, 2, 5, 200]), abs=TOLERANCE)


def test_loss_a_token_and_a_byte(characters):
    text = Text(("ab\n", "é"), "")  # 3 + 2 bytes, each a token, and two ends
    stream = encode_text(characters, text.documents)
    found = heldout(view(uniform, characters, stream, 3), stream, text)
    assert (found["tokens"], found["bytes"], found["loss"]["n"]) == (7, 5, 7)
    assert found["loss"]["mean"] == pytest.approx(math.log(BYTES), abs=TOLERANCE)
    assert found["bits_per_byte"]["mean"] == pytest.approx(7 * math.log2(BYTES) / 5, abs=TOLERANCE)
    assert found["unigram"] == pytest.approx(5 / 7 * math.log(7) + 2 / 7 * math.log(3.5))  # five bytes, two ends
    measured = heldout(view(ruler(stream), characters, stream, 8), stream, text)
    total = sum(map(cost, range(1, 8)))
    assert measured["loss"]["mean"] == pytest.approx(total / 7, abs=TOLERANCE)
    assert measured["bits_per_byte"]["mean"] == pytest.approx(total / math.log(2) / 5, abs=TOLERANCE)


# -------------------------------------------------------------------------------------------------------- copying


def test_copies_are_what_they_should_be():
    copies = draw_copies(np.arange(1000), 64, 300, seed=0)
    assert copies.windows.shape == copies.control.shape == (300, 65) and copies.span == 8
    for window, control, start, gap in zip(copies.windows, copies.control, copies.start, copies.other, strict=True):
        assert start + 8 + gap + 8 == 65 and 1 <= gap <= 48 and start >= 1
        pieces = (window[: start + 8], window[start + 8 : -8], control[: start + 8])
        assert all((np.diff(piece) == 1).all() for piece in pieces)  # passages of the text
        assert len(set(np.concatenate(pieces).tolist())) == sum(map(len, pieces))  # no two of them overlap
        assert (window[start : start + 8] == window[-8:]).all()
        assert (control[start + 8 :] == window[start + 8 :]).all()
    assert {1, 48} <= set(copies.other.tolist())
    again, other = (draw_copies(np.arange(1000), 64, 300, seed=seed) for seed in (0, 1))
    assert (again.windows == copies.windows).all() and (other.windows != copies.windows).any()


@pytest.fixture(scope="module")
def distinct():
    return stream_of(*np.random.default_rng(0).permutation(256))


def test_who_copies_is_right_where_it_is_repeated_and_nowhere_else(characters, distinct):
    found = copying(copier, characters, distinct, 16, Settings(copies=50))
    assert (found["items"], found["span"]) == (50, 4)
    rates = {name: found[name]["accuracy"] for name in ("first", "second", "control")}
    assert {name: (rate["mean"], rate["n"]) for name, rate in rates.items()} == {
        "first": (0.0, 150),  # the 2nd to the 4th token of each span
        "second": (1.0, 150),
        "control": (0.0, 150),
    }
    assert found["second"]["loss"]["mean"] == pytest.approx(0.0, abs=TOLERANCE)
    assert found["gain"]["mean"] == pytest.approx(50.0, abs=1e-4)  # log(1 + 256 e^−50) to float32
    assert found["gain_near"]["mean"] == found["gain_far"]["mean"] == pytest.approx(50.0, abs=1e-4)
    assert found["gain_near"]["n"] + found["gain_far"]["n"] == 150
    assert found["gain_accuracy"]["mean"] == 1.0


def test_the_same_tokens_are_compared(characters, distinct):
    """A model that looks at nothing gains nothing, to the last item, and loses what the span's tokens cost."""
    found = copying(unigram, characters, distinct, 16, Settings(copies=50, seed=3))
    for name in ("gain", "gain_first", "gain_near", "gain_far"):
        assert (found[name]["mean"], found[name]["se"]) == (0.0, 0.0)
    spans = draw_copies(distinct.tokens, 16, 50, seed=3).windows[:, -3:]
    assert found["first"]["loss"]["mean"] == pytest.approx(unigram_nats(spans).mean(), abs=TOLERANCE)


def test_near_and_far(characters):
    """On a stream that counts, who knows the successor is right at both places, near and far."""
    stream = stream_of(*range(256))
    model = lambda tokens: copier(tokens) + (tokens[:, :1, None] > 200) * successor(tokens) * 2  # noqa: E731
    found = copying(model, characters, stream, 16, Settings(copies=40))
    copies = draw_copies(stream.tokens, 16, 40, seed=0)
    near = copies.other <= 4.5  # half of the nine tokens that are no span's
    assert (found["gain_near"]["n"], found["gain_far"]["n"]) == (3 * near.sum(), 3 * (~near).sum())
    knows = copies.control[:, 0] > 200  # then the control is known too, and nothing is gained
    for name, rows in (("gain_near", near), ("gain_far", ~near)):
        assert 0 < knows[rows].mean() < 1
        assert found[name]["mean"] == pytest.approx(50 * (1 - knows[rows].mean()), abs=1e-3)


def test_too_little_to_copy(characters):
    with pytest.raises(ValueError, match="seq_len = 7: must be ≥ 8"):
        draw_copies(np.arange(1000), 7, 10, 0)
    with pytest.raises(ValueError, match=re.escape("has 127 tokens: must be ≥ 8 · seq_len = 128")):
        draw_copies(np.arange(127), 16, 10, 0)


# ------------------------------------------------------------------------------------------------------- brackets


def test_brackets_of_code(characters):
    text = 'x = ")" # ]\nf(a[1], {2: f"{(y)}"})\n'
    line = text.index("f(")
    pairs = [("[", "]"), ("{2", "})"), ("(a", ")\n")]
    expected = [(text.index(a, line), text.index(b, line)) for a, b in pairs]
    code = read_code(text)
    assert code.brackets == expected
    assert [text[a:b] for a, b in code.names] == ["x", "f", "a"]
    stream = encode_text(characters, [text])
    assert stream.brackets == [Bracket(a + 1, b + 1, kind) for (a, b), kind in zip(expected, (1, 2, 0), strict=True)]
    second = encode_text(characters, ["()\n", text])  # five tokens stand before it: end ( ) \n end
    assert second.brackets[1:] == [
        Bracket(a + 5, b + 5, kind) for (a, b), kind in zip(expected, (1, 2, 0), strict=True)
    ]


@pytest.mark.parametrize("text", ["(]\n", "(\n", ")\n", "'''\n", "  a\n b\n"])
def test_what_is_not_code(characters, text):
    assert read_code(text) is None
    stream = encode_text(characters, [text, "a\n"])
    assert (stream.documents, stream.python, [name.text for name in stream.names]) == (2, 1, ["a"])


def test_right_kinds(characters):
    text = "f(a[1], (2, 3), [4, {5}])\n" * 3
    stream = encode_text(characters, [text])
    right = brackets(view(matcher(characters), characters, stream, 100), stream)
    assert (right["items"], right["accuracy"]["mean"], right["balanced"]["mean"]) == (15, 1.0, 1.0)
    assert right["loss"]["mean"] == pytest.approx(0.0, abs=TOLERANCE)
    assert right["majority"] == 6 / 15
    assert {kind: value["n"] for kind, value in right["kind"].items()} == {")": 6, "]": 6, "}": 3}
    # Always ")": right in 6 of 15, and by kind in one of three
    one = torch.zeros(BYTES)
    one[characters.encode(")", add_special_tokens=False).ids] = 3.0
    always = brackets(view(lambda tokens: one.expand(*tokens.shape, BYTES), characters, stream, 100), stream)
    assert always["accuracy"]["mean"] == pytest.approx(0.4)
    assert always["balanced"]["mean"] == pytest.approx(1 / 3)
    expected = math.log(math.exp(3) + 2) - 3 * 0.4  # among three, whatever the other 254 have
    assert always["loss"]["mean"] == pytest.approx(expected, abs=TOLERANCE)
    # A tie of two is half right
    one[characters.encode("]", add_special_tokens=False).ids] = 3.0
    tie = brackets(view(lambda tokens: one.expand(*tokens.shape, BYTES), characters, stream, 100), stream)
    assert {kind: value["mean"] for kind, value in tie["kind"].items()} == {")": 0.5, "]": 0.5, "}": 0.0}


def test_chance(characters):
    stream = encode_text(characters, ["f(a[1], {2: 3})\n" * 4])
    found = brackets(view(uniform, characters, stream, 16), stream)
    assert found["accuracy"]["mean"] == found["balanced"]["mean"] == pytest.approx(1 / 3)
    assert found["loss"]["mean"] == pytest.approx(math.log(3), abs=TOLERANCE)


def test_the_opening_bracket_must_be_in_view(characters):
    stream = encode_text(characters, ["1+(2)\n"])  # end 1 + ( 2 ): opening 3, closing 5
    items = {}
    for seq_len in range(1, 7):
        found = brackets(view(uniform, characters, stream, seq_len), stream)
        items[seq_len] = 0 if found is None else found["items"]
    # 5 is a target of the window that begins at 4, 4, 3, 4, 0, 0
    assert items == {1: 0, 2: 0, 3: 1, 4: 0, 5: 1, 6: 1}


def test_distances(characters):
    gaps = [1, 4, 5, 16, 17, 64, 65]  # tokens from "(" to ")"
    stream = encode_text(characters, ["".join(f"({'1' * (gap - 1)})\n" for gap in gaps)])
    found = brackets(view(matcher(characters), characters, stream, 300), stream)
    counts = {name: value["accuracy"]["n"] for name, value in found["distance"].items()}
    assert counts == {"1-4": 2, "5-16": 2, "17-64": 2, "65-": 1}


def test_longer_tokens_that_begin_with_a_bracket(pieces):
    text = "self._bar(self._foo((1)), (self, [2]), {3: [4]})\n(1\n )\n"
    stream = encode_text(pieces, [text])
    begin = [i for i, token in enumerate(stream.tokens) if pieces.decode([token]).lstrip(" ")[:1] in (")", "]", "}")]
    assert begin == sorted(item.closing for item in stream.brackets)
    assert text.count(")") + text.count("]") + text.count("}") > len(begin)  # some stand inside a token
    for item in stream.brackets:
        assert pieces.decode(stream.tokens[[item.opening]]).strip()[-1:] in ("(", "[", "{")
    groups = closer_tokens(pieces)
    assert {pieces.decode([token]) for token in groups[0].tolist()} == {")", "),", ")),", " )"}
    assert " )" in [pieces.decode(stream.tokens[[item.closing]]) for item in stream.brackets]
    # Nearly all mass on ")),": it is mass on ")"
    logits = torch.zeros(pieces.get_vocab_size())
    logits[pieces.token_to_id(")),")] = 9.0
    scores = score(lambda tokens: logits.expand(*tokens.shape, -1), pieces, np.zeros((1, 2), dtype=np.int64))
    p = logits.softmax(0)
    assert np.exp(scores.closers[0, 0]) == pytest.approx([float(p[group].sum()) for group in groups], abs=TOLERANCE)


# ---------------------------------------------------------------------------------------------------- identifiers


CODE = "foo = 1\nbar = foo\nfoo.bar\nif foo:\n    pass # bar\n"


def test_names_first_and_again(characters):
    stream = encode_text(characters, [CODE])
    at = [match.start() + 1 for match in re.finditer("foo|bar", CODE)][:6]  # the last bar is in a comment
    assert [(name.first, name.last) for name in stream.names] == [(i, i + 2) for i in at]
    found = sort_names(stream, view(uniform, characters, stream, 64))
    assert ([name.first for name in found.first], found.left_out) == ([at[0], at[1]], 0)
    assert [name.first for name in found.repeated] == at[2:]


def test_what_names_cost(characters):
    """With the ruler: means over the names' targets, and for the same name weighted by its repetitions."""
    stream = encode_text(characters, [CODE])
    foo, bar, *again = [sum(cost(name.first + i) for i in range(3)) for name in stream.names]
    found = identifiers(view(ruler(stream), characters, stream, 64), stream)
    assert found["names"] == {"first": 2, "repeated": 4, "left_out": 0}
    assert (found["first"]["loss"]["n"], found["repeated"]["loss"]["n"]) == (6, 12)
    assert found["first"]["loss"]["mean"] == pytest.approx((foo + bar) / 6, abs=TOLERANCE)
    assert found["repeated"]["loss"]["mean"] == pytest.approx(sum(again) / 12, abs=TOLERANCE)
    assert found["gain"]["mean"] == pytest.approx((foo + bar) / 6 - sum(again) / 12, abs=TOLERANCE)
    gains = [foo - again[0], foo - again[1], bar - again[2], foo - again[3]]
    assert found["gain_same_name"]["mean"] == pytest.approx(sum(gains) / 4, abs=TOLERANCE)
    assert found["gain_same_name"]["n"] == 4


def test_who_copies_recalls(characters):
    stream = encode_text(characters, ["abc;abc;abc\n"])
    found = identifiers(view(copier, characters, stream, 64), stream)
    assert found["first"]["accuracy"]["mean"] == 0.0
    # the second time what follows ";" is not known yet, "a"; the third time it is
    assert found["repeated"]["accuracy"]["mean"] == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("text", "seq_len", "first", "repeated", "left_out"),
    [
        ("ab=ab\n", 8, [1], [4], 0),
        ("ab=ab\n", 5, [1], [4], 0),  # targets 1 … 5 are one window
        ("ab=ab\n", 4, [1], [], 1),  # 4 and 5 are targets of two windows
        ("ab=ab\n", 3, [1, 4], [], 0),  # the second window begins behind the first name
        ("ab=ab\n", 1, [], [], 2),
        ("123;ab;ab\n", 5, [], [8], 1),  # the window of 8 begins with the first name, which two windows share
        ("1;ab;ab\n", 4, [3], [], 1),  # of 3 and 4, only 4 is in view of 6 and 7
    ],
)
def test_names_and_windows(characters, text, seq_len, first, repeated, left_out):
    stream = encode_text(characters, [text])
    found = sort_names(stream, view(uniform, characters, stream, seq_len))
    assert ([name.first for name in found.first], [name.first for name in found.repeated]) == (first, repeated)
    assert found.left_out == left_out


def test_names_that_share_a_token_are_left_out(pieces):
    stream = encode_text(pieces, ["self._bar = self\n"])
    texts = [pieces.decode([token]) for token in stream.tokens]
    by_name = {name.first: name for name in stream.names}
    assert texts[1] == "self" and by_name[1] == Name("self", 1, 1, True)
    private = next(name for name in stream.names if name.text == "_bar")
    assert texts[private.first] == "._" and not private.alone
    last = stream.names[-1]
    assert last.text == "self" and last.alone and "".join(texts[last.first : last.last + 1]).strip(" ") == "self"
    seen = view(lambda tokens: torch.zeros(*tokens.shape, pieces.get_vocab_size()), pieces, stream, 64)
    found = sort_names(stream, seen)
    assert (len(found.first), len(found.repeated), found.left_out) == (1, 1, 1)
    behind = train_tokenizer(["a_) " * 9], BYTES + 1)  # one token more: `_)`
    assert [name.alone for name in encode_text(behind, ["(a, a_)\n"]).names] == [True, False]


def test_text_that_is_not_python(characters):
    text = Text(("it isn't (so) easy " * 20,), "prose")
    found = evaluate(uniform, characters, 16, text, Settings(copies=3))
    assert found["documents"] == {"all": 1, "python": 0}
    assert found["brackets"] is None and found["identifiers"] is None
    assert found["copying"]["gain"]["mean"] == 0.0


# ----------------------------------------------------------------------------------------------------------- text


def test_default_text_is_of_another_source():
    text = load_text(Settings(max_bytes=20_000))
    assert re.fullmatch(r"pytest \d+\.\d+\.\d+", text.source)
    names = [path.as_posix() for path in text.files]
    assert names == sorted(names) and all(name.endswith(".py") for name in names)
    assert 0 < sum(len(document.encode()) for document in text.documents) <= 20_000
    assert trained_on(DataConfig(), text.files) == []
    assert text.digest != load_text(Settings(max_bytes=4_500)).digest


def test_text_that_is_known(tmp_path, text_folder):
    copy = tmp_path / "other_name.py"
    shutil.copyfile(text_folder / "003.txt", copy)
    (tmp_path / "new.py").write_text("x = 1\n")
    corpus = DataConfig(files=(str(text_folder),))
    assert trained_on(corpus, [tmp_path / "new.py", copy]) == [copy]
    assert trained_on(corpus, [tmp_path / "new.py"]) == []
    assert trained_on(DataConfig(files=(str(tmp_path / "gone"),)), [copy]) is None
    assert trained_on(DataConfig(dataset="some/text"), [copy]) is None
    (tmp_path / "table.jsonl").write_text('{"text": "x = 1"}\n')
    assert trained_on(DataConfig(files=(str(tmp_path / "table.jsonl"),)), [copy]) is None


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Settings(copies=1), "copies = 1: must be an integer ≥ 2"),
        (lambda: Settings(max_bytes=0), "max_bytes = 0: must be an integer ≥ 1"),
        (lambda: Settings(seed=-1), "seed = -1: must be an integer ≥ 0"),
        (lambda: package_files("no-such-package"), "package = 'no-such-package': must be an installed package"),
        (lambda: load_text(Settings(max_bytes=5)), "max_bytes = 5: must be at least the first document of pytest"),
        (lambda: find_runs("gone"), "folder = 'gone': must hold finished runs with weights, has 0 finished without"),
        (lambda: execute(DownstreamArguments(threads=0)), "threads = 0: must be an integer ≥ 1"),
    ],
)
def test_errors(act, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        act()


# ----------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("downstream")
    train(tiny(out=str(folder / "plain-s0"), steps=3, model={"m": None, "n": None}))
    (folder / "text.py").write_text("def width(state):\n    return norm(state, [width(state)])\n" * 20)
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    """A folder with one finished run and a text; and how to evaluate it."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    arguments = DownstreamArguments(folder=str(tmp_path), files=(str(tmp_path / "text.py"),), copies=5)
    return tmp_path, arguments


def result_of(folder, name="plain-s0"):
    return json.loads((folder / name / "downstream.json").read_text())


def test_done_once_with_the_same_settings_and_weights(runs, capsys):
    folder, arguments = runs
    assert execute(arguments) == 0
    first = result_of(folder)
    assert first["brackets"]["items"] > 0 and first["identifiers"]["names"]["repeated"] > 0
    assert first["text"]["checked_not_trained_on"] is True
    stamp = (folder / "plain-s0" / "downstream.json").stat().st_mtime_ns

    def written():
        nonlocal stamp
        before, stamp = stamp, (folder / "plain-s0" / "downstream.json").stat().st_mtime_ns
        return stamp != before

    assert execute(arguments) == 0 and not written() and "plain-s0: done before" in capsys.readouterr().err
    assert execute(replace(arguments, again=True)) == 0 and written()
    again = result_of(folder)
    assert {name: again[name] for name in ("digest", "heldout", "copying")} == {
        name: first[name] for name in ("digest", "heldout", "copying")
    }
    assert execute(replace(arguments, seed=1)) == 0 and written()
    assert result_of(folder)["digest"] != first["digest"]
    tensors, state = load(folder / "plain-s0" / "weights.safetensors")
    tensors["norm.weight"] *= 2
    save(folder / "plain-s0" / "weights.safetensors", tensors, state)
    assert execute(replace(arguments, seed=1)) == 0 and written()
    assert result_of(folder)["heldout"]["loss"] != first["heldout"]["loss"]


def test_a_vocabulary_that_does_not_fit(runs, characters, capsys):
    folder, arguments = runs
    characters.save(str(folder / "plain-s0" / "tokenizer.json"))
    assert execute(arguments) == 1
    said = capsys.readouterr().err
    assert "model.vocab_size = 280: must be the 257 tokens of tokenizer.json" in said
    assert not (folder / "plain-s0" / "downstream.json").exists()


def test_text_of_the_training_corpus_is_refused(runs, text_folder, capsys):
    _, arguments = runs
    assert execute(replace(arguments, files=(str(text_folder),))) == 1
    assert "must not be text that it was trained on, as " in capsys.readouterr().err


def test_half_a_result_is_none(runs, monkeypatch):
    folder, arguments = runs
    execute(arguments)
    before = result_of(folder)

    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr(module, "brackets", broken)
    assert execute(replace(arguments, again=True)) == 1
    assert result_of(folder) == before


def test_table(runs):
    """Two variants, two seeds, numbers put in: means, and Student's t over two pairs by hand."""
    folder, arguments = runs
    execute(arguments)
    losses = {"plain-s0": 3.0, "plain-s1": 3.2, "r2-s0": 2.9, "r2-s1": 3.0}
    for name, loss in losses.items():
        if name != "plain-s0":
            shutil.copytree(folder / "plain-s0", folder / name)
        result, config = result_of(folder, name), json.loads((folder / name / "config.json").read_text())
        result["heldout"]["loss"]["mean"] = loss
        (folder / name / "downstream.json").write_text(json.dumps(result))
        (folder / name / "config.json").write_text(json.dumps({**config, "seed": int(name[-1])}))
    size = json.loads((folder / "plain-s0" / "summary.json").read_text())["parameters"]
    rows = [line.split(" | ") for line in table(folder).splitlines() if line.startswith(("| plain", "| r2"))]
    assert rows[0][:5] == ["| plain", f"{size:,}", "2", "3.1000", ""]
    # differences −0.1 and −0.2: mean −0.15, half width 12.7062 · 0.0707107 / √2
    assert rows[1][:5] == ["| r2", f"{size:,}", "2", "2.9500", "-0.1500 ± 0.6353"]
    assert all(row[4].startswith("+0.0000 ± 0.0000") for row in rows[3::2])  # the other measures are the same
    assert keep(folder, folder / "kept") == 4
    assert table(folder / "kept") == table(folder)
    with pytest.raises(ValueError, match=re.escape("base = 'r4': must be one of plain, r2")):
        table(folder, "r4")
    assert execute(replace(arguments, seed=1)) == 0  # of all four; then one of the old ones comes back
    shutil.copyfile(folder / "kept" / "r2-s1" / "downstream.json", folder / "r2-s1" / "downstream.json")
    with pytest.raises(ValueError, match="must be evaluated on one text with one setting"):
        table(folder)
    for path in folder.glob("*/downstream.json"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape("must hold runs with downstream.json")):
        table(folder)
