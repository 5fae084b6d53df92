"""The Triton kernels as compiled, executed on a CPU: an emulator of PTX, the instructions that Triton writes for a GPU.

No GPU is needed. With the fixture `emulated` backend="triton" runs on CPU tensors: the launcher compiles for the given
compute capability, exactly as for a call on such a GPU (constants, divisibility, tiles, warps, stages), and machine.py
executes the PTX on the tensors' own memory, all threads in lockstep. A launch raises KernelError where it sees

    global memory   an access out of bounds, misaligned or outside of the tensors, a read of what nobody wrote, an
                    output that is not written exactly once, a store into an input
    shared memory   the same, races between two barriers, between warps and within one, what cp.async may still write,
                    what wgmma may still read or cannot see yet
    registers       reads before they are written, as of wgmma's results before the wait

Not modelled: ptxas (machine code, registers, spills), timing, the order of memory between CTAs, the low bits of tensor
cores' sums and of approximate instructions, 32-bit overflow that leads to no wrong address, tcgen05 (10.0), TMA.

    triton_copy.py   a second import of Triton, which compiles while the first one interprets
    launch.py        from a launch to the emulator and back
    parser.py  kernel.py  arithmetic.py  transfers.py  matrices.py      PTX, and what its instructions do
    machine.py  memory.py  shared.py                                    what executes them, and what is checked
    runs.py          what is run: by every test run, by the slow tests, and by `python -m tests.ptx`
"""
