"""The examples in the package's docstrings say what they say."""

import doctest
import importlib
import pkgutil

import pytest

import vwn_ref

MODULES = [name for _, name, package in pkgutil.iter_modules(vwn_ref.__path__, "vwn_ref.") if not package]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    found = [doctest.DocTestFinder().find(importlib.import_module(name)) for name in MODULES]
    assert sum(len(test.examples) for tests in found for test in tests) > 20
