// 1 x 1 convolutions of deferred activations: matrix products of blocks of rows that stay in the second-level cache.
//
// What is owed to a block is paid as it goes to panels; backward forms the output's gradient the same way, once, for the
// product with the weights and the one with the activations.
#include "operators/partition.h"
#include "operators/rows.h"

namespace effnet {
namespace {

// Panels of a block, and their rows: a few register tiles at least.
constexpr std::int64_t block_floats = 64 * 1024;
constexpr std::int64_t least_rows = 42, most_block_rows = 168;
// Parts that have weight gradients of their own, and the memory for those.
constexpr std::int64_t least_chunks = 4, most_chunks = 32, chunk_floats = 2 * 1024 * 1024;
// Units of a forward call at least: panels are dealt out too where rows are few.
constexpr std::int64_t least_units = 16;

std::int64_t panels_of(std::int64_t channels) { return ceil_div(channels, panel_columns); }

std::int64_t block_rows(std::int64_t floats_a_row) {
  return std::max(least_rows, std::min(most_block_rows, block_floats / floats_a_row));
}

// A panel of the forward product's right side: [channels, 16] of the weights of 16 outputs.
void pack_outputs(const PointwiseForward& call, std::int64_t panel, float* to, float* bias) {
  const std::int64_t columns = columns_of(panel, call.outputs), first = panel * panel_columns;
  for (std::int64_t j = 0; j < panel_columns; ++j) {
    const bool real = j < columns;
    const float scale = call.epilogue.scale != nullptr && real ? call.epilogue.scale[first + j] : 1.0f;
    const float shift = call.epilogue.shift != nullptr && real ? call.epilogue.shift[first + j] : 0.0f;
    bias[j] = real ? (call.bias != nullptr ? call.bias[first + j] : 0.0f) * scale + shift : 0.0f;
    const float* row = call.weight + (first + j) * call.channels;
    for (std::int64_t c = 0; c < call.channels; ++c) to[c * panel_columns + j] = real ? row[c] * scale : 0.0f;
  }
}

// The same of the product that goes back: [outputs, 16] of the weights of 16 inputs.
void pack_inputs(const PointwiseBackward& call, std::int64_t panel, float* to) {
  const std::int64_t columns = columns_of(panel, call.channels), first = panel * panel_columns;
  for (std::int64_t k = 0; k < call.outputs; ++k, to += panel_columns) {
    const float* row = call.weight + k * call.channels + first;
    for (std::int64_t j = 0; j < panel_columns; ++j) to[j] = j < columns ? row[j] : 0.0f;
  }
}

// Rows in panels as the left side of a product.
void read_panels(Gemm& gemm, const float* panels, std::int64_t rows, std::int64_t channels) {
  gemm.a = panels;
  gemm.a_row = panel_columns;
  gemm.a_segment = rows * panel_columns;
  gemm.segments = panels_of(channels);
  gemm.segment_length = panel_columns;
  gemm.k_tail_padding = gemm.segments * panel_columns - channels;
}

// A panel of a product to the map, where the product could not write there itself.
void store_panel(const Kernels& kernels, float* panel, std::int64_t rows, std::int64_t columns, const Rows& residual,
                 const Rows& to) {
  ActivateRows store{};
  store.x = panel_rows(panel, rows);
  store.residual = residual;
  store.to = to;
  store.rows = rows;
  store.channels = columns;
  kernels.activate_rows_f32(store);
}

class Forward {
 public:
  Forward(const PointwiseForward& call, const Kernels& kernels)
      : call_(call), kernels_(kernels), panels_(panels_of(call.outputs)) {
    const Prologue& owed = call.prologue;
    pays_ = owed.scale != nullptr || owed.gate != nullptr || owed.act != Activation::none;
    wanted_ = block_rows(round_up(call.channels, panel_columns));
    most_ = most_rows(call.pixels, wanted_);
    groups_ = std::min(panels_, ceil_div(least_units, call.pixels.count()));
    weights_ = Scratch(panels_ * call.channels * panel_columns);
    bias_ = Scratch(panels_ * panel_columns);
  }

  std::int64_t scratch_floats() const {
    return (pays_ ? most_ * round_up(call_.channels, panel_columns) : 0) + most_ * panel_columns;
  }

  std::int64_t pack_units() const { return panels_; }
  void pack(std::int64_t panel) {
    pack_outputs(call_, panel, weights_.get() + panel * call_.channels * panel_columns, bias_.get() + panel * panel_columns);
  }

  std::int64_t units() const { return call_.pixels.count() * groups_; }

