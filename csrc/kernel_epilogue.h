// What happens to a tile's sums: scale, bias, activation, product of a gated pair, and the way into
// the kept rows of y. Part of kernel_body.h, under its rules.
#include "kernels.h"

#define FG_INLINE inline __attribute__((always_inline))

namespace finegates {
namespace {

using F = Vec::F;
constexpr int kPanelVecs = kPanel / Vec::kLanes;

constexpr float kLog2E = 1.44269504f;
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what it is added to is rounded to an integer

// 2^(n + t) for an integer n from -126 to 127 and |t| <= 1/2, and 0 for n = -127; `shifted` is
// n + kRound. Minimax polynomial of degree 6, relative error 2e-9.
FG_INLINE F power(F shifted, F t) {
  F p = Vec::fma(Vec::set(1.53533605e-4f), t, Vec::set(1.33988750e-3f));
  p = Vec::fma(p, t, Vec::set(9.61843692e-3f));
  p = Vec::fma(p, t, Vec::set(5.55033237e-2f));
  p = Vec::fma(p, t, Vec::set(2.40226477e-1f));
  p = Vec::fma(p, t, Vec::set(6.93147182e-1f));
  p = Vec::fma(p, t, Vec::set(1.0f));
  return Vec::mul(p, Vec::power_of_two(shifted));
}

// 2^x for x up to 127, 1.3 ulp, 0 below -126.5. A NaN stays one.
FG_INLINE F exp2(F x) {
  x = Vec::max(Vec::set(-127.0f), x);
  const F shifted = Vec::add(x, Vec::set(kRound));
  return power(shifted, Vec::sub(x, Vec::sub(shifted, Vec::set(kRound))));
}

// exp(x) for x up to 88, 1.5 ulp, 0 below -87.7. A NaN stays one.
FG_INLINE F exp(F x) {
  x = Vec::max(Vec::set(-88.0f), x);
  const F shifted = Vec::fma(x, Vec::set(kLog2E), Vec::set(kRound));
  const F n = Vec::sub(shifted, Vec::set(kRound));
  F r = Vec::fma(n, Vec::set(-0.693359375f), x);
  r = Vec::fma(n, Vec::set(2.12194440e-4f), r);
  return power(shifted, Vec::mul(r, Vec::set(kLog2E)));
}

// x / (1 + exp(-s)); x is bounded below because exp() goes no further than e^88.
FG_INLINE F times_sigmoid(F x, F s) {
  x = Vec::max(Vec::set(-1e4f), x);
  return Vec::div(
      x, Vec::add(Vec::set(1.0f), exp(Vec::min(Vec::set(88.0f), Vec::sub(Vec::zero(), s)))));
}

// max(x, 0) - |x| / 2 erfc(|x| / sqrt 2): no cancellation in the negative tail. erfc(z) is
// exp(-z^2) times a polynomial in 1 / (1 + 0.4 z), least squares, absolute error 2e-10 in fp64.
FG_INLINE F gelu(F x) {
  const F a = Vec::min(Vec::abs(x), Vec::set(20.0f));
  const F t = Vec::div(Vec::set(1.0f), Vec::fma(a, Vec::set(0.4f * 0.70710678f), Vec::set(1.0f)));
  F q = Vec::fma(Vec::set(0.07794789f), t, Vec::set(-0.41015667f));
  q = Vec::fma(q, t, Vec::set(0.71093166f));
  q = Vec::fma(q, t, Vec::set(-0.39605272f));
  q = Vec::fma(q, t, Vec::set(0.4169545f));
  q = Vec::fma(q, t, Vec::set(0.13970287f));
  q = Vec::fma(q, t, Vec::set(0.23553653f));
  q = Vec::fma(q, t, Vec::set(0.22513595f));
  const F e = Vec::mul(Vec::mul(q, t), exp(Vec::mul(Vec::mul(a, a), Vec::set(-0.5f))));
  return Vec::fma(Vec::mul(a, Vec::set(-0.5f)), e, Vec::max(Vec::zero(), x));
}

FG_INLINE F gelu_tanh(F x) {
  const F cube = Vec::mul(Vec::mul(x, x), Vec::mul(x, Vec::set(0.044715f)));
  return times_sigmoid(x, Vec::mul(Vec::add(x, cube), Vec::set(1.59576912f)));
}

template <Activation A>
void activate(float* c, int64_t rows, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int v = 0; v < kPanelVecs; ++v) {
      float* at = c + r * stride + v * Vec::kLanes;
      const F x = Vec::load(at);
      if constexpr (A == Activation::kGelu) Vec::store(at, gelu(x));
      if constexpr (A == Activation::kGeluTanh) Vec::store(at, gelu_tanh(x));
      if constexpr (A == Activation::kSilu) Vec::store(at, times_sigmoid(x, x));
      if constexpr (A == Activation::kRelu) Vec::store(at, Vec::max(Vec::zero(), x));
    }
  }
}

