"""Recipes: what is read, what is refused, and in which words."""

import pytest

import foveate
from foveate.passes import pipeline, recipe
from foveate.passes.base import PassError, make


def test_every_named_recipe_loads_and_survives_its_own_yaml(tmp_path):
    assert recipe.names()
    for name in recipe.names():
        loaded = recipe.load(name)
        (tmp_path / "r.yaml").write_text(loaded.yaml())
        assert recipe.load(tmp_path / "r.yaml") == loaded
        assert loaded.steps and loaded.description


def test_inline_text_and_overrides():
    loaded = recipe.load("drop-fastv{layer=3,keep=0.25}, clean-up", {"keep": "16", "drop-fastv.layer": "4"})
    assert [s.rewrite for s in loaded.steps] == [make("drop-fastv", {"layer": 4, "keep": 16}), make("clean-up")]


@pytest.mark.parametrize(("text", "message"), [
    ("drop-fastw", "recipe: no recipe or pass 'drop-fastw', did you mean 'drop-fastv'"),
    ("fastv-65", "recipe: no recipe or pass 'fastv-65', did you mean 'fastv-64'"),
    ("drop-fastv{layr=1}", "drop-fastv: no parameter 'layr', did you mean 'layer'.*parameters are layer, keep"),
    ("drop-fastv{layer=-1}", "drop-fastv: parameter layer: input should be greater than or equal to 0, got -1"),
    ("drop-fastv{keep=0}", "drop-fastv: parameter keep: .*got 0"),
    ("drop-fastv{keep=1.5}", "drop-fastv: parameter keep: .*got 1.5"),
    ("drop-fastv{keep}", "recipe: 'keep' in 'drop-fastv{keep}' has no value"),
    ("nowhere/r.yaml", "recipe: no file nowhere/r.yaml"),
])
def test_refuses_by_name(text, message):
    with pytest.raises(PassError, match=message):
        recipe.load(text)


def test_refuses_an_unknown_key_and_broken_yaml_by_file(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("passs: []\n")
    with pytest.raises(PassError, match=r"r.yaml: passes: field required|did you mean 'passes'"):
        recipe.load(file)
    file.write_text("passes: [")
    with pytest.raises(PassError, match="not YAML"):
        recipe.load(file)


def test_refuses_an_ambiguous_override():
    with pytest.raises(PassError, match=r"--set keep: fits 2 passes of recipe 'cls-then-fastv'.*settable are prune-vision-cls.keep, drop-fastv.layer"):
        recipe.load("cls-then-fastv", {"keep": "4"})


def test_a_pass_that_changes_nothing_is_an_error_unless_optional(toy):
    with pytest.raises(PassError, match=r"drop-fastv: nothing to change.*ran before: nothing"):
        pipeline.run(toy.clone(), recipe.load("drop-fastv{layer=1,keep=1.0}"))
    program = pipeline.run(toy, recipe.load([{"drop-fastv": {"layer": 1, "keep": 1.0, "optional": True}}]))
    assert [r.changed for r in program.history] == [False]


def test_an_optional_pass_that_fails_leaves_the_program_as_it_was(toy):
    from foveate.graph.dump import dump

    before = dump(toy)
    pipeline.run(toy, recipe.load([{"drop-fastv": {"layer": 7, "keep": 2, "optional": True}}]))
    assert dump(toy) == before


def test_an_error_names_what_ran_before(toy):
    with pytest.raises(PassError, match=r"drop-fastv: no layer 7 .*ran before: drop-uniform"):
        pipeline.run(toy, recipe.load("drop-uniform{layer=1,keep=3}, drop-fastv{layer=7,keep=2}"))


def test_a_method_from_a_folder_takes_one_file(tmp_path, toy):
    from foveate.passes.base import PASSES

    (tmp_path / "drop_first.py").write_text('''
from dataclasses import dataclass
from typing import ClassVar
from torch import Tensor
from foveate.passes.select import Keep, Layer, Select

@dataclass(frozen=True)
class DropFirst(Select):
    """Keep the last visual tokens."""
    name: ClassVar[str] = "drop-first"
    layer: Layer = 1
    keep: Keep = 2
    def score(self, visual_index: Tensor) -> Tensor:
        return visual_index.float()
''')
    try:
        assert foveate.load_plugin(tmp_path)["passes"] == ["drop-first"]
        pipeline.run(toy, recipe.load("drop-first{keep=2}, clean-up"))
        assert toy["prefill"].run(toy.example["prefill"])["kept.layer1"].tolist() == [[4, 5]] * 5
    finally:
        PASSES.pop("drop-first", None)
