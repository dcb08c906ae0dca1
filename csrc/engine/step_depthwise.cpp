// Depthwise convolutions. Rows of the input are copied or, if the layer before runs in the same step, computed into a
// ring buffer of floats that stays in cache.
#include <algorithm>

#include "engine/bf16.h"
#include "engine/copy_rows.h"
#include "engine/step.h"

namespace effnet {
namespace {

// The size of a panel's ring, which decides how many output rows are computed between two fills.
constexpr std::int64_t panel_ring_floats = 12 * 1024;

template <class T>
class DepthwiseStep final : public Step {
 public:
  DepthwiseStep(const Layer& layer, const Layer* producer, const Place& x, const Place& y, std::int64_t sums,
                std::int64_t images, int threads)
      : Step(name_of(layer, producer, x)), layer_(layer), producer_(producer), x_(x), y_(y), sums_(sums) {
    std::int64_t height = x.height, width = x.width;
    if (producer != nullptr) {
      source_shape_ = conv_shape(producer->spec, height, width);
      height = source_shape_.out_height;
      width = source_shape_.out_width;
      dense_producer_ = !producer->spec.pointwise() || x.memory == Memory::strided_image;
    }
    shape_ = conv_shape(layer.spec, height, width);
    pitch_ = shape_.padded_width() * panel_columns;
    // Where a map is divided, the rows at the borders are loaded twice: small maps stay whole.
    items_per_divided_map_ = shape_.out_height < sum_shards * shape_.kernel ? 1 : sum_shards;
    if (dense_producer_) {
      group_panels_ = layer.panel_count();
    } else if (producer != nullptr && fit_together(images, threads)) {
      group_panels_ = panels_together;
    }
    const std::int64_t rows = panel_ring_floats / pitch_;
    chunk_rows_ = std::max<std::int64_t>(1, (rows - shape_.kernel) / shape_.stride + 1);
    chunk_rows_ = std::min(chunk_rows_, shape_.out_height);
    ring_rows_ = (chunk_rows_ - 1) * shape_.stride + shape_.kernel;
    if (dense_producer_) {
      source_pixel_ = padded_channels(type_of<T>, producer->spec.in_channels);
      source_pitch_ = source_shape_.padded_width() * source_pixel_;
    }
  }

  // A work item is the whole map of a group of panels, as long as every thread gets the same number of them; the maps
  // that are left over are divided into several items.
  std::int64_t items(const Run& run) const override {
    const std::int64_t maps = run.images * groups();
    return whole_maps(run) + (maps - whole_maps(run)) * items_per_divided_map_;
  }

  std::int64_t scratch_floats() const override {
    const std::int64_t source_bytes = source_rows() * source_pitch_ * size_of(type_of<T>);
    return group_panels_ * ring_rows_ * pitch_ + ceil_div(source_bytes, size_of(Type::f32));
  }

  std::int64_t multiply_adds() const override {
    const std::int64_t own = y_.pixels() * layer_.spec.out_channels * shape_.kernel * shape_.kernel;
    if (producer_ == nullptr) return own;
    return own + shape_.height * shape_.width * producer_->matrix.inner * producer_->matrix.out;
  }

  void run_item(const Run& run, std::int64_t item, float* scratch) const override {
    const std::int64_t divided = item - whole_maps(run);
    const std::int64_t map = divided < 0 ? item : whole_maps(run) + divided / items_per_divided_map_;
    const std::int64_t image = map / groups();
    const std::int64_t first_panel = map % groups() * group_panels_;
    if (divided < 0) {
      run_rows(run, image, first_panel, 0, y_.height, scratch);
    } else {
      const std::int64_t index = divided % items_per_divided_map_;
      run_rows(run, image, first_panel, y_.height * index / items_per_divided_map_,
               y_.height * (index + 1) / items_per_divided_map_, scratch);
    }
  }

 private:
  static std::string name_of(const Layer& layer, const Layer* producer, const Place& x) {
    const auto number = [](std::int64_t n) { return std::to_string(n); };
    std::string name = "depthwise " + number(layer.spec.kernel) + "x" + number(layer.spec.kernel) + " stride " +
                       number(layer.spec.stride) + " of " + number(layer.spec.out_channels);
    if (producer != nullptr) {
      name = (producer->spec.kernel > 1 ? "stem, " : "expand " + number(producer->spec.in_channels) + ", ") + name;
    }
    return name + " at " + number(x.height) + "x" + number(x.width);
  }

  // Whether work items of several panels each, which take a twentieth less time, keep the threads about as evenly busy
  // as items of one panel. Maps that are divided do.
  bool fit_together(std::int64_t images, int threads) const {
    const std::int64_t panels = images * layer_.panel_count();
    const std::int64_t groups = images * ceil_div(layer_.panel_count(), panels_together);
    const std::int64_t busiest = std::min(panels, panels_together * ceil_div(groups, threads));
    return items_per_divided_map_ > 1 || 15 * busiest <= 16 * ceil_div(panels, threads);
  }

