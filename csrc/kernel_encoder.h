// What an encoder layer needs besides its Linears: attention of whole sequences, and LayerNorm.
// Part of kernel_body.h, under its rules.
//
// A result is one fixed chain of operations, whatever else is in the batch. A masked key adds an
// exact zero, so it may as well be left out, and a padded sequence equals the same one alone.
#include "kernel_panels.h"
#include "kernels.h"

namespace finegates {
namespace {

// x = (x - mean) / sqrt(variance + eps) * weight + bias for each row, in place. `scratch` holds
// norm_floats(features).
template <class T>
void layer_norm(const LayerNorm& norm, int64_t first_row, int64_t rows, float* scratch) {
  const int64_t n = norm.features, padded = round_up(n, kPanel);
  float* const weight = scratch;
  float* const bias = weight + padded + kChunk;
  float* const row = bias + padded + kChunk;
  read_row(weight, reinterpret_cast<const T*>(norm.weight), n);
  read_row(bias, reinterpret_cast<const T*>(norm.bias), n);
  for (int64_t r = first_row; r < first_row + rows; ++r) {
    T* const x = reinterpret_cast<T*>(norm.x) + r * n;
    read_row(row, x, n);
    F sum[2] = {Vec::zero(), Vec::zero()};
    for (int64_t i = 0; i < padded; i += 2 * Vec::kLanes) {
      for (int v = 0; v < 2; ++v) sum[v] = Vec::add(sum[v], Vec::load(row + i + v * Vec::kLanes));
    }
    const float mean = Vec::sum(Vec::add(sum[0], sum[1])) / static_cast<float>(n);
    for (int64_t i = n; i < padded; ++i) row[i] = mean;
    F square[2] = {Vec::zero(), Vec::zero()};
    for (int64_t i = 0; i < padded; i += 2 * Vec::kLanes) {
      for (int v = 0; v < 2; ++v) {
        const F d = Vec::sub(Vec::load(row + i + v * Vec::kLanes), Vec::set(mean));
        square[v] = Vec::fma(d, d, square[v]);
      }
    }
    const float variance = Vec::sum(Vec::add(square[0], square[1])) / static_cast<float>(n);
    const F scale = Vec::set(1.0f / __builtin_sqrtf(variance + norm.eps));
    for (int64_t i = 0; i < padded; i += Vec::kLanes) {
      const F scaled = Vec::mul(Vec::sub(Vec::load(row + i), Vec::set(mean)), scale);
      Vec::store(row + i, Vec::fma(scaled, Vec::load(weight + i), Vec::load(bias + i)));
    }
    write_row(x, row, n);
  }
}

void layer_norm_any(const LayerNorm& norm, int64_t first_row, int64_t rows, float* scratch) {
  if (norm.type == Type::kF32) return layer_norm<float>(norm, first_row, rows, scratch);
  layer_norm<uint16_t>(norm, first_row, rows, scratch);
}

// One row of the mask as numbers to add to the scores, times log2(e): what hides a key stays what
// it is.
void read_mask_row(const SelfAttention& a, int64_t sequence, int64_t head, int64_t row,
                   float* out) {
  const uint8_t* const mask =
      a.mask + sequence * a.mask_strides[0] + head * a.mask_strides[1] + row * a.mask_strides[2];
  const auto scale = [&] {
    for (int64_t i = 0; i < a.length; ++i) out[i] *= out[i] <= kMasked / 2 ? 1.0f : kLog2E;
  };
  switch (a.mask_type) {
    case Mask::kNone:
      for (int64_t i = 0; i < a.length; ++i) out[i] = 0.0f;
      break;
    case Mask::kKeep:
      for (int64_t i = 0; i < a.length; ++i) out[i] = mask[i] ? 0.0f : kMasked;
      break;
    case Mask::kAddF32:
      read_row(out, reinterpret_cast<const float*>(mask), a.length);
      return scale();
    case Mask::kAddBf16:
      read_row(out, reinterpret_cast<const uint16_t*>(mask), a.length);
      return scale();
  }
}

template <class T>
void self_attention(const SelfAttention& a, int64_t sequence, int64_t head, float* scratch) {
  const int64_t d = a.head_size, padded = round_up(d, kPanel);
  const int64_t offset = sequence * a.length * a.stride + head * d * sizeof(T);
  constexpr Kind K = kAttentionKind<T>;
  constexpr int kRows = Vec::tile_rows(K);
  const AttentionScratch at = attention_scratch(a, kRows);
  float* const mask = scratch + at.mask;
  float* const x = scratch + at.x;
  float* const p = scratch + at.p;
  float* const c = scratch + at.c;
  float before[kRows], most[kRows], total[kRows];
  const bool one_mask = a.mask_type == Mask::kNone || a.mask_strides[2] == 0;
  int64_t keys = a.length;
  if (one_mask) {
    read_mask_row(a, sequence, head, 0, mask);
    while (keys > 0 && mask[keys - 1] <= kMasked / 2) --keys;
    if (keys == 0) keys = a.length;  // nothing to attend to: all of it, as in transformers
    end_mask(mask, keys);
  }
  for (int64_t first = 0; first < keys; first += kPRow) {
    const int64_t count = keys - first < kPRow ? keys - first : kPRow;
    pack_keys<T>(a.k + offset + first * a.stride, a.stride, count, d,
                 scratch + at.keys + first * d);
    pack_values<T>(a.v + offset + first * a.stride, a.stride, count, d,
                   scratch + at.values + first * padded);
  }
  const int64_t tiles = (a.length + kRows - 1) / kRows;
  for (int64_t t = 0, row = 0; t < tiles; ++t) {
    const int64_t rows = (a.length - row) / (tiles - t);
    for (int64_t r = 0; r < rows; ++r) {
      read_operand(x + r * kPRow, reinterpret_cast<const T*>(a.q + offset + (row + r) * a.stride),
                   d);
      most[r] = kMasked;
      total[r] = 0.0f;
      if (one_mask) continue;
      read_mask_row(a, sequence, head, row + r, mask + r * at.mask_stride);
      end_mask(mask + r * at.mask_stride, keys);
    }
    for (int64_t first = 0; first < keys; first += kPRow) {
      const int64_t count = keys - first < kPRow ? keys - first : kPRow;
      multiply_panels<K>(x, rows, scratch + at.keys + first * d, units_of<T>(d), count, p, kPRow,
                         false);
      for (int64_t r = 0; r < rows; ++r) {
        const float* const row_mask = mask + (one_mask ? 0 : r * at.mask_stride) + first;
        before[r] = most[r];
        most[r] = raise_maximum(p + r * kPRow, row_mask, count, a.scale, before[r]);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const float sum = exponentials<kPairs<T>>(p + r * kPRow, count, most[r]);
        const float shrink = first == 0 ? 0.0f : shrinkage(before[r], most[r]);
        total[r] = __builtin_fmaf(total[r], shrink, sum);
        if (first == 0) continue;
        for (int64_t i = 0; i < padded; i += Vec::kLanes) {
          float* const value = c + r * padded + i;
          Vec::store(value, Vec::mul(Vec::load(value), Vec::set(shrink)));
        }
      }
      multiply_panels<K>(p, rows, scratch + at.values + first * padded, units_of<T>(count), d, c,
                         padded, first > 0);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const F share = Vec::set(1.0f / total[r]);
      for (int64_t i = 0; i < padded; i += Vec::kLanes) {
        Vec::store(c + r * padded + i, Vec::mul(Vec::load(c + r * padded + i), share));
      }
      write_row(reinterpret_cast<T*>(a.out + offset + (row + r) * a.stride), c + r * padded, d);
    }
    row += rows;
  }
}

void self_attention_any(const SelfAttention& a, int64_t sequence, int64_t head, float* scratch) {
  if (a.type == Type::kF32) return self_attention<float>(a, sequence, head, scratch);
  self_attention<uint16_t>(a, sequence, head, scratch);
}

}  // namespace
}  // namespace finegates
