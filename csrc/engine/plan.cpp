#include "engine/plan.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>

#include "engine/copy_rows.h"
#include "platform/parallel.h"
#include "platform/pool.h"

namespace effnet {
namespace {

MapSize output_of(const LayerSpec& layer, const MapSize& input) {
  if (layer.pool) return {layer.out_channels, 1, 1};
  const ConvShape shape = conv_shape(layer, input.height, input.width);
  return {layer.out_channels, shape.out_height, shape.out_width};
}

std::string describe(const MapSize& size) {
  return std::to_string(size.channels) + " x " + std::to_string(size.height) + " x " + std::to_string(size.width);
}

bool contains(const std::vector<std::int64_t>& values, std::int64_t value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

// Decides which layers run together and where in the arena every tensor is.
class Layout {
 public:
  Layout(const std::vector<Layer>& layers, const std::vector<std::int64_t>& outputs, std::int64_t images,
         std::int64_t height, std::int64_t width, Type type, InPlace in_place)
      : layers_(layers), outputs_(outputs), images_(images) {
    const std::vector<MapSize> sizes = tensor_sizes(layers, height, width);
    const std::int64_t count = static_cast<std::int64_t>(layers.size());
    places.resize(layers.size() + 1);
    sums.assign(layers.size(), absent);
    hidden = gate = scaled = sums;
    for (std::int64_t i = 0; i <= count; ++i) {
      const MapSize& size = sizes[static_cast<std::size_t>(i)];
      places[static_cast<std::size_t>(i)] = {0, size.channels, size.height, size.width, type};
    }
    Place& image = places.front();
    if (in_place.image) {
      image.memory = Memory::image;
    } else if (reads_image_as_tensor()) {
      place(images * image.floats(), 0, last_use(0), image.offset);
    } else {
      image.memory = Memory::strided_image;
    }
    if (in_place.output) places.back().memory = Memory::output;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::size_t at = static_cast<std::size_t>(i);
      if (!fused_into_next(i) && places[at + 1].memory == Memory::arena) {
        place(images * places[at + 1].floats(), i, last_use(i + 1), places[at + 1].offset);
      }
      const Excitation& excitation = layers[at].spec.excitation;
      if (excitation.squeeze == 0) continue;
      place(images * sum_shards * places[at + 1].vector(), i, i, sums[at]);
      place(images * round_up(excitation.squeeze, panel_columns), i, i, hidden[at]);
      place(images * places[at + 1].vector(), i, i, gate[at]);
      if (!gates_map(i)) place(images * layers[at + 1].matrix.floats(), i, i + 1, scaled[at]);
    }
  }

  // Whether a convolution runs inside the step of the depthwise layer after it, as it does if no other layer reads its
  // output and no gate scales it: that is the largest tensor of the block, and a few of its rows at a time stay in
  // cache.
  bool fused_into_next(std::int64_t i) const {
    const std::size_t at = static_cast<std::size_t>(i);
    return at + 1 < layers_.size() && layers_[at].spec.kind == LayerKind::conv && layers_[at].winograd == nullptr &&
           !layers_[at].spec.pool && layers_[at].spec.residual < 0 && layers_[at].spec.excitation.squeeze == 0 &&
           layers_[at + 1].spec.kind == LayerKind::depthwise && last_use(i + 1) == i + 1;
  }

  // Whether the gate scales the map, rather than the weights of the 1 x 1 convolution after it, which costs a pass over
  // them for each image: the map is scaled where it has fewer numbers, or another layer reads it. So it is before a
  // convolution that runs inside the step of the depthwise layer behind it, which takes no scaled weights.
  bool gates_map(std::int64_t i) const {
    const std::size_t at = static_cast<std::size_t>(i);
    if (at + 1 == layers_.size() || last_use(i + 1) != i + 1) return true;
    const LayerSpec& next = layers_[at + 1].spec;
    if (!next.pointwise()) return true;
    return places[at + 1].pixels() < next.out_channels;
  }

  std::vector<Place> places;                             // of the tensors
  std::vector<std::int64_t> sums, hidden, gate, scaled;  // offsets, of layers with squeeze-and-excitation
  std::int64_t floats = 0;                               // of the arena

 private:
  // A range of the arena that is in use while layers [first, last] run.
  struct Taken {
    std::int64_t begin, end, first, last;
  };

  // Whether a step reads the image otherwise than a dense convolution does, which takes it in any type and strides.
  bool reads_image_as_tensor() const {
    const LayerSpec& first = layers_.front().spec;
    return first.kind == LayerKind::depthwise || first.pool ||
           std::any_of(layers_.begin(), layers_.end(), [](const Layer& layer) { return layer.spec.residual == 0; });
  }

  // The last layer that reads a tensor.
  std::int64_t last_use(std::int64_t tensor) const {
    const std::int64_t count = static_cast<std::int64_t>(layers_.size());
    if (contains(outputs_, tensor)) return count;
    std::int64_t last = tensor;
    for (std::int64_t i = 0; i < count; ++i) {
      if (layers_[static_cast<std::size_t>(i)].spec.residual == tensor) last = std::max(last, i);
    }
    // A step of two layers reads the input of the first while it writes the output of the second.
    return last == tensor && tensor < count && fused_into_next(tensor) ? tensor + 1 : last;
  }

  // Finds the first gap of `size` floats that is free while layers [first, last] run.
  void place(std::int64_t size, std::int64_t first, std::int64_t last, std::int64_t& offset) {
    std::int64_t at = 0;
    for (bool moved = true; moved;) {
      moved = false;
      for (const Taken& taken : taken_) {
        if (taken.first <= last && first <= taken.last && taken.begin < at + size && at < taken.end) {
          at = taken.end;
          moved = true;
        }
      }
    }
    const std::int64_t end = at + round_up(size, panel_columns);
    taken_.push_back({at, end, first, last});
    floats = std::max(floats, end);
    offset = at;
  }

  const std::vector<Layer>& layers_;
  const std::vector<std::int64_t>& outputs_;
  const std::int64_t images_;
  std::vector<Taken> taken_;
};

// The steps of all layers, whose maps are of type T.
template <class T>
std::vector<std::unique_ptr<Step>> make_steps(const std::vector<Layer>& layers, const Layout& layout,
                                              std::int64_t images, int threads) {
  std::vector<std::unique_ptr<Step>> steps;
  if (layout.places.front().memory == Memory::arena) steps.push_back(copy_step(layout.places.front()));
  std::int64_t scaled = absent;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const LayerSpec& spec = layers[i].spec;
    const bool fused = layout.fused_into_next(static_cast<std::int64_t>(i));
    const Layer* producer = fused ? &layers[i] : nullptr;
    const Place& x = layout.places[i];
    if (fused) ++i;
    const Layer& layer = layers[i];
    const Place& y = layout.places[i + 1];
    std::optional<Place> residual;
    if (layer.spec.residual >= 0) residual = layout.places[static_cast<std::size_t>(layer.spec.residual)];
    if (layer.spec.kind == LayerKind::depthwise) {
      steps.push_back(depthwise_step<T>(layer, producer, x, y, layout.sums[i], images, threads));
    } else if (spec.pointwise() && x.memory != Memory::strided_image) {
      steps.push_back(pointwise_step<T>(layer, x, y, residual, scaled));
    } else if (layer.winograd != nullptr) {
      steps.push_back(winograd_step(layer, x, y, residual, images, threads));
    } else {
      steps.push_back(dense_step<T>(layer, x, y, residual));
    }
    scaled = layout.scaled[i];
    if (layer.spec.excitation.squeeze == 0) continue;
    if (layer.spec.kind != LayerKind::depthwise) steps.push_back(sum_step<T>(y, layout.sums[i]));
    const Layer* next = scaled != absent ? &layers[i + 1] : nullptr;
    steps.push_back(squeeze_step(layer, y, layout.sums[i], layout.hidden[i], images));
    steps.push_back(excite_step<T>(layer, y, layout.hidden[i], layout.gate[i], next, scaled));
    if (next == nullptr) steps.push_back(scale_step<T>(y, layout.gate[i]));
  }
  return steps;
}

}  // namespace

