"""Train the testbed from nothing: the vision tower as a small CLIP, then everything on packed questions. Kill it, run it again: it resumes."""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.testbed import batches, model, words  # noqa: E402
from examples.testbed.questions import TYPE_ID, TYPES  # noqa: E402
from examples.testbed.workers import Layout, Shared, update  # noqa: E402

PHASES = ("vision", "joint")
# shared.state: 0 micro-batches per step, 1 phase, 2 step, then the running accuracy per question type from ACC on
ACC = 16


def schedule(step: int, steps: int, warm: int = 80, hold: float = 0.5) -> float:
    """Warm up, hold, then fall linearly to 2%: the total may be changed at a resume while it holds."""
    x = max(0.0, (step / steps - hold) / (1 - hold))
    return min(1.0, (step + 1) / warm) * max(0.02, 1 - x)


def tensors(batch: dict, device: str) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v).to(device) for k, v in batch.items()}


def vision_losses(bed, b: dict) -> list[torch.Tensor]:
    """Labels, CLS-caption contrast, patch-phrase match, CLS attention off the background; and that attention mass, for the log."""
    penultimate, last, seen = model.look(bed, b["pixels"], last=True)
    contrast, match = model.clip_loss(bed, last, b["caption"], b["phrase"], b["match"])
    mass = [(a * (b["labels"][:, 0] > 0)).sum(1) for a in seen]
    return [model.label_loss(bed, penultimate[:, 1:], b["labels"]), contrast, match, -sum(m.clamp(min=1e-4).log().mean() for m in mass), *(m.mean() for m in mass)]


def joint_losses(bed, b: dict, images: int, frozen: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict]:
    with torch.set_grad_enabled(not frozen and torch.is_grad_enabled()):
        features, _, _ = model.look(bed, b["pixels"])
        labels = model.label_loss(bed, features[:, 1:], b["labels"])
    hidden = model.talk(bed, features[:, 1:], images, b["ids"], b["segment"], b["offset"])
    here = b["target"] >= 0
    logits, target, kind = bed.vlm.lm_head(hidden[here]), b["target"][here], b["kind"][here]
    long = (kind == TYPE_ID["describe"]) | (kind == TYPE_ID["transcribe"])
    weight = torch.where(long, 0.4, 1.0)
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    answer, wrong = b["answer"][here], logits.argmax(-1) != target
    n = int(answer.max()) + 1
    bad = torch.zeros(n, device=wrong.device).index_add_(0, answer, wrong.float())
    of = torch.full((n,), -1, device=wrong.device).scatter_(0, answer, kind)
    kinds = of[of >= 0].cpu()
    count = torch.bincount(kinds, minlength=len(TYPES)).double()
    right = torch.bincount(kinds[bad[of >= 0].cpu() == 0], minlength=len(TYPES)).double()
    return loss, labels, right, count


