"""Python text in tokens, with the places of its brackets and names: what `vwn_ref.experiments.downstream` asks about.

Code is what `tokenize` calls operators and names in a document that Python can parse: brackets and names in strings
(f-strings whole, on every version) and comments are neither asked for nor count as seen.
"""

from __future__ import annotations

import ast
import io
import keyword
import tokenize
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from vwn_ref.experiments.data import END

BRACKETS = {")": "(", "]": "[", "}": "{"}
CLOSERS = "".join(BRACKETS)


class Code(NamedTuple):
    """Places in a document, by character."""

    brackets: list[tuple[int, int]]  # opening, closing
    names: list[tuple[int, int]]  # start, end


# From Python 3.12 on an f-string is several tokens: here it is one string, as before.
STRING_STARTS = {getattr(tokenize, name) for name in ("FSTRING_START", "TSTRING_START") if hasattr(tokenize, name)}
STRING_ENDS = {getattr(tokenize, name) for name in ("FSTRING_END", "TSTRING_END") if hasattr(tokenize, name)}


def read_code(text: str) -> Code | None:
    """Brackets that belong together, in the order of the closing ones, and names of Python code; None if it is not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in strings
            ast.parse(text)  # `tokenize` takes much that is prose
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    begins = [0]  # of lines, as `tokenize` sees them
    for line in io.StringIO(text):
        begins.append(begins[-1] + len(line))
    code, opened, in_string = Code([], []), [], 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            at = begins[token.start[0] - 1] + token.start[1]
            in_string += (token.type in STRING_STARTS) - (token.type in STRING_ENDS)
            if in_string or token.type not in (tokenize.OP, tokenize.NAME):
                continue
            if not text.startswith(token.string, at):  # lines were cut elsewhere
                return None
            if token.type == tokenize.NAME:
                if not keyword.iskeyword(token.string):
                    code.names.append((at, at + len(token.string)))
            elif token.string in BRACKETS.values():
                opened.append(at)
            elif token.string in BRACKETS:
                code.brackets.append((opened.pop(), at))
    except (tokenize.TokenError, SyntaxError, IndexError):
        return None
    return code


class Bracket(NamedTuple):
    """A token that begins with a closing bracket, and the token that has the opening one, by index in the stream."""

    opening: int
    closing: int
    kind: int  # index in CLOSERS


class Name(NamedTuple):
    """A name in code: its first and its last token, by index in the stream."""

    text: str
    first: int
    last: int
    alone: bool  # these tokens hold nothing but the name, and spaces before it


@dataclass(frozen=True)
class Stream:
    """A text in tokens: `end`, document, `end`, document, …, `end`; and what there is to ask about it."""

    tokens: Int[np.ndarray, " n"]
    brackets: list[Bracket]
    names: list[Name]
    documents: int
    python: int
    """Documents that are Python."""


def encode_text(tokenizer: Tokenizer, documents: Sequence[str]) -> Stream:
    """Tokens of the documents, with brackets and names."""
    end = tokenizer.token_to_id(END)
    ids, brackets, names, python = [end], [], [], 0
    for text in documents:
        base, encoding = len(ids), tokenizer.encode(text, add_special_tokens=False)
        ids += [*encoding.ids, end]
        code = read_code(text)
        if code is None:
            continue
        python += 1
        starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T

        def holding(start: int, stop: int, starts=starts, ends=ends) -> tuple[int, int]:  # [start, stop) in characters
            return int(np.searchsorted(ends, start, "right")), int(np.searchsorted(starts, stop, "left")) - 1

        for opening, closing in code.brackets:
            token = holding(closing, closing + 1)[0]
            if not text[starts[token] : closing].strip(" "):
                opened = holding(opening, opening + 1)[0]
                brackets.append(Bracket(base + opened, base + token, CLOSERS.index(text[closing])))
        for start, stop in code.names:
            first, last = holding(start, stop)
            alone = not text[starts[first] : start].strip(" ") and int(ends[last]) == stop
            names.append(Name(text[start:stop], base + first, base + last, alone))
    return Stream(np.array(ids, dtype=np.int64), brackets, names, len(documents), python)
