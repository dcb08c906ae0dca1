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
  std::int64_t segments, segment_length;  // the inner dimension is their product, less what the last one lacks
  std::int64_t lacking;                   // of the last segment
  const float* b;                         // [inner dimension, 16], packed
  const float* next_b;                    // what will be read in its place next; null for what follows it in memory
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
  const float* soon;      // where a line a row will be written next, to be asked for meanwhile; may be null
  std::int64_t soon_row;  // floats from one to the next
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

// Rows of a map, or rows in panels: channel c of row r is at data[r * row + c / 16 * panel + c % 16]. A map has a panel of
// 16; panels of their own are padded to 16 columns.
struct Rows {
  float* data;
  std::int64_t row, panel;
};

// to = act(scale * x + shift) * factor + residual: pays what is owed to a map.
struct ActivateRows {
  Rows x;
  const float* scale;    // [channels], with shift; null for none
  const float* shift;    // [channels]
  const float* factor;   // [channels] or null
  Rows residual;         // data may be null
  Rows to;
  std::int64_t rows, channels;
  bool fill;  // whether the last panel of `to` is filled up with zeros
  Activation act;
};

// dz = (grad * factor + offset) * act'(scale * y + shift), to = alpha * dz + beta * y + gamma + residual: the gradient of
// a convolution's raw output.
struct GradientRows {
  Rows grad;  // data may be null, for zeros
  Rows y;     // data may be null where neither act nor beta needs it
  const float *factor, *offset;       // [channels] or null
  const float *scale, *shift;         // [channels], both or neither
  const float *alpha, *beta, *gamma;  // [channels], all or none
  Rows residual;                      // data may be null
  Rows to;
  std::int64_t rows, channels;
  bool fill;  // as above
  Activation act;
};

// One panel of the gradient dq of act(scale * x + shift) * gate, back through the activation: with s the activation's
// derivative and u its value, stores gate * dq * s + residual, or dq itself, and adds up what BatchNorm and
// squeeze-and-excitation need.
struct ThroughPanel {
  const float* dq;              // [rows, 16]
  Rows x, residual, to;         // from this panel's first column on; the residual's data may be null
  const float *scale, *shift;   // [columns], both or neither
  const float *mean, *gate;     // [columns] or null
  std::int64_t rows, columns;   // columns of this panel, 1 to 16
  bool through;                 // whether gate * dq * s is stored, and not dq
  float* sums;                  // [sums_kept, 16], added to; may be null
  int sums_kept;                // 5: dq * u, dq * s, s, dq * s * (x - mean), s * (x - mean); 2: the second and fourth
  Activation act;
};

// Mean and sum of squared deviations of `count` values a column, to which rows are added.
struct PanelStatistics {
  const float* values;        // of the first row
  std::int64_t row;           // floats from a row to the next
  std::int64_t rows, columns;  // columns 1 to 16
  std::int64_t count;
  float *mean, *m2;  // [16]
};

// sums += d, products += d * (x - mean) for one panel.
struct PanelSums {
  const float* d;  // [rows, 16]
  Rows x;          // from this panel's first column on
  const float* mean;              // [columns] or null
  std::int64_t rows, columns;
  float *sums, *products;  // [16]; products may be null, and x then absent
};

// to[k, c] = sum over rows of g[row, k] * a[row, c], added to what is there or not, one panel by one panel.
struct WeightGradient {
  const float *g, *a;       // [rows, 16]
  std::int64_t rows, outputs, inputs;  // of the panels, 1 to 16; 8 are computed where 8 are enough, else 16
  float* to;                // [16, 16]
  bool adds;
};

// to[i, j] += sum over columns of g[column] * x[i][column * stride + j], one panel of channels.
struct DepthwiseWeightGradient {
  const float* const* x;            // [kernel] padded rows of [*, 16]; only those from tap_begin to tap_end are read
  std::int64_t tap_begin, tap_end;
  const float* g;                   // [width, 16]
  std::int64_t width, stride;
  std::int32_t kernel;  // 3, 5 or 7
  float* to;            // [kernel * kernel, 16]
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
  void (*activate_rows_f32)(const ActivateRows&);
  void (*gradient_rows_f32)(const GradientRows&);
  void (*through_panel_f32)(const ThroughPanel&);
  void (*panel_statistics_f32)(const PanelStatistics&);
  void (*panel_sums_f32)(const PanelSums&);
  void (*weight_gradient_f32)(const WeightGradient&);
  void (*depthwise_weight_gradient_f32)(const DepthwiseWeightGradient&);
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
