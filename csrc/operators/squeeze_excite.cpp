// Squeeze-and-excitation between the squeeze and the gate, forward and backward: two layers on a vector for each image.
//
// The weights have many more numbers than the vectors. They are therefore never transposed: forward they are the left
// operand of a product whose columns are images, backward they are copied to panels row by row.
#include "operators/partition.h"
#include "operators/rows.h"

namespace effnet {
namespace {

// Rows of weights that a work item of the forward pass multiplies, and images that one of the backward pass does.
constexpr std::int64_t weight_rows = 48, image_rows = 48;
constexpr std::int64_t pair_columns = panels_together * panel_columns;

std::int64_t pairs_of(std::int64_t count) { return ceil_div(count, pair_columns); }

int threads_of(const ExciteShape& shape, const Execution& execution) {
  return threads_for(shape.channels * (shape.squeezed + shape.images), execution.threads);
}

// y = a @ b for a [rows, inner] and the next of the panels b [inner, 16], one or two, of `columns` columns in all: y in
// panels, too. Returns how many columns it computes.
std::int64_t multiply(const float* a, std::int64_t rows, std::int64_t inner, const float* b, std::int64_t columns,
                      float* y, const Kernels& kernels) {
  alignas(64) static const float no_bias[pair_columns] = {};
  Gemm<float> gemm{};
  gemm.a = a;
  gemm.a_row = inner;
  gemm.segments = 1;
  gemm.segment_length = inner;
  gemm.b = b;
  gemm.bias = no_bias;
  gemm.y = y;
  gemm.y_row = panel_columns;
  gemm.y_panel = rows * panel_columns;
  gemm.rows = rows;
  gemm.columns = std::min(pair_columns, columns);
  kernels.f32.gemm_bias_act_residual_sum(gemm);
  return gemm.columns;
}

// Adds up rows of up to 16 numbers that are `stride` apart.
void add_rows(const float* row, std::int64_t rows, std::int64_t stride, std::int64_t columns, float* to) {
  float totals[panel_columns] = {};
  for (std::int64_t i = 0; i < rows; ++i, row += stride) {
    // A number of columns that the compiler knows stays in vector registers.
    if (columns == panel_columns) {
      for (std::int64_t j = 0; j < panel_columns; ++j) totals[j] += row[j];
    } else {
      for (std::int64_t j = 0; j < columns; ++j) totals[j] += row[j];
    }
  }
  std::copy_n(totals, columns, to);
}

// The gate's derivative with respect to its logits, from its value.
float gate_slope(float gate, Gate kind) {
  switch (kind) {
    case Gate::sigmoid:
      return gate * (1.0f - gate);
    case Gate::hardsigmoid:
      return gate > 0.0f && gate < 1.0f ? 1.0f / 6.0f : 0.0f;
  }
  return 0.0f;
}

// The products' columns are images: the vectors are in panels of 16 images, [inner dimension, 16].
class Forward {
 public:
  Forward(const Excite& call, const Kernels& kernels)
      : call_(call), kernels_(kernels), images_(call.shape.images), channels_(call.shape.channels),
        squeezed_(call.shape.squeezed) {
    const std::int64_t lanes = panels_of(images_) * panel_columns;
    pooled_ = Scratch(lanes * channels_);
    activated_ = Scratch(lanes * squeezed_);
  }

  std::int64_t scratch_floats() const { return weight_rows * pair_columns; }

  std::int64_t pool_items() const { return panels_of(channels_); }
  void pool(std::int64_t panel) const {
    const std::int64_t first = panel * panel_columns, columns = columns_of(panel, channels_);
    for (std::int64_t image = 0; image < panels_of(images_) * panel_columns; ++image) {
      float mean[panel_columns] = {};
      if (image < images_) {
        add_rows(call_.sums + image * call_.parts * channels_ + first, call_.parts, channels_, columns, mean);
        for (std::int64_t j = 0; j < columns; ++j) mean[j] *= call_.inverse_pixels;
        std::copy_n(mean, columns, call_.pooled + image * channels_ + first);
      }
      float* to = pooled_.get() + (image / panel_columns * channels_ + first) * panel_columns + image % panel_columns;
      for (std::int64_t j = 0; j < columns; ++j) to[j * panel_columns] = mean[j];
    }
  }

