// The operator on a caller's tensors: a network of one depthwise step, whose tensors are where the caller has them.
#include "depthwise_conv.h"

#include <algorithm>
#include <atomic>

#include "dispatch.h"
#include "parallel.h"
#include "step.h"

namespace effnet {
namespace {

// Starting a team costs about as much as this many multiplies in one thread.
constexpr std::int64_t multiplies_per_thread = 64 * 1024;

// Of the bands' sums, in order, so that it does not depend on which thread had which band.
void merge_sums(const DepthwiseCall& call, const float* sums) {
  const float inverse = 1.0f / static_cast<float>(call.out_height * call.out_width);
  const std::int64_t pitch = round_up(call.channels, panel_columns);
  for (std::int64_t image = 0; image < call.batch; ++image, sums += sum_bands * pitch) {
    for (std::int64_t c = 0; c < call.channels; ++c) {
      float total = 0;
      for (std::int64_t band = 0; band < sum_bands; ++band) total += sums[band * pitch + c];
      call.pooled[image * call.channels + c] = total * inverse;
    }
  }
}

}  // namespace

void depthwise_conv(const DepthwiseCall& call, const std::string& isa, int threads) {
  const Kernels& kernels = kernels_of(isa);
  LayerSpec spec;
  spec.kind = LayerKind::depthwise;
  spec.in_channels = spec.out_channels = call.channels;
  spec.kernel = call.kernel;
  spec.stride = call.stride;
  spec.padding = call.padding;
  spec.act = call.act;
  const Layer layer = depthwise_layer(spec, call.weight, call.scale, call.shift);
  // Nothing writes to x.
  const Place x{0, call.channels, call.height, call.width, false, const_cast<float*>(call.x)};
  const Place y{0, call.channels, call.out_height, call.out_width, false, call.y};
  const auto step = depthwise_step(layer, nullptr, x, y, call.pooled != nullptr ? 0 : absent);

  const std::int64_t work = call.batch * step->multiply_adds();
  threads = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, work / multiplies_per_thread)));
  const std::int64_t scratch_floats = round_up(step->scratch_floats(), panel_columns) + panel_columns;
  const Buffer scratch = allocate(threads * scratch_floats);
  const Buffer sums =
      allocate(call.pooled != nullptr ? call.batch * sum_bands * round_up(call.channels, panel_columns) : 0);
  const Run run{{}, sums.get(), call.batch, threads, kernels};
  const std::int64_t units = step->units(run);
  std::atomic<std::int64_t> taken{0};
  parallel_team(threads, [&](Team& team) {
    for (std::int64_t unit; (unit = taken.fetch_add(1, std::memory_order_relaxed)) < units;) {
      step->run_unit(run, unit, scratch.get() + team.index() * scratch_floats);
    }
  });
  if (call.pooled != nullptr) merge_sums(call, sums.get());
}

}  // namespace effnet
