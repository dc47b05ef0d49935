"""The training loop: students over shared learned tensors, one optimizer, checkpoints that continue the same curve, any number of processes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .distill_data import Cache, Row, collate
from .distill_error import DistillError
from .distill_loss import Target, agreeing, divergences, gaps, hidden_error, kl, target
from .distill_view import Named, trainable
from .graph.program import Program
from .passes.insert import PREFIX, save_weights

STATE, CURVE, WEIGHTS = "state.pt", "curve.jsonl", "weights.safetensors"
Say = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Settings:
    """How to train. One step sees `batch` rows (a row is an image with its questions), in `accumulate` parts on each process."""

    steps: int = 1000
    batch: int = 8
    accumulate: int = 1
    lr: float = 3e-3
    rates: Mapping[str, float] = field(default_factory=lambda: {"victor": 1e-2, "prefusion.registers": 1e-2, "prefusion": 1e-3, "meta-tokens": 1e-2,
                                                                       "context-registers": 1e-3, "context-registers.queries": 1e-2})
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: int = 20
    floor: float = 0.03  # of the rate is left at the end of the cosine
    temperature: float = 1.0
    kl_weight: float = 1.0
    hidden_weight: float = 0.5
    hidden_layers: tuple[int, ...] | None = None  # None: after half, three quarters and all of the layers
    stitch_layer: int = 0  # > 0: begin with `stitch_steps` steps that only compare hidden rows at this layer, without running the rest
    stitch_steps: int = 0
    elastic: tuple[int, ...] = ()  # numbers of registers that one training is to serve; a step draws one
    focus: float = 0.0  # of a step's rows are drawn by how far the student was from the teacher when it last saw them; of elastic steps, the number too
    anneal: tuple[int, ...] = ()  # layers at which the first `anneal_share` of the steps cut, one after the other, before the recipe's own
    anneal_share: float = 0.3
    held_out: int = 64  # sources that are never trained on
    evaluate_every: int = 200
    patience: int = 0  # stop after so many evaluations without a better agreement; 0: never
    save_every: int = 100
    packed: bool = True  # many questions behind one image; false: every question alone, as methods need that look at it when they choose tokens
    room: int = 160
    max_new_tokens: int = 64
    precision: str = "float32"  # or bfloat16 (autocast)
    tensorboard: bool = False
    seed: int = 0

    def check(self) -> None:
        for name in ("steps", "batch", "accumulate", "evaluate_every", "save_every", "held_out", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise DistillError(f"distill: {name} is {getattr(self, name)}; it must be at least 1")
        if self.batch % (self.accumulate * world()[1]):
            raise DistillError(f"distill: a batch of {self.batch} cannot be divided into {self.accumulate} parts on each of {world()[1]} processes")
        if not 0 <= self.focus < 1:
            raise DistillError(f"distill: focus is {self.focus}; it is a share of a step's rows, at least 0 and below 1, so that all are seen in turn")
        if self.precision not in ("float32", "bfloat16"):
            raise DistillError(f"distill: precision {self.precision!r} is none of ['float32', 'bfloat16']")
        if self.stitch_steps and not self.stitch_layer:
            raise DistillError("distill: stitch_steps needs a stitch_layer of at least 1")
        if not self.kl_weight and not self.hidden_weight:
            raise DistillError("distill: kl_weight and hidden_weight are both 0; nothing would be learned")


def world() -> tuple[int, int]:
    """(rank, processes), as torchrun and accelerate launch say."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Student:
    """A rewritten training view, ready to run. vision: its vision stage, where that learns or returns something else than the teacher's."""

    name: str
    facts: Mapping[str, Any]
    full: Named
    vision: Named | None = None
    stitched: Named | None = None

    @classmethod
    def of(cls, name: str, view: Program, hidden: Sequence[int], own_vision: bool, stitch: int = 0) -> Student:
        outputs = ["logits", *[f"hidden.{l}" for l in hidden]]
        return cls(name, json.loads(json.dumps(asdict(view.facts))), trainable(view["prefill"], outputs),
                   trainable(view["vision"], list(view.facts.features)) if own_vision else None,
                   trainable(view["prefill"], [f"hidden.{stitch}"]) if stitch else None)

    def __call__(self, rows: Sequence[Row], stitched: bool = False) -> dict[str, Tensor]:
        feeds = self._with_features(rows) if self.vision else collate(rows, self.facts)
        return (self.stitched if stitched else self.full)(feeds)  # type: ignore[misc]

    def _see(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        arrays = {n: torch.cat([self.vision.rows(n, r.vision[n]) for r in rows]) for n in self.vision.inputs}  # type: ignore[union-attr]
        return self.vision(arrays)  # type: ignore[misc]

    def _with_features(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Feeds whose features are the student's own, with their gradient."""
        seen, each = self._see(rows), int(self.facts["features_per_image"] or self.facts["tokens_per_image"])
        blank = {n: [torch.zeros(r.images * each, x.shape[-1]) for r in rows] for n, x in seen.items()}
        feeds = collate(rows, self.facts, blank)
        for n, x in seen.items():
            parts = x.split([r.images * each for r in rows])
            width = feeds[n].shape[1]
            feeds[n] = torch.stack([nn.functional.pad(p, (0, 0, 0, width - len(p))) for p in parts])
        return feeds


class Together(nn.Module):
    """The learned tensors as one module, so that a data-parallel wrapper sees them; the frozen graphs stay outside of it."""

    def __init__(self, tensors: Mapping[str, nn.Parameter], settings: Settings) -> None:
        super().__init__()
        self.tensors, self.settings = nn.ParameterList(tensors.values()), settings

    def forward(self, student: Student, rows: Sequence[Row], to: Target, stitched: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> loss, KL, hidden error: parts of the batch's, so that they add up over parts and processes; and the gap of every row"""
        s = self.settings
        out = student(rows, stitched)
        layers = [s.stitch_layer] if stitched else [int(n.partition(".")[2]) for n in out if n.startswith("hidden.") and s.hidden_weight]
        error = hidden_error({l: out[f"hidden.{l}"] for l in layers}, to)
        if stitched:
            return error, torch.zeros(()), error.detach(), torch.full([len(rows)], math.nan)
        apart = divergences(out["logits"], to, s.temperature)
        distance = apart.sum() / to.answers
        return s.kl_weight * distance + s.hidden_weight * error, distance.detach(), error.detach(), gaps(apart, rows)


class Trainer:
    """The first `served` students ship and are judged; `plan` says which one a step trains. All read the tensors of `tensors`."""

    def __init__(self, students: Sequence[Student], plan: Callable[[int], int], tensors: Mapping[str, nn.Parameter], cache: Cache, settings: Settings,
                 folder: Path, say: Say = lambda line: None, served: int = 1) -> None:
        settings.check()
        self.students, self.plan, self.tensors, self.cache, self.settings, self.folder, self.say = students, plan, dict(tensors), cache, settings, folder, say
        self.served = served
        self.rank, self.processes = world()
        held = min(settings.held_out, cache.count - 1)
        if cache.count < 2:
            raise DistillError(f"distill: {cache.count} source is too few; one is held out to judge by, and at least one more is needed")
        self.held = [row for i in range(held) for row in cache.rows(i)]
        if not settings.packed:
            self.held = [part for row in self.held for part in row.split()]
        self.train = [(i, r) for i in range(held, cache.count) for r in range(cache.lengths(i))]
        self.gap = np.full(len(self.train), math.nan)  # of every row, when it was last seen
        self.far = np.full(served, math.nan)  # of every served student, over its last ten steps or so
        self.device = next((t.device for t in self.tensors.values()), torch.device("cpu"))
        self.masters = {n: t if t.dtype == torch.float32 else nn.Parameter(t.detach().float()) for n, t in self.tensors.items()}
        groups: dict[float, list[nn.Parameter]] = {}
        for name, tensor in self.tensors.items():
            tensor.requires_grad_(True)
            groups.setdefault(rate_of(name.removeprefix(PREFIX), settings), []).append(self.masters[name])
        self.optimizer = torch.optim.AdamW([{"params": p, "lr": r} for r, p in groups.items()], betas=settings.betas, weight_decay=settings.weight_decay)
        self.rates = list(groups)
        self.module: Any = Together(self.tensors, settings)
        self.step, self.best, self.best_kl, self.stale = 0, -1.0, math.inf, 0
        self.accelerator = None
        if self.processes > 1:
            self.accelerator = _accelerator(self.device)
            self.module, self.optimizer = self.accelerator.prepare(self.module, self.optimizer)

    # ---- the loop

    def run(self) -> dict[str, Any]:
        """Train to the end (or until patience runs out); returns the report. Continues from the folder's checkpoint if there is one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        board = _board(self.folder) if self.settings.tensorboard and self.rank == 0 else None
        history: list[dict[str, Any]] = self._evaluations()
        while self.step < self.settings.steps:
            line = self._one()
            self.step += 1
            self._log(line)
            if board:
                for name in ("loss", "kl", "hidden"):
                    board.add_scalar(name, line[name], self.step)
            if self.step % self.settings.evaluate_every == 0 or self.step == self.settings.steps:
                found = {"step": self.step, **self.evaluate()}
                history.append(found)
                self._log(found)
                if board:
                    board.add_scalar("agreement", found["agreement"], self.step)
                self._judge(found)
                if self.settings.patience and self.stale >= self.settings.patience:
                    self.say({"step": self.step, "stopped": f"no better agreement in {self.stale} evaluations"})
                    self._save()
                    break
            if self.step % self.settings.save_every == 0 or self.step == self.settings.steps:
                self._save()
        if board:
            board.close()
        best = max(history, key=lambda found: (found["agreement"], -found["held_out_kl"]))
        return {"steps": self.step, "agreement": self.best, "students": best.get("students", {}), "evaluations": history, "rows": len(self.train),
                "held_out_questions": sum(len(r.segments) for r in self.held), "parameters": sum(t.numel() for t in self.tensors.values())}

    def _one(self) -> dict[str, Any]:
        s, step = self.settings, self.step
        factor = min(1.0, (step + 1) / max(s.warmup, 1)) * (s.floor + (1 - s.floor) * 0.5 * (1 + math.cos(math.pi * step / s.steps)))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        drawn = self.draw(step)
        rows = [self.cache.rows(source)[row] for source, row in (self.train[n] for n in drawn)]
        answers, texts = sum(r.answers for r in rows), sum(r.texts for r in rows)
        mine = rows[self.rank :: self.processes]
        size = len(mine) // s.accumulate
        alone = (lambda part: part) if s.packed else (lambda part: [one for row in part for one in row.split()])
        chosen, stitched = self.choose(step), step < s.stitch_steps
        student = self.students[chosen]
        total, apart = torch.zeros(3, dtype=torch.float64), []
        self.optimizer.zero_grad(set_to_none=True)
        for part in range(s.accumulate):
            whole = mine[part * size : (part + 1) * size]
            some = alone(whole)
            to = _to(target(some, answers, texts), self.device)
            wait = self.module.no_sync() if self.accelerator and part + 1 < s.accumulate else nullcontext()
            with wait, torch.autocast(self.device.type, torch.bfloat16, enabled=s.precision == "bfloat16"):
                *values, gap = self.module(student, some, to, stitched)
                self._backward(values[0] * self.processes)  # data parallel averages over processes; the parts are to be added
            total += torch.stack([v.detach().double().cpu() for v in values])
            apart += [g.mean() for g in gap.split([1 if s.packed else len(r.segments) for r in whole])]
        gap = torch.stack(apart).double()
        if self.accelerator:
            total = self.accelerator.reduce(total.to(self.accelerator.device), "sum").cpu()
            gap = self.accelerator.gather(gap.to(self.accelerator.device)).view(self.processes, -1).T.flatten()
        if not torch.isfinite(total).all():
            raise self._broken("loss", float(total[0]))
        for name, master in self.masters.items():
            if master is not (tensor := self.tensors[name]):
                master.grad, tensor.grad = None if tensor.grad is None else tensor.grad.float(), None
        norm = nn.utils.clip_grad_norm_(list(self.masters.values()), s.clip)
        if not torch.isfinite(norm):
            raise self._broken("gradient", float(norm))
        self.optimizer.step()
        self._narrow()
        if not stitched:
            self.gap[drawn] = gap.cpu().numpy()
            if chosen < self.served:
                now, before = float(gap.mean()), self.far[chosen]
                self.far[chosen] = now if math.isnan(before) else 0.9 * before + 0.1 * now
        loss, distance, error = total.tolist()
        return {"step": step + 1, "loss": loss, "kl": distance, "hidden": error, "norm": float(norm), "factor": round(factor, 6), "student": student.name}

    @torch.no_grad()
    def _narrow(self) -> None:
        """The graphs' own tensors from the float32 ones that are trained, where the model is in half precision: its steps would be lost there."""
        for name, tensor in self.tensors.items():
            if tensor is not self.masters[name]:
                tensor.copy_(self.masters[name])

    def _backward(self, loss: Tensor) -> None:
        if self.accelerator:
            self.accelerator.backward(loss)
        elif loss.requires_grad:
            loss.backward()
        else:
            raise DistillError("distill: the loss does not depend on any learned tensor; with these weights of the losses there is nothing to train")

    def _broken(self, what: str, value: float) -> DistillError:
        state = self.folder / STATE
        kept = f"the last good checkpoint is {state}" if state.is_file() else "there was no checkpoint yet"
        return DistillError(f"distill: the {what} is {value} at step {self.step + 1}; training stopped and {kept}; try a smaller lr (now {self.settings.lr})")

    def draw(self, step: int) -> list[int]:
        """Which of `train` a step sees: a function of the seed, the step and, for `focus` of them, the gaps seen so far.

        Loshchilov and Hutter, "Online batch selection for faster training of neural networks" (2016), with the loss itself for a probability.
        """
        s, count = self.settings, len(self.train)
        hard = min(int(s.focus * s.batch + 0.5), s.batch - 1)
        easy = s.batch - hard
        found = [int(_order(s.seed, n // count, count)[n % count]) for n in range(step * easy, (step + 1) * easy)]
        if hard:
            found += np.random.default_rng([s.seed, step, 1]).choice(count, hard, p=_shares(self.gap)).tolist()
        return found

    def choose(self, step: int) -> int:
        """Which student a step trains: the planned one or, for `focus` of the steps, one of those that are served, by how far each is: few registers
        need more steps than many."""
        planned = self.plan(step)
        if self.served == 1 or planned >= self.served:
            return planned
        rng = np.random.default_rng([self.settings.seed, step, 2])
        return planned if rng.random() >= self.settings.focus else int(rng.choice(self.served, p=_shares(self.far)))

    # ---- judging

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """On held-out sources: the share of questions with the teacher's answer, and the mean KL; of several served students the means."""
        each = {s.name: self._evaluate(s) for s in self.students[: self.served]}
        agreement, distance = (sum(values) / len(values) for values in zip(*each.values(), strict=True))
        return {"agreement": agreement, "held_out_kl": distance, "students": {name: found for name, (found, _) in each.items()}}

    def _evaluate(self, student: Student) -> tuple[float, float]:
        right: list[bool] = []
        distance, answers = 0.0, 0
        for i in range(0, len(self.held), 8):
            rows = self.held[i : i + 8]
            to = _to(target(rows), self.device)
            logits = student(rows)["logits"]
            right += agreeing(logits, to, rows)
            distance += float(kl(logits, to)) * to.answers
            answers += to.answers
        return sum(right) / len(right), distance / answers

    def _judge(self, found: Mapping[str, Any]) -> None:
        better = (found["agreement"], -found["held_out_kl"]) > (self.best, -self.best_kl)  # at equal agreement, the smaller distance
        self.stale = 0 if better else self.stale + 1
        if better:
            self.best, self.best_kl = found["agreement"], found["held_out_kl"]
        if better and self.rank == 0:
            save_weights(self.masters, self.folder / WEIGHTS, {"step": str(self.step), "agreement": f"{self.best:.4f}"})

    # ---- the folder

    def _save(self) -> None:
        if self.rank:
            return
        state = {"step": self.step, "best": self.best, "best_kl": self.best_kl, "stale": self.stale,
                 "tensors": {n: t.detach().cpu() for n, t in self.masters.items()},
                 "optimizer": self.optimizer.state_dict(), "gap": torch.from_numpy(self.gap), "far": torch.from_numpy(self.far), "seed": self.settings.seed}
        partial = self.folder / f".{STATE}.part"
        torch.save(state, partial)
        os.replace(partial, self.folder / STATE)

    def _resume(self) -> None:
        path = self.folder / STATE
        if path.is_file():
            state = torch.load(path, map_location="cpu", weights_only=True)
            if {n: t.shape for n, t in state["tensors"].items()} != {n: t.shape for n, t in self.tensors.items()}:
                raise DistillError(f"distill: the checkpoint in {self.folder} has other tensors than this recipe; choose another output folder")
            if (rows := len(state.get("gap", self.gap))) != len(self.gap):
                raise DistillError(f"distill: the checkpoint in {self.folder} is of {rows} rows, the data have {len(self.gap)}; choose another output folder")
            with torch.no_grad():
                for name, tensor in self.masters.items():
                    tensor.copy_(state["tensors"][name])
            self._narrow()
            self.optimizer.load_state_dict(state["optimizer"])
            self.gap, self.far = (state[n].numpy() if n in state else getattr(self, n) for n in ("gap", "far"))  # an older checkpoint has none
            self.step, self.best, self.best_kl, self.stale = state["step"], state["best"], state["best_kl"], state["stale"]
            self.say({"step": self.step, "resumed": str(path)})
        if self.rank == 0:  # lines behind the checkpoint will come again
            lines = [l for l in self._lines() if l["step"] <= self.step]
            (self.folder / CURVE).write_text("".join(json.dumps(l) + "\n" for l in lines), encoding="utf-8")

    def _lines(self) -> list[dict[str, Any]]:
        path = self.folder / CURVE
        found = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:  # the last line of a killed run
                break
        return found

    def _evaluations(self) -> list[dict[str, Any]]:
        return [l for l in self._lines() if "agreement" in l]

    def _log(self, line: dict[str, Any]) -> None:
        self.say(line)
        if self.rank == 0:
            with (self.folder / CURVE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def rate_of(name: str, settings: Settings) -> float:
    """By the longest beginning of the tensor's name in `rates`, else `lr`."""
    found = [b for b in settings.rates if name == b or name.startswith(f"{b}.")]
    return settings.rates[max(found, key=len)] if found else settings.lr


def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    key = (seed, epoch, count)
    if key not in _orders:
        _orders.clear()
        _orders[key] = np.random.default_rng([seed, epoch]).permutation(count)
    return _orders[key]


_orders: dict[tuple[int, int, int], np.ndarray] = {}


def _shares(gap: np.ndarray) -> np.ndarray:
    """Probabilities in proportion to the gaps; an unknown one (NaN) counts as the mean of the others."""
    known = float(np.nanmean(gap)) if np.isfinite(gap).any() else 1.0
    weight = np.nan_to_num(gap, nan=known) + 1e-6
    return weight / weight.sum()


def _to(to: Target, device: torch.device) -> Target:
    return Target(to.logits.to(device), None if to.index is None else to.index.to(device), to.answer.to(device), to.wanted.to(device),
                  {l: h.to(device) for l, h in to.hidden.items()}, to.text.to(device), to.answers, to.texts)


def _accelerator(device: torch.device) -> Any:
    try:
        from accelerate import Accelerator
    except ImportError:
        raise DistillError("distill: several processes need the package accelerate; install foveate[train]") from None
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no", rng_types=[])


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise DistillError("distill: tensorboard logs need the package tensorboard; install foveate[train]") from None
    return SummaryWriter(str(folder / "tensorboard"))
