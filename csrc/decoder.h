// A stack of Llama layers for new tokens over a cache, one parallel region for all of it:
//
//   x += o(attention(rope(q(n)), rope(k(n)), v(n))),  n = norm(x)
//   x += down(act(gate(n)) * up(n)),                  n = norm(x)
//
// and a norm at the end. New keys and values are written into the cache.
#pragma once

#include "kernels.h"

namespace finegates {

struct DecoderLayer {
  // Packed q, k, v, o, gate, up, down: addresses, then bytes.
  const void* packed[7];
  int64_t packed_bytes[7];
  const void* attention_norm;  // [hidden]
  const void* mlp_norm;        // [hidden]
};

struct DecoderArgs {
  const DecoderLayer* layers;
  int64_t count;
  void* const* cache;    // keys and values of each layer
  const void* end_norm;  // [hidden]
  const void* x;         // [batch, queries, hidden]
  void* y;               // like x, not x itself
  int64_t hidden;
  float eps;
  Activation activation;
  int64_t rope_positions;  // rows of cos and sin
  int64_t mask_tokens;     // entries of each row of the mask
  Attention attention;     // without q, k, v, y, keys, values and panels
  // Null, or room for what each stage takes. Of a layer: norm; query, key and value; attention;
  // output; norm; gate and up; down. Last the norm at the end.
  double* stage_seconds;
};

// Throws std::invalid_argument before anything is written, and std::bad_alloc.
void decoder(const DecoderArgs& args);

}  // namespace finegates
