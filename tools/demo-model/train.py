"""Training: conversations in rows of a few fixed lengths, AdamW, a cosine, the router's bias kept by its load.

Everything follows from the seed. A checkpoint holds all that the next step needs, so a run that was cut goes on where
it stood.
"""
import json
import math
import multiprocessing
import os
import random
import time

import numpy as np
import torch
import torch.nn.functional as F

import corpus
from net import SHAPES, Experts, Net
from tokenizer import Tokenizer

LENGTHS = (32, 64, 128, 448)  # tokens of a row; a longer sample is dropped
LR, LR_END, WARMUP, DECAY, BETAS, CLIP = 3e-3, 2e-5, 300, 0.05, (0.9, 0.98), 1.0
MTP_WEIGHT = 0.3
BIAS_STEP = 1e-3  # of the router's bias, for each step; it shrinks with the learning rate
AVERAGE = 0.998   # of the averaged weights that are exported
CHUNK = 20000     # samples made by one worker at a time


def _make(job):
    model, seed, n = job
    tok, r, rows = Tokenizer(model), random.Random(seed), {t: [] for t in LENGTHS}
    for _ in range(n):
        ids, start = tok.sample(corpus.sample(r))
        t = next((t for t in LENGTHS if len(ids) <= t), None)
        if t:
            rows[t].append(np.array(ids + [-1] * (t - len(ids)) + [start, len(ids)], np.int16))
    return {t: np.stack(v) if v else np.zeros((0, t + 2), np.int16) for t, v in rows.items()}


