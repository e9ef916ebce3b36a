"""Libraries load without the collector of cycles, which is on again afterwards and leaves them alone."""

import subprocess
import sys

LOOKS = """
import gc
from fedpeft import collector
seen = []
gc.callbacks.append(lambda phase, info: seen.append(phase))
{before}
collector.load_libraries()
import sys
print(len(seen), gc.isenabled(), gc.get_freeze_count() > 100_000, "peft" in sys.modules)
"""


def run(before):
    return subprocess.run([sys.executable, "-c", LOOKS.format(before=before)], capture_output=True, text=True, check=True).stdout.split()


def test_nothing_is_collected_while_libraries_load():
    looked, on, left_alone, loaded = run("seen.clear()")
    assert int(looked) <= 2, "the callback may see a collection that was due before"
    assert (on, left_alone, loaded) == ("True", "True", "True")


def test_a_collector_that_was_off_stays_off():
    assert run("gc.disable()")[1:] == ["False", "True", "True"]
