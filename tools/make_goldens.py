#!/usr/bin/env python3
"""Make the golden vectors of tests/golden/vectors: what Hugging Face transformers computes on the made checkpoints.

    python3 tools/make_goldens.py --out tests/golden/vectors [--shape tiny-dense ...] [--device cuda]

Needs PyTorch and transformers >= 5.17; 21b-a3b needs 100 GB of device memory, the others run anywhere.
`--weights-only` needs PyTorch alone and prints sample elements of the formula.

The weights are built here a second time, from docs/model.md 8 and not from the C code, and go into the published classes
Ernie4_5ForCausalLM and Ernie4_5_MoeForCausalLM in float32 (TF32 off, eager attention). transformers has no MTP layer, so
docs/model.md 3.7 is written out here around its decoder layer. Each shape runs twice: with K and V as computed ("f32"),
and with K and V rounded to bf16 as they enter the cache ("bf16").

One JSON file per shape:
    shape, seed, versions, config    what was run; config holds the keys given to the config class
    token     [T + 1] ids; rows 0..T-1 are run, the last id is only the MTP layer's next token of row T-1
    sample    [[name, index, value], ...] weight elements, for the bit check against ern_synth_bf16
    column    ids whose logits are stored at every row besides the best 20
    run.f32, run.bf16:
        top, logit        [T][20] best ids and their logits, best first
        at                [T][len(column)] logits of the fixed ids
        resid             [[layer, row, [column ...], [value ...]], ...] x after the layer
        rms               [L] root mean square of x after each layer, over all rows
        mtp_top, mtp_logit, mtp_at    the same for the MTP layer's logits, where there is one
        route_gap         least distance between the last chosen and the first refused expert's score, over all rows and layers
"""
import argparse
import json
import math
import os
import sys

import torch

SEED = 7
N_TOP = 20
SHAPES = {  # name: (class, rows, layers whose residual rows are kept, config)
    "tiny-dense": ("dense", 160, (0, 1, 2), dict(
        vocab_size=1024, hidden_size=64, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=1,
        head_dim=16, intermediate_size=168)),
    "tiny-moe": ("moe", 160, (0, 1, 2, 3), dict(
        vocab_size=1024, hidden_size=80, num_hidden_layers=4, num_attention_heads=10, num_key_value_heads=2,
        head_dim=16, intermediate_size=200, moe_num_experts=8, moe_k=3, moe_intermediate_size=44,
        moe_num_shared_experts=2, moe_layer_start_index=1, moe_layer_end_index=2, moe_layer_interval=1)),
    "0.3b": ("dense", 64, (0, 8, 17), dict(
        vocab_size=103424, hidden_size=1024, num_hidden_layers=18, num_attention_heads=16, num_key_value_heads=2,
        head_dim=128, intermediate_size=3072)),
    "21b-a3b": ("moe", 16, (0, 1, 13, 27), dict(
        vocab_size=103424, hidden_size=2560, num_hidden_layers=28, num_attention_heads=20, num_key_value_heads=4,
        head_dim=128, intermediate_size=12288, moe_num_experts=64, moe_k=6, moe_intermediate_size=1536,
        moe_num_shared_experts=2, moe_layer_start_index=1, moe_layer_end_index=27, moe_layer_interval=1)),
}
COMMON = dict(hidden_act="silu", max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500000.0,
              use_bias=False, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0)
MASK = (1 << 64) - 1


# ---- the formula of docs/model.md 8 -----------------------------------------------------------------------------------

def signed(x):
    x &= MASK
    return x - (1 << 64) if x >> 63 else x


def counter64(key, index):
    z = (key + (index + 1) * 0x9e3779b97f4a7c15) & MASK
    z = ((z ^ (z >> 30)) * 0xbf58476d1ce4e5b9) & MASK
    z = ((z ^ (z >> 27)) * 0x94d049bb133111eb) & MASK
    return z ^ (z >> 31)


