// Prologues, applied to rows on their way to panels; their gradients; and reductions of panels.
#pragma once

#include "kernels/generic/activation.inl.h"

namespace {

using effnet::Activation;

template <int I>
using Width = Index<I>;

// Calls body(Width<n>, column) for vectors that together cover exactly `columns` columns, so that nothing past the last
// one is read or written: of L columns while they fit, then of eight, then of one.
template <int L, class Body>
EFFNET_INLINE void for_columns(std::int64_t columns, const Body& body) {
  std::int64_t c = 0;
  for (; c + L <= columns; c += L) body(Width<L>{}, c);
  if constexpr (L > 8) {
    for (; c + 8 <= columns; c += 8) body(Width<8>{}, c);
  }
  if constexpr (L > 1) {
    for (; c < columns; ++c) body(Width<1>{}, c);
  }
}

EFFNET_INLINE float* at(const effnet::Rows& rows, std::int64_t row, std::int64_t channel) {
  constexpr std::int64_t panel = effnet::panel_columns;
  return rows.data + row * rows.row + channel / panel * rows.panel + channel % panel;
}

// How many rows ahead to prefetch: about four kilobytes, which hides the latency of memory.
EFFNET_INLINE std::int64_t rows_ahead(std::int64_t channels) { return 1 + 1024 / channels; }

template <int L>
EFFNET_INLINE F<L> load_or(const float* from, std::int64_t offset, float otherwise) {
  return from != nullptr ? load<L>(from + offset) : broadcast<L>(otherwise);
}

template <Activation A, int L>
EFFNET_INLINE F<L> activated(F<L> x) {
  F<L> value[1] = {x};
  activate<float, L, 1>(value, A);
  return value[0];
}

// An activation's value u and derivative s at z. At kinks and at NaN the derivative is torch's.
template <Activation A, int L>
EFFNET_INLINE void differentiate(F<L> z, F<L>& u, F<L>& s) {
  const F<L> zero{}, one = broadcast<L>(1.0f);
  if constexpr (A == Activation::silu) {
    const F<L> sigma = sigmoid<L>(z);
    u = z * sigma;
    s = sigma + u * (1.0f - sigma);
  } else if constexpr (A == Activation::relu) {
    u = at_least<L>(z, 0.0f);
    s = z <= 0.0f ? zero : one;
  } else if constexpr (A == Activation::relu6) {
    u = at_most<L>(at_least<L>(z, 0.0f), 6.0f);
    s = z <= 0.0f ? zero : (z >= 6.0f ? zero : one);
  } else if constexpr (A == Activation::hardswish) {
    u = activated<A, L>(z);
    s = z <= -3.0f ? zero : (z < 3.0f ? z * (1.0f / 3.0f) + 0.5f : one);
  } else {
    static_assert(A == Activation::none, "an activation without a derivative");
    u = z;
    s = one;
  }
}

// Calls f(Tag<A>) for the activation at hand, so that loops are compiled once for each.
template <Activation A>
struct Tag {
  static constexpr Activation value = A;
};

template <class Function>
EFFNET_INLINE void with_activation(Activation act, const Function& f) {
  switch (act) {
    case Activation::none:
      return f(Tag<Activation::none>{});
    case Activation::silu:
      return f(Tag<Activation::silu>{});
    case Activation::relu:
      return f(Tag<Activation::relu>{});
    case Activation::relu6:
      return f(Tag<Activation::relu6>{});
    case Activation::hardswish:
      return f(Tag<Activation::hardswish>{});
  }
}

// Writes zeros from the last channel to the end of its panel, in every row.
EFFNET_INLINE void fill_panel(const effnet::Rows& to, std::int64_t rows, std::int64_t channels) {
  const std::int64_t end = (channels + effnet::panel_columns - 1) / effnet::panel_columns * effnet::panel_columns;
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t c = channels; c < end; ++c) *at(to, row, c) = 0.0f;
  }
}

template <int L>
void activate_rows(const effnet::ActivateRows& call) {
  with_activation(call.act, [&](auto tag) EFFNET_INLINE_LAMBDA {
    constexpr Activation A = decltype(tag)::value;
    const std::int64_t ahead = rows_ahead(call.channels);
    for (std::int64_t row = 0; row < call.rows; ++row) {
      for_columns<L>(call.channels, [&](auto width, std::int64_t c) EFFNET_INLINE_LAMBDA {
        constexpr int W = decltype(width)::value;
        prefetch(at(call.x, row + ahead, c));
        F<W> value = load<W>(at(call.x, row, c));
        if (call.scale != nullptr) value = value * load<W>(call.scale + c) + load<W>(call.shift + c);
        value = activated<A, W>(value);
        if (call.factor != nullptr) value = value * load<W>(call.factor + c);
        if (call.residual.data != nullptr) value = value + load<W>(at(call.residual, row, c));
        store<W>(at(call.to, row, c), value);
      });
    }
  });
  if (call.fill) fill_panel(call.to, call.rows, call.channels);
}

