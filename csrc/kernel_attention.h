// RMSNorm, rotary embedding and attention over a cache. Part of kernel_body.h, under its rules.
//
// A query's result is one chain of operations that depends on its own visible keys alone: keys come
// in blocks that start at the batch entry's first visible one; after each block the running maximum
// m and sum l of the softmax move on and earlier results shrink by e^(m_old - m_new).
#include "kernel_panels.h"
#include "kernels.h"
#include "scalar_chunks.h"

namespace finegates {
namespace {

template <class T>
void rms_norm(const T* x, const T* weight, int64_t n, float eps, T* y) {
  const int64_t whole = n / Vec::kLanes * Vec::kLanes;
  F squares = Vec::zero();
  for (int64_t i = 0; i < whole; i += Vec::kLanes) {
    const F value = Vec::load(x + i);
    squares = Vec::fma(value, value, squares);
  }
  float total = Vec::sum(squares);
  for (int64_t i = whole; i < n; ++i) total += widen(x[i]) * widen(x[i]);
  const float factor = 1.0f / __builtin_sqrtf(total / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < whole; i += Vec::kLanes) {
    const F value = Vec::mul(Vec::load(x + i), Vec::set(factor));
    Vec::store(y + i, Vec::mul(value, Vec::load(weight + i)));
  }
  for (int64_t i = whole; i < n; ++i) narrow(widen(x[i]) * factor * widen(weight[i]), y + i);
}

void rms_norm_any(Type type, const void* x, const void* weight, int64_t n, float eps, void* y) {
  if (type == Type::kF32) {
    rms_norm(static_cast<const float*>(x), static_cast<const float*>(weight), n, eps,
             static_cast<float*>(y));
  } else {
    rms_norm(static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(weight), n, eps,
             static_cast<uint16_t*>(y));
  }
}

// y = x * cos + (-x[half..], x[..half]) * sin
template <class T, class Out>
void turn(const T* x, const T* cos, const T* sin, int64_t n, Out* y) {
  const int64_t half = n / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float low = widen(x[i]), high = widen(x[i + half]);
    narrow(low * widen(cos[i]) - high * widen(sin[i]), y + i);
    narrow(high * widen(cos[i + half]) + low * widen(sin[i + half]), y + i + half);
  }
}

// The cache's row of a token.
template <class T>
T* cached(const Attention& t, uint8_t* cache, int64_t batch, int64_t group, int64_t token) {
  const int64_t row = (batch * t.groups + group) * t.capacity + token;
  return reinterpret_cast<T*>(cache) + row * t.head_dim;
}

const uint8_t* mask_of(const Attention& t, int64_t batch, int64_t query) {
  if (t.mask == nullptr) return nullptr;
  return t.mask + batch * t.mask_batch_stride + query * t.mask_query_stride;
}

// One after the last key that a query may see.
int64_t end_of_keys(const Attention& t, int64_t query) {
  return t.causal ? t.past + query + 1 : t.tokens();
}

// The first key that any query of a batch entry sees: blocks start there, so that padding on the
// left changes nothing.
int64_t first_key(const Attention& t, int64_t batch) {
  if (t.mask == nullptr) return 0;
  int64_t first = t.tokens();
  for (int64_t query = 0; query < t.queries; ++query) {
    const uint8_t* mask = mask_of(t, batch, query);
    for (int64_t key = 0; key < first; ++key) {
      if (mask[key] != 0) first = key;
    }
    if (t.mask_query_stride == 0) break;
  }
  return first;
}

// Where the panels of one batch entry and group lie: all tokens from the first that is seen.
template <class T>
struct Panels {
  int64_t first, key_units, value_units;
  float *keys, *values;