def counter_key(seed, name):
    h = 0xcbf29ce484222325 ^ counter64(seed, 0)
    for c in name.encode():
        h = ((h ^ c) * 0x100000001b3) & MASK
    return h


def counter64_tensor(key, n, device):
    """counter64(key, 0..n-1) as int64, which wraps as uint64 does; only >> must be made logical."""
    def shift(z, by):
        return (z >> by) & ((1 << (64 - by)) - 1)
    z = torch.arange(1, n + 1, dtype=torch.int64, device=device) * signed(0x9e3779b97f4a7c15) + signed(key)
    z = (z ^ shift(z, 30)) * signed(0xbf58476d1ce4e5b9)
    z = (z ^ shift(z, 27)) * signed(0x94d049bb133111eb)
    return z ^ shift(z, 31)


def scale_offset(name, n_in):
    if "norm" in name:
        return 0.25, 1.0
    if "e_score_correction_bias" in name:
        return 0.02, 0.0
    if "embed_tokens" in name or "lm_head" in name:
        return math.sqrt(18.75 / n_in), 0.0
    return math.sqrt(3.0 / n_in), 0.0


def is_f32(name):
    return name.endswith(".mlp.gate.weight") or "e_score_correction_bias" in name


def made(name, shape, device):
    """A whole tensor by its PyTorch name, as float32 holding the values that the file holds."""
    n = math.prod(shape)
    scale, offset = scale_offset(name, shape[-1])
    h = (counter64_tensor(counter_key(SEED, name), n, device) >> 41) & ((1 << 23) - 1)
    u = (2 * h + 1 - (1 << 23)).to(torch.float32) * 2.0 ** -23
    v = torch.tensor(offset, dtype=torch.float32, device=device) + torch.tensor(
        scale, dtype=torch.float32, device=device) * u
    if not is_f32(name):
        v = v.to(torch.bfloat16).to(torch.float32)
    return v.reshape(shape)


# ---- transformers' model, filled -------------------------------------------------------------------------------------

def build(kind, config, device):
    import transformers
    if kind == "dense":
        config_class, model_class = transformers.Ernie4_5Config, transformers.Ernie4_5ForCausalLM
    else:
        config_class, model_class = transformers.Ernie4_5_MoeConfig, transformers.Ernie4_5_MoeForCausalLM
    cfg = config_class(**COMMON, **config)
    cfg.head_dim = config["head_dim"]  # the MoE config class does not name it
    cfg._attn_implementation = "eager"
    with torch.device(device):
        model = model_class(cfg)
    model = model.to(torch.float32).eval()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    c = config["head_dim"]
    want = 1.0 / (500000.0 ** (torch.arange(0, c, 2, dtype=torch.float32) / c))
    assert torch.allclose(model.model.rotary_emb.inv_freq.cpu().float(), want, rtol=3e-7, atol=0), "rope parameters"
    assert model.model.layers[0].self_attn.q_proj.weight.shape[0] == config["num_attention_heads"] * c, "head_dim"
    model.lm_head.weight = model.model.embed_tokens.weight
    for name, p in model.named_parameters():
        fill(name, p)
    return model, cfg


def fill(name, p, to_file_name=lambda n: n):
    """Give a parameter the made values; the merged experts of transformers 5 are cut back into the file's tensors."""
    with torch.no_grad():
        if name.endswith("mlp.experts.gate_up_proj"):
            base, half = name[:-len("gate_up_proj")], p.shape[1] // 2
            for e in range(p.shape[0]):
                p[e, :half] = made(f"{base}{e}.gate_proj.weight", (half, p.shape[2]), p.device)
                p[e, half:] = made(f"{base}{e}.up_proj.weight", (half, p.shape[2]), p.device)
        elif name.endswith("mlp.experts.down_proj"):
            base = name[:-len("down_proj")]
            for e in range(p.shape[0]):
                p[e] = made(f"{base}{e}.down_proj.weight", tuple(p.shape[1:]), p.device)
        elif "e_score_correction_bias" in name:
            layer = name.split(".mlp.")[0]
            p.copy_(made(f"{layer}.mlp.moe_statics.e_score_correction_bias", (p.numel(),), p.device).reshape(p.shape))
        else:
            p.copy_(made(to_file_name(name), tuple(p.shape), p.device))