def make_rows(model, seed, n):
    """n training samples as arrays [rows, length + 2] by length: ids (-1 after the end), first learned index, end."""
    jobs = [(model, f"{seed}/{i}", CHUNK) for i in range((n + CHUNK - 1) // CHUNK)]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        parts = pool.map(_make, jobs, chunksize=1)
    return {t: np.concatenate([p[t] for p in parts]) for t in LENGTHS}


def load_rows(path, model, seed, n):
    """make_rows, kept in a file between runs."""
    if not path.exists():
        new = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(new, **{str(t): v for t, v in make_rows(model, seed, n).items()})
        new.replace(path)
    with np.load(path) as f:
        return {t: f[str(t)] for t in LENGTHS}


class Batches:
    """A fixed stream of batches: which length, which rows, decided by the seed and the step alone."""

    def __init__(self, rows, tokens, seed, device):
        self.rows = {t: torch.from_numpy(v).to(device) for t, v in rows.items() if len(v)}
        self.size = {t: max(1, tokens // t) for t in self.rows}
        self.seed, self.epoch, self.plan = seed, -1, []

    def _plan(self, epoch):
        g = torch.Generator().manual_seed(self.seed * 1000003 + epoch)
        order = {t: torch.randperm(len(v), generator=g) for t, v in self.rows.items()}
        plan = [(t, i) for t, o in order.items() for i in range(0, max(1, len(o) - self.size[t] + 1), self.size[t])]
        mix = torch.randperm(len(plan), generator=g).tolist()
        device = next(iter(self.rows.values())).device
        self.order, self.plan = {t: o.to(device) for t, o in order.items()}, [plan[i] for i in mix]

    def __getitem__(self, step):
        if self.epoch < 0:
            self._plan(0)
            self.epoch, self.n = 0, len(self.plan)
        if step // self.n != self.epoch:
            self.epoch = step // self.n
            self._plan(self.epoch)
        t, i = self.plan[step % self.n]
        return t, self.rows[t][self.order[t][i:i + self.size[t]]]


def losses(net, row):
    """row [B, T + 2]. Summed loss of the main head and of the MTP head, how many targets each, expert loads."""
    ids, start, end = row[:, :-2].long(), row[:, -2, None], row[:, -1, None]
    at = torch.arange(ids.shape[1], device=ids.device)[None]
    valid, learn = (at < end).float(), ((at >= start) & (at < end)).float()
    x, v, load = net(ids.clamp_min(0), valid)
    main = F.cross_entropy(net.head(x[:, :-1]).float().flatten(0, 1), ids[:, 1:].clamp_min(0).flatten(), reduction="none")
    main, n = (main * learn[:, 1:].flatten()).sum(), learn[:, 1:].sum()
    if v is None:
        return main, n, None, None, None
    far = F.cross_entropy(net.head(v[:, :-1]).float().flatten(0, 1), ids[:, 2:].clamp_min(0).flatten(), reduction="none")
    # the MTP head learns targets whose draft is used: the token before is one the model itself wrote
    mask = learn[:, 1:-1] * learn[:, 2:]
    return main, n, (far * mask.flatten()).sum(), mask.sum(), load


def _optimizer(net):
    matrices = [p for n, p in net.named_parameters() if p.dim() > 1 and "embed" not in n]
    others = [p for n, p in net.named_parameters() if p.dim() == 1 or "embed" in n]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}], lr=LR, betas=BETAS, eps=1e-10,
                             fused=True if others[0].is_cuda else None)


def _rate(step, steps):
    """The share of LR at a step."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    x = (step - WARMUP) / max(1, steps - WARMUP)
    return LR_END / LR + (1 - LR_END / LR) * 0.5 * (1 + math.cos(math.pi * min(1.0, x)))


class Run:
    """The state of a training run and its checkpoint."""

    def __init__(self, name, seed, steps, device):
        torch.manual_seed(seed)
        self.name, self.seed, self.steps, self.device = name, seed, steps, device
        self.net = Net(SHAPES[name]).to(device)
        self.opt, self.step, self.log = _optimizer(self.net), 0, []
        self.average = {k: v.clone() for k, v in self.net.state_dict().items()}

    def save(self, path):
        """Weights in f32, the optimizer's moments in bf16: half the size, and the run goes on as well."""
        moments = [{k: v.bfloat16() for k, v in self.opt.state[p].items() if k != "step"} for p in self.net.parameters()]
        state = {"step": self.step, "steps": self.steps, "seed": self.seed, "log": self.log, "net": self.net.state_dict(),
                 "average": {k: (v - self.net.state_dict()[k]).bfloat16() for k, v in self.average.items()}, "moments": moments}
        torch.save(state, f"{path}.new")
        os.replace(f"{path}.new", path)

    def load(self, path):
        state = torch.load(path, map_location=self.device)
        if (state["steps"], state["seed"]) != (self.steps, self.seed):
            raise SystemExit(f"{path} is of a run with seed {state['seed']} and {state['steps']} steps; remove it or give the same")
        self.net.load_state_dict(state["net"])
        self.average = {k: v + state["average"][k].float() for k, v in self.net.state_dict().items()}
        for p, m in zip(self.net.parameters(), state["moments"]):
            self.opt.state[p] = {"step": torch.tensor(float(state["step"]), device=self.device), **{k: v.float() for k, v in m.items()}}
        self.step, self.log = state["step"], state["log"]

    def averaged(self):
        """The net that is exported: averaged weights, rounded as stored."""
        net = Net(self.net.s).to(self.device)
        net.load_state_dict(self.average)
        net.round_to_bf16()
        return net.eval()


def train(run, rows, batch_tokens, checkpoint, save_every_s, say):
    """Take the run to its last step."""
    net, opt, cuda = run.net, run.opt, run.device == "cuda"
    batches = Batches(rows, batch_tokens, run.seed, run.device)
    step_loss = torch.compile(losses, dynamic=False) if cuda else losses
    if cuda:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward sums in no fixed order
    experts = [m for m in net.modules() if isinstance(m, Experts)]
    live = dict(net.named_parameters())
    seen, t0, saved = torch.zeros(4, device=run.device), time.monotonic(), time.monotonic()
    while run.step < run.steps:
        rate = _rate(run.step, run.steps)
        for g in opt.param_groups:
            g["lr"] = LR * rate
        _, row = batches[run.step]
        with torch.autocast(run.device, dtype=torch.bfloat16, enabled=cuda):
            main, n, far, n_far, load = step_loss(net, row)
        loss = main / n
        if far is not None:
            loss = loss + MTP_WEIGHT * far / n_far
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        opt.step()
        with torch.no_grad():
            for i, m in enumerate(experts):
                m.bias += BIAS_STEP * rate * torch.sign(load[i].mean() - load[i])
            keep = min(AVERAGE, (1 + run.step) / (10 + run.step))
            torch._foreach_mul_([run.average[k] for k in live], keep)
            torch._foreach_add_([run.average[k] for k in live], list(live.values()), alpha=1 - keep)
            for i, m in enumerate(experts):
                run.average[f"layers.{i + 1}.mlp.bias"].lerp_(m.bias, 1 - keep)
            seen[0] += main.detach()
            seen[1] += n
            if far is not None:
                seen[2] += far.detach()
                seen[3] += n_far
        run.step += 1
        if run.step % 100 == 0 or run.step == run.steps:
            a, b, c, d = seen.tolist()
            run.log.append([run.step, a / b] + ([c / d] if d else []))
            seen.zero_()
            if run.step % 1000 == 0 or run.step == 100:
                say(f"{run.name}: step {run.step} of {run.steps}, loss {a / b:.4f}" + (f", MTP {c / d:.4f}" if d else "") + f", {time.monotonic() - t0:.0f} s")
        if checkpoint and time.monotonic() - saved > save_every_s:
            run.save(checkpoint)
            saved = time.monotonic()


def write_log(run, path):
    path.write_text(json.dumps({"model": run.name, "seed": run.seed, "steps": run.steps, "columns": ["step", "loss", "mtp_loss"][:len(run.log[0])], "rows": run.log}) + "\n")
