"""Writing a trained net as a published ERNIE-4.5 checkpoint: config.json, generation_config.json, model.safetensors.

The two layouts are those of docs/model.md 2: PyTorch ([out, in], one tensor each) and Paddle ([in, out], q/k/v and
gate/up fused by columns).
"""
import json
import struct

import torch


def _config(s):
    moe = s.n_expert > 0
    c = {"architectures": ["Ernie4_5_MoeForCausalLM" if moe else "Ernie4_5_ForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "head_dim": s.n_head_dim, "hidden_act": "silu",
         "hidden_size": s.n_hidden, "intermediate_size": s.n_ffn, "max_position_embeddings": s.n_position, "model_type": "ernie4_5_moe" if moe else "ernie4_5",
         "num_attention_heads": s.n_head, "num_hidden_layers": s.n_layer, "num_key_value_heads": s.n_kv_head, "pad_token_id": 0, "rms_norm_eps": s.eps,
         "rope_theta": s.rope_theta, "tie_word_embeddings": True, "use_bias": False, "use_cache": False, "vocab_size": s.n_vocab}
    if moe:
        c |= {"moe_capacity": [s.n_expert] * 3, "moe_gate": "topk", "moe_intermediate_size": s.n_expert_ffn, "moe_k": s.n_expert_used, "moe_layer_end_index": s.n_layer - 1,
              "moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_num_experts": s.n_expert, "moe_num_shared_experts": s.n_shared, "moe_use_aux_free": True,
              "multi_token_pred_lambda": 0.3, "num_nextn_predict_layers": s.n_mtp, "use_rmsnorm": True}
    c["torch_dtype" if s.layout == "pt" else "dtype"] = "bfloat16"
    return dict(sorted(c.items()))


GENERATION = {"bos_token_id": 1, "do_sample": True, "eos_token_id": 2, "frequency_penalty": 0.0, "pad_token_id": 0, "presence_penalty": 0.0, "repetition_penalty": 1.0,
              "temperature": 0.8, "top_p": 0.8}


def _ffn(name, f):
    """Tensors of one SwiGLU by their PyTorch names."""
    return {f"{name}.{p}_proj.weight": getattr(f, f"{p}_proj").weight for p in ("gate", "up", "down")}


def _mlp(name, layer, s):
    if not layer.is_moe:
        return _ffn(name, layer.mlp)
    m, out = layer.mlp, {f"{name}.gate.weight": layer.mlp.gate.weight, f"{name}.moe_statics.e_score_correction_bias": layer.mlp.bias[None]}
    for e in range(s.n_expert):
        rows = slice(e * s.n_expert_ffn, (e + 1) * s.n_expert_ffn)
        out |= {f"{name}.experts.{e}.gate_proj.weight": m.routed.gate_proj.weight[rows], f"{name}.experts.{e}.up_proj.weight": m.routed.up_proj.weight[rows],
                f"{name}.experts.{e}.down_proj.weight": m.routed.down_proj.weight[:, rows]}
    return out | _ffn(f"{name}.shared_experts", m.shared)


def _layer(name, layer, s):
    out = {f"{name}.input_layernorm.weight": layer.input_layernorm.weight, f"{name}.post_attention_layernorm.weight": layer.post_attention_layernorm.weight}
    out |= {f"{name}.self_attn.{p}_proj.weight": getattr(layer.self_attn, f"{p}_proj").weight for p in "qkvo"}
    return out | _mlp(f"{name}.mlp", layer, s)


def pt_tensors(net):
    """Name to tensor, PyTorch layout."""
    out = {"model.embed_tokens.weight": net.embed_tokens.weight}
    for i, layer in enumerate(net.layers):
        out |= _layer(f"model.layers.{i}", layer, net.s)
    out["model.norm.weight"] = net.norm.weight
    if net.s.n_mtp:
        out |= _layer("model.mtp_block.0", net.mtp_block, net.s)
        out |= {"model.mtp_emb_norm.0.weight": net.mtp_emb_norm.weight, "model.mtp_hidden_norm.0.weight": net.mtp_hidden_norm.weight,
                "model.mtp_linear_proj.0.weight": net.mtp_linear_proj.weight}
    return out


def paddle_tensors(pt):
    """The same tensors in Paddle's layout."""
    out = {}
    for name, w in pt.items():
        to = name.replace("model.", "ernie.", 1)
        if name.endswith(("k_proj.weight", "v_proj.weight", "up_proj.weight")):
            continue
        if name.endswith("q_proj.weight"):
            w = torch.cat([pt[name.replace("q_proj", f"{p}_proj")] for p in "qkv"])
            to = to.replace("q_proj", "qkv_proj")
        elif name.endswith("gate_proj.weight"):
            w = torch.cat([w, pt[name.replace("gate_proj", "up_proj")]])
            to = to.replace("gate_proj", "up_gate_proj")
        linear = w.dim() == 2 and not name.endswith(("embed_tokens.weight", "e_score_correction_bias"))
        out[to] = w.t() if linear else w
    return out


def write_safetensors(path, tensors):
    """bf16, but f32 for the router and its bias."""
    header, blobs, at = {}, [], 0
    for name in sorted(tensors):
        w = tensors[name].detach().cpu().contiguous()
        exact = name.endswith(("mlp.gate.weight", "e_score_correction_bias"))
        blob = w.float().numpy().tobytes() if exact else w.bfloat16().view(torch.int16).numpy().tobytes()
        header[name] = {"dtype": "F32" if exact else "BF16", "shape": list(w.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * ((56 - len(head)) % 64)  # data begins on a multiple of 64 bytes
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        f.writelines(blobs)
    return at


def write(directory, net):
    """The checkpoint without its tokenizer. Returns the bytes of its tensors."""
    tensors = pt_tensors(net)
    if net.s.layout == "paddle":
        tensors = paddle_tensors(tensors)
    for name, value in (("config.json", _config(net.s)), ("generation_config.json", GENERATION)):
        (directory / name).write_text(json.dumps(value, indent=2) + "\n")
    return write_safetensors(directory / "model.safetensors", tensors)
