// Depthwise convolutions: rows of the raw input go through a ring of padded rows in panels, with the prologue applied once
// for all the kernel rows that read them.
#include "operators/depthwise_rows.h"

namespace effnet {
namespace {

class Forward {
 public:
  Forward(const DepthwiseForward& call, const Kernels& kernels)
      : call_(call),
        s_(call.shape),
        kernels_(kernels),
        ring_(input_ring(s_)),
        cut_(call.images, s_, ring_.panel_floats() + s_.out_width * panel_columns),
        taps_(cut_.panels * tap_floats()) {}

  const Cut& cut() const { return cut_; }
  std::int64_t scratch_floats() const {
    return cut_.most_panels() * (ring_.panel_floats() + (s_.out_width + 2) * panel_columns);
  }

  void pack(std::int64_t panel) {
    float* to = taps_.get() + panel * tap_floats();
    std::fill_n(to, tap_floats(), 0.0f);
    const std::int64_t taps = s_.kernel * s_.kernel;
    for (std::int64_t j = 0; j < columns_of(panel, s_.channels); ++j) {
      const std::int64_t c = panel * panel_columns + j;
      const float scale = call_.epilogue.scale != nullptr ? call_.epilogue.scale[c] : 1.0f;
      to[j] = call_.epilogue.shift != nullptr ? call_.epilogue.shift[c] : 0.0f;
      for (std::int64_t tap = 0; tap < taps; ++tap) to[(1 + tap) * panel_columns + j] = call_.weight[c * taps + tap] * scale;
    }
  }

  void run(std::int64_t index, float* scratch) const {
    const Unit unit(call_.images, s_, cut_, index);
    float* statistics = scratch + cut_.most_panels() * (ring_.panel_floats() + s_.out_width * panel_columns);
    ring_.clear_margins(scratch, unit.panels);
    const bool pools = call_.reduction == Reduction::pool;
    std::int64_t count = 0;
    for (std::int64_t image = unit.first_image; image < unit.end_image; ++image) {
      if (pools || image == unit.first_image) std::fill_n(statistics, unit.panels * 2 * panel_columns, 0.0f);
      run_image(unit, image, count, statistics, scratch);
      if (pools) write(unit, statistics, call_.partials + image * s_.channels);
    }
    if (call_.reduction != Reduction::statistics) return;
    float* partials = call_.partials + unit.slot * 3 * s_.channels;
    std::fill_n(partials + unit.channel, unit.channels, static_cast<float>(count));
    write(unit, statistics, partials + s_.channels);
    write(unit, statistics + panel_columns, partials + 2 * s_.channels);
  }

 private:
  std::int64_t tap_floats() const { return (1 + s_.kernel * s_.kernel) * panel_columns; }

  // One of the two vectors that are kept for each panel.
  void write(const Unit& unit, const float* vectors, float* to) const {
    for (std::int64_t panel = 0; panel < unit.panels; ++panel) {
      std::copy_n(vectors + 2 * panel * panel_columns, columns_of(unit.first_panel + panel, s_.channels),
                  to + unit.channel + panel * panel_columns);
    }
  }

  void run_image(const Unit& unit, std::int64_t image, std::int64_t& count, float* statistics, float* ring) const {
    float* out = ring + cut_.most_panels() * ring_.panel_floats();
    ActivateRows pay = activate_rows(call_.prologue, image, s_.channels, unit.channel);
    pay.rows = s_.width;
    pay.channels = unit.channels;
    pay.fill = true;
    ActivateRows store{};
    store.x = panel_rows(out, s_.out_width);
    store.rows = s_.out_width;
    store.channels = unit.channels;
    DepthwiseRow row{};
    row.y_pixel = panel_columns;
    row.width = s_.out_width;
    row.stride = s_.stride;
    row.kernel = static_cast<std::int32_t>(s_.kernel);
    row.act = call_.epilogue.act;
    const float* taps[7];
    row.x = taps;
    std::int64_t next = 0;
    for (std::int64_t y = 0; y < s_.out_height; ++y) {
      const std::int64_t top = s_.in_row(y);
      const std::int64_t end = std::min(s_.height, top + s_.kernel);
      for (next = std::max(next, top); next < end; ++next) {
        pay.x = map_rows(call_.x, (image * s_.height + next) * s_.width, s_.channels, unit.channel);
        pay.to = ring_.to(ring, next);
        kernels_.activate_rows_f32(pay);
      }
      row.tap_begin = std::max<std::int64_t>(0, -top);
      row.tap_end = std::max(row.tap_begin, end - top);
      for (std::int64_t panel = 0; panel < unit.panels; ++panel) {
        for (std::int64_t tap = row.tap_begin; tap < row.tap_end; ++tap) taps[tap] = ring_.row(ring, panel, top + tap);
        row.packed = taps_.get() + (unit.first_panel + panel) * tap_floats();
        row.y = out + panel * s_.out_width * panel_columns;
        row.channels = columns_of(unit.first_panel + panel, s_.channels);
        float* kept = statistics + 2 * panel * panel_columns;
        row.sums = call_.reduction == Reduction::pool ? kept : nullptr;
        kernels_.depthwise_row_f32_bias_act_sum(row);
        if (call_.reduction == Reduction::statistics) {
          kernels_.panel_statistics_f32(
              {row.y, panel_columns, s_.out_width, row.channels, count, kept, kept + panel_columns});
        }
      }
      count += s_.out_width;
      store.to = map_rows(call_.y, (image * s_.out_height + y) * s_.out_width, s_.channels, unit.channel);
      kernels_.activate_rows_f32(store);
    }
  }

  const DepthwiseForward& call_;
  const ConvShape& s_;
  const Kernels& kernels_;
  const Ring ring_;
  const Cut cut_;
  Scratch taps_;
};

}  // namespace

std::int64_t depthwise_slots(std::int64_t images) { return std::min(images, most_slots); }

void depthwise_forward(const DepthwiseForward& call, const Execution& execution) {
  const ConvShape& s = call.shape;
  Forward forward(call, execution.kernels);
  const int threads = threads_for(call.images * s.channels * (s.height * s.width + s.out_height * s.out_width), execution.threads);
  parallel_phases(threads, forward.scratch_floats(),
                  Phase{forward.cut().panels, [&](std::int64_t unit, float*) { forward.pack(unit); }},
                  Phase{forward.cut().units(), [&](std::int64_t unit, float* scratch) { forward.run(unit, scratch); }});
}

}  // namespace effnet
