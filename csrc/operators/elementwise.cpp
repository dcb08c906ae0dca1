// Passes over whole maps, for what no convolution can compute on the way: reductions for BatchNorm and
// squeeze-and-excitation, and the block's output.
#include "operators/partition.h"
#include "operators/rows.h"

namespace effnet {
namespace {

// The size of the panels that a reduction works on at a time, so that they stay in cache.
constexpr std::int64_t block_floats = 16 * 1024;

int threads_of(const Pixels& pixels, std::int64_t channels, const Execution& execution) {
  return threads_for(pixels.images * pixels.pixels * channels, execution.threads);
}

std::int64_t pixel_of(const Pixels& pixels, const Shard& shard) {
  return shard.group * pixels.group_rows() + shard.begin;
}

// Goes through the rows of all shards block by block: load() writes a block to panels, then reduce() is called for each
// of these. load() is also given memory for [channels]; reduce() the number of the shard's rows before this block and
// the panel's first channel.
template <class Load, class Reduce>
void for_blocks(const Pixels& pixels, std::int64_t channels, const Execution& execution, const Load& load,
                const Reduce& reduce) {
  const std::int64_t pitch = round_up(channels, panel_columns);
  const std::int64_t wanted = std::max<std::int64_t>(8, block_floats / pitch);
  const std::int64_t scratch = most_rows(pixels, wanted) * pitch + channels;
  const auto run = [&](std::int64_t index, float* panels) {
    const Shard shard = shard_of(pixels, index);
    const RowBlocks blocks(shard.rows(), wanted);
    for (std::int64_t begin = shard.begin; begin < shard.end; begin += blocks.rows) {
      const std::int64_t rows = std::min(blocks.rows, shard.end - begin);
      const std::int64_t pixel = shard.group * pixels.group_rows() + begin;
      load(shard, pixel, rows, panels, panels + most_rows(pixels, wanted) * pitch);
      for (std::int64_t panel = 0; panel * panel_columns < channels; ++panel) {
        reduce(shard, begin - shard.begin, pixel, rows, panel * panel_columns, columns_of(panel, channels),
               panels + panel * rows * panel_columns);
      }
    }
  };
  parallel_phases(threads_of(pixels, channels, execution), scratch, Phase<decltype(run)>{pixels.total_shards(), run});
}

// Adds a panel's sums, products or both to those of its shard; the first block of a shard overwrites them.
void add_sums(PanelSums call, const Kernels& kernels, bool first, float* sums, float* products) {
  alignas(64) float of_block[2][panel_columns] = {};
  call.sums = of_block[0];
  call.products = products != nullptr ? of_block[1] : nullptr;
  kernels.panel_sums_f32(call);
  for (std::int64_t c = 0; c < call.columns; ++c) {
    if (sums != nullptr) sums[c] = of_block[0][c] + (first ? 0.0f : sums[c]);
    if (products != nullptr) products[c] = of_block[1][c] + (first ? 0.0f : products[c]);
  }
}

}  // namespace

Pixels partition_pixels(std::int64_t images, std::int64_t pixels, bool by_image) {
  constexpr std::int64_t wanted_shards = 32, least_rows = 48;
  Pixels result{images, pixels, by_image ? images : 1, 1};
  result.shards =
      std::max<std::int64_t>(1, std::min(ceil_div(wanted_shards, result.groups), result.group_rows() / least_rows));
  return result;
}

void patches(std::int64_t images, const ConvShape& shape, const float* x, float* to, const Execution& execution) {
  const std::int64_t segment = shape.kernel * shape.channels, patch = shape.kernel * segment;
  const auto run = [&](std::int64_t index, float*) {
    const std::int64_t image = index / shape.out_height, y = index % shape.out_height;
    float* own = to + index * shape.out_width * patch;
    for (std::int64_t i = 0; i < shape.kernel; ++i) {
      const std::int64_t row = shape.in_row(y) + i;
      const bool inside = row >= 0 && row < shape.height;
      const float* from = x + (image * shape.height + (inside ? row : 0)) * shape.width * shape.channels;
      for (std::int64_t column = 0; column < shape.out_width; ++column) {
        float* segment_to = own + column * patch + i * segment;
        const std::int64_t first = column * shape.stride - shape.left;
        // Where the padding is wider than the kernel, a patch may lie outside of the map altogether.
        const std::int64_t begin = inside ? std::min(shape.kernel, std::max<std::int64_t>(0, -first)) : shape.kernel;
        const std::int64_t end = std::max(begin, std::min(shape.kernel, shape.width - first));
        std::int64_t at = 0;
        for (; at < begin * shape.channels; ++at) segment_to[at] = 0.0f;
        for (; at < end * shape.channels; ++at) segment_to[at] = from[first * shape.channels + at];
        for (; at < segment; ++at) segment_to[at] = 0.0f;
      }
    }
  };
  const std::int64_t rows = images * shape.out_height;
  const int threads = threads_for(rows * shape.out_width * patch, execution.threads);
  parallel_phases(threads, 0, Phase<decltype(run)>{rows, run});
}

void bn_act_add(const Pixels& pixels, std::int64_t channels, const float* x, const Prologue& prologue,
                const float* drop_path_scale, const float* residual, float* to, const Execution& execution) {
  const auto run = [&](std::int64_t index, float* factor) {
    const Shard shard = shard_of(pixels, index);
    const std::int64_t pixel = pixel_of(pixels, shard);
    ActivateRows call = activate_rows(prologue, shard.group, channels);
    call.factor = gate_times_drop_path(prologue.gate, drop_path_scale, shard.group, channels, factor);
    call.x = map_rows(x, pixel, channels);
    call.residual = map_rows(residual, pixel, channels);
    call.to = map_rows(to, pixel, channels);
    call.rows = shard.rows();
    execution.kernels.activate_rows_f32(call);
  };
  parallel_phases(threads_of(pixels, channels, execution), channels, Phase<decltype(run)>{pixels.total_shards(), run});
}

void pooled_sums(const Pixels& pixels, std::int64_t channels, const float* x, const Prologue& prologue,
                 const float* factor, float* sums, const Execution& execution) {
  const auto load = [&](const Shard& shard, std::int64_t pixel, std::int64_t rows, float* panels, float*) {
    ActivateRows call = activate_rows(prologue, shard.group, channels);
    call.x = map_rows(x, pixel, channels);
    call.to = panel_rows(panels, rows);
    call.rows = rows;
    execution.kernels.activate_rows_f32(call);
  };
  const auto reduce = [&](const Shard& shard, std::int64_t rows_before, std::int64_t pixel, std::int64_t rows,
                          std::int64_t channel, std::int64_t columns, const float* panel) {
    float* to = sums + shard.index * channels + channel;
    PanelSums call{panel, map_rows(factor, pixel, channels, channel), nullptr, rows, columns, nullptr, nullptr};
    add_sums(call, execution.kernels, rows_before == 0, factor == nullptr ? to : nullptr,
             factor == nullptr ? nullptr : to);
  };
  for_blocks(pixels, channels, execution, load, reduce);
}

void channel_statistics(const Pixels& pixels, std::int64_t channels, const float* y, float* partials,
                        const Execution& execution) {
  const auto load = [&](const Shard&, std::int64_t pixel, std::int64_t rows, float* panels, float*) {
    ActivateRows copy{};
    copy.x = map_rows(y, pixel, channels);
    copy.to = panel_rows(panels, rows);
    copy.rows = rows;
    copy.channels = channels;
    copy.fill = true;
    execution.kernels.activate_rows_f32(copy);
  };
  const auto reduce = [&](const Shard& shard, std::int64_t rows_before, std::int64_t, std::int64_t rows,
                          std::int64_t channel, std::int64_t columns, const float* panel) {
    float* to = partials + shard.index * 3 * channels + channel;
    alignas(64) float mean[panel_columns] = {}, m2[panel_columns] = {};
    if (rows_before > 0) {
      std::copy_n(to + channels, columns, mean);
      std::copy_n(to + 2 * channels, columns, m2);
    }
    execution.kernels.panel_statistics_f32({panel, panel_columns, rows, columns, rows_before, mean, m2});
    std::fill_n(to, columns, static_cast<float>(rows_before + rows));
    std::copy_n(mean, columns, to + channels);
    std::copy_n(m2, columns, to + 2 * channels);
  };
  for_blocks(pixels, channels, execution, load, reduce);
}

void gradient_sums(const Pixels& pixels, std::int64_t channels, const OutputGradient& gradient, const float* mean,
                   float* sums, const Execution& execution) {
  const auto load = [&](const Shard& shard, std::int64_t pixel, std::int64_t rows, float* panels, float* factor) {
    GradientRows call = gradient_rows(gradient, shard.group, channels, factor);
    call.grad = map_rows(gradient.grad, pixel, channels);
    call.y = map_rows(gradient.y, pixel, channels);
    call.alpha = call.beta = call.gamma = nullptr;
    call.to = panel_rows(panels, rows);
    call.rows = rows;
    execution.kernels.gradient_rows_f32(call);
  };
  const auto reduce = [&](const Shard& shard, std::int64_t rows_before, std::int64_t pixel, std::int64_t rows,
                          std::int64_t channel, std::int64_t columns, const float* panel) {
    float* to = sums + shard.index * 2 * channels + channel;
    PanelSums call{panel,  map_rows(gradient.y, pixel, channels, channel), mean + channel, rows, columns, nullptr,
                   nullptr};
    add_sums(call, execution.kernels, rows_before == 0, to, to + channels);
  };
  for_blocks(pixels, channels, execution, load, reduce);
}

void apply_gradient(const Pixels& pixels, std::int64_t channels, const OutputGradient& gradient, const float* residual,
                    float* to, const Execution& execution) {
  const auto run = [&](std::int64_t index, float* factor) {
    const Shard shard = shard_of(pixels, index);
    const std::int64_t pixel = pixel_of(pixels, shard);
    GradientRows call = gradient_rows(gradient, shard.group, channels, factor);
    call.grad = map_rows(gradient.grad, pixel, channels);
    call.y = map_rows(gradient.y, pixel, channels);
    call.residual = map_rows(residual, pixel, channels);
    call.to = map_rows(to, pixel, channels);
    call.rows = shard.rows();
    execution.kernels.gradient_rows_f32(call);
  };
  parallel_phases(threads_of(pixels, channels, execution), channels, Phase<decltype(run)>{pixels.total_shards(), run});
}

}  // namespace effnet
