"""The text of a PTX kernel, as Triton writes it, taken apart into instructions."""

import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Instruction", "Program", "parse", "split_list"]


class Instruction(NamedTuple):
    """A line.

    Args:
        predicate: The register that says which threads do it; "" for all.
        is_negated: Whether those do it whose predicate is false.
        name: With its dots, "ld.global.v4.b32".
        operands: As written; vectors and addresses are one operand.
        text: The whole, with the line of the source that it comes from.
    """

    predicate: str
    is_negated: bool
    name: str
    operands: list[str]
    text: str


class Program(NamedTuple):
    """A kernel: instructions, the place of each label, the names of the parameters in order, threads of a CTA."""

    instructions: list[Instruction]
    labels: dict[str, int]
    params: list[str]
    num_threads: int


def parse(ptx: str) -> Program:
    """The one entry of the text."""
    head, _, body = ptx[ptx.index(".entry") :].partition("{")
    params = re.findall(r"\.param\s+\.\w+[^,\n)]*?\s(\w+_param_\d+)", head)
    num_threads = re.search(r"\.reqntid\s+(\d+)", ptx)
    assert num_threads is not None
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for text, source in _statements(body):
        if label := re.fullmatch(r"(\$\w+):", text):
            labels[label.group(1)] = len(instructions)
        else:
            instructions.append(_instruction(text, source))
    return Program(instructions, labels, params, int(num_threads.group(1)))


def split_list(text: str) -> list[str]:
    """At the commas that are within no brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _statements(body: str) -> Iterator[tuple[str, str]]:
    """Labels and instructions, each with where in the source it comes from; directives are left out."""
    source = ""
    for line in body.splitlines():
        if place := re.match(r"\s*\.loc\s+\d+\s+\d+\s+\d+.*?//\s*(\S+)", line):
            source = place.group(1)
        statement = line.partition("//")[0].strip()
        if statement.startswith(".section"):
            return
        if statement.startswith("."):
            continue
        for text in statement.split(";"):
            text = text.strip().removeprefix("{").strip()  # a block may open before an instruction, and close after it
            if text not in ("", "}") and not text.startswith("."):
                yield text, source


def _instruction(text: str, source: str) -> Instruction:
    match = re.match(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", text)
    if match is None:
        raise ValueError(f"not an instruction: {text!r}")
    negation, predicate, name, rest = match.groups()
    return Instruction(predicate or "", bool(negation), name, split_list(rest), f"{text}   ({source})")
