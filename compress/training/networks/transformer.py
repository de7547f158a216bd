"""A small vision transformer.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, section 3.1; the mean of all tokens in place of
a class token: Beyer, Zhai, Kolesnikov, "Better plain ViT baselines for ImageNet-1k", 2022. Parameter names are timm's.
"""
import torch
from torch import nn
from torch.nn import functional


class PatchEmbed(nn.Module):
    """Image [N, C, H, W] -> tokens [N, T, width]: a convolution whose stride is its kernel."""

    def __init__(self, channels, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """``softmax(q k^T / sqrt(d)) v`` in ``heads`` heads of ``d = width / heads``; q, k, v from one matrix."""

    def __init__(self, tokens, width, heads):
        super().__init__()
        self.tokens, self.width, self.heads = tokens, width, heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        size = self.width // self.heads
        x = self.qkv(x).reshape(-1, self.tokens, 3, self.heads, size).permute(2, 0, 3, 1, 4)       # [3, N, heads, T, d]
        share = functional.softmax((x[0] @ x[1].transpose(-2, -1)) * size ** -0.5, dim=-1)
        return self.proj((share @ x[2]).transpose(1, 2).reshape(-1, self.tokens, self.width))


class MLP(nn.Module):
    """Linear | GELU | linear."""

    def __init__(self, width, inside):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inside), nn.Linear(inside, width)

    def forward(self, x):
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each normalised before and added to its input."""

    def __init__(self, tokens, width, heads, inside):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(tokens, width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), MLP(width, inside)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """``depth`` blocks on ``(image / patch)^2`` tokens of ``width``; the default is of ViT-Tiny's width, half as deep.

    Args: image: height and width; patch: divides it; heads: divide width; ratio: inner width of the MLP over width.
    """

    def __init__(self, *, classes=10, image=32, channels=3, patch=4, width=192, depth=6, heads=3, ratio=4):
        super().__init__()
        if image % patch or width % heads:
            raise ValueError(f"Image and width must be multiples of patch and heads, not {image} of {patch}, "
                             f"{width} of {heads}")
        self.input_shape = (channels, image, image)
        tokens = (image // patch) ** 2
        self.patch_embed = PatchEmbed(channels, patch, width)
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        self.blocks = nn.Sequential(*(Block(tokens, width, heads, ratio * width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def forward(self, x):
        x = self.blocks(self.patch_embed(x) + self.pos_embed)
        return self.head(self.norm(x).mean(dim=1))
