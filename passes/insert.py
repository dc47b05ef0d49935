"""Insert: passes that add trainable tensors. What they are called, how they reach the graphs, and how they are saved, loaded and folded away.

A learned tensor is one `Parameter`, read by `get_attr` nodes named `learned.<pass>.<what>` in every stage that needs it (prefill and decode share
it, as they share weights). The files are safetensors with the same names; a file and a recipe fit when names and shapes are equal.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..graph.program import Program, Stage
from ..graph.retype import fake_mode, retype
from ..graph.stage import sweep
from .base import Pass, PassError

PREFIX = "learned."
MERGED = "merged."


class Insertion(Pass):
    """A pass that adds trainable tensors. `elastic` ones may be loaded from a longer table: their first rows are meant to be used alone."""

    def learn(self, program: Program, stage: str, before: Node, what: str, initial: Callable[[], Tensor]) -> Node:
        """The tensor `learned.<pass>.<what>` as a node of the stage; the first to ask makes it from `initial` (float32)."""
        name = f"{PREFIX}{self.name}.{what}"
        known = learned(program)
        if name in known:
            tensor = known[name]
            if any(n.op == "get_attr" and n.target == name for n in program[stage].graph.nodes):
                raise self.fail(f"is in this program already (its tensor {name} is taken); give a recipe one of them")
        else:
            place = reference(program)
            value = torch.empty_like(initial(), device="meta") if place.device.type == "meta" else initial().to(place.device)
            tensor = nn.Parameter(value.to(place.dtype))
        return attach(program[stage], before, name, tensor)

    def noise(self, what: str, *shape: int, std: float = 0.02) -> Tensor:
        """Normal numbers that depend on the names only: the same tensor in every run and on every machine."""
        seed = zlib.crc32(f"{self.name}.{what}".encode()) + int(getattr(self, "seed", 0))
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def reference(program: Program) -> Tensor:
    """A tensor of the model that says on which device and in which dtype learned ones live: its largest floating one."""
    return max((t for _, t in program.parameters() if t.is_floating_point()), key=lambda t: t.numel())


def attach(stage: Stage, before: Node, name: str, tensor: nn.Parameter) -> Node:
    """The tensor under that name in the stage's module, and a typed get_attr node that reads it."""
    *parents, leaf = name.split(".")
    owner: nn.Module = stage.module
    for part in parents:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    owner.register_parameter(leaf, tensor)
    with stage.graph.inserting_before(before):
        node = stage.graph.get_attr(name)
    node.meta["val"] = fake_mode(stage).from_tensor(tensor, static_shapes=True)
    return node


def learned(program: Program) -> dict[str, nn.Parameter]:
    """name -> tensor, of all learned tensors that some stage reads."""
    found: dict[str, nn.Parameter] = {}
    for stage in program.stages.values():
        for node in stage.graph.nodes:
            if node.op == "get_attr" and str(node.target).startswith(PREFIX):
                found[str(node.target)] = attribute(stage, str(node.target))
    return dict(sorted(found.items()))


def attribute(stage: Stage, path: str) -> Any:
    value: Any = stage.module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def share(programs: Iterable[Program]) -> dict[str, nn.Parameter]:
    """Let programs of one family (the same insertion at another layer, or with fewer rows in use) read the same tensors: those of the first that
    has them. Returns all of them."""
    owners: dict[str, nn.Parameter] = {}
    for program in programs:
        for name, tensor in learned(program).items():
            first = owners.setdefault(name, tensor)
            if first.shape != tensor.shape:
                raise PassError(f"insert: {name} is {list(first.shape)} in one program and {list(tensor.shape)} in another; they cannot share it")
            if first is not tensor:
                _replace(program, name, first)
    return owners


def _replace(program: Program, name: str, tensor: nn.Parameter) -> None:
    *parents, leaf = name.split(".")
    for stage in program.stages.values():
        owner: Any = stage.module
        for part in parents:
            owner = getattr(owner, part, None)
        if owner is not None and leaf in owner._parameters:
            owner.register_parameter(leaf, tensor)


# ---- files


