// The operators of training, forward and backward, on contiguous channels-last maps: [N, H, W, C].
//
// Maps are divided into shards, each of which has partial results of its own. How many there are depends on the shapes
// alone, never on the number of threads, and the partial results are merged in a fixed order, so that every result is
// bitwise reproducible.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/conv_shape.h"
#include "kernels/kernels.h"

namespace effnet {

// What an operator runs on.
struct Execution {
  const Kernels& kernels;
  int threads;
};

// What is applied to a raw output x when it is read: act(scale * x + shift) * gate. Pointers may be null.
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

// The gradient dy of a convolution's raw output y, computed when it is read: with z = scale * y + shift,
// dz = (grad * gate * drop_path_scale + offset) * act'(z) and dy = alpha * dz + beta * y + gamma. Pointers may be null.
// drop_path_scale is stochastic depth's factor of each sample; offset is the gradient that comes through the squeeze.
struct OutputGradient {
  const float *grad, *y;
  const float* coefficients;     // [3, C]: alpha, beta, gamma
  const float* gate;             // [N, C]
  const float* drop_path_scale;  // [N]
  const float* offset;           // [N, C]
  const float *scale, *shift;    // [C]
  Activation act;

  bool by_image() const { return gate != nullptr || drop_path_scale != nullptr || offset != nullptr; }
};

// The pixels of a batch, in groups that are divided into shards of nearly equal size. A group is an image where an
// operand has a value for each image, such as a gate; otherwise the batch is one group.
struct Pixels {
  std::int64_t images, pixels;  // pixels of an image
  std::int64_t groups, shards;  // shards of a group

