"""Train the testbed from nothing: first the vision tower as a small CLIP, then everything on packed questions.

Kill it and run it again with the same --out: it resumes from the last save. `--joint-steps` may be changed at a resume.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.testbed import batches, export, model
from examples.testbed.questions import TYPE_ID, TYPES
from examples.testbed.scenes import LABELS, SIZE
from examples.testbed.workers import Layout, Shared, update

PHASES = ("vision", "joint")
ACC = 16            # shared.state: 0 micro-batches per step, 1 phase, 2 step; from ACC on the running accuracy of every question type
RIGHT, COUNT, HELD = 64, 128, 192                       # shared.stats: 0..15 losses, 16 how many; then answers by type


def schedule(step: int, steps: int, hold: float, warm: int = 80) -> float:
    """Warm up, hold, then fall linearly to 2%: the total may still change at a resume while it holds."""
    x = max(0.0, (step / steps - hold) / (1 - hold))
    return min(1.0, (step + 1) / warm) * max(0.02, 1 - x)


# ---- losses --------------------------------------------------------------------------------------------------------
def vision_losses(bed: model.Testbed, b: dict[str, Tensor]) -> list[Tensor]:
    """Labels, CLS-caption contrast, patch-phrase match, gaze; and, to watch, the CLS attention on foreground of the last two layers.

    Gaze: how far the CLS attention of the penultimate layer is from looking evenly at the foreground (Kullback-Leibler).
    """
    penultimate, last, seen = model.look(bed, b["pixels"], last=True)
    contrast, match = model.clip_loss(bed, last, b["caption"], b["phrase"], b["match"])
    foreground = b["labels"][:, 0] > 0
    even = foreground / foreground.sum(1, keepdim=True).clamp(min=1)
    gaze = (even * (even.clamp(min=1e-9).log() - seen[0].clamp(min=1e-6).log())).sum(1).mean()
    mass = [(a.detach() * foreground).sum(1).mean() for a in seen]
    return [model.label_loss(bed, penultimate[:, 1:], b["labels"]), contrast, match, gaze, *mass]


def thinned(foreground: Tensor, share: float) -> Tensor:
    """Background patches left out, 30 to 100% of them in a share of the pictures; no thing is touched. foreground[B, N] -> bool[B, N]"""
    rate = 0.3 + 0.7 * torch.rand(len(foreground), 1)
    gone = (torch.rand(foreground.shape) < rate) & (torch.rand(len(foreground), 1) < share)
    return gone.to(foreground.device) & ~foreground


def joint_losses(
    bed: model.Testbed, b: dict[str, Tensor], images: int, rest: bool, thin: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Answer loss and label loss; right and asked per question type. `rest`: the vision tower is not trained."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and not rest):
        features, _, _ = model.look(bed, b["pixels"])
        labels = model.label_loss(bed, features[:, 1:], b["labels"])
    aside = thinned(b["labels"][:, 0] > 0, thin) if thin else None
    hidden = model.talk(bed, features[:, 1:], images, b["ids"], b["segment"], b["offset"], aside)
    here = b["target"] >= 0
    logits, target, kind, answer = bed.vlm.lm_head(hidden[here]).float(), b["target"][here], b["kind"][here], b["answer"][here]
    weight = torch.where((kind == TYPE_ID["describe"]) | (kind == TYPE_ID["transcribe"]), 0.4, 1.0)
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    wrong = torch.zeros(int(answer.max()) + 1, device=target.device).index_add_(0, answer, (logits.argmax(-1) != target).float())
    of = torch.full_like(wrong, -1, dtype=torch.long).scatter_(0, answer, kind)
    right = torch.bincount(of[(of >= 0) & (wrong == 0)], minlength=len(TYPES))
    return loss, labels, right.double().cpu(), torch.bincount(of[of >= 0], minlength=len(TYPES)).double().cpu()


# ---- data ----------------------------------------------------------------------------------------------------------
class Micros(torch.utils.data.Dataset):
    """Micro-batch i of step s of a phase, made from its own seed: a resumed run continues the same stream."""

    def __init__(self, args: argparse.Namespace, phase: str, state: Tensor):
        self.args, self.phase, self.state = args, phase, state
        self.each = getattr(args, f"{phase}_micros")
        self.steps = getattr(args, f"{phase}_steps")
        self.grid = SIZE // model.SIZES[args.size].patch

    def __len__(self) -> int:
        return self.steps * self.each

    def __getitem__(self, index: int) -> tuple[str, int, dict[str, np.ndarray]] | None:
        """-> vision or joint, images per row, batch; None where a step has nothing to do"""
        a, (step, i) = self.args, divmod(index, self.each)
        rng, progress = np.random.default_rng([a.seed, PHASES.index(self.phase), step, i]), step / self.steps
        if self.phase == "vision":
            return "vision", 1, batches.vision_batch(rng, a.vision_batch, grid=self.grid)
        if i == 0:                                      # one micro-batch of vision only keeps the tower a CLIP
            if rests(a, step):
                return None
            return "vision", 1, batches.vision_batch(rng, a.keep_batch, grid=self.grid)
        images = 2 if progress > 0.08 and rng.random() < a.pairs else 1
        weight = batches.weights(self.state[ACC:ACC + len(TYPES)].numpy())
        rows, room = (a.joint_batch, 150) if images == 1 else (max(1, a.joint_batch * 3 // 4), 110)
        chat = a.chat if progress > 0.1 else 0.0
        return "joint", images, batches.joint_batch(rng, rows, weight, images=images, room=room, chat=chat, grid=self.grid)


def rests(args: argparse.Namespace, step: int) -> bool:
    """Whether the vision tower sits out a joint step: most of them, and all near the end."""
    return step % args.see_every > 0 or step >= args.see_until * args.joint_steps


def as_is(sample):
    return sample


# ---- training ------------------------------------------------------------------------------------------------------
class Trainer:
    """One worker: takes micro-batches until a step has enough, then updates its share of the parameters."""

    def __init__(self, args: argparse.Namespace, shared: Shared, rank: int):
        self.args, self.shared, self.rank = args, shared, rank
        self.bed = model.Testbed(args.size).to(shared.device)
        self.layout = Layout(self.bed)
        self.folder = Path(args.out)
        self.clock, self.seconds = time.time(), 0.0
        self.asked = torch.zeros(2, len(TYPES), dtype=torch.float64)
        self.amp = nullcontext if shared.device == "cpu" else lambda: torch.autocast("cuda", torch.bfloat16)
        self.load()

    @property
    def phase(self) -> str | None:
        n = int(self.shared.state[1])
        return PHASES[n] if n < len(PHASES) else None

    def load(self) -> None:
        s, file = self.shared, self.folder / "state.pt"
        s.bind(self.layout, self.rank, load=file.exists())
        if self.rank == 0:
            s.state[ACC:ACC + len(TYPES)] = 0.3
            if file.exists():
                saved = torch.load(file, map_location=s.device)
                if saved["names"] != self.layout.names:
                    raise SystemExit(f"{file}: its parameters are not those of --size {self.args.size}")
                for name in ("param", "first", "second", "state"):
                    getattr(s, name).copy_(saved[name])
                self.say(f"resumed {self.phase} at step {int(s.state[2])}")
        s.barrier.wait()

    def save(self) -> None:
        """Written aside, then renamed: a kill at any moment leaves a whole file."""
        s, file = self.shared, self.folder / "state.pt"
        torch.save(dict(names=self.layout.names, param=s.param, first=s.first, second=s.second, state=s.state), file.with_suffix(".part"))
        os.replace(file.with_suffix(".part"), file)

    def say(self, text: str) -> None:
        if self.rank == 0:
            line = f"{time.strftime('%H:%M:%S')} {time.time() - self.clock:6.0f}s {text}"
            print(line, flush=True)
            with open(self.folder / "log.txt", "a") as log:
                log.write(line + "\n")

    def run(self) -> None:
        s = self.shared
        while self.phase:
            if self.phase == "joint" and int(s.state[2]) == 0:
                self.level()
            self.run_phase(self.phase)
            if self.rank == 0:
                s.state[1] += 1
                s.state[2] = 0
                s.first.zero_()
                s.second.zero_()
                self.save()
            s.barrier.wait()
        if self.rank == 0:
            export.save(self.bed, self.folder / "checkpoint")
            self.say(f"done: {self.folder / 'checkpoint'}")

    def run_phase(self, phase: str) -> None:
        s, micros = self.shared, Micros(self.args, phase, self.shared.state)
        rates, decay = [self.rates(phase, rest) for rest in (False, True)], self.layout.spread(lambda n, p: 0.05 if p.ndim >= 2 else 0.0)
        decay = decay.to(s.device)
        stream = self.stream(micros)
        while (step := int(s.state[2])) < micros.steps:
            started, rest = time.time(), phase == "joint" and rests(self.args, step)
            if self.rank == 0:
                s.state[0], s.taken.value = micros.each, 0
            s.barrier.wait()
            while (i := s.take()) < micros.each:
                sample = next(stream) if stream else micros[step * micros.each + i]
                self.thin = self.args.thin if step >= self.args.thin_from * micros.steps else 0.0
                if sample:
                    self.micro(*sample, rest)
            s.barrier.wait()
            norm = update(s, self.layout, self.rank, step + 1, rates[rest], decay, schedule(step, micros.steps, self.args.hold))
            self.seconds += time.time() - started
            self.after(phase, step + 1, micros.steps, norm)

    def stream(self, micros: Micros) -> Iterator | None:
        """On a GPU, batches come from loader processes; on a CPU the workers make their own."""
        if self.shared.device == "cpu":
            return None
        rest = range(int(self.shared.state[2]) * micros.each, len(micros))
        return iter(torch.utils.data.DataLoader(
            micros, batch_size=None, sampler=rest, num_workers=os.cpu_count() or 1, prefetch_factor=4, collate_fn=as_is))

    def micro(self, kind: str, images: int, batch: dict[str, np.ndarray], rest: bool) -> None:
        a, stats = self.args, self.shared.stats[self.rank]
        b = {k: torch.from_numpy(v).to(self.shared.device) for k, v in batch.items()}
        with self.amp():
            if kind == "vision":
                losses = vision_losses(self.bed, b)
                total = losses[0] + a.contrast * losses[1] + a.phrase * losses[2] + a.gaze * losses[3]
                stats[:6] += torch.stack([x.detach().double().cpu() for x in losses])
                stats[16] += 1
            else:
                loss, labels, right, count = joint_losses(self.bed, b, images, rest, self.thin)
                total = loss if rest else loss + a.labels * labels
                stats[8] += loss.item()
                stats[9] += labels.item()
                stats[17] += 1
                stats[RIGHT:RIGHT + len(TYPES)] += right
                stats[COUNT:COUNT + len(TYPES)] += count
        total.backward()

    @torch.no_grad()
    def level(self) -> None:
        """Let the projector start from features of unit size."""
        if self.rank == 0:
            pixels = batches.vision_batch(np.random.default_rng(3), 16)["pixels"]
            spread = model.look(self.bed, torch.from_numpy(pixels).to(self.shared.device))[0][:, 1:].std()
            self.bed.vlm.model.multi_modal_projector.linear_1.weight.div_(spread)
            self.say(f"penultimate features: standard deviation {spread:.2f}")
        self.shared.barrier.wait()

    def rates(self, phase: str, rest: bool) -> Tensor:
        """The learning rate of every element; Muon would move a matrix without a gradient too, so what rests has none."""
        a = self.args

        def rate(name: str, p: Tensor) -> float:
            seeing = "vision_tower" in name or not name.startswith("vlm.")
            if phase == "vision":
                return a.vision_lr if seeing else 0.0
            return a.joint_lr * ((0.0 if rest else a.see) if seeing else 1.0)

        return self.layout.spread(rate).to(self.shared.device)

    # ---- what happens between steps ----------------------------------------------------------------------------
    def after(self, phase: str, step: int, steps: int, norm: float) -> None:
        a, s = self.args, self.shared
        if self.rank == 0:
            s.state[2] = step
            self.follow(step)
            if step % a.log == 0:
                self.report(phase, step, steps, norm)
            if step % a.save == 0:
                self.save()
        s.barrier.wait()
        if step % a.evaluate == 0 or step == steps:
            self.evaluate(phase)
            s.barrier.wait()

    def follow(self, step: int) -> None:
        """Running accuracy per question type: what is not yet answered is asked more (batches.weights)."""
        s = self.shared
        for t in s.stats:
            self.asked += torch.stack([t[RIGHT:RIGHT + len(TYPES)], t[COUNT:COUNT + len(TYPES)]])
            t[RIGHT:HELD] = 0
        if step % 10 == 0:
            right, count = self.asked
            accuracy, keep = s.state[ACC:ACC + len(TYPES)], 0.9 ** (count / 20)
            accuracy.copy_(accuracy * keep + (1 - keep) * right / count.clamp(min=1))
            self.asked.zero_()

    def report(self, phase: str, step: int, steps: int, norm: float) -> None:
        total = torch.stack(self.shared.stats).sum(0)
        label, contrast, match, gaze, *mass = (total[:6] / total[16].clamp(min=1)).tolist()
        said = f"labels {label:.3f} contrast {contrast:.3f} phrase {match:.3f} gaze {gaze:.3f} CLS on things {mass[0]:.2f} {mass[1]:.2f}"
        if phase == "joint":
            answers, label = (total[8:10] / total[17].clamp(min=1)).tolist()
            said = f"answers {answers:.3f} labels {label:.3f} | {said} | {by_type(self.shared.state[ACC:ACC + len(TYPES)])}"
        self.say(f"{phase} {step}/{steps} {self.seconds / self.args.log:.2f} s/step norm {norm:.2f} {said}")
        self.seconds = 0.0
        for t in self.shared.stats:
            t.zero_()

    @torch.no_grad()
    def evaluate(self, phase: str) -> None:
        """On val digits: accuracy of the labels, or teacher-forced exact match (for a whole answer equal to greedy's)."""
        s, device = self.shared, self.shared.device
        grid = SIZE // self.bed.size.patch
        if phase == "vision":
            if self.rank == 0:
                batch = batches.vision_batch(np.random.default_rng(5), 192, "val", grid=grid)
                b = {k: torch.from_numpy(v).to(device) for k, v in batch.items()}
                penultimate, _, seen = model.look(self.bed, b["pixels"], last=True)
                self.say(f"  val {label_report(self.bed, penultimate[:, 1:], b['labels'], seen)}")
            return
        held = s.stats[self.rank][HELD:HELD + 2 * len(TYPES)]
        held.zero_()
        for j in range(self.rank, 14, s.workers):
            images, evenly = 2 if j >= 12 else 1, batches.weights(np.full(len(TYPES), 0.5))
            rng = np.random.default_rng([77, j])
            batch = batches.joint_batch(rng, 10, evenly, images=images, room=190, chat=0.0, pages=0.3, split="val", grid=grid)
            with self.amp():
                _, _, right, count = joint_losses(self.bed, {k: torch.from_numpy(v).to(device) for k, v in batch.items()}, images, True)
            held += torch.cat([right, count])
        s.barrier.wait()
        if self.rank == 0:
            right, count = torch.stack(s.stats).sum(0)[HELD:HELD + 2 * len(TYPES)].view(2, -1)
            accuracy = right / count.clamp(min=1)
            self.say(f"  val exact {100 * right.sum() / count.sum():.1f} mean {100 * accuracy.mean():.1f} | {by_type(accuracy)}")


def by_type(accuracy: Tensor) -> str:
    return " ".join(f"{kind}:{100 * v:.0f}" for kind, v in zip(TYPES, accuracy.tolist(), strict=True))


def label_report(bed: model.Testbed, features: Tensor, labels: Tensor, seen: list[Tensor]) -> str:
    kind, said = labels[:, 0], []
    for i, (z, name) in enumerate(zip(bed.labels(features).split(list(LABELS.values()), -1), LABELS, strict=True)):
        hit, ask = z.argmax(-1) == labels[:, i], (kind > 0) & (labels[:, i] >= 0)
        said.append(f"{name}:{100 * hit[ask].float().mean():.0f}")
        if name == "kind":
            written = (kind > 0) & (kind <= 10) & (labels[:, -1] < 0)
            said.append(f"(handwritten:{100 * hit[written].float().mean():.0f} background:{100 * hit[kind == 0].float().mean():.0f})")
    mass = " ".join(f"{(a * (kind > 0)).sum(1).mean():.2f}" for a in seen)
    return f"{' '.join(said)} | CLS on foreground {mass}, its area {(kind > 0).float().mean():.2f}"


def worker(rank: int, args: argparse.Namespace, shared: Shared) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    Trainer(args, shared, rank).run()


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", default="testbed-run", help="folder of the run: state.pt, log.txt, in the end checkpoint/")
    p.add_argument("--size", default="small", choices=model.SIZES)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    p.add_argument("--workers", type=int, default=2, help="single-threaded processes (CPU)")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--vision-steps", type=int, default=850)
    p.add_argument("--joint-steps", type=int, default=3250)
    p.add_argument("--vision-batch", type=int, default=16, help="pictures per micro-batch")
    p.add_argument("--vision-micros", type=int, default=4, help="micro-batches per step")
    p.add_argument("--joint-batch", type=int, default=3)
    p.add_argument("--joint-micros", type=int, default=7, help="the first of them vision only")
    p.add_argument("--keep-batch", type=int, default=24, help="pictures of that one")
    p.add_argument("--vision-lr", type=float, default=2.5e-3)
    p.add_argument("--joint-lr", type=float, default=3e-3)
    p.add_argument("--see", type=float, default=0.3, help="the vision tower's share of the joint learning rate")
    p.add_argument("--see-every", type=int, default=3, help="joint steps per one in which the vision tower is trained too")
    p.add_argument("--see-until", type=float, default=0.9, help="joint progress after which it rests for good")
    p.add_argument("--thin", type=float, default=0.4, help="share of the pictures that lose background patches, in the end")
    p.add_argument("--thin-from", type=float, default=0.82, help="joint progress from which they do; before, every token is always there")
    p.add_argument("--hold", type=float, default=0.4, help="share of a phase before the learning rate falls")
    p.add_argument("--contrast", type=float, default=0.3, help="weight of CLS against captions")
    p.add_argument("--phrase", type=float, default=0.5, help="weight of patches against phrases")
    p.add_argument("--gaze", type=float, default=0.3, help="weight of CLS looking evenly at the foreground")
    p.add_argument("--labels", type=float, default=0.4, help="weight of the patch labels in the joint phase")
    p.add_argument("--pairs", type=float, default=0.18, help="share of micro-batches with two pictures per row")
    p.add_argument("--chat", type=float, default=0.2, help="share of conversations that go on to a second turn")
    p.add_argument("--log", type=int, default=25)
    p.add_argument("--save", type=int, default=50)
    p.add_argument("--evaluate", type=int, default=200)
    return p.parse_args(argv)


def main() -> None:
    args = arguments()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    size = Layout(model.Testbed(args.size)).size
    if args.device == "cuda":
        worker(0, args, Shared(size, 1, "cuda"))
    else:
        mp.spawn(worker, args=(args, Shared(size, args.workers)), nprocs=args.workers)


if __name__ == "__main__":
    main()
