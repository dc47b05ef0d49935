"""A program as a picture: Graphviz DOT of one stage, or one stand-alone HTML page of all of them."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping

from torch.fx import Node

from .cost import OTHER, cost, evaluate
from .dump import dump_stage
from .program import Program
from .sites import layer_of

STYLE = """
:root { color-scheme: light dark; --bar: #4c8bf5; --cut: #d9822b; --line: #8884; }
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; } td, th { padding: .15rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
td:last-child { width: 45%; } .bar { background: var(--bar); height: .8rem; border-radius: 2px; } .cut .bar { background: var(--cut); }
pre { overflow-x: auto; font-size: 12px; padding: .6rem; border: 1px solid var(--line); border-radius: 4px; } summary { cursor: pointer; }
"""


def dot(program: Program, stage: str = "prefill") -> str:
    """Graphviz text: one cluster per layer, dialect ops filled, the nodes that no layer owns (embedding, selection, head) outside."""
    graph, pattern = program[stage], _pattern(program, stage)
    clusters: dict[int, list[Node]] = {}
    for node in graph.graph.nodes:
        if node.op in ("call_function", "placeholder"):
            layer = layer_of(node, pattern)
            clusters.setdefault(OTHER if layer is None else layer, []).append(node)
    lines = [f'digraph "{stage}" {{', "  node [shape=box, fontsize=10];"]
    for layer, nodes in sorted(clusters.items()):
        inside = [f'    "{n.name}" [label="{_label(n)}"{", style=filled" if "foveate" in str(n.target) else ""}];' for n in nodes]
        lines += inside if layer == OTHER else [f"  subgraph cluster_{layer} {{", f'    label="layer {layer}";', *inside, "  }"]
    shown = {n for nodes in clusters.values() for n in nodes}
    lines += [f'  "{a.name}" -> "{n.name}";' for n in graph.graph.nodes if n in shown for a in n.all_input_nodes if a in shown]
    return "\n".join([*lines, "}"])


def page(program: Program, sizes: Mapping[str, int] | None = None) -> str:
    """Tokens, FLOPs and bytes of every layer as bars, the history, and the text of every stage. `sizes`: values of B, S, N for the bars."""
    visual = program.facts.visual_per_image or 576
    sizes = {"B": 1, "S": visual + 40, "N": visual, "images": 1, **(sizes or {})}
    parts = [f"<h1>{html.escape(program.facts.model_type)}</h1>", f"<p>Sizes: {', '.join(f'{k} = {v}' for k, v in sizes.items())}</p>"]
    if program.history:
        parts.append("<h2>Passes</h2><table><tr><th>pass</th><th>parameters</th><th>nodes</th><th>ms</th></tr>")
        parts += [
            f"<tr><td>{r.name}</td><td>{html.escape(str(r.parameters))}</td><td>{r.nodes[0]} → {r.nodes[1]}</td><td>{r.ms:.0f}</td></tr>"
            for r in program.history
        ]
        parts.append("</table>")
    for name, stage in program.stages.items():
        parts.append(f"<h2>{name}</h2>")
        if name != "decode":
            parts.append(_bars(program, name, sizes))
        parts.append(f"<details><summary>{len(stage.graph.nodes)} nodes</summary><pre>{html.escape(dump_stage(stage))}</pre></details>")
    head = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>foveate</title>"
    return f"{head}<style>{STYLE}</style><body>{''.join(parts)}</body></html>"


def _bars(program: Program, stage: str, sizes: Mapping[str, int]) -> str:
    rows = [(r.layer, evaluate(r.tokens, sizes), evaluate(r.flops, sizes), evaluate(r.bytes, sizes)) for r in cost(program, stage).rows]
    widest = max(tokens for _, tokens, _, _ in rows) or 1
    lines = ["<table><tr><th>layer</th><th>tokens</th><th>MFLOP</th><th>MB moved</th><th></th></tr>"]
    for layer, tokens, flops, moved in rows:
        label, cut = ("other", "") if layer == OTHER else (str(layer), " class=cut" if 0 < tokens < widest else "")
        lines.append(
            f"<tr{cut}><td>{label}</td><td>{tokens}</td><td>{flops / 1e6:.1f}</td><td>{moved / 1e6:.1f}</td>"
            f"<td><div class=bar style='width:{100 * tokens / widest:.1f}%'></div></td></tr>"
        )
    return "".join([*lines, "</table>"])


def _pattern(program: Program, stage: str) -> re.Pattern[str]:
    return re.compile(program.facts.vision_layer_path if stage == "vision" else program.facts.layer_path)


def _label(node: Node) -> str:
    return node.meta.get("name", node.name) if node.op == "placeholder" else str(node.target).removesuffix(".default")
