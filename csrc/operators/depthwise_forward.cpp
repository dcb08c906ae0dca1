// Depthwise convolutions. Rows of the input are loaded into a ring of padded rows, so that the prologue is applied once
// to a row and not once for every row of the kernel that reads it.
#include "operators/depthwise_rows.h"

namespace effnet {
namespace {

class Forward {
 public:
  Forward(const DepthwiseForward& call, const Kernels& kernels)
      : call_(call),
        shape_(call.shape),
        kernels_(kernels),
        ring_(input_ring(shape_)),
        partition_(call.images, shape_, ring_.panel_floats() + shape_.out_width * panel_columns),
        taps_(partition_.panels * tap_floats()) {}

  const Partition& partition() const { return partition_; }
  std::int64_t scratch_floats() const {
    return partition_.most_panels() * (ring_.panel_floats() + (shape_.out_width + 2) * panel_columns);
  }

  // Packs the taps of a panel, with the epilogue's scale multiplied in and its shift as the bias.
  void pack(std::int64_t panel) {
    float* to = taps_.get() + panel * tap_floats();
    std::fill_n(to, tap_floats(), 0.0f);
    const std::int64_t taps = shape_.kernel * shape_.kernel;
    for (std::int64_t j = 0; j < columns_of(panel, shape_.channels); ++j) {
      const std::int64_t c = panel * panel_columns + j;
      const float scale = call_.epilogue.scale != nullptr ? call_.epilogue.scale[c] : 1.0f;
      to[j] = call_.epilogue.shift != nullptr ? call_.epilogue.shift[c] : 0.0f;
      for (std::int64_t tap = 0; tap < taps; ++tap) {
        to[(1 + tap) * panel_columns + j] = call_.weight[c * taps + tap] * scale;
      }
    }
  }

  void run(std::int64_t index, float* scratch) const {
    const WorkItem item(call_.images, shape_, partition_, index);
    float* statistics = scratch + partition_.most_panels() * (ring_.panel_floats() + shape_.out_width * panel_columns);
    ring_.clear_margins(scratch, item.panels);
    const bool by_image = call_.reduction == Reduction::pooled_sums;
    std::int64_t count = 0;
    for (std::int64_t image = item.first_image; image < item.end_image; ++image) {
      if (by_image || image == item.first_image) std::fill_n(statistics, item.panels * 2 * panel_columns, 0.0f);
      run_image(item, image, count, statistics, scratch);
      if (by_image) write(item, statistics, call_.partials + image * shape_.channels);
    }
    if (call_.reduction != Reduction::statistics) return;
    float* partials = call_.partials + item.shard * 3 * shape_.channels;
    std::fill_n(partials + item.channel, item.channels, static_cast<float>(count));
    write(item, statistics, partials + shape_.channels);
    write(item, statistics + panel_columns, partials + 2 * shape_.channels);
  }

 private:
  std::int64_t tap_floats() const { return (1 + shape_.kernel * shape_.kernel) * panel_columns; }

  // Each panel has two vectors in `vectors`, of which this writes the first.
  void write(const WorkItem& item, const float* vectors, float* to) const {
    for (std::int64_t panel = 0; panel < item.panels; ++panel) {
      std::copy_n(vectors + 2 * panel * panel_columns, columns_of(item.first_panel + panel, shape_.channels),
                  to + item.channel + panel * panel_columns);
    }
  }

  void run_image(const WorkItem& item, std::int64_t image, std::int64_t& count, float* statistics, float* ring) const {
    float* out = ring + partition_.most_panels() * ring_.panel_floats();
    ActivateRows load_x = activate_rows(call_.prologue, image, shape_.channels, item.channel);
    load_x.rows = shape_.width;
    load_x.channels = item.channels;
    load_x.fill = true;
    ActivateRows store{};
    store.x = panel_rows(out, shape_.out_width);
    store.rows = shape_.out_width;
    store.channels = item.channels;
    DepthwiseRow<float> row{};
    row.y_pixel = panel_columns;
    row.width = shape_.out_width;
    row.stride = shape_.stride;
    row.kernel = static_cast<std::int32_t>(shape_.kernel);
    row.act = call_.epilogue.act;
    const float* taps[7];
    row.x = taps;
    std::int64_t next = 0;
    for (std::int64_t y = 0; y < shape_.out_height; ++y) {
      const std::int64_t top = shape_.in_row(y);
      const std::int64_t end = std::min(shape_.height, top + shape_.kernel);
      for (next = std::max(next, top); next < end; ++next) {
        load_x.x = map_rows(call_.x, (image * shape_.height + next) * shape_.width, shape_.channels, item.channel);
        load_x.to = ring_.to(ring, next);
        kernels_.activate_rows_f32(load_x);
      }
      row.tap_begin = std::max<std::int64_t>(0, -top);
      row.tap_end = std::max(row.tap_begin, end - top);
      for (std::int64_t panel = 0; panel < item.panels; ++panel) {
        for (std::int64_t tap = row.tap_begin; tap < row.tap_end; ++tap) taps[tap] = ring_.row(ring, panel, top + tap);
        row.packed = taps_.get() + (item.first_panel + panel) * tap_floats();
        row.y = out + panel * shape_.out_width * panel_columns;
        row.channels = columns_of(item.first_panel + panel, shape_.channels);
        float* of_panel = statistics + 2 * panel * panel_columns;
        row.sums = call_.reduction == Reduction::pooled_sums ? of_panel : nullptr;
        kernels_.f32.depthwise_row_bias_act_sum(row);
        if (call_.reduction == Reduction::statistics) {
          kernels_.panel_statistics_f32(
              {row.y, panel_columns, shape_.out_width, row.channels, count, of_panel, of_panel + panel_columns});
        }
      }
      count += shape_.out_width;
      store.to = map_rows(call_.y, (image * shape_.out_height + y) * shape_.out_width, shape_.channels, item.channel);
      kernels_.activate_rows_f32(store);
    }
  }

  const DepthwiseForward& call_;
  const ConvShape& shape_;
  const Kernels& kernels_;
  const Ring ring_;
  const Partition partition_;
  Scratch taps_;
};

}  // namespace

std::int64_t depthwise_shards(std::int64_t images) { return std::min(images, most_shards); }

void depthwise_forward(const DepthwiseForward& call, const Execution& execution) {
  const ConvShape& shape = call.shape;
  Forward forward(call, execution.kernels);
  const int threads =
      threads_for(call.images * shape.channels * (shape.height * shape.width + shape.out_height * shape.out_width),
                  execution.threads);
  parallel_phases(
      threads, forward.scratch_floats(),
      Phase{forward.partition().panels, [&](std::int64_t item, float*) { forward.pack(item); }},
      Phase{forward.partition().items(), [&](std::int64_t item, float* scratch) { forward.run(item, scratch); }});
}

}  // namespace effnet
