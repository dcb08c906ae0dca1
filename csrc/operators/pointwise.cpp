// 1 x 1 convolutions: matrix products of blocks of rows that stay in the second-level cache.
//
// The prologue is applied while a block is copied to panels. Backward computes the output's gradient in the same way,
// once for both the product with the weights and the product with the activations.
#include "operators/partition.h"
#include "operators/rows.h"

namespace effnet {
namespace {

// The size of a block's panels, and the number of its rows: a few register tiles at least.
constexpr std::int64_t block_floats = 64 * 1024;
constexpr std::int64_t least_rows = 42, most_block_rows = 168;
// Work items of a forward call, at least: where there are fewer shards, the panels of outputs are divided as well.
constexpr std::int64_t least_forward_items = 16;
// Work items of a backward call, each of which has a weight gradient of its own, and the memory for all of these.
constexpr std::int64_t least_backward_items = 4, most_backward_items = 32, weight_gradients_floats = 2 * 1024 * 1024;

// The columns of a product that begins at a panel.
std::int64_t columns_at_once(std::int64_t panel, std::int64_t channels) {
  return std::min(panels_together * panel_columns, channels - panel * panel_columns);
}

std::int64_t block_rows(std::int64_t floats_per_row) {
  return std::max(least_rows, std::min(most_block_rows, block_floats / floats_per_row));
}

// Packs the weights of 16 outputs as a panel [channels, 16] of forward's right operand, and their bias [16], with the
// epilogue's scale and shift in both.
void pack_outputs(const PointwiseForward& call, std::int64_t panel, float* to, float* bias) {
  const std::int64_t columns = columns_of(panel, call.outputs), first = panel * panel_columns;
  const float* rows[panel_columns];
  float scales[panel_columns];
  for (std::int64_t j = 0; j < panel_columns; ++j) {
    // The last panel is filled up with zeros.
    const bool real = j < columns;
    const float scale = call.epilogue.scale != nullptr && real ? call.epilogue.scale[first + j] : 1.0f;
    const float shift = call.epilogue.shift != nullptr && real ? call.epilogue.shift[first + j] : 0.0f;
    bias[j] = real ? (call.bias != nullptr ? call.bias[first + j] : 0.0f) * scale + shift : 0.0f;
    rows[j] = call.weight + (real ? first + j : first) * call.channels;
    scales[j] = scale;
  }
  // Channel after channel: sixteen rows are read side by side, where a row at a time would write to every line of the
  // panel, sixteen times over.
  for (std::int64_t c = 0; c < call.channels; ++c, to += panel_columns) {
    for (std::int64_t j = 0; j < panel_columns; ++j) to[j] = j < columns ? rows[j][c] * scales[j] : 0.0f;
  }
}

// Makes rows in panels the left operand of a product.
void read_panels(Gemm<float>& gemm, const float* panels, std::int64_t rows, std::int64_t channels) {
  gemm.a = panels;
  gemm.a_row = panel_columns;
  gemm.a_segment = rows * panel_columns;
  gemm.segments = panels_of(channels);
  gemm.segment_length = panel_columns;
  gemm.k_tail_padding = gemm.segments * panel_columns - channels;
}

// Makes rows of a map or of panels the output of a product, with a residual as they are or null, and prefetches the rows
// of the map that they are for.
void write_product(Gemm<float>& gemm, const Rows& y, const float* residual, const Rows& map) {
  gemm.y = y.data;
  gemm.y_row = y.row;
  gemm.y_panel = y.panel;
  gemm.residual = residual;
  gemm.prefetch_dst = map.data;
  gemm.prefetch_dst_row = map.row;
}

// Copies the panels of a product to the map, where the product could not write there itself.
void store_panels(const Kernels& kernels, float* panels, std::int64_t rows, std::int64_t columns, const Rows& residual,
                  const Rows& to) {
  ActivateRows store{};
  store.x = panel_rows(panels, rows);
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
    const Prologue& prologue = call.prologue;
    has_prologue_ = prologue.scale != nullptr || prologue.gate != nullptr || prologue.act != Activation::none;
    wanted_rows_ = block_rows(round_up(call.channels, panel_columns));
    most_rows_ = most_rows(call.pixels, wanted_rows_);
    products_ = ceil_div(panels_, panels_together);
    product_groups_ = std::min(products_, ceil_div(least_forward_items, call.pixels.total_shards()));
    weights_ = Scratch(panels_ * call.channels * panel_columns);
    bias_ = Scratch(panels_ * panel_columns);
  }

