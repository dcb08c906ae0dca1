// Gradients of depthwise convolutions: rows of the raw input and of the output's gradient go through rings side by side, so
// that the weights' gradient and the input's come out of one pass.
#include "operators/depthwise_rows.h"

namespace effnet {
namespace {

// The taps that input row or column `at` of the gradient takes part in, as a convolution of the output's gradient with
// stride 1: input h = stride * o + tap - before, so taps of one phase of h and outputs that go down as taps go up.
struct Phase1d {
  std::int64_t phase, newest;  // the output of the lowest tap; others precede it

  Phase1d(std::int64_t at, std::int64_t before, std::int64_t stride)
      : phase((at + before) % stride), newest((at + before) / stride) {}
};

class Backward {
 public:
  Backward(const DepthwiseBackward& call, const Kernels& kernels)
      : call_(call),
        s_(call.shape),
        kernels_(kernels),
        size_(phase_kernel(s_)),
        x_ring_(input_ring(s_)),
        // A phase's convolution reads from size - 1 outputs before the newest one on.
        g_ring_{size_, size_ - 1, s_.out_width,
                size_ - 1 + std::max(s_.out_width, (s_.width - 1 + s_.left) / s_.stride + 1)},
        cut_(call.images, s_, x_ring_.panel_floats() + g_ring_.panel_floats() + s_.width * panel_columns),
        taps_(cut_.panels * s_.stride * s_.stride * tap_floats()),
        gradients_(cut_.slots * cut_.panels * gradient_floats()) {}

  const Cut& cut() const { return cut_; }
  std::int64_t scratch_floats() const {
    return cut_.most_panels() * (x_ring_.panel_floats() + g_ring_.panel_floats() + 2 * panel_columns) +
           s_.width * panel_columns + s_.channels;
  }

  // For each phase of rows and columns the taps of that phase, backwards; absent ones are zero.
  void pack(std::int64_t panel) {
    for (std::int64_t row_phase = 0; row_phase < s_.stride; ++row_phase) {
      for (std::int64_t column_phase = 0; column_phase < s_.stride; ++column_phase) {
        float* to = taps_of(panel, row_phase, column_phase);
        std::fill_n(to, tap_floats(), 0.0f);
        to += panel_columns;
        for (std::int64_t i = 0; i < size_; ++i) {
          for (std::int64_t j = 0; j < size_; ++j, to += panel_columns) {
            const std::int64_t row = row_phase + (size_ - 1 - i) * s_.stride;
            const std::int64_t column = column_phase + (size_ - 1 - j) * s_.stride;
            if (row >= s_.kernel || column >= s_.kernel) continue;
            for (std::int64_t c = 0; c < columns_of(panel, s_.channels); ++c) {
              to[c] = call_.weight[((panel * panel_columns + c) * s_.kernel + row) * s_.kernel + column];
            }
          }
        }
      }
    }
  }

  void run(std::int64_t index, float* scratch) const {
    const Unit unit(call_.images, s_, cut_, index);
    const std::int64_t rings = cut_.most_panels() * (x_ring_.panel_floats() + g_ring_.panel_floats());
    float* sums = scratch + rings;
    x_ring_.clear_margins(scratch, unit.panels);
    g_ring_.clear_margins(scratch + cut_.most_panels() * x_ring_.panel_floats(), unit.panels);
    std::fill_n(sums, unit.panels * 2 * panel_columns, 0.0f);
    for (std::int64_t panel = 0; panel < unit.panels; ++panel) {
      std::fill_n(gradient_of(unit.slot, unit.first_panel + panel), gradient_floats(), 0.0f);
    }
    for (std::int64_t image = unit.first_image; image < unit.end_image; ++image) run_image(unit, image, scratch);
    if (call_.sums == nullptr) return;
    for (std::int64_t panel = 0; panel < unit.panels; ++panel) {
      const std::int64_t columns = columns_of(unit.first_panel + panel, s_.channels);
      for (std::int64_t kind = 0; kind < 2; ++kind) {
        std::copy_n(sums + (2 * panel + kind) * panel_columns, columns,
                    call_.sums + (unit.slot * 2 + kind) * s_.channels + unit.channel + panel * panel_columns);
      }
    }
  }

