// What the forward and the backward pass of a depthwise convolution share: rings of padded rows, and how the work is
// divided.
#pragma once

#include "operators/partition.h"
#include "operators/rows.h"

namespace effnet {

// Shards of the images, at most.
constexpr std::int64_t most_shards = 16;
// The size that the rings of panels which are computed together may have, so that they stay in cache.
constexpr std::int64_t ring_floats = 128 * 1024;
// Work items of a call, at least, as far as there are panels.
constexpr std::int64_t least_items = 16;

// A ring buffer of padded rows for each of several panels: row r of panel p is at [p][r % rows], with zeros outside of
// [left, left + width).
struct Ring {
  std::int64_t rows, left, width, padded;

  std::int64_t row_floats() const { return padded * panel_columns; }
  std::int64_t panel_floats() const { return rows * row_floats(); }
  float* row(float* ring, std::int64_t panel, std::int64_t index) const {
    return ring + panel * panel_floats() + index % rows * row_floats();
  }
  // Row `index` of all the panels, without its margins, for a kernel to write.
  Rows to(float* ring, std::int64_t index) const {
    return {row(ring, 0, index) + left * panel_columns, panel_columns, panel_floats()};
  }
  // Writes the zeros left and right of the rows; they stay, because rows are written between them.
  void clear_margins(float* ring, std::int64_t panels) const {
    for (std::int64_t index = 0; index < panels * rows; ++index, ring += row_floats()) {
      std::fill_n(ring, left * panel_columns, 0.0f);
      std::fill_n(ring + (left + width) * panel_columns, (padded - left - width) * panel_columns, 0.0f);
    }
  }
};

// Has room for the input rows that one output row reads.
inline Ring input_ring(const ConvShape& shape) { return {shape.kernel, shape.left, shape.width, shape.padded_width()}; }

// Images are divided into shards and channels into groups of panels; a work item is one group of one shard's images.
struct Partition {
  std::int64_t shards, panels, groups;

  Partition(std::int64_t images, const ConvShape& shape, std::int64_t floats_per_panel) {
    shards = depthwise_shards(images);
    panels = panels_of(shape.channels);
    const std::int64_t in_cache = std::max<std::int64_t>(1, ring_floats / floats_per_panel);
    groups = std::min(panels, std::max(ceil_div(panels, in_cache), ceil_div(least_items, shards)));
  }
  std::int64_t items() const { return shards * groups; }
  std::int64_t most_panels() const { return ceil_div(panels, groups); }
};

// The images and the channels of a work item.
struct WorkItem {
  std::int64_t shard, first_image, end_image, first_panel, panels, channel, channels;

  WorkItem(std::int64_t images, const ConvShape& shape, const Partition& partition, std::int64_t index) {
    shard = index / partition.groups;
    const std::int64_t group = index % partition.groups;
    first_image = images * shard / partition.shards;
    end_image = images * (shard + 1) / partition.shards;
    first_panel = partition.panels * group / partition.groups;
    panels = partition.panels * (group + 1) / partition.groups - first_panel;
    channel = first_panel * panel_columns;
    channels = std::min(shape.channels - channel, panels * panel_columns);
  }
};

}  // namespace effnet