  std::int64_t scratch_floats() const {
    const std::int64_t panels = has_prologue_ ? panels_of(call_.channels) : 0;
    return most_rows_ * (panels + panels_together) * panel_columns;
  }

  std::int64_t pack_items() const { return panels_; }
  void pack(std::int64_t panel) {
    pack_outputs(call_, panel, weights_.get() + panel * call_.channels * panel_columns,
                 bias_.get() + panel * panel_columns);
  }

  std::int64_t items() const { return call_.pixels.total_shards() * product_groups_; }

  void run(std::int64_t item, float* scratch) const {
    const Shard shard = shard_of(call_.pixels, item / product_groups_);
    const std::int64_t group = item % product_groups_;
    const std::int64_t first = products_ * group / product_groups_ * panels_together;
    const std::int64_t last = std::min(panels_, products_ * (group + 1) / product_groups_ * panels_together);
    clear_partials(shard, first, last);
    const RowBlocks blocks(shard.rows(), wanted_rows_);
    for (std::int64_t begin = shard.begin; begin < shard.end; begin += blocks.rows) {
      run_block(shard, begin, std::min(blocks.rows, shard.end - begin), first, last, scratch);
    }
  }

 private:
  float* partials(const Shard& shard, std::int64_t kind, std::int64_t panel) const {
    const std::int64_t kinds = call_.reduction == Reduction::statistics ? 3 : 1;
    return call_.partials + (shard.index * kinds + kind) * call_.outputs + panel * panel_columns;
  }

  void clear_partials(const Shard& shard, std::int64_t first, std::int64_t last) const {
    if (call_.reduction == Reduction::none) return;
    const std::int64_t kinds = call_.reduction == Reduction::statistics ? 3 : 1;
    for (std::int64_t panel = first; panel < last; ++panel) {
      for (std::int64_t kind = 0; kind < kinds; ++kind) {
        std::fill_n(partials(shard, kind, panel), columns_of(panel, call_.outputs), 0.0f);
      }
    }
  }

  void run_block(const Shard& shard, std::int64_t begin, std::int64_t rows, std::int64_t first_panel,
                 std::int64_t last_panel, float* scratch) const {
    const std::int64_t pixel = shard.group * call_.pixels.group_rows() + begin;
    float* panel_scratch = scratch;
    Gemm<float> gemm{};
    if (has_prologue_) {
      float* panels = scratch + most_rows_ * panels_together * panel_columns;
      ActivateRows load_x = activate_rows(call_.prologue, shard.group, call_.channels);
      load_x.x = map_rows(call_.x, pixel, call_.channels);
      load_x.to = panel_rows(panels, rows);
      load_x.rows = rows;
      kernels_.activate_rows_f32(load_x);
      read_panels(gemm, panels, rows, call_.channels);
    } else {
      gemm.a = call_.x + pixel * call_.channels;
      gemm.a_row = call_.channels;
      gemm.segments = 1;
      gemm.segment_length = call_.channels;
    }
    gemm.rows = rows;
    gemm.act = call_.epilogue.act;
    for (std::int64_t panel = first_panel; panel < last_panel; panel += panels_together) {
      alignas(64) float sums[panels_together * panel_columns] = {};
      gemm.b = weights_.get() + panel * call_.channels * panel_columns;
      gemm.bias = bias_.get() + panel * panel_columns;
      gemm.columns = columns_at_once(panel, call_.outputs);
      if (call_.reduction == Reduction::pooled_sums) {
        gemm.sums = sums;
        kernels_.f32.gemm_bias_act_residual_sum(gemm);
        for (std::int64_t c = 0; c < gemm.columns; ++c) partials(shard, 0, panel)[c] += sums[c];
        continue;
      }
      // The product writes 8 or 16 columns of a panel; any other number is written to panels and copied.
      const bool whole = gemm.columns % 8 == 0;
      const Rows to = map_rows(call_.y, pixel, call_.outputs, panel * panel_columns);
      const Rows residual = map_rows(call_.epilogue.residual, pixel, call_.outputs, panel * panel_columns);
      write_product(gemm, whole ? to : panel_rows(panel_scratch, rows), whole ? residual.data : nullptr, to);
      kernels_.f32.gemm_bias_act_residual_sum(gemm);
      if (call_.reduction == Reduction::statistics) {
        for (std::int64_t i = 0; i < panels_of(gemm.columns); ++i) {
          add_statistics(shard, begin - shard.begin, rows, panel + i, gemm.y + i * gemm.y_panel, gemm.y_row);
        }
      }
      if (!whole) store_panels(kernels_, panel_scratch, rows, gemm.columns, residual, to);
    }
  }

