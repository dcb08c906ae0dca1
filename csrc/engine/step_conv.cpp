// Steps that are matrix products: 1 x 1 and dense convolutions, and the layers of squeeze-and-excitation.
#include <algorithm>

#include "engine/bf16.h"
#include "engine/copy_rows.h"
#include "engine/step.h"

namespace effnet {
namespace {

// The size of a block of rows of the input, which stays in the second-level cache while the panels of the weights are
// read.
constexpr std::int64_t block_bytes = 384 * 1024;
constexpr std::int64_t least_rows = 28;
constexpr std::int64_t items_per_thread = 8;

// How a matrix product is divided into work items: one group of panels of one block of rows each.
struct Blocks {
  std::int64_t count, rows;           // blocks of so many rows; the last one may be shorter
  std::int64_t panel_groups, panels;  // groups of so many panels; the last one may be smaller
};

// For rows of so many bytes.
Blocks divide(std::int64_t rows, std::int64_t row_bytes, std::int64_t panels, std::int64_t images, int threads) {
  const std::int64_t wanted = wanted_items(items_per_thread, images, threads);
  Blocks blocks;
  blocks.rows = std::max(least_rows, std::min(block_bytes / row_bytes, rows / wanted));
  blocks.count = std::max<std::int64_t>(1, rows / blocks.rows);
  blocks.rows = ceil_div(rows, blocks.count);
  blocks.count = ceil_div(rows, blocks.rows);
  const std::int64_t pairs = ceil_div(panels, panels_together);
  blocks.panel_groups = std::min(pairs, ceil_div(wanted, blocks.count));
  blocks.panels = ceil_div(pairs, blocks.panel_groups) * panels_together;
  blocks.panel_groups = ceil_div(panels, blocks.panels);
  return blocks;
}

template <class T>
class PointwiseStep final : public Step {
 public:
  PointwiseStep(const Layer& layer, const Place& x, const Place& y, const std::optional<Place>& residual,
                std::int64_t scaled)
      : Step(std::string(layer.spec.pool ? "pointwise and pool " : "pointwise ") +
             std::to_string(layer.spec.in_channels) + " to " + std::to_string(layer.spec.out_channels) + " at " +
             std::to_string(x.height) + "x" + std::to_string(x.width)),
        layer_(layer), x_(x), y_(y), residual_(residual), scaled_(scaled) {}

  std::int64_t items(const Run& run) const override {
    const Blocks blocks = blocks_of(run);
    return groups(run) * blocks.count * blocks.panel_groups;
  }

  std::int64_t multiply_adds() const override {
    return x_.pixels() * layer_.spec.in_channels * layer_.spec.out_channels;
  }

  void run_item(const Run& run, std::int64_t item, float*) const override {
    const Blocks blocks = blocks_of(run);
    const std::int64_t group = item / (blocks.count * blocks.panel_groups);
    const std::int64_t panel_group = item / blocks.count % blocks.panel_groups;
    const std::int64_t begin = item % blocks.count * blocks.rows;
    const std::int64_t rows = std::min(blocks.rows, group_rows(run) - begin);
    const std::int64_t first = group * x_.pixels() + begin;
    Gemm<T> gemm{};
    gemm.a = run.at<T>(x_) + first * x_.pitch();
    gemm.a_row = x_.pitch();
    gemm.segments = 1;
    gemm.segment_length = layer_.matrix.inner;
    gemm.y_row = y_.pitch();
    gemm.y_panel = panel_columns;
    gemm.rows = rows;
    gemm.row_by_row = x_.pixels() == 1;
    gemm.act = layer_.spec.act;
    const std::int64_t end = std::min(layer_.matrix.panel_count(), (panel_group + 1) * blocks.panels);
    for (std::int64_t panel = panel_group * blocks.panels; panel < end; panel += panels_together) {
      const std::int64_t column = panel * panel_columns;
      gemm.b = layer_.matrix.template panel<T>(panel);
      if (scaled_ != absent) {
        gemm.b = run.at<T>(scaled_ + group * layer_.matrix.floats() + panel * layer_.matrix.panel_floats);
      }
      gemm.bias = layer_.matrix.bias.get() + column;
      gemm.columns = layer_.matrix.columns(panel, std::min(panels_together, end - panel));
      if (layer_.spec.pool) {
        pool(run, gemm, run.at<T>(y_) + group * y_.pitch() + column);
        continue;
      }
      gemm.y = run.at<T>(y_) + first * y_.pitch() + column;
      if (residual_) gemm.residual = run.at<T>(*residual_) + first * y_.pitch() + column;
      run.kernels.of<T>().gemm_bias_act_residual_sum(gemm);
    }
  }

