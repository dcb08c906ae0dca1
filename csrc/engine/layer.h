// A layer of a frozen network: what it computes, and its weights packed for the kernels.
#pragma once

#include <cstdint>

#include "engine/bf16.h"
#include "engine/view.h"
#include "kernels/conv_shape.h"
#include "kernels/kernels.h"
#include "platform/buffer.h"

namespace effnet {

// Zeros around a map: either given, or TensorFlow's SAME, which depends on the map's size.
struct Padding {
  bool same = false;
  std::int64_t left = 0, right = 0, top = 0, bottom = 0;

  bool any() const { return left != 0 || right != 0 || top != 0 || bottom != 0; }
};

// Numbers in the caller's memory, one after another.
struct Weights {
  const void* data = nullptr;
  Type type = Type::f32;
  const double* scale = nullptr;  // a factor for each row; null for none

  // A number of a row, scaled.
  float at(std::int64_t row, std::int64_t index) const {
    return scale == nullptr ? at(index) : static_cast<float>(static_cast<double>(at(index)) * scale[row]);
  }

 private:
  float at(std::int64_t index) const {
    if (type == Type::bf16) return to_float(static_cast<const Bf16*>(data)[index]);
    return static_cast<const float*>(data)[index];
  }
};

// Squeeze-and-excitation after a layer: gate(w2 @ act(w1 @ mean + b1) + b2).
struct Excitation {
  std::int64_t squeeze = 0;  // channels between the two layers; 0 where there is none
  Activation act = Activation::none;
  Gate gate = Gate::sigmoid;
  Weights w1;                 // [squeeze, channels]
  const float* b1 = nullptr;  // [squeeze]
  Weights w2;                 // [channels, squeeze]
  const float* b2 = nullptr;  // [channels]
};

enum class LayerKind { conv, depthwise };

// A layer as the caller describes it. Tensor 0 is the image, and layer i makes tensor i + 1 out of tensor i. A fully
// connected layer is a 1 x 1 convolution of a map of one pixel.
struct LayerSpec {
  LayerKind kind = LayerKind::conv;
  std::int64_t in_channels = 0, out_channels = 0, kernel = 1, stride = 1;
  Padding padding;
  Activation act = Activation::none;
  std::int64_t residual = -1;   // the tensor that is added to the output, or -1
  bool pool = false;            // whether the output is averaged over its pixels
  Weights weight;               // [out, in, kernel, kernel], a depthwise one [out, kernel, kernel]
  const float* bias = nullptr;  // [out]
  Excitation excitation;        // of the output, without a residual or pooling
  bool winograd = false;        // whether a 3 x 3 convolution may be computed by Winograd's transforms

  // Whether each pixel of the output depends on the pixel of the input at the same place alone.
  bool pointwise() const { return kind == LayerKind::conv && kernel == 1 && stride == 1 && !padding.any(); }
};

// The sizes of a layer's convolution of a map of this size.
ConvShape conv_shape(const LayerSpec& layer, std::int64_t height, std::int64_t width);

// A matrix [out, segments * length] in panels, as Gemm reads them; and its bias [panels * 16].
struct PackedMatrix {
  std::int64_t out = 0, inner = 0;
  std::int64_t panel_floats = 0;  // memory of a panel
  Buffer panels, bias;

  std::int64_t panel_count() const { return ceil_div(out, panel_columns); }
  std::int64_t floats() const { return panel_count() * panel_floats; }
  template <class T>
  const T* panel(std::int64_t index) const {
    return reinterpret_cast<const T*>(panels.get() + index * panel_floats);
  }
  // The columns of so many panels that are outputs, not padding.
  std::int64_t columns(std::int64_t index, std::int64_t panels = 1) const {
    const std::int64_t left = out - index * panel_columns;
    return left < panels * panel_columns ? left : panels * panel_columns;
  }
};

struct Layer {
  LayerSpec spec;               // with null pointers: the weights are below
  PackedMatrix matrix;          // of a conv, in the network's type
  Buffer taps;                  // of a depthwise layer: [panels, 1 + kernel * kernel, 16], the bias first
  PackedMatrix reduce, expand;  // of its excitation
  // The transformed weights, [pairs of panels, 36, panels of a pair, in_channels, 16], of a convolution that is
  // computed by Winograd's transforms; its matrix has no weights then. Null for another.
  Buffer winograd;

  explicit Layer(const LayerSpec& spec) : spec(spec) {}

  std::int64_t panel_count() const { return ceil_div(spec.out_channels, panel_columns); }
  const float* panel_taps(std::int64_t index) const {
    return taps.get() + index * (1 + spec.kernel * spec.kernel) * panel_columns;
  }
};

// Packs the weights of a layer for maps of a type, and keeps no pointer to the caller's. Depthwise weights and those of
// squeeze-and-excitation stay float32.
Layer pack(const LayerSpec& spec, Type type);

}  // namespace effnet