std::vector<MapSize> tensor_sizes(const std::vector<Layer>& layers, std::int64_t height, std::int64_t width) {
  std::vector<MapSize> sizes = {{layers.front().spec.in_channels, height, width}};
  for (const Layer& layer : layers) {
    sizes.push_back(output_of(layer.spec, sizes.back()));
    if (sizes.back().height < 1 || sizes.back().width < 1) {
      throw std::invalid_argument("expected a larger image, got " + std::to_string(height) + " x " +
                                  std::to_string(width) + ", of which a convolution leaves nothing");
    }
    if (layer.spec.residual < 0) continue;
    const MapSize& added = sizes[static_cast<std::size_t>(layer.spec.residual)];
    if (added.height != sizes.back().height || added.width != sizes.back().width) {
      throw std::invalid_argument("layer " + std::to_string(sizes.size() - 2) + ": expected a residual of " +
                                  describe(sizes.back()) + ", got " + describe(added));
    }
  }
  return sizes;
}

Plan::Plan(const std::vector<Layer>& layers, const std::vector<std::int64_t>& outputs, Type type, std::int64_t images,
           std::int64_t height, std::int64_t width, InPlace in_place, const Kernels& kernels, int threads)
    : type_(type), images_(images), height_(height), width_(width), in_place_(in_place), kernels_(kernels),
      threads_(threads) {
  const Layout layout(layers, outputs, images, height, width, type, in_place);
  steps_ = type == Type::bf16 ? make_steps<Bf16>(layers, layout, images, threads)
                              : make_steps<float>(layers, layout, images, threads);
  for (const std::int64_t tensor : outputs) {
    outputs_.push_back(layout.places[static_cast<std::size_t>(tensor)]);
  }
  tensor_floats_ = layout.floats;
  for (const auto& step : steps_) scratch_floats_ = std::max(scratch_floats_, step->scratch_floats());
  // Different threads write to different cache lines.
  scratch_floats_ = round_up(scratch_floats_, panel_columns) + panel_columns;
}

