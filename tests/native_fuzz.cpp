// Seeded, time-bounded fuzz of the native core without Python: right answers, bitwise equal rows,
// and hostile arguments that must end in std::invalid_argument. Buffers have their exact sizes, so
// that AddressSanitizer sees any step outside; with threads it is ThreadSanitizer's stress test.
//
//   native_fuzz SECONDS SEED THREADS
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../csrc/decoder.h"
#include "../csrc/encoder_layer.h"
#include "../csrc/isa.h"
#include "../csrc/layout.h"
#include "../csrc/pruned_linear.h"
#include "../csrc/scratch.h"

using namespace finegates;

namespace {

using Random = std::mt19937_64;

int64_t draw(Random& random, int64_t low, int64_t high) {
  return low + static_cast<int64_t>(random() % static_cast<uint64_t>(high - low + 1));
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<uint8_t, Free>;

Buffer aligned(size_t bytes) {
  return Buffer(static_cast<uint8_t*>(std::aligned_alloc(kAlign, (bytes + 63) / 64 * 64)));
}

// Exactly `bytes` long, `offset` bytes off the allocation's alignment.
struct Bytes {
  Bytes(size_t bytes, size_t offset) : memory(static_cast<uint8_t*>(std::malloc(bytes + offset))) {
    data = memory.get() + offset;
    if (bytes > 0) std::memset(data, 0xff, bytes);  // NaN in both dtypes
  }
  Buffer memory;
  uint8_t* data;
};

float get(const uint8_t* data, Type type, int64_t i) {
  float value;
  if (type == Type::kF32) {
    std::memcpy(&value, data + 4 * i, 4);
  } else {
    uint16_t half;
    std::memcpy(&half, data + 2 * i, 2);
    const uint32_t bits = uint32_t{half} << 16;
    std::memcpy(&value, &bits, 4);
  }
  return value;
}

void put(uint8_t* data, Type type, int64_t i, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (type == Type::kF32) {
    std::memcpy(data + 4 * i, &bits, 4);
  } else {
    const uint16_t half = static_cast<uint16_t>(bits >> 16);
    std::memcpy(data + 2 * i, &half, 2);
  }
}

std::vector<int32_t> choose(Random& random, int64_t full, int64_t kept) {
  std::vector<int32_t> all(full);
  std::iota(all.begin(), all.end(), 0);
  std::shuffle(all.begin(), all.end(), random);
  all.resize(kept);
  std::sort(all.begin(), all.end());
  return all;
}

double activate(Activation a, double x) {
  switch (a) {
    case Activation::kGelu:
      return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case Activation::kGeluTanh:
      return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kRelu:
      return std::max(x, 0.0);
    default:
      return x;
  }
}

[[noreturn]] void die(const std::string& what) {
  std::fprintf(stderr, "native_fuzz: %s\n", what.c_str());
  std::abort();
}

struct Case {
  int64_t n, k, out, in, m, stride;
  Type weight_type, type;
  Activation activation;
  bool has_rows, has_columns, has_bias, has_residual, pair;
  std::vector<int32_t> rows, columns;
  std::vector<float> weight[2], bias[2];  // of the layer, and of the second of a gated pair
  std::unique_ptr<Bytes> x, residual;
  Buffer packed, up;
  size_t packed_size;

  LinearArgs args(void* y) const {
    return {packed.get(),
            packed_size,
            x->data,
            m,
            in,
            stride,
            type,
            y,
            out,
            has_residual ? residual->data : nullptr,
            activation,
            pair ? up.get() : nullptr,
            pair ? packed_size : 0};
  }
};

// Packs random weights and checks that they come back; the values go to weight and bias.
Buffer pack_random(const LayerShape& shape, Random& random, std::vector<float>& weight,
                   std::vector<float>& bias, size_t* size) {
  std::uniform_real_distribution<float> uniform(-1, 1);
  const int64_t count = shape.rows * shape.columns;
  const size_t bytes = count * type_bytes(shape.type);
  Bytes raw(bytes, 0), back(bytes, 0);
  std::vector<float> scale;
  for (int64_t r = 0; r < shape.rows; ++r) {
    bias.push_back(shape.has_bias ? uniform(random) : 0.0f);
    scale.push_back(std::fabs(uniform(random)) / 127);
    for (int64_t i = r * shape.columns; i < (r + 1) * shape.columns; ++i) {
      if (shape.type == Type::kI8) {
        const int64_t q = draw(random, -127, 127);
        raw.data[i] = static_cast<uint8_t>(q);
        weight.push_back(static_cast<float>(q) * scale[r]);
      } else {
        put(raw.data, shape.type, i, uniform(random));
        weight.push_back(get(raw.data, shape.type, i));
      }
    }
  }
  *size = packed_bytes(shape);
  Buffer packed = aligned(*size);
  pack(shape, raw.data, bias.data(), scale.data(), packed.get(), *size);
  unpack_weight(view(packed.get(), *size), back.data);
  if (bytes > 0 && std::memcmp(back.data, raw.data, bytes)) die("unpacked weight differs");
  return packed;
}

// A layer of at most this many features on either side.
Case make_case(Random& random, int64_t most) {
  Case c;
  c.out = draw(random, 0, most), c.in = draw(random, 0, most);
  c.has_rows = draw(random, 0, 3) > 0, c.has_columns = draw(random, 0, 3) > 0;
  c.n = c.has_rows ? draw(random, 0, c.out) : c.out;
  c.k = c.has_columns ? draw(random, 0, c.in) : c.in;
  c.m = draw(random, 0, 9) == 0 ? draw(random, 0, 300) : draw(random, 0, 30);
  c.stride = c.in + (draw(random, 0, 1) ? draw(random, 0, 20) : 0);
  c.weight_type = static_cast<Type>(draw(random, 0, 2));
  c.type = static_cast<Type>(draw(random, 0, 1));
  c.activation = static_cast<Activation>(draw(random, 0, 4));
  c.has_bias = draw(random, 0, 1), c.has_residual = draw(random, 0, 2) == 0;
  c.pair = draw(random, 0, 3) == 0;
  c.rows = choose(random, c.out, c.n), c.columns = choose(random, c.in, c.k);
  const LayerShape shape = {
      c.weight_type, c.n,        c.k,           c.out,         c.in,
      c.has_bias,    c.has_rows, c.has_columns, c.rows.data(), c.columns.data()};
  c.packed = pack_random(shape, random, c.weight[0], c.bias[0], &c.packed_size);
  if (c.pair) c.up = pack_random(shape, random, c.weight[1], c.bias[1], &c.packed_size);
  std::uniform_real_distribution<float> uniform(-1, 1);
  const size_t element = type_bytes(c.type);
  const size_t offset = element * draw(random, 0, 3);
  c.x.reset(new Bytes(c.m > 0 ? ((c.m - 1) * c.stride + c.in) * element : 0, offset));
  for (int64_t r = 0; r < c.m; ++r) {
    for (const int32_t column : c.columns) {  // removed columns stay NaN
      put(c.x->data, c.type, r * c.stride + column, uniform(random));
    }
  }
  c.residual.reset(new Bytes(c.m * c.out * element, offset));
  for (int64_t i = 0; i < c.m * c.out; ++i) put(c.residual->data, c.type, i, uniform(random));
  return c;
}

void check_values(const Case& c, const uint8_t* y) {
  std::vector<double> expected(c.out), magnitude(c.out);
  for (int64_t r = 0; r < c.m; ++r) {
    std::fill(expected.begin(), expected.end(), 0.0);
    std::fill(magnitude.begin(), magnitude.end(), 0.0);
    for (int64_t i = 0; i < c.n; ++i) {
      double sum[2], scale[2];
      for (int half = 0; half <= c.pair; ++half) {
        sum[half] = c.bias[half][i], scale[half] = std::fabs(sum[half]);
        for (int64_t j = 0; j < c.k; ++j) {
          const double term = double{c.weight[half][i * c.k + j]} *
                              get(c.x->data, c.type, r * c.stride + c.columns[j]);
          sum[half] += term;
          scale[half] += std::fabs(term);
        }
      }
      const double value = activate(c.activation, sum[0]);
      expected[c.rows[i]] = c.pair ? value * sum[1] : value;
      magnitude[c.rows[i]] = c.pair ? scale[0] * scale[1] : scale[0];
    }
    for (int64_t o = 0; o < c.out; ++o) {
      const double want =
          expected[o] + (c.has_residual ? get(c.residual->data, c.type, r * c.out + o) : 0.0);
      const double got = get(y, c.type, r * c.out + o);
      const double rounding = c.type == Type::kF32 ? 1e-6 : 5e-3;
      if (!(std::fabs(got - want) <= rounding * std::fabs(want) + 2e-6 * magnitude[o] + 1e-6)) {
        die("row " + std::to_string(r) + " output " + std::to_string(o) + ": got " +
            std::to_string(got) + ", want " + std::to_string(want));
      }
    }
  }
}

// Two layers of one x in one call give what each gives alone, in other memory, for any number of
// threads. These are threads that the sanitizers see, unlike OpenMP's.
void check_together(const Case& c, const uint8_t* y, Random& random) {
  const size_t bytes = c.m * c.out * type_bytes(c.type);
  Bytes first(bytes, 0), second(bytes, 0);
  const LinearArgs args[] = {c.args(first.data), c.args(second.data)};
  const int threads = draw(random, 0, 9) == 0 ? 17 : draw(random, 1, 4);
  LinearTasks tasks(args, 2);
  tasks.cut(threads);
  std::vector<std::thread> team;
  for (int t = 0; t < threads; ++t) {
    team.emplace_back([&] { tasks.run(thread_scratch(tasks.scratch_bytes())); });
  }
  for (std::thread& member : team) member.join();
  if (bytes > 0 && (std::memcmp(first.data, y, bytes) || std::memcmp(second.data, y, bytes))) {
    die("two layers together on " + std::to_string(threads) + " threads differ from one alone");
  }
}

void check_rows_alone(const Case& c, const uint8_t* y, Random& random) {
  const size_t row_bytes = c.out * type_bytes(c.type);
  for (int i = 0; i < 3 && c.m > 0; ++i) {
    const int64_t r = draw(random, 0, c.m - 1);
    Bytes alone(row_bytes, 0);
    LinearArgs one = c.args(alone.data);
    one.m = 1;
    one.x = c.x->data + r * c.stride * type_bytes(c.type);
    if (c.has_residual) one.residual = c.residual->data + r * row_bytes;
    pruned_linear(one);
    if (row_bytes > 0 && std::memcmp(alone.data, y + r * row_bytes, row_bytes)) {
      die("a row alone differs from the same row in the batch");
    }
  }
}

// Of rows, features or strides: none of them is possible.
int64_t impossible(Random& random) {
  const int64_t sizes[] = {-1, INT64_MIN, INT64_MAX, INT64_MAX / 4 + 1, (int64_t{1} << 40) + 1};
  return sizes[draw(random, 0, 4)];
}

// Whether call() ends in an Error.
template <class Error = std::invalid_argument, class Call>
bool refused(const Call& call) {
  try {
    call();
  } catch (const Error&) {
    return true;
  }
  return false;
}

// Rows of the weight by number are those of the whole weight; a number beyond them is refused.
void check_unpacked_rows(const Case& c, Random& random) {
  const Packed p = view(c.packed.get(), c.packed_size);
  const size_t row_bytes = c.k * type_bytes(p.type);
  Bytes whole(c.n * row_bytes, 0);
  unpack_weight(p, whole.data);
  std::vector<int64_t> rows(c.n > 0 ? draw(random, 0, 20) : 0);
  for (int64_t& row : rows) row = draw(random, 0, c.n - 1);
  Bytes some(rows.size() * row_bytes, 0);
  unpack_rows(p, rows.data(), rows.size(), some.data);
  for (size_t i = 0; i < rows.size() && row_bytes > 0; ++i) {
    if (std::memcmp(some.data + i * row_bytes, whole.data + rows[i] * row_bytes, row_bytes)) {
      die("an unpacked row differs from that row of the weight");
    }
  }
  const int64_t outside[] = {-1, c.n, INT64_MIN, INT64_MAX};
  rows.push_back(outside[draw(random, 0, 3)]);
  std::swap(rows.back(), rows[draw(random, 0, rows.size() - 1)]);
  Bytes more(rows.size() * row_bytes, 0);
  if (!refused<std::out_of_range>([&] { unpack_rows(p, rows.data(), rows.size(), more.data); })) {
    die("a row beyond the weight was unpacked");
  }
}

// What a damaged buffer holds, if it does not contradict itself.
void read_back(Case& c) {
  const Packed p = view(c.packed.get(), c.packed_size);
  c.n = p.rows, c.k = p.columns;
  c.rows.resize(c.n), c.columns.resize(c.k);
  unpack_indices(p, c.rows.data(), c.columns.data());
  Bytes raw(c.n * c.k * type_bytes(p.type), 0);
  unpack_weight(p, raw.data);
  c.weight[0].clear();
  for (int64_t i = 0; i < c.n * c.k; ++i) {
    c.weight[0].push_back(p.type == Type::kI8 ? static_cast<int8_t>(raw.data[i]) * p.scale[i / c.k]
                                              : get(raw.data, p.type, i));
  }
  c.bias[0].assign(p.bias, p.bias + c.n);
}

// A damaged buffer is refused or multiplied as what it holds now; a wrong argument is refused.
void hostile(Random& random) {
  Case c = make_case(random, 60);
  std::uniform_real_distribution<float> uniform(-1, 1);
  for (int64_t r = 0; r < c.m; ++r) {
    for (int64_t i = 0; i < c.in; ++i) put(c.x->data, c.type, r * c.stride + i, uniform(random));
  }
  Bytes y(c.m * c.out * type_bytes(c.type), 0);
  LinearArgs args = c.args(y.data);
  uint8_t* const packed = c.packed.get();
  const int64_t tables =
      reinterpret_cast<const uint8_t*>(view(packed, c.packed_size).bias) - packed;
  bool wrong = true;
  switch (draw(random, 0, 8)) {
    case 0:
      packed[draw(random, 0, tables - 1)] ^= 1 << draw(random, 0, 7);
      wrong = false;
      break;
    case 1:
      for (int i = 0; i < 8; ++i) packed[draw(random, 0, tables - 1)] = random();
      wrong = false;
      break;
    case 2:
      args.packed_bytes = draw(random, 0, c.packed_size - 1);
      break;
    case 3: {
      int64_t& size = draw(random, 0, 1) ? args.in_features : args.out_features;
      size = draw(random, 0, 1) ? impossible(random) : size + 1;
      break;
    }
    case 4:
      args.x_stride = draw(random, 0, 1) ? impossible(random) : c.in - 1;
      break;
    case 5:
      args.m = impossible(random);
      break;
    case 6:
      args.packed = nullptr;
      break;
    case 7:
      wrong = c.m > 0 && c.in > 0 && c.out > 0;
      if (wrong) *(draw(random, 0, 1) ? &args.x : const_cast<const void**>(&args.y)) = nullptr;
      break;
    case 8:
      args.up = packed;
      args.up_bytes = draw(random, 0, c.packed_size - 1);
      break;
  }
  if (refused([&] { pruned_linear(args); })) return;
  if (wrong) die("a wrong argument was taken");
  read_back(c);
  check_values(c, y.data);
}

void hostile_pack(Random& random) {
  const int64_t out = draw(random, 3, 60), in = draw(random, 3, 60);
  const int64_t n = draw(random, 2, out - 1), k = draw(random, 2, in - 1);
  const Type type = static_cast<Type>(draw(random, 0, 2));
  std::vector<int32_t> rows = choose(random, out, n), columns = choose(random, in, k);
  std::vector<float> values(n);
  Bytes weight(n * k * type_bytes(type), 0);
  LayerShape shape = {type, n, k, out, in, true, true, true, rows.data(), columns.data()};
  size_t bytes = packed_bytes(shape);
  const Buffer buffer = aligned(bytes + kAlign);
  uint8_t* target = buffer.get();
  const void* from = weight.data;
  const float *bias = values.data(), *scale = values.data();
  const bool of_rows = draw(random, 0, 1);
  std::vector<int32_t>& index = of_rows ? rows : columns;
  const int64_t at = draw(random, 1, index.size() - 1);
  int64_t* const sizes[] = {&shape.rows, &shape.columns, &shape.out_features, &shape.in_features};
  const int32_t outside[] = {-1, INT32_MIN, INT32_MAX, static_cast<int32_t>(of_rows ? out : in)};
  switch (draw(random, 0, 11)) {
    case 0:
      *sizes[draw(random, 0, 3)] = impossible(random);
      break;
    case 1:
      std::swap(index[at - 1], index[at]);
      break;
    case 2:
      index[at] = index[at - 1];
      break;
    case 3:
      index[at] = outside[draw(random, 0, 3)];
      break;
    case 4:
      (of_rows ? shape.row_index : shape.column_index) = nullptr;
      break;
    case 5:
      (of_rows ? shape.has_rows : shape.has_columns) = false;
      break;
    case 6:
      from = nullptr;
      break;
    case 7:
      bias = nullptr;
      break;
    case 8:
      if (type != Type::kI8) return;
      scale = nullptr;
      break;
    case 9:
      target += draw(random, 1, kAlign - 1);
      break;
    case 10:
      bytes = draw(random, 0, bytes - 1);
      break;
    case 11:
      shape.type = static_cast<Type>(3);
      break;
  }
  if (!refused([&] { pack(shape, from, bias, scale, target, bytes); })) {
    die("a wrong layer was packed");
  }
}

// `count` random numbers of a type.
Bytes some_numbers(Random& random, Type type, int64_t count) {
  std::uniform_real_distribution<float> uniform(-1, 1);
  Bytes numbers(count * type_bytes(type), 0);
  for (int64_t i = 0; i < count; ++i) put(numbers.data, type, i, uniform(random));
  return numbers;
}

// A random layer of any weight type that keeps some rows and columns.
Buffer some_layer(Random& random, int64_t out, int64_t in, size_t* size) {
  const int64_t n = draw(random, 0, out), k = draw(random, 0, in);
  const std::vector<int32_t> rows = choose(random, out, n), columns = choose(random, in, k);
  std::vector<float> weight, bias;
  return pack_random({static_cast<Type>(draw(random, 0, 2)), n, k, out, in, true, true, true,
                      rows.data(), columns.data()},
                     random, weight, bias, size);
}

// A sequence comes out of an encoder layer as it does alone, and impossible sizes are refused.
void check_encoder(Random& random) {
  const Type type = static_cast<Type>(draw(random, 0, 1));
  const int64_t heads = draw(random, 1, 3), head = draw(random, 1, 40), width = heads * head;
  const int64_t features = draw(random, 1, 70), inner = draw(random, 1, 90);
  const int64_t sequences = draw(random, 1, 3), length = draw(random, 1, 40);
  const int64_t sides[6][2] = {{width, features}, {width, features}, {width, features},
                               {features, width}, {inner, features}, {features, inner}};
  Buffer layers[6];
  PackedBytes packed[6];
  for (int i = 0; i < 6; ++i) {
    layers[i] = some_layer(random, sides[i][0], sides[i][1], &packed[i].bytes);
    packed[i].data = layers[i].get();
  }
  const int64_t element = type_bytes(type), bytes = length * features * element;
  const Bytes norms = some_numbers(random, type, 4 * features);
  const Bytes x = some_numbers(random, type, sequences * length * features);
  Bytes y(sequences * bytes, 0), alone(bytes, 0);
  const auto norm = [&](int i) { return norms.data + i * features * element; };
  EncoderLayerArgs args = {packed[0],
                           packed[1],
                           packed[2],
                           packed[3],
                           packed[4],
                           packed[5],
                           {norm(0), norm(1)},
                           {norm(2), norm(3)},
                           {1e-5f, 1e-12f},
                           static_cast<Activation>(draw(random, 0, 4)),
                           heads,
                           head,
                           0.3f,
                           type,
                           x.data,
                           y.data,
                           sequences,
                           length,
                           features,
                           Mask::kNone,
                           nullptr,
                           {}};
  encoder_layer(args);
  const int64_t at = draw(random, 0, sequences - 1) * bytes;
  args.x = x.data + at, args.y = alone.data, args.sequences = 1;
  encoder_layer(args);
  if (std::memcmp(alone.data, y.data + at, bytes)) die("a sequence alone differs");
  int64_t* const sizes[] = {&args.heads, &args.head_size, &args.sequences, &args.length,
                            &args.features};
  *sizes[draw(random, 0, 4)] = impossible(random);
  if (!refused([&] { encoder_layer(args); })) die("an impossible encoder ran");
}

// A batch entry comes out of the decoder as it does alone, and impossible sizes are refused.
void check_decoder(Random& random) {
  const Type type = static_cast<Type>(draw(random, 0, 1));
  const int64_t groups = draw(random, 1, 2), heads = groups * draw(random, 1, 3);
  const int64_t head = 2 * draw(random, 1, 32), count = draw(random, 1, 2);
  const int64_t hidden = draw(random, 1, 70), inner = draw(random, 1, 90);
  const int64_t batch = draw(random, 1, 3), queries = draw(random, 1, 30);
  const int64_t past = draw(random, 0, 50), capacity = past + queries + draw(random, 0, 5);
  const int64_t q = heads * head, kv = groups * head;
  const int64_t sides[7][2] = {{q, hidden},     {kv, hidden},    {kv, hidden},   {hidden, q},
                               {inner, hidden}, {inner, hidden}, {hidden, inner}};
  const Bytes norm = some_numbers(random, type, hidden);
  std::vector<Buffer> buffers;
  std::vector<DecoderLayer> layers(count);
  std::vector<Bytes> caches;
  std::vector<void*> cache;
  for (DecoderLayer& layer : layers) {
    layer.attention_norm = layer.mlp_norm = norm.data;
    for (int i = 0; i < 7; ++i) {
      if (i == 5) {  // gate and up keep the same rows and columns
        layer.packed[5] = layer.packed[4], layer.packed_bytes[5] = layer.packed_bytes[4];
        continue;
      }
      size_t size;
      buffers.push_back(some_layer(random, sides[i][0], sides[i][1], &size));
      layer.packed[i] = buffers.back().get();
      layer.packed_bytes[i] = static_cast<int64_t>(size);
    }
    for (int i = 0; i < 2; ++i) {
      caches.push_back(some_numbers(random, type, batch * groups * capacity * head));
      cache.push_back(caches.back().data);
    }
  }
  const int64_t element = type_bytes(type), bytes = queries * hidden * element;
  const Bytes x = some_numbers(random, type, batch * queries * hidden);
  const Bytes cos = some_numbers(random, type, capacity * head);
  const Bytes sin = some_numbers(random, type, capacity * head);
  std::vector<int64_t> positions(batch * queries);
  for (int64_t& position : positions) position = draw(random, 0, capacity - 1);
  Bytes y(batch * bytes, 0), alone(bytes, 0);
  Attention attention = {};
  attention.type = type;
  attention.batch = batch, attention.queries = queries;
  attention.heads = heads, attention.groups = groups, attention.head_dim = head;
  attention.past = past, attention.capacity = capacity;
  attention.cos = cos.data, attention.sin = sin.data;
  attention.positions = positions.data();
  attention.causal = true;
  attention.scale = 0.3f;
  DecoderArgs args = {layers.data(), count, cache.data(),      norm.data, x.data, y.data,
                      hidden,        1e-5f, Activation::kSilu, capacity,  0,      attention,
                      nullptr};
  decoder(args);
  const int64_t b = draw(random, 0, batch - 1);
  for (void*& tokens : cache) {
    tokens = static_cast<uint8_t*>(tokens) + b * groups * capacity * head * element;
  }
  args.x = x.data + b * bytes, args.y = alone.data;
  args.attention.batch = 1, args.attention.positions += b * queries;
  decoder(args);
  if (std::memcmp(alone.data, y.data + b * bytes, bytes)) die("a batch entry alone differs");
  Attention& a = args.attention;
  int64_t* const sizes[] = {&args.count, &args.hidden, &a.batch,    &a.queries,
                            &a.heads,    &a.groups,    &a.head_dim, &a.past};
  *sizes[draw(random, 0, 7)] = impossible(random);
  if (!refused([&] { decoder(args); })) die("an impossible decoder ran");
}

void work(double seconds, uint64_t seed, int64_t* cases) {
  Random random(seed);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  for (; std::chrono::steady_clock::now() < end; ++*cases) {
    const Case c = make_case(random, draw(random, 0, 9) == 0 ? 1700 : 130);
    Bytes y(c.m * c.out * type_bytes(c.type), 0);
    pruned_linear(c.args(y.data));
    check_values(c, y.data);
    check_rows_alone(c, y.data, random);
    check_together(c, y.data, random);
    check_unpacked_rows(c, random);
    for (int i = 0; i < 5; ++i) hostile(random);
    for (int i = 0; i < 5; ++i) hostile_pack(random);
    check_encoder(random);
    check_decoder(random);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 5;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  const int threads = argc > 3 ? std::atoi(argv[3]) : 1;
  std::vector<int64_t> cases(threads, 0);
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t) {
    workers.emplace_back(work, seconds, seed + t, &cases[t]);
  }
  for (std::thread& worker : workers) worker.join();
  std::printf("native_fuzz: %lld cases on %s\n",
              static_cast<long long>(std::accumulate(cases.begin(), cases.end(), int64_t{0})),
              kernels().name);
}
