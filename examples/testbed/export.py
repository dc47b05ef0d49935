"""Write a training state as a checkpoint that plain transformers loads."""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.testbed import words
from examples.testbed.model import Testbed
from examples.testbed.workers import Layout


def save(bed: Testbed, folder: Path) -> None:
    bed = bed.cpu().eval()
    bed.vlm.generation_config = GenerationConfig(
        bos_token_id=words.BOS, eos_token_id=words.EOS, pad_token_id=words.PAD, max_new_tokens=48, do_sample=False)
    bed.vlm.save_pretrained(folder)
    words.save_processor(folder, patch=bed.size.patch)
    bed.text_tower.save_pretrained(folder / "text_tower")
    save_file({"visual_projection.weight": bed.visual_projection.weight.data.contiguous(), "scales": bed.scales.data},
              folder / "text_tower" / "projection.safetensors")


def restore(state: Path, size: str) -> Testbed:
    bed, saved = Testbed(size), torch.load(state, map_location="cpu")
    layout = Layout(bed)
    for i, p in enumerate(layout.params):
        p.data.copy_(saved["param"][layout.at[i]:layout.at[i + 1]].view(p.shape))
    return bed


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--run", type=Path, default=Path("testbed-run"))
    p.add_argument("--size", default="small")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "checkpoint")
    args = p.parse_args()
    save(restore(args.run / "state.pt", args.size), args.out)
    print(f"{args.out}: {sum(f.stat().st_size for f in args.out.rglob('*.safetensors')) / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