bool Plan::fits(std::int64_t images, std::int64_t height, std::int64_t width, InPlace in_place, const std::string& isa,
                int threads) const {
  return images == images_ && height == height_ && width == width_ && in_place == in_place_ && threads == threads_ &&
         isa == kernels_.isa;
}

void Plan::run(const View& image, std::int64_t images, const std::vector<View>& outputs,
               std::vector<StepProfile>* profile) const {
  const Scratch arena(tensor_floats_ + threads_ * scratch_floats_);
  const Run run{image, in_place_.output ? outputs.front() : View{}, arena.get(), images, threads_, kernels_};
  // Each thread takes the next work item when it is free, so that a thread that is interrupted delays the others by one
  // item at most.
  const auto taken = std::make_unique<std::atomic<std::int64_t>[]>(steps_.size());
  for (std::size_t i = 0; i < steps_.size(); ++i) taken[i] = 0;
  std::vector<double> seconds(profile == nullptr ? 0 : steps_.size());
  parallel_team(threads_, [&](Team& team) {
    float* scratch = arena.get() + tensor_floats_ + team.index() * scratch_floats_;
    auto start = std::chrono::steady_clock::now();
    for (std::size_t i = 0; i < steps_.size(); ++i) {
      const std::int64_t items = steps_[i]->items(run);
      for (std::int64_t item; (item = taken[i].fetch_add(1, std::memory_order_relaxed)) < items;) {
        steps_[i]->run_item(run, item, scratch);
      }
      team.barrier();
      if (profile != nullptr && team.index() == 0) {
        const auto now = std::chrono::steady_clock::now();
        seconds[i] = std::chrono::duration<double>(now - start).count();
        start = now;
      }
    }
    for (std::size_t i = 0; i < outputs_.size() && !in_place_.output; ++i) {
      const Place& place = outputs_[i];
      const std::int64_t rows = images * place.height;
      for (std::int64_t row = rows * team.index() / team.count(); row < rows * (team.index() + 1) / team.count();
           ++row) {
        copy_row(run.map(place), outputs[i], {place.channels, place.height, place.width}, row);
      }
    }
  });
  if (profile != nullptr) {
    if (profile->empty()) {
      for (const auto& step : steps_) profile->push_back({step->name, 0, 0.0});
    }
    for (std::size_t i = 0; i < steps_.size(); ++i) {
      (*profile)[i].multiply_adds += images * steps_[i]->multiply_adds();
      (*profile)[i].seconds += seconds[i];
    }
  }
}

}  // namespace effnet