 private:
  // Each image is a group of its own if it has its own weights, or if it is pooled.
  bool by_image() const { return scaled_ != absent || layer_.spec.pool; }
  std::int64_t groups(const Run& run) const { return by_image() ? run.images : 1; }
  std::int64_t group_rows(const Run& run) const { return by_image() ? x_.pixels() : run.images * x_.pixels(); }

  Blocks blocks_of(const Run& run) const {
    const std::int64_t row_bytes = layer_.matrix.inner * size_of(type_of<T>);
    Blocks blocks = divide(group_rows(run), row_bytes, layer_.matrix.panel_count(), groups(run), run.threads);
    // One work item sees all the pixels of its panels, so that it can compute their mean.
    if (layer_.spec.pool && blocks.count > 1) {
      blocks.count = 1;
      blocks.rows = x_.pixels();
      blocks.panels = panels_together;
      blocks.panel_groups = ceil_div(layer_.matrix.panel_count(), panels_together);
    }
    return blocks;
  }

  void pool(const Run& run, Gemm<T>& gemm, T* mean) const {
    alignas(64) float sums[panels_together * panel_columns] = {};
    gemm.sums = sums;
    run.kernels.of<T>().gemm_bias_act_residual_sum(gemm);
    for (std::int64_t c = 0; c < gemm.columns; ++c) mean[c] = convert<T>(sums[c] / static_cast<float>(x_.pixels()));
  }

  const Layer& layer_;
  const Place x_, y_;
  const std::optional<Place> residual_;
  const std::int64_t scaled_;
};

template <class T>
class DenseStep final : public Step {
 public:
  DenseStep(const Layer& layer, const Place& x, const Place& y, const std::optional<Place>& residual)
      : Step("dense " + std::to_string(layer.spec.kernel) + "x" + std::to_string(layer.spec.kernel) + " " +
             std::to_string(layer.spec.in_channels) + " to " + std::to_string(layer.spec.out_channels) + " at " +
             std::to_string(x.height) + "x" + std::to_string(x.width)),
        layer_(layer), x_(x), y_(y), residual_(residual), shape_(conv_shape(layer.spec, x.height, x.width)),
        pixel_(padded_channels(type_of<T>, layer.spec.in_channels)), pitch_(shape_.padded_width() * pixel_) {
    const std::int64_t rows = std::max<std::int64_t>(1, block_bytes / (pitch_ * size_of(type_of<T>)) - shape_.kernel);
    most_rows_ = std::min(y.height, std::max<std::int64_t>(1, rows / shape_.stride));
  }

  std::int64_t items(const Run& run) const override { return run.images * ceil_div(y_.height, rows_per_item(run)); }

  std::int64_t scratch_floats() const override {
    const std::int64_t numbers = ((most_rows_ - 1) * shape_.stride + shape_.kernel) * pitch_;
    return ceil_div(numbers * size_of(type_of<T>), size_of(Type::f32));
  }

  std::int64_t multiply_adds() const override { return y_.pixels() * layer_.matrix.inner * layer_.spec.out_channels; }

  void run_item(const Run& run, std::int64_t item, float* scratch) const override {
    const std::int64_t items_per_image = ceil_div(y_.height, rows_per_item(run));
    const std::int64_t image = item / items_per_image, begin = item % items_per_image * rows_per_item(run);
    const std::int64_t end = std::min(y_.height, begin + rows_per_item(run));
    const std::int64_t rows = (end - begin - 1) * shape_.stride + shape_.kernel;
    T* padded = reinterpret_cast<T*>(scratch);
    copy_padded_rows(run.map(x_), image, shape_, shape_.in_row(begin), rows, padded);
    Gemm<T> gemm{};
    gemm.a_row = shape_.stride * pixel_;
    gemm.a_segment = pitch_;
    gemm.segments = shape_.kernel;
    gemm.segment_length = shape_.kernel * pixel_;
    gemm.y_row = y_.pitch();
    gemm.y_panel = panel_columns;
    gemm.rows = y_.width;
    gemm.act = layer_.spec.act;
    for (std::int64_t panel = 0; panel < layer_.matrix.panel_count(); panel += panels_together) {
      gemm.b = layer_.matrix.template panel<T>(panel);
      gemm.bias = layer_.matrix.bias.get() + panel * panel_columns;
      gemm.columns = layer_.matrix.columns(panel, panels_together);
      for (std::int64_t row = begin; row < end; ++row) {
        const std::int64_t at = (image * y_.pixels() + row * y_.width) * y_.pitch() + panel * panel_columns;
        gemm.a = padded + (row - begin) * shape_.stride * pitch_;
        gemm.y = run.at<T>(y_) + at;
        gemm.residual = residual_ ? run.at<T>(*residual_) + at : nullptr;
        run.kernels.of<T>().gemm_bias_act_residual_sum(gemm);
      }
    }
  }

