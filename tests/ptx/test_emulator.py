"""The emulator itself, on kernels of a few lines: what instructions give, worked out by hand, and what is noticed."""

import numpy as np
import pytest

from tests.ptx.kernel import Kernel
from tests.ptx.machine import Machine
from tests.ptx.memory import Memory, Segment

THREADS, BASE = 64, 4096
FRAME = """
.visible .entry small(.param .u64 small_param_0)
.reqntid {threads}
{{
    ld.param.b64 %rd1, [small_param_0];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd2, %r0, 4;
    add.s64 %rd3, %rd1, %rd2;  // a word for each thread
    shl.b32 %r8, %r0, 2;
    add.s32 %r8, %r8, global_smem;  // one in shared memory
    {body}
    st.global.b32 [%rd3], %r9;
    ret;
}}
"""


def execute(body):
    """What %r9 holds at the end, in each thread; and what was noticed."""
    words, found = np.zeros(THREADS, np.uint32), set()
    all_of_it = np.ones(2 * THREADS, bool)
    memory = Memory(
        [Segment(BASE, words.view(np.uint8), all_of_it, ~all_of_it)], note := lambda kind, *_: found.add(kind)
    )
    kernel = Kernel(FRAME.format(threads=THREADS, body=body))
    Machine(kernel, {"small_param_0": np.int64(BASE)}, memory, 4 * THREADS, (0, 1), 1, note).run()
    return words.tolist(), found


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("add.s32 %r9, 0x7fffffff, 1;", 0x80000000),
        ("div.s32 %r9, -7, 2;", -3),
        ("mul.hi.u32 %r9, 0x80000000, 4;", 2),
        ("mov.b32 {%rs1, %rs2}, 0xffffffff; mul.wide.u16 %r8, %rs1, 2; neg.s32 %r9, %r8;", -0x1FFFE),  # 32 bits
        ("shl.b32 %r9, 1, 32;", 0),
        ("shr.s32 %r9, -8, 40;", -1),
        ("bfe.u32 %r9, 0x11223344, 8, 8;", 0x33),
        ("bfe.s32 %r9, 0xf000, 12, 4;", -1),
        ("prmt.b32 %r9, 0x11223344, 0x55667788, 0x7531;", 0x55771133),
        ("lop3.b32 %r9, 0xff00, 0x1234, 0x5678, 0xca;", 0x1278),  # the first one chooses
        ("fma.rn.f32 %r9, 0f3F800800, 0f3F800800, 0fBF801000;", 0x33800000),  # 2**-24: rounded once
        ("ex2.approx.ftz.f32 %r9, 0f40400000;", 0x41000000),  # 8
        ("add.ftz.f32 %r9, 0f00000001, 0f00000001;", 0),
        ("max.NaN.f32 %r9, 0f7FC00000, 0f3F800000;", 0x7FC00000),
        ("max.f32 %r9, 0f7FC00000, 0f3F800000;", 0x3F800000),
        ("setp.ltu.f32 %p1, 0f7FC00000, 0f00000000; selp.b32 %r9, 1, 2, %p1;", 1),
        ("cvt.rn.bf16x2.f32 %r9, 0f3F800000, 0f40000000;", 0x3F804000),
        ("cvt.rn.bf16x2.f32 %r9, 0f3F808000, 0f3F818000;", 0x3F803F82),  # ties to even
        ("mov.b32 {%rs1, %rs2}, 0x11223344; mov.b32 %r9, {%rs2, %rs1};", 0x33441122),
    ],
)
def test_instructions(body, expected):
    assert execute(body) == ([expected % 2**32] * THREADS, set())


def test_threads_of_a_warp_and_branches():
    threads = list(range(THREADS))
    assert execute("shfl.sync.bfly.b32 %r9, %r0, 1, 31, -1;")[0] == [thread ^ 1 for thread in threads]
    body = "mov.b32 %r9, 1; setp.lt.u32 %p1, %r0, 40; @%p1 bra $end; mov.b32 %r9, 2;\n$end:\nadd.s32 %r9, %r9, %r0;"
    assert execute(body) == ([thread + (1 if thread < 40 else 2) for thread in threads], set())


def exchange(distance, *, between="", after=""):
    """Each thread writes a word and reads that of another one."""
    read = f"xor.b32 %r1, %r8, {4 * distance}; ld.shared.b32 %r9, [%r1];"
    return f"st.shared.b32 [%r8], %r0; {between} {read} {after}"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (exchange(32, between="bar.sync 0;"), None),
        (exchange(32), "shared race: read after another warp's write"),
        (exchange(1, between="bar.warp.sync -1;"), None),
        (exchange(1), "shared race within a warp: read after write"),
        (exchange(32, between="bar.sync 0;", after="st.shared.b32 [%r8], 0;"), "shared race: write after another warp"),
        (exchange(0, between="st.shared.b32 [global_smem], %r0;"), "shared: threads store different values at one"),
        ("ld.shared.b32 %r9, [%r8];", "shared read of what nobody wrote"),
        ("st.shared.b32 [%r8+4], 0; mov.b32 %r9, 0;", "shared access out of bounds"),
        ("st.shared.b32 [%r8+2], 0; mov.b32 %r9, 0;", "shared access misaligned"),
        ("ld.global.b32 %r9, [%rd3];", "global read of what nobody wrote"),
        ("st.global.b32 [%rd3+4], 0; mov.b32 %r9, 0;", "global access out of bounds"),
        ("mov.b32 %r9, %r7;", "register read before it is written"),
    ],
)
def test_what_is_noticed(body, expected):
    found = execute(body)[1]
    assert any(kind.startswith(expected) for kind in found) if expected else not found, found