  std::int64_t reduce_items() const { return pairs_of(images_) * ceil_div(squeezed_, weight_rows); }
  void reduce(std::int64_t item, float* scratch) const {
    for_panels(item, squeezed_, channels_, call_.w1, call_.b1, pooled_.get(), scratch,
               [&](std::int64_t image, std::int64_t s, std::int64_t rows, std::int64_t images, float* values) {
                 write_columns(values, rows, images, call_.hidden + image * squeezed_ + s, squeezed_);
                 ActivateRows activate{};
                 activate.x = {values, panel_columns, panel_columns};
                 activate.to = {activated_.get() + (image * squeezed_ + s * panel_columns), panel_columns,
                                panel_columns};
                 activate.rows = rows;
                 activate.channels = panel_columns;
                 activate.act = call_.act;
                 kernels_.activate_rows_f32(activate);
               });
  }

  std::int64_t expand_items() const { return pairs_of(images_) * ceil_div(channels_, weight_rows); }
  void expand(std::int64_t item, float* scratch) const {
    for_panels(item, channels_, squeezed_, call_.w2, call_.b2, activated_.get(), scratch,
               [&](std::int64_t image, std::int64_t c, std::int64_t rows, std::int64_t images, float* values) {
                 kernels_.gate_f32(values, rows * panel_columns, call_.gate_kind);
                 write_columns(values, rows, images, call_.gate + image * channels_ + c, channels_);
               });
  }

 private:
  // Multiplies a block of rows of a weight [outputs, inner] with a pair of panels of images, adds their bias, and calls
  // f(first image, first row, rows, images, panel [rows, 16] of the sums, with zeros behind the images) for each panel.
  template <class Function>
  void for_panels(std::int64_t item, std::int64_t outputs, std::int64_t inner, const float* weight, const float* bias,
                  const float* panels, float* scratch, const Function& f) const {
    const std::int64_t blocks = ceil_div(outputs, weight_rows), first = outputs * (item % blocks) / blocks;
    const std::int64_t rows = outputs * (item % blocks + 1) / blocks - first;
    const std::int64_t image = item / blocks * pair_columns;
    const std::int64_t images =
        multiply(weight + first * inner, rows, inner, panels + image * inner, images_ - image, scratch, kernels_);
    for (std::int64_t i = 0; i < images; i += panel_columns, scratch += rows * panel_columns) {
      const std::int64_t columns = std::min(panel_columns, images - i);
      for (std::int64_t row = 0; row < rows; ++row) {
        float* values = scratch + row * panel_columns;
        for (std::int64_t j = 0; j < columns; ++j) values[j] += bias != nullptr ? bias[first + row] : 0.0f;
        std::fill(values + columns, values + panel_columns, 0.0f);
      }
      f(image + i, first, rows, columns, scratch);
    }
  }

  // Writes the columns of a panel [rows, 16], each behind the other by `stride`.
  static void write_columns(const float* panel, std::int64_t rows, std::int64_t columns, float* to,
                            std::int64_t stride) {
    for (std::int64_t j = 0; j < columns; ++j, to += stride) {
      for (std::int64_t row = 0; row < rows; ++row) to[row] = panel[row * panel_columns + j];
    }
  }

  const Excite& call_;
  const Kernels& kernels_;
  const std::int64_t images_, channels_, squeezed_;
  Scratch pooled_, activated_;
};

class Backward {
 public:
  Backward(const ExciteBackward& call, const Kernels& kernels)
      : call_(call), kernels_(kernels), images_(call.shape.images), channels_(call.shape.channels),
        squeezed_(call.shape.squeezed) {
    w1_ = Scratch(panels_of(channels_) * squeezed_ * panel_columns);
    w2_ = Scratch(panels_of(squeezed_) * channels_ * panel_columns);
  }

  std::int64_t scratch_floats() const { return image_rows * pair_columns; }

  // The logits' gradient of 16 channels, and what the two products need of the weights.
  std::int64_t gate_items() const { return panels_of(channels_); }
  void gate_gradient(std::int64_t panel) const {
    const std::int64_t first = panel * panel_columns, columns = columns_of(panel, channels_);
    for (std::int64_t image = 0; image < images_; ++image) {
      const std::int64_t at = image * channels_ + first;
      float grad_gate[panel_columns];
      add_sums(image, 0, first, columns, grad_gate);
      for (std::int64_t j = 0; j < columns; ++j) {
        call_.grad_logits[at + j] = grad_gate[j] * gate_slope(call_.gate[at + j], call_.gate_kind);
      }
    }
    pack_panel(call_.w1, squeezed_, channels_, panel, w1_.get() + first * squeezed_);
    for (std::int64_t j = 0; j < panels_of(squeezed_); ++j) {
      float* to = w2_.get() + (j * channels_ + first) * panel_columns;
      pack_panel(call_.w2 + first * squeezed_, columns, squeezed_, j, to);
    }
  }