 private:
  std::int64_t rows_per_item(const Run& run) const {
    const std::int64_t wanted = wanted_items(items_per_thread, run.images, run.threads);
    return std::max<std::int64_t>(1, std::min(most_rows_, y_.height / wanted));
  }

  const Layer& layer_;
  const Place x_, y_;
  const std::optional<Place> residual_;
  const ConvShape shape_;
  const std::int64_t pixel_, pitch_;  // numbers of a pixel and of a padded row
  std::int64_t most_rows_;
};

template <class T>
class SumStep final : public Step {
 public:
  SumStep(const Place& map, std::int64_t sums) : Step("sum"), map_(map), sums_(sums) {}

  std::int64_t items(const Run& run) const override { return run.images * sum_shards; }

  void run_item(const Run& run, std::int64_t item, float*) const override {
    const std::int64_t image = item / sum_shards, shard = item % sum_shards;
    const std::int64_t begin = map_.pixels() * shard / sum_shards, end = map_.pixels() * (shard + 1) / sum_shards;
    float* sums = run.at(sums_) + item * map_.vector();
    std::fill(sums, sums + map_.vector(), 0.0f);
    const T* pixel = run.at<T>(map_) + (image * map_.pixels() + begin) * map_.pitch();
    for (std::int64_t i = begin; i < end; ++i, pixel += map_.pitch()) {
      for (std::int64_t c = 0; c < map_.channels; ++c) sums[c] += convert<float>(pixel[c]);
    }
  }

 private:
  const Place map_;
  const std::int64_t sums_;
};

class SqueezeStep final : public Step {
 public:
  SqueezeStep(const Layer& layer, const Place& map, std::int64_t sums, std::int64_t hidden, std::int64_t images)
      : Step("squeeze"), layer_(layer), map_(map), sums_(sums), hidden_(hidden), images_(images) {}

  std::int64_t items(const Run&) const override { return layer_.reduce.panel_count(); }

  std::int64_t scratch_floats() const override { return images_ * map_.vector(); }

  std::int64_t multiply_adds() const override { return layer_.reduce.inner * layer_.reduce.out; }

  void run_item(const Run& run, std::int64_t item, float* scratch) const override {
    const std::int64_t vector = map_.vector(), channels = layer_.reduce.inner;
    const float inverse = 1.0f / static_cast<float>(map_.pixels());
    for (std::int64_t image = 0; image < run.images; ++image) {
      const float* sums = run.at(sums_) + image * sum_shards * vector;
      for (std::int64_t c = 0; c < channels; ++c) {
        float total = 0;
        for (std::int64_t shard = 0; shard < sum_shards; ++shard) total += sums[shard * vector + c];
        scratch[image * vector + c] = total * inverse;
      }
    }
    Gemm<float> gemm{};
    gemm.a = scratch;
    gemm.a_row = vector;
    gemm.segments = 1;
    gemm.segment_length = layer_.reduce.inner;
    gemm.b = layer_.reduce.panel<float>(item);
    gemm.bias = layer_.reduce.bias.get() + item * panel_columns;
    gemm.columns = layer_.reduce.columns(item);
    gemm.y_row = round_up(layer_.reduce.out, panel_columns);
    gemm.y = run.at(hidden_) + item * panel_columns;
    gemm.rows = run.images;
    gemm.row_by_row = true;
    gemm.act = layer_.spec.excitation.act;
    run.kernels.f32.gemm_bias_act_residual_sum(gemm);
  }

 private:
  const Layer& layer_;
  const Place map_;
  const std::int64_t sums_, hidden_;
  const std::int64_t images_;
};

template <class T>
class ExciteStep final : public Step {
 public:
  ExciteStep(const Layer& layer, const Place& map, std::int64_t hidden, std::int64_t gate, const Layer* next,
             std::int64_t scaled)
      : Step("excite"), layer_(layer), map_(map), hidden_(hidden), gate_(gate), next_(next), scaled_(scaled) {}

  // A work item has several panels, because one takes only a fraction of a microsecond.
  std::int64_t items(const Run&) const override { return ceil_div(layer_.expand.panel_count(), panels_per_item); }

  std::int64_t multiply_adds() const override { return layer_.expand.inner * layer_.expand.out; }