  void merge(std::int64_t panel) const {
    const std::int64_t taps = s_.kernel * s_.kernel;
    for (std::int64_t tap = 0; tap < taps; ++tap) {
      float total[panel_columns] = {};
      for (std::int64_t slot = 0; slot < cut_.slots; ++slot) {
        const float* gradient = gradient_of(slot, panel) + tap * panel_columns;
        for (std::int64_t c = 0; c < panel_columns; ++c) total[c] += gradient[c];
      }
      for (std::int64_t c = 0; c < columns_of(panel, s_.channels); ++c) {
        call_.dweight[(panel * panel_columns + c) * taps + tap] = total[c];
      }
    }
  }

 private:
  // Of the convolution of one phase: one of the sizes that there are kernels of.
  static std::int64_t phase_kernel(const ConvShape& shape) {
    const std::int64_t taps = ceil_div(shape.kernel, shape.stride);
    return taps <= 3 ? 3 : taps <= 5 ? 5 : 7;
  }
  std::int64_t tap_floats() const { return (1 + size_ * size_) * panel_columns; }
  float* taps_of(std::int64_t panel, std::int64_t row_phase, std::int64_t column_phase) const {
    return taps_.get() + ((panel * s_.stride + row_phase) * s_.stride + column_phase) * tap_floats();
  }
  std::int64_t gradient_floats() const { return s_.kernel * s_.kernel * panel_columns; }
  float* gradient_of(std::int64_t slot, std::int64_t panel) const {
    return gradients_.get() + (slot * cut_.panels + panel) * gradient_floats();
  }

  void run_image(const Unit& unit, std::int64_t image, float* x_ring) const {
    float* g_ring = x_ring + cut_.most_panels() * x_ring_.panel_floats();
    float* sums = g_ring + cut_.most_panels() * g_ring_.panel_floats();
    float* dx = sums + cut_.most_panels() * 2 * panel_columns;
    ActivateRows pay = activate_rows(call_.prologue, image, s_.channels, unit.channel);
    pay.rows = s_.width;
    pay.channels = unit.channels;
    pay.fill = true;
    OutputGradient gradient = call_.gradient;
    GradientRows load = gradient_rows(gradient, image, s_.channels, dx + s_.width * panel_columns);
    for (const float** vector : {&load.factor, &load.offset, &load.scale, &load.shift, &load.alpha, &load.beta, &load.gamma}) {
      *vector = offset(*vector, unit.channel);
    }
    load.rows = s_.out_width;
    load.channels = unit.channels;
    load.fill = true;
    std::int64_t next_x = 0, next_row = 0;
    for (std::int64_t y = 0; y < s_.out_height; ++y) {
      const std::int64_t top = s_.in_row(y);
      const std::int64_t end = std::min(s_.height, top + s_.kernel);
      for (next_x = std::max(next_x, top); next_x < end; ++next_x) {
        pay.x = map_rows(call_.x, (image * s_.height + next_x) * s_.width, s_.channels, unit.channel);
        pay.to = x_ring_.to(x_ring, next_x);
        kernels_.activate_rows_f32(pay);
      }
      const std::int64_t pixel = (image * s_.out_height + y) * s_.out_width;
      load.grad = map_rows(call_.gradient.grad, pixel, s_.channels, unit.channel);
      load.y = map_rows(call_.gradient.y, pixel, s_.channels, unit.channel);
      load.to = g_ring_.to(g_ring, y);
      kernels_.gradient_rows_f32(load);
      add_weight_gradient(unit, top, end, y, x_ring, g_ring);
      // Input rows that no later output row reaches.
      const std::int64_t done = y + 1 < s_.out_height ? s_.in_row(y + 1) : s_.height;
      for (; next_row < std::min(done, s_.height); ++next_row) go_back(unit, image, next_row, g_ring, sums, dx);
    }
  }

