"""Every lesson keeps every rule of lessons.py. Works with no lesson at all."""

import pytest
from lessons import NOTEBOOKS, RULES, Lesson, all_lessons


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("path", all_lessons(), ids=lambda path: path.relative_to(NOTEBOOKS).as_posix())
def test_lesson(path, rule):
    complaints = list(RULES[rule](Lesson(path)))
    assert not complaints, "\n".join([f"{path.name}: {RULES[rule].__doc__}", *complaints])
