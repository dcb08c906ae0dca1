// The steps of a plan: one or two layers that run together, cut in units of work that any thread may take.
//
// Tensors are [images, height, width, round_up(channels, 16)] in the plan's arena. What lies between the last channel and
// the next multiple of 16 is never read.
#pragma once

#include <memory>
#include <string>

#include "engine/layer.h"
#include "engine/view.h"

namespace effnet {

// A tensor in the plan's arena, or the network's input.
struct Place {
  std::int64_t offset = 0;
  std::int64_t channels = 0, height = 0, width = 0;
  bool is_image = false;

  std::int64_t pitch() const { return round_up(channels, panel_columns); }
  std::int64_t pixels() const { return height * width; }
  std::int64_t floats() const { return pixels() * pitch(); }
};

// One pass over the steps.
struct Run {
  View image;  // the network's input
  float* arena;
  std::int64_t images;
  int threads;
  const Kernels& kernels;

  float* at(std::int64_t offset) const { return arena + offset; }
  float* at(const Place& place) const { return arena + place.offset; }
  View map(const Place& place) const {
    if (place.is_image) return image;
    return {at(place), place.floats(), 1, place.width * place.pitch(), place.pitch()};
  }
};

class Step {
 public:
  explicit Step(std::string name) : name(std::move(name)) {}
  virtual ~Step() = default;

  virtual std::int64_t units(const Run& run) const = 0;
  // Units may run in any order and at the same time. Scratch is the thread's own, scratch_floats() long.
  virtual void run_unit(const Run& run, std::int64_t unit, float* scratch) const = 0;
  virtual std::int64_t scratch_floats() const { return 0; }
  // Of one image.
  virtual std::int64_t multiply_adds() const { return 0; }

  const std::string name;
};

constexpr std::int64_t absent = -1;

// Bands of rows whose sums a depthwise step keeps apart.
constexpr std::int64_t sum_bands = 4;

// A 1 x 1 convolution: act(x @ w + b) + residual, of weights that the gate may scale; or the mean of that.
std::unique_ptr<Step> pointwise_step(const Layer& layer, const Place& x, const Place& y, std::int64_t residual,
                                     std::int64_t gate);

// A k x k convolution, or a 1 x 1 one of the image: act(conv(x) + b) + residual.
std::unique_ptr<Step> dense_step(const Layer& layer, const Place& x, const Place& y, std::int64_t residual);

// A depthwise convolution, of x or, with a producer, of that layer's output, which is never stored whole. With sums,
// [images, sum_bands, round_up(channels, 16)] partial sums of the output for the squeeze.
std::unique_ptr<Step> depthwise_step(const Layer& layer, const Layer* producer, const Place& x, const Place& y,
                                     std::int64_t sums);

// The squeeze and the first matrix of squeeze-and-excitation: sums to [images, round_up(squeeze, 16)].
std::unique_ptr<Step> squeeze_step(const Layer& layer, const Place& map, std::int64_t sums, std::int64_t hidden,
                                   std::int64_t images);

// The second: the gate, [images, pitch].
std::unique_ptr<Step> excite_step(const Layer& layer, const Place& map, std::int64_t hidden, std::int64_t gate);

// The map times the gate, in place.
std::unique_ptr<Step> scale_step(const Place& map, std::int64_t gate);

}  // namespace effnet
