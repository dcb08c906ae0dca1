// The steps of a plan. A step is one or two layers that run together, divided into work items that any thread may take.
//
// Tensors are [images, height, width, pitch] of the network's type: T in the functions below, which is float or Bf16.
// In the plan's arena the pitch is round_up(channels, 16), and the numbers after the last channel of a pixel are never
// read. The caller's image and its one output are read and written in place where they are dense, with the channels as
// their pitch. Vectors of a number a channel are floats.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "engine/layer.h"
#include "engine/view.h"

namespace effnet {

// Where a tensor is: in the plan's arena, or in dense memory of the caller's that has its image or its one output. A
// strided image is the caller's in any type and strides, which dense convolutions copy row by row, with padding.
enum class Memory { arena, image, output, strided_image };

struct Place {
  std::int64_t offset = 0;  // in floats, in the arena
  std::int64_t channels = 0, height = 0, width = 0;
  Type type = Type::f32;
  Memory memory = Memory::arena;

  std::int64_t pitch() const { return memory == Memory::arena ? vector() : channels; }
  // Floats of a vector with a number for each channel.
  std::int64_t vector() const { return round_up(channels, panel_columns); }
  std::int64_t pixels() const { return height * width; }
  std::int64_t size() const { return pixels() * pitch(); }  // of one image, in numbers
  std::int64_t floats() const { return ceil_div(size() * size_of(type), size_of(Type::f32)); }
};

// The arguments of one run through the steps.
struct Run {
  View image;   // the network's input
  View output;  // its output, where it is written in place
  float* arena;
  std::int64_t images;
  int threads;
  const Kernels& kernels;

  float* at(std::int64_t offset) const { return arena + offset; }
  template <class T>
  T* at(std::int64_t offset) const {
    return reinterpret_cast<T*>(arena + offset);
  }
  template <class T>
  T* at(const Place& place) const {
    if (place.memory == Memory::arena) return at<T>(place.offset);
    return static_cast<T*>(place.memory == Memory::output ? output.data : image.data);
  }
  View map(const Place& place) const {
    if (place.memory == Memory::image || place.memory == Memory::strided_image) return image;
    return {at<void>(place), place.type, place.size(), 1, place.width * place.pitch(), place.pitch()};
  }
};

class Step {
 public:
  explicit Step(std::string name) : name(std::move(name)) {}
  virtual ~Step() = default;

  // The number of work items.
  virtual std::int64_t items(const Run& run) const = 0;
  // Work items may run in any order and at the same time. scratch is scratch_floats() of memory that is the thread's
  // own.
  virtual void run_item(const Run& run, std::int64_t item, float* scratch) const = 0;
  virtual std::int64_t scratch_floats() const { return 0; }
  // For one image.
  virtual std::int64_t multiply_adds() const { return 0; }

  const std::string name;
};

// Into how many work items a step divides an image: so many for each thread that the others take over those of a thread
// that is interrupted.
inline std::int64_t wanted_items(std::int64_t per_thread, std::int64_t images, int threads) {
  return threads > 1 ? ceil_div(per_thread * threads, images) : 1;
}

// In place of an offset in the arena: there is no such tensor.
constexpr std::int64_t absent = -1;

// Shards of a map's rows, each of which has partial sums of its own in a depthwise step.
constexpr std::int64_t sum_shards = 4;

// Copies the caller's image to a tensor.
std::unique_ptr<Step> copy_step(const Place& to);

// A 1 x 1 convolution: act(x @ w + b) + residual, which has y's pitch; or with Layer.spec.pool the spatial mean of
// that. If scaled is not absent, the weights are there, for each image.
template <class T>
std::unique_ptr<Step> pointwise_step(const Layer& layer, const Place& x, const Place& y,
                                     const std::optional<Place>& residual, std::int64_t scaled);

// Any other dense convolution: act(conv(x) + b) + residual. Also a 1 x 1 convolution of an image in other strides.
template <class T>
std::unique_ptr<Step> dense_step(const Layer& layer, const Place& x, const Place& y,
                                 const std::optional<Place>& residual);

// The same for float32 by Winograd's transforms, of a layer that was packed for them.
std::unique_ptr<Step> winograd_step(const Layer& layer, const Place& x, const Place& y,
                                    const std::optional<Place>& residual, std::int64_t images, int threads);

// A depthwise convolution of x; or, with a producer, of that layer's output of x, of which only a few rows at a time
// are stored. If sums is not absent, the output's sums for the squeeze are [images, sum_shards, round_up(channels, 16)]
// there. The numbers of images and threads decide how the step is divided into work items, not what it computes.
template <class T>
std::unique_ptr<Step> depthwise_step(const Layer& layer, const Layer* producer, const Place& x, const Place& y,
                                     std::int64_t sums, std::int64_t images, int threads);

// The same sums of a map that another step has made.
template <class T>
std::unique_ptr<Step> sum_step(const Place& map, std::int64_t sums);

// The squeeze and the first layer of squeeze-and-excitation: from sums to hidden, [images, round_up(squeeze, 16)].
std::unique_ptr<Step> squeeze_step(const Layer& layer, const Place& map, std::int64_t sums, std::int64_t hidden,
                                   std::int64_t images);

// The second layer: from hidden to the gate, [images, round_up(channels, 16)]; and with a next layer, which is a 1 x 1
// convolution, to its packed weights times the gate, [images, matrix].
template <class T>
std::unique_ptr<Step> excite_step(const Layer& layer, const Place& map, std::int64_t hidden, std::int64_t gate,
                                  const Layer* next, std::int64_t scaled);

// Multiplies the map by the gate, in place.
template <class T>
std::unique_ptr<Step> scale_step(const Place& map, std::int64_t gate);

}  // namespace effnet
