// langevin_chunk(): the step of a run of elements by any rule of langevin.h. float32 runs of whole blocks are updated from
// registers, inside the noise loop; every other dtype, head and tail goes through buffers in the first-level cache. Both apply
// the element maths of langevin.h.
#include "cpu/langevin.h"

#include "../half.h"
#include "../langevin.h"
#include "cpu/normals.h"
#include "cpu/normals_loop.h"

namespace bkd {
namespace BKD_ISA {
namespace {

template <class T> struct ArithmeticOf { using type = float; };
template <> struct ArithmeticOf<double> { using type = double; };
template <class T> using RealOf = typename ArithmeticOf<T>::type;

template <class Real> Numbers<Real> rounded(const StepNumbers& n) {
  Numbers<Real> r{(Real)-n.lr, (Real)n.sigma, {}};
  for (int k = 0; k < kOwnNumbers; ++k) r.own[k] = (Real)n.own[k];
  return r;
}

Stream stream_of(const LangevinTensor& t, const LangevinStep& s, Tag tag = Tag::langevin) {
  return {s.seed, s.step, s.chain + t.chain, t.parameter, (uint32_t)tag};
}

void report(const LangevinTensor& tensor) { __atomic_store_n(tensor.nonfinite, (uint8_t)1, __ATOMIC_RELAXED); }

// ---- any dtype, any run: buffers, and loops over them that the compiler vectorises ----
// (ivdep: nothing overlaps, and the pointers are more than the compiler would check)
constexpr int64_t kBuffer = 1024;  // elements: the buffers stay in the first-level cache

template <class T> struct Buffers {
  using Real = RealOf<T>;
  alignas(64) Real theta[kBuffer] = {};  // what holds the chain
  alignas(64) Real g[kBuffer];           // the gradient with the prior's share in it
  alignas(64) Real kept[kBuffer];        // not 0 where the gradient is not finite and the element keeps its value
  alignas(64) float noise[kBuffer] = {};

  // Reads elements [from, from + n); tells whether any is kept.
  bool read(const LangevinTensor& tensor, Rounding rounding, Real decay, int64_t from, int64_t n) {
    const T* __restrict stored = (const T*)tensor.theta + from;
    const T* __restrict gradient = (const T*)tensor.gradient + from;
    const T* __restrict center = (const T*)tensor.center + from;
    const float* __restrict master = tensor.master + from;
    if (rounding == Rounding::master) {
#pragma GCC ivdep
      for (int64_t k = 0; k < n; ++k) theta[k] = (Real)master[k];
    } else {
#pragma GCC ivdep
      for (int64_t k = 0; k < n; ++k) theta[k] = (Real)widen(stored[k]);
    }
    if (decay == 0) {
#pragma GCC ivdep
      for (int64_t k = 0; k < n; ++k) g[k] = (Real)widen(gradient[k]);
    } else if (tensor.center) {
#pragma GCC ivdep
      for (int64_t k = 0; k < n; ++k) g[k] = prior_gradient(theta[k], (Real)widen(gradient[k]), (Real)widen(center[k]), decay);
    } else {
#pragma GCC ivdep
      for (int64_t k = 0; k < n; ++k) g[k] = prior_gradient(theta[k], (Real)widen(gradient[k]), decay);
    }
    if (!tensor.nonfinite) return false;
    uint32_t bad = 0;
#pragma GCC ivdep
    for (int64_t k = 0; k < n; ++k) {
      const bool finite = is_finite(gradient[k]);
      kept[k] = finite ? (Real)0 : (Real)1;
      bad |= !finite;
    }
    return bad != 0;
  }

  template <Rule rule> void advance_all(const LangevinTensor& tensor, const Numbers<Real>& numbers, bool check, int64_t from, int64_t n) {
    constexpr int states = states_of(rule);
    Real* __restrict first = (Real*)tensor.first + from;
    Real* __restrict second = (Real*)tensor.second + from;
#pragma GCC ivdep
    for (int64_t k = 0; k < n; ++k) {
      const Element<Real> old{theta[k], states > 0 ? first[k] : 0, states > 1 ? second[k] : 0};
      Element<Real> e = old;
      advance<rule>(e, g[k], (Real)noise[k], numbers);
      const bool keep = check && kept[k] != 0;
      theta[k] = keep ? old.theta : e.theta;
      if (states > 0) first[k] = keep ? old.first : e.first;
      if (states > 1) second[k] = keep ? old.second : e.second;
    }
  }

  // To nearest.
  void write(const LangevinTensor& tensor, Rounding rounding, int64_t from, int64_t n) const {
    T* __restrict stored = (T*)tensor.theta + from;
    float* __restrict master = tensor.master + from;
#pragma GCC ivdep
    for (int64_t k = 0; k < n; ++k) narrow(theta[k], stored[k]);
    if (rounding == Rounding::master) {
#pragma GCC ivdep
      for (int64_t k = 0; k < n; ++k) master[k] = (float)theta[k];
    }
  }

  void add_draws(const LangevinTensor& tensor, Rounding rounding, Real inverse_count, int64_t from, int64_t n) const {
    if (!tensor.mean) return;
    const T* __restrict stored = (const T*)tensor.theta + from;
    Real* __restrict mean = (Real*)tensor.mean + from;
    Real* __restrict m2 = (Real*)tensor.m2 + from;
    const bool narrowed = rounding != Rounding::master;
#pragma GCC ivdep
    for (int64_t k = 0; k < n; ++k) {
      const Real draw = narrowed ? (Real)widen(stored[k]) : theta[k];
      const Moments<Real> m = add_draw(Moments<Real>{mean[k], m2[k]}, draw, inverse_count);
      mean[k] = m.mean;
      m2[k] = m.m2;
    }
  }
};

template <class T, Rule rule>
void update_buffered(const LangevinTensor& tensor, const LangevinStep& step, int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  const StepNumbers& given = step.numbers_of(tensor);
  const Numbers<Real> numbers = rounded<Real>(given);
  const Stream stream = stream_of(tensor, step);
  Buffers<T> b;
  bool any_kept = false;
  if (given.sigma == 0)
    for (float& z : b.noise) z = -0.0f;
  for (int64_t from = begin; from < end; from += kBuffer) {
    const int64_t n = end - from < kBuffer ? end - from : kBuffer;
    if (given.sigma != 0) normals(b.noise, n, stream, tensor.first_element + (uint64_t)from);
    const bool check = b.read(tensor, step.rounding, (Real)given.decay, from, n);
    any_kept |= check;
    b.template advance_all<rule>(tensor, numbers, check, from, n);
    b.write(tensor, step.rounding, from, n);
    b.add_draws(tensor, step.rounding, (Real)step.inverse_count, from, n);
  }
  if (any_kept) report(tensor);
}

// ---- 16-bit types, stochastic rounding: drift, noise and rounding in turn. The look-up of the noise's size is spelled in
// vectors, the compiler vectorises the others. ----

// exponent_field() of half.h; of any lane at all the result is an index of the table
BKD_INLINE Ints exponent_field(Floats x, BFloat16) { return bit_and(shift_right<23>(as_ints(x)), set1i(0xFF)); }
BKD_INLINE Ints exponent_field(Floats x, Half) {
  const Floats magnitude = as_floats(bit_and(as_ints(x), set1i(0x7FFFFFFF)));
  const Floats clamped = min(max(magnitude, set1(0x1p-15f)), set1(0x1p15f));  // fields 0 and 30; a NaN becomes 2^-15
  return sub(shift_right<23>(as_ints(clamped)), set1i(112));
}
template <class T> constexpr int64_t kFields = 256;
template <> constexpr int64_t kFields<Half> = 32;

template <class T>
void update_stochastically(const LangevinTensor& tensor, const LangevinStep& step, int64_t begin, int64_t end) {
  const StepNumbers& given = step.numbers_of(tensor);
  const float minus_lr = (float)-given.lr;
  const float* noise_table = step.noise_table + (step.numbers_per_chain ? kFields<T> * tensor.chain : 0);
  const Stream stream = stream_of(tensor, step), rounding_stream = stream_of(tensor, step, Tag::stochastic_rounding);
  Buffers<T> b;
  alignas(64) int32_t random[kBuffer];
  bool any_kept = false;
  for (int64_t from = begin; from < end; from += kBuffer) {
    const int64_t n = end - from < kBuffer ? end - from : kBuffer;
    normals(b.noise, n, stream, tensor.first_element + (uint64_t)from);
    words(random, n, rounding_stream, tensor.first_element + (uint64_t)from);
    const bool check = b.read(tensor, step.rounding, (float)given.decay, from, n);
    any_kept |= check;
#pragma GCC ivdep
    for (int64_t k = 0; k < n; ++k) {
      const bool keep = check && b.kept[k] != 0;
      const float drifted = sgld_drift(b.theta[k], b.g[k], minus_lr);
      b.theta[k] = keep ? b.theta[k] : drifted;
      b.noise[k] = keep ? -0.0f : b.noise[k];
    }
    for (int64_t k = 0; k < n; k += kLanes) {  // past n are the zeros, or values of an earlier round
      const Floats drifted = load(b.theta + k);
      store(b.theta + k, fma(gather(noise_table, exponent_field(drifted, T{})), load(b.noise + k), drifted));
    }
    T* __restrict stored = (T*)tensor.theta + from;
#pragma GCC ivdep
    for (int64_t k = 0; k < n; ++k) round_stochastically(b.theta[k], (uint32_t)random[k] >> 16, stored[k]);
    b.add_draws(tensor, step.rounding, (float)step.inverse_count, from, n);
  }
  if (any_kept) report(tensor);
}

// ---- float32, whole runs of the noise loop: everything in registers ----
// `noisy`: sigma > 0. `plain`: no prior, no check, no moments. What is constant over a run is branched on inside the loop: the branches are
// predicted, and what they guard waits for memory.
template <Rule rule, bool noisy, bool plain>
void update_fused(const LangevinTensor& tensor, const LangevinStep& step, int64_t begin, int64_t count) {
  constexpr int states = states_of(rule);
  const StepNumbers& given = step.numbers_of(tensor);
  Numbers<Floats> numbers{set1((float)-given.lr), set1((float)given.sigma), {}};
  for (int k = 0; k < kOwnNumbers; ++k) numbers.own[k] = set1((float)given.own[k]);
  const Floats decay = set1((float)given.decay), inverse_count = set1((float)step.inverse_count);
  const bool prior = !plain && given.decay != 0, centred = prior && tensor.center, check = !plain && tensor.nonfinite;
  const bool moments = !plain && tensor.mean;
  float* theta = (float*)tensor.theta + begin;
  const float* gradient = (const float*)tensor.gradient + begin;
  const float* center = (const float*)tensor.center + begin;
  float* first = (float*)tensor.first + begin;
  float* second = (float*)tensor.second + begin;
  float* mean = (float*)tensor.mean + begin;
  float* m2 = (float*)tensor.m2 + begin;
  Mask bad = bkd::BKD_ISA::first(0);
  constexpr int64_t kAhead = 384;  // floats: the loop computes for longer than the hardware prefetcher looks ahead
  const auto update = [&](int64_t i, Floats noise) __attribute__((always_inline)) {
    if (kLanes == 16 || i % 16 == 0) {
      __builtin_prefetch(theta + i + kAhead, 1);
      __builtin_prefetch(gradient + i + kAhead, 0);
      if (states > 0) __builtin_prefetch(first + i + kAhead, 1);
      if (states > 1) __builtin_prefetch(second + i + kAhead, 1);
    }
    const Floats raw = load(gradient + i), zero = set1(0);
    const Element<Floats> old{load(theta + i), states > 0 ? load(first + i) : zero, states > 1 ? load(second + i) : zero};
    Floats g = raw;
    if (centred) g = prior_gradient(old.theta, g, load(center + i), decay);
    else if (prior) g = prior_gradient(old.theta, g, decay);
    Element<Floats> e = old;
    advance<rule>(e, g, noise, numbers);
    if (check) {
      const Mask nonfinite = unordered(sub(raw, raw));
      e.theta = select(nonfinite, old.theta, e.theta);
      if (states > 0) e.first = select(nonfinite, old.first, e.first);
      if (states > 1) e.second = select(nonfinite, old.second, e.second);
      bad = mask_or(bad, nonfinite);
    }
    store(theta + i, e.theta);
    if (states > 0) store(first + i, e.first);
    if (states > 1) store(second + i, e.second);
    if (moments) {
      const Moments<Floats> m = add_draw(Moments<Floats>{load(mean + i), load(m2 + i)}, e.theta, inverse_count);
      store(mean + i, m.mean);
      store(m2 + i, m.m2);
    }
  };
  if constexpr (noisy) {
    each_normal(count, stream_of(tensor, step), (tensor.first_element + (uint64_t)begin) >> 2, update);
  } else {
    for (int64_t i = 0; i < count; i += kLanes) update(i, set1(-0.0f));
  }
  if (check && any(bad)) report(tensor);
}

template <Rule rule> void float32_chunk(const LangevinTensor& tensor, const LangevinStep& step, int64_t begin, int64_t end) {
  const uint64_t from = tensor.first_element + (uint64_t)begin, to = tensor.first_element + (uint64_t)end;
  const int64_t head = (int64_t)(-from & 3);  // elements before the first whole block
  const int64_t whole = end - begin - head > 0 ? (end - begin - head) / kNoiseRun * kNoiseRun : 0;
  const bool wraps = from >> 34 != to >> 34;  // the low word of the block number wraps inside
  const StepNumbers& given = step.numbers_of(tensor);
  if (whole == 0 || wraps) return update_buffered<float, rule>(tensor, step, begin, end);
  if (head) update_buffered<float, rule>(tensor, step, begin, begin + head);
  const bool plain = given.decay == 0 && !tensor.nonfinite && !tensor.mean;
  if (given.sigma == 0) update_fused<rule, false, false>(tensor, step, begin + head, whole);
  else if (plain) update_fused<rule, true, true>(tensor, step, begin + head, whole);
  else update_fused<rule, true, false>(tensor, step, begin + head, whole);
  if (begin + head + whole < end) update_buffered<float, rule>(tensor, step, begin + head + whole, end);
}

template <Rule rule> void chunk_by(const LangevinTensor& tensor, const LangevinStep& step, int64_t begin, int64_t end) {
  switch (step.storage) {
    case Storage::float32: return float32_chunk<rule>(tensor, step, begin, end);
    case Storage::float64: return update_buffered<double, rule>(tensor, step, begin, end);
    case Storage::bfloat16: return update_buffered<BFloat16, rule>(tensor, step, begin, end);
    case Storage::float16: return update_buffered<Half, rule>(tensor, step, begin, end);
  }
}

template <class T> bool any_nonfinite(const void* data, int64_t count) {
  const T* x = (const T*)data;
  uint32_t bad = 0;
  for (int64_t i = 0; i < count; ++i) bad |= !is_finite(x[i]);
  return bad != 0;
}

}  // namespace

void langevin_chunk(const LangevinTensor& tensor, const LangevinStep& step, int64_t begin, int64_t end) {
  if (step.rounding == Rounding::stochastic) {
    if (step.storage == Storage::bfloat16) return update_stochastically<BFloat16>(tensor, step, begin, end);
    return update_stochastically<Half>(tensor, step, begin, end);
  }
  switch (step.rule) {
    case Rule::sgld: return chunk_by<Rule::sgld>(tensor, step, begin, end);
    case Rule::sghmc: return chunk_by<Rule::sghmc>(tensor, step, begin, end);
    case Rule::nesterov: return chunk_by<Rule::nesterov>(tensor, step, begin, end);
    case Rule::rmsprop: return chunk_by<Rule::rmsprop>(tensor, step, begin, end);
    case Rule::adam: return chunk_by<Rule::adam>(tensor, step, begin, end);
    case Rule::sgnht: return chunk_by<Rule::sgnht>(tensor, step, begin, end);
    case Rule::baoab: return chunk_by<Rule::baoab>(tensor, step, begin, end);
  }
}

bool has_nonfinite(const void* data, int64_t count, Storage storage) {
  switch (storage) {
    case Storage::float32: return any_nonfinite<float>(data, count);
    case Storage::float64: return any_nonfinite<double>(data, count);
    case Storage::bfloat16: return any_nonfinite<BFloat16>(data, count);
    case Storage::float16: return any_nonfinite<Half>(data, count);
  }
  return false;
}

}  // namespace BKD_ISA
}  // namespace bkd
