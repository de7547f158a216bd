"""Training speed beside plain PyTorch: ``python -m sim_tests.bench.training [--threads N] [--json F]``.

One network (ResNet-20), random images of CIFAR-10's size, stochastic gradient descent with momentum; what differs:

* plain: float32, channels first, a ``DataLoader`` that crops, mirrors and normalises image by image;
* ours: `compress.training.trainer.Phase` with `compress.training.loader`, in both precisions;
* integer: the quantised network (`compress.training.integer`), float32.

Needs the extra ``train``. Times vary with the machine; the ratios are of one run.
"""
import argparse
import json
from pathlib import Path
import time

import numpy as np

IMAGES, BATCH = 1024, 128


def _plain(images, labels, shift, mean, std):
    """Images per second of an epoch written as tutorials do."""
    import torch
    from torch.nn import functional
    from torch.utils.data import DataLoader, Dataset

    from compress.training.networks import build

    class Images(Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, n):
            image = torch.from_numpy(images[n]).permute(2, 0, 1).float() / 255
            image = functional.pad(image, (shift,) * 4)
            top, left = torch.randint(0, 2 * shift + 1, (2,)).tolist()
            image = image[:, top:top + 32, left:left + 32]
            if torch.rand(()) < 0.5:
                image = image.flip(2)
            return (image - mean[:, None, None]) / std[:, None, None], int(labels[n])

    model = build("resnet20").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

    def epoch():
        for x, y in DataLoader(Images(), BATCH, shuffle=True):
            loss = functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return _rate(epoch)


def _rate(epoch):
    epoch()
    began = time.perf_counter()
    epoch()
    return IMAGES / (time.perf_counter() - began)


def measure(threads=1):
    """{name: images per second}, each of its second epoch."""
    import torch

    from compress import onnx_import
    from compress.quantize import quantize, Calibration
    from compress.training import export, integer, loader, networks, recipe, trainer

    torch.set_num_threads(threads)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, IMAGES)
    split = images, labels
    data = loader.Dataset(train=split, validation=(images[:1], labels[:1]), test=split, shift=4, flip=True,
                          mean=(0.5,) * 3, std=(0.25,) * 3)
    stage = recipe.Stage(name="speed", epochs=10, optimizer={"rate": 0.01})
    found = {"plain, float32": _plain(images, labels, 4, torch.full((3,), 0.5), torch.full((3,), 0.25))}

    def ours(model, precision):
        generator = torch.Generator().manual_seed(0)
        phase = trainer.Phase(stage, model, data, precision=precision, generator=generator)
        return _rate(lambda: phase.epoch(0))

    for precision in recipe.PRECISIONS:
        model = networks.build("resnet20").to(memory_format=torch.channels_last)
        found[f"ours, {precision}"] = ours(model, precision)
    graph = onnx_import.parse(export.to_onnx(model).SerializeToString(), name="resnet20")
    x = np.ascontiguousarray(data.normalized(images[:32]).permute(0, 2, 3, 1).numpy())
    network = quantize(graph, Calibration(x=x, source="random images"))
    found["integer"] = ours(integer.IntegerNetwork(network, graph), "float32")

    def loading():
        for _ in data.batches(BATCH, torch.Generator().manual_seed(0)):
            pass
    found["loader alone"] = _rate(loading)
    return found


def main(arguments=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    found = measure(options.threads)
    for name, rate in found.items():
        print(f"{name:16} {rate:9.0f} images/s  {rate / found['plain, float32']:6.2f} x plain")
    if options.json:
        options.json.write_text(json.dumps({"threads": options.threads, "images_per_second": found}) + "\n")


if __name__ == "__main__":
    main()