  void add_weight_gradient(const Unit& unit, std::int64_t top, std::int64_t end, std::int64_t y, float* x_ring,
                           float* g_ring) const {
    const float* taps[7];
    DepthwiseWeightGradient row{};
    row.x = taps;
    row.tap_begin = std::max<std::int64_t>(0, -top);
    row.tap_end = std::max(row.tap_begin, end - top);
    row.width = s_.out_width;
    row.stride = s_.stride;
    row.kernel = static_cast<std::int32_t>(s_.kernel);
    for (std::int64_t panel = 0; panel < unit.panels; ++panel) {
      for (std::int64_t tap = row.tap_begin; tap < row.tap_end; ++tap) taps[tap] = x_ring_.row(x_ring, panel, top + tap);
      row.g = g_ring_.row(g_ring, panel, y) + g_ring_.left * panel_columns;
      row.to = gradient_of(unit.slot, unit.first_panel + panel);
      kernels_.depthwise_weight_gradient_f32(row);
    }
  }

  // Row h of the input's gradient.
  void go_back(const Unit& unit, std::int64_t image, std::int64_t h, float* g_ring, float* sums, float* dx) const {
    const Phase1d vertical(h, s_.top, s_.stride);
    const std::int64_t first = vertical.newest - (size_ - 1);
    const float* taps[7];
    DepthwiseRow row{};
    row.x = taps;
    row.tap_begin = std::min(size_, std::max<std::int64_t>(0, -first));
    row.tap_end = std::max(row.tap_begin, std::min(size_, s_.out_height - first));
    row.y_pixel = s_.stride * panel_columns;
    row.stride = 1;
    row.kernel = static_cast<std::int32_t>(size_);
    const std::int64_t pixel = (image * s_.height + h) * s_.width;
    for (std::int64_t panel = 0; panel < unit.panels; ++panel) {
      const std::int64_t channel = unit.channel + panel * panel_columns;
      row.channels = columns_of(unit.first_panel + panel, s_.channels);
      for (std::int64_t column = 0; column < std::min(s_.stride, s_.width); ++column) {
        const Phase1d horizontal(column, s_.left, s_.stride);
        for (std::int64_t tap = row.tap_begin; tap < row.tap_end; ++tap) {
          taps[tap] = g_ring_.row(g_ring, panel, first + tap) + horizontal.newest * panel_columns;
        }
        row.packed = taps_of(unit.first_panel + panel, vertical.phase, horizontal.phase);
        row.width = ceil_div(s_.width - column, s_.stride);
        row.y = dx + column * panel_columns;
        kernels_.depthwise_row_f32_bias_act_sum(row);
      }
      ActGradPanel through{};
      through.dq = dx;
      through.x = map_rows(call_.x, pixel, s_.channels, channel);
      through.residual = map_rows(call_.residual, pixel, s_.channels, channel);
      through.to = map_rows(call_.dz, pixel, s_.channels, channel);
      through.scale = offset(call_.prologue.scale, channel);
      through.shift = offset(call_.prologue.shift, channel);
      through.mean = offset(call_.mean, channel);
      through.rows = s_.width;
      through.columns = row.channels;
      through.apply_act_grad = true;
      through.sums = call_.sums != nullptr ? sums + 2 * panel * panel_columns : nullptr;
      through.sum_kinds = 2;
      through.act = call_.prologue.act;
      kernels_.act_grad_panel_f32(through);
    }
  }

  const DepthwiseBackward& call_;
  const ConvShape& s_;
  const Kernels& kernels_;
  const std::int64_t size_;
  const Ring x_ring_, g_ring_;
  const Cut cut_;
  Scratch taps_, gradients_;
};

}  // namespace

void depthwise_backward(const DepthwiseBackward& call, const Execution& execution) {
  const ConvShape& s = call.shape;
  Backward backward(call, execution.kernels);
  const int threads = threads_for(call.images * s.channels * (s.height * s.width + s.out_height * s.out_width), execution.threads);
  parallel_phases(threads, backward.scratch_floats(),
                  Phase{backward.cut().panels, [&](std::int64_t unit, float*) { backward.pack(unit); }},
                  Phase{backward.cut().units(), [&](std::int64_t unit, float* scratch) { backward.run(unit, scratch); }},
                  Phase{backward.cut().panels, [&](std::int64_t unit, float*) { backward.merge(unit); }});
}

}  // namespace effnet