  std::int64_t group_rows() const { return images * pixels / groups; }
  std::int64_t total_shards() const { return groups * shards; }
};

// Decides how many groups and shards there are. With by_image, each image is a group.
Pixels partition_pixels(std::int64_t images, std::int64_t pixels, bool by_image);

// In the order of REDUCTIONS in effnet_kernels/fusion/spec.py, whose indices Python passes.
enum class Reduction : std::int32_t { none, statistics, pooled_sums };

struct PointwiseForward {
  Pixels pixels;
  std::int64_t channels, outputs;
  const float *x, *weight, *bias;  // weight [outputs, channels], bias [outputs] or null
  Prologue prologue;
  Epilogue epilogue;
  Reduction reduction;
  float* y;         // null with pooled_sums
  float* partials;  // statistics [total_shards, 3, outputs]; pooled sums [images, shards, outputs]
};

void pointwise_forward(const PointwiseForward& call, const Execution& execution);

struct PointwiseBackward {
  Pixels pixels;
  std::int64_t channels, outputs;
  OutputGradient gradient;
  const float* weight;
  const float* x;  // may be null where dweight and sums are
  Prologue prologue;
  const float* mean;      // [channels] or null
  const float* residual;  // added to dx; or null
  bool apply_act_grad;    // whether dx is multiplied by the prologue's gate and the derivative of its activation
  float* dx;              // [N, H, W, channels] or null
  float* sums;     // [images, shards, 5, channels] (see ActGradPanel), or null, and dx is then the matrix product alone
  float* dweight;  // [outputs, channels] or null
};

void pointwise_backward(const PointwiseBackward& call, const Execution& execution);

// The number of shards that the images of a depthwise convolution are divided into.
std::int64_t depthwise_shards(std::int64_t images);

struct DepthwiseForward {
  std::int64_t images;
  ConvShape shape;
  const float *x, *weight;  // weight [C, k, k]
  Prologue prologue;        // without a gate
  Epilogue epilogue;        // without a residual
  Reduction reduction;
  float* y;
  float* partials;  // statistics [shards, 3, C]; pooled sums [images, 1, C]
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
  float* dz;              // [N, H, W, C], the gradient of scale * x + shift
  float* sums;            // [shards, 2, C] or null
  float* dweight;         // [C, k, k]
};

void depthwise_backward(const DepthwiseBackward& call, const Execution& execution);

// For each output of a convolution the pixels that it reads, in the order of rows, columns and channels, with zeros
// outside of the map (im2col): [N, out_height, out_width, kernel * kernel * C].
void patches(std::int64_t images, const ConvShape& shape, const float* x, float* to, const Execution& execution);

// A block's output from its last raw output: drop_path_scale * act(scale * x + shift) * gate + residual.
void bn_act_add(const Pixels& pixels, std::int64_t channels, const float* x, const Prologue& prologue,
                const float* drop_path_scale, const float* residual, float* to, const Execution& execution);

// Sums over the pixels of each shard of act(scale * x + shift) * gate, multiplied by `factor` [N, H, W, C] where it is
// not null: [images, shards, C].
void pooled_sums(const Pixels& pixels, std::int64_t channels, const float* x, const Prologue& prologue,
                 const float* factor, float* sums, const Execution& execution);

// The sizes of squeeze-and-excitation's two layers: w1 [squeezed, channels], w2 [channels, squeezed].
struct ExciteShape {
  std::int64_t images, channels, squeezed;
};

// From partial sums to pooled = their mean over the pixels, hidden = w1 pooled + b1 and
// gate = gate_kind(w2 act(hidden) + b2).
struct Excite {
  ExciteShape shape;
  std::int64_t parts;
  float inverse_pixels;
  const float* sums;  // [images, parts, channels]
  const float *w1, *b1, *w2, *b2;  // biases may be null
  Activation act;
  Gate gate_kind;
  float *gate, *pooled, *hidden;  // [images, channels], [images, channels], [images, squeezed]
};

void excite(const Excite& call, const Execution& execution);

// The gradients of the logits that the gate is made of, of hidden, and of each pixel through the mean (offset).
struct ExciteBackward {
  ExciteShape shape;
  std::int64_t parts, kinds;
  float inverse_pixels;
  const float* sums;  // [images, parts, kinds, channels]: 5 kinds (see ActGradPanel), or the gate's gradient alone
  const float *gate, *hidden, *w1, *w2;
  Activation act;
  Gate gate_kind;
  float *offset, *grad_logits, *grad_hidden;  // [images, channels], [images, channels], [images, squeezed]
  float* norm_sums;  // [images, 2, channels], of dz and dz * (y - mean); null with one kind
};

void excite_backward(const ExciteBackward& call, const Execution& execution);

// The gradients of the layers' weights and biases.
struct ExciteBackwardWeight {
  ExciteShape shape;
  const float *grad_logits, *grad_hidden, *hidden, *pooled;
  Activation act;
  float *dw1, *db1, *dw2, *db2;
};

void excite_backward_weight(const ExciteBackwardWeight& call, const Execution& execution);

// The count, the mean and the sum of squared deviations (M2) of each shard: [total_shards, 3, C].
void channel_statistics(const Pixels& pixels, std::int64_t channels, const float* y, float* partials,
                        const Execution& execution);

// The sums over each shard of dz and of dz * (y - mean): [total_shards, 2, C].
void gradient_sums(const Pixels& pixels, std::int64_t channels, const OutputGradient& gradient, const float* mean,
                   float* sums, const Execution& execution);

// Writes dy + residual.
void apply_gradient(const Pixels& pixels, std::int64_t channels, const OutputGradient& gradient, const float* residual,
                    float* to, const Execution& execution);

// Count, mean and M2 of the union of partials [partials, 3, C]: [3, C].
void merge_statistics(const float* partials, std::int64_t count, std::int64_t channels, float* stats);

// Mean, rstd, scale and shift from partial statistics.
struct FinalizeBatchNorm {
  const float* partials;  // [count, 3, C]
  std::int64_t count, channels;
  const float *weight, *bias;         // [C] or null
  float *running_mean, *running_var;  // [C] or null; updated
  float momentum, eps;
  bool skip_nonfinite;  // whether non-finite statistics leave the running ones alone
  float* result;        // [4, C]: scale, shift, mean, rstd
};

void finalize_batch_norm(const FinalizeBatchNorm& call);

// The coefficients of OutputGradient, and BatchNorm's gradients, from the partial sums of gradient_sums.
struct FinalizeBatchNormBackward {
  const float* sums;  // [count, 2, C], of dz and dz * (y - mean), with the strides below
  std::int64_t count, partial_stride, kind_stride, channels;
  float inverse_pixels;
  const float *weight, *mean, *rstd;      // weight may be null
  bool batch_statistics;                  // whether mean and rstd are the batch's, and gradients flow through them
  float *coefficients, *dweight, *dbias;  // [3, C], [C], [C]
};

void finalize_batch_norm_backward(const FinalizeBatchNormBackward& call);

}  // namespace effnet
