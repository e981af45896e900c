"""Tiny attention blocks in the many ways people write them, over sequences ``[batch, 6, 12]``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, HEAD = 12, 3, 4


class Block(nn.Module):
    """A residual block around a way to attend, between an embedding and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.norm2 = nn.Linear(12, WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.out, self.up, self.down = nn.Linear(HEADS * HEAD, WIDTH), nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.out(self.attend(self.norm(x)))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))

    def attend(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Separate(Block):
    def __init__(self, keys: int = HEADS) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, HEADS * HEAD), nn.Linear(WIDTH, keys * HEAD), nn.Linear(WIDTH, keys * HEAD)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], -1, HEAD).transpose(1, 2)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = map(self.heads, (self.q(x), self.k(x), self.v(x)))
        return self.mix(q, k, v).transpose(1, 2).flatten(2)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Eager(Separate):
    """Softmax written out, with a scale taken from the shape: it must stay that of the original."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v


class Einsum(Separate):
    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, HEAD)) for y in (self.q(x), self.k(x), self.v(x)))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(HEAD**-0.5).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", scores, v).reshape(x.shape[0], -1, HEADS * HEAD)


class Causal(Separate):
    """A mask of the longest length, cut to the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(9, 9, dtype=torch.bool).tril().view(1, 1, 9, 9), persistent=False)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        scores = (q @ k.mT) * HEAD**-0.5
        return scores.masked_fill(~self.mask[:, :, :length, :length], float("-inf")).softmax(-1) @ v


class MultiQuery(Separate):
    """One head of keys and values for all queries, by broadcasting."""

    def __init__(self) -> None:
        super().__init__(keys=1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * HEAD**-0.5).softmax(-1) @ v


class GroupedQuery(Block):
    """Four heads of queries and two of keys and values, repeated by torch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(WIDTH, 4 * HEAD), nn.Linear(WIDTH, 4 * HEAD), nn.Linear(4 * HEAD, WIDTH)

    def attend(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (-1, HEAD)).transpose(1, 2)
        k, v = (y.unflatten(-1, (-1, HEAD)).transpose(1, 2) for y in self.kv(x).chunk(2, -1))
        return F.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True).transpose(1, 2).flatten(2)


class Chunked(Separate):
    """A fused projection, cut in three."""

    def __init__(self) -> None:
        super().__init__()
        del self.q, self.k, self.v
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * HEAD)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = map(self.heads, self.parts(self.qkv(x)))
        return self.mix(q, k, v).transpose(1, 2).flatten(2)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(3, -1)


class SplitByConstant(Chunked):
    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(HEADS * HEAD, dim=2)


class Reshaped(Chunked):
    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
        return self.mix(q, k, v).transpose(1, 2).reshape(*x.shape[:2], HEADS * HEAD)


class ReshapedTokens(Reshaped):
    """Behind a class token, with one number a module for heads and one for their width, as vision transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 7, WIDTH))
        self.heads, self.width = HEADS, HEAD

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), self.embed(x)), 1) + self.place
        x = x + self.out(self.attend(self.norm(x)))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x[:, 0])

    def attend(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        return self.mix(qkv[0], qkv[1], qkv[2]).transpose(1, 2).reshape(*x.shape[:2], self.heads * self.width)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=HEAD**-0.5)


class Normalised(Chunked):
    """Queries, keys and values go through one norm together, so they stay equally wide."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = F.normalize(self.qkv(x).unflatten(-1, (3, HEADS, HEAD)), dim=-1).permute(2, 0, 3, 1, 4)
        return self.mix(q, k, v).transpose(1, 2).reshape(*x.shape[:2], -1)


class Interleaved(Chunked):
    """Each head has its queries, keys and values side by side."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], HEADS, 3 * HEAD).transpose(1, 2).chunk(3, -1)
        return self.mix(q, k, v).transpose(1, 2).flatten(2)


class Library(Block):
    """torch's own multi-head attention."""

    def __init__(self, weights: bool = False) -> None:
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), weights

    def attend(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.weights)[0]


class LibraryToken(Library):
    """torch's own attention, which makes one dimension of batch and heads, behind a class token repeated for every example."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 7, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), self.embed(x)), 1) + self.place
        x = x + self.out(self.attend(self.norm(x)))
        return self.head(x[:, 0] + self.down(F.gelu(self.up(self.norm2(x[:, 0])))))


class LibraryProbe(Library):
    """torch's own attention of one learnt query over the sequence, repeated for every example and met by nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x))
        x = self.out(self.attention(self.probe.expand(x.shape[0], -1, -1), x, x, need_weights=False)[0].mean(1))
        return self.head(x + self.down(F.gelu(self.up(self.norm2(x)))))


class LibraryLayer(Block):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 20, 0.0, batch_first=True, norm_first=first)

    def attend(self, x: Tensor) -> Tensor:
        return self.layer(x)