  Panels(const Attention& t, int64_t batch, int64_t group) {
    first = first_key(t, batch);
    key_units = units_of<T>(t.head_dim);
    value_units = units_of<T>(t.tokens() - first);
    uint8_t* const at = t.panels + (batch * t.groups + group) * t.panel_bytes();
    keys = reinterpret_cast<float*>(at);
    values = reinterpret_cast<float*>(at + t.panel_bytes() / 2);
  }
  const float* key_panel(int64_t key) const { return keys + (key - first) * key_units; }
  const float* value_panel(int64_t column, int64_t key) const {
    return values + column * value_units + units_of<T>(key - first) * kPanel;
  }
  void pack(const Attention& t, int64_t batch, int64_t group) const {
    const int64_t tokens = t.tokens() - first, stride = t.head_dim * sizeof(T);
    const auto from = [&](uint8_t* cache) {
      return reinterpret_cast<const uint8_t*>(cached<T>(t, cache, batch, group, first));
    };
    pack_keys<T>(from(t.keys), stride, tokens, t.head_dim, keys);
    pack_values<T>(from(t.values), stride, tokens, t.head_dim, values);
  }
};

template <class T>
void append(const Attention& t, int64_t batch, int64_t group) {
  for (int64_t query = 0; query < t.queries; ++query) {
    const int64_t row = batch * t.queries + query;
    const int64_t at = (row * t.groups + group) * t.head_dim;
    const int64_t position = t.positions[row] * t.head_dim;
    turn(reinterpret_cast<const T*>(t.k) + at, reinterpret_cast<const T*>(t.cos) + position,
         reinterpret_cast<const T*>(t.sin) + position, t.head_dim,
         cached<T>(t, t.keys, batch, group, t.past + query));
    __builtin_memcpy(cached<T>(t, t.values, batch, group, t.past + query),
                     reinterpret_cast<const T*>(t.v) + at, t.head_dim * sizeof(T));
  }
  if (t.panels != nullptr) Panels<T>(t, batch, group).pack(t, batch, group);
}

void append_any(const Attention& t, int64_t batch, int64_t group) {
  if (t.type == Type::kF32) return append<float>(t, batch, group);
  append<uint16_t>(t, batch, group);
}

// The rows of one attend(): tokens, and within each the heads of the group.
struct Rows {
  int64_t count;
  float* q;       // [count, kKeyBlock]: rows of a K block, of the operand's type
  float* scores;  // [count, kKeyBlock], then the probabilities
  float* y;       // [count, kMaxHeadSize]
  float *most, *sum;

  Rows(int64_t rows, uint8_t* scratch) : count(rows) {
    q = reinterpret_cast<float*>(scratch);
    scores = q + rows * kKeyBlock;
    y = scores + rows * kKeyBlock;
    most = y + rows * kMaxHeadSize;
    sum = most + rows;
    for (int64_t i = 0; i < rows * kMaxHeadSize; ++i) y[i] = 0.0f;
    for (int64_t i = 0; i < rows; ++i) most[i] = kMasked, sum[i] = 0.0f;
  }
};

// Turns one row's scores of `keys` keys into probabilities up to a factor, zeros up to `padded`,
// and lets what the row has so far shrink to the same factor.
void soften_row(Rows& rows, int64_t r, int64_t keys, int64_t padded, const uint8_t* kept,
                float scale, int64_t head_dim) {
  float* const s = rows.scores + r * kKeyBlock;
  for (int64_t i = keys; i < padded; ++i) s[i] = 0.0f;
  alignas(kAlign) float mask[kKeyBlock];
  for (int64_t i = 0; i < keys; ++i) {
    mask[i] = kept == nullptr || kept[i] != 0 ? 0.0f : -__builtin_inff();
  }
  end_mask(mask, keys);
  const float before = rows.most[r];
  rows.most[r] = raise_maximum(s, mask, keys, scale, before);
  const float sum = exponentials<false>(s, keys, rows.most[r]);
  const float shrink = shrinkage(before, rows.most[r]);
  rows.sum[r] = __builtin_fmaf(rows.sum[r], shrink, sum);
  float* const y = rows.y + r * kMaxHeadSize;
  for (int64_t i = 0; i < head_dim; ++i) y[i] *= shrink;
}

// Scores and results from the cache as it is, for few rows: each key is read once for up to four.
template <class T>
struct FromCache {
  static constexpr int kRows = 4;
  static constexpr int kVecs = Vec::kLanes == 16 ? 4 : 2;
  using Query = float;
  const Attention& t;
  int64_t batch, group, first;

  FromCache(const Attention& call, int64_t b, int64_t g)
      : t(call), batch(b), group(g), first(first_key(call, b)) {}