  std::int64_t hidden_items() const { return ceil_div(images_, image_rows) * pairs_of(squeezed_); }
  void hidden_gradient(std::int64_t item, float* scratch) const {
    const Tile tile = multiply_block(item, call_.grad_logits, channels_, w2_.get(), squeezed_, scratch);
    GradientRows back{};
    back.grad = panel_rows(scratch, tile.rows);
    back.y = map_rows(call_.hidden, tile.image, squeezed_, tile.column);
    back.to = map_rows(call_.grad_hidden, tile.image, squeezed_, tile.column);
    back.rows = tile.rows;
    back.channels = tile.columns;
    back.act = call_.act;
    kernels_.gradient_rows_f32(back);
  }

  std::int64_t pooled_items() const { return ceil_div(images_, image_rows) * pairs_of(channels_); }
  void pooled_gradient(std::int64_t item, float* scratch) const {
    const Tile tile = multiply_block(item, call_.grad_hidden, squeezed_, w1_.get(), channels_, scratch);
    for (std::int64_t column = 0; column < tile.columns; column += panel_columns) {
      const std::int64_t first = tile.column + column, columns = std::min(panel_columns, tile.columns - column);
      for (std::int64_t row = 0; row < tile.rows; ++row, scratch += panel_columns) {
        write_offset(tile.image + row, first, columns, scratch);
      }
    }
  }

 private:
  struct Tile {
    std::int64_t image, rows, column, columns;
  };

  void add_sums(std::int64_t image, std::int64_t kind, std::int64_t first, std::int64_t columns, float* to) const {
    const float* sums = call_.sums + (image * call_.parts * call_.kinds + kind) * channels_ + first;
    add_rows(sums, call_.parts, call_.kinds * channels_, columns, to);
  }

  // What an image's pixels get of the gradient of their mean, and the sums for the BatchNorm before.
  void write_offset(std::int64_t image, std::int64_t first, std::int64_t columns, const float* grad_pooled) const {
    float* offset = call_.offset + image * channels_ + first;
    for (std::int64_t j = 0; j < columns; ++j) offset[j] = grad_pooled[j] * call_.inverse_pixels;
    if (call_.norm_sums == nullptr) return;
    const float* gate = call_.gate + image * channels_ + first;
    for (std::int64_t kind = 0; kind < 2; ++kind) {
      float of_gradient[panel_columns], of_slopes[panel_columns];
      add_sums(image, 1 + kind, first, columns, of_gradient);
      add_sums(image, 3 + kind, first, columns, of_slopes);
      float* to = call_.norm_sums + (image * 2 + kind) * channels_ + first;
      for (std::int64_t j = 0; j < columns; ++j) to[j] = gate[j] * of_gradient[j] + offset[j] * of_slopes[j];
    }
  }

  // A block of vectors [images, inner] times a pair of panels [inner, 16], to panels.
  Tile multiply_block(std::int64_t item, const float* vectors, std::int64_t inner, const float* panels,
                      std::int64_t outputs, float* to) const {
    const std::int64_t blocks = ceil_div(images_, image_rows), image = images_ * (item % blocks) / blocks;
    const std::int64_t rows = images_ * (item % blocks + 1) / blocks - image, column = item / blocks * pair_columns;
    const std::int64_t columns =
        multiply(vectors + image * inner, rows, inner, panels + column * inner, outputs - column, to, kernels_);
    return {image, rows, column, columns};
  }

  const ExciteBackward& call_;
  const Kernels& kernels_;
  const std::int64_t images_, channels_, squeezed_;
  Scratch w1_, w2_;
};

// The gradient of a weight [outputs, inputs] is a sum over images of the products of two vectors.
class WeightBackward {
 public:
  WeightBackward(const ExciteBackwardWeight& call, const Kernels& kernels)
      : call_(call), kernels_(kernels), images_(call.shape.images), channels_(call.shape.channels),
        squeezed_(call.shape.squeezed) {
    const std::int64_t of_channels = images_ * panels_of(channels_) * panel_columns;
    const std::int64_t of_squeezed = images_ * panels_of(squeezed_) * panel_columns;
    pooled_ = Scratch(of_channels);
    grad_logits_ = Scratch(of_channels);
    activated_ = Scratch(of_squeezed);
    grad_hidden_ = Scratch(of_squeezed);
  }

