"""A small ViT of our own, for machines without the Hub: pretrained on CIFAR-10, so that adapters have something to adapt.

    python benchmarks/pretrain_vit.py --data DIR/cifar10_6k/pretrain.parquet --test DIR/cifar10_6k/test.parquet --out runs/vit

DIR holds pictures with labels as `data.name` takes them: parquet with an image column, or a folder with a folder a class.
Writes a Hugging Face folder (`ViTForImageClassification`, 32 pixels in patches of 8, 4 layers of 128, 0.56 million
parameters) with its image processor, and says what it reaches on the test part. Two cores need about a quarter of an hour.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

from fedpeft import environment

environment.prepare()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn import functional  # noqa: E402
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil  # noqa: E402

from fedpeft import Config  # noqa: E402
from fedpeft.data import corpus  # noqa: E402
from fedpeft.data.pictures import opened  # noqa: E402
from fedpeft.tasks.image_classification import ImageClassification  # noqa: E402

SIDE, PAD = 32, 4


def pictures(
    data: pathlib.Path, test: pathlib.Path
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], tuple[str, ...], ViTImageProcessorPil]:
    """Pixels [pictures, 3, SIDE, SIDE] and labels of both parts, the classes, and the processor that made the pixels."""
    section = Config.from_dict({"model": {"task": "image-classification"}, "data": {"name": str(data), "test": str(test)}}).data
    found = corpus.load(section, ImageClassification(), 0)
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    parts = []
    for examples in (found.train, found.test):
        pixels = processor([opened(cell) for cell in examples.columns["image"]], return_tensors="np")["pixel_values"]
        parts.append((torch.from_numpy(np.asarray(pixels, dtype=np.float32)), torch.from_numpy(examples.labels)))
    return parts, found.train.label_names, processor


def varied(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of the pictures mirrored, all shifted by up to PAD pixels."""
    mirrored = torch.rand(len(pixels), generator=generator) < 0.5
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
    down, right = torch.randint(0, 2 * PAD + 1, (2,), generator=generator).tolist()
    return functional.pad(pixels, (PAD, PAD, PAD, PAD))[:, :, down : down + SIDE, right : right + SIDE]


def accuracy(model: ViTForImageClassification, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        said = torch.cat([model(pixel_values=part).logits.argmax(dim=1) for part in pixels.split(256)])
    return float((said == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--test", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/vit"))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    started = time.perf_counter()
    ((pixels, labels), test), names, processor = pictures(given.data, given.test)
    torch.manual_seed(given.seed)
    generator = torch.Generator().manual_seed(given.seed)
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
    ids = {"id2label": dict(enumerate(names)), "label2id": {name: code for code, name in enumerate(names)}}
    model = ViTForImageClassification(ViTConfig(image_size=SIDE, patch_size=8, num_labels=len(names), **sizes, **ids))
    steps = given.epochs * (len(pixels) // 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    for epoch in range(given.epochs):
        model.train()
        for rows in torch.randperm(len(pixels), generator=generator)[: len(pixels) // 128 * 128].split(128):
            logits = model(pixel_values=varied(pixels[rows], generator)).logits
            loss = functional.cross_entropy(logits, labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{given.epochs}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    reached = accuracy(model, *test)
    model.save_pretrained(given.out)
    processor.save_pretrained(given.out)
    facts = {"accuracy": reached, "pictures": len(pixels), "epochs": given.epochs, "seconds": time.perf_counter() - started}
    (given.out / "pretrained.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"accuracy on the test part {reached:.3f}; {given.out} written")


if __name__ == "__main__":
    main()
