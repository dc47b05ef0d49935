"""Position ids equal those of transformers' modelling code, on random sequences."""

import numpy as np
import pytest
import torch

from foveate.runtime.batch import image_groups, lay_out
from foveate.runtime.errors import RunError
from foveate.runtime.positions import position_ids

IMAGE = 7


def random_prompt(rng: np.random.Generator, images: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens[T] with text between images, as the mrope families' markers guarantee, and grids[images, 3] in patches"""
    tokens, grids = [rng.integers(10, 99, rng.integers(1, 6))], []
    for _ in range(images):
        t, h, w = 1, *(rng.integers(1, 6, 2) * merge)
        grids.append((t, h, w))
        tokens += [np.full(t * h * w // merge**2, IMAGE), rng.integers(10, 99, rng.integers(1, 6))]
    return np.concatenate(tokens), np.array(grids).reshape(-1, 3)


def modelling_code(family: str, merge: int):
    """transformers' own get_rope_index, unbound, over a stand-in config: no weights are needed for arithmetic"""
    import importlib
    from types import SimpleNamespace

    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    model = next(v for k, v in vars(module).items() if k.endswith("Model") and hasattr(v, "get_rope_index"))
    stand_in = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=merge, tokens_per_second=2)))
    stand_in.get_vision_position_ids = lambda *a, **k: model.get_vision_position_ids(stand_in, *a, **k)
    return lambda **inputs: model.get_rope_index(stand_in, **inputs)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_mrope_equals_the_modelling_code(family):
    rng = np.random.default_rng(0)
    for trial in range(40):
        merge, images = int(rng.choice([1, 2])), int(rng.integers(0, 4))
        tokens, grids = random_prompt(rng, images, merge)
        groups = image_groups(tokens, IMAGE, images, None, grids if images else None, merge)
        got = position_ids(len(tokens), groups, grids if images else None, {"kind": "mrope", "merge": merge})
        pad = int(rng.integers(0, 4))  # right padding, as the runtime feeds it
        ids = torch.tensor(np.pad(tokens, (0, pad)))[None]
        mask = torch.tensor([[1] * len(tokens) + [0] * pad])
        want, delta = modelling_code(family, merge)(input_ids=ids, mm_token_type_ids=(ids == IMAGE).int(), attention_mask=mask,
                                                    image_grid_thw=torch.tensor(grids) if images else None)
        np.testing.assert_array_equal(got, want[:, 0, : len(tokens)].numpy(), err_msg=f"trial {trial}")
        layout = lay_out(tokens, groups, [len(g) for g in groups], grids if images else None, {"kind": "mrope", "merge": merge})
        assert layout.next_position == len(tokens) + int(delta), "the first generated token's position"


def test_linear_starts_where_the_family_says():
    assert position_ids(3, (), None, {"kind": "linear"}).tolist() == [0, 1, 2]
    assert position_ids(3, (), None, {"kind": "linear", "start": 1}).tolist() == [1, 2, 3]


def test_a_pruned_picture_keeps_its_places():
    tokens = np.array([11, *[IMAGE] * 6, 12])
    grids = np.array([[1, 2, 3]])
    groups = image_groups(tokens, IMAGE, 1, None, grids, 1)
    layout = lay_out(tokens, groups, [2], grids, {"kind": "mrope", "merge": 1}, kept=[np.array([1, 5])])
    assert layout.tokens.tolist() == [11, IMAGE, IMAGE, 12]
    assert layout.positions.T.tolist() == [[0, 0, 0], [1, 1, 2], [1, 2, 3], [4, 4, 4]]
    assert layout.next_position == 5


def test_groups_follow_grids_counts_or_runs():
    tokens = np.array([IMAGE, IMAGE, 1, IMAGE, IMAGE, 1, IMAGE, IMAGE])
    assert [g.tolist() for g in image_groups(tokens, IMAGE, 3, None)] == [[0, 1], [3, 4], [6, 7]]
    assert [g.tolist() for g in image_groups(tokens, IMAGE, 1, 6)] == [[0, 1, 3, 4, 6, 7]], "rows of one picture with breaks between"
    assert [g.tolist() for g in image_groups(tokens, IMAGE, 2, None, np.array([[1, 1, 2], [1, 2, 2]]))] == [[0, 1], [3, 4, 6, 7]]
    adjacent = np.array([IMAGE] * 6)
    assert [g.tolist() for g in image_groups(adjacent, IMAGE, 2, 3)] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(("images", "message"), [(0, "8 image tokens, but no image"), (3, "do not belong to 3 image")])
def test_groups_that_do_not_fit(images, message):
    with pytest.raises(RunError, match=message):
        image_groups(np.array([IMAGE] * 8), IMAGE, images, None)


def test_unknown_kind():
    with pytest.raises(RunError, match=r"unknown kind 'spiral'; this version knows \['linear', 'mrope'\]"):
        position_ids(3, (), None, {"kind": "spiral"})


def test_a_reduction_may_not_add_rows():
    tokens = np.array([1, IMAGE, IMAGE])
    with pytest.raises(RunError, match="3 rows for an image with 2"):
        lay_out(tokens, image_groups(tokens, IMAGE, 1, None), [3], None, {"kind": "linear"})