template <int L>
void gradient_rows(const effnet::GradientRows& call) {
  with_activation(call.act, [&](auto tag) EFFNET_INLINE_LAMBDA {
    constexpr Activation A = decltype(tag)::value;
    const std::int64_t ahead = rows_ahead(call.channels);
    for (std::int64_t row = 0; row < call.rows; ++row) {
      for_columns<L>(call.channels, [&](auto width, std::int64_t c) EFFNET_INLINE_LAMBDA {
        constexpr int W = decltype(width)::value;
        prefetch(at(call.y, row + ahead, c));
        prefetch(at(call.grad, row + ahead, c));
        const F<W> y = call.y.data != nullptr ? load<W>(at(call.y, row, c)) : F<W>{};
        F<W> dz = call.grad.data != nullptr ? load<W>(at(call.grad, row, c)) : F<W>{};
        if (call.factor != nullptr) dz = dz * load<W>(call.factor + c);
        if (call.offset != nullptr) dz = dz + load<W>(call.offset + c);
        if constexpr (A != Activation::none) {
          F<W> u, s, z = y;
          if (call.scale != nullptr) z = y * load<W>(call.scale + c) + load<W>(call.shift + c);
          differentiate<A, W>(z, u, s);
          dz = dz * s;
        }
        if (call.alpha != nullptr) {
          dz = dz * load<W>(call.alpha + c) + (y * load<W>(call.beta + c) + load<W>(call.gamma + c));
        }
        if (call.residual.data != nullptr) dz = dz + load<W>(at(call.residual, row, c));
        store<W>(at(call.to, row, c), dz);
      });
    }
  });
  if (call.fill) fill_panel(call.to, call.rows, call.channels);
}

template <int L>
void act_grad_panel(const effnet::ActGradPanel& call) {
  constexpr int pixel = effnet::panel_columns;
  with_activation(call.act, [&](auto tag) EFFNET_INLINE_LAMBDA {
    constexpr Activation A = decltype(tag)::value;
    for_columns<L>(call.columns, [&](auto width, std::int64_t c) EFFNET_INLINE_LAMBDA {
      constexpr int W = decltype(width)::value;
      const F<W> scale = load_or<W>(call.scale, c, 1.0f), shift = load_or<W>(call.shift, c, 0.0f);
      const F<W> mean = load_or<W>(call.mean, c, 0.0f), gate = load_or<W>(call.gate, c, 1.0f);
      F<W> of_gate{}, of_shift{}, slopes{}, of_scale{}, deviations{};
      for (std::int64_t row = 0; row < call.rows; ++row) {
        const F<W> x = load<W>(call.x.data + row * call.x.row + c);
        const F<W> dq = load<W>(call.dq + row * pixel + c);
        F<W> u, s;
        differentiate<A, W>(x * scale + shift, u, s);
        const F<W> dz = dq * s, deviation = x - mean;
        of_shift += dz;
        of_scale += dz * deviation;
        if (call.sum_kinds == 5) {
          of_gate += dq * u;
          slopes += s;
          deviations += s * deviation;
        }
        F<W> value = call.apply_act_grad ? gate * dz : dq;
        if (call.residual.data != nullptr) value = value + load<W>(call.residual.data + row * call.residual.row + c);
        store<W>(call.to.data + row * call.to.row + c, value);
      }
      if (call.sums == nullptr) return;
      const auto add = [&](int index, F<W> value) EFFNET_INLINE_LAMBDA {
        float* to = call.sums + index * pixel + c;
        store<W>(to, load<W>(to) + value);
      };
      if (call.sum_kinds == 5) {
        add(0, of_gate);
        add(1, of_shift);
        add(2, of_scale);
        add(3, slopes);
        add(4, deviations);
      } else {
        add(0, of_shift);
        add(1, of_scale);
      }
    });
  });
}

// Two passes over rows that are in cache, then Chan's formula: never the difference of two large squares.
template <int L>
void panel_statistics(const effnet::PanelStatistics& call) {
  const float rows = static_cast<float>(call.rows), total = static_cast<float>(call.count + call.rows);
  const float of_new = rows / total, of_both = of_new * static_cast<float>(call.count);
  for_columns<L>(call.columns, [&](auto width, std::int64_t c) EFFNET_INLINE_LAMBDA {
    constexpr int W = decltype(width)::value;
    const float* values = call.values + c;
    // Calls f(sum, row) for every row, with four sums in turn.
    const auto each = [&](F<W>(&sums)[4], const auto& f) EFFNET_INLINE_LAMBDA {
      std::int64_t row = 0;
      for (; row + 4 <= call.rows; row += 4) {
        unrolled<0, 4>([&](auto i)
                           EFFNET_INLINE_LAMBDA { f(sums[i.value], load<W>(values + (row + i.value) * call.row)); });
      }
      for (; row < call.rows; ++row) f(sums[0], load<W>(values + row * call.row));
    };
    F<W> sums[4] = {}, squares[4] = {};
    each(sums, [](F<W>& sum, F<W> value) EFFNET_INLINE_LAMBDA { sum += value; });
    const F<W> mean = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * (1.0f / rows);
    each(squares, [&](F<W>& square, F<W> value) EFFNET_INLINE_LAMBDA { square += (value - mean) * (value - mean); });
    const F<W> m2 = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    if (call.count == 0) {
      store<W>(call.mean + c, mean);
      store<W>(call.m2 + c, m2);
      return;
    }
    const F<W> delta = mean - load<W>(call.mean + c);
    store<W>(call.mean + c, load<W>(call.mean + c) + delta * of_new);
    store<W>(call.m2 + c, load<W>(call.m2 + c) + (m2 + delta * delta * of_both));
  });
}

template <int L>
void panel_sums(const effnet::PanelSums& call) {
  constexpr int pixel = effnet::panel_columns;
  for_columns<L>(call.columns, [&](auto width, std::int64_t c) EFFNET_INLINE_LAMBDA {
    constexpr int W = decltype(width)::value;
    F<W> sums{}, products{};
    const F<W> mean = load_or<W>(call.mean, c, 0.0f);
    for (std::int64_t row = 0; row < call.rows; ++row) {
      const F<W> d = load<W>(call.d + row * pixel + c);
      sums += d;
      if (call.products != nullptr) products += d * (load<W>(call.x.data + row * call.x.row + c) - mean);
    }
    store<W>(call.sums + c, load<W>(call.sums + c) + sums);
    if (call.products != nullptr) store<W>(call.products + c, load<W>(call.products + c) + products);
  });
}

}  // namespace
