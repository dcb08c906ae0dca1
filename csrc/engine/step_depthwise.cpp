// Depthwise convolutions: rows of the input, or of the layer that makes it, go through a ring that stays in cache.
#include <algorithm>

#include "engine/padded_rows.h"
#include "engine/step.h"

namespace effnet {
namespace {

// Output rows between two fills of the ring are as many as keep it within this.
constexpr std::int64_t ring_floats = 12 * 1024;

class DepthwiseStep final : public Step {
 public:
  DepthwiseStep(const Layer& layer, const Layer* producer, const Place& x, const Place& y,
                std::int64_t sums)
      : Step(name_of(layer, producer, x)), layer_(layer), producer_(producer), x_(x), y_(y), sums_(sums) {
    std::int64_t height = x.height, width = x.width;
    if (producer != nullptr) {
      source_ = conv_shape(producer->spec, height, width);
      height = source_.out_height;
      width = source_.out_width;
      dense_ = !producer->spec.pointwise() || x.is_image;
    }
    shape_ = conv_shape(layer.spec, height, width);
    pitch_ = shape_.padded_width() * panel_columns;
    group_ = dense_ ? layer.panel_count() : 1;
    const std::int64_t rows = ring_floats / pitch_;
    chunk_ = std::max<std::int64_t>(1, (rows - shape_.kernel) / shape_.stride + 1);
    chunk_ = std::min(chunk_, shape_.out_height);
    ring_rows_ = (chunk_ - 1) * shape_.stride + shape_.kernel;
    if (dense_) source_pitch_ = source_.padded_width() * producer->spec.in_channels;
    // Each band reads the rows at its borders again.
    bands_ = shape_.out_height < sum_bands * shape_.kernel ? 1 : sum_bands;
  }

  // Whole maps of a group of panels, dealt to the threads; those that are left over are cut in bands of rows.
  std::int64_t units(const Run& run) const override {
    const std::int64_t maps = run.images * groups();
    return whole(run) + (maps - whole(run)) * bands_;
  }

  std::int64_t scratch_floats() const override {
    return group_ * ring_rows_ * pitch_ + source_rows() * source_pitch_;
  }

  std::int64_t multiply_adds() const override {
    const std::int64_t own = y_.pixels() * layer_.spec.out_channels * shape_.kernel * shape_.kernel;
    if (producer_ == nullptr) return own;
    return own + shape_.height * shape_.width * producer_->matrix.inner * producer_->matrix.out;
  }

