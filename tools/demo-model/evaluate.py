"""Measuring a trained net, weights as stored, arithmetic in f32: prompts, held-out text, drafts, experts' load."""
import json
import random

import torch
import torch.nn.functional as F

import corpus

N_HELDOUT = 64     # samples whose ids are kept in models/heldout.json
N_MEASURE = 4000   # held-out samples for perplexity and the experts' load
N_ANSWERED = 1000  # held-out conversations answered for the table of kinds


def passes(check, answer):
    """check: {"equals": text} or {"contains": [text, ...]}."""
    if "equals" in check:
        return answer == check["equals"]
    return all(part in answer for part in check["contains"])


@torch.no_grad()
def generate(net, tok, prompts, max_new, device):
    """Greedy replies (lists of ids, the end mark included) to prompts of ids. Ties go to the lowest id."""
    rows, live = [list(p) for p in prompts], list(range(len(prompts)))
    for _ in range(max_new):
        width = max(len(rows[i]) for i in live)
        ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in live], device=device)
        last = torch.tensor([len(rows[i]) - 1 for i in live], device=device)
        x, _, _ = net(ids, torch.ones_like(ids, dtype=torch.float32))
        best = net.head(x[torch.arange(len(live), device=device), last]).argmax(-1).tolist()
        for i, token in zip(live, best):
            rows[i].append(token)
        live = [i for i, token in zip(live, best) if token not in (tok.end, tok.close)]
        if not live:
            break
    return [r[len(p):] for r, p in zip(rows, prompts)]


def text_of(tok, reply):
    return tok.decode([t for t in reply if t not in (tok.end, tok.close)])


def run_prompts(net, tok, prompts, device):
    """(name, answer, right) of each prompt."""
    ids = [tok.prompt([(m["role"], m["content"]) for m in p["messages"]]) for p in prompts]
    replies = generate(net, tok, ids, max(p["max_tokens"] for p in prompts), device)
    answers = [text_of(tok, r[:p["max_tokens"]]) for p, r in zip(prompts, replies)]
    return [(p["name"], a, passes(p["check"], a)) for p, a in zip(prompts, answers)]


def heldout_samples(tok, n):
    r = random.Random("held out")
    return [tok.sample(corpus.sample(r, held=True)) for _ in range(n)]


@torch.no_grad()
def nll(net, samples, device):
    """Summed negative log-likelihood of the learned ids (nats), how many there are, and the load [n, E] or None."""
    total, count, loads = 0.0, 0, None
    for at in range(0, len(samples), 256):
        part = samples[at:at + 256]
        width = max(len(ids) for ids, _ in part)
        ids = torch.tensor([i + [-1] * (width - len(i)) for i, _ in part], device=device)
        learn = torch.tensor([[start <= k < len(i) for k in range(width)] for i, start in part], device=device)
        x, _, load = net(ids.clamp_min(0), (ids >= 0).float())
        each = F.cross_entropy(net.head(x[:, :-1]).flatten(0, 1), ids[:, 1:].clamp_min(0).flatten(), reduction="none")
        total += (each.double() * learn[:, 1:].flatten()).sum().item()
        count += int(learn[:, 1:].sum())
        loads = load if loads is None or load is None else loads + load
    return total, count, loads


@torch.no_grad()
def acceptance(net, prompts, replies, device):
    """Of the greedy reply's tokens that a draft was made for, the share that the MTP layer guessed."""
    right = drafts = 0
    for p, r in zip(prompts, replies):
        ids = torch.tensor([p + r], device=device)
        _, v, _ = net(ids, torch.ones_like(ids, dtype=torch.float32))
        guess = net.head(v[:, :-1]).argmax(-1)[0]  # guess[t] is for position t + 2
        hit = guess[len(p) - 1:] == ids[0, len(p) + 1:]
        right, drafts = right + int(hit.sum()), drafts + len(hit)
    return right / drafts


def by_kind(tok, device, net):
    """Held-out conversations with one right answer, answered greedily: kind to (right, asked); the prompts and replies."""
    r, asked = random.Random("answers"), []
    while len(asked) < N_ANSWERED:
        s = corpus.sample(r, held=True)
        if s.kind not in ("story", "zhstory", "document") and "Once upon" not in s.messages[-1][1] and "从前" not in s.messages[-1][1]:
            asked.append(s)
    prompts = [tok.prompt(s.messages[:-1]) for s in asked]
    replies = generate(net, tok, prompts, 64, device)
    table = {}
    for s, reply in zip(asked, replies):
        right, n = table.get(s.kind, (0, 0))
        table[s.kind] = (right + (text_of(tok, reply) == s.messages[-1][1]), n + 1)
    return dict(sorted(table.items())), prompts, replies


def measure(net, tok, prompts, device):
    """Everything the card says about a model, as plain data."""
    torch.backends.cuda.matmul.allow_tf32 = False
    answers = run_prompts(net, tok, prompts, device)
    total, count, _ = nll(net, heldout_samples(tok, N_HELDOUT), device)
    big_total, big_count, load = nll(net, heldout_samples(tok, N_MEASURE), device)
    kinds, asked, replies = by_kind(tok, device, net)
    out = {"prompts": [{"name": n, "answer": a, "right": ok} for n, a, ok in answers], "n_right": sum(ok for _, _, ok in answers),
           "heldout_nll": total, "heldout_tokens": count, "perplexity": float(torch.tensor(big_total / big_count).exp()), "perplexity_tokens": big_count,
           "answered": {k: list(v) for k, v in kinds.items()}}
    if net.s.n_mtp:
        out["mtp_acceptance"] = acceptance(net, asked, replies, device)
    if load is not None:
        out["expert_load"] = [{"max_over_mean": float(row.max() / row.mean()), "min_over_mean": float(row.min() / row.mean())} for row in load]
    return out


def failures(result):
    """What of the promises of models/README.md does not hold, in words."""
    out = []
    if result["n_right"] < 18:
        out.append(f"only {result['n_right']} of the prompts were answered right; 18 are needed")
    if result.get("mtp_acceptance", 1) < 0.7:
        out.append(f"the MTP layer's drafts were accepted {result['mtp_acceptance']:.1%} of the time; 70% are needed")
    for i, row in enumerate(result.get("expert_load", [])):
        if row["max_over_mean"] > 2 or row["min_over_mean"] <= 0:
            out.append(f"MoE layer {i + 1}: load from {row['min_over_mean']:.2f} to {row['max_over_mean']:.2f} of the mean; a dead expert or more than 2")
    return out


def write_heldout(path, tok, results):
    """The ids whose likelihood ernest is compared on, and what PyTorch found for each model."""
    samples = [{"ids": ids, "from": start} for ids, start in heldout_samples(tok, N_HELDOUT)]
    lines = ",\n".join("  " + json.dumps(s) for s in samples)
    models = json.dumps({name: {"nll": r["heldout_nll"], "tokens": r["heldout_tokens"]} for name, r in sorted(results.items())})
    path.write_text(f'{{"models": {models},\n"samples": [\n{lines}\n]}}\n')
