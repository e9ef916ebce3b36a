"""Frozen layers once an example: the hidden states that enter the lowest layer with an adapter, kept and used again.

    h = layer_{l-1}( ... layer_0(embed(x)))      constant in x as long as nothing below layer l trains or draws random numbers

A pass then starts at layer l: the layers below hand on what they are given, and layer l takes the kept states. The model's own
code runs otherwise as it stands (embeddings, masks and rotations are made as always), so that this works for every
architecture whose layers are a numbered list.

It is used where it changes nothing but rounding. Training with a dropout that is active below layer l is not; evaluation still
is, since there no dropout is on. Before its first use with a new l what comes out of two examples is compared with and without it.
What does not fit into the bound is computed anew each time. States have the last bits of the batch that they were first
computed in: a run that keeps them repeats, and is resumed, to rounding and not to the bit.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.adapters.layers import forward_as, layer_of
from fedpeft.data.encoded import Encoded
from fedpeft.data.examples import Indices
from fedpeft.training.apart import mixing

if TYPE_CHECKING:
    import torch

    from fedpeft.adapters.adapted import Adapted

log = logging.getLogger(__name__)

APART = 1e-3  # outputs with and without may differ by this share of the largest: more than rounding in bfloat16 is another model


class _Reached(Exception):
    """The pass has come to layer l; it needs to go no further."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


class _Call(threading.local):
    """What the layers do in the call of the model that this thread has under way."""

    states: list[torch.Tensor] | None = None  # of its rows: those below layer l hand on what they are given, and l takes these
    stops = False  # what enters l is all that is wanted


