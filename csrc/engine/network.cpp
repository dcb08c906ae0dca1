#include "engine/network.h"

#include <algorithm>
#include <set>
#include <stdexcept>

#include "engine/plan.h"
#include "kernels/dispatch.h"
#include "platform/lock.h"

namespace effnet {
namespace {

// Images that go through the network together: enough to make use of weights once they are read, few enough for their
// maps to stay in cache from one layer to the next.
constexpr std::int64_t images_together = 4;

constexpr std::size_t plans_kept = 8;

// All networks; the lock protects it. Never destroyed, because a network may be destroyed after every static object.
std::set<const Network*>& networks() {
  static std::set<const Network*>& networks = *new std::set<const Network*>;
  return networks;
}

}  // namespace

Network::Network(std::vector<Layer> layers, std::vector<std::int64_t> outputs, Type type)
    : layers_(std::move(layers)), outputs_(std::move(outputs)), type_(type) {
  const std::int64_t count = static_cast<std::int64_t>(layers_.size());
  if (count == 0) throw std::invalid_argument("expected at least one layer, got none");
  for (std::int64_t i = 0; i < count; ++i) {
    const LayerSpec& spec = layers_[static_cast<std::size_t>(i)].spec;
    const std::string name = "layer " + std::to_string(i) + ": ";
    const std::int64_t channels =
        i == 0 ? spec.in_channels : layers_[static_cast<std::size_t>(i - 1)].spec.out_channels;
    if (spec.in_channels != channels) {
      throw std::invalid_argument(name + "expected " + std::to_string(channels) + " input channels, as layer " +
                                  std::to_string(i - 1) + " has outputs, got " + std::to_string(spec.in_channels));
    }
    if (spec.kind == LayerKind::depthwise && (spec.kernel < 3 || spec.kernel > 7 || spec.kernel % 2 == 0)) {
      throw std::invalid_argument(name + "expected a depthwise kernel of 3, 5 or 7, got " +
                                  std::to_string(spec.kernel));
    }
    if (spec.pool && (!spec.pointwise() || spec.residual >= 0)) {
      throw std::invalid_argument(name + "expected a 1x1 convolution without a residual to pool, got another");
    }
    if (spec.excitation.squeeze > 0 && (spec.pool || spec.residual >= 0)) {
      throw std::invalid_argument(name + "expected neither a residual nor pooling beside squeeze-and-excitation");
    }
    if (spec.residual > i || (spec.residual >= 0 && spec.kind == LayerKind::depthwise)) {
      throw std::invalid_argument(name + "expected a residual out of tensors 0 to " + std::to_string(i) +
                                  " added to a convolution, got " + std::to_string(spec.residual));
    }
    if (spec.residual >= 0) {
      const std::size_t producer = static_cast<std::size_t>(std::max<std::int64_t>(0, spec.residual - 1));
      const std::int64_t added =
          spec.residual == 0 ? layers_.front().spec.in_channels : layers_[producer].spec.out_channels;
      if (added != spec.out_channels) {
        throw std::invalid_argument(name + "expected a residual of " + std::to_string(spec.out_channels) +
                                    " channels, got tensor " + std::to_string(spec.residual) + " of " +
                                    std::to_string(added));
      }
    }
  }
  for (const std::int64_t tensor : outputs_) {
    if (tensor < 1 || tensor > count) {
      throw std::invalid_argument("expected outputs out of 1 to " + std::to_string(count) + ", got " +
                                  std::to_string(tensor));
    }
  }
  const Lock lock;
  networks().insert(this);
}

Network::~Network() {
  const Lock lock;
  networks().erase(this);
}

std::vector<MapSize> Network::output_sizes(std::int64_t height, std::int64_t width) const {
  const std::vector<MapSize> sizes = tensor_sizes(layers_, height, width);
  std::vector<MapSize> chosen;
  for (const std::int64_t tensor : outputs_) chosen.push_back(sizes[static_cast<std::size_t>(tensor)]);
  return chosen;
}

InPlace Network::in_place(const View& image, std::int64_t batch, std::int64_t height, std::int64_t width,
                          const std::vector<View>& outputs) const {
  const std::int64_t count = static_cast<std::int64_t>(layers_.size());
  InPlace in_place;
  in_place.image = image.type == type_ && image.is_dense({layers_.front().spec.in_channels, height, width}, batch);
  // Kernels write multiples of 8 channels.
  in_place.output = outputs_ == std::vector<std::int64_t>{count} && layers_.back().spec.out_channels % 8 == 0 &&
                    outputs.front().type == type_ &&
                    outputs.front().is_dense(output_sizes(height, width).front(), batch);
  // A residual and what it is added to have one pitch.
  for (std::int64_t i = 0; i < count; ++i) {
    const LayerSpec& spec = layers_[static_cast<std::size_t>(i)].spec;
    if (spec.residual < 0 || spec.out_channels % panel_columns == 0) continue;
    const bool of_image = spec.residual == 0, to_output = i + 1 == count;
    if (of_image && to_output) {
      in_place.image = in_place.output = in_place.image && in_place.output;
    } else if (of_image) {
      in_place.image = false;
    } else if (to_output) {
      in_place.output = false;
    }
  }
  return in_place;
}

std::shared_ptr<Plan> Network::plan_for(std::int64_t images, std::int64_t height, std::int64_t width, InPlace in_place,
                                        const std::string& isa, int threads) const {
  {
    const Lock lock;
    for (auto plan = plans_.begin(); plan != plans_.end(); ++plan) {
      if ((*plan)->fits(images, height, width, in_place, isa, threads)) {
        plans_.splice(plans_.begin(), plans_, plan);
        return plans_.front();
      }
    }
  }
  // Threads that get here at the same time make a plan each; the duplicates are forgotten in their turn.
  const Kernels& kernels = kernels_of(isa);
  if (type_ == Type::bf16 && kernels.bf16 == nullptr) throw std::invalid_argument(without_bf16(isa));
  auto made =
      std::make_shared<Plan>(layers_, outputs_, type_, images, height, width, in_place, kernels, std::max(1, threads));
  std::shared_ptr<Plan> forgotten;  // freed after the lock is released
  const Lock lock;
  plans_.push_front(made);
  if (plans_.size() > plans_kept) {
    forgotten = std::move(plans_.back());
    plans_.pop_back();
  }
  return made;
}

void release_plans() {
  std::list<std::shared_ptr<Plan>> forgotten;  // freed after the lock is released
  const Lock lock;
  for (const Network* network : networks()) forgotten.splice(forgotten.end(), network->plans_);
}

void Network::run(const View& image, std::int64_t batch, std::int64_t height, std::int64_t width,
                  const std::vector<View>& outputs, const std::string& isa, int threads,
                  std::vector<StepProfile>* profile) const {
  const std::shared_ptr<Plan> plan = plan_for(std::min(batch, images_together), height, width,
                                              in_place(image, batch, height, width, outputs), isa, threads);
  for (std::int64_t first = 0; first < batch; first += images_together) {
    std::vector<View> parts;
    for (const View& output : outputs) parts.push_back(output.from_image(first));
    plan->run(image.from_image(first), std::min(images_together, batch - first), parts, profile);
  }
}

}  // namespace effnet
