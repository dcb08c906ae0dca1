// The arguments of every kernel: plain structs of raw pointers, so that a kernel knows neither Python nor torch.
//
// Activations are channels last. Weights are packed in panels of 16 output channels whatever the number of lanes, the
// last panel filled up with zeros, so that packed weights do not depend on the machine.
//
// Numbers are float32. Where a frozen network computes in bfloat16, its maps and the weights of matrix products are
// bfloat16; sums, vectors of a number a channel, and everything between two maps stay float32.
#pragma once

#include <cstdint>

namespace effnet {

constexpr std::int64_t panel_columns = 16;
// Panels that a matrix product computes together, where there are so many: loads would limit the speed of a single one.
constexpr std::int64_t panels_together = 2;

// In the order of ACTIVATIONS in effnet_kernels/fusion/spec.py, whose indices Python passes.
enum class Activation : std::int32_t { none, silu, relu, relu6, hardswish };

// The last step of squeeze-and-excitation, which makes gates of numbers; in the order of GATES there.
enum class Gate : std::int32_t { sigmoid, hardsigmoid };

// A number in bfloat16: the upper half of the bits of a float.
enum class Bf16 : std::uint16_t {};

// y = act(a @ b + bias) + residual for one panel of columns or two: a matrix product whose rows are pixels. Operands
// are of type T, float or Bf16; y, and with it the residual, of either.
//
// A row of `a` consists of segments, so that a k x k convolution of padded rows has k segments of k * channels numbers.
// The rows of `y` are the pixels of a map that is `width` pixels wide, with `gap` unused numbers between its lines.
template <class T, class Y = T>
struct Gemm {
  const T* a;
  std::int64_t a_row;                     // numbers from a row to the next
  std::int64_t a_segment;                 // numbers from a segment to the next
  std::int64_t segments, segment_length;  // the inner dimension is their product, less k_tail_padding
  std::int64_t k_tail_padding;            // numbers at the end of the last segment that do not take part; 0 for Bf16
  // Packed, panel after panel: [inner dimension, 16], and for Bf16 [segments, pairs of a segment, 16, 2]. The last pair
  // of a single, odd segment ends in a zero.
  const T* b;
  const float* bias;     // [columns], rounded up to 16
  const Y* residual;     // as y; may be null
  Y* y;                  // [rows, columns]; may be null where sums is not
  std::int64_t y_row;    // numbers from a row to the next, within a line
  std::int64_t y_panel;  // numbers from the first panel's columns to the second's
  std::int64_t width, gap;
  std::int64_t rows;
  // Whether rows are computed one at a time, each with several chains of additions: faster where they are few. Either
  // way the order of the additions of a row does not depend on the number of rows.
  bool row_by_row;
  // 1 to 16 of one panel, to 32 of two; in the last one 8 are written where 8 are enough, else 16.
  std::int64_t columns;
  float* sums;  // [columns], rounded up to 16, to which the sums of y's columns are added; may be null
  Activation act;
  const Y* prefetch_dst;  // memory that will be written after this product, prefetched a line a row; may be null
  std::int64_t prefetch_dst_row;  // numbers from a row to the next
};

// One row of y = act(depthwise(x) + bias), one panel of channels wide, out of rows of x that are padded left and right.
template <class Y>
struct DepthwiseRow {
  const float* const* x;            // [kernel] rows of [width, 16]; only those from tap_begin to tap_end are read
  std::int64_t tap_begin, tap_end;  // kernel rows that lie inside the image
  const float* packed;              // [1 + kernel * kernel, 16]: the bias, then the taps in row order
  Y* y;                             // [width, channels], float or Bf16
  std::int64_t y_pixel;             // numbers from a pixel to the next
  std::int64_t width;
  std::int64_t channels;  // of this panel, 1 to 16; 8 are written where 8 are enough, else 16
  float* sums;            // [16], to which the sums of y over the row are added; may be null
  std::int64_t stride;
  std::int32_t kernel;  // 3, 5 or 7
  Activation act;
};

// The input transform of a row of tiles, each 6 x 6 pixels and 4 pixels from the next: to the operands of 36 products.
struct WinogradInput {
  const float* x;                // rows of [*, channels]
  std::int64_t x_row;            // floats from a row to the next
  std::int64_t tiles, channels;  // tiles of this row
  float* to;                     // [36, *, channels]
  std::int64_t to_product;       // floats from a product to the next
};

// The output transform of a row of tiles, from the 36 products: y = act(outputs + bias) + residual for the 4 x 4
// outputs of each tile, one panel of channels wide.
struct WinogradOutput {
  const float* m;                  // [36, tiles, *], the products
  std::int64_t m_product, m_tile;  // floats from one to the next
  const float* bias;               // [16]
  const float* residual;           // as y; may be null
  float* y;
  std::int64_t y_row, y_pixel;      // floats from one to the next
  std::int64_t tiles, rows, width;  // rows of outputs that are inside the map, 1 to 4, and pixels of a row
  std::int64_t channels;            // of this panel, 1 to 16; 8 are written where 8 are enough, else 16
  Activation act;
};

// Rows of a map, or rows in panels: channel c of row r is at data[r * row + c / 16 * panel + c % 16]. For a map `panel`
// is 16; rows in panels are padded to a multiple of 16 channels.
struct Rows {
  float* data;
  std::int64_t row, panel;
};

// to = act(scale * x + shift) * factor + residual: applies a prologue to rows, or copies them.
struct ActivateRows {
  Rows x;
  const float* scale;   // [channels], with shift; null for none
  const float* shift;   // [channels]
  const float* factor;  // [channels] or null
  Rows residual;        // data may be null
  Rows to;
  std::int64_t rows, channels;
  bool fill;  // whether zeros are written up to the end of the last panel of `to`
  Activation act;
};

// dz = (grad * factor + offset) * act'(scale * y + shift), to = alpha * dz + beta * y + gamma + residual: the gradient
// of a convolution's raw output.
struct GradientRows {
  Rows grad;                          // data may be null, for zeros
  Rows y;                             // data may be null where neither act nor beta needs it
  const float *factor, *offset;       // [channels] or null
  const float *scale, *shift;         // [channels], both or neither
  const float *alpha, *beta, *gamma;  // [channels], all or none
  Rows residual;                      // data may be null
  Rows to;
  std::int64_t rows, channels;
  bool fill;  // as in ActivateRows
  Activation act;
};

// The backward pass of a prologue for one panel: dq is the gradient of act(scale * x + shift) * gate. With u the
// activation's value and s its derivative, stores gate * dq * s + residual or dq + residual, and adds up the reductions
// that the backward passes of BatchNorm and squeeze-and-excitation need.
struct ActGradPanel {
  const float* dq;             // [rows, 16]
  Rows x, residual, to;        // from this panel's first column on; the residual's data may be null
  const float *scale, *shift;  // [columns], both or neither
  const float *mean, *gate;    // [columns] or null
  std::int64_t rows, columns;  // columns of this panel, 1 to 16
  bool apply_act_grad;         // whether gate * dq * s is stored rather than dq
  float* sums;                 // [sum_kinds, 16], added to; may be null
  int sum_kinds;               // 5: dq * u, dq * s, dq * s * (x - mean), s, s * (x - mean); 2: the second and third
  Activation act;
};

// Adds rows to the mean and the sum of squared deviations (m2) of each column, which hold `count` values so far.
struct PanelStatistics {
  const float* values;         // of the first row
  std::int64_t row;            // floats from a row to the next
  std::int64_t rows, columns;  // columns 1 to 16
  std::int64_t count;
  float *mean, *m2;  // [16]
};

// Adds up d and d * (x - mean) over the rows of one panel.
struct PanelSums {
  const float* d;     // [rows, 16]
  Rows x;             // from this panel's first column on
  const float* mean;  // [columns] or null
  std::int64_t rows, columns;
  float *sums, *products;  // [16], added to; products may be null, and x is then not read
};

// to[k, c] = sum over rows of g[row, k] * a[row, c], for one panel of g and one or two of a.
struct WeightGradient {
  const float *g, *a;    // [rows, 16]
  std::int64_t a_panel;  // floats from the first panel of `a` to the second
  std::int64_t rows;
  std::int64_t outputs;  // 1 to 16; 8 are computed where 8 are enough, else 16
  std::int64_t inputs;   // 1 to 16 of one panel, to 32 of two; in the last one as outputs
  float* to;             // [16, 16], for the second panel behind that for the first
  bool accumulate;       // whether the sums are added to `to` rather than written
};

// to[i, j] += sum over columns of g[column] * x[i][column * stride + j], for one panel of channels.
struct DepthwiseWeightGradient {
  const float* const* x;  // [kernel] padded rows of [*, 16]; only those from tap_begin to tap_end are read
  std::int64_t tap_begin, tap_end;
  const float* g;  // [width, 16]
  std::int64_t width, stride;
  std::int32_t kernel;  // 3, 5 or 7
  float* to;            // [kernel * kernel, 16]
};

// The kernels of one instruction set for maps and weights of type T.
template <class T>
struct MapKernels {
  void (*gemm_bias_act_residual_sum)(const Gemm<T>&);
  void (*gemm_to_floats)(const Gemm<T, float>&);
  void (*depthwise_row_bias_act_sum)(const DepthwiseRow<T>&);
  // y[row * y_row + i] = x[row * x_row + i] * factors[i]
  void (*scale_rows)(const T* x, std::int64_t x_row, const float* factors, T* y, std::int64_t y_row, std::int64_t rows,
                     std::int64_t count);
  // The product of a packed panel (of one segment) and a factor for each number k of the inner dimension.
  void (*scale_panel)(const T* x, const float* factors, T* y, std::int64_t inner);
  // rounds * multiply_adds_per_round multiply-adds in registers, to measure the machine's peak
  float (*multiply_add)(std::int64_t rounds);
  int multiply_adds_per_round;
};

// The kernels of one instruction set. A name spells the operator and what is fused, and in the files of the instruction
// sets also the tile: rows x vectors.
struct Kernels {
  const char* isa;
  int lanes;
  bool emulated;  // for tests alone: runs the logic of an instruction set on machines without it
  MapKernels<float> f32;
  const MapKernels<Bf16>* bf16;  // null where the instruction set does not multiply in bfloat16
  void (*winograd_input_f32)(const WinogradInput&);
  void (*winograd_output_f32)(const WinogradOutput&);
  // values[i] = gate(values[i])
  void (*gate_f32)(float* values, std::int64_t count, Gate gate);
  void (*activate_rows_f32)(const ActivateRows&);
  void (*gradient_rows_f32)(const GradientRows&);
  void (*act_grad_panel_f32)(const ActGradPanel&);
  void (*panel_statistics_f32)(const PanelStatistics&);
  void (*panel_sums_f32)(const PanelSums&);
  void (*weight_gradient_f32)(const WeightGradient&);
  void (*depthwise_weight_gradient_f32)(const DepthwiseWeightGradient&);
  // The same for all instruction sets.
  std::uint64_t (*hash)(const void* data, std::int64_t bytes);

  template <class T>
  const MapKernels<T>& of() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return f32;
    } else {
      return *bf16;
    }
  }
};

extern const Kernels scalar_kernels;
extern const Kernels emulated4_kernels;
extern const Kernels emulated16_kernels;
extern const Kernels emulated_amx_kernels;
extern const Kernels neon_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
// Of processors with AVX512-BF16, whose other kernels are those of AVX-512.
extern const MapKernels<Bf16> avx512_bf16_kernels;
// Those of them that processors with AMX have in their own way.
void amx_bf16_gemm(const Gemm<Bf16>& gemm);
void amx_bf16_gemm_to_floats(const Gemm<Bf16, float>& gemm);
float amx_bf16_multiply_add(std::int64_t rounds);
// Four products of 16 rows, 32 numbers of the inner dimension and 16 columns.
constexpr int amx_bf16_multiply_adds_per_round = 4 * 16 * 32 * 16;

}  // namespace effnet