  std::int64_t groups() const { return ceil_div(layer_.panel_count(), group_panels_); }
  // The panels of the group that begins with this one.
  std::int64_t panels(std::int64_t first_panel) const {
    return std::min(group_panels_, layer_.panel_count() - first_panel);
  }
  std::int64_t whole_maps(const Run& run) const {
    if (items_per_divided_map_ == 1) return run.images * groups();
    return run.images * groups() / run.threads * run.threads;
  }
  std::int64_t source_rows() const {
    return dense_producer_ ? (ring_rows_ - 1) * source_shape_.stride + source_shape_.kernel : 0;
  }

  float* sums_of(const Run& run, std::int64_t image, std::int64_t panel, std::int64_t shard) const {
    return run.at(sums_) + ((image * sum_shards + shard) * layer_.panel_count() + panel) * panel_columns;
  }

  void run_rows(const Run& run, std::int64_t image, std::int64_t first_panel, std::int64_t begin, std::int64_t end,
                float* scratch) const {
    clear_margins(scratch);
    std::int64_t next = begin < end ? shape_.first_row(begin) : 0;
    for (std::int64_t chunk = begin; chunk < end; chunk += chunk_rows_) {
      const std::int64_t chunk_end = std::min(end, chunk + chunk_rows_);
      const std::int64_t needed = shape_.end_row(chunk_end);
      while (next < needed) {
        const std::int64_t rows = std::min(needed - next, ring_rows_ - next % ring_rows_);
        load_rows(run, image, first_panel, next, rows, scratch);
        next += rows;
      }
      // All panels of a row in turn, because two of them share the cache lines of the output.
      for (std::int64_t row = chunk; row < chunk_end; ++row) {
        for (std::int64_t index = 0; index < panels(first_panel); ++index) {
          convolve(run, image, first_panel + index, row, scratch + index * ring_rows_ * pitch_);
        }
      }
    }
  }

  // Writes the zeros left and right of the ring's rows; they stay, because rows are written between them.
  void clear_margins(float* ring) const {
    const std::int64_t left = shape_.left * panel_columns;
    const std::int64_t inside_end = left + shape_.width * panel_columns;
    for (std::int64_t row = 0; row < group_panels_ * ring_rows_; ++row) {
      float* to = ring + row * pitch_;
      std::fill(to, to + left, 0.0f);
      std::fill(to + inside_end, to + pitch_, 0.0f);
    }
  }

  // Writes rows [row, row + rows) of the depthwise layer's input to the ring. They must not wrap around its end.
  void load_rows(const Run& run, std::int64_t image, std::int64_t first_panel, std::int64_t row, std::int64_t rows,
                 float* ring) const {
    float* to = ring + row % ring_rows_ * pitch_ + shape_.left * panel_columns;
    if (producer_ == nullptr) {
      copy(run, image, first_panel, row, rows, to);
      return;
    }
    Gemm<T, float> gemm{};
    gemm.y_row = panel_columns;
    gemm.y_panel = ring_rows_ * pitch_;
    gemm.width = shape_.width;
    gemm.gap = pitch_ - shape_.width * panel_columns;
    gemm.act = producer_->spec.act;
    if (!dense_producer_) {
      gemm.a = run.at<T>(x_) + (image * x_.pixels() + row * x_.width) * x_.pitch();
      gemm.a_row = x_.pitch();
      gemm.segments = 1;
      gemm.segment_length = producer_->matrix.inner;
      gemm.rows = rows * shape_.width;
      multiply(run, gemm, first_panel, panels(first_panel), to);
      return;
    }
    T* padded = reinterpret_cast<T*>(ring + group_panels_ * ring_rows_ * pitch_);
    copy_padded_rows(run.map(x_), image, source_shape_, source_shape_.in_row(row),
                     (rows - 1) * source_shape_.stride + source_shape_.kernel, padded);
    gemm.a_row = source_shape_.stride * source_pixel_;
    gemm.a_segment = source_pitch_;
    gemm.segments = source_shape_.kernel;
    gemm.segment_length = source_shape_.kernel * source_pixel_;
    gemm.rows = shape_.width;
    for (std::int64_t index = 0; index < panels(first_panel); index += panels_together) {
      for (std::int64_t i = 0; i < rows; ++i) {
        gemm.a = padded + i * source_shape_.stride * source_pitch_;
        const std::int64_t count = std::min(panels_together, panels(first_panel) - index);
        multiply(run, gemm, first_panel + index, count, to + (index * ring_rows_ + i) * pitch_);
      }
    }
  }

