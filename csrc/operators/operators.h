// The operators, forward and backward, on maps as torch has them: [N, H, W, C] with nothing between the pixels.
//
// Work is cut by shapes alone, never by the number of threads, and partial results are kept apart and merged in order,
// so that every result is the same whoever computes which part.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/conv_shape.h"
#include "kernels/kernels.h"

namespace effnet {

struct Execution {
  const Kernels& kernels;
  int threads;
};

// What is owed to a map: act(scale * x + shift) * gate. Pointers may be null.
struct Prologue {
  const float *scale, *shift;  // [C]
  const float* gate;           // [N, C]
  Activation act;
};

// What is applied to an output before it is stored: act(scale * y + shift) + residual. Pointers may be null.
struct Epilogue {
  const float *scale, *shift;  // [K]
  const float* residual;       // as the output
  Activation act;
};

// The gradient of a convolution's raw output y, formed on load: dz = (grad * gate * keep + offset) * act'(scale * y +
// shift), dy = alpha * dz + beta * y + gamma. Pointers may be null.
struct OutputGradient {
  const float *grad, *y;
  const float* coefficients;  // [3, C]: alpha, beta, gamma
  const float* gate;          // [N, C]
  const float* keep;          // [N]
  const float* offset;        // [N, C]
  const float *scale, *shift;
  Activation act;

  bool by_image() const { return gate != nullptr || keep != nullptr || offset != nullptr; }
};

// Pixels, in groups (images, where images differ in more than their pixels) that are cut in parts of nearly equal size.
struct Pixels {
  std::int64_t images, pixels;  // of an image
  std::int64_t groups, parts;   // parts of a group

  std::int64_t group_rows() const { return images * pixels / groups; }
  std::int64_t count() const { return groups * parts; }
};

// The rule for both: by_image keeps images apart.
Pixels cut_pixels(std::int64_t images, std::int64_t pixels, bool by_image);

enum class Reduction : std::int32_t { none, statistics, pool };

struct PointwiseForward {
  Pixels pixels;
  std::int64_t channels, outputs;
  const float *x, *weight, *bias;  // weight [outputs, channels], bias [outputs] or null
  Prologue prologue;
  Epilogue epilogue;
  Reduction reduction;
  float* y;         // null with pool
  float* partials;  // statistics [parts, 3, outputs]; pool: sums [images, parts, outputs]
};

void pointwise_forward(const PointwiseForward& call, const Execution& execution);

struct PointwiseBackward {
  Pixels pixels;
  std::int64_t channels, outputs;
  OutputGradient gradient;
  const float* weight;
  const float* x;  // null where neither dweight nor sums are wanted
  Prologue prologue;
  const float* mean;      // [channels] or null
  const float* residual;  // added to dx; or null
  bool through;
  float* dx;       // [N, H, W, channels] or null
  float* sums;     // [images, parts, 5, channels] or null: then dx is the plain product
  float* dweight;  // [outputs, channels] or null
};

void pointwise_backward(const PointwiseBackward& call, const Execution& execution);

// Images in slots, whose partial results are apart.
std::int64_t depthwise_slots(std::int64_t images);

struct DepthwiseForward {
  std::int64_t images;
  ConvShape shape;
  const float *x, *weight;  // weight [C, k, k]
  Prologue prologue;        // without a gate
  Epilogue epilogue;        // without a residual
  Reduction reduction;
  float* y;
  float* partials;  // statistics [slots, 3, C]; pool: sums [images, 1, C]
};

void depthwise_forward(const DepthwiseForward& call, const Execution& execution);

struct DepthwiseBackward {
  std::int64_t images;
  ConvShape shape;
  OutputGradient gradient;
  const float *x, *weight;
  Prologue prologue;      // without a gate
  const float* mean;      // [C] or null
  const float* residual;  // added to dz; or null
  float* dz;              // [N, H, W, C]: with respect to scale * x + shift
  float* sums;            // [slots, 2, C] or null
  float* dweight;         // [C, k, k]
};

void depthwise_backward(const DepthwiseBackward& call, const Execution& execution);

// The pixels that a convolution reads for each of its outputs, in the order of rows, columns and channels, with zeros
// outside of the map: [N, out_height, out_width, kernel * kernel * C].
void patches(std::int64_t images, const ConvShape& shape, const float* x, float* to, const Execution& execution);

// to = keep * act(scale * x + shift) * gate + residual
void merge(const Pixels& pixels, std::int64_t channels, const float* x, const Prologue& prologue, const float* keep,
           const float* residual, float* to, const Execution& execution);

// Sums over each image's pixels of the deferred activation, times `factor` [N, H, W, C] or null: [images, parts, C].
void squeeze(const Pixels& pixels, std::int64_t channels, const float* x, const Prologue& prologue, const float* factor,
             float* sums, const Execution& execution);

// Partial count, mean and M2: [parts, 3, C].
void channel_statistics(const Pixels& pixels, std::int64_t channels, const float* y, float* partials,
                        const Execution& execution);

// Partial sums of dz and dz * (y - mean): [parts, 2, C].
void gradient_sums(const Pixels& pixels, std::int64_t channels, const OutputGradient& gradient, const float* mean,
                   float* sums, const Execution& execution);

// dy + residual as a map.
void apply_gradient(const Pixels& pixels, std::int64_t channels, const OutputGradient& gradient, const float* residual,
                    float* to, const Execution& execution);

// Count, mean and M2 of the union of partials [partials, 3, C]: [3, C].
void merge_statistics(const float* partials, std::int64_t count, std::int64_t channels, float* stats);

struct FoldBatchNorm {
  const float* partials;  // [count, 3, C]
  std::int64_t count, channels;
  const float *weight, *bias;           // [C] or null
  float *running_mean, *running_var;    // [C] or null; moved by momentum
  float momentum, eps;
  bool skip_nonfinite;
  float* folded;  // [4, C]: scale, shift, mean, rstd
};

void fold_batch_norm(const FoldBatchNorm& call);

struct FoldBatchNormBackward {
  const float* sums;  // of dz and dz * (y - mean)
  std::int64_t count, partial_stride, kind_stride, channels;
  float inverse_pixels;
  const float *weight, *mean, *rstd;  // weight may be null
  bool batch_statistics;
  float *coefficients, *dweight, *dbias;  // [3, C], [C], [C]
};

void fold_batch_norm_backward(const FoldBatchNormBackward& call);

}  // namespace effnet