def cache_of(round_kv):
    from transformers import DynamicCache

    class Rounding(DynamicCache):
        def update(self, key_states, value_states, *args, **kwargs):
            if round_kv:
                key_states = key_states.to(torch.bfloat16).to(torch.float32)
                value_states = value_states.to(torch.bfloat16).to(torch.float32)
            return super().update(key_states, value_states, *args, **kwargs)
    return Rounding()


def mtp_logits(model, cfg, config, hidden, token, round_kv):
    """docs/model.md 3.7, the training definition. hidden [T, D] before the final norm; token [T + 1]."""
    device, D, T = hidden.device, config["hidden_size"], hidden.shape[0]
    decoder = type(model.model.layers[0])
    with torch.device(device):
        block = decoder(cfg, 0).to(torch.float32).eval()  # layer 0 is a dense one
    for name, p in block.named_parameters():
        fill(name, p, lambda n: f"model.mtp_block.0.{n}")

    def norm(x, w):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w
    embedding = model.model.embed_tokens.weight[token[1:]]
    z = torch.cat((norm(embedding, made("model.mtp_emb_norm.0.weight", (D,), device)),
                   norm(hidden, made("model.mtp_hidden_norm.0.weight", (D,), device))), dim=-1)
    u = z @ made("model.mtp_linear_proj.0.weight", (D, 2 * D), device).T
    position = torch.arange(T, device=device)[None]
    causal = torch.full((T, T), float("-inf"), device=device).triu(1)[None, None]
    out = block(u[None], attention_mask=causal, position_ids=position, past_key_values=cache_of(round_kv),
                position_embeddings=model.model.rotary_emb(u[None], position))
    out = out[0] if isinstance(out, tuple) else out
    return model.model.norm(out[0]) @ model.model.embed_tokens.weight.T


# ---- one run --------------------------------------------------------------------------------------------------------

def numbers(t):
    return [float("%.9g" % x) for x in t.flatten().tolist()]


def top_of(logits):
    """Best ids and logits a row, ties to the lower id: a stable sort of the negated row."""
    value, index = torch.sort(-logits, dim=-1, stable=True)
    return index[:, :N_TOP].tolist(), [numbers(-row[:N_TOP]) for row in value]


def route_gap(model, config, normed):
    """normed: {layer: [T, D] what the router read}."""
    gap = float("inf")
    for i, x in normed.items():
        p = torch.softmax(x @ made(f"model.layers.{i}.mlp.gate.weight", (config["moe_num_experts"], x.shape[1]),
                                   x.device).T, dim=-1)
        s = p + made(f"model.layers.{i}.mlp.moe_statics.e_score_correction_bias", (p.shape[1],), x.device)
        s = torch.sort(s, dim=-1, descending=True).values
        gap = min(gap, (s[:, config["moe_k"] - 1] - s[:, config["moe_k"]]).min().item())
    return gap


