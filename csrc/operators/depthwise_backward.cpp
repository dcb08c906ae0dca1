// Gradients of depthwise convolutions. Rows of the input and of the output's gradient are loaded into a ring each, so
// that one pass over both gives the gradients of the weights and of the input.
#include "operators/depthwise_rows.h"

namespace effnet {
namespace {

// How one dimension of the input's gradient is a convolution of the output's gradient with stride 1. Tap t of output o
// reads input h = stride * o + t - before: so the taps that reach h are those with t % stride == (h + before) % stride,
// which is the phase of h, and the outputs go down as the taps go up.
struct StridePhase {
  std::int64_t phase;
  std::int64_t newest;  // the output that reads h by the phase's lowest tap; the others come before it

  StridePhase(std::int64_t at, std::int64_t before, std::int64_t stride)
      : phase((at + before) % stride), newest((at + before) / stride) {}
};

class Backward {
 public:
  Backward(const DepthwiseBackward& call, const Kernels& kernels)
      : call_(call),
        shape_(call.shape),
        kernels_(kernels),
        size_(phase_kernel(shape_)),
        x_ring_(input_ring(shape_)),
        // The convolution of a phase begins size - 1 outputs before the newest one.
        g_ring_{size_, size_ - 1, shape_.out_width,
                size_ - 1 + std::max(shape_.out_width, (shape_.width - 1 + shape_.left) / shape_.stride + 1)},
        partition_(call.images, shape_, x_ring_.panel_floats() + g_ring_.panel_floats() + shape_.width * panel_columns),
        taps_(partition_.panels * shape_.stride * shape_.stride * tap_floats()),
        gradients_(partition_.shards * partition_.panels * gradient_floats()) {}

  const Partition& partition() const { return partition_; }
  std::int64_t scratch_floats() const {
    return partition_.most_panels() * (x_ring_.panel_floats() + g_ring_.panel_floats() + 2 * panel_columns) +
           shape_.width * panel_columns + shape_.channels;
  }

  // Packs the taps of each phase of rows and columns in reverse order, with zeros up to size_.
  void pack(std::int64_t panel) {
    for (std::int64_t row_phase = 0; row_phase < shape_.stride; ++row_phase) {
      for (std::int64_t column_phase = 0; column_phase < shape_.stride; ++column_phase) {
        float* to = taps_of(panel, row_phase, column_phase);
        std::fill_n(to, tap_floats(), 0.0f);
        to += panel_columns;
        for (std::int64_t i = 0; i < size_; ++i) {
          for (std::int64_t j = 0; j < size_; ++j, to += panel_columns) {
            const std::int64_t row = row_phase + (size_ - 1 - i) * shape_.stride;
            const std::int64_t column = column_phase + (size_ - 1 - j) * shape_.stride;
            if (row >= shape_.kernel || column >= shape_.kernel) continue;
            for (std::int64_t c = 0; c < columns_of(panel, shape_.channels); ++c) {
              to[c] = call_.weight[((panel * panel_columns + c) * shape_.kernel + row) * shape_.kernel + column];
            }
          }
        }
      }
    }
  }

  void run(std::int64_t index, float* scratch) const {
    const WorkItem item(call_.images, shape_, partition_, index);
    const std::int64_t rings = partition_.most_panels() * (x_ring_.panel_floats() + g_ring_.panel_floats());
    float* sums = scratch + rings;
    x_ring_.clear_margins(scratch, item.panels);
    g_ring_.clear_margins(scratch + partition_.most_panels() * x_ring_.panel_floats(), item.panels);
    std::fill_n(sums, item.panels * 2 * panel_columns, 0.0f);
    for (std::int64_t panel = 0; panel < item.panels; ++panel) {
      std::fill_n(gradient_of(item.shard, item.first_panel + panel), gradient_floats(), 0.0f);
    }
    for (std::int64_t image = item.first_image; image < item.end_image; ++image) run_image(item, image, scratch);
    if (call_.sums == nullptr) return;
    for (std::int64_t panel = 0; panel < item.panels; ++panel) {
      const std::int64_t columns = columns_of(item.first_panel + panel, shape_.channels);
      for (std::int64_t kind = 0; kind < 2; ++kind) {
        std::copy_n(sums + (2 * panel + kind) * panel_columns, columns,
                    call_.sums + (item.shard * 2 + kind) * shape_.channels + item.channel + panel * panel_columns);
      }
    }
  }

