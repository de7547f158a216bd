"""Tiny networks, a plain loop with the hooks of a technique, and digits: shared by the tests of the techniques."""
import functools

from compress import demo
import torch
from torch import nn
from torch.nn import functional

#: Images of `net`.
IMAGE = (3, 6, 6)


def net():
    """3 -> 8 -> 16 channels, then 4 classes: layers "0", "2", "6"."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


class Attention(nn.Module):
    """One head over the 36 pixels of an image of `IMAGE`, then a feed-forward part; 4 classes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.embed, self.qkv, self.out = nn.Linear(3, 12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.down, self.head = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = self.embed(x.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + self.out(torch.softmax(q @ k.transpose(1, 2) / 12 ** 0.5, dim=-1) @ v)
        return self.head((x + self.down(functional.gelu(self.up(x)))).mean(1))


def images(count=2, seed=9):
    """Random images of `IMAGE`."""
    return torch.randn(count, *IMAGE, generator=torch.Generator().manual_seed(seed))


def steps(model, technique, count, *, rate=0.1, seed=0, momentum=0.0, data=None):
    """Plain SGD with the hooks of a technique on random images, or on ``data`` (x, labels) in random batches of 64."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=rate, momentum=momentum)
    for _ in range(count):
        if data is None:
            x, y = torch.randn(8, *IMAGE, generator=generator), torch.randint(0, 4, (8,), generator=generator)
        else:
            part = torch.randint(0, len(data[0]), (64,), generator=generator)
            x, y = data[0][part], data[1][part]
        optimiser.zero_grad()
        (functional.cross_entropy(model(x), y) + technique.penalty()).backward()
        technique.after_backward()
        optimiser.step()
        technique.after_step()


@functools.cache
def digits():
    """(x, labels) of the demo's training split."""
    return tuple(torch.from_numpy(a) for a in demo.digits("train"))


def digits_net():
    """8 x 8 digits: convolutions of 1 -> 16 -> 16 channels, then 10 classes: layers "0", "2", "6"."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, padding=1),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))


@torch.no_grad()
def accuracy(model, data):
    """Share of right answers."""
    return float((model(data[0]).argmax(1) == data[1]).double().mean())