def run(model, cfg, kind, config, token, columns, kept_layers, round_kv):
    device = model.model.embed_tokens.weight.device
    ids = torch.tensor(token, device=device)
    T, L = len(token) - 1, config["num_hidden_layers"]
    resid, normed, hooks = {}, {}, []
    for i, layer in enumerate(model.model.layers):
        def keep(_, __, out, i=i):
            resid[i] = (out[0] if isinstance(out, tuple) else out).reshape(T, -1)
        hooks.append(layer.register_forward_hook(keep))
        if hasattr(layer.mlp, "experts"):
            def keep_in(_, args, i=i):
                normed[i] = args[0].reshape(T, -1)
            hooks.append(layer.mlp.register_forward_pre_hook(keep_in))
    with torch.no_grad():
        logits = model(ids[None, :T], past_key_values=cache_of(round_kv), use_cache=True).logits[0].float()
        out = {}
        out["top"], out["logit"] = top_of(logits)
        out["at"] = [numbers(row[columns]) for row in logits]
        D = config["hidden_size"]
        spread = sorted({(j * D) // 16 for j in range(16)} | {D - 1})
        out["resid"] = [[i, t, spread, numbers(resid[i][t][spread])] for i in kept_layers for t in (0, T // 2, T - 1)]
        out["rms"] = [float("%.9g" % resid[i].pow(2).mean().sqrt().item()) for i in range(L)]
        if kind == "moe":
            m = mtp_logits(model, cfg, config, resid[L - 1], ids, round_kv)
            out["mtp_top"], out["mtp_logit"] = top_of(m)
            out["mtp_at"] = [numbers(row[columns]) for row in m]
            out["route_gap"] = route_gap(model, config, normed)
    for h in hooks:
        h.remove()
    return out


def sample_names(kind, config):
    last = config["num_hidden_layers"] - 1
    names = [("model.embed_tokens.weight", (config["vocab_size"], config["hidden_size"])),
             ("model.norm.weight", (config["hidden_size"],)),
             (f"model.layers.{last}.self_attn.k_proj.weight",
              (config["num_key_value_heads"] * config["head_dim"], config["hidden_size"])),
             ("model.layers.0.mlp.down_proj.weight", (config["hidden_size"], config["intermediate_size"]))]
    if kind == "moe":
        e = config["moe_num_experts"] - 1
        names += [(f"model.layers.1.mlp.experts.{e}.up_proj.weight",
                   (config["moe_intermediate_size"], config["hidden_size"])),
                  ("model.layers.1.mlp.gate.weight", (config["moe_num_experts"], config["hidden_size"])),
                  ("model.layers.1.mlp.moe_statics.e_score_correction_bias", (config["moe_num_experts"],)),
                  ("model.mtp_linear_proj.0.weight", (config["hidden_size"], 2 * config["hidden_size"]))]
    return names


def samples(kind, config, device):
    """[name, index, n_in, value]: the value prints with the nine digits that give an f32 back."""
    out = []
    for name, shape in sample_names(kind, config):
        flat = made(name, shape, device).flatten()
        for at in (0, 1, flat.numel() // 3, flat.numel() - 1):
            out.append([name, at, shape[-1], float("%.9g" % flat[at].item())])
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", default="tests/golden/vectors")
    p.add_argument("--shape", action="append", choices=list(SHAPES))
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--weights-only", action="store_true")
    a = p.parse_args()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    for shape in a.shape or list(SHAPES):
        kind, rows, kept_layers, config = SHAPES[shape]
        if a.weights_only:
            for s in samples(kind, config, a.device):
                print(shape, *s)
            continue
        import transformers
        key = counter_key(SEED, "tokens")
        V = config["vocab_size"]
        token = [counter64(key, i) % V for i in range(rows + 1)]
        columns = [(2 * j + 1) * V // 32 for j in range(16)]
        model, cfg = build(kind, config, a.device)
        doc = dict(format=1, shape=shape, seed=SEED, kind=kind, config={**COMMON, **config},
                   versions=dict(torch=torch.__version__, transformers=transformers.__version__, device=a.device),
                   token=token, column=columns, sample=samples(kind, config, a.device), run={})
        for name, round_kv in (("f32", False), ("bf16", True)):
            doc["run"][name] = run(model, cfg, kind, config, token, columns, kept_layers, round_kv)
            print(shape, name, "best logit of row 0", doc["run"][name]["logit"][0][0], "rms", doc["run"][name]["rms"][-1],
                  "route gap", doc["run"][name].get("route_gap"), flush=True)
        path = os.path.join(a.out, f"{shape}.json")
        with open(path, "w") as f:
            json.dump(doc, f, separators=(",", ":"))
            f.write("\n")
        print(path, os.path.getsize(path), "bytes", flush=True)
        del model
        if a.device == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
