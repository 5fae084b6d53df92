"""A PTX kernel, decoded: for each instruction a function of the machine that executes it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from tests.ptx.memory import Array
from tests.ptx.parser import Instruction, parse, split_list
from tests.ptx.shared import BASE

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

__all__ = ["DTYPES", "Get", "Kernel", "Operation", "Step"]

Step: TypeAlias = "Callable[[Machine], int | None]"  # executes; the place to go on at, None: the next one
Get: TypeAlias = "Callable[[Machine], Array]"

# By the type that ends an instruction's name.
DTYPES: dict[str, Any] = {
    "pred": np.bool_, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "b32": np.uint32, "u32": np.uint32,
    "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f32": np.float32,
}  # fmt: skip
_ALWAYS_0 = {"%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"}


class Registers:
    """Numbers of a kernel's registers by their names."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        return self.numbers.setdefault(name, len(self.numbers))

    def get(self, text: str, dtype: Any) -> Get:
        """The value of a register or a constant."""
        if text in _ALWAYS_0:
            return lambda m: dtype(0)
        if text.startswith(("%tid", "%ctaid", "%ntid", "%nctaid", "%laneid")):
            return lambda m: m.special[text].view(dtype)
        if text.startswith("%"):
            number = self.number(text)
            return lambda m: m.read(number, text, dtype)
        value = _constant(text, dtype)
        return lambda m: value


def _constant(text: str, dtype: Any) -> Any:
    if text == "global_smem":
        return np.uint32(BASE).view(dtype)
    if dtype is np.bool_:
        return np.bool_(int(text))
    if text.startswith("0f"):
        return np.uint32(int(text[2:], 16)).view(dtype)
    unsigned: Any = DTYPES[f"u{8 * np.dtype(dtype).itemsize}"]
    bits = int(text.removesuffix("U"), 0) & (2 ** (8 * np.dtype(dtype).itemsize) - 1)
    return unsigned(bits).view(dtype)


class Operation:
    """An instruction while it is decoded, and what decoding it needs.

    Attributes:
        parts: Of its name.
        type: The last one of them.
        operands: As written.
        text: The whole.
        predicate: Which threads execute it; None: all.
    """

    def __init__(self, instruction: Instruction, registers: Registers, labels: dict[str, int]) -> None:
        self.parts, self.operands, self.text = instruction.name.split("."), instruction.operands, instruction.text
        self.type = self.parts[-1]
        self.registers, self.labels = registers, labels
        self.predicate: Get | None = None
        if instruction.predicate:
            get = registers.get(instruction.predicate, np.bool_)
            self.predicate = (lambda m: ~get(m)) if instruction.is_negated else get

    def active(self, machine: Machine) -> Array:
        """Which threads execute it, bool; None: all."""
        return machine.active(None if self.predicate is None else self.predicate(machine))

    def get(self, index: int, dtype: Any) -> Get:
        """The value of an operand."""
        return self.registers.get(self.operands[index], dtype)

    def names(self, index: int) -> list[str]:
        """Of the registers of a vector, or of one alone."""
        return split_list(self.operands[index].strip("{} "))

    def gets(self, index: int, dtype: Any) -> list[Get]:
        """The values of a vector."""
        return [self.registers.get(name, dtype) for name in self.names(index)]

    def numbers(self, index: int) -> list[int]:
        """Of the registers of a vector."""
        return [self.registers.number(name) for name in self.names(index)]

    def address(self, index: int, dtype: Any) -> Get:
        """Of an operand [register + offset], int64."""
        match = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+))?\s*\]", self.operands[index])
        assert match is not None, self.text
        base, offset = self.registers.get(match.group(1), dtype), int(match.group(2) or "0", 0)
        return lambda m: m.full(base(m).astype(np.int64) + offset)

    def stack(self, index: int, dtype: Any) -> Get:
        """The values of a vector, (registers, threads)."""
        gets = self.gets(index, dtype)
        return lambda m: np.stack([m.full(get(m)) for get in gets])

    def elementwise(self, function: Callable[..., Array], *dtypes: Any) -> Step:
        """Writes a function of the operands behind the first one, of these types."""
        number = self.numbers(0)[0]
        gets = [self.get(index, dtype) for index, dtype in enumerate(dtypes, 1)]
        assert len(gets) == len(self.operands) - 1, self.text
        return lambda m: m.write(number, np.asarray(function(*[get(m) for get in gets])), self.active(m))

    def by_all(self, function: Callable[[Machine], None]) -> Step:
        """A step that a whole warp takes as one."""
        assert self.predicate is None, self.text

        def step(machine: Machine) -> None:
            machine.check_whole(self.text)
            function(machine)

        return step


class Kernel:
    """PTX, decoded.

    Attributes:
        steps: (text, step) of each instruction.
        params: Names of the parameters.
        num_threads: Of a CTA.
    """

    def __init__(self, ptx: str) -> None:
        from tests.ptx import arithmetic, matrices, transfers

        decoders = {**_CONTROL, **arithmetic.DECODERS, **transfers.DECODERS, **matrices.DECODERS}
        program = parse(ptx)
        self.params, self.num_threads, self.registers = program.params, program.num_threads, Registers()
        self.steps: list[tuple[str, Step]] = []
        for instruction in program.instructions:
            operation = Operation(instruction, self.registers, program.labels)
            decode = decoders.get(operation.parts[0])
            if decode is None:
                raise NotImplementedError(instruction.text)
            self.steps.append((instruction.text, decode(operation)))


def _return(operation: Operation) -> Step:
    assert operation.predicate is None, operation.text
    return lambda m: len(m.kernel.steps)


def _branch(operation: Operation) -> Step:
    target, predicate = operation.labels[operation.operands[0]], operation.predicate
    if predicate is None:
        return lambda m: m.branch(target)
    return lambda m: m.branch(target, predicate(m))


def _barrier(operation: Operation) -> Step:
    if operation.parts[1] == "warp":
        return operation.by_all(lambda m: m.shared.warp_barrier(is_whole=m.kernel.num_threads == 32))
    return operation.by_all(lambda m: m.shared.barrier())


def _fence(operation: Operation) -> Step:
    if "proxy" not in operation.parts:
        raise NotImplementedError(operation.text)
    return lambda m: m.shared.fence_proxy()


_CONTROL = {"ret": _return, "bra": _branch, "bar": _barrier, "barrier": _barrier, "fence": _fence}
