"""The collector of cycles is off while libraries load, and afterwards as it was."""

import gc

import pytest

from fedpeft import collector


@pytest.mark.parametrize("was_on", [True, False])
def test_it_is_as_it_was(was_on):
    (gc.enable if was_on else gc.disable)()
    try:
        with collector.held_back():
            assert not gc.isenabled()
            with collector.held_back():
                assert not gc.isenabled()
            assert not gc.isenabled()
        assert gc.isenabled() is was_on
        with pytest.raises(ZeroDivisionError):
            collector.held_back()(lambda: 1 / 0)()
        assert gc.isenabled() is was_on
    finally:
        gc.enable()


def test_only_what_was_there_first_is_left_alone():
    """A second run in the same process must not keep the first one's model for ever."""
    with collector.held_back():
        pass
    kept = gc.get_freeze_count()
    made = [[] for _ in range(1000)]
    with collector.held_back():
        pass
    assert gc.get_freeze_count() <= kept and len(made) == 1000