  std::int64_t scratch_floats() const { return panels_together * panel_columns * panel_columns; }

  std::int64_t pack_items() const { return 4; }
  void pack(std::int64_t item) const {
    const float* vectors[] = {call_.pooled, call_.grad_logits, call_.hidden, call_.grad_hidden};
    float* panels[] = {pooled_.get(), grad_logits_.get(), activated_.get(), grad_hidden_.get()};
    ActivateRows copy{};
    copy.channels = item < 2 ? channels_ : squeezed_;
    copy.x = map_rows(vectors[item], 0, copy.channels);
    copy.to = panel_rows(panels[item], images_);
    copy.rows = images_;
    copy.fill = true;
    copy.act = vectors[item] == call_.hidden ? call_.act : Activation::none;
    kernels_.activate_rows_f32(copy);
  }

  std::int64_t items() const { return panels_of(channels_) + panels_of(squeezed_); }
  void run(std::int64_t item, float* scratch) const {
    const std::int64_t panels = panels_of(channels_);
    if (item < panels) {
      gradient(item, grad_logits_.get(), channels_, activated_.get(), squeezed_, scratch, call_.dw2, call_.db2);
    } else {
      gradient(item - panels, grad_hidden_.get(), squeezed_, pooled_.get(), channels_, scratch, call_.dw1, call_.db1);
    }
  }

 private:
  // The gradients of the weight's and the bias's 16 outputs.
  void gradient(std::int64_t panel, const float* g, std::int64_t outputs, const float* a, std::int64_t inputs,
                float* scratch, float* dweight, float* dbias) const {
    const std::int64_t first = panel * panel_columns, rows = columns_of(panel, outputs);
    const std::int64_t pitch = images_ * panel_columns;
    g += panel * pitch;
    for (std::int64_t column = 0; column < inputs; column += pair_columns) {
      const std::int64_t columns = std::min(pair_columns, inputs - column);
      kernels_.weight_gradient_f32({g, a + column * images_, pitch, images_, rows, columns, scratch, false});
      for (std::int64_t k = 0; k < rows; ++k) {
        for (std::int64_t j = 0; j < columns; j += panel_columns) {
          std::copy_n(scratch + (j + k) * panel_columns, std::min(panel_columns, columns - j),
                      dweight + (first + k) * inputs + column + j);
        }
      }
    }
    add_rows(g, images_, panel_columns, rows, dbias + first);
  }

  const ExciteBackwardWeight& call_;
  const Kernels& kernels_;
  const std::int64_t images_, channels_, squeezed_;
  Scratch pooled_, grad_logits_, activated_, grad_hidden_;
};

}  // namespace

void excite(const Excite& call, const Execution& execution) {
  const Forward forward(call, execution.kernels);
  parallel_phases(
      threads_of(call.shape, execution), forward.scratch_floats(),
      Phase{forward.pool_items(), [&](std::int64_t item, float*) { forward.pool(item); }},
      Phase{forward.reduce_items(), [&](std::int64_t item, float* scratch) { forward.reduce(item, scratch); }},
      Phase{forward.expand_items(), [&](std::int64_t item, float* scratch) { forward.expand(item, scratch); }});
}

void excite_backward(const ExciteBackward& call, const Execution& execution) {
  const Backward backward(call, execution.kernels);
  parallel_phases(threads_of(call.shape, execution), backward.scratch_floats(),
                  Phase{backward.gate_items(), [&](std::int64_t item, float*) { backward.gate_gradient(item); }},
                  Phase{backward.hidden_items(),
                        [&](std::int64_t item, float* scratch) { backward.hidden_gradient(item, scratch); }},
                  Phase{backward.pooled_items(),
                        [&](std::int64_t item, float* scratch) { backward.pooled_gradient(item, scratch); }});
}

void excite_backward_weight(const ExciteBackwardWeight& call, const Execution& execution) {
  const WeightBackward backward(call, execution.kernels);
  parallel_phases(threads_of(call.shape, execution), backward.scratch_floats(),
                  Phase{backward.pack_items(), [&](std::int64_t item, float*) { backward.pack(item); }},
                  Phase{backward.items(), [&](std::int64_t item, float* scratch) { backward.run(item, scratch); }});
}

}  // namespace effnet