class LibraryDecoder(Block):
    """torch's decoder: learnt queries attend to each other and to the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.probe, self.layer = nn.Parameter(torch.randn(1, 2, WIDTH)), nn.TransformerDecoderLayer(WIDTH, HEADS, 20, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.probe.expand(x.shape[0], -1, -1), self.norm(self.embed(x)))[:, 0]
        return self.head(self.out(x) + self.down(F.gelu(self.up(self.norm2(x)))))


class RMSNorm(nn.Module):
    """Written by hand: the mean runs over the channels that are left."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


class Rotary(Separate):
    """Queries and keys turned by their place; pairs of their width go together, with the frequency they turn by."""

    def __init__(self, turn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.norm2, self.turn = RMSNorm(), RMSNorm(), turn
        self.register_buffer("frequencies", torch.rand(HEAD // 2), persistent=False)

    def rotated(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2])[:, None] * self.frequencies
        angles = torch.cat((angles, angles), -1) if self.turn is half else angles.repeat_interleave(2, -1)
        return x * angles.cos() + self.turn(x) * angles.sin()

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, scale=0.5)


class RotaryByConstants(Rotary):
    """Frequencies that code makes anew from the width: pairs cannot go."""

    def rotated(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2])[:, None] * 10.0 ** -torch.arange(HEAD // 2)
        angles = torch.cat((angles, angles), -1)
        return x * angles.cos() + self.turn(x) * angles.sin()


class Cosine(Separate):
    """Queries and keys of length one, and a temperature a head."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1) + 1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature).softmax(-1) @ v


class Windows(Separate):
    """Attention in windows of three places, rolled, with a table of biases by relative place and head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, HEADS))
        self.register_buffer("index", torch.arange(3)[:, None] - torch.arange(3) + 2)

    def attend(self, x: Tensor) -> Tensor:
        windows = x.roll(1, 1).view(-1, 3, x.shape[-1])
        return super().attend(windows).view(x.shape[0], x.shape[1], -1).roll(-1, 1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.table[self.index.view(-1)].view(3, 3, -1).permute(2, 0, 1).unsqueeze(0)
        return ((q * HEAD**-0.5) @ k.mT + bias).softmax(-1) @ v


class Tokens(Separate):
    """Class and distillation tokens, places to learn, layer scale and two classifiers."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.distilled = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.place, self.scale, self.head2 = nn.Parameter(torch.randn(1, 8, WIDTH)), nn.Parameter(torch.rand(WIDTH)), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), self.distilled.expand(x.shape[0], -1, -1), x), 1) + self.place
        x = x + self.scale * self.out(self.attend(self.norm(x)))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return (self.head(x[:, 0]) + self.head2(x[:, 1])) / 2


class Bare(Separate):
    """Weights outside of any layer: parameters of the block, in a list and in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        del self.q, self.k, self.v
        self.maps = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, HEADS, HEAD) / 4) for _ in range(2))
        self.rest = nn.ParameterDict({"v": nn.Parameter(torch.randn(HEADS * HEAD, WIDTH) / 4)})

    def attend(self, x: Tensor) -> Tensor:
        q, k = (torch.einsum("bnc,chd->bhnd", x, w) for w in self.maps)
        return self.mix(q, k, self.heads(x @ self.rest["v"].mT)).transpose(1, 2).flatten(2)


class Experts(Block):
    """Four experts weighed by a softmax, each a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        del self.out
        self.router, self.experts = nn.Linear(WIDTH, 4), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + (torch.stack([e(x) for e in self.experts], -1) * self.router(x).softmax(-1)[..., None, :]).sum(-1)
        return self.head(x.mean(1))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    **{f.__name__.lower(): f for f in (Separate, Eager, Einsum, Causal, MultiQuery, GroupedQuery, Chunked, SplitByConstant, Reshaped,
                                       ReshapedTokens, Normalised, Interleaved, RotaryByConstants, Cosine, Windows, Tokens, Bare, Experts)},
    "library": Library,
    "library_token": LibraryToken,
    "library_probe": LibraryProbe,
    "library_decoder": LibraryDecoder,
    "library_with_weights": lambda: Library(weights=True),
    "library_layer": lambda: LibraryLayer(first=False),
    "library_layer_norm_first": lambda: LibraryLayer(first=True),
    "rotary": lambda: Rotary(half),
    "rotary_by_pairs": lambda: Rotary(pairs),
}  # fmt: skip
BLOCKS["rotarybyconstants"] = lambda: RotaryByConstants(half)


def make_block(name: str, seed: int = 0) -> nn.Module:
    """The named model in float64 and evaluation mode; norms and biases are not at their initial values."""
    torch.manual_seed(seed)
    model = BLOCKS[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