  void run(std::int64_t unit, float* scratch) const {
    const Part part = part_of(call_.pixels, unit / groups_);
    const std::int64_t group = unit % groups_;
    const std::int64_t first = panels_ * group / groups_, last = panels_ * (group + 1) / groups_;
    begin(part, first, last);
    const Blocks blocks(part.rows(), wanted_);
    for (std::int64_t begin = part.begin; begin < part.end; begin += blocks.rows) {
      run_block(part, begin, std::min(blocks.rows, part.end - begin), first, last, scratch);
    }
  }

 private:
  float* partials(const Part& part, std::int64_t kind, std::int64_t panel) const {
    const std::int64_t kinds = call_.reduction == Reduction::statistics ? 3 : 1;
    return call_.partials + (part.index * kinds + kind) * call_.outputs + panel * panel_columns;
  }

  void begin(const Part& part, std::int64_t first, std::int64_t last) const {
    if (call_.reduction == Reduction::none) return;
    const std::int64_t kinds = call_.reduction == Reduction::statistics ? 3 : 1;
    for (std::int64_t panel = first; panel < last; ++panel) {
      for (std::int64_t kind = 0; kind < kinds; ++kind) {
        std::fill_n(partials(part, kind, panel), columns_of(panel, call_.outputs), 0.0f);
      }
    }
  }

  void run_block(const Part& part, std::int64_t begin, std::int64_t rows, std::int64_t first_panel,
                 std::int64_t last_panel, float* scratch) const {
    const std::int64_t pixel = part.group * call_.pixels.group_rows() + begin;
    float* panel_scratch = scratch;
    Gemm gemm{};
    if (pays_) {
      float* panels = scratch + most_ * panel_columns;
      ActivateRows pay = activate_rows(call_.prologue, part.group, call_.channels);
      pay.x = map_rows(call_.x, pixel, call_.channels);
      pay.to = panel_rows(panels, rows);
      pay.rows = rows;
      kernels_.activate_rows_f32(pay);
      read_panels(gemm, panels, rows, call_.channels);
    } else {
      gemm.a = call_.x + pixel * call_.channels;
      gemm.a_row = call_.channels;
      gemm.segments = 1;
      gemm.segment_length = call_.channels;
    }
    gemm.rows = rows;
    gemm.act = call_.epilogue.act;
    for (std::int64_t panel = first_panel; panel < last_panel; ++panel) {
      alignas(64) float sums[panel_columns] = {};
      gemm.b = weights_.get() + panel * call_.channels * panel_columns;
      gemm.bias = bias_.get() + panel * panel_columns;
      gemm.columns = columns_of(panel, call_.outputs);
      if (call_.reduction == Reduction::pool) {
        gemm.sums = sums;
        kernels_.gemm_f32_bias_act_residual_sum(gemm);
        for (std::int64_t c = 0; c < gemm.columns; ++c) partials(part, 0, panel)[c] += sums[c];
        continue;
      }
      // The product writes 8 or 16 columns: others go by way of a panel.
      const bool whole = gemm.columns % 8 == 0;
      const Rows to = map_rows(call_.y, pixel, call_.outputs, panel * panel_columns);
      const Rows residual = map_rows(call_.epilogue.residual, pixel, call_.outputs, panel * panel_columns);
      gemm.y = whole ? to.data : panel_scratch;
      gemm.y_row = whole ? to.row : panel_columns;
      gemm.residual = whole ? residual.data : nullptr;
      gemm.prefetch_dst = to.data;
      gemm.prefetch_dst_row = to.row;
      kernels_.gemm_f32_bias_act_residual_sum(gemm);
      if (call_.reduction == Reduction::statistics) {
        add_statistics(part, begin - part.begin, rows, panel, gemm.y, gemm.y_row);
      }
      if (!whole) store_panel(kernels_, panel_scratch, rows, gemm.columns, residual, to);
    }
  }

  void add_statistics(const Part& part, std::int64_t count, std::int64_t rows, std::int64_t panel,
                      const float* values, std::int64_t row) const {
    alignas(64) float mean[panel_columns], m2[panel_columns];
    const std::int64_t columns = columns_of(panel, call_.outputs);
    std::copy_n(partials(part, 1, panel), columns, mean);
    std::copy_n(partials(part, 2, panel), columns, m2);
    kernels_.panel_statistics_f32({values, row, rows, columns, count, mean, m2});
    std::fill_n(partials(part, 0, panel), columns, static_cast<float>(count + rows));
    std::copy_n(mean, columns, partials(part, 1, panel));
    std::copy_n(m2, columns, partials(part, 2, panel));
  }