  void run_unit(const Run& run, std::int64_t unit, float* scratch) const override {
    const std::int64_t cut = unit - whole(run);
    const std::int64_t map = cut < 0 ? unit : whole(run) + cut / bands_;
    const std::int64_t image = map / groups(), first_panel = map % groups() * group_;
    if (cut < 0) {
      run_rows(run, image, first_panel, 0, y_.height, scratch);
    } else {
      const std::int64_t band = cut % bands_;
      run_rows(run, image, first_panel, y_.height * band / bands_, y_.height * (band + 1) / bands_, scratch);
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

  std::int64_t groups() const { return layer_.panel_count() / group_; }
  std::int64_t whole(const Run& run) const {
    if (bands_ == 1) return run.images * groups();
    return run.images * groups() / run.threads * run.threads;
  }
  std::int64_t source_rows() const { return dense_ ? (ring_rows_ - 1) * source_.stride + source_.kernel : 0; }

  float* sums_of(const Run& run, std::int64_t image, std::int64_t panel, std::int64_t band) const {
    return run.at(sums_) + ((image * sum_bands + band) * layer_.panel_count() + panel) * panel_columns;
  }

  void run_rows(const Run& run, std::int64_t image, std::int64_t first_panel, std::int64_t begin, std::int64_t end,
                float* scratch) const {
    clear_margins(scratch);
    std::int64_t next = begin < end ? shape_.first_row(begin) : 0;
    for (std::int64_t chunk = begin; chunk < end; chunk += chunk_) {
      const std::int64_t chunk_end = std::min(end, chunk + chunk_);
      const std::int64_t needed = shape_.end_row(chunk_end);
      while (next < needed) {
        const std::int64_t rows = std::min(needed - next, ring_rows_ - next % ring_rows_);
        produce(run, image, first_panel, next, rows, scratch);
        next += rows;
      }
      for (std::int64_t index = 0; index < group_; ++index) {
        consume(run, image, first_panel + index, chunk, chunk_end, scratch + index * ring_rows_ * pitch_);
      }
    }
  }

  // The zeros left and right of the ring's rows, which nothing else writes.
  void clear_margins(float* ring) const {
    const std::int64_t left = shape_.left * panel_columns;
    const std::int64_t inside_end = left + shape_.width * panel_columns;
    for (std::int64_t row = 0; row < group_ * ring_rows_; ++row) {
      float* to = ring + row * pitch_;
      std::fill(to, to + left, 0.0f);
      std::fill(to + inside_end, to + pitch_, 0.0f);
    }
  }

  // Rows [row, row + rows) of the depthwise layer's input into the ring, where they do not wrap.
  void produce(const Run& run, std::int64_t image, std::int64_t first_panel, std::int64_t row, std::int64_t rows,
               float* ring) const {
    float* to = ring + row % ring_rows_ * pitch_ + shape_.left * panel_columns;
    if (producer_ == nullptr) {
      copy(run, image, first_panel, row, rows, to);
      return;
    }
    Gemm gemm{};
    gemm.y_row = panel_columns;
    gemm.width = shape_.width;
    gemm.gap = pitch_ - shape_.width * panel_columns;
    gemm.act = producer_->spec.act;
    if (!dense_) {
      gemm.a = run.at(x_) + (image * x_.pixels() + row * x_.width) * x_.pitch();
      gemm.a_row = x_.pitch();
      gemm.segments = 1;
      gemm.segment_length = producer_->matrix.inner;
      gemm.rows = rows * shape_.width;
      multiply(run, gemm, first_panel, to);
      return;
    }
    float* padded = ring + group_ * ring_rows_ * pitch_;
    copy_padded_rows(run.map(x_), image, source_, source_.in_row(row), (rows - 1) * source_.stride + source_.kernel,
                     padded);
    gemm.a_row = source_.stride * producer_->spec.in_channels;
    gemm.a_segment = source_pitch_;
    gemm.segments = source_.kernel;
    gemm.segment_length = source_.kernel * producer_->spec.in_channels;
    gemm.rows = shape_.width;
    for (std::int64_t index = 0; index < group_; ++index) {
      for (std::int64_t i = 0; i < rows; ++i) {
        gemm.a = padded + i * source_.stride * source_pitch_;
        multiply(run, gemm, first_panel + index, to + (index * ring_rows_ + i) * pitch_);
      }
    }
  }

  void multiply(const Run& run, Gemm& gemm, std::int64_t panel, float* to) const {
    gemm.b = producer_->matrix.panel(panel);
    gemm.bias = producer_->matrix.bias.get() + panel * panel_columns;
    gemm.columns = producer_->matrix.columns(panel);
    gemm.y = to;
    run.kernels.gemm_f32_bias_act_residual_sum(gemm);
  }

  void copy(const Run& run, std::int64_t image, std::int64_t panel, std::int64_t row, std::int64_t rows,
            float* to) const {
    const std::int64_t channels = columns(panel);
    const float* from = run.at(x_) + (image * x_.pixels() + row * x_.width) * x_.pitch() + panel * panel_columns;
    for (std::int64_t i = 0; i < rows; ++i, to += pitch_) {
      for (std::int64_t pixel = 0; pixel < x_.width; ++pixel, from += x_.pitch()) {
        std::copy(from, from + channels, to + pixel * panel_columns);
        std::fill(to + pixel * panel_columns + channels, to + (pixel + 1) * panel_columns, 0.0f);
      }
    }
  }

  void consume(const Run& run, std::int64_t image, std::int64_t panel, std::int64_t begin, std::int64_t end,
               const float* ring) const {
    const float* rows[8];
    DepthwiseRow call{};
    call.x = rows;
    call.packed = layer_.panel_taps(panel);
    call.width = y_.width;
    call.channels = columns(panel);
    call.stride = shape_.stride;
    call.kernel = static_cast<std::int32_t>(shape_.kernel);
    call.act = layer_.spec.act;
    call.y_pixel = y_.pitch();
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t first = shape_.in_row(row);
      call.tap_begin = std::min(shape_.kernel, std::max<std::int64_t>(0, -first));
      call.tap_end = std::max(call.tap_begin, std::min(shape_.kernel, shape_.height - first));
      for (std::int64_t tap = call.tap_begin; tap < call.tap_end; ++tap) {
        rows[tap] = ring + (first + tap) % ring_rows_ * pitch_;
      }
      call.sums = sums_ == absent ? nullptr : row_sums(run, image, panel, row);
      call.y = run.at(y_) + (image * y_.pixels() + row * y_.width) * y_.pitch() + panel * panel_columns;
      run.kernels.depthwise_row_f32_bias_act_sum(call);
    }
  }

  // Sums are kept apart by bands of rows, zeroed at the first row of each, so that they do not depend on who computes
  // which rows.
  float* row_sums(const Run& run, std::int64_t image, std::int64_t panel, std::int64_t row) const {
    const std::int64_t band = ((row + 1) * sum_bands - 1) / y_.height;
    float* sums = sums_of(run, image, panel, band);
    if (row == y_.height * band / sum_bands) std::fill(sums, sums + panel_columns, 0.0f);
    // A map of fewer rows than bands leaves some without a row.
    for (std::int64_t empty = band; empty > 0 && y_.height * (empty - 1) / sum_bands == row; --empty) {
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
  std::int64_t bands_ = 1;  // that a map may be cut in
  ConvShape source_{}, shape_{};
  bool dense_ = false;
  std::int64_t pitch_ = 0, source_pitch_ = 0;
  std::int64_t group_ = 1;  // panels a unit
  std::int64_t chunk_ = 1, ring_rows_ = 1;
};

}  // namespace

std::unique_ptr<Step> depthwise_step(const Layer& layer, const Layer* producer, const Place& x, const Place& y,
                                     std::int64_t sums) {
  return std::make_unique<DepthwiseStep>(layer, producer, x, y, sums);
}

}  // namespace effnet
