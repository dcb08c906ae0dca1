// What every kernel takes: plain structs over raw pointers, so that a kernel knows neither Python nor torch.
//
// Activations are fp32, channels last. Weights are packed in panels of 16 output channels whatever the number of lanes,
// the last panel filled up with zeros, so that packed weights do not depend on the machine.
#pragma once

#include <cstdint>

namespace effnet {

constexpr std::int64_t panel_columns = 16;

enum class Activation : std::int32_t { none, silu, relu, relu6, hardswish };

// How a gate is made of a number: squeeze-and-excitation's last step.
enum class Gate : std::int32_t { sigmoid, hardsigmoid };

// y = act(a @ b + bias) + residual for one panel of columns: a matrix product whose rows are pixels.
//
// A row of `a` is made of segments, so that a k x k convolution of padded rows is k segments of k * channels floats. The
// rows of `y` are pixels of a map `width` wide whose lines are `gap` floats further apart than the pixels fill.
struct Gemm {
  const float* a;
  std::int64_t a_row;                     // floats from a row to the next
  std::int64_t a_segment;                 // floats from a segment to the next
  std::int64_t segments, segment_length;  // the inner dimension is their product
  const float* b;                         // [segments * segment_length, 16], packed
  const float* bias;                      // [16]
  const float* residual;                  // as y; may be null
  float* y;                               // [rows, columns]; may be null, where only the sums are wanted
  std::int64_t y_row;                     // floats from a row to the next, within a line
  std::int64_t width, gap;
  std::int64_t rows;
  bool rows_apart;       // each row by itself: for few of them, and sums that do not depend on how many
  std::int64_t columns;  // of this panel, 1 to 16; 8 are written where 8 are enough, else 16
  float* sums;           // [16], the columns' sums of y are added to it; may be null
  Activation act;
};

// One row of y = act(depthwise(x) + bias), one panel of channels wide, out of rows of x that are padded left and right.
struct DepthwiseRow {
  const float* const* x;               // [kernel] rows of [width, 16]; only those from tap_begin to tap_end are read
  std::int64_t tap_begin, tap_end;     // kernel rows that lie inside the image
  const float* packed;                 // [1 + kernel * kernel, 16]: the bias, then the taps in row order
  float* y;                            // [width, channels]
  std::int64_t y_pixel;                // floats from a pixel to the next
  std::int64_t width;
  std::int64_t channels;               // of this panel, 1 to 16; 8 are written where 8 are enough, else 16
  float* sums;                         // [16], the sums of y over the row are added to it; may be null
  std::int64_t stride;
  std::int32_t kernel;  // 3, 5 or 7
  Activation act;
};

// The kernels of one instruction set. A name spells dtype, operator, what is fused, and the tile: rows x vectors.
struct Kernels {
  const char* isa;
  int lanes;
  bool emulated;  // never chosen: there so that tests reach its logic on machines without its instruction set
  void (*gemm_f32_bias_act_residual_sum)(const Gemm&);
  void (*depthwise_row_f32_bias_act_sum)(const DepthwiseRow&);
  // values[i] = gate(values[i])
  void (*gate_f32)(float* values, std::int64_t count, Gate gate);
  // y[row * y_row + i] = x[row * x_row + i] * factors[i]
  void (*scale_rows_f32)(const float* x, std::int64_t x_row, const float* factors, float* y, std::int64_t y_row,
                         std::int64_t rows, std::int64_t count);
  // y[row * columns + i] = x[row * columns + i] * factors[row], columns a multiple of 16
  void (*scale_panel_f32)(const float* x, const float* factors, float* y, std::int64_t rows, std::int64_t columns);
  // rounds * chains * lanes multiply-adds in registers: the peak that kernels are measured by
  float (*multiply_add_f32)(std::int64_t rounds);
  int chains;
};

extern const Kernels scalar_kernels;
extern const Kernels emulated4_kernels;
extern const Kernels emulated16_kernels;
extern const Kernels neon_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;

}  // namespace effnet