  // Adds up the weights' gradients of the shards, in order.
  void merge(std::int64_t panel) const {
    const std::int64_t taps = shape_.kernel * shape_.kernel;
    for (std::int64_t tap = 0; tap < taps; ++tap) {
      float total[panel_columns] = {};
      for (std::int64_t shard = 0; shard < partition_.shards; ++shard) {
        const float* gradient = gradient_of(shard, panel) + tap * panel_columns;
        for (std::int64_t c = 0; c < panel_columns; ++c) total[c] += gradient[c];
      }
      for (std::int64_t c = 0; c < columns_of(panel, shape_.channels); ++c) {
        call_.dweight[(panel * panel_columns + c) * taps + tap] = total[c];
      }
    }
  }

 private:
  // The kernel size of a phase's convolution, rounded up to a size that the depthwise kernel supports.
  static std::int64_t phase_kernel(const ConvShape& shape) {
    const std::int64_t taps = ceil_div(shape.kernel, shape.stride);
    return taps <= 3 ? 3 : taps <= 5 ? 5 : 7;
  }
  std::int64_t tap_floats() const { return (1 + size_ * size_) * panel_columns; }
  float* taps_of(std::int64_t panel, std::int64_t row_phase, std::int64_t column_phase) const {
    return taps_.get() + ((panel * shape_.stride + row_phase) * shape_.stride + column_phase) * tap_floats();
  }
  std::int64_t gradient_floats() const { return shape_.kernel * shape_.kernel * panel_columns; }
  float* gradient_of(std::int64_t shard, std::int64_t panel) const {
    return gradients_.get() + (shard * partition_.panels + panel) * gradient_floats();
  }

  void run_image(const WorkItem& item, std::int64_t image, float* x_ring) const {
    float* g_ring = x_ring + partition_.most_panels() * x_ring_.panel_floats();
    float* sums = g_ring + partition_.most_panels() * g_ring_.panel_floats();
    float* dx = sums + partition_.most_panels() * 2 * panel_columns;
    ActivateRows load_x = activate_rows(call_.prologue, image, shape_.channels, item.channel);
    load_x.rows = shape_.width;
    load_x.channels = item.channels;
    load_x.fill = true;
    GradientRows load_gradient =
        gradient_rows(call_.gradient, image, shape_.channels, dx + shape_.width * panel_columns);
    for (const float** vector :
         {&load_gradient.factor, &load_gradient.offset, &load_gradient.scale, &load_gradient.shift,
          &load_gradient.alpha, &load_gradient.beta, &load_gradient.gamma}) {
      *vector = offset(*vector, item.channel);
    }
    load_gradient.rows = shape_.out_width;
    load_gradient.channels = item.channels;
    load_gradient.fill = true;
    std::int64_t next_x = 0, next_row = 0;
    for (std::int64_t y = 0; y < shape_.out_height; ++y) {
      const std::int64_t top = shape_.in_row(y);
      const std::int64_t end = std::min(shape_.height, top + shape_.kernel);
      for (next_x = std::max(next_x, top); next_x < end; ++next_x) {
        load_x.x = map_rows(call_.x, (image * shape_.height + next_x) * shape_.width, shape_.channels, item.channel);
        load_x.to = x_ring_.to(x_ring, next_x);
        kernels_.activate_rows_f32(load_x);
      }
      const std::int64_t pixel = (image * shape_.out_height + y) * shape_.out_width;
      load_gradient.grad = map_rows(call_.gradient.grad, pixel, shape_.channels, item.channel);
      load_gradient.y = map_rows(call_.gradient.y, pixel, shape_.channels, item.channel);
      load_gradient.to = g_ring_.to(g_ring, y);
      kernels_.gradient_rows_f32(load_gradient);
      add_weight_gradient(item, top, end, y, x_ring, g_ring);
      // The gradients of input rows that no later output row reads are complete.
      const std::int64_t done = y + 1 < shape_.out_height ? shape_.in_row(y + 1) : shape_.height;
      for (; next_row < std::min(done, shape_.height); ++next_row) {
        input_gradient_row(item, image, next_row, g_ring, sums, dx);
      }
    }
  }

