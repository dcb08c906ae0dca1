// A network for one size of image: its steps, and where in memory every tensor is.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/network.h"
#include "engine/step.h"

namespace effnet {

class Plan {
 public:
  // For up to `images` images at a time.
  Plan(const std::vector<Layer>& layers, const std::vector<std::int64_t>& outputs, Type type, std::int64_t images,
       std::int64_t height, std::int64_t width, InPlace in_place, const Kernels& kernels, int threads);

  bool fits(std::int64_t images, std::int64_t height, std::int64_t width, InPlace in_place, const std::string& isa,
            int threads) const;

  // Runs the first `images` images of a view, no more than the plan was made for.
  void run(const View& image, std::int64_t images, const std::vector<View>& outputs,
           std::vector<StepProfile>* profile) const;

 private:
  Type type_;
  std::int64_t images_, height_, width_;
  InPlace in_place_;
  const Kernels& kernels_;
  int threads_;
  std::vector<std::unique_ptr<Step>> steps_;
  std::vector<Place> outputs_;
  std::int64_t tensor_floats_ = 0, scratch_floats_ = 0;
};

// The sizes of every tensor, the image's first (see LayerSpec).
std::vector<MapSize> tensor_sizes(const std::vector<Layer>& layers, std::int64_t height, std::int64_t width);

}  // namespace effnet
