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

#include "../csrc/isa.h"
#include "../csrc/layout.h"
#include "../csrc/pruned_linear.h"

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
  bool has_rows, has_columns, has_bias, has_residual;
  std::vector<int32_t> rows, columns;
  std::vector<float> weight, bias;
  std::unique_ptr<Bytes> x, residual;
  Buffer packed;
  size_t packed_size;

  LinearArgs args(void* y) const {
    return {packed.get(), packed_size, x->data, m,   in,
            stride,       type,        y,       out, has_residual ? residual->data : nullptr,
            activation};
  }
};

Case make_case(Random& random) {
  Case c;
  const int64_t most = draw(random, 0, 9) == 0 ? 1500 : 130;
  c.out = draw(random, 0, most), c.in = draw(random, 0, most);
  c.has_rows = draw(random, 0, 3) > 0, c.has_columns = draw(random, 0, 3) > 0;
  c.n = c.has_rows ? draw(random, 0, c.out) : c.out;
  c.k = c.has_columns ? draw(random, 0, c.in) : c.in;
  c.m = draw(random, 0, 9) == 0 ? draw(random, 0, 300) : draw(random, 0, 30);
  c.stride = c.in + (draw(random, 0, 1) ? draw(random, 0, 20) : 0);
  c.weight_type = static_cast<Type>(draw(random, 0, 1));
  c.type = static_cast<Type>(draw(random, 0, 1));
  c.activation = static_cast<Activation>(draw(random, 0, 4));
  c.has_bias = draw(random, 0, 1), c.has_residual = draw(random, 0, 2) == 0;
  c.rows = choose(random, c.out, c.n), c.columns = choose(random, c.in, c.k);
  std::uniform_real_distribution<float> uniform(-1, 1);
  Bytes weight(c.n * c.k * type_bytes(c.weight_type), 0);
  for (int64_t i = 0; i < c.n * c.k; ++i) {
    put(weight.data, c.weight_type, i, uniform(random));
    c.weight.push_back(get(weight.data, c.weight_type, i));
  }
  for (int64_t i = 0; i < c.n; ++i) c.bias.push_back(uniform(random));
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
  const LayerShape shape = {
      c.weight_type, c.n,        c.k,           c.out,         c.in,
      c.has_bias,    c.has_rows, c.has_columns, c.rows.data(), c.columns.data()};
  c.packed_size = packed_bytes(shape);
  c.packed.reset(static_cast<uint8_t*>(std::aligned_alloc(64, (c.packed_size + 63) / 64 * 64)));
  pack(shape, weight.data, c.bias.data(), c.packed.get(), c.packed_size);
  Bytes back(c.n * c.k * type_bytes(c.weight_type), 0);
  unpack_weight(view(c.packed.get(), c.packed_size), back.data);
  if (c.n * c.k > 0 && std::memcmp(back.data, weight.data, c.n * c.k * type_bytes(c.weight_type))) {
    die("unpacked weight differs");
  }
  return c;
}

void check_values(const Case& c, const uint8_t* y) {
  std::vector<double> expected(c.out), magnitude(c.out);
  for (int64_t r = 0; r < c.m; ++r) {
    std::fill(expected.begin(), expected.end(), 0.0);
    std::fill(magnitude.begin(), magnitude.end(), 0.0);
    for (int64_t i = 0; i < c.n; ++i) {
      double sum = c.has_bias ? c.bias[i] : 0.0, scale = std::fabs(sum);
      for (int64_t j = 0; j < c.k; ++j) {
        const double term =
            double{c.weight[i * c.k + j]} * get(c.x->data, c.type, r * c.stride + c.columns[j]);
        sum += term;
        scale += std::fabs(term);
      }
      expected[c.rows[i]] = activate(c.activation, sum);
      magnitude[c.rows[i]] = scale;
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

// Damages the tables, not the weights: every outcome but a crash or a step outside is fine.
void hostile(const Case& c, uint8_t* y, Random& random) {
  const size_t tables = view(c.packed.get(), c.packed_size).panels - c.packed.get();
  Buffer copy(static_cast<uint8_t*>(std::aligned_alloc(64, (c.packed_size + 63) / 64 * 64)));
  std::memcpy(copy.get(), c.packed.get(), c.packed_size);
  LinearArgs args = c.args(y);
  args.packed = copy.get();
  const int64_t huge[] = {-1, INT64_MIN, INT64_MAX, int64_t{1} << 40, c.in + 1, 0};
  switch (draw(random, 0, 5)) {
    case 0:
      copy.get()[draw(random, 0, tables - 1)] ^= 1 << draw(random, 0, 7);
      break;
    case 1:
      for (int i = 0; i < 8; ++i) copy.get()[draw(random, 0, tables - 1)] = random();
      break;
    case 2:
      args.packed_bytes = draw(random, 0, c.packed_size - 1);
      break;
    case 3:
      (draw(random, 0, 1) ? args.in_features : args.out_features) = huge[draw(random, 0, 4)];
      break;
    case 4:
      args.x_stride = draw(random, 0, 1) ? -1 : c.in - 1;
      break;
    case 5:
      args.m = draw(random, 0, 1) ? -1 : INT64_MAX;
      break;
  }
  try {
    pruned_linear(args);
  } catch (const std::invalid_argument&) {
  }
}

void work(double seconds, uint64_t seed, int64_t* cases) {
  Random random(seed);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  for (; std::chrono::steady_clock::now() < end; ++*cases) {
    const Case c = make_case(random);
    Bytes y(c.m * c.out * type_bytes(c.type), 0);
    pruned_linear(c.args(y.data));
    check_values(c, y.data);
    check_rows_alone(c, y.data, random);
    for (int i = 0; i < 5; ++i) hostile(c, y.data, random);
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