class Trainer:
    def __init__(self, args, shared: Shared, rank: int):
        self.args, self.shared, self.rank = args, shared, rank
        self.bed = model.Testbed(args.size).to(shared.device)
        self.layout = Layout(self.bed)
        self.folder = Path(args.out)
        self.grid = 96 // self.bed.size.patch
        self.clock = time.time()
        self.load()

    # ---- state -------------------------------------------------------------------------------------------------
    def load(self) -> None:
        s, file = self.shared, self.folder / "state.pt"
        found = file.exists()
        s.bind(self.layout, self.rank, load=found)
        if self.rank == 0:
            s.state[ACC:ACC + len(TYPES)] = 0.3
            if found:
                saved = torch.load(file, map_location=s.device)
                if saved["names"] != self.layout.names:
                    raise SystemExit(f"{file}: the parameters saved are not those of --size {self.args.size}")
                for name in ("param", "first", "second", "state"):
                    getattr(s, name).copy_(saved[name])
                self.say(f"resumed {PHASES[int(s.state[1])]} at step {int(s.state[2])} from {file}")
        s.barrier.wait()

    def save(self) -> None:
        s, file = self.shared, self.folder / "state.pt"
        torch.save(dict(names=self.layout.names, param=s.param, first=s.first, second=s.second, state=s.state), file.with_suffix(".part"))
        os.replace(file.with_suffix(".part"), file)

    def say(self, text: str) -> None:
        if self.rank == 0:
            line = f"{time.time() - self.clock:6.0f}s {text}"
            print(line, flush=True)
            with open(self.folder / "log.txt", "a") as log:
                log.write(time.strftime("%H:%M:%S ") + line + "\n")

    # ---- the loop ----------------------------------------------------------------------------------------------
    def run(self) -> None:
        s, a = self.shared, self.args
        while int(s.state[1]) < len(PHASES):
            phase = PHASES[int(s.state[1])]
            steps = getattr(a, f"{phase}_steps")
            lr, decay = self.rates(phase)
            if phase == "joint" and self.rank == 0 and int(s.state[2]) == 0:
                self.level()
            micros = a.vision_micros if phase == "vision" else a.joint_micros
            while int(s.state[2]) < steps:
                step, started = int(s.state[2]), time.time()
                if self.rank == 0:
                    s.state[0] = micros
                    s.taken.value = 0
                s.barrier.wait()
                while (i := s.take()) < micros:
                    rng = np.random.default_rng([a.seed, PHASES.index(phase), step, i])
                    getattr(self, phase)(rng, i, step / steps)
                s.barrier.wait()
                norm = update(s, self.layout, self.rank, step + 1, lr, decay, schedule(step, steps, hold=a.hold))
                self.after(phase, step + 1, steps, norm, time.time() - started)
            if self.rank == 0:
                s.state[1] += 1
                s.state[2] = 0
                if phase == "vision":
                    s.first.zero_(), s.second.zero_()
                self.save()
            s.barrier.wait()

    @torch.no_grad()
    def level(self) -> None:
        """Let the projector start from features of unit size."""
        b = tensors(batches.vision_batch(np.random.default_rng(3), 16, grid=self.grid), self.shared.device)
        spread = model.look(self.bed, b["pixels"])[0][:, 1:].std()
        self.bed.vlm.model.multi_modal_projector.linear_1.weight.div_(spread)
        self.say(f"penultimate features: standard deviation {spread:.2f}")

    def rates(self, phase: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Learning rate and weight decay of every element."""
        a = self.args

        def rate(name: str, p) -> float:
            seeing = "vision_tower" in name or not name.startswith("vlm.")
            if phase == "vision":
                return a.vision_lr if seeing else 0.0
            return a.joint_lr * (a.see if seeing else 1.0)

        device = self.shared.device
        return self.layout.spread(rate).to(device), self.layout.spread(lambda n, p: 0.05 if p.ndim >= 2 else 0.0).to(device)

    def after(self, phase: str, step: int, steps: int, norm: float, seconds: float) -> None:
        s, a = self.shared, self.args
        if self.rank == 0:
            s.state[2] = step
            if phase == "joint":                        # running accuracy decides what is asked next
                got = sum(t.clone() for t in s.stats)
                right, count = got[64:64 + len(TYPES)], got[128:128 + len(TYPES)]
                self.right, self.count = getattr(self, "right", 0) + right, getattr(self, "count", 0) + count
                if step % 10 == 0:
                    acc, keep = s.state[ACC:ACC + len(TYPES)], 0.9 ** (self.count / 20)
                    acc.copy_(torch.where(self.count > 0, acc * keep + (1 - keep) * self.right / self.count.clamp(min=1), acc))
                    self.right, self.count = self.right * 0, self.count * 0
            for t in s.stats:
                t[64:192] = 0
            self.seconds = getattr(self, "seconds", 0) + seconds
            if step % a.log == 0:
                t = sum(x.clone() for x in s.stats)
                mean = t[:16] / t[16].clamp(min=1)
                said = " ".join(f"{x:.3f}" for x in mean[:8].tolist())
                if phase == "joint":
                    said += " | " + " ".join(f"{k}:{100 * v:.0f}" for k, v in zip(TYPES, s.state[ACC:].tolist()))
                self.say(f"{phase} {step}/{steps} {self.seconds / a.log:.2f} s/step norm {norm:.2f} loss {said}")
                self.seconds = 0
                for x in s.stats:
                    x.zero_()
            if step % a.save == 0:
                self.save()
        if step % a.evaluate == 0 or step == steps:
            s.barrier.wait()
            self.evaluate(phase)
        s.barrier.wait()

    def vision(self, rng, i: int, progress: float) -> None:
        a, stats = self.args, self.shared.stats[self.rank]
        b = tensors(batches.vision_batch(rng, a.vision_batch, grid=self.grid), self.shared.device)
        losses = vision_losses(self.bed, b)
        (losses[0] + a.contrast * losses[1] + a.phrase * losses[2] + a.gaze * losses[3]).backward()
        stats[:6] += torch.stack([x.detach().double().cpu() for x in losses])
        stats[16] += 1

    def joint(self, rng, i: int, progress: float) -> None:
        a, s = self.args, self.shared
        stats = s.stats[self.rank]
        if i == 0 and progress < a.see_until:           # one micro-batch of vision only keeps the tower a CLIP
            b = tensors(batches.vision_batch(rng, a.keep_batch, grid=self.grid), s.device)
            losses = vision_losses(self.bed, b)
            (losses[0] + a.contrast * losses[1] + a.phrase * losses[2] + a.gaze * losses[3]).backward()
            stats[2:8] += torch.stack([x.detach().double().cpu() for x in losses]) * (a.joint_micros - 1)
            return
        images = 2 if progress > 0.08 and rng.random() < a.pairs else 1
        weight = batches.weights(s.state[ACC:ACC + len(TYPES)].numpy())
        b = batches.joint_batch(rng, a.joint_batch if images == 1 else max(1, a.joint_batch * 3 // 4), weight, images=images,
                                room=150 if images == 1 else 110, chat=a.chat if progress > 0.1 else 0.0, grid=self.grid)
        loss, labels, right, count = joint_losses(self.bed, tensors(b, s.device), images, progress >= a.see_until)
        (loss + (a.labels * labels if labels.requires_grad else 0.0)).backward()
        stats[0] += loss.item()
        stats[1] += labels.item()
        stats[16] += 1
        stats[64:64 + len(TYPES)] += right
        stats[128:128 + len(TYPES)] += count

    # ---- held-out ----------------------------------------------------------------------------------------------
    @torch.no_grad()
    def evaluate(self, phase: str) -> None:
        """Teacher-forced exact match per type (for a full answer equal to greedy), or label accuracy, on the val digits."""
        s = self.shared
        if phase == "vision":
            if self.rank == 0:
                b = tensors(batches.vision_batch(np.random.default_rng(5), 192, split="val", grid=self.grid), s.device)
                penultimate, _, seen = model.look(self.bed, b["pixels"], last=True)
                z = self.bed.labels(penultimate[:, 1:]).split(list(batches_labels().values()), -1)
                kind = b["labels"][:, 0]
                said = []
                for j, name in enumerate(batches_labels()):
                    y, hit = b["labels"][:, j], z[j].argmax(-1) == b["labels"][:, j]
                    ask = (kind > 0) & (y >= 0)
                    said.append(f"{name}:{100 * hit[ask].float().mean():.0f}")
                digit, back = (kind > 0) & (kind <= 10) & (b["labels"][:, -1] < 0), kind == 0
                hit = z[0].argmax(-1) == kind
                ratio = [(a * (kind > 0)).sum(1).mean() for a in seen]
                self.say(f"  val labels {' '.join(said)} handwritten:{100 * hit[digit].float().mean():.0f} background:{100 * hit[back].float().mean():.0f}"
                         f" | CLS mass on foreground {ratio[0]:.2f} {ratio[1]:.2f} of area {(kind > 0).float().mean():.2f}")
            return
        flat = torch.ones(len(TYPES)).numpy() * 0.5
        total = s.stats[self.rank][192:192 + 2 * len(TYPES)]
        total.zero_()
        for j in range(self.rank, 14, s.workers):
            rng = np.random.default_rng([77, j])
            images = 2 if j >= 12 else 1
            b = batches.joint_batch(rng, 10, batches.weights(flat), images=images, room=190, chat=0.0, pages=0.3, split="val", grid=self.grid)
            _, _, right, count = joint_losses(self.bed, tensors(b, s.device), images, True)
            total[:len(TYPES)] += right
            total[len(TYPES):] += count
        s.barrier.wait()
        if self.rank == 0:
            t = sum(x[192:192 + 2 * len(TYPES)].clone() for x in s.stats)
            right, count = t[:len(TYPES)], t[len(TYPES):].clamp(min=1)
            self.say(f"  val exact {100 * right.sum() / count.sum():.1f} mean {100 * (right / count).mean():.1f} | "
                     + " ".join(f"{k}:{100 * v:.0f}" for k, v in zip(TYPES, (right / count).tolist())))


def batches_labels():
    from examples.testbed.scenes import LABELS
    return LABELS


def worker(rank: int, args, shared: Shared) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(rank)
    Trainer(args, shared, rank).run()


def arguments(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", default="testbed-run", help="folder of the run: state.pt, log.txt")
    p.add_argument("--size", default="small", choices=model.SIZES)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--vision-steps", type=int, default=1400)
    p.add_argument("--joint-steps", type=int, default=4600)
    p.add_argument("--vision-batch", type=int, default=16)
    p.add_argument("--vision-micros", type=int, default=4)
    p.add_argument("--joint-batch", type=int, default=4)
    p.add_argument("--joint-micros", type=int, default=7)
    p.add_argument("--keep-batch", type=int, default=12)
    p.add_argument("--vision-lr", type=float, default=2e-3)
    p.add_argument("--joint-lr", type=float, default=2e-3)
    p.add_argument("--see", type=float, default=0.4, help="vision tower's share of the joint learning rate")
    p.add_argument("--see-until", type=float, default=0.85, help="joint progress after which the vision tower rests")
    p.add_argument("--hold", type=float, default=0.5, help="share of a phase before the learning rate falls")
    p.add_argument("--contrast", type=float, default=0.3)
    p.add_argument("--phrase", type=float, default=0.5)
    p.add_argument("--gaze", type=float, default=0.0, help="weight of CLS attention on labelled foreground")
    p.add_argument("--labels", type=float, default=0.4, help="weight of the patch labels in the joint phase")
    p.add_argument("--pairs", type=float, default=0.12)
    p.add_argument("--chat", type=float, default=0.2)
    p.add_argument("--log", type=int, default=25)
    p.add_argument("--save", type=int, default=50)
    p.add_argument("--evaluate", type=int, default=200)
    return p.parse_args(argv)


def main() -> None:
    args = arguments()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    shared = Shared(Layout(model.Testbed(args.size)).size, args.workers)
    mp.spawn(worker, args=(args, shared), nprocs=args.workers)


if __name__ == "__main__":
    main()