class Prefix:
    """The kept states of one model. `ready` says what they are of, `serving` lets a call of the model use them, in any thread."""

    def __init__(self, adapted: Adapted, ask: Callable[..., Any] | None = None, kind: str = "none", gigabytes: float = 0.0) -> None:
        self.adapted = adapted
        self._ask = ask  # (model, inputs, labels) -> [batch, numbers]: a task's call of the model, such as its `outputs`
        self._make = STORES[kind]
        self._bound = int(gigabytes * 1e9)
        self._store: Any = None
        self._layers: list[Any] = []  # 0 to l
        self._held = ExitStack()  # what they do in place of their own
        self._returns = 0  # of a layer: entries of a tuple, or hidden states alone
        self._at: tuple[str, int] | None = None
        self._in_training = False
        self._call = _Call()
        self._room = threading.Lock()  # to keep states

    def ready(self, data: Encoded) -> None:
        """Look where the lowest adapter is now; forget everything when it has moved."""
        if self._make is None:
            return
        found = _lowest(self.adapted)
        if found == self._at:
            return
        self._at, self._store = found, None
        self._release()
        if found is None:
            return
        stack, first = found
        modules = dict(self.adapted.model.named_modules())
        self._hold([modules[f"{stack}.{number}"] for number in range(first + 1)])
        rows = np.arange(min(2, len(data)))
        reason = mixing(self.adapted.model) or self._obstacle(data, rows)
        if reason is not None:
            self._release()
            log.warning("prefix cache: not used, since %s", reason)
            return
        self._store = self._make(self._bound)
        self._in_training = not self._draws(data, rows)
        if not self._in_training:
            log.warning("prefix cache: used in evaluation only: the base drops out below layer %d (model.dropout=false ends that)", first)

    @contextmanager
    def serving(self, data: Encoded, rows: Indices) -> Iterator[None]:
        """Inside the block, a call of the model with the batch of these rows starts at layer l where that changes nothing."""
        if self._store is None or (self.adapted.model.training and not self._in_training):
            yield
            return
        with self._skipping(self._states(data, rows)):
            yield

    def _states(self, data: Encoded, rows: Indices) -> list[torch.Tensor]:
        """The states [time, features] of each row, without padding."""
        keys = [_key(data.inputs[row]) for row in rows]
        found = [self._store.get(key) for key in keys]
        if missing := [place for place, state in enumerate(found) if state is None]:
            hidden = self._computed(data, rows[missing]).to("cpu")
            for place, states in zip(missing, hidden, strict=True):
                tokens = data.inputs[rows[place]].get("input_ids")
                found[place] = states[: states.shape[0] if tokens is None else len(tokens)].clone()
                with self._room:
                    if self._store.get(keys[place]) is None:  # another lane may have met the same text
                        self._store.put(keys[place], found[place])
        return found

    def _computed(self, data: Encoded, rows: Indices) -> torch.Tensor:
        """What enters layer l, [rows, time, features], in the mode in which the model is."""
        import torch

        assert self._ask is not None
        batch = data.batch(rows, self.adapted.base.tokenizer, self.adapted.base.device)
        self._call.stops = True
        try:
            with torch.no_grad():
                self._ask(self.adapted.model, *batch)
        except _Reached as reached:
            return reached.hidden
        finally:
            self._call.stops = False
        raise AssertionError("the model has a layer that it does not call")

    @contextmanager
    def _skipping(self, states: list[torch.Tensor]) -> Iterator[None]:
        self._call.states = states
        try:
            yield
        finally:
            self._call.states = None

    def _hold(self, layers: list[Any]) -> None:
        """Let these, 0 to l, ask what they are to do in each call."""
        self._layers = layers
        for layer in layers[:-1]:
            self._held.enter_context(forward_as(layer, self._handing_on(layer.forward)))
        self._held.callback(layers[-1].register_forward_pre_hook(self._enter, with_kwargs=True).remove)

    def _release(self) -> None:
        self._held.close()
        self._layers = []

    def _handing_on(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **named: Any) -> Any:
            if self._call.states is None:
                return compute(*args, **named)
            hidden = args[0] if args else named["hidden_states"]
            return (hidden, *[None] * (self._returns - 1)) if self._returns else hidden

        return forward

    def _enter(self, layer: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """What layer l is given."""
        from torch.nn.utils.rnn import pad_sequence

        given = args[0] if args else named["hidden_states"]
        if self._call.stops:
            raise _Reached(given)
        if self._call.states is None:
            return None
        kept = pad_sequence(self._call.states, batch_first=True).to(given.device)
        hidden = given.new_zeros(given.shape)
        hidden[:, : kept.shape[1]] = kept
        return ((hidden, *args[1:]), named) if args else (args, {**named, "hidden_states": hidden})

    def _obstacle(self, data: Encoded, rows: Indices) -> str | None:
        """Why the layers cannot be left out; None when the model puts out the same."""
        import torch

        assert self._ask is not None
        model, was = self.adapted.model, self.adapted.model.training
        batch = data.batch(rows, self.adapted.base.tokenizer, self.adapted.base.device)
        outputs: list[Any] = []
        hook = self._layers[-2].register_forward_hook(lambda layer, given, output: outputs.append(output))
        model.eval()
        try:
            with torch.no_grad():
                whole = self._ask(model, *batch)
                self._returns = len(outputs[0]) if isinstance(outputs[0], tuple) else 0
                if self._returns and any(part is not None for part in outputs[0][1:]):
                    return "its layers give more than hidden states"
                hook.remove()
                hidden = self._computed(data, rows)
                lengths = [len(data.inputs[row].get("input_ids", hidden[0])) for row in rows]
                with self._skipping([states[:n] for states, n in zip(hidden.to("cpu"), lengths, strict=True)]):
                    short = self._ask(model, *batch)
        finally:
            hook.remove()
            model.train(was)
        off = (whole - short).abs()
        return None if float(off.max()) <= APART * float(whole.abs().max()) else "the model reads its lower layers elsewhere too"

    def _draws(self, data: Encoded, rows: Indices) -> bool:
        """Whether training draws random numbers below layer l."""
        import torch

        device = self.adapted.base.device
        cuda = device.startswith("cuda")
        with torch.random.fork_rng(devices=[torch.device(device)] if cuda else []):
            model, was = self.adapted.model, self.adapted.model.training
            before = torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()
            model.train()
            try:
                self._computed(data, rows)
            finally:
                model.train(was)
            after = torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()
            return not torch.equal(before, after)


def _key(inputs: dict[str, Any]) -> bytes:
    """What tells an example from all others."""
    sha = hashlib.blake2b(digest_size=16)
    for name in sorted(inputs):
        sha.update(f"{name}|{inputs[name].shape}|".encode())
        sha.update(np.ascontiguousarray(inputs[name]).tobytes())
    return sha.digest()


def _lowest(adapted: Adapted) -> tuple[str, int] | None:
    """(stack, number) of the first layer with an adapter, where nothing that trains is outside that stack and above its end."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    own = {id(parameter) for parameter in adapted.parameters.values()}
    head = {id(adapted.parameters[name]) for name in adapted.head}
    found: set[tuple[str, int]] = set()
    behind = True  # what trains outside of layers comes after them
    for module, layer in adapted.model.named_modules():
        if isinstance(layer, BaseTunerLayer) and not layer._disable_adapters:
            if any(id(parameter) in own for parameter in layer.parameters()):
                if (at := layer_of(module)) is not None:
                    found.add(at)
                behind &= bool(found)  # a pooler's may come after the stack
        elif any(id(parameter) in head for parameter in layer.parameters(recurse=False)):
            behind &= bool(found) and layer_of(module) is None
    if not found or not behind or len({stack for stack, _ in found}) > 1:
        return None
    lowest = min(found)
    return lowest if lowest[1] > 0 else None


class InMemory:
    """States in memory, up to a number of bytes."""

    def __init__(self, bound: int) -> None:
        self._left, self._kept = bound, dict[bytes, Any]()

    def get(self, key: bytes) -> Any:
        """The states kept under `key`; None when there are none."""
        return self._kept.get(key)

    def put(self, key: bytes, states: torch.Tensor) -> None:
        """Keep states if there is room."""
        if states.nbytes <= self._left:
            self._left -= states.nbytes
            self._kept[key] = states


class OnDisk:
    """States in a temporary file without a name: it is gone when the process is."""

    def __init__(self, bound: int) -> None:
        self._left, self._end, self._kept = bound, 0, dict[bytes, tuple[int, int, Any, Any]]()
        self._file = tempfile.TemporaryFile(prefix="fedpeft-prefix-")  # noqa: SIM115 - it lives as long as the cache

    def get(self, key: bytes) -> Any:
        """The states kept under `key`; None when there are none."""
        import torch

        if key not in self._kept:
            return None
        start, size, shape, dtype = self._kept[key]
        return torch.frombuffer(bytearray(os.pread(self._file.fileno(), size, start)), dtype=dtype).reshape(shape)

    def put(self, key: bytes, states: torch.Tensor) -> None:
        """Keep states if there is room."""
        import torch

        if states.nbytes <= self._left:
            os.pwrite(self._file.fileno(), states.contiguous().view(torch.uint8).numpy().tobytes(), self._end)
            self._kept[key] = (self._end, states.nbytes, states.shape, states.dtype)
            self._left -= states.nbytes
            self._end += states.nbytes


STORES: dict[str, Callable[[int], Any] | None] = {"none": None, "memory": InMemory, "disk": OnDisk}
