"""Image classification: one class a picture, by ViT and whatever else Transformers opens as a classifier of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.data.encoded import Encoded
from fedpeft.data.examples import Examples
from fedpeft.data.pictures import is_picture, opened
from fedpeft.sections import Columns, DataSection
from fedpeft.tasks import classes

if TYPE_CHECKING:
    from fedpeft.base import Base

TOGETHER = 64  # pictures that are resized at a time


class ImageClassification(classes.OfClasses):
    """One class a picture, read from the logits of `AutoModelForImageClassification`."""

    @property
    def primary_metric(self) -> str:
        """Accuracy."""
        return "accuracy"

    def roles(self, columns: Columns) -> dict[str, str]:
        """The picture."""
        return {"image": columns.image}

    def unfit(self, role: str, cell: Any) -> str | None:
        """Bytes, a path, or a dict with either; whether a picture can be decoded is seen when it is."""
        return None if is_picture(cell) else f"holds a {type(cell).__name__} where a picture should be: bytes, or the path of a file"

    def model_class(self) -> Any:
        """The Transformers class that loads the base with a classification head."""
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification

    def model_settings(self, label_count: int) -> dict[str, Any]:
        """As many outputs as classes."""
        return classes.named(label_count)

    def processor(self, read: Callable[[Any], Any]) -> Any:
        """What resizes and normalises pictures as the checkpoint was trained with, by PIL: the same numbers on every machine."""
        from transformers import AutoImageProcessor

        return read(lambda place: AutoImageProcessor.from_pretrained(place, backend="pil"))

    def own_head(self, model: Any) -> tuple[str, ...]:
        """What stands beside the body: PEFT knows no task of pictures, and would leave the head out."""
        body = model.base_model_prefix
        return tuple(name for name, child in model.named_children() if name != body and any(True for _ in child.parameters()))

    def encode(self, examples: Examples, base: Base, data: DataSection) -> Encoded:
        """Decoded, resized and normalised once, [3, height, width] each; what cannot be decoded is left out."""
        pictures, left_out = [], {}
        for row, cell in enumerate(examples.columns["image"]):
            try:
                pictures.append(opened(cell))
            except (OSError, SyntaxError, ValueError) as error:
                left_out[row] = f"cannot be read as a picture ({str(error).splitlines()[0][:80]})"
        processed: list[np.ndarray[Any, Any]] = []
        for start in range(0, len(pictures), TOGETHER):
            processed.extend(base.tokenizer(pictures[start : start + TOGETHER], return_tensors="np")["pixel_values"])
        found = iter(processed)
        nothing = np.zeros_like(processed[0]) if processed else np.zeros((3, 1, 1), np.float32)
        inputs = [{"pixel_values": nothing if row in left_out else next(found)} for row in range(len(examples))]
        return Encoded(inputs, classes.targets(examples), len(examples.label_names), 0, left_out, _patches(base, nothing))

    def tell(self, inputs: dict[str, np.ndarray[Any, Any]], label: Any, names: tuple[str, ...], base: Base) -> tuple[str, str]:
        """Size and range of a picture, as the model sees it."""
        pixels = inputs["pixel_values"]
        size = " x ".join(map(str, pixels.shape))
        return f"{size} numbers; trains: {names[int(label)]}", f"from {pixels.min():.2f} to {pixels.max():.2f}, mean {pixels.mean():.2f}"


def _patches(base: Base, picture: np.ndarray[Any, Any]) -> int:
    """Tokens that a picture becomes: its patches and the token of the class; of models without patches, as of patches of 16."""
    said = getattr(base.model.config, "patch_size", None)
    size: int = said if isinstance(said, int) and said > 0 else 16
    height, width = picture.shape[-2:]
    return max(1, int(height) // size) * max(1, int(width) // size) + 1
