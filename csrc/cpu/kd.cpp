// The KD energy, vectorised. Three ways through a row, all with one read of the logits and one write of the gradient:
//   across rows   up to kAcrossClasses classes: one row per lane, moved in and out by 4x4 transposes
//   along a row   above: the row's exponentials wait in scratch (L1 or L2) until their sums are known
//   general       csrc/kd.h, a row at a time: every prior, soft labels, probabilities, double
// The first two know the Dirichlet prior (or none), teacher logits and hard labels. Smoothing spreads over all classes there,
// and masked classes are not looked for: a row with a NaN, an infinity or a mask comes out with an energy that is not
// finite, which costs nothing to find, and then goes the general way, which knows what is legal.
#include "cpu/kd.h"

#include "cpu/simd.h"
#include "cpu/vector_math.h"

namespace bkd {
namespace BKD_ISA {
namespace {

// How exp(x) follows from u = exp(x / T): it is u itself, its square, the square of that, or an exponential of its own.
enum class Tempering { one, two, four, any };

constexpr float kLowest = -0x1.fffffep127f;
constexpr int64_t kFold = 512;                // columns summed in one float chain before it is folded into the row's sum
constexpr int64_t kStreamingClasses = 8192;   // from here a row's gradient is written past the caches
constexpr int64_t kReadAhead = 1024;          // floats: the hardware prefetcher stops at a page of 4 KiB
constexpr int64_t kWriteAhead = 256;

// The settings as the vector kernels use them.
struct Terms {
  int64_t classes;
  float inverse_temperature;
  float strength;      // lambda
  float label_weight;
  float hard;          // label_weight (1 - smoothing): the label's own share
  float even;          // label_weight smoothing / classes: every class's share
  float scale;
};

Terms terms_of(const KdSettings& s) {
  return {s.classes,
          s.prior == Prior::none ? 1.0f : (float)(1.0 / s.temperature),
          (float)s.prior_strength,
          (float)s.label_weight,
          (float)(s.label_weight * (1.0 - s.label_smoothing)),
          (float)(s.label_weight * s.label_smoothing / (double)s.classes),
          (float)s.scale};
}

// What a block's rows have summed up, one lane or element per row; x is z - max z.
struct BlockSums {
  alignas(64) float tempered[kBlockRows];  // sum exp(x / T)
  alignas(64) float plain[kBlockRows];     // sum exp(x)
  alignas(64) float teacher[kBlockRows];   // sum v, v = exp((t - max t) / T)
  alignas(64) float cross[kBlockRows];     // sum v x
  alignas(64) float spread[kBlockRows];    // sum x
  alignas(64) float hit[kBlockRows];       // x of the label
  alignas(64) float labelled[kBlockRows];  // 1, or 0 without a label
};

// energy = lambda (log sum exp(x / T) - sum p x / T) + labelled (weight log sum exp(x) - hard x_y - even sum x).
// Every input of the row is in some product, so that whatever is not finite (0 times -inf too) shows.
template <bool taught>
void finish_energies(const Terms& c, const BlockSums& sums, float* energy) {
  for (int r = 0; r < kBlockRows; r += kLanes) {
    Floats label = mul(set1(c.label_weight), log_positive(load(sums.plain + r)));
    label = sub_mul(set1(c.hard), load(sums.hit + r), label);
    label = sub_mul(set1(c.even), load(sums.spread + r), label);
    Floats e = mul(load(sums.labelled + r), label);
    if (taught) {
      const Floats expected = div(mul(load(sums.cross + r), set1(c.inverse_temperature)), load(sums.teacher + r));
      e = mul_add(set1(c.strength), sub(log_positive(load(sums.tempered + r)), expected), e);
    }
    store(energy + r, e);
  }
}

// scale * d energy / dz of one column, but for the label's own share:
//   lambda / T (u / sum u - v / sum v) + label_weight w / sum w - even,   w = exp(x)
struct Gradient {
  Floats student, teacher, plain, even;  // the factors of u, v and w, and the constant
};
template <Tempering kind, bool taught>
BKD_INLINE Floats gradient_of(const Gradient& f, Floats u, const float* v, const float* w) {
  const Floats away = taught ? mul_add(load(v), f.teacher, f.even) : f.even;
  if (kind == Tempering::one) return mul_sub(u, add(f.student, f.plain), away);
  if (kind == Tempering::two) return mul_sub(mul_add(u, f.plain, f.student), u, away);
  const Floats squared = mul(u, u);
  const Floats exponential = kind == Tempering::four ? mul(squared, squared) : load(w);
  return mul_add(exponential, f.plain, mul_sub(u, f.student, away));
}

// exp(x) where it needs no exponential of its own.
template <Tempering kind>
BKD_INLINE Floats untempered(Floats u) {
  if (kind == Tempering::one) return u;
  const Floats squared = mul(u, u);
  return kind == Tempering::two ? squared : mul(squared, squared);
}

// ---- one row along the lanes ----

template <Tempering kind, bool taught, bool streaming>
void along_row(const Terms& c, const float* z, const float* t, int32_t label, float* gradient, float* scratch, int r,
               BlockSums& sums) {
  const int64_t classes = c.classes, whole = classes - classes % kLanes, stride = kd_fast_stride(classes);
  float* u_row = scratch;
  float* v_row = scratch + stride;
  float* w_row = scratch + 2 * stride;
  const Mask tail = first((int)(classes - whole));
  const Floats zero = set1(0.0f), lowest = set1(kLowest);

  Floats z_top = lowest, z_top2 = lowest, t_top = lowest, t_top2 = lowest;  // kLowest, so that a masked row stays finite
  int64_t k = 0;
  for (; k + 2 * kLanes <= whole; k += 2 * kLanes) {
    z_top = max(z_top, load(z + k));
    z_top2 = max(z_top2, load(z + k + kLanes));
    if (taught) {
      t_top = max(t_top, load(t + k));
      t_top2 = max(t_top2, load(t + k + kLanes));
    }
  }
  for (; k < classes; k += kLanes) {
    const Mask here = first((int)(classes - k < kLanes ? classes - k : kLanes));
    z_top = max(z_top, load(z + k, here, lowest));
    if (taught) t_top = max(t_top, load(t + k, here, lowest));
  }
  const float z_max = reduce_max(max(z_top, z_top2)), t_max = taught ? reduce_max(max(t_top, t_top2)) : 0.0f;
  const Floats z_max_all = set1(z_max), t_max_all = set1(t_max);
  const Floats per_temperature = set1(kLog2e * c.inverse_temperature), per_one = set1(kLog2e);

  const int64_t ahead = classes > kReadAhead ? classes : kReadAhead;
  Floats tempered = zero, plain = zero, teacher = zero, cross = zero, spread = zero;
  // `fill` pads z with the maximum and t with -inf: x = 0 and v = 0 add nothing, and u and w are masked
  auto accumulate = [&](int64_t k, Floats z_k, Floats t_k, bool all, Mask here) __attribute__((always_inline)) {
    prefetch(z + k + ahead);
    if (taught) prefetch(t + k + ahead);
    if (!streaming) prefetch_for_write(gradient + k + kWriteAhead);
    const Floats x = sub(z_k, z_max_all);
    Floats u = exp2_nonpositive(mul(x, per_temperature));
    if (!all) u = select(here, u, zero);
    spread = add(spread, x);
    tempered = add(tempered, u);
    store(u_row + k, u);
    if (taught) {
      const Floats v = exp2_nonpositive(mul(sub(t_k, t_max_all), per_temperature));
      teacher = add(teacher, v);
      cross = mul_add(v, x, cross);
      store(v_row + k, v);
    }
    if (kind == Tempering::any) {
      Floats w = exp2_nonpositive(mul(x, per_one));
      if (!all) w = select(here, w, zero);
      plain = add(plain, w);
      store(w_row + k, w);
    } else if (kind == Tempering::two) {
      plain = mul_add(u, u, plain);
    } else if (kind == Tempering::four) {
      const Floats squared = mul(u, u);
      plain = mul_add(squared, squared, plain);
    }
  };
  Floats all_tempered = zero, all_plain = zero, all_teacher = zero, all_cross = zero, all_spread = zero;
  for (k = 0; k < whole;) {
    for (const int64_t end = k + kFold < whole ? k + kFold : whole; k < end; k += kLanes)
      accumulate(k, load(z + k), taught ? load(t + k) : zero, true, tail);
    all_tempered = add(all_tempered, tempered);
    all_plain = add(all_plain, plain);
    all_teacher = add(all_teacher, teacher);
    all_cross = add(all_cross, cross);
    all_spread = add(all_spread, spread);
    tempered = plain = teacher = cross = spread = zero;
  }
  if (whole < classes) {
    const Floats t_k = taught ? load(t + whole, tail, set1(-__builtin_inff())) : zero;
    accumulate(whole, load(z + whole, tail, z_max_all), t_k, false, tail);
  }
  const float tempered_sum = reduce_add(add(all_tempered, tempered));
  const float plain_sum = kind == Tempering::one ? tempered_sum : reduce_add(add(all_plain, plain));
  const float teacher_sum = taught ? reduce_add(add(all_teacher, teacher)) : 1.0f;
  const bool labelled = label >= 0;
  sums.tempered[r] = tempered_sum;
  sums.plain[r] = plain_sum;
  sums.teacher[r] = teacher_sum;
  sums.cross[r] = taught ? reduce_add(add(all_cross, cross)) : 0.0f;
  sums.spread[r] = reduce_add(add(all_spread, spread));
  sums.hit[r] = labelled ? z[label] - z_max : 0.0f;
  sums.labelled[r] = labelled ? 1.0f : 0.0f;

  const float prior = taught ? c.scale * c.strength * c.inverse_temperature : 0.0f;
  const float weight = labelled ? c.scale * c.label_weight : 0.0f;
  const Gradient f{set1(prior / tempered_sum), set1(prior / teacher_sum), set1(weight / plain_sum),
                   set1(labelled ? c.scale * c.even : 0.0f)};
  auto column = [&](int64_t k) __attribute__((always_inline)) {
    return gradient_of<kind, taught>(f, load(u_row + k), v_row + k, w_row + k);
  };
  alignas(64) float at_label[kLanes];
  if (labelled) store(at_label, column(label));  // now: reading back a line that was streamed would stall

  // Streaming stores spare the read of the gradient's lines (12 bytes per logit, not 16) and must be aligned.
  constexpr int64_t kVectorBytes = kLanes * (int64_t)sizeof(float);
  int64_t head = streaming ? (int64_t)(-(uintptr_t)gradient % kVectorBytes) / (int64_t)sizeof(float) : 0;
  if (head > classes) head = classes;
  if (head) store(gradient, first((int)head), column(0));
  for (k = head; k + kLanes <= classes; k += kLanes) {
    if (streaming)
      stream(gradient + k, column(k));
    else
      store(gradient + k, column(k));
  }
  if (k < classes) store(gradient + k, first((int)(classes - k)), column(k));
  if (labelled) gradient[label] = at_label[0] - c.scale * c.hard;
}

// ---- a block of rows across the lanes ----

#if !defined(BKD_ISA_scalar)

// rows[r][k], r < kLanes, to columns[k][r], and the rows' maxima; classes < 4 are too narrow for quads.
BKD_INLINE Floats gather_columns(const float* rows, int64_t classes, float* columns) {
  Floats top = set1(kLowest);
  if (classes < 4) {
    for (int r = 0; r < kLanes; ++r)
      for (int64_t k = 0; k < classes; ++k) columns[k * kLanes + r] = rows[r * classes + k];
    for (int64_t k = 0; k < classes; ++k) top = max(top, load(columns + k * kLanes));
    return top;
  }
  for (int64_t next = 0; next < classes; next += 4) {
    const int64_t k = next + 4 <= classes ? next : classes - 4;  // the last quad overlaps the one before
    const float* quad = rows + k;
    Floats a = load_quads(quad, classes), b = load_quads(quad + classes, classes);
    Floats c = load_quads(quad + 2 * classes, classes), d = load_quads(quad + 3 * classes, classes);
    transpose_quads(a, b, c, d);
    top = max(top, max(max(a, b), max(c, d)));
    float* out = columns + k * kLanes;
    store(out, a);
    store(out + kLanes, b);
    store(out + 2 * kLanes, c);
    store(out + 3 * kLanes, d);
  }
  return top;
}

// The way back, from a function that gives column k.
template <class Column>
BKD_INLINE void scatter_columns(Column column, int64_t classes, float* rows) {
  if (classes < 4) {
    alignas(64) float lanes[kLanes];
    for (int64_t k = 0; k < classes; ++k) {
      store(lanes, column(k));
      for (int r = 0; r < kLanes; ++r) rows[r * classes + k] = lanes[r];
    }
    return;
  }
  for (int64_t next = 0; next < classes; next += 4) {
    const int64_t k = next + 4 <= classes ? next : classes - 4;
    Floats a = column(k), b = column(k + 1), c = column(k + 2), d = column(k + 3);
    transpose_quads(a, b, c, d);
    float* quad = rows + k;
    store_quads(quad, classes, a);
    store_quads(quad + classes, classes, b);
    store_quads(quad + 2 * classes, classes, c);
    store_quads(quad + 3 * classes, classes, d);
  }
}

// kLanes rows, number r of the block and the following.
template <Tempering kind, bool taught>
void across_rows(const Terms& c, const float* z, const float* t, const int32_t* labels, float* gradient, float* scratch,
                 int r, BlockSums& sums) {
  const int64_t classes = c.classes, stride = kd_fast_stride(classes);
  float* u_columns = scratch;  // first z, then u
  float* v_columns = scratch + stride;
  float* w_columns = scratch + 2 * stride;
  const Floats z_max = gather_columns(z, classes, u_columns);
  const Floats t_max = taught ? gather_columns(t, classes, v_columns) : z_max;
  const Floats per_temperature = set1(kLog2e * c.inverse_temperature), per_one = set1(kLog2e), zero = set1(0.0f);
  const Ints label = load(labels);

  const int64_t rows_ahead = classes < 32 ? 64 : classes < 64 ? 32 : 16;
  Floats tempered = zero, plain = zero, teacher = zero, cross = zero, spread = zero, hit = zero;
  for (int64_t k = 0; k < classes; ++k) {
    const int64_t later = rows_ahead * classes + k * kLanes;  // one line of each array per column
    prefetch(z + later);
    if (taught) prefetch(t + later);
    prefetch_for_write(gradient + later);
    const int64_t at = k * kLanes;
    const Floats x = sub(load(u_columns + at), z_max);
    const Floats u = exp2_nonpositive(mul(x, per_temperature));
    tempered = add(tempered, u);
    spread = add(spread, x);
    hit = select(equal(label, set1i((int32_t)k)), x, hit);
    store(u_columns + at, u);
    if (taught) {
      const Floats v = exp2_nonpositive(mul(sub(load(v_columns + at), t_max), per_temperature));
      teacher = add(teacher, v);
      cross = mul_add(v, x, cross);
      store(v_columns + at, v);
    }
    if (kind == Tempering::any) {
      const Floats w = exp2_nonpositive(mul(x, per_one));
      plain = add(plain, w);
      store(w_columns + at, w);
    } else if (kind != Tempering::one) {
      plain = add(plain, untempered<kind>(u));
    }
  }
  if (kind == Tempering::one) plain = tempered;
  const Floats labelled = select(less(to_float(label), zero), zero, set1(1.0f));
  store(sums.tempered + r, tempered);
  store(sums.plain + r, plain);
  store(sums.teacher + r, teacher);
  store(sums.cross + r, cross);
  store(sums.spread + r, spread);
  store(sums.hit + r, hit);
  store(sums.labelled + r, labelled);

  const Floats prior = set1(taught ? c.scale * c.strength * c.inverse_temperature : 0.0f);
  const Gradient f{div(prior, tempered), taught ? div(prior, teacher) : zero,
                   div(mul(set1(c.scale * c.label_weight), labelled), plain), mul(set1(c.scale * c.even), labelled)};
  const Floats hard = set1(c.scale * c.hard);
  auto column = [&](int64_t k) __attribute__((always_inline)) {
    const int64_t at = k * kLanes;
    const Floats g = gradient_of<kind, taught>(f, load(u_columns + at), v_columns + at, w_columns + at);
    return select(equal(label, set1i((int32_t)k)), sub(g, hard), g);
  };
  scatter_columns(column, classes, gradient);
}

#endif

// ---- inputs and outputs of every storage ----

template <class Real, class Element>
void widen_all(const Element* in, int64_t count, Real* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = (Real)widen(in[i]);
}
template <class Real>
void read(const void* data, Storage storage, int64_t from, int64_t count, Real* out) {
  switch (storage) {
    case Storage::float32: return widen_all((const float*)data + from, count, out);
    case Storage::float64: return widen_all((const double*)data + from, count, out);
    case Storage::bfloat16: return widen_all((const BFloat16*)data + from, count, out);
    case Storage::float16: return widen_all((const Half*)data + from, count, out);
  }
}

template <class Real, class Element>
void narrow_all(const Real* in, int64_t count, Element* out) {
  for (int64_t i = 0; i < count; ++i) narrow(in[i], out[i]);
}
void write(const float* in, int64_t count, void* data, Storage storage, int64_t from) {
  if (storage == Storage::float32) return narrow_all(in, count, (float*)data + from);
  if (storage == Storage::bfloat16) return narrow_all(in, count, (BFloat16*)data + from);
  narrow_all(in, count, (Half*)data + from);
}
void write(const double* in, int64_t count, void* data, Storage, int64_t from) { narrow_all(in, count, (double*)data + from); }

// A label as the kernels use it: the class, or -1 for none. False: it is neither a class nor to be ignored.
BKD_INLINE bool read_label(const KdCall& call, int64_t row, int32_t& label) {
  label = -1;
  if (!call.labels) return true;
  const int64_t y = call.labels[row];
  const bool is_class = (uint64_t)y < (uint64_t)call.settings.classes;
  const bool used = call.teacher_by_label | (call.settings.label_weight != 0);
  if (is_class & (y != call.ignore_index) & used) label = (int32_t)y;
  return is_class | (y == call.ignore_index);
}

// The teacher's row as it is dense; `values` holds `top` elements while a top-k teacher's is written out.
template <class Real>
Fault read_teacher(const KdCall& call, int64_t row, Real* values, Real* dense) {
  const int64_t n = call.settings.classes, at = row * call.top;
  if (!call.indices) {
    read(call.teacher, call.teacher_storage, row * n, n, dense);
    return Fault::none;
  }
  read(call.teacher, call.teacher_storage, at, call.top, values);
  const Real rest = (Real)call.rest[row];
  return call.wide_indices ? expand_top(values, (const int64_t*)call.indices + at, call.top, rest, n, dense)
                           : expand_top(values, (const int32_t*)call.indices + at, call.top, rest, n, dense);
}

// ---- the general way ----

template <class Real>
Fault general_row(const KdCall& call, int64_t chain, int64_t row, char* scratch, double& energy) {
  KdSettings s = call.settings;
  const int64_t n = s.classes;
  double* sums = (double*)scratch;  // (2, teachers)
  Real* logits = (Real*)(sums + 2 * s.teachers);
  Real* gradient = logits + n;
  Real* soft = gradient + n;
  Real* teacher = soft + n;
  Real* weights = teacher + s.teachers * n;
  Real* rest = weights + s.teachers;

  KdRow<Real> r{logits, nullptr, nullptr, nullptr, -1};
  int32_t label;
  if (!read_label(call, row, label)) return Fault::target_out_of_range;
  r.label = label;
  if (call.teacher_by_label && label < 0) s.prior = Prior::none;
  const int64_t at = (chain * call.rows + row) * n;
  read(call.logits, call.logits_storage, at, n, logits);
  if (s.prior != Prior::none) {
    for (int64_t m = 0; m < s.teachers; ++m) {
      const int64_t from = call.teacher_by_label ? label : m * call.rows + row;
      const Fault fault = read_teacher(call, from, rest, teacher + m * n);
      if (fault != Fault::none) return fault;
    }
    r.teacher = teacher;
  }
  if (call.weights) {
    widen_all(call.weights + (call.weights_per_row ? row * s.teachers : 0), s.teachers, weights);
    r.weights = weights;
  }
  if (call.soft && s.label_weight != 0) {
    read(call.soft, call.soft_storage, row * n, n, soft);
    r.soft = soft;
  }
  const Fault fault = kd_row(s, r, rest, sums, energy, gradient);
  if (fault == Fault::none) write(gradient, n, call.gradient, call.logits_storage, at);
  return fault;
}

Fault general_row(const KdCall& call, int64_t chain, int64_t row, char* scratch, double& energy) {
  if (call.logits_storage == Storage::float64) return general_row<double>(call, chain, row, scratch, energy);
  return general_row<float>(call, chain, row, scratch, energy);
}

// ---- blocks and tasks ----

struct Block {
  int64_t chain, row, count;
};

char* general_scratch(const KdCall& call, char* scratch) {
  return scratch + kd_fast_scratch(call.settings.classes) * (int64_t)sizeof(float);
}

void report(KdTaskResult& result, const KdCall& call, const Block& block, int64_t r, Fault fault) {
  if (result.bad_row >= 0) return;
  result.bad_row = block.chain * call.rows + block.row + r;
  result.fault = fault;
}

void general_block(const KdCall& call, const Block& block, char* scratch, KdTaskResult& result) {
  for (int64_t r = 0; r < block.count; ++r) {
    double energy = 0;
    const Fault fault = general_row(call, block.chain, block.row + r, general_scratch(call, scratch), energy);
    if (fault != Fault::none) report(result, call, block, r, fault);
    const int64_t at = block.chain * call.rows + block.row + r;
    if (call.energy && call.logits_storage == Storage::float64) ((double*)call.energy)[at] = energy;
    if (call.energy && call.logits_storage != Storage::float64) ((float*)call.energy)[at] = (float)energy;
    result.energy += energy;
  }
}

// `count` elements as floats: where they lie, or widened into `stage`, with zeros up to `padded`.
BKD_INLINE const float* staged(const void* data, Storage storage, int64_t from, int64_t count, int64_t padded, float* stage) {
  if (storage == Storage::float32 && count == padded) return (const float*)data + from;
  read(data, storage, from, count, stage);
  for (int64_t i = count; i < padded; ++i) stage[i] = 0.0f;
  return stage;
}

// The teacher's `count` rows from `row` on, the same way. A top-k teacher's that cannot be used is NaN, which shows.
BKD_INLINE const float* staged_teacher(const KdCall& call, int64_t row, int64_t count, int64_t padded, float* values,
                                       float* stage) {
  const int64_t n = call.settings.classes;
  if (!call.indices) return staged(call.teacher, call.teacher_storage, row * n, count * n, padded * n, stage);
  for (int64_t r = 0; r < count; ++r)
    if (read_teacher(call, row + r, values, stage + r * n) != Fault::none) stage[r * n] = __builtin_nanf("");
  for (int64_t i = count * n; i < padded * n; ++i) stage[i] = 0.0f;
  return stage;
}

template <Tempering kind, bool taught>
void vector_block(const KdCall& call, const Terms& terms, const Block& block, char* scratch, KdTaskResult& result) {
  const int64_t classes = terms.classes, stride = kd_fast_stride(classes);
  float* work = (float*)scratch;
  float* z_stage = work + 3 * stride;
  float* t_stage = z_stage + stride;
  float* g_stage = t_stage + stride;
  const bool in_place = call.logits_storage == Storage::float32;
  const int64_t z_from = (block.chain * call.rows + block.row) * classes;

  alignas(64) int32_t labels[kBlockRows];
  bool labels_good = true;
  for (int r = 0; r < kBlockRows; ++r) {
    labels[r] = -1;
    if (r < block.count) labels_good &= read_label(call, block.row + r, labels[r]);
  }

  BlockSums sums;
#if !defined(BKD_ISA_scalar)
  if (classes <= kAcrossClasses) {
    // a last, short block is padded: a row's result does not depend on where it stands
    const int64_t count = block.count * classes, padded = kBlockRows * classes;
    const float* z = staged(call.logits, call.logits_storage, z_from, count, padded, z_stage);
    const float* t = taught ? staged_teacher(call, block.row, block.count, kBlockRows, work, t_stage) : nullptr;
    const bool direct = in_place && count == padded;
    float* g = direct ? (float*)call.gradient + z_from : g_stage;
    for (int r = 0; r < kBlockRows; r += kLanes)
      across_rows<kind, taught>(terms, z + r * classes, t + (taught ? r * classes : 0), labels + r, g + r * classes, work, r, sums);
    if (!direct) write(g, count, call.gradient, call.logits_storage, z_from);
  } else
#endif
  {
    for (int r = 0; r < kBlockRows; ++r) {  // rows that are not there leave sums of harmless numbers
      sums.tempered[r] = sums.plain[r] = sums.teacher[r] = 1.0f;
      sums.cross[r] = sums.spread[r] = sums.hit[r] = sums.labelled[r] = 0.0f;
    }
    for (int r = 0; r < block.count; ++r) {
      const int64_t z_row = z_from + r * classes;
      const float* z = staged(call.logits, call.logits_storage, z_row, classes, classes, z_stage);
      const float* t = taught ? staged_teacher(call, block.row + r, 1, 1, work, t_stage) : nullptr;
      float* g = in_place ? (float*)call.gradient + z_row : g_stage;
      if (in_place && classes >= kStreamingClasses)
        along_row<kind, taught, true>(terms, z, t, labels[r], g, work, r, sums);
      else
        along_row<kind, taught, false>(terms, z, t, labels[r], g, work, r, sums);
      if (!in_place) write(g, classes, call.gradient, call.logits_storage, z_row);
    }
  }

  alignas(64) float energy[kBlockRows];
  finish_energies<taught>(terms, sums, energy);
  float total = 0;
  for (int r = 0; r < block.count; ++r) total += energy[r];
  if (!(total - total == 0.0f) || !labels_good) {
    total = 0;
    for (int r = 0; r < block.count; ++r) {
      int32_t label;
      if (!(energy[r] - energy[r] == 0.0f) || !read_label(call, block.row + r, label)) {
        double repaired = 0;
        const Fault fault = general_row(call, block.chain, block.row + r, general_scratch(call, scratch), repaired);
        if (fault != Fault::none) report(result, call, block, r, fault);
        energy[r] = (float)repaired;
      }
      total += energy[r];
    }
  }
  if (call.energy) {
    float* out = (float*)call.energy + block.chain * call.rows + block.row;
    for (int r = 0; r < block.count; ++r) out[r] = energy[r];
  }
  result.energy += (double)total;
}

using BlockKernel = void (*)(const KdCall&, const Terms&, const Block&, char*, KdTaskResult&);

BlockKernel vector_kernel(const KdSettings& s) {
  if (s.prior == Prior::none) return vector_block<Tempering::one, false>;
  if (s.temperature == 1) return vector_block<Tempering::one, true>;
  if (s.temperature == 2) return vector_block<Tempering::two, true>;
  if (s.temperature == 4) return vector_block<Tempering::four, true>;
  return vector_block<Tempering::any, true>;
}

bool has_vector_kernel(const KdCall& call) {
  const KdSettings& s = call.settings;
  const bool known_prior = s.prior == Prior::none || (s.prior == Prior::dirichlet && !s.teacher_is_probs);
  return known_prior && !call.soft && call.logits_storage != Storage::float64;
}

}  // namespace

KdTaskResult kd_task(const KdCall& call, const KdTiling& tiling, int64_t task, char* scratch) {
  KdTaskResult result{0.0, -1, Fault::none};
  const BlockKernel kernel = has_vector_kernel(call) ? vector_kernel(call.settings) : nullptr;
  const Terms terms = terms_of(call.settings);
  const int64_t begin = task * tiling.blocks_per_task;
  const int64_t end = begin + tiling.blocks_per_task < tiling.blocks ? begin + tiling.blocks_per_task : tiling.blocks;
  Block block{begin / tiling.blocks_per_chain, begin % tiling.blocks_per_chain * tiling.block_rows, 0};
  for (int64_t b = begin; b < end; ++b) {
    const int64_t left = call.rows - block.row;
    block.count = left < tiling.block_rows ? left : tiling.block_rows;
    if (kernel)
      kernel(call, terms, block, scratch, result);
    else
      general_block(call, block, scratch, result);
    block.row += tiling.block_rows;
    if (block.row >= call.rows) {
      block.row = 0;
      ++block.chain;
    }
  }
  if (kernel && terms.classes >= kStreamingClasses) stream_fence();
  return result;
}

}  // namespace BKD_ISA
}  // namespace bkd
