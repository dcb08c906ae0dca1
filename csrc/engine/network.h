// A frozen network: all its layers in one call.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <string>
#include <vector>

#include "engine/layer.h"
#include "engine/view.h"

namespace effnet {

class Plan;

// Which of the caller's tensors the steps read and write themselves, without a copy: only dense ones of the network's
// type can be.
struct InPlace {
  bool image = false, output = false;

  bool operator==(const InPlace& other) const { return image == other.image && output == other.output; }
};

// The cost of a step of the network.
struct StepProfile {
  std::string name;
  std::int64_t multiply_adds;
  double seconds;
};

class Network {
 public:
  // outputs are the numbers of tensors (see LayerSpec), in ascending order; the layers were packed for maps of a type.
  Network(std::vector<Layer> layers, std::vector<std::int64_t> outputs, Type type);
  ~Network();
  Network(const Network&) = delete;
  Network& operator=(const Network&) = delete;

  std::vector<MapSize> output_sizes(std::int64_t height, std::int64_t width) const;

  // The image and the outputs may be of any type and strides. Throws std::invalid_argument if the instruction set has
  // no kernels for the network's type. Any number of threads may call it at the same time. If profile is not null, each
  // step's cost is added to it.
  void run(const View& image, std::int64_t batch, std::int64_t height, std::int64_t width,
           const std::vector<View>& outputs, const std::string& isa, int threads,
           std::vector<StepProfile>* profile) const;

 private:
  friend void release_plans();

  InPlace in_place(const View& image, std::int64_t batch, std::int64_t height, std::int64_t width,
                   const std::vector<View>& outputs) const;
  std::shared_ptr<Plan> plan_for(std::int64_t images, std::int64_t height, std::int64_t width, InPlace in_place,
                                 const std::string& isa, int threads) const;

  std::vector<Layer> layers_;
  std::vector<std::int64_t> outputs_;
  Type type_;
  mutable std::list<std::shared_ptr<Plan>> plans_;  // the latest first
};

// Forgets the plans of all networks. Their memory is freed as soon as no call uses it.
void release_plans();

}  // namespace effnet
