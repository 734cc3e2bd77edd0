"""The comparison of instruction counts; the counting itself is `make count`."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "tools/count_instructions.py"
spec = importlib.util.spec_from_file_location("count_instructions", SCRIPT)
counting = importlib.util.module_from_spec(spec)
spec.loader.exec_module(counting)


def test_counts_may_shrink_and_grow_a_little():
    lines, fine = counting.compare({"a": 104.9, "b": 50.0}, {"a": 100.0, "b": 100.0})
    assert fine
    assert "+4.9%" in lines[0] and "-50.0%" in lines[1]


def test_counts_that_grow_fail_by_name():
    lines, fine = counting.compare({"a": 105.1, "b": 100.0}, {"a": 100.0, "b": 100.0})
    assert not fine
    assert "grew by more than 5%" in lines[0] and "grew" not in lines[1]


def test_stages_that_come_or_go_fail():
    assert not counting.compare({"a": 1.0, "b": 1.0}, {"a": 1.0})[1]
    lines, fine = counting.compare({"a": 1.0}, {"a": 1.0, "b": 1.0})
    assert not fine
    assert "is gone" in lines[-1]