  template <int R>
  void scores(const Rows& rows, int64_t r, int64_t key, int64_t keys) const {
    const float* q = rows.q + r * kKeyBlock;
    const T* k = cached<T>(t, t.keys, batch, group, key);
    for (int64_t i = 0; i < keys; ++i, k += t.head_dim) {
      F acc[R];
      for (int j = 0; j < R; ++j) acc[j] = Vec::zero();
      for (int64_t c = 0; c < t.head_dim; c += Vec::kLanes) {
        const F value = Vec::load(k + c);
        for (int j = 0; j < R; ++j)
          acc[j] = Vec::fma(value, Vec::load(q + j * kKeyBlock + c), acc[j]);
      }
      for (int j = 0; j < R; ++j) rows.scores[(r + j) * kKeyBlock + i] = Vec::sum(acc[j]);
    }
  }
  template <int R, int N>
  void add(const Rows& rows, int64_t r, int64_t key, int64_t keys, int64_t column) const {
    const float* p = rows.scores + r * kKeyBlock;
    float* y = rows.y + r * kMaxHeadSize + column;
    const T* v = cached<T>(t, t.values, batch, group, key) + column;
    F acc[R][N];
    for (int j = 0; j < R; ++j) {
      for (int n = 0; n < N; ++n) acc[j][n] = Vec::load(y + j * kMaxHeadSize + n * Vec::kLanes);
    }
    for (int64_t i = 0; i < keys; ++i, v += t.head_dim) {
      F value[N];
      for (int n = 0; n < N; ++n) value[n] = Vec::load(v + n * Vec::kLanes);
      for (int j = 0; j < R; ++j) {
        const F weight = Vec::broadcast(p + j * kKeyBlock + i);
        for (int n = 0; n < N; ++n) acc[j][n] = Vec::fma(value[n], weight, acc[j][n]);
      }
    }
    for (int j = 0; j < R; ++j) {
      for (int n = 0; n < N; ++n) Vec::store(y + j * kMaxHeadSize + n * Vec::kLanes, acc[j][n]);
    }
  }
  template <int R>
  void add(const Rows& rows, int64_t r, int64_t key, int64_t keys) const {
    int64_t column = 0;
    for (; column + kVecs * Vec::kLanes <= t.head_dim; column += kVecs * Vec::kLanes) {
      add<R, kVecs>(rows, r, key, keys, column);
    }
    for (; column < t.head_dim; column += Vec::kLanes) add<R, 1>(rows, r, key, keys, column);
  }

  void scores(const Rows& rows, int64_t key, const int64_t* seen) const {
    int64_t r = 0;
    for (; r + kRows <= rows.count; r += kRows) scores<kRows>(rows, r, key, seen[r + kRows - 1]);
    for (; r < rows.count; ++r) scores<1>(rows, r, key, seen[r]);
  }
  void add(const Rows& rows, int64_t key, const int64_t* seen) const {
    int64_t r = 0;
    for (; r + kRows <= rows.count; r += kRows) add<kRows>(rows, r, key, seen[r + kRows - 1]);
    for (; r < rows.count; ++r) add<1>(rows, r, key, seen[r]);
  }
};

// Scores and results from panels, for many rows: the tiles of the matrix product.
// Queries are of the operand's type.
template <class T, class Operand>
struct FromPanels {
  static constexpr Kind kKind = kAttentionKind<T>;
  using Query = Operand;
  const Attention& t;
  Panels<T> panels;
  int64_t first;

  FromPanels(const Attention& call, int64_t b, int64_t g)
      : t(call), panels(call, b, g), first(panels.first) {}

  // Calls body(first row, rows, keys seen by any of them) for each tile that sees a key.
  template <class Body>
  void tiles(const Rows& rows, const int64_t* seen, const Body& body) const {
    constexpr int64_t kMost = Vec::tile_rows(kKind);
    const int64_t count = (rows.count + kMost - 1) / kMost;
    for (int64_t i = 0, r = 0; i < count; ++i) {
      const int64_t many = (rows.count - r) / (count - i);
      if (seen[r + many - 1] > 0) body(r, many, seen[r + many - 1]);
      r += many;
    }
  }

