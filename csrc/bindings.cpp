// The Python face of the CPU kernels: raw addresses and plain numbers in, nothing of torch. Callers (bkd_fast/ops/cpp)
// own every buffer and have checked shapes, dtypes and strides; the GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <stdexcept>

#include "cpu/dispatch.h"
#include "cpu/kd.h"
#include "cpu/langevin_table.h"
#include "cpu/normals.h"
#include "cpu/parallel.h"
#include "cpu/predictive.h"
#include "cpu/sketch.h"
#include "cpu/sketch_update.h"

namespace py = pybind11;

using Address = uint64_t;
template <class T = void> static T* pointer(Address address) { return reinterpret_cast<T*>(address); }

void bind_machine(py::module_& m) {
  m.def("isa", [] { return bkd::isa_name(bkd::active_isa()); }, "The instruction set in use.");
  m.def("isas", [] {
    std::vector<std::string> names;
    for (bkd::Isa isa : {bkd::Isa::scalar, bkd::Isa::avx2, bkd::Isa::avx512})
      if (isa <= bkd::best_isa()) names.emplace_back(bkd::isa_name(isa));
    return names;
  }, "The instruction sets that this machine runs, narrowest first.");
  m.def("use_isa", [](const std::string& name) { bkd::set_active_isa(bkd::isa_named(name.c_str())); },
        py::arg("name"), "Choose the instruction set (tests and benchmarks; the default is the widest).");
  m.def("threading", &bkd::threading_name, "Where the kernels' threads come from.");
}

// ---- noise ----