void activate(Activation activation, float* c, int64_t rows, int64_t stride) {
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kGelu:
      return activate<Activation::kGelu>(c, rows, stride);
    case Activation::kGeluTanh:
      return activate<Activation::kGeluTanh>(c, rows, stride);
    case Activation::kSilu:
      return activate<Activation::kSilu>(c, rows, stride);
    case Activation::kRelu:
      return activate<Activation::kRelu>(c, rows, stride);
  }
}

// C consecutive chunks of y for all rows of a tile; the last one may be cut short.
template <class T, int C>
void scatter_chunks(const Call& call, int64_t at, int64_t rows, const float* c, int64_t c_stride,
                    const Vec::Spread* spreads, int last_valid) {
  Vec::Spread spread[C];
  for (int i = 0; i < C; ++i) spread[i] = spreads[i];
  T* y = reinterpret_cast<T*>(call.y + at);
  const T* residual = call.residual ? reinterpret_cast<const T*>(call.residual + at) : nullptr;
  const int64_t y_stride = call.y_stride / static_cast<int64_t>(sizeof(T));
  for (int64_t r = 0; r < rows; ++r, c += c_stride, y += y_stride) {
    const auto panel = Vec::load_panel(c);
    if (residual == nullptr) {
#pragma GCC unroll 4
      for (int i = 0; i + 1 < C; i += 2) {
        Vec::write_pair(y + i * kChunk, Vec::expand(panel, spread[i]),
                        Vec::expand(panel, spread[i + 1]), i + 2 == C ? last_valid : kChunk);
      }
      if (C % 2 == 1) {
        Vec::write(y + (C - 1) * kChunk, Vec::expand(panel, spread[C - 1]), last_valid);
      }
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < C; ++i) {
        Vec::add_write(y + i * kChunk, Vec::expand(panel, spread[i]), residual + i * kChunk,
                       i + 1 == C ? last_valid : kChunk);
      }
      residual += y_stride;
    }
  }
}

// Expands one panel's results into its range of y: zeros (or the residual) between kept rows.
// `limit` is where the caller's last panel ends: up to there a store may run past this panel's
// range, because the next panel writes later.
template <class T>
void scatter(const Call& call, int64_t first_row, int64_t rows, int64_t panel, int64_t limit,
             const float* c, int64_t c_stride) {
  const Packed& p = call.layer;
  const Segment& segment = p.row_segments[panel];
  const uint32_t chunks = p.row_segments[panel + 1].chunk - segment.chunk;
  int64_t column = segment.start;
  int kept = 0;
  for (uint32_t done = 0; done < chunks;) {
    Vec::Spread spreads[4];
    const int count = chunks - done < 4 ? static_cast<int>(chunks - done) : 4;
    for (int i = 0; i < count; ++i) {
      const unsigned mask = p.row_masks[segment.chunk + done + i];
      spreads[i] = Vec::spread(mask, kept);
      kept += __builtin_popcount(mask);
    }
    const int64_t at = first_row * call.y_stride + column * static_cast<int64_t>(sizeof(T));
    column += count * kChunk;
    const int valid = column > limit ? static_cast<int>(kChunk - (column - limit)) : kChunk;
    constexpr decltype(&scatter_chunks<T, 1>) kScatter[] = {
        scatter_chunks<T, 1>, scatter_chunks<T, 2>, scatter_chunks<T, 3>, scatter_chunks<T, 4>};
    kScatter[count - 1](call, at, rows, c, c_stride, spreads, valid);
    done += count;
  }
}

// c *= up
void multiply_by(const float* up, float* c, int64_t rows, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int v = 0; v < kPanelVecs; ++v) {
      const int64_t at = r * stride + v * Vec::kLanes;
      Vec::store(c + at, Vec::mul(Vec::load(c + at), Vec::load(up + at)));
    }
  }
}

// c = c * scale + bias, of int8 weights.
void rescale(const Packed& p, int64_t panel, float* c, int64_t rows, int64_t stride) {
  for (int v = 0; v < kPanelVecs; ++v) {
    const int64_t at = panel * kPanel + v * Vec::kLanes;
    const F scale = Vec::load(p.scale + at), bias = Vec::load(p.bias + at);
    for (int64_t r = 0; r < rows; ++r) {
      float* value = c + r * stride + v * Vec::kLanes;
      Vec::store(value, Vec::fma(Vec::load(value), scale, bias));
    }
  }
}

void finish(const Call& call, int64_t first_row, int64_t rows, int64_t panel, int64_t limit,
            float* c, int64_t c_stride, float* up) {
  if (call.layer.scale != nullptr) {
    rescale(call.layer, panel, c, rows, c_stride);
    if (call.pair) rescale(call.up, panel, up, rows, c_stride);
  }
  activate(call.activation, c, rows, c_stride);
  if (call.pair) multiply_by(up, c, rows, c_stride);
  if (call.type == Type::kF32) {
    scatter<float>(call, first_row, rows, panel, limit, c, c_stride);
  } else {
    scatter<uint16_t>(call, first_row, rows, panel, limit, c, c_stride);
  }
}

}  // namespace
}  // namespace finegates
