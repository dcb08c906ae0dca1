// What the forward and the backward pass of a depthwise convolution share: rings of padded rows, and how the work is divided.
#pragma once

#include "operators/partition.h"
#include "operators/rows.h"

namespace effnet {

constexpr std::int64_t most_slots = 16;
// Rings of the panels that are done together, and units of a call at least.
constexpr std::int64_t ring_floats = 128 * 1024;
constexpr std::int64_t least_units = 16;

// Padded rows of several panels: row r of panel p is at [p][r % rows], zero outside of [left, left + width).
struct Ring {
  std::int64_t rows, left, width, padded;

  std::int64_t row_floats() const { return padded * panel_columns; }
  std::int64_t panel_floats() const { return rows * row_floats(); }
  float* row(float* ring, std::int64_t panel, std::int64_t index) const {
    return ring + panel * panel_floats() + index % rows * row_floats();
  }
  // Where a load of row `index` of all the panels goes.
  Rows to(float* ring, std::int64_t index) const {
    return {row(ring, 0, index) + left * panel_columns, panel_columns, panel_floats()};
  }
  // The zeros left and right of the rows, which nothing else writes.
  void clear_margins(float* ring, std::int64_t panels) const {
    for (std::int64_t index = 0; index < panels * rows; ++index, ring += row_floats()) {
      std::fill_n(ring, left * panel_columns, 0.0f);
      std::fill_n(ring + (left + width) * panel_columns, (padded - left - width) * panel_columns, 0.0f);
    }
  }
};

// Of the rows that the kernel reads for one output row.
inline Ring input_ring(const ConvShape& s) {
  return {s.kernel, s.left, s.width, s.padded_width()};
}

// Channels in groups of panels, images in slots; a unit is a group of a slot's images.
struct Cut {
  std::int64_t slots, panels, groups;

  Cut(std::int64_t images, const ConvShape& shape, std::int64_t floats_a_panel) {
    slots = depthwise_slots(images);
    panels = ceil_div(shape.channels, panel_columns);
    const std::int64_t in_cache = std::max<std::int64_t>(1, ring_floats / floats_a_panel);
    groups = std::min(panels, std::max(ceil_div(panels, in_cache), ceil_div(least_units, slots)));
  }
  std::int64_t units() const { return slots * groups; }
  std::int64_t most_panels() const { return ceil_div(panels, groups); }
};

struct Unit {
  std::int64_t slot, first_image, end_image, first_panel, panels, channel, channels;

  Unit(std::int64_t images, const ConvShape& shape, const Cut& cut, std::int64_t index) {
    slot = index / cut.groups;
    const std::int64_t group = index % cut.groups;
    first_image = images * slot / cut.slots;
    end_image = images * (slot + 1) / cut.slots;
    first_panel = cut.panels * group / cut.groups;
    panels = cut.panels * (group + 1) / cut.groups - first_panel;
    channel = first_panel * panel_columns;
    channels = std::min(shape.channels - channel, panels * panel_columns);
  }
};

}  // namespace effnet
