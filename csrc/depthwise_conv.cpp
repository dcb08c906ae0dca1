// Packs the weights, cuts the work for threads and merges the sums; the kernels do the rest.
#include "depthwise_conv.h"

#include <algorithm>
#include <memory>
#include <new>
#include <stdexcept>

#include "dispatch.h"
#include "parallel.h"

namespace effnet {
namespace {

constexpr std::size_t cache_line = 64;

struct Free {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(cache_line)); }
};

std::unique_ptr<float[], Free> allocate(std::int64_t count) {
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(float);
  return std::unique_ptr<float[], Free>(
      static_cast<float*>(::operator new[](bytes, std::align_val_t(cache_line))));
}

// Starting a team costs about as much as this many multiplies in one thread.
constexpr std::int64_t multiplies_per_thread = 64 * 1024;

// Weights of one block of channels stay in the first-level cache, beside the pixels, while the rows go by.
constexpr std::int64_t packed_bytes_per_block = 12 * 1024;

void pack(const DepthwiseCall& call, std::int64_t lanes, std::int64_t slot, float* packed) {
  const std::int64_t taps = std::int64_t{call.kernel} * call.kernel;
  const std::int64_t channel = slot_channel(slot, lanes, call.channels);
  float* to = packed + slot * (1 + taps) * lanes;
  for (std::int64_t l = 0; l < lanes; ++l) to[l] = call.shift != nullptr ? call.shift[channel + l] : 0.0f;
  for (std::int64_t l = 0; l < lanes; ++l) {
    const float scale = call.scale != nullptr ? call.scale[channel + l] : 1.0f;
    const float* from = call.weight + (channel + l) * taps;
    for (std::int64_t tap = 0; tap < taps; ++tap) to[(1 + tap) * lanes + l] = from[tap] * scale;
  }
}

// In row order, so that the mean does not depend on which thread had which row.
void merge_row_sums(const DepthwiseCall& call, std::int64_t lanes, std::int64_t slots, const float* row_sums) {
  const float inverse = 1.0f / static_cast<float>(call.out_height * call.out_width);
  const std::int64_t pitch = slots * lanes;
  for (std::int64_t image = 0; image < call.batch; ++image) {
    float* pooled = call.pooled + image * call.channels;
    const float* rows = row_sums + image * call.out_height * pitch;
    for (std::int64_t slot = 0; slot < slots; ++slot) {
      float* to = pooled + slot_channel(slot, lanes, call.channels);
      std::fill(to, to + lanes, 0.0f);
      for (std::int64_t row = 0; row < call.out_height; ++row) {
        const float* from = rows + row * pitch + slot * lanes;
        for (std::int64_t l = 0; l < lanes; ++l) to[l] += from[l];
      }
      for (std::int64_t l = 0; l < lanes; ++l) to[l] *= inverse;
    }
  }
}

}  // namespace

void depthwise_conv(const DepthwiseCall& call, const std::string& isa, int threads) {
  const auto kernel = find_kernel<DepthwiseConvKernel>(isa, call.channels);
  if (kernel.run == nullptr) throw std::invalid_argument("no depthwise_conv kernel for instruction set '" + isa + "'");
  const std::int64_t lanes = kernel.lanes;
  const std::int64_t slots = (call.channels + lanes - 1) / lanes;
  const std::int64_t packed_per_slot = (1 + std::int64_t{call.kernel} * call.kernel) * lanes;

  const auto packed = allocate(slots * packed_per_slot);
  parallel_for(slots, std::max<std::int64_t>(1, multiplies_per_thread / packed_per_slot), threads,
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t slot = begin; slot < end; ++slot) pack(call, lanes, slot, packed.get());
               });
  const auto row_sums = allocate(call.pooled != nullptr ? call.batch * call.out_height * slots * lanes : 0);

  DepthwiseConv conv;
  conv.x = call.x;
  conv.packed = packed.get();
  conv.y = call.y;
  conv.row_sums = call.pooled != nullptr ? row_sums.get() : nullptr;
  conv.height = call.height;
  conv.width = call.width;
  conv.channels = call.channels;
  conv.out_height = call.out_height;
  conv.out_width = call.out_width;
  conv.slots = slots;
  conv.stride = call.stride;
  conv.pad_left = call.pad_left;
  conv.pad_top = call.pad_top;
  conv.kernel = call.kernel;
  conv.act = call.act;

  const std::int64_t wanted = packed_bytes_per_block / static_cast<std::int64_t>(packed_per_slot * sizeof(float));
  // The last two slots overlap when lanes does not divide the channels, so no block is smaller than two: one thread
  // writes both.
  const std::int64_t blocks =
      std::max<std::int64_t>(1, std::min((slots + wanted) / std::max<std::int64_t>(wanted, 1), slots / 2));
  const std::int64_t units = call.batch * blocks * call.out_height;
  const std::int64_t unit_multiplies = std::max<std::int64_t>(1, call.out_width * slots * packed_per_slot / blocks);
  parallel_for(units, (multiplies_per_thread + unit_multiplies - 1) / unit_multiplies, threads,
               [&](std::int64_t begin, std::int64_t end) {
                 while (begin < end) {
                   const std::int64_t row = begin % call.out_height;
                   const std::int64_t block = begin / call.out_height % blocks;
                   DepthwiseBand band;
                   band.image = begin / call.out_height / blocks;
                   band.row_begin = row;
                   band.row_end = std::min(call.out_height, row + (end - begin));
                   band.slot_begin = slots * block / blocks;
                   band.slot_end = slots * (block + 1) / blocks;
                   kernel.run(conv, band);
                   begin += band.row_end - row;
                 }
               });
  if (call.pooled != nullptr) merge_row_sums(call, lanes, slots, row_sums.get());
}

}  // namespace effnet
