"""`Adapted`: a base with an adapter on it, read and written as plain arrays under the names of PEFT's adapter file."""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedpeft import frozen_linear
from fedpeft.adapters import layers
from fedpeft.adapters.backbone import Backbone, as_higher_rank
from fedpeft.adapters.rank_space import CORE, fold
from fedpeft.errors import Problem, UserError
from fedpeft.products import Product
from fedpeft.records import BESIDE, MERGED, Arrays, Layout, Pair, sparse_name
from fedpeft.training.apart import Apart
from fedpeft.training.prefix import Prefix
from fedpeft.training.unread import Unread

if TYPE_CHECKING:
    import torch

    from fedpeft.adapters.adapter import Adapter
    from fedpeft.base import Base
    from fedpeft.data.encoded import Encoded

A_FACTOR, B_FACTOR = ".lora_A.weight", ".lora_B.weight"


class Adapted:
    """The one model of a process. Whoever trains or evaluates writes its own arrays into it first.

    `parameters` maps names, sorted, to what they name; `trained` are those that training may move, `head` whole layers.
    """

    def __init__(self, base: Base, model: Any, adapter: Adapter, train_head: bool) -> None:
        self.base = base
        self.model = model
        self.adapter = adapter
        self.merges: Arrays = {}  # what the adapter's own initialisation takes out of the base, as `records.merge_names`
        self.resting: frozenset[str] = frozenset()  # tensors that stay as they are, as last written
        self.parameters: dict[str, torch.nn.Parameter] = named(model)
        self._sparse: dict[str, NDArray[np.int64]] = {}
        self._written: dict[str, tuple[int, ...]] = {}  # the shapes last written, where clients have their own ranks
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()  # adapters and heads train in float32 on a base of any dtype
        in_head = self._head_parameters()
        self.head = tuple(name for name, parameter in self.parameters.items() if id(parameter) in in_head)
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(train_head if name in self.head else parameter.requires_grad)
        self.trained = tuple(name for name, parameter in self.parameters.items() if parameter.requires_grad)
        for wrapper in self._head_wrappers():
            wrapper.register_forward_pre_hook(_as_float32)
        frozen_linear.install(model)
        self.backbone = Backbone(model, base.device)
        self.prefix = Prefix(self)  # keeps nothing until it is told to
        self.unread = Unread(self)  # nor leaves anything out
        self.apart = Apart(self)  # nor supposes anything of the records of a batch
        self._layout = self._look()

    def ready(self, data: Encoded) -> None:
        """Before passes over `data`: see what of them need not be computed."""
        self.unread.ready(data)
        self.prefix.ready(data)

    @property
    def trainable_parameters(self) -> int:
        """Numbers that training moves."""
        return sum(self.parameters[name].numel() for name in self.trained if name not in self.resting)

    @property
    def first_trained_layer(self) -> int | None:
        """The lowest transformer layer in which something trains: what is below stays constant. 0 when something below all layers does."""
        trained = {id(self.parameters[name]) for name in self.trained if name not in self.resting and name not in self.head}
        return layers.lowest([(name, module) for name, module in self.model.named_modules()], trained)

    @property
    def base_parameters(self) -> int:
        """Numbers of the frozen base, without adapter and head."""
        own = {id(parameter) for parameter in self.parameters.values()}
        return sum(parameter.numel() for parameter in self.base.model.base_model.parameters() if id(parameter) not in own)

    def layout(self) -> Layout:
        """Names, shapes, LoRA pairs with PEFT's own scaling, and the head."""
        return self._layout

    def _look(self) -> Layout:
        self._modules = dict(self.model.named_modules())
        self._tuned = self._tensors_of_layers()
        power = 0.5 if getattr(self.model.active_peft_config, "use_rslora", False) else 1.0
        pairs = []
        for name, parameter in self.parameters.items() if self.adapter.factored or self.adapter.has_cores else ():
            if name.endswith(A_FACTOR) and parameter.dim() == 2:
                module = name.removesuffix(A_FACTOR)
                scaling = float(self._modules[module].scaling[self.model.active_adapter])
                core = module + CORE if module + CORE in self.parameters else None
                pairs.append(Pair(module, A=name, B=module + B_FACTOR, s=scaling, r=len(parameter), power=power, core=core))
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        output = self.output_layer() if self.head else None
        return Layout(
            tensors=Layout.specs(self.read()),
            pairs=tuple(pairs),
            head=self.head,
            output_weight=None if output is None else names[id(output.weight)],
            output_bias=None if output is None else names.get(id(output.bias)),
        )

    def read(self, names: Collection[str] | None = None) -> Arrays:
        """A copy of the adapter and head, or of the tensors named, float32, by name; factors of the rank last written."""
        whole = {name: self.parameters[name].detach().to("cpu").numpy() for name in names or self.parameters}
        return {name: array[tuple(map(slice, self._written.get(name, array.shape)))].copy() for name, array in whole.items()}

    def write(self, arrays: Arrays) -> None:
        """Set the tensors named in `arrays`, and the backbone to what they merge into it; other tensors keep their values.

        Factors of a smaller rank than the model's fill its first rows or columns, zeros the rest, and the scaling becomes
        that of their rank: the rest gets no gradient and stays zero.
        """
        import torch

        self.backbone.set({name: array for name, array in arrays.items() if name.startswith(MERGED)})
        with torch.no_grad():
            for name, array in arrays.items():
                if name.startswith((MERGED, BESIDE)):
                    continue
                parameter = self.parameters[name]
                if array.shape != tuple(parameter.shape):
                    parameter.zero_()
                parameter[tuple(map(slice, array.shape))].copy_(torch.from_numpy(np.array(array)))
                self._written[name] = array.shape
        for pair in self._layout.pairs:
            if pair.A in arrays:
                self._modules[pair.module].scaling[self.model.active_adapter] = pair.scaling(len(arrays[pair.A]))
        self.rest(arrays)

    def rest(self, arrays: Arrays) -> None:
        """Switch off the layers all of whose tensors stay as they are under `arrays`; they cost nothing then."""
        names = self.adapter.resting(self._layout, arrays)
        if names == self.resting:
            return
        self.resting = names
        for module, tensors in self._tuned.items():
            self._modules[module]._disable_adapters = tensors <= names

    def _tensors_of_layers(self) -> dict[str, frozenset[str]]:
        """Module -> names of the adapter's tensors in it."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        names = {id(parameter): name for name, parameter in self.parameters.items()}
        return {
            module: frozenset(names[id(parameter)] for parameter in layer.parameters() if id(parameter) in names)
            for module, layer in self._modules.items()
            if isinstance(layer, BaseTunerLayer)
        }

    def weight(self, module: str) -> NDArray[np.float64]:
        """The base's weight of an adapted layer, [d_out, d_in], however the layer stores it."""
        layer = self._modules[module]
        weight: NDArray[np.float64] = layer.get_base_layer().weight.detach().to("cpu").double().numpy()
        return weight.T if layer.fan_in_fan_out else weight

    def add(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Tensors MODULE.NAME of the adapter that PEFT does not know; training may move them."""
        for name, parameter in parameters.items():
            module, _, own = name.rpartition(".")
            self._modules[module].register_parameter(own, parameter)
        self.parameters = dict(sorted({**self.parameters, **parameters}.items()))
        self.trained = tuple(sorted([*self.trained, *parameters]))
        self._layout = self._look()

    def add_sparse(self, positions: Mapping[str, NDArray[np.int64]]) -> None:
        """Values at flat `positions` of the weights of modules, zero at first, that training may move: y = W0 x + D x."""
        import torch

        for module, where in sorted(positions.items()):
            values = torch.nn.Parameter(torch.zeros(len(where), device=self.base.device))
            hook = _adds_sparse(values, torch.from_numpy(where).to(self.base.device), self._shape(module))
            self._modules[module].base_layer.register_forward_hook(hook)
            self.parameters[sparse_name(module)] = values
            self._sparse[module] = where
        if positions:
            self.trained = tuple(sorted([*self.trained, *map(sparse_name, positions)]))
            self._layout = self._look()

    def _shape(self, module: str) -> tuple[int, int]:
        """(d_out, d_in) of an adapted weight, however its layer stores it."""
        pair = next(pair for pair in self._layout.pairs if pair.module == module)
        return self._layout.tensors[pair.B].shape[0], self._layout.tensors[pair.A].shape[1]

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
        self.adapter.export(folder, self)
        if products := {**self.backbone.products, **self._sparse_products()}:
            as_higher_rank(folder, self.layout(), products)
        if any(pair.core for pair in self._layout.pairs):
            fold(folder, self._layout)
        self.base.tokenizer.save_pretrained(str(folder))

    def _sparse_products(self) -> dict[str, Product]:
        """What sparse values add to each weight, where they are not zero; of full rank."""
        found = {}
        for module, where in self._sparse.items():
            values = self.parameters[sparse_name(module)].detach().cpu().numpy()
            if values.any():
                D = np.zeros(self._shape(module))
                D.flat[where] = values
                found[module] = Product(D, np.eye(D.shape[1])).compressed()
        return found

    def _head_wrappers(self) -> list[Any]:
        from peft.utils import ModulesToSaveWrapper

        return [module for module in self.model.modules() if isinstance(module, ModulesToSaveWrapper)]

    def _head_parameters(self) -> set[int]:
        adapter = self.model.active_adapter
        return {id(p) for wrapper in self._head_wrappers() for p in wrapper.modules_to_save[adapter].parameters()}


def named(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters of a PEFT model's adapter and head under the names of PEFT's adapter file, sorted; shared ones once."""
    from peft import get_peft_model_state_dict

    saved = get_peft_model_state_dict(model)
    by_storage = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    found: dict[int, tuple[str, torch.nn.Parameter]] = {}
    for name in sorted(saved):
        if (place := saved[name].data_ptr()) in by_storage:  # the others are frozen bases (frozen.py)
            found.setdefault(place, (name, by_storage[place]))
    return dict(found.values())


def _adds_sparse(values: torch.nn.Parameter, where: torch.Tensor, shape: tuple[int, int]) -> Any:
    """A forward hook: output + x D^T with D zero but for `values` at `where`, in float32."""

    def hook(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if not values.requires_grad and not values.any():
            return output
        D = values.new_zeros(shape[0] * shape[1]).index_put((where,), values).view(shape)
        return output + (inputs[0].float() @ D.T).to(output.dtype)

    return hook


def _as_float32(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A float32 head behind a base of another dtype."""
    return tuple(value.float() if hasattr(value, "is_floating_point") and value.is_floating_point() else value for value in inputs)
