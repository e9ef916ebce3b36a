"""`Adapted`: a base with an adapter on it, read and written as plain arrays under the names of PEFT's adapter file."""

from __future__ import annotations

import pathlib
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.adapters.backbone import Backbone, as_higher_rank
from fedpeft.errors import Problem, UserError
from fedpeft.records import MERGED, Arrays, Layout, Pair

if TYPE_CHECKING:
    import torch

    from fedpeft.base import Base

A_FACTOR, B_FACTOR = ".lora_A.weight", ".lora_B.weight"


class Adapted:
    """The one model of a process. Whoever trains or evaluates writes its own arrays into it first.

    `parameters` maps names, sorted, to what they name; `trained` are those that training may move, `head` whole layers.
    """

    def __init__(self, base: Base, model: Any, train_head: bool) -> None:
        from peft import get_peft_model_state_dict

        self.base = base
        self.model = model
        saved = get_peft_model_state_dict(model)
        by_storage = {p.data_ptr(): p for p in model.parameters()}
        self.parameters: dict[str, torch.nn.Parameter] = {}
        for name in sorted(saved):
            parameter = by_storage[saved[name].data_ptr()]
            parameter.data = parameter.data.float()  # adapters and heads train in float32 on a base of any dtype
            self.parameters[name] = parameter
        in_head = self._head_parameters()
        self.head = tuple(name for name, parameter in self.parameters.items() if id(parameter) in in_head)
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(train_head if name in self.head else parameter.requires_grad)
        self.trained = tuple(name for name, parameter in self.parameters.items() if parameter.requires_grad)
        for wrapper in self._head_wrappers():
            wrapper.register_forward_pre_hook(_as_float32)
        self.backbone = Backbone(model, base.device)

    @property
    def trainable_parameters(self) -> int:
        """Numbers that training moves."""
        return sum(self.parameters[name].numel() for name in self.trained)

    @property
    def base_parameters(self) -> int:
        """Numbers of the frozen base, without adapter and head."""
        own = {id(parameter) for parameter in self.parameters.values()}
        return sum(parameter.numel() for parameter in self.base.model.base_model.parameters() if id(parameter) not in own)

    def layout(self) -> Layout:
        """Names, shapes, LoRA pairs with PEFT's own scaling, and the head."""
        modules = dict(self.model.named_modules())
        pairs = []
        for name in self.parameters:
            if name.endswith(A_FACTOR):
                module = name.removesuffix(A_FACTOR)
                scaling = float(modules[module].scaling[self.model.active_adapter])
                pairs.append(Pair(module=module, A=name, B=module + B_FACTOR, s=scaling))
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        output = self.output_layer() if self.head else None
        return Layout(
            tensors=Layout.specs(self.read()),
            pairs=tuple(pairs),
            head=self.head,
            output_weight=None if output is None else names[id(output.weight)],
            output_bias=None if output is None else names.get(id(output.bias)),
        )

    def read(self) -> Arrays:
        """A copy of the adapter and head, float32, by name."""
        return {name: parameter.detach().to("cpu").numpy().copy() for name, parameter in self.parameters.items()}

    def write(self, arrays: Arrays) -> None:
        """Set the tensors named in `arrays`, and the backbone to what they merge into it; other tensors keep their values."""
        import torch

        self.backbone.set({name: array for name, array in arrays.items() if name.startswith(MERGED)})
        with torch.no_grad():
            for name, array in arrays.items():
                if not name.startswith(MERGED):
                    self.parameters[name].copy_(torch.from_numpy(np.array(array)))

    def train_only(self, names: Collection[str]) -> list[torch.nn.Parameter]:
        """Give gradients to these tensors and to no others; the parameters, in the order of `names`."""
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in names)
        return [self.parameters[name] for name in names]

    def output_layer(self) -> torch.nn.Linear:
        """The head's last linear layer: features in, one logit a label out. Raises UserError when the model has none."""
        import torch

        heads = [wrapper.modules_to_save[self.model.active_adapter] for wrapper in self._head_wrappers()]
        layers = [layer for head in heads for layer in head.modules() if isinstance(layer, torch.nn.Linear)]
        if not layers or layers[-1].out_features != self.base.model.config.num_labels:
            raise UserError(Problem("model.name", "the model has no head that ends in a linear layer with one output a label"))
        return layers[-1]

    def save(self, folder: pathlib.Path) -> None:
        """Write a plain PEFT folder: `PeftModel.from_pretrained(base, folder)` gives this model.

        What was merged into the backbone becomes part of the adapter, which is then one exact LoRA of a higher rank.
        """
        self.model.save_pretrained(str(folder))
        if self.backbone.products:
            as_higher_rank(folder, self.layout(), self.backbone.products)
        self.base.tokenizer.save_pretrained(str(folder))

    def _head_wrappers(self) -> list[Any]:
        from peft.utils import ModulesToSaveWrapper

        return [module for module in self.model.modules() if isinstance(module, ModulesToSaveWrapper)]

    def _head_parameters(self) -> set[int]:
        adapter = self.model.active_adapter
        return {id(p) for wrapper in self._head_wrappers() for p in wrapper.modules_to_save[adapter].parameters()}


def _as_float32(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A float32 head behind a base of another dtype."""
    return tuple(value.float() if hasattr(value, "is_floating_point") and value.is_floating_point() else value for value in inputs)