  void scores(const Rows& rows, int64_t key, const int64_t* seen) const {
    for (int64_t k = 0; k < seen[rows.count - 1]; k += kPanel) {
      tiles(rows, seen, [&](int64_t r, int64_t many, int64_t keys) {
        if (k >= keys) return;
        multiply_panels<kKind>(rows.q + r * kKeyBlock, many, panels.key_panel(key + k),
                               panels.key_units, kPanel, rows.scores + r * kKeyBlock + k, kKeyBlock,
                               false);
      });
    }
  }
  void add(const Rows& rows, int64_t key, const int64_t* seen) const {
    if constexpr (kPairs<T>) {  // never ahead of what it reads
      for (int64_t r = 0; r < rows.count; ++r) {
        float* const p = rows.scores + r * kKeyBlock;
        write_row(reinterpret_cast<uint16_t*>(p), p, round_up(seen[rows.count - 1], kPanel));
      }
    }
    for (int64_t column = 0; column < t.head_dim; column += kPanel) {
      tiles(rows, seen, [&](int64_t r, int64_t many, int64_t keys) {
        multiply_panels<kKind>(rows.scores + r * kKeyBlock, many, panels.value_panel(column, key),
                               units_of<T>(keys), kPanel, rows.y + r * kMaxHeadSize + column,
                               kMaxHeadSize, true);
      });
    }
  }
};

template <class T, class Engine>
void attend(const Attention& t, int64_t batch, int64_t group, int64_t first_query, int64_t queries,
            uint8_t* scratch) {
  const Engine engine(t, batch, group);
  const int64_t repeats = t.repeats();
  Rows rows(queries * repeats, scratch);
  int64_t* const seen = reinterpret_cast<int64_t*>(rows.sum + rows.count);
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t row = batch * t.queries + first_query + r / repeats;
    const int64_t head = group * repeats + r % repeats;
    auto* const q = reinterpret_cast<typename Engine::Query*>(rows.q + r * kKeyBlock);
    const int64_t position = t.positions[row] * t.head_dim;
    turn(reinterpret_cast<const T*>(t.q) + (row * t.heads + head) * t.head_dim,
         reinterpret_cast<const T*>(t.cos) + position, reinterpret_cast<const T*>(t.sin) + position,
         t.head_dim, q);
  }
  const int64_t end = end_of_keys(t, first_query + queries - 1);
  for (int64_t key = engine.first; key < end; key += kKeyBlock) {
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t left = end_of_keys(t, first_query + r / repeats) - key;
      seen[r] = left < 0 ? 0 : left < kKeyBlock ? left : kKeyBlock;
    }
    engine.scores(rows, key, seen);
    const int64_t padded = (seen[rows.count - 1] + kPanel - 1) / kPanel * kPanel;
    for (int64_t r = 0; r < rows.count; ++r) {
      const uint8_t* mask = mask_of(t, batch, first_query + r / repeats);
      soften_row(rows, r, seen[r], padded, mask ? mask + key : nullptr, t.scale, t.head_dim);
    }
    engine.add(rows, key, seen);
  }
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t row = batch * t.queries + first_query + r / repeats;
    T* y = reinterpret_cast<T*>(t.y) + (row * t.heads + group * repeats + r % repeats) * t.head_dim;
    const float factor = rows.sum[r] > 0.0f ? 1.0f / rows.sum[r] : 0.0f;
    for (int64_t c = 0; c < t.head_dim; ++c) narrow(rows.y[r * kMaxHeadSize + c] * factor, y + c);
  }
}

template <class T>
void attend(const Attention& t, int64_t batch, int64_t group, int64_t first, int64_t queries,
            uint8_t* scratch) {
  if (t.panels == nullptr) {
    attend<T, FromCache<T>>(t, batch, group, first, queries, scratch);
  } else if constexpr (kPairs<T>) {
    attend<T, FromPanels<T, uint16_t>>(t, batch, group, first, queries, scratch);
  } else {
    attend<T, FromPanels<T, float>>(t, batch, group, first, queries, scratch);
  }
}

void attend_any(const Attention& t, int64_t batch, int64_t group, int64_t first, int64_t queries,
                uint8_t* scratch) {
  if (t.type == Type::kF32) return attend<float>(t, batch, group, first, queries, scratch);
  attend<uint16_t>(t, batch, group, first, queries, scratch);
}

}  // namespace
}  // namespace finegates
