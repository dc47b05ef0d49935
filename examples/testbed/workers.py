"""Data-parallel training that survives a contended machine: single-threaded workers take micro-batches from a shared counter."""

import math
from collections.abc import Callable

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

BETAS, EPS, MOMENTUM = (0.9, 0.95), 1e-8, 0.95
STATS = 256


def is_matrix(name: str, p: Tensor) -> bool:
    """Hidden matrices take Muon; embeddings, output heads, norms and biases take Adam."""
    return p.ndim == 2 and not any(part in name for part in ("embed", "lm_head", "labels"))


class Layout:
    """Where each parameter lies in one flat vector: matrices of one shape are neighbours, everything else follows."""

    def __init__(self, model: nn.Module):
        named = [(n, p) for n, p in model.named_parameters()]
        matrices = sorted((p.shape, n, p) for n, p in named if is_matrix(n, p))
        self.names = [n for _, n, _ in matrices] + [n for n, p in named if not is_matrix(n, p)]
        params = dict(named)
        self.params = [params[n] for n in self.names]
        self.at = [0]
        for p in self.params:
            self.at.append(self.at[-1] + p.numel())
        self.size = self.at[-1]
        self.groups: dict[torch.Size, list[int]] = {}
        for i in range(len(matrices)):
            self.groups.setdefault(self.params[i].shape, []).append(i)
        self.adam = slice(self.at[len(matrices)], self.size)

    def spread(self, value: Callable[[str, Tensor], float]) -> Tensor:
        """One number per parameter, repeated over its elements."""
        return torch.cat([torch.full((p.numel(),), value(n, p)) for n, p in zip(self.names, self.params, strict=True)])


class Shared:
    """Parameters, gradients, optimizer state and statistics of all workers, in shared memory."""

    def __init__(self, size: int, workers: int, device: str = "cpu"):
        def zeros(*shape: int, dtype=torch.float32) -> Tensor:
            z = torch.zeros(*shape, dtype=dtype, device=device)
            return z.share_memory_() if device == "cpu" else z

        self.workers, self.device = workers, device
        self.param, self.first, self.second = zeros(size), zeros(size), zeros(size)
        self.grad = [zeros(size) for _ in range(workers)]
        self.stats = [torch.zeros(STATS, dtype=torch.float64).share_memory_() for _ in range(workers)]
        self.state = torch.zeros(STATS, dtype=torch.float64).share_memory_()       # what the loop tells its workers
        context = mp.get_context("spawn")
        self.taken, self.barrier = context.Value("i", 0), context.Barrier(workers)

    def take(self) -> int:
        with self.taken.get_lock():
            self.taken.value += 1
            return self.taken.value - 1

    def bind(self, layout: Layout, rank: int, load: bool) -> None:
        """Make the model's parameters views of the shared vector."""
        for i, p in enumerate(layout.params):
            view = self.param[layout.at[i]:layout.at[i + 1]].view(p.shape)
            if rank == 0 and not load:
                view.copy_(p.data)
            p.data, p.grad = view, self.grad[rank][layout.at[i]:layout.at[i + 1]].view(p.shape)
        self.barrier.wait()


def orthogonal(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: five Newton-Schulz steps on g[k, r, c] (Muon)."""
    tall = g.shape[1] > g.shape[2]
    x = g.transpose(1, 2) if tall else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.transpose(1, 2) if tall else x


@torch.no_grad()
def update(shared: Shared, layout: Layout, rank: int, step: int, lr: Tensor, decay: Tensor, rate: float, clip: float = 1.0) -> float:
    """Average the gradients and take one optimizer step, the matrices divided among the workers; -> gradient norm (worker 0)."""
    norm = 0.0
    if rank == 0:
        total = shared.grad[0]
        for g in shared.grad[1:]:
            total.add_(g)
        total.mul_(1.0 / float(shared.state[0]))
        norm = total.norm().item()
        total.mul_(min(1.0, clip / (norm + 1e-6)) if math.isfinite(norm) else 0.0)
        total.nan_to_num_(0.0)
    shared.barrier.wait()
    grad = shared.grad[0]
    for shape, members in layout.groups.items():
        mine = members[len(members) * rank // shared.workers:len(members) * (rank + 1) // shared.workers]
        if not mine:
            continue
        here = slice(layout.at[mine[0]], layout.at[mine[-1] + 1])
        g, m, w = (t[here].view(-1, *shape) for t in (grad, shared.first, shared.param))
        step_size = (rate * lr[here]).view(-1, *shape)[:, :1, :1]
        m.copy_(torch.where(step_size > 0, m * MOMENTUM + g, m))       # what rests keeps its momentum
        w.mul_(1 - step_size * decay[here].view(-1, *shape)[:, :1, :1])
        w.sub_(orthogonal(g + MOMENTUM * m) * (step_size * 0.2 * math.sqrt(max(shape))))
    if rank == 0:
        here = layout.adam
        g, m, v, w = grad[here], shared.first[here], shared.second[here], shared.param[here]
        scale = rate * lr[here]
        m.lerp_(g, (scale > 0) * (1 - BETAS[0]))
        v.lerp_(g * g, (scale > 0) * (1 - BETAS[1]))
        w.mul_(1 - scale * decay[here])
        w.sub_(scale * (m / (1 - BETAS[0] ** step)) / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS))
    shared.barrier.wait()
    shared.grad[rank].zero_()
    return norm
