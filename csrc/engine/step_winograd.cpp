// 3 x 3 convolutions of stride 1 by Winograd's F(4 x 4, 3 x 3). A work item is some rows of tiles: it transforms their
// input, which stays in cache while a pair of panels after another is multiplied by it and transformed back.
#include <algorithm>

#include "engine/copy_rows.h"
#include "engine/step.h"

namespace effnet {
namespace {

// The size of the transformed input of a work item, which stays in the second-level cache.
constexpr std::int64_t input_floats = 96 * 1024;
constexpr std::int64_t items_per_thread = 4;

class WinogradStep final : public Step {
 public:
  WinogradStep(const Layer& layer, const Place& x, const Place& y, const std::optional<Place>& residual,
               std::int64_t images, int threads)
      : Step("winograd 3x3 " + std::to_string(layer.spec.in_channels) + " to " +
             std::to_string(layer.spec.out_channels) + " at " + std::to_string(x.height) + "x" +
             std::to_string(x.width)),
        layer_(layer),
        x_(x),
        y_(y),
        residual_(residual),
        columns_(ceil_div(y.width, tile)),
        rows_(ceil_div(y.height, tile)),
        padded_(conv_shape(layer.spec, x.height, x.width)) {
    // Tiles reach beyond the map's end, where their input is zeros.
    padded_.out_width = columns_ * tile;
    const std::int64_t in_cache = input_floats / (products * layer.spec.in_channels * columns_);
    const std::int64_t wanted = wanted_items(items_per_thread, images, threads);
    rows_per_item_ = std::max<std::int64_t>(1, std::min(in_cache, rows_ / wanted));
  }

  std::int64_t items(const Run& run) const override { return run.images * items_per_image(); }

  std::int64_t scratch_floats() const override {
    return padded_floats() + input_size() + products * tiles() * panels_together * panel_columns;
  }

  // Those of the products: about a quarter of the convolution's.
  std::int64_t multiply_adds() const override {
    return products * rows_ * columns_ * layer_.spec.in_channels * layer_.spec.out_channels;
  }

  void run_item(const Run& run, std::int64_t item, float* scratch) const override {
    const std::int64_t image = item / items_per_image(), first = item % items_per_image() * rows_per_item_;
    const std::int64_t rows = std::min(rows_per_item_, rows_ - first), channels = layer_.spec.in_channels;
    float* input = scratch + padded_floats();
    float* output = input + input_size();
    copy_padded_rows(run.map(x_), image, padded_, padded_.in_row(first * tile), rows * tile + 2, scratch);
    for (std::int64_t row = 0; row < rows; ++row) {
      WinogradInput call{};
      call.x_row = padded_.padded_width() * channels;
      call.x = scratch + row * tile * call.x_row;
      call.tiles = columns_;
      call.channels = channels;
      call.to = input + row * columns_ * channels;
      call.to_product = rows * columns_ * channels;
      run.kernels.winograd_input_f32(call);
    }
    alignas(64) static const float no_bias[panels_together * panel_columns] = {};
    for (std::int64_t panel = 0; panel < layer_.panel_count(); panel += panels_together) {
      const std::int64_t panels = std::min(panels_together, layer_.panel_count() - panel);
      Gemm<float> gemm{};
      gemm.a_row = channels;
      gemm.segments = 1;
      gemm.segment_length = channels;
      gemm.bias = no_bias;
      gemm.y_row = panels_together * panel_columns;
      gemm.y_panel = panel_columns;
      gemm.rows = rows * columns_;
      gemm.columns = layer_.matrix.columns(panel, panels);
      for (std::int64_t product = 0; product < products; ++product) {
        gemm.a = input + product * gemm.rows * channels;
        gemm.b = layer_.winograd.get() + (panel * products + product * panels) * channels * panel_columns;
        gemm.y = output + product * gemm.rows * gemm.y_row;
        run.kernels.f32.gemm_bias_act_residual_sum(gemm);
      }
      for (std::int64_t index = panel; index < panel + panels; ++index) {
        for (std::int64_t row = 0; row < rows; ++row) {
          store(run, image, first + row, index, output + row * columns_ * gemm.y_row + (index - panel) * panel_columns,
                gemm.rows * gemm.y_row);
        }
      }
    }
  }

 private:
  static constexpr std::int64_t tile = 4, products = 36;

  std::int64_t items_per_image() const { return ceil_div(rows_, rows_per_item_); }
  std::int64_t tiles() const { return rows_per_item_ * columns_; }
  std::int64_t input_size() const { return products * tiles() * layer_.spec.in_channels; }
  std::int64_t padded_floats() const {
    return (rows_per_item_ * tile + 2) * padded_.padded_width() * layer_.spec.in_channels;
  }

  void store(const Run& run, std::int64_t image, std::int64_t row, std::int64_t panel, const float* m,
             std::int64_t m_product) const {
    const std::int64_t at = (image * y_.pixels() + row * tile * y_.width) * y_.pitch() + panel * panel_columns;
    WinogradOutput call{};
    call.m = m;
    call.m_product = m_product;
    call.m_tile = panels_together * panel_columns;
    call.bias = layer_.matrix.bias.get() + panel * panel_columns;
    call.y = run.at<float>(y_) + at;
    call.residual = residual_ ? run.at<float>(*residual_) + at : nullptr;
    call.y_row = y_.width * y_.pitch();
    call.y_pixel = y_.pitch();
    call.tiles = columns_;
    call.rows = std::min(tile, y_.height - row * tile);
    call.width = y_.width;
    call.channels = layer_.matrix.columns(panel);
    call.act = layer_.spec.act;
    run.kernels.winograd_output_f32(call);
  }

  const Layer& layer_;
  const Place x_, y_;
  const std::optional<Place> residual_;
  const std::int64_t columns_, rows_;  // of tiles
  ConvShape padded_;
  std::int64_t rows_per_item_ = 1;  // of tiles
};

}  // namespace

std::unique_ptr<Step> winograd_step(const Layer& layer, const Place& x, const Place& y,
                                    const std::optional<Place>& residual, std::int64_t images, int threads) {
  return std::make_unique<WinogradStep>(layer, x, y, residual, images, threads);
}

}  // namespace effnet