  const PointwiseForward& call_;
  const Kernels& kernels_;
  const std::int64_t panels_;
  bool pays_ = false;
  std::int64_t wanted_ = 1, most_ = 1, groups_ = 1;
  Scratch weights_, bias_;
};

class Backward {
 public:
  Backward(const PointwiseBackward& call, const Kernels& kernels)
      : call_(call), kernels_(kernels), in_panels_(panels_of(call.channels)), out_panels_(panels_of(call.outputs)) {
    wanted_ = block_rows((in_panels_ + out_panels_) * panel_columns);
    most_ = most_rows(call.pixels, wanted_);
    chunks_ = call.pixels.count();
    if (call.dweight != nullptr) {
      const std::int64_t most = chunk_floats / (call.outputs * call.channels);
      std::int64_t power = least_chunks;
      while (power * 2 <= std::min(most, most_chunks)) power *= 2;
      chunks_ = std::min(chunks_, power);
      gradients_ = Scratch(chunks_ * gradient_floats());
    }
    if (call.dx != nullptr) weights_ = Scratch(in_panels_ * call.outputs * panel_columns);
  }

  std::int64_t scratch_floats() const {
    return most_ * (in_panels_ + out_panels_ + 1) * panel_columns + (5 * in_panels_ + 1) * panel_columns + call_.outputs;
  }

  std::int64_t pack_units() const { return call_.dx != nullptr ? in_panels_ : 0; }
  void pack(std::int64_t panel) { pack_inputs(call_, panel, weights_.get() + panel * call_.outputs * panel_columns); }

  std::int64_t units() const { return chunks_; }

  void run(std::int64_t chunk, float* scratch) const {
    const std::int64_t parts = call_.pixels.count(), first = parts * chunk / chunks_;
    for (std::int64_t index = first; index < parts * (chunk + 1) / chunks_; ++index) {
      run_part(chunk, part_of(call_.pixels, index), index == first, scratch);
    }
  }

  std::int64_t merge_units() const { return call_.dweight != nullptr ? out_panels_ : 0; }

  // The sum over the chunks, in order, of the gradients of 16 outputs' weights.
  void merge(std::int64_t panel) const {
    const std::int64_t tile = panel_columns * panel_columns;
    for (std::int64_t in = 0; in < in_panels_; ++in) {
      alignas(64) float total[panel_columns * panel_columns];
      std::copy_n(gradients_.get() + (panel * in_panels_ + in) * tile, tile, total);
      for (std::int64_t chunk = 1; chunk < chunks_; ++chunk) {
        const float* gradient = gradients_.get() + chunk * gradient_floats() + (panel * in_panels_ + in) * tile;
        for (std::int64_t i = 0; i < tile; ++i) total[i] += gradient[i];
      }
      for (std::int64_t k = 0; k < columns_of(panel, call_.outputs); ++k) {
        float* to = call_.dweight + (panel * panel_columns + k) * call_.channels + in * panel_columns;
        std::copy_n(total + k * panel_columns, columns_of(in, call_.channels), to);
      }
    }
  }

 private:
  std::int64_t gradient_floats() const { return in_panels_ * out_panels_ * panel_columns * panel_columns; }

  void run_part(std::int64_t chunk, const Part& part, bool first, float* scratch) const {
    float* gradient_panels = scratch;
    float* input_panels = gradient_panels + most_ * out_panels_ * panel_columns;
    float* product = input_panels + most_ * in_panels_ * panel_columns;
    float* sums = product + most_ * panel_columns;
    float* factor = sums + 5 * in_panels_ * panel_columns;
    if (call_.sums != nullptr) std::fill_n(sums, 5 * in_panels_ * panel_columns, 0.0f);
    const Blocks blocks(part.rows(), wanted_);
    GradientRows load = gradient_rows(call_.gradient, part.group, call_.outputs, factor);
    for (std::int64_t begin = part.begin; begin < part.end; begin += blocks.rows) {
      const std::int64_t rows = std::min(blocks.rows, part.end - begin);
      const std::int64_t pixel = part.group * call_.pixels.group_rows() + begin;
      load.grad = map_rows(call_.gradient.grad, pixel, call_.outputs);
      load.y = map_rows(call_.gradient.y, pixel, call_.outputs);
      load.to = panel_rows(gradient_panels, rows);
      load.rows = rows;
      load.fill = true;
      kernels_.gradient_rows_f32(load);
      if (call_.dweight != nullptr) {
        const bool adds = !first || begin > part.begin;
        add_weight_gradient(chunk, part, pixel, rows, adds, gradient_panels, input_panels);
      }
      if (call_.dx != nullptr) go_back(part, pixel, rows, gradient_panels, product, sums);
    }
    if (call_.sums == nullptr) return;
    for (std::int64_t kind = 0; kind < 5; ++kind) {
      float* to = call_.sums + (part.index * 5 + kind) * call_.channels;
      for (std::int64_t c = 0; c < call_.channels; ++c) {
        to[c] = sums[(c / panel_columns * 5 + kind) * panel_columns + c % panel_columns];
      }
    }
  }