  void add_weight_gradient(const WorkItem& item, std::int64_t top, std::int64_t end, std::int64_t y, float* x_ring,
                           float* g_ring) const {
    const float* taps[7];
    DepthwiseWeightGradient row{};
    row.x = taps;
    row.tap_begin = std::max<std::int64_t>(0, -top);
    row.tap_end = std::max(row.tap_begin, end - top);
    row.width = shape_.out_width;
    row.stride = shape_.stride;
    row.kernel = static_cast<std::int32_t>(shape_.kernel);
    for (std::int64_t panel = 0; panel < item.panels; ++panel) {
      for (std::int64_t tap = row.tap_begin; tap < row.tap_end; ++tap) {
        taps[tap] = x_ring_.row(x_ring, panel, top + tap);
      }
      row.g = g_ring_.row(g_ring, panel, y) + g_ring_.left * panel_columns;
      row.to = gradient_of(item.shard, item.first_panel + panel);
      kernels_.depthwise_weight_gradient_f32(row);
    }
  }

  // Computes row h of the input's gradient and adds to its sums.
  void input_gradient_row(const WorkItem& item, std::int64_t image, std::int64_t h, float* g_ring, float* sums,
                          float* dx) const {
    const StridePhase vertical(h, shape_.top, shape_.stride);
    const std::int64_t first = vertical.newest - (size_ - 1);
    const float* taps[7];
    DepthwiseRow<float> row{};
    row.x = taps;
    row.tap_begin = std::min(size_, std::max<std::int64_t>(0, -first));
    row.tap_end = std::max(row.tap_begin, std::min(size_, shape_.out_height - first));
    row.y_pixel = shape_.stride * panel_columns;
    row.stride = 1;
    row.kernel = static_cast<std::int32_t>(size_);
    const std::int64_t pixel = (image * shape_.height + h) * shape_.width;
    for (std::int64_t panel = 0; panel < item.panels; ++panel) {
      const std::int64_t channel = item.channel + panel * panel_columns;
      row.channels = columns_of(item.first_panel + panel, shape_.channels);
      for (std::int64_t column = 0; column < std::min(shape_.stride, shape_.width); ++column) {
        const StridePhase horizontal(column, shape_.left, shape_.stride);
        for (std::int64_t tap = row.tap_begin; tap < row.tap_end; ++tap) {
          taps[tap] = g_ring_.row(g_ring, panel, first + tap) + horizontal.newest * panel_columns;
        }
        row.packed = taps_of(item.first_panel + panel, vertical.phase, horizontal.phase);
        row.width = ceil_div(shape_.width - column, shape_.stride);
        row.y = dx + column * panel_columns;
        kernels_.f32.depthwise_row_bias_act_sum(row);
      }
      ActGradPanel back = act_grad_panel(call_.prologue, call_.mean, image, shape_.channels, channel);
      back.dq = dx;
      back.x = map_rows(call_.x, pixel, shape_.channels, channel);
      back.residual = map_rows(call_.residual, pixel, shape_.channels, channel);
      back.to = map_rows(call_.dz, pixel, shape_.channels, channel);
      back.rows = shape_.width;
      back.apply_act_grad = true;
      back.sums = call_.sums != nullptr ? sums + 2 * panel * panel_columns : nullptr;
      back.sum_kinds = 2;
      kernels_.act_grad_panel_f32(back);
    }
  }

  const DepthwiseBackward& call_;
  const ConvShape& shape_;
  const Kernels& kernels_;
  const std::int64_t size_;
  const Ring x_ring_, g_ring_;
  const Partition partition_;
  Scratch taps_, gradients_;
};

}  // namespace

void depthwise_backward(const DepthwiseBackward& call, const Execution& execution) {
  const ConvShape& shape = call.shape;
  Backward backward(call, execution.kernels);
  const int threads =
      threads_for(call.images * shape.channels * (shape.height * shape.width + shape.out_height * shape.out_width),
                  execution.threads);
  parallel_phases(
      threads, backward.scratch_floats(),
      Phase{backward.partition().panels, [&](std::int64_t item, float*) { backward.pack(item); }},
      Phase{backward.partition().items(), [&](std::int64_t item, float* scratch) { backward.run(item, scratch); }},
      Phase{backward.partition().panels, [&](std::int64_t item, float*) { backward.merge(item); }});
}

}  // namespace effnet
