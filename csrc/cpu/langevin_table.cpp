#include "cpu/langevin_table.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "cpu/parallel.h"

namespace bkd {

std::vector<Chunk> chunks_of(const std::vector<LangevinTensor>& tensors) {
  std::vector<Chunk> chunks;
  for (size_t t = 0; t < tensors.size(); ++t)
    for (int64_t begin = 0; begin < tensors[t].count; begin += kChunk)
      chunks.push_back({static_cast<int32_t>(t), begin, std::min(begin + kChunk, tensors[t].count)});
  return chunks;
}

std::vector<LangevinTensor> split_into_chains(const std::vector<LangevinTensor>& tensors, Storage storage, int64_t chains) {
  const int64_t size = size_of(storage), real = storage == Storage::float64 ? 8 : 4;
  const auto moved = [](auto* pointer, int64_t bytes) {
    return pointer ? reinterpret_cast<decltype(pointer)>(reinterpret_cast<uintptr_t>(pointer) + static_cast<size_t>(bytes))
                   : nullptr;
  };
  std::vector<LangevinTensor> parts;
  parts.reserve(tensors.size() * static_cast<size_t>(chains));
  for (const LangevinTensor& whole : tensors) {
    for (int64_t chain = 0; chain < chains; ++chain) {
      LangevinTensor part = whole;
      part.count = whole.count / chains;
      part.chain = static_cast<uint32_t>(chain);
      const int64_t elements = chain * part.count;
      part.theta = moved(whole.theta, elements * size);
      part.gradient = moved(whole.gradient, elements * size);
      part.center = moved(whole.center, elements * size);
      part.mean = moved(whole.mean, elements * real);
      part.m2 = moved(whole.m2, elements * real);
      part.master = moved(whole.master, elements * 4);
      part.first = moved(whole.first, elements * real);
      part.second = moved(whole.second, elements * real);
      parts.push_back(part);
    }
  }
  return parts;
}

// Waking a thread costs microseconds: fewer threads for less work.
static int useful_threads(const std::vector<Chunk>& chunks, int threads) {
  constexpr int64_t kWorthAThread = 16 * 1024;  // elements
  int64_t elements = 0;
  for (const Chunk& chunk : chunks) elements += chunk.end - chunk.begin;
  return static_cast<int>(std::min<int64_t>(threads, 1 + elements / kWorthAThread));
}

void langevin_step(const std::vector<LangevinTensor>& tensors, const LangevinStep& step, int threads) {
  const std::vector<Chunk> chunks = chunks_of(tensors);
  parallel_for(static_cast<int64_t>(chunks.size()), useful_threads(chunks, threads), [&](int64_t i) {
    const Chunk& chunk = chunks[static_cast<size_t>(i)];
    BKD_CALL(langevin_chunk, tensors[static_cast<size_t>(chunk.tensor)], step, chunk.begin, chunk.end);
  });
}

std::vector<bool> find_nonfinite(const std::vector<const void*>& data, const std::vector<int64_t>& counts, Storage storage,
                                 int threads) {
  std::vector<LangevinTensor> tensors(data.size());
  for (size_t t = 0; t < data.size(); ++t) {
    tensors[t].gradient = data[t];
    tensors[t].count = counts[t];
  }
  const std::vector<Chunk> chunks = chunks_of(tensors);
  const int64_t size = size_of(storage);
  const auto found = std::make_unique<std::atomic<bool>[]>(data.size());
  parallel_for(static_cast<int64_t>(chunks.size()), useful_threads(chunks, threads), [&](int64_t i) {
    const Chunk& chunk = chunks[static_cast<size_t>(i)];
    const size_t t = static_cast<size_t>(chunk.tensor);
    const void* from = static_cast<const char*>(data[t]) + chunk.begin * size;
    if (BKD_CALL(has_nonfinite, from, chunk.end - chunk.begin, storage)) found[t].store(true, std::memory_order_relaxed);
  });
  return std::vector<bool>(found.get(), found.get() + data.size());
}

}  // namespace bkd
