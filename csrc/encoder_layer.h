// A whole encoder layer with the norms after the residuals (BERT, RoBERTa):
//
//   h = norm1(x + output(attention(query(x), key(x), value(x))))
//   y = norm2(h + down(act(up(h))))
//
// where every Linear is packed, and query, key and value write the layout of whole heads.
#pragma once

#include "kernels.h"

namespace finegates {

struct PackedBytes {
  const void* data;
  size_t bytes;
};

struct EncoderLayerArgs {
  PackedBytes query, key, value, output, up, down;
  const void* norm_weight[2];  // [features], of `type`
  const void* norm_bias[2];
  float eps[2];
  Activation activation;
  int64_t heads, head_size;
  float scale;    // of the scores
  Type type;      // of x, y and the norms
  const void* x;  // [sequences, length, features]
  void* y;        // the same; not x
  int64_t sequences, length, features;
  Mask mask_type;
  const void* mask;
  int64_t mask_strides[3];  // of sequences, heads and rows, in bytes
};

// A sequence's result is bitwise the same whatever the batch, the padding behind it and the number
// of threads. Throws std::invalid_argument for sizes that do not fit each other and std::bad_alloc.
void encoder_layer(const EncoderLayerArgs& args);

}  // namespace finegates