void bind_noise(py::module_& m) {
  m.def("philox", [](std::array<uint32_t, 4> counter, uint64_t key) {
    const bkd::Words w = bkd::philox({{counter[0], counter[1], counter[2], counter[3]}}, static_cast<uint32_t>(key),
                                     static_cast<uint32_t>(key >> 32));
    return std::array<uint32_t, 4>{w.w[0], w.w[1], w.w[2], w.w[3]};
  }, py::arg("counter"), py::arg("key"), "Philox4x32-10 of one counter (known-answer tests).");
  m.def("normal_pair", [](uint32_t radius_word, uint32_t angle_word) {
    const bkd::Pair pair = bkd::normals_of(radius_word, angle_word);
    return std::array<uint32_t, 2>{bkd::as_bits(pair.z0), bkd::as_bits(pair.z1)};
  }, py::arg("radius_word"), py::arg("angle_word"), "The bits of the two normals of two words (known-answer tests).");
  m.def("normals", [](Address out, int64_t count, uint64_t seed, uint64_t step, uint32_t chain, uint32_t parameter, uint32_t tag,
                      uint64_t first_element, int threads) {
    const bkd::Stream stream{seed, step, chain, parameter, tag};
    const int64_t tasks = (count + bkd::kChunk - 1) / bkd::kChunk;
    bkd::parallel_for(tasks, threads, [&](int64_t task) {
      const int64_t begin = task * bkd::kChunk, end = std::min(begin + bkd::kChunk, count);
      BKD_CALL(normals, pointer<float>(out) + begin, end - begin, stream, first_element + static_cast<uint64_t>(begin));
    });
  }, py::arg("out"), py::arg("count"), py::kw_only(), py::arg("seed"), py::arg("step"), py::arg("chain"), py::arg("parameter"),
     py::arg("tag"), py::arg("first_element"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
     "out[0 .. count) = the noise of elements first_element ...");
}

// ---- operation A: the Langevin step ----

static bkd::Storage storage_named(const std::string& name) {
  if (name == "float64") return bkd::Storage::float64;
  if (name == "bfloat16") return bkd::Storage::bfloat16;
  if (name == "float16") return bkd::Storage::float16;
  return bkd::Storage::float32;
}

constexpr std::pair<const char*, bkd::Rule> kRules[] = {
    {"sgld", bkd::Rule::sgld}, {"sghmc", bkd::Rule::sghmc}, {"nesterov", bkd::Rule::nesterov}, {"rmsprop", bkd::Rule::rmsprop},
    {"adam", bkd::Rule::adam}, {"sgnht", bkd::Rule::sgnht}, {"baoab", bkd::Rule::baoab}};

static bkd::Rule rule_named(const std::string& name) {
  for (const auto& [known, rule] : kRules)
    if (name == known) return rule;
  throw std::invalid_argument("rule = '" + name + "' is unknown");
}

void bind_langevin(py::module_& m) {
  m.def("rules", [] {
    std::map<std::string, std::pair<int, int>> rules;
    for (const auto& [name, rule] : kRules) rules[name] = {bkd::states_of(rule), bkd::own_numbers_of(rule)};
    return rules;
  }, "The rules of csrc/rules.h: how many arrays of state and numbers of its own each has.");
  m.def("langevin_step", [](const std::string& rule, const std::vector<Address>& theta, const std::vector<Address>& gradient,
                            const std::vector<Address>& center, const std::vector<Address>& mean,
                            const std::vector<Address>& m2, const std::vector<Address>& master,
                            const std::vector<Address>& first, const std::vector<Address>& second,
                            const std::vector<int64_t>& counts, const std::vector<uint64_t>& first_elements,
                            const std::vector<uint32_t>& parameters, const std::string& dtype, uint64_t seed, uint64_t step,
                            uint32_t chain, int64_t chains, const std::vector<std::vector<double>>& numbers, int64_t draws,
                            Address noise_table, Address nonfinite, int threads) {
    const auto at = [](const std::vector<Address>& addresses, size_t t) {
      return addresses.empty() ? nullptr : pointer(addresses[t]);
    };
    std::vector<bkd::LangevinTensor> tensors(theta.size());
    for (size_t t = 0; t < theta.size(); ++t)
      tensors[t] = {at(theta, t), at(gradient, t), at(center, t), at(mean, t), at(m2, t), static_cast<float*>(at(master, t)),
                    at(first, t), at(second, t), counts[t], first_elements[t], parameters[t], 0,
                    nonfinite ? pointer<uint8_t>(nonfinite) + t : nullptr};
    const bkd::Storage storage = storage_named(dtype);
    if (chains > 1) tensors = bkd::split_into_chains(tensors, storage, chains);
    std::vector<bkd::StepNumbers> of_chains;
    for (const std::vector<double>& given : numbers) {
      bkd::StepNumbers n{given[0], given[1], given[2], {}};
      std::copy(given.begin() + 3, given.end(), n.own);
      of_chains.push_back(n);
    }
    const double inverse_count = draws > 0 ? 1.0 / static_cast<double>(draws) : 0.0;
    const bkd::Rounding rounding = noise_table      ? bkd::Rounding::stochastic
                                   : master.empty() ? bkd::Rounding::nearest
                                                    : bkd::Rounding::master;
    const bkd::LangevinStep s{rule_named(rule), storage, rounding, seed, step, chain, of_chains.data(), of_chains.size() > 1,
                              inverse_count, pointer<float>(noise_table)};
    py::gil_scoped_release release;
    bkd::langevin_step(tensors, s, threads);
  }, py::arg("rule"), py::arg("theta"), py::arg("gradient"), py::arg("center"), py::arg("mean"), py::arg("m2"),
     py::arg("master"), py::arg("first"), py::arg("second"), py::arg("counts"), py::arg("first_elements"),
     py::arg("parameters"), py::arg("dtype"), py::kw_only(), py::arg("seed"), py::arg("step"), py::arg("chain"),
     py::arg("chains"), py::arg("numbers"), py::arg("draws"), py::arg("noise_table"), py::arg("nonfinite"), py::arg("threads"),
     "One step of tensors of one dtype by a rule of csrc/rules.h; lists of addresses may be empty; numbers: (lr, decay, sigma, "
     "the rule's own) for each chain, or one for all; noise_table is 0 or an address; nonfinite is 0 or the address of a byte "
     "per tensor.");
  m.def("find_nonfinite", [](const std::vector<Address>& data, const std::vector<int64_t>& counts, const std::string& dtype,
                             int threads) {
    std::vector<const void*> pointers;
    for (Address address : data) pointers.push_back(pointer<const void>(address));
    std::vector<bool> found;
    {
      py::gil_scoped_release release;
      found = bkd::find_nonfinite(pointers, counts, storage_named(dtype), threads);
    }
    std::vector<size_t> numbers;
    for (size_t t = 0; t < found.size(); ++t)
      if (found[t]) numbers.push_back(t);
    return numbers;
  }, py::arg("data"), py::arg("counts"), py::arg("dtype"), py::kw_only(), py::arg("threads"),
     "The numbers of the tensors that hold a NaN or an infinity.");
}

// ---- operation B: the KD energy ----

static bkd::Prior prior_named(const std::string& name) {
  if (name == "dirichlet") return bkd::Prior::dirichlet;
  if (name == "continuous_categorical") return bkd::Prior::continuous_categorical;
  if (name == "reverse_kl") return bkd::Prior::reverse_kl;
  if (name == "mixture") return bkd::Prior::mixture;
  return bkd::Prior::none;
}

static const char* fault_name(bkd::Fault fault) {
  switch (fault) {
    case bkd::Fault::none: return "";
    case bkd::Fault::logits_not_finite: return "logits_not_finite";
    case bkd::Fault::logits_all_masked: return "logits_all_masked";
    case bkd::Fault::teacher_not_finite: return "teacher_not_finite";
    case bkd::Fault::teacher_all_masked: return "teacher_all_masked";
    case bkd::Fault::teacher_not_probabilities: return "teacher_not_probabilities";
    case bkd::Fault::teacher_on_masked_class: return "teacher_on_masked_class";
    case bkd::Fault::teacher_excludes_class: return "teacher_excludes_class";
    case bkd::Fault::weights_not_probabilities: return "weights_not_probabilities";
    case bkd::Fault::target_out_of_range: return "target_out_of_range";
    case bkd::Fault::target_not_probabilities: return "target_not_probabilities";
    case bkd::Fault::target_on_masked_class: return "target_on_masked_class";
    case bkd::Fault::teacher_index_out_of_range: return "teacher_index_out_of_range";
    case bkd::Fault::teacher_index_repeated: return "teacher_index_repeated";
    case bkd::Fault::target_sum_not_one: return "target_sum_not_one";
  }
  return "unknown";
}

void bind_kd(py::module_& m) {
  m.def("kd_energy", [](Address logits, const std::string& logits_dtype, Address teacher, const std::string& teacher_dtype,
                        bool teacher_by_label, Address indices, bool wide_indices, Address rest, int64_t top, Address labels,
                        Address soft, const std::string& soft_dtype, bool signed_target, Address weights, bool weights_per_row,
                        Address gradient, Address energy, int64_t chains, int64_t rows, int64_t classes, int64_t teachers,
                        const std::string& prior, bool teacher_is_probs, double prior_strength, double temperature,
                        double label_weight, double label_smoothing, double tolerance_teacher, double tolerance_target,
                        double scale, int64_t ignore_index, int threads) {
    bkd::KdCall call;
    call.settings = {classes, teachers, prior_named(prior), teacher_is_probs, prior_strength, temperature, label_weight,
                     label_smoothing, tolerance_teacher, tolerance_target, signed_target, scale};
    call.chains = chains;
    call.rows = rows;
    call.ignore_index = ignore_index;
    call.logits = pointer(logits);
    call.logits_storage = storage_named(logits_dtype);
    call.teacher = pointer(teacher);
    call.teacher_storage = storage_named(teacher_dtype);
    call.teacher_by_label = teacher_by_label;
    call.indices = pointer(indices);
    call.wide_indices = wide_indices;
    call.rest = pointer<float>(rest);
    call.top = top;
    call.labels = pointer<int64_t>(labels);
    call.soft = pointer(soft);
    call.soft_storage = storage_named(soft_dtype);
    call.weights = pointer<double>(weights);
    call.weights_per_row = weights_per_row;
    call.gradient = pointer(gradient);
    call.energy = pointer(energy);
    bkd::KdTaskResult result;
    {
      py::gil_scoped_release release;
      result = bkd::kd_energy(call, threads);
    }
    return py::make_tuple(result.energy, result.bad_row, fault_name(result.fault));
  }, py::arg("logits"), py::arg("logits_dtype"), py::arg("teacher"), py::arg("teacher_dtype"), py::arg("teacher_by_label"),
     py::arg("indices"), py::arg("wide_indices"), py::arg("rest"), py::arg("top"), py::arg("labels"), py::arg("soft"),
     py::arg("soft_dtype"), py::arg("signed_target"), py::arg("weights"), py::arg("weights_per_row"), py::arg("gradient"),
     py::arg("energy"), py::arg("chains"), py::arg("rows"), py::arg("classes"), py::arg("teachers"), py::arg("prior"),
     py::arg("teacher_is_probs"), py::arg("prior_strength"), py::arg("temperature"), py::arg("label_weight"),
     py::arg("label_smoothing"), py::arg("tolerance_teacher"), py::arg("tolerance_target"), py::arg("scale"),
     py::arg("ignore_index"), py::arg("threads"),
     "Writes the KD energies (unless energy is 0) and scale times their gradient; gives (sum of the energies, first bad row "
     "or -1, its fault). Absent arrays are 0.");
}

// ---- operation C: the posterior predictive and its sketch ----

static bkd::SketchTiles sketch_tiles(Address counters, Address minimum, Address maximum, Address counts, int64_t rows,
                                     int64_t row_cells, int bins) {
  return {pointer<uint16_t>(counters), pointer<int16_t>(minimum), pointer<int16_t>(maximum), pointer<int32_t>(counts),
          rows, row_cells, bkd::log2_of(bins)};
}

void bind_predictive(py::module_& m) {
  m.def("predictive_update", [](Address logits, int64_t draw_stride, int32_t draws, Address rows, Address batch, int64_t size,
                                Address counters, Address minimum, Address maximum, Address mean, Address m2,
                                Address reference, Address counts, Address invalid, Address entropy, Address divergence,
                                Address picked, int32_t picks, Address codes, Address valid, int64_t num_rows,
                                int32_t num_classes, int bins, int threads) {
    const bkd::PredictiveState state{pointer<uint16_t>(counters), pointer<int16_t>(minimum), pointer<int16_t>(maximum),
                                     pointer<float>(mean), pointer<float>(m2), pointer<float>(reference),
                                     pointer<int32_t>(counts), pointer<int32_t>(invalid), pointer<double>(entropy),
                                     pointer<double>(divergence), num_rows, num_classes, bkd::log2_of(bins)};
    const bkd::PredictiveWindow window{pointer<float>(logits), draw_stride, draws, pointer<int64_t>(rows),
                                       pointer<int64_t>(batch), size};
    const bkd::PickedCodes picked_codes{pointer<int32_t>(picked), picks, pointer<int16_t>(codes), pointer<uint8_t>(valid)};
    bkd::predictive_update(state, window, picked_codes, threads);
  }, py::arg("logits"), py::arg("draw_stride"), py::arg("draws"), py::arg("rows"), py::arg("batch"), py::arg("size"),
     py::arg("counters"), py::arg("minimum"), py::arg("maximum"), py::arg("mean"), py::arg("m2"), py::arg("reference"),
     py::arg("counts"), py::arg("invalid"), py::arg("entropy"), py::arg("divergence"), py::arg("picked"), py::arg("picks"),
     py::arg("codes"), py::arg("valid"), py::kw_only(), py::arg("num_rows"), py::arg("num_classes"), py::arg("bins"),
     py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
     "Adds up to 64 draws of logits of sorted rows to the posterior predictive's state; writes the codes of picked classes.");
  m.def("sketch_update", [](Address counters, Address minimum, Address maximum, Address counts, Address codes, Address valid,
                            int32_t draws, Address rows, int64_t size, int64_t num_rows, int64_t row_cells, int bins,
                            int threads) {
    bkd::sketch_update(sketch_tiles(counters, minimum, maximum, counts, num_rows, row_cells, bins), pointer<int32_t>(counts),
                       {pointer<int16_t>(codes), pointer<uint8_t>(valid), draws, pointer<int64_t>(rows), size}, threads);
  }, py::arg("counters"), py::arg("minimum"), py::arg("maximum"), py::arg("counts"), py::arg("codes"), py::arg("valid"),
     py::arg("draws"), py::arg("rows"), py::arg("size"), py::kw_only(), py::arg("num_rows"), py::arg("row_cells"),
     py::arg("bins"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
     "Adds up to 64 draws of codes of sorted rows to the tiles. valid = 0: all draws count.");
  m.def("sketch_histogram", [](Address counters, Address minimum, Address maximum, Address counts, int64_t begin, int64_t end,
                               Address least, Address most, Address out, int64_t rows, int64_t row_cells, int bins,
                               int threads) {
    bkd::sketch_histogram(sketch_tiles(counters, minimum, maximum, counts, rows, row_cells, bins), begin, end,
                          pointer<int16_t>(least), pointer<int16_t>(most), pointer<int32_t>(out), threads);
  }, py::arg("counters"), py::arg("minimum"), py::arg("maximum"), py::arg("counts"), py::arg("begin"), py::arg("end"),
     py::arg("least"), py::arg("most"), py::arg("out"), py::kw_only(), py::arg("rows"), py::arg("row_cells"), py::arg("bins"),
     py::arg("threads"), py::call_guard<py::gil_scoped_release>(), "Counts of a range of rows at the level of given codes.");
  m.def("sketch_sort", [](Address counters, Address counts, int64_t rows, int64_t row_cells, int bins, int threads) {
    bkd::sketch_sort(sketch_tiles(counters, 0, 0, counts, rows, row_cells, bins), threads);
  }, py::arg("counters"), py::arg("counts"), py::kw_only(), py::arg("rows"), py::arg("row_cells"), py::arg("bins"),
     py::arg("threads"), py::call_guard<py::gil_scoped_release>(), "Sorts the codes that cells still keep.");
  m.def("sketch_quantile", [](Address counters, Address minimum, Address maximum, Address counts, double q, Address lower,
                              Address upper, Address point, int64_t rows, int64_t row_cells, int bins, int threads) {
    bkd::sketch_quantile(sketch_tiles(counters, minimum, maximum, counts, rows, row_cells, bins), q, pointer<int32_t>(lower),
                         pointer<int32_t>(upper), pointer<float>(point), threads);
  }, py::arg("counters"), py::arg("minimum"), py::arg("maximum"), py::arg("counts"), py::arg("q"), py::arg("lower"),
     py::arg("upper"), py::arg("point"), py::kw_only(), py::arg("rows"), py::arg("row_cells"), py::arg("bins"),
     py::arg("threads"), py::call_guard<py::gil_scoped_release>(), "The order statistic ceil(q n) of every cell, in codes.");
  m.def("sketch_merge", [](Address counters, Address minimum, Address maximum, Address counts, Address other_counters,
                           Address other_minimum, Address other_maximum, Address other_counts, int64_t rows,
                           int64_t row_cells, int bins, int threads) {
    bkd::sketch_merge(sketch_tiles(counters, minimum, maximum, counts, rows, row_cells, bins),
                      sketch_tiles(other_counters, other_minimum, other_maximum, other_counts, rows, row_cells, bins), threads);
  }, py::arg("counters"), py::arg("minimum"), py::arg("maximum"), py::arg("counts"), py::arg("other_counters"),
     py::arg("other_minimum"), py::arg("other_maximum"), py::arg("other_counts"), py::kw_only(), py::arg("rows"),
     py::arg("row_cells"), py::arg("bins"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
     "Adds the other sketch's codes to the first.");
  m.def("sketch_deviance_quantile", [](Address counters, Address minimum, Address maximum, Address counts, Address level,
                                       Address out, int64_t rows, int64_t row_cells, int bins, int threads) {
    bkd::sketch_deviance_quantile(sketch_tiles(counters, minimum, maximum, counts, rows, row_cells, bins),
                                  pointer<double>(level), pointer<float>(out), threads);
  }, py::arg("counters"), py::arg("minimum"), py::arg("maximum"), py::arg("counts"), py::arg("level"), py::arg("out"),
     py::kw_only(), py::arg("rows"), py::arg("row_cells"), py::arg("bins"), py::arg("threads"),
     py::call_guard<py::gil_scoped_release>(), "The weighted deviance quantile of every row.");
}

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled CPU kernels of bkd_fast.";
  bind_machine(m);
  bind_noise(m);
  bind_langevin(m);
  bind_kd(m);
  bind_predictive(m);
}
