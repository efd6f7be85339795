// finegates._C: pointers in, pointers out. finegates/ops/_cpu.py and _cpu_blocks.py call it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "decoder.h"
#include "encoder_layer.h"
#include "isa.h"
#include "layout.h"
#include "probe.h"
#include "pruned_linear.h"

namespace py = pybind11;

namespace {

using finegates::Activation;
using finegates::Type;

Type type_of(int64_t code, int most = 1) {
  if (code < 0 || code > most) throw std::invalid_argument("unknown dtype code");
  return static_cast<Type>(code);
}

// given: bit 0 a bias, bit 1 row indices, bit 2 column indices (an empty tensor has no pointer).
finegates::LayerShape shape_of(int type, int64_t rows, int64_t columns, int64_t out_features,
                               int64_t in_features, int given, uintptr_t row_index,
                               uintptr_t column_index) {
  return {type_of(type, 2),
          rows,
          columns,
          out_features,
          in_features,
          (given & 1) != 0,
          (given & 2) != 0,
          (given & 4) != 0,
          reinterpret_cast<const int32_t*>(row_index),
          reinterpret_cast<const int32_t*>(column_index)};
}

size_t packed_bytes(int type, int64_t rows, int64_t columns, int64_t out_features,
                    int64_t in_features, int given, uintptr_t row_index, uintptr_t column_index) {
  return finegates::packed_bytes(
      shape_of(type, rows, columns, out_features, in_features, given, row_index, column_index));
}

void pack(int type, int64_t rows, int64_t columns, int64_t out_features, int64_t in_features,
          int given, uintptr_t row_index, uintptr_t column_index, uintptr_t weight, uintptr_t bias,
          uintptr_t scale, uintptr_t buffer, size_t bytes) {
  finegates::pack(
      shape_of(type, rows, columns, out_features, in_features, given, row_index, column_index),
      reinterpret_cast<const void*>(weight), reinterpret_cast<const float*>(bias),
      reinterpret_cast<const float*>(scale), reinterpret_cast<void*>(buffer), bytes);
}

py::dict describe(uintptr_t packed, size_t bytes) {
  const finegates::Packed p = finegates::view(reinterpret_cast<const void*>(packed), bytes);
  py::dict out;
  out["type"] = static_cast<int>(p.type);
  out["rows"] = p.rows;
  out["columns"] = p.columns;
  out["out_features"] = p.out_features;
  out["in_features"] = p.in_features;
  out["has_bias"] = p.has_bias;
  out["has_rows"] = p.has_rows;
  out["has_columns"] = p.has_columns;
  out["bias_offset"] = reinterpret_cast<uintptr_t>(p.bias) - packed;
  out["scale_offset"] = p.scale ? reinterpret_cast<uintptr_t>(p.scale) - packed : 0;
  return out;
}

void unpack(uintptr_t packed, size_t bytes, uintptr_t weight, uintptr_t rows, uintptr_t columns) {
  const finegates::Packed p = finegates::view(reinterpret_cast<const void*>(packed), bytes);
  finegates::unpack_weight(p, reinterpret_cast<void*>(weight));
  finegates::unpack_indices(p, reinterpret_cast<int32_t*>(rows),
                            reinterpret_cast<int32_t*>(columns));
}

void unpack_rows(uintptr_t packed, size_t bytes, uintptr_t rows, int64_t count, uintptr_t weight) {
  finegates::unpack_rows(finegates::view(reinterpret_cast<const void*>(packed), bytes),
                         reinterpret_cast<const int64_t*>(rows), count,
                         reinterpret_cast<void*>(weight));
}

Activation activation_of(int64_t code) {
  if (code < 0 || code > 4) throw std::invalid_argument("unknown activation code");
  return static_cast<Activation>(code);
}

// The one call that matters a microsecond: plain C, since pybind11 takes 0.2 us for 11 numbers.
// packed, bytes, x, m, in_features, x_stride, type, y, out_features, residual, activation
PyObject* pruned_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kCount = 11;
  if (count != kCount) return PyErr_Format(PyExc_TypeError, "pruned_linear takes 11 integers");
  int64_t v[kCount];
  for (Py_ssize_t i = 0; i < kCount; ++i) {
    v[i] = PyLong_AsLongLong(args[i]);
    if (v[i] == -1 && PyErr_Occurred()) return nullptr;
  }
  try {
    const finegates::LinearArgs call = {reinterpret_cast<const void*>(v[0]),
                                        static_cast<size_t>(v[1]),
                                        reinterpret_cast<const void*>(v[2]),
                                        v[3],
                                        v[4],
                                        v[5],
                                        type_of(v[6]),
                                        reinterpret_cast<void*>(v[7]),
                                        v[8],
                                        reinterpret_cast<const void*>(v[9]),
                                        activation_of(v[10]),
                                        nullptr,
                                        0};
    py::gil_scoped_release unlocked;
    finegates::pruned_linear(call);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyMethodDef pruned_linear_method = {
    "pruned_linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(pruned_linear)),
    METH_FASTCALL, nullptr};

void pruned_glu(uintptr_t gate, size_t gate_bytes, uintptr_t up, size_t up_bytes, uintptr_t x,
                int64_t m, int64_t in_features, int64_t x_stride, int type, uintptr_t y,
                int64_t out_features, int activation) {
  if (up == 0) throw std::invalid_argument("packed buffer: too short for a header");
  finegates::pruned_linear(
      {reinterpret_cast<const void*>(gate), gate_bytes, reinterpret_cast<const void*>(x), m,
       in_features, x_stride, type_of(type), reinterpret_cast<void*>(y), out_features, nullptr,
       activation_of(activation), reinterpret_cast<const void*>(up), up_bytes});
}

// layers: packed, bytes, y and out_features of each, one after the other.
void pruned_linears(const std::vector<uintptr_t>& layers, uintptr_t x, int64_t m,
                    int64_t in_features, int64_t x_stride, int type) {
  if (layers.size() % 4 != 0) throw std::invalid_argument("four numbers for each layer");
  std::vector<finegates::LinearArgs> args;
  for (size_t i = 0; i < layers.size(); i += 4) {
    args.push_back({reinterpret_cast<const void*>(layers[i]), layers[i + 1],
                    reinterpret_cast<const void*>(x), m, in_features, x_stride, type_of(type),
                    reinterpret_cast<void*>(layers[i + 2]), static_cast<int64_t>(layers[i + 3]),
                    nullptr, Activation::kNone, nullptr, 0});
  }
  finegates::pruned_linears(args.data(), static_cast<int>(args.size()));
}

// packed: query, key, value, output, up and down, addresses then sizes. norms: weight and bias of
// both. sizes: sequences, length, features, heads, head_size. strides of the mask in bytes.
void encoder_layer(const std::array<uintptr_t, 12>& packed, const std::array<uintptr_t, 4>& norms,
                   std::array<float, 2> eps, const std::array<int64_t, 5>& sizes, float scale,
                   int activation, int type, uintptr_t x, uintptr_t y, int mask_type,
                   uintptr_t mask, std::array<int64_t, 3> mask_strides) {
  if (mask_type < 0 || mask_type > 3) throw std::invalid_argument("unknown mask code");
  const auto layer = [&](int i) {
    return finegates::PackedBytes{reinterpret_cast<const void*>(packed[i]), packed[i + 6]};
  };
  finegates::EncoderLayerArgs args;
  args.query = layer(0);
  args.key = layer(1);
  args.value = layer(2);
  args.output = layer(3);
  args.up = layer(4);
  args.down = layer(5);
  for (int i = 0; i < 2; ++i) {
    args.norm_weight[i] = reinterpret_cast<const void*>(norms[2 * i]);
    args.norm_bias[i] = reinterpret_cast<const void*>(norms[2 * i + 1]);
    args.eps[i] = eps[i];
  }
  args.activation = activation_of(activation);
  args.heads = sizes[3];
  args.head_size = sizes[4];
  args.scale = scale;
  args.type = type_of(type);
  args.x = reinterpret_cast<const void*>(x);
  args.y = reinterpret_cast<void*>(y);
  args.sequences = sizes[0];
  args.length = sizes[1];
  args.features = sizes[2];
  args.mask_type = static_cast<finegates::Mask>(mask_type);
  args.mask = reinterpret_cast<const void*>(mask);
  std::copy_n(mask_strides.data(), 3, args.mask_strides);
  finegates::encoder_layer(args);
}

// layers: a table of DecoderLayer. cache: addresses of keys and values of each layer. sizes: batch,
// queries, heads, groups, head_dim. mask_sizes: tokens, strides of batch entries and of queries.
void decoder(uintptr_t layers, int64_t count, const std::vector<uintptr_t>& cache,
             uintptr_t end_norm, uintptr_t x, uintptr_t y, int64_t hidden, float eps,
             int activation, int type, const std::array<int64_t, 5>& sizes, int64_t past,
             int64_t capacity, uintptr_t cos, uintptr_t sin, int64_t rope_positions,
             uintptr_t positions, uintptr_t mask, const std::array<int64_t, 3>& mask_sizes,
             bool causal, float scale, uintptr_t stage_seconds) {
  if (static_cast<int64_t>(cache.size()) != 2 * count) {
    throw std::invalid_argument("two addresses for each layer");
  }
  finegates::Attention attention = {};
  attention.type = type_of(type);
  attention.batch = sizes[0];
  attention.queries = sizes[1];
  attention.heads = sizes[2];
  attention.groups = sizes[3];
  attention.head_dim = sizes[4];
  attention.past = past;
  attention.capacity = capacity;
  attention.cos = reinterpret_cast<const uint8_t*>(cos);
  attention.sin = reinterpret_cast<const uint8_t*>(sin);
  attention.positions = reinterpret_cast<const int64_t*>(positions);
  attention.mask = reinterpret_cast<const uint8_t*>(mask);
  attention.mask_batch_stride = mask_sizes[1];
  attention.mask_query_stride = mask_sizes[2];
  attention.causal = causal;
  attention.scale = scale;
  finegates::decoder({reinterpret_cast<const finegates::DecoderLayer*>(layers), count,
                      reinterpret_cast<void* const*>(cache.data()),
                      reinterpret_cast<const void*>(end_norm), reinterpret_cast<const void*>(x),
                      reinterpret_cast<void*>(y), hidden, eps, activation_of(activation),
                      rope_positions, mask_sizes[0], attention,
                      reinterpret_cast<double*>(stage_seconds)});
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  // An unknown FINEGATES_MAX_ISA or FINEGATES_TUNE fails here, once, as an import error.
  finegates::kernels();
  finegates::tune();
  using unlocked = py::call_guard<py::gil_scoped_release>;
  m.def("isa", [] { return std::string(finegates::kernels().name); });
  m.def("tune",
        [] { return std::string(finegates::tune() == finegates::Tune::kZen4 ? "zen4" : "zen5"); });
  m.def("packed_bytes", &packed_bytes, unlocked());
  m.def("pack", &pack, unlocked());
  m.def("describe", &describe);
  m.def("unpack", &unpack, unlocked());
  m.def("unpack_rows", &unpack_rows, unlocked());
  m.add_object("pruned_linear",
               py::reinterpret_steal<py::object>(PyCFunction_New(&pruned_linear_method, nullptr)));
  m.def("pruned_linears", &pruned_linears, unlocked());
  m.def("pruned_glu", &pruned_glu, unlocked());
  m.def("encoder_layer", &encoder_layer, unlocked());
  m.def("decoder", &decoder, unlocked());
  m.def(
      "probe_flops",
      [](bool dot) {
        return finegates::probe_flops(dot ? finegates::Arithmetic::kDot
                                          : finegates::Arithmetic::kFma);
      },
      unlocked());
  m.def(
      "probe_read",
      [](uintptr_t data, size_t bytes, int streams, size_t ahead) {
        return finegates::probe_read(reinterpret_cast<const uint8_t*>(data), bytes, streams, ahead);
      },
      unlocked());
}
