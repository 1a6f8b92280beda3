"""Which part of a decoding step each instruction of a compiled program belongs to, by the names that JAX gave it."""

import re
from collections import deque
from typing import NamedTuple

SCOPES = {
    "projections": "projections",
    "sparse_decode_attention": "attention",
    "mlp": "neurons",
    "routers": "routers and selection",
    "append": "cache append",
    "head": "head",
}
"""The part of each `jax.named_scope` of polarjax/model; an operation is in the last of them on its path."""
REST = "norms and the rest"

_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)\(([^()]*)\)(.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")


class Instruction(NamedTuple):
    """One line of a program: its operation, operands, the computation that it is in and calls, and its path, or ""."""

    name: str
    op: str
    operands: tuple[str, ...]
    inside: str
    calls: str
    path: str


def part_of(path: str) -> str:
    """The part that a path such as "jit(step)/layer_0/mlp/dot_general" belongs to."""
    for scope in reversed(path.split("/")):
        if part := SCOPES.get(scope.partition(".")[0]):
            return part
    return REST


def instruction_parts(program: str) -> dict[str, str]:
    """The part of every instruction of a compiled program's text, by its name.

    The compiler drops the path where it splits or merges products: then the last path inside the instruction counts,
    or that of the nearest operation that uses its result.
    """
    known = {each.name: each for each in _instructions(program)}
    inside: dict[str, list[Instruction]] = {}
    for each in known.values():
        inside.setdefault(each.inside, []).append(each)
    users = _users(known, inside)
    found = {}
    for each in known.values():
        path = each.path
        if not path and each.op == "fusion":
            path = next((own.path for own in reversed(inside.get(each.calls, [])) if own.path), "")
        found[each.name] = part_of(path or _nearest(each.name, users, known))
    return found


def _instructions(program: str):
    computation = ""
    for line in program.splitlines():
        if begins := _COMPUTATION.match(line):
            computation = begins[1]
        elif (seen := _LINE.match(line)) is not None:
            name, op, operands, rest = seen.groups()
            calls, path = re.search(r"calls=%?([\w.\-]+)", rest), re.search(r'op_name="([^"]*)"', rest)
            names = tuple(re.findall(r"%([\w.\-]+)", operands)) if op != "parameter" else (operands,)
            yield Instruction(
                name, op, names, computation, calls[1] if calls else "", path[1] if path else ""
            )


def _users(known: dict[str, Instruction], inside: dict[str, list[Instruction]]) -> dict[str, list[str]]:
    """What uses each result: instructions, or the parameter inside a fusion that receives it."""
    users: dict[str, list[str]] = {}
    for each in known.values():
        own = inside.get(each.calls, []) if each.op == "fusion" else []
        places = {param.operands[0]: param.name for param in own if param.op == "parameter"}
        for i, operand in enumerate(each.operands if each.op != "parameter" else ()):
            users.setdefault(operand, []).append(places.get(str(i), each.name))
    return users


def _nearest(name: str, users: dict[str, list[str]], known: dict[str, Instruction]) -> str:
    """The path of the nearest instruction that depends on this one and has one, or ""."""
    todo, seen = deque(users.get(name, ())), {name}
    while todo:
        each = todo.popleft()
        if each in seen:
            continue
        seen.add(each)
        if each in known and known[each].path:
            return known[each].path
        todo.extend(users.get(each, ()))
    return ""
