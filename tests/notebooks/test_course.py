"""The exercise checker says what differs."""

import importlib.util
import math
import os
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
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
        (lambda x: x.add_(x), "✓ correct in all 2 cases; but it writes into a tensor that it is given"),
        (lambda x: None, "✗ case 1 of 2: it returned None; is there a return statement?"),
        (lambda x: 2 * x[:1], "✗ case 1 of 2: shape (1,), expected (3,)"),
        (
            lambda x: [2 * x, 2 * x],
            "✗ case 1 of 2: expected a number or a tensor, got list (torch.stack makes one of rows)",
        ),
        (lambda x: "x", "✗ case 1 of 2: expected a number or a tensor, got str"),
        (
            lambda x: 2 * x + (len(x) == 2) * torch.eye(len(x))[1],
            "✗ case 2 of 2: 1 of 2 entries differ; entry [1] is 3, expected 2",
        ),
        (lambda x: x / 0 * 0, "✗ case 1 of 2: 3 of 3 entries differ; entry [0] is nan, expected 2"),
        (lambda x: x @ torch.ones(5), "✗ case 1 of 2: raised RuntimeError"),
        (lambda x: (2 * x).numpy()[::-1], "✓ correct in all 2 cases"),  # strides that PyTorch does not take
        (lambda x: (2 * x).numpy().astype(np.longdouble), "✓ correct in all 2 cases"),
        (lambda x: 2 * x + 0j, "✗ case 1 of 2: expected real numbers, got complex ones"),
        (lambda x: (2 * x).to_sparse(), "✗ case 1 of 2: expected a number or a tensor, got Tensor"),
        (lambda x: 10**400, "✗ case 1 of 2: expected a number or a tensor, got int"),
        (
            lambda x: (2.01 * x).bfloat16(),
            "✗ case 1 of 2: 3 of 3 entries differ; entry [0] is 2.016, expected 2 (yours are of torch.bfloat16)",
        ),
        (lambda x: 2.0001 * x, "✗ case 1 of 2: 3 of 3 entries differ; entry [0] is 2.0001, expected 2"),
        (
            lambda x: 2 * x + 0.1 * torch.arange(len(x)),
            "✗ case 1 of 2: 2 of 3 entries differ; entry [2] is 2.2, expected 2",  # the farthest
        ),
    ],
)
def test_check(student, said, capsys):
    course.check(student, double, (torch.ones(3),), (torch.ones(2),))
    assert capsys.readouterr().out.startswith(said)


def test_numbers(capsys):
    right = ((Fraction(3, 2), 1.5), (Decimal("1.5"), 1.5), (np.float32(1.5), 1.5), (True, 1), (math.inf, math.inf))
    for got, want in right:
        course.check(lambda got=got: got, lambda want=want: want, ())
    for got, want in ((Fraction(3, 2), 1.25), (torch.ones(1), 1.0), (math.inf, 1.0), (1.0, math.inf)):
        course.check(lambda got=got: got, lambda want=want: want, ())
    course.check(lambda: torch.tensor([math.inf, 5.0]), lambda: torch.tensor([math.inf, 6.0]), ())
    course.check(lambda: math.nan, lambda: math.nan, ())
    lines = [line.removeprefix("✗ case 1 of 1: ") for line in capsys.readouterr().out.splitlines()]
    assert lines == ["✓ correct in all 1 cases"] * 5 + [
        "1 of 1 entries differ; the value is 1.5, expected 1.25",
        "shape (1,), expected a single number",
        "1 of 1 entries differ; the value is inf, expected 1",
        "1 of 1 entries differ; the value is 1, expected inf",
        "1 of 2 entries differ; entry [1] is 5, expected 6",
        "1 of 1 entries differ; the value is nan, expected nan",
    ]


def test_digits_that_look_different():
    assert course.in_digits(94212.0, 94208.0) == ("94212", "94208")
    assert course.in_digits(6.6512345, 6.6512399) == ("6.65123", "6.65124")
    assert course.in_digits(6.5, 6.25) == ("6.5", "6.25")


def test_the_line_in_which_it_happened(capsys):
    def inner(y):
        return y @ torch.ones(5)

    def student(x):
        return inner(2 * x)

    course.check(student, double, (torch.ones(3),))
    assert capsys.readouterr().out.rstrip().endswith("(in the line 'return y @ torch.ones(5)')")


def test_nothing_is_spoiled(capsys):
    """Arrays, lists and dictionaries are copied, too."""

    def student(a, b, c):
        a -= 1
        b.pop()
        c.clear()
        return 0.0

    case = (np.ones(3), [torch.ones(2), 1], {1: 2})
    course.check(student, lambda a, b, c: 0.0, case)
    assert case[0].tolist() == [1, 1, 1] and len(case[1]) == 2 and case[2] == {1: 2}


def test_tuples(capsys):
    course.check(lambda x: (x, 2 * x), lambda x: (x, x), (torch.ones(2),))
    course.check(lambda x: x, lambda x: (x, x), (torch.ones(2),))
    course.check(lambda x: [x, x], lambda x: (x, x), (torch.ones(2),))
    course.check(lambda x: torch.stack([x, x]), lambda x: (x, x), (torch.ones(2),))
    course.check(lambda x: (x, None), lambda x: (x, x), (torch.ones(2),))
    course.check(lambda x: 3.0, lambda x: (x, x), (torch.ones(2),))
    course.check(lambda x: (x, x, x), lambda x: (x, x), (torch.ones(2),))
    course.check(lambda x: torch.ones(2, 3), lambda x: (x, x), (torch.ones(2),))
    lines = [line.removeprefix("✗ case 1 of 1: ") for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "result 2 of 2: 2 of 2 entries differ; entry [0] is 2, expected 1",
        "result 1 of 2: shape (), expected (2,)",
        "✓ correct in all 1 cases",
        "✓ correct in all 1 cases",
        "result 2 of 2: expected a number or a tensor, got NoneType",
        "expected 2 results, a tuple, got one float",
        "expected 2 results, got 3",
        "expected 2 results, a tuple, got one Tensor of shape (2, 3)",
    ]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here, not interpreted")
def test_kernel_traffic():
    triton = pytest.importorskip("triton")
    tl = triton.language

    @triton.jit
    def kernel(X, Y, T, BT: tl.constexpr):
        t = tl.program_id(0) * BT + tl.arange(0, BT)
        x = tl.load(X + t, mask=t < T) + tl.load(X + t, mask=t < T)  # twice: counted once
        tl.store(Y + t, x, mask=t < T)  # 5 of 8
        tl.store(Y + t, 2 * tl.load(Y + t, mask=t < T), mask=t < T)  # read after it was written: not counted

    X, Y, Z = torch.arange(8.0), torch.full((8,), -1.0), torch.zeros(3)
    with course.KernelTraffic() as traffic:
        kernel[(2,)](X, Y, 5, BT=4)
    assert Y.tolist() == [0, 4, 8, 12, 16, -1, -1, -1]
    assert traffic.of(X) == (5, 0)
    assert traffic.of(Y) == (0, 5)
    assert traffic.of(Z) == (0, 0)
    kernel[(2,)](X, Y, 8, BT=4)  # outside the context: not seen
    assert traffic.of(Y) == (0, 5)
    with course.KernelTraffic() as traffic:  # two launches: both have to read
        kernel[(1,)](X, Y, 4, BT=4)
        kernel[(1,)](X, Y, 4, BT=4)
    assert traffic.of(X) == (8, 0)