  void add_statistics(const Shard& shard, std::int64_t count, std::int64_t rows, std::int64_t panel,
                      const float* values, std::int64_t row) const {
    alignas(64) float mean[panel_columns], m2[panel_columns];
    const std::int64_t columns = columns_of(panel, call_.outputs);
    std::copy_n(partials(shard, 1, panel), columns, mean);
    std::copy_n(partials(shard, 2, panel), columns, m2);
    kernels_.panel_statistics_f32({values, row, rows, columns, count, mean, m2});
    std::fill_n(partials(shard, 0, panel), columns, static_cast<float>(count + rows));
    std::copy_n(mean, columns, partials(shard, 1, panel));
    std::copy_n(m2, columns, partials(shard, 2, panel));
  }

  const PointwiseForward& call_;
  const Kernels& kernels_;
  const std::int64_t panels_;
  bool has_prologue_ = false;
  std::int64_t wanted_rows_ = 1, most_rows_ = 1, products_ = 1, product_groups_ = 1;
  Scratch weights_, bias_;
};

class Backward {
 public:
  Backward(const PointwiseBackward& call, const Kernels& kernels)
      : call_(call), kernels_(kernels), in_panels_(panels_of(call.channels)), out_panels_(panels_of(call.outputs)) {
    wanted_rows_ = block_rows((in_panels_ + out_panels_) * panel_columns);
    most_rows_ = most_rows(call.pixels, wanted_rows_);
    items_ = call.pixels.total_shards();
    if (call.dweight != nullptr) {
      const std::int64_t most = weight_gradients_floats / (call.outputs * call.channels);
      std::int64_t power = least_backward_items;
      while (power * 2 <= std::min(most, most_backward_items)) power *= 2;
      items_ = std::min(items_, power);
      gradients_ = Scratch(items_ * gradient_floats());
    }
    if (call.dx != nullptr) weights_ = Scratch(in_panels_ * call.outputs * panel_columns);
  }

  std::int64_t scratch_floats() const {
    return most_rows_ * (in_panels_ + out_panels_ + panels_together) * panel_columns +
           (5 * in_panels_ + 1) * panel_columns + call_.outputs;
  }

  std::int64_t pack_items() const { return call_.dx != nullptr ? in_panels_ : 0; }
  // Packs the weights of 16 inputs as a panel [outputs, 16] of the right operand.
  void pack(std::int64_t panel) {
    float* to = weights_.get() + panel * call_.outputs * panel_columns;
    pack_panel(call_.weight, call_.outputs, call_.channels, panel, to);
  }

  std::int64_t items() const { return items_; }