  void run_item(const Run& run, std::int64_t item, float*) const override {
    const std::int64_t vector = map_.vector();
    const std::int64_t end = std::min(layer_.expand.panel_count(), (item + 1) * panels_per_item);
    Gemm<float> gemm{};
    gemm.a = run.at(hidden_);
    gemm.a_row = round_up(layer_.expand.inner, panel_columns);
    gemm.segments = 1;
    gemm.segment_length = layer_.expand.inner;
    gemm.y_row = vector;
    gemm.rows = run.images;
    gemm.row_by_row = true;
    for (std::int64_t panel = item * panels_per_item; panel < end; ++panel) {
      const std::int64_t column = panel * panel_columns;
      gemm.b = layer_.expand.panel<float>(panel);
      gemm.bias = layer_.expand.bias.get() + column;
      gemm.columns = layer_.expand.columns(panel);
      gemm.y = run.at(gate_) + column;
      run.kernels.f32.gemm_bias_act_residual_sum(gemm);
      for (std::int64_t image = 0; image < run.images; ++image) {
        run.kernels.gate_f32(run.at(gate_) + image * vector + column, gemm.columns, layer_.spec.excitation.gate);
      }
    }
    if (next_ == nullptr) return;
    const std::int64_t first = item * panels_per_item * panel_columns;
    const std::int64_t count = std::min(layer_.expand.out - first, panels_per_item * panel_columns);
    for (std::int64_t image = 0; image < run.images; ++image) {
      scale_weights(run, first, count, run.at(gate_) + image * vector + first,
                    scaled_ + image * next_->matrix.floats());
    }
  }

 private:
  static constexpr std::int64_t panels_per_item = 4;

  // Scales the next layer's weights of these input channels, in all its panels.
  void scale_weights(const Run& run, std::int64_t first, std::int64_t count, const float* gate, std::int64_t to) const {
    const PackedMatrix& matrix = next_->matrix;
    for (std::int64_t panel = 0; panel < matrix.panel_count(); ++panel) {
      const std::int64_t offset = first * panel_columns;
      run.kernels.of<T>().scale_panel(matrix.template panel<T>(panel) + offset, gate,
                                      run.at<T>(to + panel * matrix.panel_floats) + offset, count);
    }
  }

  const Layer& layer_;
  const Place map_;
  const std::int64_t hidden_, gate_;
  const Layer* next_;
  const std::int64_t scaled_;
};

template <class T>
class ScaleStep final : public Step {
 public:
  ScaleStep(const Place& map, std::int64_t gate) : Step("scale"), map_(map), gate_(gate) {}

  std::int64_t items(const Run& run) const override { return run.images * map_.height; }

  void run_item(const Run& run, std::int64_t item, float*) const override {
    T* row = run.at<T>(map_) + item * map_.width * map_.pitch();
    const float* gate = run.at(gate_) + item / map_.height * map_.vector();
    run.kernels.of<T>().scale_rows(row, map_.pitch(), gate, row, map_.pitch(), map_.width, map_.channels);
  }

 private:
  const Place map_;
  const std::int64_t gate_;
};

}  // namespace

template <class T>
std::unique_ptr<Step> pointwise_step(const Layer& layer, const Place& x, const Place& y,
                                     const std::optional<Place>& residual, std::int64_t scaled) {
  return std::make_unique<PointwiseStep<T>>(layer, x, y, residual, scaled);
}

template <class T>
std::unique_ptr<Step> dense_step(const Layer& layer, const Place& x, const Place& y,
                                 const std::optional<Place>& residual) {
  return std::make_unique<DenseStep<T>>(layer, x, y, residual);
}

template <class T>
std::unique_ptr<Step> sum_step(const Place& map, std::int64_t sums) {
  return std::make_unique<SumStep<T>>(map, sums);
}

std::unique_ptr<Step> squeeze_step(const Layer& layer, const Place& map, std::int64_t sums, std::int64_t hidden,
                                   std::int64_t images) {
  return std::make_unique<SqueezeStep>(layer, map, sums, hidden, images);
}

template <class T>
std::unique_ptr<Step> excite_step(const Layer& layer, const Place& map, std::int64_t hidden, std::int64_t gate,
                                  const Layer* next, std::int64_t scaled) {
  return std::make_unique<ExciteStep<T>>(layer, map, hidden, gate, next, scaled);
}

template <class T>
std::unique_ptr<Step> scale_step(const Place& map, std::int64_t gate) {
  return std::make_unique<ScaleStep<T>>(map, gate);
}

#define EFFNET_STEPS(T)                                                                                                \
  template std::unique_ptr<Step> pointwise_step<T>(const Layer&, const Place&, const Place&,                           \
                                                   const std::optional<Place>&, std::int64_t);                         \
  template std::unique_ptr<Step> dense_step<T>(const Layer&, const Place&, const Place&, const std::optional<Place>&); \
  template std::unique_ptr<Step> sum_step<T>(const Place&, std::int64_t);                                              \
  template std::unique_ptr<Step> excite_step<T>(const Layer&, const Place&, std::int64_t, std::int64_t, const Layer*,  \
                                                std::int64_t);                                                         \
  template std::unique_ptr<Step> scale_step<T>(const Place&, std::int64_t);
EFFNET_STEPS(float)
EFFNET_STEPS(Bf16)
#undef EFFNET_STEPS

}  // namespace effnet
