"""The exercise checker says what differs."""

import importlib.util
from pathlib import Path

import pytest
import torch

spec = importlib.util.spec_from_file_location("course", Path(__file__).parents[2] / "notebooks" / "course.py")
course = importlib.util.module_from_spec(spec)
spec.loader.exec_module(course)


def double(x):
    return 2 * x


@pytest.mark.parametrize(
    "student, said",
    [
        (double, "✓ correct in all 2 cases"),
        (lambda x: x.add_(x), "✓ correct in all 2 cases"),  # writing into the argument spoils no later case
        (lambda x: None, "✗ case 1 of 2: it returned None; is there a return statement?"),
        (lambda x: 2 * x[:1], "✗ case 1 of 2: shape (1,), expected (3,)"),
        (lambda x: "x", "✗ case 1 of 2: expected a number or a tensor, got str"),
        (
            lambda x: 2 * x + (len(x) == 2) * torch.eye(len(x))[1],
            "✗ case 2 of 2: 1 of 2 entries differ; entry [1] is 3, expected 2",
        ),
        (lambda x: x / 0 * 0, "✗ case 1 of 2: 3 of 3 entries differ; entry [0] is nan, expected 2"),
        (lambda x: x @ torch.ones(5), "✗ case 1 of 2: raised RuntimeError"),
    ],
)
def test_check(student, said, capsys):
    course.check(student, double, (torch.ones(3),), (torch.ones(2),))
    assert capsys.readouterr().out.startswith(said)


def test_tuples(capsys):
    course.check(lambda x: (x, 2 * x), lambda x: (x, x), (torch.ones(2),))
    course.check(lambda x: x, lambda x: (x, x), (torch.ones(2),))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("✗ case 1 of 1: result 1: 2 of 2 entries differ")
    assert lines[1] == "✗ case 1 of 1: expected 2 results, got 1"
