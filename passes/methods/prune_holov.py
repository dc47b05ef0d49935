"""HoloV: every stretch of the picture gets a share of the budget by attention and diversity, and spends it on its most attended tokens."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from ..select import Keep
from ..vision_plan import Plan, best
from ..vision_select import Mode, VisionSelect
from ..vision_signals import Signals, cosine, rank


@dataclass(frozen=True)
class PruneHoloV(VisionSelect):
    """
    rewrite:
        P stretches of n / P tokens in reading order;  t = 1000 a + alpha v mean|1000 a| / mean|v|,  a = mean_h attention of CLS (or received),
        v = variance of the cosines inside the stretch;  quota of a stretch ~ mean t;  i = top quota by a in every stretch
        keep_tokens(projected tokens, i)

    Zou et al., "HoloV: Don't Just Chase Highlighted Tokens in MLLMs" (NeurIPS 2025); 16 stretches, alpha 0.09, 64 of 576.
    Towers without CLS: the attention that a token receives, as in the published code for Qwen2.5-VL (there in window order, here in its own).
    fixed: what a stretch cannot spend goes to the most attended tokens anywhere; reading order.
    parity: it is lost (rows of zeros at the end), and tokens come stretch by stretch, by falling attention unless the whole stretch stays.
    """

    name: ClassVar[str] = "prune-holov"
    paper: ClassVar[str] = "arXiv:2510.02912"
    shapes: ClassVar[str] = "split"
    after_projector: ClassVar[bool] = True

    keep: Keep = 0.112
    stretches: Annotated[int, Ge(1)] = 16
    alpha: float = 0.09
    mode: Mode = "fixed"

    def reads(self) -> list[str]:
        return ["features", "attended"]

    def plan(self, count: int, signals: Signals) -> Plan:
        a, n = signals.attended.mean(1), signals.features.shape[1]
        parts = min(self.stretches, n // 2)
        owner = torch.tensor([p for p in range(parts) for _ in range(n // parts + (p < n % parts))], device=a.device)
        member = (owner[:, None] == torch.arange(parts, device=a.device)).float()  # [n, P]
        size = member.sum(0)
        quota = self.quota((self.token_scores(a, signals.features, member) @ member) / size, count)
        inside = (rank(torch.where(member.T > 0, a[:, None], float("-inf"))) * member.T.long()).sum(1)  # place in its own stretch
        mine = quota[:, owner]
        if self.mode == "fixed":
            return Plan(best(torch.where(inside < mine, 2 + a, a), count))
        place = torch.arange(n, device=a.device)[None]
        whole = mine >= size[owner]
        key = torch.where(inside < mine, owner * n + torch.where(whole, place, inside), n * n)
        order = key.sort(1)
        return Plan(torch.where(order.values < n * n, order.indices, -1)[:, :count], holes=True)

    def token_scores(self, a: Tensor, features: Tensor, member: Tensor) -> Tensor:
        """-> t[I, n]; the cosine with itself counts as zero, its deviation from the mean does not"""
        n, same = a.shape[1], member @ member.T
        others = (same.sum(1) - 1).clamp(min=1)
        likeness = cosine(features) * (same * (torch.arange(n, device=a.device)[:, None] != torch.arange(n, device=a.device)))
        mean = likeness.sum(-1, keepdim=True) / others[:, None]
        variance = ((likeness - mean).square() * same).sum(-1) / others
        attended, varied = ((x.abs() @ member / member.sum(0)) @ member.T for x in (1e3 * a, variance))
        return 1e3 * a + self.alpha * variance * attended / (varied + 1e-6)

    def quota(self, score: Tensor, count: int) -> Tensor:
        """score[I, P] -> tokens per stretch: the floor of its share, and one more each for the largest while tokens are left"""
        share = score / (score.sum(1, keepdim=True) + 1e-6)
        whole = (share * count).floor()
        return (whole + (rank(share) < count - whole.sum(1, keepdim=True))).long()
