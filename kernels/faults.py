"""The word that a kernel puts into a device's fault register (bkd_fast/ops/faults.py reads it).

By one atomic maximum, so that the first call wins, then the first chain, then the first row. From the highest bit:

    12 bits   4095 - the call's number, so that the first call comes first
    12        4095 - the chain, saturating
    32        2^32 - 1 - the row, saturating
    3         flags of the call, which come with its number in `stamp` = 8 * number + flags
    4         the fault's code (csrc/kd.h), 1 or more: a word of 0 is no fault
"""

import triton
import triton.language as tl


@triton.jit
def fault_word(stamp, chain, row, code):
    """The word of a fault; a scalar stamp, and scalars or tensors of one shape."""
    word = tl.full((), 0, tl.int64) + 4095 - (stamp >> 3)
    word = (word << 12) + 4095 - tl.minimum(chain, 4095)
    word = (word << 32) + 4294967295 - tl.minimum(row, 4294967295)
    return (((word << 3) + (stamp & 7)) << 4) + code
