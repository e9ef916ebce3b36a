"""Libraries, loaded without Python's collector of cycles looking on.

torch, Transformers and PEFT make objects by the million and hardly a cycle among them, and the collector looks through all of them
again and again: a quarter of the time that they take to import, and some of every second afterwards. They stay for as long as
the process does, so that they need not be looked at. For processes of our own: what is there before is not looked at any more either.
"""

from __future__ import annotations

import gc


def load_libraries() -> None:
    """Import what every command with a model needs."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        import peft  # noqa: F401
        import transformers.modeling_utils  # noqa: F401
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
