// The step that copies an image of any type and strides to a tensor, for the steps that read nothing else.
#include "engine/bf16.h"
#include "engine/step.h"

namespace effnet {
namespace {

template <class T>
class CopyStep final : public Step {
 public:
  explicit CopyStep(const Place& to) : Step("copy"), to_(to) {}

  std::int64_t items(const Run& run) const override { return run.images * to_.height; }

  void run_item(const Run& run, std::int64_t item, float*) const override {
    if (run.image.type == Type::bf16) {
      copy_row<Bf16>(run, item);
    } else {
      copy_row<float>(run, item);
    }
  }

 private:
  template <class From>
  void copy_row(const Run& run, std::int64_t item) const {
    const View& image = run.image;
    const From* from = image.at<const From>(item / to_.height * image.image + item % to_.height * image.row);
    T* to = run.at<T>(to_) + item * to_.width * to_.pitch();
    for (std::int64_t x = 0; x < to_.width; ++x, from += image.pixel, to += to_.pitch()) {
      for (std::int64_t c = 0; c < to_.channels; ++c) to[c] = convert<T>(from[c * image.channel]);
    }
  }

  const Place to_;
};

}  // namespace

template <class T>
std::unique_ptr<Step> copy_step(const Place& to) {
  return std::make_unique<CopyStep<T>>(to);
}

template std::unique_ptr<Step> copy_step<float>(const Place&);
template std::unique_ptr<Step> copy_step<Bf16>(const Place&);

}  // namespace effnet
