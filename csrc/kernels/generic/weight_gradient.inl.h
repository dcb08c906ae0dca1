// Gradients of weights: products of two maps, summed over their pixels.
#pragma once

#include "kernels/generic/lanes.inl.h"

namespace {

// Computes outputs [first, first + K) of the panel by V vectors of L inputs, which stay in registers over all the rows.
template <int L, int K, int V>
EFFNET_NOINLINE void weight_gradient_tile(const effnet::WeightGradient& call, std::int64_t first, std::int64_t column) {
  constexpr int pixel = effnet::panel_columns, matrix = pixel * pixel;
  // Where a vector of inputs is: how many panels behind the first vector's, and from which of its columns on.
  const auto panel = [](auto v) EFFNET_INLINE_LAMBDA { return decltype(v)::value * L / pixel; };
  const auto lane = [](auto v) EFFNET_INLINE_LAMBDA { return decltype(v)::value * L % pixel; };
  F<L> sums[K * V];
  float* to = call.to + column / pixel * matrix + first * pixel + column % pixel;
  unrolled<0, K>([&](auto k) EFFNET_INLINE_LAMBDA {
    unrolled<0, V>([&](auto v) EFFNET_INLINE_LAMBDA {
      const float* from = to + panel(v) * matrix + k.value * pixel + lane(v);
      sums[k.value * V + v.value] = call.accumulate ? load<L>(from) : F<L>{};
    });
  });
  const float* g = call.g + first;
  const float* a = call.a + column / pixel * call.a_panel + column % pixel;
  for (std::int64_t row = 0; row < call.rows; ++row, g += pixel, a += pixel) {
    F<L> inputs[V];
    unrolled<0, V>(
        [&](auto v) EFFNET_INLINE_LAMBDA { inputs[v.value] = load<L>(a + panel(v) * call.a_panel + lane(v)); });
    unrolled<0, K>([&](auto k) EFFNET_INLINE_LAMBDA {
      const F<L> output = broadcast<L>(g[k.value]);
      unrolled<0, V>([&](auto v) EFFNET_INLINE_LAMBDA { sums[k.value * V + v.value] += output * inputs[v.value]; });
    });
  }
  unrolled<0, K>([&](auto k) EFFNET_INLINE_LAMBDA {
    unrolled<0, V>([&](auto v) EFFNET_INLINE_LAMBDA {
      store<L>(to + panel(v) * matrix + k.value * pixel + lane(v), sums[k.value * V + v.value]);
    });
  });
}

// K outputs at a time, as many as the panel has; K divides 16. L * V inputs are half a panel, one, or two.
template <int L, int K, int V>
void weight_gradient(const effnet::WeightGradient& call) {
  for (std::int64_t first = 0; first < call.outputs; first += K) {
    for (std::int64_t column = 0; column < call.inputs; column += L * V) {
      weight_gradient_tile<L, K, V>(call, first, column);
    }
  }
}

// Calls f(call of one panel of inputs) for each panel.
template <class Function>
EFFNET_INLINE void each_input_panel(effnet::WeightGradient call, const Function& f) {
  constexpr std::int64_t width = effnet::panel_columns;
  const std::int64_t inputs = call.inputs;
  call.inputs = inputs < width ? inputs : width;
  f(call);
  if (inputs <= width) return;
  call.a += call.a_panel;
  call.to += width * width;
  call.inputs = inputs - width;
  f(call);
}

// T output columns at a time, whose products alternate between two sums of each tap, because an addition to one sum
// would wait for the last.
template <int L, int K, int S, int T>
EFFNET_INLINE void depthwise_weight_columns(const float* x, const float* g, F<L> (&sums)[2][K]) {
  constexpr int pixel = effnet::panel_columns;
  F<L> gradient[T];
  unrolled<0, T>([&](auto t) EFFNET_INLINE_LAMBDA { gradient[t.value] = load<L>(g + t.value * pixel); });
  unrolled<0, (T - 1) * S + K>([&](auto i) EFFNET_INLINE_LAMBDA {
    constexpr int offset = decltype(i)::value;
    constexpr int begin = offset < K ? 0 : (offset - K) / S + 1;
    constexpr int end = offset / S + 1 < T ? offset / S + 1 : T;
    if constexpr (begin < end) {
      const F<L> value = load<L>(x + offset * pixel);
      unrolled<begin, end>([&](auto t) EFFNET_INLINE_LAMBDA {
        constexpr int column = decltype(t)::value;
        sums[K < 7 ? column % 2 : 0][offset - column * S] += value * gradient[column];
      });
    }
  });
}

template <int L, int K, int S>
EFFNET_NOINLINE void depthwise_weight_row(const effnet::DepthwiseWeightGradient& call, std::int64_t lane) {
  constexpr int pixel = effnet::panel_columns, T = 4;
  for (std::int64_t tap_row = call.tap_begin; tap_row < call.tap_end; ++tap_row) {
    float* to = call.to + tap_row * K * pixel + lane;
    const float* x = call.x[tap_row] + lane;
    const float* g = call.g + lane;
    F<L> sums[2][K] = {};
    std::int64_t column = 0;
    if (call.stride == S) {
      for (; column + T <= call.width; column += T) {
        depthwise_weight_columns<L, K, S, T>(x + column * S * pixel, g + column * pixel, sums);
      }
    }
    for (; column < call.width; ++column) {
      depthwise_weight_columns<L, K, S, 1>(x + column * call.stride * pixel, g + column * pixel, sums);
    }
    unrolled<0, K>([&](auto k) EFFNET_INLINE_LAMBDA {
      store<L>(to + k.value * pixel, load<L>(to + k.value * pixel) + (sums[0][k.value] + sums[1][k.value]));
    });
  }
}

template <int L, int K>
void depthwise_weight_strides(const effnet::DepthwiseWeightGradient& call) {
  for (std::int64_t lane = 0; lane < effnet::panel_columns; lane += L) {
    if (call.stride == 2) {
      depthwise_weight_row<L, K, 2>(call, lane);
    } else {
      depthwise_weight_row<L, K, 1>(call, lane);
    }
  }
}

template <int L>
void depthwise_weight_gradient(const effnet::DepthwiseWeightGradient& call) {
  switch (call.kernel) {
    case 3:
      return depthwise_weight_strides<L, 3>(call);
    case 5:
      return depthwise_weight_strides<L, 5>(call);
    case 7:
      return depthwise_weight_strides<L, 7>(call);
  }
}

}  // namespace
