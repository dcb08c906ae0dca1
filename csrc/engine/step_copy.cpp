// The step that copies an image of any type and strides to a tensor, for the steps that read nothing else.
#include "engine/copy_rows.h"
#include "engine/step.h"

namespace effnet {
namespace {

class CopyStep final : public Step {
 public:
  explicit CopyStep(const Place& to) : Step("copy"), to_(to) {}

  std::int64_t items(const Run& run) const override { return run.images * to_.height; }

  void run_item(const Run& run, std::int64_t item, float*) const override {
    copy_row(run.image, run.map(to_), {to_.channels, to_.height, to_.width}, item);
  }

 private:
  const Place to_;
};

}  // namespace

std::unique_ptr<Step> copy_step(const Place& to) { return std::make_unique<CopyStep>(to); }

}  // namespace effnet
