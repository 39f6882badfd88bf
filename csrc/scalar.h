// The vector operations of cpu/simd.h on plain numbers: element maths written in them runs where there are no vectors, one
// element of a GPU thread or of plain C++ at a time, to the same bits.
#pragma once
#include "common.h"

namespace bkd {

using Floats = float;
using Ints = int32_t;
using Mask = bool;

BKD_HD float set1(float x) { return x; }
BKD_HD int32_t set1i(int32_t x) { return x; }
BKD_HD float fnma(float a, float b, float c) { return fma(-a, b, c); }  // c - a b
BKD_HD float max(float a, float b) { return a > b ? a : b; }            // b where either is NaN
BKD_HD bool less(float a, float b) { return a < b; }
BKD_HD bool equal(float a, float b) { return a == b; }
BKD_HD float select(bool k, float yes, float no) { return k ? yes : no; }
template <int n> BKD_HD int32_t shift_left(int32_t a) { return (int32_t)((uint32_t)a << n); }
template <int n> BKD_HD int32_t shift_right(int32_t a) { return a >> n; }  // arithmetic
BKD_HD int32_t add(int32_t a, int32_t b) { return (int32_t)((uint32_t)a + (uint32_t)b); }  // wraps around
BKD_HD int32_t sub(int32_t a, int32_t b) { return (int32_t)((uint32_t)a - (uint32_t)b); }
BKD_HD float to_float(int32_t a) { return (float)a; }
BKD_HD float as_floats(int32_t a) { return as_float((uint32_t)a); }
BKD_HD int32_t as_ints(float a) { return (int32_t)as_bits(a); }

}  // namespace bkd