  void run(std::int64_t item, float* scratch) const {
    const std::int64_t shards = call_.pixels.total_shards(), first = shards * item / items_;
    for (std::int64_t index = first; index < shards * (item + 1) / items_; ++index) {
      run_shard(item, shard_of(call_.pixels, index), index == first, scratch);
    }
  }

  std::int64_t merge_items() const { return call_.dweight != nullptr ? out_panels_ : 0; }

  // Adds up the gradients of 16 outputs' weights over the work items, in order.
  void merge(std::int64_t panel) const {
    const std::int64_t tile = panel_columns * panel_columns;
    for (std::int64_t in = 0; in < in_panels_; ++in) {
      alignas(64) float total[panel_columns * panel_columns];
      std::copy_n(gradients_.get() + (panel * in_panels_ + in) * tile, tile, total);
      for (std::int64_t item = 1; item < items_; ++item) {
        const float* gradient = gradients_.get() + item * gradient_floats() + (panel * in_panels_ + in) * tile;
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

  void run_shard(std::int64_t item, const Shard& shard, bool first, float* scratch) const {
    float* gradient_panels = scratch;
    float* input_panels = gradient_panels + most_rows_ * out_panels_ * panel_columns;
    float* product = input_panels + most_rows_ * in_panels_ * panel_columns;
    float* sums = product + most_rows_ * panels_together * panel_columns;
    float* factor = sums + 5 * in_panels_ * panel_columns;
    if (call_.sums != nullptr) std::fill_n(sums, 5 * in_panels_ * panel_columns, 0.0f);
    const RowBlocks blocks(shard.rows(), wanted_rows_);
    GradientRows load_gradient = gradient_rows(call_.gradient, shard.group, call_.outputs, factor);
    for (std::int64_t begin = shard.begin; begin < shard.end; begin += blocks.rows) {
      const std::int64_t rows = std::min(blocks.rows, shard.end - begin);
      const std::int64_t pixel = shard.group * call_.pixels.group_rows() + begin;
      load_gradient.grad = map_rows(call_.gradient.grad, pixel, call_.outputs);
      load_gradient.y = map_rows(call_.gradient.y, pixel, call_.outputs);
      load_gradient.to = panel_rows(gradient_panels, rows);
      load_gradient.rows = rows;
      load_gradient.fill = true;
      kernels_.gradient_rows_f32(load_gradient);
      if (call_.dweight != nullptr) {
        const bool accumulate = !first || begin > shard.begin;
        add_weight_gradient(item, shard, pixel, rows, accumulate, gradient_panels, input_panels);
      }
      if (call_.dx != nullptr) data_gradient(shard, pixel, rows, gradient_panels, product, sums);
    }
    if (call_.sums == nullptr) return;
    for (std::int64_t kind = 0; kind < 5; ++kind) {
      float* to = call_.sums + (shard.index * 5 + kind) * call_.channels;
      for (std::int64_t c = 0; c < call_.channels; ++c) {
        to[c] = sums[(c / panel_columns * 5 + kind) * panel_columns + c % panel_columns];
      }
    }
  }

  void add_weight_gradient(std::int64_t item, const Shard& shard, std::int64_t pixel, std::int64_t rows,
                           bool accumulate, const float* g, float* a) const {
    ActivateRows load_x = activate_rows(call_.prologue, shard.group, call_.channels);
    load_x.x = map_rows(call_.x, pixel, call_.channels);
    load_x.to = panel_rows(a, rows);
    load_x.rows = rows;
    load_x.fill = true;
    kernels_.activate_rows_f32(load_x);
    float* to = gradients_.get() + item * gradient_floats();
    for (std::int64_t out = 0; out < out_panels_; ++out) {
      for (std::int64_t in = 0; in < in_panels_; in += panels_together) {
        const std::int64_t panel = rows * panel_columns;
        kernels_.weight_gradient_f32({g + out * panel, a + in * panel, panel, rows, columns_of(out, call_.outputs),
                                      columns_at_once(in, call_.channels), to + in * panel_columns * panel_columns,
                                      accumulate});
      }
      to += in_panels_ * panel_columns * panel_columns;
    }
  }

  void data_gradient(const Shard& shard, std::int64_t pixel, std::int64_t rows, const float* g, float* product,
                     float* sums) const {
    Gemm<float> gemm{};
    read_panels(gemm, g, rows, call_.outputs);
    alignas(64) static const float no_bias[panels_together * panel_columns] = {};
    gemm.bias = no_bias;
    gemm.rows = rows;
    for (std::int64_t panel = 0; panel < in_panels_; panel += panels_together) {
      const std::int64_t column = panel * panel_columns;
      gemm.b = weights_.get() + panel * call_.outputs * panel_columns;
      gemm.columns = columns_at_once(panel, call_.channels);
      const Rows residual = map_rows(call_.residual, pixel, call_.channels, column);
      const Rows to = map_rows(call_.dx, pixel, call_.channels, column);
      const bool whole = call_.sums == nullptr && gemm.columns % 8 == 0;
      write_product(gemm, whole ? to : panel_rows(product, rows), whole ? residual.data : nullptr, to);
      kernels_.f32.gemm_bias_act_residual_sum(gemm);
      if (whole) continue;
      if (call_.sums == nullptr) {
        store_panels(kernels_, product, rows, gemm.columns, residual, to);
        continue;
      }
      for (std::int64_t i = 0; i < panels_of(gemm.columns); ++i) {
        through_prologue(shard, pixel, rows, panel + i, product + i * gemm.y_panel, sums);
      }
    }
  }

  // From the gradient dq [rows, 16] of one panel of the product's inputs to that of the raw input, with its sums.
  void through_prologue(const Shard& shard, std::int64_t pixel, std::int64_t rows, std::int64_t panel, const float* dq,
                        float* sums) const {
    const std::int64_t column = panel * panel_columns;
    ActGradPanel back = act_grad_panel(call_.prologue, call_.mean, shard.group, call_.channels, column);
    back.dq = dq;
    back.x = map_rows(call_.x, pixel, call_.channels, column);
    back.residual = map_rows(call_.residual, pixel, call_.channels, column);
    back.to = map_rows(call_.dx, pixel, call_.channels, column);
    back.rows = rows;
    back.apply_act_grad = call_.apply_act_grad;
    back.sums = sums + 5 * column;
    back.sum_kinds = 5;
    kernels_.act_grad_panel_f32(back);
  }

  const PointwiseBackward& call_;
  const Kernels& kernels_;
  const std::int64_t in_panels_, out_panels_;
  std::int64_t wanted_rows_ = 1, most_rows_ = 1, items_ = 1;
  Scratch weights_, gradients_;
};

}  // namespace

void pointwise_forward(const PointwiseForward& call, const Execution& execution) {
  Forward forward(call, execution.kernels);
  const std::int64_t rows = call.pixels.images * call.pixels.pixels;
  const int threads = threads_for(rows * (call.channels + call.outputs), execution.threads);
  parallel_phases(threads, forward.scratch_floats(),
                  Phase{forward.pack_items(), [&](std::int64_t item, float*) { forward.pack(item); }},
                  Phase{forward.items(), [&](std::int64_t item, float* scratch) { forward.run(item, scratch); }});
}

void pointwise_backward(const PointwiseBackward& call, const Execution& execution) {
  Backward backward(call, execution.kernels);
  const std::int64_t rows = call.pixels.images * call.pixels.pixels;
  const int threads = threads_for(rows * (call.channels + call.outputs), execution.threads);
  parallel_phases(threads, backward.scratch_floats(),
                  Phase{backward.pack_items(), [&](std::int64_t item, float*) { backward.pack(item); }},
                  Phase{backward.items(), [&](std::int64_t item, float* scratch) { backward.run(item, scratch); }},
                  Phase{backward.merge_items(), [&](std::int64_t item, float*) { backward.merge(item); }});
}

}  // namespace effnet