def save_weights(program: Program | Mapping[str, Tensor], path: str | Path, note: Mapping[str, str] | None = None) -> Path:
    """The learned tensors as safetensors (float32), by their names without the prefix; replaced in one step. `note` becomes the file's metadata."""
    from safetensors.torch import save_file

    tensors = learned(program) if isinstance(program, Program) else program
    if not tensors:
        raise PassError("weights: this program has no learned tensors to save; its recipe inserts none")
    path = Path(path)
    partial = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({n.removeprefix(PREFIX): t.detach().float().cpu().contiguous() for n, t in tensors.items()}, str(partial), dict(note or {}) or None)
        os.replace(partial, path)
    except OSError as error:
        raise PassError(f"weights: cannot write {path}: {error.strerror or error}") from error
    return path


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """name (with prefix) -> tensor of a weights file; unreadable is a PassError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise PassError(f"weights: no file {path}")
    try:
        return {PREFIX + n: t for n, t in load_file(str(path)).items()}
    except (SafetensorError, OSError) as error:
        raise PassError(f"weights: {path} is not a safetensors file that can be read: {error}") from error


def load_weights(program: Program, path: str | Path) -> int:
    """Fill the program's learned tensors from a file; returns how many. Names and shapes must be equal: a PassError says which are not."""
    have, want = read_weights(path), learned(program)
    if not want:
        raise PassError(f"weights: {path} was given, and this recipe inserts no learned tensors")
    plain = [n.removeprefix(PREFIX) for n in want]
    if have.keys() != want.keys():
        missing, unknown = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
        parts = [f"{what} {len(names)} ({', '.join(n.removeprefix(PREFIX) for n in names[:4])}{', ...' if len(names) > 4 else ''})"
                 for what, names in (("lacks", missing), ("has unknown", unknown)) if names]
        raise PassError(f"weights: {path} does not belong to this recipe: it {' and '.join(parts)}; the recipe's tensors are "
                        f"{', '.join(plain[:6])}{', ...' if len(plain) > 6 else ''}")
    for name, tensor in want.items():
        if have[name].shape != tensor.shape:
            raise PassError(f"weights: {name.removeprefix(PREFIX)} is {list(have[name].shape)} in {path} and {list(tensor.shape)} in this recipe and model")
        if not torch.isfinite(have[name]).all():
            raise PassError(f"weights: {name.removeprefix(PREFIX)} in {path} has numbers that are not finite")
    with torch.no_grad():
        for name, tensor in want.items():
            if tensor.device.type != "meta":
                tensor.copy_(have[name])
    return len(want)


# ---- folding


def settle(program: Program) -> int:
    """Compute once what depends on weights alone and reads a learned tensor (W + B A, a softmax over constant rows), after training and loading.

    rewrite:
        f(@weight, @learned.x)  ->  @merged.<first weight's name or the learned one's>

    The same expression in two stages becomes one tensor. Returns how many tensors were made.
    """
    made: dict[str, nn.Parameter] = {}
    for stage in program.stages.values():
        constant = _constants(stage)
        for node in list(stage.graph.nodes):
            if node in constant and node.op != "get_attr" and PREFIX in constant[node] and any(u not in constant for u in node.users):
                _fold(stage, node, constant[node], made)
        sweep(stage)
        retype(stage)
        stage.module.recompile()
    return len(made)


def _constants(stage: Stage) -> dict[Node, str]:
    """Nodes that depend on parameters alone, each with its expression as text."""
    found: dict[Node, str] = {}
    for node in stage.graph.nodes:
        if node.op == "get_attr":
            found[node] = f"@{node.target}"
        elif node.op == "call_function" and isinstance(node.meta.get("val"), Tensor) and node.all_input_nodes:
            if all(n in found for n in node.all_input_nodes):
                found[node] = f"{node.target}({torch.fx.node.map_arg((node.args, tuple(sorted(node.kwargs.items()))), found.__getitem__)})"
    return found


def _fold(stage: Stage, node: Node, key: str, made: dict[str, nn.Parameter]) -> None:
    if key not in made:
        with torch.no_grad():
            made[key] = nn.Parameter(evaluate(stage, node), requires_grad=False)
        taken = sum(t.foveate_leaf == _leaf(node) for k, t in made.items() if k != key)  # type: ignore[attr-defined]
        made[key].foveate_leaf = _leaf(node)  # type: ignore[attr-defined]
        made[key].foveate_name = f"{MERGED}{_leaf(node)}{taken or ''}"  # type: ignore[attr-defined]
    new = attach(stage, node, made[key].foveate_name, made[key])  # type: ignore[attr-defined]
    for user in list(node.users):
        user.replace_input_with(node, new)


def evaluate(stage: Stage, node: Node) -> Tensor:
    """The value of a node that depends on parameters alone."""
    values: dict[Node, Any] = {}

    def value(n: Node) -> Any:
        if n not in values:
            values[n] = attribute(stage, str(n.target)) if n.op == "get_attr" else n.target(  # type: ignore[operator]
                *torch.fx.node.map_arg(n.args, value), **torch.fx.node.map_arg(n.kwargs, value))
        return values[n]

    return value(node)


def _leaf(node: Node) -> str:
    """A readable, unique name: of the first weight below, the learned one if there is no other."""
    names, waiting = [], [node]
    while waiting:
        n = waiting.pop(0)
        names += [str(n.target)] if n.op == "get_attr" else []
        waiting += n.all_input_nodes
    plain = [n for n in names if not n.startswith(PREFIX)]
    return plain[0] if plain else names[0].removeprefix(PREFIX)