  void multiply(const Run& run, Gemm<T, float>& gemm, std::int64_t panel, std::int64_t count, float* to) const {
    gemm.b = producer_->matrix.template panel<T>(panel);
    gemm.bias = producer_->matrix.bias.get() + panel * panel_columns;
    gemm.columns = producer_->matrix.columns(panel, count);
    gemm.y = to;
    run.kernels.of<T>().gemm_to_floats(gemm);
  }

  void copy(const Run& run, std::int64_t image, std::int64_t panel, std::int64_t row, std::int64_t rows,
            float* to) const {
    const std::int64_t channels = columns(panel);
    const T* from = run.at<T>(x_) + (image * x_.pixels() + row * x_.width) * x_.pitch() + panel * panel_columns;
    for (std::int64_t i = 0; i < rows; ++i, to += pitch_) {
      for (std::int64_t pixel = 0; pixel < x_.width; ++pixel, from += x_.pitch()) {
        for (std::int64_t c = 0; c < channels; ++c) to[pixel * panel_columns + c] = convert<float>(from[c]);
        std::fill(to + pixel * panel_columns + channels, to + (pixel + 1) * panel_columns, 0.0f);
      }
    }
  }

  void convolve(const Run& run, std::int64_t image, std::int64_t panel, std::int64_t row, const float* ring) const {
    const float* rows[8];
    DepthwiseRow<T> call{};
    call.x = rows;
    const std::int64_t first = shape_.in_row(row);
    call.tap_begin = std::min(shape_.kernel, std::max<std::int64_t>(0, -first));
    call.tap_end = std::max(call.tap_begin, std::min(shape_.kernel, shape_.height - first));
    for (std::int64_t tap = call.tap_begin; tap < call.tap_end; ++tap) {
      rows[tap] = ring + (first + tap) % ring_rows_ * pitch_;
    }
    call.packed = layer_.panel_taps(panel);
    call.y = run.at<T>(y_) + (image * y_.pixels() + row * y_.width) * y_.pitch() + panel * panel_columns;
    call.y_pixel = y_.pitch();
    call.width = y_.width;
    call.channels = columns(panel);
    call.sums = sums_ == absent ? nullptr : row_sums(run, image, panel, row);
    call.stride = shape_.stride;
    call.kernel = static_cast<std::int32_t>(shape_.kernel);
    call.act = layer_.spec.act;
    run.kernels.of<T>().depthwise_row_bias_act_sum(call);
  }

  // Each shard of rows has sums of its own, which its first row clears, so that they do not depend on how the rows are
  // divided into work items.
  float* row_sums(const Run& run, std::int64_t image, std::int64_t panel, std::int64_t row) const {
    const std::int64_t shard = ((row + 1) * sum_shards - 1) / y_.height;
    float* sums = sums_of(run, image, panel, shard);
    if (row == y_.height * shard / sum_shards) std::fill(sums, sums + panel_columns, 0.0f);
    // If a map has fewer rows than there are shards, some shards have no row: the next row clears their sums.
    for (std::int64_t empty = shard; empty > 0 && y_.height * (empty - 1) / sum_shards == row; --empty) {
      float* none = sums_of(run, image, panel, empty - 1);
      std::fill(none, none + panel_columns, 0.0f);
    }
    return sums;
  }

  std::int64_t columns(std::int64_t panel) const {
    return std::min(panel_columns, layer_.spec.out_channels - panel * panel_columns);
  }

  const Layer& layer_;
  const Layer* producer_;
  const Place x_, y_;
  const std::int64_t sums_;
  std::int64_t items_per_divided_map_ = 1;
  ConvShape source_shape_{}, shape_{};
  bool dense_producer_ = false;  // whether the producer reads padded rows, as any but a 1 x 1 convolution
  std::int64_t pitch_ = 0, source_pixel_ = 0, source_pitch_ = 0;
  std::int64_t group_panels_ = 1;  // panels of a work item
  std::int64_t chunk_rows_ = 1;    // output rows between two fills of the ring
  std::int64_t ring_rows_ = 1;
};

}  // namespace

template <class T>
std::unique_ptr<Step> depthwise_step(const Layer& layer, const Layer* producer, const Place& x, const Place& y,
                                     std::int64_t sums, std::int64_t images, int threads) {
  return std::make_unique<DepthwiseStep<T>>(layer, producer, x, y, sums, images, threads);
}

template std::unique_ptr<Step> depthwise_step<float>(const Layer&, const Layer*, const Place&, const Place&,
                                                     std::int64_t, std::int64_t, int);
template std::unique_ptr<Step> depthwise_step<Bf16>(const Layer&, const Layer*, const Place&, const Place&,
                                                    std::int64_t, std::int64_t, int);

}  // namespace effnet
