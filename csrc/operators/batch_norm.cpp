// BatchNorm as arithmetic on vectors of channels (Ioffe and Szegedy 2015, algorithms 1 and 2).
#include <cmath>
#include <vector>

#include "operators/operators.h"

namespace effnet {

// Merges one partial after another by the formula for two sets of Chan, Golub and LeVeque 1983.
void merge_statistics(const float* partials, std::int64_t count, std::int64_t channels, float* stats) {
  float *total = stats, *mean = stats + channels, *m2 = stats + 2 * channels;
  for (std::int64_t c = 0; c < 3 * channels; ++c) stats[c] = partials[c];
  for (std::int64_t index = 1; index < count; ++index) {
    const float* own = partials + index * 3 * channels;
    for (std::int64_t c = 0; c < channels; ++c) {
      const float sum = total[c] + own[c];
      const float share = sum > 0.0f ? own[c] / sum : 0.0f;
      const float delta = own[channels + c] - mean[c];
      m2[c] += own[2 * channels + c] + delta * delta * (total[c] * share);
      mean[c] += delta * share;
      total[c] = sum;
    }
  }
}

void finalize_batch_norm(const FinalizeBatchNorm& call) {
  const std::int64_t channels = call.channels;
  std::vector<float> stats(static_cast<std::size_t>(3 * channels));
  merge_statistics(call.partials, call.count, channels, stats.data());
  const float *count = stats.data(), *mean = count + channels, *m2 = mean + channels;
  for (std::int64_t c = 0; c < channels; ++c) {
    const float var = m2[c] / count[c];
    const float rstd = 1.0f / std::sqrt(var + call.eps);
    const float scale = call.weight != nullptr ? call.weight[c] * rstd : rstd;
    call.result[c] = scale;
    call.result[channels + c] = (call.bias != nullptr ? call.bias[c] : 0.0f) - mean[c] * scale;
    call.result[2 * channels + c] = mean[c];
    call.result[3 * channels + c] = rstd;
    // An empty batch leaves the running statistics alone, as in torch.
    if (call.running_mean == nullptr || count[c] == 0.0f) continue;
    if (call.skip_nonfinite && !(std::isfinite(mean[c]) && std::isfinite(var))) continue;
    // Not running + momentum * (batch - running), which at a momentum of 1 would keep rounding errors of the old
    // statistics.
    const float decay = 1.0f - call.momentum;
    call.running_mean[c] = decay * call.running_mean[c] + call.momentum * mean[c];
    call.running_var[c] = decay * call.running_var[c] + call.momentum * (m2[c] / (count[c] - 1.0f));
  }
}

void finalize_batch_norm_backward(const FinalizeBatchNormBackward& call) {
  for (std::int64_t c = 0; c < call.channels; ++c) {
    float of_bias = 0.0f, of_scale = 0.0f;
    for (std::int64_t index = 0; index < call.count; ++index) {
      const float* own = call.sums + index * call.partial_stride + c;
      of_bias += own[0];
      of_scale += own[call.kind_stride];
    }
    const float rstd = call.rstd[c];
    const float alpha = call.weight != nullptr ? call.weight[c] * rstd : rstd;
    // dy = alpha * (dz - mean(dz) - xhat * mean(dz * xhat)), xhat = (y - mean) * rstd
    const float beta = call.batch_statistics ? -alpha * rstd * rstd * of_scale * call.inverse_pixels : 0.0f;
    const float gamma = call.batch_statistics ? -alpha * of_bias * call.inverse_pixels - beta * call.mean[c] : 0.0f;
    call.coefficients[c] = alpha;
    call.coefficients[call.channels + c] = beta;
    call.coefficients[2 * call.channels + c] = gamma;
    call.dweight[c] = of_scale * rstd;
    call.dbias[c] = of_bias;
  }
}

}  // namespace effnet