  void add_weight_gradient(std::int64_t chunk, const Part& part, std::int64_t pixel, std::int64_t rows, bool adds,
                           const float* g, float* a) const {
    ActivateRows pay = activate_rows(call_.prologue, part.group, call_.channels);
    pay.x = map_rows(call_.x, pixel, call_.channels);
    pay.to = panel_rows(a, rows);
    pay.rows = rows;
    pay.fill = true;
    kernels_.activate_rows_f32(pay);
    float* to = gradients_.get() + chunk * gradient_floats();
    for (std::int64_t out = 0; out < out_panels_; ++out) {
      for (std::int64_t in = 0; in < in_panels_; ++in, to += panel_columns * panel_columns) {
        kernels_.weight_gradient_f32({g + out * rows * panel_columns, a + in * rows * panel_columns, rows,
                                      columns_of(out, call_.outputs), columns_of(in, call_.channels), to, adds});
      }
    }
  }

  void go_back(const Part& part, std::int64_t pixel, std::int64_t rows, const float* g, float* product,
               float* sums) const {
    Gemm gemm{};
    read_panels(gemm, g, rows, call_.outputs);
    alignas(64) static const float no_bias[panel_columns] = {};
    gemm.bias = no_bias;
    gemm.rows = rows;
    for (std::int64_t panel = 0; panel < in_panels_; ++panel) {
      const std::int64_t column = panel * panel_columns;
      gemm.b = weights_.get() + panel * call_.outputs * panel_columns;
      gemm.columns = columns_of(panel, call_.channels);
      const Rows residual = map_rows(call_.residual, pixel, call_.channels, column);
      const Rows to = map_rows(call_.dx, pixel, call_.channels, column);
      const bool whole = call_.sums == nullptr && gemm.columns % 8 == 0;
      gemm.y = whole ? to.data : product;
      gemm.y_row = whole ? to.row : panel_columns;
      gemm.residual = whole ? residual.data : nullptr;
      gemm.prefetch_dst = to.data;
      gemm.prefetch_dst_row = to.row;
      kernels_.gemm_f32_bias_act_residual_sum(gemm);
      if (whole) continue;
      if (call_.sums == nullptr) {
        store_panel(kernels_, product, rows, gemm.columns, residual, to);
        continue;
      }
      ActGradPanel through{};
      through.dq = product;
      through.x = map_rows(call_.x, pixel, call_.channels, column);
      through.residual = residual;
      through.to = to;
      through.scale = offset(call_.prologue.scale, column);
      through.shift = offset(call_.prologue.shift, column);
      through.mean = offset(call_.mean, column);
      through.gate = offset(call_.prologue.gate, part.group * call_.channels + column);
      through.rows = rows;
      through.columns = gemm.columns;
      through.apply_act_grad = call_.through;
      through.sums = sums + 5 * column;
      through.sum_kinds = 5;
      through.act = call_.prologue.act;
      kernels_.act_grad_panel_f32(through);
    }
  }

  const PointwiseBackward& call_;
  const Kernels& kernels_;
  const std::int64_t in_panels_, out_panels_;
  std::int64_t wanted_ = 1, most_ = 1, chunks_ = 1;
  Scratch weights_, gradients_;
};

}  // namespace

void pointwise_forward(const PointwiseForward& call, const Execution& execution) {
  Forward forward(call, execution.kernels);
  const std::int64_t rows = call.pixels.images * call.pixels.pixels;
  const int threads = threads_for(rows * (call.channels + call.outputs), execution.threads);
  parallel_phases(threads, forward.scratch_floats(),
                  Phase{forward.pack_units(), [&](std::int64_t unit, float*) { forward.pack(unit); }},
                  Phase{forward.units(), [&](std::int64_t unit, float* scratch) { forward.run(unit, scratch); }});
}

void pointwise_backward(const PointwiseBackward& call, const Execution& execution) {
  Backward backward(call, execution.kernels);
  const std::int64_t rows = call.pixels.images * call.pixels.pixels;
  const int threads = threads_for(rows * (call.channels + call.outputs), execution.threads);
  parallel_phases(threads, backward.scratch_floats(),
                  Phase{backward.pack_units(), [&](std::int64_t unit, float*) { backward.pack(unit); }},
                  Phase{backward.units(), [&](std::int64_t unit, float* scratch) { backward.run(unit, scratch); }},
                  Phase{backward.merge_units(), [&](std::int64_t unit, float*) { backward.merge(unit); }});
}

}  // namespace effnet
