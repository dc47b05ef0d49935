"""Every vision-side method, exported to ONNX, gives on ONNX Runtime what it gives eagerly: the same tokens, the same rows."""

import helpers
import onnxruntime
import pytest
import torch
import towers
from vision_cases import CASES, IN_TOWER, KEEP

from foveate.export.errors import LowerError
from foveate.export.to_onnx import to_onnx
from foveate.passes.base import make

METHODS = [(name, {"keep": KEEP, **more}) for name, more in CASES if name != "merge-prumerge" or "mode" not in more] + IN_TOWER


@pytest.mark.parametrize(("name", "parameters"), METHODS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(METHODS)])
def test_onnx_runtime_equals_eager(name, parameters):
    program, method = towers.tower(layers=4), make(name, parameters)
    assert method.run(program)
    shared = getattr(method, "shared", 1)
    pixels = torch.randn(2 * shared, 15, 3, generator=torch.Generator().manual_seed(11))
    feeds = towers.feeds(program, pixels)
    want = {k: v.detach().numpy() for k, v in program["vision"].run(feeds).items()}
    model = to_onnx(program["vision"], "vision").SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    got = dict(zip(program["vision"].outputs, session.run(program["vision"].outputs, {k: v.numpy() for k, v in feeds.items()}), strict=True))
    for key, value in want.items():
        if key.startswith("kept"):
            assert (got[key] == value).all(), key
        else:
            helpers.close(torch.from_numpy(got[key]), torch.from_numpy(value), 1e-4)  # other kernels, float32, four layers of unit-variance weights


def test_prumerge_s_published_count_is_for_comparison_only():
    """Percentiles over a batch have no portable form: the parity mode runs eagerly and says what it lacks when exported."""
    program = towers.tower(layers=4)
    make("merge-prumerge", {"keep": KEEP, "mode": "parity"}).run(program)
    with pytest.raises(LowerError, match="quantile"):
        to_onnx(program["vision"], "vision")
