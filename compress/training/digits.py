"""Trains the demo network on scikit-learn's digits and writes ``models/digits.onnx`` and ``models/digits.json``.

Run from the repository's root in an environment with PyTorch (extra ``train``): ``python -m compress.training.digits``.
Two stages: dense training, then a short fine-tune on the sum of two losses, dense and with the 2:4 view of the weights
(straight-through gradient), while the weights outside the view shrink a little each step. The file holds the dense
weights, which therefore lose little when they are pruned later.
"""
import argparse
from importlib.metadata import version
import json
from pathlib import Path
import platform
import time

import torch
from torch import nn
from torch.nn import functional

from compress import demo
from compress.training import export

MODELS = Path(__file__).resolve().parents[2] / "models"


#: Factor by which one step of the second stage shrinks the weights outside their 2:4 view.
SHRINK = 0.99


class Conv(nn.Conv2d):
    """Convolution that computes with its 2:4 view while ``sparse`` is set (4 input channels or more)."""

    sparse = False

    @torch.no_grad()
    def mask(self):
        """1 where the 2:4 view along the input channels keeps a weight, else 0."""
        if self.weight.shape[1] < 4:
            return torch.ones_like(self.weight)
        blocks = self.weight.movedim(1, -1)
        flat = blocks.reshape(-1, 4)
        keep = torch.zeros_like(flat).scatter_(1, flat.abs().topk(2, dim=1).indices, 1.0)
        return keep.reshape(blocks.shape).movedim(-1, 1)

    def forward(self, x):
        weight = self.weight
        if self.sparse:
            weight = weight - (weight * (1 - self.mask())).detach()
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)


def set_sparse(model, sparse):
    """Switch every convolution between its weights and their 2:4 view."""
    for module in model.modules():
        if isinstance(module, Conv):
            module.sparse = sparse


class Digits(nn.Module):
    """1x8x8 -> conv 32 -> residual block 32 -> conv 64 stride 2 -> max pool -> global average -> 10.

    Most multiplications lie in the block at full size, as they lie in the large maps of larger networks.
    """

    input_shape = (1, 8, 8)

    def __init__(self):
        super().__init__()
        spec = [("conv1", 1, 32, 1), ("block_a", 32, 32, 1), ("block_b", 32, 32, 1), ("conv2", 32, 64, 2)]
        for name, inputs, outputs, stride in spec:
            setattr(self, name, Conv(inputs, outputs, 3, stride=stride, padding=1, bias=False))
            setattr(self, f"{name}_bn", nn.BatchNorm2d(outputs))
        self.fc = nn.Linear(64, 10)

    def stage(self, name, x):
        """Convolution and batch normalisation."""
        return getattr(self, f"{name}_bn")(getattr(self, name)(x))

    def forward(self, x):
        x = functional.relu(self.stage("conv1", x))
        y = functional.relu(self.stage("block_a", x))
        x = functional.relu(self.stage("block_b", y) + x)
        x = functional.max_pool2d(functional.relu(self.stage("conv2", x)), 2)
        return self.fc(x.mean(dim=(2, 3)))


def train(model, x, labels, *, epochs, rate, generator, prune=False):
    """Adam with one cycle of the rate; images are shifted by up to one pixel. ``prune``: the second stage."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    steps = -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=epochs * steps)
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(x), generator=generator)
        for part in order.split(64):
            down, right = torch.randint(0, 3, (2,), generator=generator).tolist()
            batch = functional.pad(x[part], (1, 1, 1, 1))[:, :, down:down + 8, right:right + 8]
            loss = functional.cross_entropy(model(batch), labels[part], label_smoothing=0.05)
            if prune:
                set_sparse(model, True)
                loss = loss + functional.cross_entropy(model(batch), labels[part], label_smoothing=0.05)
                set_sparse(model, False)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            if prune:
                shrink(model)
        if epoch % 5 == 4:
            print(f"epoch {epoch + 1}/{epochs}: loss {loss.item():.3f}")


@torch.no_grad()
def shrink(model):
    """Shrink the weights outside their 2:4 view by `SHRINK`."""
    for module in model.modules():
        if isinstance(module, Conv):
            module.weight.mul_(1 - (1 - SHRINK) * (1 - module.mask()))


@torch.no_grad()
def settle(model, x):
    """Batch statistics of the dense network over the whole training set."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None                            # a plain mean over what follows
    model.train()
    model(x)


@torch.no_grad()
def accuracy(model, split):
    """Share of right answers on a split."""
    model.eval()
    x, labels = demo.digits(split)
    return float((model(torch.from_numpy(x)).argmax(1).numpy() == labels).mean())


def main(arguments=None):
    """Command line: ``--out`` folder, ``--seed``, ``--epochs`` of the dense stage, ``--sparse-epochs``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODELS)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--sparse-epochs", type=int, default=15)
    options = parser.parse_args(arguments)
    started = time.monotonic()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(options.seed)                           # torch initialises layers from its own generator
    generator = torch.Generator().manual_seed(options.seed)
    model = Digits()
    x, labels = (torch.from_numpy(a) for a in demo.digits("train"))
    train(model, x, labels, epochs=options.epochs, rate=4e-3, generator=generator)
    stages = {"dense_stage": accuracy(model, "validation")}
    train(model, x, labels, epochs=options.sparse_epochs, rate=2e-3, generator=generator, prune=True)
    settle(model, x)
    stages["both_stages"] = accuracy(model, "validation")
    set_sparse(model, True)
    stages["both_stages_2_4_view"] = accuracy(model, "validation")
    set_sparse(model, False)
    options.out.mkdir(parents=True, exist_ok=True)
    data = export.to_onnx(model, name="digits").SerializeToString()
    (options.out / "digits.onnx").write_bytes(data)
    facts = {
        "command": f"python -m compress.training.digits --seed {options.seed} --epochs {options.epochs} "
                   f"--sparse-epochs {options.sparse_epochs}",
        "seed": options.seed,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in
                                                             ("torch", "numpy", "onnx", "scikit-learn")},
        "split": demo.definition(),
        "validation_accuracy_after": stages,
        "float_accuracy": {s: accuracy(model, s) for s in ("validation", "heldout")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "onnx_bytes": len(data),
    }
    (options.out / "digits.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(json.dumps(facts["float_accuracy"]), f"in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
