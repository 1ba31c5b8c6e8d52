"""ERNIE-4.5 in PyTorch, small: the forward pass of docs/model.md 3 as training needs it, and the two demo shapes.

Dimensions: T tokens, D hidden, H query heads, G KV heads, C head size, E experts, K used per token, V rows.
The experts of a layer are computed as one wide FFN whose hidden units are scaled by their expert's weight; an expert
that was not chosen has weight 0. That is the sum of docs/model.md 3.6 in another order, and needs no gather.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Shape:
    name: str
    layout: str  # paddle or pt
    n_vocab: int
    n_hidden: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_head_dim: int
    n_ffn: int
    n_expert: int = 0
    n_expert_used: int = 0
    n_expert_ffn: int = 0
    n_shared: int = 0
    n_mtp: int = 0
    rope_theta: float = 500000.0
    n_position: int = 4096
    eps: float = 1e-5

    def is_moe(self, layer):
        return self.n_expert > 0 and layer >= 1


SHAPES = {
    # as 0.3B: a query width other than the hidden width, grouped KV heads, a tied head
    "demo-dense": Shape("demo-dense", "paddle", n_vocab=4096, n_hidden=256, n_layer=5, n_head=6, n_kv_head=2, n_head_dim=64, n_ffn=384),
    # as 21B-A3B: query width = hidden width, a dense first layer of four times it, shared experts of twice one expert, MTP
    "demo-moe": Shape("demo-moe", "pt", n_vocab=4096, n_hidden=256, n_layer=5, n_head=4, n_kv_head=2, n_head_dim=64, n_ffn=1024, n_expert=16, n_expert_used=4,
                      n_expert_ffn=64, n_shared=2, n_mtp=1),
}


class Norm(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(s.n_hidden)), s.eps

    def forward(self, x):
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rope_table(s, n, device):
    """cos and sin [n, C/2], f32."""
    inv = s.rope_theta ** (-torch.arange(0, s.n_head_dim, 2, dtype=torch.float64) / s.n_head_dim)
    angle = torch.arange(n, dtype=torch.float32)[:, None] * inv.float()[None, :]
    return angle.cos().to(device), angle.sin().to(device)


def rotate(x, cos, sin):
    """Interleaved pairs (2j, 2j+1). x [B, heads, T, C]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.s = s
        self.q_proj = nn.Linear(s.n_hidden, s.n_head * s.n_head_dim, bias=False)
        self.k_proj = nn.Linear(s.n_hidden, s.n_kv_head * s.n_head_dim, bias=False)
        self.v_proj = nn.Linear(s.n_hidden, s.n_kv_head * s.n_head_dim, bias=False)
        self.o_proj = nn.Linear(s.n_head * s.n_head_dim, s.n_hidden, bias=False)

    def forward(self, x, rope):
        s, (b, t, _) = self.s, x.shape
        q, k, v = (p(x).view(b, t, -1, s.n_head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rope), rotate(k, *rope)
        k, v = (y.repeat_interleave(s.n_head // s.n_kv_head, 1) for y in (k, v))
        if x.is_cuda and q.dtype == torch.bfloat16:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            score = q @ k.transpose(-1, -2) * s.n_head_dim ** -0.5
            future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
            y = score.masked_fill(future, float("-inf")).softmax(-1) @ v
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class Ffn(nn.Module):
    def __init__(self, n_hidden, width):
        super().__init__()
        self.gate_proj = nn.Linear(n_hidden, width, bias=False)
        self.up_proj = nn.Linear(n_hidden, width, bias=False)
        self.down_proj = nn.Linear(width, n_hidden, bias=False)

    def forward(self, x, scale=None):
        h = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(h if scale is None else h * scale.to(h.dtype))


class Experts(nn.Module):
    """Routed and shared experts. `load` counts the tokens that chose each expert since it was last cleared."""

    def __init__(self, s):
        super().__init__()
        self.s = s
        self.gate = nn.Linear(s.n_hidden, s.n_expert, bias=False)
        self.routed = Ffn(s.n_hidden, s.n_expert * s.n_expert_ffn)
        self.shared = Ffn(s.n_hidden, s.n_shared * s.n_expert_ffn)
        self.register_buffer("bias", torch.zeros(s.n_expert))

    def forward(self, x, valid):
        s = self.s
        with torch.autocast(x.device.type, enabled=False):
            p = F.linear(x.float(), self.gate.weight.float()).softmax(-1)
            chosen = (p.detach() + self.bias).topk(s.n_expert_used, -1).indices
            mask = torch.zeros_like(p).scatter(-1, chosen, 1.0)
            weight = p * mask / (p * mask).sum(-1, keepdim=True).clamp_min(1e-12)
            load = (mask * valid[..., None]).flatten(0, -2).sum(0)
        return self.routed(x, weight.repeat_interleave(s.n_expert_ffn, -1)) + self.shared(x), load


class Layer(nn.Module):
    def __init__(self, s, is_moe):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(s), Norm(s)
        self.self_attn = Attention(s)
        self.is_moe = is_moe
        self.mlp = Experts(s) if is_moe else Ffn(s.n_hidden, s.n_ffn)

    def forward(self, x, rope, valid):
        x = x + self.self_attn(self.input_layernorm(x), rope)
        y = self.post_attention_layernorm(x)
        if not self.is_moe:
            return x + self.mlp(y), None
        y, load = self.mlp(y, valid)
        return x + y, load


class Net(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.s = s
        self.embed_tokens = nn.Embedding(s.n_vocab, s.n_hidden)
        self.layers = nn.ModuleList(Layer(s, s.is_moe(i)) for i in range(s.n_layer))
        self.norm = Norm(s)
        if s.n_mtp:
            self.mtp_block, self.mtp_emb_norm, self.mtp_hidden_norm = Layer(s, False), Norm(s), Norm(s)
            self.mtp_linear_proj = nn.Linear(2 * s.n_hidden, s.n_hidden, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                out = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (2 * s.n_layer) ** 0.5 if out else 0.02)

    def embed(self, ids):
        """Rows of the embedding. In training on a GPU as a product with one-hot rows: its gradient is one matrix product,
        in a fixed order, where summing the rows of a frequent token one after another is slow."""
        w = self.embed_tokens.weight
        if not (self.training and ids.is_cuda):
            return F.embedding(ids, w)
        hot = ids[..., None] == torch.arange(self.s.n_vocab, device=ids.device)
        return hot.to(torch.bfloat16) @ w.to(torch.bfloat16)

    def head(self, x):
        """Logits [.., V] of a hidden state: the shared final norm and the tied head."""
        return F.linear(self.norm(x), self.embed_tokens.weight)

    def forward(self, ids, valid):
        """ids [B, T], valid [B, T] f32 (1 for tokens, 0 for padding).
        Returns the hidden state before the final norm [B, T, D], the MTP layer's [B, T-1, D] or None, and the load of
        each MoE layer [n, E]."""
        rope = rope_table(self.s, ids.shape[1], ids.device)
        e = self.embed(ids)
        x, loads = e.float(), []
        for layer in self.layers:
            x, load = layer(x, rope, valid)
            if load is not None:
                loads.append(load)
        if not self.s.n_mtp:
            return x, None, None
        z = torch.cat((self.mtp_emb_norm(e[:, 1:]), self.mtp_hidden_norm(x[:, :-1])), -1)
        v, _ = self.mtp_block(self.mtp_linear_proj(z).float(), (rope[0][:-1], rope[1][:-1]), valid[:, 1:])
        return x, v, torch.stack(loads)

    @torch.no_grad()
    def round_to_bf16(self):
        """The weights as the checkpoint stores them; router and bias stay f32."""
        for name, p in self.named_parameters():
            if not name.endswith("mlp.gate.weight"):
                p.copy_(p.bfloat16().float())
